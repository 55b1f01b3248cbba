"""What every rank of a world spec holds, element by element: the preset's oracle.

Works like an engineer who reads the frameworks' code: takes whole Hugging Face tensors and joins, reshapes and slices them. Knows no boxes and no
strides, and must not read the library's presets: that the two agree is the test.

Every parameter is an array of element numbers: which element of which Hugging Face tensor lies there, -1 where it is padding. Values,
padding, and what a rank needs and does not hold all follow from it.
"""

import functools
import re
import zlib

import numpy as np

PAD = -1
ARCHITECTURES = ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM")
DTYPES = {"bfloat16": ((4, 16, 1), np.uint16), "float16": ((2, 16, 1), np.uint16), "float32": ((2, 32, 1), np.uint32)}


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
        need(config["architectures"][0] in ARCHITECTURES, "architectures")
        self.arch = config["architectures"][0]
        self.hidden, self.layers = config["hidden_size"], config["num_hidden_layers"]
        self.heads = config["num_attention_heads"]
        self.kv_heads = config.get("num_key_value_heads", self.heads)
        self.head = config.get("head_dim") or self.hidden // self.heads
        self.mlp, self.vocab = config["intermediate_size"], config["vocab_size"]
        self.tied = config.get("tie_word_embeddings", False)
        self.dtype, self.kind = DTYPES[config.get("torch_dtype", config.get("dtype", "bfloat16"))]
        self.bias, self.norms = self.arch == "Qwen2ForCausalLM", self.arch == "Qwen3ForCausalLM"
        self.shapes = dict(self._shapes())
        ends = np.cumsum([int(np.prod(shape)) for shape in self.shapes.values()])
        self.elements = int(ends[-1])
        self._first = dict(zip(self.shapes, [0, *ends[:-1].tolist()]))

    def _shapes(self):
        h, q, kv = self.hidden, self.heads * self.head, self.kv_heads * self.head
        yield "model.embed_tokens.weight", (self.vocab, h)
        for i in range(self.layers):
            layer = f"model.layers.{i}."
            yield layer + "input_layernorm.weight", (h,)
            for part, rows in (("q", q), ("k", kv), ("v", kv)):
                yield layer + f"self_attn.{part}_proj.weight", (rows, h)
                if self.bias:
                    yield layer + f"self_attn.{part}_proj.bias", (rows,)
            if self.norms:
                yield layer + "self_attn.q_norm.weight", (self.head,)
                yield layer + "self_attn.k_norm.weight", (self.head,)
            yield layer + "self_attn.o_proj.weight", (h, q)
            yield layer + "post_attention_layernorm.weight", (h,)
            yield layer + "mlp.gate_proj.weight", (self.mlp, h)
            yield layer + "mlp.up_proj.weight", (self.mlp, h)
            yield layer + "mlp.down_proj.weight", (h, self.mlp)
        yield "model.norm.weight", (h,)
        if not self.tied:
            yield "lm_head.weight", (self.vocab, h)

    def __getitem__(self, name):
        shape = self.shapes[name]
        first = self._first[name]
        return np.arange(first, first + int(np.prod(shape))).reshape(shape)

    @property
    def head_name(self):
        return "model.embed_tokens.weight" if self.tied else "lm_head.weight"

    @functools.cached_property
    def bits(self):
        """The value of every element, as the model's dtype has it."""
        all_bits = np.concatenate([values(name, int(np.prod(shape))) for name, shape in self.shapes.items()])
        return all_bits.astype(np.uint32) << 16 if self.kind == np.uint32 else all_bits

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

    @property
    def key(self):
        return self.chunk, self.name

    def data(self, pad):
        """The memory that it should have, with `pad` where it is padding."""
        data = self.model.bits[np.where(self.pads, 0, self.elements)]
        data[self.pads] = pad
        return data


def part(array, of, index, axis=0):
    """Part `index` of `of` equal parts."""
    need(array.shape[axis] % of == 0, "divisible", array.shape[axis], of)
    return np.split(array, of, axis)[index]


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


# Megatron


def megatron_coordinates(side, own):
    """tp, cp, dp and pp rank of the framework's rank `own`."""
    tp, cp = side.get("tensor_model_parallel_size", 1), side.get("context_parallel_size", 1)
    pp, world = side.get("pipeline_model_parallel_size", 1), len(ranks_of(side))
    dp = side.get("data_parallel_size", world // (tp * cp * pp))
    need(tp * cp * pp * dp == world, "ranks")
    rest = own // (tp * cp)
    dp_pp = (rest // pp, rest % pp) if side.get("use_tp_pp_dp_mapping") else (rest % dp, rest // dp)
    return {"tp": own % tp, "cp": own // tp % cp, "dp": dp_pp[0], "pp": dp_pp[1]}


def expanded(text):
    """The entries of a pipeline layout, a string of E, t, m, L each."""
    text = text.replace(",", "")

    def repeat(match):
        return match[1] * int(match[2] or 1)

    text = re.sub(r"\(([^()]*)\)(?:\*(\d+))?", repeat, text)
    return re.sub(r"([EtmL])\*(\d+)", repeat, text).split("|")


def megatron_placement(side, layers):
    """What each (pp, chunk) holds: the layers, None for a no-op; and where embedding and output are."""
    pp, vpp = side.get("pipeline_model_parallel_size", 1), side.get("virtual_pipeline_model_parallel_size") or 1
    noops = numbers(side.get("noop_layers"))
    slots, real = [], iter(range(layers))
    for slot in range(layers + len(noops)):
        slots.append(None if slot in noops else next(real, None))
    need(all(0 <= noop < len(slots) for noop in noops) and len(set(noops)) == len(noops), "noop_layers")
    total = len(slots)

    if layout := side.get("pipeline_model_parallel_layout"):
        entries = expanded(layout)
        need(len(entries) % pp == 0, "pipeline_model_parallel_layout")
        chunks = len(entries) // pp
        need(vpp in (1, chunks), "virtual_pipeline_model_parallel_size")
        held = [[symbol for symbol in entry if symbol == "t"] for entry in entries]
        need(sum(map(len, held)) == total, "pipeline_model_parallel_layout")
        at = [(i % pp, i // pp) for i in range(len(entries))]
        ends = [next((a for a, entry in zip(at, entries) if symbol in entry), None) for symbol in "EL"]
        need(ends == [(0, 0), (pp - 1, chunks - 1)], "pipeline_model_parallel_layout")
        sizes = {a: len(h) for a, h in zip(at, held)}
    else:
        chunks = vpp
        need(chunks == 1 or pp > 1, "virtual_pipeline_model_parallel_size")
        first, last = side.get("num_layers_in_first_pipeline_stage"), side.get("num_layers_in_last_pipeline_stage")
        emb = int(side.get("account_for_embedding_in_pipeline_split", False))
        loss = int(side.get("account_for_loss_in_pipeline_split", False))
        if sizes := numbers(side.get("num_layer_list")):
            need(len(sizes) == pp and sum(sizes) == total and chunks == 1, "num_layer_list")
            need(first is last is None and not emb and not loss, "num_layer_list")
        else:
            given = {0: first, pp - 1: last}
            given = {stage: size for stage, size in given.items() if size is not None}
            need(not given or not (emb or loss), "account_for")
            need(pp > 1 or not given, "pipeline_model_parallel_size")
            rest, stages = total + emb + loss - sum(given.values()), pp - len(given)
            need(rest % stages == 0 if stages else rest == 0, "pipeline_model_parallel_size")
            even = rest // stages if stages else 0
            sizes = [given.get(stage, even) for stage in range(pp)]
            need(min(sizes) > 0, "pipeline_model_parallel_size")
        need(all(size % chunks == 0 for size in sizes), "virtual_pipeline_model_parallel_size")
        sizes = {(p, c): sizes[p] // chunks for c in range(chunks) for p in range(pp)}
        sizes[0, 0] -= emb
        sizes[pp - 1, chunks - 1] -= loss
        need(min(sizes.values()) >= 0, "account_for")

    placed, at = {}, 0
    for c in range(chunks):
        for p in range(pp):
            placed[p, c] = slots[at : at + sizes[p, c]]
            at += sizes[p, c]
    return placed, (0, 0), (pp - 1, chunks - 1)


NORMS = {
    "transformer_engine": ("self_attention.linear_qkv.layer_norm_weight", "mlp.linear_fc1.layer_norm_weight"),
    "local": ("input_layernorm.weight", "pre_mlp_layernorm.weight"),
}


def megatron(model, side, own, role):
    tp, pp = side.get("tensor_model_parallel_size", 1), side.get("pipeline_model_parallel_size", 1)
    need(model.heads % tp == 0, "num_attention_heads")
    need(model.kv_heads % tp == 0 or tp % model.kv_heads == 0, "num_key_value_heads")
    need(model.mlp % tp == 0, "intermediate_size")
    divisor = side.get("make_vocab_size_divisible_by", 128) * tp
    padded = side.get("padded_vocab_size") or rounded_up(model.vocab, divisor)
    need(padded >= model.vocab and padded % tp == 0, "padded_vocab_size")
    coordinates = megatron_coordinates(side, own)
    r, stage = coordinates["tp"], coordinates["pp"]
    placed, first, last = megatron_placement(side, model.layers)
    params = []

    def add(chunk, name, elements, *sources, required=True):
        params.append(Param(model, chunk, name, elements, sources, required))

    for (p, chunk), slots in placed.items():
        if p != stage:
            continue
        if (p, chunk) == first:
            embedding = "model.embed_tokens.weight"
            add(chunk, "embedding.word_embeddings.weight", vocabulary(model[embedding], padded, tp, r), embedding)
        for local, layer in enumerate(slots):
            if layer is None:
                continue
            ours, theirs = f"decoder.layers.{local}.", f"model.layers.{layer}."

            def whole(name, source):
                add(chunk, ours + name, model[theirs + source], theirs + source)

            def columns(name, source):
                add(chunk, ours + name, part(model[theirs + source], tp, r, axis=1), theirs + source)

            norm, mlp_norm = NORMS[side.get("transformer_impl", "transformer_engine")]
            whole(norm, "input_layernorm.weight")
            for kind in ["weight"] + ["bias"] * model.bias:
                # Group by group: its query heads, its key head, its value head. Then equal cuts, wherever they fall.
                names = [f"{theirs}self_attn.{x}_proj.{kind}" for x in "qkv"]
                groups = [model[name].reshape(model.kv_heads, -1, *model.shapes[name][1:]) for name in names]
                fused = np.concatenate(groups, axis=1)
                fused = fused.reshape(-1, *fused.shape[2:])
                shard = part(fused, tp, r)
                inside = [name for name in names if model.name_in(name, shard)]
                add(chunk, f"{ours}self_attention.linear_qkv.{kind}", shard, *inside)
            if model.norms:
                whole("self_attention.q_layernorm.weight", "self_attn.q_norm.weight")
                whole("self_attention.k_layernorm.weight", "self_attn.k_norm.weight")
            columns("self_attention.linear_proj.weight", "self_attn.o_proj.weight")
            whole(mlp_norm, "post_attention_layernorm.weight")
            halves = [f"{theirs}mlp.{x}_proj.weight" for x in ("gate", "up")]
            add(chunk, ours + "mlp.linear_fc1.weight", np.concatenate([part(model[h], tp, r) for h in halves]), *halves)
            columns("mlp.linear_fc2.weight", "mlp.down_proj.weight")
        if (p, chunk) == last:
            add(chunk, "decoder.final_layernorm.weight", model["model.norm.weight"], "model.norm.weight")
            if not model.tied or pp > 1:
                # The copy of tied embeddings is the trainer's own; as a source the embedding itself is read.
                head = vocabulary(model[model.head_name], padded, tp, r)
                add(chunk, "output_layer.weight", head, model.head_name, required=role == "target" or not model.tied)
    return params


# vLLM


def vllm_partition(side, layers):
    pp = side.get("pipeline_parallel_size", 1)
    if sizes := numbers(side.get("VLLM_PP_LAYER_PARTITION")):
        need(len(sizes) == pp and sum(sizes) == layers, "VLLM_PP_LAYER_PARTITION")
        return sizes
    sizes = [layers // pp] * pp
    for i in range(layers % pp):
        sizes[-(i + 2)] += 1
    return sizes


def vllm(model, side, own, role):
    tp, pp = side.get("tensor_parallel_size", 1), side.get("pipeline_parallel_size", 1)
    dp, replicas, world = side.get("data_parallel_size", 1), side.get("replicas", 1), len(ranks_of(side))
    need(tp * pp * dp * replicas == world, "ranks")
    need(model.heads % tp == 0, "num_attention_heads")
    need(model.kv_heads % tp == 0 or tp % model.kv_heads == 0, "num_key_value_heads")
    need(model.mlp % tp == 0, "intermediate_size")
    padded = rounded_up(model.vocab, side.get("vocab_padding_size", 64))
    need(padded % tp == 0, "vocab_size")
    r, stage = own % tp, own // tp % pp  # data parallel ranks and replicas repeat
    sizes = vllm_partition(side, model.layers)
    params = []

    def add(name, elements, *sources):
        params.append(Param(model, 0, name, elements, sources or (name,)))

    first, last = stage == 0, stage == pp - 1
    if first or (last and model.tied):
        embedding = "model.embed_tokens.weight"
        add(embedding, vocabulary(model[embedding], padded, tp, r))
    for layer in range(sum(sizes[:stage]), sum(sizes[: stage + 1])):
        layer = f"model.layers.{layer}."
        wholes = ["input_layernorm.weight", "post_attention_layernorm.weight"]
        wholes += ["self_attn.q_norm.weight", "self_attn.k_norm.weight"] * model.norms
        for name in wholes:
            add(layer + name, model[layer + name])
        for kind in ["weight"] + ["bias"] * model.bias:
            q, k, v = (f"{layer}self_attn.{x}_proj.{kind}" for x in "qkv")
            if model.kv_heads >= tp:
                kv = [part(model[x], tp, r) for x in (k, v)]
            else:  # several ranks hold the same head
                kv = [part(model[x], model.kv_heads, r * model.kv_heads // tp) for x in (k, v)]
            add(f"{layer}self_attn.qkv_proj.{kind}", np.concatenate([part(model[q], tp, r), *kv]), q, k, v)
        for name in ("self_attn.o_proj.weight", "mlp.down_proj.weight"):
            add(layer + name, part(model[layer + name], tp, r, axis=1))
        halves = [f"{layer}mlp.{x}_proj.weight" for x in ("gate", "up")]
        add(layer + "mlp.gate_up_proj.weight", np.concatenate([part(model[h], tp, r) for h in halves]), *halves)
    if last:
        add("model.norm.weight", model["model.norm.weight"])
        if not model.tied:
            add("lm_head.weight", vocabulary(model["lm_head.weight"], padded, tp, r))
    return params


def hf(model, side, own, role):
    return [Param(model, 0, name, model[name], (name,)) for name in model.shapes]


FRAMEWORKS = {"megatron": megatron, "vllm": vllm, "hf": hf}


def params(spec, role, rank, model=None):
    """The parameters that a rank of the communicator holds as "source" or "target" of a spec."""
    side = spec[role]
    ranks = ranks_of(side)
    if rank not in ranks:
        return []
    return FRAMEWORKS[side["framework"]](model or Model(spec["model"]), side, ranks.index(rank), role)
