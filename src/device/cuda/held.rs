//! Whether memory is still there between two syncs.
//!
//! What comes from cudaMalloc is known by CU_POINTER_ATTRIBUTE_BUFFER_ID, which no other allocation of the process gets. Memory of pools,
//! managed memory and what is mapped piece by piece may be replaced at the same address, and is looked at for being there alone; but where
//! other processes have pieces open, these are known by CU_POINTER_ATTRIBUTE_MEMORY_BLOCK_ID. A place is always asked for at an address
//! within a block: what lies beside it in the same mapping may be somebody else's, and gone.

use super::gpu::{Address, Gpu};
use crate::abi::RS_DEVICE_CUDA;
use crate::device::{Held, Identity, Mem, Missing};
use crate::error::Result;
use cudarc::driver::sys::{CUdeviceptr, CUmemorytype};
use std::collections::BTreeMap;

/// What is known, by the begin of the range of addresses that it stands for, with the length of that.
#[derive(Default)]
struct Ranges(BTreeMap<CUdeviceptr, (u64, Held)>);

impl Ranges {
    fn at(&mut self, at: u64) -> Option<(u64, &mut Held)> {
        let (&base, (len, held)) = self.0.range_mut(..=at).next_back()?;
        (at - base < *len).then_some((base.saturating_add(*len), held))
    }

    fn into_list(self) -> Vec<Held> {
        self.0.into_values().map(|range| range.1).collect()
    }
}

/// The blocks of the GPU's own memory: their number, begin and end.
fn own<'a>(gpu: &Gpu, blocks: &'a [Mem]) -> impl Iterator<Item = (u32, u64, u64)> + use<'a> {
    let kind = (RS_DEVICE_CUDA, gpu.ordinal);
    let own = (0..).zip(blocks).filter(move |(_, mem)| mem.kind() == kind && !mem.is_empty());
    own.map(|(block, mem)| (block, mem.addr() as u64, (mem.addr() + mem.len()) as u64))
}

/// See [`crate::device::Device::held`].
pub fn whole(gpu: &Gpu, blocks: &[Mem]) -> Result<Vec<Held>> {
    let mut known = Ranges::default();
    for (block, begin, end) in own(gpu, blocks) {
        if let Some((_, held)) = known.at(begin).filter(|range| end <= range.0) {
            if held.identity != Identity::Any {
                held.blocks.push(block);
            }
            continue;
        }
        let found = gpu.about(begin)?;
        let identity = if found.named { Identity::Whole(found.id) } else { Identity::Any };
        // Of what is mapped, which may be less than the driver calls a range: enough not to ask for each of many blocks.
        let range = gpu.range(begin).ok().filter(|&(base, len)| begin.checked_sub(base).is_some_and(|offset| offset < len));
        let (base, len) = range.unwrap_or((begin, end - begin));
        known.0.insert(base, (len, Held { at: begin, identity, blocks: vec![block] }));
    }
    Ok(known.into_list())
}

/// See [`crate::device::Device::held_open`].
pub fn pieces(gpu: &Gpu, blocks: &[Mem]) -> Result<Vec<Held>> {
    let mut known = Ranges::default();
    for (block, mut at, end) in own(gpu, blocks) {
        while at < end {
            if let Some((range_end, held)) = known.at(at) {
                held.blocks.push(block);
                at = range_end;
                continue;
            }
            if gpu.about(at)?.named {
                break;
            }
            let piece = gpu.mapping(at)?;
            if at.checked_sub(piece.base).is_none_or(|offset| offset >= piece.len) {
                break;
            }
            known.0.insert(piece.base, (piece.len, Held { at, identity: Identity::Piece(piece.id), blocks: vec![block] }));
            at = piece.base.saturating_add(piece.len);
        }
    }
    Ok(known.into_list())
}

/// See [`crate::device::Device::missing`].
pub fn missing(gpu: &Gpu, held: &[&Held]) -> Result<Option<Missing>> {
    let current = gpu.current()?;
    for (which, place) in held.iter().enumerate() {
        let now = current.about(place.at)?;
        if !is_own(gpu, &now) {
            return Ok(Some(Missing { which, replaced: false }));
        }
        let same = match place.identity {
            Identity::Any => true,
            Identity::Whole(id) => now.named && now.id == id,
            Identity::Piece(id) => !now.named && current.mapping(place.at)?.id == id,
        };
        if !same {
            return Ok(Some(Missing { which, replaced: true }));
        }
    }
    Ok(None)
}

fn is_own(gpu: &Gpu, found: &Address) -> bool {
    found.kind == CUmemorytype::CU_MEMORYTYPE_DEVICE as u32 && found.ordinal == gpu.ordinal
}
