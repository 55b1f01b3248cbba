"""A rank of a small world, as a process: the first half of the ranks hold all of some tensors, each other wants a quarter of their rows.

Arguments: rank, rows and columns of a tensor. Commands are lines on stdin, each answered by a line of JSON on stdout:
    join NAME WORLD              joins a run of this host's processes, and connects
    join NAME WORLD ADDRESS      of several hosts with two ranks each, over NIXL (RESHARD_NIXL is the path of its library)
    sync V                       moves a version and looks at every element
    loop N                       up to N syncs, with versions that go on from the last; says why it ended before
    usage                        memory and descriptors of this process
    limit files|memory N         so many more descriptors or bytes may it have, "-" lifts the limit
    signals MS                   a signal every so often, 0 none
"""

import json
import os
import resource
import signal
import sys
import time

import numpy as np
import reshard

SOURCES, QUARTERS, TENSORS = 4, 4, 8


class Rank:
    def __init__(self, rank, rows, cols):
        self.rank, self.rows, self.cols = rank, rows, cols
        self.source = rank < SOURCES
        quarter = rows // QUARTERS
        self.first = 0 if self.source else (rank - SOURCES) % QUARTERS * quarter
        self.arrays = [np.full((rows if self.source else quarter, cols), 0xDEAD, dtype=np.uint16) for _ in range(TENSORS)]
        self.container = self.comm = None
        self.version = 0
        # Every element tells its place: no two rows and no two columns within 16 bits of each other are alike.
        row, col = np.arange(rows, dtype=np.uint32)[:, None], np.arange(cols, dtype=np.uint32)[None, :]
        self.places = (row * 31 + col * 7).astype(np.uint16)[self.first : self.first + len(self.arrays[0])]

    def value(self, tensor, version):
        return self.places + np.uint16((tensor * 1009 + version * 40503) % 0x10000)

    def join(self, name, world, address=None):
        world = int(world)
        if address:
            config = {"address": address, "run": name, "library": os.environ["RESHARD_NIXL"], "timeout_ms": 20000}
            near, wide = reshard.LocalComm(name, self.rank % 2, 2), reshard.NixlComm(config, self.rank, world)
            comm = reshard.CompositeComm(near, wide)
            near.close()
            wide.close()
        else:
            comm = reshard.LocalComm(name, self.rank, world, timeout_ms=int(os.environ["TIMEOUT_MS"]))
        if self.container:
            self.container.set_comm(comm)
        else:
            layout = reshard.Layout()
            role = reshard.SOURCE if self.source else reshard.TARGET
            for t, array in enumerate(self.arrays):
                box = [self.rows, self.cols], [self.first, 0], array.shape, [self.cols, 1]
                tensor = layout.tensor(f"model.{t}", [self.rows, self.cols])
                layout.tile(tensor, layout.buffer(f"model.{t}", array, role), 0, *box)
            self.container = reshard.Container(layout, comm, f"rank {self.rank}", timeout_ms=int(os.environ["TIMEOUT_MS"]), flags=int(os.environ.get("RELAY", "0")))
        if self.comm:
            self.comm.close()
        self.comm = comm
        self.container.connect()
        return {}

    def sync(self, version):
        self.version = int(version)
        for t, array in enumerate(self.arrays):
            array[:] = self.value(t, self.version) if self.source else 0xDEAD
        stats = self.container.sync(self.version)
        for t, array in enumerate(self.arrays):
            if not np.array_equal(array, self.value(t, self.version)):
                raise RuntimeError(f"tensor {t} is wrong at version {self.version}")
        return {"seconds": stats["seconds"], "received": stats["bytes"]["received"], "plans": stats["plans"]}

    def loop(self, count):
        for done in range(int(count)):
            begun = time.monotonic()
            try:
                self.sync(self.version + 1)
            except reshard.Error as error:
                return {"done": done, "error": str(error), "seconds": time.monotonic() - begun, "at": time.monotonic()}
        return {"done": int(count)}

    @staticmethod
    def limit(what, more):
        kind, now = {
            "files": (resource.RLIMIT_NOFILE, len(os.listdir("/proc/self/fd")) - 1),
            "memory": (resource.RLIMIT_AS, int(open("/proc/self/statm").read().split()[0]) * os.sysconf("SC_PAGE_SIZE")),
        }[what]
        hard = resource.getrlimit(kind)[1]
        resource.setrlimit(kind, (hard if more == "-" else now + int(more), hard))
        return {}

    @staticmethod
    def signals(ms):
        signal.signal(signal.SIGALRM, lambda *_: None)  # without SA_RESTART: system calls end with EINTR
        signal.setitimer(signal.ITIMER_REAL, int(ms) / 1000, int(ms) / 1000)
        return {}

    @staticmethod
    def usage():
        with open("/proc/self/statm") as f:
            pages = int(f.read().split()[1])
        return {"memory": pages * os.sysconf("SC_PAGE_SIZE"), "descriptors": len(os.listdir("/proc/self/fd"))}


def main():
    rank = Rank(*map(int, sys.argv[1:]))
    for line in sys.stdin:
        command, *words = line.split()
        try:
            answer = getattr(rank, command)(*words)
        except Exception as error:
            answer = {"failed": str(error)}
        print(json.dumps(answer), flush=True)
    if rank.container:
        rank.container.close()
        rank.comm.close()


main()
