//! Ranks and their coordinates.
#![forbid(unsafe_code)]

use crate::abi::RS_ERR_INVALID;
use crate::error::{Result, bail};
use serde::Serialize;

/// A coordinate of a rank's position: `position / stride % size`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Dim {
    /// Number of values.
    pub size: u64,
    /// Positions from one value to the next.
    pub stride: u64,
}

impl Dim {
    /// The coordinate of a position.
    pub fn of(&self, position: u64) -> u64 {
        position / self.stride % self.size
    }
}

/// The grid of one side, or of its experts: which positions hold the same.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Mesh {
    /// Which shard of its layers a rank holds: a number written in these, the fastest first.
    pub shard: Vec<Dim>,
    /// Which layers a rank holds.
    pub stage: Dim,
    /// Whatever else tells ranks apart: those that differ only in these hold the same.
    pub copies: Vec<Dim>,
}

impl Mesh {
    /// A grid of so many ranks from its axes, the fastest first.
    pub fn new(axes: &[(Axis, u64)], ranks: usize) -> Result<Mesh> {
        let sizes = axes.iter().try_fold(1u64, |n, a| n.checked_mul(a.1));
        if sizes != Some(ranks as u64) {
            let sizes: Vec<String> = axes.iter().filter(|a| a.1 > 1).map(|a| a.1.to_string()).collect();
            let sizes = if sizes.is_empty() { "1".to_string() } else { sizes.join(" * ") };
            bail!(RS_ERR_INVALID, "ranks has {ranks} ranks, the sizes of its parallelisms multiply to {sizes}");
        }
        let mut stride = 1;
        let mut mesh = Mesh { shard: vec![], stage: Dim { size: 1, stride: 1 }, copies: vec![] };
        for &(axis, size) in axes {
            let dim = Dim { size, stride };
            match axis {
                Axis::Shard => mesh.shard.push(dim),
                Axis::Stage => mesh.stage = dim,
                Axis::Copy => mesh.copies.push(dim),
            }
            stride *= size;
        }
        Ok(mesh)
    }

    /// Number of shards.
    pub fn shards(&self) -> u64 {
        self.shard.iter().map(|d| d.size).product()
    }

    /// Stage and shard of a position.
    pub fn coords(&self, position: u64) -> (u64, u64) {
        let shard = self.shard.iter().rev().fold(0, |n, d| n * d.size + d.of(position));
        (self.stage.of(position), shard)
    }

    /// The positions of a stage and shard.
    pub fn positions(&self, stage: u64, shard: u64) -> Vec<u64> {
        let (mut first, mut rest) = (stage * self.stage.stride, shard);
        for dim in &self.shard {
            first += rest % dim.size * dim.stride;
            rest /= dim.size;
        }
        let mut out = vec![first];
        for dim in &self.copies {
            out = (0..dim.size).flat_map(|i| out.iter().map(move |p| p + i * dim.stride)).collect();
        }
        out
    }
}

/// What an axis of a [`Mesh`] does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Axis {
    /// Cuts layers.
    Shard,
    /// Pipeline stages.
    Stage,
    /// Ranks that hold the same.
    Copy,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn positions_and_coordinates_belong_together() {
        for (ranks, axes) in [
            (120, [(Axis::Shard, 3), (Axis::Copy, 2), (Axis::Copy, 4), (Axis::Stage, 5)]),
            (36, [(Axis::Shard, 2), (Axis::Stage, 3), (Axis::Shard, 2), (Axis::Copy, 3)]),
        ] {
            let mesh = Mesh::new(&axes, ranks).unwrap();
            let mut seen = vec![0; ranks];
            for stage in 0..mesh.stage.size {
                for shard in 0..mesh.shards() {
                    for p in mesh.positions(stage, shard) {
                        assert_eq!(mesh.coords(p), (stage, shard));
                        seen[p as usize] += 1;
                    }
                }
            }
            assert!(seen.iter().all(|&n| n == 1));
            assert!(Mesh::new(&axes, ranks + 1).unwrap_err().text().contains("multiply to"));
            let huge = [axes[0], (Axis::Copy, 1 << 40), (Axis::Copy, 1 << 40), axes[3]];
            assert!(Mesh::new(&huge, ranks).is_err(), "sizes that wrap");
        }
    }
}
