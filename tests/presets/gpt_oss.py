"""gpt-oss, whose experts are one tensor a projection: what real vLLM holds of it, by golden file."""

import hashlib
import json
import os

import numpy as np
import worlds
from oracle import values
from worlds import SOURCE, TARGET, check, on_threads, reshard

GOLDEN = os.path.join(os.path.dirname(__file__), "..", "goldens", "vllm", "gpt_oss.tp2pp1ep0dp1.json")
TIMEOUT_MS = 20_000


def main():
    with open(GOLDEN) as file:
        golden = json.load(file)
    ranks, hub, memory = len(golden["ranks"]), next(worlds.hubs), {}
    target = {"framework": "vllm", "ranks": list(range(1, ranks + 1)), "tensor_parallel_size": golden["setting"]["tp"]}
    spec = {"model": golden["config"], "source": {"framework": "hf", "ranks": [0]}, "target": target}

    def work(rank):
        comm = worlds.LoopbackComm(hub, rank, ranks + 1)
        preset = reshard.Preset(spec, rank)
        for p in preset.describe(reshard.DESCRIBE_LAYOUT)["params"]:
            array = np.full(p["shape"], worlds.POISON, np.uint16)
            if rank == 0:
                array[...] = values(p["name"], array.size).reshape(array.shape)
            preset.bind(p["name"], array, SOURCE if rank == 0 else TARGET)
            memory[rank, p["name"]] = array
        container = reshard.Container(preset, comm, f"rank {rank}", TIMEOUT_MS)
        container.connect()
        container.sync(1)
        for handle in (container, comm, preset):
            handle.close()

    on_threads(range(ranks + 1), work)
    count = 0
    for rank, held in enumerate(golden["ranks"], 1):
        check({name for r, name in memory if r == rank} == held["params"].keys(), f"rank {rank}: other names")
        for name, param in held["params"].items():
            array = memory[rank, name]
            check(list(array.shape) == param["shape"], f"rank {rank}: {name}: {array.shape} instead of {param['shape']}")
            # What vLLM leaves zero, nobody has written: rows of padding, and the second rank's biases of the down projection.
            array[array == worlds.POISON] = 0
            check(hashlib.sha256(array.tobytes()).hexdigest() == param["sha256"], f"rank {rank}: {name}: other bytes")
            count += 1
    print(f"gpt_oss: {count} parameters")


if __name__ == "__main__":
    main()
