//! How the routed experts of a layer are stored.
//!
//! From Megatron-core 0.12 to 0.16: transformer/moe/experts.py (TEGroupedMLP, SequentialMLP, GroupedMLP); vLLM 0.11 to 0.33:
//! fused_moe/layer.py; vllm-ascend, which transposes after loading.
#![forbid(unsafe_code)]

use super::cut::{Cut, Span};
use super::model::{LayerType, Model, Moe, Part, names};
use super::side::Param;
use serde::Deserialize;

/// Who stores experts, and how.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Storage {
    /// Megatron's TEGroupedMLP: `linear_fc1.weight{j}` and `linear_fc2.weight{j}`.
    TeGrouped,
    /// Megatron's SequentialMLP: `local_experts.{j}`.
    Sequential,
    /// Megatron's legacy GroupedMLP: `weight1` and `weight2`, whose memory is transposed expert by expert.
    Grouped,
    /// vLLM's w13 and w2.
    Stacked,
    /// vLLM's w13 with up before gate, as FlashInfer's CUTLASS kernels want it.
    StackedSwapped,
    /// vllm-ascend's w13 and w2, transposed.
    StackedTransposed,
}

/// Parameters that hold `slots` (experts by slot) of a layer, shard `x` of `t` of each. `stored`: the shard's intermediate size and the
/// hidden size as they are in memory, which may be padded.
pub fn params(
    model: &Model,
    moe: &Moe,
    storage: Storage,
    names: [&str; 2],
    slots: &[u32],
    (x, t): (u64, u64),
    [ffn, hidden]: [u64; 2],
) -> Vec<Param> {
    let of_part = Part::Expert(LayerType::Moe);
    let [gate, up, down] = moe.expert_names().map(|n| model.kind(of_part, &n));
    let local = moe.ffn / t;
    let count = slots.len() as u64;
    let each = || (0..).zip(slots);
    let part = |stride: u64| Span { view: moe.ffn, origin: x * local, extent: local, stride };
    let whole = |stride: u64| Span { view: model.hidden, origin: 0, extent: model.hidden, stride };
    let cut = |kind: usize, offset: u64, axes: [Span; 2]| Cut { kind, expert: 0, offset, axes: axes.as_slice().into() };
    // Gate over up of one expert, and its down projection.
    let turned = matches!(storage, Storage::Grouped | Storage::StackedTransposed);
    let half = |i: u64, kind: usize| match turned {
        true => cut(kind, i * ffn, [part(1), whole(2 * ffn)]),
        false => cut(kind, i * ffn * hidden, [part(hidden), whole(1)]),
    };
    let swapped = storage == Storage::StackedSwapped;
    let fc1 = || if swapped { [half(0, up), half(1, gate)] } else { [half(0, gate), half(1, up)] };
    let fc2 = || [if turned { cut(down, 0, [whole(1), part(hidden)]) } else { cut(down, 0, [whole(ffn), part(1)]) }];
    let [first, second] = names;
    if matches!(storage, Storage::TeGrouped | Storage::Sequential) {
        let one = |(j, &e): (u64, &u32)| {
            let name = |n: &str| n.replace("{}", &j.to_string());
            [
                Param::new(name(first), &[2 * ffn, hidden], fc1().map(|c| c.of(e, 0))),
                Param::new(name(second), &[hidden, ffn], fc2().map(|c| c.of(e, 0))),
            ]
        };
        return each().flat_map(one).collect();
    }
    let shapes = match storage {
        // The same memory as that of the transposed ones, by other shapes.
        Storage::Grouped => [vec![hidden, count * 2 * ffn], vec![count * ffn, hidden]],
        Storage::StackedTransposed => [vec![count, hidden, 2 * ffn], vec![count, ffn, hidden]],
        _ => [vec![count, 2 * ffn, hidden], vec![count, hidden, ffn]],
    };
    let fc1: Vec<Cut> = each().flat_map(|(j, &e)| fc1().map(|c| c.of(e, j * 2 * ffn * hidden))).collect();
    let fc2: Vec<Cut> = each().flat_map(|(j, &e)| fc2().map(|c| c.of(e, j * hidden * ffn))).collect();
    vec![Param::new(first, &shapes[0], fc1), Param::new(second, &shapes[1], fc2)]
}

/// The same for experts that are one tensor a projection (gpt-oss): gate and up by turns in its columns, transposed, with biases.
/// vLLM's w13 keeps the turns; Megatron has gate over up. `names`: of weight and bias of both projections. Stored one by one if that is
/// `storage`, else stacked.
pub fn fused(model: &Model, moe: &Moe, storage: Storage, names: [&str; 4], slots: &[u32], (x, t): (u64, u64)) -> Vec<Param> {
    let [gate_up, gate_up_bias, down, down_bias] = names::FUSED.map(|n| model.kind(Part::Layer(LayerType::Moe), n));
    let (all, h, ffn, local, count) = (moe.experts, model.hidden, moe.ffn, moe.ffn / t, slots.len() as u64);
    let one = |e: u32| Span { view: all, origin: e.into(), extent: 1, stride: 1 };
    let part = |stride: u64| Span { view: ffn, origin: x * local, extent: local, stride };
    let whole = |n: u64, stride: u64| Span { view: n, origin: 0, extent: n, stride };
    let half = |i: u64| Span { view: 2, origin: i, extent: 1, stride: 1 };
    let cut = |kind: usize, offset: u64, axes: &[Span]| Cut { kind, expert: 0, offset, axes: axes.into() };
    let each = || (0..).zip(slots);
    if storage == Storage::TeGrouped {
        // Gate over up, and out by in.
        let params = |(j, &e): (u64, &u32)| {
            let name = |i: usize| names[i].replace("{}", &j.to_string());
            let fc1 = |i: u64| cut(gate_up, i * local * h, &[one(e), whole(h, 1), part(h), half(i)]);
            let bias = |i: u64| cut(gate_up_bias, i * local, &[one(e), part(1), half(i)]);
            let fc2 = cut(down, 0, &[one(e), part(1), whole(h, local)]);
            [
                Param::new(name(0), &[2 * local, h], [fc1(0), fc1(1)]),
                Param::new(name(1), &[2 * local], [bias(0), bias(1)]),
                Param::new(name(2), &[h, local], [fc2]),
                Param::new(name(3), &[h], [cut(down_bias, 0, &[one(e), whole(h, 1)])]),
            ]
        };
        return each().flat_map(params).collect();
    }
    let turns = |stride: u64| Span { view: 2 * ffn, origin: 2 * x * local, extent: 2 * local, stride };
    let w13 = each().map(|(j, &e)| cut(gate_up, j * 2 * local * h, &[one(e), whole(h, 1), turns(h)]));
    let w13_bias = each().map(|(j, &e)| cut(gate_up_bias, j * 2 * local, &[one(e), turns(1)]));
    let w2 = each().map(|(j, &e)| cut(down, j * h * local, &[one(e), part(1), whole(h, local)]));
    // Added once: the other shards have zeros, which nobody writes.
    let w2_bias = each().filter(|_| x == 0).map(|(j, &e)| cut(down_bias, j * h, &[one(e), whole(h, 1)]));
    vec![
        Param::new(names[0], &[count, 2 * local, h], w13),
        Param::new(names[1], &[count, 2 * local], w13_bias),
        Param::new(names[2], &[count, h, local], w2),
        Param::new(names[3], &[count, h], w2_bias),
    ]
}

/// Experts of each of `ep` ranks, as evenly as they go, in order: the first ranks have one more.
pub fn linear(experts: u64, ep: u64) -> Vec<Vec<u32>> {
    let (base, rest) = (experts / ep, experts % ep);
    let first = |k: u64| k * base + k.min(rest);
    (0..ep).map(|k| (first(k) as u32..first(k + 1) as u32).collect()).collect()
}

/// Experts of each of `ep` ranks, dealt one by one.
pub fn round_robin(experts: u64, ep: u64) -> Vec<Vec<u32>> {
    (0..ep).map(|k| (k..experts).step_by(ep as usize).map(|e| e as u32).collect()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn experts_that_do_not_divide() {
        assert_eq!(linear(10, 4), [vec![0, 1, 2], vec![3, 4, 5], vec![6, 7], vec![8, 9]]);
        assert_eq!(round_robin(6, 4), [vec![0, 4], vec![1, 5], vec![2], vec![3]]);
    }
}
