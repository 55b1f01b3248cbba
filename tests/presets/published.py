"""Published jobs at their real numbers of ranks, heads, layers and rows: those of MindSpeed-RL's examples and others.

Plans without peers and without memory: names, shapes and bytes of some ranks against the oracle, and the world's sums. The hidden size
is 1, which no cut depends on, so that numpy can count every element; Qwen2.5 is cut as Llama is, for vLLM's Qwen2 has no head_dim of
its own.
"""

import json

import numpy as np
import worlds
from worlds import check, reshard

TP, PP, VPP = "tensor_model_parallel_size", "pipeline_model_parallel_size", "virtual_pipeline_model_parallel_size"


def model(arch, layers, heads, kv_heads, mlp, vocab, tied=False):
    return {
        "architectures": [arch + "ForCausalLM"], "hidden_size": 1, "num_hidden_layers": layers, "num_attention_heads": heads,
        "num_key_value_heads": kv_heads, "head_dim": 128, "intermediate_size": mlp, "vocab_size": vocab, "tie_word_embeddings": tied,
    }  # fmt: skip


QWEN25_7B = model("Llama", 28, 28, 4, 18944, 152064)
QWEN25_32B = model("Llama", 64, 40, 8, 27648, 152064)
QWEN3_8B = model("Qwen3", 36, 32, 8, 12288, 151936)
QWEN3_4B = model("Qwen3", 36, 32, 8, 9728, 151936, tied=True)
LLAMA_8B = model("Llama", 32, 32, 8, 14336, 128256)
# Name, model, ranks, trainer, vLLM's tensor parallel size (as many engines as fit).
JOBS = [
    ("grpo qwen25-7b",     QWEN25_7B,  16, {TP: 2, PP: 2}, 1),
    ("grpo qwen25-32b A2", QWEN25_32B, 16, {TP: 4, PP: 4}, 2),
    ("grpo qwen25-32b A3", QWEN25_32B, 16, {TP: 4, PP: 4, "num_layer_list": "16,17,16,15"}, 2),
    ("ppo qwen25-32b",     QWEN25_32B, 32, {TP: 8}, 8),
    ("dapo qwen25-32b",    QWEN25_32B, 64, {TP: 8, PP: 2, "context_parallel_size": 2}, 4),
    ("grpo qwen3-8b",      QWEN3_8B,   16, {TP: 2, PP: 2}, 1),
    ("llama 8b, 16 heads", LLAMA_8B,   16, {TP: 4, PP: 2, VPP: 2, "use_tp_pp_dp_mapping": True}, 16),
    ("qwen3-4b, tied",     QWEN3_4B,   16, {TP: 8, PP: 2, "account_for_embedding_in_pipeline_split": False}, 4),
]  # fmt: skip


def with_experts(dense, experts, width, **more):
    return {**dense, "num_experts": experts, "moe_intermediate_size": width, **more}


# Experts are narrow, so that numpy can count them, and as many as they are.
QWEN3_30B = with_experts(model("Qwen3Moe", 48, 32, 4, 8, 151936), 128, 8)
QWEN3_235B = with_experts(model("Qwen3Moe", 94, 64, 4, 8, 151936), 128, 8)
DEEPSEEK_V3 = {
    **model("DeepseekV3", 61, 128, 128, 96, 129280), "n_routed_experts": 256, "moe_intermediate_size": 8, "n_shared_experts": 1, "first_k_dense_replace": 3,
    "q_lora_rank": 48, "kv_lora_rank": 16, "qk_nope_head_dim": 4, "qk_rope_head_dim": 4, "v_head_dim": 4,
}  # fmt: skip
MOONLIGHT = {**DEEPSEEK_V3, "num_hidden_layers": 27, "num_attention_heads": 16, "n_routed_experts": 64, "first_k_dense_replace": 1, "n_shared_experts": 2,
             "q_lora_rank": None}  # fmt: skip
FIRST, LAST = "num_layers_in_first_pipeline_stage", "num_layers_in_last_pipeline_stage"
EP, ETP, EXTEND = "expert_model_parallel_size", "expert_tensor_parallel_size", "moe_tp_extend_ep"
TE = {"transformer_impl": "transformer_engine", "moe_grouped_gemm": True}
R1 = {TP: 4, PP: 8, EP: 8, EXTEND: True, "num_layer_list": "7,7,8,8,8,8,8,7"}
# 64 more slots than experts, on 64 ranks.
EPLB = [[(layer + slot) % 256 for slot in range(320)] for layer in range(58)]
# Name, model, ranks, trainer, vLLM's tensor and data parallel size with expert parallel, more of it.
EXPERT_JOBS = [
    ("dapo qwen3-30b-a3b",    QWEN3_30B,   16,  {TP: 4, EP: 2, EXTEND: True}, 1, 8, {"expert_storage": "stacked_transposed"}),
    ("grpo qwen3-235b-a22b",  QWEN3_235B,  128, {TP: 2, PP: 16, EP: 4, EXTEND: True, "noop_layers": "5,95"}, 4, 8, {"expert_storage": "stacked_transposed"}),
    ("qwen3-235b, verl",      QWEN3_235B,  256, {TP: 4, PP: 8, EP: 8, "context_parallel_size": 8, ETP: 1, FIRST: 11, LAST: 11, **TE}, 4, 32, {}),
    ("grpo deepseek-r1 EPLB", DEEPSEEK_V3, 256, R1, 4, 16, {"expert_storage": "stacked_transposed", "physical_to_logical_map": EPLB}),
    ("deepseek-v3, verl",     DEEPSEEK_V3, 256, {TP: 8, PP: 16, EP: 16, ETP: 1, FIRST: 3, LAST: 2, **TE}, 8, 8, {}),
    ("moonlight, verl",       MOONLIGHT,   16,  {TP: 2, PP: 4, ETP: 2, FIRST: 7, LAST: 6, **TE}, 4, 1, {"enable_expert_parallel": False}),
]  # fmt: skip


def job(config, ranks, trainer, tp, pads):
    source = {"framework": "megatron", "ranks": f"0-{ranks - 1}", "transformer_impl": "local", **trainer}
    if not pads:
        source |= {"make_vocab_size_divisible_by": 1, "padded_vocab_size": config["vocab_size"]}
    target = {"framework": "vllm", "ranks": f"0-{ranks - 1}", "tensor_parallel_size": tp, "replicas": ranks // tp}
    return {"model": config, "source": source, "target": target, "ranks_per_host": 8}


def expert_job(config, ranks, trainer, tp, dp, more):
    spec = job(config, ranks, trainer, tp, True)
    spec["target"] |= {"data_parallel_size": dp, "replicas": ranks // (tp * dp), "enable_expert_parallel": True, **more}
    return spec


def run(name, spec, ranks):
    made, sums = worlds.model_of(json.dumps(spec)), {}
    looked_at = np.linspace(0, ranks - 1, 4, dtype=int).tolist()
    for number in range(ranks):
        preset = reshard.Preset(spec, number)
        plan = preset.describe(reshard.DESCRIBE_PLAN)
        for what, count in plan["bytes"].items():
            sums[what] = sums.get(what, 0) + count
        if number in looked_at:
            rank = worlds.Described(spec, number, made)
            rank.preset = preset
            rank.check_describe()
            worlds.check_plan(plan, number, rank.expected_bytes())
        if number == ranks - 1:
            whole = preset.describe(reshard.DESCRIBE_WORLD)["bytes"]
        preset.close()
    check(sums["sent"] == sums["received"], name, "sent and received differ:", sums)
    check(
        all(whole[what] == sums[what] for what in ("sent", "received")),
        name,
        "the world says",
        whole,
        "its ranks",
        sums,
    )
    return len(looked_at)


def main():
    count = 0
    for name, config, ranks, trainer, tp in JOBS:
        for pads in (False, True):
            try:
                count += run(name, job(config, ranks, trainer, tp, pads), ranks)
            except Exception as error:
                raise AssertionError(f"{name}: {error}") from error
    for name, *sizes in EXPERT_JOBS:
        try:
            count += run(name, expert_job(*sizes), sizes[1])
        except Exception as error:
            raise AssertionError(f"{name}: {error}") from error
    print(f"published: {2 * len(JOBS) + len(EXPERT_JOBS)} jobs, {count} ranks looked at")


if __name__ == "__main__":
    main()
