"""The models, and their Hugging Face tensors in several versions.

A value is a function of tensor, element and version, random enough that no element is like its neighbours; no value is zero, a NaN, or
the same in two versions.
"""

import zlib

import numpy as np
import torch

SHAPE = {
    "hidden_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "intermediate_size": 96,
    "vocab_size": 275,  # neither framework's padding divides it
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "hidden_act": "silu",
    "attention_bias": False,
    "torch_dtype": "bfloat16",
}
DENSE = {**SHAPE, "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "tie_word_embeddings": False}
TIED = {**DENSE, "tie_word_embeddings": True}
MOE = {
    **SHAPE,
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "tie_word_embeddings": False,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "norm_topk_prob": True,
}

VERSIONS = (0x8000, 0, 0x00FF)  # what a version's bits differ by from version 1's


def shapes(config):
    """Of all Hugging Face tensors, by name."""
    hidden, d = config["hidden_size"], config["head_dim"]
    q, kv = config["num_attention_heads"] * d, config["num_key_value_heads"] * d
    out = {"model.embed_tokens.weight": (config["vocab_size"], hidden), "model.norm.weight": (hidden,)}
    if not config["tie_word_embeddings"]:
        out["lm_head.weight"] = (config["vocab_size"], hidden)

    def mlp(prefix, width):
        out[prefix + "gate_proj.weight"] = out[prefix + "up_proj.weight"] = (width, hidden)
        out[prefix + "down_proj.weight"] = (hidden, width)

    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}."
        out[prefix + "input_layernorm.weight"] = out[prefix + "post_attention_layernorm.weight"] = (hidden,)
        out[prefix + "self_attn.q_proj.weight"] = (q, hidden)
        out[prefix + "self_attn.k_proj.weight"] = out[prefix + "self_attn.v_proj.weight"] = (kv, hidden)
        out[prefix + "self_attn.o_proj.weight"] = (hidden, q)
        out[prefix + "self_attn.q_norm.weight"] = out[prefix + "self_attn.k_norm.weight"] = (d,)
        if "num_experts" in config:
            out[prefix + "mlp.gate.weight"] = (config["num_experts"], hidden)
            for expert in range(config["num_experts"]):
                mlp(f"{prefix}mlp.experts.{expert}.", config["moe_intermediate_size"])
        else:
            mlp(prefix + "mlp.", config["intermediate_size"])
    return out


def tensors(config, version):
    out = {}
    for name, shape in shapes(config).items():
        bits = np.random.default_rng(zlib.crc32(name.encode())).integers(0x2000, 0x6000, shape, np.uint16)
        out[name] = torch.from_numpy(bits ^ np.uint16(VERSIONS[version])).view(torch.bfloat16)
    return out


def bits(tensor):
    """The memory of a bf16 tensor, as a numpy array."""
    assert tensor.dtype == torch.bfloat16, tensor.dtype
    return tensor.detach().view(torch.uint16).numpy()
