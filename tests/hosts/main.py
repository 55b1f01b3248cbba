"""What is true of several hosts: see tests/hosts.sh. Arguments: libnixl_capi.so, the model's folder, the engine's."""

import json
import os
import subprocess
import sys
import time

from net import Net

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "faults"))
from ranks import EXAMPLES, Process, ask  # noqa: E402

LIBRARY, MODEL, ENGINE = (os.path.abspath(path) for path in sys.argv[1:])
MB = 1 << 20
TIMEOUT_MS = 4000
ROWS, COLS, TENSORS = 2048, 2048, 8
# All of it over the links: no shared memory between hosts that are really one, and no InfiniBand, whose module of NIXL 1.5.1's wheel
# crashes at a process's end where there is none.
os.environ |= {"UCX_TLS": "tcp", "UCX_MODULES": "^ib", "UCX_NET_DEVICES": "eth0", "RESHARD_NIXL": LIBRARY, "NIXL_LOG_LEVEL": "FATAL"}


def expect(condition, otherwise):
    if not condition:
        sys.exit(f"hosts: {otherwise}")


def since(before, after):
    return [(b[0] - a[0], b[1] - a[1]) for a, b in zip(before, after)]


def the_model():
    """The job of the README: trainer on two hosts, engine on two others."""
    with Net(4) as net:
        before = net.bytes()
        hosts = {"address": f"{net.address(0)}:4711", "library": LIBRARY, "launch": [net.on(host) for host in range(4)]}
        command = [sys.executable, os.path.join(EXAMPLES, "job.py"), "--model", MODEL, "--engine", ENGINE]
        text = subprocess.run([*command, "--tokens", "24", "--hosts", json.dumps(hosts)], stdout=subprocess.PIPE, text=True)
        print(text.stdout)
        expect(text.returncode == 0, "the job failed")
        table = [line.split() for line in text.stdout.splitlines()[-3:]]
        moved = sum(float(row[1]) for row in table) * 1e6
        wire = since(before, net.bytes())
        trainer, engine = sum(rx for rx, _ in wire[:2]), sum(rx for rx, _ in wire[2:])
        print(f"over the links: {engine / 1e6:.1f} MB into the engine's hosts, for {moved / 1e6:.1f} MB of weights")
        expect(moved < engine < 1.1 * moved, "the weights did not cross the links once")
        expect(trainer < 0.1 * moved, f"{trainer} bytes came into the trainer's hosts")


class Ranks:
    """Processes, two on each host."""

    def __init__(self, net, world=8, timeout_ms=TIMEOUT_MS):
        self.net, self.runs, self.all, self.timeout_ms = net, 0, [], timeout_ms
        self.start(world)

    def start(self, world):
        ranks = range(len(self.all), world)
        self.all += [Process(rank, ROWS, COLS, self.timeout_ms, self.net.on(rank // 2)) for rank in ranks]

    def ask(self, line):
        return ask(self.all, line)

    def join(self):
        self.runs += 1
        self.ask(f"join hosts-{os.getpid()}-{self.runs} {len(self.all)} {self.net.address(0)}:{4800 + self.runs}")

    def end(self, remain=0):
        while len(self.all) > remain:
            self.all.pop().end()


def slow_links():
    """Sources that hold the same share the work: two hosts with slow links take half the time of one."""
    mbit = 200
    with Net(4) as net:
        ranks = Ranks(net)
        ranks.join()
        ranks.ask("sync 1")
        for host in range(2):
            net.limit(host, mbit)
        before = net.bytes()
        answers = ranks.ask("sync 2")
        wire = since(before, net.bytes())
        ranks.end()
    # Of the rank that came last: the others waited for it first.
    seconds = min(answer["seconds"] for answer in answers)
    weights = sum(answer["received"] for answer in answers)
    sent = [tx for _, tx in wire[:2]]
    least = weights / 2 / (mbit * 1e6 / 8)
    print(f"links of {mbit} Mbit/s: {weights / MB:.0f} MiB in {seconds:.2f} s, at least {least:.2f}")
    print(f"the two hosts sent {sent[0] / MB:.1f} and {sent[1] / MB:.1f} MiB")
    expect(weights == 8 * ROWS * COLS * 2, f"{weights} bytes are not those of the tensors")
    expect(max(sent) < 1.05 * min(sent), "the two hosts did not send alike")
    expect(max(rx for rx, _ in wire[2:]) < 0.55 * 1.05 * weights, "a host received what the other one needs")
    expect(seconds < 1.6 * least, "it took as long as from one host")


def replicas():
    """Engines that want the same: where they relay, the sources send it once, however many there are."""
    mbit, weights = 100, TENSORS * ROWS * COLS * 2
    took = {}
    for engines, relay in [(1, False), (4, False), (1, True), (4, True), (16, True)]:
        os.environ["RELAY"] = "2" if relay else "0"  # RS_CONFIG_RELAY
        with Net(2 + 2 * engines) as net:
            ranks = Ranks(net, 4 + 4 * engines, 60_000)
            ranks.join()
            ranks.ask("sync 1")
            for host in range(len(net.hosts)):
                net.limit(host, mbit)
            before = net.bytes()
            # Of the rank that came last: the others waited for it first.
            took[engines, relay] = min(answer["seconds"] for answer in ranks.ask("sync 2"))
            wire = since(before, net.bytes())
            ranks.end()
        sent = sum(tx for _, tx in wire[:2])
        print(f"  {engines} engines, relays {'on' if relay else 'off'}: sources sent {sent / weights:.2f} copies, {took[engines, relay]:.1f} s", flush=True)
        copies = 1 if relay else engines
        expect(copies <= sent / weights < 1.05 * copies, f"the sources sent {sent} bytes")
        expect(max(tx for _, tx in wire) < 0.55 * copies * weights, f"a host sent more than its share: {wire}")
    del os.environ["RELAY"]
    expect(took[4, False] > 3 * took[1, False], f"links are not what takes the time: {took}")
    expect(took[4, True] < 2 * took[1, True], f"four engines that relay take too long: {took}")
    expect(took[16, True] < 4 * took[1, True], f"sixteen engines that relay take too long: {took}")


def a_lost_link():
    """A host whose cable is pulled: the others say so within the deadline, and go on with it once it is back."""
    with Net(4) as net:
        ranks = Ranks(net)
        ranks.join()
        for process in ranks.all:
            process.tell("loop 1000000")
        time.sleep(2)
        net.link(3, "down")
        struck = time.monotonic()
        answers = [process.hear() for process in ranks.all]
        for rank, answer in enumerate(answers):
            late = answer["at"] - struck
            print(f"  rank {rank} after {late:.1f} s: {answer['error']}")
            expect(late < TIMEOUT_MS / 1000 + 3, f"rank {rank} took {late:.1f} s")
            named = any(f"rank {lost}" in answer["error"] for lost in ((6, 7) if rank < 6 else range(6)))
            expect(named, f"rank {rank} does not name who is unreachable")
        net.link(3, "up")
        ranks.join()
        plans = [answer["plans"] for answer in ranks.ask("sync 1000000")]
        expect(plans == [1] * 8, f"ranks have planned {plans} times, for layouts that are as they were")
        ranks.end()


def an_engine_comes_and_goes():
    """A second engine on a host of its own comes between two syncs, and goes again; trainer and first engine stay where they are."""
    with Net(5) as net:
        ranks = Ranks(net)
        ranks.join()
        ranks.ask("sync 1")
        ranks.start(10)  # ranks 8 and 9 want what 4 and 5 have
        ranks.join()
        answers = ranks.ask("sync 2")
        expect(all(answer["received"] == 8 * ROWS * COLS * 2 // 4 for answer in answers[4:]), "an engine's rank lacks something")
        ranks.end(8)
        ranks.join()
        ranks.ask("sync 3")
        ranks.end()


for test in [test for test in [the_model, slow_links, replicas, a_lost_link, an_engine_comes_and_goes] if test.__name__ in os.environ.get("RESHARD_HOSTS", test.__name__).split()]:
    print(f"--- {test.__doc__.strip().splitlines()[0]}", flush=True)
    test()
print("several hosts: all is well")
