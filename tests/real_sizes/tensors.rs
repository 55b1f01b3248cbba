//! The logical tensors of a model: those of its checkpoint.

use super::models::{Family, Model};

/// A tensor or a parameter: its layer, if it belongs to one; the rest of its name; the number of its expert, which stands for `{}` where
/// the name has that, else 0.
pub type Key = (Option<u64>, &'static str, u64);

pub const EMBED: Key = (None, "model.embed_tokens.weight", 0);
pub const HEAD: Key = (None, "lm_head.weight", 0);
pub const NORM: Key = (None, "model.norm.weight", 0);

pub const GATE_UP: &str = "mlp.experts.gate_up_proj";
pub const GATE_UP_BIAS: &str = "mlp.experts.gate_up_proj_bias";
pub const CORRECTION: &str = "mlp.gate.e_score_correction_bias";

pub struct Tensor {
    pub key: Key,
    pub shape: Vec<u64>,
    /// Bytes of an element.
    pub item: u64,
}

impl Tensor {
    /// Elements that are one row in this test: those of the last axis, or one of a tensor that has but one.
    pub fn width(&self) -> u64 {
        if self.shape.len() > 1 { self.shape[self.shape.len() - 1] } else { 1 }
    }

    /// Whether columns of gates and of ups take turns. In this test, such a row has first all gates, then all ups.
    pub fn interleaved(&self) -> bool {
        [GATE_UP, GATE_UP_BIAS].contains(&self.key.1)
    }
}

/// A name with all that stands in it.
pub fn filled(name: &str, number: u64) -> String {
    name.replace("{}", &number.to_string())
}

/// A tensor's name in the checkpoint.
pub fn name((layer, rest, number): Key) -> String {
    let rest = filled(rest, number);
    layer.map_or(rest.clone(), |layer| format!("model.layers.{layer}.{rest}"))
}

/// Names of an expert's gate, up and down projection.
pub fn of_expert(family: Family) -> [&'static str; 3] {
    match family {
        Family::Mixtral => [
            "block_sparse_moe.experts.{}.w1.weight",
            "block_sparse_moe.experts.{}.w3.weight",
            "block_sparse_moe.experts.{}.w2.weight",
        ],
        _ => ["mlp.experts.{}.gate_proj.weight", "mlp.experts.{}.up_proj.weight", "mlp.experts.{}.down_proj.weight"],
    }
}

/// Names of the same of the shared expert.
pub fn of_shared(family: Family) -> [&'static str; 3] {
    match family {
        Family::Qwen2Moe => {
            ["mlp.shared_expert.gate_proj.weight", "mlp.shared_expert.up_proj.weight", "mlp.shared_expert.down_proj.weight"]
        }
        _ => ["mlp.shared_experts.gate_proj.weight", "mlp.shared_experts.up_proj.weight", "mlp.shared_experts.down_proj.weight"],
    }
}

pub fn router(family: Family) -> &'static str {
    match family {
        Family::Mixtral => "block_sparse_moe.gate.weight",
        Family::GptOss => "mlp.router.weight",
        _ => "mlp.gate.weight",
    }
}

impl Model {
    /// All logical tensors.
    pub fn tensors(&self) -> Vec<Tensor> {
        let (v, h, item) = (self.vocabulary, self.hidden, self.item());
        let mut out = vec![Tensor { key: EMBED, shape: vec![v, h], item }, Tensor { key: NORM, shape: vec![h], item }];
        if !self.tied {
            out.push(Tensor { key: HEAD, shape: vec![v, h], item });
        }
        for layer in 0..self.layers {
            let mut add = |name: &'static str, shape: &[u64]| {
                let item = if name == CORRECTION { 4 } else { item };
                out.push(Tensor { key: (Some(layer), name, 0), shape: shape.to_vec(), item });
            };
            self.attention(&mut add);
            if self.has_experts(layer) {
                self.around_experts(&mut add);
                self.routed(layer, &mut out);
            } else {
                add("mlp.gate_proj.weight", &[self.ffn, h]);
                add("mlp.up_proj.weight", &[self.ffn, h]);
                add("mlp.down_proj.weight", &[h, self.ffn]);
            }
        }
        out
    }

    /// A layer's norms and its attention.
    fn attention(&self, add: &mut impl FnMut(&'static str, &[u64])) {
        let (q, kv, h) = (self.heads * self.head(), self.groups * self.head(), self.hidden);
        add("input_layernorm.weight", &[h]);
        add("post_attention_layernorm.weight", &[h]);
        if let Some(l) = self.latent {
            let rows = self.heads * (l.nope + l.rope);
            if l.q > 0 {
                add("self_attn.q_a_proj.weight", &[l.q, h]);
                add("self_attn.q_a_layernorm.weight", &[l.q]);
                add("self_attn.q_b_proj.weight", &[rows, l.q]);
            } else {
                add("self_attn.q_proj.weight", &[rows, h]);
            }
            add("self_attn.kv_a_proj_with_mqa.weight", &[l.kv + l.rope, h]);
            add("self_attn.kv_a_layernorm.weight", &[l.kv]);
            add("self_attn.kv_b_proj.weight", &[self.heads * (l.nope + l.value), l.kv]);
            add("self_attn.o_proj.weight", &[h, self.heads * l.value]);
            return;
        }
        add("self_attn.q_proj.weight", &[q, h]);
        add("self_attn.k_proj.weight", &[kv, h]);
        add("self_attn.v_proj.weight", &[kv, h]);
        add("self_attn.o_proj.weight", &[h, q]);
        if self.has_bias() {
            add("self_attn.q_proj.bias", &[q]);
            add("self_attn.k_proj.bias", &[kv]);
            add("self_attn.v_proj.bias", &[kv]);
        }
        if self.has_head_norms() {
            add("self_attn.q_norm.weight", &[self.head()]);
            add("self_attn.k_norm.weight", &[self.head()]);
        }
        if self.family == Family::GptOss {
            add("self_attn.o_proj.bias", &[h]);
            add("self_attn.sinks", &[self.heads]);
        }
    }

    /// What a layer with experts has but for these.
    fn around_experts(&self, add: &mut impl FnMut(&'static str, &[u64])) {
        let (e, h) = (self.experts.expect("experts"), self.hidden);
        add(router(self.family), &[e.count, h]);
        match self.family {
            Family::DeepSeekV3 => add(CORRECTION, &[e.count]),
            Family::Qwen2Moe => add("mlp.shared_expert_gate.weight", &[1, h]),
            Family::GptOss => add("mlp.router.bias", &[e.count]),
            _ => {}
        }
        if e.shared > 0 {
            let [gate, up, down] = of_shared(self.family);
            add(gate, &[e.shared, h]);
            add(up, &[e.shared, h]);
            add(down, &[h, e.shared]);
        }
    }

    fn routed(&self, layer: u64, out: &mut Vec<Tensor>) {
        let (e, h, item) = (self.experts.expect("experts"), self.hidden, self.item());
        let mut add = |name, number, shape: &[u64]| {
            out.push(Tensor { key: (Some(layer), name, number), shape: shape.to_vec(), item });
        };
        if self.family == Family::GptOss {
            add(GATE_UP, 0, &[e.count, h, 2 * e.width]);
            add(GATE_UP_BIAS, 0, &[e.count, 2 * e.width]);
            add("mlp.experts.down_proj", 0, &[e.count, e.width, h]);
            add("mlp.experts.down_proj_bias", 0, &[e.count, h]);
            return;
        }
        let [gate, up, down] = of_expert(self.family);
        for expert in 0..e.count {
            add(gate, expert, &[e.width, h]);
            add(up, expert, &[e.width, h]);
            add(down, expert, &[h, e.width]);
        }
    }
}
