//! Rows: `run` contiguous bytes at each step of one axis.
//!
//! Knows how bytes are moved fastest. Must not know axes beyond that one.

use super::{Ends, LINE, Path};
use crate::geom::CopyAxis;
use std::ptr;

/// Copies `run` bytes at each step of `row`.
///
/// # Safety
/// All those bytes lie in the blocks that `ends` point into; the CPU has what `path` needs.
pub(super) unsafe fn copy(path: Path, stream: bool, ends: Ends, row: &CopyAxis, run: usize) {
    // SAFETY: the caller's promise.
    unsafe {
        match (path, stream) {
            (Path::Portable, _) => portable(ends, row, run),
            #[cfg(target_arch = "x86_64")]
            (Path::Avx2, false) => avx2::copy::<false>(ends, row, run),
            #[cfg(target_arch = "x86_64")]
            (Path::Avx2, true) => avx2::copy::<true>(ends, row, run),
        }
    }
}

/// `len` contiguous bytes, at least one, few enough that nothing but the loop counts.
///
/// # Safety
/// They lie in the blocks that `ends` point into; the CPU has what `path` needs.
#[inline]
pub(super) unsafe fn short(path: Path, stream: bool, ends: Ends, len: usize) {
    // SAFETY: the caller's promise.
    unsafe {
        match (path, stream) {
            (Path::Portable, _) => ptr::copy_nonoverlapping(ends.src, ends.dst, len),
            #[cfg(target_arch = "x86_64")]
            (Path::Avx2, false) => avx2::short::<false>(ends, len),
            #[cfg(target_arch = "x86_64")]
            (Path::Avx2, true) => avx2::short::<true>(ends, len),
        }
    }
}

/// Makes what was streamed visible before anything written later.
pub(super) fn fence(path: Path) {
    match path {
        Path::Portable => {}
        #[cfg(target_arch = "x86_64")]
        // SAFETY: every x86-64 CPU has SSE.
        Path::Avx2 => unsafe { std::arch::x86_64::_mm_sfence() },
    }
}

/// # Safety
/// As [`copy`].
unsafe fn portable(ends: Ends, row: &CopyAxis, run: usize) {
    // SAFETY: each step lies inside.
    unsafe {
        match run {
            1 => elements::<u8>(ends, row),
            2 => elements::<u16>(ends, row),
            4 => elements::<u32>(ends, row),
            8 => elements::<u64>(ends, row),
            16 => elements::<u128>(ends, row),
            _ => {
                for i in 0..row.extent as usize {
                    let at = ends.step(row, i);
                    ptr::copy_nonoverlapping(at.src, at.dst, run);
                }
            }
        }
    }
}

/// # Safety
/// As [`copy`], with `T`'s size as the run.
unsafe fn elements<T: Copy>(ends: Ends, row: &CopyAxis) {
    for i in 0..row.extent as usize {
        // SAFETY: each step lies inside; alignment is not assumed.
        unsafe {
            let at = ends.step(row, i);
            at.dst.cast::<T>().write_unaligned(at.src.cast::<T>().read_unaligned());
        }
    }
}

#[cfg(target_arch = "x86_64")]
mod avx2 {
    //! With 32-byte registers, and four places of the source at a time: a core's prefetcher follows a stream up to the end of its
    //! page only, so four streams keep four times as many lines on their way.

    use super::*;
    use std::arch::x86_64::*;

    /// Bytes that one lane moves before the next lane's turn.
    const STEP: usize = 2 * LINE;
    /// Bytes of a lane in a long row: a page.
    const PAGE: usize = 4096;
    /// Rows below this are done one after the other: four lanes would not pay for setting them up.
    const SHORT: usize = 512;
    /// Bytes of short rows between the row being copied and the one being fetched: gaps between rows end a prefetcher's stream.
    const AHEAD: usize = 2048;

    /// # Safety
    /// As [`super::copy`]; the CPU has AVX2.
    #[target_feature(enable = "avx2")]
    pub(super) unsafe fn copy<const STREAM: bool>(ends: Ends, row: &CopyAxis, run: usize) {
        let rows = row.extent as usize;
        // SAFETY: each step lies inside.
        unsafe {
            if run <= 16 {
                return portable(ends, row, run);
            }
            let mut i = 0;
            if (SHORT..4 * PAGE).contains(&run) {
                while i + 4 <= rows {
                    lanes::<STREAM>(ends.step(row, i), row.src as usize, row.dst as usize, run);
                    i += 4;
                }
            }
            let ahead = AHEAD / run;
            for i in i..rows {
                let at = ends.step(row, i);
                if run < SHORT {
                    let later = at.src.wrapping_add(ahead * row.src as usize);
                    for line in (0..run).step_by(LINE) {
                        _mm_prefetch::<_MM_HINT_T0>(later.wrapping_add(line).cast());
                    }
                    short::<STREAM>(at, run);
                } else {
                    long::<STREAM>(at, run);
                }
            }
        }
    }

    /// `len` contiguous bytes, at least [`SHORT`].
    ///
    /// # Safety
    /// They lie in the blocks that `ends` point into; the CPU has AVX2.
    #[target_feature(enable = "avx2")]
    unsafe fn long<const STREAM: bool>(ends: Ends, len: usize) {
        let mut done = ends.to_line().min(len);
        // SAFETY: every part ends at or before `len`.
        unsafe {
            ptr::copy_nonoverlapping(ends.src, ends.dst, done);
            while len - done >= 4 * STEP {
                let lane = ((len - done) / 4 / STEP * STEP).min(PAGE);
                lanes::<STREAM>(ends.at(done), lane, lane, lane);
                done += 4 * lane;
            }
            let rest = ends.at(done);
            ptr::copy_nonoverlapping(rest.src, rest.dst, len - done);
        }
    }

    /// `len` contiguous bytes at each of four places, in turns; they lie `src_step` and `dst_step` apart.
    ///
    /// # Safety
    /// They lie in the blocks that `ends` point into; the CPU has AVX2.
    #[target_feature(enable = "avx2")]
    #[inline]
    unsafe fn lanes<const STREAM: bool>(ends: Ends, src_step: usize, dst_step: usize, len: usize) {
        let mut lanes = [ends; 4];
        let mut left = [len; 4];
        // SAFETY: head, body and tail of each lane are its `len` bytes; the body's target is aligned to a line where it streams.
        unsafe {
            for i in 0..4 {
                lanes[i] = Ends { src: ends.src.add(i * src_step), dst: ends.dst.add(i * dst_step) };
                let head = if STREAM { lanes[i].to_line().min(len) } else { 0 };
                if head > 0 {
                    short::<false>(lanes[i], head);
                    lanes[i] = lanes[i].at(head);
                    left[i] -= head;
                }
            }
            let body = left[0].min(left[1]).min(left[2]).min(left[3]) / STEP * STEP;
            for at in (0..body).step_by(STEP) {
                for lane in lanes {
                    line::<STREAM>(lane.at(at));
                    line::<STREAM>(lane.at(at + LINE));
                }
            }
            for i in 0..4 {
                if left[i] > body {
                    short::<STREAM>(lanes[i].at(body), left[i] - body);
                }
            }
        }
    }

    /// [`super::short`]. Streams whole lines if the target begins at one.
    ///
    /// # Safety
    /// They lie in the blocks that `ends` point into; the CPU has AVX2.
    #[target_feature(enable = "avx2")]
    #[inline]
    pub(super) unsafe fn short<const STREAM: bool>(ends: Ends, len: usize) {
        let mut done = 0;
        // SAFETY: every access ends at or before `len`.
        unsafe {
            if STREAM && ends.to_line() == 0 {
                while done + LINE <= len {
                    line::<true>(ends.at(done));
                    done += LINE;
                }
            }
            while done + 32 <= len {
                put::<__m256i>(ends.at(done));
                done += 32;
            }
            if done < len {
                below_32(ends.at(done), len - done);
            }
        }
    }

    /// 1 to 31 bytes: the first and the last half, which may overlap.
    ///
    /// # Safety
    /// They lie in the blocks that `ends` point into.
    #[inline]
    unsafe fn below_32(ends: Ends, len: usize) {
        // SAFETY: both accesses of an arm lie within `len`.
        unsafe {
            match len {
                16.. => pair::<u128>(ends, len),
                8.. => pair::<u64>(ends, len),
                4.. => pair::<u32>(ends, len),
                2.. => pair::<u16>(ends, len),
                _ => put::<u8>(ends),
            }
        }
    }

    /// # Safety
    /// `len` is at least the size of `T` and lies in the blocks that `ends` point into.
    #[inline]
    unsafe fn pair<T: Copy>(ends: Ends, len: usize) {
        // SAFETY: the caller's promise.
        unsafe {
            put::<T>(ends);
            put::<T>(ends.at(len - size_of::<T>()));
        }
    }

    /// # Safety
    /// One `T` lies in the blocks at both ends.
    #[inline]
    unsafe fn put<T: Copy>(ends: Ends) {
        // SAFETY: the caller's promise; alignment is not assumed.
        unsafe { ends.dst.cast::<T>().write_unaligned(ends.src.cast::<T>().read_unaligned()) }
    }

    /// One line.
    ///
    /// # Safety
    /// It lies in the blocks at both ends; with `STREAM` the target is aligned to it; the CPU has AVX2.
    #[target_feature(enable = "avx2")]
    #[inline]
    unsafe fn line<const STREAM: bool>(ends: Ends) {
        let (src, dst) = (ends.src.cast::<__m256i>(), ends.dst.cast::<__m256i>());
        // SAFETY: the caller's promise; only the streaming store needs alignment.
        unsafe {
            let (low, high) = (_mm256_loadu_si256(src), _mm256_loadu_si256(src.add(1)));
            if STREAM {
                _mm256_stream_si256(dst, low);
                _mm256_stream_si256(dst.add(1), high);
            } else {
                _mm256_storeu_si256(dst, low);
                _mm256_storeu_si256(dst.add(1), high);
            }
        }
    }
}
