//! The tables of all ranks, sorted by logical tensor.
#![forbid(unsafe_code)]

use super::owners::Holder;
use super::route::TensorFacts;
use crate::abi::{RS_ERR_MISMATCH, RS_SOURCE, RS_TARGET};
use crate::error::{Result, bail};
use crate::layout::Tensor;
use crate::wire::Table;
use std::collections::HashMap;
use xxhash_rust::xxh3::Xxh3;

/// All logical tensors that any rank named, bytewise by name: a tensor's ordinal is its place here.
#[derive(Clone, Debug, Default)]
pub struct Union {
    /// By name.
    pub tensors: Vec<Tensor>,
    /// Equal on all ranks that see the same tensors with the same shapes.
    pub digest: u64,
}

/// The union of all tables (one a rank, in rank order), and what each tensor that `me` has a tile of looks like on all ranks.
pub fn facts(me: u32, tables: &[Table]) -> Result<(Union, Vec<TensorFacts<'_>>)> {
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
    let mut union = Union::default();
    for (i, &id) in order.iter().enumerate() {
        ordinal[id] = i as u32;
        let t = first[id].0;
        hash.update(&(t.name.len() as u64).to_le_bytes());
        hash.update(t.name.as_bytes());
        hash.update(&(t.shape.len() as u64).to_le_bytes());
        t.shape.iter().for_each(|n| hash.update(&n.to_le_bytes()));
        union.tensors.push(t.clone());
    }
    union.digest = hash.digest();

    let mut mine: Vec<Option<TensorFacts<'_>>> = vec![None; first.len()];
    for tile in tables.get(me as usize).map_or(&[][..], |t| &t.tiles) {
        let id = rows[me as usize][tile.tensor as usize];
        let t = first[id].0;
        mine[id].get_or_insert_with(|| TensorFacts {
            ordinal: ordinal[id],
            name: &t.name,
            shape: &t.shape,
            ..TensorFacts::default()
        });
    }
    for (rank, table) in tables.iter().enumerate() {
        for (i, tile) in table.tiles.iter().enumerate() {
            let Some(facts) = &mut mine[rows[rank][tile.tensor as usize]] else { continue };
            let buffer = &table.buffers[tile.buffer as usize];
            let holder = Holder {
                rank: rank as u32,
                tile: i as u32,
                buffer: tile.buffer,
                dtype: buffer.dtype,
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

/// A rank's plan from the tables of all.
pub fn plan(me: u32, places: &[super::Place], facts: &[TensorFacts<'_>]) -> Result<super::Plan> {
    let mut plan = super::Plan::default();
    for f in facts {
        super::route::plan_tensor(me, places, f, &mut plan)?;
    }
    for peer in &mut plan.peers {
        for list in [&mut peer.out, &mut peer.into] {
            list.sort_by_key(|p| (p.tensor, p.key, p.tile));
        }
    }
    Ok(plan)
}
