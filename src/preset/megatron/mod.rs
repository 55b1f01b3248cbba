//! Megatron's parameters, as `named_parameters()` of each model chunk lists them.
//!
//! From Megatron-core 0.12 to 0.16: models/gpt/gpt_layer_specs.py (names of both specs), tensor_parallel/layers.py,
//! transformer/attention.py (order of linear_qkv), transformer/mlp.py, parallel_state.py (order of ranks), training/tokenizer
//! (vocabulary padding). Context and sequence parallelism change no parameter.
#![forbid(unsafe_code)]

mod experts;
mod layer;
mod place;

use super::mesh::{Axis, Mesh};
use super::model::{Attention, MOST_ELEMENTS, Model, names};
use super::pipeline::Placement;
use super::shard::{EMBED, HEAD, MERGER, MTP, NORM, PATCH, Shard, VISION, sections};
use super::side::Parts;
use super::spec::{List, Ranks, divides, for_experts, one, size};
use super::vision;
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
    /// All experts of a rank in one parameter a projection.
    #[serde(default)]
    moe_single_grouped_weight: bool,
    /// MindSpeed's.
    #[serde(default)]
    moe_tp_extend_ep: bool,
    /// Whether the MLA down projections are cut by rows: with local layers, and with Transformer-Engine's up to Megatron-core 0.13.
    #[serde(default)]
    mla_down_proj_cut: Option<bool>,
    /// Both MLA down projections in one.
    #[serde(default)]
    mla_down_proj_fusion: bool,
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
    /// Layers for multi-token prediction.
    #[serde(default)]
    mtp_num_layers: Option<u64>,
    /// Whose names a model with a vision tower has.
    #[serde(default)]
    vision_names: Option<VisionNames>,
    /// MindSpeed-MM's: layers of the vision tower of each stage.
    #[serde(default)]
    vision_num_layer_list: Option<List>,
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

/// Whose names a model with a vision tower has.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
enum VisionNames {
    #[default]
    Mbridge,
    /// MindSpeed-MM's.
    MindspeedMm,
    /// Megatron-Bridge's, whose vision tower is the Hugging Face module, whole on each rank.
    MegatronBridge,
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
    let mtp = o.mtp_num_layers.unwrap_or(0);
    let chunks = Placement {
        layers: model.text,
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
        mtp,
    }
    .chunks()?;
    let places = place::places(model, o, chunks)?;
    // A stage that has the output layer and not the embedding has an embedding of its own for it, and so has one that predicts. Megatron
    // keeps them equal to the first stage's, which is read.
    let copies = place::copies(model, o, &places, [padded / tp, model.hidden]);
    let head_copy = target && copies.iter().any(|c| c.name.ends_with("output_layer.weight"));
    let tower = |section: usize, shard: &Shard<'_>| match (&model.vision, o.vision_names.unwrap_or_default()) {
        (None, _) => vec![],
        (Some(_), VisionNames::MegatronBridge) => vision::whole(section, shard),
        (Some(v), VisionNames::Mbridge) => {
            let te = o.transformer_impl == Impl::TransformerEngine;
            vision::params(v, section, shard, if te { &vision::MBRIDGE } else { &vision::MBRIDGE_LOCAL })
        }
        (Some(v), VisionNames::MindspeedMm) => vision::params(v, section, shard, &vision::MINDSPEED),
    };
    let mut sections = sections(model, tp, |section, shard| match section {
        EMBED => vec![shard.vocab("embedding.word_embeddings.weight", names::EMBED, padded)],
        NORM => vec![shard.whole("decoder.final_layernorm.weight", names::NORM)],
        HEAD if !model.tied => vec![shard.vocab("output_layer.weight", names::HEAD, padded)],
        HEAD if head_copy => vec![shard.vocab("output_layer.weight", names::EMBED, padded)],
        HEAD => vec![],
        MTP => layer::mtp_params(shard),
        PATCH | VISION | MERGER => tower(section, shard),
        _ => layer::params(shard, o),
    });
    if let Some(moe) = &model.moe {
        let (mesh, section) = experts::section(model, moe, o, tp, pp)?;
        meshes.push(mesh);
        sections.push(section);
    }
    Ok(Parts {
        meshes,
        ranks: o.ranks.0.clone(),
        dtype: super::spec::dtype("params_dtype", o.params_dtype.as_deref(), model)?,
        zero_centered: o.layernorm_zero_centered_gamma,
        stages: place::slots(model, o, &places, target),
        sections,
        unused: if target { vec![] } else { copies },
        strip: "module.",
        views: &[],
        // From Megatron-core 0.17.1.
        renamed: &[(".mtp_model_layer.", ".transformer_layer.")],
    })
}

/// Layers for multi-token prediction that a side holds, of so many that the checkpoint has.
pub fn predictors(o: &Options, all: u64) -> Result<u64> {
    let given = o.mtp_num_layers.unwrap_or(0);
    if given > all {
        bail!(RS_ERR_INVALID, "mtp_num_layers is {given}; model.num_nextn_predict_layers, of the classes that have them, is {all}");
    }
    let mindspeed = [
        ("mla_weights \"mindspeed\" or \"mindspeed_qb\"", o.mla_weights != MlaWeights::Core),
        ("schedules_method", o.schedules_method.is_some()),
        ("noop_layers", o.noop_layers.is_some()),
    ];
    if let Some((member, _)) = mindspeed.iter().find(|m| given > 0 && m.1) {
        bail!(RS_ERR_UNSUPPORTED, "mtp_num_layers with {member}: MindSpeed's MTP is not built");
    }
    Ok(given)
}

/// Shards and copies that are `faster`, then stages and copies in the order that is asked for.
fn mesh(o: &Options, pp: u64, faster: &[(Axis, u64)], copies: u64) -> Result<Mesh> {
    let slower =
        if o.use_tp_pp_dp_mapping { [(Axis::Stage, pp), (Axis::Copy, copies)] } else { [(Axis::Copy, copies), (Axis::Stage, pp)] };
    Mesh::new(&[faster, &slower].concat(), o.ranks.0.len())
}

/// What Megatron forbids, and members that do not fit the model.
fn check(model: &Model, o: &Options, tp: u64) -> Result<()> {
    let given = [
        ("expert_model_parallel_size", o.expert_model_parallel_size != 1),
        ("expert_tensor_parallel_size", o.expert_tensor_parallel_size.is_some()),
        ("moe_tp_extend_ep", o.moe_tp_extend_ep),
        ("moe_grouped_gemm", o.moe_grouped_gemm),
        ("moe_use_legacy_grouped_gemm", o.moe_use_legacy_grouped_gemm),
        ("moe_single_grouped_weight", o.moe_single_grouped_weight),
    ];
    for_experts(model, &given)?;
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
            sizes.push(("the rows of linear_qkv, (num_attention_heads + 2 * num_query_groups) * head_dim,", h.rows()));
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
    if o.mla_down_proj_fusion {
        if o.mla_weights != MlaWeights::Core {
            bail!(RS_ERR_INVALID, "mla_down_proj_fusion goes with mla_weights \"core\": MindSpeed has a fusion of its own");
        }
        if !matches!(model.attention, Attention::Latent(l) if l.q_lora.is_some()) {
            bail!(RS_ERR_UNSUPPORTED, "mla_down_proj_fusion is for models with a q_lora_rank; {} has none", model.architecture);
        }
    }
    match &model.vision {
        None if o.vision_names.is_some() || o.vision_num_layer_list.is_some() => bail!(
            RS_ERR_INVALID,
            "vision_names and vision_num_layer_list are for models with a vision tower; {} has none",
            model.architecture
        ),
        Some(v) if o.vision_names != Some(VisionNames::MegatronBridge) => sizes.extend(v.cut_sizes()),
        _ => {}
    }
    divides("Megatron", "tensor_model_parallel_size", tp, &sizes)
}

fn down_proj_cut(o: &Options) -> bool {
    o.mla_down_proj_cut.unwrap_or(o.transformer_impl == Impl::Local)
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
