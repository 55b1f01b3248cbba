//! Who sends what to whom: each rank plans its own moves only, and both ends of a pair derive the same list in the same order.
//!
//! One logical tensor at a time: its sources are cut into *atoms* ([`owners`]), each held whole by a set of ranks; what a target rank
//! does not hold itself is met with the atoms; each such piece is given to one or several of the ranks that hold it ([`route`]). Pieces
//! of a pair are packed into messages ([`rounds`]). What a rank holds itself is copied inside the rank ([`local`]). What lies where on
//! the other ranks is known from their tables ([`facts`]) or from a world spec ([`closed`]).
//!
//! Knows boxes, ranks and the hosts they live on. Must not know memory, devices or communicators; no hash-map order reaches a plan.
#![forbid(unsafe_code)]

pub mod closed;
pub mod facts;
pub mod local;
pub mod owners;
pub mod parts;
pub mod report;
pub mod rounds;
pub mod route;
pub mod totals;

use crate::abi::RS_ERR_UNSUPPORTED;
use crate::convert::Convert;
use crate::error::{Error, err};
use crate::geom::{Axis, Pattern, Radix, Region, StridedCopy};
use crate::layout::ranges;
use smallvec::SmallVec;
use std::collections::BTreeSet;

/// Number of the rules in this module. Changes with any change of moves or of their order, so that ranks with different rules never
/// plan together.
pub const PLANNER_VERSION: u16 = 3;

/// Where a rank lives.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Place {
    /// Equal on ranks of one host.
    pub host: u64,
    /// Identity of the device; zeros: none that two processes could share.
    pub device: [u64; 2],
    /// Whether it passes on what its targets get.
    pub relays: bool,
}

/// Boxes that pass from a source through the same ranks, one after the other. Each rank sends message k of a stream when it has got
/// it, so all of them pack the same pieces into it: pieces are no longer than [`route::relay_piece`], and none is cut.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Stream {
    /// Equal for the same source and the same ranks after it, and for no others.
    pub id: u64,
    /// 0 from the source, else the number of ranks that have passed it on.
    pub hop: u32,
}

/// One axis of a piece.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PieceAxis {
    /// Number of steps, at least 2.
    pub extent: u64,
    /// Step in the logical tensor, in elements.
    pub key: u64,
    /// Step in the source's buffer, in elements.
    pub src: u64,
    /// Step in the target's buffer, in elements.
    pub dst: u64,
}

/// A place in a buffer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Spot {
    /// Row of the owning rank's buffer table.
    pub buffer: u32,
    /// First element, counted from the buffer's first.
    pub offset: u64,
}

/// A box of one logical tensor that goes from one buffer to another. Axes are in wire order: by falling source step, ties by logical
/// axis; nothing about it depends on the end that looks.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Piece {
    /// Ordinal of the tensor.
    pub tensor: u32,
    /// Bytes of an element where it is read: at the source and on the wire, or of a double at the first target.
    pub item: u32,
    /// What happens to each element at the target; `None`: its bytes are copied.
    pub convert: Option<Convert>,
    /// What it is a part of, if ranks pass it on. Beyond hop 0, `src` is a target of the sender.
    pub stream: Option<Stream>,
    /// Number of the first element in the logical tensor.
    pub key: u64,
    /// First element at the source.
    pub src: Spot,
    /// First element at the target.
    pub dst: Spot,
    /// The rest.
    pub axes: SmallVec<[PieceAxis; 3]>,
}

impl Piece {
    /// Number of the source's bytes.
    pub fn bytes(&self) -> u64 {
        self.axes.iter().map(|a| a.extent).product::<u64>() * u64::from(self.item)
    }

    /// Bytes that lie together at the source.
    pub fn source_run(&self) -> u64 {
        let mut run = 1;
        for a in self.axes.iter().rev() {
            if a.src != run {
                break;
            }
            run *= a.extent;
        }
        run * u64::from(self.item)
    }

    /// From the source's buffer to the target's.
    pub fn copy(&self) -> StridedCopy {
        let axes = self.axes.iter().map(|a| (a.extent, a.src, a.dst));
        StridedCopy::converting(self.item, self.convert, self.src.offset, self.dst.offset, axes)
    }

    /// From the source's buffer to byte `at` of a message.
    pub fn pack(&self, at: u64) -> StridedCopy {
        let mut copy = StridedCopy::new(self.item, self.src.offset, 0, self.wire_steps().map(|(a, step)| (a.extent, a.src, step)));
        copy.dst = at;
        copy
    }

    /// From byte `at` of a message to the target's buffer.
    pub fn unpack(&self, at: u64) -> StridedCopy {
        let axes = self.wire_steps().map(|(a, step)| (a.extent, step, a.dst));
        let mut copy = StridedCopy::converting(self.item, self.convert, 0, self.dst.offset, axes);
        copy.src = at;
        copy
    }

    /// Each axis with its step in a message, in elements.
    fn wire_steps(&self) -> impl Iterator<Item = (&PieceAxis, u64)> {
        let mut steps: SmallVec<[u64; 3]> = SmallVec::new();
        let mut step = 1;
        for a in self.axes.iter().rev() {
            steps.push(step);
            step *= a.extent;
        }
        steps.reverse();
        self.axes.iter().zip(steps)
    }

    /// The box, in words: ranges of the tensor's own shape where it is a box there, else its first and last element.
    pub fn shown(&self, shape: &[u64]) -> String {
        let axes = self.axes.iter().map(|a| Axis { extent: a.extent, key: a.key, val: 0 }).collect();
        shown(&Pattern { key: self.key, val: 0, axes }, shape)
    }

    /// The box as `[lo, hi)` of each axis of the tensor's own shape, where it is a box there.
    pub fn ranges(&self, shape: &[u64]) -> Option<Vec<[u64; 2]>> {
        let axes = self.axes.iter().map(|a| Axis { extent: a.extent, key: a.key, val: 0 }).collect();
        box_in(&Pattern { key: self.key, val: 0, axes }, shape)
    }

    /// Logical numbers of its first and last element.
    pub fn ends(&self) -> (u64, u64) {
        (self.key, self.key + self.axes.iter().map(|a| (a.extent - 1) * a.key).sum::<u64>())
    }

    fn sort_axes(&mut self) {
        self.axes.sort_by_key(|a| std::cmp::Reverse((a.src, a.key)));
        let mut out: SmallVec<[PieceAxis; 3]> = SmallVec::new();
        for a in self.axes.iter().rev() {
            match out.last_mut() {
                Some(l)
                    if [(a.key, l.key), (a.src, l.src), (a.dst, l.dst)].iter().all(|s| s.1.checked_mul(l.extent) == Some(s.0)) =>
                {
                    l.extent *= a.extent
                }
                _ => out.push(*a),
            }
        }
        out.reverse();
        self.axes = out;
    }
}

/// Row-major index of an element.
pub fn index(mut number: u64, shape: &[u64]) -> Vec<u64> {
    let mut out: Vec<u64> = shape
        .iter()
        .rev()
        .map(|&n| {
            let i = number % n;
            number /= n;
            i
        })
        .collect();
    out.reverse();
    out
}

fn box_in(pattern: &Pattern, shape: &[u64]) -> Option<Vec<[u64; 2]>> {
    // The steps of `shape`, but without the axes of extent 1, whose step is that of the axis above or below.
    let steps: Vec<u64> = (0..shape.len()).map(|i| shape[i + 1..].iter().product()).collect();
    let radix = Radix::new(shape.iter().product(), steps.iter().copied());
    let patches = pattern.clone().coalesce().patches(&radix)?;
    let [patch] = &patches[..] else { return None };
    let mut digit = 0;
    let place = |i: usize, digit: &mut usize| {
        if shape[i] == 1 {
            return [0, 1];
        }
        let d = *digit;
        *digit += 1;
        [patch.region.lo[d], patch.region.lo[d] + patch.region.len[d]]
    };
    let wide = shape.iter().filter(|&&n| n > 1).count();
    (wide == radix.digits()).then(|| (0..shape.len()).map(|i| place(i, &mut digit)).collect())
}

/// A box of a tensor, in words.
pub fn shown(pattern: &Pattern, shape: &[u64]) -> String {
    match box_in(pattern, shape) {
        Some(r) => {
            let (lo, len): (Vec<i64>, Vec<i64>) = r.iter().map(|r| (r[0] as i64, (r[1] - r[0]) as i64)).unzip();
            format!("box {}", ranges(&lo, &len))
        }
        None => format!(
            "{} elements from {:?} to {:?}",
            pattern.volume(),
            index(pattern.key, shape),
            index(pattern.key_end() - 1, shape)
        ),
    }
}

/// What a rank exchanges with one other.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Peer {
    /// The other rank.
    pub rank: u32,
    /// Pieces that we send, in the order of the pair.
    pub out: Vec<Piece>,
    /// Pieces that we receive, in the order of the pair.
    pub into: Vec<Piece>,
}

impl Peer {
    /// Bytes sent and received.
    pub fn wire_bytes(&self) -> (u64, u64) {
        let sum = |list: &[Piece]| list.iter().map(Piece::bytes).sum();
        (sum(&self.out), sum(&self.into))
    }
}

/// A rank's own moves.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Plan {
    /// By rank.
    pub peers: Vec<Peer>,
    /// Second tiles of elements that cross once: copied inside the rank after all else has landed, from target to target.
    pub doubles: Vec<Piece>,
}

impl Plan {
    /// Bytes sent and received.
    pub fn wire_bytes(&self) -> (u64, u64) {
        self.peers.iter().map(Peer::wire_bytes).fold((0, 0), |sum, p| (sum.0 + p.0, sum.1 + p.1))
    }

    /// Most channels of this rank: pairs of a peer and a stream, or no stream, that messages go through or come from.
    pub fn channels(&self) -> u32 {
        let count = |p: &Peer| {
            let streams: BTreeSet<Option<Stream>> = p.out.iter().chain(&p.into).map(|p| p.stream).collect();
            streams.len() as u32
        };
        self.peers.iter().map(count).sum()
    }

    /// Whether something is passed on to or by this rank, or will be.
    pub fn streams(&self) -> bool {
        self.peers.iter().flat_map(|p| p.out.iter().chain(&p.into)).any(|p| p.stream.is_some())
    }

    /// Puts the pieces of each pair in their order: by tensor, then by box. No two of a pair have the same of both.
    fn sort(&mut self) {
        for peer in &mut self.peers {
            for list in [&mut peer.out, &mut peer.into] {
                list.sort_by_key(|p| (p.tensor, p.key));
            }
        }
    }

    fn peer(&mut self, rank: u32) -> &mut Peer {
        let at = match self.peers.binary_search_by_key(&rank, |p| p.rank) {
            Ok(at) => at,
            Err(at) => {
                self.peers.insert(at, Peer { rank, ..Peer::default() });
                at
            }
        };
        &mut self.peers[at]
    }
}

/// Too many boxes.
pub(crate) fn incomparable(tensor: &str) -> Error {
    err!(
        RS_ERR_UNSUPPORTED,
        "tensor '{tensor}': views and strides of ranks do not divide, and their tiles fall into over 260,000 boxes; give views that have more \
         in common"
    )
}

/// A region's part of two boxes, that lies at `from.1` and goes to `to.1`, as a piece.
pub(crate) fn piece(
    radix: &Radix,
    region: &Region,
    tensor: u32,
    (item, convert): (u32, Option<Convert>),
    (from, src): (&owners::Held, Spot),
    (to, dst): (&owners::Held, Spot),
) -> Piece {
    let mut piece = Piece { tensor, item, convert, stream: None, key: radix.number(&region.lo), src, dst, axes: SmallVec::new() };
    for i in 0..radix.digits() {
        if region.len[i] > 1 {
            piece.axes.push(PieceAxis {
                extent: region.len[i],
                key: radix.weight(i),
                src: from.patch.stride[i],
                dst: to.patch.stride[i],
            });
        }
    }
    piece.sort_axes();
    piece
}

#[cfg(test)]
mod tests;
