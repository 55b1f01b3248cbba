"""Specs that must be refused, with what the error must name; specs that must not be; and the same worlds, written differently."""

TP, PP, VPP = "tensor_model_parallel_size", "pipeline_model_parallel_size", "virtual_pipeline_model_parallel_size"
PIPELINE, LIST, NOOPS = "pipeline_model_parallel_layout", "num_layer_list", "noop_layers"
FIRST, LAST = "num_layers_in_first_pipeline_stage", "num_layers_in_last_pipeline_stage"
V_TP, V_PP, V_LIST = "tensor_parallel_size", "pipeline_parallel_size", "VLLM_PP_LAYER_PARTITION"
MODEL = {
    "architectures": ["LlamaForCausalLM"], "hidden_size": 16, "num_hidden_layers": 4, "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 2,
    "intermediate_size": 24, "vocab_size": 100, "torch_dtype": "bfloat16",
}  # fmt: skip
SMOLLM2 = {
    **MODEL, "hidden_size": 576, "num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 3, "head_dim": 64, "intermediate_size": 1536,
    "vocab_size": 49152, "tie_word_embeddings": True,
}  # fmt: skip
QWEN = {**MODEL, "architectures": ["Qwen3MoeForCausalLM"], "num_experts": 8, "moe_intermediate_size": 12}
QWEN2 = {**QWEN, "architectures": ["Qwen2MoeForCausalLM"], "shared_expert_intermediate_size": 12}
MIXTRAL = {**MODEL, "architectures": ["MixtralForCausalLM"], "num_local_experts": 8}
DEEPSEEK = {
    **MODEL, "architectures": ["DeepseekV3ForCausalLM"], "n_routed_experts": 8, "moe_intermediate_size": 12, "n_shared_experts": 1, "q_lora_rank": 8,
    "kv_lora_rank": 6, "qk_nope_head_dim": 2, "qk_rope_head_dim": 2, "v_head_dim": 2, "first_k_dense_replace": 1,
}  # fmt: skip
GLM = {
    **MODEL, "architectures": ["Glm4MoeForCausalLM"], "n_routed_experts": 8, "moe_intermediate_size": 12, "n_shared_experts": 1, "use_qk_norm": True,
    "attention_bias": True, "num_nextn_predict_layers": 1,
}  # fmt: skip
PREDICTS = {**DEEPSEEK, "num_nextn_predict_layers": 2}
NEXT = {**QWEN2, "architectures": ["Qwen3NextForCausalLM"], "full_attention_interval": 1}
VISION = {
    "depth": 4, "hidden_size": 24, "num_heads": 4, "intermediate_size": 12, "patch_size": 2, "temporal_patch_size": 2, "spatial_merge_size": 2,
    "out_hidden_size": 16,
}  # fmt: skip
SEES = {**MODEL, "architectures": ["Qwen2_5_VLForConditionalGeneration"], "vision_config": VISION}
MTP, DRAFTER, NAMES, V_LAYERS = "mtp_num_layers", "mtp_drafter", "vision_names", "vision_num_layer_list"
SINGLE, FUSION, DERIVED, ENCODER = "moe_single_grouped_weight", "mla_down_proj_fusion", "mla_derived_weights", "mm_encoder_tp_mode"
EP, ETP, EXTEND = "expert_model_parallel_size", "expert_tensor_parallel_size", "moe_tp_extend_ep"
GROUPED, LEGACY, CUT, ORDER = (
    "moe_grouped_gemm",
    "moe_use_legacy_grouped_gemm",
    "mla_down_proj_cut",
    "use_tp_pp_dp_mapping",
)
PARALLEL, PLACEMENT, MAP, STORAGE = (
    "enable_expert_parallel",
    "expert_placement_strategy",
    "physical_to_logical_map",
    "expert_storage",
)
V_DP, HUGE, ALL = "data_parallel_size", 1 << 28, list(range(8))
HF = {"framework": "hf", "ranks": [0]}


def spec(source=HF, target=HF, model=MODEL, **more):
    return {"model": model, "source": source, "target": target, **more}


def megatron(ranks, **setting):
    return {"framework": "megatron", "ranks": list(range(ranks)), **setting}


def vllm(ranks, **setting):
    return {"framework": "vllm", "ranks": list(range(ranks)), **setting}


def sized(**sizes):
    return {**MODEL, **sizes}


def without(member, model=MODEL):
    return {key: value for key, value in model.items() if key != member}


def mapped(*lists, tp=2, **more):
    """vLLM with experts in these slots."""
    return vllm(tp, **{V_TP: tp, PARALLEL: True, MAP: list(lists), **more})


M, V = megatron, vllm
# A spec, and what the error names: every word, or one of the words of a tuple.
SPECS = [
    (spec(V(9, **{V_TP: 9}), model=SMOLLM2), "9", ("1536", "49152", "intermediate_size", "vocab_size")),
    (spec(V(2, **{V_TP: 2}), model=sized(num_attention_heads=6, num_key_value_heads=3)), "num_key_value_heads"),
    (spec(V(3, **{V_TP: 3}), model=sized(num_key_value_heads=1)), "num_attention_heads"),
    (spec(V(3, **{V_TP: 3}), model=sized(num_attention_heads=6, num_key_value_heads=3)), ("vocab_size", "vocab_padding_size")),
    (spec(V(2, **{V_TP: 2}), model=sized(intermediate_size=25)), "intermediate_size"),
    (spec(V(2, **{V_PP: 2, V_LIST: "1,2"})), V_LIST),
    (spec(V(2, **{V_PP: 2, V_LIST: "1,1,2"})), V_LIST),
    (spec(V(3, **{V_TP: 2})), "ranks"),
    (spec(V(3, **{V_TP: 1, "replicas": 2})), ("ranks", "replicas")),
    (spec(V(2, **{V_TP: 2, TP: 2})), TP),
    (spec(V(1, enable_expert_parallel=True)), "enable_expert_parallel"),

    (spec(M(3, **{TP: 3}), model=sized(num_key_value_heads=1)), "num_attention_heads"),
    (spec(M(4, **{TP: 4}), model=sized(intermediate_size=22)), "intermediate_size"),
    (spec(M(6, **{TP: 6}), model=sized(num_attention_heads=12)), ("num_key_value_heads", "num_query_groups")),
    (spec(M(3, **{TP: 3}), model=sized(num_attention_heads=6, num_key_value_heads=2)), ("num_key_value_heads", "num_query_groups")),
    (spec(M(18, **{TP: 18}), model=sized(num_attention_heads=36, num_key_value_heads=6, head_dim=4, intermediate_size=36)), "linear_qkv"),
    (spec(M(3, **{PP: 3})), (PP, "num_hidden_layers")),
    (spec(M(2, **{PP: 2, LIST: "1,2"})), LIST),
    (spec(M(2, **{PP: 2, LIST: "1,1,2"})), LIST),
    (spec(M(2, **{PP: 2, VPP: 2, LIST: "2,2"})), (LIST, VPP)),
    (spec(M(2, **{PP: 2, LIST: "1,x"})), LIST),
    (spec(M(2, **{PP: 2, PIPELINE: "Et|ttL"})), PIPELINE),
    (spec(M(2, **{PP: 2, PIPELINE: "Ettt|ttL"})), PIPELINE),
    (spec(M(2, **{PP: 2, PIPELINE: "tt|ttL"})), PIPELINE),
    (spec(M(2, **{PP: 2, PIPELINE: "Ett|tt"})), PIPELINE),
    (spec(M(2, **{PP: 2, PIPELINE: "EEtt|ttL"})), PIPELINE),
    (spec(M(2, **{PP: 2, PIPELINE: "Et|tt|tL"})), PIPELINE),
    (spec(M(2, **{PP: 2, PIPELINE: "Ext|tttL"})), PIPELINE),
    (spec(M(2, **{PP: 2, PIPELINE: "E(tt|ttL"})), PIPELINE),
    (spec(M(2, **{PP: 2, PIPELINE: "Et*|tttL"})), PIPELINE),
    (spec(M(2, **{PP: 2, PIPELINE: "Et|t|t|tL", VPP: 3})), (PIPELINE, VPP)),
    (spec(M(2, **{PP: 2, PIPELINE: "Ett|ttL", FIRST: 2})), (PIPELINE, FIRST)),
    (spec(M(2, **{PP: 2, NOOPS: "9,2"})), NOOPS),
    (spec(M(2, **{PP: 2, NOOPS: "-1,2"})), NOOPS),
    (spec(M(2, **{PP: 2, NOOPS: "1,1"})), NOOPS),
    (spec(M(2, **{PP: 2, VPP: 4})), VPP),
    (spec(M(2, **{PP: 2, VPP: 3})), VPP),
    (spec(M(1, **{VPP: 2})), VPP),
    (spec(M(2, **{PP: 2, FIRST: 5})), FIRST),
    (spec(M(2, **{PP: 2, FIRST: 1, LAST: 2})), (FIRST, LAST)),
    (spec(M(2, **{PP: 2, FIRST: 1, "account_for_embedding_in_pipeline_split": True})), (FIRST, "account_for_embedding_in_pipeline_split")),
    (spec(M(2, **{PP: 2, "account_for_loss_in_pipeline_split": True})), ("account_for_loss_in_pipeline_split", PP)),
    (spec(M(3, **{TP: 2})), "ranks"),
    (spec(M(4, **{TP: 2, "data_parallel_size": 3})), ("data_parallel_size", "ranks")),
    (spec(M(2, **{"context_parallel_size": 4})), ("context_parallel_size", "ranks")),
    (spec(M(1, padded_vocab_size=99)), "padded_vocab_size"),
    (spec(M(2, **{TP: 2, "padded_vocab_size": 101})), "padded_vocab_size"),
    (spec(M(1, make_vocab_size_divisible_by=0)), "make_vocab_size_divisible_by"),
    (spec(M(1, transformer_impl="inference")), "transformer_impl"),
    (spec(M(2, **{"expert_model_parallel_size": 2})), "expert_model_parallel_size"),
    (spec(M(2, **{V_TP: 2})), V_TP),
    (spec(M(2, **{TP: 0})), TP),
    (spec(M(2, **{TP: -2})), TP),
    (spec(M(2, **{TP: 1.5})), TP),
    (spec(M(2, **{TP: "two"})), TP),

    (spec({**HF, "ranks": [0, 1, 1]}), "ranks", "1"),
    (spec({**HF, "ranks": "0-2,2"}), "ranks", "2"),
    (spec({**HF, "ranks": "2-1"}), "ranks"),
    (spec({**HF, "ranks": "a"}), "ranks"),
    (spec({**HF, "ranks": ""}), "ranks"),
    (spec({**HF, "ranks": []}), "ranks"),
    (spec({**HF, "ranks": [-1]}), "ranks"),
    (spec({"framework": "hf"}), "ranks"),
    (spec({**HF, TP: 1}), TP),
    (spec({"ranks": [0]}), "framework"),
    (spec({**HF, "framework": "deepspeed"}), "deepspeed"),
    (spec(sauce=1), "sauce"),
    ({"model": MODEL, "target": HF}, "source"),
    ({"source": HF, "target": HF}, "model"),
    (spec(ranks_per_host=0), "ranks_per_host"),
    (spec(ignore="all"), "ignore"),

    (spec(model=without("hidden_size")), "hidden_size"),
    (spec(model=without("architectures")), "architectures"),
    (spec(model=without("vocab_size")), "vocab_size"),
    (spec(model=sized(hidden_size="16")), "hidden_size"),
    (spec(model=sized(num_hidden_layers=0)), "num_hidden_layers"),
    (spec(model=sized(num_key_value_heads=3)), "num_key_value_heads"),
    (spec(model=sized(torch_dtype="int7")), "int7"),
    (spec(model=sized(torch_dtype="bfloat16", dtype="float16")), "torch_dtype", "dtype"),
    (spec(model=sized(num_key_value_heads=1 << 60, num_attention_heads=1 << 60)), ("num_attention_heads", "num_key_value_heads")),
    *((spec(model=without("num_key_value_heads", sized(architectures=[a + "ForCausalLM"]))), "num_key_value_heads") for a in ("Mistral", "Qwen2", "Qwen3")),
    (spec(model=without("head_dim", sized(architectures=["Qwen3ForCausalLM"]))), "head_dim"),

    (spec(M(1, data_parallel_size=0)), "data_parallel_size"),
    (spec(V(1, data_parallel_size=0)), "data_parallel_size"),
    (spec(M(2, **{PP: 2, FIRST: 0})), FIRST),
    (spec(M(2, **{PP: 2, LAST: 0})), LAST),
    (spec(M(1, **{PIPELINE: "Ett|ttL"})), PIPELINE, PP),
    (spec(M(1, **{PIPELINE: "E(t*999999999)*999999999L"})), PIPELINE),
    (spec(M(1, **{PIPELINE: "E" + "(" * 50000 + "t" + ")*9" * 50000 + "L"})), PIPELINE),
    # Sizes beyond all sense, and products beyond 64 bits.
    (spec(M(1, **{TP: HUGE})), (TP, "ranks")),
    (spec(V(1, **{V_TP: HUGE})), (V_TP, "ranks")),
    (spec(M(1, **{TP: 1 << 32, PP: 1 << 32})), (TP, PP)),
    (spec(M(1, **{TP: HUGE, PP: HUGE, "context_parallel_size": HUGE})), (TP, "ranks")),
    (spec(V(1, **{V_TP: HUGE, V_PP: HUGE, V_DP: HUGE})), (V_TP, "ranks")),
    (spec(V(1, replicas=1 << 62)), "replicas"),
    (spec({**M(1), "ranks": f"0-{HUGE - 1}", TP: HUGE}, model=sized(num_attention_heads=HUGE, num_key_value_heads=HUGE)), "ranks"),
    (spec({**HF, "ranks": "0-2147483647"}), "ranks"),
    (spec({**HF, "ranks": "0-99999999999999999999"}), "ranks"),
    (spec(model=sized(hidden_size=1 << 62, intermediate_size=1 << 62)), ("hidden_size", "intermediate_size")),
    (spec(model=sized(hidden_size=1 << 70)), "hidden_size"),
    (spec(model=sized(num_attention_heads=HUGE, head_dim=HUGE, hidden_size=HUGE)), ("q_proj", "num_attention_heads")),
    (spec(model=sized(num_hidden_layers=1 << 40)), "num_hidden_layers"),
    (spec(model=sized(num_hidden_layers=HUGE)), "num_hidden_layers"),
    (spec(M(1, padded_vocab_size=(1 << 63) - 1)), "padded_vocab_size"),
    (spec(M(1, make_vocab_size_divisible_by=1 << 62)), "make_vocab_size_divisible_by"),
    (spec(V(1, vocab_padding_size=(1 << 63) - 1)), "vocab_padding_size"),
    (spec(model={**QWEN, "num_experts": HUGE}), "experts"),
    (spec(V(1), model={**QWEN, "num_experts": HUGE, "moe_intermediate_size": HUGE, "hidden_size": HUGE}), "experts"),
    (spec(model={**DEEPSEEK, "n_shared_experts": HUGE, "moe_intermediate_size": HUGE, "hidden_size": HUGE}), "shared_experts"),
    (spec(M(1, **{EP: 1 << 32, ETP: 1 << 32}), model=QWEN), (EP, ETP)),
    (spec(M(1, **{EP: HUGE, ETP: HUGE, PP: HUGE}), model=QWEN), (PP, "ranks")),

    # Experts: Megatron.
    (spec(M(3, **{EP: 3}), model=QWEN), ("experts", EP), "3", "8"),
    (spec(M(5, **{ETP: 5}), model=QWEN), ("intermediate size", "moe_intermediate_size"), "5", "12"),
    (spec(M(5, **{TP: 5}), model={**QWEN, "num_attention_heads": 5, "num_key_value_heads": 5, "intermediate_size": 25}), ("intermediate size",), "5", "12"),
    (spec(M(3, **{EP: 2}), model=QWEN), "ranks", "3"),
    (spec(M(4, **{ETP: 3}), model=QWEN), "ranks", "4"),
    (spec(M(6, **{EP: 4, PP: 2}), model=QWEN), "ranks", "6"),
    (spec(M(6, **{TP: 2, EP: 2}), model=QWEN), "ranks", "6"),
    (spec(M(2, **{TP: 2, ETP: 2, EXTEND: True}), model=QWEN), EXTEND, ETP),
    (spec(M(4, **{TP: 4, EXTEND: True}), model={**QWEN, "num_experts": 6}), "experts", "4", "6"),
    (spec(M(8, **{TP: 4, EP: 2, EXTEND: True, ORDER: True, PP: 2}), model=QWEN), ("ranks", ORDER)),
    (spec(M(4, **{EP: 2, PP: 2, ORDER: True}), model=QWEN), ORDER),
    (spec(M(2, **{TP: 2}), model={**QWEN2, "shared_expert_intermediate_size": 13}), "shared", "13"),
    (spec(M(2, **{TP: 2}), model={**DEEPSEEK, "moe_intermediate_size": 13}), "13"),
    (spec(M(2, **{TP: 2, "transformer_impl": "local"}), model={**DEEPSEEK, "q_lora_rank": 7}), "q_lora_rank", "7"),
    (spec(M(2, **{TP: 2, CUT: True}), model={**DEEPSEEK, "kv_lora_rank": 7}), "kv_lora_rank", "9"),
    (spec(M(1, **{GROUPED: "yes"}), model=QWEN), GROUPED),
    *((spec(M(2, **{member: value})), member) for member, value in ((EP, 2), (ETP, 2), (GROUPED, True), (LEGACY, True), (EXTEND, True))),
    (spec(M(2, **{EP: 2}), model={**DEEPSEEK, "n_routed_experts": None}), EP),

    # Experts: vLLM.
    (spec(V(8, **{V_TP: 4, V_DP: 2}), model=QWEN), (PARALLEL, "moe_intermediate_size"), "8", "12"),
    (spec(V(5, **{V_DP: 5}), model=MIXTRAL), ("intermediate size", "intermediate_size"), "5", "24"),
    (spec(V(2, **{V_TP: 2, PARALLEL: True}), model={**QWEN2, "shared_expert_intermediate_size": 13}), "shared", "13"),
    (spec(V(4, **{V_TP: 2, V_DP: 2, PARALLEL: True}), model={**QWEN2, "shared_expert_intermediate_size": 13}), "shared", "13"),
    (spec(V(2, **{V_TP: 2, PARALLEL: True}), model={**DEEPSEEK, "moe_intermediate_size": 13}), "shared", "13"),
    (spec(mapped(ALL, ALL, ALL), model=QWEN), MAP, "3", "4"),
    (spec(mapped(*[ALL] * 5), model=QWEN), MAP, "5", "4"),
    (spec(mapped(*[ALL] * 4), model=DEEPSEEK), MAP, "4", "3"),
    (spec(mapped(ALL, ALL, ALL, [*ALL, 0]), model=QWEN), MAP, "9"),
    (spec(mapped(ALL, ALL, ALL[:6] + [0, 1], ALL), model=QWEN), MAP, "2"),
    (spec(mapped(ALL, [*ALL, 8, 8], ALL, ALL), model=QWEN), MAP, "8"),
    (spec(mapped(ALL, [*ALL, -1, -1], ALL, ALL), model=QWEN), MAP),
    (spec(mapped(*ALL), model=QWEN), MAP),
    (spec(mapped(*[[]] * 4), model=QWEN), MAP),
    (spec(V(1, **{MAP: [ALL] * 4}), model=QWEN), MAP, PARALLEL),
    (spec(V(1, **{PLACEMENT: "random", PARALLEL: True}), model=QWEN), PLACEMENT, "random"),
    (spec(V(1, **{STORAGE: "shuffled"}), model=QWEN), STORAGE, "shuffled"),
    (spec(V(1, **{STORAGE: "grouped"}), model=QWEN), STORAGE),
    (spec(V(1, **{MAP: [[0]]})), MAP),
    (spec(V(1, **{PLACEMENT: "round_robin"})), PLACEMENT),
    (spec(V(1, **{STORAGE: "stacked_swapped"})), STORAGE),
    (spec(V(1, **{EP: 1}), model=QWEN), EP),
    (spec(M(1, **{PARALLEL: True}), model=QWEN), PARALLEL),
    (spec({**HF, EP: 1}, model=QWEN), EP),

    # Layers for multi-token prediction.
    (spec(M(1, **{MTP: 3}), model=PREDICTS), MTP, "3", "num_nextn_predict_layers", "2"),
    (spec(M(1, **{MTP: 1}), model=DEEPSEEK), MTP, "num_nextn_predict_layers"),
    (spec(M(1, **{MTP: 1})), MTP, "num_nextn_predict_layers"),
    (spec(V(1, **{DRAFTER: True}), model=DEEPSEEK), DRAFTER, "num_nextn_predict_layers"),
    (spec(V(1, **{DRAFTER: True}), model=QWEN), DRAFTER, "num_nextn_predict_layers"),
    (spec(M(1, **{MTP: 1}), V(1, **{DRAFTER: True}), model=PREDICTS), MTP, DRAFTER, "1", "2"),
    (spec(M(1, **{MTP: 1}), M(1, **{MTP: 2}), model=PREDICTS), MTP, "1", "2"),
    (spec(V(1, padded_vocab_size=8)), "padded_vocab_size"),
    (spec(V(1, e_score_correction_bias_dtype="float32")), "e_score_correction_bias_dtype"),
    (spec(V(1, e_score_correction_bias_dtype="int8"), model=DEEPSEEK), "e_score_correction_bias_dtype", "int8"),
    (spec(V(1, moe_padded_hidden_size=8), model=DEEPSEEK), "moe_padded_hidden_size"),
    (spec(V(1, moe_padded_intermediate_size=1 << 28, moe_padded_hidden_size=1 << 28), model=DEEPSEEK), "too large"),
    (spec(M(1, layernorm_zero_centered_gamma=True, transformer_impl="local")), "layernorm_zero_centered_gamma"),
    (spec(M(1, **{MTP: "1"}), model=PREDICTS), MTP),
    (spec(V(1, **{MTP: 1}), model=PREDICTS), MTP),
    (spec(M(2, **{PP: 2, PIPELINE: "Ett|ttL", MTP: 1}), model=GLM), PIPELINE, MTP, "0 m"),
    (spec(M(2, **{PP: 2, PIPELINE: "Ett|ttmL"}), model=GLM), PIPELINE, MTP),
    (spec(M(2, **{PP: 2, PIPELINE: "Ettt|tm|m|L", MTP: 2}), model=PREDICTS), PIPELINE, "one entry"),
    (spec(M(2, **{PP: 2, PIPELINE: "Et|tm|ttL|", MTP: 1}), model=GLM), PIPELINE),
    (spec(M(2, **{PP: 2, PIPELINE: "Ett|ttm|t|L", MTP: 1}), model=sized(**{**GLM, "num_hidden_layers": 5})), PIPELINE, "no t"),
    (spec(M(2, **{PP: 2, PIPELINE: "Ett|tt|m|L", MTP: 1}), model=GLM), PIPELINE, "first"),

    # The vision tower.
    (spec(model=without("vision_config", SEES)), "vision_config"),
    *((spec(model={**SEES, "vision_config": without(member, VISION)}), "vision_config." + member) for member in VISION),
    (spec(model={**SEES, "vision_config": {**VISION, "num_heads": 5}}), "vision_config", "num_heads", "24", "5"),
    (spec(model={**SEES, "vision_config": {**VISION, "depth": HUGE}}), "depth"),
    (spec(model={**SEES, "vision_config": {**VISION, "spatial_merge_size": HUGE}}), "spatial_merge_size"),
    (spec(model={**SEES, "vision_config": {**VISION, "patch_size": HUGE}}), "patch_embed"),
    (spec(model={**SEES, "text_config": {"hidden_size": 32}}), "text_config.hidden_size", "16", "32"),
    *((spec(side(4, **{size: 4}), model={**SEES, "vision_config": {**VISION, "intermediate_size": 14}}), "vision_config.intermediate_size", "14")
      for side, size in ((M, TP), (V, V_TP))),
    *((spec(side(4, **{size: 4}), model={**SEES, "vision_config": {**VISION, "num_heads": 6}}), "vision_config.num_heads", "6")
      for side, size in ((M, TP), (V, V_TP))),
    (spec(M(1, **{NAMES: "mbridge"})), NAMES),
    (spec(M(1, **{V_LAYERS: "4"})), V_LAYERS),
    (spec(M(1, **{NAMES: "bridge"}), model=SEES), NAMES, "bridge"),
    (spec(M(1, **{V_LAYERS: "4"}), model=SEES), V_LAYERS, "mindspeed_mm"),
    (spec(M(2, **{PP: 2, NAMES: "mindspeed_mm", V_LAYERS: "2,1"}), model=SEES), V_LAYERS, "depth", "4"),
    (spec(M(2, **{PP: 2, NAMES: "mindspeed_mm", V_LAYERS: "4"}), model=SEES), V_LAYERS, "2"),
    (spec(M(2, **{PP: 2, VPP: 2, NAMES: "mindspeed_mm"}), model=SEES), VPP, "mindspeed_mm"),
    (spec(V(1, **{ENCODER: "data"})), ENCODER),
    (spec(V(1, **{ENCODER: "tensor"}), model=SEES), ENCODER, "tensor"),

    # Members of one storage or attention.
    (spec(M(1, **{SINGLE: True})), SINGLE),
    (spec(M(1, **{SINGLE: True}), model=QWEN), SINGLE, GROUPED),
    (spec(M(1, **{SINGLE: True, GROUPED: True, "transformer_impl": "local"}), model=QWEN), SINGLE, "transformer_impl"),
    (spec(M(1, **{SINGLE: True, GROUPED: True, LEGACY: True}), model=QWEN), SINGLE),
    (spec(M(1, **{FUSION: True}), model=QWEN), FUSION, "q_lora_rank"),
    (spec(M(1, **{FUSION: True}), model={**DEEPSEEK, "q_lora_rank": None}), FUSION, "q_lora_rank"),
    (spec(M(1, **{FUSION: True, "mla_weights": "mindspeed"}), model=DEEPSEEK), FUSION, "mla_weights"),
    (spec(M(2, **{TP: 2, FUSION: True, CUT: True}), model={**DEEPSEEK, "q_lora_rank": 7}), "q_lora_rank", "7"),
    (spec(V(1, **{DERIVED: "copies"})), DERIVED),
    (spec(V(1, **{DERIVED: "alias"}), model=DEEPSEEK), DERIVED, "alias"),
    (spec(V(1, fused_qkv_a_proj=False)), "fused_qkv_a_proj"),
    (spec(V(1, shared_experts="whole")), "shared_experts"),
    (spec(V(4, **{V_TP: 2, V_DP: 2, PARALLEL: True}), model={**GLM, "moe_intermediate_size": 13}), "shared", "13"),
    *((spec(model=without(member, GLM)), member) for member in ("n_routed_experts", "moe_intermediate_size", "num_key_value_heads")),
    *((spec(model=without(member, NEXT)), member) for member in ("num_experts", "shared_expert_intermediate_size", "head_dim")),
    (spec(model={**NEXT, "layer_types": ["full_attention"] * 3}), "layer_types", "4"),
    (spec(model={**GLM, "attention_bias": 1}), "attention_bias"),

    # Experts and MLA: the model.
    *((spec(model=without(member, QWEN)), member) for member in ("num_experts", "moe_intermediate_size", "num_key_value_heads", "head_dim")),
    *((spec(model=without(member, QWEN2)), member) for member in ("num_experts", "moe_intermediate_size", "shared_expert_intermediate_size")),
    *((spec(model=without(member, MIXTRAL)), member) for member in ("num_local_experts", "intermediate_size", "num_key_value_heads")),
    *((spec(model=without(member, DEEPSEEK)), member)
      for member in ("moe_intermediate_size", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")),
    (spec(model={**QWEN, "num_experts": 0}), "num_experts"),
    (spec(model={**QWEN, "num_experts": "8"}), "num_experts"),
    (spec(model={**QWEN, "decoder_sparse_step": 0}), "decoder_sparse_step"),
    (spec(model={**QWEN, "mlp_only_layers": "0"}), "mlp_only_layers"),
    (spec(model={**DEEPSEEK, "moe_layer_freq": 0}), "moe_layer_freq"),
    (spec(model={**DEEPSEEK, "first_k_dense_replace": -1}), "first_k_dense_replace"),
]  # fmt: skip
NOT_BUILT = [
    *((spec(model=sized(**{member: True})), member) for member in ("bias", "qkv_bias")),
    *((spec(model={**model, "attention_bias": True}), "attention_bias") for model in (QWEN, QWEN2, MIXTRAL, DEEPSEEK)),
    (spec(model={**DEEPSEEK, "quantization_config": {"quant_method": "fp8"}}), "quantization_config"),
    (spec(model={**QWEN2, "qkv_bias": False}), "qkv_bias"),
    (spec(model=sized(architectures=["BertModel"])), "BertModel"),
    (spec(model=sized(attention_bias=True)), "attention_bias"),
    (spec(model=sized(mlp_bias=True)), "mlp_bias"),
    (spec(model=sized(quantization_config={"quant_method": "fp8"})), "quantization_config"),
    (spec(model={**GLM, "mlp_bias": True}), "mlp_bias"),
    (spec(model={**DEEPSEEK, "architectures": ["DeepseekV32ForCausalLM"]}), "DeepseekV32ForCausalLM"),
    (spec(model={**NEXT, "attention_bias": True}), "attention_bias"),
    (spec(model={**NEXT, "attn_output_gate": False}), "attn_output_gate"),
    (spec(model=without("full_attention_interval", NEXT)), "full_attention_interval", "layer 0", "linear_attention"),
    (spec(model={**NEXT, "full_attention_interval": 2}), "full_attention_interval", "layer 0", "linear_attention"),
    (spec(model={**NEXT, "layer_types": ["full_attention"] * 3 + ["linear_attention"]}), "layer_types", "layer 3", "linear_attention"),
    (spec(model={**SEES, "text_config": {"quantization_config": {"quant_method": "fp8"}}}), "quantization_config"),
    (spec(M(1, **{MTP: 1, "mla_weights": "mindspeed"}), model=PREDICTS), MTP, "mla_weights"),
    (spec(M(1, **{MTP: 1, "mla_weights": "mindspeed_qb"}), model=PREDICTS), MTP, "mla_weights"),
    (spec(M(2, **{PP: 2, MTP: 1, "schedules_method": "dualpipev"}), model=GLM), MTP, "schedules_method"),
    (spec(M(2, **{PP: 2, MTP: 1, "noop_layers": "4,5"}), model=GLM), MTP, "noop_layers"),
    (spec(V(1, shared_experts="whole"), model=GLM), "shared_experts"),
    (spec(M(2, **{PP: 2, NAMES: "mindspeed_mm", PIPELINE: "Ett|ttL"}), model=SEES), PIPELINE),
]

# Refused on this side only.
ONE_WAY = [
    (spec(M(1), V(1, **{DRAFTER: True}), model=PREDICTS), MTP, DRAFTER),
    (spec(M(1), M(1, **{MTP: 1}), model=GLM), "source." + MTP, "target." + MTP),
    (spec(V(1), M(1, **{MTP: 1}), model=GLM), "source." + DRAFTER, "target." + MTP),
    (spec(V(1, **{DERIVED: "copies"}), model=DEEPSEEK), DERIVED, "source"),
]

# What is not refused, though it is next to something that is.
ACCEPTED = [
    spec(V(2, **{V_TP: 2, PARALLEL: True, PLACEMENT: "round_robin"}), model=QWEN),  # whatever n_group is
    spec(V(2, **{V_TP: 2, PARALLEL: True, PLACEMENT: "round_robin"}), model={**DEEPSEEK, "n_group": 1}),
    spec(V(8, **{V_TP: 4, V_DP: 2, PARALLEL: True}), model=QWEN),
    spec(
        V(4, **{V_TP: 2, V_DP: 2, PARALLEL: True}), model={**DEEPSEEK, "moe_intermediate_size": 13}
    ),  # shared experts are whole
    spec(mapped(ALL, [*ALL, 0, 0], ALL, ALL), model=QWEN),
    spec(
        M(2, **{TP: 2}), model={**DEEPSEEK, "kv_lora_rank": 7, "q_lora_rank": 7}
    ),  # whole in Transformer Engine's spec
    spec(M(2, **{TP: 2, "transformer_impl": "local", CUT: False}), model={**DEEPSEEK, "kv_lora_rank": 7}),
    spec(M(2, **{EP: 2, ORDER: True, "context_parallel_size": 2}), model=QWEN),
    spec(
        M(5, **{TP: 5, ETP: 1}), model={**MIXTRAL, "num_attention_heads": 5, "num_key_value_heads": 5}
    ),  # no dense layer
    spec(model={**QWEN2, "qkv_bias": True}),
    spec(model=without("num_key_value_heads", DEEPSEEK)),
    spec(model=without("head_dim", DEEPSEEK)),
    spec(model=without("num_key_value_heads")),
    spec(model={**DEEPSEEK, "n_routed_experts": None}),
    spec(model={**DEEPSEEK, "n_shared_experts": None, "q_lora_rank": None, "num_nextn_predict_layers": 1}),
    spec(model=sized(torch_dtype="bfloat16", dtype="bfloat16")),
    spec(model={**GLM, "attention_bias": False}),
    spec(model=without("attention_bias", without("use_qk_norm", GLM))),
    spec(M(1, **{MTP: 1}), V(1), model=GLM),  # unused
    spec(M(1, **{MTP: 0}), V(1), model=GLM),
    spec(V(1, **{DRAFTER: True}), HF, model=GLM),
    spec(HF, M(1, **{MTP: 1}), model=PREDICTS),
    spec(model={**NEXT, "layer_types": ["full_attention"] * 4, "full_attention_interval": 4}),
    spec(V(4, **{V_TP: 2, V_DP: 2, PARALLEL: True}), model={**NEXT, "shared_expert_intermediate_size": 13}),
    spec(V(2, **{V_TP: 2, PARALLEL: True, "shared_experts": "whole"}), model={**DEEPSEEK, "moe_intermediate_size": 15, "n_shared_experts": 1}),
    spec(target=V(1, **{DERIVED: "copies"}), model=DEEPSEEK),
    spec(V(1, fused_qkv_a_proj=False), model={**DEEPSEEK, "q_lora_rank": None}),
    spec(V(4, **{V_TP: 4, ENCODER: "data"}), model={**SEES, "vision_config": {**VISION, "num_heads": 6}}),
    spec(M(4, **{TP: 4, NAMES: "megatron_bridge"}), model={**SEES, "vision_config": {**VISION, "num_heads": 6}}),
    spec(model={**without("hidden_size", SEES), "text_config": {"hidden_size": 16, "num_hidden_layers": 4}}),
]

# Equal worlds: members at their defaults, written out on one rank and left out on another.
DEFAULTS = [
    (M(4, **{TP: 2, PP: 2}), {"data_parallel_size": 1}),
    (M(4, **{TP: 2}), {"data_parallel_size": 2}),
    (M(4, **{TP: 2, PP: 2}), {VPP: 1}),
    (M(4, **{TP: 2, PP: 2}), {VPP: None}),
    (M(4, **{TP: 2, PP: 2}), {"params_dtype": "bfloat16"}),
    (M(4, **{TP: 2, PP: 2}), {NOOPS: []}),
    (M(4, **{TP: 2, PP: 2}), {ORDER: False, "transformer_impl": "transformer_engine", "make_vocab_size_divisible_by": 128}),
    (M(4, **{TP: 2, EP: 2}), {ETP: 2, GROUPED: False, LEGACY: False, EXTEND: False}),
    (M(2, **{TP: 2}), {EP: 1}),
    (V(4, **{V_TP: 2, V_PP: 2}), {V_LIST: "2,2"}),
    (V(4, **{V_TP: 2, V_PP: 2}), {V_LIST: [2, 2]}),
    (V(4, **{V_TP: 2, V_PP: 2}), {V_DP: 1, "replicas": 1, "vocab_padding_size": 64, "dtype": "bfloat16"}),
    (V(4, **{V_TP: 2, V_PP: 2}), {PARALLEL: False, STORAGE: "stacked"}),
    (V(2, **{V_TP: 2, PARALLEL: True}), {PLACEMENT: "linear"}),
    (V(2, **{V_TP: 2}), {"ranks": "0-1"}),
    (V(2, **{V_TP: 2}), {DRAFTER: False}),
    (M(2, **{TP: 2}), {MTP: None, SINGLE: False, FUSION: False}),
]  # fmt: skip
