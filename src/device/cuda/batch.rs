//! Lists of copies as the kernel takes them.
//!
//! A copy is cut until 32 bits hold its offsets and the kernel's axes suffice, and where that makes wide accesses possible: a row
//! whose two ends are aligned alike is a few bytes, then units of 16, then a few bytes. Each part becomes a descriptor, of rows or
//! of tiles. Then the descriptors are divided into chunks of about equal cost.
//!
//! Knows what the kernel can do and what its accesses cost. Must not know the driver.
#![forbid(unsafe_code)]

mod desc;
#[cfg(test)]
mod tests;

use crate::convert::Convert;
use crate::device::Job;
use crate::geom::{CopyAxis, StridedCopy};
use desc::{AXES, Axis, CAST, CAST_ODD, CAST_WIDE, Desc, LIMIT, STORE_WIDE, UNITS, cast};
use smallvec::{SmallVec, smallvec};

/// Threads of a block.
pub const BLOCK: u32 = 256;

/// Contiguous moves of so many bytes are left to the driver's memcpy: they take long enough to hide what a call more costs.
const LARGE: u64 = 16 << 20;

/// So many of a list, and no more: a stream that stands still takes about a thousand calls, then the next one waits for it.
const MOST_COPIES: usize = 64;

/// Bytes of the kernel's widest access.
const UNIT: u64 = 16;
/// A tile is so many rows, along `d`, of so many bytes along `s`.
const TILE_ROWS: u64 = 128;
const ROW: u64 = 128;

/// Planes with fewer elements along an axis would leave most of a tile empty. As rows, the other side's accesses share what few
/// sectors they have.
const LEAST_PLANE: u64 = 8;
/// Elements that lie further apart at the source share no sector: there is nothing that a tile could gain.
const SECTOR: u64 = 32;

/// Groups of wide accesses along a loop that are worth descriptors of their own, apart from what is left at the ends.
const WORTH_CUTTING: u64 = 16;

/// Chunks that a list should at least have: a few waves on the largest GPUs, so that none of their multiprocessors ends long after
/// the others.
const CHUNKS: u64 = 2048;
/// Bytes of a chunk, at least and at most: below, finding the descriptor costs more than moving its bytes; above, there is nothing
/// to gain.
const CHUNK_COST: (u64, u64) = (4 << 10, 64 << 10);

/// A list of copies.
#[derive(Debug, Default)]
pub struct Descriptors {
    descs: Vec<u8>,
    first: Vec<u32>,
    /// Of all descriptors; 0: there is nothing for the kernel to do.
    pub chunks: u32,
    /// What is not the kernel's but the driver's: target, source, bytes.
    pub copies: Vec<(u64, u64, u64)>,
}

impl Descriptors {
    /// Of jobs that do not overlap.
    pub fn new(jobs: &[Job<'_>]) -> Descriptors {
        Descriptors::of(jobs.iter().map(|job| (job.src_addr() as u64, job.dst_addr() as u64, job.copy())))
    }

    /// Of copies from an address to an address.
    fn of<'a>(copies: impl Iterator<Item = (u64, u64, &'a StridedCopy)>) -> Descriptors {
        let mut out = Descriptors::default();
        let mut descs = Vec::new();
        for (src, dst, copy) in copies {
            if copy.bytes() == 0 {
                continue;
            }
            let large = copy.axes.is_empty() && copy.convert.is_none() && copy.run >= LARGE;
            if large && out.copies.len() < MOST_COPIES {
                out.copies.push((dst, src, copy.run));
            } else {
                Piece::new(src, dst, copy).place(&mut descs);
            }
        }
        let cost = descs.iter().map(cost).sum::<u64>();
        let wanted = (cost / CHUNKS).clamp(CHUNK_COST.0, CHUNK_COST.1);
        for mut desc in descs {
            out.chunks += divide(&mut desc, wanted, &mut out.first, out.chunks);
            desc.put(&mut out.descs);
        }
        out
    }

    /// All descriptors, to be aligned to 8 bytes.
    pub fn bytes(&self) -> &[u8] {
        &self.descs
    }

    /// Number of the first chunk of each.
    pub fn first_bytes(&self) -> Vec<u8> {
        self.first.iter().flat_map(|first| first.to_ne_bytes()).collect()
    }

    /// Number of descriptors.
    pub fn count(&self) -> u32 {
        self.first.len() as u32
    }
}

/// About how many bytes could be moved while the kernel does the whole descriptor. A tile takes its time however full it is, and an
/// access of a byte as much as one of four.
fn cost(desc: &Desc) -> u64 {
    u64::from(desc.items) * if desc.tiles == 1 { TILE_ROWS * ROW } else { access(desc).max(4) }
}

/// Bytes that a descriptor of rows moves at once, on the larger side.
fn access(desc: &Desc) -> u64 {
    match desc.path {
        path if path < CAST => 1 << path,
        path if (CAST_WIDE..CAST_ODD).contains(&path) => UNIT,
        path if path % 4 == 0 => 2,
        _ => 4,
    }
}

/// Divides a descriptor into chunks of about `wanted` bytes, the first of number `next`; their count.
fn divide(desc: &mut Desc, wanted: u64, first: &mut Vec<u32>, next: u32) -> u32 {
    let items = u64::from(desc.items);
    let mut per_chunk = items.div_ceil(cost(desc).div_ceil(wanted));
    if desc.tiles == 0 {
        // All threads of the block are busy in each turn, but for the last of a descriptor.
        per_chunk = per_chunk.next_multiple_of(u64::from(BLOCK)).min(items);
    }
    desc.per_chunk = per_chunk as u32;
    first.push(next);
    items.div_ceil(per_chunk) as u32
}

/// A part of a copy: elements over `loops`, the fastest at the target first.
#[derive(Clone, Debug)]
struct Piece {
    src: u64,
    dst: u64,
    /// Bytes of an element on each side. Without a conversion, elements are bytes.
    item: (u64, u64),
    convert: Option<Convert>,
    /// The first is the run, contiguous on both sides.
    loops: SmallVec<[CopyAxis; 8]>,
}

impl Piece {
    fn new(src: u64, dst: u64, copy: &StridedCopy) -> Piece {
        let item = copy.convert.map_or((1, 1), |c| (u64::from(c.from.item()), u64::from(c.to.item())));
        let mut loops = smallvec![CopyAxis { extent: copy.run / item.0, src: item.0, dst: item.1 }];
        loops.extend(copy.axes.iter().rev().copied().filter(|axis| axis.extent > 1));
        Piece { src, dst, item, convert: copy.convert, loops }
    }

    /// From the first element on each side to the end of the last.
    fn spans(&self) -> (u64, u64) {
        let span = |item, step: fn(&CopyAxis) -> u64| self.loops.iter().map(|l| (l.extent - 1) * step(l)).sum::<u64>() + item;
        (span(self.item.0, |l| l.src), span(self.item.1, |l| l.dst))
    }

    /// Steps `from..to` of one loop.
    fn cut(&self, at: usize, from: u64, to: u64) -> Piece {
        let mut part = self.clone();
        part.src += from * self.loops[at].src;
        part.dst += from * self.loops[at].dst;
        part.loops[at].extent = to - from;
        if at > 0 && part.loops[at].extent == 1 {
            part.loops.remove(at);
        }
        part
    }

    /// Descriptors of all of it.
    fn place(self, out: &mut Vec<Desc>) {
        if self.loops.len() > AXES {
            let axes = 1..self.loops.len();
            let least = axes.min_by_key(|&i| self.loops[i].extent).unwrap_or(1);
            (0..self.loops[least].extent).for_each(|step| self.cut(least, step, step + 1).place(out));
            return;
        }
        let (src, dst) = self.spans();
        if src >= LIMIT || dst >= LIMIT {
            let reach = |i: &usize| (self.loops[*i].extent - 1) * self.loops[*i].src.max(self.loops[*i].dst);
            let longest = (0..self.loops.len()).max_by_key(reach).unwrap_or(0);
            let extent = self.loops[longest].extent;
            self.cut(longest, 0, extent / 2).place(out);
            self.cut(longest, extent / 2, extent).place(out);
            return;
        }
        if !self.tiles(out) {
            self.rows(out);
        }
    }

    /// Places what lies before, in and after `from..to` of a loop, if that is not all of it.
    fn split(&self, at: usize, (from, to): (u64, u64), out: &mut Vec<Desc>) -> bool {
        let extent = self.loops[at].extent;
        let parts = [(0, from), (from, to), (to, extent)].into_iter().filter(|(from, to)| from < to);
        let whole = (from, to) == (0, extent);
        if !whole {
            parts.for_each(|(from, to)| self.cut(at, from, to).place(out));
        }
        !whole
    }

    /// Steps of a loop before the first that begins an aligned access of `lanes` steps; `None`: there is none, or not in each row.
    /// `side` is the source's or the target's bytes from step to step.
    fn skip(&self, at: usize, lanes: u64, begin: u64, side: fn(&CopyAxis) -> u64) -> Option<u64> {
        let step = side(&self.loops[at]);
        let width = step * lanes;
        // Seen from another loop, the run is an element.
        let mut others = self.loops.iter().enumerate().filter(|(i, _)| *i != at && *i > 0);
        let alike = begin % step == 0 && others.all(|(_, other)| side(other) % width == 0);
        alike.then(|| begin.wrapping_neg() % width / step)
    }

    /// The steps after `skip` that make whole groups of `lanes`, if that is all of the loop or enough of it to be worth cutting.
    fn groups(&self, at: usize, lanes: u64, skip: u64) -> Option<(u64, u64)> {
        let extent = self.loops[at].extent;
        let (from, to) = (skip, extent - extent.saturating_sub(skip) % lanes);
        ((from, to) == (0, extent) || extent >= WORTH_CUTTING * lanes).then_some((from, to))
    }

    /// Descriptors of rows, the widest that alignment allows.
    fn rows(self, out: &mut Vec<Desc>) {
        let mut lanes = UNIT / self.item.0.max(self.item.1);
        loop {
            let skip = self.skip(0, lanes, self.src, |l| l.src);
            let skip = skip.filter(|_| skip == self.skip(0, lanes, self.dst, |l| l.dst));
            if let Some(range) = skip.and_then(|skip| self.groups(0, lanes, skip)) {
                if !self.split(0, range, out) {
                    let path = match self.convert {
                        None => lanes.ilog2(),
                        Some(convert) => cast(convert) + if lanes == 1 { CAST } else { CAST_WIDE },
                    };
                    out.push(self.rows_of(path, lanes));
                }
                return;
            }
            match self.convert {
                None => lanes /= 2,
                Some(_) if lanes > 1 => lanes = 1,
                Some(convert) => return out.push(self.rows_of(CAST_ODD + cast(convert), 1)),
            }
        }
    }

    fn rows_of(&self, path: u32, lanes: u64) -> Desc {
        let run = self.loops[0];
        let vectors = CopyAxis { extent: run.extent / lanes, src: run.src * lanes, dst: run.dst * lanes };
        let axes = std::iter::once(vectors).chain(self.loops[1..].iter().copied()).filter(|axis| axis.extent > 1);
        self.desc(path, axes.map(|axis| Axis::new(axis.extent, axis.src, axis.dst)))
    }

    /// Descriptors of tiles, if the elements lie in another order on the two sides; else it does nothing.
    fn tiles(&self, out: &mut Vec<Desc>) -> bool {
        let run = self.loops[0].extent;
        let item = match self.convert {
            None if matches!(run, 1 | 2 | 4 | 8 | 16) => (run, run),
            Some(_) if run == 1 => self.item,
            _ => return false,
        };
        let axes = || 1..self.loops.len();
        let s = axes().filter(|&i| self.loops[i].src > 0).min_by_key(|&i| self.loops[i].src);
        let d = axes().min_by_key(|&i| self.loops[i].dst);
        let (Some(at_s), Some(at_d)) = (s, d) else { return false };
        let (s, d) = (self.loops[at_s], self.loops[at_d]);
        let aligned = |begin: u64, item: u64, side: fn(&CopyAxis) -> u64| {
            begin % item == 0 && axes().all(|i| side(&self.loops[i]) % item == 0)
        };
        if at_s == at_d
            || s.src >= SECTOR
            || s.extent.min(d.extent) < LEAST_PLANE
            || !aligned(self.src, item.0, |l| l.src)
            || !aligned(self.dst, item.1, |l| l.dst)
        {
            return false;
        }
        let lanes = (UNIT / item.0, UNIT / item.1);
        let wide = |at: usize, lanes, skip: Option<u64>| skip.and_then(|skip| self.groups(at, lanes, skip));
        let dense = self.convert.is_none() && lanes.0 > 1 && s.src == item.0;
        let units = wide(at_s, lanes.0, dense.then(|| self.skip(at_s, lanes.0, self.src, |l| l.src)).flatten());
        let dense = lanes.1 > 1 && d.dst == item.1;
        let stores = wide(at_d, lanes.1, dense.then(|| self.skip(at_d, lanes.1, self.dst, |l| l.dst)).flatten());
        if units.is_some_and(|range| self.split(at_s, range, out)) || stores.is_some_and(|range| self.split(at_d, range, out)) {
            return true;
        }
        let path = match self.convert {
            Some(convert) => CAST + cast(convert),
            None if units.is_some() => UNITS,
            None => item.0.ilog2(),
        };
        let columns = ROW / item.1;
        let across = |axis: CopyAxis, steps: u64| match axis.extent.div_ceil(steps) {
            1 => Axis::new(1, 0, 0),
            tiles => Axis::new(tiles, axis.src * steps, axis.dst * steps),
        };
        let outer = axes().filter(|i| ![at_s, at_d].contains(i)).map(|i| self.loops[i]);
        let outer = outer.map(|axis| Axis::new(axis.extent, axis.src, axis.dst));
        let mut desc = self.desc(path, [across(s, columns), across(d, TILE_ROWS)].into_iter().chain(outer));
        desc.tiles = 1;
        desc.store = item.1.ilog2() + if stores.is_some() { STORE_WIDE } else { 0 };
        [desc.s_extent, desc.s_src, desc.s_dst] = [s.extent, s.src, s.dst].map(|n| n as u32);
        [desc.d_extent, desc.d_src, desc.d_dst] = [d.extent, d.src, d.dst].map(|n| n as u32);
        out.push(desc);
        true
    }

    fn desc(&self, path: u32, axes: impl Iterator<Item = Axis>) -> Desc {
        let mut desc = Desc { src: self.src, dst: self.dst, items: 1, path, ..Desc::default() };
        for axis in axes {
            desc.axes[desc.rank as usize] = axis;
            desc.rank += 1;
            desc.items *= axis.extent;
        }
        if desc.rank == 0 {
            (desc.rank, desc.axes[0]) = (1, Axis::new(1, 0, 0));
        }
        if let Some(convert) = self.convert {
            desc.set_convert(convert);
        }
        desc
    }
}
