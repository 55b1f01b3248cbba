//! Makes a valid case from a seed: any tensor cut, viewed, permuted, fused, padded, replicated and shared in any way that the header
//! allows, with every needed element somewhere at a source.

use super::model::{Buffer, Case, Rank, Tensor, Tile, dense, item};
use super::place::{Gaps, place};
use super::truth::Census;
use super::views::{Piece, chance, factors, review, whole};
use fastrand::Rng;
use reshard::abi::{RS_CONFIG_RELAY, RS_CONFIG_WATCHDOG, RS_SOURCE, RS_TARGET, RS_TRANSFORM_NONE, rs_dtype_t};

const BOTH: u32 = RS_SOURCE | RS_TARGET;
/// Staging memory, by peer, that every plan finds enough.
const LEAST_STAGING: u64 = 16384;
/// Most boxes of one role that a rank gets.
const MOST_PIECES: usize = 24;

/// The case of a seed, with `world` ranks if given. Low seeds modulo 4 are small cases.
pub fn case(seed: u64, world: Option<usize>) -> Case {
    let mut rng = Rng::with_seed(seed);
    let rng = &mut rng;
    let size = (seed % 4) as usize;
    let world = world.unwrap_or_else(|| rng.usize(1..=[2, 4, 6, 6][size]));
    let tensors = tensors(rng, size);
    let roles = roles(rng, world);
    let mut case = Case { seed, tensors, ranks: vec![Rank::default(); world] };
    for role in [RS_SOURCE, RS_TARGET] {
        let ranks: Vec<usize> = (0..world).filter(|&r| roles[r] & role != 0).collect();
        let mut pieces = vec![Vec::new(); world];
        for (t, tensor) in case.tensors.iter().enumerate() {
            let tiling = if role == RS_SOURCE { source_tiling } else { target_tiling };
            tiling(rng, &whole(t, &tensor.shape), &ranks, &mut pieces);
        }
        for r in ranks {
            let shared = role == RS_SOURCE && roles[r] == BOTH;
            bind_all(rng, &case.tensors, &mut case.ranks[r], std::mem::take(&mut pieces[r]), role, shared);
        }
    }
    for r in (0..world).filter(|&r| roles[r] == BOTH) {
        share_memory(rng, &case.tensors, &mut case.ranks[r]);
    }
    if chance(rng, 40) {
        prune(rng, &mut case);
    }
    let host_mode = rng.u32(0..3);
    // Some pass weights on, through more channels than they have peers.
    let relay_mode = chance(rng, 30);
    for rank in &mut case.ranks {
        finish(rng, rank, case.tensors.len());
        rank.host = if host_mode == 0 { 0 } else { rng.u64(if host_mode == 1 { 1 } else { 0 }..=2) };
        let most = if relay_mode { 16 } else { 1 } * world as u64;
        rank.staging = if chance(rng, 30) { 0 } else { LEAST_STAGING * rng.u64(most..=2 * most) };
        rank.threads = rng.u32(0..4);
        rank.lends = rank.staging > 0 && chance(rng, 30);
        rank.flags = if rng.u32(0..8) == 0 { RS_CONFIG_WATCHDOG } else { 0 };
        rank.flags |= if relay_mode && chance(rng, 60) { RS_CONFIG_RELAY } else { 0 };
    }
    case
}

fn tensors(rng: &mut Rng, size: usize) -> Vec<Tensor> {
    let most = [48, 400, 2000, 8000][size];
    let dtypes: Vec<rs_dtype_t> = (0..2).map(|_| dtype(rng)).collect();
    let mut all: Vec<Tensor> = Vec::new();
    for t in 0..rng.usize(1..=[1, 3, 4, 4][size]) {
        if chance(rng, 10) && t > 0 {
            // Tied to the one before: another logical tensor, equal values, one memory at some sources.
            let tied = Tensor { name: format!("model.{t}.tied"), ..all[t - 1].clone() };
            all.push(tied);
            continue;
        }
        let mut shape = Vec::new();
        for _ in 0..[rng.u32(0..=5), 5][usize::from(size == 3)] {
            let extent = *rng.choice(&[1, 2, 3, 4, 5, 6, 7, 8, 8, 9, 12, 12, 16, 24, 36]).expect("not empty");
            if shape.iter().product::<i64>() * extent <= most {
                shape.push(extent);
            }
        }
        let dtype = *rng.choice(&dtypes).expect("not empty");
        let (target, transform) = arrival(rng, dtype);
        all.push(Tensor { name: format!("model.{t}.weight"), shape, dtype, target, transform, seed: rng.u64(..) });
    }
    all
}

fn dtype(rng: &mut Rng) -> rs_dtype_t {
    let (code, bits) = *rng.choice(&[(0, 8), (1, 8), (4, 16), (2, 16), (2, 32), (2, 64), (5, 128)]).expect("not empty");
    rs_dtype_t { code, bits, lanes: 1 }
}

/// The type and transform of a tensor's targets: of floats often others.
fn arrival(rng: &mut Rng, dtype: rs_dtype_t) -> (rs_dtype_t, u32) {
    let floats = [(4, 16), (2, 16), (2, 32)].map(|(code, bits)| rs_dtype_t { code, bits, lanes: 1 });
    if !matches!((dtype.code, dtype.bits), (4, 16) | (2, 16) | (2, 32)) || rng.bool() {
        return (dtype, RS_TRANSFORM_NONE);
    }
    match rng.u32(0..3) {
        n @ 1.. => (floats[2], n),
        _ => (*rng.choice(&floats).expect("not empty"), RS_TRANSFORM_NONE),
    }
}

/// Each rank's role; at least one source and one target.
fn roles(rng: &mut Rng, world: usize) -> Vec<u32> {
    let mut roles: Vec<u32> = (0..world).map(|_| *rng.choice(&[0, RS_SOURCE, RS_TARGET, BOTH, BOTH]).expect("not empty")).collect();
    roles[rng.usize(0..world)] |= RS_SOURCE;
    roles[rng.usize(0..world)] |= RS_TARGET;
    roles
}

/// One full tiling, each box on one to three ranks, and parts of up to two others.
fn source_tiling(rng: &mut Rng, tensor: &Piece, ranks: &[usize], out: &mut [Vec<Piece>]) {
    for extra in 0..=rng.usize(0..3) {
        let parts = rng.usize(1..=6);
        for piece in review(rng, tensor.clone()).cut(rng, parts) {
            let copies = if extra == 0 { 1 + rng.usize(0..3) / 2 * rng.usize(1..3) } else { usize::from(rng.bool()) };
            for r in rng.choose_multiple(ranks.iter().copied(), copies) {
                if extra == 0 || out[r].len() < MOST_PIECES {
                    give(rng, &piece, &mut out[r]);
                }
            }
        }
    }
}

/// Boxes of one or two tilings, each wanted by some of the ranks, some twice.
fn target_tiling(rng: &mut Rng, tensor: &Piece, ranks: &[usize], out: &mut [Vec<Piece>]) {
    let wanted = *rng.choice(&[30, 60, 100]).expect("not empty");
    for _ in 0..=rng.usize(0..5) / 4 {
        let parts = rng.usize(1..=6);
        for piece in review(rng, tensor.clone()).cut(rng, parts) {
            for &r in ranks {
                let copies = u32::from(chance(rng, wanted)) + u32::from(chance(rng, 8));
                for _ in 0..copies {
                    if out[r].len() < MOST_PIECES {
                        give(rng, &piece, &mut out[r]);
                    }
                }
            }
        }
    }
}

/// A rank gets a box, in a view of its own.
fn give(rng: &mut Rng, piece: &Piece, out: &mut Vec<Piece>) {
    let packed = Piece { stride: dense(&piece.extent), ..piece.clone() };
    out.push(review(rng, packed));
}

/// Puts a rank's boxes of one role into buffers, one or several to a buffer. With `shared` some source buffers are targets too.
fn bind_all(rng: &mut Rng, tensors: &[Tensor], rank: &mut Rank, mut pieces: Vec<Piece>, role: u32, shared: bool) {
    if rng.bool() {
        rng.shuffle(&mut pieces);
    }
    while let Some(first) = pieces.pop() {
        let dtype = tensors[first.tensor].dtype_as(role);
        let mut group = vec![first];
        for _ in 0..rng.usize(0..4) {
            if pieces.last().is_some_and(|p| tensors[p.tensor].dtype_as(role) == dtype) {
                group.extend(pieces.pop());
            }
        }
        let both = shared && chance(rng, 20) && group.iter().all(|p| !tensors[p.tensor].converts());
        bind(rng, tensors, rank, group, if both { BOTH } else { role });
    }
}

/// One buffer, in a block of its own.
fn bind(rng: &mut Rng, tensors: &[Tensor], rank: &mut Rank, group: Vec<Piece>, role: u32) {
    let dtype = tensors[group[0].tensor].dtype_as(role);
    let item = item(dtype);
    let gaps = Gaps { frame: rng.bool(), pads: chance(rng, 30) };
    let (placed, region) = place(rng, group, gaps);
    let lead = if gaps.pads { rng.i64(0..4) } else { 0 };
    let exact = region.span == region.dims.iter().map(|d| d.0).product::<i64>();
    let (shape, strides) = if gaps.pads || exact && rng.bool() {
        let tail = if gaps.pads { rng.i64(0..4) } else { 0 };
        let shape = factors(rng, lead + region.span + tail);
        (shape.clone(), dense(&shape))
    } else {
        let mut dims = region.dims;
        rng.shuffle(&mut dims);
        dims.into_iter().unzip()
    };
    let index = rank.buffers.len();
    for placed in placed {
        let byte_offset = (lead + placed.offset) as u64 * item as u64;
        let tied = tensors.get(placed.piece.tensor + 1).filter(|t| t.seed == tensors[placed.piece.tensor].seed).is_some();
        if tied && role == RS_SOURCE && rng.bool() {
            let other = Piece { tensor: placed.piece.tensor + 1, ..placed.piece.clone() };
            rank.tiles.push(tile(rng, other, index, byte_offset));
        }
        let transform = if role == RS_TARGET { tensors[placed.piece.tensor].transform } else { RS_TRANSFORM_NONE };
        rank.tiles.push(Tile { transform, ..tile(rng, placed.piece, index, byte_offset) });
    }
    let bytes = extent_of(&shape, &strides) * item + if chance(rng, 20) { rng.usize(1..20) } else { 0 };
    rank.blocks.push(bytes);
    let (padded, block) = ((gaps.pads || chance(rng, 5)) && role & RS_TARGET != 0, rank.blocks.len() - 1);
    rank.buffers.push(Buffer { name: name(rank, role), role, padded, dtype, shape, strides, bytes, block, at: 0 });
}

/// The next free name: sources and targets of a rank often share names, as a trainer's and an engine's may.
fn name(rank: &Rank, role: u32) -> String {
    let count = rank.buffers.iter().filter(|b| b.role == role).count();
    if role == BOTH { format!("shared.{count:02}.w") } else { format!("layers.{count:02}.w") }
}

/// Elements from the first to the last of a strided box, both included.
fn extent_of(shape: &[i64], strides: &[i64]) -> usize {
    1 + shape.iter().zip(strides).map(|(e, s)| (e - 1) * s).sum::<i64>() as usize
}

/// The row of a placed box, in another view; strides of unit axes mean nothing and say so.
fn tile(rng: &mut Rng, piece: Piece, buffer: usize, byte_offset: u64) -> Tile {
    let p = review(rng, piece);
    let mut stride = p.stride;
    for (s, _) in stride.iter_mut().zip(&p.extent).filter(|(_, e)| **e == 1) {
        *s = *rng.choice(&[*s, *s, 0, 1, -3, i64::MAX]).expect("not empty");
    }
    Tile {
        tensor: p.tensor,
        buffer,
        transform: RS_TRANSFORM_NONE,
        byte_offset,
        view: p.view,
        origin: p.origin,
        extent: p.extent,
        stride,
    }
}

/// A second row of the other role over a part of some buffers' memory: the same elements at the same addresses.
fn share_memory(rng: &mut Rng, tensors: &[Tensor], rank: &mut Rank) {
    let tied = |t: usize| tensors.iter().filter(|x| x.seed == tensors[t].seed).count() > 1;
    for old in rank.tiles.clone() {
        let parent = rank.buffers[old.buffer].clone();
        if parent.role == BOTH || tied(old.tensor) || tensors[old.tensor].converts() || !chance(rng, 12) {
            continue;
        }
        let Tile { tensor, view, origin, extent, mut stride, .. } = old.clone();
        stride.iter_mut().zip(&extent).filter(|(_, e)| **e == 1).for_each(|(s, _)| *s = 1);
        let parts = rng.usize(1..4);
        let boxes = Piece { tensor, view, origin, extent, stride }.cut(rng, parts);
        let part = rng.choice(boxes).expect("at least one");
        let before: i64 = (0..part.view.len()).map(|j| (part.origin[j] - old.origin[j]) * part.stride[j]).sum();
        let item = item(parent.dtype);
        let mut dims: Vec<(i64, i64)> = part.extent.iter().copied().zip(part.stride.iter().copied()).filter(|d| d.0 > 1).collect();
        rng.shuffle(&mut dims);
        let (shape, strides): (Vec<i64>, Vec<i64>) = dims.into_iter().unzip();
        let role = BOTH ^ parent.role;
        let at = parent.at + old.byte_offset as usize + before as usize * item;
        let bytes = extent_of(&shape, &strides) * item;
        let row = Buffer { name: name(rank, role), role, padded: false, shape, strides, bytes, at, ..parent };
        rank.tiles.push(tile(rng, part, rank.buffers.len(), 0));
        rank.buffers.push(row);
    }
}

/// Takes away some source tiles that nobody needs or that others hold too.
fn prune(rng: &mut Rng, case: &mut Case) {
    let mut census = Census::new(case);
    for r in 0..case.ranks.len() {
        let rank = &mut case.ranks[r];
        for t in (0..rank.tiles.len()).rev() {
            let tile = &rank.tiles[t];
            let (source, item) = (rank.buffers[tile.buffer].role == RS_SOURCE, case.tensors[tile.tensor].item());
            let elements = tile.elements(item);
            let spare = |&(e, _): &(usize, usize)| census.sources[tile.tensor][e] > 1 || census.needs[tile.tensor][e] == 0;
            if source && chance(rng, 50) && elements.iter().all(spare) {
                elements.iter().for_each(|&(e, _)| census.sources[tile.tensor][e] -= 1);
                rank.tiles.remove(t);
            }
        }
    }
}

/// Rows in any order, and more tensors in the table than this rank has.
fn finish(rng: &mut Rng, rank: &mut Rank, tensors: usize) {
    let mut order: Vec<usize> = (0..rank.buffers.len()).collect();
    rng.shuffle(&mut order);
    rank.buffers = order.iter().map(|&b| rank.buffers[b].clone()).collect();
    for tile in &mut rank.tiles {
        tile.buffer = order.iter().position(|&b| b == tile.buffer).expect("a permutation");
    }
    rng.shuffle(&mut rank.tiles);
    rank.listed = (0..tensors).filter(|&t| rank.tiles.iter().any(|x| x.tensor == t) || chance(rng, 15)).collect();
    rng.shuffle(&mut rank.listed);
}
