//! Which kinds of tensors a model has, in the order of the model, and their names.
#![forbid(unsafe_code)]

use super::{Attention, Kind, LayerType, Model, Moe, Part};

/// Kinds by name; see [`Model::kind`].
pub mod names {
    #![allow(missing_docs)] // The names themselves.
    pub const EMBED: &str = "model.embed_tokens.weight";
    pub const NORM: &str = "model.norm.weight";
    pub const HEAD: &str = "lm_head.weight";
    pub const INPUT_NORM: &str = "input_layernorm.weight";
    pub const POST_NORM: &str = "post_attention_layernorm.weight";
    pub const QKV: [&str; 3] = ["self_attn.q_proj.weight", "self_attn.k_proj.weight", "self_attn.v_proj.weight"];
    pub const QKV_BIAS: [&str; 3] = ["self_attn.q_proj.bias", "self_attn.k_proj.bias", "self_attn.v_proj.bias"];
    pub const Q_NORM: &str = "self_attn.q_norm.weight";
    pub const K_NORM: &str = "self_attn.k_norm.weight";
    pub const Q: &str = QKV[0];
    pub const Q_A: &str = "self_attn.q_a_proj.weight";
    pub const Q_A_NORM: &str = "self_attn.q_a_layernorm.weight";
    pub const Q_B: &str = "self_attn.q_b_proj.weight";
    pub const KV_A: &str = "self_attn.kv_a_proj_with_mqa.weight";
    pub const KV_A_NORM: &str = "self_attn.kv_a_layernorm.weight";
    pub const KV_B: &str = "self_attn.kv_b_proj.weight";
    pub const O: &str = "self_attn.o_proj.weight";
    pub const O_BIAS: &str = "self_attn.o_proj.bias";
    pub const SINKS: &str = "self_attn.sinks";
    pub const ROUTER_BIAS: &str = "mlp.router.bias";
    /// Experts of a layer in one: gate and up, their biases, down, its biases.
    pub const FUSED: [&str; 4] =
        ["mlp.experts.gate_up_proj", "mlp.experts.gate_up_proj_bias", "mlp.experts.down_proj", "mlp.experts.down_proj_bias"];
    /// MTP's own.
    pub const E_NORM: &str = "enorm.weight";
    pub const H_NORM: &str = "hnorm.weight";
    pub const EH: &str = "eh_proj.weight";
    pub const MTP_NORM: &str = "shared_head.norm.weight";
    pub const MLP: [&str; 3] = ["mlp.gate_proj.weight", "mlp.up_proj.weight", "mlp.down_proj.weight"];
    /// Of the vision tower: before its layers, in one (each with its bias), and after them.
    pub const PATCH: &str = "visual.patch_embed.proj.weight";
    pub const VISION_NORMS: [&str; 2] = ["norm1.weight", "norm2.weight"];
    pub const VISION_QKV: [&str; 2] = ["attn.qkv.weight", "attn.qkv.bias"];
    pub const VISION_O: [&str; 2] = ["attn.proj.weight", "attn.proj.bias"];
    pub const VISION_GATE: [&str; 2] = ["mlp.gate_proj.weight", "mlp.gate_proj.bias"];
    pub const VISION_UP: [&str; 2] = ["mlp.up_proj.weight", "mlp.up_proj.bias"];
    pub const VISION_DOWN: [&str; 2] = ["mlp.down_proj.weight", "mlp.down_proj.bias"];
    pub const MERGER_NORM: &str = "visual.merger.ln_q.weight";
    pub const MERGER_IN: [&str; 2] = ["visual.merger.mlp.0.weight", "visual.merger.mlp.0.bias"];
    pub const MERGER_OUT: [&str; 2] = ["visual.merger.mlp.2.weight", "visual.merger.mlp.2.bias"];
}

/// Kinds as they are added.
#[derive(Default)]
struct Kinds(Vec<Kind>);

impl Kinds {
    fn add(&mut self, part: Part, name: impl Into<String>, shape: &[u64]) {
        self.0.push(Kind { name: name.into(), shape: shape.to_vec(), part, fp32: false });
    }

    /// A linear layer's weight and bias.
    fn linear(&mut self, part: Part, names: [&str; 2], shape: [u64; 2]) {
        self.add(part, names[0], &shape);
        self.add(part, names[1], &shape[..1]);
    }
}

/// All kinds of a model, for which everything else is known.
pub fn kinds(model: &Model) -> Vec<Kind> {
    use names::*;
    let h = model.hidden;
    let mut out = Kinds::default();
    out.add(Part::Once, EMBED, &[model.vocab, h]);
    out.add(Part::Once, NORM, &[h]);
    if !model.tied {
        out.add(Part::Once, HEAD, &[model.vocab, h]);
    }
    for layer in [LayerType::Dense, LayerType::Moe] {
        if model.layers.contains(&layer) {
            out.add(Part::Layer(layer), INPUT_NORM, &[h]);
            attention(model, &mut out, Part::Layer(layer));
            out.add(Part::Layer(layer), POST_NORM, &[h]);
            match model.moe.as_ref().filter(|_| layer == LayerType::Moe) {
                Some(moe) => experts(moe, &mut out, h),
                None => {
                    let ffn = model.ffn;
                    for (name, shape) in MLP.into_iter().zip([[ffn, h], [ffn, h], [h, ffn]]) {
                        out.add(Part::Layer(layer), name, &shape);
                    }
                }
            }
        }
    }
    if model.mtp > 0 {
        for (name, shape) in [(E_NORM, &[h][..]), (H_NORM, &[h]), (EH, &[h, 2 * h]), (MTP_NORM, &[h])] {
            out.add(Part::Mtp, name, shape);
        }
    }
    vision(model, &mut out);
    out.0
}

fn attention(model: &Model, out: &mut Kinds, part: Part) {
    use names::*;
    let h = model.hidden;
    let mut put = |name: &str, shape: &[u64]| out.add(part, name, shape);
    match &model.attention {
        Attention::Grouped(a) => {
            for (i, rows) in [a.q_rows(), a.kv * a.dim, a.kv * a.dim].into_iter().enumerate() {
                put(QKV[i], &[rows, h]);
                if a.bias {
                    put(QKV_BIAS[i], &[rows]);
                }
            }
            if a.norm {
                put(Q_NORM, &[a.dim]);
                put(K_NORM, &[a.dim]);
            }
        }
        Attention::Latent(a) => {
            let [nope, rope, v] = a.dims;
            match a.q_lora {
                Some(rank) => {
                    put(Q_A, &[rank, h]);
                    put(Q_A_NORM, &[rank]);
                    put(Q_B, &[a.heads * (nope + rope), rank]);
                }
                None => put(Q, &[a.heads * (nope + rope), h]),
            }
            put(KV_A, &[a.kv_lora + rope, h]);
            put(KV_A_NORM, &[a.kv_lora]);
            put(KV_B, &[a.heads * (nope + v), a.kv_lora]);
        }
    }
    put(O, &[h, model.attention.out()]);
    if let Attention::Grouped(a) = &model.attention {
        if a.out_bias {
            put(O_BIAS, &[h]);
        }
        if a.sinks {
            put(SINKS, &[a.q]);
        }
    }
}

/// Router, shared and routed experts of a layer.
fn experts(moe: &Moe, out: &mut Kinds, h: u64) {
    use names::*;
    let part = Part::Layer(LayerType::Moe);
    out.add(part, moe.router(), &[moe.experts, h]);
    if moe.fused {
        out.add(part, ROUTER_BIAS, &[moe.experts]);
        let (e, f) = (moe.experts, moe.ffn);
        let shapes: [&[u64]; 4] = [&[e, h, 2 * f], &[e, 2 * f], &[e, f, h], &[e, h]];
        FUSED.into_iter().zip(shapes).for_each(|(name, shape)| out.add(part, name, shape));
        return;
    }
    if moe.shared > 0 {
        for (name, shape) in moe.shared_names().into_iter().zip([[moe.shared, h], [moe.shared, h], [h, moe.shared]]) {
            out.add(part, name, &shape);
        }
    }
    if moe.shared_gate {
        out.add(part, moe.shared_gate_name(), &[1, h]);
    }
    if moe.correction {
        out.0.push(Kind { name: moe.correction_name(), shape: vec![moe.experts], part, fp32: true });
    }
    for (name, shape) in moe.expert_names().into_iter().zip([[moe.ffn, h], [moe.ffn, h], [h, moe.ffn]]) {
        out.add(Part::Expert(LayerType::Moe), name, &shape);
    }
}

fn vision(model: &Model, out: &mut Kinds) {
    use names::*;
    let Some(v) = &model.vision else { return };
    let (n, layer) = (v.hidden, Part::Layer(LayerType::Vision));
    out.add(Part::Once, PATCH, &[&[n], &v.patch[..]].concat());
    out.add(Part::Once, MERGER_NORM, &[n]);
    out.linear(Part::Once, MERGER_IN, [v.merged(), v.merged()]);
    out.linear(Part::Once, MERGER_OUT, [v.out, v.merged()]);
    VISION_NORMS.into_iter().for_each(|name| out.add(layer, name, &[n]));
    out.linear(layer, VISION_QKV, [3 * n, n]);
    out.linear(layer, VISION_O, [n, n]);
    out.linear(layer, VISION_GATE, [v.ffn, n]);
    out.linear(layer, VISION_UP, [v.ffn, n]);
    out.linear(layer, VISION_DOWN, [n, v.ffn]);
}

impl Moe {
    /// Name of the router's weight.
    pub fn router(&self) -> String {
        format!("{}.{}.weight", self.block, if self.fused { "router" } else { "gate" })
    }

    /// Name of the router's e_score_correction_bias.
    pub fn correction_name(&self) -> String {
        format!("{}.gate.e_score_correction_bias", self.block)
    }

    /// Names of the shared experts' projections.
    pub fn shared_names(&self) -> [String; 3] {
        names::MLP.map(|n| n.replacen("mlp.", &format!("{}.{}.", self.block, self.shared_name), 1))
    }

    /// Name of the shared expert's gate.
    pub fn shared_gate_name(&self) -> String {
        format!("{}.{}_gate.weight", self.block, self.shared_name)
    }

    /// Names of an expert's projections, `{}` being its number.
    pub fn expert_names(&self) -> [String; 3] {
        self.names.map(|n| format!("{}.experts.{{}}.{n}", self.block))
    }
}
