"""Machines that have nothing left: descriptors, memory, /dev/shm; and signals all the time. Each call of every rank ends in time, with a
reason on all of them, and the next one works once there is room again. RESHARD_LIBRARY is the library.

    main.py [TEST ...]
"""

import os
import re
import subprocess
import sys
import time

from ranks import Process, ask

RANKS, ROWS, COLS, TIMEOUT_MS = 6, 512, 512, 3000


def expect(condition, otherwise):
    if not condition:
        sys.exit(f"faults: {otherwise}")


class World:
    def __init__(self, launch=()):
        self.ranks = [Process(rank, ROWS, COLS, TIMEOUT_MS, launch) for rank in range(RANKS)]
        self.runs = 0

    def join(self):
        """What each rank said, "" for success."""
        self.runs += 1
        begun = time.monotonic()
        for rank in self.ranks:
            rank.tell(f"join faults-{os.getpid()}-{id(self)}-{self.runs} {RANKS}")
        said = [rank.hear(failing=True).get("failed", "") for rank in self.ranks]
        # A rank that does not come is waited for, then it connects.
        took = time.monotonic() - begun
        expect(took < 2 * TIMEOUT_MS / 1000 + 2, f"joining took {took:.1f} s: {said}")
        return said

    def works(self, version):
        said = self.join()
        expect(not any(said), f"the next connect failed: {said}")
        ask(self.ranks, f"sync {version}")

    def end(self):
        for rank in self.ranks:
            rank.end()


def short_of(what, amounts, words, fresh=False):
    """One rank has room for ever more; up to where it suffices, every rank must say why nothing goes."""
    world = World()
    world.works(1)
    base = ask(world.ranks, "usage")
    failed = 0
    for turn, amount in enumerate(amounts):
        rank = turn % RANKS
        if fresh:
            world.ranks[rank].kill()
            world.ranks[rank] = Process(rank, ROWS, COLS, TIMEOUT_MS)
        victim = world.ranks[rank]
        ask([victim], f"limit {what} {amount}")
        said = world.join()
        ask([victim], f"limit {what} -")
        if not any(said):
            continue
        failed += 1
        print(f"  rank {victim.rank}, {amount} more: {said[victim.rank]}")
        expect(all(said), f"some ranks do not know that rank {victim.rank} failed: {said}")
        expect(any(word in said[victim.rank] for word in words), f"rank {victim.rank} does not say what it lacks: {said[victim.rank]}")
        for rank, text in enumerate(said):
            expect(rank == victim.rank or re.search(rf"\brank {victim.rank}\b", text), f"rank {rank} does not name rank {victim.rank}: {text}")
        world.works(2 + turn)
    expect(failed >= 3, f"only {failed} of {amounts} were too few")
    for rank, (before, now) in enumerate(zip(base, ask(world.ranks, "usage"))):
        expect(fresh or now["descriptors"] <= before["descriptors"], f"rank {rank} has {now} now, and had {before}")
    world.end()


def descriptors():
    """No descriptors left in one process."""
    short_of("files", [0, 1, 2, 3, 4, 6, 8, 10, 12, 14, 17, 20], ["Too many open files", "ulimit -n"])


def memory():
    """No memory left in one process."""
    short_of("memory", [0, 1 << 12, 1 << 16, 1 << 18, 1 << 20, 1 << 21, 1 << 22, 1 << 23, 1 << 24, 1 << 25], ["annot allocate memory", "no memory"], fresh=True)


def shared_memory_full():
    """/dev/shm without a byte left is none of the library's concern."""
    if os.getuid() != 0 or subprocess.run(["unshare", "--mount", "true"], capture_output=True).returncode != 0:
        print("  skipped: it wants root, to give the processes a /dev/shm of their own")
        return
    full = "mount -t tmpfs -o size=4k tmpfs /dev/shm && head -c 4096 /dev/zero >/dev/shm/full && exec \"$@\""
    world = World(["unshare", "--mount", "sh", "-c", full, "sh"])
    world.works(1)
    world.end()


def signals():
    """A signal every millisecond that ends system calls."""
    world = World()
    ask(world.ranks, "signals 1")
    world.works(1)
    for answer in ask(world.ranks, "loop 300"):
        expect(answer == {"done": 300}, f"{answer}")
    world.works(1000)
    ask(world.ranks, "signals 0")
    world.end()


tests = {test.__name__: test for test in [descriptors, memory, shared_memory_full, signals]}
for name in sys.argv[1:] or tests:
    print(f"--- {tests[name].__doc__}", flush=True)
    tests[name]()
print("faults: all is well")
