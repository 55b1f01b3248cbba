//! `host`: the CPU copies, on the thread that calls.
//!
//! A copy becomes loops over one of two inner shapes: rows (`rows`: `run` contiguous bytes at a time) or, where the run is one
//! element and the two sides are contiguous along different axes, tiles (`tiles`: transposes through a block that stays in the
//! L1 cache). Both write in the target's order. A copy that converts values goes through a small block (`cast`).
//!
//! Each shape has a portable form and one with AVX2, chosen when the device is made. The AVX2 form may write past the caches:
//! a store that misses first reads the line it is about to overwrite, so a large target costs three transfers for two. That pays
//! only where nobody reads the target soon, which is what [`Job::streaming`] says.
//!
//! Knows addresses, strides and cache lines. Must not know who asked for a copy or why.

mod cast;
mod rows;
mod tiles;
#[cfg(test)]
mod tests;

use super::{Copies, CopyNow, Device, Event, HostBlock, Job, Mem, Shows, Stream};
use crate::abi::*;
use crate::error::{Result, bail, err};
use crate::geom::CopyAxis;
use smallvec::SmallVec;
use std::cell::UnsafeCell;
use std::collections::BTreeMap;
use std::io;
use std::ptr;
use std::slice;
use std::sync::{Mutex, PoisonError};

/// Which form of the inner loops runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Path {
    Portable,
    /// Only made after the CPU said that it has AVX2.
    #[cfg(target_arch = "x86_64")]
    Avx2,
}

/// Host memory. Any number of threads may copy at once, each what it was told.
pub struct HostDevice {
    path: Path,
    /// Address and mapped length of each allocation.
    blocks: Mutex<BTreeMap<usize, usize>>,
}

impl Default for HostDevice {
    fn default() -> Self {
        HostDevice::new()
    }
}

impl HostDevice {
    /// With the fastest loops that this CPU runs.
    pub fn new() -> HostDevice {
        #[cfg(target_arch = "x86_64")]
        if is_x86_feature_detected!("avx2") {
            return HostDevice { path: Path::Avx2, blocks: Mutex::default() };
        }
        HostDevice::portable()
    }

    /// With the loops that every CPU runs.
    pub fn portable() -> HostDevice {
        HostDevice { path: Path::Portable, blocks: Mutex::default() }
    }
}

impl Device for HostDevice {
    fn name(&self) -> &str {
        "host"
    }

    fn id(&self) -> (i32, i32) {
        (RS_DEVICE_CPU, 0)
    }

    fn shows(&self) -> Option<&dyn Shows> {
        Some(self)
    }

    fn converts(&self) -> bool {
        true
    }

    /// Zeroed pages, each made when first touched.
    fn alloc(&self, bytes: usize) -> Result<Mem> {
        const HUGE: usize = 2 << 20;
        let len = bytes.max(1);
        // SAFETY: a new private mapping without a wanted address touches nothing that exists.
        let addr = unsafe {
            let protection = libc::PROT_READ | libc::PROT_WRITE;
            libc::mmap(ptr::null_mut(), len, protection, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS, -1, 0)
        };
        if addr == libc::MAP_FAILED {
            bail!(RS_ERR_MEMORY, "the system gave no {bytes} bytes of host memory: {}", io::Error::last_os_error());
        }
        if len >= HUGE {
            // Advice: small pages are slower, not wrong, so its answer does not matter.
            // SAFETY: the range is the mapping made above.
            unsafe { libc::madvise(addr, len, libc::MADV_HUGEPAGE) };
        }
        self.blocks.lock().unwrap_or_else(PoisonError::into_inner).insert(addr as usize, len);
        // SAFETY: one mapping, readable and writable until `free`, that nothing else refers to.
        Ok(unsafe { Mem::new(addr.cast(), bytes) })
    }

    fn free(&self, mem: Mem) {
        let len = self.blocks.lock().unwrap_or_else(PoisonError::into_inner).remove(&mem.addr());
        debug_assert!(len.is_some(), "{mem:?} is not an allocation of this device");
        if let Some(len) = len {
            // SAFETY: `alloc` made this mapping, it was not freed yet, and the caller says that nothing uses it any more.
            unsafe { libc::munmap(mem.addr() as *mut libc::c_void, len) };
        }
    }

    fn copies(&self) -> Copies<'_> {
        Copies::AsTheyAre(self)
    }

    fn record(&self, _stream: Stream) -> Result<Event> {
        Ok(Event(0))
    }

    fn query(&self, _event: &Event) -> Result<bool> {
        Ok(true)
    }

    fn wait(&self, _stream: Stream, _event: &Event) -> Result<()> {
        Ok(())
    }

    fn forget(&self, _event: Event) {}
}

impl Shows for HostDevice {
    fn block(&self, bytes: usize) -> Result<Box<dyn HostBlock>> {
        Ok(Box::new(OwnBlock((0..bytes).map(|_| UnsafeCell::new(0)).collect())))
    }
}

/// Memory of its own.
struct OwnBlock(Box<[UnsafeCell<u8>]>);

impl HostBlock for OwnBlock {
    fn mem(&self) -> Mem {
        // SAFETY: there until it is dropped, which its owner does when no copy writes it any more.
        unsafe { Mem::new(self.0.as_ptr().cast_mut().cast(), self.0.len()) }
    }

    fn show(&mut self, bytes: usize, _stream: Stream) -> Result<&[u8]> {
        // SAFETY: all of its own bytes; the caller says that no copy writes them.
        let all = unsafe { slice::from_raw_parts(self.0.as_ptr().cast(), self.0.len()) };
        all.get(..bytes).ok_or_else(|| err!(RS_ERR_INTERNAL, "{bytes} bytes of a block of {}", all.len()))
    }
}

impl CopyNow for HostDevice {
    fn copy(&self, jobs: &[Job<'_>], _stream: Stream) -> Result<()> {
        for job in jobs {
            // SAFETY: a job's bytes lie inside its two blocks, which whoever made them promised to be accessible and still;
            // `Path::Avx2` exists only where the CPU has AVX2.
            unsafe { run(self.path, job) };
        }
        if jobs.iter().any(Job::is_streaming) {
            rows::fence(self.path);
        }
        Ok(())
    }
}

impl Drop for HostDevice {
    fn drop(&mut self) {
        for (addr, len) in std::mem::take(self.blocks.get_mut().unwrap_or_else(PoisonError::into_inner)) {
            // SAFETY: `alloc` made this mapping; its users are gone with the device.
            unsafe { libc::munmap(addr as *mut libc::c_void, len) };
        }
    }
}

/// Bytes of a cache line. Where it is another number, only speed suffers.
const LINE: usize = 64;

/// A copy's two ends, moving together.
#[derive(Clone, Copy)]
struct Ends {
    src: *const u8,
    dst: *mut u8,
}

impl Ends {
    /// # Safety
    /// Both ends stay within the blocks they point into.
    unsafe fn step(self, axis: &CopyAxis, steps: usize) -> Ends {
        // SAFETY: the caller's promise.
        unsafe { Ends { src: self.src.add(steps * axis.src as usize), dst: self.dst.add(steps * axis.dst as usize) } }
    }

    /// # Safety
    /// As [`Ends::step`].
    unsafe fn at(self, bytes: usize) -> Ends {
        // SAFETY: the caller's promise.
        unsafe { Ends { src: self.src.add(bytes), dst: self.dst.add(bytes) } }
    }

    /// Bytes from the target to the next line's begin.
    fn to_line(self) -> usize {
        (self.dst as usize).wrapping_neg() % LINE
    }
}

/// # Safety
/// - Every byte that `job` reads and writes may be accessed now, and nobody else writes it, or reads what it writes.
/// - The CPU has what `path` needs.
unsafe fn run(path: Path, job: &Job<'_>) {
    let copy = job.copy();
    if copy.run == 0 || copy.axes.iter().any(|axis| axis.extent == 0) {
        return;
    }
    let stream = job.is_streaming();
    let ends = Ends { src: job.src_addr() as *const u8, dst: job.dst_addr() as *mut u8 };
    let mut outer = copy.axes.clone();
    if let Some(convert) = copy.convert {
        let rows = cast::Rows::new(convert, copy, &mut outer);
        let mut block = cast::Block::new();
        // SAFETY: the ends of each step, and the rows from there, lie inside the copy.
        unsafe { for_each(ends, &outer, |ends| rows.copy(ends, &mut block)) };
    } else if let Some((s, d)) = tiles::axes(copy) {
        outer.retain(|axis| *axis != s && *axis != d);
        let plane = tiles::Plane { item: copy.run as usize, s, d };
        let mut block = tiles::Block::new();
        // SAFETY: the ends of each step, and the tile axes from there, lie inside the copy.
        unsafe { for_each(ends, &outer, |ends| plane.copy(path, stream, ends, &mut block)) };
    } else {
        let row = outer.pop().unwrap_or(CopyAxis { extent: 1, src: 0, dst: 0 });
        // SAFETY: the ends of each step, and the rows from there, lie inside the copy.
        unsafe { for_each(ends, &outer, |ends| rows::copy(path, stream, ends, &row, copy.run as usize)) };
    }
}

/// Calls `inner` at every position of `axes`, the last fastest.
///
/// # Safety
/// All those positions lie in the blocks that `ends` point into.
unsafe fn for_each(ends: Ends, axes: &[CopyAxis], mut inner: impl FnMut(Ends)) {
    let mut index: SmallVec<[u64; 8]> = SmallVec::from_elem(0, axes.len());
    let mut at = ends;
    loop {
        inner(at);
        let Some(turn) = (0..axes.len()).rev().find(|&i| index[i] + 1 < axes[i].extent) else { return };
        index[turn] += 1;
        index[turn + 1..].fill(0);
        at = ends;
        for (axis, index) in axes.iter().zip(&index) {
            // SAFETY: each axis moves on towards a position inside, and none moves back.
            at = unsafe { at.step(axis, *index as usize) };
        }
    }
}
