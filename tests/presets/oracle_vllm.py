"""What a vLLM rank holds: a part of the oracle (oracle.py)."""

import numpy as np
from oracle_model import Param, halves, mlp_names, need, numbers, part, ranks_of, rounded_up, vocabulary
from oracle_vision import vllm_vision

ENDS_EVERYWHERE = ("Mixtral", "Qwen2Moe", "Qwen3Moe", "Qwen3Next")  # embedding and head on every stage
NORM_EVERYWHERE = ("Mixtral", "Qwen2Moe", "Qwen3Moe")
WHOLE_SHARED = ("DeepseekV2", "DeepseekV3", "Qwen3Next")  # where shared experts may be whole
STORAGES = ("stacked", "stacked_swapped", "stacked_transposed")


def vllm_partition(side, layers):
    pp = side.get("pipeline_parallel_size", 1)
    if sizes := numbers(side.get("VLLM_PP_LAYER_PARTITION")):
        need(len(sizes) == pp and sum(sizes) == layers, "VLLM_PP_LAYER_PARTITION")
        return sizes
    sizes = [layers // pp] * pp
    for i in range(layers % pp):
        sizes[-(i + 2)] += 1
    return sizes


def expert_slots(side, experts, ranks, moe_layer):
    """Which experts each of an engine's `ranks` holds with expert parallel, slot by slot; `moe_layer` counts layers with experts."""
    if maps := side.get("physical_to_logical_map"):
        slots = maps[moe_layer]
        need(len(slots) % ranks == 0 and set(slots) == set(range(experts)), "physical_to_logical_map")
        return [part(np.array(slots), ranks, k).tolist() for k in range(ranks)]
    if side.get("expert_placement_strategy") == "round_robin":
        return [list(range(k, experts, ranks)) for k in range(ranks)]
    dealt = iter(range(experts))
    return [[next(dealt) for _ in range(experts // ranks + (k < experts % ranks))] for k in range(ranks)]


def vllm(model, side, own, role):
    return VllmRank(model, side, own, role).params


class VllmRank:
    """Adds up the parameters of one rank."""

    def __init__(self, model, side, own, role):
        self.model, self.side, self.role, self.params, self.chunk = model, side, role, [], 0
        tp, pp = side.get("tensor_parallel_size", 1), side.get("pipeline_parallel_size", 1)
        dp, replicas, world = side.get("data_parallel_size", 1), side.get("replicas", 1), len(ranks_of(side))
        need(tp * pp * dp * replicas == world, "ranks")
        need(model.heads % tp == 0, "num_attention_heads")
        need(model.mla or model.kv_heads % tp == 0 or tp % model.kv_heads == 0, "num_key_value_heads")
        need(not model.has_dense_mlp or model.mlp % tp == 0, "intermediate_size")
        self.padded = rounded_up(model.vocab, side.get("vocab_padding_size", 64))
        need(self.padded % tp == 0, "vocab_size")
        self.tp, self.r, stage = (
            tp,
            own % tp,
            own // tp % pp,
        )  # replicas repeat, and but for experts data parallel ranks
        self.dp, self.data_rank = dp, own // tp // pp % dp
        self.copies = side.get("mla_derived_weights") == "copies"
        need(not self.copies or (model.mla and role == "target"), "mla_derived_weights")
        need("fused_qkv_a_proj" not in side or model.mla, "fused_qkv_a_proj")
        need(model.vision or "mm_encoder_tp_mode" not in side, "mm_encoder_tp_mode")
        self._check_experts()
        sizes = vllm_partition(side, model.layers)
        self.prefix = "language_model." if model.vision else ""

        first, last, family = stage == 0, stage == pp - 1, model.family
        if first or (last and model.tied) or family in ENDS_EVERYWHERE:
            self.vocabulary("model.embed_tokens.weight", "model.embed_tokens.weight")
        for number in range(sum(sizes[:stage]), sum(sizes[: stage + 1])):
            self.layer(f"model.layers.{number}.", number)
        if last or family in NORM_EVERYWHERE:
            self.add("model.norm.weight", model["model.norm.weight"])
        if (last or family in ENDS_EVERYWHERE) and not model.tied:
            self.vocabulary("lm_head.weight", "lm_head.weight")
        if last and side.get("mtp_drafter"):
            self.chunk = 1  # a model of its own
            for number in range(model.layers, model.layers + model.mtp):
                self.prediction(f"model.layers.{number}.", number)
        if model.vision:
            self.prefix = ""
            whole = side.get("mm_encoder_tp_mode", "weights") == "data"
            for name, elements, sources in vllm_vision(model, *((1, 0) if whole else (tp, self.r))):
                self.add(name, elements, *sources)

    def _check_experts(self):
        model, side = self.model, self.side
        told = side.get("shared_experts")
        need(told is None or (model.family in WHOLE_SHARED and model.experts), "shared_experts")
        if not model.experts:
            return
        self.parallel = side.get("enable_expert_parallel", False)
        need(self.parallel or model.expert_mlp % (self.dp * self.tp) == 0, "moe_intermediate_size")
        need(self.parallel or "physical_to_logical_map" not in side, "physical_to_logical_map")
        maps = side.get("physical_to_logical_map")
        need(maps is None or len(maps) == len(model.moe_layers), "physical_to_logical_map")
        # Sequence-parallel MoE: shared experts are then whole.
        together = self.parallel and self.tp > 1 and self.dp > 1
        self.shared_whole = told == "whole" if told else model.family in WHOLE_SHARED and together
        need(self.shared_whole or model.shared % self.tp == 0, "shared experts")

    def add(self, name, elements, *sources):
        self.params.append(Param(self.model, self.role, self.chunk, self.prefix + name, elements, sources or (name,)))

    def whole(self, name):
        self.add(self.ours + name, self.model[self.theirs + name], self.theirs + name)

    def rows(self, name):
        self.add(self.ours + name, part(self.model[self.theirs + name], self.tp, self.r), self.theirs + name)

    def columns(self, name):
        self.add(self.ours + name, part(self.model[self.theirs + name], self.tp, self.r, axis=1), self.theirs + name)

    def vocabulary(self, name, source):
        self.add(name, vocabulary(self.model[source], self.padded, self.tp, self.r), source)

    def layer(self, ours, number):
        """A decoder layer under the name `ours`."""
        self.ours, self.theirs, self.number = ours, f"model.layers.{number}.", number
        for name in ("input_layernorm.weight", "post_attention_layernorm.weight"):
            self.whole(name)
        self.mla() if self.model.mla else self.attention()
        self.experts() if self.model.has_experts(number) else self.mlp(self.theirs + "mlp.", self.tp, self.r)

    def prediction(self, ours, number):
        """A layer for multi-token prediction, which has a decoder layer in it."""
        self.layer(ours + "mtp_block.", number)
        self.ours = ours
        for name in ("enorm.weight", "hnorm.weight", "eh_proj.weight", "shared_head.norm.weight"):
            self.whole(name)
        self.vocabulary(ours + "shared_head.head.weight", self.model.head_name)

    def attention(self):
        model, tp, r = self.model, self.tp, self.r
        for kind in ["weight"] + ["bias"] * model.bias:
            q, k, v = (f"{self.theirs}self_attn.{x}_proj.{kind}" for x in "qkv")
            if model.kv_heads >= tp:
                kv = [part(model[x], tp, r) for x in (k, v)]
            else:  # several ranks hold the same head
                kv = [part(model[x], model.kv_heads, r * model.kv_heads // tp) for x in (k, v)]
            self.add(f"{self.ours}self_attn.qkv_proj.{kind}", np.concatenate([part(model[q], tp, r), *kv]), q, k, v)
        if model.norms:
            self.whole("self_attn.q_norm.weight")
            self.whole("self_attn.k_norm.weight")
        self.columns("self_attn.o_proj.weight")

    def mla(self):
        if self.model.q_lora:
            q_a, kv_a = "self_attn.q_a_proj.weight", "self_attn.kv_a_proj_with_mqa.weight"
            if self.side.get("fused_qkv_a_proj", True):
                downs = [self.theirs + name for name in (q_a, kv_a)]
                fused = np.concatenate([self.model[name] for name in downs])
                self.add(self.ours + "self_attn.fused_qkv_a_proj.weight", fused, *downs)
            else:
                self.whole(q_a)
                self.whole(kv_a)
            self.whole("self_attn.q_a_layernorm.weight")
            self.rows("self_attn.q_b_proj.weight")
        else:
            self.rows("self_attn.q_proj.weight")
            self.whole("self_attn.kv_a_proj_with_mqa.weight")
        self.whole("self_attn.kv_a_layernorm.weight")
        self.rows("self_attn.kv_b_proj.weight")
        self.columns("self_attn.o_proj.weight")
        if self.copies:
            model, source = self.model, self.theirs + "self_attn.kv_b_proj.weight"
            heads = part(model[source].reshape(model.heads, model.nope + model.v_head, model.kv_lora), self.tp, self.r)
            key, value = heads[:, : model.nope], heads[:, model.nope :].transpose(0, 2, 1)
            self.add(self.ours + "self_attn.mla_attn.mla_attn.W_UK_T", key, source)
            self.add(self.ours + "self_attn.mla_attn.mla_attn.W_UV", value, source)

    def mlp(self, prefix, of, index):
        gate, up, down = mlp_names(prefix)
        ours = self.ours + prefix.removeprefix(self.theirs)
        self.add(ours + "gate_up_proj.weight", halves(self.model, gate, up, of, index), gate, up)
        self.add(ours + "down_proj.weight", part(self.model[down], of, index, axis=1), down)

    def stored(self, w13, w2):
        """Experts as a kernel wants them that has rounded their sizes up; each half of w13 is."""
        here, hidden = w2[0].shape[1], self.model.hidden
        ffn, width = (self.side.get(f"moe_padded_{name}_size", size) for name, size in (("intermediate", here), ("hidden", hidden)))
        need(ffn >= here and width >= hidden, "moe_padded")
        out = [[], []]
        for one, two in zip(w13, w2):
            halves_of = np.full((2, ffn, width), -1)
            halves_of[:, :here, :hidden] = one.reshape(2, here, hidden)
            down = np.full((width, ffn), -1)
            down[:hidden, :here] = two
            out[0].append(halves_of.reshape(2 * ffn, width))
            out[1].append(down)
        return out

    def experts(self):
        model, moe = self.model, self.model.moe(self.number).removeprefix(self.theirs)
        self.whole(moe + "gate.weight")
        if model.router_bias:
            self.whole(moe + "gate.e_score_correction_bias")

        ranks, mine = self.dp * self.tp, self.data_rank * self.tp + self.r
        of, index, held = ranks, mine, range(model.experts)
        if self.parallel:
            drafter = self.number >= model.layers  # for whose experts a map has no list
            at = None if drafter else model.moe_layers.index(self.number)
            held = expert_slots({**self.side, "physical_to_logical_map": None} if drafter else self.side, model.experts, ranks, at)[mine]
            of, index = 1, 0
        need(len(held) > 0, "experts")
        names = [model.expert(self.number, e) for e in held]
        storage = self.side.get("expert_storage", "stacked")
        swapped, transposed = storage == "stacked_swapped", storage == "stacked_transposed"
        w13 = [halves(model, *((up, gate) if swapped else (gate, up)), of, index) for gate, up, _ in names]
        w2 = [part(model[down], of, index, axis=1) for _, _, down in names]
        w13, w2 = self.stored(w13, w2)
        experts = self.ours + moe + "experts.routed_experts."
        w13, w2 = (np.stack([w.T if transposed else w for w in weights]) for weights in (w13, w2))
        self.add(experts + "w13_weight", w13, *dict.fromkeys(name for of_one in names for name in of_one[:2]))
        self.add(experts + "w2_weight", w2, *dict.fromkeys(of_one[2] for of_one in names))

        if model.shared:
            self.mlp(model.shared_expert(self.number), *((1, 0) if self.shared_whole else (self.tp, self.r)))
        if model.shared_gate:
            self.whole(moe + "shared_expert_gate.weight")
