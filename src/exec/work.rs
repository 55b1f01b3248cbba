//! A plan's pieces as lists of copies, made once a plan (and once a subset) and reused by every sync.
#![forbid(unsafe_code)]

use super::group::Rounds;
use crate::comm::{Access, Windows};
use crate::geom::StridedCopy;
use crate::plan::local::Local;
use crate::plan::rounds::{Message, messages, whole_messages};
use crate::plan::{Piece, Plan, Stream};
use std::collections::BTreeMap;

/// Bytes of one unit of reading: small enough to share work among threads and to notice an abort, large enough to forget its cost.
const UNIT: u64 = 2 << 20;

/// Rounds between a message's landing at a relay and its going on: it is unpacked beside the next round, packed beside the one after.
const BEHIND: usize = 2;

/// A stream is cut into so many messages, where pieces and staging allow it: the longer it is, the less it matters how many ranks it passes.
const RUN: u64 = 128;

/// But into none that are shorter, which would take longer to announce than to move.
const LEAST: u64 = 128 << 10;

/// Shorter runs are packed: a block of so many bytes takes about as long to read as to name.
const LONG: u64 = 64 << 10;

/// A message lies in so many blocks at most, less those that its ends cut.
const BLOCKS: u64 = 1024;

/// Whose memory a unit reads.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Origin {
    /// This rank's: `Step::src` is a row of its buffers.
    Own,
    /// That of `Work::owners[i]`: `Step::src` is a place in its offer to us.
    Owner(usize),
}

/// A copy into a buffer of this rank.
#[derive(Clone, Debug)]
pub struct Step {
    /// See [`Origin`].
    pub src: u32,
    /// Row of this rank's buffers.
    pub dst: u32,
    /// What moves.
    pub copy: StridedCopy,
}

/// Copies that one thread does in one go.
#[derive(Clone, Debug)]
pub struct Unit {
    /// Bytes moved.
    pub bytes: u64,
    /// Where from.
    pub origin: Origin,
    /// The copies.
    pub steps: Vec<Step>,
}

/// A message as one end sees it: copies between it and rows of this rank's buffers.
#[derive(Clone, Debug)]
pub struct Parcel {
    /// Its length.
    pub bytes: u64,
    /// `(buffer, copy)`.
    pub copies: Vec<(u32, StridedCopy)>,
    /// Whether it is sent from and received into several blocks of buffers as they are, rather than packed and unpacked. The two ends
    /// may cut it into different blocks.
    pub blocks: bool,
}

/// The messages of a pair.
#[derive(Clone, Debug)]
pub struct Lane {
    /// The other rank.
    pub peer: u32,
    /// The round of its first message: of a stream those before are still on their way to the sender.
    pub first: usize,
    /// In the order of the pair.
    pub out: Vec<Parcel>,
    /// In the order of the pair.
    pub into: Vec<Parcel>,
}

impl Lane {
    /// What goes out (side 0) or comes in (1) in a round.
    pub fn at(&self, side: usize, round: usize) -> Option<&Parcel> {
        [&self.out, &self.into][side].get(round.checked_sub(self.first)?)
    }
}

/// What a sync does on this rank.
#[derive(Debug, Default)]
pub struct Work {
    /// Ranks that we may read from, in the order in which they were opened.
    pub owners: Vec<u32>,
    /// Reading, and copying inside the rank.
    pub units: Vec<Unit>,
    /// Messages through lent memory.
    pub lanes: Vec<Lane>,
    /// Messages through our own staging.
    pub group: Option<Rounds>,
    /// Copies inside the rank after all has landed.
    pub after: Vec<Unit>,
    /// Sums in bytes.
    pub bytes: Bytes,
}

/// Sums of a sync in bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Bytes {
    /// Copied inside the rank, source to target.
    pub local: u64,
    /// Shared memory: nothing moved.
    pub aliased: u64,
    /// Copied inside the rank after landing, target to target.
    pub doubled: u64,
    /// To other ranks.
    pub sent: u64,
    /// Of `sent`, packed by this rank; the rest is read by its readers.
    pub packed: u64,
    /// From other ranks.
    pub received: u64,
}

impl Bytes {
    /// What this rank's threads copy.
    pub fn work(&self) -> u64 {
        self.local + self.doubled + self.packed + self.received
    }
}

/// How the bytes of pairs travel.
pub struct Ways<'a> {
    /// By reading where the access allows it, else through lent memory: where the communicator can, with the peers that it covers.
    pub reads: Option<Reads<'a>>,
    /// In groups of messages of our own, with all others: whether a buffer's memory may be sent and received as it is, rather than
    /// through staging.
    pub direct: &'a dyn Fn(u32) -> bool,
    /// Longest message of a group.
    pub message: u64,
    /// Whether a message of a group may lie in several blocks ([`crate::comm::Group::scatters`]).
    pub scatters: bool,
}

/// See [`Ways`].
pub struct Reads<'a> {
    /// The communicator's.
    pub windows: &'a dyn Windows,
    /// What readers could make of our offers: `(reader, its offer's buffers, access)`.
    pub granted: &'a [(u32, Vec<u32>, Vec<Access>)],
    /// What we can make of the owners' offers.
    pub opened: &'a [(u32, Vec<u32>, Vec<Access>)],
    /// Longest message through lent memory.
    pub message: u64,
}

/// Rows of the owner's buffers that occur in the pieces of a pair, rising: what the owner offers and the reader expects.
pub fn offer(pieces: &[Piece]) -> Vec<u32> {
    let mut rows: Vec<u32> = pieces.iter().filter(|p| p.stream.is_none()).map(|p| p.src.buffer).collect();
    rows.sort_unstable();
    rows.dedup();
    rows
}

/// Lists the copies of all pieces that `accept` (by tensor: of this rank's table for `local`, by ordinal for the rest).
pub fn build(
    plan: &Plan,
    local: &Local,
    accept_local: &dyn Fn(u32) -> bool,
    accept: &dyn Fn(u32) -> bool,
    ways: &Ways<'_>,
) -> Work {
    let mut work = Work::default();
    if let Some(reads) = &ways.reads {
        work.owners = reads.opened.iter().map(|o| o.0).collect();
    }
    let mut grouped = vec![];
    for p in local.aliased.iter().filter(|p| accept_local(p.tensor)) {
        work.bytes.aliased += p.bytes();
    }
    let own = local.pieces.iter().filter(|p| accept_local(p.tensor));
    work.bytes.local = units(own.cloned(), Origin::Own, |row| row, &mut work.units);
    let doubles = plan.doubles.iter().filter(|p| accept(p.tensor));
    work.bytes.doubled = units(doubles.cloned(), Origin::Own, |row| row, &mut work.after);
    // What is passed on goes in messages of groups, a lane for each stream; both ends have the lanes of a pair in the same order.
    for peer in &plan.peers {
        let mut streams: BTreeMap<Stream, [Vec<&Piece>; 2]> = BTreeMap::new();
        for (side, list) in [&peer.out, &peer.into].into_iter().enumerate() {
            for p in list.iter().filter(|p| accept(p.tensor)) {
                if let Some(stream) = p.stream {
                    streams.entry(stream).or_default()[side].push(p);
                }
            }
        }
        for (stream, [out, into]) in streams {
            let sum = |list: &[&Piece]| list.iter().map(|p| p.bytes()).sum::<u64>();
            work.bytes.sent += sum(&out);
            work.bytes.packed += sum(&out);
            work.bytes.received += sum(&into);
            // Message by message the same at every hop: the pieces are, but not their axes, along which they would be cut.
            let longest = out.iter().chain(&into).map(|p| p.bytes()).max().unwrap_or(0);
            let message = (sum(&out).max(sum(&into)) / RUN).max(LEAST).max(longest).min(ways.message);
            grouped.push(Lane {
                peer: peer.rank,
                first: BEHIND * stream.hop as usize,
                out: parcels(whole_messages(out.into_iter().cloned(), message), false, pack),
                into: parcels(whole_messages(into.into_iter().cloned(), message), false, unpack),
            });
        }
    }
    for peer in &plan.peers {
        let wanted = |p: &&Piece| p.stream.is_none() && accept(p.tensor);
        let out: Vec<&Piece> = peer.out.iter().filter(wanted).collect();
        let into: Vec<&Piece> = peer.into.iter().filter(wanted).collect();
        work.bytes.sent += out.iter().map(|p| p.bytes()).sum::<u64>();
        let received: u64 = into.iter().map(|p| p.bytes()).sum();
        work.bytes.received += received;
        let (mut packed, mut unpacked) = (vec![], vec![]);
        let reads = ways.reads.as_ref().filter(|r| r.windows.covers(peer.rank));
        match reads {
            None => (packed, unpacked) = (out, into),
            Some(Reads { windows, granted, opened, .. }) => {
                let reads = |list: &[(u32, Vec<u32>, Vec<Access>)], p: &Piece| {
                    let found = list.binary_search_by_key(&peer.rank, |l| l.0).ok().and_then(|i| {
                        let at = list[i].1.binary_search(&p.src.buffer).ok()?;
                        list[i].2.get(at)
                    });
                    match found {
                        Some(Access::Mapped) => true,
                        // The kernel reads straight into the target, as it is.
                        Some(Access::Remote) => p.convert.is_none() && windows.prefers_read(p.source_run()),
                        _ => false,
                    }
                };
                packed.extend(out.into_iter().filter(|p| !reads(granted, p)));
                let mut read = vec![];
                for p in into {
                    if reads(opened, p) { read.push(p) } else { unpacked.push(p) }
                }
                if let (false, Ok(i)) = (read.is_empty(), opened.binary_search_by_key(&peer.rank, |l| l.0)) {
                    let rows = &opened[i].1;
                    // `reads` found each row in this list.
                    let place = |row: u32| rows.binary_search(&row).map_or(u32::MAX, |at| at as u32);
                    units(read.into_iter().cloned(), Origin::Owner(i), place, &mut work.units);
                }
            }
        }
        work.bytes.packed += packed.iter().map(|p| p.bytes()).sum::<u64>();
        if !packed.is_empty() || !unpacked.is_empty() {
            let (lanes, message) = reads.map_or((&mut grouped, ways.message), |r| (&mut work.lanes, r.message));
            // Both ends know the runs of a piece.
            let long =
                |p: &&Piece| ways.scatters && reads.is_none() && p.convert.is_none() && p.copy().run >= LONG.max(message / BLOCKS);
            let both = |list: Vec<&Piece>, copy: Ends| {
                let (long, short): (Vec<&Piece>, Vec<&Piece>) = list.into_iter().partition(long);
                let [long, short] = [long, short].map(|pieces| messages(pieces.into_iter().cloned(), message));
                [parcels(long, true, copy), parcels(short, false, copy)].concat()
            };
            lanes.push(Lane { peer: peer.rank, first: 0, out: both(packed, pack), into: both(unpacked, unpack) });
        }
    }
    work.group = Rounds::new(grouped, ways.direct);
    work
}

/// Between a piece's buffer at one end and byte so many of a message.
type Ends = fn(&Piece, u64) -> (u32, StridedCopy);

fn pack(p: &Piece, at: u64) -> (u32, StridedCopy) {
    (p.src.buffer, p.pack(at))
}

fn unpack(p: &Piece, at: u64) -> (u32, StridedCopy) {
    (p.dst.buffer, p.unpack(at))
}

fn parcels(messages: Vec<Message>, blocks: bool, copy: Ends) -> Vec<Parcel> {
    let make = |m: Message| {
        let mut at = 0;
        let mut copies = Vec::with_capacity(m.pieces.len());
        for p in &m.pieces {
            copies.push(copy(p, at));
            at += p.bytes();
        }
        Parcel { bytes: m.bytes, copies, blocks }
    };
    messages.into_iter().map(make).collect()
}

/// Appends units for pieces that are copied directly; returns their bytes.
fn units(pieces: impl Iterator<Item = Piece>, origin: Origin, place: impl Fn(u32) -> u32, out: &mut Vec<Unit>) -> u64 {
    let mut sum = 0;
    for m in messages(pieces, UNIT) {
        sum += m.bytes;
        let steps = m.pieces.iter().map(|p| Step { src: place(p.src.buffer), dst: p.dst.buffer, copy: p.copy() }).collect();
        out.push(Unit { bytes: m.bytes, origin, steps });
    }
    sum
}
