//! A number of the weights that all ranks hold together, however they are cut: see [`crate::digest`].
#![forbid(unsafe_code)]

use super::connect::{Connected, agree_outcome};
use super::sync::{compare, gather, give_up};
use super::{Container, Phase};
use crate::abi::*;
use crate::comm::{Comm, Deadline};
use crate::digest::{Residue, scale};
use crate::error::{Error, Result, bail};
use crate::exec::scan::{self, Scan, Sum, shown};
use crate::plan::parts::{self, Part};
use crate::wire::{Call, Header, Table};
use std::collections::BTreeMap;
use xxhash_rust::xxh3::xxh3_64;

/// Of the first copy beside the one that counts; of the next its square, and so on. The fraction of e, less its first
/// bit.
const WEIGHT: Residue = Residue::constant(0x37E1_5162_8AED_2A6A_BF71_5880_9CF4_F3C7);

/// What is asked for.
struct Asked {
    /// Sources are 0, targets 1.
    side: usize,
    /// By ordinal; `None`: all that a sync moves.
    tensors: Option<Vec<bool>>,
}

impl Asked {
    fn wants(&self, part: &Part) -> bool {
        self.tensors.as_ref().map_or(part.moved, |chosen| chosen[part.tensor as usize])
    }
}

/// What a rank adds.
#[derive(Clone, Copy, Default)]
struct Tally {
    /// Of what counts.
    sum: Residue,
    /// 0 over all ranks where all copies of each element are alike.
    apart: Residue,
    /// Elements that count.
    elements: u64,
}

impl Tally {
    fn new(part: &Part, sum: Residue) -> Tally {
        let mut weights = std::iter::successors(Some(WEIGHT), |w| Some(*w * WEIGHT));
        if part.copy == 0 {
            // What the others take away, if they hold the same. Each has a weight of its own, so that two that differ do not even out.
            let others = weights.take(part.copies as usize - 1).fold(Residue::default(), |sum, weight| sum + weight);
            return Tally { sum, apart: sum * others, elements: part.pattern.volume() };
        }
        let weight = weights.nth(part.copy as usize - 1).unwrap_or(WEIGHT);
        Tally { apart: -(sum * weight), ..Tally::default() }
    }

    fn and(self, other: &Tally) -> Tally {
        Tally { sum: self.sum + other.sum, apart: self.apart + other.apart, elements: self.elements + other.elements }
    }
}

impl Part {
    fn scanned(&self) -> Result<scan::Part> {
        let convert = self.convert.clone()?;
        Ok(scan::Part { buffer: self.buffer, item: self.source_item(), convert, nans: self.cast, pattern: self.pattern.clone() })
    }
}

impl Container {
    /// Collective: the fingerprint of what all ranks hold as sources or as targets, of one tensor, of those whose names begin so
    /// (`name*`), or of all that a sync moves.
    pub fn fingerprint(&mut self, role: u32, tensor: Option<&str>) -> Result<[u8; 16]> {
        let (mut connected, comm, turn) = self.begin()?;
        self.control.started();
        let result = self.sum_up(&*comm, &mut connected, role, tensor);
        drop(turn);
        match &result {
            Err(e) if e.status() <= RS_ERR_TIMEOUT => self.ended("the fingerprint", &Err(e.clone()), None),
            _ => self.control.rested(),
        }
        self.phase = Phase::Connected(connected);
        self.break_off();
        result
    }

    fn sum_up(&self, comm: &dyn Comm, c: &mut Connected, role: u32, tensor: Option<&str>) -> Result<[u8; 16]> {
        let deadline = Deadline::after(self.timeout);
        // Another rank may take this header for that of a sync, which has a number.
        c.number += 1;
        let asked = self.asked(c, role, tensor);
        let mine = Header {
            call: Call::Fingerprint,
            version: 0,
            plan: c.digest,
            subset: digest(role, tensor),
            binding: self.binding,
            status: asked.as_ref().err().map_or(RS_OK, Error::status),
        };
        let headers = gather(comm, &mine, deadline).map_err(|e| give_up(comm, e))?;
        let asked = asked.map_err(|e| if e.status() <= RS_ERR_TIMEOUT { give_up(comm, e) } else { e })?;
        compare(comm.rank(), &headers, &mine)?;

        let known = c.parts[asked.side].take();
        let parts = match known {
            Some(parts) => Ok(parts),
            None => self.parts(comm, c, asked.side, deadline)?,
        };
        let tallies = parts.as_ref().map_err(Error::clone).and_then(|all| {
            let wanted: Vec<&Part> = all.iter().filter(|part| asked.wants(part)).collect();
            let scan = Scan { device: &*self.device, comm, mems: &self.mems, threads: self.threads, deadline, sum: Sum::Digest };
            self.still_there(&wanted)?;
            let sums = scan.run(&wanted.iter().map(|part| part.scanned()).collect::<Result<Vec<_>>>()?)?;
            let mut tallies: BTreeMap<u32, Tally> = BTreeMap::new();
            for (part, sum) in wanted.into_iter().zip(sums) {
                let tensor = &c.planned.union.tensors[part.tensor as usize];
                let sum = sum * scale(&tensor.name, part.kind(), &tensor.shape);
                let tally = tallies.entry(part.tensor).or_default();
                *tally = tally.and(&Tally::new(part, sum));
            }
            Ok(tallies)
        });
        agree_outcome(comm, tallies.as_ref().map(|_| (0, 0)), deadline)?;
        let tallies = tallies?;
        // Only now, as all ranks ask for tables again or none does.
        c.parts[asked.side] = Some(parts?);

        let own = tallies.values().fold(Tally::default(), |sum, tally| sum.and(tally));
        let all = totals(comm, &own, deadline)?;
        let held_as = ["source", "target"][asked.side];
        if all.apart != Residue::default() {
            let name = differing(comm, c, &tallies, deadline)?;
            bail!(
                RS_ERR_MISMATCH,
                "tensor '{name}': the ranks that hold the same part of it as {held_as} do not hold the same bytes, so it has no fingerprint"
            );
        }
        if all.elements == 0 {
            let what = tensor.map_or("any tensor".to_string(), |name| format!("'{name}'"));
            bail!(RS_ERR_NOT_FOUND, "no rank holds {what} as {held_as}");
        }
        Ok(all.sum.to_bytes())
    }

    /// What can be wrong on this rank alone.
    fn asked(&self, c: &Connected, role: u32, tensor: Option<&str>) -> Result<Asked> {
        shown(&*self.device)?;
        let side = match role {
            RS_SOURCE => 0,
            RS_TARGET => 1,
            _ => bail!(RS_ERR_INVALID, "role is {role}: a fingerprint is of RS_SOURCE ({RS_SOURCE}) or of RS_TARGET ({RS_TARGET})"),
        };
        if self.wrecks.iter().any(|wreck| !wreck.stuck().over()) {
            bail!(RS_ERR_STATE, "{} is not through with a failed sync, which may still write: ask again later", self.device.name());
        }
        let tensors = match tensor {
            None => None,
            Some(name) => {
                let named = c.planned.union.named(name);
                if named.is_empty() {
                    bail!(RS_ERR_NOT_FOUND, "no rank has a tensor '{name}'");
                }
                let mut chosen = vec![false; c.planned.union.tensors.len()];
                named.iter().for_each(|&o| chosen[o as usize] = true);
                Some(chosen)
            }
        };
        Ok(Asked { side, tensors })
    }

    /// An error if memory is gone that is to be read.
    fn still_there(&self, parts: &[&Part]) -> Result<()> {
        let mut used = vec![false; self.mems.len() + 1];
        parts.iter().for_each(|part| used[part.buffer as usize] = true);
        self.ground.check(&*self.device, &used, |row| self.buffer_name(row))
    }

    /// What this rank holds. Without a world spec, ranks exchange their tables once more: the outer error is of that.
    fn parts(&self, comm: &dyn Comm, c: &Connected, side: usize, deadline: Deadline) -> Result<Result<Vec<Part>>> {
        let me = comm.rank();
        if let Some(world) = &c.planned.world {
            return Ok(parts::of_world(me, side, world));
        }
        let own = Table::of(&self.layout);
        let blob = own.encode(me)?;
        let tables = self.tables(comm, own, blob, &c.records, deadline)?;
        Ok(tables.and_then(|tables| parts::of_tables(me, side, &tables)))
    }
}

/// Sums over all ranks.
fn totals(comm: &dyn Comm, own: &Tally, deadline: Deadline) -> Result<Tally> {
    let mine = [&own.sum.to_bytes()[..], &own.apart.to_bytes(), &own.elements.to_le_bytes()].concat();
    let all = comm.allgather(&mine, deadline).map_err(|e| give_up(comm, e))?;
    Ok(all.chunks_exact(mine.len()).fold(Tally::default(), |sum, of| {
        sum.and(&Tally {
            sum: Residue::from_bytes(&of[..16]),
            apart: Residue::from_bytes(&of[16..32]),
            elements: of[32..].iter().rev().fold(0, |n, &byte| n << 8 | u64::from(byte)),
        })
    }))
}

/// The first tensor whose copies differ. Collective; all ranks look at the same halves.
fn differing<'c>(comm: &dyn Comm, c: &'c Connected, tallies: &BTreeMap<u32, Tally>, deadline: Deadline) -> Result<&'c str> {
    let (mut low, mut high) = (0, c.planned.union.tensors.len() as u32);
    while high - low > 1 {
        let middle = low + (high - low) / 2;
        let own = tallies.range(low..middle).fold(Tally::default(), |sum, (_, tally)| sum.and(tally));
        if totals(comm, &own, deadline)?.apart == Residue::default() { low = middle } else { high = middle }
    }
    Ok(c.planned.union.tensors.get(low as usize).map_or("", |t| &t.name))
}

/// Tells what is asked for from other questions.
fn digest(role: u32, tensor: Option<&str>) -> u64 {
    xxh3_64(format!("{role} {tensor:?}").as_bytes())
}
