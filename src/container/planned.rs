//! A rank's plan, and what it was made of: it outlives a connection, so that ranks which connect again to the same others, one of them
//! in another process perhaps, need not plan again.
#![forbid(unsafe_code)]

use super::FromSpec;
use crate::abi::*;
use crate::error::{Result, bail};
use crate::plan::facts::{Union, classes, facts, plan};
use crate::plan::{Place, Plan, closed};
use crate::preset::variant::Variants;
use crate::preset::world::World;
use crate::wire::{Record, Table};
use std::collections::BTreeMap;
use std::sync::Arc;

/// What planning makes of all tables, or of a spec.
pub(super) struct Planned {
    pub union: Union,
    pub plan: Plan,
    /// Row of this rank's tensor table -> ordinal.
    pub ordinals: Vec<u32>,
    /// Names of the source buffers that we receive from: (rank, row) -> name. Empty with a world spec, which knows them.
    pub names: BTreeMap<(u32, u32), String>,
    /// The spec's, with all variants.
    pub world: Option<Arc<World>>,
    /// What it was made of.
    pub basis: Vec<Basis>,
}

/// What of a rank's record a plan is made of: where these are the same, the plan is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Basis {
    place: (u64, [u64; 2], bool),
    staging: u64,
    spec: (u64, [u64; 2]),
    table: (u64, u64),
}

impl Basis {
    /// Of each record, in rank order.
    pub fn of(records: &[Record]) -> Vec<Basis> {
        let one = |r: &Record| Basis {
            place: (r.host, r.device, r.relays),
            staging: r.staging,
            spec: (r.spec, r.variants),
            table: (r.table_len, r.table_digest),
        };
        records.iter().map(one).collect()
    }
}

impl Planned {
    pub fn of_tables(me: u32, places: &[Place], staging: u64, tables: Vec<Table>, basis: Vec<Basis>) -> Result<Planned> {
        let classes = classes(tables.len() as u32);
        let (union, facts) = facts(me, &tables, &classes)?;
        let plan = plan(me, places, staging, &facts)?;
        let own = &tables[me as usize].tensors;
        let ordinal = |name: &str| union.tensors.binary_search_by(|t| t.name.as_str().cmp(name)).map_or(0, |i| i as u32);
        let ordinals = own.iter().map(|t| ordinal(&t.name)).collect();
        let mut names = BTreeMap::new();
        for peer in &plan.peers {
            for p in &peer.into {
                let row = p.src.buffer;
                names.entry((peer.rank, row)).or_insert_with(|| tables[peer.rank as usize].buffers[row as usize].name.clone());
            }
        }
        Ok(Planned { union, plan, ordinals, names, world: None, basis })
    }

    pub fn of_spec(
        me: u32,
        places: &[Place],
        staging: u64,
        world: Arc<World>,
        spec: &FromSpec,
        basis: Vec<Basis>,
    ) -> Result<Planned> {
        if spec.rank != me {
            bail!(RS_ERR_MISMATCH, "its preset was created for rank {}, its communicator says rank {me}", spec.rank);
        }
        if world.ranks() as usize > places.len() {
            bail!(RS_ERR_MISMATCH, "the spec has ranks up to {}, the communicator has {} ranks", world.ranks() - 1, places.len());
        }
        let plan = closed::plan(me, places, staging, &world)?;
        let union = Union::new(world.tensors(), world.spec.digest);
        Ok(Planned { union, plan, ordinals: spec.ordinals.clone(), names: BTreeMap::new(), world: Some(world), basis })
    }
}

/// The world with all that any rank has found out of it. An error if this rank's parameters lie otherwise.
pub(super) fn agreed(me: u32, records: &[Record], spec: &FromSpec) -> Result<Arc<World>> {
    let own = &spec.world;
    let left = &own.spec.left;
    let all = records.iter().map(|r| (r.rank, Variants::from_words(r.variants)));
    let variants = Variants::of_all(all, [&left[0], &left[1]])?;
    if variants == own.variants {
        return Ok(own.clone());
    }
    let world = Arc::new(own.with(variants)?);
    if let Some((name, [bound, wanted])) = own.differs(&world, me) {
        bail!(
            RS_ERR_MISMATCH,
            "parameter '{name}' of rank {me} has shape {bound:?}; other ranks have bound theirs as with {} and {}, which makes it {wanted:?}",
            variants.shown(0, &left[0]),
            variants.shown(1, &left[1])
        );
    }
    Ok(world)
}

/// All ranks are described by one spec, or none is. All see the same records, so all come to the same end.
pub(super) fn same_spec(records: &[Record]) -> Result<()> {
    let mut count: BTreeMap<u64, usize> = BTreeMap::new();
    records.iter().for_each(|r| *count.entry(r.spec).or_default() += 1);
    // What most ranks have is taken for right; of equals, a spec.
    let Some((&usual, _)) = count.iter().max_by_key(|(spec, n)| (**n, **spec)) else { return Ok(()) };
    let odd: Vec<&Record> = records.iter().filter(|r| r.spec != usual).collect();
    let Some(first) = odd.first() else { return Ok(()) };
    let what = |spec: u64| if spec == 0 { "is described by tables".to_string() } else { format!("has the spec {spec:016x}") };
    let ranks: Vec<u32> = odd.iter().map(|r| r.rank).take(16).collect();
    bail!(
        RS_ERR_MISMATCH,
        "{} of {} ranks differ from the others, which {}: ranks {ranks:?}; rank {} {}: give all ranks the same world spec",
        odd.len(),
        records.len(),
        if usual == 0 { "are described by tables".to_string() } else { format!("have the spec {usual:016x}") },
        first.rank,
        what(first.spec)
    );
}
