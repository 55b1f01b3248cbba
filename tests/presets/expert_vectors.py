"""Worked examples of experts and MLA: of the oracle, and of the library by syncs that are compared with the oracle.

expert_vectors.py [--oracle]: only the oracle, in numpy alone.
"""

import sys

import oracle

TP, PP, EP, ETP = (
    "tensor_model_parallel_size",
    "pipeline_model_parallel_size",
    "expert_model_parallel_size",
    "expert_tensor_parallel_size",
)
V_TP, V_DP, PARALLEL = "tensor_parallel_size", "data_parallel_size", "enable_expert_parallel"
PLACEMENT, MAP, STORAGE = "expert_placement_strategy", "physical_to_logical_map", "expert_storage"

# Sizes, rank, (part of an expert, parts; part of the experts, parts).
COORDINATES = [
    (16, {TP: 2, PP: 2, EP: 4, ETP: 1}, 5, (0, 1, 1, 4)),
    (16, {TP: 2, PP: 2, EP: 4, ETP: 1}, 10, (0, 1, 2, 4)),
    (32, {TP: 2, PP: 2, "context_parallel_size": 2, EP: 4, ETP: 2}, 13, (1, 2, 2, 4)),
    (32, {TP: 2, PP: 2, "context_parallel_size": 2, EP: 4}, 13, (1, 2, 2, 4)),
    # MindSpeed's DeepSeek-R1: TP 4 and EP 8 make 32 runs of experts.
    (256, {TP: 4, PP: 8, EP: 8, "moe_tp_extend_ep": True}, 37, (0, 1, 5, 32)),
]  # fmt: skip

# A side's members, experts, ranks that share them: the experts of each.
SLOTS = [
    ({}, 10, 4, [[0, 1, 2], [3, 4, 5], [6, 7], [8, 9]]),
    ({PLACEMENT: "linear"}, 6, 2, [[0, 1, 2], [3, 4, 5]]),
    ({PLACEMENT: "round_robin"}, 8, 4, [[0, 4], [1, 5], [2, 6], [3, 7]]),
    ({PLACEMENT: "round_robin"}, 5, 2, [[0, 2, 4], [1, 3]]),
    ({MAP: [[0, 1, 2, 3, 4, 5, 6, 7, 0, 1, 2, 3]]}, 8, 4, [[0, 1, 2], [3, 4, 5], [6, 7, 0], [1, 2, 3]]),
]  # fmt: skip

# One parameter of each rank: the letter of the projection, the expert, the row and the column, as its memory has them.
G, U = "g0.00 g0.01 g0.10 g0.11", "u0.00 u0.01 u0.10 u0.11"
G1, U1 = G.replace("g0", "g1"), U.replace("u0", "u1")
TURNED = "g0.00 g0.10 u0.00 u0.10 g0.01 g0.11 u0.01 u0.11"  # input by output, gate and up in a row
GROUPED, SEQUENTIAL = {"moe_grouped_gemm": True}, {}
SINGLE = {**GROUPED, "moe_single_grouped_weight": True}
LEGACY = {"moe_use_legacy_grouped_gemm": True}
E, M13, M2 = "mlp.experts.", "mlp.experts.routed_experts.w13_weight", "mlp.experts.routed_experts.w2_weight"
SHARDS = [
    ("megatron", 1, 1, SEQUENTIAL, E + "local_experts.0.linear_fc1.weight", f"{G} {U}"),
    ("megatron", 2, 1, {TP: 2, **GROUPED}, E + "linear_fc1.weight0", "g0.00 g0.01 u0.00 u0.01 ; g0.10 g0.11 u0.10 u0.11"),
    ("megatron", 2, 1, {TP: 2, **GROUPED}, E + "linear_fc2.weight0", "d0.00 d0.10 ; d0.01 d0.11"),
    ("megatron", 2, 2, {EP: 2, **GROUPED}, E + "linear_fc1.weight0", f"{G} {U} ; {G1} {U1}"),
    ("megatron", 1, 2, SINGLE, E + "linear_fc1.weight", f"{G} {U} {G1} {U1}"),
    ("megatron", 2, 1, {ETP: 2, **SINGLE}, E + "linear_fc1.weight", "g0.00 g0.01 u0.00 u0.01 ; g0.10 g0.11 u0.10 u0.11"),
    ("megatron", 2, 2, {ETP: 2, **SINGLE}, E + "linear_fc2.weight", "d0.00 d0.10 d1.00 d1.10 ; d0.01 d0.11 d1.01 d1.11"),
    ("megatron", 1, 1, LEGACY, E + "weight1", TURNED),
    ("megatron", 1, 2, LEGACY, E + "weight1", f"{TURNED} {TURNED.replace('0.', '1.')}"),
    ("megatron", 1, 1, LEGACY, E + "weight2", "d0.00 d0.10 d0.01 d0.11"),
    ("megatron", 2, 1, {ETP: 2, **LEGACY}, E + "weight1", "g0.00 u0.00 g0.01 u0.01 ; g0.10 u0.10 g0.11 u0.11"),
    ("megatron", 2, 2, {TP: 2, "moe_tp_extend_ep": True}, E + "weight2", "d0.00 d0.10 d0.01 d0.11 ; d1.00 d1.10 d1.01 d1.11"),
    ("vllm", 1, 1, {}, M13, f"{G} {U}"),
    ("vllm", 1, 1, {STORAGE: "stacked_swapped"}, M13, f"{U} {G}"),
    ("vllm", 1, 1, {STORAGE: "stacked_transposed"}, M13, TURNED),
    ("vllm", 1, 1, {}, M2, "d0.00 d0.01 d0.10 d0.11"),
    ("vllm", 1, 1, {STORAGE: "stacked_transposed"}, M2, "d0.00 d0.10 d0.01 d0.11"),
    ("vllm", 2, 1, {V_DP: 2}, M2, "d0.00 d0.10 ; d0.01 d0.11"),
    ("vllm", 2, 2, {V_TP: 2, PARALLEL: True, MAP: [[1, 1, 0, 1]]}, M13, f"{G1} {U1} {G1} {U1} ; {G} {U} {G1} {U1}"),
]  # fmt: skip

MLA = {"kv_lora_rank": 512, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128}


def deepseek(q_lora, shared, first, mlp):
    return {
        **MLA,
        "q_lora_rank": q_lora,
        "n_shared_experts": shared,
        "first_k_dense_replace": first,
        "intermediate_size": mlp,
    }


def glm(first, mlp, qk_norm):
    return {"first_k_dense_replace": first, "intermediate_size": mlp, "use_qk_norm": qk_norm, "attention_bias": True, "n_shared_experts": 1}


# Sizes and number of parameters of published models: hidden, layers, heads, kv heads, experts, their width, vocabulary.
TOTALS = [
    ("Qwen3Moe",   2048, 48, 32, 4,  128, 768,  151936, {}, 30_532_122_624),
    ("Qwen3Moe",   4096, 94, 64, 4,  128, 1536, 151936, {}, 235_093_634_560),
    ("Qwen2Moe",   2048, 24, 16, 16, 60,  1408, 151936, {"shared_expert_intermediate_size": 5632}, 14_315_784_192),
    ("Mixtral",    4096, 32, 32, 8,  8,   14336, 32000, {}, 46_702_792_704),
    ("Mixtral",    6144, 56, 48, 8,  8,   16384, 32000, {}, 140_620_634_112),
    ("DeepseekV2", 2048, 27, 16, 16, 64,  1408, 102400, deepseek(None, 2, 1, 10944), 15_706_484_224),
    ("DeepseekV2", 5120, 60, 128, 128, 160, 1536, 102400, deepseek(1536, 2, 1, 12288), 235_741_434_880),
    ("DeepseekV3", 7168, 61, 128, 128, 256, 2048, 129280, deepseek(1536, 1, 3, 18432), 671_026_419_200),
    ("DeepseekV3", 7168, 61, 64, 64, 384, 2048, 163840, deepseek(1536, 1, 1, 18432), 1_026_408_232_448),
    ("DeepseekV3", 2048, 27, 16, 16, 64,  1408, 163840, deepseek(None, 2, 1, 11264), 15_960_110_208),
    ("Glm4Moe",    5120, 92, 96, 8,  160, 1536, 151552, glm(3, 12288, True), 352_797_829_024),
    ("Glm4Moe",    4096, 46, 96, 8,  128, 1408, 151552, glm(1, 10944, False), 106_852_251_264),
]  # fmt: skip


def same(got, expected, *what):
    assert got == expected, f"{what}: {got} instead of {expected}"


def shard_spec(framework, ranks, experts, setting):
    model = {
        "architectures": ["Qwen3MoeForCausalLM"], "hidden_size": 2, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2,
        "head_dim": 1, "intermediate_size": 2, "vocab_size": 2, "num_experts": experts, "moe_intermediate_size": 2,
    }  # fmt: skip
    target = {"framework": framework, "ranks": list(range(1, 1 + ranks)), **setting}
    return {"model": model, "source": {"framework": "hf", "ranks": [0]}, "target": target}


def labels(model, param):
    known = {}
    for expert in range(model.experts):
        for letter, name in zip("gud", model.expert(0, expert)):
            known |= {int(model[name][i, j]): f"{letter}{expert}.{i}{j}" for i in range(2) for j in range(2)}
    return " ".join(known[int(element)] for element in param.elements.ravel())


def oracle_vectors():
    for world, setting, rank, expected in COORDINATES:
        parts, etp, ep = oracle.expert_coordinates({"ranks": list(range(world)), **setting}, rank)
        same((parts["etp"], etp, parts["ep"], ep), expected, setting, rank)
    for setting, experts, ranks, expected in SLOTS:
        same(oracle.expert_slots(setting, experts, ranks, 0), expected, setting)
    for framework, ranks, experts, setting, name, expected in SHARDS:
        spec = shard_spec(framework, ranks, experts, setting)
        model, got = oracle.model_of(spec), []
        for rank in range(1, 1 + ranks):
            (param,) = (p for p in oracle.params(spec, "target", rank, model) if p.name.endswith(f"layers.0.{name}"))
            got.append(labels(model, param))
        same(" ; ".join(got), expected, framework, setting, name)
    for family, hidden, layers, heads, kv_heads, experts, width, vocab, more, total in TOTALS:
        config = {
            "architectures": [family + "ForCausalLM"], "hidden_size": hidden, "num_hidden_layers": layers, "num_attention_heads": heads,
            "num_key_value_heads": kv_heads, "head_dim": 128, "intermediate_size": width, "moe_intermediate_size": width, "vocab_size": vocab,
            oracle.EXPERTS[family]: experts, **more,
        }  # fmt: skip
        same(oracle.Model(config).elements, total, family, hidden, layers)
    return len(COORDINATES) + len(SLOTS) + len(SHARDS) + len(TOTALS)


def library_vectors():
    import worlds

    for framework, ranks, experts, setting, *_ in SHARDS:
        worlds.run(shard_spec(framework, ranks, experts, setting), ranks + 1)
    return len(SHARDS)


def main():
    print(f"expert vectors: {oracle_vectors()} of the oracle")
    if "--oracle" not in sys.argv:
        print(f"expert vectors: {library_vectors()} of the library")


if __name__ == "__main__":
    main()
