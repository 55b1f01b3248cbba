//! Boxes of logical tensors in a local tensor: the patterns that frameworks cut by.
//!
//! All are for local tensors that are row-major and dense. `width` is the number of columns: a bias is its weight with one column.
#![forbid(unsafe_code)]

use super::model::Heads;
use crate::abi::RS_MAX_RANK;
use crate::geom::{Axis, Pattern};
use crate::layout::TileRow;
use serde::Serialize;
use smallvec::{SmallVec, smallvec};

/// One axis of a box.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Span {
    /// Extent of the view.
    pub view: u64,
    /// First index.
    pub origin: u64,
    /// Indices.
    pub extent: u64,
    /// Elements of the local tensor from one index to the next.
    pub stride: u64,
}

/// A box of a tensor of some kind.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Cut {
    /// Index of the kind.
    pub kind: usize,
    /// Expert, if the kind is one of experts, else 0.
    pub expert: u32,
    /// Elements from the local tensor's first to the box's first.
    pub offset: u64,
    /// The box.
    pub axes: SmallVec<[Span; 4]>,
}

impl Cut {
    /// The same box of an expert's tensor, `by` elements further on.
    pub fn of(self, expert: u32, by: u64) -> Cut {
        Cut { expert, offset: self.offset + by, ..self }
    }

    /// As a planner sees it: what `row` says, without the checks that a caller's rows need.
    pub fn pattern(&self) -> Pattern {
        let mut out = Pattern { key: 0, val: self.offset, axes: SmallVec::new() };
        let mut weight = 1;
        for a in self.axes.iter().rev() {
            out.key += a.origin * weight;
            if a.extent > 1 {
                out.axes.push(Axis { extent: a.extent, key: weight, val: a.stride });
            }
            weight *= a.view;
        }
        out.coalesce()
    }

    /// As a row of a tile table, for items of `item` bytes; the rows of tensor and buffer are the caller's to set.
    pub fn row(&self, item: u64, transform: u32) -> TileRow {
        let list = |f: fn(&Span) -> u64| {
            let mut out = [0; RS_MAX_RANK];
            for (o, a) in out.iter_mut().zip(&self.axes) {
                *o = f(a) as i64;
            }
            out
        };
        TileRow {
            tensor: 0,
            buffer: 0,
            rank: self.axes.len() as u32,
            transform,
            byte_offset: self.offset * item,
            view: list(|a| a.view),
            origin: list(|a| a.origin),
            extent: list(|a| a.extent),
            stride: list(|a| a.stride),
        }
    }
}

/// `count` of `total` rows of `width` elements from row `first`, which lie from row `at` of a local tensor. None if there are none.
pub fn rows(kind: usize, total: u64, first: u64, count: u64, width: u64, at: u64) -> Option<Cut> {
    let columns = Span { view: width, origin: 0, extent: width, stride: 1 };
    let rows = Span { view: total, origin: first, extent: count, stride: width };
    (count > 0).then(|| Cut { kind, expert: 0, offset: at * width, axes: smallvec![rows, columns] })
}

/// Rows `first` to `first + count` of each of the heads of part `r` of `t`, a head having `rows` of them.
pub fn of_heads(kind: usize, heads: u64, rows: u64, (first, count): (u64, u64), width: u64, r: u64, t: u64) -> Cut {
    let part = heads / t;
    let axes = smallvec![
        Span { view: heads, origin: r * part, extent: part, stride: count * width },
        Span { view: rows, origin: first, extent: count, stride: width },
        Span { view: width, origin: 0, extent: width, stride: 1 },
    ];
    Cut { kind, expert: 0, offset: 0, axes }
}

/// Part `r` of `t` of the columns of a [rows, columns] tensor: a row-parallel linear layer.
pub fn columns(kind: usize, rows: u64, columns: u64, r: u64, t: u64) -> Cut {
    let part = columns / t;
    let axes = smallvec![
        Span { view: rows, origin: 0, extent: rows, stride: part },
        Span { view: columns, origin: r * part, extent: part, stride: 1 },
    ];
    Cut { kind, expert: 0, offset: 0, axes }
}

/// Gate over up, each part `r` of `t` of its `ffn` rows: merged column-parallel layers, equal in Megatron and vLLM.
pub fn glu(kinds: [usize; 2], ffn: u64, width: u64, r: u64, t: u64) -> Vec<Cut> {
    let part = ffn / t;
    (0..).zip(kinds).filter_map(|(half, kind)| rows(kind, ffn, r * part, part, width, half * part)).collect()
}

/// Rows `r` of `t` of a vocabulary of `vocab` rows padded to `padded`: its real rows.
pub fn vocab(kind: usize, vocab: u64, padded: u64, width: u64, r: u64, t: u64) -> Option<Cut> {
    let part = padded / t;
    let first = (r * part).min(vocab);
    rows(kind, vocab, first, ((r + 1) * part).min(vocab) - first, width, 0)
}

/// Shard `r` of `t` of Megatron's linear_qkv: for each group its query heads, then their gates if it has any, its key, its value. With
/// fewer groups than shards (Megatron-core from 0.16) the rows are cut evenly, wherever that falls.
pub fn qkv_grouped(kinds: [usize; 3], h: Heads, width: u64, r: u64, t: u64) -> Vec<Cut> {
    let m = h.q / h.kv;
    // Rows of a group: of its queries with their gates, of all.
    let queries = h.q_rows() / h.kv;
    let block = queries + 2 * h.dim;
    let groups = h.kv / t;
    if h.kv % t == 0 {
        let of_groups = Span { view: h.kv, origin: r * groups, extent: groups, stride: block * width };
        let whole = |n: u64, stride: u64| Span { view: n, origin: 0, extent: n, stride };
        let cut = |kind: usize, at: u64, inner: &[Span]| {
            let axes = [&[of_groups], inner, &[whole(width, 1)]].concat();
            Cut { kind, expert: 0, offset: at * width, axes: axes.into() }
        };
        // In q_proj a head's gate follows the head.
        let half = |i: u64| Span { view: 2, origin: i, extent: 1, stride: 1 };
        let gated = |i: u64| cut(kinds[0], i * m * h.dim, &[whole(m, h.dim * width), half(i), whole(h.dim, width)]);
        let mut out = if h.gate { vec![gated(0), gated(1)] } else { vec![cut(kinds[0], 0, &[whole(queries, width)])] };
        out.extend((0..).zip(&kinds[1..]).map(|(i, &kind)| cut(kind, queries + i * h.dim, &[whole(h.dim, width)])));
        return out;
    }
    let part = h.kv * block / t;
    let (lo, hi) = (r * part, (r + 1) * part);
    let mut out = vec![];
    for group in 0..h.kv {
        // Kind and its rows in all; of a run, its first row, its rows, and where it starts in the group.
        let mut runs = match h.gate {
            false => vec![(kinds[0], h.q_rows(), group * queries, queries, 0)],
            true => (0..2 * m)
                .map(|i| (kinds[0], h.q_rows(), (2 * group * m + i) * h.dim, h.dim, (i / 2 + i % 2 * m) * h.dim))
                .collect(),
        };
        runs.extend((0..).zip(&kinds[1..]).map(|(i, &kind)| (kind, h.kv * h.dim, group * h.dim, h.dim, queries + i * h.dim)));
        for (kind, all, first, n, start) in runs {
            let begin = group * block + start;
            let (from, to) = (begin.max(lo), (begin + n).min(hi));
            if from < to {
                out.extend(rows(kind, all, first + from - begin, to - from, width, from - lo));
            }
        }
    }
    out
}

/// Shard `r` of `t` of vLLM's qkv_proj: its query heads, gates among them as in q_proj, then its keys, then its values; with fewer key
/// heads than shards each is on several.
pub fn qkv_stacked(kinds: [usize; 3], h: Heads, width: u64, r: u64, t: u64) -> Vec<Cut> {
    let (q, kv, copies) = (h.q_rows() / t, (h.kv / t).max(1) * h.dim, (t / h.kv).max(1));
    let first = r / copies * kv;
    let list = [(h.q_rows(), r * q, q, 0), (h.kv * h.dim, first, kv, q), (h.kv * h.dim, first, kv, q + kv)];
    let cut = |(kind, (all, first, count, at))| rows(kind, all, first, count, width, at);
    kinds.into_iter().zip(list).filter_map(cut).collect()
}

/// Shard `r` of `t` of a fused qkv with as many keys as queries, which is one tensor already, `heads` heads of `dim` rows of q, then of k,
/// then of v: grouped, q, k and v of each head together, or stacked as it is.
pub fn qkv_fused(kind: usize, [heads, dim]: [u64; 2], width: u64, grouped: bool, r: u64, t: u64) -> Cut {
    let (part, head) = (heads / t, dim * width);
    let strides = if grouped { [head, 3 * head] } else { [part * head, head] };
    let axes = smallvec![
        Span { view: 3, origin: 0, extent: 3, stride: strides[0] },
        Span { view: heads, origin: r * part, extent: part, stride: strides[1] },
        Span { view: dim, origin: 0, extent: dim, stride: width },
        Span { view: width, origin: 0, extent: width, stride: 1 },
    ];
    Cut { kind, expert: 0, offset: 0, axes }
}

/// Whole [heads, rows, width] tensors seen per head, rows `first` and up of each of part `r` of `t`, each head's transposed.
pub fn of_heads_transposed(kind: usize, heads: u64, rows: u64, of: (u64, u64), width: u64, r: u64, t: u64) -> Cut {
    let mut cut = of_heads(kind, heads, rows, of, width, r, t);
    (cut.axes[1].stride, cut.axes[2].stride) = (1, of.1);
    cut
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Which row of which kind each local row holds.
    fn labels(cuts: &[Cut], names: &[&str]) -> String {
        let mut rows = std::collections::BTreeMap::new();
        for c in cuts {
            let mut list = vec![(0, c.offset)];
            for a in &c.axes {
                list = list
                    .iter()
                    .flat_map(|&(i, o)| (0..a.extent).map(move |j| (i * a.view + a.origin + j, o + j * a.stride)))
                    .collect();
            }
            rows.extend(list.into_iter().map(|(i, o)| (o, format!("{}{i}", names[c.kind]))));
        }
        assert!(rows.keys().copied().eq(0..rows.len() as u64), "no gap");
        rows.into_values().collect::<Vec<_>>().join(" ")
    }

    fn all(t: u64, cut: impl Fn(u64) -> Vec<Cut>, names: &[&str]) -> String {
        (0..t).map(|r| labels(&cut(r), names)).collect::<Vec<_>>().join("; ")
    }

    // What the frameworks hold, with heads of one row and one column.
    #[test]
    fn known_shards() {
        let qkv = ["q", "k", "v"];
        let h = Heads { q: 4, kv: 2, dim: 1, bias: false, norm: false, out_bias: false, sinks: false, gate: false };
        let grouped = |h: Heads, t: u64| all(t, |r| qkv_grouped([0, 1, 2], h, 1, r, t), &qkv);
        let stacked = |h: Heads, t: u64| all(t, |r| qkv_stacked([0, 1, 2], h, 1, r, t), &qkv);
        assert_eq!(grouped(h, 1), "q0 q1 k0 v0 q2 q3 k1 v1");
        assert_eq!(grouped(h, 2), "q0 q1 k0 v0; q2 q3 k1 v1");
        assert_eq!(grouped(h, 4), "q0 q1; k0 v0; q2 q3; k1 v1");
        assert_eq!(stacked(h, 1), "q0 q1 q2 q3 k0 k1 v0 v1");
        assert_eq!(stacked(h, 2), "q0 q1 k0 v0; q2 q3 k1 v1");
        assert_eq!(stacked(h, 4), "q0 k0 v0; q1 k0 v0; q2 k1 v1; q3 k1 v1");
        let h = Heads { q: 8, ..h };
        assert_eq!(grouped(h, 4), "q0 q1 q2; q3 k0 v0; q4 q5 q6; q7 k1 v1");
        assert_eq!(stacked(h, 4), "q0 q1 k0 v0; q2 q3 k0 v0; q4 q5 k1 v1; q6 q7 k1 v1");
        // Heads 0 to 3 with their gates: rows 2h and 2h + 1 of q_proj.
        let h = Heads { q: 4, gate: true, ..h };
        assert_eq!(grouped(h, 1), "q0 q2 q1 q3 k0 v0 q4 q6 q5 q7 k1 v1");
        assert_eq!(grouped(h, 2), "q0 q2 q1 q3 k0 v0; q4 q6 q5 q7 k1 v1");
        assert_eq!(grouped(h, 4), "q0 q2 q1; q3 k0 v0; q4 q6 q5; q7 k1 v1");
        assert_eq!(stacked(h, 2), "q0 q1 q2 q3 k0 v0; q4 q5 q6 q7 k1 v1");
        assert_eq!(stacked(h, 4), "q0 q1 k0 v0; q2 q3 k0 v0; q4 q5 k1 v1; q6 q7 k1 v1");
        // Two heads, q in the first third.
        let fused = |grouped: bool, t: u64| all(t, |r| vec![qkv_fused(0, [2, 1], 1, grouped, r, t)], &["x"]);
        assert_eq!(fused(true, 1), "x0 x2 x4 x1 x3 x5");
        assert_eq!(fused(true, 2), "x0 x2 x4; x1 x3 x5");
        assert_eq!(fused(false, 1), "x0 x1 x2 x3 x4 x5");
        assert_eq!(fused(false, 2), "x0 x2 x4; x1 x3 x5");
        // Of two heads of three rows of two, the last two rows: [2, 2] of each, transposed.
        assert_eq!(labels(&[of_heads_transposed(0, 2, 3, (1, 2), 2, 0, 1)], &["x"]), "x2 x4 x3 x5 x8 x10 x9 x11");
        let merged = |t: u64| all(t, |r| glu([0, 1], 4, 1, r, t), &["g", "u"]);
        assert_eq!(merged(1), "g0 g1 g2 g3 u0 u1 u2 u3");
        assert_eq!(merged(2), "g0 g1 u0 u1; g2 g3 u2 u3");
    }

    #[test]
    fn vocabularies_are_clipped() {
        let span = |v: u64, p: u64, r: u64, t: u64| vocab(0, v, p, 8, r, t).map(|c| (c.axes[0].origin, c.axes[0].extent));
        assert_eq!(span(151_936, 152_064, 3, 4), Some((114_048, 151_936 - 114_048)));
        assert_eq!(span(151_936, 151_936, 3, 4), Some((113_952, 151_936 - 113_952)));
        assert_eq!(span(10, 64, 1, 2), None, "padding only");
    }
}
