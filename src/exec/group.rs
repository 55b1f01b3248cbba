//! Rounds of grouped sends and receives through our own staging: pack of round i+1, wire of round i, unpack of round i-1 overlap.
//!
//! Staging has two halves, used by turns; each half holds one message to and one from every peer, so it takes at most
//! 4 * peers * message size. A message that is one contiguous block of a buffer goes from or to that buffer itself.
#![forbid(unsafe_code)]

use super::work::{Lane, Parcel};
use super::{Run, lost};
use crate::device::{Device, Mem};
use crate::error::{Result, err};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

/// Most operations in one group.
const GROUP_LIMIT: usize = 4096;

/// The messages of all pairs, and where each passes.
#[derive(Debug)]
pub struct Rounds {
    lanes: Vec<Lane>,
    rounds: usize,
    /// Offset in a half of each lane's outgoing and incoming slot.
    slots: Vec<[u64; 2]>,
    half: u64,
}

impl Rounds {
    /// `None` without lanes.
    pub fn new(lanes: Vec<Lane>) -> Option<Rounds> {
        let rounds = lanes.iter().map(|l| l.out.len().max(l.into.len())).max()?;
        let mut half = 0;
        let mut slots = vec![];
        for lane in &lanes {
            let mut slot = |list: &[Parcel]| {
                let at = half;
                half += list.iter().filter(|p| direct(p).is_none()).map(|p| p.bytes).max().unwrap_or(0).next_multiple_of(256);
                at
            };
            slots.push([slot(&lane.out), slot(&lane.into)]);
        }
        Some(Rounds { lanes, rounds, slots, half })
    }

    /// Bytes of staging that it uses.
    pub fn staging(&self) -> u64 {
        2 * self.half
    }

    /// Number of rounds.
    pub fn rounds(&self) -> usize {
        self.rounds
    }

    /// Runs all rounds. Ends the communicator before an error frees staging that a group in flight still uses.
    pub fn run(&self, run: &Run<'_>, done: &AtomicU64, progress: &mut dyn FnMut(u64)) -> Result<()> {
        let staging = Staging::new(run.device, self.staging())?;
        let out = self.all(run, &staging, done, progress);
        if let Err(e) = &out {
            run.comm.abort(e.text());
        }
        out
    }

    fn all(&self, run: &Run<'_>, staging: &Staging<'_>, done: &AtomicU64, progress: &mut dyn FnMut(u64)) -> Result<()> {
        let mut flight = None;
        for round in 0..self.rounds {
            self.pack(run, round, staging)?;
            run.settle()?;
            if let Some(before) = flight.take() {
                self.wait(run)?;
                self.start(run, round, staging)?;
                self.unpack(run, before, staging, done)?;
            } else {
                self.start(run, round, staging)?;
            }
            flight = Some(round);
            progress(done.load(Ordering::Relaxed));
        }
        if let Some(before) = flight {
            self.wait(run)?;
            self.unpack(run, before, staging, done)?;
        }
        run.settle()
    }

    fn slot(&self, staging: &Staging<'_>, round: usize, lane: usize, side: usize, bytes: u64) -> Result<Mem> {
        let at = (round % 2) as u64 * self.half + self.slots[lane][side];
        staging.mem.and_then(|m| m.cut(at as usize, bytes as usize)).ok_or_else(|| lost("staging"))
    }

    /// The memory of a message: its own block of a buffer, or its slot.
    fn place(&self, run: &Run<'_>, staging: &Staging<'_>, round: usize, lane: usize, side: usize, p: &Parcel) -> Result<Mem> {
        match direct(p) {
            Some((buffer, offset)) => {
                let block = run.mem(buffer)?.cut(offset[side] as usize, p.bytes as usize);
                block.ok_or_else(|| lost(format_args!("a block of buffer row {buffer}")))
            }
            None => self.slot(staging, round, lane, side, p.bytes),
        }
    }

    fn pack(&self, run: &Run<'_>, round: usize, staging: &Staging<'_>) -> Result<()> {
        for (i, lane) in self.lanes.iter().enumerate() {
            if let Some(p) = lane.out.get(round).filter(|p| direct(p).is_none()) {
                run.pack(p, self.slot(staging, round, i, 0, p.bytes)?)?;
            }
        }
        Ok(())
    }

    fn start(&self, run: &Run<'_>, round: usize, staging: &Staging<'_>) -> Result<()> {
        let group = run.comm.group().ok_or_else(|| lost("the communicator's group"))?;
        group.begin()?;
        for (i, lane) in self.lanes.iter().enumerate() {
            if let Some(p) = lane.out.get(round) {
                group.send(self.place(run, staging, round, i, 0, p)?, lane.peer, run.stream)?;
            }
            if let Some(p) = lane.into.get(round) {
                if direct(p).is_some() {
                    run.wrote.store(true, Ordering::Relaxed);
                }
                group.recv(self.place(run, staging, round, i, 1, p)?, lane.peer, run.stream)?;
            }
        }
        group.end()
    }

    fn wait(&self, run: &Run<'_>) -> Result<()> {
        let group = run.comm.group().ok_or_else(|| lost("the communicator's group"))?;
        let mut pause = Duration::from_micros(10);
        while !group.poll()? {
            run.comm.check()?;
            run.deadline.check(|| "the caller's communicator to complete a group of sends and receives".into())?;
            std::thread::sleep(pause);
            pause = (pause * 2).min(Duration::from_millis(1));
        }
        Ok(())
    }

    fn unpack(&self, run: &Run<'_>, round: usize, staging: &Staging<'_>, done: &AtomicU64) -> Result<()> {
        for (i, lane) in self.lanes.iter().enumerate() {
            if let Some(p) = lane.out.get(round) {
                done.fetch_add(p.bytes, Ordering::Relaxed);
            }
            if let Some(p) = lane.into.get(round) {
                if direct(p).is_none() {
                    run.unpack(p, self.slot(staging, round, i, 1, p.bytes)?)?;
                }
                done.fetch_add(p.bytes, Ordering::Relaxed);
            }
        }
        Ok(())
    }

    /// An error if a round needs more operations than a group may have.
    pub fn check(&self) -> Result<()> {
        let most = (0..self.rounds)
            .map(|k| self.lanes.iter().map(|l| usize::from(l.out.len() > k) + usize::from(l.into.len() > k)).sum())
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

/// Buffer and byte offsets (as source, as target) of a message that is one contiguous block there.
fn direct(p: &Parcel) -> Option<(u32, [u64; 2])> {
    match &p.copies[..] {
        [(buffer, copy)] if copy.axes.is_empty() && copy.convert.is_none() => Some((*buffer, [copy.src, copy.dst])),
        _ => None,
    }
}

/// Staging of one sync.
struct Staging<'a> {
    device: &'a dyn Device,
    mem: Option<Mem>,
}

impl<'a> Staging<'a> {
    fn new(device: &'a dyn Device, bytes: u64) -> Result<Staging<'a>> {
        let mem = if bytes == 0 { None } else { Some(device.alloc(bytes as usize)?) };
        Ok(Staging { device, mem })
    }
}

impl Drop for Staging<'_> {
    fn drop(&mut self) {
        if let Some(mem) = self.mem.take() {
            self.device.free(mem);
        }
    }
}
