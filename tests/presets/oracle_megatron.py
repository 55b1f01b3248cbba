"""What a Megatron rank holds: a part of the oracle (oracle.py)."""

import numpy as np
from oracle_model import Param, grouped, halves, mlp_names, need, part, rounded_up, vocabulary
from oracle_placement import expert_coordinates, megatron_coordinates, megatron_placement
from oracle_vision import MegatronVision, vision_stages

EXPERT_MEMBERS = (
    "expert_model_parallel_size", "expert_tensor_parallel_size", "moe_grouped_gemm", "moe_use_legacy_grouped_gemm", "moe_tp_extend_ep",
    "moe_single_grouped_weight",
)  # fmt: skip
# The name of the language model beside a vision tower, by the tower's names.
LANGUAGE = {"mbridge": "language_model.", "megatron_bridge": "language_model.", "mindspeed_mm": "text_decoder."}


def megatron(model, side, own, role):
    return MegatronRank(model, side, own, role).params


class MegatronRank:
    """Adds up the parameters of one rank."""

    def __init__(self, model, side, own, role):
        self.model, self.side, self.role, self.params = model, side, role, []
        tp, pp = side.get("tensor_model_parallel_size", 1), side.get("pipeline_model_parallel_size", 1)
        self.te = side.get("transformer_impl", "transformer_engine") == "transformer_engine"
        need(model.heads % tp == 0, "num_attention_heads")
        need(model.mla or model.kv_heads % tp == 0 or tp % model.kv_heads == 0, "num_key_value_heads")
        need(not model.has_dense_mlp or model.mlp % tp == 0, "intermediate_size")
        need(self.te or not side.get("layernorm_zero_centered_gamma"), "layernorm_zero_centered_gamma")
        need(not side.get("mla_down_proj_fusion") or (model.mla and model.q_lora), "mla_down_proj_fusion")
        divisor = side.get("make_vocab_size_divisible_by", 128) * tp
        padded = side.get("padded_vocab_size") or rounded_up(model.vocab, divisor)
        need(padded >= model.vocab and padded % tp == 0, "padded_vocab_size")
        coordinates = megatron_coordinates(side, own)
        self.tp, self.r, stage = tp, coordinates["tp"], coordinates["pp"]
        self._check_experts(own)
        placed, first, last = megatron_placement(side, model.layers)
        names, blocks = vision_stages(model, side, len(placed) // pp)
        self.prefix = LANGUAGE[names] if model.vision else ""
        predictions = model.mtp if side.get("mtp_num_layers") else 0

        for (p, self.chunk), slots in placed.items():
            if p != stage:
                continue
            here = (p, self.chunk)
            # The copies of the embedding, which the last stage needs, are the trainer's own; as a source the embedding itself is read.
            copied = predictions > 0 and here == last and p != first[0]
            if here == first or copied:
                embedding, name = "model.embed_tokens.weight", self.prefix + "embedding.word_embeddings.weight"
                self.add(name, vocabulary(model[embedding], padded, tp, self.r), embedding, required=here == first or role == "target")
            for local, layer in enumerate(slots):
                if layer is not None:
                    self.layer(f"{self.prefix}decoder.layers.{local}.", layer)
            # With layers for multi-token prediction, the norm is where the last layer is.
            if model.layers - 1 in slots if predictions else here == last:
                self.add(self.prefix + "decoder.final_layernorm.weight", model["model.norm.weight"], "model.norm.weight")
            if here == last:
                if not model.tied or pp > 1:
                    head = vocabulary(model[model.head_name], padded, tp, self.r)
                    required = role == "target" or not model.tied
                    self.add(self.prefix + "output_layer.weight", head, model.head_name, required=required)
                for k in range(predictions):
                    self.prediction(f"{self.prefix}mtp.layers.{k}.", model.layers + k)
            if self.chunk == 0 and model.vision:
                MegatronVision(self, names, blocks[p]).add()

    def _check_experts(self, own):
        model, side = self.model, self.side
        if not model.experts:
            need(not any(member in side for member in EXPERT_MEMBERS), "experts")
            return
        self.expert, self.etp, self.ep = expert_coordinates(side, own)
        need(model.experts % self.ep == 0, "experts")
        need(model.expert_mlp % self.etp == 0, "moe_intermediate_size")
        need(model.shared % self.tp == 0, "shared experts")
        self.grouped = side.get("moe_grouped_gemm", False)
        legacy = side.get("moe_tp_extend_ep") or side.get("moe_use_legacy_grouped_gemm")
        self.legacy = legacy or (self.grouped and not self.te)
        self.single = side.get("moe_single_grouped_weight", False)
        need(not self.single or (self.grouped and not self.legacy), "moe_single_grouped_weight")

    def add(self, name, elements, *sources, required=True):
        self.params.append(Param(self.model, self.role, self.chunk, name, elements, sources, required))

    def whole(self, name, source):
        self.add(self.ours + name, self.model[self.theirs + source], self.theirs + source)

    def rows(self, name, source):
        self.add(self.ours + name, part(self.model[self.theirs + source], self.tp, self.r), self.theirs + source)

    def columns(self, name, source):
        self.add(
            self.ours + name, part(self.model[self.theirs + source], self.tp, self.r, axis=1), self.theirs + source
        )

    def layer(self, ours, number):
        """A decoder layer under the name `ours`."""
        self.ours, self.theirs, self.number = ours, f"model.layers.{number}.", number
        self.mla() if self.model.mla else self.attention()
        self.experts() if self.model.has_experts(number) else self.dense_mlp()

    def prediction(self, ours, number):
        """A layer for multi-token prediction, which has a decoder layer in it."""
        self.layer(ours + "transformer_layer.", number)
        self.ours = ours
        self.whole("enorm.weight", "enorm.weight")
        self.whole("hnorm.weight", "hnorm.weight")
        self.rows("eh_proj.weight", "eh_proj.weight")
        self.whole("final_layernorm.weight", "shared_head.norm.weight")

    def attention(self):
        model, layer = self.model, self.theirs
        te, local = "self_attention.linear_qkv.layer_norm_weight", "input_layernorm.weight"
        self.whole(te if self.te else local, "input_layernorm.weight")
        for kind in ["weight"] + ["bias"] * model.bias:
            # Group by group: its query heads, its key head, its value head. Then equal cuts, wherever they fall.
            names = [f"{layer}self_attn.{x}_proj.{kind}" for x in "qkv"]
            q, k, v = (model[name] for name in names)
            parts = [q, k, v]
            if model.gated:  # every head's rows are those of the query, then those of its gate
                heads = q.reshape(model.heads, 2, model.head, *q.shape[1:])
                parts = [heads[:, 0].reshape(-1, *q.shape[1:]), heads[:, 1].reshape(-1, *q.shape[1:]), k, v]
            shard = part(grouped(parts, model.kv_heads), self.tp, self.r)
            inside = [name for name in names if model.name_in(name, shard)]
            self.add(f"{self.ours}self_attention.linear_qkv.{kind}", shard, *inside)
        if model.norms:
            self.whole("self_attention.q_layernorm.weight", "self_attn.q_norm.weight")
            self.whole("self_attention.k_layernorm.weight", "self_attn.k_norm.weight")
        self.columns("self_attention.linear_proj.weight", "self_attn.o_proj.weight")

    def mla(self):
        q_a, kv_a = "self_attn.q_a_proj.weight", "self_attn.kv_a_proj_with_mqa.weight"
        cut = self.side.get("mla_down_proj_cut", not self.te)
        fused = self.side.get("mla_down_proj_fusion", False)
        norm = "self_attention.linear_qkv_down_proj.layer_norm_weight" if fused and self.te else "input_layernorm.weight"
        self.whole(norm, "input_layernorm.weight")
        down = self.rows if cut else self.whole
        if fused:
            names = [self.theirs + name for name in (q_a, kv_a)]
            both = [part(self.model[name], self.tp, self.r) if cut else self.model[name] for name in names]
            self.add(self.ours + "self_attention.linear_qkv_down_proj.weight", np.concatenate(both), *names)
        if self.model.q_lora:
            te, local = "self_attention.linear_q_up_proj.layer_norm_weight", "self_attention.q_layernorm.weight"
            if not fused:
                down("self_attention.linear_q_down_proj.weight", q_a)
            self.whole(te if self.te else local, "self_attn.q_a_layernorm.weight")
            self.rows("self_attention.linear_q_up_proj.weight", "self_attn.q_b_proj.weight")
        else:
            self.rows("self_attention.linear_q_proj.weight", "self_attn.q_proj.weight")
        te, local = "self_attention.linear_kv_up_proj.layer_norm_weight", "self_attention.kv_layernorm.weight"
        if not fused:
            down("self_attention.linear_kv_down_proj.weight", kv_a)
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
        model, layer, ours = self.model, self.number, self.ours + "mlp."
        self.whole("pre_mlp_layernorm.weight", "post_attention_layernorm.weight")
        router = model.moe(layer) + "gate."
        self.add(ours + "router.weight", model[router + "weight"], router + "weight")
        if model.router_bias:
            bias = router + "e_score_correction_bias"
            self.add(ours + "router.expert_bias", model[bias], bias)

        mine = [model.expert(layer, e) for e in part(np.arange(model.experts), self.ep, self.expert["ep"])]
        fc1 = [halves(model, gate, up, self.etp, self.expert["etp"]) for gate, up, _ in mine]
        fc2 = [part(model[down], self.etp, self.expert["etp"], axis=1) for _, _, down in mine]
        one, two = [name for names in mine for name in names[:2]], [names[2] for names in mine]
        if self.legacy:
            # Expert after expert, each as input by output; the shape of weight1 says something else.
            self.add(ours + "experts.weight1", np.stack([w.T for w in fc1]).reshape(model.hidden, -1), *one)
            self.add(ours + "experts.weight2", np.concatenate([w.T for w in fc2]), *two)
        elif self.single:
            self.add(ours + "experts.linear_fc1.weight", np.stack(fc1), *one)
            self.add(ours + "experts.linear_fc2.weight", np.stack(fc2), *two)
        else:
            name = "linear_fc{0}.weight{1}" if self.grouped else "local_experts.{1}.linear_fc{0}.weight"
            for j, (gate, up, down) in enumerate(mine):
                self.add(ours + "experts." + name.format(1, j), fc1[j], gate, up)
                self.add(ours + "experts." + name.format(2, j), fc2[j], down)

        if model.shared:
            self.mlp("mlp.shared_experts", model.shared_expert(layer))
        if model.shared_gate:
            gate = model.moe(layer) + "shared_expert_gate.weight"
            self.add(ours + "shared_experts.gate_weight", model[gate], gate)
