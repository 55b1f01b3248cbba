//! What must be: memory full of poison, the values of the sources in it, and, element by element, what a sync may change.

use super::gpu::{Block, HOST, Kind};
use super::model::{Case, Rank, item, mix};
use reshard::abi::{RS_SOURCE, RS_TARGET};

/// Who has and who wants each element of each tensor.
pub struct Census {
    /// By tensor and element: how many source tiles hold it.
    pub sources: Vec<Vec<u32>>,
    /// By tensor and element: how many target tiles want it.
    pub needs: Vec<Vec<u32>>,
}

impl Census {
    pub fn new(case: &Case) -> Census {
        let mut census = Census { sources: zeros(case), needs: zeros(case) };
        for rank in &case.ranks {
            count(case, rank, RS_SOURCE, &mut census.sources);
            count(case, rank, RS_TARGET, &mut census.needs);
        }
        census
    }
}

fn zeros(case: &Case) -> Vec<Vec<u32>> {
    case.tensors.iter().map(|t| vec![0; t.len()]).collect()
}

fn count(case: &Case, rank: &Rank, role: u32, table: &mut [Vec<u32>]) {
    for tile in rank.tiles_of(role) {
        tile.elements(case.tensors[tile.tensor].item()).iter().for_each(|&(e, _)| table[tile.tensor][e] += 1);
    }
}

/// By tensor and element: how many tiles of `role` on one rank have it.
pub fn held(case: &Case, rank: usize, role: u32) -> Vec<Vec<u32>> {
    let mut table = zeros(case);
    count(case, &case.ranks[rank], role, &mut table);
    table
}

/// Bytes that must reach a rank from others in a sync of `only` (by tensor): each element that it wants and does not hold, once.
pub fn lower_bound(case: &Case, rank: usize, only: &[bool]) -> u64 {
    let (have, want) = (held(case, rank, RS_SOURCE), held(case, rank, RS_TARGET));
    let missing = |t: usize| want[t].iter().zip(&have[t]).filter(|(w, h)| **w > 0 && **h == 0).count();
    (0..case.tensors.len()).filter(|&t| only[t]).map(|t| (missing(t) * case.tensors[t].item()) as u64).sum()
}

/// One rank's memory: its blocks in an arena, with poison around and in them.
pub struct Memory {
    block: Block,
    starts: Vec<usize>,
}

impl Memory {
    /// Blocks of the given sizes, in an order and at distances that follow from `seed`.
    pub fn new(kind: Kind, blocks: &[usize], seed: u64) -> Memory {
        let mut rng = fastrand::Rng::with_seed(seed);
        let mut order: Vec<usize> = (0..blocks.len()).collect();
        rng.shuffle(&mut order);
        let (mut starts, mut end) = (vec![0; blocks.len()], 32);
        for b in order {
            starts[b] = end;
            end = (end + blocks[b] + rng.usize(16..64)).next_multiple_of(16);
        }
        let bytes: Vec<u8> = (0..end + 32).map(|i| mix(seed ^ i as u64) as u8).collect();
        Memory { block: Block::new(kind, &bytes), starts }
    }

    /// Address of a byte of a block; what lies there belongs to the library until the ranks' threads have been joined.
    pub fn address(&mut self, block: usize, at: usize) -> *mut u8 {
        self.block.at(self.starts[block] + at)
    }

    /// See [`Block::sleep`]; what [`Memory::wake`] wants.
    #[allow(dead_code)] // of `cuda` alone
    pub fn sleep(&mut self) -> Vec<u8> {
        let bytes = self.bytes();
        self.block.sleep();
        bytes
    }

    /// Other memory with these bytes.
    #[allow(dead_code)] // of `cuda` alone
    pub fn wake(&mut self, bytes: &[u8]) {
        self.block.wake();
        self.block.write(bytes);
    }

    #[allow(dead_code)] // of `cuda` alone
    pub fn renew(&mut self) {
        let bytes = self.sleep();
        self.wake(&bytes);
    }

    /// Where it lies.
    pub fn kind(&self) -> Kind {
        self.block.kind()
    }

    /// The GPU that copies from and to it.
    pub fn gpu(&self) -> Option<i32> {
        (self.kind() != HOST).then_some(self.kind().1)
    }

    /// For syncs of it.
    pub fn stream(&self) -> *mut std::ffi::c_void {
        self.block.stream()
    }

    /// All of it.
    pub fn bytes(&self) -> Vec<u8> {
        self.block.read()
    }

    /// Other bytes, as many.
    pub fn write(&mut self, bytes: &[u8]) {
        self.block.write(bytes);
    }

    /// Where a buffer starts in `bytes`.
    pub fn start(&self, rank: &Rank, buffer: usize) -> usize {
        self.starts[rank.buffers[buffer].block] + rank.buffers[buffer].at
    }
}

/// Writes the value of every element that a tile of `role` has, of the tensors in `only`, into `image`, an arena laid out as `memory`.
pub fn write(case: &Case, rank: usize, role: u32, only: &[bool], version: u64, memory: &Memory, image: &mut [u8]) {
    let rank = &case.ranks[rank];
    for tile in rank.tiles_of(role).filter(|t| only[t.tensor]) {
        let (tensor, start, buffer) = (&case.tensors[tile.tensor], memory.start(rank, tile.buffer), &rank.buffers[tile.buffer]);
        let item = item(buffer.dtype);
        for (e, byte) in tile.elements(item) {
            tensor.value(e, version, buffer.role, &mut image[start + byte..start + byte + item]);
        }
    }
}

/// Compares an arena with what it must be; the text names the first byte that differs and whose it is.
pub fn compare(case: &Case, rank: usize, memory: &Memory, expected: &[u8]) -> Result<(), String> {
    let now = memory.bytes();
    let Some(byte) = now.iter().zip(expected).position(|(a, b)| a != b) else { return Ok(()) };
    let wrong = now.iter().zip(expected).filter(|(a, b)| a != b).count();
    let mut text = format!("rank {rank}: {wrong} bytes differ; byte {byte} is {} and must be {}", now[byte], expected[byte]);
    let owner = &case.ranks[rank];
    for (b, buffer) in owner.buffers.iter().enumerate() {
        let start = memory.start(owner, b);
        if (start..start + buffer.bytes).contains(&byte) {
            text += &format!("; byte {} of buffer {}", byte - start, buffer.name);
            for tile in owner.tiles.iter().filter(|t| t.buffer == b) {
                let tensor = &case.tensors[tile.tensor];
                let item = item(buffer.dtype);
                let hit = tile.elements(item).into_iter().find(|(_, at)| (*at..at + item).contains(&(byte - start)));
                if let Some((e, _)) = hit {
                    text += &format!("; element {e} of {}", tensor.name);
                }
            }
        }
    }
    Err(text)
}
