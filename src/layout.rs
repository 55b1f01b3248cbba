//! One rank's tables: tensors, buffers, tiles, and all that can be wrong with them before any other rank is asked.
//!
//! Knows names, shapes and addresses as numbers. Must not know other ranks, nor touch memory.
#![forbid(unsafe_code)]

use crate::abi::*;
use crate::convert::Convert;
use crate::error::{Error, Result, bail, err};
use crate::geom::{Axis, Index, Pattern, Radix};
use std::collections::{BTreeSet, HashMap};

/// A tensor as the caller gave it.
#[derive(Clone, Debug)]
pub struct TensorRow {
    /// Hugging Face name.
    pub name: String,
    /// Extents.
    pub shape: Vec<i64>,
}

/// A buffer as the caller gave it.
#[derive(Clone, Debug)]
pub struct BufferRow {
    /// The framework's parameter name.
    pub name: String,
    /// Address of the first element.
    pub addr: u64,
    /// Bytes that belong to it.
    pub bytes: u64,
    /// DLPack device type.
    pub device_type: i32,
    /// DLPack device id.
    pub device_id: i32,
    /// `RS_SOURCE | RS_TARGET`.
    pub role: u32,
    /// `RS_BUFFER_*`.
    pub flags: u32,
    /// Element type.
    pub dtype: rs_dtype_t,
    /// Extents.
    pub shape: Vec<i64>,
    /// Strides in elements.
    pub strides: Vec<i64>,
}

/// A tile as the caller gave it; the first `rank` entries of the arrays count.
#[derive(Clone, Copy, Debug)]
pub struct TileRow {
    /// Row of the tensor table.
    pub tensor: u32,
    /// Row of the buffer table.
    pub buffer: u32,
    /// Axes of the view.
    pub rank: u32,
    /// `RS_TRANSFORM_*`.
    pub transform: u32,
    /// Bytes to the first element.
    pub byte_offset: u64,
    /// Reshape of the tensor.
    pub view: [i64; RS_MAX_RANK],
    /// First index on each axis.
    pub origin: [i64; RS_MAX_RANK],
    /// Indices on each axis.
    pub extent: [i64; RS_MAX_RANK],
    /// Elements of the buffer from one index to the next.
    pub stride: [i64; RS_MAX_RANK],
}

/// A logical tensor.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Tensor {
    /// Hugging Face name.
    pub name: String,
    /// Extents.
    pub shape: Vec<u64>,
    /// Their product.
    pub elements: u64,
}

/// A checked buffer.
#[derive(Clone, Debug)]
pub struct Buffer {
    /// The framework's parameter name.
    pub name: String,
    /// Address of the first element.
    pub addr: u64,
    /// Bytes that belong to it.
    pub bytes: u64,
    /// DLPack device type.
    pub device_type: i32,
    /// DLPack device id.
    pub device_id: i32,
    /// `RS_SOURCE | RS_TARGET`.
    pub role: u32,
    /// Elements in no tile are allowed.
    pub padded: bool,
    /// Element type.
    pub dtype: rs_dtype_t,
    /// Bytes of an element.
    pub item: u32,
    /// Extents.
    pub shape: Vec<i64>,
    /// Strides in elements.
    pub strides: Vec<i64>,
}

/// A checked tile. Its pattern's `key` counts elements of the tensor, its `val` elements of the buffer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Tile {
    /// Index of the tensor.
    pub tensor: u32,
    /// Index of the buffer.
    pub buffer: u32,
    /// What lies where, coalesced.
    pub pattern: Pattern,
    /// `RS_TRANSFORM_*`; of a source `RS_TRANSFORM_NONE`.
    pub transform: u32,
}

/// One rank's checked tables.
#[derive(Clone, Debug, Default)]
pub struct Layout {
    tensors: Vec<Tensor>,
    buffers: Vec<Buffer>,
    tiles: Vec<Tile>,
}

impl Layout {
    /// Checks everything that one rank can check alone; an error (RS_ERR_INVALID, RS_ERR_UNSUPPORTED or RS_ERR_LAYOUT) names the
    /// row, and the box where there is one.
    pub fn new(tensors: &[TensorRow], buffers: &[BufferRow], tiles: &[TileRow]) -> Result<Layout> {
        let mut seen = HashMap::new();
        let mut out = Layout::default();
        for (i, row) in tensors.iter().enumerate() {
            if let Some(first) = seen.insert(row.name.as_str(), i) {
                bail!(RS_ERR_INVALID, "tensors[{i}]: '{}' is already tensors[{first}]", row.name);
            }
            out.tensors.push(tensor(row).map_err(|e| e.context(format_args!("tensors[{i}] '{}'", row.name)))?);
        }
        for (i, row) in buffers.iter().enumerate() {
            out.buffers.push(buffer(row).map_err(|e| e.context(format_args!("buffers[{i}] '{}'", row.name)))?);
        }
        for (i, row) in tiles.iter().enumerate() {
            let name = |e: Error| match buffers.get(row.buffer as usize) {
                Some(b) => e.context(format_args!("tiles[{i}] of '{}'", b.name)),
                None => e.context(format_args!("tiles[{i}]")),
            };
            out.tiles.push(out.tile(row).map_err(name)?);
        }
        out.check_cover()?;
        out.check_overlap()?;
        Ok(out)
    }

    /// Tensors in row order.
    pub fn tensors(&self) -> &[Tensor] {
        &self.tensors
    }

    /// Buffers in row order.
    pub fn buffers(&self) -> &[Buffer] {
        &self.buffers
    }

    /// Tiles in row order.
    pub fn tiles(&self) -> &[Tile] {
        &self.tiles
    }

    /// Whether `other` differs from this layout in addresses at most: then plans stay valid.
    pub fn same_boxes(&self, other: &Layout) -> bool {
        let same = |a: &Buffer, b: &Buffer| {
            (&a.name, a.device_type, a.device_id, a.role, a.padded, a.dtype, &a.shape, &a.strides)
                == (&b.name, b.device_type, b.device_id, b.role, b.padded, b.dtype, &b.shape, &b.strides)
        };
        self.tensors == other.tensors
            && self.tiles == other.tiles
            && self.buffers.len() == other.buffers.len()
            && self.buffers.iter().zip(&other.buffers).all(|(a, b)| same(a, b))
    }

    fn tile(&self, row: &TileRow) -> Result<Tile> {
        let Some(tensor) = self.tensors.get(row.tensor as usize) else {
            bail!(RS_ERR_INVALID, "tensor is {}, but the tensor table has {} rows", row.tensor, self.tensors.len());
        };
        let Some(buffer) = self.buffers.get(row.buffer as usize) else {
            bail!(RS_ERR_INVALID, "buffer is {}, but the buffer table has {} rows", row.buffer, self.buffers.len());
        };
        if row.transform != RS_TRANSFORM_NONE {
            let dtype = (buffer.dtype.code, buffer.dtype.bits);
            Convert::between(dtype, dtype, row.transform)?;
            if buffer.role != RS_TARGET {
                bail!(
                    RS_ERR_INVALID,
                    "transform {}: only a target's tiles have one, and no source may share their memory",
                    row.transform
                );
            }
        }
        let n = row.rank as usize;
        if n > RS_MAX_RANK {
            bail!(RS_ERR_INVALID, "rank is {n}, at most {RS_MAX_RANK} is possible");
        }
        let (view, origin, extent, stride) = (&row.view[..n], &row.origin[..n], &row.extent[..n], &row.stride[..n]);
        if elements(view)? != tensor.elements {
            bail!(
                RS_ERR_INVALID,
                "view {view:?} is no reshape of '{}' {:?}: it has {} elements instead of {}",
                tensor.name,
                tensor.shape,
                elements(view)?,
                tensor.elements
            );
        }
        let shown = || format!("box {} of '{}'", ranges(origin, extent), tensor.name);
        if row.byte_offset % u64::from(buffer.item) != 0 {
            bail!(RS_ERR_INVALID, "byte_offset {} is no multiple of the item size {}", row.byte_offset, buffer.item);
        }
        let mut pattern = Pattern { key: 0, val: row.byte_offset / u64::from(buffer.item), ..Pattern::default() };
        let mut weight = 1u64;
        for i in (0..n).rev() {
            if origin[i] < 0 || extent[i] < 1 || extent[i] > view[i] || origin[i] > view[i] - extent[i] {
                bail!(RS_ERR_INVALID, "{} does not lie in its view {view:?} (leave out a tile without elements)", shown());
            }
            if extent[i] > 1 && stride[i] < 1 {
                bail!(RS_ERR_INVALID, "{}: stride[{i}] is {}, it must be at least 1", shown(), stride[i]);
            }
            // Inside the view, whose elements were counted without overflow.
            pattern.key += origin[i] as u64 * weight;
            if extent[i] > 1 {
                pattern.axes.push(Axis { extent: extent[i] as u64, key: weight, val: stride[i] as u64 });
            }
            weight *= view[i] as u64;
        }
        let last = span(pattern.val, pattern.axes.iter().map(|a| (a.extent, a.val)));
        let end = last.and_then(|l| l.checked_add(1)?.checked_mul(u64::from(buffer.item)));
        if end.is_none_or(|end| end > buffer.bytes) {
            let end = end.map_or("a number beyond 2^64".to_string(), |e| e.to_string());
            bail!(RS_ERR_LAYOUT, "{} ends at byte {end} of a buffer of {} bytes", shown(), buffer.bytes);
        }
        let pattern = pattern.coalesce();
        if !pattern.flip().nests() {
            bail!(
                RS_ERR_LAYOUT,
                "{} with strides {stride:?}: strides must nest (sorted, each at least the next one times its extent)",
                shown()
            );
        }
        Ok(Tile { tensor: row.tensor, buffer: row.buffer, pattern, transform: row.transform })
    }

    /// Every tile lies on elements of its buffer; every element of a target buffer lies in a tile.
    fn check_cover(&self) -> Result<()> {
        let mut covered = vec![0u64; self.buffers.len()];
        let grids: Vec<Option<Pattern>> = self.buffers.iter().map(Buffer::gaps).collect();
        for tile in &self.tiles {
            let buffer = &self.buffers[tile.buffer as usize];
            let inside = match &grids[tile.buffer as usize] {
                // Without gaps, the elements are the numbers from 0.
                None => tile.pattern.val_end() <= buffer.elements(),
                Some(grid) => common(&tile.pattern.flip(), grid)? == tile.pattern.volume(),
            };
            if !inside {
                bail!(
                    RS_ERR_LAYOUT,
                    "buffer '{}' (shape {:?}, strides {:?}): its tile of '{}' holds elements that are not its own",
                    buffer.name,
                    buffer.shape,
                    buffer.strides,
                    self.tensors[tile.tensor as usize].name
                );
            }
            let sum = &mut covered[tile.buffer as usize];
            *sum = sum.saturating_add(tile.pattern.volume());
        }
        for (buffer, &covered) in self.buffers.iter().zip(&covered) {
            // More than all is an overlap: check_overlap names the tiles.
            if buffer.role & RS_TARGET != 0 && !buffer.padded && covered < buffer.elements() {
                bail!(
                    RS_ERR_LAYOUT,
                    "target buffer '{}' has {} elements, its tiles cover {covered}: the others would keep their old values; give the \
                     missing tiles, or flag the buffer RS_BUFFER_PADDED",
                    buffer.name,
                    buffer.elements()
                );
            }
        }
        Ok(())
    }

    /// No two target tiles share an element; a source and a target tile do only where both name the same element at the same address.
    fn check_overlap(&self) -> Result<()> {
        let mut all: Vec<(u64, u64, usize)> = Vec::with_capacity(self.tiles.len());
        for (i, t) in self.tiles.iter().enumerate() {
            let b = &self.buffers[t.buffer as usize];
            let item = u64::from(b.item);
            all.push((b.addr + t.pattern.val * item, b.addr + t.pattern.val_end() * item, i));
        }
        all.sort_unstable();
        // Clusters of tiles whose spans of memory chain; within one, only boxes that meet are looked at more closely.
        let mut rest = &all[..];
        while let Some(&(_, mut far, _)) = rest.first() {
            let mut n = 1;
            while n < rest.len() && rest[n].0 < far {
                far = far.max(rest[n].1);
                n += 1;
            }
            if n > 1 {
                self.check_cluster(&rest[..n])?;
            }
            rest = &rest[n..];
        }
        Ok(())
    }

    fn check_cluster(&self, cluster: &[(u64, u64, usize)]) -> Result<()> {
        let base = cluster[0].0;
        let patterns: Vec<Pattern> = cluster
            .iter()
            .map(|c| {
                let tile = &self.tiles[c.2];
                // The buffer may begin before the cluster: count from the tile's own first byte.
                Pattern { key: c.0 - base, ..in_bytes(tile, &self.buffers[tile.buffer as usize]) }
            })
            .collect();
        let end = patterns.iter().map(Pattern::key_end).max().unwrap_or(0);
        let radix = Radix::new(end, patterns.iter().flat_map(|p| p.axes.iter().map(|a| a.key)));
        let mut regions = vec![];
        let mut of = vec![];
        for (pattern, c) in patterns.iter().zip(cluster) {
            for patch in pattern.patches(&radix).ok_or_else(incomparable)? {
                regions.push(patch.region);
                of.push(c.2);
            }
        }
        let index = Index::new(regions.iter());
        let mut pairs = BTreeSet::new();
        for (region, &i) in regions.iter().zip(&of) {
            pairs.extend(
                index.meeting(region).into_iter().map(|m| of[m]).filter(|&j| j > i && self.may_clash(i, j)).map(|j| (i, j)),
            );
        }
        pairs.into_iter().try_for_each(|(i, j)| self.check_pair(i, j))
    }

    /// Whether two tiles may not simply share memory: one is a target.
    fn may_clash(&self, i: usize, j: usize) -> bool {
        let role = |t: usize| self.buffers[self.tiles[t].buffer as usize].role;
        (role(i) | role(j)) & RS_TARGET != 0
    }

    fn check_pair(&self, i: usize, j: usize) -> Result<()> {
        let (ti, tj) = (&self.tiles[i], &self.tiles[j]);
        let (bi, bj) = (&self.buffers[ti.buffer as usize], &self.buffers[tj.buffer as usize]);
        let both = bi.role & bj.role;
        let at = |t: &Tile, b: &Buffer| b.addr + t.pattern.val * u64::from(b.item);
        let base = at(ti, bi).min(at(tj, bj));
        let placed = |t, b| Pattern { key: at(t, b) - base, ..in_bytes(t, b) };
        let shared = common(&placed(ti, bi), &placed(tj, bj))?;
        let (ni, nj) = (&self.tensors[ti.tensor as usize].name, &self.tensors[tj.tensor as usize].name);
        if both & RS_TARGET != 0 {
            bail!(
                RS_ERR_LAYOUT,
                "target buffers '{}' (tiles[{i}], tensor '{ni}') and '{}' (tiles[{j}], tensor '{nj}') share {shared} bytes: an element \
                 can be the target of one tile only",
                bi.name,
                bj.name
            );
        }
        let alike = bi.dtype == bj.dtype && ti.transform == tj.transform;
        let aliased = if ti.tensor == tj.tensor && alike { self.aliased(ti, tj)? * u64::from(bi.item) } else { 0 };
        if shared != aliased {
            bail!(
                RS_ERR_LAYOUT,
                "buffers '{}' (tiles[{i}], tensor '{ni}') and '{}' (tiles[{j}], tensor '{nj}'), one a source and one a target, share \
                 {shared} bytes, {aliased} of them for the same elements: memory may be shared only where both name the same element \
                 at the same address",
                bi.name,
                bj.name
            );
        }
        Ok(())
    }

    /// Elements that two tiles of one tensor hold at the same address.
    fn aliased(&self, a: &Tile, b: &Tile) -> Result<u64> {
        let total = self.tensors[a.tensor as usize].elements;
        let radix = Radix::new(total, a.pattern.axes.iter().chain(&b.pattern.axes).map(|x| x.key));
        let addr = |t: &Tile, o: u64| {
            let buffer = &self.buffers[t.buffer as usize];
            buffer.addr + o * u64::from(buffer.item)
        };
        let mut sum = 0;
        let patches_b = b.pattern.patches(&radix).ok_or_else(incomparable)?;
        for pa in a.pattern.patches(&radix).ok_or_else(incomparable)? {
            for pb in &patches_b {
                if let Some(m) = pa.region.meet(&pb.region) {
                    let same = (0..m.len.len()).all(|i| m.len[i] == 1 || pa.stride[i] == pb.stride[i]);
                    if same && addr(a, pa.offset_of(&m)) == addr(b, pb.offset_of(&m)) {
                        sum += m.volume();
                    }
                }
            }
        }
        Ok(sum)
    }
}

impl Buffer {
    /// Number of elements.
    pub fn elements(&self) -> u64 {
        self.shape.iter().map(|&n| n as u64).product()
    }

    /// Its elements as a pattern over their distance from the first; `None` if they are the first so many numbers, without gaps.
    fn gaps(&self) -> Option<Pattern> {
        let axes = self.shape.iter().zip(&self.strides).map(|(&n, &s)| Axis { extent: n as u64, key: s as u64, val: 0 });
        let grid = Pattern { key: 0, val: 0, axes: axes.collect() }.coalesce();
        (grid.key_end() != grid.volume()).then_some(grid)
    }
}

/// Bytes of an element, or why the type is refused.
pub fn item_size(dtype: rs_dtype_t) -> Result<u32> {
    match (dtype.lanes, dtype.bits) {
        (1, 8 | 16 | 32 | 64 | 128) => Ok(u32::from(dtype.bits) / 8),
        _ => bail!(
            RS_ERR_UNSUPPORTED,
            "dtype (code {}, bits {}, lanes {}): an element must have 8, 16, 32, 64 or 128 bits and one lane",
            dtype.code,
            dtype.bits,
            dtype.lanes
        ),
    }
}

/// `[lo:hi, ...]`.
pub fn ranges(origin: &[i64], extent: &[i64]) -> String {
    let parts: Vec<String> = origin.iter().zip(extent).map(|(&o, &e)| format!("{o}:{}", o.saturating_add(e))).collect();
    format!("[{}]", parts.join(", "))
}

fn elements(shape: &[i64]) -> Result<u64> {
    let mut n = 1i64;
    for &e in shape {
        if e < 1 {
            bail!(RS_ERR_INVALID, "extents {shape:?}: each must be at least 1");
        }
        n = n.checked_mul(e).ok_or_else(|| err!(RS_ERR_INVALID, "extents {shape:?}: their product is beyond 2^63"))?;
    }
    Ok(n as u64)
}

/// Number of the last element of a grid, unless it is beyond 2^64.
fn span(first: u64, axes: impl Iterator<Item = (u64, u64)>) -> Option<u64> {
    axes.map(|(extent, step)| (extent - 1).checked_mul(step)).try_fold(first, |sum, s| sum.checked_add(s?))
}

fn tensor(row: &TensorRow) -> Result<Tensor> {
    if row.name.is_empty() {
        bail!(RS_ERR_INVALID, "a tensor needs a name");
    }
    let elements = elements(&row.shape)?;
    Ok(Tensor { name: row.name.clone(), shape: row.shape.iter().map(|&n| n as u64).collect(), elements })
}

fn buffer(row: &BufferRow) -> Result<Buffer> {
    if row.name.is_empty() {
        bail!(RS_ERR_INVALID, "a buffer needs a name");
    }
    if row.role == 0 || row.role & !(RS_SOURCE | RS_TARGET) != 0 {
        bail!(RS_ERR_INVALID, "role is {}, it must be RS_SOURCE (1), RS_TARGET (2) or both (3)", row.role);
    }
    if row.flags & !RS_BUFFER_PADDED != 0 {
        bail!(RS_ERR_INVALID, "flags {:#x} are unknown", row.flags & !RS_BUFFER_PADDED);
    }
    let item = item_size(row.dtype)?;
    elements(&row.shape)?;
    if row.addr == 0 || row.addr.checked_add(row.bytes).is_none() {
        bail!(RS_ERR_INVALID, "{} bytes at {:#x} are no block of memory", row.bytes, row.addr);
    }
    let mut grid = Pattern::default();
    for (i, (&n, &s)) in row.shape.iter().zip(&row.strides).enumerate() {
        if n > 1 && s < 1 {
            bail!(RS_ERR_INVALID, "strides[{i}] is {s}, it must be at least 1");
        }
        if n > 1 {
            grid.axes.push(Axis { extent: n as u64, key: s as u64, val: s as u64 });
        }
    }
    let end = span(0, grid.axes.iter().map(|a| (a.extent, a.key)));
    if end.and_then(|e| e.checked_add(1)?.checked_mul(u64::from(item))).is_none_or(|bytes| bytes > row.bytes) {
        bail!(
            RS_ERR_LAYOUT,
            "shape {:?} with strides {:?} and {item} bytes an element does not fit in {} bytes",
            row.shape,
            row.strides,
            row.bytes
        );
    }
    if !grid.coalesce().nests() {
        bail!(
            RS_ERR_LAYOUT,
            "strides {:?} of shape {:?} must nest (sorted, each at least the next one times its extent)",
            row.strides,
            row.shape
        );
    }
    Ok(Buffer {
        name: row.name.clone(),
        addr: row.addr,
        bytes: row.bytes,
        device_type: row.device_type,
        device_id: row.device_id,
        role: row.role,
        padded: row.flags & RS_BUFFER_PADDED != 0,
        dtype: row.dtype,
        item,
        shape: row.shape.clone(),
        strides: row.strides.clone(),
    })
}

/// A tile's bytes as a pattern over their distance from its first.
fn in_bytes(tile: &Tile, buffer: &Buffer) -> Pattern {
    let item = u64::from(buffer.item);
    let mut p = tile.pattern.flip();
    p.key = 0;
    for a in &mut p.axes {
        *a = Axis { extent: a.extent, key: a.key * item, val: 0 };
    }
    p.axes.push(Axis { extent: item, key: 1, val: 0 });
    p.coalesce()
}

/// Number of keys that two patterns share.
fn common(a: &Pattern, b: &Pattern) -> Result<u64> {
    let radix = Radix::new(a.key_end().max(b.key_end()), a.axes.iter().chain(&b.axes).map(|x| x.key));
    let patches_b = b.patches(&radix).ok_or_else(incomparable)?;
    let mut sum = 0;
    for pa in a.patches(&radix).ok_or_else(incomparable)? {
        sum += patches_b.iter().filter_map(|pb| pa.region.meet(&pb.region)).map(|m| m.volume()).sum::<u64>();
    }
    Ok(sum)
}

fn incomparable() -> Error {
    err!(RS_ERR_UNSUPPORTED, "two tiles whose strides do not divide fall into over 260,000 boxes and cannot be compared")
}

#[cfg(test)]
mod tests;
