"""What a vLLM rank holds: a part of the oracle (oracle.py)."""

import numpy as np
from oracle_model import Param, halves, mlp_names, need, numbers, part, ranks_of, rounded_up, vocabulary

EVERYWHERE = ("Mixtral", "Qwen2Moe", "Qwen3Moe")  # embedding, norm and head on every stage
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
    return VllmRank(model, side, own).params


class VllmRank:
    """Adds up the parameters of one rank."""

    def __init__(self, model, side, own):
        self.model, self.side, self.params = model, side, []
        tp, pp = side.get("tensor_parallel_size", 1), side.get("pipeline_parallel_size", 1)
        dp, replicas, world = side.get("data_parallel_size", 1), side.get("replicas", 1), len(ranks_of(side))
        need(tp * pp * dp * replicas == world, "ranks")
        need(model.heads % tp == 0, "num_attention_heads")
        need(model.mla or model.kv_heads % tp == 0 or tp % model.kv_heads == 0, "num_key_value_heads")
        need(not model.has_dense_mlp or model.mlp % tp == 0, "intermediate_size")
        padded = rounded_up(model.vocab, side.get("vocab_padding_size", 64))
        need(padded % tp == 0, "vocab_size")
        self.tp, self.r, stage = (
            tp,
            own % tp,
            own // tp % pp,
        )  # replicas repeat, and but for experts data parallel ranks
        self.dp, self.data_rank = dp, own // tp // pp % dp
        self._check_experts()
        sizes = vllm_partition(side, model.layers)

        first, last = stage == 0, stage == pp - 1
        if model.family in EVERYWHERE:
            first = last = True
        if first or (last and model.tied):
            embedding = "model.embed_tokens.weight"
            self.add(embedding, vocabulary(model[embedding], padded, tp, self.r))
        for layer in range(sum(sizes[:stage]), sum(sizes[: stage + 1])):
            self.layer = f"model.layers.{layer}."
            for name in ("input_layernorm.weight", "post_attention_layernorm.weight"):
                self.whole(name)
            self.mla() if model.mla else self.attention()
            if layer in model.moe_layers:
                self.experts(layer)
            else:
                self.mlp(self.layer + "mlp.", tp, self.r)
        if last:
            self.add("model.norm.weight", model["model.norm.weight"])
            if not model.tied:
                self.add("lm_head.weight", vocabulary(model["lm_head.weight"], padded, tp, self.r))

    def _check_experts(self):
        model, side = self.model, self.side
        if not model.experts:
            return
        self.parallel = side.get("enable_expert_parallel", False)
        need(self.parallel or model.expert_mlp % (self.dp * self.tp) == 0, "moe_intermediate_size")
        need(self.parallel or "physical_to_logical_map" not in side, "physical_to_logical_map")
        maps = side.get("physical_to_logical_map")
        need(maps is None or len(maps) == len(model.moe_layers), "physical_to_logical_map")
        # Sequence-parallel MoE: DeepSeek's shared experts are then whole.
        self.shared_whole = model.mla and self.parallel and self.tp > 1 and self.dp > 1
        need(self.shared_whole or model.shared % self.tp == 0, "shared experts")

    def add(self, name, elements, *sources):
        self.params.append(Param(self.model, 0, name, elements, sources or (name,)))

    def whole(self, name):
        self.add(self.layer + name, self.model[self.layer + name])

    def rows(self, name):
        self.add(self.layer + name, part(self.model[self.layer + name], self.tp, self.r))

    def columns(self, name):
        self.add(self.layer + name, part(self.model[self.layer + name], self.tp, self.r, axis=1))

    def attention(self):
        model, tp, r = self.model, self.tp, self.r
        for kind in ["weight"] + ["bias"] * model.bias:
            q, k, v = (f"{self.layer}self_attn.{x}_proj.{kind}" for x in "qkv")
            if model.kv_heads >= tp:
                kv = [part(model[x], tp, r) for x in (k, v)]
            else:  # several ranks hold the same head
                kv = [part(model[x], model.kv_heads, r * model.kv_heads // tp) for x in (k, v)]
            self.add(f"{self.layer}self_attn.qkv_proj.{kind}", np.concatenate([part(model[q], tp, r), *kv]), q, k, v)
        if model.norms:
            self.whole("self_attn.q_norm.weight")
            self.whole("self_attn.k_norm.weight")
        self.columns("self_attn.o_proj.weight")

    def mla(self):
        if self.model.q_lora:
            downs = [f"{self.layer}self_attn.{x}.weight" for x in ("q_a_proj", "kv_a_proj_with_mqa")]
            fused = np.concatenate([self.model[name] for name in downs])
            self.add(self.layer + "self_attn.fused_qkv_a_proj.weight", fused, *downs)
            self.whole("self_attn.q_a_layernorm.weight")
            self.rows("self_attn.q_b_proj.weight")
        else:
            self.rows("self_attn.q_proj.weight")
            self.whole("self_attn.kv_a_proj_with_mqa.weight")
        self.whole("self_attn.kv_a_layernorm.weight")
        self.rows("self_attn.kv_b_proj.weight")
        self.columns("self_attn.o_proj.weight")

    def mlp(self, prefix, of, index):
        gate, up, down = mlp_names(prefix)
        self.add(prefix + "gate_up_proj.weight", halves(self.model, gate, up, of, index), gate, up)
        self.add(down, part(self.model[down], of, index, axis=1))

    def experts(self, layer):
        model, moe = self.model, self.model.moe(layer)
        self.add(moe + "gate.weight", model[moe + "gate.weight"])
        if model.router_bias:
            self.add(moe + "gate.e_score_correction_bias", model[moe + "gate.e_score_correction_bias"])

        ranks, mine = self.dp * self.tp, self.data_rank * self.tp + self.r
        of, index, held = ranks, mine, range(model.experts)
        if self.parallel:
            held = expert_slots(self.side, model.experts, ranks, model.moe_layers.index(layer))[mine]
            of, index = 1, 0
        need(len(held) > 0, "experts")
        names = [model.expert(layer, e) for e in held]
        storage = self.side.get("expert_storage", "stacked")
        swapped, transposed = storage == "stacked_swapped", storage == "stacked_transposed"
        w13 = [halves(model, *((up, gate) if swapped else (gate, up)), of, index) for gate, up, _ in names]
        w2 = [part(model[down], of, index, axis=1) for _, _, down in names]
        experts = moe + "experts.routed_experts."
        w13, w2 = (np.stack([w.T if transposed else w for w in weights]) for weights in (w13, w2))
        self.add(experts + "w13_weight", w13, *dict.fromkeys(name for of_one in names for name in of_one[:2]))
        self.add(experts + "w2_weight", w2, *dict.fromkeys(of_one[2] for of_one in names))

        if model.shared:
            whole = (1, 0) if self.shared_whole else (self.tp, self.r)
            self.mlp(model.shared_expert(layer), *whole)
        if model.shared_gate:
            gate = moe + "shared_expert_gate.weight"
            self.add(gate, model[gate])
