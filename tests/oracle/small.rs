//! Small worlds that tests know by heart.

use super::model::{Buffer, Case, Rank, Tensor, Tile};
use reshard::abi::*;

/// Two ranks on a GPU each: a source with a tensor by rows and a square one, a target with the tensors cut, transposed and cast.
pub fn two_ranks() -> Case {
    let dtype = |code, bits| rs_dtype_t { code, bits, lanes: 1 };
    let tensor = |name: &str, target, seed| Tensor {
        name: name.into(),
        shape: vec![64, 48],
        dtype: dtype(2, 32),
        target,
        transform: 0,
        seed,
    };
    let buffer = |name: &str, role, dtype: rs_dtype_t, shape: [i64; 2], block| Buffer {
        name: name.into(),
        role,
        padded: false,
        dtype,
        shape: shape.to_vec(),
        strides: vec![shape[1], 1],
        bytes: (shape[0] * shape[1]) as usize * usize::from(dtype.bits / 8),
        block,
        at: 0,
    };
    let tile = |tensor, buffer, origin: [i64; 2], extent: [i64; 2], stride: [i64; 2]| Tile {
        tensor,
        buffer,
        transform: 0,
        byte_offset: 0,
        view: vec![64, 48],
        origin: origin.to_vec(),
        extent: extent.to_vec(),
        stride: stride.to_vec(),
    };
    let rank = |buffers: Vec<Buffer>, tiles| Rank {
        blocks: buffers.iter().map(|b| b.bytes).collect(),
        listed: vec![0, 1],
        buffers,
        tiles,
        ..Rank::default()
    };
    let (fp32, bf16) = (dtype(2, 32), dtype(4, 16));
    let source = rank(
        vec![buffer("a", RS_SOURCE, fp32, [64, 48], 0), buffer("b", RS_SOURCE, fp32, [64, 48], 1)],
        vec![tile(0, 0, [0, 0], [64, 48], [48, 1]), tile(1, 1, [0, 0], [64, 48], [48, 1])],
    );
    let target = rank(
        vec![
            buffer("left", RS_TARGET, fp32, [64, 20], 0),
            buffer("turned", RS_TARGET, fp32, [48, 64], 1),
            buffer("narrow", RS_TARGET, bf16, [64, 48], 2),
        ],
        vec![tile(0, 0, [0, 0], [64, 20], [20, 1]), tile(0, 1, [0, 0], [64, 48], [1, 64]), tile(1, 2, [0, 0], [64, 48], [48, 1])],
    );
    Case { seed: 0, tensors: vec![tensor("A", fp32, 1), tensor("B", bf16, 2)], ranks: vec![source, target] }
}

/// Two ranks that have both sides of that world: no weight goes from one to the other.
pub fn two_alone() -> Case {
    let mut case = two_ranks();
    let [source, target] = &case.ranks[..] else { unreachable!("two ranks") };
    let mut both = source.clone();
    let (blocks, buffers) = (source.blocks.len(), source.buffers.len());
    both.blocks.extend(&target.blocks);
    both.buffers.extend(target.buffers.iter().map(|b| Buffer { block: b.block + blocks, ..b.clone() }));
    both.tiles.extend(target.tiles.iter().map(|t| Tile { buffer: t.buffer + buffers, ..t.clone() }));
    case.ranks = vec![both.clone(), both];
    case
}

/// A source and a target of one vector, which the least staging moves in about a hundred rounds.
pub fn many_rounds() -> Case {
    let dtype = rs_dtype_t { code: 4, bits: 16, lanes: 1 };
    let n: i64 = 200_000;
    let tensor = Tensor { name: "A".into(), shape: vec![n], dtype, target: dtype, transform: 0, seed: 1 };
    let rank = |role: u32, step: i64| {
        let bytes = (n * step) as usize * 2;
        let name = "a".into();
        let buffer = Buffer { name, role, padded: false, dtype, shape: vec![n], strides: vec![step], bytes, block: 0, at: 0 };
        let (view, origin, extent, stride) = (vec![n], vec![0], vec![n], vec![step]);
        let tile = Tile { tensor: 0, buffer: 0, transform: 0, byte_offset: 0, view, origin, extent, stride };
        Rank {
            blocks: vec![bytes],
            listed: vec![0],
            buffers: vec![buffer],
            tiles: vec![tile],
            staging: 16 << 10,
            ..Rank::default()
        }
    };
    Case { seed: 0, tensors: vec![tensor], ranks: vec![rank(RS_SOURCE, 2), rank(RS_TARGET, 1)] }
}

/// A tensor in runs long enough to be moved where they lie: sources with some columns each, a target with other columns, and one whose
/// columns are its slowest axis.
pub fn long_runs() -> Case {
    let dtype = rs_dtype_t { code: 4, bits: 16, lanes: 1 };
    let (rows, run) = (3, 33_000);
    let tensor = Tensor { name: "model.0.weight".into(), shape: vec![rows, 5, run], dtype, target: dtype, transform: 0, seed: 1 };
    let rank = |role: u32, columns: std::ops::Range<i64>, turned: bool| {
        let count = columns.end - columns.start;
        let stride = if turned { vec![run, rows * run, 1] } else { vec![count * run, run, 1] };
        let shape = if turned { vec![count, rows, run] } else { vec![rows, count, run] };
        let strides = vec![shape[1] * run, run, 1];
        let bytes = (rows * count * run) as usize * 2;
        let buffer = Buffer { name: "a".into(), role, padded: false, dtype, shape, strides, bytes, block: 0, at: 0 };
        let (view, origin, extent) = (vec![rows, 5, run], vec![0, columns.start, 0], vec![rows, count, run]);
        let tile = Tile { tensor: 0, buffer: 0, transform: 0, byte_offset: 0, view, origin, extent, stride };
        Rank { blocks: vec![bytes], listed: vec![0], buffers: vec![buffer], tiles: vec![tile], ..Rank::default() }
    };
    let sources = [rank(RS_SOURCE, 0..3, false), rank(RS_SOURCE, 3..5, false)];
    let targets = [rank(RS_TARGET, 1..5, false), rank(RS_TARGET, 0..5, true)];
    Case { seed: 0, tensors: vec![tensor], ranks: [sources, targets].concat() }
}
