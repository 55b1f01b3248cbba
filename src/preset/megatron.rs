//! Megatron's parameters, as `named_parameters()` of each model chunk lists them.
//!
//! From Megatron-core 0.12 to 0.16: models/gpt/gpt_layer_specs.py (names of both specs), tensor_parallel/layers.py,
//! transformer/attention.py (order of linear_qkv), transformer/mlp.py, parallel_state.py (order of ranks), training/tokenizer
//! (vocabulary padding). Context and sequence parallelism change no parameter.
#![forbid(unsafe_code)]

use super::cut;
use super::experts::{self, Storage};
use super::mesh::{Axis, Mesh};
use super::model::{Attention, Latent, LayerType, MOST_ELEMENTS, Model, Moe, names};
use super::pipeline::{Chunk, Placement};
use super::shard::{BACK, DENSE, EXPERTS, FRONT, MOE, Shard, back, sections, vocab};
use super::side::{Param, Parts, Section, Slot, Unused};
use super::spec::{List, Ranks, divides, for_experts, one, size};
use crate::abi::*;
use crate::error::{Result, bail};
use serde::Deserialize;

/// Members of a side of the framework `megatron`.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Options {
    ranks: Ranks,
    #[serde(default = "one")]
    tensor_model_parallel_size: u64,
    #[serde(default = "one")]
    pipeline_model_parallel_size: u64,
    #[serde(default)]
    virtual_pipeline_model_parallel_size: Option<u64>,
    #[serde(default = "one")]
    context_parallel_size: u64,
    /// Default: what the ranks give.
    #[serde(default)]
    data_parallel_size: Option<u64>,
    #[serde(default = "one")]
    expert_model_parallel_size: u64,
    /// Default: that of the rest.
    #[serde(default)]
    expert_tensor_parallel_size: Option<u64>,
    #[serde(default)]
    moe_grouped_gemm: bool,
    #[serde(default)]
    moe_use_legacy_grouped_gemm: bool,
    /// MindSpeed's.
    #[serde(default)]
    moe_tp_extend_ep: bool,
    /// Whether the MLA down projections are cut by rows: with local layers, and with Transformer-Engine's up to Megatron-core 0.13.
    #[serde(default)]
    mla_down_proj_cut: Option<bool>,
    /// Whose names and fusions MLA has.
    #[serde(default)]
    mla_weights: MlaWeights,
    /// MindSpeed's: the up projections' parts of each head on their own.
    #[serde(default)]
    mla_mm_split: bool,
    /// MindSpeed's.
    #[serde(default)]
    schedules_method: Option<Schedule>,
    #[serde(default)]
    use_tp_pp_dp_mapping: bool,
    #[serde(default)]
    transformer_impl: Impl,
    #[serde(default)]
    num_layers_in_first_pipeline_stage: Option<u64>,
    #[serde(default)]
    num_layers_in_last_pipeline_stage: Option<u64>,
    #[serde(default)]
    account_for_embedding_in_pipeline_split: bool,
    #[serde(default)]
    account_for_loss_in_pipeline_split: bool,
    #[serde(default)]
    pipeline_model_parallel_layout: Option<String>,
    #[serde(default)]
    num_layer_list: Option<List>,
    #[serde(default)]
    noop_layers: Option<List>,
    #[serde(default = "divisor")]
    make_vocab_size_divisible_by: u64,
    #[serde(default)]
    padded_vocab_size: Option<u64>,
    #[serde(default)]
    params_dtype: Option<String>,
    /// Norms hold their weight minus one.
    #[serde(default)]
    layernorm_zero_centered_gamma: bool,
}

/// Whose layers; it decides where norms are.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
enum Impl {
    #[default]
    TransformerEngine,
    Local,
}

/// Whose names and fusions the projections of multi-head latent attention have.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
enum MlaWeights {
    /// Megatron-core's.
    #[default]
    Core,
    /// MindSpeed-LLM's: one linear_qkv for both down projections, whole on each rank.
    Mindspeed,
    /// The same with linear_qb and linear_kvb, beside Megatron-core 0.8.
    MindspeedQb,
}

/// Pipelines that go another way.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
enum Schedule {
    /// Two chunks a stage, the second in falling order: the first stage has both ends.
    Dualpipev,
}

fn divisor() -> u64 {
    128
}

/// What each rank holds; `target`: whether the side is written.
pub fn parts(model: &Model, o: &Options, target: bool) -> Result<Parts> {
    let tp = size("tensor_model_parallel_size", o.tensor_model_parallel_size)?;
    let pp = size("pipeline_model_parallel_size", o.pipeline_model_parallel_size)?;
    let cp = size("context_parallel_size", o.context_parallel_size)?;
    let vp = o.virtual_pipeline_model_parallel_size.map(|n| size("virtual_pipeline_model_parallel_size", n)).transpose()?;
    let one_copy = tp.saturating_mul(pp).saturating_mul(cp);
    let dp = match o.data_parallel_size {
        Some(given) => size("data_parallel_size", given)?,
        None => (o.ranks.0.len() as u64 / one_copy).max(1),
    };
    let mut meshes = vec![mesh(o, pp, &[(Axis::Shard, tp), (Axis::Copy, cp)], dp)?];
    check(model, o, tp)?;
    let padded = padded(model, o, tp)?;
    let chunks = Placement {
        layers: model.layers.len() as u64,
        stages: pp,
        chunks: vp,
        ends: [
            o.num_layers_in_first_pipeline_stage.map(|n| size("num_layers_in_first_pipeline_stage", n)).transpose()?,
            o.num_layers_in_last_pipeline_stage.map(|n| size("num_layers_in_last_pipeline_stage", n)).transpose()?,
        ],
        account: [o.account_for_embedding_in_pipeline_split, o.account_for_loss_in_pipeline_split],
        layout: o.pipeline_model_parallel_layout.as_deref(),
        list: o.num_layer_list.as_ref().map(|l| &l.0[..]),
        v_shaped: o.schedules_method == Some(Schedule::Dualpipev),
        noops: o.noop_layers.as_ref().map_or(&[], |l| &l.0[..]),
    }
    .chunks()?;
    // The last stage has an embedding of its own for its output layer. Megatron keeps it equal to the first stage's, which is read.
    let copy = model.tied && pp > 1;
    let v_shaped = o.schedules_method == Some(Schedule::Dualpipev);
    if copy && v_shaped {
        bail!(RS_ERR_UNSUPPORTED, "schedules_method dualpipev: not built for tied embeddings");
    }
    let unused = Unused {
        stage: pp - 1,
        chunk: chunks[0].len() as u32 - 1,
        name: "output_layer.weight".to_string(),
        shape: vec![padded / tp, model.hidden],
    };
    let front = |r| vec![vocab(model, "embedding.word_embeddings.weight", names::EMBED, padded, r, tp)];
    let last = ["decoder.final_layernorm.weight", "output_layer.weight"];
    let back = |r| back(model, last, (copy && target).then_some(last[1]), padded, r, tp);
    let mut sections = sections(model, tp, front, back, |shard| layer_params(shard, o));
    if let Some(moe) = &model.moe {
        let (mesh, section) = experts(model, moe, o, tp, pp)?;
        meshes.push(mesh);
        sections.push(section);
    }
    let given = [
        ("expert_model_parallel_size", o.expert_model_parallel_size != 1),
        ("expert_tensor_parallel_size", o.expert_tensor_parallel_size.is_some()),
        ("moe_tp_extend_ep", o.moe_tp_extend_ep),
        ("moe_grouped_gemm", o.moe_grouped_gemm),
        ("moe_use_legacy_grouped_gemm", o.moe_use_legacy_grouped_gemm),
    ];
    for_experts(model, &given)?;
    Ok(Parts {
        meshes,
        ranks: o.ranks.0.clone(),
        dtype: super::spec::dtype("params_dtype", o.params_dtype.as_deref(), model)?,
        zero_centered: o.layernorm_zero_centered_gamma,
        stages: chunks.iter().map(|c| slots(model, c)).collect(),
        sections,
        unused: if copy && !target { vec![unused] } else { vec![] },
        strip: "module.",
        renamed: &[],
    })
}

/// Shards and copies that are `faster`, then stages and copies in the order that is asked for.
fn mesh(o: &Options, pp: u64, faster: &[(Axis, u64)], copies: u64) -> Result<Mesh> {
    let slower =
        if o.use_tp_pp_dp_mapping { [(Axis::Stage, pp), (Axis::Copy, copies)] } else { [(Axis::Copy, copies), (Axis::Stage, pp)] };
    Mesh::new(&[faster, &slower].concat(), o.ranks.0.len())
}

/// What Megatron forbids.
fn check(model: &Model, o: &Options, tp: u64) -> Result<()> {
    let mut sizes = model.cut_sizes(true);
    match &model.attention {
        Attention::Grouped(h) => {
            if h.kv % tp != 0 && tp % h.kv != 0 {
                bail!(
                    RS_ERR_UNSUPPORTED,
                    "tensor_model_parallel_size {tp}: Megatron wants num_query_groups (num_key_value_heads) {} to be a multiple of it, or \
                     from Megatron-core 0.16 a divisor",
                    h.kv
                );
            }
            let rows = (h.q + 2 * h.kv) * h.dim;
            sizes.push(("the rows of linear_qkv, (num_attention_heads + 2 * num_query_groups) * head_dim,", rows));
        }
        Attention::Latent(l) if down_proj_cut(o) && o.mla_weights == MlaWeights::Core => {
            sizes.push(("kv_lora_rank + qk_rope_head_dim", l.kv_lora + l.dims[1]));
            sizes.push(("q_lora_rank", l.q_lora.unwrap_or(0)));
        }
        Attention::Latent(l) if o.mla_weights != MlaWeights::Core && l.q_lora.is_none() && tp > 1 => bail!(
            RS_ERR_UNSUPPORTED,
            "tensor_model_parallel_size {tp}: MindSpeed's linear_qkv holds all of q where there is no q_lora_rank, which works with 1 only"
        ),
        Attention::Latent(_) => {}
    }
    if o.layernorm_zero_centered_gamma && o.transformer_impl == Impl::Local {
        bail!(RS_ERR_INVALID, "layernorm_zero_centered_gamma: Megatron's local RMSNorm has none; it goes with transformer_engine");
    }
    if o.mla_mm_split && o.mla_weights == MlaWeights::Core {
        bail!(RS_ERR_INVALID, "mla_mm_split goes with mla_weights \"mindspeed\" or \"mindspeed_qb\"");
    }
    divides("Megatron", "tensor_model_parallel_size", tp, &sizes)
}

fn down_proj_cut(o: &Options) -> bool {
    o.mla_down_proj_cut.unwrap_or(o.transformer_impl == Impl::Local)
}

/// The experts' grid, and what each shard of it holds of every layer that has any.
fn experts(model: &Model, moe: &Moe, o: &Options, tp: u64, pp: u64) -> Result<(Mesh, Section)> {
    let given = size("expert_model_parallel_size", o.expert_model_parallel_size)?;
    let (ep, etp) = match o.moe_tp_extend_ep {
        true if o.expert_tensor_parallel_size.is_some_and(|n| n != 1) => {
            bail!(RS_ERR_INVALID, "moe_tp_extend_ep contradicts expert_tensor_parallel_size: its experts are not cut")
        }
        true => (given * tp, 1),
        false => (given, size("expert_tensor_parallel_size", o.expert_tensor_parallel_size.unwrap_or(tp))?),
    };
    let ranks = o.ranks.0.len() as u64;
    let one_copy = ep.saturating_mul(etp).saturating_mul(pp);
    if ranks % one_copy != 0 {
        bail!(
            RS_ERR_INVALID,
            "ranks: {ranks} ranks are no multiple of expert_tensor_parallel_size {etp} (if it is not given, that of the rest) * \
             expert_model_parallel_size {ep} * pipeline_model_parallel_size {pp}"
        );
    }
    let copies = ranks / one_copy;
    let mesh = mesh(o, pp, &[(Axis::Shard, etp * ep)], copies)?;
    if o.use_tp_pp_dp_mapping && etp * ep != tp * o.context_parallel_size {
        bail!(
            RS_ERR_INVALID,
            "use_tp_pp_dp_mapping: Megatron wants expert tensor {etp} * expert {ep} parallel sizes to be tensor {tp} * context {} ones",
            o.context_parallel_size
        );
    }
    for (what, n, by) in [("experts", moe.experts, ep), ("the experts' intermediate size", moe.ffn, etp)] {
        if n % by != 0 {
            bail!(RS_ERR_UNSUPPORTED, "expert parallel sizes {ep} and tensor {etp}: Megatron wants {by} to divide {what} {n}");
        }
    }
    let legacy = o.moe_tp_extend_ep || o.moe_use_legacy_grouped_gemm || (o.moe_grouped_gemm && o.transformer_impl == Impl::Local);
    let (storage, names) = if legacy {
        (Storage::Grouped, ["mlp.experts.weight1", "mlp.experts.weight2"])
    } else if o.moe_grouped_gemm {
        (Storage::TeGrouped, ["mlp.experts.linear_fc1.weight{}", "mlp.experts.linear_fc2.weight{}"])
    } else {
        let names = ["mlp.experts.local_experts.{}.linear_fc1.weight", "mlp.experts.local_experts.{}.linear_fc2.weight"];
        (Storage::Sequential, names)
    };
    if moe.fused && storage != Storage::TeGrouped {
        bail!(RS_ERR_UNSUPPORTED, "{}: only moe_grouped_gemm with Transformer-Engine is built", model.architecture);
    }
    let biases = ["mlp.experts.linear_fc1.bias{}", "mlp.experts.linear_fc2.bias{}"];
    let of = experts::linear(moe.experts, ep);
    let shard = |s: u64| {
        let (slots, cut) = (&of[(s / etp) as usize], (s % etp, etp));
        match moe.fused {
            true => experts::fused(model, moe, storage, [names[0], biases[0], names[1], biases[1]], slots, cut),
            false => experts::params(model, moe, storage, names, slots, cut),
        }
    };
    Ok((mesh, Section::new(1, (0..ep * etp).map(shard).collect())))
}

/// Rows of the vocabulary over all shards.
fn padded(model: &Model, o: &Options, tp: u64) -> Result<u64> {
    let padded = match o.padded_vocab_size {
        None => model.vocab.next_multiple_of(size("make_vocab_size_divisible_by", o.make_vocab_size_divisible_by)? * tp),
        Some(padded) => size("padded_vocab_size", padded)?,
    };
    if padded.saturating_mul(model.hidden) > MOST_ELEMENTS {
        bail!(RS_ERR_INVALID, "make_vocab_size_divisible_by and padded_vocab_size: a vocabulary of {padded} rows is too large");
    }
    if padded < model.vocab || padded % tp != 0 {
        bail!(
            RS_ERR_INVALID,
            "padded_vocab_size {padded} must be at least vocab_size {} and a multiple of tensor_model_parallel_size {tp}",
            model.vocab
        );
    }
    Ok(padded)
}

fn slots(model: &Model, chunks: &[Chunk]) -> Vec<Slot> {
    let mut out = vec![];
    for (i, chunk) in (0..).zip(chunks) {
        if chunk.front {
            out.push(Slot::new(FRONT, 0, i, String::new()));
        }
        for (local, layer) in chunk.layers.iter().enumerate().filter_map(|(i, l)| Some((i, (*l)?))) {
            let sections: &[usize] = if model.layers[layer as usize] == LayerType::Dense { &[DENSE] } else { &[MOE, EXPERTS] };
            out.extend(sections.iter().map(|&s| Slot::new(s, layer, i, format!("decoder.layers.{local}."))));
        }
        if chunk.back {
            out.push(Slot::new(BACK, 0, i, String::new()));
        }
    }
    out
}

/// A shard of a layer, but for its routed experts.
fn layer_params(shard: &Shard<'_>, o: &Options) -> Vec<Param> {
    let Shard { model, r, t, .. } = *shard;
    let te = o.transformer_impl == Impl::TransformerEngine;
    let named = |te_name: &'static str, local: &'static str| if te { te_name } else { local };
    let mut out = vec![];
    match &model.attention {
        Attention::Grouped(a) => {
            let input_norm = named("self_attention.linear_qkv.layer_norm_weight", "input_layernorm.weight");
            out.push(shard.whole(input_norm, names::INPUT_NORM));
            let rows = (a.q + 2 * a.kv) * a.dim / t;
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
            out.push(shard.whole("input_layernorm.weight", names::INPUT_NORM));
            let down = |param: &str, tensor: &str| {
                if down_proj_cut(o) { shard.rows(param, tensor) } else { shard.whole(param, tensor) }
            };
            if a.q_lora.is_some() {
                let norm = named("self_attention.linear_q_up_proj.layer_norm_weight", "self_attention.q_layernorm.weight");
                out.extend([
                    down("self_attention.linear_q_down_proj.weight", names::Q_A),
                    shard.whole(norm, names::Q_A_NORM),
                    shard.rows("self_attention.linear_q_up_proj.weight", names::Q_B),
                ]);
            } else {
                out.push(shard.rows("self_attention.linear_q_proj.weight", names::Q));
            }
            let norm = named("self_attention.linear_kv_up_proj.layer_norm_weight", "self_attention.kv_layernorm.weight");
            out.extend([
                down("self_attention.linear_kv_down_proj.weight", names::KV_A),
                shard.whole(norm, names::KV_A_NORM),
                shard.rows("self_attention.linear_kv_up_proj.weight", names::KV_B),
            ]);
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
        shard.stacked("self_attention.linear_qkv.weight", &[first, names::KV_A]),
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
    let Shard { model, layer, .. } = *shard;
    let mut out = vec![];
    let Some(moe) = model.moe.as_ref().filter(|_| layer == LayerType::Moe) else {
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
