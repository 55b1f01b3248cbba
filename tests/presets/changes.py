"""Layouts, memory and ranks that change while a job runs: experts that move to other slots, a part of the tensors, memory that goes
elsewhere, engines that come and go.

A model with experts goes from whole tensors on rank 0 to engines that hold its experts by a map; what each slot must hold is written
down here from the tensors alone.
"""

import itertools
import mmap

import numpy as np
import worlds
from memory import Container, Preset
from oracle import values
from worlds import SOURCE, TARGET, check, on_threads, reshard

HIDDEN, WIDTH, EXPERTS, LAYERS, ENGINES = 16, 8, 6, 3, 2
CONFIG = {
    "architectures": ["Qwen3MoeForCausalLM"], "hidden_size": HIDDEN, "num_hidden_layers": LAYERS, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 4, "intermediate_size": 24, "vocab_size": 64, "num_experts": EXPERTS, "moe_intermediate_size": WIDTH,
}  # fmt: skip
W13 = "model.layers.{}.mlp.experts.routed_experts.w13_weight"
TIMEOUT_MS = 20_000


def spec(maps, replicas):
    target = {"framework": "vllm", "ranks": f"1-{ENGINES * replicas}", "tensor_parallel_size": ENGINES, "enable_expert_parallel": True}
    target["replicas"] = replicas
    if maps:
        target["physical_to_logical_map"] = maps
    return {"model": CONFIG, "source": {"framework": "hf", "ranks": [0]}, "target": target}


class Memory:
    """Pages of their own, which are gone after close(): whoever still reads them dies."""

    def __init__(self, shape, fill):
        count = int(np.prod(shape))
        self._map = mmap.mmap(-1, 2 * count)
        self.array = np.frombuffer(self._map, np.uint16, count).reshape(shape)
        self.array[...] = fill

    def close(self):
        self.array = None
        self._map.close()


class Job:
    """All ranks as threads; rank 0 has whole tensors, the others are the engines', at first of one."""

    def __init__(self, maps, hub):
        self.presets, self.memory, self.containers, self.comms = {}, {}, {}, {}
        self.engines(1, maps, hub)

    def engines(self, replicas, maps, hub):
        """So many engines from now on: ranks that stay get the new spec and new ranks beside them."""
        self.replicas = replicas
        world = 1 + ENGINES * replicas
        for rank in [rank for rank in self.containers if rank >= world]:
            for handles in (self.containers, self.comms, self.presets):
                handles.pop(rank).close()
            self.memory = {key: memory for key, memory in self.memory.items() if key[0] != rank}
        for rank in range(world):
            comm = worlds.LoopbackComm(hub, rank, world)
            self.describe(rank, maps)
            if rank in self.containers:
                self.rebind(rank)
                self.containers[rank].set_comm(comm)
                self.comms[rank].close()
            else:
                self.containers[rank] = Container(self.presets[rank], comm, f"rank {rank}", TIMEOUT_MS)
            self.comms[rank] = comm
        self.everywhere(lambda c: c.connect())

    def describe(self, rank, maps):
        """A preset with memory for whatever has none of its shape yet."""
        if rank in self.presets:
            self.presets[rank].close()
        preset = self.presets[rank] = Preset(spec(maps, self.replicas), rank)
        for p in preset.describe(reshard.DESCRIBE_LAYOUT)["params"]:
            key, shape = (rank, p["name"]), tuple(p["shape"])
            if key not in self.memory or self.memory[key].array.shape != shape:
                self.memory[key] = Memory(shape, self.version(p["name"], shape, 1) if rank == 0 else worlds.POISON)
            preset.bind(p["name"], self.memory[key].array, SOURCE if rank == 0 else TARGET)

    def version(self, name, shape, number):
        """The trainer's tensor, different in each version."""
        return (values(name, int(np.prod(shape))) ^ np.uint16(number)).reshape(shape)

    def rebind(self, rank):
        self.containers[rank].rebind(self.presets[rank])

    def train(self, number):
        for (rank, name), memory in self.memory.items():
            if rank == 0:
                memory.array[...] = self.version(name, memory.array.shape, number)

    def everywhere(self, call):
        on_threads(self.containers, lambda rank: call(self.containers[rank]))

    def check_experts(self, slots, numbers):
        """Every slot of every engine holds its expert, of the version that its layer is at."""
        for layer in range(LAYERS):
            per_rank = len(slots[layer]) // ENGINES
            for engine, (at, expert) in itertools.product(range(self.replicas), enumerate(slots[layer])):
                got = self.memory[1 + engine * ENGINES + at // per_rank, W13.format(layer)].array[at % per_rank]
                name = f"model.layers.{layer}.mlp.experts.{expert}.{{}}_proj.weight"
                halves = [self.version(name.format(half), (WIDTH, HIDDEN), numbers[layer]) for half in ("gate", "up")]
                check((got == np.concatenate(halves)).all(), f"layer {layer}, slot {at}: not expert {expert}, version {numbers[layer]}")

    def close(self):
        for handles in (self.containers, self.comms, self.presets):
            for handle in handles.values():
                handle.close()


LINEAR = [list(range(EXPERTS))] * LAYERS
# Two redundant experts: of one layer both on the rank that has the expert already, so that one copy crosses and is doubled there.
FIRST = [[0, 1, 2, 3, 4, 5, 0, 1], [5, 5, 4, 3, 2, 1, 0, 5], [0, 2, 4, 4, 1, 3, 5, 1]]
SECOND = [[3, 3, 3, 0, 1, 2, 4, 5], [0, 1, 2, 3, 4, 5, 0, 1], [1, 0, 3, 2, 5, 4, 4, 5]]


def check_rebalance():
    """Other maps, also with other numbers of slots: every rank rebinds, connects, and the next sync writes the new layout."""
    job = Job(FIRST, next(worlds.hubs))
    job.everywhere(lambda c: c.sync(1))
    job.check_experts(FIRST, [1] * LAYERS)
    for number, maps in ((2, SECOND), (3, None), (4, FIRST)):
        job.train(number)
        for rank in job.containers:
            job.describe(rank, maps)
            job.rebind(rank)
        if number == 2:
            try:
                job.containers[1].sync(number)
                raise AssertionError("a sync before connect")
            except reshard.Error as error:
                check("connect" in str(error), error)
        job.everywhere(lambda c: c.connect())
        job.everywhere(lambda c: c.sync(number))
        job.check_experts(maps or LINEAR, [number] * LAYERS)
    job.close()
    return 4


def check_subset():
    """Only the experts of one layer: the others keep their bytes and their version."""
    job = Job(FIRST, next(worlds.hubs))
    job.everywhere(lambda c: c.sync(1))
    job.train(2)
    job.everywhere(lambda c: c.sync(2, only=["model.layers.1.mlp.experts.*"]))
    job.check_experts(FIRST, [1, 2, 1])
    for rank in range(1, ENGINES + 1):
        versions = [job.containers[rank].param(W13.format(layer)).version for layer in range(LAYERS)]
        check(versions == [1, 2, 1], f"rank {rank}: versions {versions}")
        check(job.containers[rank].param("model.norm.weight").version == 1, "a norm has moved")
    norm = job.memory[1, "model.norm.weight"].array
    check((norm == job.version("model.norm.weight", norm.shape, 1)).all(), "a norm has changed")
    job.everywhere(lambda c: c.sync(3))
    job.check_experts(FIRST, [2] * LAYERS)
    job.close()
    return 2


def check_moved_source():
    """The trainer's memory goes elsewhere and the old is unmapped: no connect, the next sync's readers find it."""
    job = Job(FIRST, next(worlds.hubs))
    job.everywhere(lambda c: c.sync(1))
    old = {key: memory for key, memory in job.memory.items() if key[0] == 0}
    for (rank, name), memory in old.items():
        shape = memory.array.shape
        job.memory[rank, name] = Memory(shape, job.version(name, shape, 2))
        job.presets[0].bind(name, job.memory[rank, name].array, SOURCE)
    job.presets[0]._arrays = {(name, SOURCE, 0): job.memory[0, name].array for _, name in old}
    job.rebind(0)
    for memory in old.values():
        memory.close()
    job.everywhere(lambda c: c.sync(2))
    job.check_experts(FIRST, [2] * LAYERS)
    job.close()
    return 1


def check_engines():
    """Engines come and go between two syncs; the trainer and those that stay are not started again."""
    job = Job(None, next(worlds.hubs))
    job.everywhere(lambda c: c.sync(1))
    job.check_experts(LINEAR, [1] * LAYERS)
    for number, replicas in ((2, 2), (3, 1), (4, 3)):
        job.train(number)
        job.engines(replicas, None, next(worlds.hubs))
        job.everywhere(lambda c: c.sync(number))
        job.check_experts(LINEAR, [number] * LAYERS)
    job.close()
    return 4


def main():
    parts = {part.__name__.removeprefix("check_"): part() for part in (check_rebalance, check_subset, check_moved_source, check_engines)}
    print("changes: " + ", ".join(f"{count} of {part}" for part, count in parts.items()))


if __name__ == "__main__":
    main()
