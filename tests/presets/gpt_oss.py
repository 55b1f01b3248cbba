"""gpt-oss, whose experts are one tensor a projection: what real vLLM holds of it, by golden file."""

import hashlib
import json
import os

import worlds
from worlds import check

GOLDEN = os.path.join(os.path.dirname(__file__), "..", "goldens", "vllm", "gpt_oss.tp2pp1ep0dp1.json")


def main():
    with open(GOLDEN) as file:
        golden = json.load(file)
    ranks = list(range(1, len(golden["ranks"]) + 1))
    target = {"framework": "vllm", "ranks": ranks, "tensor_parallel_size": golden["setting"]["tp"]}
    memory = worlds.from_hugging_face(golden["config"], target)
    count = 0
    for rank, held in enumerate(golden["ranks"], 1):
        check({name for r, _, name in memory if r == rank} == held["params"].keys(), f"rank {rank}: other names")
        for name, param in held["params"].items():
            array = memory[rank, 0, name]
            check(list(array.shape) == param["shape"], f"rank {rank}: {name}: {array.shape} instead of {param['shape']}")
            # What vLLM leaves zero, nobody has written: rows of padding, and the second rank's biases of the down projection.
            array[array == worlds.POISON] = 0
            check(hashlib.sha256(array.tobytes()).hexdigest() == param["sha256"], f"rank {rank}: {name}: other bytes")
            count += 1
    print(f"gpt_oss: {count} parameters")


if __name__ == "__main__":
    main()
