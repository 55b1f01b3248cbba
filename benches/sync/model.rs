//! Four layers of Llama-3.1-8B as tables, cut as Megatron and vLLM cut them.

use reshard::abi::*;
use reshard::device::Mem;
use reshard::layout::{BufferRow, TensorRow, TileRow};

const LAYERS: u32 = 4;
const BF16: rs_dtype_t = rs_dtype_t { code: 4, bits: 16, lanes: 1 };

/// Along which axis tensor parallelism cuts.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Cut {
    Rows,
    Columns,
}

/// Name within a layer, shape, cut. (The norms' few kilobytes are left out.)
const LAYER: [(&str, [i64; 2], Cut); 7] = [
    ("self_attn.q_proj.weight", [4096, 4096], Cut::Rows),
    ("self_attn.k_proj.weight", [1024, 4096], Cut::Rows),
    ("self_attn.v_proj.weight", [1024, 4096], Cut::Rows),
    ("self_attn.o_proj.weight", [4096, 4096], Cut::Columns),
    ("mlp.gate_proj.weight", [14336, 4096], Cut::Rows),
    ("mlp.up_proj.weight", [14336, 4096], Cut::Rows),
    ("mlp.down_proj.weight", [4096, 14336], Cut::Columns),
];

/// One rank's tables, a buffer a tensor.
#[derive(Default)]
pub struct Side {
    pub tensors: Vec<TensorRow>,
    pub tiles: Vec<TileRow>,
    shapes: Vec<[i64; 2]>,
    role: u32,
}

fn pad(v: [i64; 2]) -> [i64; RS_MAX_RANK] {
    let mut out = [0; RS_MAX_RANK];
    out[..2].copy_from_slice(&v);
    out
}

impl Side {
    fn add(&mut self, layer: u32, name: &str, shape: [i64; 2], origin: [i64; 2], extent: [i64; 2]) {
        let id = self.tensors.len() as u32;
        self.tensors.push(TensorRow { name: format!("model.layers.{layer}.{name}"), shape: shape.to_vec() });
        self.shapes.push(extent);
        self.tiles.push(TileRow {
            tensor: id,
            buffer: id,
            rank: 2,
            transform: RS_TRANSFORM_NONE,
            byte_offset: 0,
            view: pad(shape),
            origin: pad(origin),
            extent: pad(extent),
            stride: pad([extent[1], 1]),
        });
    }

    /// Bytes of each buffer.
    pub fn bytes(&self) -> Vec<usize> {
        self.shapes.iter().map(|s| (s[0] * s[1] * 2) as usize).collect()
    }

    pub fn buffers(&self, mems: &[Mem]) -> Vec<BufferRow> {
        let row = |((t, shape), mem): ((&TensorRow, &[i64; 2]), &Mem)| BufferRow {
            name: t.name.clone(),
            addr: mem.addr() as u64,
            bytes: mem.len() as u64,
            device_type: RS_DEVICE_CPU,
            device_id: 0,
            role: self.role,
            flags: 0,
            dtype: BF16,
            shape: shape.to_vec(),
            strides: vec![shape[1], 1],
        };
        self.tensors.iter().zip(&self.shapes).zip(mems).map(row).collect()
    }
}

/// A source stage: whole tensors of every `stages`-th part of the layers.
pub fn pipeline_stage(stage: u32, stages: u32) -> Side {
    let mut out = Side { role: RS_SOURCE, ..Side::default() };
    let per = LAYERS / stages;
    for layer in stage * per..(stage + 1) * per {
        for (name, shape, _) in LAYER {
            out.add(layer, name, shape, [0, 0], shape);
        }
    }
    out
}

/// A shard of all layers.
pub fn tensor_parallel(rank: u32, size: u32, role: u32) -> Side {
    let mut out = Side { role, ..Side::default() };
    for layer in 0..LAYERS {
        for (name, shape, cut) in LAYER {
            let axis = usize::from(cut == Cut::Columns);
            let (mut origin, mut extent) = ([0, 0], shape);
            extent[axis] /= i64::from(size);
            origin[axis] = extent[axis] * i64::from(rank);
            out.add(layer, name, shape, origin, extent);
        }
    }
    out
}

/// The logical tensors that are cut so.
pub fn names(cut: Cut) -> Vec<String> {
    let layer = |l| LAYER.iter().filter(move |t| t.2 == cut).map(move |t| format!("model.layers.{l}.{}", t.0));
    (0..LAYERS).flat_map(layer).collect()
}

/// Bytes of these tensors in all, and the memcpys `(from, to, len)` that one of `size` targets makes of its part: one a tensor, or
/// one a row where columns are cut.
pub fn runs(cut: Cut, size: usize) -> (usize, Vec<(usize, usize, usize)>) {
    let (mut total, mut from, mut to, mut runs) = (0, 0, 0, vec![]);
    for _ in 0..LAYERS {
        for (_, shape, _) in LAYER.iter().filter(|t| t.2 == cut) {
            let (rows, cols) = (shape[0] as usize, shape[1] as usize);
            total += rows * cols * 2;
            if cut == Cut::Rows {
                let len = rows * cols * 2 / size;
                runs.push((from, to, len));
                from += len;
                to += len;
            } else {
                let len = cols * 2 / size;
                for r in 0..rows {
                    runs.push((from + r * cols * 2, to + r * len, len));
                }
                from += rows * cols * 2;
                to += rows * len;
            }
        }
    }
    (total, runs)
}

/// Bytes of the two blocks that runs lie in.
pub fn span(runs: &[(usize, usize, usize)]) -> (usize, usize) {
    let end = |f: fn(&(usize, usize, usize)) -> usize| runs.iter().map(f).max().unwrap_or(0);
    (end(|r| r.0 + r.2), end(|r| r.1 + r.2))
}
