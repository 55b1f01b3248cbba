//! The experts of a vLLM side.
#![forbid(unsafe_code)]

use super::{Options, Strategy};
use crate::abi::*;
use crate::error::{Result, bail};
use crate::preset::experts::{self, Storage};
use crate::preset::model::{LayerType, MOST_ELEMENTS, Model};
use crate::preset::side::Section;
use crate::preset::spec::size;

/// The experts of all layers, or with a map of each and then of those that predict, over the `ranks` of a stage of an engine.
pub fn sections(model: &Model, o: &Options, ranks: u64) -> Result<Vec<Section>> {
    let Some(moe) = &model.moe else { return Ok(vec![]) };
    let storage = o.expert_storage.unwrap_or(Storage::Stacked);
    if moe.fused && storage != Storage::Stacked {
        bail!(RS_ERR_UNSUPPORTED, "expert_storage: {} is built stacked only", model.architecture);
    }
    let local = if o.enable_expert_parallel { moe.ffn } else { moe.ffn / ranks };
    let stored = [
        padded("moe_padded_intermediate_size", o.moe_padded_intermediate_size, local)?,
        padded("moe_padded_hidden_size", o.moe_padded_hidden_size, model.hidden)?,
    ];
    let most = o.physical_to_logical_map.iter().flatten().map(Vec::len).max().unwrap_or(0).max(moe.experts as usize) as u64;
    if stored[0].saturating_mul(stored[1]).saturating_mul(2 * most) > MOST_ELEMENTS {
        bail!(
            RS_ERR_INVALID,
            "moe_padded_intermediate_size and moe_padded_hidden_size {stored:?}: {most} such experts are too large"
        );
    }
    if moe.fused && stored != [local, model.hidden] {
        bail!(RS_ERR_UNSUPPORTED, "moe_padded_intermediate_size, moe_padded_hidden_size: not built for {}", model.architecture);
    }
    let prefix = format!("{}.experts.routed_experts", moe.block);
    let fused = ["w13_weight", "w13_bias", "w2_weight", "w2_bias"].map(|n| format!("{prefix}.{n}"));
    let params = |slots: &[u32], cut: (u64, u64)| match moe.fused {
        true => experts::fused(model, moe, storage, fused.each_ref().map(String::as_str), slots, cut),
        false => experts::params(model, moe, storage, [&fused[0], &fused[2]], slots, cut, stored),
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
    let moe_layers = model.layers[..model.text as usize].iter().filter(|&&l| l == LayerType::Moe).count();
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
    // Those of layers that the map does not cover.
    if o.mtp_drafter {
        out.push(section(&experts::linear(moe.experts, ranks)));
    }
    Ok(out)
}

/// A size as it is stored.
fn padded(member: &str, given: Option<u64>, least: u64) -> Result<u64> {
    let given = given.map_or(Ok(least), |n| size(member, n))?;
    if given < least {
        bail!(RS_ERR_INVALID, "{member} is {given}, a rank's experts have {least}");
    }
    Ok(given)
}
