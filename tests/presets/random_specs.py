"""Random world specs of small models, which the oracle accepts. No library is needed to draw them."""

import math

import oracle
from oracle import EXPERTS
from random_models import DTYPES, random_model

MOST_RANKS = 12  # of one side
EP, ETP = "expert_model_parallel_size", "expert_tensor_parallel_size"
WITH_EXPERTS = (*EXPERTS, "DeepseekV3", "DeepseekV3", "Glm4Moe")
DENSE = ("Llama", "Mistral", "Qwen2", "Qwen3", "Qwen2_5_VL", "Qwen2_5_VL")
TPS = (1, 1, 2, 2, 3, 4, 5, 6, 7, 8)


def pick_ranks(rng, count, taken):
    """`count` communicator ranks, and how they lie to those of the other side."""
    if taken is None:
        ranks = rng.choice([list(range(count)), rng.sample(range(count + 2), count)])
    else:
        free = [r for r in range(max(taken) + 1 + count) if r not in taken]
        kind = rng.choice(["same", "overlap", "disjoint"])
        if kind == "disjoint":
            ranks = free[:count]
        elif kind == "same" and len(taken) >= count:
            ranks = rng.sample(taken, count) if rng.random() < 0.5 else taken[:count]
        else:
            ranks = rng.sample(range(max(max(taken) + 1, count) + 1), count)
    return ranks


def written(rng, ranks):
    """The ranks as a list or as a string."""
    if rng.random() < 0.5:
        return list(ranks)
    spans = []
    for rank in ranks:
        if spans and spans[-1][1] == rank - 1:
            spans[-1][1] = rank
        else:
            spans.append([rank, rank])
    return ",".join(f"{a}-{b}" if a < b else f"{a}" for a, b in spans)


def cut(rng, total, parts, least):
    """`total` as the sum of so many numbers."""
    sizes = [least] * parts
    for _ in range(total - least * parts):
        sizes[rng.randrange(parts)] += 1
    return sizes


def as_list(rng, sizes):
    return ",".join(map(str, sizes)) if rng.random() < 0.5 else sizes


def layout_text(rng, sizes):
    """Entries with so many layers each, with repeats now and then written short."""
    entries = []
    for i, size in enumerate(sizes):
        t = f"t*{size}" if size > 1 and rng.random() < 0.5 else "t" * size
        entries.append("E" * (i == 0) + t + "L" * (i == len(sizes) - 1))
    text = "|".join(entries)
    for size in (1, 2):
        group = "t" * size + "|"
        for times in (3, 2):
            if group * times in text and rng.random() < 0.5:
                return text.replace(group * times, f"({group})*{times},", 1)
    return text


KINDS = ("even", "even", "first", "last", "both", "account", "layout", "layout", "list", "noop", "noop first")


def megatron_experts(rng, wish, side, tp, te):
    """Adds the members for experts; answers of how many ranks a stage must be a multiple."""
    ep, etp = wish["ep"], wish["etp"] or tp
    if ep > 1 or rng.random() < 0.3:
        side[EP] = ep
    if wish["extend"]:
        side["moe_tp_extend_ep"] = True
        etp = tp
    elif wish["etp"]:
        side[ETP] = etp
    storage = rng.choice(["sequential", "grouped", "grouped", "legacy", "legacy"])
    if storage == "legacy":
        side["moe_use_legacy_grouped_gemm"] = True
    if storage == "grouped" or rng.random() < 0.2:
        side["moe_grouped_gemm"] = storage == "grouped" or rng.random() < 0.5
    if storage == "grouped" and not wish["extend"] and te and rng.random() < 0.4:
        side["moe_single_grouped_weight"] = rng.random() < 0.9
    return etp * ep


def megatron_side(rng, wish, model, role):
    layers, vocab = model.layers, model.vocab
    tp, pp, vpp, kind = wish["tp"], wish["pp"], wish["vpp"], wish["kind"]
    side = {"framework": "megatron", "tensor_model_parallel_size": tp}
    if rng.random() < 0.5:
        side["transformer_impl"] = rng.choice(["transformer_engine", "local"])
    te = side.get("transformer_impl") != "local"
    if te and rng.random() < 0.25:
        side["layernorm_zero_centered_gamma"] = rng.random() < 0.9
    cp, dp = rng.choice([1, 1, 1, 2]), rng.choice([1, 1, 2, 3])
    if model.experts:
        of = megatron_experts(rng, wish, side, tp, te)
        dp = math.lcm(of, tp * cp) // (tp * cp) * rng.choice([1, 1, 1, 2])
    if model.mla and rng.random() < 0.4:
        side["mla_down_proj_cut"] = rng.random() < 0.5
    if model.mla and model.q_lora and rng.random() < 0.4:
        side["mla_down_proj_fusion"] = rng.random() < 0.8
    if wish["mtp"] is not None:
        side["mtp_num_layers"] = wish["mtp"]
    if model.vision:
        random_vision(rng, side, model, pp, vpp)
    if pp > 1 or rng.random() < 0.5:
        side["pipeline_model_parallel_size"] = pp
    if cp > 1:
        side["context_parallel_size"] = cp
    if rng.random() < 0.3:
        side["data_parallel_size"] = dp
    if rng.random() < 0.4:
        side["use_tp_pp_dp_mapping"] = rng.random() < 0.8
    first, last = "num_layers_in_first_pipeline_stage", "num_layers_in_last_pipeline_stage"
    chunks = vpp or 1
    if kind in ("first", "both", "noop first"):
        side[first] = rng.randint(1, 3) * chunks
    if kind == "both" and pp == 2:
        vpp, chunks = None, 1  # Megatron divides by zero there
        side[first] = min(side[first], layers - 1)
    if kind in ("last", "both"):
        side[last] = rng.randint(1, 3) * chunks
    if kind == "account":
        side["account_for_embedding_in_pipeline_split"] = rng.random() < 0.7
        side["account_for_loss_in_pipeline_split"] = rng.random() < 0.7
    if kind.startswith("noop"):
        slots = layers + rng.randint(1, 4)
        side["noop_layers"] = as_list(rng, sorted(rng.sample(range(slots), slots - layers)))
    if kind == "list":
        if layers < pp:
            return None
        side["num_layer_list"] = as_list(rng, cut(rng, layers, pp, 1))
        vpp = None
    if kind == "layout":
        if wish["mtp"]:
            return None
        if layers < pp * chunks - 2:
            return None
        inner = cut(rng, layers, pp * chunks, 0)
        side["pipeline_model_parallel_layout"] = layout_text(rng, inner)
        if not all(inner[1:-1]):
            return None  # an entry without anything: not a question for now
        vpp = rng.choice([vpp, None])
    if vpp:
        side["virtual_pipeline_model_parallel_size"] = vpp
    padding = rng.choice(["divisor", "divisor", "explicit", "default"])
    if padding == "divisor":
        side["make_vocab_size_divisible_by"] = rng.choice([1, 2, 3, 8, 16])
    elif padding == "explicit":
        side["padded_vocab_size"] = oracle.rounded_up(vocab, tp) + tp * rng.randint(0, 5)
    return side, tp * pp * cp * dp


def random_vision(rng, side, model, pp, vpp):
    if names := rng.choice([None, "mbridge", "mindspeed_mm", "mindspeed_mm", "megatron_bridge"]):
        side["vision_names"] = names
    if names == "mindspeed_mm" and not vpp and rng.random() < 0.9:
        side["vision_num_layer_list"] = as_list(rng, cut(rng, model.vision.depth, pp, 0))


def eplb_maps(rng, model, ranks):
    """For every layer with experts: slots dealt to the ranks, every expert in one at least."""
    slots = oracle.rounded_up(model.experts, ranks) + ranks * rng.randint(0, 2)
    maps = []
    for _ in model.moe_layers:
        held = list(range(model.experts)) + [rng.randrange(model.experts) for _ in range(slots - model.experts)]
        if rng.random() < 0.8:
            rng.shuffle(held)
        maps.append(held)
    return maps


def vllm_side(rng, wish, model, role):
    layers = model.layers
    tp, pp = wish["tp"], wish["pp"]
    side = {"framework": "vllm", "tensor_parallel_size": tp}
    dp, replicas = wish["dp"], rng.choice([1, 1, 1, 2])
    if model.experts:
        if wish["parallel"] or rng.random() < 0.2:
            side["enable_expert_parallel"] = wish["parallel"]
        if wish["parallel"]:
            placement = rng.choice(["default", "linear", "round_robin", "map", "map"])
            if placement == "map":
                side["physical_to_logical_map"] = eplb_maps(rng, model, tp * dp)
            elif placement != "default":
                side["expert_placement_strategy"] = placement
        if rng.random() < 0.6:
            side["expert_storage"] = rng.choice(["stacked", "stacked_swapped", "stacked_transposed"])
        if rng.random() < 0.2:
            here = model.expert_mlp if wish["parallel"] else model.expert_mlp // (tp * dp)
            side["moe_padded_intermediate_size"] = here + rng.choice([0, 1, 3])
        if rng.random() < 0.2:
            side["moe_padded_hidden_size"] = model.hidden + rng.choice([0, 2, 5])
        if model.router_bias and rng.random() < 0.4:
            side["e_score_correction_bias_dtype"] = rng.choice(["float32", "bfloat16", "bfloat16", "float16"])
        if model.shared and model.family in ("DeepseekV2", "DeepseekV3", "Qwen3Next") and rng.random() < 0.3:
            side["shared_experts"] = rng.choice(["whole", "whole", "cut"])
    if model.mla and role == "target" and rng.random() < 0.6:
        side["mla_derived_weights"] = "copies"
    if model.mla and model.q_lora and rng.random() < 0.3:
        side["fused_qkv_a_proj"] = rng.random() < 0.3
    if model.vision and rng.random() < 0.6:
        side["mm_encoder_tp_mode"] = rng.choice(["weights", "data"])
    if wish["mtp"] or (wish["mtp"] == 0 and rng.random() < 0.5):
        side["mtp_drafter"] = wish["mtp"] > 0
    if pp > layers:
        return None
    for key, size in (("pipeline_parallel_size", pp), ("data_parallel_size", dp), ("replicas", replicas)):
        if size > 1 or rng.random() < 0.3:
            side[key] = size
    if rng.random() < 0.3:
        side["VLLM_PP_LAYER_PARTITION"] = as_list(rng, cut(rng, layers, pp, 1))
    if rng.random() < 0.8:
        side["vocab_padding_size"] = rng.choice([1, tp, 2 * tp, 8, 16 * tp, 64])
    return side, tp * pp * dp * replicas


def hf_side(rng, wish, model, role):
    return {"framework": "hf"}, rng.choice([1, 1, 2, 3])


SIDES = {"megatron": megatron_side, "vllm": vllm_side, "hf": hf_side}


def wish(rng, family):
    """What a side shall be, whatever the model; the rest is tried until it fits."""
    experts = family in EXPERTS
    framework = rng.choice(["megatron", "megatron", "megatron", "vllm", "vllm", "hf"])
    pp = rng.choice([1, 1, 1, 2, 2, 3] if experts else [1, 2, 2, 2, 3, 4])
    tp = 1 if framework == "hf" else rng.choice((1, 1, 2, 2, 3, 4, 6) if experts else TPS)
    vpp = rng.choice([None, None, 2, 3]) if pp > 1 else None
    return {
        "family": family, "framework": framework, "tp": tp, "pp": pp, "vpp": vpp, "kind": rng.choice(KINDS) if pp > 1 else "even",
        "dp": rng.choice([1, 1, 2, 2, 3] if experts else [1, 1, 1, 2]), "parallel": rng.random() < 0.6,
        "ep": rng.choice([1, 1, 2, 2, 3, 4]), "etp": rng.choice([None, None, 1, 1, 2, 3]), "extend": rng.random() < 0.15,
        "mtp": None,
    }  # fmt: skip


def ask_for_mtp(rng, wishes, family, most):
    """Now and then layers for multi-token prediction: as a rule as many on both sides, or on the source's alone."""
    has = family in ("DeepseekV3", "Glm4Moe")
    for wish in wishes:
        wish["mtp"] = rng.choice([None, 0]) if has else None
    if most and has and rng.random() < 0.8:
        count = rng.randint(1, most) if all(w["framework"] != "vllm" for w in wishes) else most
        for wish in wishes if rng.random() < 0.7 else [rng.choice(wishes)]:
            wish["mtp"] = count


def attempt(rng, wishes, same):
    """A spec, or None where the choices do not fit each other."""
    layers = rng.randint(1, 6 if wishes[0]["family"] in EXPERTS else 10)
    config, dtype = random_model(rng, wishes, layers)
    model = oracle.Model(config)
    ask_for_mtp(rng, wishes, model.family, config.get("num_nextn_predict_layers", 0))
    if model.experts and not model.moe_layers:
        return None
    made = [SIDES[w["framework"]](rng, w, model, role) for w, role in zip(wishes, ("source", "target"))]
    if None in made:
        return None
    if same:
        made[1] = (dict(made[0][0]), made[0][1])  # the same layout on both sides
    if max(ranks for _, ranks in made) > MOST_RANKS:
        return None
    spec, taken, casts = {"model": config}, None, rng.random() < 0.25
    for role, (side, count) in zip(("source", "target"), made):
        ranks = pick_ranks(rng, count, taken)
        taken = taken or ranks
        side["ranks"] = written(rng, ranks)
        if rng.random() < (0.8 if casts else 0.2):
            side["params_dtype" if side["framework"] == "megatron" else "dtype"] = rng.choice(DTYPES) if casts else dtype
        spec[role] = side
    if made[0][0].get("framework") == made[1][0].get("framework") and rng.random() < 0.3 and made[0][1] == made[1][1]:
        spec["target"] = {**spec["source"]}  # the same ranks too: memory of both sides
    if rng.random() < 0.2:
        spec["ranks_per_host"] = rng.choice([1, 2, 4, 8])
    if rng.random() < 0.1:
        spec["link_gb_per_s"] = {"same_host": 100, "network": 25}
    if rng.random() < 0.1:
        spec["ignore"] = ["*.rotary_emb.inv_freq"]
    world = 1 + max(oracle.ranks_of(spec["source"]) + oracle.ranks_of(spec["target"]))
    try:
        model = oracle.model_of(spec)
        for role in ("source", "target"):
            for rank in range(world):
                oracle.params(spec, role, rank, model)
    except oracle.Refused:
        return None
    return spec, world + rng.choice([0, 0, 0, 1])  # now and then with a rank that has no part


def random_spec(rng):
    while True:
        family = rng.choice(rng.choice([DENSE, WITH_EXPERTS, WITH_EXPERTS]))
        wishes, same = [wish(rng, family), wish(rng, family)], rng.random() < 0.2
        for _ in range(100):
            if found := attempt(rng, wishes, same):
                return found
