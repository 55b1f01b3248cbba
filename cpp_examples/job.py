#!/usr/bin/env python3
"""The job: six trainer processes put SmolLM2's weights into a C++ engine, twice change them, and the engine's text follows.

Starts the processes of trainer.py and engine/main.cpp, gives all of them the same world spec, tells them what to do over pipes, compares
what they answer: text, and whether trainer, engine and file hold the same weights. When one fails, all are ended and the failure is printed.
"""

import argparse
import contextlib
import json
import os
import secrets
import selectors
import signal
import subprocess
import sys
import textwrap
import time

import megatron
import reshard
from tokenizer import Tokenizer

HERE = os.path.dirname(os.path.abspath(__file__))
TP, PP = 3, 2  # the trainer's cut
TRAINERS = TP * PP
SPARE_ROWS = 64  # of each engine rank's vocabulary, with --tables: memory that no sync may touch
CHANGED = "every MLP weakened by a fifth"
PATIENCE = 150  # seconds for any answer; the library's own deadlines are shorter and say more


class JobError(Exception):
    pass


class Worker:
    """A process that answers lines."""

    def __init__(self, name, command, fds):
        self.name = name
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0, pass_fds=fds)
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


def world_spec(model, first, engines, replicas):
    """The model, the trainer's cut and the engines' cut (their ranks from `first` on): all there is to know of anybody's weights."""
    with open(os.path.join(model, "config.json")) as f:
        config = json.load(f)
    source = {
        "framework": "megatron",
        "ranks": list(range(TRAINERS)),
        "tensor_model_parallel_size": TP,
        "pipeline_model_parallel_size": PP,
        "padded_vocab_size": megatron.padded_vocabulary(config["vocab_size"], TP),
    }
    target = {
        "framework": "vllm",
        "ranks": list(range(first, first + engines)),
        "tensor_parallel_size": engines // replicas,
        "replicas": replicas,
    }
    return {"model": config, "source": source, "target": target}


def file_fingerprint(folder):
    """That of the model as it lies on disk: one rank that holds each tensor whole."""
    model, layout = megatron.Model(folder), reshard.Layout()
    for name in model:
        array = model[name]
        box = array.shape, [0] * array.ndim, array.shape, [s // array.itemsize for s in array.strides]
        layout.tile(layout.tensor(name, array.shape), layout.buffer(name, array, reshard.SOURCE), 0, *box)
    comm = reshard.LocalComm(f"file-{os.getpid()}-{secrets.token_hex(4)}", 0, 1)
    container = reshard.Container(layout, comm, "file")
    container.connect()
    out = container.fingerprint(reshard.SOURCE)
    container.close()
    comm.close()
    return f"{out:032x}"


class Job:
    def __init__(self, options):
        self.options = options
        self.tokenizer = Tokenizer(os.path.join(options.model, "tokenizer.json"))
        self.name = f"smollm2-{os.getpid()}-{secrets.token_hex(4)}"
        self.engine_tp = options.engines // options.replicas
        self.first_engine = 0 if options.colocated else TRAINERS  # rank of the world
        self.world = max(TRAINERS, self.first_engine + options.engines)
        self.spec = None if options.tables else world_spec(options.model, self.first_engine, options.engines, options.replicas)
        self.workers = []
        self.syncs = []  # (version, statistics of all ranks)

    def start(self, name, command, fds):
        self.workers.append(Worker(name, [str(word) for word in command], fds))
        return self.workers[-1]

    def member(self, rank):
        """Arguments of a rank of the world."""
        out = ["--comm", self.name, "--world", self.world, "--comm-rank", rank]
        if self.spec:
            out += ["--spec", json.dumps(self.spec)]
        if self.options.hosts:
            host = self.host(rank)
            near = [r for r in range(self.world) if self.host(r) == host]
            nixl = {"address": self.options.hosts["address"], "run": self.name, "library": self.options.hosts["library"]}
            out += ["--nixl", json.dumps(nixl), "--near-rank", near.index(rank), "--near-world", len(near)]
        return out

    def host(self, rank):
        """Where a rank of the world lives: the first half of the hosts has the trainer's, the second the engine's."""
        half = len(self.options.hosts["launch"]) // 2
        if rank < TRAINERS:
            return rank * half // TRAINERS
        return half + (rank - TRAINERS) * half // (self.world - TRAINERS)

    def launch(self, rank):
        """What comes before the command of a rank's process."""
        return self.options.hosts["launch"][self.host(rank)] if self.options.hosts else []

    @contextlib.contextmanager
    def teams(self):
        """The memfds in which each engine's ranks meet, to be passed on, and a function: what engine_open() wants of a rank of them all."""
        padding = 0 if self.spec else SPARE_ROWS
        fds = [os.memfd_create("engine-team") for _ in range(self.options.replicas)]

        def arguments(rank):
            replica, tp = divmod(rank, self.engine_tp)
            return ["--engine-rank", tp, "--engine-ranks", self.engine_tp, "--padding-rows", padding, "--team-fd", fds[replica]]

        try:
            yield fds, arguments
        finally:
            for fd in fds:
                os.close(fd)

    def start_engines(self, title, count, arguments, launch=lambda rank: []):
        """One process for each of the first `count` engine ranks; further `arguments` of a rank, and what comes before its command."""
        program = [os.path.join(self.options.engine, "engine_rank"), "--model", self.options.model]
        with self.teams() as (fds, engine):
            return [
                self.start(f"{title} rank {rank}", [*launch(rank), *program, *engine(rank), *arguments(rank)], fds)
                for rank in range(count)
            ]

    def start_trainers(self):
        program = [sys.executable, os.path.join(HERE, "trainer.py"), "--model", self.options.model]
        program += ["--tp", TP, "--pp", PP]
        library = ["--engine-library", os.path.join(self.options.engine, "libengine.so")]
        held = self.options.engines if self.options.colocated else 0
        with self.teams() as (fds, engine):
            return [
                self.start(
                    f"trainer rank {rank}",
                    [*self.launch(rank), *program, *self.member(rank), *([*engine(rank), *library] if rank < held else [])],
                    fds,
                )
                for rank in range(TRAINERS)
            ]

    def generate(self, engines):
        prompt = self.tokenizer.chat(self.options.prompt)
        answers = ask(engines, " ".join(map(str, ["generate", self.options.tokens, *prompt])))
        ids = [[int(word) for word in answer.split()] for answer in answers]
        if any(x != ids[0] for x in ids):
            raise JobError("the engine's ranks disagree on the tokens")
        return ids[0]

    def check_spec(self):
        """Hears of a spec that the library refuses before any process is started."""
        try:
            reshard.Preset(self.spec, 0).close()
        except reshard.Error as error:
            raise JobError(f"{error}\nwith --tables the job runs with any number of engine ranks") from None

    def reference(self):
        """What an engine says that read the weights from the file."""
        engines = self.start_engines("reference", self.engine_tp, lambda rank: ["--reference"])
        ids = self.generate(engines)
        for engine in engines:
            engine.end()
        self.workers.clear()
        return ids

    def fingerprint(self):
        """That of the trainer's weights, which the engines' must have, as every rank says."""
        numbers = {number for answer in ask(self.workers, "fingerprint") for number in answer.split()}
        if len(numbers) != 1:
            raise JobError(f"trainer and engine differ: fingerprints {sorted(numbers)}")
        return numbers.pop()

    def version(self, number, engines, what):
        """Syncs a version, checks the engine's parameters, compares its weights with the trainer's, generates."""
        statistics = [json.loads(answer) for answer in ask(self.workers, f"sync {number}", f"version {number}")]
        self.syncs.append((number, statistics))
        params = sum(map(int, ask(engines, f"check {number}")))
        fingerprint = self.fingerprint()
        same = fingerprint == self.of_file
        expect(same == (what != CHANGED), f"version {number} {'is' if same else 'is not'} what the file holds: fingerprint {fingerprint}")
        ids = self.generate(engines)
        padding = "" if self.spec else ", padding untouched"
        print(f"\nversion {number}, {what}: {params} parameters whole, at their first addresses{padding}")
        print(f"  fingerprint of trainer and engine: {fingerprint}, {'that' if same else 'not that'} of the file")
        print("  " + self.tokenizer.decode(ids).strip().replace("\n", "\n  "), flush=True)
        return ids

    def run(self):
        colocated, count, replicas = self.options.colocated, self.options.engines, self.options.replicas
        where = "in the trainer processes" if colocated else "processes of their own"
        print(f"trainer: {TRAINERS} processes, tensor parallel {TP}, pipeline parallel {PP}")
        print(f"engine:  {count} ranks, {replicas} x tensor parallel {self.engine_tp}, {where}")
        print(f"weights: {'by one world spec, given to every process' if self.spec else 'by tables of each process'}")
        if self.spec:
            print(textwrap.indent(textwrap.fill(json.dumps(self.spec), 116), "  "))
            self.check_spec()
        if self.options.hosts:
            print(f"hosts:   {len(self.options.hosts['launch'])}, the first half for the trainer, the second for the engine")
        print(f"prompt:  {self.options.prompt}", flush=True)
        reference = self.reference()
        self.of_file = file_fingerprint(self.options.model)
        print(f"fingerprint of the file: {self.of_file}")
        print(f"reference, from the file:\n  {self.tokenizer.decode(reference).strip()}".replace("\n", "\n  "), flush=True)

        trainers = self.start_trainers()
        if colocated:
            engines = trainers[:count]
        else:
            first = self.first_engine
            engines = self.start_engines("engine", count, lambda rank: self.member(first + rank), lambda rank: self.launch(first + rank))
        ask(self.workers, "connect")

        first = self.version(1, engines, "the trainer's weights")
        expect(first == reference, "version 1 and the reference give different tokens")
        ask(trainers, "change")
        second = self.version(2, engines, CHANGED)
        expect(second != first, "changed weights give the same tokens: with so few it may not show yet, try more --tokens")
        ask(trainers, "restore")
        third = self.version(3, engines, "restored")
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
    parser.add_argument("--replicas", type=int, default=1, help="independent engines that these ranks make, equal in size (1)")
    parser.add_argument("--colocated", action="store_true", help="the first trainer processes hold the engine's ranks too")
    parser.add_argument("--preset", action="store_false", dest="tables", default=False, help="one world spec for all: the default")
    parser.add_argument("--tables", action="store_true", help="each process describes its weights by tables of its own")
    # {"address": "host:port", "library": path of libnixl_capi.so, "launch": [[word, ..] before a command on each host]}
    parser.add_argument("--hosts", type=json.loads, help=argparse.SUPPRESS)
    parser.add_argument("--model", required=True, help=argparse.SUPPRESS)  # the folder that convert.py wrote
    parser.add_argument("--engine", required=True, help=argparse.SUPPRESS)  # the folder of engine_rank and libengine.so
    options = parser.parse_args()
    if not 1 <= options.engines <= (TRAINERS if options.colocated else 9):
        parser.error(f"--engines {options.engines}: 1 to 9, or to {TRAINERS} with --colocated")
    if options.hosts and (options.colocated or options.engines < len(options.hosts["launch"]) // 2):
        parser.error("over hosts the engine has ranks of its own, one for each of its hosts at least")
    if options.replicas < 1 or options.engines % options.replicas:
        parser.error(f"--replicas {options.replicas}: {options.engines} engine ranks cannot be cut into so many equal engines")

    signal.signal(signal.SIGTERM, lambda *_: sys.exit("ended by SIGTERM"))
    job = Job(options)
    try:
        job.run()
    except JobError as error:
        sys.exit(f"run.sh: {error}")
    finally:
        job.end()


main()
