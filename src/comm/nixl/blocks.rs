//! Where messages lie: blocks of memory at their senders, and at their receivers, who read part by part.
#![forbid(unsafe_code)]

use super::api::{DRAM, VRAM};
use crate::abi::*;
use crate::device::Mem;
use crate::error::{Result, bail};
use std::ffi::c_int;

/// Memory of any agent, as its owner says: address, length, DLPack's device type and id.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Block {
    pub addr: u64,
    pub len: u64,
    pub kind: (i32, i32),
}

/// What a receiver reads in one piece; both are of one length.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Part {
    pub from: Block,
    pub into: Block,
}

impl Block {
    /// Of this process.
    pub fn of(mem: Mem) -> Block {
        Block { addr: mem.addr() as u64, len: mem.len() as u64, kind: mem.kind() }
    }

    /// How NIXL names the memory.
    pub fn place(&self) -> Result<(c_int, u64)> {
        match self.kind {
            (RS_DEVICE_CPU | RS_DEVICE_CUDA_HOST, _) => Ok((DRAM, 0)),
            (RS_DEVICE_CUDA, id) => Ok((VRAM, id as u64)),
            (kind, id) => {
                bail!(RS_ERR_UNSUPPORTED, "nixl moves memory of the host and of CUDA's GPUs, not of device (type {kind}, id {id})")
            }
        }
    }

    /// For other ranks.
    pub fn encode(&self) -> [u8; 24] {
        let mut out = [0; 24];
        out[..8].copy_from_slice(&self.addr.to_le_bytes());
        out[8..16].copy_from_slice(&self.len.to_le_bytes());
        out[16..20].copy_from_slice(&self.kind.0.to_le_bytes());
        out[20..].copy_from_slice(&self.kind.1.to_le_bytes());
        out
    }

    /// One or more, all of one kind and none empty; `None`: the bytes are not that.
    pub fn decode(bytes: &[u8]) -> Option<Vec<Block>> {
        let rows = bytes.chunks_exact(24);
        let rest = rows.remainder();
        let word = |row: &[u8], at: usize| row[at..].first_chunk().map(|w| u64::from_le_bytes(*w));
        let half = |row: &[u8], at: usize| row[at..].first_chunk().map(|w| i32::from_le_bytes(*w));
        let block = |row| Some(Block { addr: word(row, 0)?, len: word(row, 8)?, kind: (half(row, 16)?, half(row, 20)?) });
        let blocks: Vec<Block> = rows.map(block).collect::<Option<_>>()?;
        let kind = blocks.first()?.kind;
        (rest.is_empty() && blocks.iter().all(|b| b.kind == kind && b.len > 0)).then_some(blocks)
    }

    fn cut(&self, at: u64, len: u64) -> Block {
        // The owner's NIXL has the last word on what lies in its memory: the sum may be anything that another rank wrote.
        Block { addr: self.addr.wrapping_add(at), len, kind: self.kind }
    }
}

/// The length of a message.
pub fn bytes(blocks: &[Block]) -> u64 {
    blocks.iter().fold(0, |sum, b| sum.saturating_add(b.len))
}

/// The parts of a message that lies in some blocks at its sender and goes to others here. `None`: they have different lengths.
pub fn meet_in(from: &[Block], into: &[Block]) -> Option<Vec<Part>> {
    let mut parts = vec![];
    let (mut senders, mut ours) = (from.iter(), into.iter());
    let (mut left, mut right) = (senders.next().copied(), ours.next().copied());
    loop {
        match (left, right) {
            (Some(a), Some(b)) => {
                let len = a.len.min(b.len);
                parts.push(Part { from: a.cut(0, len), into: b.cut(0, len) });
                let rest = |block: Block| (block.len > len).then(|| block.cut(len, block.len - len));
                left = rest(a).or_else(|| senders.next().copied());
                right = rest(b).or_else(|| ours.next().copied());
            }
            (None, None) => return Some(parts),
            _ => return None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn block(addr: u64, len: u64) -> Block {
        Block { addr, len, kind: (RS_DEVICE_CUDA, 3) }
    }

    #[test]
    fn every_byte_of_a_message_goes_to_its_place() {
        let mut rng = fastrand::Rng::with_seed(5);
        for _ in 0..200 {
            let all = rng.u64(1..60);
            let mut blocks = || {
                let (mut out, mut left) = (vec![], all);
                while left > 0 {
                    let len = rng.u64(1..=left);
                    out.push(block(rng.u64(0..1 << 40), len));
                    left -= len;
                }
                out
            };
            let (from, into) = (blocks(), blocks());
            let places = |blocks: &[Block]| blocks.iter().flat_map(|b| (0..b.len).map(|i| b.addr + i)).collect::<Vec<u64>>();
            let parts = meet_in(&from, &into).unwrap();
            let (read, written): (Vec<Block>, Vec<Block>) = parts.iter().map(|p| (p.from, p.into)).unzip();
            assert_eq!((places(&read), places(&written)), (places(&from), places(&into)));
            assert!(parts.iter().all(|p| p.from.len == p.into.len) && parts.len() < from.len() + into.len());
            assert_eq!(bytes(&from), all);
            let longer = [&from[..], &[block(0, 1)]].concat();
            assert!(meet_in(&longer, &into).is_none() && meet_in(&from, &[&into[..], &[block(0, 1)]].concat()).is_none());
            let sent: Vec<u8> = from.iter().flat_map(Block::encode).collect();
            assert_eq!(Block::decode(&sent), Some(from));
        }
    }

    #[test]
    fn blocks_that_make_no_sense_are_not_taken() {
        let encode = |blocks: &[Block]| blocks.iter().flat_map(Block::encode).collect::<Vec<u8>>();
        let host = Block { kind: (RS_DEVICE_CPU, 0), ..block(1, 1) };
        let short = encode(&[block(1, 1)])[..23].to_vec();
        for bytes in [vec![], encode(&[block(1, 1), host]), encode(&[block(1, 0)]), short] {
            assert_eq!(Block::decode(&bytes), None);
        }
        // Whatever lengths another rank tells.
        assert!(meet_in(&[block(u64::MAX, u64::MAX), block(u64::MAX, u64::MAX)], &[block(1, 9)]).is_none());
        assert_eq!(bytes(&[block(1, u64::MAX), block(1, 9)]), u64::MAX);
    }
}
