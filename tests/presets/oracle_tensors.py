"""Names and shapes of the Hugging Face tensors of a model: a part of the oracle (oracle.py)."""

# Tensors whose values a trainer may hold less one. Those of a vision tower are not among them.
NORMS = (
    ".input_layernorm.weight", ".post_attention_layernorm.weight", "model.norm.weight", ".q_norm.weight", ".k_norm.weight",
    ".q_a_layernorm.weight", ".kv_a_layernorm.weight", ".enorm.weight", ".hnorm.weight", ".shared_head.norm.weight",
)  # fmt: skip


class Tensors:
    """What Model knows of names: a layer's number, from 0, counts the layers for multi-token prediction after the others."""

    @property
    def shared_gate(self):
        return self.family in ("Qwen2Moe", "Qwen3Next")

    def moe(self, layer):
        """Before the names of a layer's experts and their router."""
        return f"model.layers.{layer}." + ("block_sparse_moe." if self.family == "Mixtral" else "mlp.")

    def shared_expert(self, layer):
        return self.moe(layer) + ("shared_expert." if self.shared_gate else "shared_experts.")

    def expert(self, layer, number):
        """The names of an expert's gate, up and down projection."""
        names = ("w1", "w3", "w2") if self.family == "Mixtral" else ("gate_proj", "up_proj", "down_proj")
        return [f"{self.moe(layer)}experts.{number}.{name}.weight" for name in names]

    @property
    def head_name(self):
        return "model.embed_tokens.weight" if self.tied else "lm_head.weight"

    def all_shapes(self):
        h = self.hidden
        yield "model.embed_tokens.weight", (self.vocab, h)
        for i in range(self.layers + self.mtp):
            yield from self._layer_shapes(i)
        for i in range(self.layers, self.layers + self.mtp):
            layer = f"model.layers.{i}."
            yield layer + "enorm.weight", (h,)
            yield layer + "hnorm.weight", (h,)
            yield layer + "eh_proj.weight", (h, 2 * h)
            yield layer + "shared_head.norm.weight", (h,)
        yield "model.norm.weight", (h,)
        if not self.tied:
            yield "lm_head.weight", (self.vocab, h)
        if self.vision:
            yield from self.vision.shapes()

    def _layer_shapes(self, i):
        layer = f"model.layers.{i}."
        yield layer + "input_layernorm.weight", (self.hidden,)
        yield from self._mla_shapes(layer) if self.mla else self._attention_shapes(layer)
        yield layer + "post_attention_layernorm.weight", (self.hidden,)
        if self.has_experts(i):
            yield from self._expert_shapes(i)
        else:
            yield from self._mlp_shapes(layer + "mlp.", self.mlp)

    def _attention_shapes(self, layer):
        h, q, kv = self.hidden, self.heads * self.head, self.kv_heads * self.head
        for part, rows in (("q", q * (2 if self.gated else 1)), ("k", kv), ("v", kv)):
            yield layer + f"self_attn.{part}_proj.weight", (rows, h)
            if self.bias:
                yield layer + f"self_attn.{part}_proj.bias", (rows,)
        if self.norms:
            yield layer + "self_attn.q_norm.weight", (self.head,)
            yield layer + "self_attn.k_norm.weight", (self.head,)
        yield layer + "self_attn.o_proj.weight", (h, q)

    def _mla_shapes(self, layer):
        h, q = self.hidden, self.heads * (self.nope + self.rope)
        if self.q_lora:
            yield layer + "self_attn.q_a_proj.weight", (self.q_lora, h)
            yield layer + "self_attn.q_a_layernorm.weight", (self.q_lora,)
            yield layer + "self_attn.q_b_proj.weight", (q, self.q_lora)
        else:
            yield layer + "self_attn.q_proj.weight", (q, h)
        yield layer + "self_attn.kv_a_proj_with_mqa.weight", (self.kv_lora + self.rope, h)
        yield layer + "self_attn.kv_a_layernorm.weight", (self.kv_lora,)
        yield layer + "self_attn.kv_b_proj.weight", (self.heads * (self.nope + self.v_head), self.kv_lora)
        yield layer + "self_attn.o_proj.weight", (h, self.heads * self.v_head)

    def _mlp_shapes(self, prefix, rows):
        yield prefix + "gate_proj.weight", (rows, self.hidden)
        yield prefix + "up_proj.weight", (rows, self.hidden)
        yield prefix + "down_proj.weight", (self.hidden, rows)

    def _expert_shapes(self, layer):
        yield self.moe(layer) + "gate.weight", (self.experts, self.hidden)
        if self.router_bias:
            yield self.moe(layer) + "gate.e_score_correction_bias", (self.experts,)
        for number in range(self.experts):
            gate, up, down = self.expert(layer, number)
            yield gate, (self.expert_mlp, self.hidden)
            yield up, (self.expert_mlp, self.hidden)
            yield down, (self.hidden, self.expert_mlp)
        if self.shared:
            yield from self._mlp_shapes(self.shared_expert(layer), self.shared)
        if self.shared_gate:
            yield self.moe(layer) + "shared_expert_gate.weight", (1, self.hidden)


class Vision:
    """The vision tower of Qwen2.5-VL."""

    def __init__(self, config):
        self.depth, self.width, self.heads, self.mlp = (config[x] for x in ("depth", "hidden_size", "num_heads", "intermediate_size"))
        self.patch = (config.get("in_channels", config.get("in_chans", 3)), config["temporal_patch_size"], *[config["patch_size"]] * 2)
        self.merged, self.out = self.width * config["spatial_merge_size"] ** 2, config["out_hidden_size"]

    def shapes(self):
        n, f = self.width, self.mlp
        yield "visual.patch_embed.proj.weight", (n, *self.patch)
        for i in range(self.depth):
            block = f"visual.blocks.{i}."
            yield block + "norm1.weight", (n,)
            yield block + "norm2.weight", (n,)
            for name, rows, columns in (
                ("attn.qkv", 3 * n, n), ("attn.proj", n, n), ("mlp.gate_proj", f, n), ("mlp.up_proj", f, n), ("mlp.down_proj", n, f),
            ):  # fmt: skip
                yield f"{block}{name}.weight", (rows, columns)
                yield f"{block}{name}.bias", (rows,)
        yield "visual.merger.ln_q.weight", (n,)
        for name, rows in (("mlp.0", self.merged), ("mlp.2", self.out)):
            yield f"visual.merger.{name}.weight", (rows, self.merged)
            yield f"visual.merger.{name}.bias", (rows,)
