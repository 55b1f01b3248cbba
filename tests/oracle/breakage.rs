//! Makes a valid case wrong in one way, and says how the library must answer.

use super::generate;
use super::model::{Buffer, Case, Tensor, Tile};
use super::truth::held;
use fastrand::Rng;
use reshard::abi::*;

/// How a case was broken.
pub struct Broken {
    pub what: &'static str,
    /// The rank whose own tables show it, so that its create may refuse them already.
    pub own: Option<usize>,
    /// One of these is the status.
    pub statuses: &'static [rs_status_t],
    /// Of each list one must occur in the text.
    pub words: Vec<Vec<String>>,
}

/// A table that is wrong in itself; what is not even a number of the right kind may be called an invalid argument.
const WRONG: &[rs_status_t] = &[RS_ERR_LAYOUT];
const SENSELESS: &[rs_status_t] = &[RS_ERR_LAYOUT, RS_ERR_INVALID];

type Way = fn(&mut Rng, &mut Case) -> Option<Broken>;
const WAYS: [Way; 13] =
    [uncovered, overlap, second_row, out_of_bounds, hole, shape, dtype, transform, stride, crossed, view, index, misaligned];

/// A valid case of the seed, then the same broken in one of the ways.
pub fn case(seed: u64) -> (Case, Case, Broken) {
    let mut rng = Rng::with_seed(seed ^ 0xB0_17_E5);
    for attempt in 0.. {
        let valid = generate::case(seed + (attempt << 40), None);
        let mut case = valid.clone();
        for _ in 0..4 {
            let way = *rng.choice(&WAYS).expect("not empty");
            if let Some(broken) = way(&mut rng, &mut case) {
                return (valid, case, broken);
            }
        }
    }
    unreachable!("some way fits some case")
}

/// A random tile of some rank for which `fits` holds: (rank, row).
fn any_tile(rng: &mut Rng, case: &Case, fits: impl Fn(&Buffer, &Tile) -> bool) -> Option<(usize, usize)> {
    let rows = case.ranks.iter().enumerate().flat_map(|(r, rank)| (0..rank.tiles.len()).map(move |t| (r, t)));
    let fitting = rows.filter(|&(r, t)| fits(&case.ranks[r].buffers[case.ranks[r].tiles[t].buffer], &case.ranks[r].tiles[t]));
    rng.choice(fitting.collect::<Vec<_>>())
}

fn own(what: &'static str, rank: usize, statuses: &'static [rs_status_t], words: &[&str]) -> Option<Broken> {
    let words = words.iter().map(|w| vec![w.to_string()]).collect();
    Some(Broken { what, own: Some(rank), statuses, words })
}

/// One element that a target wants loses all its sources.
fn uncovered(rng: &mut Rng, case: &mut Case) -> Option<Broken> {
    let (r, t) = any_tile(rng, case, |b, _| b.role == RS_TARGET)?;
    let tile = case.ranks[r].tiles[t].clone();
    let (lost, _) = rng.choice(tile.elements(1))?;
    let has = |rank: &super::model::Rank, x: &Tile| {
        x.tensor == tile.tensor && rank.buffers[x.buffer].role & RS_SOURCE != 0 && x.elements(1).iter().any(|e| e.0 == lost)
    };
    if case.ranks.iter().any(|k| k.tiles.iter().any(|x| k.buffers[x.buffer].role & RS_TARGET != 0 && has(k, x))) {
        return None;
    }
    for rank in &mut case.ranks {
        let keep: Vec<bool> = rank.tiles.iter().map(|x| !has(rank, x)).collect();
        let mut keep = keep.into_iter();
        rank.tiles.retain(|_| keep.next().expect("one for each"));
    }
    // More may have lost its sources with it: any of those may be named.
    let mut names = Vec::new();
    let sources: Vec<Vec<Vec<u32>>> = (0..case.ranks.len()).map(|k| held(case, k, RS_SOURCE)).collect();
    for rank in &case.ranks {
        for x in rank.tiles_of(RS_TARGET).filter(|x| x.tensor == tile.tensor) {
            if x.elements(1).iter().any(|&(e, _)| sources.iter().all(|s| s[x.tensor][e] == 0)) {
                names.push(rank.buffers[x.buffer].name.clone());
            }
        }
    }
    let words = vec![names, vec![case.tensors[tile.tensor].name.clone()]];
    Some(Broken { what: "an element without a source", own: None, statuses: &[RS_ERR_COVERAGE], words })
}

/// A target tile twice at one place.
fn overlap(rng: &mut Rng, case: &mut Case) -> Option<Broken> {
    let (r, t) = any_tile(rng, case, |b, _| b.role & RS_TARGET != 0)?;
    let tile = case.ranks[r].tiles[t].clone();
    let name = case.ranks[r].buffers[tile.buffer].name.clone();
    let at = rng.usize(0..=case.ranks[r].tiles.len());
    case.ranks[r].tiles.insert(at, tile);
    own("two target tiles at one place", r, WRONG, &[&name])
}

/// A target buffer twice in the table, under two names.
fn second_row(rng: &mut Rng, case: &mut Case) -> Option<Broken> {
    let (r, t) = any_tile(rng, case, |b, _| b.role & RS_TARGET != 0)?;
    let rank = &mut case.ranks[r];
    let old = rank.tiles[t].buffer;
    let name = rank.buffers[old].name.clone();
    let new = rank.buffers.len();
    rank.buffers.push(Buffer { name: "again.w".into(), role: RS_TARGET, ..rank.buffers[old].clone() });
    let tiles: Vec<Tile> = rank.tiles.iter().filter(|x| x.buffer == old).map(|x| Tile { buffer: new, ..x.clone() }).collect();
    rank.tiles.extend(tiles);
    own("two target buffers at one place", r, WRONG, &[&name, "again.w"])
}

/// A tile moved by as little as puts its last element out of its buffer.
fn out_of_bounds(rng: &mut Rng, case: &mut Case) -> Option<Broken> {
    let (r, t) = any_tile(rng, case, |_, _| true)?;
    let tile = &case.ranks[r].tiles[t];
    let buffer = &case.ranks[r].buffers[tile.buffer];
    let item = case.ranks[r].buffers[tile.buffer].dtype.bits as usize / 8;
    let end = tile.elements(item).iter().map(|e| e.1 + item).max().expect("an element");
    let name = buffer.name.clone();
    let shift = (buffer.bytes - end) / item + 1;
    case.ranks[r].tiles[t].byte_offset += (shift * item) as u64;
    own("a tile out of its buffer by one element", r, WRONG, &[&name])
}

/// A target buffer, not flagged padded, loses a tile.
fn hole(rng: &mut Rng, case: &mut Case) -> Option<Broken> {
    let (r, t) = any_tile(rng, case, |b, _| b.role & RS_TARGET != 0 && !b.padded)?;
    let tile = case.ranks[r].tiles.remove(t);
    own("an element of a target in no tile", r, WRONG, &[&case.ranks[r].buffers[tile.buffer].name.clone()])
}

/// Two ranks give one tensor two shapes of equal size.
fn shape(rng: &mut Rng, case: &mut Case) -> Option<Broken> {
    let (r, t) = any_tile(rng, case, |_, _| true)?;
    let old = case.ranks[r].tiles[t].tensor;
    if !case.ranks.iter().enumerate().any(|(k, rank)| k != r && rank.tiles.iter().any(|x| x.tensor == old)) {
        return None;
    }
    let mut shape = case.tensors[old].shape.clone();
    shape.reverse();
    if shape == case.tensors[old].shape {
        shape.insert(rng.usize(0..=shape.len()), 1);
    }
    let new = case.tensors.len();
    case.tensors.push(Tensor { shape, ..case.tensors[old].clone() });
    let rank = &mut case.ranks[r];
    rank.listed.iter_mut().filter(|l| **l == old).for_each(|l| *l = new);
    rank.tiles.iter_mut().filter(|x| x.tensor == old).for_each(|x| x.tensor = new);
    let words = vec![vec![case.tensors[old].name.clone()]];
    Some(Broken { what: "one tensor with two shapes", own: None, statuses: &[RS_ERR_MISMATCH], words })
}

/// A target wants an element type that its source's cannot become; the size is the same.
fn dtype(rng: &mut Rng, case: &mut Case) -> Option<Broken> {
    let (r, t) = any_tile(rng, case, |b, _| b.role == RS_TARGET)?;
    let b = case.ranks[r].tiles[t].buffer;
    let rank = &mut case.ranks[r];
    let buffer = &mut rank.buffers[b];
    buffer.dtype.code = match (buffer.dtype.code, buffer.dtype.bits) {
        (0, 8) => 1,
        (0, _) => 1,
        _ => 0,
    };
    rank.tiles.iter_mut().filter(|x| x.buffer == b).for_each(|x| x.transform = 0);
    let tensors = rank.tiles.iter().filter(|x| x.buffer == b).map(|x| case.tensors[x.tensor].name.clone());
    let words = vec![tensors.collect(), vec![rank.buffers[b].name.clone()]];
    Some(Broken {
        what: "another element type than the source",
        own: Some(r),
        statuses: &[RS_ERR_MISMATCH, RS_ERR_LAYOUT, RS_ERR_UNSUPPORTED],
        words,
    })
}

/// A transform that is not built.
fn transform(rng: &mut Rng, case: &mut Case) -> Option<Broken> {
    let (r, t) = any_tile(rng, case, |_, _| true)?;
    case.ranks[r].tiles[t].transform = 7;
    own("a transform", r, &[RS_ERR_UNSUPPORTED], &["transform"])
}

/// A stride of zero or less where it counts.
fn stride(rng: &mut Rng, case: &mut Case) -> Option<Broken> {
    let (r, t) = any_tile(rng, case, |_, x| x.extent.iter().any(|&e| e > 1))?;
    let tile = &mut case.ranks[r].tiles[t];
    let axis = tile.extent.iter().position(|&e| e > 1)?;
    tile.stride[axis] = *rng.choice(&[0, -1, -tile.stride[axis], i64::MIN])?;
    own("a stride of zero or less", r, SENSELESS, &["stride"])
}

/// A target lies where a source has another element.
fn crossed(rng: &mut Rng, case: &mut Case) -> Option<Broken> {
    let (r, t) = any_tile(rng, case, |b, x| b.role == RS_SOURCE && x.extent.iter().product::<i64>() > 1)?;
    let tile = case.ranks[r].tiles[t].clone();
    let parent = case.ranks[r].buffers[tile.buffer].clone();
    let elements = tile.elements(parent.dtype.bits as usize / 8);
    let (wanted, place) = (elements[0].0, elements[elements.len() - 1].1);
    let rank = &mut case.ranks[r];
    let item = parent.dtype.bits as usize / 8;
    let count = case.tensors[tile.tensor].len() as i64;
    rank.tiles.push(Tile {
        buffer: rank.buffers.len(),
        byte_offset: 0,
        view: vec![count],
        origin: vec![wanted as i64],
        extent: vec![1],
        stride: vec![1],
        ..tile
    });
    let at = parent.at + place;
    let there = rank.buffers.iter().filter(|b| b.block == parent.block).map(|b| b.name.clone()).collect();
    let (shape, strides) = (vec![1], vec![1]);
    rank.buffers.push(Buffer {
        name: "crossed.w".into(),
        role: RS_TARGET,
        padded: false,
        shape,
        strides,
        bytes: item,
        at,
        ..parent
    });
    let words = vec![there, vec!["crossed.w".into()]];
    Some(Broken { what: "a target over another element of a source", own: Some(r), statuses: WRONG, words })
}

/// A view or a box that is not one of the tensor.
fn view(rng: &mut Rng, case: &mut Case) -> Option<Broken> {
    let (r, t) = any_tile(rng, case, |_, x| !x.view.is_empty())?;
    let tile = &mut case.ranks[r].tiles[t];
    let axis = rng.usize(0..tile.view.len());
    match rng.u32(0..5) {
        0 => tile.view[axis] += 1,
        1 => tile.origin[axis] = tile.view[axis] - tile.extent[axis] + 1,
        2 => tile.origin[axis] = -1,
        3 => tile.extent[axis] = *rng.choice(&[0, -1, i64::MIN])?,
        _ => tile.extent[axis] = i64::MAX,
    }
    own("a box that is not in the tensor", r, SENSELESS, &[])
}

/// A row that does not exist.
fn index(rng: &mut Rng, case: &mut Case) -> Option<Broken> {
    let (r, t) = any_tile(rng, case, |_, _| true)?;
    let rank = &mut case.ranks[r];
    if rng.bool() {
        let tensor = rank.tiles[t].tensor;
        rank.listed.retain(|&l| l != tensor);
        return own("a tile of a tensor that is not in the table", r, SENSELESS, &["tensor"]);
    }
    rank.buffers[rank.tiles[t].buffer].role = 4;
    own("a role that is none", r, SENSELESS, &["role"])
}

/// A byte offset between two elements.
fn misaligned(rng: &mut Rng, case: &mut Case) -> Option<Broken> {
    let (r, t) = any_tile(rng, case, |b, _| b.dtype.bits > 8)?;
    case.ranks[r].tiles[t].byte_offset += 1;
    own("a byte offset between two elements", r, SENSELESS, &["offset"])
}
