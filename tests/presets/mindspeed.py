"""MindSpeed's own: fused and split projections of multi-head latent attention, and the pipeline that comes back.

Whole tensors on rank 0 go to trainers; what each parameter must hold is written down here from the tensors alone.
"""

import numpy as np
import worlds
from oracle import values
from worlds import check

HIDDEN, HEADS, KV_LORA, NOPE, ROPE, V, LAYERS = 12, 4, 10, 3, 2, 5, 4
CONFIG = {
    "architectures": ["DeepseekV3ForCausalLM"], "hidden_size": HIDDEN, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS,
    "kv_lora_rank": KV_LORA, "qk_nope_head_dim": NOPE, "qk_rope_head_dim": ROPE, "v_head_dim": V, "intermediate_size": 8, "vocab_size": 32,
}  # fmt: skip


def tensor(layer, name, *shape):
    name = f"model.layers.{layer}.self_attn.{name}.weight"
    return values(name, int(np.prod(shape))).reshape(shape)


def run(config, left_out=(), order=None, **setting):
    """Memory of all trainers after a sync, by rank, chunk and name."""
    ranks = list(range(1, setting.pop("ranks") + 1))
    return worlds.from_hugging_face(config, {"framework": "megatron", "ranks": ranks, "transformer_impl": "local", **setting}, left_out, order)


def check_latent():
    """Every fusion and split, with TP 2 where MindSpeed can."""
    count = 0
    for q_lora in (6, None):
        for weights in ("mindspeed", "mindspeed_qb"):
            for split in (False, True):
                tp = 2 if q_lora else 1
                members = {"ranks": tp, "tensor_model_parallel_size": tp, "mla_weights": weights, "mla_mm_split": split}
                got = run({**CONFIG, "q_lora_rank": q_lora}, **members)
                for order in range(4):  # the parameters' names tell as much
                    found = run({**CONFIG, "q_lora_rank": q_lora}, ("mla_weights", "mla_mm_split"), order, **members)
                    check(all((found[key] == got[key]).all() for key in got), "another sync with", weights, split, order)
                for rank in range(1, tp + 1):
                    part = slice((rank - 1) * HEADS // tp, rank * HEADS // tp)
                    for layer in range(LAYERS):
                        expected = latent(layer, q_lora, weights, split, part)
                        for name, want in expected.items():
                            have = got[rank, 0, f"decoder.layers.{layer}.self_attention.{name}.weight"]
                            check((have == want).all() and have.shape == want.shape, name, rank, q_lora, weights, split)
                            count += 1
                        named = [n for _, _, n in got if n.startswith(f"decoder.layers.{layer}.self_attention.linear_")]
                        check(len(set(named)) == len(expected) + 1, "others than", sorted(expected), "and linear_proj:", sorted(set(named)))
    return count


def latent(layer, q_lora, weights, split, heads):
    """The projections of some heads, but for the output."""
    kv_a = tensor(layer, "kv_a_proj_with_mqa", KV_LORA + ROPE, HIDDEN)
    kv_b = tensor(layer, "kv_b_proj", HEADS, NOPE + V, KV_LORA)[heads]
    if q_lora:
        first = tensor(layer, "q_a_proj", q_lora, HIDDEN)
        q_b = tensor(layer, "q_b_proj", HEADS, NOPE + ROPE, q_lora)[heads]
    else:
        first, q_b = tensor(layer, "q_proj", HEADS * (NOPE + ROPE), HIDDEN), None
    out = {"linear_qkv": np.concatenate([first, kv_a])}
    if split:
        out |= {"linear_kv_nope": kv_b[:, :NOPE].reshape(-1, KV_LORA), "linear_v": kv_b[:, NOPE:].reshape(-1, KV_LORA)}
        if q_lora:
            out |= {"linear_qk_nope": q_b[:, :NOPE].reshape(-1, q_lora), "linear_qk_rope": q_b[:, NOPE:].reshape(-1, q_lora)}
    else:
        core = weights == "mindspeed"
        out["linear_kv_up_proj" if core else "linear_kvb"] = kv_b.reshape(-1, KV_LORA)
        if q_lora:
            out["linear_q_up_proj" if core else "linear_qb"] = q_b.reshape(-1, q_lora)
    return out


def check_pipeline():
    """dualpipev: stage p has layers p and L - 1 - p of 4 on 2 stages, the first stage the embedding and the output layer."""
    got = run({**CONFIG, "q_lora_rank": 6}, ranks=2, pipeline_model_parallel_size=2, schedules_method="dualpipev")
    for rank, chunk, layer in ((1, 0, 0), (2, 0, 1), (2, 1, 2), (1, 1, 3)):
        norm = got[rank, chunk, "decoder.layers.0.input_layernorm.weight"]
        check((norm == values(f"model.layers.{layer}.input_layernorm.weight", HIDDEN)).all(), f"stage {rank - 1}, chunk {chunk}")
    check((1, 0, "embedding.word_embeddings.weight") in got and (1, 1, "output_layer.weight") in got, "both ends on the first stage")
    check(not any(rank == 2 and not name.startswith("decoder.layers.") for rank, _, name in got), "an end on the last stage")
    return 4


def main():
    print(f"mindspeed: {check_latent()} projections, {check_pipeline()} chunks")


if __name__ == "__main__":
    main()
