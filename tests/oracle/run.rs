//! What a valid case must live through.

use super::library::Failure;
use super::model::{Case, mix};
use super::views::chance;
use super::world::{Unmoved, Wire, open};
use super::{generate, plans};
use fastrand::Rng;
use reshard::abi::{RS_SYNC_VERIFY, RS_TARGET};

/// A valid case must work: connect, syncs of all and of parts, new addresses, then other tables for the same ranks.
pub fn run(case: &Case) -> Result<(), String> {
    let mut rng = Rng::with_seed(mix(case.seed));
    let rng = &mut rng;
    let refused = |all: Vec<(usize, Failure, Unmoved)>| format!("rank {}: create: {}", all[0].0, all[0].1);
    let wire = Wire::any(rng);
    let mut world = open(case, rng, wire).map_err(refused)?;
    world.all_ok("connect", |_, c| c.connect())?;
    plans::check(case, &world.containers, chance(rng, 30))?;
    world.sync(1, None)?;
    if chance(rng, 20) {
        world.check_sums(1, None)?;
    }
    for version in 2..2 + rng.u64(0..3) {
        let moved = if chance(rng, 40) { world.move_house(rng)? } else { Vec::new() };
        let patterns = chance(rng, 50).then(|| some_names(case, rng));
        let flags = if chance(rng, 20) { RS_SYNC_VERIFY } else { 0 };
        world.containers.iter_mut().for_each(|c| c.flags = flags);
        let what = |e: String| format!("version {version}, {wire:?}, rebound {moved:?}, only {patterns:?}, flags {flags}: {e}");
        world.sync(version * 1000, patterns.as_deref()).map_err(&what)?;
        if let Some(first) = patterns.as_ref().and_then(|p| p.first()).filter(|_| chance(rng, 20)) {
            world.check_sums(version * 1000, Some(first)).map_err(what)?;
        }
    }
    let mut other = generate::case((mix(case.seed + 1) << 2) | (case.seed % 4), Some(case.ranks.len()));
    other.ranks.iter_mut().zip(&case.ranks).for_each(|(new, old)| (new.host, new.flags) = (old.host, old.flags));
    if chance(rng, 25) {
        world.rebuild(&other, rng)?;
        plans::check(&other, &world.containers, true)?;
        world
            .sync(9000, None)
            .and_then(|()| world.check_sums(9000, None))
            .map_err(|e| format!("after other boxes, {other}: {e}"))?;
    }
    world.close()
}

/// Names or prefixes of some tensors that some rank has, with all those that share a target with them: a parameter moves as a whole.
pub fn some_names(case: &Case, rng: &mut Rng) -> Vec<String> {
    let used = |t: &usize| case.ranks.iter().any(|r| r.tiles.iter().any(|x| x.tensor == *t));
    let names: Vec<usize> = (0..case.tensors.len()).filter(used).collect();
    let few = rng.usize(1..3);
    let mut chosen = rng.choose_multiple(names, few);
    loop {
        let before = chosen.len();
        for rank in &case.ranks {
            for tile in rank.tiles_of(RS_TARGET).filter(|x| !chosen.contains(&x.tensor)).collect::<Vec<_>>() {
                if rank.tiles.iter().any(|x| x.buffer == tile.buffer && chosen.contains(&x.tensor)) {
                    chosen.push(tile.tensor);
                }
            }
        }
        if chosen.len() == before {
            break;
        }
    }
    let spell = |t: usize| if t % 3 > 0 { case.tensors[t].name.clone() } else { format!("model.{t}.*") };
    chosen.into_iter().map(spell).collect()
}
