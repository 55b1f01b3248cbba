"""One rank of a Megatron-style training job that holds a Llama model: its shards, under Megatron's names, and the tables for libreshard.

Knows Megatron's cuts (tensor parallel, pipeline parallel, fused QKV, gate and up in one matrix) and numpy. Must not know who takes the
weights. bf16 lies in uint16 arrays.
"""

import json

import numpy as np
import reshard


class Model:
    """The Hugging Face tensors and config that convert.py wrote."""

    def __init__(self, folder):
        with open(f"{folder}/config.json") as f:
            self.config = json.load(f)
        self._index = {}
        with open(f"{folder}/model.txt") as f:
            for kind, name, *values in map(str.split, f):
                if kind == "tensor":
                    offset, rows, columns = map(int, values)
                    self._index[name] = offset, (rows, columns) if columns else (rows,)
        self._bytes = np.memmap(f"{folder}/weights.bin", mode="r")

    def __iter__(self):
        return iter(self._index)

    def __getitem__(self, name):
        offset, shape = self._index[name]
        return self._bytes[offset : offset + 2 * int(np.prod(shape))].view(np.uint16).reshape(shape)


def scale(weights, factor):
    """bf16 times a number, rounded to nearest even."""
    bits = ((weights.astype(np.uint32) << 16).view(np.float32) * np.float32(factor)).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def padded_vocabulary(vocab, tp_size):
    """Rows of the embedding over all ranks, a multiple of 128 on each: one block more than needed, so some are of no token."""
    return (vocab // (128 * tp_size) + 1) * 128 * tp_size


class Rank:
    """Tensor-parallel rank `tp` of `tp_size` of pipeline stage `pp` of `pp_size`.

    `shards` are the parameters: name to array, the names with the `module.` of Megatron's wrappers. `layout` are the tables that describe
    them as sources, for who gives no world spec. Embeddings are tied: the last stage holds a copy of its own, as Megatron does.
    """

    def __init__(self, model, tp, tp_size, pp, pp_size):
        self.model, self.tp, self.tp_size = model, tp, tp_size
        self.shards, self.layout = {}, reshard.Layout()
        layers = model.config["num_hidden_layers"] // pp_size
        if pp == 0:
            self.add_vocabulary("embedding.word_embeddings.weight")
        for i in range(layers):
            self.add_layer(f"decoder.layers.{i}.", f"model.layers.{pp * layers + i}.")
        if pp == pp_size - 1:
            self.add_whole("decoder.final_layernorm.weight", "model.norm.weight")
            self.add_vocabulary("output_layer.weight")

    def add_layer(self, ours, theirs):
        self.add_whole(ours + "self_attention.linear_qkv.layer_norm_weight", theirs + "input_layernorm.weight")
        self.add_qkv(ours + "self_attention.linear_qkv.weight", theirs + "self_attn.")
        self.add_columns(ours + "self_attention.linear_proj.weight", theirs + "self_attn.o_proj.weight")
        self.add_whole(ours + "mlp.linear_fc1.layer_norm_weight", theirs + "post_attention_layernorm.weight")
        self.add_gate_up(ours + "mlp.linear_fc1.weight", theirs + "mlp.")
        self.add_columns(ours + "mlp.linear_fc2.weight", theirs + "mlp.down_proj.weight")

    def add(self, name, shard):
        name = f"module.{name}"
        self.shards[name] = np.ascontiguousarray(shard)
        return self.layout.buffer(name, self.shards[name], reshard.SOURCE)

    def tile(self, theirs, buffer, first_element, view, origin, extent, stride):
        tensor = self.layout.tensor(theirs, self.model[theirs].shape)
        self.layout.tile(tensor, buffer, 2 * first_element, view, origin, extent, stride)

    def add_whole(self, name, theirs):
        """A norm, the same on all tensor-parallel ranks."""
        w = self.model[theirs]
        self.tile(theirs, self.add(name, w.copy()), 0, w.shape, (0,), w.shape, (1,))

    def add_columns(self, name, theirs):
        """A row-parallel weight: cut on the input axis."""
        w = self.model[theirs]
        rows, columns = w.shape
        width = columns // self.tp_size
        first = self.tp * width
        self.tile(theirs, self.add(name, w[:, first : first + width]), 0, w.shape, (0, first), (rows, width), (width, 1))

    def add_qkv(self, name, theirs):
        """Fused by KV group: its query heads, its key head, its value head; then the next group."""
        kv_heads, hidden = self.model.config["num_key_value_heads"], self.model.config["hidden_size"]
        views = {}  # a tensor as [group, rows of a group, hidden]
        for part in "qkv":
            w = self.model[f"{theirs}{part}_proj.weight"]
            views[part] = w.reshape(kv_heads, w.shape[0] // kv_heads, hidden)
        groups = kv_heads // self.tp_size
        first = self.tp * groups
        fused = np.concatenate([views[part][first : first + groups] for part in "qkv"], axis=1)
        block = fused[0].size  # elements of one group
        buffer, at = self.add(name, fused.reshape(-1, hidden)), 0
        for part, view in views.items():
            rows = view.shape[1]
            box = (first, 0, 0), (groups, rows, hidden)
            self.tile(f"{theirs}{part}_proj.weight", buffer, at, view.shape, *box, (block, hidden, 1))
            at += rows * hidden

    def add_gate_up(self, name, theirs):
        """Gate rows, then up rows, each cut on its own."""
        halves = [f"{theirs}{part}_proj.weight" for part in ("gate", "up")]
        rows, hidden = self.model[halves[0]].shape
        rows //= self.tp_size
        first = self.tp * rows
        buffer = self.add(name, np.concatenate([self.model[half][first : first + rows] for half in halves]))
        for i, half in enumerate(halves):
            self.tile(half, buffer, i * rows * hidden, self.model[half].shape, (first, 0), (rows, hidden), (hidden, 1))

    def add_vocabulary(self, name):
        """Rows of the embedding; behind the last token's come rows of zeros."""
        w = self.model["model.embed_tokens.weight"]
        vocab, hidden = w.shape
        rows = padded_vocabulary(vocab, self.tp_size) // self.tp_size
        first = self.tp * rows
        true = min(rows, vocab - first)
        shard = np.zeros((rows, hidden), np.uint16)
        shard[:true] = w[first : first + true]
        self.tile("model.embed_tokens.weight", self.add(name, shard), 0, w.shape, (first, 0), (true, hidden), (hidden, 1))

    def weaken_mlps(self, factor):
        """A training step of a kind: every MLP adds less to the residual stream. Returns what undoes it, to the bit."""
        before = {name: shard.copy() for name, shard in self.shards.items() if name.endswith("mlp.linear_fc2.weight")}
        for name in before:
            self.shards[name][:] = scale(before[name], factor)
        return before

    def restore(self, before):
        for name, shard in before.items():
            self.shards[name][:] = shard
