//! The experts of a Megatron side.
#![forbid(unsafe_code)]

use super::{Impl, Options, mesh};
use crate::abi::*;
use crate::error::{Result, bail};
use crate::preset::experts::{self, Storage};
use crate::preset::mesh::{Axis, Mesh};
use crate::preset::model::{Model, Moe};
use crate::preset::side::Section;
use crate::preset::spec::size;

/// The experts' grid, and what each shard of it holds of every layer that has any.
pub fn section(model: &Model, moe: &Moe, o: &Options, tp: u64, pp: u64) -> Result<(Mesh, Section)> {
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
    let (storage, names) = match o.moe_single_grouped_weight {
        true if storage != Storage::TeGrouped => bail!(
            RS_ERR_INVALID,
            "moe_single_grouped_weight goes with moe_grouped_gemm and transformer_impl \"transformer_engine\" alone"
        ),
        true => (Storage::Stacked, ["mlp.experts.linear_fc1.weight", "mlp.experts.linear_fc2.weight"]),
        false => (storage, names),
    };
    if moe.fused && storage != Storage::TeGrouped {
        bail!(
            RS_ERR_UNSUPPORTED,
            "{}: only moe_grouped_gemm with Transformer-Engine is built, without moe_single_grouped_weight",
            model.architecture
        );
    }
    let biases = ["mlp.experts.linear_fc1.bias{}", "mlp.experts.linear_fc2.bias{}"];
    let of = experts::linear(moe.experts, ep);
    let shard = |s: u64| {
        let (slots, cut) = (&of[(s / etp) as usize], (s % etp, etp));
        match moe.fused {
            true => experts::fused(model, moe, storage, [names[0], biases[0], names[1], biases[1]], slots, cut),
            false => experts::params(model, moe, storage, names, slots, cut, [moe.ffn / etp, model.hidden]),
        }
    };
    Ok((mesh, Section::new(1, (0..ep * etp).map(shard).collect())))
}
