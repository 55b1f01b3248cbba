//! A layer of a Megatron side.
#![forbid(unsafe_code)]

use super::{Impl, MlaWeights, Options, down_proj_cut};
use crate::preset::cut;
use crate::preset::model::{Attention, Latent, LayerType, Part, names};
use crate::preset::shard::Shard;
use crate::preset::side::Param;

/// A shard of a layer, but for its routed experts.
pub fn params(shard: &Shard<'_>, o: &Options) -> Vec<Param> {
    let Shard { model, r, t, .. } = *shard;
    let te = o.transformer_impl == Impl::TransformerEngine;
    let named = |te_name: &'static str, local: &'static str| if te { te_name } else { local };
    let mut out = vec![];
    match &model.attention {
        Attention::Grouped(a) => {
            let input_norm = named("self_attention.linear_qkv.layer_norm_weight", "input_layernorm.weight");
            out.push(shard.whole(input_norm, names::INPUT_NORM));
            let rows = a.rows() / t;
            let qkv = |of: [&str; 3], width: u64| cut::qkv_grouped(of.map(|n| shard.kind(n)), *a, width, r, t);
            out.push(Param::new("self_attention.linear_qkv.weight", &[rows, model.hidden], qkv(names::QKV, model.hidden)));
            if a.bias {
                out.push(Param::new("self_attention.linear_qkv.bias", &[rows], qkv(names::QKV_BIAS, 1)));
            }
            if a.out_bias {
                out.push(shard.whole("self_attention.linear_proj.bias", names::O_BIAS));
            }
            if a.sinks {
                out.push(shard.rows("self_attention.core_attention.softmax_offset", names::SINKS));
            }
            if a.norm {
                out.push(shard.whole("self_attention.q_layernorm.weight", names::Q_NORM));
                out.push(shard.whole("self_attention.k_layernorm.weight", names::K_NORM));
            }
        }
        Attention::Latent(a) if o.mla_weights != MlaWeights::Core => out.extend(mindspeed_latent(shard, o, a)),
        Attention::Latent(a) => {
            let down = |param: &str, tensor: &str| {
                if down_proj_cut(o) { shard.rows(param, tensor) } else { shard.whole(param, tensor) }
            };
            let fused = "self_attention.linear_qkv_down_proj.layer_norm_weight";
            let input_norm = if o.mla_down_proj_fusion { named(fused, "input_layernorm.weight") } else { "input_layernorm.weight" };
            out.push(shard.whole(input_norm, names::INPUT_NORM));
            if o.mla_down_proj_fusion {
                let part = if down_proj_cut(o) { *shard } else { Shard { r: 0, t: 1, ..*shard } };
                out.push(part.stacked("self_attention.linear_qkv_down_proj.weight", &[names::Q_A, names::KV_A]));
            } else {
                out.push(down("self_attention.linear_kv_down_proj.weight", names::KV_A));
                out.extend(a.q_lora.map(|_| down("self_attention.linear_q_down_proj.weight", names::Q_A)));
            }
            if a.q_lora.is_some() {
                let norm = named("self_attention.linear_q_up_proj.layer_norm_weight", "self_attention.q_layernorm.weight");
                out.extend([shard.whole(norm, names::Q_A_NORM), shard.rows("self_attention.linear_q_up_proj.weight", names::Q_B)]);
            } else {
                out.push(shard.rows("self_attention.linear_q_proj.weight", names::Q));
            }
            let norm = named("self_attention.linear_kv_up_proj.layer_norm_weight", "self_attention.kv_layernorm.weight");
            out.extend([shard.whole(norm, names::KV_A_NORM), shard.rows("self_attention.linear_kv_up_proj.weight", names::KV_B)]);
        }
    }
    out.push(shard.columns("self_attention.linear_proj.weight", names::O));
    out.extend(mlp_params(shard, named));
    out
}

/// MindSpeed-LLM's norms and projections of multi-head latent attention, but for the last.
fn mindspeed_latent(shard: &Shard<'_>, o: &Options, a: &Latent) -> Vec<Param> {
    let [nope, rope, v] = a.dims;
    let first = if a.q_lora.is_some() { names::Q_A } else { names::Q };
    let mut out = vec![
        shard.whole("input_layernorm.weight", names::INPUT_NORM),
        Shard { r: 0, t: 1, ..*shard }.stacked("self_attention.linear_qkv.weight", &[first, names::KV_A]),
    ];
    let part = |param: &str, tensor: &str, rows: u64, of: (u64, u64)| {
        shard.of_heads(&format!("self_attention.{param}.weight"), tensor, rows, of)
    };
    let up = |core: &str, old: &str, tensor: &str| {
        let name = if o.mla_weights == MlaWeights::Mindspeed { core } else { old };
        shard.rows(&format!("self_attention.{name}.weight"), tensor)
    };
    if a.q_lora.is_some() {
        out.push(shard.whole("self_attention.q_layernorm.weight", names::Q_A_NORM));
        if o.mla_mm_split {
            out.push(part("linear_qk_nope", names::Q_B, nope + rope, (0, nope)));
            out.push(part("linear_qk_rope", names::Q_B, nope + rope, (nope, rope)));
        } else {
            out.push(up("linear_q_up_proj", "linear_qb", names::Q_B));
        }
    }
    out.push(shard.whole("self_attention.kv_layernorm.weight", names::KV_A_NORM));
    if o.mla_mm_split {
        out.push(part("linear_kv_nope", names::KV_B, nope + v, (0, nope)));
        out.push(part("linear_v", names::KV_B, nope + v, (nope, v)));
    } else {
        out.push(up("linear_kv_up_proj", "linear_kvb", names::KV_B));
    }
    out
}

/// What follows a layer's attention, but for its routed experts.
fn mlp_params(shard: &Shard<'_>, named: impl Fn(&'static str, &'static str) -> &'static str) -> Vec<Param> {
    let Shard { model, part, .. } = *shard;
    let mut out = vec![];
    let Some(moe) = model.moe.as_ref().filter(|_| part == Part::Layer(LayerType::Moe)) else {
        let [gate, up, down] = names::MLP;
        out.push(shard.whole(named("mlp.linear_fc1.layer_norm_weight", "pre_mlp_layernorm.weight"), names::POST_NORM));
        out.push(shard.glu("mlp.linear_fc1.weight", gate, up));
        out.push(shard.columns("mlp.linear_fc2.weight", down));
        return out;
    };
    out.push(shard.whole("pre_mlp_layernorm.weight", names::POST_NORM));
    out.push(shard.whole("mlp.router.weight", &moe.router()));
    if moe.fused {
        out.push(shard.whole("mlp.router.bias", names::ROUTER_BIAS));
    }
    if moe.correction {
        out.push(shard.whole("mlp.router.expert_bias", &moe.correction_name()));
    }
    if moe.shared > 0 {
        let [gate, up, down] = moe.shared_names();
        out.push(shard.glu("mlp.shared_experts.linear_fc1.weight", &gate, &up));
        out.push(shard.columns("mlp.shared_experts.linear_fc2.weight", &down));
    }
    if moe.shared_gate {
        out.push(shard.whole("mlp.shared_experts.gate_weight", &moe.shared_gate_name()));
    }
    out
}

/// What a layer for multi-token prediction has beside an ordinary one.
pub fn mtp_params(shard: &Shard<'_>) -> Vec<Param> {
    vec![
        shard.whole("enorm.weight", names::E_NORM),
        shard.whole("hnorm.weight", names::H_NORM),
        shard.rows("eh_proj.weight", names::EH),
        shard.whole("final_layernorm.weight", names::MTP_NORM),
    ]
}
