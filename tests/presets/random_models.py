"""Random configs, small and odd, that fit what both sides of a world shall be."""

import math

import oracle
from oracle import EXPERTS

DTYPES = ("bfloat16", "float16", "float32")

def divisors(number):
    return [n for n in range(1, number + 1) if number % n == 0]


def random_model(rng, wishes, layers):
    """A config whose sizes both tensor parallel sizes divide."""
    tps = [w["tp"] for w in wishes]
    together = math.lcm(*tps)
    heads = together * rng.choice([1, 1, 2] if together < 20 else [1])
    kv_heads = rng.choice([n for n in divisors(heads) if all(n % tp == 0 or tp % n == 0 for tp in tps)])
    head, family = rng.choice([1, 2, 2, 4, 6]), wishes[0]["family"]
    config = {
        "architectures": [family + ("ForConditionalGeneration" if family == "Qwen2_5_VL" else "ForCausalLM")],
        "hidden_size": rng.randint(1, 24),
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head,
        "intermediate_size": together * rng.randint(1, 3),
        "vocab_size": rng.choice([rng.randint(1, 9), rng.randint(10, 300)]),
        "rope_theta": 10000.0,
        "hidden_act": "silu",
    }
    if family in ("Qwen2", "Qwen2Moe", "Qwen2_5_VL") or rng.random() < 0.3:  # vLLM's Qwen2 knows no other head size
        config["hidden_size"] = heads * head
        if rng.random() < 0.7 and not family.startswith(("Qwen3", "Glm")):
            del config["head_dim"]
    if kv_heads == heads and rng.random() < 0.5 and family == "Llama":
        del config["num_key_value_heads"]
    if family.startswith("Deepseek"):
        random_mla(rng, config, together)
    if family == "Glm4Moe":
        random_glm(rng, config)
    if family == "Qwen3Next":
        kinds = {"layer_types": ["full_attention"] * layers, "full_attention_interval": 1}
        config |= {member: kinds[member] for member in rng.choice([list(kinds), ["layer_types"], ["full_attention_interval"]])}
    if family in EXPERTS:
        random_experts(rng, config, wishes, family)
    if rng.random() < 0.5:
        config["tie_word_embeddings"] = rng.random() < 0.8
    dtype = rng.choice([None, "bfloat16", *DTYPES])
    if dtype:
        config[rng.choice(["dtype", "torch_dtype"])] = dtype
    if family == "Qwen2_5_VL":
        config = random_vision(rng, config, together)
    return config, dtype or "bfloat16"


def random_glm(rng, config):
    for member in ("attention_bias", "use_qk_norm"):
        if rng.random() < 0.8:
            config[member] = rng.random() < 0.7
    config["num_nextn_predict_layers"] = rng.choice([0, 1, 1, 2])


def random_vision(rng, config, together):
    """A vision tower that can be cut as the text can, or one that must be whole; and the text's members beside it or of their own."""
    heads = together * rng.choice([1, 1, 2]) if rng.random() < 0.8 else rng.randint(1, 5)
    vision = {
        "depth": rng.randint(1, 4), "hidden_size": heads * rng.choice([1, 2, 3]), "num_heads": heads, "patch_size": rng.randint(1, 3),
        "intermediate_size": together * rng.randint(1, 2) if rng.random() < 0.8 else rng.randint(1, 7), "temporal_patch_size": rng.randint(1, 2),
        "spatial_merge_size": rng.choice([1, 2, 2]), "out_hidden_size": config["hidden_size"],
    }  # fmt: skip
    for member in ("in_channels", "in_chans"):
        if rng.random() < 0.4:
            vision[member] = 3
    if rng.random() < 0.6:
        return {**config, "vision_config": vision}
    outer = {"architectures": config.pop("architectures"), "vision_config": vision}
    for member in ("dtype", "torch_dtype", "tie_word_embeddings"):
        if member in config and rng.random() < 0.5:
            outer[member] = config[member]
    return {**outer, "text_config": config}


def random_mla(rng, config, together):
    for ignored in ("head_dim", "num_key_value_heads"):
        if rng.random() < 0.5:
            config.pop(ignored, None)
    config["num_nextn_predict_layers"] = rng.choice([0, 1, 1, 2])
    rope, divides = rng.randint(1, 4), rng.random() < 0.8
    down = oracle.rounded_up(rng.randint(rope + 1, rope + 8), together) if divides else rng.randint(rope + 1, rope + 12)
    config |= {
        "qk_nope_head_dim": rng.randint(1, 4),
        "qk_rope_head_dim": rope,
        "v_head_dim": rng.randint(1, 4),
        "kv_lora_rank": down - rope,
    }
    if rng.random() < 0.6:
        config["q_lora_rank"] = together * rng.randint(1, 2) if divides else rng.randint(1, 9)
    elif rng.random() < 0.5:
        config["q_lora_rank"] = None


def random_experts(rng, config, wishes, family):
    """As many experts, and as wide, as both sides' cuts allow."""
    together = math.lcm(*(w["tp"] for w in wishes))
    trainers, engines = ([w for w in wishes if w["framework"] == name] for name in ("megatron", "vllm"))
    counts = [w["ep"] * (w["tp"] if w["extend"] else 1) for w in trainers]
    cuts = [1 if w["extend"] else w["etp"] or w["tp"] for w in trainers]
    least = max([w["tp"] * w["dp"] for w in engines if w["parallel"]], default=1)
    cuts += [w["tp"] * w["dp"] for w in engines if not w["parallel"]]
    experts = oracle.rounded_up(max(least, rng.randint(1, 8)), math.lcm(*counts))
    width = math.lcm(*cuts) * rng.choice([1, 1, 2, 3])
    layers = config["num_hidden_layers"]
    config["num_experts_per_tok"] = 1
    config[EXPERTS[family]] = experts
    if family == "Mixtral":
        config["intermediate_size"] = width
        return
    config["moe_intermediate_size"] = width
    if family.startswith("Qwen"):
        if rng.random() < 0.5:
            config["decoder_sparse_step"] = rng.choice([1, 1, 2, 3])
        if rng.random() < 0.5:
            config["mlp_only_layers"] = rng.sample(range(layers), rng.randint(0, layers // 2))
        if family in ("Qwen2Moe", "Qwen3Next"):
            config["shared_expert_intermediate_size"] = together * rng.randint(1, 3)
        return
    if family == "Glm4Moe" or rng.random() < 0.7:
        config["first_k_dense_replace"] = rng.randint(0, layers - 1)
    if family != "Glm4Moe" and rng.random() < 0.4:
        config["moe_layer_freq"] = rng.choice([1, 1, 2])
    if rng.random() < 0.8:
        config["n_shared_experts"] = (
            rng.choice([None, 1, 1, 2]) if width % together == 0 or rng.random() < 0.2 else together
        )
    if family != "Glm4Moe" and rng.random() < 0.6:
        config["topk_method"] = rng.choice(["noaux_tc", "greedy", "group_limited_greedy"])
    if family != "Glm4Moe" and rng.random() < 0.1:
        config[EXPERTS[family]] = None  # MLA without experts
