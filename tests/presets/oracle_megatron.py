"""What a Megatron rank holds: a part of the oracle (oracle.py)."""

import re

import numpy as np
from oracle_model import Param, halves, mlp_names, need, numbers, part, ranks_of, rounded_up, vocabulary


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


EXPERT_MEMBERS = (
    "expert_model_parallel_size", "expert_tensor_parallel_size", "moe_grouped_gemm", "moe_use_legacy_grouped_gemm", "moe_tp_extend_ep",
)  # fmt: skip


def expert_coordinates(side, own):
    """Rank `own` holds part "etp" of `etp` of the experts of part "ep" of `ep`."""
    tp, cp = side.get("tensor_model_parallel_size", 1), side.get("context_parallel_size", 1)
    pp, ep = side.get("pipeline_model_parallel_size", 1), side.get("expert_model_parallel_size", 1)
    etp = side.get("expert_tensor_parallel_size") or tp
    need(len(ranks_of(side)) % (etp * ep * pp) == 0, "ranks")
    need(not side.get("use_tp_pp_dp_mapping") or etp * ep == tp * cp, "use_tp_pp_dp_mapping")
    if side.get("moe_tp_extend_ep"):  # MindSpeed: TP ranks have experts of their own
        need("expert_tensor_parallel_size" not in side, "expert_tensor_parallel_size")
        return {"etp": 0, "ep": own % (tp * ep)}, 1, tp * ep
    return {"etp": own % etp, "ep": own // etp % ep}, etp, ep


def megatron(model, side, own, role):
    return MegatronRank(model, side, own, role).params


class MegatronRank:
    """Adds up the parameters of one rank."""

    def __init__(self, model, side, own, role):
        self.model, self.side, self.params = model, side, []
        tp, pp = side.get("tensor_model_parallel_size", 1), side.get("pipeline_model_parallel_size", 1)
        self.te = side.get("transformer_impl", "transformer_engine") == "transformer_engine"
        need(model.heads % tp == 0, "num_attention_heads")
        need(model.mla or model.kv_heads % tp == 0 or tp % model.kv_heads == 0, "num_key_value_heads")
        need(not model.has_dense_mlp or model.mlp % tp == 0, "intermediate_size")
        divisor = side.get("make_vocab_size_divisible_by", 128) * tp
        padded = side.get("padded_vocab_size") or rounded_up(model.vocab, divisor)
        need(padded >= model.vocab and padded % tp == 0, "padded_vocab_size")
        coordinates = megatron_coordinates(side, own)
        self.tp, self.r, stage = tp, coordinates["tp"], coordinates["pp"]
        self._check_experts(own)
        placed, first, last = megatron_placement(side, model.layers)

        for (p, self.chunk), slots in placed.items():
            if p != stage:
                continue
            if (p, self.chunk) == first:
                embedding = "model.embed_tokens.weight"
                self.add(
                    "embedding.word_embeddings.weight", vocabulary(model[embedding], padded, tp, self.r), embedding
                )
            for local, self.layer in enumerate(slots):
                if self.layer is not None:
                    self.ours, self.theirs = f"decoder.layers.{local}.", f"model.layers.{self.layer}."
                    self.mla() if model.mla else self.attention()
                    self.experts() if self.layer in model.moe_layers else self.dense_mlp()
            if (p, self.chunk) == last:
                self.add("decoder.final_layernorm.weight", model["model.norm.weight"], "model.norm.weight")
                if not model.tied or pp > 1:
                    # The copy of tied embeddings is the trainer's own; as a source the embedding itself is read.
                    head = vocabulary(model[model.head_name], padded, tp, self.r)
                    self.add("output_layer.weight", head, model.head_name, required=role == "target" or not model.tied)

    def _check_experts(self, own):
        model, side = self.model, self.side
        if not model.experts:
            need(not any(member in side for member in EXPERT_MEMBERS), "experts")
            return
        self.expert, self.etp, self.ep = expert_coordinates(side, own)
        need(model.experts % self.ep == 0, "experts")
        need(model.expert_mlp % self.etp == 0, "moe_intermediate_size")
        need(model.shared % self.tp == 0, "shared experts")

    def add(self, name, elements, *sources, required=True):
        self.params.append(Param(self.model, self.chunk, name, elements, sources, required))

    def whole(self, name, source):
        self.add(self.ours + name, self.model[self.theirs + source], self.theirs + source)

    def rows(self, name, source):
        self.add(self.ours + name, part(self.model[self.theirs + source], self.tp, self.r), self.theirs + source)

    def columns(self, name, source):
        self.add(
            self.ours + name, part(self.model[self.theirs + source], self.tp, self.r, axis=1), self.theirs + source
        )

    def attention(self):
        model, layer = self.model, self.theirs
        te, local = "self_attention.linear_qkv.layer_norm_weight", "input_layernorm.weight"
        self.whole(te if self.te else local, "input_layernorm.weight")
        for kind in ["weight"] + ["bias"] * model.bias:
            # Group by group: its query heads, its key head, its value head. Then equal cuts, wherever they fall.
            names = [f"{layer}self_attn.{x}_proj.{kind}" for x in "qkv"]
            groups = [model[name].reshape(model.kv_heads, -1, *model.shapes[name][1:]) for name in names]
            fused = np.concatenate(groups, axis=1)
            fused = fused.reshape(-1, *fused.shape[2:])
            shard = part(fused, self.tp, self.r)
            inside = [name for name in names if model.name_in(name, shard)]
            self.add(f"{self.ours}self_attention.linear_qkv.{kind}", shard, *inside)
        if model.norms:
            self.whole("self_attention.q_layernorm.weight", "self_attn.q_norm.weight")
            self.whole("self_attention.k_layernorm.weight", "self_attn.k_norm.weight")
        self.columns("self_attention.linear_proj.weight", "self_attn.o_proj.weight")

    def mla(self):
        self.whole("input_layernorm.weight", "input_layernorm.weight")
        down = self.rows if self.side.get("mla_down_proj_cut", not self.te) else self.whole
        if self.model.q_lora:
            te, local = "self_attention.linear_q_up_proj.layer_norm_weight", "self_attention.q_layernorm.weight"
            down("self_attention.linear_q_down_proj.weight", "self_attn.q_a_proj.weight")
            self.whole(te if self.te else local, "self_attn.q_a_layernorm.weight")
            self.rows("self_attention.linear_q_up_proj.weight", "self_attn.q_b_proj.weight")
        else:
            self.rows("self_attention.linear_q_proj.weight", "self_attn.q_proj.weight")
        te, local = "self_attention.linear_kv_up_proj.layer_norm_weight", "self_attention.kv_layernorm.weight"
        down("self_attention.linear_kv_down_proj.weight", "self_attn.kv_a_proj_with_mqa.weight")
        self.whole(te if self.te else local, "self_attn.kv_a_layernorm.weight")
        self.rows("self_attention.linear_kv_up_proj.weight", "self_attn.kv_b_proj.weight")
        self.columns("self_attention.linear_proj.weight", "self_attn.o_proj.weight")

    def mlp(self, name, prefix):
        """A gated MLP cut over TP."""
        gate, up, down = mlp_names(prefix)
        self.add(f"{self.ours}{name}.linear_fc1.weight", halves(self.model, gate, up, self.tp, self.r), gate, up)
        self.add(f"{self.ours}{name}.linear_fc2.weight", part(self.model[down], self.tp, self.r, axis=1), down)

    def dense_mlp(self):
        te, local = "mlp.linear_fc1.layer_norm_weight", "pre_mlp_layernorm.weight"
        self.whole(te if self.te else local, "post_attention_layernorm.weight")
        self.mlp("mlp", self.theirs + "mlp.")

    def experts(self):
        model, side, layer, ours = self.model, self.side, self.layer, self.ours + "mlp."
        self.whole("pre_mlp_layernorm.weight", "post_attention_layernorm.weight")
        router = model.moe(layer) + "gate."
        self.add(ours + "router.weight", model[router + "weight"], router + "weight")
        if model.router_bias:
            bias = router + "e_score_correction_bias"
            self.add(ours + "router.expert_bias", model[bias], bias)

        mine = [model.expert(layer, e) for e in part(np.arange(model.experts), self.ep, self.expert["ep"])]
        fc1 = [halves(model, gate, up, self.etp, self.expert["etp"]) for gate, up, _ in mine]
        fc2 = [part(model[down], self.etp, self.expert["etp"], axis=1) for _, _, down in mine]
        grouped = side.get("moe_grouped_gemm", False)
        if side.get("moe_tp_extend_ep") or side.get("moe_use_legacy_grouped_gemm") or (grouped and not self.te):
            # Expert after expert, each as input by output; the shape of weight1 says something else.
            weight1 = np.stack([w.T for w in fc1]).reshape(model.hidden, -1)
            weight2 = np.concatenate([w.T for w in fc2])
            self.add(ours + "experts.weight1", weight1, *(name for names in mine for name in names[:2]))
            self.add(ours + "experts.weight2", weight2, *(names[2] for names in mine))
        else:
            one, two = "local_experts.{0}.linear_fc1.weight", "local_experts.{0}.linear_fc2.weight"
            if grouped:
                one, two = "linear_fc1.weight{0}", "linear_fc2.weight{0}"
            for j, (gate, up, down) in enumerate(mine):
                self.add(ours + "experts." + one.format(j), fc1[j], gate, up)
                self.add(ours + "experts." + two.format(j), fc2[j], down)

        if model.shared:
            self.mlp("mlp.shared_experts", model.shared_expert(layer))
        if model.shared_gate:
            gate = model.moe(layer) + "shared_expert_gate.weight"
            self.add(ours + "shared_experts.gate_weight", model[gate], gate)
