//! One side of a world: what each of its ranks holds, whatever the framework.
//!
//! A rank is at a *stage* (which layers) and is a *shard* of it (which boxes of them). Its parameters are listed by *slots*, each the
//! place of one [`Section`]: what comes before the layers, a layer, its experts, what comes after. All layers of a type have the same
//! parameters, so a shard has one list for each section, and a slot says how they are called and in which row of the rank's buffers they
//! begin. Experts are cut over other ranks than the rest: a section says by which [`Mesh`].
#![forbid(unsafe_code)]

use super::cut::Cut;
use super::mesh::Mesh;
use super::model::{FP32, Id, Model, Part};
use crate::abi::*;
use crate::error::{Result, bail};
use crate::geom::Pattern;
use serde::Serialize;
use std::collections::HashMap;

/// A parameter of a section.
#[derive(Clone, Debug, Serialize)]
pub struct Param {
    /// Its name, after the slot's prefix.
    pub name: String,
    /// Local shape.
    pub shape: Vec<u64>,
    /// What it holds.
    pub cuts: Vec<Cut>,
    /// `cuts` as a planner sees them.
    #[serde(skip)]
    pub patterns: Vec<Pattern>,
    /// Whether some of its elements hold no logical element.
    pub padded: bool,
    /// DLPack code and bits, if they are not the side's.
    pub dtype: Option<(u8, u8)>,
    /// RS_TRANSFORM_* of its boxes.
    pub transform: u32,
}

impl Param {
    /// A parameter with its boxes.
    pub fn new(name: impl Into<String>, shape: &[u64], cuts: impl IntoIterator<Item = Cut>) -> Param {
        let cuts: Vec<Cut> = cuts.into_iter().collect();
        let held: u64 = cuts.iter().map(|c| c.axes.iter().map(|a| a.extent).product::<u64>()).sum();
        let padded = held < shape.iter().product();
        Param {
            name: name.into(),
            shape: shape.to_vec(),
            cuts,
            patterns: vec![],
            padded,
            dtype: None,
            transform: RS_TRANSFORM_NONE,
        }
    }

    /// The same in fp32.
    pub fn fp32(self) -> Param {
        Param { dtype: Some(FP32), ..self }
    }
}

/// The parameters of the shards of a mesh. Equal in number on all shards.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Section {
    /// Index of the mesh.
    pub mesh: usize,
    /// By shard.
    pub shards: Vec<Vec<Param>>,
    /// Every box, rising.
    #[serde(skip)]
    boxes: Vec<At>,
}

/// Where a box is: kind, expert, shard, parameter of the shard, cut of the parameter.
type At = (usize, u32, u64, u32, u32);

impl Section {
    /// Cut by a mesh; `shards` are by its shards.
    pub fn new(mesh: usize, shards: Vec<Vec<Param>>) -> Section {
        Section { mesh, shards, boxes: vec![] }
    }

    /// Shards that hold a part of a tensor, rising.
    pub fn holders(&self, kind: usize, expert: u32) -> impl Iterator<Item = u64> {
        let first = self.boxes.partition_point(|b| (b.0, b.1) < (kind, expert));
        self.boxes[first..].iter().take_while(move |b| (b.0, b.1) == (kind, expert)).map(|b| b.2)
    }

    /// Boxes of a tensor on a shard: the parameter, its number, and what lies where.
    pub fn boxes(&self, kind: usize, expert: u32, shard: u64) -> impl Iterator<Item = (u32, &Param, &Pattern)> {
        let wanted = (kind, expert, shard);
        let first = self.boxes.partition_point(|b| (b.0, b.1, b.2) < wanted);
        let own = self.boxes[first..].iter().take_while(move |b| (b.0, b.1, b.2) == wanted);
        own.map(move |&(.., param, cut)| {
            let p = &self.shards[shard as usize][param as usize];
            (param, p, &p.patterns[cut as usize])
        })
    }

    fn complete(&mut self) {
        for (shard, params) in (0..).zip(&mut self.shards) {
            for (at, param) in (0..).zip(params) {
                param.patterns = param.cuts.iter().map(Cut::pattern).collect();
                self.boxes.extend((0..).zip(&param.cuts).map(|(i, c)| (c.kind, c.expert, shard, at, i)));
            }
        }
        self.boxes.sort_unstable();
    }
}

/// A section's place on the ranks of a stage.
#[derive(Clone, Debug, Serialize)]
pub struct Slot {
    /// Index of the section.
    pub section: usize,
    /// Layer of the model, if it is one.
    pub layer: u64,
    /// Virtual-pipeline chunk.
    pub chunk: u32,
    /// What its parameters' names begin with.
    pub prefix: String,
    /// Row of its first parameter among those of the side on a rank.
    pub first: u32,
}

impl Slot {
    /// A slot whose row [`Side::new`] will set.
    pub fn new(section: usize, layer: u64, chunk: u32, prefix: String) -> Slot {
        Slot { section, layer, chunk, prefix, first: 0 }
    }
}

/// A parameter that ranks have and a plan does not use: a source's second copy of something.
#[derive(Clone, Debug, Serialize)]
pub struct Unused {
    /// Which stage has it.
    pub stage: u64,
    /// In which virtual-pipeline chunk.
    pub chunk: u32,
    /// Its name.
    pub name: String,
    /// Local shape.
    pub shape: Vec<u64>,
}

/// What a framework's module makes of its part of the spec. Its serialized form is what ranks compare.
#[derive(Serialize)]
pub struct Parts {
    /// The grid, and that of the experts if there are any. Equal in stages.
    pub meshes: Vec<Mesh>,
    /// Communicator ranks by position.
    pub ranks: Vec<u32>,
    /// DLPack code and bits of all parameters that do not say otherwise.
    pub dtype: (u8, u8),
    /// Whether norms hold their weight minus one.
    pub zero_centered: bool,
    /// All sections.
    pub sections: Vec<Section>,
    /// By stage.
    pub stages: Vec<Vec<Slot>>,
    /// See [`Unused`].
    pub unused: Vec<Unused>,
    /// What is stripped from the front of a bound name, as often as it stands there.
    #[serde(skip)]
    pub strip: &'static str,
    /// Patterns of names that are other names of parameters' memory, and so left out.
    #[serde(skip)]
    pub views: &'static [&'static str],
    /// Parts of names that other versions have, and what stands here instead: the first that a name has is replaced once.
    #[serde(skip)]
    pub renamed: &'static [(&'static str, &'static str)],
}

/// One side, ready to be asked.
pub struct Side {
    /// As the framework's module gave them, completed.
    pub parts: Parts,
    /// By communicator rank: its position + 1, or 0 if it plays no part.
    positions: Vec<u32>,
    /// Slots by kind and, in a layer, layer: stage and index of the slot.
    places: HashMap<(usize, u64), Vec<(u64, usize)>>,
    /// By kind; see [`Side::kind_dtype`].
    dtypes: Vec<(u8, u8)>,
}

impl Side {
    /// Completes a side and finds out where everything is. `label` is "source" or "target".
    pub fn new(model: &Model, label: &str, mut parts: Parts) -> Result<Side> {
        let mut positions = vec![0; parts.ranks.iter().max().map_or(0, |&r| r as usize + 1)];
        for (at, &rank) in (1..).zip(&parts.ranks) {
            if std::mem::replace(&mut positions[rank as usize], at) != 0 {
                bail!(RS_ERR_INVALID, "{label}.ranks has rank {rank} twice");
            }
        }
        parts.sections.iter_mut().for_each(Section::complete);
        let mut places: HashMap<(usize, u64), Vec<(u64, usize)>> = HashMap::new();
        for (stage, slots) in (0..).zip(&mut parts.stages) {
            let mut row = 0;
            for (i, slot) in slots.iter_mut().enumerate() {
                slot.first = row;
                let section = &parts.sections[slot.section];
                row += section.shards[0].len() as u32;
                let mut kinds: Vec<usize> = section.boxes.iter().map(|b| b.0).collect();
                kinds.dedup();
                for kind in kinds {
                    let layer = if model.kinds[kind].part == Part::Once { 0 } else { slot.layer };
                    places.entry((kind, layer)).or_default().push((stage, i));
                }
            }
        }
        let mut dtypes = vec![parts.dtype; model.kinds.len()];
        for param in parts.sections.iter().flat_map(|s| s.shards.iter().flatten()) {
            if let Some(dtype) = param.dtype {
                param.cuts.iter().for_each(|c| dtypes[c.kind] = dtype);
            }
        }
        Ok(Side { parts, positions, places, dtypes })
    }

    /// As a target: what is added to norms, or taken away, where the source centres them another way.
    pub fn center_norms(&mut self, model: &Model, source_is_zero_centered: bool) {
        if model.has_zero_centered_norms() {
            return;
        }
        let transform = match (source_is_zero_centered, self.parts.zero_centered) {
            (true, false) => RS_TRANSFORM_PLUS_ONE,
            (false, true) => RS_TRANSFORM_MINUS_ONE,
            _ => return,
        };
        let params = self.parts.sections.iter_mut().flat_map(|s| s.shards.iter_mut().flatten());
        params.filter(|p| p.cuts.iter().any(|c| model.kinds[c.kind].is_norm())).for_each(|p| p.transform = transform);
    }

    /// Stage and shard of a communicator rank in a mesh; `None`: it plays no part.
    pub fn coords(&self, mesh: usize, rank: u32) -> Option<(u64, u64)> {
        let position = self.positions.get(rank as usize)?.checked_sub(1)?;
        Some(self.parts.meshes[mesh].coords(position.into()))
    }

    /// Stage of a communicator rank; `None`: it plays no part.
    pub fn stage(&self, rank: u32) -> Option<u64> {
        self.coords(0, rank).map(|c| c.0)
    }

    /// Communicator ranks of a stage and shard, rising.
    pub fn ranks(&self, mesh: usize, stage: u64, shard: u64) -> Vec<u32> {
        let positions = self.parts.meshes[mesh].positions(stage, shard);
        let mut out: Vec<u32> = positions.into_iter().map(|p| self.parts.ranks[p as usize]).collect();
        out.sort_unstable();
        out
    }

    /// Where a tensor may be: stage and index of the slot, by stage.
    pub fn places(&self, id: Id) -> &[(u64, usize)] {
        self.places.get(&(id.kind, id.layer)).map_or(&[], |p| p)
    }

    /// A slot.
    pub fn slot(&self, (stage, slot): (u64, usize)) -> &Slot {
        &self.parts.stages[stage as usize][slot]
    }

    /// A rank's parameters in the order of its rows, each with its slot.
    pub fn params(&self, rank: u32) -> impl Iterator<Item = (&Slot, &Param)> {
        let slots = self.stage(rank).map_or(&[][..], |stage| &self.parts.stages[stage as usize]);
        slots.iter().flat_map(move |slot| {
            let section = &self.parts.sections[slot.section];
            let shard = self.coords(section.mesh, rank).map_or(0, |c| c.1);
            section.shards[shard as usize].iter().map(move |p| (slot, p))
        })
    }

    /// Number of a rank's parameters.
    pub fn count(&self, rank: u32) -> u32 {
        self.params(rank).count() as u32
    }

    /// DLPack code and bits of a parameter.
    pub fn dtype(&self, param: &Param) -> (u8, u8) {
        param.dtype.unwrap_or(self.parts.dtype)
    }

    /// DLPack code and bits of all parameters that hold a kind.
    pub fn kind_dtype(&self, kind: usize) -> (u8, u8) {
        self.dtypes[kind]
    }

    /// One more than the highest communicator rank.
    pub fn world(&self) -> u32 {
        self.positions.len() as u32
    }
}
