"""What ranks hold of Qwen2.5-VL's vision tower: a part of the oracle (oracle.py)."""

import numpy as np
from oracle_model import grouped, halves, need, numbers, part

NAMES = ("mbridge", "mindspeed_mm", "megatron_bridge")


def vision_stages(model, side, chunks):
    """The names that Megatron has for the tower, and the blocks of every stage: their numbers."""
    pp, names = side.get("pipeline_model_parallel_size", 1), side.get("vision_names", "mbridge")
    sizes = numbers(side.get("vision_num_layer_list"))
    need(model.vision or ("vision_names" not in side and not sizes), "vision_names")
    need(names in NAMES, "vision_names")
    need(not sizes or (names == "mindspeed_mm" and chunks == 1 and len(sizes) == pp), "vision_num_layer_list")
    if not model.vision:
        return names, []
    if names == "mindspeed_mm":  # which has lists of layers
        need(chunks == 1, "virtual_pipeline_model_parallel_size")
        need("pipeline_model_parallel_layout" not in side, "pipeline_model_parallel_layout")
    need(not sizes or sum(sizes) == model.vision.depth, "vision_num_layer_list")
    of = iter(range(model.vision.depth))
    return names, [[next(of) for _ in range(size)] for size in sizes or [model.vision.depth] + [0] * (pp - 1)]


def thirds(model, name):
    return np.split(model[name], 3)


class MegatronVision:
    """Adds the tower's parameters on one stage to a rank."""

    def __init__(self, rank, names, blocks):
        self.rank, self.model, self.names, self.blocks = rank, rank.model, names, blocks
        self.tp, self.r = rank.tp, rank.r
        vision = self.model.vision
        cut = names != "megatron_bridge"
        need(not cut or all(size % self.tp == 0 for size in (vision.heads, vision.mlp, vision.merged)), "vision_config")

    def add(self):
        if not self.blocks:
            return
        first, last = 0 in self.blocks, self.model.vision.depth - 1 in self.blocks
        if self.names == "megatron_bridge":
            for name in self.model.shapes:
                if name.startswith("visual."):
                    self.rank.add(name, self.model[name], name)
            return
        bridge = self.names == "mbridge"
        blocks, ends = (
            ("vision_model.decoder.layers.{}.", {
                "patch": "vision_model.patch_embed.proj.weight", "norm": "vision_model.decoder.final_layernorm.weight",
                "projector": "vision_model.projection.encoder.",
            }) if bridge else
            ("image_encoder.encoder.blocks.layers.{}.", {
                "patch": "image_encoder.encoder.patch_embed.proj.weight", "norm": "image_encoder.projector.layernorm.weight",
                "projector": "image_encoder.projector.encoder.",
            })
        )  # fmt: skip
        if first:
            self.whole(ends["patch"], "visual.patch_embed.proj.weight")
        for local, number in enumerate(self.blocks):
            self.block(blocks.format(local), f"visual.blocks.{number}.", bridge and self.rank.te)
        if last:
            merger, projector = "visual.merger.", ends["projector"]
            self.whole(ends["norm"], merger + "ln_q.weight")
            for kind in ("weight", "bias"):
                self.cut(f"{projector}linear_fc1.{kind}", f"{merger}mlp.0.{kind}", 0)
            self.cut(projector + "linear_fc2.weight", merger + "mlp.2.weight", 1)
            self.whole(projector + "linear_fc2.bias", merger + "mlp.2.bias")

    def whole(self, ours, theirs):
        self.rank.add(ours, self.model[theirs], theirs)

    def cut(self, ours, theirs, axis):
        self.rank.add(ours, part(self.model[theirs], self.tp, self.r, axis), theirs)

    def block(self, ours, theirs, fused_norms):
        one, two = "self_attention.linear_qkv.layer_norm_weight", "mlp.linear_fc1.layer_norm_weight"
        self.whole(ours + (one if fused_norms else "input_layernorm.weight"), theirs + "norm1.weight")
        self.whole(ours + (two if fused_norms else "pre_mlp_layernorm.weight"), theirs + "norm2.weight")
        for kind in ("weight", "bias"):
            qkv, gate, up = (f"{theirs}{name}.{kind}" for name in ("attn.qkv", "mlp.gate_proj", "mlp.up_proj"))
            heads = grouped(thirds(self.model, qkv), self.model.vision.heads)  # every head's query, key and value
            self.rank.add(f"{ours}self_attention.linear_qkv.{kind}", part(heads, self.tp, self.r), qkv)
            self.rank.add(f"{ours}mlp.linear_fc1.{kind}", halves(self.model, gate, up, self.tp, self.r), gate, up)
        for linear, projection in (("self_attention.linear_proj", "attn.proj"), ("mlp.linear_fc2", "mlp.down_proj")):
            self.cut(f"{ours}{linear}.weight", f"{theirs}{projection}.weight", 1)
            self.whole(f"{ours}{linear}.bias", f"{theirs}{projection}.bias")


def vllm_vision(model, tp, r):
    """Name, elements and sources of vLLM's parameters; `tp` is 1 where the tower is whole on every rank."""
    vision = model.vision
    need(all(size % tp == 0 for size in (vision.heads, vision.mlp, vision.merged)), "vision_config")

    def plain(name, axis=None):
        return name, model[name] if axis is None else part(model[name], tp, r, axis), (name,)

    yield plain("visual.patch_embed.proj.weight")
    for i in range(vision.depth):
        block = f"visual.blocks.{i}."
        yield plain(block + "norm1.weight")
        yield plain(block + "norm2.weight")
        for kind in ("weight", "bias"):
            qkv, gate, up = (f"{block}{name}.{kind}" for name in ("attn.qkv", "mlp.gate_proj", "mlp.up_proj"))
            yield qkv, np.concatenate([part(third, tp, r) for third in thirds(model, qkv)]), (qkv,)
            yield f"{block}mlp.gate_up_proj.{kind}", halves(model, gate, up, tp, r), (gate, up)
        for projection in ("attn.proj", "mlp.down_proj"):
            yield plain(f"{block}{projection}.weight", 1)
            yield plain(f"{block}{projection}.bias")
    yield plain("visual.merger.ln_q.weight")
    yield plain("visual.merger.mlp.0.weight", 0)
    yield plain("visual.merger.mlp.0.bias", 0)
    yield plain("visual.merger.mlp.2.weight", 1)
    yield plain("visual.merger.mlp.2.bias")
