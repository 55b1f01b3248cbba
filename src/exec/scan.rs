//! Sums over this rank's memory: digests of parts of tensors, and checksums of what was sent and what landed.
//!
//! The device copies parts into memory that the CPU sees, a block at a time, converted where they must be, in an order that does not
//! depend on how they lie; there they are summed. So there is one loop that sums, whatever the memory and however it is strided.
#![forbid(unsafe_code)]

use super::{GRACE, lost, settle, until_done};
use crate::abi::RS_ERR_UNSUPPORTED;
use crate::comm::{Comm, Deadline};
use crate::convert::{Convert, Float};
use crate::device::{Copies, Device, HostBlock, Job, Mem, Shows, Stream};
use crate::digest::{Residue, elements, run};
use crate::error::{Error, Result, err};
use crate::geom::{Axis, Pattern, StridedCopy};
use smallvec::SmallVec;
use std::borrow::Cow;
use std::ops::Range;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};
use xxhash_rust::xxh3::xxh3_128_with_seed;

/// Most bytes that are copied and summed at once, equal on all ranks; what stays in a core's cache.
const SLICE: u64 = 256 << 10;

/// Bytes of a block where each is a launch and a wait.
const LARGE_BLOCK: u64 = 16 << 20;

/// What lies behind one another in a block begins at multiples of this.
const ALIGN: u64 = 64;

/// Elements that lie up to so many apart in a tensor are summed as one run with zeros between them.
const GAP: u64 = 8;

/// A box of a tensor in a buffer of this rank.
pub struct Part {
    /// Row of the buffer.
    pub buffer: u32,
    /// Bytes of an element of the buffer.
    pub item: u32,
    /// What each element becomes first.
    pub convert: Option<Convert>,
    /// The type whose NaNs are one and the same: which of them a cast makes, devices differ in.
    pub nans: Option<Float>,
    /// `key` counts elements of the tensor, `val` those of the buffer.
    pub pattern: Pattern,
}

/// How a part becomes a number.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Sum {
    /// What it adds to the digest of its tensor ([`crate::digest`]): any parts that hold the same elements have the same sum.
    Digest,
    /// A checksum of its elements in the order of its axes: the same of both ends of a piece. Faster.
    Checksum,
}

/// Where the memory is and who reads it.
pub struct Scan<'a> {
    /// Who copies.
    pub device: &'a dyn Device,
    /// Whose end ends it.
    pub comm: &'a dyn Comm,
    /// The rank's own buffers, by row.
    pub mems: &'a [Mem],
    /// Threads that copy and sum, the caller's included.
    pub threads: usize,
    /// End of all waiting.
    pub deadline: Deadline,
    /// What to make of the parts.
    pub sum: Sum,
}

/// The device's way to let the CPU see its memory; an error if it has none.
pub fn shown(device: &dyn Device) -> Result<&dyn Shows> {
    let none =
        || err!(RS_ERR_UNSUPPORTED, "'{}' does not copy its memory into the host's, where it could be looked at", device.name());
    device.shows().ok_or_else(none)
}

/// A part of a part that lies in a block.
struct Slice<'p> {
    /// Which of the parts it is of.
    of: usize,
    part: &'p Part,
    pattern: Pattern,
    copy: StridedCopy,
    /// Bytes of the block that it takes.
    bytes: u64,
}

impl Scan<'_> {
    /// The number of each part.
    pub fn run(&self, parts: &[Part]) -> Result<Vec<Residue>> {
        let block = if matches!(self.device.copies(), Copies::Prepared(_)) { LARGE_BLOCK } else { SLICE };
        let loads = loads(parts, block);
        let (next, ended) = (AtomicUsize::new(0), Mutex::new(Ok(vec![Residue::default(); parts.len()])));
        let threads = self.threads.clamp(1, loads.len().max(1));
        let worker = || {
            let mut own = vec![];
            let done = self.work(block, &mut || loads.get(next.fetch_add(1, Ordering::Relaxed)).map(Vec::as_slice), &mut own);
            let mut ended = ended.lock().unwrap_or_else(PoisonError::into_inner);
            match (done, &mut *ended) {
                (Ok(()), Ok(all)) => own.into_iter().for_each(|(part, number): (usize, Residue)| all[part] += number),
                (Ok(()), Err(_)) => {}
                (Err(e), _) => {
                    next.store(loads.len(), Ordering::Relaxed);
                    *ended = Err(e);
                }
            }
        };
        std::thread::scope(|scope| {
            for _ in 1..threads {
                // With fewer it takes longer.
                if std::thread::Builder::new().spawn_scoped(scope, worker).is_err() {
                    break;
                }
            }
            worker();
        });
        ended.into_inner().unwrap_or_else(PoisonError::into_inner)
    }

    /// Loads one after the other, in a block of its own.
    fn work<'l>(
        &self,
        block: u64,
        next: &mut dyn FnMut() -> Option<&'l [Slice<'l>]>,
        out: &mut Vec<(usize, Residue)>,
    ) -> Result<()> {
        let Some(mut load) = next() else { return Ok(()) };
        let stream = match self.device.copies() {
            Copies::Prepared(prepare) => Some(prepare.stream()?),
            Copies::AsTheyAre(_) => None,
        };
        let mut memory = shown(self.device)?.block(block as usize)?;
        loop {
            self.comm.check()?;
            self.deadline.check(|| "the sums over this rank's weights".into())?;
            if let Err(e) = self.read(load, &*memory, stream.as_ref().map_or(0, |s| s.raw())) {
                if !e.over {
                    std::mem::forget(memory);
                }
                return Err(e.error);
            }
            let end = load.last().map_or(0, |slice| slice.place().end);
            let bytes = memory.show(end, stream.as_ref().map_or(0, |s| s.raw()))?;
            for slice in load {
                let number = slice.number(self.sum, bytes)?;
                match out.last_mut() {
                    Some((of, sum)) if *of == slice.of => *sum += number,
                    _ => out.push((slice.of, number)),
                }
            }
            match next() {
                Some(more) => load = more,
                None => return Ok(()),
            }
        }
    }

    /// Fills a block.
    fn read(&self, load: &[Slice<'_>], memory: &dyn HostBlock, stream: Stream) -> std::result::Result<(), Unread> {
        let into = memory.mem();
        let mut jobs = Vec::with_capacity(load.len());
        for slice in load {
            let from = self.mems.get(slice.part.buffer as usize).ok_or_else(|| lost("a buffer"))?;
            jobs.push(Job::new(*from, into, &slice.copy)?);
        }
        let mut batch = None;
        match self.device.copies() {
            Copies::AsTheyAre(device) => device.copy(&jobs, stream)?,
            Copies::Prepared(prepare) => {
                let [list] = <[_; 1]>::try_from(prepare.prepare(&[jobs])?).map_err(|_| lost("a prepared list"))?;
                batch.insert(list).start(stream)?;
            }
        }
        let Err(error) = settle(self.device, stream, self.comm, self.deadline) else { return Ok(()) };
        let end = Deadline::after(GRACE);
        let over = until_done(self.device, stream, || end.check(|| "copies of a failed call".into())).is_ok();
        if !over {
            std::mem::forget(batch);
        }
        Err(Unread { error, over })
    }
}

/// Why a block is not filled, and whether nothing fills it any more.
struct Unread {
    error: Error,
    over: bool,
}

impl From<Error> for Unread {
    fn from(error: Error) -> Unread {
        Unread { error, over: true }
    }
}

impl Slice<'_> {
    /// Where it lies in the block.
    fn place(&self) -> Range<usize> {
        self.copy.dst as usize..(self.copy.dst + self.bytes) as usize
    }

    fn number(&self, sum: Sum, block: &[u8]) -> Result<Residue> {
        let mut bytes = Cow::Borrowed(block.get(self.place()).ok_or_else(|| lost("a place in a block"))?);
        if let Some(float) = self.part.nans {
            same_nans(bytes.to_mut(), float);
        }
        if sum == Sum::Checksum {
            return Ok(Residue::new(xxh3_128_with_seed(&bytes, self.pattern.key)));
        }
        let item = self.part.to_item();
        // Runs along the last axis, where its elements lie close enough in the tensor.
        let (last, outer) = match self.pattern.axes.split_last() {
            Some((last, outer)) if last.key <= GAP => (*last, outer),
            _ => (Axis { extent: 1, key: 1, val: 1 }, &self.pattern.axes[..]),
        };
        let mut spread = vec![0; if last.key > 1 { (((last.extent - 1) * last.key + 1) * item) as usize } else { 0 }];
        let mut out = elements(self.pattern.volume());
        let mut rows = bytes.chunks_exact((last.extent * item) as usize);
        each(self.pattern.key, outer, &mut |key| {
            let Some(row) = rows.next() else { return };
            if last.key == 1 {
                out += run(row, key * item);
                return;
            }
            let places = spread.chunks_mut((last.key * item) as usize);
            places
                .zip(row.chunks_exact(item as usize))
                .for_each(|(place, element)| place[..element.len()].copy_from_slice(element));
            out += run(&spread, key * item);
        });
        Ok(out)
    }
}

/// Makes all NaNs one.
fn same_nans(bytes: &mut [u8], float: Float) {
    let (mask, infinity): (u32, u32) = match float {
        Float::F32 => (0x7FFF_FFFF, 0x7F80_0000),
        Float::F16 => (0x7FFF, 0x7C00),
        Float::Bf16 => (0x7FFF, 0x7F80),
    };
    for element in bytes.chunks_exact_mut(float.item() as usize) {
        let bits = element.iter().rev().fold(0, |bits, &byte| bits << 8 | u32::from(byte));
        if bits & mask > infinity {
            let len = element.len();
            element.copy_from_slice(&mask.to_le_bytes()[..len]);
        }
    }
}

impl Part {
    /// Bytes of an element in a block.
    fn to_item(&self) -> u64 {
        u64::from(self.convert.map_or(self.item, |c| c.to.item()))
    }
}

/// Calls `f` with the number of each element of `axes`, the last fastest.
fn each(key: u64, axes: &[Axis], f: &mut impl FnMut(u64)) {
    match axes.split_first() {
        None => f(key),
        Some((axis, inner)) => (0..axis.extent).for_each(|i| each(key + i * axis.key, inner, f)),
    }
}

/// Appends patterns of at most `most` elements, which together are this one.
fn cut(pattern: &Pattern, most: u64, out: &mut Vec<Pattern>) {
    if pattern.volume() <= most {
        return out.push(pattern.clone());
    }
    let Some(first) = pattern.axes.first().copied() else { return };
    let one = Pattern { axes: pattern.axes[1..].into(), ..pattern.clone() };
    let steps = (most / one.volume()).max(1);
    let mut from = 0;
    while from < first.extent {
        let extent = steps.min(first.extent - from);
        let mut part = Pattern { key: pattern.key + from * first.key, val: pattern.val + from * first.val, ..one.clone() };
        if extent > 1 {
            part.axes.insert(0, Axis { extent, ..first });
        }
        cut(&part, most, out);
        from += extent;
    }
}

/// The parts in blocks of so many bytes.
fn loads(parts: &[Part], block: u64) -> Vec<Vec<Slice<'_>>> {
    let mut out: Vec<Vec<Slice<'_>>> = vec![];
    let mut end = block;
    let mut patterns = vec![];
    for (of, part) in parts.iter().enumerate() {
        cut(&part.pattern, SLICE / part.to_item(), &mut patterns);
        for pattern in patterns.drain(..) {
            let bytes = pattern.volume() * part.to_item();
            let mut at = end.next_multiple_of(ALIGN);
            if at + bytes > block {
                out.push(vec![]);
                at = 0;
            }
            end = at + bytes;
            let mut copy = StridedCopy::converting(part.item, part.convert, pattern.val, 0, steps(&pattern));
            copy.dst = at;
            if let Some(load) = out.last_mut() {
                load.push(Slice { of, part, pattern, copy, bytes });
            }
        }
    }
    out
}

/// Extents and steps of a pattern, in its buffer and in a block, where it is dense.
fn steps(pattern: &Pattern) -> SmallVec<[(u64, u64, u64); 4]> {
    let mut room = 1;
    let step = |axis: &Axis| {
        let step = (axis.extent, axis.val, room);
        room *= axis.extent;
        step
    };
    pattern.axes.iter().rev().map(step).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use smallvec::smallvec;

    fn elements_of(p: &Pattern) -> Vec<(u64, u64)> {
        let mut out = vec![(p.key, p.val)];
        for a in &p.axes {
            out = out.iter().flat_map(|&(k, v)| (0..a.extent).map(move |i| (k + i * a.key, v + i * a.val))).collect();
        }
        out.sort_unstable();
        out
    }

    #[test]
    fn cuts_fit_and_hold_each_element_once() {
        let mut rng = fastrand::Rng::with_seed(8);
        for _ in 0..3000 {
            let mut span = 1;
            let mut axes = smallvec![];
            for _ in 0..rng.usize(0..4) {
                let (extent, key) = (rng.u64(1..7), span * rng.u64(1..4));
                axes.push(Axis { extent, key, val: rng.u64(1..40) });
                span = key * extent;
            }
            let pattern = Pattern { key: rng.u64(0..9), val: rng.u64(0..9), axes }.coalesce();
            let most = rng.u64(1..60);
            let mut parts = vec![];
            cut(&pattern, most, &mut parts);
            assert!(parts.iter().all(|p| p.volume() <= most), "{pattern:?} in {most}");
            let mut all: Vec<_> = parts.iter().flat_map(elements_of).collect();
            all.sort_unstable();
            assert_eq!(all, elements_of(&pattern));
        }
    }
}
