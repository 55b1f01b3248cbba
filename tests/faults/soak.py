"""A job that goes on for long: nine processes sync a small model, one of them is killed at a random moment in about every hundred syncs,
another takes its place, and none of those that stay needs more memory or descriptors in the end.

    soak.py [SYNCS [SEED]]       10,000 syncs if not given. RESHARD_LIBRARY is the library.
"""

import os
import random
import sys
import time

from ranks import Process, ask

RANKS, ROWS, COLS, TIMEOUT_MS = 9, 256, 64, 5000
EACH = 100  # syncs to a kill
GROWTH = 4 << 20  # bytes of memory that Python may move about


def expect(condition, otherwise):
    if not condition:
        sys.exit(f"soak: {otherwise}")


class Life:
    """What a process has used, since it had its second kill behind it."""

    def __init__(self):
        self.seen = []

    def check(self, rank):
        if len(self.seen) < 8:
            return
        early, late = self.seen[len(self.seen) // 4], self.seen[-1]
        grown = late["memory"] - early["memory"]
        expect(grown < GROWTH, f"rank {rank} has {grown} bytes more after {len(self.seen)} kills than after a quarter of them")
        expect(late["descriptors"] <= early["descriptors"], f"rank {rank} has {late} now, and had {early}")


def main():
    wanted = int(sys.argv[1]) if len(sys.argv) > 1 else 10_000
    seed = int(sys.argv[2]) if len(sys.argv) > 2 else random.randrange(1 << 32)
    rng = random.Random(seed)
    print(f"{wanted} syncs, seed {seed}", flush=True)
    start = lambda rank: Process(rank, ROWS, COLS, TIMEOUT_MS)  # noqa: E731
    ranks, lives = [start(rank) for rank in range(RANKS)], [Life() for _ in range(RANKS)]
    syncs = kills = longest = 0
    pace = 0.005  # seconds a sync
    slowest = 0.0
    while syncs < wanted:
        ask(ranks, f"join soak-{os.getpid()}-{kills} {RANKS}")
        ask(ranks, f"sync {(kills + 1) << 20}")
        for rank, (process, life) in enumerate(zip(ranks, lives)):
            life.seen.append(ask([process], "usage")[0])
            life.check(rank)
        victim = rng.randrange(RANKS)
        begun = time.monotonic()
        for process in ranks:
            process.tell(f"loop {2 * EACH}")
        time.sleep(rng.uniform(0, 2) * EACH * pace)
        struck = time.monotonic()
        ranks[victim].kill()
        rest = [process for process in ranks if process.rank != victim]
        answers = [process.hear() for process in rest]
        done = min(answer["done"] for answer in answers)
        for process, answer in zip(rest, answers):
            if "error" in answer:
                slowest = max(slowest, answer["at"] - struck)
                expect(f"rank {victim}" in answer["error"], f"rank {process.rank} does not name rank {victim}: {answer['error']}")
                expect(answer["at"] - struck < TIMEOUT_MS / 1000 + 2, f"rank {process.rank} took too long: {answer}")
            else:
                expect(answer["done"] == 2 * EACH, f"rank {process.rank} stopped without an error: {answer}")
        if done > 20:
            pace = (struck - begun) / done
        syncs += done + 1
        kills += 1
        longest = max(longest, max(len(life.seen) for life in lives))
        ranks[victim], lives[victim] = start(victim), Life()
        if kills % 10 == 0:
            print(f"  {syncs} syncs, {kills} kills, {pace * 1e3:.1f} ms a sync", flush=True)
    ask(ranks, f"join soak-{os.getpid()}-last {RANKS}")
    ask(ranks, f"sync {1 << 40}")
    for process in ranks:
        process.end()
    print(f"{syncs} syncs and {kills} kills: every byte right; survivors knew within {slowest:.2f} s; a process lived through up to {longest} kills")


main()
