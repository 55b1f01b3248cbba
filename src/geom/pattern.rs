//! Patterns, and their boxes in a mixed radix.
#![forbid(unsafe_code)]

use super::{Dims, Region};
use smallvec::SmallVec;

/// Most boxes one pattern may fall into; more means that two layouts cannot be compared in reasonable time.
pub const MAX_PATCHES: usize = 1 << 18;

/// One axis of a pattern.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Axis {
    /// Number of steps.
    pub extent: u64,
    /// Step in the space that is compared.
    pub key: u64,
    /// Step in the other space.
    pub val: u64,
}

/// A grid of elements with its numbers in two spaces: element `i` is number `key + sum(i * axis.key)` of one and
/// `val + sum(i * axis.val)` of the other. In a tile, `key` counts the tensor's elements and `val` the buffer's.
#[derive(Clone, Debug, PartialEq, Eq, Default)]
pub struct Pattern {
    /// Number of the first element in the space that is compared.
    pub key: u64,
    /// Its number in the other.
    pub val: u64,
    /// Axes by falling `key`.
    pub axes: SmallVec<[Axis; 3]>,
}

/// A box of a radix, and where its elements lie in the other space.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Patch {
    /// The box.
    pub region: Region,
    /// Number of its first element in the other space.
    pub offset: u64,
    /// Step in the other space on each axis; 0 where the box has one index.
    pub stride: Dims,
}

/// A space of `total` elements written in digits, slowest first: element number = sum(digit * weight).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Radix {
    weight: Dims,
    size: Dims,
}

impl Radix {
    /// The finest radix whose weights are `strides`. Where two do not divide, the larger gives way: patterns that use it fall into
    /// boxes step by step.
    pub fn new(total: u64, strides: impl IntoIterator<Item = u64>) -> Radix {
        let mut all: Vec<u64> = strides.into_iter().filter(|&s| s > 1 && s < total).collect();
        all.sort_unstable();
        all.dedup();
        let mut weight: Dims = Dims::from_slice(&[1]);
        for s in all {
            if s % weight[weight.len() - 1] == 0 {
                weight.push(s);
            }
        }
        weight.reverse();
        let mut size = Dims::with_capacity(weight.len());
        let mut above = total;
        for &w in &weight {
            size.push(above.div_ceil(w).max(1));
            above = w;
        }
        Radix { weight, size }
    }

    /// Number of digits.
    pub fn digits(&self) -> usize {
        self.weight.len()
    }

    /// Elements from one value of a digit to the next.
    pub fn weight(&self, digit: usize) -> u64 {
        self.weight[digit]
    }

    /// Element number of an index.
    pub fn number(&self, index: &[u64]) -> u64 {
        self.weight.iter().zip(index).map(|(w, i)| w * i).sum()
    }

    /// A box of this radix as a pattern over element numbers, the other space being `patch`'s.
    pub fn pattern(&self, region: &Region) -> Pattern {
        let axes = (0..self.digits()).map(|i| Axis { extent: region.len[i], key: self.weight[i], val: 0 }).collect();
        Pattern { key: self.number(&region.lo), val: 0, axes }.coalesce()
    }
}

impl Pattern {
    /// The same elements with the fewest axes, by falling `key`.
    pub fn coalesce(mut self) -> Pattern {
        self.axes.retain(|a| a.extent != 1);
        self.axes.sort_by_key(|a| std::cmp::Reverse(a.key));
        let mut out: SmallVec<[Axis; 3]> = SmallVec::new();
        for a in self.axes.iter().rev() {
            match out.last_mut() {
                Some(last) if continues(a.key, last.key, last.extent) && continues(a.val, last.val, last.extent) => {
                    last.extent *= a.extent
                }
                _ => out.push(*a),
            }
        }
        out.reverse();
        self.axes = out;
        self
    }

    /// The same pattern with the two spaces exchanged.
    pub fn flip(&self) -> Pattern {
        let axes = self.axes.iter().map(|a| Axis { extent: a.extent, key: a.val, val: a.key }).collect();
        Pattern { key: self.val, val: self.key, axes }.coalesce()
    }

    /// Number of elements.
    pub fn volume(&self) -> u64 {
        self.axes.iter().map(|a| a.extent).product()
    }

    /// One past the last number in the compared space.
    pub fn key_end(&self) -> u64 {
        self.key + 1 + self.axes.iter().map(|a| (a.extent - 1) * a.key).sum::<u64>()
    }

    /// One past the last number in the other space.
    pub fn val_end(&self) -> u64 {
        self.val + 1 + self.axes.iter().map(|a| (a.extent - 1) * a.val).sum::<u64>()
    }

    /// Whether the numbers in the compared space nest: sorted, each step at least the next one times its extent. Then no number
    /// occurs twice.
    pub fn nests(&self) -> bool {
        let mut span = 1;
        self.axes.iter().rev().all(|a| {
            let ok = a.key >= span;
            span = a.key.saturating_mul(a.extent);
            ok
        })
    }

    /// Its boxes in `radix`. The pattern must be coalesced and nest. `None`: more than [`MAX_PATCHES`].
    pub fn patches(&self, radix: &Radix) -> Option<Vec<Patch>> {
        let mut out = Vec::with_capacity(1);
        let digits = radix.digits();
        let mut on: SmallVec<[(u64, u64); 4]> = SmallVec::from_elem((1, 0), digits);
        let mut loose: SmallVec<[Axis; 2]> = SmallVec::new();
        for a in &self.axes {
            match radix.weight.iter().position(|&w| w == a.key) {
                Some(i) => on[i] = (a.extent, a.val),
                None => loose.push(*a),
            }
        }
        let steps: u64 = loose.iter().map(|a| a.extent).product();
        if steps > MAX_PATCHES as u64 {
            return None;
        }
        for step in 0..steps {
            let (mut rest, mut key, mut val) = (step, self.key, self.val);
            for a in loose.iter().rev() {
                key += rest % a.extent * a.key;
                val += rest % a.extent * a.val;
                rest /= a.extent;
            }
            let base: Dims = radix.weight.iter().zip(&radix.size).map(|(&w, &n)| key / w % n).collect();
            let region = Region { lo: base.clone(), len: Dims::from_elem(1, digits) };
            let start = Patch { region, offset: val, stride: Dims::from_elem(0, digits) };
            Cut { radix, base: &base, on: &on, out: &mut out }.digit(digits, 0, (1, 0), start)?;
        }
        Some(out)
    }
}

/// Whether `outer` is `extent` steps of `inner`. (Their product may be beyond 2^64: only the last step is known to lie in memory.)
fn continues(outer: u64, inner: u64, extent: u64) -> bool {
    inner.checked_mul(extent) == Some(outer)
}

/// The recursion of [`Pattern::patches`], from the fastest digit to the slowest.
struct Cut<'a> {
    radix: &'a Radix,
    base: &'a [u64],
    /// Extent and step in the other space of the pattern's own axis on each digit.
    on: &'a [(u64, u64)],
    out: &'a mut Vec<Patch>,
}

impl Cut<'_> {
    /// Digit `below - 1`. `carry` comes from the digits below; `spill` is an axis of whole blocks that grew beyond its digit.
    fn digit(&mut self, below: usize, carry: u64, spill: (u64, u64), patch: Patch) -> Option<()> {
        if below == 0 {
            debug_assert_eq!(carry, 0);
            if self.out.len() == MAX_PATCHES {
                return None;
            }
            self.out.push(patch);
            return Some(());
        }
        let i = below - 1;
        if self.on[i].0 > 1 && spill.0 > 1 {
            // Two axes on one digit are no box: take the spilled one step by step.
            for j in 0..spill.0 {
                let mut p = patch.clone();
                p.offset += j * spill.1;
                self.digit(below, carry + j, (1, 0), p)?;
            }
            return Some(());
        }
        let (extent, step) = if spill.0 > 1 { spill } else { self.on[i] };
        let size = if i == 0 { u64::MAX } else { self.radix.size[i] };
        let start = self.base[i] + carry;
        let mut place = |lo: u64, len: u64, skip: u64, carry: u64, spill: (u64, u64)| {
            let mut p = patch.clone();
            p.region.lo[i] = lo;
            p.region.len[i] = len;
            p.stride[i] = if len > 1 { step } else { 0 };
            p.offset += skip * step;
            self.digit(i, carry, spill, p)
        };
        // Head up to the next block, whole blocks (an axis of the digit above), tail.
        let (block, at) = (start / size, start % size);
        let head = if at == 0 && extent >= size { 0 } else { extent.min(size - at) };
        if head > 0 {
            place(at, head, 0, block, (1, 0))?;
        }
        let blocks = (extent - head) / size;
        let first = block + u64::from(head > 0);
        if blocks > 0 {
            place(0, size, head, first, (blocks, size * step))?;
        }
        let tail = extent - head - blocks * size;
        if tail > 0 {
            place(0, tail, extent - tail, first + blocks, (1, 0))?;
        }
        Some(())
    }
}

impl Patch {
    /// Number in the other space of the first element of `part`, a box inside this one.
    pub fn offset_of(&self, part: &Region) -> u64 {
        self.offset + (0..part.lo.len()).map(|i| (part.lo[i] - self.region.lo[i]) * self.stride[i]).sum::<u64>()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Every (key, val) pair, element by element.
    fn elements(p: &Pattern) -> Vec<(u64, u64)> {
        let mut out = vec![(p.key, p.val)];
        for a in &p.axes {
            out = out.iter().flat_map(|&(k, v)| (0..a.extent).map(move |i| (k + i * a.key, v + i * a.val))).collect();
        }
        out.sort_unstable();
        out
    }

    fn of_patches(radix: &Radix, patches: &[Patch]) -> Vec<(u64, u64)> {
        let mut out = vec![];
        for p in patches {
            let mut index: Vec<(u64, u64)> = vec![(0, p.offset)];
            for i in 0..radix.digits() {
                let (w, lo, len, s) = (radix.weight[i], p.region.lo[i], p.region.len[i], p.stride[i]);
                assert!(i == 0 || lo + len <= radix.size[i]);
                index = index.iter().flat_map(|&(k, v)| (0..len).map(move |j| (k + (lo + j) * w, v + j * s))).collect();
            }
            out.extend(index);
        }
        out.sort_unstable();
        out
    }

    #[test]
    fn patches_hold_exactly_the_elements_of_the_pattern() {
        let mut rng = fastrand::Rng::with_seed(7);
        let mut several = 0;
        for _ in 0..20_000 {
            let mut span = rng.u64(1..3);
            let mut axes = SmallVec::new();
            for _ in 0..rng.usize(0..4) {
                let extent = rng.u64(1..6);
                let key = span * rng.u64(1..3) + rng.u64(0..2);
                axes.push(Axis { extent, key, val: rng.u64(1..50) });
                span = key * extent;
            }
            let p = Pattern { key: rng.u64(0..40), val: rng.u64(0..9), axes }.coalesce();
            assert!(p.nests());
            let strides: Vec<u64> = (0..rng.usize(0..4)).map(|_| rng.u64(1..30)).chain(p.axes.iter().map(|a| a.key)).collect();
            let radix = Radix::new(p.key_end() + rng.u64(0..5), strides);
            let patches = p.patches(&radix).unwrap();
            several += usize::from(patches.len() > 1);
            assert_eq!(of_patches(&radix, &patches), elements(&p), "{p:?} in {radix:?}");
        }
        assert!(several > 1000, "the test must meet patterns that fall apart");
    }

    #[test]
    fn coalesce_keeps_the_elements_and_flip_exchanges_them() {
        let mut rng = fastrand::Rng::with_seed(3);
        for _ in 0..2000 {
            let axes =
                (0..rng.usize(0..4)).map(|_| Axis { extent: rng.u64(1..4), key: rng.u64(1..9), val: rng.u64(1..9) }).collect();
            let p = Pattern { key: 2, val: 5, axes };
            let q = p.clone().coalesce();
            assert!(q.axes.len() <= p.axes.len());
            assert_eq!(elements(&p), elements(&q));
            let mut swapped: Vec<_> = elements(&p).iter().map(|&(k, v)| (v, k)).collect();
            swapped.sort_unstable();
            assert_eq!(elements(&q.flip()), swapped);
        }
    }

    #[test]
    fn aligned_boxes_stay_whole() {
        // A row shard and a column shard of [12, 10], seen in the radix of both.
        let rows = Pattern { key: 30, val: 0, axes: SmallVec::from_slice(&[Axis { extent: 60, key: 1, val: 1 }]) };
        let cols = Pattern {
            key: 5,
            val: 0,
            axes: SmallVec::from_slice(&[Axis { extent: 12, key: 10, val: 5 }, Axis { extent: 5, key: 1, val: 1 }]),
        };
        let radix = Radix::new(120, [10, 1]);
        let (a, b) = (rows.patches(&radix).unwrap(), cols.patches(&radix).unwrap());
        assert_eq!((a.len(), b.len()), (1, 1));
        let both = a[0].region.meet(&b[0].region).unwrap();
        assert_eq!((both.lo.as_slice(), both.len.as_slice()), (&[3, 5][..], &[6, 5][..]));
        assert_eq!((a[0].offset_of(&both), b[0].offset_of(&both)), (5, 15));
    }
}
