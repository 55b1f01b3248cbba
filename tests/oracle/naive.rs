//! A mover without a plan: one element after another, from the first source that has it. It tests the oracle.

use super::model::{Case, item};
use super::truth::Memory;
use reshard::abi::{RS_SOURCE, RS_TARGET};

/// What a wrong mover does wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Slip {
    /// Nothing.
    None,
    /// It leaves out the last element.
    Skips,
    /// It fills the last element with its neighbour's value.
    Shifts,
    /// It writes past the end of a target buffer.
    Spills,
    /// It writes to a source.
    Scribbles,
}

/// Moves all elements into `memories`; a `slip` happens on the last rank that has a target.
pub fn move_all(case: &Case, memories: &mut [Memory], slip: Slip) {
    let mut images: Vec<Vec<u8>> = memories.iter().map(Memory::bytes).collect();
    move_in(case, memories, &mut images, slip);
    memories.iter_mut().zip(&images).for_each(|(memory, image)| memory.write(image));
}

/// The same in arenas laid out as `memories`.
fn move_in(case: &Case, memories: &[Memory], images: &mut [Vec<u8>], slip: Slip) {
    let mut homes: Vec<Vec<Option<Vec<u8>>>> = case.tensors.iter().map(|t| vec![None; t.len()]).collect();
    for (r, rank) in case.ranks.iter().enumerate() {
        for tile in rank.tiles_of(RS_SOURCE) {
            let (item, start) = (case.tensors[tile.tensor].item(), memories[r].start(rank, tile.buffer));
            for (e, byte) in tile.elements(item) {
                let value = || case.tensors[tile.tensor].arrived(&images[r][start + byte..start + byte + item]);
                homes[tile.tensor][e].get_or_insert_with(value);
            }
        }
    }
    let mut moves = Vec::new();
    for (r, rank) in case.ranks.iter().enumerate() {
        for tile in rank.tiles_of(RS_TARGET) {
            let start = memories[r].start(rank, tile.buffer);
            let elements = tile.elements(item(rank.buffers[tile.buffer].dtype));
            moves.extend(elements.into_iter().map(|(e, byte)| (r, start + byte, tile.tensor, e)));
        }
    }
    if slip == Slip::Skips {
        moves.pop();
    }
    if let Some(last) = moves.last_mut().filter(|_| slip == Slip::Shifts) {
        last.3 = (last.3 + 1) % homes[last.2].len();
    }
    for (r, at, tensor, e) in moves {
        let value = homes[tensor][e].as_ref().expect("a valid case has a source for each element");
        images[r][at..at + value.len()].copy_from_slice(value);
    }
    let (role, past) = if slip == Slip::Spills { (RS_TARGET, true) } else { (RS_SOURCE, false) };
    if slip == Slip::Spills || slip == Slip::Scribbles {
        for (r, rank) in case.ranks.iter().enumerate() {
            if let Some(b) = rank.buffers.iter().position(|b| b.role & role != 0) {
                let at = memories[r].start(rank, b) + if past { rank.buffers[b].bytes } else { 0 };
                images[r][at] ^= 0x5A;
                return;
            }
        }
    }
}
