//! Whether memory is still there between two syncs.
//!
//! What comes from cudaMalloc is known by CU_POINTER_ATTRIBUTE_BUFFER_ID, which no other allocation of the process gets. Memory of pools
//! and what is mapped piece by piece may be replaced at the same address, and is looked at for being there alone; but where other
//! processes have pieces open, these are known by CU_POINTER_ATTRIBUTE_MEMORY_BLOCK_ID. Managed memory, of which the driver may say
//! another thing each time, is not looked at. A place is always asked for at an address within a block: what lies beside it in the same
//! mapping may be somebody else's, and gone.

use super::gpu::Gpu;
use crate::abi::RS_DEVICE_CUDA;
use crate::device::{Held, Identity, Mem, Missing};
use crate::error::Result;
use cudarc::driver::sys::{CUdeviceptr, CUmemorytype};
use std::collections::BTreeMap;

const DEVICE: u32 = CUmemorytype::CU_MEMORYTYPE_DEVICE as u32;

/// See [`crate::device::Device::held`].
pub fn held(gpu: &Gpu, blocks: &[Mem]) -> Result<Vec<Held>> {
    places(gpu, blocks, false)
}

/// See [`crate::device::Device::held_open`].
pub fn held_open(gpu: &Gpu, blocks: &[Mem]) -> Result<Vec<Held>> {
    places(gpu, blocks, true)
}

/// Places in the GPU's own memory; `open`: in mapped memory alone, and what is there is known by its piece.
fn places(gpu: &Gpu, blocks: &[Mem], open: bool) -> Result<Vec<Held>> {
    // By the begin of an allocation or piece, with its length.
    let mut known: BTreeMap<CUdeviceptr, (u64, Held)> = BTreeMap::new();
    // Where the driver's ranges are not those that come and go together.
    let mut alone = vec![];
    let own = (RS_DEVICE_CUDA, gpu.ordinal);
    for (block, mem) in (0..).zip(blocks).filter(|(_, mem)| mem.kind() == own) {
        let (mut at, end) = (mem.addr() as u64, (mem.addr() + mem.len()) as u64);
        while at < end {
            if let Some((&base, (len, held))) = known.range_mut(..=at).next_back() {
                if at - base < *len {
                    held.blocks.push(block);
                    at = base.saturating_add(*len);
                    continue;
                }
            }
            let found = gpu.about(at)?;
            if found.kind != DEVICE || found.managed || found.named && open {
                break;
            }
            let range = if found.named {
                let (base, len) = gpu.range(at)?;
                Some((base, len, Identity::Whole(found.id)))
            } else {
                let piece = gpu.mapping(at).ok().filter(|piece| !piece.pool);
                let present = Identity::Present { mapped: found.mapped };
                piece.map(|piece| (piece.base, piece.len, if open { Identity::Piece(piece.id) } else { present }))
            };
            match range.filter(|&(base, len, _)| at.checked_sub(base).is_some_and(|offset| offset < len)) {
                Some((base, len, identity)) => {
                    known.insert(base, (len, Held { at, identity, blocks: vec![block] }));
                    at = base.saturating_add(len);
                }
                None => {
                    alone.push(Held { at, identity: Identity::Present { mapped: found.mapped }, blocks: vec![block] });
                    break;
                }
            }
        }
    }
    Ok(known.into_values().map(|range| range.1).chain(alone).collect())
}

/// See [`crate::device::Device::missing`].
pub fn missing(gpu: &Gpu, held: &[&Held]) -> Result<Option<Missing>> {
    let current = gpu.current()?;
    for (which, place) in held.iter().enumerate() {
        let now = current.about(place.at)?;
        let gone = now.kind != DEVICE || now.ordinal != gpu.ordinal;
        let (gone, same) = match place.identity {
            Identity::Present { mapped } => (gone || mapped && !now.mapped, true),
            Identity::Whole(id) => (gone, now.named && now.id == id),
            Identity::Piece(id) => (gone, gone || !now.named && current.mapping(place.at)?.id == id),
        };
        if gone || !same {
            return Ok(Some(Missing { which, replaced: !gone }));
        }
    }
    Ok(None)
}
