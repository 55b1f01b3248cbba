//! What a case says: logical tensors, and for each rank its memory, buffers and tiles. Plain data; calls nothing of the library.

use reshard::abi::rs_dtype_t;

/// A logical tensor. Its elements' values follow from `seed`, their row-major index and a version.
#[derive(Clone, Debug)]
pub struct Tensor {
    pub name: String,
    pub shape: Vec<i64>,
    pub dtype: rs_dtype_t,
    pub seed: u64,
}

impl Tensor {
    /// Number of elements.
    pub fn len(&self) -> usize {
        self.shape.iter().product::<i64>() as usize
    }

    /// Bytes of an element.
    pub fn item(&self) -> usize {
        item(self.dtype)
    }

    /// Writes the bytes of element `index` at `version` to `out`, one item long.
    pub fn value(&self, index: usize, version: u64, out: &mut [u8]) {
        let key = self.seed ^ (index as u64).wrapping_mul(0x9E37_79B9_7F4A_7C15) ^ version.wrapping_mul(0xD1B5_4A32_D192_ED03);
        for (part, chunk) in out.chunks_mut(8).enumerate() {
            chunk.copy_from_slice(&mix(key.wrapping_add(part as u64)).to_le_bytes()[..chunk.len()]);
        }
    }
}

/// A row of a rank's buffer table, and where it lies: `at` bytes into the rank's block number `block`.
#[derive(Clone, Debug)]
pub struct Buffer {
    pub name: String,
    pub role: u32,
    pub padded: bool,
    pub dtype: rs_dtype_t,
    pub shape: Vec<i64>,
    pub strides: Vec<i64>,
    pub bytes: usize,
    pub block: usize,
    pub at: usize,
}

/// A row of a rank's tile table; `tensor` counts in the case, `buffer` in the rank.
#[derive(Clone, Debug)]
pub struct Tile {
    pub tensor: usize,
    pub buffer: usize,
    pub transform: u32,
    pub byte_offset: u64,
    pub view: Vec<i64>,
    pub origin: Vec<i64>,
    pub extent: Vec<i64>,
    pub stride: Vec<i64>,
}

impl Tile {
    /// Every element of the box: its row-major index in the tensor, and its bytes from the buffer's first.
    pub fn elements(&self, item: usize) -> Vec<(usize, usize)> {
        let mut out = Vec::with_capacity(self.extent.iter().product::<i64>() as usize);
        self.walk(0, 0, self.byte_offset as i64, item as i64, &mut out);
        out
    }

    fn walk(&self, axis: usize, index: i64, byte: i64, item: i64, out: &mut Vec<(usize, usize)>) {
        if axis == self.view.len() {
            return out.push((index as usize, byte as usize));
        }
        for i in 0..self.extent[axis] {
            let along = if i == 0 { 0 } else { i * self.stride[axis] * item };
            self.walk(axis + 1, index * self.view[axis] + self.origin[axis] + i, byte + along, item, out);
        }
    }
}

/// One rank: its tables and how it is configured.
#[derive(Clone, Debug, Default)]
pub struct Rank {
    /// Bytes of each block of memory.
    pub blocks: Vec<usize>,
    pub buffers: Vec<Buffer>,
    pub tiles: Vec<Tile>,
    /// Rows of the tensor table, as numbers of the case's tensors.
    pub listed: Vec<usize>,
    /// `rs_config_t` fields.
    pub host: u64,
    pub staging: u64,
    pub threads: u32,
}

impl Rank {
    /// The tiles whose buffer has a role of `role`.
    pub fn tiles_of(&self, role: u32) -> impl Iterator<Item = &Tile> {
        self.tiles.iter().filter(move |t| self.buffers[t.buffer].role & role != 0)
    }
}

/// A world of ranks over one set of logical tensors.
#[derive(Clone, Debug)]
pub struct Case {
    pub seed: u64,
    pub tensors: Vec<Tensor>,
    pub ranks: Vec<Rank>,
}

impl Case {
    /// How much there is to look at when it fails.
    pub fn size(&self) -> usize {
        self.ranks.iter().map(|r| 1 + r.buffers.len() + r.tiles.len()).sum()
    }
}

impl std::fmt::Display for Case {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        for t in &self.tensors {
            writeln!(f, "tensor {} {:?} dtype {:?}", t.name, t.shape, t.dtype)?;
        }
        for (r, rank) in self.ranks.iter().enumerate() {
            writeln!(f, "rank {r}: host {} staging {} threads {}", rank.host, rank.staging, rank.threads)?;
            for (b, x) in rank.buffers.iter().enumerate() {
                let (role, pad) = (["", "source", "target", "both"][x.role as usize & 3], if x.padded { " padded" } else { "" });
                writeln!(
                    f,
                    "  buffer {} {role}{pad} {:?} strides {:?}, {} bytes at {}+{}",
                    x.name, x.shape, x.strides, x.bytes, x.block, x.at
                )?;
                for t in rank.tiles.iter().filter(|t| t.buffer == b) {
                    let name = &self.tensors[t.tensor].name;
                    writeln!(
                        f,
                        "    {name} view {:?} [{:?} + {:?}) byte {} strides {:?}",
                        t.view, t.origin, t.extent, t.byte_offset, t.stride
                    )?;
                }
            }
        }
        Ok(())
    }
}

/// Bytes of an element.
pub fn item(dtype: rs_dtype_t) -> usize {
    dtype.bits as usize / 8
}

/// The strides of a dense row-major box.
pub fn dense(extent: &[i64]) -> Vec<i64> {
    let mut strides = vec![1; extent.len()];
    for axis in (1..extent.len()).rev() {
        strides[axis - 1] = strides[axis] * extent[axis];
    }
    strides
}

/// A well-mixed 64-bit hash.
pub fn mix(mut x: u64) -> u64 {
    x = (x ^ (x >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    x = (x ^ (x >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    x ^ (x >> 31)
}
