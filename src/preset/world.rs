//! Both sides of a world, as a planner asks for them: who holds the tensors of a kind, found from coordinates.
//!
//! A tensor's *places* are the stages that hold it. Tensors of one kind and expert with the same places lie alike on all ranks, but for
//! the rows of their buffers; ranks with the same coordinates hold the same and form one [`Group`].
#![forbid(unsafe_code)]

use super::model::{Id, Model, Part};
use super::side::{Param, Side};
use super::spec::Spec;
use super::variant::Variants;
use crate::error::Result;
use crate::geom::Pattern;
use crate::layout::Tensor;
use serde_json::{Value, json};
use smallvec::SmallVec;
use std::collections::BTreeSet;

/// A whole job: model, trainer, engine.
pub struct World {
    /// As the caller gave it, with the variants.
    pub spec: Spec,
    /// What has turned out of it.
    pub variants: Variants,
    text: String,
}

/// Stage and section.
pub type Place = (u64, usize);

/// What tells how a tensor lies from how others do: its kind and expert, and its places as source and as target.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Likeness {
    kind: usize,
    expert: u32,
    places: [SmallVec<[Place; 2]>; 2],
}

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
        let variants = Variants::default();
        Ok(World { spec: Spec::new(text, &variants)?, variants, text: text.to_string() })
    }

    /// The same spec with other variants. It is the same job: the digest stays.
    pub fn with(&self, variants: Variants) -> Result<World> {
        let spec = Spec { digest: self.spec.digest, ..Spec::new(&self.text, &variants)? };
        Ok(World { spec, variants, text: self.text.clone() })
    }

    /// What has turned out of each side, in words.
    pub fn found(&self) -> Value {
        let shown = |side: usize| self.variants.shown(side, &self.spec.left[side]);
        json!({"source": shown(0), "target": shown(1)})
    }

    /// The first parameter of a rank that is another one in `other`, by name, with both shapes.
    pub fn differs(&self, other: &World, rank: u32) -> Option<(String, [Vec<u64>; 2])> {
        let of = |world: &World, side: usize| -> Vec<(String, u32, Param)> {
            let params = world.sides()[side].params(rank);
            params.map(|(slot, p)| (format!("{}{}", slot.prefix, p.name), slot.chunk, p.clone())).collect()
        };
        let same = |a: &Param, b: &Param| (&a.shape, &a.cuts, a.dtype, a.transform) == (&b.shape, &b.cuts, b.dtype, b.transform);
        (0..2).find_map(|side| {
            let (a, b) = (of(self, side), of(other, side));
            let first = (0..a.len().max(b.len()))
                .find(|&i| !matches!((a.get(i), b.get(i)), (Some(a), Some(b)) if (&a.0, a.1) == (&b.0, b.1) && same(&a.2, &b.2)))?;
            let name = a.get(first).or(b.get(first)).map(|p| p.0.clone())?;
            let shape = |list: &[(String, u32, Param)]| list.iter().find(|p| p.0 == name).map_or(vec![], |p| p.2.shape.clone());
            Some((name.clone(), [shape(&a), shape(&b)]))
        })
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
        let tensor = |id: Id| {
            let shape = self.model().kinds[id.kind].shape.clone();
            Tensor { name: self.model().name(id), elements: shape.iter().product(), shape }
        };
        self.model().all().map(tensor).collect()
    }

    /// The tensor of a box in a slot of that layer.
    pub fn id(&self, kind: usize, layer: u64, expert: u32) -> Id {
        Id { kind, layer: if self.model().kinds[kind].part == Part::Once { 0 } else { layer }, expert }
    }

    /// Tensors that a rank has a part of on either side, by ordinal.
    pub fn tensors_of(&self, rank: u32) -> BTreeSet<(u32, Id)> {
        let mut out = BTreeSet::new();
        for side in self.sides() {
            for (slot, param) in side.params(rank) {
                out.extend(param.cuts.iter().map(|c| {
                    let id = self.id(c.kind, slot.layer, c.expert);
                    (self.model().ordinal(id), id)
                }));
            }
        }
        out
    }

    /// How a tensor lies.
    pub fn likeness(&self, id: Id) -> Likeness {
        let places = |side: &Side| side.places(id).iter().map(|&p| (p.0, side.slot(p).section)).collect();
        Likeness { kind: id.kind, expert: id.expert, places: self.sides().map(places) }
    }

    /// Shape of tensors that lie so.
    pub fn shape(&self, like: &Likeness) -> &[u64] {
        &self.model().kinds[like.kind].shape
    }

    /// First row of each place of a tensor on a side's ranks.
    pub fn rows(&self, side: usize, id: Id) -> SmallVec<[u32; 2]> {
        let side = self.sides()[side];
        side.places(id).iter().map(|&p| side.slot(p).first).collect()
    }

    /// What the ranks at `coords` of a side hold of a tensor that lies so.
    pub fn holds(&self, side: usize, like: &Likeness, (stage, shard): (u64, u64)) -> SmallVec<[Hold<'_>; 4]> {
        let mut out = SmallVec::new();
        for (place, &(at, section)) in (0..).zip(&like.places[side]) {
            if at != stage {
                continue;
            }
            let own = self.sides()[side].parts.sections[section].boxes(like.kind, like.expert, shard);
            out.extend(own.map(|(row, param, pattern)| Hold { place, row, param, pattern }));
        }
        out
    }

    /// Shards that hold a part of a tensor that lies so at a stage of a side, rising, and the mesh that they are of.
    fn holders(&self, side: usize, like: &Likeness, stage: u64) -> (usize, SmallVec<[u64; 16]>) {
        let mut shards: SmallVec<[u64; 16]> = SmallVec::new();
        let mut mesh = 0;
        for &(_, section) in like.places[side].iter().filter(|p| p.0 == stage) {
            let section = &self.sides()[side].parts.sections[section];
            mesh = section.mesh;
            shards.extend(section.holders(like.kind, like.expert));
        }
        shards.sort_unstable();
        shards.dedup();
        (mesh, shards)
    }

    /// All ranks that have a part of a tensor that lies so, by coordinates.
    pub fn groups(&self, like: &Likeness) -> Vec<Group> {
        let stages = |side: usize| {
            let mut stages: SmallVec<[u64; 2]> = like.places[side].iter().map(|p| p.0).collect();
            stages.dedup();
            stages.into_iter().map(|stage| (stage, self.holders(side, like, stage))).collect::<SmallVec<[_; 2]>>()
        };
        let found = [stages(0), stages(1)];
        // Where a rank found on one side is on the other.
        let at = |side: usize, rank: u32| {
            found[side].iter().find_map(|(stage, (mesh, shards))| {
                let coords = self.sides()[side].coords(*mesh, rank)?;
                (coords.0 == *stage && shards.binary_search(&coords.1).is_ok()).then_some(coords)
            })
        };
        let mut out: Vec<Group> = vec![];
        for side in [0, 1] {
            for (stage, (mesh, shards)) in &found[side] {
                for &shard in shards {
                    let first = out.len();
                    for rank in self.sides()[side].ranks(*mesh, *stage, shard) {
                        let mut coords = [None, None];
                        coords[side] = Some((*stage, shard));
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
        let (slot, param) = self.sides()[side].params(rank).nth(row as usize)?;
        Some(format!("{}{}", slot.prefix, param.name))
    }
}
