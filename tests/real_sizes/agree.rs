//! What a rank says that it sends another is what that one says that it receives, in the same order.
//!
//! The plans of large worlds are too many to keep, so of each list there is a digest only.

use super::balance::Transfer;
use reshard::plan::{Piece, Plan};
use std::collections::HashMap;

/// Staging of a rank, and what a message of it is cut to.
const STAGING: u64 = 256 << 20;
const UNIT: u64 = 256;

/// A list of pieces.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Digest {
    count: usize,
    bytes: u64,
    mixed: u64,
}

/// Lists by sender and receiver, as either of the two gave it.
#[derive(Default)]
pub struct Agree {
    sent: HashMap<(usize, usize), Digest>,
    received: HashMap<(usize, usize), Digest>,
    most_peers: usize,
}

impl Digest {
    /// A receiver counts all its buffers, a sender those of the receiver's target side: the difference is `before`.
    fn of(pieces: &[Piece], before: u32) -> Digest {
        let mut out = Digest { count: pieces.len(), ..Digest::default() };
        let mut mix = |value: u64| out.mixed = (out.mixed.rotate_left(23) ^ value).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        for p in pieces {
            mix(u64::from(p.tensor) << 32 | u64::from(p.item));
            mix(u64::from(p.src.buffer) << 32 | u64::from(p.dst.buffer - before));
            [p.key, p.src.offset, p.dst.offset, p.axes.len() as u64].into_iter().for_each(&mut mix);
            p.axes.iter().flat_map(|a| [a.extent, a.key, a.src, a.dst]).for_each(&mut mix);
        }
        out.bytes = pieces.iter().map(Piece::bytes).sum();
        out
    }
}

impl Agree {
    /// Takes in the plan of `rank`, which has `sources` parameters as a source.
    pub fn add(&mut self, rank: usize, plan: &Plan, sources: u32) -> Result<(), String> {
        if !plan.peers.windows(2).all(|p| p[0].rank < p[1].rank) {
            return Err(format!("rank {rank}: peers out of order"));
        }
        self.most_peers = self.most_peers.max(plan.peers.len());
        for peer in &plan.peers {
            let other = peer.rank as usize;
            if other == rank {
                return Err(format!("rank {rank} is its own peer"));
            }
            if !peer.out.is_empty() {
                self.sent.insert((rank, other), Digest::of(&peer.out, 0));
            }
            if !peer.into.is_empty() {
                self.received.insert((other, rank), Digest::of(&peer.into, sources));
            }
        }
        Ok(())
    }

    /// All transfers, once all plans are in; else a pair that does not agree.
    pub fn judge(&self) -> Result<Vec<Transfer>, (usize, usize)> {
        let mut pairs: Vec<(usize, usize)> = self.sent.keys().chain(self.received.keys()).copied().collect();
        pairs.sort_unstable();
        pairs.dedup();
        let size = (STAGING / (4 * self.most_peers.max(1) as u64) / UNIT * UNIT).max(UNIT);
        let of = |pair: (usize, usize)| {
            let sent = self.sent.get(&pair).filter(|sent| Some(*sent) == self.received.get(&pair)).ok_or(pair)?;
            Ok(Transfer { from: pair.0, to: pair.1, bytes: sent.bytes, messages: sent.bytes.div_ceil(size), size })
        };
        pairs.into_iter().map(of).collect()
    }
}

/// Where the plans of a sender and of a receiver part.
pub fn difference(sender: &Plan, receiver: &Plan, (from, to): (usize, usize), sources: u32) -> String {
    let out = sender.peers.iter().find(|p| p.rank as usize == to).map_or(&[][..], |p| &p.out);
    let into = receiver.peers.iter().find(|p| p.rank as usize == from).map_or(&[][..], |p| &p.into);
    if out.len() != into.len() {
        return format!("{from} sends {to} {} pieces, not the {} that it receives", out.len(), into.len());
    }
    let same = |(a, b): &(&Piece, &Piece)| {
        let mut a = (*a).clone();
        a.dst.buffer += sources;
        a == **b
    };
    let first = out.iter().zip(into).find(|pair| !same(pair));
    format!("{to} does not receive what {from} sends: {first:?}")
}
