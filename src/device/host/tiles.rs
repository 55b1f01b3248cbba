//! Transposes: copies element by element whose two sides are densest along different axes.
//!
//! A tile, 64 bytes of the source's dense axis by 128 of the target's, is gathered into a block that stays in the L1 cache,
//! already turned, and written from there in whole lines. So each line is fetched once and written once, whatever the strides.
//!
//! Knows two axes. Must not know what lies around them.

use super::{Ends, LINE, Path, rows};
use crate::geom::{CopyAxis, StridedCopy};

/// Bytes along the source's dense axis: walking on along it, one line of every source row is in use at a time.
const WIDTH: usize = LINE;
/// Bytes along the target's dense axis.
const HEIGHT: usize = 2 * LINE;
/// Bytes from row to row of the block: a row, and what another row's next line may be away.
const PITCH: usize = HEIGHT + LINE;

/// The dense axes of source and target, where the copy's run is an element that a register holds and those axes differ.
pub(super) fn axes(copy: &StridedCopy) -> Option<(CopyAxis, CopyAxis)> {
    let s = *copy.axes.iter().min_by_key(|axis| axis.src)?;
    let d = *copy.axes.iter().min_by_key(|axis| axis.dst)?;
    (matches!(copy.run, 1 | 2 | 4 | 8 | 16) && s != d).then_some((s, d))
}

/// A tile, turned: rows of the target. Large enough for elements of one byte, which have the most rows.
#[repr(align(64))]
pub(super) struct Block([u8; WIDTH * PITCH]);

impl Block {
    pub(super) fn new() -> Block {
        Block([0; WIDTH * PITCH])
    }
}

/// Elements of `item` bytes over two axes: `s`, the source's densest, and `d`, the target's.
pub(super) struct Plane {
    pub(super) item: usize,
    pub(super) s: CopyAxis,
    pub(super) d: CopyAxis,
}

/// A part of a plane: `s` by `d` elements from `ends`.
struct Tile {
    ends: Ends,
    s: usize,
    d: usize,
}

impl Plane {
    /// Copies the plane that begins at `ends`.
    ///
    /// # Safety
    /// Its bytes lie in the blocks that `ends` point into; the CPU has what `path` needs.
    pub(super) unsafe fn copy(&self, path: Path, stream: bool, ends: Ends, block: &mut Block) {
        let (width, height) = (WIDTH / self.item, HEIGHT / self.item);
        let (all_s, all_d) = (self.s.extent as usize, self.d.extent as usize);
        // The first tiles end where the target's first row begins a line; where every row does, all later tiles do.
        let head = ends.to_line() / self.item;
        let overlap = if self.s.dst as usize % LINE == 0 { 0 } else { LINE / self.item };
        let mut d = 0;
        while d < all_d {
            let tall = if d == 0 && head > 0 { head } else { height };
            for s in (0..all_s).step_by(width) {
                // SAFETY: the tile lies inside the plane.
                unsafe {
                    let ends = ends.step(&self.d, d).step(&self.s, s);
                    let tile = Tile { ends, s: width.min(all_s - s), d: (tall + overlap).min(all_d - d) };
                    self.gather(path, &tile, block);
                    self.put(path, stream, &tile, block, (d == 0, tall));
                }
            }
            d += tall;
        }
    }

    /// Writes the block to the rows of a tile; `first` and `tall` are whether it is the first of its rows, and its height without
    /// the overlap.
    ///
    /// Each row's piece ends with a line, wherever in a line the row begins: it is shifted by less than a line against the first
    /// row of the plane, which the overlap makes room for, and the row's next piece begins there.
    ///
    /// # Safety
    /// As [`Plane::gather`], for the target.
    unsafe fn put(&self, path: Path, stream: bool, tile: &Tile, block: &Block, (first, tall): (bool, usize)) {
        let item = self.item;
        let rows = CopyAxis { extent: tile.s as u64, src: PITCH as u64, dst: self.s.dst };
        let ends = Ends { src: block.0.as_ptr(), dst: tile.ends.dst };
        // SAFETY: a row's piece lies between the first and the last element of the tile's row.
        unsafe {
            if self.d.dst as usize != item {
                let items = CopyAxis { extent: tall.min(tile.d) as u64, src: item as u64, dst: self.d.dst };
                (0..tile.s).for_each(|row| rows::copy(path, stream, ends.step(&rows, row), &items, item));
            } else if self.s.dst as usize % LINE == 0 {
                rows::copy(path, stream, ends, &rows, tall.min(tile.d) * item);
            } else {
                for row in 0..tile.s {
                    let row = ends.step(&rows, row);
                    let shift = row.at(tall * item).to_line();
                    let from = if first { 0 } else { shift };
                    let to = (tall * item + shift).min(tile.d * item);
                    if from < to {
                        rows::short(path, stream, row.at(from), to - from);
                    }
                }
            }
        }
    }

    /// Reads a tile into the block.
    ///
    /// # Safety
    /// The tile lies in the block of memory its source points into and fits into `block`; the CPU has what `path` needs.
    unsafe fn gather(&self, path: Path, tile: &Tile, block: &mut Block) {
        let block = block.0.as_mut_ptr();
        let turns = self.s.src as usize == self.item;
        // SAFETY: the caller's promise; a run is 1, 2, 4, 8 or 16 bytes.
        unsafe {
            match (path, self.item) {
                #[cfg(target_arch = "x86_64")]
                (Path::Avx2, 1) if turns => avx2::gather_turned::<1, u8>(self, tile, block),
                #[cfg(target_arch = "x86_64")]
                (Path::Avx2, 2) if turns => avx2::gather_turned::<2, u16>(self, tile, block),
                #[cfg(target_arch = "x86_64")]
                (Path::Avx2, 4) if turns => avx2::gather_turned::<4, u32>(self, tile, block),
                #[cfg(target_arch = "x86_64")]
                (Path::Avx2, 8) if turns => avx2::gather_turned::<8, u64>(self, tile, block),
                (_, 1) => gather::<u8>(self, tile, 0, 0, block),
                (_, 2) => gather::<u16>(self, tile, 0, 0, block),
                (_, 4) => gather::<u32>(self, tile, 0, 0, block),
                (_, 8) => gather::<u64>(self, tile, 0, 0, block),
                _ => gather::<u128>(self, tile, 0, 0, block),
            }
        }
    }
}

/// Gathers what of the tile lies at or after `from_s` or `from_d`, one by one.
///
/// # Safety
/// As [`Plane::gather`]; `T` has the item's size.
unsafe fn gather<T: Copy>(plane: &Plane, tile: &Tile, from_s: usize, from_d: usize, block: *mut u8) {
    let (s_step, d_step) = (plane.s.src as usize, plane.d.src as usize);
    let (src, wide) = (tile.ends.src, tile.s);
    for d in 0..tile.d {
        for s in if d < from_d { from_s } else { 0 }..wide {
            // SAFETY: the element lies inside the tile, and its place inside the block.
            unsafe {
                let to = block.add(s * PITCH + d * size_of::<T>()).cast::<T>();
                to.write_unaligned(src.add(d * d_step + s * s_step).cast::<T>().read_unaligned());
            }
        }
    }
}

#[cfg(target_arch = "x86_64")]
mod avx2 {
    //! Turns squares of elements in registers.

    use super::*;
    use std::arch::x86_64::*;

    /// [`gather`] of `ITEM`-byte elements that are contiguous along `s`.
    ///
    /// # Safety
    /// As [`gather`]; `T` has `ITEM` bytes, at most 8; the CPU has AVX2.
    #[target_feature(enable = "avx2")]
    pub(super) unsafe fn gather_turned<const ITEM: usize, T: Copy>(plane: &Plane, tile: &Tile, block: *mut u8) {
        let (width, height) = (32 / ITEM, 16 / ITEM);
        let (whole_s, whole_d) = (tile.s / width * width, tile.d / height * height);
        let stride = plane.d.src as usize;
        // SAFETY: each square lies inside the tile and inside the block; the rest is gathered one by one.
        unsafe {
            for d in (0..whole_d).step_by(height) {
                // The next tile's line: more rows are in use than the core's own prefetchers follow. Not into the L1 cache, where
                // rows a power of two apart push each other out.
                for row in d..d + height {
                    _mm_prefetch::<_MM_HINT_T1>(tile.ends.src.wrapping_add(row * stride + LINE).cast());
                }
                for s in (0..whole_s).step_by(width) {
                    let src = tile.ends.src.add(d * stride + s * ITEM);
                    let dst = block.add(s * PITCH + d * ITEM);
                    match ITEM {
                        1 => turn::<ITEM, 16>(src, stride, dst),
                        2 => turn::<ITEM, 8>(src, stride, dst),
                        4 => turn::<ITEM, 4>(src, stride, dst),
                        _ => turn::<ITEM, 2>(src, stride, dst),
                    }
                }
            }
            gather::<T>(plane, tile, whole_s, whole_d, block);
        }
    }

    /// Turns two squares, side by side in `ROWS` rows of 32 bytes `stride` apart, into 32 / `ITEM` rows of 16 bytes `PITCH` apart.
    ///
    /// Interleaving the first half of the rows with the second turns an element's place, written in bits as row then column,
    /// left by one bit. As many times as a row number has bits, and row and column have changed places.
    ///
    /// # Safety
    /// All those bytes may be read and written; `ROWS` is 16 / `ITEM`; the CPU has AVX2.
    #[target_feature(enable = "avx2")]
    #[inline]
    unsafe fn turn<const ITEM: usize, const ROWS: usize>(src: *const u8, stride: usize, dst: *mut u8) {
        // SAFETY: the caller's promise for loads and stores; the rest is arithmetic of a CPU with AVX2.
        unsafe {
            let mut rows = [_mm256_setzero_si256(); ROWS];
            for (i, row) in rows.iter_mut().enumerate() {
                *row = _mm256_loadu_si256(src.add(i * stride).cast());
            }
            for _ in 0..ROWS.ilog2() {
                let half = rows;
                for i in 0..ROWS / 2 {
                    let (a, b) = (half[i], half[i + ROWS / 2]);
                    (rows[2 * i], rows[2 * i + 1]) = match ITEM {
                        1 => (_mm256_unpacklo_epi8(a, b), _mm256_unpackhi_epi8(a, b)),
                        2 => (_mm256_unpacklo_epi16(a, b), _mm256_unpackhi_epi16(a, b)),
                        4 => (_mm256_unpacklo_epi32(a, b), _mm256_unpackhi_epi32(a, b)),
                        _ => (_mm256_unpacklo_epi64(a, b), _mm256_unpackhi_epi64(a, b)),
                    };
                }
            }
            for (column, row) in rows.iter().enumerate() {
                let at = dst.add(column * PITCH);
                _mm_storeu_si128(at.cast(), _mm256_castsi256_si128(*row));
                _mm_storeu_si128(at.add(ROWS * PITCH).cast(), _mm256_extracti128_si256::<1>(*row));
            }
        }
    }
}
