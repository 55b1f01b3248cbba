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

/// A whole [rows, columns] tensor of which row i lies in column i: transposed, as part `r` of `t` of its rows or, with `by_columns`, of
/// its columns. `across` is the number of local columns.
pub fn transposed(kind: usize, shape: [u64; 2], by_columns: bool, r: u64, t: u64, across: u64) -> Cut {
    let mut part = shape;
    part[usize::from(by_columns)] /= t;
    let first = |i: usize| if usize::from(by_columns) == i { r * part[i] } else { 0 };
    let axes = smallvec![
        Span { view: shape[0], origin: first(0), extent: part[0], stride: 1 },
        Span { view: shape[1], origin: first(1), extent: part[1], stride: across },
    ];
    Cut { kind, expert: 0, offset: 0, axes }
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

/// Shard `r` of `t` of Megatron's linear_qkv: for each group its query heads, its key, its value. With fewer groups than shards
/// (Megatron-core from 0.16) the rows are cut evenly, wherever that falls.
pub fn qkv_grouped(kinds: [usize; 3], h: Heads, width: u64, r: u64, t: u64) -> Vec<Cut> {
    let m = h.q / h.kv;
    // Rows of each member of a group, and where it starts there.
    let members = [(m * h.dim, 0), (h.dim, m * h.dim), (h.dim, (m + 1) * h.dim)];
    let block = (m + 2) * h.dim;
    if h.kv % t == 0 {
        let groups = h.kv / t;
        let cut = |(kind, (n, start)): (usize, (u64, u64))| {
            let axes = smallvec![
                Span { view: h.kv, origin: r * groups, extent: groups, stride: block * width },
                Span { view: n, origin: 0, extent: n, stride: width },
                Span { view: width, origin: 0, extent: width, stride: 1 },
            ];
            Cut { kind, expert: 0, offset: start * width, axes }
        };
        return kinds.into_iter().zip(members).map(cut).collect();
    }
    let part = h.kv * block / t;
    let (lo, hi) = (r * part, (r + 1) * part);
    let mut out = vec![];
    for group in 0..h.kv {
        for (kind, (n, start)) in kinds.into_iter().zip(members) {
            let begin = group * block + start;
            let (from, to) = (begin.max(lo), (begin + n).min(hi));
            if from < to {
                out.extend(rows(kind, h.kv * n, group * n + from - begin, to - from, width, from - lo));
            }
        }
    }
    out
}

/// Shard `r` of `t` of vLLM's qkv_proj: its query heads, then its keys, then its values; with fewer key heads than shards each is on
/// several.
pub fn qkv_stacked(kinds: [usize; 3], h: Heads, width: u64, r: u64, t: u64) -> Vec<Cut> {
    let (q, kv, copies) = (h.q / t, (h.kv / t).max(1), (t / h.kv).max(1));
    let first = r / copies * kv;
    let list = [(h.q, r * q, q, 0), (h.kv, first, kv, q), (h.kv, first, kv, q + kv)];
    let cut = |(kind, (all, first, count, at)): (usize, (u64, u64, u64, u64))| {
        rows(kind, all * h.dim, first * h.dim, count * h.dim, width, at * h.dim)
    };
    kinds.into_iter().zip(list).filter_map(cut).collect()
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
        let h = Heads { q: 4, kv: 2, dim: 1, bias: false, norm: false, out_bias: false, sinks: false };
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
