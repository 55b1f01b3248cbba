//! What a rank holds itself: copies from its source tiles to its target tiles.
//!
//! These depend on nobody else, but on addresses: where source and target are the same memory nothing is copied. So they are planned
//! whenever the rank is bound to memory, without asking anyone.
#![forbid(unsafe_code)]

use super::owners::{Held, Holder, held};
use super::{Piece, Spot, piece};
use crate::abi::{RS_SOURCE, RS_TARGET};
use crate::convert::Convert;
use crate::error::Result;
use crate::geom::{Index, Radix, Region};
use crate::layout::Layout;
use std::collections::BTreeMap;

/// A rank's copies inside itself.
#[derive(Clone, Debug, Default)]
pub struct Local {
    /// Source to target; `tensor` is the row of the rank's own tensor table.
    pub pieces: Vec<Piece>,
    /// Elements that are shared instead of copied; not in `pieces`.
    pub aliased: Vec<Piece>,
}

/// Plans them.
pub fn plan_local(layout: &Layout) -> Result<Local> {
    let mut tensors: BTreeMap<u32, [Vec<Holder<'_>>; 2]> = BTreeMap::new();
    for tile in layout.tiles() {
        let buffer = &layout.buffers()[tile.buffer as usize];
        let holder = Holder {
            class: 0,
            buffer: tile.buffer,
            base: 0,
            dtype: (buffer.dtype.code, buffer.dtype.bits),
            transform: tile.transform,
            param: &buffer.name,
            pattern: &tile.pattern,
        };
        for (side, role) in [RS_SOURCE, RS_TARGET].into_iter().enumerate() {
            if buffer.role & role != 0 {
                tensors.entry(tile.tensor).or_default()[side].push(holder);
            }
        }
    }
    let mut out = Local::default();
    for (tensor, [sources, targets]) in tensors {
        let facts = &layout.tensors()[tensor as usize];
        if sources.is_empty() || targets.is_empty() {
            continue;
        }
        let keys = sources.iter().chain(&targets).flat_map(|h| h.pattern.axes.iter().map(|a| a.key));
        let radix = Radix::new(facts.elements, keys);
        let own = (sources, targets);
        let (sources, targets) = (held(&facts.name, &own.0, &radix)?, held(&facts.name, &own.1, &radix)?);
        let index = Index::new(sources.iter().map(|s| &s.patch.region));
        for target in &targets {
            let to = &own.1[target.holder as usize];
            let mut rest = vec![target.patch.region.clone()];
            // Where a source is the target's own memory nothing moves: those first.
            let mut order: Vec<(bool, &Held)> = vec![];
            for s in index.meeting(&target.patch.region).into_iter().map(|i| &sources[i]) {
                if let Some(shared) = s.patch.region.meet(&target.patch.region) {
                    let ends = ((s, own.0[s.holder as usize].buffer), (target, to.buffer));
                    order.push((!same_memory(layout, ends.0, ends.1, &shared), s));
                }
            }
            order.sort_by_key(|o| o.0);
            for (copied, source) in order {
                let from = &own.0[source.holder as usize];
                for part in rest.iter().filter_map(|r| r.meet(&source.patch.region)) {
                    let convert = Convert::between(from.dtype, to.dtype, to.transform).map_err(|e| {
                        let (tensor, from, to) = (&facts.name, from.param, to.param);
                        e.context(format_args!("tensor '{tensor}', source '{from}', target '{to}' of the same rank"))
                    })?;
                    let item = (u32::from(from.dtype.1) / 8, convert);
                    let src = Spot { buffer: from.buffer, offset: source.patch.offset_of(&part) };
                    let dst = Spot { buffer: to.buffer, offset: target.patch.offset_of(&part) };
                    let piece = piece(&radix, &part, tensor, item, (source, src), (target, dst));
                    if copied { out.pieces.push(piece) } else { out.aliased.push(piece) }
                }
                Region::minus_all(&mut rest, &source.patch.region);
            }
        }
    }
    Ok(out)
}

/// Whether two boxes, each in a row of the buffers, hold their shared elements at the same addresses.
fn same_memory(layout: &Layout, (a, row_a): (&Held, u32), (b, row_b): (&Held, u32), shared: &Region) -> bool {
    let addr = |h: &Held, row: u32| {
        let buffer = &layout.buffers()[row as usize];
        buffer.addr + h.patch.offset_of(shared) * u64::from(buffer.item)
    };
    addr(a, row_a) == addr(b, row_b) && (0..shared.len.len()).all(|i| shared.len[i] == 1 || a.patch.stride[i] == b.patch.stride[i])
}
