"""Runs a world spec through the library and compares every byte with the oracle.

All ranks are threads of this process (rs_comm_loopback; ctypes lets go of the interpreter's lock inside a call). What is local is done
on the calling thread first, so that a refused preset or bind ends a case at once instead of leaving the others to wait.
"""

import ctypes as c
import functools
import itertools
import json
import random
import threading

import memory
import numpy as np
import oracle
import totals
from memory import SOURCE, TARGET, reshard

POISON, JUNK = 0xA5A5, 0xDEAD  # no element has these: targets before a sync; padding of sources
ROLES = {"source": SOURCE, "target": TARGET}
TIMEOUT_MS = 30000
hubs = itertools.count(1000)

reshard._lib.rs_comm_loopback.argtypes = [c.c_uint64, c.c_int32, c.c_int32, c.c_void_p]


class LoopbackComm(reshard.LocalComm):
    """Threads of this process that give the same number."""

    def __init__(self, hub, rank, world):
        self._handle = c.c_void_p()
        reshard._check(reshard._lib.rs_comm_loopback(hub, rank, world, c.byref(self._handle)))


def check(condition, *words):
    if not condition:
        raise AssertionError(" ".join(map(str, words)))


@functools.lru_cache(maxsize=4)
def model_of(text):
    return oracle.model_of(json.loads(text))


def on_threads(ranks, work):
    """work(rank) for all of them at once; the first failure is raised."""
    failures = {}

    def guarded(rank):
        try:
            work(rank)
        except Exception as error:
            failures[rank] = error

    threads = [threading.Thread(target=guarded, args=(rank,), daemon=True) for rank in ranks]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(3 * TIMEOUT_MS / 1000)
        check(not thread.is_alive(), "a rank hangs")
    if failures:
        rank, error = min(failures.items(), key=lambda item: item[0])
        raise AssertionError(f"rank {rank}: {error}") from error
    return failures


class Described:
    """One rank's parameters, by side."""

    def __init__(self, spec, rank, model):
        self.rank, self.model, self.spec, self.preset = rank, model, spec, None
        self.params = {side: oracle.params(spec, side, rank, model) for side in ROLES}
        self.shared = {}  # a target's key to the source whose memory it is

    def check_describe(self):
        """RS_DESCRIBE_LAYOUT lists the oracle's parameters, and nothing else."""
        said = self.preset.describe(reshard.DESCRIBE_LAYOUT)
        check(said["rank"] == self.rank, "describe says rank", said["rank"])
        expected = {(role, *p.key): p for side, role in ROLES.items() for p in self.params[side]}
        listed = {(p["role"], p["chunk"], p["name"]): p for p in said["params"]}
        check(len(listed) == len(said["params"]), "a parameter is listed twice")
        check(listed.keys() == expected.keys(), "listed or expected only:", sorted(listed.keys() ^ expected.keys()))
        for key, p in expected.items():
            row = listed[key]
            check(tuple(row["shape"]) == p.shape, key, "shape", row["shape"], "instead of", p.shape)
            dtype = tuple(row["dtype"][x] for x in ("code", "bits", "lanes"))
            check(dtype == p.dtype, key, "dtype", dtype, "instead of", p.dtype)
            check(row["required"] == p.required, key, "required", row["required"])
            if p.real.size and p.required:
                check(set(row["tensors"]) == set(p.sources), key, "sources", row["tensors"], "instead of", p.sources)
        return said["params"]

    def expected_bytes(self):
        """What a sync must do here at least: every element that is needed and not held arrives once."""
        none = [np.empty(0, np.int64)]
        wanted = np.concatenate([p.real for p in self.params["target"]] or none)
        held = np.concatenate([p.real for p in self.params["source"] if p.required] or none)
        shared = np.concatenate([p.real for p in self.params["target"] if p.key in self.shared] or none)
        is_held, is_missing = np.zeros((2, self.model.elements), bool)
        is_held[held] = True
        here = is_held[wanted]
        is_missing[wanted[~here]] = True
        sizes = self.model.sizes
        again = np.bincount(wanted[~here], minlength=self.model.elements) - is_missing
        aliased, received = int(sizes[shared].sum()), int(sizes[is_missing].sum())
        return {
            "aliased": aliased,
            "local": int(sizes[wanted[here]].sum()) - aliased,
            "received": received,
            "doubled": int((again * self.model.target_sizes).sum()),  # read from the first target
        }

    def landed_bytes(self):
        """What the targets hold, as sources have it."""
        return sum(int(self.model.sizes[p.real].sum()) for p in self.params["target"])


class Rank(Described):
    """One rank's parameters and their memory."""

    def __init__(self, spec, rank, model, sources=None, share=lambda param: False, skip_optional=False, order=None):
        """`sources`: memory to send, by (chunk, name); else the oracle's. `share(target)`: whether it may be the source's own memory."""
        super().__init__(spec, rank, model)
        self.order = order
        self.memory = {side: {} for side in ROLES}
        for param in self.params["source"]:
            if param.required or not skip_optional:
                given = sources and sources[param.key]
                self.memory["source"][param.key] = param.data(JUNK) if given is None else given
        equal = {}
        for source in self.params["source"]:
            if source.required:
                equal.setdefault((source.shape, source.elements.tobytes()), []).append(source.key)
        for param in self.params["target"]:
            keys = equal.get((param.shape, param.elements.tobytes()))
            if keys and not param.changes and share(param):
                self.shared[param.key] = keys.pop(0)
        self.new_targets()

    def new_targets(self):
        self.memory["target"] = {}
        for param in self.params["target"]:
            fresh = np.full(param.shape, POISON, param.kind)
            source = self.shared.get(param.key)
            self.memory["target"][param.key] = fresh if source is None else self.memory["source"][source]

    def make_preset(self):
        self.preset = memory.Preset(self.spec, self.rank)
        self.bind()
        return self.preset

    def bind(self, rename=lambda side, name: name):
        """Memory that is a source and a target under one name is bound once, with both roles."""
        both = {key for key, source in self.shared.items() if key == source}
        params = [(side, param) for side in ROLES for param in self.params[side]]
        if self.order:
            random.Random(self.order).shuffle(params)
        for side, param in params:
            if param.key not in self.memory[side] or (param.key in both and side == "source"):
                continue
            roles = SOURCE | TARGET if param.key in both else ROLES[side]
            # A name that is one on both sides has no wrapper that one of the frameworks does not know.
            frameworks = {self.spec[other]["framework"] for other in ROLES}
            name = param.name if param.key in both and len(frameworks) > 1 else rename(side, param.name)
            self.preset.bind(name, self.memory[side][param.key], roles, param.dtype, param.chunk)

    def check_targets(self):
        """Every element is what the oracle says, and padding is untouched."""
        for param in self.params["target"]:
            got = self.memory["target"][param.key]
            pad = JUNK if param.key in self.shared else POISON
            expected = param.data(pad)
            differs = got != expected
            if param.changes:  # what is no number must stay none, whichever it is
                differs &= ~(oracle.is_nan(got, param.dtype) & oracle.is_nan(expected, param.dtype))
            wrong = np.argwhere(differs)
            if wrong.size:
                at = tuple(wrong[0])
                element = int(param.elements[at])
                what = "padding" if element < 0 else f"element {element} ({self.model.name_of(element)})"
                raise AssertionError(
                    f"rank {self.rank}: chunk {param.chunk} {param.name} {param.shape}: {len(wrong)} elements differ, the first at "
                    f"{tuple(map(int, at))}, {what}: {got[at]:#x} instead of {expected[at]:#x}"
                )


def run(spec, world, sources=None, specs=None, rename=lambda side, name: name, check_plans=True, again=False, left_open=False, **more):
    """A whole sync; answers the ranks.

    `sources`: by rank, memory to send. `specs`: by rank, the spec as that rank writes it. `rename(side, name)`: the name that is bound.
    `again`: whether targets move and a second sync follows. `left_open`: `specs` leave out what parameters tell when they are bound, so
    that a rank knows its layout only then, and its plan when it has connected. `more` is for Rank.
    """
    model = model_of(json.dumps(spec))
    ranks = [Rank(spec, rank, model, sources and sources.get(rank), **more) for rank in range(world)]
    hub = next(hubs)
    containers, comms = {}, {}
    try:
        for r in ranks:
            r.preset = memory.Preset(specs[r.rank] if specs else spec, r.rank)
            if not left_open:
                unbound = r.check_describe()
                check(not any(p["bound"] for p in unbound), "bound before it is bound")
            r.bind(rename)
            check(all(p["bound"] for p in r.check_describe() if p["required"]), "not bound")
            comms[r.rank] = LoopbackComm(hub, r.rank, world)
            containers[r.rank] = memory.Container(r.preset, comms[r.rank], f"rank {r.rank}", TIMEOUT_MS)
        stats = {}

        def sync(rank, version):
            stats[rank] = containers[rank].sync(version, verify=version == 2)["bytes"]

        plans = [r.preset.describe(reshard.DESCRIBE_PLAN) for r in ranks] if check_plans and not left_open else []
        on_threads(range(world), lambda rank: containers[rank].connect())
        on_threads(range(world), lambda rank: sync(rank, 1))
        for r in ranks:
            r.check_targets()
        expected = {r.rank: r.expected_bytes() for r in ranks}
        for rank in range(world):
            for what, count in expected[rank].items():
                check(stats[rank][what] == count, f"rank {rank}: {stats[rank][what]} bytes {what} instead of {count}")
        total = sum(e["received"] for e in expected.values())
        check(
            sum(s["sent"] for s in stats.values()) == total,
            "sent",
            [s["sent"] for s in stats.values()],
            "received",
            total,
        )
        check_fingerprints(model, ranks, containers)
        for rank, plan in enumerate(plans):
            check_plan(plan, rank, expected[rank])
            mine = containers[rank].describe(reshard.DESCRIBE_PLAN)
            keys = ("rank", "sent", "received")
            peers = [sorted(tuple(p[k] for k in keys) for p in x["peers"]) for x in (plan, mine)]
            check(
                # Of several GPUs the nearest sender is the one on the same, which a spec does not know.
                "ranks_per_host" in spec or memory.on_gpus or peers[0] == peers[1],
                f"rank {rank}: planned alone",
                peers[0],
                "together",
                peers[1],
            )
        if plans:
            whole, wanted = ranks[0].preset.describe(reshard.DESCRIBE_WORLD), totals.expected(spec, model.elements, plans, expected, sum(r.landed_bytes() for r in ranks))
            check_relayed(whole.pop("relayed"), whole, plans, spec)
            for key in whole.keys() | wanted.keys():
                check(whole.get(key) == wanted.get(key), f"the world's {key}:", whole.get(key), "instead of", wanted.get(key))
        if again:
            move_and_sync(ranks, containers, lambda rank: sync(rank, 2))
    finally:
        for container in containers.values():
            container.close()
        for comm in comms.values():
            comm.close()
        for r in ranks:
            if r.preset:
                r.preset.close()
    return ranks


def check_relayed(relayed, plain, plans, spec):
    """What all targets that relay would change of a world: that the sources send less, once at least what a rank gets from beyond its host."""
    check(relayed["ingress"] == plain["ingress"], "relayed: ingress", relayed, plain)
    check(relayed.keys() - {"egress", "ingress"} == plain.keys() & {"seconds"}, "relayed:", relayed)
    sent, before = (sum(stage["bytes"] for stage in x["egress"]) for x in (relayed, plain))
    hosts = spec.get("ranks_per_host")
    far = [sum(p["received"] for p in plan["peers"] if hosts and p["rank"] // hosts != plan["rank"] // hosts) for plan in plans]
    check(before - sum(far) + max(far) <= sent <= before, f"relayed: {sent} bytes, {before} without; from other hosts", far)


def check_fingerprints(model, ranks, containers):
    """Trainer, engine and whole tensors have one number."""
    found = {}

    def ask(rank):
        found[rank] = {containers[rank].fingerprint(role) for role in ROLES.values()}

    on_threads(range(len(ranks)), ask)
    check(all(len(numbers | found[0]) == 1 for numbers in found.values()), "fingerprints", found)
    targets = [param for r in ranks for param in r.params["target"]]
    # Rounding may make another NaN than the oracle's.
    if not any(param.changes for param in targets):
        names = sorted({name for param in targets for name in param.sources})
        whole = whole_fingerprint(model, names)
        check(found[0] == {whole}, "the world has the fingerprints", found[0], "whole tensors", whole)


def whole_fingerprint(model, names):
    """By one rank that holds each tensor in a buffer of its own."""
    layout = reshard.Layout()
    for name in names:
        dtype, shape = model.held["target"].dtype_of(name), model.shapes[name]
        bits = model.bits[model[name].ravel()].astype(np.uint32 if dtype[1] == 32 else np.uint16).reshape(shape)
        strides = [s // bits.itemsize for s in bits.strides]
        layout.tile(layout.tensor(name, shape), layout.buffer(name, bits, SOURCE, dtype), 0, shape, [0] * len(shape), shape, strides)
    comm = LoopbackComm(next(hubs), 0, 1)
    container = reshard.Container(layout, comm, "whole", TIMEOUT_MS)
    container.connect()
    out = container.fingerprint(SOURCE)
    container.close()
    comm.close()
    return out


def from_hugging_face(model, target, left_out=(), order=None):
    """Memory of the target's ranks, which are 1 and up, after a sync from rank 0, which has the whole tensors: by rank, chunk and name.

    Knows no layout: buffers have the shapes that the preset asks for. `left_out`: members of the target that the parameters, bound in an
    order that follows from `order`, must tell.
    """
    spec = {"model": model, "source": {"framework": "hf", "ranks": [0]}, "target": target}
    left = {**spec, "target": {key: value for key, value in target.items() if key not in left_out}}
    world, hub, held = 1 + len(target["ranks"]), next(hubs), {}

    def work(rank):
        comm = LoopbackComm(hub, rank, world)
        full, preset = reshard.Preset(spec, rank), memory.Preset(left, rank)
        params = full.describe(reshard.DESCRIBE_LAYOUT)["params"]
        if order:
            random.Random(order).shuffle(params)
        for p in params:
            array = np.full(p["shape"], POISON, np.uint16)
            if rank == 0:
                array[...] = oracle.values(p["name"], array.size).reshape(array.shape)
            else:
                held[rank, p["chunk"], p["name"]] = array
            preset.bind(p["name"], array, TARGET if rank else SOURCE, chunk=p["chunk"])
        container = memory.Container(preset, comm, f"rank {rank}", TIMEOUT_MS)
        container.connect()
        container.sync(1)
        for handle in (container, comm, preset, full):
            handle.close()

    on_threads(range(world), work)
    return held


def check_plan(plan, rank, expected):
    """What a preset plans without asking anyone is what a sync then does."""
    check(plan["rank"] == rank, "a plan of rank", plan["rank"])
    said = plan["bytes"]
    check(
        said["received"] == expected["received"],
        f"rank {rank}: a plan says {said} received instead of",
        expected["received"],
    )
    check(
        said["doubled"] == expected["doubled"],
        f"rank {rank}: a plan says {said} doubled instead of",
        expected["doubled"],
    )
    here = said["local"] + said.get("aliased", 0)
    check(
        here == expected["local"] + expected["aliased"],
        f"rank {rank}: a plan says {said}, instead of local and aliased",
        expected,
    )
    check(sum(p["received"] for p in plan["peers"]) == said["received"], f"rank {rank}: peers", plan["peers"])
    check(sum(p["sent"] for p in plan["peers"]) == said["sent"], f"rank {rank}: peers", plan["peers"])


def move_and_sync(ranks, containers, sync):
    """Targets move: bound anew, and the container is bound to the preset again. The former memory stays as it was."""
    former = []
    for r in ranks:
        former += [array for key, array in r.memory["target"].items() if key not in r.shared]
        r.new_targets()
        r.bind()
        containers[r.rank].rebind(r.preset)
    for array in former:
        array[...] = POISON
    memory.copy(former, to_gpus=True)
    on_threads(range(len(ranks)), sync)
    for r in ranks:
        r.check_targets()
    memory.copy(former, to_gpus=False)
    check(all((array == POISON).all() for array in former), "a target that had moved was written")
