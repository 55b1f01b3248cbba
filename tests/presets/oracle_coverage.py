"""The oracle alone: on both sides of random worlds every element of every tensor is held as often as the sizes of the world say.

RESHARD_WORLDS: how many worlds (200). RESHARD_SEED: the first seed (1).
"""

import json
import os
import random

import numpy as np
import oracle
from random_specs import random_spec

# What no tensor parallelism cuts: norms, routers, the patches' embedding, biases of projections whose input is cut.
WHOLE = (
    "norm.weight", ".norm1.weight", ".norm2.weight", ".ln_q.weight", ".gate.weight", ".e_score_correction_bias", ".shared_expert_gate.weight",
    "patch_embed.proj.weight", ".attn.proj.bias", ".mlp.down_proj.bias", ".merger.mlp.2.bias",
)  # fmt: skip
DOWN = (".q_a_proj.weight", ".kv_a_proj_with_mqa.weight")
EMBEDDING, HEAD, NORM = "model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"


def layer_of(name):
    return int(name.split(".")[2]) if name.startswith("model.layers.") else 0


def is_expert(name):
    return ".experts." in name


def megatron_times(model, side, role, name):
    ranks, tp, pp = len(oracle.ranks_of(side)), side.get("tensor_model_parallel_size", 1), side.get("pipeline_model_parallel_size", 1)
    mtp = side.get("mtp_num_layers") or 0
    if layer_of(name) >= model.layers + mtp:
        return 0
    if is_expert(name):
        ep, etp = side.get("expert_model_parallel_size", 1), side.get("expert_tensor_parallel_size") or tp
        return ranks // (ep * pp * etp)  # MindSpeed's TP ranks are as many runs of experts
    replicas = ranks // (tp * pp)
    if name == EMBEDDING:
        copies = ((mtp > 0) + model.tied) * (pp > 1) if role == "target" else 0
        return replicas * (1 + copies)
    whole = name.endswith(WHOLE)
    if name.endswith(DOWN):
        whole = not side.get("mla_down_proj_cut", side.get("transformer_impl") == "local")
    if name.startswith("visual.") and side.get("vision_names") == "megatron_bridge":
        whole = True
    return replicas * (tp if whole else 1)


def vllm_times(model, side, role, name):
    tp, pp, dp = (side.get(f"{kind}_parallel_size", 1) for kind in ("tensor", "pipeline", "data"))
    engines, parallel = side.get("replicas", 1), side.get("enable_expert_parallel", False)
    drafts = model.mtp if side.get("mtp_drafter") else 0
    if layer_of(name) >= model.layers + drafts:
        return 0
    if is_expert(name):
        maps = side.get("physical_to_logical_map")
        if not parallel or not maps or layer_of(name) >= model.layers:
            return engines
        return engines * maps[model.moe_layers.index(layer_of(name))].count(int(name.split(".experts.")[1].split(".")[0]))
    whole, stages = name.endswith(WHOLE + DOWN + (".eh_proj.weight",)), 1
    everywhere = model.family in ("Mixtral", "Qwen2Moe", "Qwen3Moe")
    if name == EMBEDDING:
        stages = pp if everywhere or model.family == "Qwen3Next" else 2 if model.tied and pp > 1 else 1
    if name == HEAD:
        stages = pp if everywhere or model.family == "Qwen3Next" else 1
    if name == (EMBEDDING if model.tied else HEAD):
        stages += drafts
    if name == NORM:
        stages = pp if everywhere else 1
    if name.startswith("visual."):
        stages, whole = pp, whole or side.get("mm_encoder_tp_mode") == "data"
    if ".shared_expert" in name and model.family in ("DeepseekV2", "DeepseekV3", "Qwen3Next"):
        whole = whole or side.get("shared_experts", "whole" if parallel and tp > 1 and dp > 1 else "cut") == "whole"
    times = engines * dp * stages * (tp if whole else 1)
    if ".self_attn.k_proj" in name or ".self_attn.v_proj" in name:
        times *= max(1, tp // model.kv_heads)
    if name.endswith(".kv_b_proj.weight") and side.get("mla_derived_weights"):
        times *= 2
    return times


def hf_times(model, side, role, name):
    return len(oracle.ranks_of(side))


TIMES = {"megatron": megatron_times, "vllm": vllm_times, "hf": hf_times}


def check(spec, world):
    model = oracle.model_of(spec)
    for role in ("source", "target"):
        held = np.zeros(model.elements, int)
        for rank in range(world):
            params = oracle.params(spec, role, rank, model)
            assert len({p.key for p in params}) == len(params), f"{role}, rank {rank}: two parameters of one name"
            for p in params:
                padded = any(part in p.name for part in ("embed", "output_layer", "head", "experts.w13", "experts.w2", "routed_experts."))
                assert p.shape and (padded or p.real.size == p.elements.size), p.name
                assert p.required or role == "source", p.name
                if p.required:
                    np.add.at(held, p.real, 1)
        for name in model.shapes:
            times, expected = held[model[name]], TIMES[spec[role]["framework"]](model, spec[role], role, name)
            assert (times == expected).all(), f"{role}: {name} {times.min()} to {times.max()} times instead of {expected}"
    return len(model.shapes)


def main():
    first, count = int(os.environ.get("RESHARD_SEED", 1)), int(os.environ.get("RESHARD_WORLDS", 200))
    tensors = 0
    for seed in range(first, first + count):
        spec, world = random_spec(random.Random(seed))
        try:
            tensors += check(spec, world)
        except Exception as error:
            raise AssertionError(f"seed {seed}: {error}\n{json.dumps(spec)}\non {world} ranks") from error
    print(f"coverage: {count} worlds, {tensors} tensors, every element of them as often as it should be")


if __name__ == "__main__":
    main()
