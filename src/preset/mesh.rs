//! Ranks and their coordinates.
#![forbid(unsafe_code)]

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

/// The grid of one side: which positions hold the same.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Mesh {
    /// Which shard of its layers a rank holds.
    pub shard: Dim,
    /// Which layers a rank holds.
    pub stage: Dim,
    /// Whatever else tells ranks apart: those that differ only in these hold the same.
    pub copies: Vec<Dim>,
}

impl Mesh {
    /// A grid from its sizes, the fastest first: the shard, then any order of the stage and the copies.
    pub fn new(shard: u64, slower: &[(Axis, u64)]) -> Mesh {
        let mut stride = shard;
        let mut mesh = Mesh { shard: Dim { size: shard, stride: 1 }, stage: Dim { size: 1, stride: 1 }, copies: vec![] };
        for &(axis, size) in slower {
            let dim = Dim { size, stride };
            match axis {
                Axis::Stage => mesh.stage = dim,
                Axis::Copy => mesh.copies.push(dim),
            }
            stride *= size;
        }
        mesh
    }

    /// Number of positions.
    pub fn len(&self) -> u64 {
        self.shard.size * self.stage.size * self.copies.iter().map(|d| d.size).product::<u64>()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Stage and shard of a position.
    pub fn coords(&self, position: u64) -> (u64, u64) {
        (self.stage.of(position), self.shard.of(position))
    }

    /// The positions of a stage and shard.
    pub fn positions(&self, stage: u64, shard: u64) -> Vec<u64> {
        let mut out = vec![stage * self.stage.stride + shard * self.shard.stride];
        for dim in &self.copies {
            out = (0..dim.size).flat_map(|i| out.iter().map(move |p| p + i * dim.stride)).collect();
        }
        out
    }
}

/// What an axis of a [`Mesh`] does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Axis {
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
        for mesh in [
            Mesh::new(3, &[(Axis::Copy, 2), (Axis::Copy, 4), (Axis::Stage, 5)]),
            Mesh::new(2, &[(Axis::Stage, 3), (Axis::Copy, 2), (Axis::Copy, 3)]),
        ] {
            let mut seen = vec![0; mesh.len() as usize];
            for stage in 0..mesh.stage.size {
                for shard in 0..mesh.shard.size {
                    for p in mesh.positions(stage, shard) {
                        assert_eq!(mesh.coords(p), (stage, shard));
                        seen[p as usize] += 1;
                    }
                }
            }
            assert!(seen.iter().all(|&n| n == 1));
        }
    }
}
