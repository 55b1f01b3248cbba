//! Copies that convert values: some rows of elements at a time, through a block of binary32 that stays in the L1 cache.

use super::Ends;
use crate::convert::{Convert, Float};
use crate::geom::{CopyAxis, StridedCopy};
use half::slice::HalfFloatSliceExt;
use half::{bf16, f16};
use smallvec::SmallVec;

/// Elements of a block.
const BLOCK: usize = 256;

/// Runs below so many elements are moved one by one: calling memcpy costs more.
const SHORT: usize = 16;

/// What lies between the two ends.
pub(super) struct Block {
    wide: [f32; BLOCK],
    narrow: [u16; BLOCK],
}

impl Block {
    pub(super) fn new() -> Block {
        Block { wide: [0.0; BLOCK], narrow: [0; BLOCK] }
    }
}

/// Rows of `run` elements, contiguous on both sides.
pub(super) struct Rows {
    convert: Convert,
    run: usize,
    axis: CopyAxis,
}

impl Rows {
    /// The copy's run and its fastest axis; what is left of its axes stays in `outer`.
    pub(super) fn new(convert: Convert, copy: &StridedCopy, outer: &mut SmallVec<[CopyAxis; 3]>) -> Rows {
        let axis = outer.pop().unwrap_or(CopyAxis { extent: 1, src: 0, dst: 0 });
        Rows { convert, run: (copy.run / u64::from(copy.item)) as usize, axis }
    }

    /// # Safety
    /// All elements of the rows lie in the blocks that `ends` point into; nobody else writes them, or reads what is written.
    pub(super) unsafe fn copy(&self, ends: Ends, block: &mut Block) {
        let count = self.axis.extent as usize;
        let at_once = (BLOCK / self.run).max(1);
        let [src, dst] = [self.convert.from, self.convert.to].map(|f| u64::from(f.item()));
        let along = CopyAxis { extent: self.run as u64, src, dst };
        for row in (0..count).step_by(at_once) {
            let rows = at_once.min(count - row);
            for at in (0..self.run).step_by(BLOCK) {
                // SAFETY: this function's promise.
                unsafe { self.block(ends.step(&self.axis, row).step(&along, at), rows, BLOCK.min(self.run - at), block) };
            }
        }
    }

    /// # Safety
    /// As [`Rows::copy`], for `run` elements of each of `rows` rows from `ends` on, at most [`BLOCK`] in all.
    unsafe fn block(&self, ends: Ends, rows: usize, run: usize, block: &mut Block) {
        let n = rows * run;
        let (wide, narrow) = (&mut block.wide[..n], &mut block.narrow[..n]);
        let (src, dst) = (self.axis.src as usize, self.axis.dst as usize);
        // SAFETY: this function's promise; addresses need not be aligned.
        unsafe {
            match self.convert.from {
                Float::F32 => gather(ends.src, src, run, wide),
                _ => gather(ends.src, src, run, narrow),
            }
        }
        match self.convert.from {
            Float::F32 => {}
            Float::F16 => f16s(narrow).convert_to_f32_slice(wide),
            Float::Bf16 => bf16s(narrow).convert_to_f32_slice(wide),
        }
        if self.convert.add != 0 {
            wide.iter_mut().for_each(|v| *v += f32::from(self.convert.add));
        }
        match self.convert.to {
            Float::F32 => {}
            Float::F16 => f16s(narrow).convert_from_f32_slice(wide),
            Float::Bf16 => bf16s(narrow).convert_from_f32_slice(wide),
        }
        // SAFETY: as above.
        unsafe {
            match self.convert.to {
                Float::F32 => scatter(wide, ends.dst, dst, run),
                _ => scatter(narrow, ends.dst, dst, run),
            }
        }
    }
}

fn f16s(bits: &mut [u16]) -> &mut [f16] {
    half::slice::HalfBitsSliceExt::reinterpret_cast_mut(bits)
}

fn bf16s(bits: &mut [u16]) -> &mut [bf16] {
    half::slice::HalfBitsSliceExt::reinterpret_cast_mut(bits)
}

/// # Safety
/// Rows of `run` elements of `T`, `step` bytes apart, as many as `into` has room for, may be read at `from`.
unsafe fn gather<T: Copy>(from: *const u8, step: usize, run: usize, into: &mut [T]) {
    for (row, to) in into.chunks_exact_mut(run).enumerate() {
        // SAFETY: this function's promise.
        let from = unsafe { from.add(row * step) };
        if run >= SHORT {
            // SAFETY: as above; the block is memory of our own.
            unsafe { std::ptr::copy_nonoverlapping(from, to.as_mut_ptr().cast(), size_of_val(to)) };
            continue;
        }
        for (i, to) in to.iter_mut().enumerate() {
            // SAFETY: this function's promise.
            *to = unsafe { from.add(i * size_of::<T>()).cast::<T>().read_unaligned() };
        }
    }
}

/// # Safety
/// Rows of `run` elements of `T`, `step` bytes apart, as many as `from` has, may be written at `to`.
unsafe fn scatter<T: Copy>(from: &[T], to: *mut u8, step: usize, run: usize) {
    for (row, from) in from.chunks_exact(run).enumerate() {
        // SAFETY: this function's promise.
        let to = unsafe { to.add(row * step) };
        if run >= SHORT {
            // SAFETY: as above; the block is memory of our own.
            unsafe { std::ptr::copy_nonoverlapping(from.as_ptr().cast(), to, size_of_val(from)) };
            continue;
        }
        for (i, value) in from.iter().enumerate() {
            // SAFETY: this function's promise.
            unsafe { to.add(i * size_of::<T>()).cast::<T>().write_unaligned(*value) };
        }
    }
}
