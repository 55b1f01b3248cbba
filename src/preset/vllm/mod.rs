//! vLLM's parameters, as `named_parameters()` of a worker's model lists them after loading, unquantised.
//!
//! From vLLM 0.11 to 0.33: model_executor/models/{llama,qwen2,qwen3,mixtral,qwen2_moe,qwen3_moe,deepseek_v2}.py, layers/linear.py
//! (QKVParallelLinear, MergedColumnParallelLinear, RowParallelLinear), layers/fused_moe/layer.py, layers/vocab_parallel_embedding.py,
//! distributed/utils.py (get_pp_indices), distributed/parallel_state.py (order of ranks).
#![forbid(unsafe_code)]

mod experts;
mod layer;

use super::experts::Storage;
use super::mesh::{Axis, Mesh};
use super::model::{Attention, LayerType, MOST_ELEMENTS, Model, names};
use super::shard::{self, EMBED, EXPERTS, HEAD, MERGER, MTP, NORM, PATCH, Shard, VISION, sections};
use super::side::{Parts, Slot};
use super::spec::{List, Ranks, divides, for_experts, one, size};
use super::vision;
use crate::abi::*;
use crate::error::{Result, bail};
use serde::Deserialize;

/// Members of a side of the framework `vllm`.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Options {
    ranks: Ranks,
    #[serde(default = "one")]
    tensor_parallel_size: u64,
    #[serde(default = "one")]
    pipeline_parallel_size: u64,
    #[serde(default = "one")]
    data_parallel_size: u64,
    /// Independent engines.
    #[serde(default = "one")]
    replicas: u64,
    #[serde(default)]
    enable_expert_parallel: bool,
    #[serde(default)]
    expert_placement_strategy: Option<Strategy>,
    /// Experts by slot, on the ranks of an engine one after the other: for all layers.
    #[serde(default)]
    physical_to_logical_map: Option<Vec<Vec<u32>>>,
    /// How w13 and w2 lie after loading.
    #[serde(default)]
    expert_storage: Option<Storage>,
    /// A rank's intermediate size of an expert as a kernel has rounded it up; up is in the second half of w13's rows.
    #[serde(default)]
    moe_padded_intermediate_size: Option<u64>,
    /// hidden_size as a kernel has rounded it up.
    #[serde(default)]
    moe_padded_hidden_size: Option<u64>,
    /// Default: as vLLM has them. vllm-ascend's enable_shared_expert_dp makes them whole.
    #[serde(default)]
    shared_experts: Option<Shared>,
    /// Default: fp32, as vLLM creates it; vllm-ascend and some paths cast it after loading.
    #[serde(default)]
    e_score_correction_bias_dtype: Option<String>,
    /// Whether both MLA down projections are one parameter.
    #[serde(default = "yes")]
    fused_qkv_a_proj: bool,
    /// What the parameters that are derived from kv_b_proj are.
    #[serde(default)]
    mla_derived_weights: Derived,
    /// Whether the model that predicts further tokens is there too, as model chunk 1.
    #[serde(default)]
    mtp_drafter: bool,
    /// How the vision tower is cut.
    #[serde(default)]
    mm_encoder_tp_mode: Option<Encoder>,
    /// Layers of each stage.
    #[serde(default, rename = "VLLM_PP_LAYER_PARTITION")]
    partition: Option<List>,
    /// Vocabularies are padded to a multiple of it.
    #[serde(default = "padding")]
    vocab_padding_size: u64,
    /// Rows of the padded vocabulary, whatever gave it.
    #[serde(default)]
    padded_vocab_size: Option<u64>,
    #[serde(default)]
    dtype: Option<String>,
}

/// Which rank has which expert.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
enum Strategy {
    #[default]
    Linear,
    RoundRobin,
}

/// Whether tensor parallelism cuts shared experts.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
enum Shared {
    Cut,
    Whole,
}

/// What W_UK_T and W_UV are.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
enum Derived {
    /// Views of kv_b_proj's memory, or nothing: vLLM's.
    #[default]
    Views,
    /// Memory of their own: vllm-ascend's.
    Copies,
}

/// How ranks share a vision tower.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
enum Encoder {
    /// Each has a shard.
    Weights,
    /// Each has all of it, for a part of the images.
    Data,
}

/// In what vLLM's classes differ beyond what their config tells.
#[derive(Default)]
struct Class {
    /// Every stage has embedding and head.
    embedding_everywhere: bool,
    /// Every stage has the final norm.
    norm_everywhere: bool,
    /// With sequence-parallel experts, shared ones are whole on each rank.
    whole_shared_experts: bool,
    /// A head's size is hidden_size / num_attention_heads whatever head_dim says.
    no_head_dim: bool,
}

impl Class {
    fn of(model: &Model) -> Class {
        let class = Class::default();
        match model.architecture.as_str() {
            "MixtralForCausalLM" | "Qwen3MoeForCausalLM" | "GptOssForCausalLM" => {
                Class { embedding_everywhere: true, norm_everywhere: true, ..class }
            }
            "Qwen2MoeForCausalLM" => Class { embedding_everywhere: true, norm_everywhere: true, no_head_dim: true, ..class },
            "Qwen3NextForCausalLM" => Class { embedding_everywhere: true, whole_shared_experts: true, ..class },
            "DeepseekV2ForCausalLM" | "DeepseekV3ForCausalLM" => Class { whole_shared_experts: true, ..class },
            "Qwen2ForCausalLM" | "Qwen2_5_VLForConditionalGeneration" => Class { no_head_dim: true, ..class },
            _ => class,
        }
    }
}

fn yes() -> bool {
    true
}

fn padding() -> u64 {
    64
}

/// What each rank holds; `target`: whether the side is written.
pub fn parts(model: &Model, o: &Options, target: bool) -> Result<Parts> {
    let tp = size("tensor_parallel_size", o.tensor_parallel_size)?;
    let pp = size("pipeline_parallel_size", o.pipeline_parallel_size)?;
    let dp = size("data_parallel_size", o.data_parallel_size)?;
    let replicas = size("replicas", o.replicas)?;
    let ranks = o.ranks.0.len();
    let mut meshes = vec![Mesh::new(&[(Axis::Shard, tp), (Axis::Stage, pp), (Axis::Copy, dp), (Axis::Copy, replicas)], ranks)?];
    members(model, o, target)?;
    let correction = o.e_score_correction_bias_dtype.as_deref();
    let correction = correction.map(|name| super::spec::dtype("e_score_correction_bias_dtype", Some(name), model)).transpose()?;
    let padded = match o.padded_vocab_size {
        Some(padded) => size("padded_vocab_size", padded)?,
        None => model.vocab.next_multiple_of(size("vocab_padding_size", o.vocab_padding_size)?),
    };
    if padded < model.vocab {
        bail!(RS_ERR_INVALID, "padded_vocab_size {padded} is less than vocab_size {}", model.vocab);
    }
    let class = Class::of(model);
    if o.shared_experts.is_some() && !class.whole_shared_experts {
        bail!(RS_ERR_UNSUPPORTED, "shared_experts: those of {} are always cut", model.architecture);
    }
    let sequence_parallel = o.enable_expert_parallel && tp > 1 && dp > 1;
    let whole = o.shared_experts.map_or(sequence_parallel && class.whole_shared_experts, |s| s == Shared::Whole);
    check(model, o, padded, whole, tp)?;
    let oss = model.moe.as_ref().is_some_and(|m| m.fused);
    let embedding = if oss { "model.embedding.weight" } else { names::EMBED };
    // The last stage of a model with tied embeddings has some of its own for its head.
    let copy = pp > 1 && !class.embedding_everywhere;
    let data = o.mm_encoder_tp_mode == Some(Encoder::Data);
    let mut sections = sections(model, tp, |section, shard| match section {
        EMBED => vec![shard.vocab(embedding, names::EMBED, padded)],
        NORM => vec![shard.whole(names::NORM, names::NORM)],
        HEAD if !model.tied => vec![shard.vocab(names::HEAD, names::HEAD, padded)],
        HEAD if copy => vec![shard.vocab(names::EMBED, names::EMBED, padded)],
        HEAD => vec![],
        MTP => layer::mtp_params(shard, padded),
        PATCH | VISION | MERGER => {
            let shard = if data { &Shard { r: 0, t: 1, ..*shard } } else { shard };
            model.vision.as_ref().map_or(vec![], |v| vision::params(v, section, shard, &vision::VLLM))
        }
        _ => layer::params(shard, o, whole, correction),
    });
    if model.moe.is_some() {
        meshes.push(Mesh::new(&[(Axis::Shard, tp), (Axis::Stage, pp), (Axis::Shard, dp), (Axis::Copy, replicas)], ranks)?);
        sections.extend(experts::sections(model, o, tp * dp)?);
    }
    Ok(Parts {
        stages: stages(model, o, &layers(model.text, pp, o.partition.as_ref())?, sections.len() - EXPERTS),
        meshes,
        ranks: o.ranks.0.clone(),
        dtype: super::spec::dtype("dtype", o.dtype.as_deref(), model)?,
        zero_centered: false,
        sections,
        unused: vec![],
        strip: "",
        views: match o.mla_derived_weights {
            Derived::Views => &["*.W_UV", "*.W_UK_T"],
            Derived::Copies => &[],
        },
        // Before 0.24.
        renamed: &[
            (".experts.w13_weight", ".experts.routed_experts.w13_weight"),
            (".experts.w2_weight", ".experts.routed_experts.w2_weight"),
            (".experts.w13_bias", ".experts.routed_experts.w13_bias"),
            (".experts.w2_bias", ".experts.routed_experts.w2_bias"),
        ],
    })
}

/// Layers for multi-token prediction that a side holds, of so many that the checkpoint has.
pub fn predictors(o: &Options, all: u64) -> Result<u64> {
    if o.mtp_drafter && all == 0 {
        bail!(RS_ERR_INVALID, "mtp_drafter: model.num_nextn_predict_layers, of the classes that have it, is 0 or not given");
    }
    Ok(if o.mtp_drafter { all } else { 0 })
}

/// Refuses members that do not fit the model or the side.
fn members(model: &Model, o: &Options, target: bool) -> Result<()> {
    let given = [
        ("enable_expert_parallel", o.enable_expert_parallel),
        ("expert_placement_strategy", o.expert_placement_strategy.is_some()),
        ("physical_to_logical_map", o.physical_to_logical_map.is_some()),
        ("expert_storage", o.expert_storage.is_some()),
        ("shared_experts", o.shared_experts.is_some()),
        ("moe_padded_intermediate_size", o.moe_padded_intermediate_size.is_some()),
        ("moe_padded_hidden_size", o.moe_padded_hidden_size.is_some()),
    ];
    for_experts(model, &given)?;
    if o.e_score_correction_bias_dtype.is_some() && !model.moe.as_ref().is_some_and(|m| m.correction) {
        bail!(RS_ERR_INVALID, "e_score_correction_bias_dtype: the routers of {} have no such bias", model.architecture);
    }
    let copies = o.mla_derived_weights == Derived::Copies;
    let latent = matches!(model.attention, Attention::Latent(_));
    for (member, given) in [("mla_derived_weights \"copies\"", copies), ("fused_qkv_a_proj false", !o.fused_qkv_a_proj)] {
        if given && !latent {
            bail!(RS_ERR_INVALID, "{member} is for models with MLA; {} has none", model.architecture);
        }
    }
    if copies && !target {
        bail!(
            RS_ERR_UNSUPPORTED,
            "mla_derived_weights \"copies\" is for a target: a source's kv_b_proj has all that they have; leave it out"
        );
    }
    if o.mm_encoder_tp_mode.is_some() && model.vision.is_none() {
        bail!(RS_ERR_INVALID, "mm_encoder_tp_mode is for models with a vision tower; {} has none", model.architecture);
    }
    Ok(())
}

/// What vLLM forbids.
fn check(model: &Model, o: &Options, padded: u64, whole: bool, tp: u64) -> Result<()> {
    let mut sizes = model.cut_sizes(!whole);
    sizes.push(("vocab_size padded by vocab_padding_size to", padded));
    if let Some(v) = model.vision.as_ref().filter(|_| o.mm_encoder_tp_mode != Some(Encoder::Data)) {
        sizes.extend(v.cut_sizes());
    }
    divides("vLLM", "tensor_parallel_size", tp, &sizes)?;
    if let Attention::Grouped(h) = model.attention {
        if h.kv % tp != 0 && tp % h.kv != 0 {
            bail!(
                RS_ERR_UNSUPPORTED,
                "tensor_parallel_size {tp}: vLLM wants num_key_value_heads {} to be a multiple or a divisor of it",
                h.kv
            );
        }
        if Class::of(model).no_head_dim && h.q * h.dim != model.hidden {
            bail!(
                RS_ERR_UNSUPPORTED,
                "model.head_dim {}: vLLM's {} ignores it and uses hidden_size / num_attention_heads, {}/{}",
                h.dim,
                model.architecture,
                model.hidden,
                h.q
            );
        }
    }
    if padded.saturating_mul(model.hidden) > MOST_ELEMENTS {
        bail!(RS_ERR_INVALID, "vocab_padding_size: a vocabulary of {padded} rows is too large");
    }
    Ok(())
}

/// Layers of each stage: what does not divide goes, one layer each, to the stages before the last, from behind.
fn layers(all: u64, pp: u64, partition: Option<&List>) -> Result<Vec<u64>> {
    if let Some(List(list)) = partition {
        if list.len() as u64 != pp || list.iter().sum::<u64>() != all {
            bail!(
                RS_ERR_INVALID,
                "VLLM_PP_LAYER_PARTITION {list:?} must have pipeline_parallel_size {pp} numbers whose sum is num_hidden_layers {all}"
            );
        }
        return Ok(list.clone());
    }
    if pp > all {
        bail!(RS_ERR_INVALID, "pipeline_parallel_size {pp} is more than num_hidden_layers {all}");
    }
    let rest = all % pp;
    Ok((0..pp).map(|p| all / pp + u64::from(p + 1 < pp && p + 1 + rest >= pp)).collect())
}

fn stages(model: &Model, o: &Options, counts: &[u64], expert_sections: usize) -> Vec<Vec<Slot>> {
    let class = Class::of(model);
    let text = if model.vision.is_some() { "language_model." } else { "" };
    // Layers with experts so far: each has its own section of them, or all have one.
    let mut moe = 0;
    let mut next = 0;
    let mut out = vec![];
    for (stage, &count) in counts.iter().enumerate() {
        let last = stage + 1 == counts.len();
        let one = |there: bool, section: usize, prefix: &str| there.then(|| Slot::new(section, 0, 0, prefix.to_string()));
        let mut slots: Vec<Slot> = one(model.vision.is_some(), PATCH, "").into_iter().collect();
        let tower = (0..).zip(model.vision_layers());
        slots.extend(tower.map(|(i, layer)| Slot::new(VISION, layer, 0, format!("{}{i}.", vision::VLLM.layers))));
        slots.extend(one(model.vision.is_some(), MERGER, ""));
        slots.extend(one(stage == 0 || class.embedding_everywhere, EMBED, text));
        for layer in next..next + count {
            let experts = EXPERTS + moe % expert_sections.max(1);
            slots.extend(shard::slots(model, layer, 0, &format!("{text}model.layers.{layer}."), experts));
            moe += usize::from(model.layer(layer) == LayerType::Moe);
        }
        slots.extend(one(last || class.norm_everywhere, NORM, text));
        slots.extend(one(last || class.embedding_everywhere, HEAD, text));
        if last && o.mtp_drafter {
            for layer in model.mtp_layers() {
                // A map has no list for it: the section after those of the map's.
                let prefix = format!("model.layers.{layer}.");
                slots.push(Slot::new(MTP, layer, 1, prefix.clone()));
                slots.extend(shard::slots(model, layer, 1, &format!("{prefix}mtp_block."), EXPERTS + expert_sections.max(1) - 1));
            }
        }
        next += count;
        out.push(slots);
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_stage_is_spared() {
        let even = |all, pp| layers(all, pp, None).unwrap();
        assert_eq!(even(61, 4), [15, 15, 16, 15]);
        assert_eq!(even(94, 4), [23, 24, 24, 23]);
        assert_eq!(even(31, 4), [8, 8, 8, 7]);
        assert_eq!(even(32, 4), [8, 8, 8, 8]);
        assert_eq!(even(5, 1), [5]);
        assert_eq!(layers(5, 2, Some(&List(vec![1, 4]))).unwrap(), [1, 4]);
        assert!(layers(5, 2, Some(&List(vec![2, 2]))).unwrap_err().text().contains("VLLM_PP_LAYER_PARTITION"));
        assert!(layers(5, 6, None).is_err());
    }
}
