//! What a rank holds of each tensor on one side, and who else holds it: for sums over all ranks that count each element once.
#![forbid(unsafe_code)]

use super::closed::Alike;
use super::facts::{classes, facts};
use super::owners::{Holder, atoms, held};
use super::route::TensorFacts;
use crate::abi::{RS_ERR_UNSUPPORTED, RS_TARGET, RS_TRANSFORM_NONE};
use crate::convert::{Convert, Float};
use crate::error::{Result, bail};
use crate::geom::{Axis, Pattern, Radix};
use crate::preset::world::{Likeness, World};
use crate::wire::Table;
use std::collections::HashMap;
use std::rc::Rc;

/// A box of a tensor in a buffer of this rank.
#[derive(Clone, Debug)]
pub struct Part {
    /// Ordinal of the tensor.
    pub tensor: u32,
    /// Row of this rank's buffer table.
    pub buffer: u32,
    /// DLPack code and bits of the buffer's elements.
    pub dtype: (u8, u8),
    /// What a target would make of an element; `None`: its bytes as they are. An error if not all ranks hold it alike.
    pub convert: Result<Option<Convert>>,
    /// The type of the targets, where some source is cast into it.
    pub cast: Option<Float>,
    /// `key` counts elements of the tensor, `val` those of the buffer.
    pub pattern: Pattern,
    /// How many boxes of all ranks hold these elements.
    pub copies: u64,
    /// Which of them this is; the first, 0, is the one that counts.
    pub copy: u64,
    /// Whether it is part of what a sync moves: some rank has the tensor as a target, or no rank has any target.
    pub moved: bool,
}

impl Part {
    /// DLPack code and bits of an element once it is converted.
    pub fn kind(&self) -> (u8, u8) {
        let convert = self.convert.as_ref().ok().and_then(Option::as_ref);
        convert.map_or(self.dtype, |c| (c.to.dtype().code, c.to.dtype().bits))
    }

    /// Bytes of an element of the buffer.
    pub fn source_item(&self) -> u32 {
        u32::from(self.dtype.1) / 8
    }
}

/// Those of side 0, the sources, or 1, the targets, from the tables of all ranks (see [`facts`]).
pub fn of_tables(me: u32, side: usize, tables: &[Table]) -> Result<Vec<Part>> {
    let classes = classes(tables.len() as u32);
    let targets = tables.iter().flat_map(|t| &t.buffers).any(|b| b.role & RS_TARGET != 0);
    let (_, known) = facts(me, tables, &classes)?;
    let mut out = vec![];
    for (tensor, facts) in &known {
        out.extend(parts(me, side, tensor.name, facts, targets)?.iter().map(|part| part.placed(tensor.ordinal, |row| row.1)));
    }
    Ok(out)
}

/// Those of side 0 or 1 from a world spec. Rows count the rank's sources, then its targets, as in [`super::closed::plan`].
pub fn of_world(me: u32, side: usize, world: &World) -> Result<Vec<Part>> {
    let mut alike = Alike::new(world, Some(me));
    let mut known: HashMap<Likeness, Rc<[Unplaced]>> = HashMap::new();
    let before = if side == 0 { 0 } else { world.sides()[0].count(me) };
    let mut out = vec![];
    for (ordinal, id) in world.tensors_of(me) {
        let like = world.likeness(id);
        let all = match known.get(&like) {
            Some(all) => all.clone(),
            None => {
                let all: Rc<[Unplaced]> = parts(me, side, &world.model().name(id), &alike.facts(&like).0, true)?.into();
                known.insert(like, all.clone());
                all
            }
        };
        let rows = world.rows(side, id);
        out.extend(all.iter().map(|part| part.placed(ordinal, |(base, row)| before + rows[base as usize] + row)));
    }
    Ok(out)
}

/// A part of all tensors that lie alike, but for their rows.
struct Unplaced {
    /// [`Holder::base`] and [`Holder::buffer`].
    row: (u32, u32),
    part: Part,
}

impl Unplaced {
    fn placed(&self, tensor: u32, row: impl Fn((u32, u32)) -> u32) -> Part {
        Part { tensor, buffer: row(self.row), ..self.part.clone() }
    }
}

/// `targets`: whether any rank has any.
fn parts(me: u32, side: usize, tensor: &str, facts: &TensorFacts<'_>, targets: bool) -> Result<Vec<Unplaced>> {
    let holders = if side == 0 { &facts.sources } else { &facts.targets };
    let radix = Radix::new(facts.shape.iter().product(), holders.iter().flat_map(|h| h.pattern.axes.iter().map(|a| a.key)));
    let held = held(tensor, holders, &radix)?;
    let ranks = |owner: usize| &facts.classes[held[owner].class as usize].ranks;
    let mut out = vec![];
    for atom in atoms(&held) {
        let copies = atom.owners.iter().map(|&owner| ranks(owner).len() as u64).sum();
        let mut before = 0;
        for &owner in &atom.owners {
            let first = before;
            before += ranks(owner).len() as u64;
            let Ok(place) = ranks(owner).binary_search(&me) else { continue };
            let holder = &holders[held[owner].holder as usize];
            let patch = &held[owner].patch;
            let axes = (0..radix.digits())
                .map(|i| Axis { extent: atom.region.len[i], key: radix.weight(i), val: patch.stride[i] })
                .collect();
            let pattern = Pattern { key: radix.number(&atom.region.lo), val: patch.offset_of(&atom.region), axes }.coalesce();
            let part = Part {
                tensor: 0,
                buffer: 0,
                dtype: holder.dtype,
                convert: converted(side, tensor, holder, facts),
                cast: cast(facts),
                pattern,
                copies,
                copy: first + place as u64,
                moved: !targets || !facts.targets.is_empty(),
            };
            out.push(Unplaced { row: (holder.base, holder.buffer), part });
        }
    }
    Ok(out)
}

/// What a holder's elements become to be compared with those of all others: what the targets hold, where there are any.
fn converted(side: usize, tensor: &str, holder: &Holder<'_>, facts: &TensorFacts<'_>) -> Result<Option<Convert>> {
    let model = facts.targets.first().or(facts.sources.first());
    let Some(model) = model else { return Ok(None) };
    let all = if facts.targets.is_empty() { &facts.sources } else { &facts.targets };
    if let Some(other) = all.iter().find(|h| (h.dtype, h.transform) != (model.dtype, model.transform)) {
        bail!(
            RS_ERR_UNSUPPORTED,
            "tensor '{tensor}': '{}' holds it with dtype (code {}, bits {}) and transform {}, '{}' with dtype (code {}, bits {}) and \
             transform {}: these have no fingerprint in common",
            model.param,
            model.dtype.0,
            model.dtype.1,
            model.transform,
            other.param,
            other.dtype.0,
            other.dtype.1,
            other.transform
        );
    }
    if side == 1 {
        return Ok(None);
    }
    Convert::between(holder.dtype, model.dtype, model.transform)
        .map_err(|e| e.context(format_args!("tensor '{tensor}', source '{}', target '{}'", holder.param, model.param)))
}

/// The type of the targets, if it is a float's and some source's is another one.
fn cast(facts: &TensorFacts<'_>) -> Option<Float> {
    let target = facts.targets.first()?;
    let other = |h: &Holder<'_>| h.dtype != target.dtype || target.transform != RS_TRANSFORM_NONE;
    facts.sources.iter().any(other).then(|| Float::of(target.dtype)).flatten()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::plan::owners::Class;
    use smallvec::smallvec;
    use std::borrow::Cow;
    use std::collections::BTreeSet;

    /// [4, 6] of three classes: ranks 0 and 3 hold the left half, rank 1 all of it, rank 2 the lower rows, twice.
    #[test]
    fn every_element_counts_once() {
        let axes = |list: &[(u64, u64, u64)]| list.iter().map(|&(extent, key, val)| Axis { extent, key, val }).collect();
        let left = Pattern { key: 0, val: 5, axes: axes(&[(4, 6, 3), (3, 1, 1)]) };
        let all = Pattern { key: 0, val: 0, axes: axes(&[(24, 1, 1)]) };
        let lower = Pattern { key: 12, val: 0, axes: axes(&[(12, 1, 1)]) };
        let classes: Vec<Class> =
            [&[0, 3][..], &[1], &[2]].into_iter().zip(0..).map(|(r, id)| Class { id, ranks: r.into() }).collect();
        let holder = |class, buffer, pattern| Holder { class, buffer, base: 0, dtype: (4, 16), transform: 0, param: "p", pattern };
        let facts = TensorFacts {
            shape: Cow::Borrowed(&[4, 6]),
            classes: Cow::Borrowed(&classes),
            sources: vec![holder(0, 7, &left), holder(1, 1, &all), holder(2, 4, &lower), holder(2, 5, &lower)],
            targets: vec![],
        };
        let (mut counted, mut held, mut copies) = ([0; 24], [0; 24], vec![BTreeSet::new(); 24]);
        for me in 0..4 {
            for Unplaced { row, part } in parts(me, 0, "t", &facts, false).unwrap() {
                assert!(part.moved && part.convert == Ok(None));
                let mut elements = vec![(part.pattern.key, part.pattern.val)];
                for a in &part.pattern.axes {
                    elements =
                        elements.iter().flat_map(|&(k, v)| (0..a.extent).map(move |i| (k + i * a.key, v + i * a.val))).collect();
                }
                for (key, val) in elements {
                    let (i, j) = (key / 6, key % 6);
                    assert_eq!(part.copies, [[3, 1], [5, 3]][usize::from(i >= 2)][usize::from(j >= 3)]);
                    assert_eq!(val, [5 + 3 * i + j, key, key - if me == 2 { 12 } else { 0 }][[0, 1, 2, 0][me as usize]]);
                    assert_eq!(row.1, [7, 1, row.1, 7][me as usize]);
                    held[key as usize] += 1;
                    counted[key as usize] += u64::from(part.copy == 0);
                    copies[key as usize].insert(part.copy);
                }
            }
        }
        assert_eq!(counted, [1; 24]);
        assert!(copies.iter().zip(held).all(|(numbers, n)| numbers.iter().copied().eq(0..n)), "{copies:?}");
        assert_eq!(held.iter().sum::<u64>(), 12 + 12 + 24 + 24);
    }

    #[test]
    fn targets_of_two_dtypes_have_no_fingerprint() {
        let all = Pattern { key: 0, val: 0, axes: smallvec![Axis { extent: 4, key: 1, val: 1 }] };
        let classes = classes(2);
        let holder = |class, dtype| Holder { class, buffer: 0, base: 0, dtype, transform: 0, param: "p", pattern: &all };
        let facts = TensorFacts {
            shape: Cow::Borrowed(&[4]),
            classes: Cow::Borrowed(&classes),
            sources: vec![holder(0, (2, 32))],
            targets: vec![holder(0, (4, 16)), holder(1, (2, 16))],
        };
        let target = parts(0, 1, "t", &facts, true).unwrap();
        assert_eq!(target[0].part.convert.as_ref().unwrap_err().status(), RS_ERR_UNSUPPORTED);
        let one = TensorFacts { targets: vec![holder(1, (4, 16))], ..facts };
        let source = parts(0, 0, "t", &one, true).unwrap();
        assert_eq!(source[0].part.kind(), (4, 16));
    }
}
