"""The Hugging Face tensors of a config, and a rank's parameter made of them: the ground of the oracle (oracle.py)."""

import functools
import zlib

import numpy as np

PAD = -1
BF16, FP16, FP32 = (4, 16, 1), (2, 16, 1), (2, 32, 1)
DTYPES = {"bfloat16": BF16, "float16": FP16, "float32": FP32}
# Architecture: the member that tells the number of experts.
EXPERTS = {
    "Mixtral": "num_local_experts", "Qwen2Moe": "num_experts", "Qwen3Moe": "num_experts",
    "DeepseekV2": "n_routed_experts", "DeepseekV3": "n_routed_experts",
}  # fmt: skip
FAMILIES = ("Llama", "Mistral", "Qwen2", "Qwen3", *EXPERTS)


class Refused(ValueError):
    """The framework forbids it."""


def need(condition, *words):
    if not condition:
        raise Refused(*words)


def values(name, count):
    """The 16 bits of a tensor's elements, by the formula of goldens/README.md."""
    with np.errstate(over="ignore"):
        seed = (zlib.crc32(name.encode()) << 32) + 0x9E3779B97F4A7C15
        z = np.uint64(seed & 0xFFFFFFFFFFFFFFFF) + np.arange(count, dtype=np.uint64)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        z ^= z >> np.uint64(31)
    return (np.uint64(0x3800) | (z & np.uint64(0x07FF))).astype(np.uint16)


class Model:
    """The Hugging Face tensors of a config: their shapes, and by model[name] their element numbers."""

    def __init__(self, config):
        self.family = config["architectures"][0].removesuffix("ForCausalLM")
        need(self.family in FAMILIES, "architectures")
        self.hidden, self.layers = config["hidden_size"], config["num_hidden_layers"]
        self.heads, self.mlp, self.vocab = (
            config["num_attention_heads"],
            config["intermediate_size"],
            config["vocab_size"],
        )
        self.tied = config.get("tie_word_embeddings", False)
        self.dtype = DTYPES[config.get("torch_dtype", config.get("dtype", "bfloat16"))]
        self.bias, self.norms = self.family in ("Qwen2", "Qwen2Moe"), self.family in ("Qwen3", "Qwen3Moe")
        self.mla = self.family in ("DeepseekV2", "DeepseekV3")
        if self.mla:
            self.q_lora, self.kv_lora = config.get("q_lora_rank"), config["kv_lora_rank"]
            self.nope, self.rope, self.v_head = (
                config[x] for x in ("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")
            )
        else:
            need("num_key_value_heads" in config or self.family == "Llama", "num_key_value_heads")
            need(config.get("head_dim") or not self.norms, "head_dim")
            self.kv_heads = config.get("num_key_value_heads", self.heads)
            self.head = config.get("head_dim") or self.hidden // self.heads
        self._read_experts(config)
        self.shapes = dict(self._shapes())
        ends = np.cumsum([int(np.prod(shape)) for shape in self.shapes.values()])
        self.elements = int(ends[-1])
        self._first = dict(zip(self.shapes, [0, *ends[:-1].tolist()]))

    def _read_experts(self, config):
        self.experts = config.get(EXPERTS[self.family]) or 0 if self.family in EXPERTS else 0
        self.moe_layers, self.shared, self.router_bias = [], 0, False
        if not self.experts:
            return
        if self.family == "Mixtral":
            self.expert_mlp, self.moe_layers = self.mlp, list(range(self.layers))
            return
        self.expert_mlp = config["moe_intermediate_size"]
        for layer in range(self.layers):
            if self.mla:
                first, every = config.get("first_k_dense_replace", 0), config.get("moe_layer_freq", 1)
                is_moe = layer >= first and layer % every == 0
            else:
                every = config.get("decoder_sparse_step", 1)
                is_moe = layer not in config.get("mlp_only_layers", []) and (layer + 1) % every == 0
            self.moe_layers += [layer] * is_moe
        if self.mla:
            self.shared = (config.get("n_shared_experts") or 0) * self.expert_mlp
            self.router_bias = self.family == "DeepseekV3" and config.get("topk_method", "noaux_tc") == "noaux_tc"
        elif self.family == "Qwen2Moe":
            self.shared = config["shared_expert_intermediate_size"]

    @property
    def has_dense_mlp(self):
        return len(self.moe_layers) < self.layers

    @property
    def shared_gate(self):
        return self.family == "Qwen2Moe"

    def moe(self, layer):
        """Before the names of a layer's experts and their router."""
        return f"model.layers.{layer}." + ("block_sparse_moe." if self.family == "Mixtral" else "mlp.")

    def shared_expert(self, layer):
        return self.moe(layer) + ("shared_expert." if self.family == "Qwen2Moe" else "shared_experts.")

    def expert(self, layer, number):
        """The names of an expert's gate, up and down projection."""
        names = ("w1", "w3", "w2") if self.family == "Mixtral" else ("gate_proj", "up_proj", "down_proj")
        return [f"{self.moe(layer)}experts.{number}.{name}.weight" for name in names]

    def _shapes(self):
        h = self.hidden
        yield "model.embed_tokens.weight", (self.vocab, h)
        for i in range(self.layers):
            layer = f"model.layers.{i}."
            yield layer + "input_layernorm.weight", (h,)
            yield from self._mla_shapes(layer) if self.mla else self._attention_shapes(layer)
            yield layer + "post_attention_layernorm.weight", (h,)
            if i in self.moe_layers:
                yield from self._expert_shapes(i)
            else:
                yield from self._mlp_shapes(layer + "mlp.", self.mlp)
        yield "model.norm.weight", (h,)
        if not self.tied:
            yield "lm_head.weight", (self.vocab, h)

    def _attention_shapes(self, layer):
        h, q, kv = self.hidden, self.heads * self.head, self.kv_heads * self.head
        for part, rows in (("q", q), ("k", kv), ("v", kv)):
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

    def __getitem__(self, name):
        shape = self.shapes[name]
        first = self._first[name]
        return np.arange(first, first + int(np.prod(shape))).reshape(shape)

    @property
    def head_name(self):
        return "model.embed_tokens.weight" if self.tied else "lm_head.weight"

    def dtype_of(self, name):
        """The routers' correction biases are fp32 in a model of any dtype."""
        return FP32 if name.endswith(".e_score_correction_bias") else self.dtype

    @functools.cached_property
    def bits(self):
        """The value of every element in 16 bits, which fp32 has as its upper half."""
        return np.concatenate([values(name, int(np.prod(shape))) for name, shape in self.shapes.items()])

    @functools.cached_property
    def sizes(self):
        """The size of every element in bytes."""
        sizes = [self.dtype_of(name)[1] // 8 for name in self.shapes]
        return np.repeat(sizes, [int(np.prod(shape)) for shape in self.shapes.values()])

    def name_in(self, name, elements):
        """Whether some of them are of this tensor."""
        first = self._first[name]
        return bool(((elements >= first) & (elements < first + int(np.prod(self.shapes[name])))).any())

    def name_of(self, element):
        return max((first, name) for name, first in self._first.items() if first <= element)[1]


class Param:
    """A parameter of one rank."""

    def __init__(self, model, chunk, name, elements, sources, required=True):
        self.model, self.chunk, self.name, self.sources, self.required = model, chunk, name, sources, required
        self.elements = np.ascontiguousarray(elements)
        self.shape, self.pads = self.elements.shape, self.elements == PAD
        self.real = self.elements[~self.pads]
        (self.dtype,) = {model.dtype_of(source) for source in sources}
        self.kind = np.uint32 if self.dtype == FP32 else np.uint16

    @property
    def key(self):
        return self.chunk, self.name

    def data(self, pad):
        """The memory that it should have, with `pad` where it is padding."""
        data = self.model.bits[np.where(self.pads, 0, self.elements)].astype(self.kind)
        if self.dtype == FP32:
            data <<= 16
        data[self.pads] = pad
        return data


def part(array, of, index, axis=0):
    """Part `index` of `of` equal parts."""
    need(array.shape[axis] % of == 0, "divisible", array.shape[axis], of)
    return np.split(array, of, axis)[index]


def halves(model, gate, up, of, index):
    """Part `index` of gate, then of up."""
    return np.concatenate([part(model[gate], of, index), part(model[up], of, index)])


def mlp_names(prefix):
    return [f"{prefix}{x}_proj.weight" for x in ("gate", "up", "down")]


def vocabulary(tensor, padded, of, index):
    padding = np.full((padded - tensor.shape[0], *tensor.shape[1:]), PAD)
    return part(np.concatenate([tensor, padding]), of, index)


def rounded_up(number, to):
    return -(-number // to) * to


def numbers(value):
    """A list of numbers, or a string of them."""
    return [int(n) for n in value.split(",")] if isinstance(value, str) else list(value or [])


def ranks_of(side):
    """The communicator's ranks in the framework's own order: [0, 1, 2], "0-2" or "0-1,2"."""
    ranks = side["ranks"]
    if isinstance(ranks, str):
        spans = [span.split("-") for span in ranks.split(",")]
        ranks = [rank for span in spans for rank in range(int(span[0]), int(span[-1]) + 1)]
    need(len(set(ranks)) == len(ranks), "ranks")
    return list(ranks)
