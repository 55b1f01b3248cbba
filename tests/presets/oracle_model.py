"""The Hugging Face tensors of a config, and a rank's parameter made of them: the ground of the oracle (oracle.py)."""

import functools
import math

import numpy as np
from oracle_tensors import NORMS, Tensors, Vision
from oracle_values import BF16, DTYPES, FP16, FP32, converted, plain, values, wild

__all__ = ["BF16", "DTYPES", "FP16", "FP32", "values"]
PAD = -1
# Architecture: the member that tells the number of experts.
EXPERTS = {
    "Mixtral": "num_local_experts", "Qwen2Moe": "num_experts", "Qwen3Moe": "num_experts", "Qwen3Next": "num_experts",
    "DeepseekV2": "n_routed_experts", "DeepseekV3": "n_routed_experts", "Glm4Moe": "n_routed_experts",
}  # fmt: skip
FAMILIES = ("Llama", "Mistral", "Qwen2", "Qwen3", *EXPERTS)
ARCHITECTURES = {family + "ForCausalLM": family for family in FAMILIES} | {"Qwen2_5_VLForConditionalGeneration": "Qwen2_5_VL"}


class Refused(ValueError):
    """The framework forbids it."""


def need(condition, *words):
    if not condition:
        raise Refused(*words)


class Held:
    """How the values of tensors are held on one side of a spec."""

    def __init__(self, model, side):
        named = side.get("params_dtype" if side.get("framework") == "megatron" else "dtype")
        self.dtype = DTYPES[named] if named else model.dtype
        self.bias_dtype = DTYPES[side.get("e_score_correction_bias_dtype", "float32")]
        self.wide_gates = side.get("framework") == "vllm" and model.family == "Glm4Moe"
        # Norms of Qwen3-Next are zero-centred in all frameworks.
        self.centred = side.get("layernorm_zero_centered_gamma", False) and model.family != "Qwen3Next"

    def dtype_of(self, name):
        """The routers' correction biases are float32 in a model of any type, unless an engine has cast them, and the routers themselves in vLLM's GLM."""
        if name.endswith(".e_score_correction_bias"):
            return self.bias_dtype
        if self.wide_gates and name.endswith(".mlp.gate.weight"):
            return FP32
        return self.dtype

    def less(self, name):
        """What has been taken from a tensor's values."""
        return int(self.centred and name.endswith(NORMS))


class Model(Tensors):
    """The Hugging Face tensors of a config: their shapes, and by model[name] their element numbers.

    `mtp`: how many of the layers for multi-token prediction there are. `sides`: by role, the sides of the spec, which say how values are held.
    """

    def __init__(self, config, mtp=0, sides=()):
        need(config["architectures"][0] in ARCHITECTURES, "architectures")
        self.family, self.mtp = ARCHITECTURES[config["architectures"][0]], mtp
        self.vision = Vision(config["vision_config"]) if self.family == "Qwen2_5_VL" else None
        config = {**config, **config.get("text_config", {})} if self.vision else config
        self.hidden, self.layers = config["hidden_size"], config["num_hidden_layers"]
        self.heads, self.mlp, self.vocab = (config[x] for x in ("num_attention_heads", "intermediate_size", "vocab_size"))
        self.tied = config.get("tie_word_embeddings", False)
        self.dtype = DTYPES[config.get("torch_dtype", config.get("dtype", "bfloat16"))]
        self.bias, self.norms = self.family in ("Qwen2", "Qwen2Moe", "Qwen2_5_VL"), self.family in ("Qwen3", "Qwen3Moe", "Qwen3Next")
        self.mla, self.gated = self.family in ("DeepseekV2", "DeepseekV3"), self.family == "Qwen3Next"
        if self.family == "Glm4Moe":
            self.bias, self.norms = config.get("attention_bias", False), config.get("use_qk_norm", False)
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
        if self.gated:
            every = config.get("full_attention_interval", 4)
            kinds = config.get("layer_types", ["full_attention" if every == 1 else "linear_attention"] * self.layers)
            need(kinds == ["full_attention"] * self.layers, "layer_types")
        need(not mtp or self.family in ("DeepseekV3", "Glm4Moe"), "mtp")
        self._read_experts(config)
        self.held = {role: Held(self, dict(sides).get(role, {})) for role in ("source", "target")}
        self.shapes = dict(self.all_shapes())
        ends = np.cumsum([math.prod(shape) for shape in self.shapes.values()])
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
        counted = self.mla or self.family == "Glm4Moe"  # the first so many layers have none
        for layer in range(self.layers):
            if counted:
                first, every = config.get("first_k_dense_replace", 0), config.get("moe_layer_freq", 1) if self.mla else 1
                is_moe = layer >= first and layer % every == 0
            else:
                every = config.get("decoder_sparse_step", 1)
                is_moe = layer not in config.get("mlp_only_layers", []) and (layer + 1) % every == 0
            self.moe_layers += [layer] * is_moe
        if counted:
            self.shared = (config.get("n_shared_experts") or 0) * self.expert_mlp
            biased = self.family == "DeepseekV3" and config.get("topk_method", "noaux_tc") == "noaux_tc"
            self.router_bias = biased or self.family == "Glm4Moe"
        elif self.shared_gate:
            self.shared = config["shared_expert_intermediate_size"]

    @property
    def has_dense_mlp(self):
        return len(self.moe_layers) < self.layers

    def has_experts(self, layer):
        """Layers for multi-token prediction are as the last of the others."""
        return min(layer, self.layers - 1) in self.moe_layers

    def __getitem__(self, name):
        shape = self.shapes[name]
        first = self._first[name]
        return np.arange(first, first + math.prod(shape)).reshape(shape)

    def added(self, name):
        """What a target has more than a source."""
        return self.held["source"].less(name) - self.held["target"].less(name)

    @functools.cached_property
    def bits(self):
        """Every element as a source holds it. Where a sync changes any values they are such that it shows."""
        source, target = self.held["source"], self.held["target"]
        changes = any(source.dtype_of(name) != target.dtype_of(name) or self.added(name) for name in self.shapes)
        make = wild if changes else plain
        return np.concatenate([make(name, math.prod(shape), source.dtype_of(name)) for name, shape in self.shapes.items()])

    @functools.cached_property
    def sizes(self):
        """The size of every element in bytes, as a source holds it, for so it travels."""
        return self._sizes("source")

    @functools.cached_property
    def target_sizes(self):
        return self._sizes("target")

    def _sizes(self, role):
        sizes = [self.held[role].dtype_of(name)[1] // 8 for name in self.shapes]
        return np.repeat(sizes, [math.prod(shape) for shape in self.shapes.values()])

    def name_in(self, name, elements):
        """Whether some of them are of this tensor."""
        first = self._first[name]
        return bool(((elements >= first) & (elements < first + math.prod(self.shapes[name]))).any())

    def name_of(self, element):
        return max((first, name) for name, first in self._first.items() if first <= element)[1]


def asked_layers(config, side):
    """How many layers for multi-token prediction a side has: None: as many as there are."""
    most = config.get("num_nextn_predict_layers") or 0
    if side["framework"] == "megatron":
        need((side.get("mtp_num_layers") or 0) <= most, "mtp_num_layers")
        need(not side.get("mtp_num_layers") or not side.get("noop_layers"), "noop_layers")  # MindSpeed's MTP is another
        return side.get("mtp_num_layers") or 0
    if side["framework"] == "vllm":
        need(most or not side.get("mtp_drafter"), "mtp_drafter")
        return most if side.get("mtp_drafter") else 0
    return None


def model_of(spec):
    """The tensors of a spec's model. Layers for multi-token prediction are there if a side asks for them, and their source has them."""
    sides = {role: spec[role] for role in ("source", "target") if role in spec}
    asked = {role: asked_layers(spec["model"], side) for role, side in sides.items()}
    source, target = asked.get("source"), asked.get("target")
    need(not target or source is None or source == target, "mtp_num_layers", "mtp_drafter")
    return Model(spec["model"], source or target or 0, sides)


class Param:
    """A parameter of one rank."""

    def __init__(self, model, role, chunk, name, elements, sources, required=True):
        self.model, self.role, self.chunk, self.name, self.sources, self.required = model, role, chunk, name, sources, required
        self.elements = np.ascontiguousarray(elements)
        self.shape, self.pads = self.elements.shape, self.elements == PAD
        self.real = self.elements[~self.pads]
        (self.dtype,) = {model.held[role].dtype_of(source) for source in sources}
        self.kind = np.uint32 if self.dtype == FP32 else np.uint16
        ((self._from, self._added),) = {(model.held["source"].dtype_of(source), model.added(source)) for source in sources}

    @property
    def key(self):
        return self.chunk, self.name

    @property
    def changes(self):
        """Whether it has other values than a source."""
        return self.role == "target" and (self._from != self.dtype or self._added != 0)

    def data(self, pad):
        """The memory that it should have, with `pad` where it is padding."""
        data = self.model.bits[np.where(self.pads, 0, self.elements)]
        if self.changes:
            data = converted(data, self._from, self.dtype, self._added)
        data = data.astype(self.kind)
        data[self.pads] = pad
        return data


def part(array, of, index, axis=0):
    """Part `index` of `of` equal parts."""
    need(array.shape[axis] % of == 0, "divisible", array.shape[axis], of)
    return np.split(array, of, axis)[index]


def halves(model, gate, up, of, index):
    """Part `index` of gate, then of up."""
    return np.concatenate([part(model[gate], of, index), part(model[up], of, index)])


def grouped(parts, groups):
    """Group by group: its share of the first tensor, of the second, and so on."""
    shares = [whole.reshape(groups, -1, *whole.shape[1:]) for whole in parts]
    fused = np.concatenate(shares, axis=1)
    return fused.reshape(-1, *fused.shape[2:])


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
