//! Both sides of a world, as a planner asks for them: who holds the tensors of a kind, found from coordinates.
//!
//! A tensor's *places* are the stages that hold it. Tensors of one kind with the same places lie alike on all ranks, but for the rows of
//! their buffers; ranks with the same coordinates hold the same and form one [`Group`].
#![forbid(unsafe_code)]

use super::model::{Model, Part};
use super::side::{Param, Section, Side};
use super::spec::Spec;
use crate::error::Result;
use crate::geom::Pattern;
use crate::layout::Tensor;
use smallvec::SmallVec;
use std::collections::BTreeSet;

/// A whole job: model, trainer, engine.
pub struct World {
    /// As the caller gave it.
    pub spec: Spec,
}

/// Stage, and what its parameters belong to.
pub type Place = (u64, Section);

/// What tells how a tensor lies from how others do: its kind, and its places as source and as target.
pub type Likeness = (usize, [SmallVec<[Place; 2]>; 2]);

/// Ranks that hold and want the same of a tensor: their stage and shard as source and as target, where they have a part of it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Group {
    /// By side.
    pub coords: [Option<(u64, u64)>; 2],
    /// Communicator ranks, rising.
    pub ranks: Vec<u32>,
}

/// A box of a tensor in a parameter.
#[derive(Clone, Copy, Debug)]
pub struct Hold<'w> {
    /// Place that it belongs to, by number.
    pub place: u32,
    /// The parameter's row, from the place's first.
    pub row: u32,
    /// The parameter.
    pub param: &'w Param,
    /// What lies where.
    pub pattern: &'w Pattern,
}

impl World {
    /// From a spec's JSON.
    pub fn new(text: &str) -> Result<World> {
        Ok(World { spec: Spec::new(text)? })
    }

    /// Source and target.
    pub fn sides(&self) -> [&Side; 2] {
        [&self.spec.source, &self.spec.target]
    }

    /// The model.
    pub fn model(&self) -> &Model {
        &self.spec.model
    }

    /// One more than the highest rank that plays a part.
    pub fn ranks(&self) -> u32 {
        self.spec.source.world().max(self.spec.target.world())
    }

    /// All logical tensors, by ordinal.
    pub fn tensors(&self) -> Vec<Tensor> {
        let model = self.model();
        let tensor = |(kind, layer): (usize, u64)| {
            let shape = model.kinds[kind].shape.clone();
            Tensor { name: model.name(kind, layer), elements: shape.iter().product(), shape }
        };
        model.all().map(tensor).collect()
    }

    /// Tensors that a rank has a part of on either side, by ordinal: (ordinal, kind, layer).
    pub fn tensors_of(&self, rank: u32) -> BTreeSet<(u32, usize, u64)> {
        let mut out = BTreeSet::new();
        for side in self.sides() {
            let Some((stage, shard)) = side.coords(rank) else { continue };
            for (slot, param) in side.params(stage, shard) {
                for cut in &param.cuts {
                    let layer = if self.model().kinds[cut.kind].part == Part::Layer { slot.layer } else { 0 };
                    out.insert((self.model().ordinal(cut.kind, layer) as u32, cut.kind, layer));
                }
            }
        }
        out
    }

    /// How a tensor lies.
    pub fn likeness(&self, kind: usize, layer: u64) -> Likeness {
        let part = self.model().kinds[kind].part;
        let places = |side: &Side| {
            let list = side.places(part, layer).iter();
            list.map(|&(stage, slot)| (stage, side.parts.stages[stage as usize][slot].section)).collect()
        };
        (kind, self.sides().map(places))
    }

    /// First row of each place of a tensor on a side's ranks.
    pub fn rows(&self, side: usize, kind: usize, layer: u64) -> SmallVec<[u32; 2]> {
        let side = self.sides()[side];
        let places = side.places(self.model().kinds[kind].part, layer).iter();
        places.map(|&(stage, slot)| side.parts.stages[stage as usize][slot].first).collect()
    }

    /// What the ranks at `coords` of a side hold of a tensor that lies so.
    pub fn holds(&self, side: usize, like: &Likeness, (stage, shard): (u64, u64)) -> SmallVec<[Hold<'_>; 4]> {
        let mut out = SmallVec::new();
        for (place, &(at, section)) in (0..).zip(&like.1[side]) {
            if at != stage {
                continue;
            }
            for (row, param) in (0..).zip(self.sides()[side].parts.shards[shard as usize].section(section)) {
                let of_kind = param.cuts.iter().zip(&param.patterns).filter(|(c, _)| c.kind == like.0);
                out.extend(of_kind.map(|(_, pattern)| Hold { place, row, param, pattern }));
            }
        }
        out
    }

    /// All ranks that have a part of a tensor that lies so, by coordinates.
    pub fn groups(&self, like: &Likeness) -> Vec<Group> {
        let at = |side: usize, rank: u32| {
            let coords = self.sides()[side].coords(rank)?;
            (like.1[side].iter().any(|p| p.0 == coords.0) && !self.holds(side, like, coords).is_empty()).then_some(coords)
        };
        let mut out: Vec<Group> = vec![];
        for side in [0, 1] {
            let mut stages: SmallVec<[u64; 2]> = like.1[side].iter().map(|p| p.0).collect();
            stages.dedup();
            for stage in stages {
                for shard in 0..self.sides()[side].parts.mesh.shard.size {
                    if self.holds(side, like, (stage, shard)).is_empty() {
                        continue;
                    }
                    let first = out.len();
                    for rank in self.sides()[side].ranks(stage, shard) {
                        let mut coords = [None, None];
                        coords[side] = Some((stage, shard));
                        coords[1 - side] = at(1 - side, rank);
                        if side == 1 && coords[0].is_some() {
                            continue; // found from its source's side
                        }
                        match out[first..].iter_mut().find(|g| g.coords == coords) {
                            Some(group) => group.ranks.push(rank),
                            None => out.push(Group { coords, ranks: vec![rank] }),
                        }
                    }
                }
            }
        }
        out
    }

    /// Name of a rank's parameter by its row on a side; `None` if there is none.
    pub fn param_name(&self, side: usize, rank: u32, row: u32) -> Option<String> {
        let (stage, shard) = self.sides()[side].coords(rank)?;
        let (slot, param) = self.sides()[side].params(stage, shard).nth(row as usize)?;
        Some(format!("{}{}", slot.prefix, param.name))
    }
}
