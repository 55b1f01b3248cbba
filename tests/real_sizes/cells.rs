//! Cells: parts of a tensor that every rank holds or wants as a whole or not at all.

use super::balance::Egress;
use super::holds::Rect;
use std::collections::{BTreeMap, BTreeSet};

/// A rectangle of a rank, as its source (false) or as its target.
pub type Owned = (usize, bool, Rect);

/// The cells of tensors that lie alike.
pub struct Cells {
    rows: Vec<u64>,
    cols: Vec<u64>,
    /// Row by row: the class of each rank that wants the cell and does not hold it.
    classes: Vec<BTreeMap<usize, usize>>,
}

/// Places in `cuts` of the steps that a range meets.
fn steps(cuts: &[u64], range: [u64; 2]) -> std::ops::Range<usize> {
    cuts.partition_point(|&c| c <= range[0]).saturating_sub(1)..cuts.partition_point(|&c| c < range[1])
}

impl Cells {
    pub fn new(boxes: &[Owned], egress: &mut Egress) -> Cells {
        let cuts = |of: fn(&Rect) -> [u64; 2]| -> Vec<u64> {
            boxes.iter().flat_map(|b| of(&b.2)).collect::<BTreeSet<u64>>().into_iter().collect()
        };
        let (rows, cols) = (cuts(|r| r.rows), cuts(|r| r.cols));
        let wide = cols.len() - 1;
        let mut ranks = vec![[BTreeSet::new(), BTreeSet::new()]; (rows.len() - 1) * wide];
        for (rank, target, rect) in boxes {
            for row in steps(&rows, rect.rows) {
                for col in steps(&cols, rect.cols) {
                    ranks[row * wide + col][usize::from(*target)].insert(*rank);
                }
            }
        }
        let class = |[holders, wanting]: &[BTreeSet<usize>; 2]| egress.classes(holders, &(wanting - holders));
        let classes = ranks.iter().map(class).collect();
        Cells { rows, cols, classes }
    }

    fn cell(&self, row: usize, col: usize) -> Rect {
        Rect { rows: [self.rows[row], self.rows[row + 1]], cols: [self.cols[col], self.cols[col + 1]] }
    }

    /// One tensor that lies so is wanted, of `item` bytes an element.
    pub fn wanted(&self, item: u64, egress: &mut Egress) {
        let wide = self.cols.len() - 1;
        for (i, classes) in self.classes.iter().enumerate() {
            let bytes = self.cell(i / wide, i % wide).area() * item;
            classes.values().for_each(|&class| egress.wanted(class, bytes));
        }
    }

    /// A rectangle of one goes from a rank to another.
    pub fn sent(&self, rect: &Rect, item: u64, (from, to): (usize, usize), egress: &mut Egress) {
        for row in steps(&self.rows, rect.rows) {
            for col in steps(&self.cols, rect.cols) {
                let class = self.classes[row * (self.cols.len() - 1) + col].get(&to);
                if let (Some(common), Some(&class)) = (self.cell(row, col).meet(rect), class) {
                    egress.sent(class, from, common.area() * item);
                }
            }
        }
    }
}
