"""Processes of rank.py, and what they answer."""

import json
import os
import subprocess
import sys

HERE = os.path.dirname(os.path.abspath(__file__))
EXAMPLES = os.path.join(HERE, "..", "..", "cpp_examples")


class Ended(Exception):
    pass


class Process:
    def __init__(self, rank, rows, cols, timeout_ms, launch=()):
        self.rank = rank
        command = [*launch, sys.executable, os.path.join(HERE, "rank.py"), str(rank), str(rows), str(cols)]
        env = os.environ | {"TIMEOUT_MS": str(timeout_ms), "PYTHONPATH": EXAMPLES, "OPENBLAS_NUM_THREADS": "1"}
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env)

    def tell(self, line):
        self.process.stdin.write(line + "\n")
        self.process.stdin.flush()

    def hear(self, failing=False):
        """Its answer. One that has failed is an error, unless it is `failing`: then its text is what it failed with, if it did."""
        line = self.process.stdout.readline()
        while line and not line.startswith("{"):  # UCX logs to stdout
            print(f"  rank {self.rank}'s UCX: {line.strip()}")
            line = self.process.stdout.readline()
        if not line:
            raise Ended(f"rank {self.rank} ended")
        answer = json.loads(line)
        if "failed" in answer and not failing:
            raise Ended(f"rank {self.rank}: {answer['failed']}")
        return answer

    def kill(self):
        self.process.kill()
        self.process.wait()
        self.process.stdin.close()
        self.process.stdout.close()

    def end(self):
        self.process.stdin.close()
        status = self.process.wait(20)
        self.process.stdout.close()
        if status != 0:
            raise Ended(f"rank {self.rank} ended with {status}")


def ask(processes, line):
    """Tells all the same; their answers in order."""
    for process in processes:
        process.tell(line)
    return [process.hear() for process in processes]
