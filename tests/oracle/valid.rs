//! What the header demands of tables, checked element by element: it keeps the generator honest.

use super::model::{Case, Rank, Tile};
use super::truth::held;
use reshard::abi::{RS_SOURCE, RS_TARGET};
use std::collections::{HashMap, HashSet};

/// What is wrong with a case, if anything.
pub fn flaw(case: &Case) -> Option<String> {
    let sources: Vec<Vec<Vec<u32>>> = (0..case.ranks.len()).map(|r| held(case, r, RS_SOURCE)).collect();
    case.ranks.iter().enumerate().find_map(|(r, rank)| own_flaw(case, rank).map(|text| format!("rank {r}: {text}"))).or_else(|| {
        case.ranks.iter().flat_map(|rank| rank.tiles_of(RS_TARGET)).find_map(|tile| {
            let lost = tile.elements(1).into_iter().find(|&(e, _)| sources.iter().all(|s| s[tile.tensor][e] == 0));
            lost.map(|(e, _)| format!("no source for element {e} of {}", case.tensors[tile.tensor].name))
        })
    })
}

/// What is wrong with a rank's tables in themselves.
fn own_flaw(case: &Case, rank: &Rank) -> Option<String> {
    let mut written = HashSet::new();
    let mut read: HashMap<(usize, usize), (u64, usize)> = HashMap::new();
    for (b, buffer) in rank.buffers.iter().enumerate() {
        let item = buffer.dtype.bits as usize / 8;
        let tile = |view: &[i64], stride: &[i64]| Tile {
            tensor: 0,
            buffer: b,
            transform: 0,
            byte_offset: 0,
            view: view.to_vec(),
            origin: vec![0; view.len()],
            extent: view.to_vec(),
            stride: stride.to_vec(),
        };
        let own: HashSet<usize> = tile(&buffer.shape, &buffer.strides).elements(item).iter().map(|e| e.1).collect();
        if !nests(&buffer.shape, &buffer.strides) || own.iter().any(|at| at + item > buffer.bytes) {
            return Some(format!("{} is not within its memory", buffer.name));
        }
        let mut covered = 0;
        for tile in rank.tiles.iter().filter(|t| t.buffer == b) {
            let tensor = &case.tensors[tile.tensor];
            let inside = (0..tile.view.len())
                .all(|j| tile.origin[j] >= 0 && tile.extent[j] > 0 && tile.origin[j] + tile.extent[j] <= tile.view[j]);
            let fits = tile.view.iter().product::<i64>() as usize == tensor.len()
                && tensor.dtype_as(buffer.role) == buffer.dtype
                && inside;
            if !fits || !nests(&tile.extent, &tile.stride) {
                return Some(format!("a tile of {} in {} is none", tensor.name, buffer.name));
            }
            for (e, byte) in tile.elements(item) {
                let place = (buffer.block, buffer.at + byte);
                if !own.contains(&byte) {
                    return Some(format!("byte {byte} of {} is no element", buffer.name));
                }
                covered += 1;
                if buffer.role & RS_TARGET != 0 && !written.insert(place) {
                    return Some(format!("two targets at byte {byte} of {}", buffer.name));
                }
                // Where a source and a target meet they must be one element; tied tensors count as one as long as both are sources.
                if read.insert(place, (tensor.seed, e)).is_some_and(|other| other != (tensor.seed, e)) {
                    return Some(format!("two elements at byte {byte} of {}", buffer.name));
                }
            }
        }
        if buffer.role & RS_TARGET != 0 && !buffer.padded && covered != own.len() {
            return Some(format!("{} elements of {} in no tile", own.len() - covered, buffer.name));
        }
    }
    None
}

/// Whether strides, sorted, are each at least the next times its extent; those of one index do not count.
fn nests(extent: &[i64], stride: &[i64]) -> bool {
    let mut wide: Vec<(i64, i64)> = stride.iter().copied().zip(extent.iter().copied()).filter(|(_, e)| *e > 1).collect();
    wide.sort();
    wide.first().is_none_or(|w| w.0 >= 1) && wide.windows(2).all(|w| w[1].0 >= w[0].0 * w[0].1)
}
