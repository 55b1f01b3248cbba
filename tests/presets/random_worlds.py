"""Random small models between random sides, compared with the oracle: every byte, every name, every count of bytes.

RESHARD_WORLDS: how many cases (500). RESHARD_SEED: the first seed (1); a failing case prints its seed, and
RESHARD_SEED=that RESHARD_WORLDS=1 repeats it.
"""

import json
import os
import random

import worlds
from random_specs import random_spec
from worlds import reshard


TOLD = ("mla_down_proj_cut", "mla_down_proj_fusion", "expert_storage", "shared_experts", "fused_qkv_a_proj", "e_score_correction_bias_dtype")


def older_names(name):
    """Those of vLLM before 0.24."""
    return name.replace(".experts.routed_experts.", ".experts.")


def shuffled(rng, value):
    """The same JSON, its members in another order."""
    if isinstance(value, dict):
        items = list(value.items())
        rng.shuffle(items)
        return {key: shuffled(rng, item) for key, item in items}
    return value


def left_open(spec):
    """The spec without members that parameters tell when they are bound."""
    out = dict(spec)
    for role in ("source", "target"):
        keep = {key: value for key, value in spec[role].items() if key not in TOLD or value == "stacked_swapped"}
        out[role] = keep
    try:
        reshard.Preset(out, 0).close()
    except reshard.Error:  # what the members have by default does not fit the model
        return spec
    return out


def case(seed):
    """Runs one; answers what it had in it."""
    rng = random.Random(seed)
    spec, world = random_spec(rng)
    try:
        shared, older = rng.choice([0, 0.5, 1]), rng.random() < 0.5

        def rename(side, name):
            if spec[side]["framework"] == "megatron":
                return "module." * rng.randrange(3) + name
            return older_names(name) if older and spec[side]["framework"] == "vllm" else name

        written = left_open(spec) if rng.random() < 0.3 else spec
        ranks = worlds.run(
            spec,
            world,
            share=lambda param: rng.random() < shared,
            skip_optional=rng.random() < 0.5,
            specs=[shuffled(rng, written) for _ in range(world)],
            left_open=written != spec,
            order=rng.randrange(3),
            rename=rename,
            again=rng.random() < 0.3,
        )
    except Exception as error:
        raise AssertionError(f"seed {seed}: {error}\n{json.dumps(spec)}\non {world} ranks") from error
    return spec, sum(len(r.shared) for r in ranks), sum(len(r.params["target"]) for r in ranks)


def main():
    first, count = int(os.environ.get("RESHARD_SEED", 1)), int(os.environ.get("RESHARD_WORLDS", 500))
    seen, shared, targets, experts = {}, 0, 0, 0
    for seed in range(first, first + count):
        spec, aliased, params = case(seed)
        pair = f"{spec['source']['framework']} to {spec['target']['framework']}"
        seen[pair] = seen.get(pair, 0) + 1
        shared, targets = shared + aliased, targets + params
        experts += any("expert" in member for member in spec["model"])
    pairs = ", ".join(f"{n} {pair}" for pair, n in sorted(seen.items()))
    print(
        f"random worlds: {count} ({pairs}; {experts} with experts), {targets} target parameters, {shared} of them the source's own memory"
    )


if __name__ == "__main__":
    main()
