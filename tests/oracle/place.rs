//! Puts boxes into one buffer: one after another, interleaved by an outer stride (as a fused QKV), with permuted axes, with gaps.

use super::views::{Piece, chance};
use fastrand::Rng;

/// Which gaps may be left.
#[derive(Clone, Copy)]
pub struct Gaps {
    /// Those that the buffer's own strides describe: they belong to nobody.
    pub frame: bool,
    /// Anywhere: elements of the buffer in no tile.
    pub pads: bool,
}

/// Where a box came to lie.
pub struct Placed {
    pub piece: Piece,
    /// Elements from the first of the buffer.
    pub offset: i64,
    /// Axes without a stride yet, and those of them that a region around the present one gives its stride.
    open: Vec<usize>,
    taken: Vec<usize>,
}

/// A region of a buffer: `span` elements, of which those of the box `dims` (extent, stride) are the buffer's own.
pub struct Region {
    pub span: i64,
    pub dims: Vec<(i64, i64)>,
}

/// Gives every piece its strides and offset; no two of them share an element.
pub fn place(rng: &mut Rng, pieces: Vec<Piece>, gaps: Gaps) -> (Vec<Placed>, Region) {
    let open = |p: &Piece| (0..p.extent.len()).filter(|&j| p.extent[j] > 1).collect();
    let mut all: Vec<Placed> =
        pieces.into_iter().map(|piece| Placed { open: open(&piece), taken: Vec::new(), piece, offset: 0 }).collect();
    let region = fill(rng, &mut all, gaps);
    (all, region)
}

fn fill(rng: &mut Rng, items: &mut [Placed], gaps: Gaps) -> Region {
    if items.len() == 1 && items[0].open.is_empty() {
        return Region { span: 1, dims: Vec::new() };
    }
    // An axis that all of them have becomes the slowest of the region; a lone box always has one.
    let shared = |g: i64| items.iter().all(|i| i.open.iter().any(|&j| i.piece.extent[j] == g));
    let common: Vec<i64> = items[0].open.iter().map(|&j| items[0].piece.extent[j]).filter(|&g| shared(g)).collect();
    let slowest = if chance(rng, 60) { common.first().copied() } else { rng.choice(common) };
    if let Some(g) = slowest.filter(|_| items.len() == 1 || chance(rng, 70)) {
        items.iter_mut().for_each(|i| i.take_axis(g));
        let inner = fill(rng, items, gaps);
        let stride = inner.span + if gaps.frame || gaps.pads { gap(rng) } else { 0 };
        for item in items {
            let axis = item.taken.pop().expect("taken above");
            item.piece.stride[axis] = stride;
        }
        let mut dims = vec![(g, stride)];
        dims.extend(inner.dims);
        return Region { span: g * stride, dims };
    }
    let inside = Gaps { frame: false, ..gaps };
    rng.shuffle(items);
    let (left, right) = items.split_at_mut(rng.usize(1..items.len()));
    let first = fill(rng, left, inside).span + if gaps.pads { gap(rng) } else { 0 };
    let span = first + fill(rng, right, inside).span;
    right.iter_mut().for_each(|i| i.offset += first);
    Region { span, dims: vec![(span, 1)] }
}

impl Placed {
    /// Takes the first open axis of extent `g`.
    fn take_axis(&mut self, g: i64) {
        let at = self.open.iter().position(|&j| self.piece.extent[j] == g).expect("shared by all");
        self.taken.push(self.open.remove(at));
    }
}

/// Elements left free: mostly none.
fn gap(rng: &mut Rng) -> i64 {
    if chance(rng, 30) { rng.i64(1..5) } else { 0 }
}
