//! Which replica sends, one tensor at a time.
//!
//! Tiers, nearest first: the same rank (see [`super::local`]), the same device in another process, the same host, the rest. In the
//! first tier that holds a box of b bytes, with n replicas, it is cut over c = clamp(b / 256 KiB, 1, n) consecutive replicas from
//! (ordinal + c * q) mod n, q being the target's position among the targets that need this box from this tier.
//!
//! Where targets on other hosts need the same box and some of their ranks relay, the sources send it once: each part goes from its
//! source to the first of these ranks, from there to the next, and so on in the order of ranks; those that do not relay come last, each
//! behind a relay of its turn.
//!
//! What the boxes are, [`Geometry`] says, for classes of ranks and for all tensors that lie alike; which ranks exchange them, [`Router`].
#![forbid(unsafe_code)]

use super::owners::{Atom, Class, Held, Holder, atoms, held};
use super::rounds::LEAST_MESSAGE;
use super::{Place, Plan, Spot, Stream, piece, shown};
use crate::abi::{RS_ERR_COVERAGE, RS_ERR_UNSUPPORTED, RS_TRANSFORM_NONE};
use crate::convert::Convert;
use crate::error::{Result, bail};
use crate::geom::{Index, Radix, Region};
use smallvec::SmallVec;
use std::borrow::Cow;
use std::collections::{BTreeMap, HashMap, HashSet};
use std::ops::Range;
use std::rc::Rc;
use xxhash_rust::xxh3::xxh3_64;

/// A box of this many bytes is worth a sender of its own.
const SHARE: u64 = 256 << 10;

/// Longest piece of a stream in bytes, where the rank with the least has so much staging: fits into a message of any rank with up to 256
/// channels.
pub fn relay_piece(staging: u64) -> u64 {
    (staging / 1024).clamp(LEAST_MESSAGE, SHARE)
}

/// Long rows are cut at multiples of so many elements.
const GRAIN: u64 = 128;

/// How a tensor, or many that lie alike, lies on all ranks. Holders are sorted by class.
#[derive(Clone, Debug, Default)]
pub struct TensorFacts<'a> {
    /// Its shape.
    pub shape: Cow<'a, [u64]>,
    /// Disjoint; others may be in the list too, which hold nothing of it.
    pub classes: Cow<'a, [Class]>,
    /// Source tiles of all classes.
    pub sources: Vec<Holder<'a>>,
    /// Target tiles of all classes.
    pub targets: Vec<Holder<'a>>,
}

/// What tells one tensor from others that lie alike.
#[derive(Clone, Debug)]
pub struct Tensor<'a> {
    /// Its place in the order that all ranks agree on.
    pub ordinal: u32,
    /// Its name, for errors.
    pub name: &'a str,
    /// Row of a holder's buffer that its `buffer` counts from, by its `base`: of sources, and of targets.
    pub rows: [SmallVec<[u32; 2]>; 2],
}

/// The boxes that one class sends or wants, and all that have to do with them.
#[derive(Debug)]
pub struct Geometry {
    radix: Radix,
    sources: Vec<Held>,
    targets: Vec<Held>,
    shares: Vec<Share>,
    /// Boxes that a second tile gets from an earlier one of the same rank (indices of targets).
    doubles: Vec<(Region, usize, usize)>,
}

/// What must cross for one box: the classes that hold it (indices of their first sources) and those that need it (of targets), rising.
#[derive(Debug)]
struct Share {
    region: Region,
    owners: SmallVec<[u32; 4]>,
    needs: SmallVec<[u32; 4]>,
}

impl Geometry {
    /// For class `me` of `facts`, or with `None` for all; `tensor` and `rank` are for errors.
    pub fn new(me: Option<u32>, facts: &TensorFacts<'_>, tensor: &str, rank: Option<u32>) -> Result<Geometry> {
        let holders = || facts.sources.iter().chain(&facts.targets);
        let radix = Radix::new(facts.shape.iter().product(), holders().flat_map(|h| h.pattern.axes.iter().map(|a| a.key)));
        let sources = held(tensor, &facts.sources, &radix)?;
        let targets = held(tensor, &facts.targets, &radix)?;
        let atoms = atoms(&sources);
        let mut doubles = vec![];
        let fresh = fresh(me, &sources, &targets, &mut doubles);
        let index = Index::new(atoms.iter().map(|a| &a.region));
        for (region, t) in fresh.iter().filter(|f| me.is_none_or(|me| targets[f.1].class == me)) {
            let mut missing = vec![region.clone()];
            for atom in index.meeting(region) {
                Region::minus_all(&mut missing, &atoms[atom].region);
            }
            if let Some(hole) = missing.first() {
                bail!(
                    RS_ERR_COVERAGE,
                    "rank {}, target '{}': {} of '{tensor}' has no source on any rank",
                    rank.unwrap_or(facts.classes[targets[*t].class as usize].ranks[0]),
                    facts.targets[targets[*t].holder as usize].param,
                    shown(&radix.pattern(hole), &facts.shape)
                );
            }
        }
        let shares = shares(me, &sources, &targets, &atoms, &index, &fresh);
        Ok(Geometry { radix, sources, targets, shares, doubles })
    }
}

/// Boxes that each target class neither holds itself nor gets for an earlier tile, with the target's index. Second tiles of one box
/// of class `me` go to `doubles`.
fn fresh(me: Option<u32>, sources: &[Held], targets: &[Held], doubles: &mut Vec<(Region, usize, usize)>) -> Vec<(Region, usize)> {
    let mut out: Vec<(Region, usize)> = vec![];
    let mut next = 0;
    while next < targets.len() {
        let class = targets[next].class;
        let of_class = next..next + targets[next..].partition_point(|t| t.class == class);
        next = of_class.end;
        let first = sources.partition_point(|s| s.class < class);
        let own = &sources[first..first + sources[first..].partition_point(|s| s.class == class)];
        let own_index = Index::new(own.iter().map(|s| &s.patch.region));
        let all = &targets[of_class.clone()];
        let index = Index::new(all.iter().map(|t| &t.patch.region));
        // Where in `out` the boxes of each target lie.
        let mut of: Vec<Range<usize>> = Vec::with_capacity(all.len());
        for (t, target) in all.iter().enumerate() {
            let mut rest = vec![target.patch.region.clone()];
            for i in own_index.meeting(&target.patch.region) {
                Region::minus_all(&mut rest, &own[i].patch.region);
            }
            for earlier in index.meeting(&target.patch.region).into_iter().take_while(|&e| e < t) {
                for (got, _) in &out[of[earlier].clone()] {
                    if me == Some(class) {
                        let shared = rest.iter().filter_map(|r| r.meet(got));
                        doubles.extend(shared.map(|r| (r, of_class.start + earlier, of_class.start + t)));
                    }
                    Region::minus_all(&mut rest, got);
                }
            }
            let begin = out.len();
            out.extend(rest.into_iter().map(|r| (r, of_class.start + t)));
            of.push(begin..out.len());
        }
    }
    out
}

/// Equal boxes of the same atom with all that hold and need them, in the order of the boxes; those only that concern class `me`,
/// if there is one.
fn shares(
    me: Option<u32>,
    sources: &[Held],
    targets: &[Held],
    atoms: &[Atom],
    index: &Index<'_>,
    fresh: &[(Region, usize)],
) -> Vec<Share> {
    let mut distinct: BTreeMap<&Region, Vec<usize>> = BTreeMap::new();
    for (region, t) in fresh {
        distinct.entry(region).or_default().push(*t);
    }
    let mut met: BTreeMap<Region, (usize, Vec<usize>)> = BTreeMap::new();
    for (region, needs) in distinct {
        for atom in index.meeting(region) {
            if let Some(shared) = atoms[atom].region.meet(region) {
                met.entry(shared).or_insert_with(|| (atom, vec![])).1.extend(&needs);
            }
        }
    }
    let mut out = vec![];
    for (region, (atom, mut needs)) in met {
        let mut owners: SmallVec<[u32; 4]> = atoms[atom].owners.iter().map(|&i| i as u32).collect();
        owners.dedup_by_key(|o| sources[*o as usize].class);
        needs.sort_unstable();
        let mine = |class: u32| me.is_none_or(|me| me == class);
        if owners.iter().any(|&o| mine(sources[o as usize].class)) || needs.iter().any(|&t| mine(targets[t].class)) {
            out.push(Share { region, owners, needs: needs.into_iter().map(|t| t as u32).collect() });
        }
    }
    out
}

/// Ranks of one tier that exchange a box.
struct Group {
    tier: u8,
    /// The replicas, rising: rank, and place in [`Share::owners`].
    near: Vec<(u32, u32)>,
    /// Those that need it, rising: rank, and place in [`Share::needs`].
    needs: Vec<(u32, u32)>,
}

/// Tier, and what tells its groups apart.
type Tier = (u8, [u64; 2]);

/// Ids of the classes that hold a box and of those that need it.
type Key = (SmallVec<[u32; 8]>, SmallVec<[u32; 8]>);

/// Gives boxes to the replicas that send them. Remembers which ranks meet, which depends on classes and places only.
pub struct Router<'p> {
    /// This rank; `None`: all ranks are of interest.
    me: Option<u32>,
    places: &'p [Place],
    /// Bytes of a piece that is passed on, at most.
    relayed: u64,
    known: HashMap<Key, Rc<[Group]>>,
}

/// One part of a box on its way.
pub struct Sent<'g> {
    /// The part.
    pub part: Region,
    /// Sender, and its source, or its target if it passes the part on.
    pub from: (u32, &'g Held),
    /// What it is passed on in.
    pub stream: Option<Stream>,
    /// Receiver, and its target.
    pub to: (u32, &'g Held),
    /// How near they are: 1 to 3.
    pub tier: u8,
}

impl<'p> Router<'p> {
    /// For the moves of one rank, or with `None` of all. `places` are those of all ranks, of which the least has so much `staging`.
    pub fn new(me: Option<u32>, places: &'p [Place], staging: u64) -> Router<'p> {
        Router { me, places, relayed: relay_piece(staging), known: HashMap::new() }
    }

    /// Adds this rank's moves of one tensor to `plan`. Tensors come in the order of their ordinals.
    pub fn plan(&mut self, facts: &TensorFacts<'_>, geometry: &Geometry, tensor: &Tensor<'_>, plan: &mut Plan) -> Result<()> {
        let Some(me) = self.me else { return Ok(()) };
        let spot = |holders: &[Holder<'_>], side: usize, held: &Held, region: &Region| {
            let holder = &holders[held.holder as usize];
            Spot { buffer: tensor.rows[side][holder.base as usize] + holder.buffer, offset: held.patch.offset_of(region) }
        };
        for (region, from, to) in &geometry.doubles {
            let (from, to) = (&geometry.targets[*from], &geometry.targets[*to]);
            let item = double(tensor.name, me, &facts.targets[from.holder as usize], &facts.targets[to.holder as usize])?;
            let ends = (spot(&facts.targets, 1, from, region), spot(&facts.targets, 1, to, region));
            plan.doubles.push(piece(&geometry.radix, region, tensor.ordinal, item, (from, ends.0), (to, ends.1)));
        }
        self.send(facts, geometry, tensor.ordinal, &mut |s| {
            // A relay sends what it has got.
            let (senders, side) = if s.stream.is_some_and(|s| s.hop > 0) { (&facts.targets, 1) } else { (&facts.sources, 0) };
            let holders = (&senders[s.from.1.holder as usize], &facts.targets[s.to.1.holder as usize]);
            let item = format(tensor.name, (s.from.0, holders.0), (s.to.0, holders.1))?;
            let ends = (spot(senders, side, s.from.1, &s.part), spot(&facts.targets, 1, s.to.1, &s.part));
            let mut piece = piece(&geometry.radix, &s.part, tensor.ordinal, item, (s.from.1, ends.0), (s.to.1, ends.1));
            piece.stream = s.stream;
            if s.from.0 == me {
                plan.peer(s.to.0).out.push(piece);
            } else {
                plan.peer(s.from.0).into.push(piece);
            }
            Ok(())
        })
    }

    /// Tells `found` every part of every box that goes from or to this rank, or with none from any rank to any.
    pub fn send<'g>(
        &mut self,
        facts: &TensorFacts<'_>,
        geometry: &'g Geometry,
        ordinal: u32,
        found: &mut dyn FnMut(Sent<'g>) -> Result<()>,
    ) -> Result<()> {
        for share in &geometry.shares {
            let groups = self.groups(facts, geometry, share);
            let dtype = facts.sources[geometry.sources[share.owners[0] as usize].holder as usize].dtype;
            let bytes = share.region.volume() * u64::from(dtype.1 / 8);
            for group in &*groups {
                let n = group.near.len() as u64;
                let c = (bytes / SHARE).clamp(1, n);
                let axis = cut_axis(&share.region, c);
                // Rows are cut where copies stay aligned, if they are so long that the parts stay even.
                let rows = axis + 1 == share.region.len.len();
                let grain = if rows && share.region.len[axis] >= 64 * GRAIN * c { GRAIN } else { 1 };
                if let Some(order) = self.relays(facts, geometry, share, group, dtype) {
                    let first = u64::from(ordinal) % n;
                    for i in 0..c {
                        let Some(part) = share.region.split(axis, i, c, grain) else { continue };
                        let owner = group.near[((first + i) % n) as usize];
                        let from = (owner.0, &geometry.sources[share.owners[owner.1 as usize] as usize]);
                        let most = self.relayed / u64::from(dtype.1 / 8).max(1);
                        self.pass_on(geometry, share, group, &order, from, (&part, most), found)?;
                    }
                    continue;
                }
                let place = self.me.and_then(|me| group.near.binary_search_by_key(&me, |o| o.0).ok());
                for (q, need) in group.needs.iter().enumerate() {
                    let first = (u64::from(ordinal) + c * q as u64) % n;
                    // All parts, but of a sender only its own; a rank that needs a box is not among those that hold it.
                    let parts = match place {
                        Some(at) => {
                            let i = (at as u64 + n - first) % n;
                            i..(i + 1).min(c)
                        }
                        None if self.me.is_none_or(|me| me == need.0) => 0..c,
                        None => 0..0,
                    };
                    for i in parts {
                        let owner = group.near[((first + i) % n) as usize];
                        let Some(part) = share.region.split(axis, i, c, grain) else { continue };
                        let from = (owner.0, &geometry.sources[share.owners[owner.1 as usize] as usize]);
                        let to = (need.0, &geometry.targets[share.needs[need.1 as usize] as usize]);
                        found(Sent { part, from, to, tier: group.tier, stream: None })?;
                    }
                }
            }
        }
        Ok(())
    }

    /// The order in which the ranks that need a box get it, by place in [`Group::needs`], and how many of them, the first, pass it on;
    /// `None`: sources send it to each.
    fn relays(
        &self,
        facts: &TensorFacts<'_>,
        geometry: &Geometry,
        share: &Share,
        group: &Group,
        dtype: (u8, u8),
    ) -> Option<(Vec<usize>, usize)> {
        if group.tier != 3 || group.needs.len() < 2 {
            return None;
        }
        // What lands there must be what the source has.
        let relays = |place: &usize| {
            let (rank, need) = group.needs[*place];
            let target = &facts.targets[geometry.targets[share.needs[need as usize] as usize].holder as usize];
            self.places[rank as usize].relays && target.dtype == dtype && target.transform == RS_TRANSFORM_NONE
        };
        let (mut order, last): (Vec<usize>, Vec<usize>) = (0..group.needs.len()).partition(relays);
        let count = order.len();
        order.extend(last);
        (count > 0).then_some((order, count))
    }

    /// Tells `found` how a part passes from a source through the ranks that need it: in pieces of `most` elements, as far as this rank is
    /// concerned; or as a whole, for all.
    #[allow(clippy::too_many_arguments)] // All of it is what `send` has found out about a box.
    fn pass_on<'g>(
        &self,
        geometry: &'g Geometry,
        share: &'g Share,
        group: &Group,
        (order, relays): &(Vec<usize>, usize),
        source: (u32, &'g Held),
        (part, most): (&Region, u64),
        found: &mut dyn FnMut(Sent<'g>) -> Result<()>,
    ) -> Result<()> {
        let end = |place: usize| {
            let (rank, need) = group.needs[order[place]];
            (rank, &geometry.targets[share.needs[need as usize] as usize])
        };
        let ranks = std::iter::once(source.0).chain((0..order.len()).map(|p| end(p).0)).chain([*relays as u32]);
        let id = xxh3_64(&ranks.flat_map(u32::to_le_bytes).collect::<Vec<u8>>());
        for place in 0..order.len() {
            let to = end(place);
            // Each relay behind the one before it; the rest behind the relays by turns, the last first: it sends to none else.
            let before = if place < *relays { place.checked_sub(1) } else { Some(relays - 1 - (place - relays) % relays) };
            let (from, hop) = before.map_or((source, 0), |b| (end(b), b as u32 + 1));
            if self.me.is_some_and(|me| me != from.0 && me != to.0) {
                continue;
            }
            let near = self.places[from.0 as usize].host == self.places[to.0 as usize].host;
            let tier = if hop > 0 && near { 2 } else { group.tier };
            let pieces = if self.me.is_some() { part.chunks(most) } else { vec![part.clone()] };
            for part in pieces {
                found(Sent { part, from, to, tier, stream: Some(Stream { id, hop }) })?;
            }
        }
        Ok(())
    }

    /// Which ranks exchange a box; those groups only that this rank is in.
    fn groups(&mut self, facts: &TensorFacts<'_>, geometry: &Geometry, share: &Share) -> Rc<[Group]> {
        let owners: SmallVec<[&Class; 8]> =
            share.owners.iter().map(|&o| &facts.classes[geometry.sources[o as usize].class as usize]).collect();
        let needs: SmallVec<[&Class; 8]> =
            share.needs.iter().map(|&t| &facts.classes[geometry.targets[t as usize].class as usize]).collect();
        let key: Key = (owners.iter().map(|c| c.id).collect(), needs.iter().map(|c| c.id).collect());
        if let Some(known) = self.known.get(&key) {
            return known.clone();
        }
        let groups = self.meet(&owners, &needs);
        self.known.insert(key, groups.clone());
        groups
    }

    fn meet(&self, owners: &[&Class], needs: &[&Class]) -> Rc<[Group]> {
        let (owners, needs) = (ranks(owners), ranks(needs));
        let keys: HashSet<Tier> = owners.iter().flat_map(|o| [1, 2].map(|tier| (tier, self.tier_key(tier, o.0)))).collect();
        let mut groups: BTreeMap<Tier, Vec<(u32, u32)>> = BTreeMap::new();
        for need in needs {
            let near = |&tier: &u8| {
                let key = self.tier_key(tier, need.0);
                key != [0; 2] && keys.contains(&(tier, key))
            };
            let tier = [1, 2].into_iter().find(near).unwrap_or(3);
            let key = if tier == 3 { [0; 2] } else { self.tier_key(tier, need.0) };
            groups.entry((tier, key)).or_default().push(need);
        }
        let mut out = vec![];
        for ((tier, key), needs) in groups {
            let near: Vec<(u32, u32)> = owners.iter().copied().filter(|o| tier == 3 || self.tier_key(tier, o.0) == key).collect();
            let within = |list: &[(u32, u32)]| self.me.is_none_or(|me| list.binary_search_by_key(&me, |r| r.0).is_ok());
            if within(&near) || within(&needs) {
                out.push(Group { tier, near, needs });
            }
        }
        out.into()
    }

    /// What tells the groups of a tier apart; zeros: none.
    fn tier_key(&self, tier: u8, rank: u32) -> [u64; 2] {
        let place = &self.places[rank as usize];
        if tier == 1 { place.device } else { [place.host, 1] }
    }
}

/// The ranks of some classes, rising, each with its class's place in the list.
fn ranks(classes: &[&Class]) -> Vec<(u32, u32)> {
    let mut out: Vec<(u32, u32)> = (0..).zip(classes).flat_map(|(i, c)| c.ranks.iter().map(move |&r| (r, i))).collect();
    out.sort_unstable();
    out
}

/// Bytes of an element of the source, and what the target makes of it.
fn format(tensor: &str, (from, source): (u32, &Holder<'_>), (to, target): (u32, &Holder<'_>)) -> Result<(u32, Option<Convert>)> {
    let convert = Convert::between(source.dtype, target.dtype, target.transform).map_err(|e| {
        let (source, target) = (source.param, target.param);
        e.context(format_args!("tensor '{tensor}', source '{source}' of rank {from}, target '{target}' of rank {to}"))
    })?;
    Ok((u32::from(source.dtype.1) / 8, convert))
}

/// The same for a second target on the rank that has the first: what landed there is what it wants, or it cannot be had from there.
fn double(tensor: &str, rank: u32, from: &Holder<'_>, to: &Holder<'_>) -> Result<(u32, Option<Convert>)> {
    if (from.dtype, from.transform) != (to.dtype, to.transform) {
        bail!(
            RS_ERR_UNSUPPORTED,
            "tensor '{tensor}': targets '{}' and '{}' of rank {rank} want the same elements with different dtypes or transforms: that \
             is not built",
            from.param,
            to.param
        );
    }
    Ok((u32::from(to.dtype.1) / 8, None))
}

/// The axis along which a box is cut in `parts`: the slowest that gives nearly equal parts, else the longest.
fn cut_axis(region: &Region, parts: u64) -> usize {
    let len = &region.len;
    let even = (0..len.len()).find(|&i| len[i] % parts == 0 || len[i] >= 16 * parts);
    even.unwrap_or_else(|| (0..len.len()).rev().max_by_key(|&i| len[i]).unwrap_or(0))
}
