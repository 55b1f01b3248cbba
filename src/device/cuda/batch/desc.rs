//! What a descriptor holds: `Desc` of `kernels/copy.cu`, field by field.

use crate::convert::{Convert, Float};

/// Most axes of a descriptor.
pub(super) const AXES: usize = 6;
/// What extents, items and offsets stay below.
pub(super) const LIMIT: u64 = 1 << 31;

/// Steps along one axis, in vectors or tiles.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Axis {
    pub extent: u32,
    pub magic: u32,
    pub shift: u32,
    pub src: u32,
    pub dst: u32,
}

impl Axis {
    /// All three below [`LIMIT`]; `extent` at least 1.
    ///
    /// For every n < 2^31, n / extent is (n * magic) >> (31 + shift). With 2^(shift-1) < extent <= 2^shift, magic is the next whole
    /// number above 2^(31+shift) / extent, still below 2^32. So n * magic is too large by at most n, which is less than 2^31, while
    /// n / extent lies at least 1 / extent below the next whole number, which is 2^(31+shift) / extent here: at least 2^31.
    pub fn new(extent: u64, src: u64, dst: u64) -> Axis {
        debug_assert!(extent < LIMIT && src < LIMIT && dst < LIMIT);
        let shift = extent.next_power_of_two().ilog2();
        let magic = (1 << (31 + shift)) / extent + 1;
        Axis { extent: extent as u32, magic: magic as u32, shift, src: src as u32, dst: dst as u32 }
    }
}

/// One descriptor.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(super) struct Desc {
    pub src: u64,
    pub dst: u64,
    pub items: u32,
    pub per_chunk: u32,
    pub path: u32,
    pub rank: u32,
    pub add: f32,
    pub src_f16: u32,
    pub dst_f16: u32,
    pub store: u32,
    pub tiles: u32,
    pub s_extent: u32,
    pub d_extent: u32,
    pub s_src: u32,
    pub s_dst: u32,
    pub d_src: u32,
    pub d_dst: u32,
    pub zero: u32,
    pub axes: [Axis; AXES],
}

/// `Path` of copy.cu: plain ones are the logarithm of the bytes moved at once.
pub(super) const UNITS: u32 = 5;
pub(super) const CAST: u32 = 8;
pub(super) const CAST_WIDE: u32 = 12;
pub(super) const CAST_ODD: u32 = 16;
/// Part of `store`.
pub(super) const STORE_WIDE: u32 = 8;

/// Which of the four casts, counted from the first of its kind.
pub(super) fn cast(convert: Convert) -> u32 {
    u32::from(convert.from == Float::F32) * 2 + u32::from(convert.to == Float::F32)
}

impl Desc {
    /// Sets what happens to elements.
    pub fn set_convert(&mut self, convert: Convert) {
        // Adding the negative zero changes nothing, not even the sign of a zero.
        self.add = if convert.add == 0 { -0.0 } else { f32::from(convert.add) };
        self.src_f16 = u32::from(convert.from == Float::F16);
        self.dst_f16 = u32::from(convert.to == Float::F16);
    }

    /// Appends its bytes.
    pub fn put(&self, bytes: &mut Vec<u8>) {
        let Desc { src, dst, items, per_chunk, path, rank, add, src_f16, dst_f16, store, tiles, .. } = *self;
        let Desc { s_extent, d_extent, s_src, s_dst, d_src, d_dst, zero, axes, .. } = *self;
        [src, dst].iter().for_each(|long| bytes.extend(long.to_ne_bytes()));
        let words = [items, per_chunk, path, rank, add.to_bits(), src_f16, dst_f16, store, tiles];
        let plane = [s_extent, d_extent, s_src, s_dst, d_src, d_dst, zero];
        let axes = axes.iter().flat_map(|a| [a.extent, a.magic, a.shift, a.src, a.dst]);
        words.into_iter().chain(plane).chain(axes).for_each(|word| bytes.extend(word.to_ne_bytes()));
    }
}
