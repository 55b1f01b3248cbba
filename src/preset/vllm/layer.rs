//! A layer of a vLLM side.
#![forbid(unsafe_code)]

use super::{Derived, Options};
use crate::preset::cut;
use crate::preset::model::{Attention, LayerType, Part, names};
use crate::preset::shard::Shard;
use crate::preset::side::Param;

/// A shard of a layer, but for its routed experts. `whole`: whether shared experts are not cut; `correction`: dtype of
/// e_score_correction_bias, if it is given.
pub fn params(shard: &Shard<'_>, o: &Options, whole: bool, correction: Option<(u8, u8)>) -> Vec<Param> {
    let Shard { model, part, r, t } = *shard;
    let same = |name: &str| shard.whole(name, name);
    let all = Shard { r: 0, t: 1, ..*shard };
    let attn = if model.moe.as_ref().is_some_and(|m| m.fused) { "attn" } else { "self_attn" };
    let mut out = vec![same(names::INPUT_NORM)];
    match &model.attention {
        Attention::Grouped(a) => {
            let rows = a.q_rows() / t + 2 * (a.kv / t).max(1) * a.dim;
            let qkv = |of: [&str; 3], width: u64| cut::qkv_stacked(of.map(|n| shard.kind(n)), *a, width, r, t);
            out.push(Param::new(format!("{attn}.qkv_proj.weight"), &[rows, model.hidden], qkv(names::QKV, model.hidden)));
            if a.bias {
                out.push(Param::new(format!("{attn}.qkv_proj.bias"), &[rows], qkv(names::QKV_BIAS, 1)));
            }
            if a.out_bias {
                out.push(shard.whole(&format!("{attn}.o_proj.bias"), names::O_BIAS));
            }
            if a.sinks {
                out.push(shard.rows(&format!("{attn}.sinks"), names::SINKS));
            }
            if a.norm {
                out.extend([same(names::Q_NORM), same(names::K_NORM)]);
            }
        }
        Attention::Latent(a) => {
            match a.q_lora {
                Some(_) => {
                    match o.fused_qkv_a_proj {
                        true => out.push(all.stacked("self_attn.fused_qkv_a_proj.weight", &[names::Q_A, names::KV_A])),
                        false => out.extend([same(names::Q_A), same(names::KV_A)]),
                    }
                    out.extend([same(names::Q_A_NORM), shard.rows(names::Q_B, names::Q_B)]);
                }
                None => out.extend([shard.rows(names::Q, names::Q), same(names::KV_A)]),
            }
            out.extend([same(names::KV_A_NORM), shard.rows(names::KV_B, names::KV_B)]);
            if o.mla_derived_weights == Derived::Copies {
                let [nope, _, v] = a.dims;
                let name = |n: &str| format!("self_attn.mla_attn.mla_attn.{n}");
                let mut w_uk = shard.of_heads(&name("W_UK_T"), names::KV_B, nope + v, (0, nope));
                w_uk.shape = vec![a.heads / t, nope, a.kv_lora];
                out.extend([w_uk, shard.of_heads_transposed(&name("W_UV"), names::KV_B, nope + v, (nope, v))]);
            }
        }
    }
    out.extend([shard.columns(&format!("{attn}.o_proj.weight"), names::O), same(names::POST_NORM)]);
    let Some(moe) = model.moe.as_ref().filter(|_| part == Part::Layer(LayerType::Moe)) else {
        let [gate, up, down] = names::MLP;
        out.extend([shard.glu("mlp.gate_up_proj.weight", gate, up), shard.columns(down, down)]);
        return out;
    };
    let router = same(&moe.router());
    out.push(if moe.fp32_router { router.fp32() } else { router });
    if moe.fused {
        out.push(same(names::ROUTER_BIAS));
    }
    if moe.correction {
        let bias = same(&moe.correction_name());
        out.push(Param { dtype: correction.or(bias.dtype), ..bias });
    }
    if moe.shared > 0 {
        let shard = if whole { &all } else { shard };
        let [gate, up, down] = moe.shared_names();
        let name = format!("{}.{}.gate_up_proj.weight", moe.block, moe.shared_name);
        out.extend([shard.glu(&name, &gate, &up), shard.columns(&down, &down)]);
    }
    if moe.shared_gate {
        out.push(same(&moe.shared_gate_name()));
    }
    out
}

/// What a layer of the drafter has beside an ordinary one. Its embedding is the main model's, and no parameter; its head is its own.
pub fn mtp_params(shard: &Shard<'_>, padded: u64) -> Vec<Param> {
    let head = if shard.model.tied { names::EMBED } else { names::HEAD };
    let mut out: Vec<Param> =
        [names::E_NORM, names::H_NORM, names::EH, names::MTP_NORM].into_iter().map(|n| shard.whole(n, n)).collect();
    out.push(shard.vocab("shared_head.head.weight", head, padded));
    out
}
