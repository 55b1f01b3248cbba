//! One side of a world: what each of its ranks holds, whatever the framework.
//!
//! A rank is at a *stage* (which layers) and is a *shard* of it (which boxes of them). Its parameters are listed by *slots*, each the
//! place of one section of the model: the front, a layer, or the back. All layers have the same parameters, so a shard has one list
//! for each [`Section`], and a slot says how they are called and in which row of the rank's buffers they begin.
#![forbid(unsafe_code)]

use super::cut::Cut;
use super::mesh::Mesh;
use super::model::{Model, Part};
use crate::abi::*;
use crate::error::{Result, bail};
use crate::geom::Pattern;
use crate::layout::Tensor;
use std::collections::HashMap;

/// A parameter of a section.
#[derive(Clone, Debug)]
pub struct Param {
    /// Its name, after the slot's prefix.
    pub name: String,
    /// Local shape.
    pub shape: Vec<u64>,
    /// What it holds.
    pub cuts: Vec<Cut>,
    /// `cuts` as a planner sees them.
    pub patterns: Vec<Pattern>,
    /// Whether some of its elements hold no logical element.
    pub padded: bool,
}

impl Param {
    /// A parameter with its boxes.
    pub fn new(name: impl Into<String>, shape: &[u64], cuts: impl IntoIterator<Item = Cut>) -> Param {
        let cuts: Vec<Cut> = cuts.into_iter().collect();
        let held: u64 = cuts.iter().map(|c| c.axes.iter().map(|a| a.extent).product::<u64>()).sum();
        let padded = held < shape.iter().product();
        Param { name: name.into(), shape: shape.to_vec(), cuts, patterns: vec![], padded }
    }
}

/// Kinds of slots.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Section {
    /// Before the layers.
    Front,
    /// A layer.
    Layer,
    /// After the layers.
    Back,
}

/// A section's place on the ranks of a stage.
#[derive(Clone, Debug)]
pub struct Slot {
    /// What is there.
    pub section: Section,
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
    pub fn new(section: Section, layer: u64, chunk: u32, prefix: String) -> Slot {
        Slot { section, layer, chunk, prefix, first: 0 }
    }
}

/// The parameters of a shard, by section. Equal in names and number on all shards.
#[derive(Clone, Debug, Default)]
pub struct Shard {
    /// Before the layers.
    pub front: Vec<Param>,
    /// Of each layer.
    pub layer: Vec<Param>,
    /// After the layers.
    pub back: Vec<Param>,
}

impl Shard {
    /// Those of a section.
    pub fn section(&self, section: Section) -> &[Param] {
        match section {
            Section::Front => &self.front,
            Section::Layer => &self.layer,
            Section::Back => &self.back,
        }
    }
}

/// A parameter that ranks have and a plan does not use: a source's second copy of something.
#[derive(Clone, Debug)]
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

/// What a framework's module makes of its part of the spec.
pub struct Parts {
    /// The grid.
    pub mesh: Mesh,
    /// Communicator ranks by position.
    pub ranks: Vec<u32>,
    /// DLPack code and bits of all parameters.
    pub dtype: (u8, u8),
    /// By stage.
    pub stages: Vec<Vec<Slot>>,
    /// By shard.
    pub shards: Vec<Shard>,
    /// See [`Unused`].
    pub unused: Vec<Unused>,
    /// What is stripped from the front of a bound name, as often as it stands there.
    pub strip: &'static str,
}

/// One side, ready to be asked.
pub struct Side {
    /// As the framework's module gave them, completed.
    pub parts: Parts,
    /// By communicator rank: its position + 1, or 0 if it plays no part.
    positions: Vec<u32>,
    /// Slots that hold tensors of a part of the model and a layer (0 outside of layers): stage and index of the slot.
    places: HashMap<(Part, u64), Vec<(u64, usize)>>,
}

impl Side {
    /// Completes a side and finds out where everything is. `label` is "source" or "target".
    pub fn new(model: &Model, label: &str, mut parts: Parts) -> Result<Side> {
        if parts.mesh.len() != parts.ranks.len() as u64 {
            bail!(
                RS_ERR_INVALID,
                "{label}.ranks has {} ranks, the sizes of its parallelisms multiply to {}",
                parts.ranks.len(),
                parts.mesh.len()
            );
        }
        let mut positions = vec![0; parts.ranks.iter().max().map_or(0, |&r| r as usize + 1)];
        for (at, &rank) in (1..).zip(&parts.ranks) {
            if std::mem::replace(&mut positions[rank as usize], at) != 0 {
                bail!(RS_ERR_INVALID, "{label}.ranks has rank {rank} twice");
            }
        }
        let item = u32::from(parts.dtype.1) / 8;
        for shard in &mut parts.shards {
            for param in [&mut shard.front, &mut shard.layer, &mut shard.back].into_iter().flatten() {
                for cut in &param.cuts {
                    let kind = &model.kinds[cut.kind];
                    let elements = kind.shape.iter().product();
                    let tensor = Tensor { name: kind.name.to_string(), shape: kind.shape.clone(), elements };
                    param.patterns.push(cut.row(item.into()).pattern(&tensor, item)?);
                }
            }
        }
        let mut places: HashMap<(Part, u64), Vec<(u64, usize)>> = HashMap::new();
        for (stage, slots) in (0..).zip(&mut parts.stages) {
            let mut row = 0;
            for (i, slot) in slots.iter_mut().enumerate() {
                slot.first = row;
                let params = parts.shards[0].section(slot.section);
                row += params.len() as u32;
                for part in [Part::Front, Part::Layer, Part::Back] {
                    // Any shard may have padding only.
                    let of_part = |p: &Param| p.cuts.iter().any(|c| model.kinds[c.kind].part == part);
                    if parts.shards.iter().any(|s| s.section(slot.section).iter().any(of_part)) {
                        places.entry((part, if part == Part::Layer { slot.layer } else { 0 })).or_default().push((stage, i));
                    }
                }
            }
        }
        Ok(Side { parts, positions, places })
    }

    /// Stage and shard of a communicator rank; `None`: it plays no part.
    pub fn coords(&self, rank: u32) -> Option<(u64, u64)> {
        let position = self.positions.get(rank as usize)?.checked_sub(1)?;
        Some(self.parts.mesh.coords(position.into()))
    }

    /// Communicator ranks of a stage and shard, rising.
    pub fn ranks(&self, stage: u64, shard: u64) -> Vec<u32> {
        let positions = self.parts.mesh.positions(stage, shard);
        let mut out: Vec<u32> = positions.into_iter().map(|p| self.parts.ranks[p as usize]).collect();
        out.sort_unstable();
        out
    }

    /// Where tensors of a part of the model and a layer may be: stage and index of the slot, by stage.
    pub fn places(&self, part: Part, layer: u64) -> &[(u64, usize)] {
        self.places.get(&(part, if part == Part::Layer { layer } else { 0 })).map_or(&[], |p| p)
    }

    /// A rank's parameters in the order of its rows: the slot, its index, the parameter.
    pub fn params(&self, stage: u64, shard: u64) -> impl Iterator<Item = (&Slot, &Param)> {
        let shard = &self.parts.shards[shard as usize];
        self.parts.stages[stage as usize].iter().flat_map(move |slot| shard.section(slot.section).iter().map(move |p| (slot, p)))
    }

    /// One more than the highest communicator rank.
    pub fn world(&self) -> u32 {
        self.positions.len() as u32
    }

    /// Number of a rank's parameters.
    pub fn count(&self, rank: u32) -> u32 {
        self.coords(rank).map_or(0, |(stage, shard)| self.params(stage, shard).count() as u32)
    }
}
