//! Random reshapes of a tensor, cuts of it into boxes, and other views in which a box is still a box.

use super::model::dense;
use fastrand::Rng;

/// Most axes that a random view grows to by itself.
const MOST_AXES: usize = 6;

/// A box of a tensor in a view, with the strides its elements have somewhere.
#[derive(Clone, Debug)]
pub struct Piece {
    pub tensor: usize,
    pub view: Vec<i64>,
    pub origin: Vec<i64>,
    pub extent: Vec<i64>,
    pub stride: Vec<i64>,
}

/// True in `percent` of the calls.
pub fn chance(rng: &mut Rng, percent: u32) -> bool {
    rng.u32(0..100) < percent
}

/// A random proper divisor of `n`, if it has one.
fn divisor(rng: &mut Rng, n: i64) -> Option<i64> {
    let all: Vec<i64> = (2..n).filter(|d| n % d == 0).collect();
    rng.choice(all)
}

/// The whole tensor in its own shape.
pub fn whole(tensor: usize, shape: &[i64]) -> Piece {
    Piece { tensor, view: shape.to_vec(), origin: vec![0; shape.len()], extent: shape.to_vec(), stride: dense(shape) }
}

/// A random shape of `count` elements.
pub fn factors(rng: &mut Rng, count: i64) -> Vec<i64> {
    let mut piece = whole(0, &[count]);
    if count == 1 && rng.bool() {
        return Vec::new();
    }
    for _ in 0..rng.u32(0..3) {
        piece = step(rng, piece);
    }
    piece.view
}

/// The same box with the same elements in the same places, in another view.
pub fn review(rng: &mut Rng, mut piece: Piece) -> Piece {
    for _ in 0..rng.u32(0..4) {
        piece = step(rng, piece);
    }
    piece
}

/// One axis split, two merged, or one of extent 1 put in, where the box stays a box.
fn step(rng: &mut Rng, mut p: Piece) -> Piece {
    let axes = p.view.len();
    match rng.u32(0..10) {
        0 if axes < MOST_AXES => {
            let at = rng.usize(0..=axes);
            p.insert(at, (1, 0, 1, 1));
        }
        1..=5 if axes > 0 && axes < MOST_AXES => {
            let j = rng.usize(0..axes);
            let (n, o, e, s) = p.axis(j);
            let Some(b) = divisor(rng, n) else { return p };
            if o % b == 0 && e % b == 0 {
                p.replace(j, 1, &[(n / b, o / b, e / b, s * b), (b, 0, b, s)]);
            } else if o / b == (o + e - 1) / b {
                p.replace(j, 1, &[(n / b, o / b, 1, s * b), (b, o % b, e, s)]);
            }
        }
        _ if axes > 1 => {
            let j = rng.usize(0..axes - 1);
            let ((n, o, e, s), (m, q, f, t)) = (p.axis(j), p.axis(j + 1));
            if m == 1 {
                p.replace(j, 2, &[(n, o, e, s)]);
            } else if e == 1 {
                p.replace(j, 2, &[(n * m, o * m + q, f, t)]);
            } else if f == m && s == t * m {
                p.replace(j, 2, &[(n * m, o * m, e * m, t)]);
            }
        }
        _ => {}
    }
    p
}

impl Piece {
    fn axis(&self, j: usize) -> (i64, i64, i64, i64) {
        (self.view[j], self.origin[j], self.extent[j], self.stride[j])
    }

    fn insert(&mut self, at: usize, axis: (i64, i64, i64, i64)) {
        self.view.insert(at, axis.0);
        self.origin.insert(at, axis.1);
        self.extent.insert(at, axis.2);
        self.stride.insert(at, axis.3);
    }

    fn replace(&mut self, at: usize, count: usize, axes: &[(i64, i64, i64, i64)]) {
        for column in [&mut self.view, &mut self.origin, &mut self.extent, &mut self.stride] {
            column.drain(at..at + count);
        }
        for axis in axes.iter().rev() {
            self.insert(at, *axis);
        }
    }

    /// The part of it from `low` to `high` on one axis; `stride` stays, so the part lies where it lay.
    fn part(&self, axis: usize, low: i64, high: i64) -> Piece {
        let mut part = self.clone();
        part.origin[axis] += low;
        part.extent[axis] = high - low;
        part
    }

    /// Cuts it in up to `parts` boxes that together are all of it: at random places, or evenly on one axis.
    pub fn cut(&self, rng: &mut Rng, parts: usize) -> Vec<Piece> {
        let mut boxes = vec![self.clone()];
        let wide = |p: &Piece| (0..p.extent.len()).filter(|&j| p.extent[j] > 1).collect::<Vec<_>>();
        if let Some(axis) = rng.choice(wide(self)).filter(|_| rng.u32(0..3) == 0) {
            let e = self.extent[axis];
            let n = e.min(parts as i64);
            return (0..n).map(|i| self.part(axis, i * e / n, (i + 1) * e / n)).collect();
        }
        for _ in 1..parts {
            let at = rng.usize(0..boxes.len());
            let Some(axis) = rng.choice(wide(&boxes[at])) else { continue };
            let old = boxes.swap_remove(at);
            let e = old.extent[axis];
            let cut = if e % 2 == 0 && rng.bool() { e / 2 } else { rng.i64(1..e) };
            boxes.extend([old.part(axis, 0, cut), old.part(axis, cut, e)]);
        }
        boxes
    }
}
