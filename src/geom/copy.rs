//! A strided copy in its simplest form.
#![forbid(unsafe_code)]

use crate::convert::Convert;
use smallvec::SmallVec;

/// One axis of a copy: `extent` steps of `src` bytes on one side and `dst` bytes on the other.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CopyAxis {
    /// Number of steps, at least 2.
    pub extent: u64,
    /// Bytes from one step to the next at the source.
    pub src: u64,
    /// Bytes from one step to the next at the target.
    pub dst: u64,
}

/// `run` contiguous bytes, repeated over `axes` (slowest first, by falling target stride). No axis left: a memcpy; one: a 2-D
/// copy. `run` is a whole number of items; it is one item where the innermost axes of the two sides differ: a transpose.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StridedCopy {
    /// Byte offset of the first element at the source.
    pub src: u64,
    /// Byte offset of the first element at the target.
    pub dst: u64,
    /// Bytes of an element at the source: 1, 2, 4, 8 or 16.
    pub item: u32,
    /// Contiguous bytes at the source, whose elements are contiguous at the target too.
    pub run: u64,
    /// The rest.
    pub axes: SmallVec<[CopyAxis; 3]>,
    /// What happens to each element; `None`: its bytes are copied.
    pub convert: Option<Convert>,
}

impl StridedCopy {
    /// The copy with the fewest axes over `axes` given in elements as `(extent, source stride, target stride)`, in any order.
    pub fn new(item: u32, src_elem: u64, dst_elem: u64, axes: impl IntoIterator<Item = (u64, u64, u64)>) -> StridedCopy {
        StridedCopy::converting(item, None, src_elem, dst_elem, axes)
    }

    /// The same with a conversion on the way; `item` is the source's.
    pub fn converting(
        item: u32,
        convert: Option<Convert>,
        src_elem: u64,
        dst_elem: u64,
        axes: impl IntoIterator<Item = (u64, u64, u64)>,
    ) -> StridedCopy {
        let [src_item, dst_item] = [item, convert.map_or(item, |c| c.to.item())].map(u64::from);
        let mut ax: SmallVec<[CopyAxis; 3]> = axes
            .into_iter()
            .filter(|a| a.0 != 1)
            .map(|(extent, src, dst)| CopyAxis { extent, src: src * src_item, dst: dst * dst_item })
            .collect();
        ax.sort_by_key(|a| std::cmp::Reverse((a.dst, a.src)));
        let mut run = 1;
        // Fastest first: an axis that continues the run on both sides joins it, one that continues its inner neighbour joins that.
        let mut out: SmallVec<[CopyAxis; 3]> = SmallVec::new();
        for a in ax.into_iter().rev() {
            if let Some(last) = out.last_mut() {
                if last.src.checked_mul(last.extent) == Some(a.src) && last.dst.checked_mul(last.extent) == Some(a.dst) {
                    last.extent *= a.extent;
                    continue;
                }
            } else if a.src == run * src_item && a.dst == run * dst_item {
                run *= a.extent;
                continue;
            }
            out.push(a);
        }
        out.reverse();
        StridedCopy { src: src_elem * src_item, dst: dst_elem * dst_item, item, run: run * src_item, axes: out, convert }
    }

    /// Bytes that it reads.
    pub fn bytes(&self) -> u64 {
        self.axes.iter().map(|a| a.extent).product::<u64>() * self.run
    }

    /// Byte offsets at the source and at the target of each of its runs.
    pub fn runs(&self) -> Vec<[u64; 2]> {
        let mut out = vec![[self.src, self.dst]];
        for a in &self.axes {
            out = out.iter().flat_map(|&[src, dst]| (0..a.extent).map(move |i| [src + i * a.src, dst + i * a.dst])).collect();
        }
        out
    }

    /// Contiguous bytes at the target.
    pub fn dst_run(&self) -> u64 {
        self.convert.map_or(self.run, |c| self.run / u64::from(self.item) * u64::from(c.to.item()))
    }

    /// One past the last byte read, counted like `src`.
    pub fn src_end(&self) -> u64 {
        self.src + self.run + self.axes.iter().map(|a| (a.extent - 1) * a.src).sum::<u64>()
    }

    /// One past the last byte written, counted like `dst`.
    pub fn dst_end(&self) -> u64 {
        self.dst + self.dst_run() + self.axes.iter().map(|a| (a.extent - 1) * a.dst).sum::<u64>()
    }
}
