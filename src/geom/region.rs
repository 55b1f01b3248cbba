//! Axis-parallel boxes of one index space.
#![forbid(unsafe_code)]

use super::Dims;
use smallvec::SmallVec;

/// The box `[lo, lo + len)`, one entry an axis, slowest first. Ordered by `lo`, then `len`.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Region {
    /// First index on each axis.
    pub lo: Dims,
    /// Indices on each axis, at least 1.
    pub len: Dims,
}

impl Region {
    /// Number of elements.
    pub fn volume(&self) -> u64 {
        self.len.iter().product()
    }

    /// Whether they share an element.
    pub fn meets(&self, other: &Region) -> bool {
        (0..self.lo.len()).all(|i| self.lo[i] < other.lo[i] + other.len[i] && other.lo[i] < self.lo[i] + self.len[i])
    }

    /// What both hold.
    pub fn meet(&self, other: &Region) -> Option<Region> {
        // Most pairs that are asked for do not meet: find out before anything is built.
        if !self.meets(other) {
            return None;
        }
        let mut out = self.clone();
        for i in 0..self.lo.len() {
            let lo = self.lo[i].max(other.lo[i]);
            out.len[i] = (self.lo[i] + self.len[i]).min(other.lo[i] + other.len[i]) - lo;
            out.lo[i] = lo;
        }
        Some(out)
    }

    /// Appends to `out` the boxes of `self` outside `hole`, cut slab by slab from the slowest axis.
    pub fn minus(&self, hole: &Region, out: &mut Vec<Region>) {
        let Some(hole) = self.meet(hole) else {
            out.push(self.clone());
            return;
        };
        let mut rest = self.clone();
        for i in 0..self.lo.len() {
            let (lo, end) = (rest.lo[i], rest.lo[i] + rest.len[i]);
            let (hole_lo, hole_end) = (hole.lo[i], hole.lo[i] + hole.len[i]);
            for (from, to) in [(lo, hole_lo), (hole_end, end)] {
                if from < to {
                    let mut slab = rest.clone();
                    slab.lo[i] = from;
                    slab.len[i] = to - from;
                    out.push(slab);
                }
            }
            rest.lo[i] = hole_lo;
            rest.len[i] = hole_end - hole_lo;
        }
    }

    /// Takes `hole` out of every box of a list.
    pub fn minus_all(list: &mut Vec<Region>, hole: &Region) {
        if list.iter().any(|r| r.meets(hole)) {
            let mut out = Vec::with_capacity(list.len() + 2);
            for r in list.iter() {
                r.minus(hole, &mut out);
            }
            *list = out;
        }
    }

    /// Cut into boxes of `most` elements at most, in row-major order, along the slowest axes.
    pub fn chunks(&self, most: u64) -> Vec<Region> {
        let mut out = vec![];
        self.chunks_into(most.max(1), &mut out);
        out
    }

    fn chunks_into(&self, most: u64, out: &mut Vec<Region>) {
        let volume = self.volume();
        let Some(axis) = self.len.iter().position(|&n| n > 1).filter(|_| volume > most) else {
            out.push(self.clone());
            return;
        };
        let steps = (most / (volume / self.len[axis])).max(1);
        for from in (0..self.len[axis]).step_by(steps as usize) {
            let mut chunk = self.clone();
            chunk.lo[axis] += from;
            chunk.len[axis] = steps.min(self.len[axis] - from);
            chunk.chunks_into(most, out);
        }
    }

    /// The `part`-th of `parts` nearly equal pieces along `axis`, cut at multiples of `grain`; `None` where it is empty.
    pub fn split(&self, axis: usize, part: u64, parts: u64, grain: u64) -> Option<Region> {
        let len = self.len[axis];
        let even = |i: u64| (u128::from(len) * u128::from(i) / u128::from(parts)) as u64;
        let at = |i: u64| if i == parts { len } else { even(i) / grain * grain };
        let (from, to) = (at(part), at(part + 1));
        (from < to).then(|| {
            let mut out = self.clone();
            out.lo[axis] += from;
            out.len[axis] = to - from;
            out
        })
    }
}

/// A list of boxes, ready to be asked which of them meet another: along the axis that tells most of them apart, sorted.
#[derive(Debug)]
pub struct Index<'a> {
    axis: usize,
    /// By first index on the axis: the box, its place in the list, and the farthest end of all up to it.
    sorted: SmallVec<[(&'a Region, usize, u64); 4]>,
}

/// Lists up to this long are simply searched.
const SHORT: usize = 8;

impl<'a> Index<'a> {
    /// Of boxes of one radix.
    pub fn new(list: impl Iterator<Item = &'a Region>) -> Index<'a> {
        let mut sorted: SmallVec<[(&Region, usize, u64); 4]> = list.enumerate().map(|(i, r)| (r, i, 0)).collect();
        if sorted.len() <= SHORT {
            return Index { axis: 0, sorted };
        }
        let distinct = |axis: usize| {
            let mut lo: Vec<u64> = sorted.iter().map(|s| s.0.lo[axis]).collect();
            lo.sort_unstable();
            lo.dedup();
            lo.len()
        };
        let axis = (0..sorted[0].0.lo.len()).rev().max_by_key(|&a| distinct(a)).unwrap_or(0);
        sorted.sort_by_key(|s| s.0.lo.get(axis).copied());
        let mut far = 0;
        for s in &mut sorted {
            far = far.max(s.0.lo.get(axis).map_or(1, |lo| lo + s.0.len[axis]));
            s.2 = far;
        }
        Index { axis, sorted }
    }

    /// Places in the list of the boxes that meet `other`, rising.
    pub fn meeting(&self, other: &Region) -> SmallVec<[usize; 8]> {
        if self.sorted.len() <= SHORT {
            return self.sorted.iter().filter(|s| s.0.meets(other)).map(|s| s.1).collect();
        }
        let (lo, end) = other.lo.get(self.axis).map_or((0, 1), |&lo| (lo, lo + other.len[self.axis]));
        let after = self.sorted.partition_point(|s| s.0.lo.get(self.axis).is_none_or(|&l| l < end));
        let near = self.sorted[..after].iter().rev().take_while(|s| s.2 > lo);
        let mut out: SmallVec<[usize; 8]> = near.filter(|s| s.0.meets(other)).map(|s| s.1).collect();
        out.sort_unstable();
        out
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use smallvec::smallvec;
    use std::collections::HashSet;

    fn cells(r: &Region) -> HashSet<(u64, u64, u64)> {
        let mut out = HashSet::new();
        for a in r.lo[0]..r.lo[0] + r.len[0] {
            for b in r.lo[1]..r.lo[1] + r.len[1] {
                for c in r.lo[2]..r.lo[2] + r.len[2] {
                    out.insert((a, b, c));
                }
            }
        }
        out
    }

    fn random(rng: &mut fastrand::Rng) -> Region {
        let lo: Dims = (0..3).map(|_| rng.u64(0..4)).collect();
        let len: Dims = (0..3).map(|_| rng.u64(1..4)).collect();
        Region { lo, len }
    }

    #[test]
    fn meet_and_minus_are_those_of_sets() {
        let mut rng = fastrand::Rng::with_seed(1);
        for _ in 0..5000 {
            let (a, b) = (random(&mut rng), random(&mut rng));
            let (sa, sb) = (cells(&a), cells(&b));
            let met: HashSet<_> = a.meet(&b).map(|m| cells(&m)).unwrap_or_default();
            assert_eq!(met, sa.intersection(&sb).copied().collect());
            let mut parts = vec![];
            a.minus(&b, &mut parts);
            let volume: u64 = parts.iter().map(Region::volume).sum();
            let union: HashSet<_> = parts.iter().flat_map(cells).collect();
            assert_eq!(union.len() as u64, volume, "parts overlap");
            assert_eq!(union, sa.difference(&sb).copied().collect());
        }
    }

    #[test]
    fn an_index_finds_what_a_search_finds() {
        let mut rng = fastrand::Rng::with_seed(9);
        for _ in 0..2000 {
            let list: Vec<Region> = (0..rng.usize(0..40)).map(|_| random(&mut rng)).collect();
            let index = Index::new(list.iter());
            let asked = random(&mut rng);
            let want: Vec<usize> = (0..list.len()).filter(|&i| !cells(&list[i]).is_disjoint(&cells(&asked))).collect();
            assert_eq!(index.meeting(&asked).as_slice(), want);
        }
        let point = Region { lo: smallvec![], len: smallvec![] };
        for n in [2, 20] {
            assert_eq!(Index::new(vec![&point; n].into_iter()).meeting(&point).len(), n);
        }
    }

    #[test]
    fn chunks_cover_in_order_and_are_short() {
        let r = Region { lo: smallvec![5, 1, 9], len: smallvec![7, 3, 10] };
        for most in [1, 4, 10, 25, 30, 100, 209, 210] {
            let chunks = r.chunks(most);
            assert!(chunks.iter().all(|c| (1..=most).contains(&c.volume())), "{most}");
            assert!(chunks.len() as u64 <= 2 * 210_u64.div_ceil(most).max(7), "{most}: {}", chunks.len());
            let cells = |c: &Region| {
                let (lo, len) = (c.lo.clone(), c.len.clone());
                (0..c.volume()).map(move |i| [lo[0] + i / (len[1] * len[2]), lo[1] + i / len[2] % len[1], lo[2] + i % len[2]])
            };
            let all: Vec<[u64; 3]> = chunks.iter().flat_map(cells).collect();
            let mut sorted = all.clone();
            sorted.sort_unstable();
            sorted.dedup();
            assert_eq!(sorted.len(), 210, "{most}");
            assert!(chunks.windows(2).all(|w| w[0].lo < w[1].lo), "{most}");
        }
    }

    #[test]
    fn splits_cover_in_order() {
        let r = Region { lo: smallvec![5, 1], len: smallvec![7, 3] };
        let parts: Vec<_> = (0..10).filter_map(|i| r.split(0, i, 10, 1)).collect();
        assert_eq!(parts.len(), 7);
        let mut next = 5;
        for p in parts {
            assert_eq!((p.lo[0], p.lo[1], p.len[1]), (next, 1, 3));
            next += p.len[0];
        }
        assert_eq!(next, 12);
    }
}
