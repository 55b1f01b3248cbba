"""A rank of eight on four hosts: ranks 0 to 3 hold all of some tensors, ranks 4 to 7 want a quarter of the rows of each.

Commands are lines on stdin: `join ADDRESS NAME` (and connect), `sync V`, `loop` (sync until it fails), `quit`. Each is answered by a line
of JSON.
"""

import json
import os
import sys
import time

import numpy as np
import reshard

RANKS, SOURCES, HOSTS = 8, 4, 4
TENSORS, ROWS, COLS = 8, 2048, 2048


def value(tensor, version):
    """Every element tells its place: no two rows and no two columns within 16 bits of each other are alike."""
    row = np.arange(ROWS, dtype=np.uint32)[:, None]
    col = np.arange(COLS, dtype=np.uint32)[None, :]
    return ((row * 31 + col * 7 + tensor * 1009 + version * 40503 % 0x10000) & 0xFFFF).astype(np.uint16)


class Rank:
    def __init__(self, rank, library):
        self.rank, self.library = rank, library
        self.first = 0 if rank < SOURCES else (rank - SOURCES) * (ROWS // (RANKS - SOURCES))
        rows = ROWS if rank < SOURCES else ROWS // (RANKS - SOURCES)
        self.role = reshard.SOURCE if rank < SOURCES else reshard.TARGET
        self.arrays = [np.full((rows, COLS), 0xDEAD, dtype=np.uint16) for _ in range(TENSORS)]
        self.container = self.comm = None
        self.version = 0

    def join(self, address, name):
        near, world = self.rank % 2, RANKS // HOSTS
        config = {"address": address, "run": name, "library": self.library, "timeout_ms": 20000}
        near = reshard.LocalComm(name, near, world)
        wide = reshard.NixlComm(config, self.rank, RANKS)
        comm = reshard.CompositeComm(near, wide)
        near.close()
        wide.close()
        if self.container:
            self.container.set_comm(comm)
        else:
            layout = reshard.Layout()
            for t, array in enumerate(self.arrays):
                box = [ROWS, COLS], [self.first, 0], array.shape, [COLS, 1]
                layout.tile(layout.tensor(f"model.{t}", [ROWS, COLS]), layout.buffer(f"model.{t}", array, self.role), 0, *box)
            self.container = reshard.Container(layout, comm, "rank", timeout_ms=int(os.environ["TIMEOUT_MS"]))
        if self.comm:
            self.comm.close()
        self.comm = comm
        self.container.connect()
        return {}

    def sync(self, version):
        self.version = version
        for t, array in enumerate(self.arrays):
            array[:] = value(t, version) if self.role == reshard.SOURCE else 0xDEAD
        stats = self.container.sync(version)
        for t, array in enumerate(self.arrays):
            if not np.array_equal(array, value(t, version)[self.first : self.first + array.shape[0]]):
                raise RuntimeError(f"tensor {t} is wrong at version {version}")
        return {"seconds": stats["seconds"], "received": stats["bytes"]["received"]}

    def loop(self):
        while True:
            begun = time.monotonic()
            try:
                self.sync(self.version + 1)
            except reshard.Error as error:
                return {"error": str(error), "seconds": time.monotonic() - begun, "at": time.monotonic()}


def main():
    rank = Rank(int(sys.argv[1]), sys.argv[2])
    for line in sys.stdin:
        command, *words = line.split()
        if command == "quit":
            break
        try:
            answer = {"join": rank.join, "sync": lambda v: rank.sync(int(v)), "loop": rank.loop}[command](*words)
        except Exception as error:
            answer = {"failed": str(error)}
        print(json.dumps(answer), flush=True)


main()
