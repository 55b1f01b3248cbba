//! A rank's plan from a world spec: nobody is asked, and no rank is listed that holds nothing of this rank's tensors.
#![forbid(unsafe_code)]

use super::owners::{Class, Holder};
use super::route::{Geometry, Router, Tensor, TensorFacts};
use super::{Place, Plan};
use crate::error::Result;
use crate::preset::model::Id;
use crate::preset::world::{Likeness, World};
use std::borrow::Cow;
use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::rc::Rc;

/// What tensors that lie alike have in common, found once for each likeness.
pub struct Alike<'w> {
    world: &'w World,
    /// Whose moves are planned; `None`: those of all ranks.
    me: Option<u32>,
    known: HashMap<Likeness, Rc<(TensorFacts<'w>, Geometry)>>,
    /// Classes' ids by their ranks.
    ids: HashMap<Rc<[u32]>, u32>,
}

impl<'w> Alike<'w> {
    /// For one rank, or with `None` for all.
    pub fn new(world: &'w World, me: Option<u32>) -> Alike<'w> {
        Alike { world, me, known: HashMap::new(), ids: HashMap::new() }
    }

    /// Facts and geometry of a tensor; `name` is for errors.
    pub fn of(&mut self, id: Id, name: &str) -> Result<Rc<(TensorFacts<'w>, Geometry)>> {
        let like = self.world.likeness(id);
        if let Some(known) = self.known.get(&like) {
            return Ok(known.clone());
        }
        let (facts, own) = self.facts(&like);
        let geometry = Geometry::new(own, &facts, name, self.me)?;
        let made = Rc::new((facts, geometry));
        self.known.insert(like, made.clone());
        Ok(made)
    }

    /// Classes and holders, and the class of `me`.
    pub(super) fn facts(&mut self, like: &Likeness) -> (TensorFacts<'w>, Option<u32>) {
        let world = self.world;
        let mut facts = TensorFacts { shape: Cow::Borrowed(world.shape(like)), ..TensorFacts::default() };
        let mut classes = vec![];
        let mut own = None;
        for (class, group) in (0..).zip(world.groups(like)) {
            for (side, list) in [&mut facts.sources, &mut facts.targets].into_iter().enumerate() {
                let Some(coords) = group.coords[side] else { continue };
                list.extend(world.holds(side, like, coords).into_iter().map(|h| Holder {
                    class,
                    buffer: h.row,
                    base: h.place,
                    dtype: world.sides()[side].dtype(h.param),
                    transform: h.param.transform,
                    param: &h.param.name,
                    pattern: h.pattern,
                }));
            }
            if self.me.is_some_and(|me| group.ranks.binary_search(&me).is_ok()) {
                own = Some(class);
            }
            let next = self.ids.len() as u32;
            let (id, ranks) = match self.ids.entry(group.ranks.into()) {
                Entry::Occupied(known) => (*known.get(), known.key().clone()),
                Entry::Vacant(new) => {
                    let ranks = new.key().clone();
                    (*new.insert(next), ranks)
                }
            };
            classes.push(Class { id, ranks });
        }
        facts.classes = Cow::Owned(classes);
        (facts, own)
    }
}

/// The plan of rank `me`. Its buffers are those of its source side, then those of its target side; a peer's target is a row of the
/// peer's target side, and so is what a peer passes on. `staging`: the least of all ranks.
pub fn plan(me: u32, places: &[Place], staging: u64, world: &World) -> Result<Plan> {
    let mut plan = Plan::default();
    let mut alike = Alike::new(world, Some(me));
    let mut router = Router::new(Some(me), places, staging);
    for (ordinal, id) in world.tensors_of(me) {
        let name = world.model().name(id);
        let known = alike.of(id, &name)?;
        let rows = [0, 1].map(|side| world.rows(side, id));
        router.plan(&known.0, &known.1, &Tensor { ordinal, name: &name, rows }, &mut plan)?;
    }
    plan.sort();
    let sources = world.sides()[0].count(me);
    let into = plan.peers.iter_mut().flat_map(|p| &mut p.into);
    into.chain(&mut plan.doubles).for_each(|p| p.dst.buffer += sources);
    let passed = plan.peers.iter_mut().flat_map(|p| &mut p.out).filter(|p| p.stream.is_some_and(|s| s.hop > 0));
    passed.for_each(|p| p.src.buffer += sources);
    plan.doubles.iter_mut().for_each(|p| p.src.buffer += sources);
    Ok(plan)
}

/// Places of ranks that nobody has asked, `per_host` to a host; `None`: all on one.
pub fn places(world: u32, per_host: Option<u64>) -> Vec<Place> {
    (0..world).map(|r| Place { host: 1 + u64::from(r) / per_host.unwrap_or(u64::MAX), device: [0; 2], relays: false }).collect()
}
