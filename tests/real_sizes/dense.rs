//! What a rank has of a layer's norms, attention and MLP.

use super::holds::{Rank, share};
use super::models::{Family, Latent, Model};
use super::names::Names;
use super::sides::Framework;

/// Rows of the fused matrix that a rank has, in its order: the projection, and rows of it.
type Rows = Vec<(usize, [u64; 2])>;

/// Megatron: group by group its query heads, its key head, its value head; the whole cut in equal runs.
pub fn megatron_qkv(model: &Model, t: u64, r: u64) -> Rows {
    if model.latent.is_some() {
        return vec![];
    }
    let (per_group, d) = (model.heads / model.groups, model.head());
    let mine = share(model.groups * (per_group + 2) * d, r, t);
    let (mut out, mut full) = (vec![], 0);
    for group in 0..model.groups {
        for (which, rows) in [per_group * d, d, d].into_iter().enumerate() {
            let (low, high) = (mine[0].max(full), mine[1].min(full + rows));
            if low < high {
                out.push((which, [group * rows + low - full, group * rows + high - full]));
            }
            full += rows;
        }
    }
    out
}

/// vLLM: the rank's query heads, then its key heads, then its value heads; these are replicated where there are more ranks.
pub fn vllm_qkv(model: &Model, t: u64, r: u64) -> Rows {
    if model.latent.is_some() {
        return vec![];
    }
    let d = model.head();
    let q = share(model.heads, r, t);
    let kv = if model.groups >= t { share(model.groups, r, t) } else { share(model.groups, r * model.groups / t, model.groups) };
    assert!(model.groups % t == 0 || t % model.groups == 0);
    [q, kv, kv].into_iter().enumerate().map(|(which, heads)| (which, heads.map(|h| h * d))).collect()
}

/// `global` is the layer's number in the model, `local` in the names.
impl Rank<'_> {
    pub fn norms(&mut self, names: &Names, global: u64, local: u64) {
        let h = self.model.hidden;
        let mlp_norm = names.mlp_norm[usize::from(self.model.has_experts(global))];
        self.rows((Some(global), "input_layernorm.weight", 0), (Some(local), names.norm, 0), [0, h], 1, 0);
        self.rows((Some(global), "post_attention_layernorm.weight", 0), (Some(local), mlp_norm, 0), [0, h], 1, 0);
    }

    pub fn attention(&mut self, names: &Names, qkv: &[(usize, [u64; 2])], global: u64, local: u64) {
        let (model, t, r) = (self.model, self.t, self.place.tp);
        let (h, q, d) = (model.hidden, model.heads * model.head(), model.head());
        let (key, param) = (|name| (Some(global), name, 0), |name| (Some(local), name, 0));
        let weights = ["self_attn.q_proj.weight", "self_attn.k_proj.weight", "self_attn.v_proj.weight"];
        let biases = ["self_attn.q_proj.bias", "self_attn.k_proj.bias", "self_attn.v_proj.bias"];
        let mut at = 0;
        for &(which, rows) in qkv {
            self.rows(key(weights[which]), param(names.qkv), rows, h, at * h);
            if model.has_bias() {
                self.rows(key(biases[which]), param(names.qkv_bias), rows, 1, at);
            }
            at += rows[1] - rows[0];
        }
        self.cols(key("self_attn.o_proj.weight"), param(names.out), h, share(q, r, t));
        if model.has_head_norms() {
            self.rows(key("self_attn.q_norm.weight"), param(names.head_norms[0]), [0, d], 1, 0);
            self.rows(key("self_attn.k_norm.weight"), param(names.head_norms[1]), [0, d], 1, 0);
        }
        if model.family == Family::GptOss {
            self.rows(key("self_attn.o_proj.bias"), param(names.out_bias), [0, h], 1, 0);
            self.rows(key("self_attn.sinks"), param(names.sinks), share(model.heads, r, t), 1, 0);
        }
    }

    pub fn latent(&mut self, names: &Names, latent: &Latent, global: u64, local: u64) {
        let (model, t, r) = (self.model, self.t, self.place.tp);
        let (h, n) = (model.hidden, model.heads);
        let (key, param) = (|name| (Some(global), name, 0), |name| (Some(local), name, 0));
        let megatron = self.side.framework == Framework::Megatron;
        let cut = megatron && self.side.switch("cut").unwrap_or(self.side.flag("impl"));
        let down = |rows: u64| if cut { share(rows, r, t) } else { [0, rows] };
        let queries = n * (latent.nope + latent.rope);
        if latent.q > 0 {
            let [down_name, norm, up] = names.q;
            self.rows(key("self_attn.q_a_proj.weight"), param(down_name), down(latent.q), h, 0);
            self.rows(key("self_attn.q_a_layernorm.weight"), param(norm), [0, latent.q], 1, 0);
            self.rows(key("self_attn.q_b_proj.weight"), param(up), share(queries, r, t), latent.q, 0);
        } else {
            self.rows(key("self_attn.q_proj.weight"), param(names.q_alone), share(queries, r, t), h, 0);
        }
        let [down_name, norm, up] = names.kv;
        // vLLM has both down projections in one parameter, that of the queries first.
        let at = if megatron { 0 } else { latent.q * h };
        self.rows(key("self_attn.kv_a_proj_with_mqa.weight"), param(down_name), down(latent.kv + latent.rope), h, at);
        self.rows(key("self_attn.kv_a_layernorm.weight"), param(norm), [0, latent.kv], 1, 0);
        let rows = share(n * (latent.nope + latent.value), r, t);
        self.rows(key("self_attn.kv_b_proj.weight"), param(up), rows, latent.kv, 0);
        self.cols(key("self_attn.o_proj.weight"), param(names.out), h, share(n * latent.value, r, t));
    }

    pub fn mlp(&mut self, names: &Names, global: u64, local: u64) {
        let part = share(self.model.ffn, self.place.tp, self.t);
        let of = ["mlp.gate_proj.weight", "mlp.up_proj.weight", "mlp.down_proj.weight"];
        self.gated(of, names.mlp, part, global, local);
    }

    /// Gate and up one after the other, and down, each the same part of its width.
    pub fn gated(&mut self, of: [&'static str; 3], names: [&'static str; 2], part: [u64; 2], global: u64, local: u64) {
        let h = self.model.hidden;
        let (key, param) = (|name| (Some(global), name, 0), |name| (Some(local), name, 0));
        self.rows(key(of[0]), param(names[0]), part, h, 0);
        self.rows(key(of[1]), param(names[0]), part, h, (part[1] - part[0]) * h);
        self.cols(key(of[2]), param(names[1]), h, part);
    }
}
