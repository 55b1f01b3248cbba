//! Whether the memory that a container was bound to is still there.
//!
//! An engine that sleeps or a trainer that offloads gives device memory back between two syncs. A GPU that then used the old addresses
//! would fail for good, with all of its process; and what another process has open stays alive for it, so that it would read on what
//! nobody writes any more. So each sync begins with a look at the allocations: of memory of one's own, whether there is one; of memory
//! that other ranks read, whether it is the same.
#![forbid(unsafe_code)]

use crate::abi::RS_ERR_STATE;
use crate::device::{Device, Held, Mem};
use crate::error::{Result, bail};
use std::collections::{BTreeMap, BTreeSet};

/// Allocations of a device's memory as they were at the last exchange of addresses.
#[derive(Default)]
pub(super) struct Ground(Vec<Lot>);

struct Lot {
    /// Where the allocation, or a piece of it, begins.
    at: u64,
    number: u64,
    /// A buffer that lies in it.
    row: u32,
    /// Whether other ranks read it.
    lent: bool,
}

impl Ground {
    /// Of all buffers, of which those of the rows `lent` are read by others.
    pub fn new(device: &dyn Device, mems: &[Mem], lent: &BTreeSet<u32>) -> Result<Ground> {
        let mut lots: BTreeMap<u64, Lot> = BTreeMap::new();
        for is_lent in [true, false] {
            let rows: Vec<u32> = (0..mems.len() as u32).filter(|row| lent.contains(row) == is_lent).collect();
            let blocks: Vec<Mem> = rows.iter().map(|&row| mems[row as usize]).collect();
            for Held { at, number, block } in device.allocations(&blocks)? {
                lots.entry(at).or_insert(Lot { at, number, row: rows[block], lent: is_lent });
            }
        }
        Ok(Ground(lots.into_values().collect()))
    }

    /// An error if one is gone. `name` is of a row's buffer.
    pub fn check<'a>(&self, device: &dyn Device, name: impl Fn(u32) -> &'a str) -> Result<()> {
        for lot in &self.0 {
            let what = match device.allocation(lot.at)? {
                now if now == lot.number => continue,
                0 => "was freed or unmapped since it was bound",
                _ if lot.lent => "is not the one that other ranks have open: that was freed or unmapped",
                _ => continue,
            };
            bail!(
                RS_ERR_STATE,
                "the memory of '{}' (of an allocation at {:#x}) {what}. Call rs_container_rebind() before a sync, with where it lies now, \
                 also if the address is the same",
                name(lot.row),
                lot.at
            );
        }
        Ok(())
    }
}
