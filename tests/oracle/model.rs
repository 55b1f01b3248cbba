//! What a case says: logical tensors, and for each rank its memory, buffers and tiles. Plain data; calls nothing of the library.

use reshard::abi::{RS_TARGET, RS_TRANSFORM_PLUS_ONE, rs_dtype_t};

/// A logical tensor. Its elements' values follow from `seed`, their row-major index and a version.
#[derive(Clone, Debug)]
pub struct Tensor {
    pub name: String,
    pub shape: Vec<i64>,
    /// What sources have.
    pub dtype: rs_dtype_t,
    /// What targets have: the same, or of float types another.
    pub target: rs_dtype_t,
    /// Of the targets' tiles. With one, `target` is fp32.
    pub transform: u32,
    pub seed: u64,
}

impl Tensor {
    /// Whether values change on the way.
    pub fn converts(&self) -> bool {
        self.transform != 0 || (self.dtype.code, self.dtype.bits) != (self.target.code, self.target.bits)
    }

    /// What a buffer of `role` has; one of both roles is of a tensor whose values stay.
    pub fn dtype_as(&self, role: u32) -> rs_dtype_t {
        if role == RS_TARGET { self.target } else { self.dtype }
    }

    /// Number of elements.
    pub fn len(&self) -> usize {
        self.shape.iter().product::<i64>() as usize
    }

    /// Bytes of an element at a source.
    pub fn item(&self) -> usize {
        item(self.dtype)
    }

    /// Writes the bytes of element `index` at `version`, as a buffer of `role` has them, to `out`, one item long.
    pub fn value(&self, index: usize, version: u64, role: u32, out: &mut [u8]) {
        if self.converts() {
            return self.float(index, version, role, out);
        }
        let key = self.seed ^ (index as u64).wrapping_mul(0x9E37_79B9_7F4A_7C15) ^ version.wrapping_mul(0xD1B5_4A32_D192_ED03);
        for (part, chunk) in out.chunks_mut(8).enumerate() {
            chunk.copy_from_slice(&mix(key.wrapping_add(part as u64)).to_le_bytes()[..chunk.len()]);
        }
    }

    /// What a target makes of a source's element.
    pub fn arrived(&self, bytes: &[u8]) -> Vec<u8> {
        if !self.converts() {
            return bytes.to_vec();
        }
        let mut word = [0; 4];
        word[..bytes.len()].copy_from_slice(bytes);
        let bits = u32::from_le_bytes(word);
        let (negative, exponent, fraction) = decoded(self.dtype, bits);
        let mut bits = encoded(self.target, negative, exponent, fraction);
        match self.transform {
            0 => {}
            RS_TRANSFORM_PLUS_ONE => bits = (f32::from_bits(bits) + 1.0).to_bits(),
            _ => bits = (f32::from_bits(bits) - 1.0).to_bits(),
        }
        bits.to_le_bytes()[..item(self.target)].to_vec()
    }

    /// The same where values change: numbers that every type has.
    fn float(&self, index: usize, version: u64, role: u32, out: &mut [u8]) {
        let label = mix(self.seed ^ (index as u64) << 20 ^ version);
        let (negative, exponent, fraction) = (label & 1 == 1, (label >> 1 & 15) as i32 - 8, (label >> 5 & 127) as u32);
        let source = encoded(self.dtype, negative, exponent, fraction).to_le_bytes();
        let source = &source[..self.item()];
        out.copy_from_slice(&if role == RS_TARGET { self.arrived(source) } else { source.to_vec() });
    }
}

/// The bits of a number with 8 significant ones and an exponent that all float types have.
fn encoded(dtype: rs_dtype_t, negative: bool, exponent: i32, fraction: u32) -> u32 {
    match (dtype.code, dtype.bits) {
        (2, 16) => u32::from(negative) << 15 | ((exponent + 15) as u32) << 10 | fraction << 3,
        (4, 16) => u32::from(negative) << 15 | ((exponent + 127) as u32) << 7 | fraction,
        _ => u32::from(negative) << 31 | ((exponent + 127) as u32) << 23 | fraction << 16,
    }
}

/// The reverse.
fn decoded(dtype: rs_dtype_t, bits: u32) -> (bool, i32, u32) {
    let (sign, exponent, fraction) = match (dtype.code, dtype.bits) {
        (2, 16) => (bits >> 15, (bits >> 10 & 31) as i32 - 15, bits >> 3 & 127),
        (4, 16) => (bits >> 15, (bits >> 7 & 255) as i32 - 127, bits & 127),
        _ => (bits >> 31, (bits >> 23 & 255) as i32 - 127, bits >> 16 & 127),
    };
    (sign == 1, exponent, fraction)
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
    pub flags: u32,
    /// Whether the staging is the caller's.
    pub lends: bool,
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
