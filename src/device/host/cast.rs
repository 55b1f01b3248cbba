//! Copies that convert values: a line of elements at a time, through a block of binary32 that stays in the L1 cache.

use super::Ends;
use crate::convert::{Convert, Float};
use crate::geom::{CopyAxis, StridedCopy};
use half::slice::HalfFloatSliceExt;
use half::{bf16, f16};
use smallvec::SmallVec;

/// Elements of a block.
const BLOCK: usize = 256;

/// Elements one after the other, each `axis.src` and `axis.dst` bytes from the last.
pub(super) struct Line {
    convert: Convert,
    axis: CopyAxis,
}

impl Line {
    /// The copy's run, or its fastest axis if that is one element; what is left of its axes stays in `outer`.
    pub(super) fn new(convert: Convert, copy: &StridedCopy, outer: &mut SmallVec<[CopyAxis; 3]>) -> Line {
        let [src, dst] = [convert.from, convert.to].map(|f| u64::from(f.item()));
        let run = CopyAxis { extent: copy.run / src, src, dst };
        let axis = if run.extent == 1 { outer.pop().unwrap_or(run) } else { run };
        Line { convert, axis }
    }

    /// # Safety
    /// All elements of the line lie in the blocks that `ends` point into; nobody else writes them, or reads what is written.
    pub(super) unsafe fn copy(&self, ends: Ends) {
        let count = self.axis.extent as usize;
        let mut at = 0;
        while at < count {
            let n = BLOCK.min(count - at);
            // SAFETY: this function's promise.
            unsafe { self.block(ends.step(&self.axis, at), n) };
            at += n;
        }
    }

    /// # Safety
    /// As [`Line::copy`], for the `n` elements from `ends` on, at most [`BLOCK`].
    unsafe fn block(&self, ends: Ends, n: usize) {
        let (src, dst) = (self.axis.src as usize, self.axis.dst as usize);
        let mut wide = [0f32; BLOCK];
        let mut narrow = [0u16; BLOCK];
        // SAFETY: this function's promise; addresses need not be aligned.
        unsafe {
            match self.convert.from {
                Float::F32 => gather(ends.src, src, &mut wide[..n]),
                _ => gather(ends.src, src, &mut narrow[..n]),
            }
        }
        let half: &mut [u16] = &mut narrow[..n];
        match self.convert.from {
            Float::F32 => {}
            Float::F16 => f16s(half).convert_to_f32_slice(&mut wide[..n]),
            Float::Bf16 => bf16s(half).convert_to_f32_slice(&mut wide[..n]),
        }
        if self.convert.add != 0 {
            wide[..n].iter_mut().for_each(|v| *v += f32::from(self.convert.add));
        }
        match self.convert.to {
            Float::F32 => {}
            Float::F16 => f16s(half).convert_from_f32_slice(&wide[..n]),
            Float::Bf16 => bf16s(half).convert_from_f32_slice(&wide[..n]),
        }
        // SAFETY: as above.
        unsafe {
            match self.convert.to {
                Float::F32 => scatter(&wide[..n], ends.dst, dst),
                _ => scatter(&narrow[..n], ends.dst, dst),
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
/// `into.len()` elements of `T`, `step` bytes apart, may be read at `from`.
unsafe fn gather<T: Copy>(from: *const u8, step: usize, into: &mut [T]) {
    if step == size_of::<T>() {
        // SAFETY: this function's promise; the block is memory of our own.
        unsafe { std::ptr::copy_nonoverlapping(from, into.as_mut_ptr().cast(), size_of_val(into)) };
        return;
    }
    for (i, to) in into.iter_mut().enumerate() {
        // SAFETY: this function's promise.
        *to = unsafe { from.add(i * step).cast::<T>().read_unaligned() };
    }
}

/// # Safety
/// `from.len()` elements of `T`, `step` bytes apart, may be written at `to`.
unsafe fn scatter<T: Copy>(from: &[T], to: *mut u8, step: usize) {
    if step == size_of::<T>() {
        // SAFETY: this function's promise; the block is memory of our own.
        unsafe { std::ptr::copy_nonoverlapping(from.as_ptr().cast(), to, size_of_val(from)) };
        return;
    }
    for (i, value) in from.iter().enumerate() {
        // SAFETY: this function's promise.
        unsafe { to.add(i * step).cast::<T>().write_unaligned(*value) };
    }
}
