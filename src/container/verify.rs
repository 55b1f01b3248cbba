//! Whether what landed is what was sent: RS_SYNC_VERIFY.
//!
//! Both ends of each piece sum up its elements, converted, in the piece's own order: the sender in its source, the receiver in its target.
//! Each number is weighed by who sent what to whom; the senders' add, the receivers' take away. So all ranks look at one sum, and where
//! it is not 0 they look for the piece, by halves.
#![forbid(unsafe_code)]

use super::Container;
use super::connect::{Connected, agree_outcome};
use super::sync::give_up;
use crate::abi::*;
use crate::comm::{Comm, Deadline};
use crate::digest::Residue;
use crate::error::{Error, Result, err};
use crate::exec::scan::{Part, Scan, Sum};
use crate::geom::{Axis, Pattern};
use crate::plan::Piece;
use std::ops::Range;
use xxhash_rust::xxh3::xxh3_128;

/// Numbers of doubles begin here: they are of the same rank and tensor as copies inside the rank.
const DOUBLES: u32 = 1 << 31;

/// One end of a piece, and what tells the piece from others: tensor, receiver, sender, number among those of that tensor from there to
/// there.
struct End<'c> {
    what: [u32; 4],
    piece: &'c Piece,
    sends: bool,
}

impl End<'_> {
    fn part(&self) -> Part {
        let (piece, sends) = (self.piece, self.sends);
        let spot = if sends { piece.src } else { piece.dst };
        let axes = piece.axes.iter().map(|a| Axis { extent: a.extent, key: a.key, val: if sends { a.src } else { a.dst } });
        Part {
            buffer: spot.buffer,
            item: if sends { piece.item } else { piece.convert.map_or(piece.item, |c| c.to.item()) },
            convert: piece.convert.filter(|_| sends),
            nans: piece.convert.map(|c| c.to),
            pattern: Pattern { key: piece.key, val: spot.offset, axes: axes.collect() },
        }
    }

    fn weighed(&self, sum: Residue) -> Residue {
        let weight = Residue::new(xxh3_128(&self.what.map(u32::to_le_bytes).concat()));
        if self.sends { sum * weight } else { -(sum * weight) }
    }
}

impl Container {
    /// Collective, after a sync of these tensors has landed on all ranks.
    pub(super) fn verify(&self, comm: &dyn Comm, c: &Connected, subset: Option<&[bool]>, deadline: Deadline) -> Result<()> {
        let ends = self.ends(comm.rank(), c, subset);
        let scan = Scan { device: &*self.device, comm, mems: &self.mems, threads: self.threads, deadline, sum: Sum::Checksum };
        let sums = scan.run(&ends.iter().map(End::part).collect::<Vec<_>>());
        agree_outcome(comm, sums.as_ref().map(|_| (0, 0)), deadline)?;
        let sums = sums?;
        let weighed: Vec<Residue> = ends.iter().zip(sums).map(|(end, sum)| end.weighed(sum)).collect();
        if total(comm, &ends, &weighed, |_| true, deadline)? == Residue::default() {
            return Ok(());
        }
        let mut what = [0..0, 0..0, 0..0, 0..0];
        for (digit, most) in [c.planned.union.tensors.len() as u32, comm.world(), comm.world(), u32::MAX].into_iter().enumerate() {
            what[digit] = 0..most;
            while what[digit].len() > 1 {
                let Range { start, end } = what[digit];
                let middle = start + (end - start) / 2;
                what[digit].end = middle;
                let inside = |end: &End<'_>| (0..=digit).all(|i| what[i].contains(&end.what[i]));
                if total(comm, &ends, &weighed, inside, deadline)? == Residue::default() {
                    what[digit] = middle..end;
                }
            }
        }
        let what = what.map(|range| range.start);
        let found = ends.iter().find(|end| !end.sends && end.what == what);
        let told = found.map_or(Ok(()), |end| Err(self.differs(c, end)));
        agree_outcome(comm, told.as_ref().map(|()| (0, 0)), deadline)?;
        Err(err!(RS_ERR_CORRUPT, "what landed is not what was sent, but it changes while it is looked at"))
    }

    fn differs(&self, c: &Connected, end: &End<'_>) -> Error {
        let [tensor, to, from, _] = end.what;
        let tensor = &c.planned.union.tensors[tensor as usize];
        err!(
            RS_ERR_CORRUPT,
            "parameter '{}': {} of '{}' does not hold what {} has there: it was changed on its way, or by somebody else during the sync",
            self.buffer_name(end.piece.dst.buffer),
            end.piece.shown(&tensor.shape),
            tensor.name,
            if from == to { "its source on this rank".to_string() } else { format!("rank {from}, which sent it,") }
        )
    }

    /// What this rank sent, received and copied.
    fn ends<'c>(&'c self, me: u32, c: &'c Connected, subset: Option<&[bool]>) -> Vec<End<'c>> {
        let accept = |tensor: u32| subset.is_none_or(|s| s[tensor as usize]);
        let mut out = vec![];
        let mut add = |pieces: &mut dyn Iterator<Item = (u32, &'c Piece)>, [to, from, first]: [u32; 3], roles: &[bool]| {
            let mut last = (u32::MAX, first);
            for (tensor, piece) in pieces.filter(|(tensor, _)| accept(*tensor)) {
                last = (tensor, if last.0 == tensor { last.1 + 1 } else { first });
                out.extend(roles.iter().map(|&sends| End { what: [tensor, to, from, last.1], piece, sends }));
            }
        };
        for peer in &c.planned.plan.peers {
            add(&mut peer.out.iter().map(|p| (p.tensor, p)), [peer.rank, me, 0], &[true]);
            add(&mut peer.into.iter().map(|p| (p.tensor, p)), [me, peer.rank, 0], &[false]);
        }
        add(&mut self.local.pieces.iter().map(|p| (c.planned.ordinals[p.tensor as usize], p)), [me, me, 0], &[true, false]);
        add(&mut c.planned.plan.doubles.iter().map(|p| (p.tensor, p)), [me, me, DOUBLES], &[true, false]);
        out
    }
}

/// The sum over all ranks of those ends.
fn total(
    comm: &dyn Comm,
    ends: &[End<'_>],
    weighed: &[Residue],
    of: impl Fn(&End<'_>) -> bool,
    deadline: Deadline,
) -> Result<Residue> {
    let own = ends.iter().zip(weighed).filter(|(end, _)| of(end)).fold(Residue::default(), |sum, (_, number)| sum + *number);
    let all = comm.allgather(&own.to_bytes(), deadline).map_err(|e| give_up(comm, e))?;
    Ok(all.chunks_exact(16).fold(Residue::default(), |sum, bytes| sum + Residue::from_bytes(bytes)))
}
