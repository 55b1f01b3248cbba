//! Whether the memory that a container was bound to is still there.
//!
//! An engine that sleeps or a trainer that offloads gives device memory back between two syncs. A GPU that then used the old addresses
//! would fail for good, with all of its process; and what another process has open stays alive for it, so that it would read on what
//! nobody writes any more. So each sync begins with a look at the GPU's memory.
#![forbid(unsafe_code)]

use crate::abi::RS_ERR_STATE;
use crate::device::{Device, Held, Mem};
use crate::error::{Result, bail};

/// Places in a device's memory, as they were when it was bound, and when others opened it. Its blocks are rows of buffers, and one more
/// for staging of the caller's.
#[derive(Default)]
pub(super) struct Ground {
    own: Vec<Held>,
    lent: Vec<Held>,
}

impl Ground {
    pub fn new(device: &dyn Device, mems: &[Mem], staging: Option<Mem>) -> Result<Ground> {
        let blocks: Vec<Mem> = mems.iter().copied().chain(staging).collect();
        Ok(Ground { own: device.held(&blocks)?, lent: vec![] })
    }

    /// Other processes have opened the buffers of these rows.
    pub fn lend(&mut self, device: &dyn Device, mems: &[Mem], rows: &[u32]) -> Result<()> {
        let blocks: Vec<Mem> = rows.iter().map(|&row| mems[row as usize]).collect();
        self.lent = device.held_open(&blocks)?;
        self.lent.iter_mut().flat_map(|held| &mut held.blocks).for_each(|block| *block = rows[*block as usize]);
        Ok(())
    }

    /// An error if something is gone where one of the chosen rows lies. `name` is of a row's buffer.
    pub fn check<'a>(&self, device: &dyn Device, chosen: impl Fn(u32) -> bool, name: impl Fn(u32) -> &'a str) -> Result<()> {
        let places: Vec<&Held> = self.own.iter().chain(&self.lent).filter(|h| h.blocks.iter().any(|&b| chosen(b))).collect();
        let Some(missing) = device.missing(&places)? else { return Ok(()) };
        let place = places[missing.which];
        let row = place.blocks.iter().copied().find(|&b| chosen(b)).unwrap_or(0);
        bail!(
            RS_ERR_STATE,
            "the memory of '{}' (at {:#x}) {} since it was bound: nothing moved. Call rs_container_rebind() before the next sync, with where \
             it lies then, also if the address is the same",
            name(row),
            place.at,
            if missing.replaced { "was replaced by another allocation" } else { "was freed or unmapped" }
        );
    }
}
