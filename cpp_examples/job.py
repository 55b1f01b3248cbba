#!/usr/bin/env python3
"""The job: six trainer processes put SmolLM2's weights into a C++ engine, twice change them, and the engine's text follows.

Starts the processes of trainer.py and engine/main.cpp, tells them what to do over pipes, compares what they answer. When one fails, all
are ended and the failure is printed.
"""

import argparse
import json
import os
import secrets
import selectors
import signal
import subprocess
import sys
import time

from tokenizer import Tokenizer

HERE = os.path.dirname(os.path.abspath(__file__))
TP, PP = 3, 2  # the trainer's cut
TRAINERS = TP * PP
PATIENCE = 150  # seconds for any answer; the library's own deadlines are shorter and say more


class JobError(Exception):
    pass


class Worker:
    """A process that answers lines."""

    def __init__(self, name, command, environment, fd=None):
        self.name = name
        self.process = subprocess.Popen(
            command,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            bufsize=0,
            pass_fds=() if fd is None else (fd,),
        )
        self._unread = b""

    def send(self, line):
        try:
            self.process.stdin.write(line.encode() + b"\n")
        except BrokenPipeError:
            pass  # its end is read from stdout

    def lines(self):
        """What it has said since; None at its end."""
        data = os.read(self.process.stdout.fileno(), 1 << 16)
        if not data:
            return None
        *lines, self._unread = (self._unread + data).split(b"\n")
        return [line.decode() for line in lines]

    def how_it_ended(self):
        status = self.process.wait()
        return f"ended by {signal.Signals(-status).name}" if status < 0 else f"ended with status {status}"

    def end(self):
        self.process.stdin.close()  # that is its signal to leave
        try:
            self.process.wait(2)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.process.stdout.close()


class Progress:
    """One line that is rewritten on a terminal and left out elsewhere: the share of all bytes that are sent or received."""

    def __init__(self, title):
        self._title, self._state = title, {}

    def update(self, worker, done, total):
        self._state[worker] = done, total
        done, total = (sum(x) for x in zip(*self._state.values()))
        if sys.stdout.isatty() and total:
            bar = "#" * (30 * done // total)
            print(f"\r  {self._title} [{bar:30}] {100 * done // total} %", end="", flush=True)

    def close(self):
        if sys.stdout.isatty():
            print("\r\x1b[K", end="", flush=True)


def ask(workers, command, title=""):
    """Sends a command to all workers at once; their answers, without the "ok", in order."""
    for worker in workers:
        worker.send(command)
    answers, errors, progress = {}, {}, Progress(title)
    deadline = time.monotonic() + PATIENCE
    with selectors.DefaultSelector() as selector:
        for worker in workers:
            selector.register(worker.process.stdout, selectors.EVENT_READ, worker)
        while selector.get_map() and time.monotonic() < deadline:
            for key, _ in selector.select(max(0.0, deadline - time.monotonic())):
                worker = key.data
                lines = worker.lines()
                if lines is None:
                    errors[worker] = worker.how_it_ended()
                    selector.unregister(worker.process.stdout)
                for line in lines or []:
                    kind, _, rest = line.partition(" ")
                    if kind == "progress":
                        progress.update(worker, *map(int, rest.split()))
                        continue
                    (answers if kind == "ok" else errors)[worker] = rest
                    selector.unregister(worker.process.stdout)
                if errors:  # what the others say within moments often tells why
                    deadline = min(deadline, time.monotonic() + 8)
    progress.close()
    if errors or len(answers) < len(workers):
        missing = {w: "no answer" for w in workers if w not in answers and w not in errors}
        said = "\n".join(f"  {w.name}: {text}" for w, text in {**errors, **missing}.items())
        raise JobError(f"`{command.split()[0]}` failed:\n{said}")
    return [answers[worker] for worker in workers]


class Job:
    def __init__(self, options):
        self.options = options
        self.tokenizer = Tokenizer(os.path.join(options.model, "tokenizer.json"))
        self.name = f"smollm2-{os.getpid()}-{secrets.token_hex(4)}"
        self.workers = []
        self.syncs = []  # (version, statistics of all ranks)

    def start(self, name, command, fd=None):
        library = os.path.join(self.options.prefix, "lib", "libreshard.so")
        environment = {**os.environ, "RESHARD_LIBRARY": library}
        self.workers.append(Worker(name, [str(word) for word in command], environment, fd))
        return self.workers[-1]

    def start_engines(self, arguments, title):
        """One process for each engine rank; `arguments` of a rank."""
        count = self.options.engines
        program = [os.path.join(self.options.engine, "engine_rank"), "--model", self.options.model, "--ranks", count]
        team = os.memfd_create("engine-team")
        try:
            return [
                self.start(f"{title} rank {rank}", [*program, "--rank", rank, "--team-fd", team, *arguments(rank)], team)
                for rank in range(count)
            ]
        finally:
            os.close(team)

    def start_trainers(self, world):
        program = [sys.executable, os.path.join(HERE, "trainer.py"), "--model", self.options.model, "--comm", self.name]
        program += ["--world", world, "--tp", TP, "--pp", PP]
        held = self.options.engines if self.options.colocated else 0
        team = os.memfd_create("engine-team")
        library = os.path.join(self.options.engine, "libengine.so")
        engine = ["--engine-ranks", held, "--engine-library", library, "--team-fd", team]
        try:
            return [
                self.start(
                    f"trainer rank {rank}",
                    [*program, "--rank", rank, *(["--engine-rank", rank, *engine] if rank < held else [])],
                    team,
                )
                for rank in range(TRAINERS)
            ]
        finally:
            os.close(team)

    def generate(self, engines):
        prompt = self.tokenizer.chat(self.options.prompt)
        answers = ask(engines, " ".join(map(str, ["generate", self.options.tokens, *prompt])))
        ids = [[int(word) for word in answer.split()] for answer in answers]
        if any(x != ids[0] for x in ids):
            raise JobError("the engine's ranks disagree on the tokens")
        return ids[0]

    def reference(self):
        """What an engine says that read the weights from the file."""
        engines = self.start_engines(lambda rank: ["--reference"], "reference")
        ids = self.generate(engines)
        for engine in engines:
            engine.end()
        self.workers.clear()
        return ids

    def version(self, number, trainers, engines, what):
        """Syncs a version, checks the engine's parameters, generates."""
        everyone = trainers if self.options.colocated else trainers + engines
        statistics = [json.loads(answer) for answer in ask(everyone, f"sync {number}", f"version {number}")]
        self.syncs.append((number, statistics))
        params = sum(map(int, ask(engines, f"check {number}")))
        ids = self.generate(engines)
        print(f"\nversion {number}, {what}: {params} parameters whole, at their first addresses, padding untouched")
        print("  " + self.tokenizer.decode(ids).strip().replace("\n", "\n  "), flush=True)
        return ids

    def run(self):
        colocated, count = self.options.colocated, self.options.engines
        print(f"trainer: {TRAINERS} processes, tensor parallel {TP}, pipeline parallel {PP}")
        print(f"engine:  {count} ranks, tensor parallel, {'in the trainer processes' if colocated else 'processes of their own'}")
        print(f"prompt:  {self.options.prompt}", flush=True)
        reference = self.reference()
        print(f"reference, from the file:\n  {self.tokenizer.decode(reference).strip()}".replace("\n", "\n  "), flush=True)

        world = TRAINERS if colocated else TRAINERS + count
        trainers = self.start_trainers(world)
        if colocated:
            engines = trainers[:count]
        else:
            engines = self.start_engines(
                lambda rank: ["--comm", self.name, "--comm-rank", TRAINERS + rank, "--world", world], "engine"
            )
        ask(self.workers, "connect")

        first = self.version(1, trainers, engines, "the trainer's weights")
        expect(first == reference, "version 1 and the reference give different tokens")
        ask(trainers, "change")
        second = self.version(2, trainers, engines, "every MLP weakened by a fifth")
        expect(second != first, "changed weights give the same tokens: with so few it may not show yet, try more --tokens")
        ask(trainers, "restore")
        third = self.version(3, trainers, engines, "restored")
        expect(third == first, "the trainer restored its weights, the first tokens did not come back")
        print(f"\nall {len(first)} tokens: version 1 = reference, version 2 differs, version 3 = version 1\n")
        self.print_table(sum(map(float, ask(engines, "memcpy"))))

    def print_table(self, memcpy):
        columns = ("sync", "MB moved", "seconds", "GB/s", "memcpy GB/s", "plan ms", "staging MB a rank")
        print("  ".join(columns))
        for version, ranks in self.syncs:
            moved = sum(rank["bytes"]["landed"] for rank in ranks)
            seconds = max(rank["seconds"] for rank in ranks)
            plan = max(rank["plan_seconds"] for rank in ranks)
            staging = max(rank["staging_bytes"] for rank in ranks)
            values = (
                f"{version}", f"{moved / 1e6:.1f}", f"{seconds:.3f}", f"{moved / 1e9 / seconds:.2f}",
                f"{memcpy / 1e9:.2f}", f"{plan * 1e3:.1f}", f"{staging / 1e6:.1f}",
            )  # fmt: skip
            print("  ".join(value.rjust(len(column)) for value, column in zip(values, columns)))

    def end(self):
        for worker in self.workers:
            worker.process.terminate()
        for worker in self.workers:
            worker.end()


def expect(condition, otherwise):
    if not condition:
        raise JobError(otherwise)


def main():
    parser = argparse.ArgumentParser(prog="run.sh", description=__doc__.split("\n")[0])
    parser.add_argument("--prompt", default="What is the capital of France?", help="the user's turn")
    parser.add_argument("--tokens", type=int, default=64, help="tokens to generate (64)")
    parser.add_argument("--engines", type=int, default=3, help="engine ranks, 1 to 9 (3)")
    parser.add_argument("--colocated", action="store_true", help="the first trainer processes hold the engine's ranks too")
    parser.add_argument("--model", required=True, help=argparse.SUPPRESS)  # the folder that convert.py wrote
    parser.add_argument("--engine", required=True, help=argparse.SUPPRESS)  # the folder of engine_rank and libengine.so
    parser.add_argument("--prefix", required=True, help=argparse.SUPPRESS)  # where the library is installed
    options = parser.parse_args()
    if not 1 <= options.engines <= (TRAINERS if options.colocated else 9):
        parser.error(f"--engines {options.engines}: 1 to 9, or to {TRAINERS} with --colocated")

    signal.signal(signal.SIGTERM, lambda *_: sys.exit("ended by SIGTERM"))
    job = Job(options)
    try:
        job.run()
    except JobError as error:
        sys.exit(f"run.sh: {error}")
    finally:
        job.end()


main()
