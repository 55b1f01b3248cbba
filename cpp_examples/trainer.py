#!/usr/bin/env python3
"""One rank of the trainer as a process: numpy and ctypes only.

Commands are lines on stdin, each answered by one line on stdout, "ok ..." or "error ...":
    connect, sync V, fingerprint         as engine/main.cpp
    change                a training step with a visible effect
    restore               takes it back
    check V, generate N ID.., memcpy     as engine/main.cpp, where this process holds an engine rank too (--engine-rank)
"""

import argparse
import ctypes
import json
import sys
import time

import megatron
import numpy as np
import reshard


class EngineRank:
    """An engine rank in this process: libengine.so through its C interface."""

    def __init__(self, library, model_dir, rank, ranks, padding_rows, team_fd):
        self._lib = lib = ctypes.CDLL(library)
        lib.engine_open.restype = ctypes.c_void_p
        lib.engine_error.restype = ctypes.c_char_p
        lib.engine_layout.restype = ctypes.POINTER(reshard.LayoutStruct)
        lib.engine_memcpy_rate.restype = ctypes.c_double
        self._handle = ctypes.c_void_p(lib.engine_open(model_dir.encode(), rank, ranks, padding_rows, team_fd))
        if not self._handle:
            raise RuntimeError(lib.engine_error().decode())
        lib.engine_poison_padding(self._handle)
        self.layout = lib.engine_layout(self._handle).contents
        self.params = {row.name.decode(): self._array(row) for row in self.layout.buffers[: self.layout.buffer_count]}

    @staticmethod
    def _array(row):
        """The memory of a bf16 buffer."""
        return np.ctypeslib.as_array(ctypes.cast(row.data, ctypes.POINTER(ctypes.c_uint16)), row.shape[: row.ndim])

    def _check(self, status):
        if status:
            raise RuntimeError(self._lib.engine_error().decode())

    def generate(self, count, prompt):
        tokens = (ctypes.c_int32 * count)()
        self._check(self._lib.engine_generate(self._handle, (ctypes.c_int32 * len(prompt))(*prompt), len(prompt), tokens, count))
        return list(tokens)

    def memcpy_rate(self):
        return self._lib.engine_memcpy_rate(self._handle)

    def check_params(self, container, version):
        """The library's view of every parameter is the engine's own buffer, whole at `version`; the padding is untouched."""
        self._check(self._lib.engine_check_padding(self._handle))
        for name, array in self.params.items():
            param = container.param(name)
            if param.data != array.ctypes.data:
                raise RuntimeError(f"{name} has moved")
            if (param.state, param.version) != (reshard.PARAM_SYNCED, version):
                raise RuntimeError(f"{name} is in state {param.state} at version {param.version}, not whole at {version}")
        return len(self.params)


def say(line):
    print(line, flush=True)


class Worker:
    def __init__(self, options):
        stage, tp = divmod(options.comm_rank, options.tp)
        self.rank = megatron.Rank(megatron.Model(options.model), tp, options.tp, stage, options.pp)
        self.engine = None
        if options.engine_rank is not None:
            self.engine = EngineRank(
                options.engine_library, options.model,
                options.engine_rank, options.engine_ranks, options.padding_rows, options.team_fd,
            )  # fmt: skip
        weights = self.by_spec(options.spec, options.comm_rank) if options.spec else self.by_tables()
        comm = self.join(options)
        self.container = reshard.Container(weights, comm, "trainer")
        comm.close()  # the container holds a reference of its own
        self.before_change = {}
        self._said = 0.0

    @staticmethod
    def join(options):
        if not options.nixl:
            return reshard.LocalComm(options.comm, options.comm_rank, options.world)
        near = reshard.LocalComm(options.comm, options.near_rank, options.near_world)
        wide = reshard.NixlComm(options.nixl, options.comm_rank, options.world)
        comm = reshard.CompositeComm(near, wide)
        near.close()  # it holds references of its own
        wide.close()
        return comm

    def by_spec(self, spec, rank):
        """The spec says what each parameter holds: names and memory are enough."""
        preset = reshard.Preset(spec, rank)
        for name, shard in self.rank.shards.items():
            preset.bind(name, shard, reshard.SOURCE)
        if self.engine:
            for name, array in self.engine.params.items():
                preset.bind(name, array, reshard.TARGET)
        return preset

    def by_tables(self):
        layout = self.rank.layout
        if self.engine:
            layout.extend(self.engine.layout)
        return layout

    def progress(self, done, total):
        now = time.monotonic()
        if now - self._said > 0.05:
            self._said = now
            say(f"progress {done} {total}")

    def answer(self, command, *words):
        if command == "connect":
            return self.container.connect() or ""
        if command == "sync":
            return json.dumps(self.container.sync(int(words[0]), self.progress))
        if command == "fingerprint":
            return " ".join(f"{self.container.fingerprint(role):032x}" for role in (reshard.SOURCE, reshard.TARGET))
        if command == "change":
            self.before_change = self.rank.weaken_mlps(0.8)
            return len(self.before_change)
        if command == "restore":
            return self.rank.restore(self.before_change) or ""
        if command == "check":
            return self.engine.check_params(self.container, int(words[0]))
        if command == "generate":
            count, *prompt = map(int, words)
            return " ".join(map(str, self.engine.generate(count, prompt)))
        if command == "memcpy":
            return self.engine.memcpy_rate()
        raise ValueError(f"unknown command: {command}")


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", required=True, help="folder that convert.py wrote")
    parser.add_argument("--comm", required=True, help="name of the run")
    parser.add_argument("--world", type=int, required=True, help="ranks of trainer and engine")
    parser.add_argument("--comm-rank", type=int, required=True, help="this rank; the trainer's come first")
    parser.add_argument("--nixl", type=json.loads, help="how it reaches ranks of other hosts, for rs_comm_nixl(); without it there are none")
    parser.add_argument("--near-rank", type=int, help="this rank among those of this host")
    parser.add_argument("--near-world", type=int)
    parser.add_argument("--spec", type=json.loads, help="the world spec, JSON; without it tables say what the weights are")
    parser.add_argument("--tp", type=int, required=True, help="tensor-parallel size")
    parser.add_argument("--pp", type=int, required=True, help="pipeline-parallel size")
    parser.add_argument("--engine-rank", type=int, help="hold this engine rank as well")
    parser.add_argument("--engine-ranks", type=int)
    parser.add_argument("--padding-rows", type=int, help="rows of no token, last in each engine rank's vocabulary")
    parser.add_argument("--engine-library", help="libengine.so")
    parser.add_argument("--team-fd", type=int, help="memfd in which the engine's ranks meet")
    try:
        worker = Worker(parser.parse_args())
    except Exception as error:
        say(f"error {error}")
        sys.exit(1)
    for line in sys.stdin:
        try:
            say(f"ok {worker.answer(*line.split())}")
        except Exception as error:
            say(f"error {error}")


main()
