//! Rounds of grouped sends and receives through our own staging: pack of round i+1, wire of round i, unpack of round i-1 overlap.
//!
//! A communicator that works on streams gets all rounds at once, on streams of our own that fork from the caller's and join it again;
//! others are waited for round by round.
//!
//! Staging has two halves, used by turns; each half holds one message to and one from every peer, so it takes at most
//! 4 * peers * message size. A message that is one contiguous block of a buffer goes from or to that buffer itself, and so do those of
//! long runs where the communicator takes messages of several blocks.
#![forbid(unsafe_code)]

use super::batches::{Batches, Places};
use super::work::{Lane, Parcel};
use super::{Run, lost};
use crate::comm::Group;
use crate::device::{Device, Event, Job, Mem, Stream, order};
use crate::error::{Result, err};
use crate::geom::StridedCopy;
use smallvec::{SmallVec, smallvec};
use std::collections::{BTreeSet, VecDeque};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

/// So many rounds are put on streams before the first of them must be done: a stream that stands still takes about a thousand calls,
/// then the next one waits for it, past every deadline.
const AHEAD: usize = 64;

/// Most operations in one group.
const GROUP_LIMIT: usize = 4096;

/// The messages of all pairs, and where each passes.
#[derive(Debug)]
pub struct Rounds {
    lanes: Vec<Lane>,
    /// Buffers that are not sent and received as they are.
    staged: BTreeSet<u32>,
    rounds: usize,
    /// Offset in a half of each lane's outgoing and incoming slot.
    slots: Vec<[u64; 2]>,
    half: u64,
}

impl Rounds {
    /// `None` without lanes. `may`: whether a buffer may be sent and received as it is.
    pub fn new(lanes: Vec<Lane>, may: &dyn Fn(u32) -> bool) -> Option<Rounds> {
        let rounds = lanes.iter().map(|l| l.first + l.out.len().max(l.into.len())).max()?;
        let parcels = lanes.iter().flat_map(|l| l.out.iter().chain(&l.into));
        let staged = parcels.flat_map(|p| p.copies.iter().map(|c| c.0)).filter(|&b| !may(b)).collect();
        let mut half = 0;
        let mut slots = vec![];
        for lane in &lanes {
            let mut slot = |list: &[Parcel]| {
                let at = half;
                half += list.iter().filter(|p| !direct(p, &staged)).map(|p| p.bytes).max().unwrap_or(0).next_multiple_of(256);
                at
            };
            slots.push([slot(&lane.out), slot(&lane.into)]);
        }
        Some(Rounds { lanes, staged, rounds, slots, half })
    }

    /// Bytes of staging that it uses.
    pub fn staging(&self) -> u64 {
        2 * self.half
    }

    /// Rows of the buffers that are sent or received as they are.
    pub fn direct(&self) -> BTreeSet<u32> {
        let parcels = self.lanes.iter().flat_map(|l| l.out.iter().chain(&l.into)).filter(|p| direct(p, &self.staged));
        parcels.flat_map(|p| p.copies.iter().map(|c| c.0)).collect()
    }

    /// The ranks that messages go to, and those that they come from.
    pub fn peers(&self) -> [Vec<u32>; 2] {
        let ranks = |some: fn(&Lane) -> bool| {
            // One may have several lanes.
            let ranks: BTreeSet<u32> = self.lanes.iter().filter(|l| some(l)).map(|l| l.peer).collect();
            ranks.into_iter().collect()
        };
        [ranks(|l| !l.out.is_empty()), ranks(|l| !l.into.is_empty())]
    }

    /// Number of rounds.
    pub fn rounds(&self) -> usize {
        self.rounds
    }

    /// Runs all rounds. An error ends the communicator: no group is in flight then, unless the run is stuck.
    pub fn run(&self, run: &Run<'_>, done: &AtomicU64, progress: &mut dyn FnMut(u64)) -> Result<()> {
        let out = self.all(run, done, progress);
        if let Err(e) = &out {
            run.comm.abort(e.text());
            if !run.comm.group().is_none_or(|g| g.idle()) {
                run.stuck.store(true, Ordering::Relaxed);
            }
        }
        out
    }

    /// Puts all rounds on streams. The caller's stream comes behind all that was put on them, also after an error, unless the run is stuck.
    pub fn enqueue(&self, run: &Run<'_>, batches: &Batches) -> Result<()> {
        let streams = batches.streams();
        let device = &**run.device;
        let out =
            streams.iter().try_for_each(|&s| order(device, run.stream, s)).and_then(|()| self.enqueue_on(run, batches, &streams));
        let joined = streams.iter().map(|&s| order(device, s, run.stream)).fold(Ok(()), Result::and);
        if joined.is_err() {
            run.stuck.store(true, Ordering::Relaxed);
        }
        out.and(joined)
    }

    fn enqueue_on(&self, run: &Run<'_>, batches: &Batches, streams: &[Stream]) -> Result<()> {
        let &[pack, wire, unpack] = streams else { return Err(lost("a stream for the rounds")) };
        let device = &**run.device;
        // Of the last two rounds, which use the two halves of the staging: after the messages, after the unpacking.
        let mut before: VecDeque<[Mark<'_>; 2]> = VecDeque::new();
        for (round, [packing, unpacking]) in batches.rounds.iter().enumerate() {
            if let Some([sent, unpacked]) = if round < 2 { None } else { before.pop_front() } {
                sent.before(pack)?;
                // What landed then may be passed on now.
                unpacked.before(pack)?;
                unpacked.before(wire)?;
            }
            if let (0, Some([sent, _])) = (round % AHEAD, before.front()) {
                sent.event.iter().try_for_each(|event| run.reach(event))?;
            }
            packing.start(pack)?;
            order(device, pack, wire)?;
            self.start(run, round, wire)?;
            self.on_stream(run)?;
            let sent = Mark::new(device, wire)?;
            sent.before(unpack)?;
            if self.lanes.iter().any(|l| l.at(1, round).is_some()) {
                run.wrote.store(true, Ordering::Relaxed);
            }
            unpacking.start(unpack)?;
            before.push_back([sent, Mark::new(device, unpack)?]);
        }
        Ok(())
    }

    fn all(&self, run: &Run<'_>, done: &AtomicU64, progress: &mut dyn FnMut(u64)) -> Result<()> {
        let mut flight = None;
        for round in 0..self.rounds {
            self.pack(run, round)?;
            run.settle()?;
            if let Some(before) = flight.take() {
                self.wait(run)?;
                self.start(run, round, run.stream)?;
                self.unpack(run, before, done)?;
            } else {
                self.start(run, round, run.stream)?;
            }
            flight = Some(round);
            progress(done.load(Ordering::Relaxed));
        }
        if let Some(before) = flight {
            self.wait(run)?;
            self.unpack(run, before, done)?;
        }
        run.settle()
    }

    fn slot(&self, places: Places<'_>, round: usize, lane: usize, side: usize, bytes: u64) -> Result<Mem> {
        let at = (round % 2) as u64 * self.half + self.slots[lane][side];
        places.staging.and_then(|m| m.cut(at as usize, bytes as usize)).ok_or_else(|| lost("staging"))
    }

    /// The memory of a message: its own blocks of buffers, or its slot.
    fn place(&self, run: &Run<'_>, round: usize, lane: usize, side: usize, p: &Parcel) -> Result<SmallVec<[Mem; 1]>> {
        if !direct(p, &self.staged) {
            return Ok(smallvec![self.slot(run.places, round, lane, side, p.bytes)?]);
        }
        let block = |(buffer, at, bytes): Block| {
            let block = run.mem(buffer)?.cut(at as usize, bytes as usize);
            block.ok_or_else(|| lost(format_args!("a block of buffer row {buffer}")))
        };
        blocks(p, side).into_iter().map(block).collect()
    }

    /// What is packed in a round, or unpacked: each message with its slot.
    fn slots<'s>(&'s self, places: Places<'s>, round: usize, side: usize) -> impl Iterator<Item = Result<(&'s Parcel, Mem)>> {
        self.lanes.iter().enumerate().filter_map(move |(i, lane)| {
            let p = lane.at(side, round).filter(|p| !direct(p, &self.staged))?;
            Some(self.slot(places, round, i, side, p.bytes).map(|slot| (p, slot)))
        })
    }

    /// The copies that pack a round (side 0) or unpack it (1).
    pub(super) fn jobs<'s>(&'s self, places: Places<'s>, round: usize, side: usize) -> Result<Vec<Job<'s>>> {
        let mut out = vec![];
        for slot in self.slots(places, round, side) {
            let (parcel, slot) = slot?;
            match side {
                0 => places.packing(parcel, slot).try_for_each(|job| job.map(|job| out.push(job)))?,
                _ => places.unpacking(parcel, slot).try_for_each(|job| job.map(|job| out.push(job)))?,
            }
        }
        Ok(out)
    }

    fn pack(&self, run: &Run<'_>, round: usize) -> Result<()> {
        match run.batches {
            Some(batches) => batches.rounds[round][0].start(run.stream),
            None => self.slots(run.places, round, 0).try_for_each(|slot| slot.and_then(|(p, slot)| run.pack(p, slot))),
        }
    }

    fn start(&self, run: &Run<'_>, round: usize, stream: Stream) -> Result<()> {
        let group = run.comm.group().ok_or_else(|| lost("the communicator's group"))?;
        group.begin()?;
        for (i, lane) in self.lanes.iter().enumerate() {
            if let Some(p) = lane.at(0, round) {
                group.send(&self.place(run, round, i, 0, p)?, lane.peer, stream)?;
            }
            if let Some(p) = lane.at(1, round) {
                if direct(p, &self.staged) {
                    run.wrote.store(true, Ordering::Relaxed);
                }
                group.recv(&self.place(run, round, i, 1, p)?, lane.peer, stream)?;
            }
        }
        group.end()
    }

    /// Waits until the groups that were started are complete.
    fn wait(&self, run: &Run<'_>) -> Result<()> {
        self.until(run, |group| group.poll())
    }

    /// Waits until the groups that were started are on their stream.
    fn on_stream(&self, run: &Run<'_>) -> Result<()> {
        self.until(run, |group| group.enqueued())
    }

    fn until(&self, run: &Run<'_>, so: impl Fn(&dyn Group) -> Result<bool>) -> Result<()> {
        let group = run.comm.group().ok_or_else(|| lost("the communicator's group"))?;
        let mut pause = Duration::from_micros(10);
        while !so(group)? {
            run.comm.check()?;
            run.deadline.check(|| group.missing())?;
            std::thread::sleep(pause);
            pause = (pause * 2).min(Duration::from_millis(1));
        }
        Ok(())
    }

    fn unpack(&self, run: &Run<'_>, round: usize, done: &AtomicU64) -> Result<()> {
        match run.batches {
            Some(batches) => {
                if self.lanes.iter().any(|l| l.at(1, round).is_some()) {
                    run.wrote.store(true, Ordering::Relaxed);
                }
                batches.rounds[round][1].start(run.stream)?;
            }
            None => self.slots(run.places, round, 1).try_for_each(|slot| slot.and_then(|(p, slot)| run.unpack(p, slot)))?,
        }
        let moved = |lane: &Lane| [0, 1].iter().filter_map(|&side| lane.at(side, round)).map(|p| p.bytes).sum::<u64>();
        done.fetch_add(self.lanes.iter().map(moved).sum(), Ordering::Relaxed);
        Ok(())
    }

    /// An error if a round needs more operations than a group may have.
    pub fn check(&self) -> Result<()> {
        let most = (0..self.rounds)
            .map(|k| self.lanes.iter().map(|l| usize::from(l.at(0, k).is_some()) + usize::from(l.at(1, k).is_some())).sum())
            .max()
            .unwrap_or(0);
        if most > GROUP_LIMIT {
            return Err(err!(
                crate::abi::RS_ERR_UNSUPPORTED,
                "this rank exchanges messages with {most} directions of peers in one round; a group holds at most {GROUP_LIMIT}"
            ));
        }
        Ok(())
    }
}

/// A point in a stream, given back when dropped.
struct Mark<'a> {
    device: &'a dyn Device,
    event: Option<Event>,
}

impl<'a> Mark<'a> {
    fn new(device: &'a dyn Device, stream: Stream) -> Result<Mark<'a>> {
        Ok(Mark { device, event: Some(device.record(stream)?) })
    }

    /// Lets what is started later on the stream wait for it.
    fn before(&self, stream: Stream) -> Result<()> {
        self.event.iter().try_for_each(|event| self.device.wait(stream, event))
    }
}

impl Drop for Mark<'_> {
    fn drop(&mut self) {
        if let Some(event) = self.event.take() {
            self.device.forget(event);
        }
    }
}

/// Whether a message goes from and to its buffers as it is.
fn direct(p: &Parcel, staged: &BTreeSet<u32>) -> bool {
    let single = matches!(&p.copies[..], [(_, copy)] if copy.axes.is_empty());
    (single || p.blocks) && p.copies.iter().all(|(buffer, copy)| copy.convert.is_none() && !staged.contains(buffer))
}

/// A part of a buffer: its row, first byte, bytes.
type Block = (u32, u64, u64);

/// Where a message comes from (side 0) or goes to (1), in its order.
fn blocks(p: &Parcel, side: usize) -> SmallVec<[Block; 1]> {
    let runs = |(buffer, copy): &(u32, StridedCopy)| {
        let (buffer, bytes) = (*buffer, copy.run);
        copy.runs().into_iter().map(move |run| (run[1 - side], (buffer, run[side], bytes)))
    };
    let mut runs: SmallVec<[(u64, Block); 1]> = p.copies.iter().flat_map(runs).collect();
    // A copy lists them in its target's order, which for side 1 is not the message's.
    runs.sort_unstable_by_key(|run| run.0);
    runs.into_iter().map(|run| run.1).collect()
}
