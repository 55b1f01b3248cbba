"""What a spec leaves open, parameters tell when they are bound.

The oracle gets the member, the library does not: it must find out from names, shapes and dtypes, and say so to ranks that cannot.
"""

import json

import numpy as np
import worlds
from worlds import SOURCE, TARGET, check, on_threads, reshard

MLA = {
    "architectures": ["DeepseekV3ForCausalLM"], "hidden_size": 12, "num_hidden_layers": 3, "num_attention_heads": 4, "kv_lora_rank": 10,
    "qk_nope_head_dim": 3, "qk_rope_head_dim": 2, "v_head_dim": 5, "intermediate_size": 8, "vocab_size": 30, "q_lora_rank": 6,
    "n_routed_experts": 4, "n_shared_experts": 1, "moe_intermediate_size": 6, "first_k_dense_replace": 1,
}  # fmt: skip
LLAMA = {
    "architectures": ["LlamaForCausalLM"], "hidden_size": 8, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2,
    "intermediate_size": 12, "vocab_size": 50, "tie_word_embeddings": True,
}  # fmt: skip
# As wide as its experts' gate and up together: w13 alone does not tell how it lies.
SQUARE = {**MLA, "hidden_size": 12, "moe_intermediate_size": 6}
TP2 = {"tensor_model_parallel_size": 2}
VLLM2 = {"tensor_parallel_size": 2}

# Model, framework, ranks, members that both are told, members that the oracle alone is told.
CASES = [
    (MLA, "megatron", 2, TP2, {"mla_down_proj_cut": True}),
    (MLA, "megatron", 2, TP2 | {"transformer_impl": "local"}, {"mla_down_proj_cut": False}),
    (MLA, "megatron", 4, TP2 | {"pipeline_model_parallel_size": 2, "num_layers_in_first_pipeline_stage": 1}, {"mla_down_proj_cut": True}),
    (LLAMA, "megatron", 2, TP2, {"padded_vocab_size": 64}),
    (LLAMA, "megatron", 4, TP2 | {"pipeline_model_parallel_size": 2}, {"padded_vocab_size": 50}),
    (LLAMA, "megatron", 3, {}, {"padded_vocab_size": 51}),
    (LLAMA, "vllm", 2, VLLM2, {"padded_vocab_size": 50}),
    (LLAMA, "vllm", 4, VLLM2 | {"pipeline_parallel_size": 2}, {"padded_vocab_size": 192}),
    (MLA, "vllm", 2, VLLM2, {"shared_experts": "whole"}),
    (MLA, "vllm", 4, VLLM2 | {"data_parallel_size": 2, "enable_expert_parallel": True}, {"shared_experts": "cut"}),
    (SQUARE, "vllm", 2, VLLM2, {"expert_storage": "stacked_transposed"}),
    (MLA, "vllm", 2, VLLM2, {"fused_qkv_a_proj": False}),
    (MLA, "vllm", 2, VLLM2, {"e_score_correction_bias_dtype": "bfloat16", "expert_storage": "stacked_transposed", "shared_experts": "whole"}),
    (MLA, "megatron", 2, TP2, {"mla_down_proj_fusion": True}),
    (MLA, "megatron", 2, TP2 | {"transformer_impl": "local"}, {"mla_down_proj_fusion": True, "mla_down_proj_cut": False}),
    (MLA, "megatron", 2, TP2, {"mla_down_proj_fusion": True, "mla_down_proj_cut": True}),
    (SQUARE, "vllm", 2, VLLM2 | {"enable_expert_parallel": True}, {"expert_storage": "stacked_transposed", "padded_vocab_size": 30}),
]  # fmt: skip


def sides(model, framework, ranks, both, told):
    """The spec with all members and without those to be found out, on each side of a whole checkpoint."""
    whole = {"framework": "hf", "ranks": [ranks]}
    full = {"framework": framework, "ranks": list(range(ranks)), **both, **told}
    left = {key: value for key, value in full.items() if key not in told}
    for source, target in ((lambda s: whole, lambda s: s), (lambda s: s, lambda s: whole)):
        yield [{"model": model, "source": source(side), "target": target(side)} for side in (full, left)]


def check_found():
    count = 0
    for case in CASES:
        for full, left in sides(*case):
            world = case[2] + 1
            try:
                for order in (None, 1, 2):
                    worlds.run(full, world, specs=[left] * world, left_open=True, again=True, order=order)
            except Exception as error:
                raise AssertionError(f"{error}\n{json.dumps(left)}\ninstead of\n{json.dumps(full)}") from error
            count += 1
    return count


def refusal(work):
    try:
        work()
    except reshard.Error as error:
        return str(error)
    raise AssertionError("was accepted")


def says(text, *words):
    for word in words:
        check(word in text, f"'{word}' is not in: {text}")


def check_refused():
    """What fits no variant, contradicts another parameter, or what another rank found."""
    spec = {"model": MLA, "source": {"framework": "hf", "ranks": [2]}, "target": {"framework": "megatron", "ranks": [0, 1], **TP2}}
    down, kv = (f"decoder.layers.0.self_attention.{name}.weight" for name in ("linear_q_down_proj", "linear_kv_down_proj"))
    new = lambda spec, rank: reshard.Preset(spec, rank)  # noqa: E731
    array = lambda *shape: np.full(shape, worlds.POISON, np.uint16)  # noqa: E731
    preset = new(spec, 0)
    text = refusal(lambda: preset.bind(down, array(5, 12), TARGET))
    says(text, down, "[6, 12]", "[5, 12]", "with mla_down_proj_cut true it has shape [3, 12]")
    preset.bind(down, array(3, 12), TARGET)
    found = preset.describe(reshard.DESCRIBE_LAYOUT)["found"]
    check(found == {"source": "", "target": "mla_down_proj_cut true"}, "found", found)
    text = refusal(lambda: preset.bind(kv, array(12, 12), TARGET))
    says(text, kv, "[6, 12]", "[12, 12]")
    preset.close()
    # A member that is given is not found out.
    preset = new({**spec, "target": {**spec["target"], "mla_down_proj_cut": False}}, 0)
    text = refusal(lambda: preset.bind(down, array(3, 12), TARGET))
    says(text, down, "[6, 12]", "[3, 12]")
    check("mla_down_proj_cut" not in text, text)
    preset.close()
    # A vocabulary that is no padded one of this model.
    preset = new(spec, 0)
    text = refusal(lambda: preset.bind("embedding.word_embeddings.weight", array(500, 12), TARGET))
    says(text, "[128, 12]", "[500, 12]")
    preset.close()
    # One bound before fits the default alone.
    preset = new(spec, 0)
    preset.bind(down, array(6, 12), TARGET)
    text = refusal(lambda: preset.bind(kv, array(6, 12), TARGET))
    says(text, kv, down, "mla_down_proj_cut true", "bound before, does not")
    preset.close()

    # A derived weight that is left out must be a view, or it would keep its values.
    target = {"framework": "vllm", "ranks": [0]}
    preset = new({"model": MLA, "source": {"framework": "hf", "ranks": [1]}, "target": target}, 0)
    arrays = {}
    for p in preset.describe(reshard.DESCRIBE_LAYOUT)["params"]:
        arrays[p["name"]] = np.zeros(p["shape"], np.uint32 if p["dtype"]["bits"] == 32 else np.uint16)
        preset.bind(p["name"], arrays[p["name"]], TARGET, tuple(p["dtype"][k] for k in ("code", "bits", "lanes")))
    derived = "model.layers.0.self_attn.mla_attn.mla_attn.W_UV"
    kv_b = arrays["model.layers.0.self_attn.kv_b_proj.weight"].reshape(4, 8, 10)
    preset.bind(derived, kv_b[:, 3:].swapaxes(1, 2), TARGET)
    preset.layout()
    preset.bind(derived, array(4, 10, 5), TARGET)
    says(refusal(preset.layout), derived, "mla_derived_weights", "copies")
    preset.close()

    # A rank that has none of it hears of it.
    hub, told = next(worlds.hubs), {}
    whole = {"model": LLAMA, "source": {"framework": "hf", "ranks": [1]}, "target": {"framework": "megatron", "ranks": [0]}}

    def hear(rank):
        preset, comm = new(whole, rank), worlds.LoopbackComm(hub, rank, 2)
        for p in preset.describe(reshard.DESCRIBE_LAYOUT)["params"]:
            shape = [60, 8] if p["name"].startswith("embedding") else p["shape"]
            preset.bind(p["name"], array(*shape), SOURCE if rank else TARGET)
        container = reshard.Container(preset, comm, f"rank {rank}", worlds.TIMEOUT_MS)
        container.connect()
        told[rank] = container.describe(reshard.DESCRIBE_PLAN)["found"]
        for handle in (container, comm, preset):
            handle.close()

    on_threads(range(2), hear)
    check(all(t == {"source": "", "target": "padded_vocab_size 60"} for t in told.values()), "told", told)

    # Ranks that disagree: found against found, and found against the default.
    def connected(shapes):
        hub, errors = next(worlds.hubs), {}

        def work(rank):
            preset, comm = new(spec, rank), worlds.LoopbackComm(hub, rank, 3)
            params = preset.describe(reshard.DESCRIBE_LAYOUT)["params"]
            for p in sorted(params, key=lambda p: "down_proj" not in p["name"]):
                shape = list(p["shape"])
                if p["name"].startswith("embedding") and rank < 2:
                    shape[0] = shapes[rank][1]
                if "down_proj" in p["name"] and rank < 2:
                    shape[0] = shape[0] // (2 if shapes[rank][0] else 1)
                kind = np.uint32 if p["dtype"]["bits"] == 32 else np.uint16
                role = SOURCE if rank == 2 else TARGET
                if "output_layer" in p["name"] and rank < 2:
                    shape[0] = shapes[rank][1]
                preset.bind(p["name"], np.zeros(shape, kind), role, tuple(p["dtype"][k] for k in ("code", "bits", "lanes")))
            container = reshard.Container(preset, comm, f"rank {rank}", worlds.TIMEOUT_MS)
            errors[rank] = refusal(container.connect)
            for handle in (container, comm, preset):
                handle.close()

        on_threads(range(3), work)
        return errors

    for error in connected([(True, 128), (False, 128)]).values():
        says(error, "MISMATCH", "rank 1", "down_proj", "mla_down_proj_cut true")
    for error in connected([(True, 16), (True, 32)]).values():
        says(error, "MISMATCH", "ranks 0 and 1", "target", "padded_vocab_size 32", "padded_vocab_size 64")
    return 9


def main():
    print(f"variants: {check_found()} found, {check_refused()} refused")


if __name__ == "__main__":
    main()
