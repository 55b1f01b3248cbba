//! The tables of all ranks, sorted by logical tensor.
#![forbid(unsafe_code)]

use super::owners::{Class, Holder};
use super::route::{Geometry, Router, Tensor as Named, TensorFacts};
use crate::abi::{RS_ERR_MISMATCH, RS_SOURCE, RS_TARGET};
use crate::error::{Result, bail};
use crate::layout::Tensor;
use crate::wire::Table;
use smallvec::smallvec;
use std::borrow::Cow;
use std::collections::HashMap;
use xxhash_rust::xxh3::Xxh3;

/// All logical tensors that any rank has: a tensor's ordinal is its place here.
#[derive(Clone, Debug, Default)]
pub struct Union {
    /// From tables bytewise by name, from a world spec in the order of the model.
    pub tensors: Vec<Tensor>,
    /// Ordinals, bytewise by name.
    pub by_name: Vec<u32>,
    /// Equal on all ranks that see the same tensors with the same shapes.
    pub digest: u64,
}

impl Union {
    /// Of tensors in the order of their ordinals.
    pub fn new(tensors: Vec<Tensor>, digest: u64) -> Union {
        let mut by_name: Vec<u32> = (0..tensors.len() as u32).collect();
        by_name.sort_by(|&a, &b| tensors[a as usize].name.cmp(&tensors[b as usize].name));
        Union { tensors, by_name, digest }
    }

    /// Ordinals of the tensors of that name, or whose name begins with what stands before a final `*`.
    pub fn named(&self, entry: &str) -> &[u32] {
        let prefix = entry.strip_suffix('*');
        let name = |o: &u32| self.tensors[*o as usize].name.as_str();
        let from = &self.by_name[self.by_name.partition_point(|o| name(o) < prefix.unwrap_or(entry))..];
        let fits = |o: &u32| prefix.map_or(name(o) == entry, |p| name(o).starts_with(p));
        &from[..from.partition_point(fits)]
    }
}

/// A tensor that this rank has a tile of, and what it looks like on all ranks.
pub type Known<'a> = (Named<'a>, TensorFacts<'a>);

/// Every rank is a class of its own.
pub fn classes(world: u32) -> Vec<Class> {
    (0..world).map(|rank| Class { id: rank, ranks: [rank].into() }).collect()
}

/// The union of all tables (one a rank, in rank order), and what each tensor that `me` has a tile of looks like on all ranks, which are
/// `classes`.
pub fn facts<'a>(me: u32, tables: &'a [Table], classes: &'a [Class]) -> Result<(Union, Vec<Known<'a>>)> {
    let mut ids: HashMap<&str, usize> = HashMap::new();
    let mut first: Vec<(&Tensor, usize)> = vec![];
    // Row of each rank's tensor table -> id.
    let mut rows: Vec<Vec<usize>> = vec![];
    for (rank, table) in tables.iter().enumerate() {
        let mut row = Vec::with_capacity(table.tensors.len());
        for t in &table.tensors {
            let id = *ids.entry(&t.name).or_insert_with(|| {
                first.push((t, rank));
                first.len() - 1
            });
            let (known, by) = first[id];
            if known.shape != t.shape {
                bail!(
                    RS_ERR_MISMATCH,
                    "tensor '{}' has shape {:?} on rank {by} and {:?} on rank {rank}: all ranks must give it its Hugging Face shape",
                    t.name,
                    known.shape,
                    t.shape
                );
            }
            row.push(id);
        }
        rows.push(row);
    }
    let mut order: Vec<usize> = (0..first.len()).collect();
    order.sort_unstable_by(|&a, &b| first[a].0.name.cmp(&first[b].0.name));
    let mut ordinal = vec![0u32; first.len()];
    let mut hash = Xxh3::new();
    let mut tensors = Vec::with_capacity(first.len());
    for (i, &id) in order.iter().enumerate() {
        ordinal[id] = i as u32;
        let t = first[id].0;
        hash.update(&(t.name.len() as u64).to_le_bytes());
        hash.update(t.name.as_bytes());
        hash.update(&(t.shape.len() as u64).to_le_bytes());
        t.shape.iter().for_each(|n| hash.update(&n.to_le_bytes()));
        tensors.push(t.clone());
    }
    let union = Union::new(tensors, hash.digest());

    let mut mine: Vec<Option<Known<'_>>> = vec![None; first.len()];
    for tile in tables.get(me as usize).map_or(&[][..], |t| &t.tiles) {
        let id = rows[me as usize][tile.tensor as usize];
        let t = first[id].0;
        mine[id].get_or_insert_with(|| {
            let named = Named { ordinal: ordinal[id], name: &t.name, rows: [smallvec![0], smallvec![0]] };
            (named, TensorFacts { shape: Cow::Borrowed(&t.shape), classes: Cow::Borrowed(classes), ..TensorFacts::default() })
        });
    }
    for (rank, table) in tables.iter().enumerate() {
        for tile in &table.tiles {
            let Some((_, facts)) = &mut mine[rows[rank][tile.tensor as usize]] else { continue };
            let buffer = &table.buffers[tile.buffer as usize];
            let holder = Holder {
                class: rank as u32,
                buffer: tile.buffer,
                base: 0,
                dtype: buffer.dtype,
                transform: tile.transform,
                param: &buffer.name,
                pattern: &tile.pattern,
            };
            if buffer.role & RS_SOURCE != 0 {
                facts.sources.push(holder);
            }
            if buffer.role & RS_TARGET != 0 {
                facts.targets.push(holder);
            }
        }
    }
    let facts = order.into_iter().filter_map(|id| mine[id].take()).collect();
    Ok((union, facts))
}

/// A rank's plan from the tables of all. `staging`: the least of all ranks.
pub fn plan(me: u32, places: &[super::Place], staging: u64, known: &[Known<'_>]) -> Result<super::Plan> {
    let mut plan = super::Plan::default();
    let mut router = Router::new(Some(me), places, staging);
    for (tensor, facts) in known {
        let geometry = Geometry::new(Some(me), facts, tensor.name, Some(me))?;
        router.plan(facts, &geometry, tensor, &mut plan)?;
    }
    plan.sort();
    Ok(plan)
}
