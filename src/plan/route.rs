//! Which replica sends, one tensor at a time.
//!
//! Tiers, nearest first: the same rank (see [`super::local`]), the same device in another process, the same host, the rest. In the
//! first tier that holds a box of b bytes, with n replicas, it is cut over c = clamp(b / 256 KiB, 1, n) consecutive replicas from
//! (ordinal + c * q) mod n, q being the target's position among the targets that need this box from this tier.
#![forbid(unsafe_code)]

use super::owners::{Atom, Held, Holder, atoms, held};
use super::{Place, Plan, piece, shown};
use crate::abi::{RS_ERR_COVERAGE, RS_ERR_MISMATCH};
use crate::error::{Result, bail};
use crate::geom::{Index, Radix, Region};
use std::collections::BTreeMap;
use std::ops::Range;

/// A box of this many bytes is worth a sender of its own.
const SHARE: u64 = 256 << 10;

/// All that planning needs to know of one tensor. Holders are sorted by (rank, tile).
#[derive(Clone, Debug, Default)]
pub struct TensorFacts<'a> {
    /// Its place in the order that all ranks agree on.
    pub ordinal: u32,
    /// Its name, for errors.
    pub name: &'a str,
    /// Its shape.
    pub shape: &'a [u64],
    /// Source tiles of all ranks.
    pub sources: Vec<Holder<'a>>,
    /// Target tiles of all ranks.
    pub targets: Vec<Holder<'a>>,
}

/// Adds `me`'s moves of one tensor to `plan`. Tensors come in the order of their ordinals.
pub fn plan_tensor(me: u32, places: &[Place], facts: &TensorFacts<'_>, plan: &mut Plan) -> Result<()> {
    let holders = || facts.sources.iter().chain(&facts.targets);
    let radix = Radix::new(facts.shape.iter().product(), holders().flat_map(|h| h.pattern.axes.iter().map(|a| a.key)));
    let sources = held(facts.name, &facts.sources, &radix)?;
    let targets = held(facts.name, &facts.targets, &radix)?;
    let atoms = atoms(&sources);
    let index = Index::new(atoms.iter().map(|a| &a.region));
    let job = Job { me, places, facts, radix, atoms: &atoms, index, sources, targets };
    let fresh = job.fresh(plan)?;
    job.check_cover(&fresh)?;
    for (region, share) in job.shares(&fresh) {
        job.route(&region, &share, plan)?;
    }
    Ok(())
}

struct Job<'a> {
    me: u32,
    places: &'a [Place],
    facts: &'a TensorFacts<'a>,
    radix: Radix,
    sources: Vec<Held<'a>>,
    targets: Vec<Held<'a>>,
    atoms: &'a [Atom],
    /// Of the atoms.
    index: Index<'a>,
}

/// What must cross for one box: the atom that holds it, and the targets (indices) that need it, by rank.
struct Share {
    atom: usize,
    needs: Vec<usize>,
}

impl Job<'_> {
    /// Boxes that each target rank neither holds itself nor gets for an earlier tile, with the target's index. Second tiles of one
    /// box become copies inside the rank.
    fn fresh(&self, plan: &mut Plan) -> Result<Vec<(Region, usize)>> {
        let mut out: Vec<(Region, usize)> = vec![];
        let mut targets = 0..0;
        while targets.end < self.targets.len() {
            let rank = self.targets[targets.end].rank;
            targets = targets.end..targets.end + self.targets[targets.end..].partition_point(|t| t.rank == rank);
            self.fresh_of(rank, targets.clone(), &mut out, plan)?;
        }
        Ok(out)
    }

    /// The part of [`Job::fresh`] of one rank, whose targets are `targets`.
    fn fresh_of(&self, rank: u32, targets: Range<usize>, out: &mut Vec<(Region, usize)>, plan: &mut Plan) -> Result<()> {
        let first = self.sources.partition_point(|s| s.rank < rank);
        let own = &self.sources[first..first + self.sources[first..].partition_point(|s| s.rank == rank)];
        let own_index = Index::new(own.iter().map(|s| &s.patch.region));
        let all = &self.targets[targets.clone()];
        let index = Index::new(all.iter().map(|t| &t.patch.region));
        // Where in `out` the boxes of each target lie.
        let mut of: Vec<Range<usize>> = Vec::with_capacity(all.len());
        for (t, target) in all.iter().enumerate() {
            let mut rest = vec![target.patch.region.clone()];
            for i in own_index.meeting(&target.patch.region) {
                Region::minus_all(&mut rest, &own[i].patch.region);
            }
            for earlier in index.meeting(&target.patch.region).into_iter().take_while(|&e| e < t) {
                let from = &all[earlier];
                for (got, _) in &out[of[earlier].clone()] {
                    if rank == self.me {
                        for shared in rest.iter().filter_map(|r| r.meet(got)) {
                            let item = self.item(from, target)?;
                            plan.doubles.push(piece(&self.radix, &shared, (from, self.facts.ordinal), (target, target.tile), item));
                        }
                    }
                    Region::minus_all(&mut rest, got);
                }
            }
            let begin = out.len();
            out.extend(rest.into_iter().map(|r| (r, targets.start + t)));
            of.push(begin..out.len());
        }
        Ok(())
    }

    /// Every box that this rank needs is held by somebody.
    fn check_cover(&self, fresh: &[(Region, usize)]) -> Result<()> {
        for (region, t) in fresh.iter().filter(|f| self.targets[f.1].rank == self.me) {
            let mut missing = vec![region.clone()];
            for atom in self.index.meeting(region) {
                Region::minus_all(&mut missing, &self.atoms[atom].region);
            }
            if let Some(hole) = missing.first() {
                bail!(
                    RS_ERR_COVERAGE,
                    "rank {}, target '{}': {} of '{}' has no source on any rank",
                    self.me,
                    self.targets[*t].param,
                    shown(&self.radix.pattern(hole), self.facts.shape),
                    self.facts.name
                );
            }
        }
        Ok(())
    }

    /// Equal boxes of the same atom, with all that need them, in the order of the boxes.
    fn shares(&self, fresh: &[(Region, usize)]) -> BTreeMap<Region, Share> {
        let mut distinct: BTreeMap<&Region, Vec<usize>> = BTreeMap::new();
        for (region, t) in fresh {
            distinct.entry(region).or_default().push(*t);
        }
        let mut out: BTreeMap<Region, Share> = BTreeMap::new();
        for (region, needs) in distinct {
            for atom in self.index.meeting(region) {
                if let Some(shared) = self.atoms[atom].region.meet(region) {
                    out.entry(shared).or_insert_with(|| Share { atom, needs: vec![] }).needs.extend(&needs);
                }
            }
        }
        for share in out.values_mut() {
            share.needs.sort_unstable();
        }
        out
    }

    /// Gives one box to the replicas that send it.
    fn route(&self, region: &Region, share: &Share, plan: &mut Plan) -> Result<()> {
        let mut owners: Vec<&Held<'_>> = self.atoms[share.atom].owners.iter().map(|&i| &self.sources[i]).collect();
        owners.dedup_by_key(|o| o.rank);
        let mine = owners.iter().any(|o| o.rank == self.me) || share.needs.iter().any(|&t| self.targets[t].rank == self.me);
        if !mine {
            return Ok(());
        }
        let mut groups: BTreeMap<(u8, [u64; 2]), Vec<usize>> = BTreeMap::new();
        for &t in &share.needs {
            groups.entry(self.tier(&owners, self.targets[t].rank)).or_default().push(t);
        }
        for ((tier, key), needs) in groups {
            let near: Vec<&Held<'_>> = owners.iter().copied().filter(|o| tier == 3 || self.tier_key(tier, o.rank) == key).collect();
            let n = near.len() as u64;
            let c = (region.volume() * u64::from(near[0].dtype.1 / 8) / SHARE).clamp(1, n);
            let axis = cut_axis(region, c);
            for (q, &t) in needs.iter().enumerate() {
                let target = &self.targets[t];
                let first = u64::from(self.facts.ordinal) + c * q as u64;
                for i in 0..c {
                    let owner = near[((first + i) % n) as usize];
                    if owner.rank != self.me && target.rank != self.me {
                        continue;
                    }
                    let Some(part) = region.split(axis, i, c) else { continue };
                    let item = self.item(owner, target)?;
                    let piece = piece(&self.radix, &part, (owner, self.facts.ordinal), (target, target.tile), item);
                    if owner.rank == self.me {
                        plan.peer(target.rank).out.push(piece);
                    } else {
                        plan.peer(owner.rank).into.push(piece);
                    }
                }
            }
        }
        Ok(())
    }

    /// The nearest tier in which `rank` finds an owner, and what tells that tier's groups apart.
    fn tier(&self, owners: &[&Held<'_>], rank: u32) -> (u8, [u64; 2]) {
        for tier in [1, 2] {
            let key = self.tier_key(tier, rank);
            if key != [0; 2] && owners.iter().any(|o| self.tier_key(tier, o.rank) == key) {
                return (tier, key);
            }
        }
        (3, [0; 2])
    }

    fn tier_key(&self, tier: u8, rank: u32) -> [u64; 2] {
        let place = &self.places[rank as usize];
        if tier == 1 { place.device } else { [place.host, 1] }
    }

    /// Bytes of an element, equal on both sides.
    fn item(&self, from: &Held<'_>, to: &Held<'_>) -> Result<u32> {
        if from.dtype != to.dtype {
            bail!(
                RS_ERR_MISMATCH,
                "tensor '{}': source '{}' of rank {} has dtype (code {}, bits {}), target '{}' of rank {} has (code {}, bits {}); \
                 casts are not built",
                self.facts.name,
                from.param,
                from.rank,
                from.dtype.0,
                from.dtype.1,
                to.param,
                to.rank,
                to.dtype.0,
                to.dtype.1
            );
        }
        Ok(u32::from(from.dtype.1) / 8)
    }
}

/// The axis along which a box is cut in `parts`: the slowest that gives nearly equal parts, else the longest.
fn cut_axis(region: &Region, parts: u64) -> usize {
    let len = &region.len;
    let even = (0..len.len()).find(|&i| len[i] % parts == 0 || len[i] >= 16 * parts);
    even.unwrap_or_else(|| (0..len.len()).rev().max_by_key(|&i| len[i]).unwrap_or(0))
}
