//! Who holds what of one tensor: patches of all classes of ranks in one radix, and the atoms of the sources.
#![forbid(unsafe_code)]

use super::incomparable;
use crate::error::Result;
use crate::geom::{Index, Patch, Pattern, Radix, Region};
use std::collections::BTreeMap;
use std::rc::Rc;

/// Ranks that hold and want the same boxes at the same places.
#[derive(Clone, Debug)]
pub struct Class {
    /// Equal on equal lists.
    pub id: u32,
    /// The ranks, rising.
    pub ranks: Rc<[u32]>,
}

/// A tile of every rank of a class, as planning sees it.
#[derive(Clone, Copy, Debug)]
pub struct Holder<'a> {
    /// Index of the class.
    pub class: u32,
    /// Row of its buffer table, counted from [`super::route::Tensor::rows`] number `base`.
    pub buffer: u32,
    /// See `buffer`.
    pub base: u32,
    /// DLPack code and bits of the buffer.
    pub dtype: (u8, u8),
    /// RS_TRANSFORM_* of the tile.
    pub transform: u32,
    /// The buffer's name, for errors.
    pub param: &'a str,
    /// What lies where.
    pub pattern: &'a Pattern,
}

/// One box of a holder.
#[derive(Clone, Debug)]
pub struct Held {
    /// Index of the class.
    pub class: u32,
    /// Index of the holder.
    pub holder: u32,
    /// The box.
    pub patch: Patch,
}

/// Boxes that the tiles of one tensor on all ranks may fall into, and how many more for each tile: a few tiles that fall into very many are
/// compared in no time that anybody waits.
const BOXES: usize = 1 << 18;
const BOXES_A_TILE: usize = 16;

/// All boxes of all holders, in their order.
pub fn held(tensor: &str, holders: &[Holder<'_>], radix: &Radix) -> Result<Vec<Held>> {
    let mut out = Vec::with_capacity(holders.len());
    for (i, h) in holders.iter().enumerate() {
        for patch in h.pattern.patches(radix).ok_or_else(|| incomparable(tensor))? {
            out.push(Held { class: h.class, holder: i as u32, patch });
        }
        if out.len() > BOXES + BOXES_A_TILE * holders.len() {
            return Err(incomparable(tensor));
        }
    }
    Ok(out)
}

/// A box that each of its owners holds whole.
#[derive(Clone, Debug)]
pub struct Atom {
    /// The box.
    pub region: Region,
    /// Indices into the list of sources, rising.
    pub owners: Vec<usize>,
}

/// Cuts the sources' boxes into disjoint atoms.
pub fn atoms(sources: &[Held]) -> Vec<Atom> {
    let mut distinct: BTreeMap<&Region, Vec<usize>> = BTreeMap::new();
    for (i, s) in sources.iter().enumerate() {
        distinct.entry(&s.patch.region).or_default().push(i);
    }
    let index = Index::new(distinct.keys().copied());
    let mut out: Vec<Atom> = vec![];
    // Atoms that each box was cut into, by the box's place: only those of boxes that it meets can be cut by a later one.
    let mut of: Vec<Vec<usize>> = vec![];
    for (place, (region, owners)) in distinct.iter().enumerate() {
        let mut rest = vec![(*region).clone()];
        let mut own = vec![];
        let met: Vec<usize> = index.meeting(region).into_iter().take_while(|&m| m < place).collect();
        for &earlier in &met {
            for i in of[earlier].clone() {
                let Some(shared) = out[i].region.meet(region) else { continue };
                if own.contains(&i) {
                    continue;
                }
                let mut outside = vec![];
                out[i].region.minus(&shared, &mut outside);
                for region in outside {
                    let atom = Atom { region, owners: out[i].owners.clone() };
                    // Whoever had the whole has the part; all of them meet this box.
                    for &m in &met {
                        if of[m].contains(&i) {
                            of[m].push(out.len());
                        }
                    }
                    out.push(atom);
                }
                out[i].owners.extend(owners);
                out[i].owners.sort_unstable();
                Region::minus_all(&mut rest, &shared);
                out[i].region = shared;
                own.push(i);
            }
        }
        for region in rest {
            own.push(out.len());
            out.push(Atom { region, owners: owners.clone() });
        }
        of.push(own);
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::geom::Dims;
    use smallvec::smallvec;

    #[test]
    fn every_cell_is_in_one_atom_with_all_its_owners() {
        let mut rng = fastrand::Rng::with_seed(5);
        for _ in 0..500 {
            let sources: Vec<Held> = (0..rng.u32(1..6))
                .map(|class| {
                    let lo: Dims = smallvec![rng.u64(0..5), rng.u64(0..5)];
                    let len: Dims = smallvec![rng.u64(1..5), rng.u64(1..5)];
                    let patch = Patch { region: Region { lo, len }, offset: 0, stride: smallvec![0, 0] };
                    Held { class, holder: class, patch }
                })
                .collect();
            let atoms = atoms(&sources);
            for a in 0..10 {
                for b in 0..10 {
                    let cell = Region { lo: smallvec![a, b], len: smallvec![1, 1] };
                    let of: Vec<usize> = (0..sources.len()).filter(|&i| sources[i].patch.region.meet(&cell).is_some()).collect();
                    let found: Vec<&Atom> = atoms.iter().filter(|x| x.region.meet(&cell).is_some()).collect();
                    match found[..] {
                        [] => assert!(of.is_empty()),
                        [atom] => assert_eq!(atom.owners, of),
                        _ => panic!("a cell in two atoms"),
                    }
                }
            }
        }
    }
}
