//! vLLM's parameters, as `named_parameters()` of a worker's model lists them after loading, unquantised.
//!
//! From vLLM 0.11 to 0.33: model_executor/models/{llama,qwen2,qwen3,mixtral,qwen2_moe,qwen3_moe,deepseek_v2}.py, layers/linear.py
//! (QKVParallelLinear, MergedColumnParallelLinear, RowParallelLinear), layers/fused_moe/layer.py, layers/vocab_parallel_embedding.py,
//! distributed/utils.py (get_pp_indices), distributed/parallel_state.py (order of ranks).
#![forbid(unsafe_code)]

use super::cut;
use super::experts::{self, Storage};
use super::mesh::{Axis, Mesh};
use super::model::{Attention, LayerType, MOST_ELEMENTS, Model, names};
use super::shard::{BACK, DENSE, EXPERTS, FRONT, MOE, Shard, back, sections, vocab};
use super::side::{Param, Parts, Section, Slot};
use super::spec::{List, Ranks, divides, for_experts, one, size};
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
    /// Layers of each stage.
    #[serde(default, rename = "VLLM_PP_LAYER_PARTITION")]
    partition: Option<List>,
    /// Vocabularies are padded to a multiple of it.
    #[serde(default = "padding")]
    vocab_padding_size: u64,
    /// Rows of the padded vocabulary, whatever gave it.
    #[serde(default)]
    padded_vocab_size: Option<u64>,
    /// Default: as vLLM has them. vllm-ascend's enable_shared_expert_dp makes them whole.
    #[serde(default)]
    shared_experts: Option<Shared>,
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

fn padding() -> u64 {
    64
}

/// What each rank holds.
pub fn parts(model: &Model, o: &Options) -> Result<Parts> {
    let tp = size("tensor_parallel_size", o.tensor_parallel_size)?;
    let pp = size("pipeline_parallel_size", o.pipeline_parallel_size)?;
    let dp = size("data_parallel_size", o.data_parallel_size)?;
    let replicas = size("replicas", o.replicas)?;
    let ranks = o.ranks.0.len();
    let mut meshes = vec![Mesh::new(&[(Axis::Shard, tp), (Axis::Stage, pp), (Axis::Copy, dp), (Axis::Copy, replicas)], ranks)?];
    let given = [
        ("enable_expert_parallel", o.enable_expert_parallel),
        ("expert_placement_strategy", o.expert_placement_strategy.is_some()),
        ("physical_to_logical_map", o.physical_to_logical_map.is_some()),
        ("expert_storage", o.expert_storage.is_some()),
        ("shared_experts", o.shared_experts.is_some()),
    ];
    for_experts(model, &given)?;
    let padded = match o.padded_vocab_size {
        Some(padded) => size("padded_vocab_size", padded)?,
        None => model.vocab.next_multiple_of(size("vocab_padding_size", o.vocab_padding_size)?),
    };
    if padded < model.vocab {
        bail!(RS_ERR_INVALID, "padded_vocab_size {padded} is less than vocab_size {}", model.vocab);
    }
    // Sequence-parallel experts: DeepSeek's shared ones are then whole on each rank.
    let sequence_parallel = o.enable_expert_parallel && tp > 1 && dp > 1;
    let can_be_whole = model.architecture.starts_with("Deepseek");
    if o.shared_experts.is_some() && !can_be_whole {
        bail!(RS_ERR_UNSUPPORTED, "shared_experts: those of {} are always cut", model.architecture);
    }
    let whole = o.shared_experts.map_or(sequence_parallel && can_be_whole, |s| s == Shared::Whole);
    check(model, padded, whole, tp)?;
    let oss = model.moe.as_ref().is_some_and(|m| m.fused);
    let embedding = if oss { "model.embedding.weight" } else { names::EMBED };
    let front = |r| vec![vocab(model, embedding, names::EMBED, padded, r, tp)];
    // The last stage of a model with tied embeddings has some of its own for its head.
    let copy = (pp > 1 && !everywhere(model)).then_some(names::EMBED);
    let back = |r| back(model, [names::NORM, names::HEAD], copy, padded, r, tp);
    let mut sections = sections(model, tp, front, back, |shard| layer_params(shard, whole));
    if model.moe.is_some() {
        meshes.push(Mesh::new(&[(Axis::Shard, tp), (Axis::Stage, pp), (Axis::Shard, dp), (Axis::Copy, replicas)], ranks)?);
        sections.extend(expert_sections(model, o, tp * dp)?);
    }
    Ok(Parts {
        stages: stages(model, &layers(model.layers.len() as u64, pp, o.partition.as_ref())?, sections.len() - EXPERTS),
        meshes,
        ranks: o.ranks.0.clone(),
        dtype: super::spec::dtype("dtype", o.dtype.as_deref(), model)?,
        zero_centered: false,
        sections,
        unused: vec![],
        strip: "",
        // Before 0.24.
        renamed: &[
            (".experts.w13_weight", ".experts.routed_experts.w13_weight"),
            (".experts.w2_weight", ".experts.routed_experts.w2_weight"),
            (".experts.w13_bias", ".experts.routed_experts.w13_bias"),
            (".experts.w2_bias", ".experts.routed_experts.w2_bias"),
        ],
    })
}

/// What vLLM forbids.
fn check(model: &Model, padded: u64, whole: bool, tp: u64) -> Result<()> {
    let mut sizes = model.cut_sizes(!whole);
    sizes.push(("vocab_size padded by vocab_padding_size to", padded));
    divides("vLLM", "tensor_parallel_size", tp, &sizes)?;
    if let Attention::Grouped(h) = model.attention {
        if h.kv % tp != 0 && tp % h.kv != 0 {
            bail!(
                RS_ERR_UNSUPPORTED,
                "tensor_parallel_size {tp}: vLLM wants num_key_value_heads {} to be a multiple or a divisor of it",
                h.kv
            );
        }
        if model.architecture.starts_with("Qwen2") && h.q * h.dim != model.hidden {
            bail!(
                RS_ERR_UNSUPPORTED,
                "model.head_dim {}: vLLM's Qwen2 ignores it and uses hidden_size / num_attention_heads, {}/{}",
                h.dim,
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

fn stages(model: &Model, counts: &[u64], expert_sections: usize) -> Vec<Vec<Slot>> {
    let everywhere = everywhere(model);
    let mut next = 0;
    let mut moe = 0;
    let mut out = vec![];
    for (stage, &count) in counts.iter().enumerate() {
        let mut slots = vec![];
        if stage == 0 || everywhere {
            slots.push(Slot::new(FRONT, 0, 0, String::new()));
        }
        for layer in next..next + count {
            let prefix = || format!("model.layers.{layer}.");
            if model.layers[layer as usize] == LayerType::Dense {
                slots.push(Slot::new(DENSE, layer, 0, prefix()));
                continue;
            }
            slots.push(Slot::new(MOE, layer, 0, prefix()));
            slots.push(Slot::new(EXPERTS + moe % expert_sections, layer, 0, prefix()));
            moe += 1;
        }
        if stage + 1 == counts.len() || everywhere {
            slots.push(Slot::new(BACK, 0, 0, String::new()));
        }
        next += count;
        out.push(slots);
    }
    out
}

/// The experts of all layers, or with a map of each, over the `ranks` of a stage of an engine.
fn expert_sections(model: &Model, o: &Options, ranks: u64) -> Result<Vec<Section>> {
    let Some(moe) = &model.moe else { return Ok(vec![]) };
    let storage = o.expert_storage.unwrap_or(Storage::Stacked);
    if moe.fused && storage != Storage::Stacked {
        bail!(RS_ERR_UNSUPPORTED, "expert_storage: {} is built stacked only", model.architecture);
    }
    let prefix = format!("{}.experts.routed_experts", moe.block);
    let fused = ["w13_weight", "w13_bias", "w2_weight", "w2_bias"].map(|n| format!("{prefix}.{n}"));
    let params = |slots: &[u32], cut: (u64, u64)| match moe.fused {
        true => experts::fused(model, moe, storage, fused.each_ref().map(String::as_str), slots, cut),
        false => experts::params(model, moe, storage, [&fused[0], &fused[2]], slots, cut),
    };
    if !matches!(storage, Storage::Stacked | Storage::StackedSwapped | Storage::StackedTransposed) {
        bail!(RS_ERR_INVALID, "expert_storage: vLLM's are stacked, stacked_swapped and stacked_transposed");
    }
    if !o.enable_expert_parallel {
        if o.physical_to_logical_map.is_some() || o.expert_placement_strategy.is_some_and(|s| s != Strategy::Linear) {
            bail!(
                RS_ERR_INVALID,
                "physical_to_logical_map and expert_placement_strategy go with enable_expert_parallel, which is not set"
            );
        }
        if moe.ffn % ranks != 0 {
            bail!(
                RS_ERR_UNSUPPORTED,
                "without enable_expert_parallel vLLM cuts experts over tensor_parallel_size * data_parallel_size = {ranks} ranks, which \
                 must divide their intermediate size {}",
                moe.ffn
            );
        }
        let all: Vec<u32> = (0..moe.experts as u32).collect();
        return Ok(vec![Section::new(1, (0..ranks).map(|x| params(&all, (x, ranks))).collect())]);
    }
    let section = |slots: &[Vec<u32>]| Section::new(1, slots.iter().map(|s| params(s, (0, 1))).collect());
    if moe.experts < ranks {
        bail!(RS_ERR_UNSUPPORTED, "enable_expert_parallel: {} experts on {ranks} ranks leave some without any", moe.experts);
    }
    if o.physical_to_logical_map.is_some() && o.expert_placement_strategy == Some(Strategy::RoundRobin) {
        bail!(RS_ERR_INVALID, "physical_to_logical_map contradicts expert_placement_strategy round_robin");
    }
    let Some(maps) = &o.physical_to_logical_map else {
        return Ok(vec![section(&match o.expert_placement_strategy.unwrap_or_default() {
            Strategy::Linear => experts::linear(moe.experts, ranks),
            Strategy::RoundRobin => experts::round_robin(moe.experts, ranks),
        })]);
    };
    let moe_layers = model.layers.iter().filter(|&&l| l == LayerType::Moe).count();
    if maps.len() != moe_layers {
        bail!(RS_ERR_INVALID, "physical_to_logical_map has {} lists, the model {moe_layers} layers with experts", maps.len());
    }
    let mut out = vec![];
    for (i, map) in maps.iter().enumerate() {
        let mut seen = vec![false; moe.experts as usize];
        for &e in map {
            match seen.get_mut(e as usize) {
                Some(seen) => *seen = true,
                None => bail!(RS_ERR_INVALID, "physical_to_logical_map[{i}] names expert {e} of {}", moe.experts),
            }
        }
        if map.len() as u64 % ranks != 0 || seen.contains(&false) {
            bail!(
                RS_ERR_INVALID,
                "physical_to_logical_map[{i}] has {} slots: it must name every expert, and be a multiple of the {ranks} ranks that share \
                 the experts",
                map.len()
            );
        }
        let per_rank = map.len() / ranks as usize;
        out.push(section(&map.chunks(per_rank).map(<[u32]>::to_vec).collect::<Vec<_>>()));
    }
    Ok(out)
}

/// These models have embedding, final norm and head on every stage.
fn everywhere(model: &Model) -> bool {
    ["Mixtral", "Qwen2Moe", "Qwen3Moe", "GptOss"].iter().any(|a| model.architecture.starts_with(a))
}

/// A shard of a layer, but for its routed experts. `whole`: whether shared experts are not cut.
fn layer_params(shard: &Shard<'_>, whole: bool) -> Vec<Param> {
    let Shard { model, layer, r, t } = *shard;
    let same = |name: &str| shard.whole(name, name);
    let attn = if model.moe.as_ref().is_some_and(|m| m.fused) { "attn" } else { "self_attn" };
    let mut out = vec![same(names::INPUT_NORM)];
    match &model.attention {
        Attention::Grouped(a) => {
            let rows = (a.q / t + 2 * (a.kv / t).max(1)) * a.dim;
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
                    out.push(shard.stacked("self_attn.fused_qkv_a_proj.weight", &[names::Q_A, names::KV_A]));
                    out.extend([same(names::Q_A_NORM), shard.rows(names::Q_B, names::Q_B)]);
                }
                None => out.extend([shard.rows(names::Q, names::Q), same(names::KV_A)]),
            }
            out.extend([same(names::KV_A_NORM), shard.rows(names::KV_B, names::KV_B)]);
        }
    }
    out.extend([shard.columns(&format!("{attn}.o_proj.weight"), names::O), same(names::POST_NORM)]);
    let Some(moe) = model.moe.as_ref().filter(|_| layer == LayerType::Moe) else {
        let [gate, up, down] = names::MLP;
        out.extend([shard.glu("mlp.gate_up_proj.weight", gate, up), shard.columns(down, down)]);
        return out;
    };
    out.push(same(&moe.router()));
    if moe.fused {
        out.push(same(names::ROUTER_BIAS));
    }
    if moe.correction {
        out.push(same(&moe.correction_name()));
    }
    if moe.shared > 0 {
        let shard = if whole { &Shard { r: 0, t: 1, ..*shard } } else { shard };
        let [gate, up, down] = moe.shared_names();
        let name = format!("{}.{}.gate_up_proj.weight", moe.block, moe.shared_name);
        out.extend([shard.glu(&name, &gate, &up), shard.columns(&down, &down)]);
    }
    if moe.shared_gate {
        out.push(same(&moe.shared_gate_name()));
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
