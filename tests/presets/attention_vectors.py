"""Worked examples of attention: gated query heads, fused and derived projections of MLA, layers for multi-token prediction, vision heads.

attention_vectors.py [--oracle]: only the oracle, in numpy alone; else the library too, by syncs that are compared with the oracle.
"""

import sys

import oracle

TP, PP, V_TP, V_PP = "tensor_model_parallel_size", "pipeline_model_parallel_size", "tensor_parallel_size", "pipeline_parallel_size"
CUT, FUSION, DERIVED, FUSED = "mla_down_proj_cut", "mla_down_proj_fusion", "mla_derived_weights", "fused_qkv_a_proj"
M, V = "megatron", "vllm"
SIZES = {"hidden_size": 1, "num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 1, "intermediate_size": 4, "vocab_size": 4}
NEXT = {
    **SIZES, "architectures": ["Qwen3NextForCausalLM"], "full_attention_interval": 1, "num_experts": 1, "moe_intermediate_size": 4,
    "shared_expert_intermediate_size": 4,
}  # fmt: skip
WIDE = {**NEXT, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 2}
MLA = {
    **SIZES, "architectures": ["DeepseekV3ForCausalLM"], "num_attention_heads": 2, "q_lora_rank": 2, "kv_lora_rank": 2, "qk_nope_head_dim": 1,
    "qk_rope_head_dim": 2, "v_head_dim": 2, "n_routed_experts": 1, "moe_intermediate_size": 4, "n_shared_experts": 1, "num_nextn_predict_layers": 1,
}  # fmt: skip
PREDICTING = {**MLA, "hidden_size": 2}
VISION = {
    **SIZES, "architectures": ["Qwen2_5_VLForConditionalGeneration"], "hidden_size": 4,
    "vision_config": {"depth": 1, "hidden_size": 2, "num_heads": 2, "intermediate_size": 2, "patch_size": 1, "temporal_patch_size": 1,
                      "spatial_merge_size": 1, "out_hidden_size": 4},
}  # fmt: skip
# Letters of a tensor's rows; where its rows are heads', how many a head has and the letters of their parts.
ATTENTION = "model.layers.0.self_attn."
LETTERS = {"k_proj.weight": "k", "v_proj.weight": "v", "q_a_proj.weight": "a", "kv_a_proj_with_mqa.weight": "c"}
MTP = {"mtp_num_layers": 1}
QKV, DOWN = "decoder.layers.0.self_attention.linear_qkv.weight", "decoder.layers.0.self_attention.linear_qkv_down_proj.weight"
V_QKV, V_A = ATTENTION + "qkv_proj.weight", ATTENTION + "fused_qkv_a_proj.weight"
KEYS, VALUES = ATTENTION + "mla_attn.mla_attn.W_UK_T", ATTENTION + "mla_attn.mla_attn.W_UV"
TOWER = "vision_model.decoder.layers.0.self_attention.linear_qkv.bias"
MM_TOWER, V_TOWER = "image_encoder.encoder.blocks.layers.0.self_attention.linear_qkv.bias", "visual.blocks.0.attn.qkv.bias"
# Model, framework, members, name and what every rank holds: a row, or an element, after the letter of its tensor.
SHARDS = [
    (NEXT, M, {}, QKV, "q0 q1 g0 g1 k0 v0 q2 q3 g2 g3 k1 v1"),
    (NEXT, M, {TP: 2}, QKV, "q0 q1 g0 g1 k0 v0 ; q2 q3 g2 g3 k1 v1"),
    (NEXT, M, {TP: 4}, QKV, "q0 q1 g0 ; g1 k0 v0 ; q2 q3 g2 ; g3 k1 v1"),
    (NEXT, V, {}, V_QKV, "q0 g0 q1 g1 q2 g2 q3 g3 k0 k1 v0 v1"),
    (NEXT, V, {V_TP: 2}, V_QKV, "q0 g0 q1 g1 k0 v0 ; q2 g2 q3 g3 k1 v1"),
    (NEXT, V, {V_TP: 4}, V_QKV, "q0 g0 k0 v0 ; q1 g1 k0 v0 ; q2 g2 k1 v1 ; q3 g3 k1 v1"),
    (WIDE, M, {}, QKV, "q0.0 q0.1 q1.0 q1.1 g0.0 g0.1 g1.0 g1.1 k0 k1 v0 v1"),
    (WIDE, V, {}, V_QKV, "q0.0 q0.1 g0.0 g0.1 q1.0 q1.1 g1.0 g1.1 k0 k1 v0 v1"),
    (MLA, M, {FUSION: True}, DOWN, "a0 a1 c0 c1 c2 c3"),
    (MLA, M, {TP: 2, FUSION: True}, DOWN, "a0 a1 c0 c1 c2 c3 ; a0 a1 c0 c1 c2 c3"),
    (MLA, M, {TP: 2, FUSION: True, CUT: True}, DOWN, "a0 c0 c1 ; a1 c2 c3"),
    (MLA, V, {V_TP: 2}, V_A, "a0 a1 c0 c1 c2 c3 ; a0 a1 c0 c1 c2 c3"),
    (MLA, V, {FUSED: False}, ATTENTION + "kv_a_proj_with_mqa.weight", "c0 c1 c2 c3"),
    # Element 2r + c is row r, column c; the rows of a head are one of its key and two of its value.
    (MLA, V, {DERIVED: "copies"}, KEYS, "b0 b1 b6 b7"),
    (MLA, V, {DERIVED: "copies"}, VALUES, "b2 b4 b3 b5 b8 b10 b9 b11"),
    (MLA, V, {V_TP: 2, DERIVED: "copies"}, VALUES, "b2 b4 b3 b5 ; b8 b10 b9 b11"),
    (PREDICTING, M, {TP: 2, **MTP}, "mtp.layers.0.eh_proj.weight", "e0 e1 e2 e3 ; e4 e5 e6 e7"),
    (PREDICTING, V, {V_TP: 2, "mtp_drafter": True}, "model.layers.1.eh_proj.weight", "e0 e1 e2 e3 e4 e5 e6 e7 ; e0 e1 e2 e3 e4 e5 e6 e7"),
    (MLA, V, {V_TP: 2, "mtp_drafter": True, "vocab_padding_size": 6}, "model.layers.1.shared_head.head.weight", "h0 h1 h2 ; h3 -- --"),
    (VISION, M, {}, TOWER, "x0 x2 x4 x1 x3 x5"),
    (VISION, M, {TP: 2}, TOWER, "x0 x2 x4 ; x1 x3 x5"),
    (VISION, M, {TP: 2, "vision_names": "mindspeed_mm"}, MM_TOWER, "x0 x2 x4 ; x1 x3 x5"),
    (VISION, M, {TP: 2, "vision_names": "megatron_bridge"}, V_TOWER, "x0 x1 x2 x3 x4 x5 ; x0 x1 x2 x3 x4 x5"),
    (VISION, V, {}, V_TOWER, "x0 x1 x2 x3 x4 x5"),
    (VISION, V, {V_TP: 2}, V_TOWER, "x0 x2 x4 ; x1 x3 x5"),
    (VISION, V, {V_TP: 2, "mm_encoder_tp_mode": "data"}, V_TOWER, "x0 x1 x2 x3 x4 x5 ; x0 x1 x2 x3 x4 x5"),
]  # fmt: skip

# Who has what of the last stage's: model, members, names that a rank has and those that it has not, by rank.
E, H, N = "embedding.word_embeddings.weight", "output_layer.weight", "mtp.layers.0.enorm.weight"
INNER = "mtp.layers.0.transformer_layer.mlp.router.weight"
TWO = {**MLA, "num_hidden_layers": 2}
TIED = {**TWO, "tie_word_embeddings": True}
PRESENT = [
    (MLA, M, {**MTP}, [(f"0 {E} 0 {H} 0 {N} 0 {INNER}", "")]),
    (TWO, M, {PP: 2, **MTP}, [(f"0 {E}", f"0 {H} 0 {N}"), (f"0 {E} 0 {H} 0 {N} 0 {INNER}", "")]),
    (TWO, M, {PP: 2}, [(f"0 {E}", ""), (f"0 {H}", f"0 {E} 0 {N}")]),
    ({**NEXT, "num_hidden_layers": 2}, V, {V_PP: 2}, [
        ("0 model.embed_tokens.weight 0 lm_head.weight", "0 model.norm.weight"),
        ("0 model.embed_tokens.weight 0 lm_head.weight 0 model.norm.weight", "0 model.layers.0.input_layernorm.weight")]),
    (TIED, M, {PP: 2, **MTP}, [(f"0 {E}", f"0 {H}"), (f"0 {E} 0 {H} 0 {N}", "")]),
    (TWO, V, {V_PP: 2, "mtp_drafter": True}, [
        ("0 model.embed_tokens.weight", "1 model.layers.2.enorm.weight 0 lm_head.weight"),
        ("0 lm_head.weight 1 model.layers.2.enorm.weight 1 model.layers.2.shared_head.head.weight 1 model.layers.2.mtp_block.mlp.gate.weight",
         "0 model.embed_tokens.weight 1 model.embed_tokens.weight 0 model.layers.2.enorm.weight")]),
]  # fmt: skip
# Model, source and target that do not fit, or that one of them forbids.
HF, MM = (None, {}), {"vision_names": "mindspeed_mm"}
REFUSED = [
    (MLA, (M, {}), (V, {"mtp_drafter": True})),
    (MLA, (V, {}), (M, MTP)),
    (MLA, HF, (M, {"mtp_num_layers": 2})),
    ({**MLA, "num_nextn_predict_layers": 2}, (M, MTP), (V, {"mtp_drafter": True})),
    ({**MLA, "num_nextn_predict_layers": 2}, (M, {"mtp_num_layers": 2}), (M, MTP)),
    ({**MLA, "num_nextn_predict_layers": 0}, HF, (V, {"mtp_drafter": True})),
    (NEXT, HF, (M, MTP)),
    (MLA, (V, {DERIVED: "copies"}), HF),
    (NEXT, HF, (V, {DERIVED: "copies"})),
    (MLA, HF, (M, {"layernorm_zero_centered_gamma": True, "transformer_impl": "local"})),
    (MLA, HF, (M, {"moe_single_grouped_weight": True})),
    (MLA, HF, (M, {"moe_single_grouped_weight": True, "moe_grouped_gemm": True, "transformer_impl": "local"})),
    ({**MLA, "q_lora_rank": None}, HF, (M, {FUSION: True})),
    (NEXT, HF, (M, {FUSION: True})),
    ({**NEXT, "full_attention_interval": 4}, HF, HF),
    ({**NEXT, "layer_types": ["linear_attention"]}, HF, HF),
    (NEXT, HF, (M, MM)),
    (VISION, HF, (M, {"vision_num_layer_list": "1"})),
    (VISION, HF, (M, {**MM, "vision_num_layer_list": "2"})),
    (VISION, HF, (M, {**MM, PP: 2, "vision_num_layer_list": "1"})),
    ({**VISION, "vision_config": {**VISION["vision_config"], "intermediate_size": 3}}, HF, (M, {TP: 2})),
    ({**VISION, "vision_config": {**VISION["vision_config"], "intermediate_size": 3}}, HF, (V, {V_TP: 2})),
]  # fmt: skip


def same(got, expected, *what):
    assert got == expected, f"{what}: {got} instead of {expected}"


def side(framework, setting, first):
    if not framework:
        return {"framework": "hf", "ranks": [first]}
    ranks = 1
    for member in (TP, PP, V_TP, V_PP):
        ranks *= setting.get(member, 1)
    padding = {"vocab_padding_size": 4} if framework == V else {"make_vocab_size_divisible_by": 1}
    return {"framework": framework, "ranks": list(range(first, first + ranks)), **padding, **setting}


def spec_of(model, framework, setting):
    target = side(framework, setting, 1)
    return {"model": model, "source": side(*HF, 0), "target": target}, len(target["ranks"])


def refused_specs():
    for model, source, target in REFUSED:
        yield {"model": model, "source": side(*source, 0), "target": side(*target, 4)}


def labels(model):
    """By element, the label that the tables above have for it."""
    known = {-1: "--"}
    for name in model.shapes:
        short = name.removeprefix(ATTENTION)
        letter = LETTERS.get(short) or {"kv_b_proj.weight": "b", "model.layers.1.eh_proj.weight": "e", V_TOWER: "x", model.head_name: "h"}.get(short)
        for i, element in enumerate(model[name].ravel().tolist() if letter else []):
            known[element] = f"{letter}{i}"
        if short == "q_proj.weight" and model.gated:
            for i, element in enumerate(model[name].ravel().tolist()):
                head, row = divmod(i, 2 * model.head)
                known[element] = f"{'qg'[row // model.head]}{head}" + (f".{row % model.head}" if model.head > 1 else "")
    return known


def oracle_vectors():
    for config, framework, setting, name, expected in SHARDS:
        spec, ranks = spec_of(config, framework, setting)
        model, got = oracle.model_of(spec), []
        known = labels(model)
        for rank in range(1, 1 + ranks):
            (param,) = (p for p in oracle.params(spec, "target", rank, model) if p.name == name)
            got.append(" ".join(known[element] for element in param.elements.ravel().tolist()))
        same(" ; ".join(got), expected, framework, setting, name)
    for config, framework, setting, by_rank in PRESENT:
        spec, _ = spec_of(config, framework, setting)
        for rank, (has, lacks) in enumerate(by_rank, 1):
            held = {f"{p.chunk} {p.name}" for p in oracle.params(spec, "target", rank)}
            for names, expected in ((has, True), (lacks, False)):
                words = names.split()
                for chunk, name in zip(words[::2], words[1::2]):
                    same(f"{chunk} {name}" in held, expected, framework, setting, rank, name)
    for spec in refused_specs():
        try:
            for role in ("source", "target"):
                oracle.params(spec, role, spec[role]["ranks"][0])
        except oracle.Refused:
            continue
        raise AssertionError(f"not refused: {spec}")
    return len(SHARDS) + len(PRESENT) + len(REFUSED)


def library_vectors():
    import worlds

    for config, framework, setting, *_ in SHARDS + PRESENT:
        spec, ranks = spec_of(config, framework, setting)
        worlds.run(spec, 1 + ranks)
    for spec in refused_specs():
        try:
            worlds.reshard.Preset(spec, 0).close()
        except worlds.reshard.Error:
            continue
        raise AssertionError(f"not refused: {spec}")
    return len(SHARDS) + len(PRESENT) + len(REFUSED)


def main():
    print(f"attention vectors: {oracle_vectors()} of the oracle")
    if "--oracle" not in sys.argv:
        print(f"attention vectors: {library_vectors()} of the library")


if __name__ == "__main__":
    main()
