//! Whether the memory that a container was bound to is still there.
//!
//! An engine that sleeps or a trainer that offloads gives device memory back between two syncs. A GPU that then used the old addresses
//! would fail for good, with all of its process; and what another process has open stays alive for it, so that it would read on what
//! nobody writes any more. So each sync begins with a look at the GPU's memory.
#![forbid(unsafe_code)]

use crate::abi::RS_ERR_STATE;
use crate::device::{Device, Held, Mem};
use crate::error::{Result, bail};

/// Places in a device's memory. Its blocks are rows of buffers, and one more for staging of the caller's.
#[derive(Default)]
pub(super) struct Ground(Vec<Held>);

impl Ground {
    /// Where something is bound.
    pub fn new(device: &dyn Device, mems: &[Mem], staging: Option<Mem>) -> Result<Ground> {
        let blocks: Vec<Mem> = mems.iter().copied().chain(staging).collect();
        device.held(&blocks).map(Ground)
    }

    /// What other processes have open, of the buffers of these rows.
    pub fn lent(device: &dyn Device, mems: &[Mem], rows: &[u32]) -> Result<Ground> {
        let blocks: Vec<Mem> = rows.iter().map(|&row| mems[row as usize]).collect();
        let mut held = device.held_open(&blocks)?;
        held.iter_mut().flat_map(|held| &mut held.blocks).for_each(|block| *block = rows[*block as usize]);
        Ok(Ground(held))
    }

    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// An error if something is gone where one of the rows lies that are `used`. `name` is of a row's buffer.
    pub fn check<'a>(&self, device: &dyn Device, used: &[bool], name: impl Fn(u32) -> &'a str) -> Result<()> {
        let is_used = |row: &u32| used[*row as usize];
        let places: Vec<&Held> = self.0.iter().filter(|held| held.blocks.iter().any(is_used)).collect();
        let Some(missing) = device.missing(&places)? else { return Ok(()) };
        let place = places[missing.which];
        bail!(
            RS_ERR_STATE,
            "the memory of '{}' (at {:#x}) {} since it was bound: nothing moved. Call rs_container_rebind() before the next sync, with where \
             it lies then, also if the address is the same",
            place.blocks.iter().copied().find(|row| is_used(row)).map_or("", name),
            place.at,
            if missing.replaced { "was replaced by another allocation" } else { "was freed or unmapped" }
        );
    }
}
