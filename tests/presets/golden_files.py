"""What real vLLM holds of models that the oracle does not know, by golden file."""

import hashlib
import json
import os

import worlds
from worlds import check

FOLDER = os.path.join(os.path.dirname(__file__), "..", "goldens", "vllm")
FILES = ("gpt_oss.tp2pp1ep0dp1.json", "qwen2_5_vl.tp2pp1ep0dp1.json")


def compare(name, golden, config, rename=lambda name: name):
    """What ranks of vLLM have of whole tensors, which are bound as `rename` says."""
    ranks = list(range(1, len(golden["ranks"]) + 1))
    target = {"framework": "vllm", "ranks": ranks, "tensor_parallel_size": golden["setting"]["tp"]}
    memory = worlds.from_hugging_face(config, target, rename)
    count = 0
    for rank, held in enumerate(golden["ranks"], 1):
        check({name for r, _, name in memory if r == rank} == held["params"].keys(), f"{name}, rank {rank}: other names")
        for param, said in held["params"].items():
            array = memory[rank, 0, param]
            where = f"{name}, rank {rank}: {param}:"
            check(list(array.shape) == said["shape"], where, array.shape, "instead of", said["shape"])
            # What vLLM leaves zero, nobody has written: rows of padding, and the second rank's biases of the down projection.
            array[array == worlds.POISON] = 0
            check(hashlib.sha256(array.tobytes()).hexdigest() == said["sha256"], where, "other bytes")
            count += 1
    return count


def nested(config):
    """As newer releases of transformers write a model with a vision tower: the decoder's members apart."""
    outer = ("architectures", "vision_config", "torch_dtype", "model_type")
    return {k: config[k] for k in outer} | {"text_config": {k: v for k, v in config.items() if k not in outer}}


def newer(name):
    """The names of a checkpoint that such a release writes."""
    if name.startswith("visual."):
        return "model." + name
    return name.replace("model.", "model.language_model.", 1)


def main():
    count = 0
    for name in FILES:
        with open(os.path.join(FOLDER, name)) as file:
            golden = json.load(file)
        count += compare(name, golden, golden["config"])
        if "vision_config" in golden["config"]:
            count += compare(name, golden, nested(golden["config"]), newer)
    print(f"golden_files: {count} parameters")


if __name__ == "__main__":
    main()
