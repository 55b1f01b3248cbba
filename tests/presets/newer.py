"""Models and members that the oracle of the others does not know: whole tensors go to a side, and come back from it.

What is new in a side's parameters is written down here from the tensors alone; that all of them come back says the rest.
"""

import numpy as np
import worlds
from oracle import values
from worlds import check

TP, PP, VPP = "tensor_model_parallel_size", "pipeline_model_parallel_size", "virtual_pipeline_model_parallel_size"
LAYOUT, LIST = "pipeline_model_parallel_layout", "num_layer_list"
TE, LOCAL = {"transformer_impl": "transformer_engine", "moe_grouped_gemm": True}, {"transformer_impl": "local"}
V_TP, V_PP, V_DP = "tensor_parallel_size", "pipeline_parallel_size", "data_parallel_size"
HIDDEN, HEADS, KV, HEAD = 8, 4, 2, 2
BASE = {
    "hidden_size": HIDDEN, "num_hidden_layers": 4, "num_attention_heads": HEADS, "num_key_value_heads": KV, "head_dim": HEAD,
    "intermediate_size": 12, "vocab_size": 64, "torch_dtype": "float32",
}  # fmt: skip
GLM = {
    **BASE, "architectures": ["Glm4MoeForCausalLM"], "attention_bias": True, "use_qk_norm": True, "n_routed_experts": 4, "n_shared_experts": 2,
    "moe_intermediate_size": 4, "first_k_dense_replace": 1, "num_nextn_predict_layers": 1,
}  # fmt: skip
DEEPSEEK = {
    **GLM, "architectures": ["DeepseekV3ForCausalLM"], "attention_bias": False, "q_lora_rank": 6, "kv_lora_rank": 10, "qk_nope_head_dim": 3,
    "qk_rope_head_dim": 2, "v_head_dim": 5, "num_nextn_predict_layers": 2, "torch_dtype": "bfloat16",
}  # fmt: skip
NEXT = {
    **BASE, "architectures": ["Qwen3NextForCausalLM"], "full_attention_interval": 1, "num_experts": 4, "moe_intermediate_size": 4,
    "shared_expert_intermediate_size": 12, "torch_dtype": "bfloat16",
}  # fmt: skip
DEPTH, WIDTH, EYES, MERGED = 3, 8, 4, 32
SEES = {
    **BASE, "architectures": ["Qwen2_5_VLForConditionalGeneration"], "torch_dtype": "bfloat16",
    "vision_config": {"depth": DEPTH, "hidden_size": WIDTH, "num_heads": EYES, "intermediate_size": 12, "patch_size": 2,
                      "temporal_patch_size": 2, "spatial_merge_size": 2, "out_hidden_size": HIDDEN, "in_chans": 3},
}  # fmt: skip


def side(framework, ranks, **members):
    return {"framework": framework, "ranks": list(range(1, ranks + 1)), **members}


def megatron(ranks, **members):
    return side("megatron", ranks, **{"make_vocab_size_divisible_by": 16, **members})


def vllm(ranks, **members):
    return side("vllm", ranks, **members)


def tensor(config, name, *shape):
    bits = values(name, int(np.prod(shape))).reshape(shape)
    return bits.astype(np.uint32) << 16 if config["torch_dtype"] == "float32" else bits


def there_and_back(config, side):
    memory = worlds.from_hugging_face(config, side)
    count = worlds.to_hugging_face(config, side, memory)
    return memory, count


def same(memory, rank, chunk, name, want):
    check((rank, chunk, name) in memory, f"rank {rank} has no {name} in chunk {chunk}; it has", sorted(n for r, _, n in memory if r == rank))
    have = memory[rank, chunk, name]
    check(have.shape == want.shape and (have == want).all(), f"rank {rank}: {name}: {have.shape} {want.shape}", have, want)


def chunks_with(memory, name):
    """Ranks and chunks that have a parameter."""
    return sorted((rank, chunk) for rank, chunk, n in memory if n == name)


def check_glm():
    """Biases and norms as the config says, experts as DeepSeek's; vLLM's routers are fp32, and its shared experts are always cut."""
    count = 0
    for setting in (TE, LOCAL, {**TE, "moe_single_grouped_weight": True}):
        memory, n = there_and_back(GLM, megatron(2, **{TP: 2, **setting}))
        layer = "model.layers.1.self_attn."
        q, k, v = (tensor(GLM, f"{layer}{p}_proj.bias", heads, HEAD) for p, heads in (("q", HEADS), ("k", KV), ("v", KV)))
        same(memory, 2, 0, "decoder.layers.1.self_attention.linear_qkv.bias", np.concatenate([*q[2:], k[1], v[1]]))
        count += n
    # Experts 2 and 3 on the second rank: gate over up.
    memory, n = there_and_back(GLM, megatron(2, **{"expert_model_parallel_size": 2, "moe_single_grouped_weight": True, **TE}))
    experts = [f"model.layers.1.mlp.experts.{e}." for e in (2, 3)]
    fc1 = [[tensor(GLM, f"{e}{p}_proj.weight", 4, HIDDEN) for p in ("gate", "up")] for e in experts]
    same(memory, 2, 0, "decoder.layers.1.mlp.experts.linear_fc1.weight", np.stack([np.concatenate(pair) for pair in fc1]))
    same(memory, 2, 0, "decoder.layers.1.mlp.experts.linear_fc2.weight", np.stack([tensor(GLM, f"{e}down_proj.weight", HIDDEN, 4) for e in experts]))
    for members in ({V_TP: 2}, {V_TP: 2, V_DP: 2, "enable_expert_parallel": True}):
        memory, more = there_and_back(GLM, vllm(2 * members.get(V_DP, 1), **members))
        gate, up = (tensor(GLM, f"model.layers.1.mlp.shared_experts.{p}_proj.weight", 8, HIDDEN) for p in ("gate", "up"))
        same(memory, 2, 0, "model.layers.1.mlp.shared_experts.gate_up_proj.weight", np.concatenate([gate[4:], up[4:]]))
        n += more
    whole = worlds.from_hugging_face(GLM, vllm(2, **{V_TP: 2, "enable_shared_expert_dp": True}))
    same(whole, 2, 0, "model.layers.1.mlp.shared_experts.gate_up_proj.weight", np.concatenate([gate, up]))
    routers = worlds.reshard.Preset({"model": {**GLM, "torch_dtype": "bfloat16"}, "source": vllm(1), "target": vllm(1)}, 1)
    bits = {p["name"]: p["dtype"]["bits"] for p in routers.describe(worlds.reshard.DESCRIBE_LAYOUT)["params"]}
    check(bits["model.layers.1.mlp.gate.weight"] == 32 and bits["model.layers.1.post_attention_layernorm.weight"] == 16, bits)
    routers.close()
    return count + n


def check_predictors():
    """Layers for multi-token prediction: on Megatron's last chunk with a copy of the embedding, in vLLM a model of its own."""
    count, eh = 0, tensor(GLM, "model.layers.4.eh_proj.weight", HIDDEN, 2 * HIDDEN)
    o = tensor(GLM, "model.layers.4.self_attn.o_proj.weight", HIDDEN, HEADS * HEAD)
    copy, norm, predicts = "embedding.word_embeddings.weight", "decoder.final_layernorm.weight", "mtp.layers.0.eh_proj.weight"
    for setting, at, norm_at in (
        ({}, (1, 0), (1, 0)),
        ({PP: 2}, (2, 0), (2, 0)),
        ({PP: 2, VPP: 2}, (2, 1), (2, 1)),
        ({PP: 3, LAYOUT: "Ett|ttm|L"}, (2, 0), (2, 0)),
        ({PP: 3, LAYOUT: "Ett|tt|mL"}, (3, 0), (2, 0)),
    ):
        ranks = setting.get(PP, 1)
        memory, n = there_and_back(GLM, megatron(ranks, **setting, **TE, mtp_num_layers=1))
        check(chunks_with(memory, predicts) == [at], setting, chunks_with(memory, predicts))
        check(chunks_with(memory, norm) == [norm_at], setting, chunks_with(memory, norm))
        check(chunks_with(memory, copy) == sorted({(1, 0), at}), setting, chunks_with(memory, copy))
        same(memory, *at, copy, memory[1, 0, copy])
        count += n
    memory, n = there_and_back(GLM, megatron(2, **{TP: 2, **LOCAL}, mtp_num_layers=1))
    same(memory, 2, 0, predicts, eh[4:])
    same(memory, 2, 0, "mtp.layers.0.final_layernorm.weight", tensor(GLM, "model.layers.4.shared_head.norm.weight", HIDDEN))
    same(memory, 2, 0, "mtp.layers.0.transformer_layer.self_attention.linear_proj.weight", o[:, 4:])
    count += n
    for members in ({V_TP: 2}, {V_TP: 2, V_PP: 2}, {V_TP: 2, V_DP: 2, "enable_expert_parallel": True}):
        ranks = 2 * members.get(V_PP, members.get(V_DP, 1))
        memory, n = there_and_back(GLM, vllm(ranks, **members, mtp_drafter=True))
        same(memory, ranks, 1, "model.layers.4.eh_proj.weight", eh)
        same(memory, ranks, 1, "model.layers.4.mtp_block.self_attn.o_proj.weight", o[:, 4:])
        same(memory, ranks, 1, "model.layers.4.shared_head.head.weight", tensor(GLM, "lm_head.weight", 64, HIDDEN)[32:])
        drafters = {rank for rank, chunk, _ in memory if chunk == 1}
        check(drafters == ({3, 4} if V_PP in members else set(range(1, ranks + 1))), members, drafters)
        count += n
    # Without any map's list: linear, whatever the map says of the layers before.
    maps = [[3, 2, 1, 0]] * 3
    memory, n = there_and_back(GLM, vllm(2, **{V_TP: 2, "enable_expert_parallel": True, "physical_to_logical_map": maps}, mtp_drafter=True))
    down = [tensor(GLM, f"model.layers.{layer}.mlp.experts.{e}.down_proj.weight", HIDDEN, 4) for layer, e in ((3, 1), (3, 0), (4, 2), (4, 3))]
    same(memory, 2, 0, "model.layers.3.mlp.experts.routed_experts.w2_weight", np.stack(down[:2]))
    same(memory, 2, 1, "model.layers.4.mtp_block.mlp.experts.routed_experts.w2_weight", np.stack(down[2:]))
    # Two of them, of multi-head latent attention; names of another release; and a target that has none.
    trainer = megatron(2, **{PP: 2, **TE}, mtp_num_layers=2)
    memory, more = there_and_back(DEEPSEEK, trainer)
    kv = tensor(DEEPSEEK, "model.layers.5.self_attn.kv_b_proj.weight", 32, 10)
    same(memory, 2, 0, "mtp.layers.1.transformer_layer.self_attention.linear_kv_up_proj.weight", kv)
    return count + n + more + into_vllm(trainer, memory)


def into_vllm(trainer, memory):
    """Megatron's into engines with and without a drafter, bound under the names of Megatron-core 0.17."""
    count = 0
    for drafter in (True, False):
        engine = {**vllm(1, mtp_drafter=drafter), "ranks": [0]}
        spec = {"model": DEEPSEEK, "source": trainer, "target": engine}
        served = {}

        def array_of(rank, param):
            if rank:
                return param["name"].replace(".transformer_layer.", ".mtp_model_layer."), memory[rank, param["chunk"], param["name"]]
            served[0, param["chunk"], param["name"]] = array = np.full(param["shape"], worlds.POISON, worlds.kind_of(param))
            return param["name"], array

        worlds.sync_once(spec, 3, array_of)
        want = worlds.from_hugging_face(DEEPSEEK, vllm(1, mtp_drafter=drafter))
        for (_, chunk, name), array in want.items():
            same(served, 0, chunk, name, array)
        check(len(served) == len(want) and any(chunk for _, chunk, _ in served) == drafter, "a drafter, or none")
        count += len(want)
    return count


def check_gates():
    """Qwen3-Next: Megatron's queries, then gates, of a group; vLLM's head by head, its norm on the last stage alone."""
    rows = {p: tensor(NEXT, f"model.layers.2.self_attn.{p}_proj.weight", n, HEAD, HIDDEN) for p, n in (("q", 2 * HEADS), ("k", KV), ("v", KV))}
    q, k, v = rows.values()
    count, name = 0, "decoder.layers.2.self_attention.linear_qkv.weight"
    full = np.concatenate([np.concatenate([q[4 * g], q[4 * g + 2], q[4 * g + 1], q[4 * g + 3], k[g], v[g]]) for g in range(KV)])
    for tp in (1, 2, 4):
        memory, n = there_and_back(NEXT, megatron(tp, **{TP: tp, **TE}))
        for rank in range(tp):
            same(memory, rank + 1, 0, name, np.split(full, tp)[rank])
        count += n
    memory, n = there_and_back(NEXT, vllm(4, **{V_TP: 4}))
    same(memory, 2, 0, "model.layers.2.self_attn.qkv_proj.weight", np.concatenate([q[2], q[3], k[0], v[0]]))
    memory, more = there_and_back(NEXT, vllm(4, **{V_TP: 2, V_PP: 2}))
    for name, ranks in (("model.norm.weight", [3, 4]), ("lm_head.weight", [1, 2, 3, 4]), ("model.embed_tokens.weight", [1, 2, 3, 4])):
        check([rank for rank, _ in chunks_with(memory, name)] == ranks, name, chunks_with(memory, name))
    memory, most = there_and_back(NEXT, vllm(4, **{V_TP: 2, V_DP: 2, "enable_expert_parallel": True}))
    up = [tensor(NEXT, f"model.layers.0.mlp.shared_expert.{p}_proj.weight", 12, HIDDEN) for p in ("gate", "up")]
    same(memory, 2, 0, "model.layers.0.mlp.shared_expert.gate_up_proj.weight", np.concatenate(up))
    return count + n + more + most


def check_latent():
    """Both down projections in one, cut or whole; in vLLM apart; and what vllm-ascend derives from kv_b_proj."""
    count, layer = 0, "model.layers.2.self_attn."
    q_a, kv_a = tensor(DEEPSEEK, f"{layer}q_a_proj.weight", 6, HIDDEN), tensor(DEEPSEEK, f"{layer}kv_a_proj_with_mqa.weight", 12, HIDDEN)
    name, norm = "decoder.layers.2.self_attention.linear_qkv_down_proj.", tensor(DEEPSEEK, "model.layers.2.input_layernorm.weight", HIDDEN)
    for setting in ({"mla_down_proj_cut": True}, {}, LOCAL):
        memory, n = there_and_back(DEEPSEEK, megatron(2, **{TP: 2, **setting}, mla_down_proj_fusion=True))
        want = [q_a[3:], kv_a[6:]] if setting else [q_a, kv_a]
        same(memory, 2, 0, name + "weight", np.concatenate(want))
        same(memory, 2, 0, "decoder.layers.2.input_layernorm.weight" if setting == LOCAL else name + "layer_norm_weight", norm)
        count += n
    memory, n = there_and_back(DEEPSEEK, vllm(2, **{V_TP: 2}, fused_qkv_a_proj=False))
    same(memory, 2, 0, f"{layer}q_a_proj.weight", q_a)
    same(memory, 2, 0, f"{layer}kv_a_proj_with_mqa.weight", kv_a)
    memory = worlds.from_hugging_face(DEEPSEEK, vllm(2, **{V_TP: 2}, mla_derived_weights="copies"))
    kv_b = tensor(DEEPSEEK, f"{layer}kv_b_proj.weight", HEADS, 8, 10)[2:]
    same(memory, 2, 0, f"{layer}mla_attn.mla_attn.W_UK_T", kv_b[:, :3])
    same(memory, 2, 0, f"{layer}mla_attn.mla_attn.W_UV", kv_b[:, 3:].transpose(0, 2, 1))
    same(memory, 2, 0, f"{layer}kv_b_proj.weight", kv_b.reshape(16, 10))
    return count + n + 3


def check_vision():
    """The vision tower: under three kinds of names in Megatron, on stages of its own in MindSpeed's; cut or whole in vLLM."""
    block = "visual.blocks.1."
    qkv, bias = tensor(SEES, block + "attn.qkv.weight", 3, EYES, 2, WIDTH), tensor(SEES, block + "attn.qkv.bias", 3, EYES, 2)
    gate, up = (tensor(SEES, f"{block}mlp.{p}_proj.bias", 12) for p in ("gate", "up"))
    patch = tensor(SEES, "visual.patch_embed.proj.weight", WIDTH, 3, 2, 2, 2)
    merger = tensor(SEES, "visual.merger.mlp.0.weight", MERGED, MERGED)
    out = tensor(SEES, "visual.merger.mlp.2.weight", HIDDEN, MERGED)
    grouped, glu = qkv[:, 2:].transpose(1, 0, 2, 3).reshape(12, WIDTH), np.concatenate([gate[6:], up[6:]])
    count = 0
    for names, text, tower, layers, merges in (
        ("mbridge", "language_model.", "vision_model.patch_embed.", "vision_model.decoder.layers.1.", "vision_model.projection.encoder."),
        ("mindspeed_mm", "text_decoder.", "image_encoder.encoder.patch_embed.", "image_encoder.encoder.blocks.layers.1.", "image_encoder.projector.encoder."),
    ):  # fmt: skip
        memory, n = there_and_back(SEES, megatron(4, **{TP: 2, PP: 2}, vision_names=names))
        same(memory, 2, 0, tower + "proj.weight", patch)
        same(memory, 2, 0, layers + "self_attention.linear_qkv.weight", grouped)
        same(memory, 2, 0, layers + "self_attention.linear_qkv.bias", bias[:, 2:].transpose(1, 0, 2).reshape(12))
        same(memory, 2, 0, layers + "mlp.linear_fc1.bias", glu)
        same(memory, 2, 0, merges + "linear_fc1.weight", merger[16:])
        same(memory, 2, 0, merges + "linear_fc2.weight", out[:, 16:])
        check(chunks_with(memory, tower + "proj.weight") == [(1, 0), (2, 0)], names, chunks_with(memory, tower + "proj.weight"))
        check(chunks_with(memory, text + "output_layer.weight") == [(3, 0), (4, 0)], text)
        count += n
    memory, n = there_and_back(SEES, megatron(4, **{TP: 2, PP: 2, VPP: 2}, vision_names="megatron_bridge"))
    same(memory, 2, 0, block + "attn.qkv.weight", qkv.reshape(24, WIDTH))
    same(memory, 2, 0, "visual.merger.mlp.2.weight", out)
    count += n
    for vision, text, placed in (
        ("1,2,0,0", "0,0,2,2", {"p": 1, "m": 2, "e": 3, "o": 4}),
        ("0,3,0", "0,4,0", {"p": 2, "m": 2, "e": 2, "o": 2}),
    ):
        stages, tied = vision.count(",") + 1, {**SEES, "tie_word_embeddings": True}
        for config in (SEES, tied):
            setting = {PP: stages, LIST: text, "vision_num_layer_list": vision, "vision_names": "mindspeed_mm"}
            memory, n = there_and_back(config, megatron(stages, **setting))
            where = {
                "p": "image_encoder.encoder.patch_embed.proj.weight", "m": "image_encoder.projector.layernorm.weight",
                "e": "text_decoder.embedding.word_embeddings.weight", "o": "text_decoder.output_layer.weight",
            }  # fmt: skip
            want = {key: [(rank, 0)] for key, rank in placed.items()}
            if config is tied and placed["e"] == placed["o"]:
                want["o"] = []
            check({key: chunks_with(memory, name) for key, name in where.items()} == want, vision, text, memory.keys())
            count += n
    for mode in ("weights", "data"):
        memory, n = there_and_back(SEES, vllm(4, **{V_TP: 2, V_PP: 2}, mm_encoder_tp_mode=mode))
        for rank in (2, 4):
            whole = mode == "data"
            same(memory, rank, 0, block + "attn.qkv.weight", qkv.reshape(24, WIDTH) if whole else qkv[:, 2:].reshape(12, WIDTH))
            same(memory, rank, 0, block + "mlp.gate_up_proj.bias", np.concatenate([gate, up]) if whole else glu)
        count += n
    return count


def main():
    parts = (check_glm, check_predictors, check_gates, check_latent, check_vision)
    print("newer: " + ", ".join(f"{part()} {part.__name__.removeprefix('check_')}" for part in parts))


if __name__ == "__main__":
    main()
