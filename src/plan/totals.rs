//! What a sync of a whole world costs, from its spec alone.
#![forbid(unsafe_code)]

use super::Place;
use super::closed::Alike;
use super::rounds::{LEAST_MESSAGE, message_size};
use super::route::Router;
use crate::error::Result;
use crate::preset::spec::Links;
use crate::preset::world::World;
use serde_json::{Value, json};
use std::collections::{BTreeMap, HashMap};

/// What goes from a rank to another.
#[derive(Default)]
struct Pair {
    bytes: u64,
    tier: u8,
}

/// All moves of all ranks, summed.
#[derive(Default)]
struct Sums {
    pairs: HashMap<(u32, u32), Pair>,
    /// By rank: out and in, to and from its host, and beyond.
    traffic: Vec<[[u64; 2]; 2]>,
    /// What the targets hold.
    landed: u64,
}

/// Totals of a world on given places, with messages of so much staging a rank; `seconds` where there are `links`.
pub fn totals(world: &World, places: &[Place], staging: u64, links: Option<Links>) -> Result<Value> {
    let mut alike = Alike::new(world, None);
    let plain = sums(world, places, staging, &mut alike)?;
    let mut out = plain.report(world, staging, links);
    // The same where all targets pass on what they get.
    let places: Vec<Place> = places.iter().map(|p| Place { relays: true, ..*p }).collect();
    let relayed = sums(world, &places, staging, &mut alike)?;
    out["relayed"] = json!({"egress": relayed.balance(world, 0), "ingress": relayed.balance(world, 1)});
    if let Some(links) = links {
        out["relayed"]["seconds"] = json!(relayed.seconds(links));
    }
    Ok(out)
}

fn sums<'w>(world: &'w World, places: &[Place], staging: u64, alike: &mut Alike<'w>) -> Result<Sums> {
    let mut sums = Sums { traffic: vec![[[0; 2]; 2]; places.len()], ..Sums::default() };
    let mut router = Router::new(None, places, staging);
    for (ordinal, id) in (0..).zip(world.model().all()) {
        let known = alike.of(id, &world.model().name(id))?;
        let (facts, geometry) = &*known;
        // As many bytes as the source has of them.
        let item = u64::from(world.sides()[0].kind_dtype(id.kind).1 / 8);
        for t in &facts.targets {
            sums.landed += t.pattern.volume() * item * facts.classes[t.class as usize].ranks.len() as u64;
        }
        router.send(facts, geometry, ordinal, &mut |s| {
            let bytes = s.part.volume() * item;
            let pair = sums.pairs.entry((s.from.0, s.to.0)).or_default();
            pair.bytes += bytes;
            pair.tier = pair.tier.max(s.tier);
            let far = usize::from(s.tier == 3);
            sums.traffic[s.from.0 as usize][far][0] += bytes;
            sums.traffic[s.to.0 as usize][far][1] += bytes;
            Ok(())
        })?;
    }
    Ok(sums)
}

impl Sums {
    fn report(&self, world: &World, staging: u64, links: Option<Links>) -> Value {
        let stage = |side: usize, rank: u32| world.sides()[side].stage(rank).unwrap_or(0);
        let mut by_stage: BTreeMap<(u64, u64, u8), (u64, u64)> = BTreeMap::new();
        let mut peers: Vec<Vec<u32>> = vec![vec![]; self.traffic.len()];
        for (&(from, to), pair) in &self.pairs {
            let sum = by_stage.entry((stage(0, from), stage(1, to), pair.tier)).or_default();
            *sum = (sum.0 + 1, sum.1 + pair.bytes);
            peers[from as usize].push(to);
            peers[to as usize].push(from);
        }
        let pair = |(&(source, target, tier), &(pairs, bytes)): (&(u64, u64, u8), &(u64, u64))| {
            let tier = ["same_device", "same_host", "network"][usize::from(tier) - 1];
            json!({"source_stage": source, "target_stage": target, "tier": tier, "pairs": pairs, "bytes": bytes})
        };
        // A rank may be the peer of another in both directions.
        let distinct = |list: &mut Vec<u32>| {
            list.sort_unstable();
            list.dedup();
            list.len() as u64
        };
        let peers = peers.iter_mut().map(distinct).max().unwrap_or(0);
        // With less, connect would ask for more staging.
        let message = message_size(staging, peers).max(LEAST_MESSAGE);
        let (rounds, figure) = self.rounds(message);
        let mut out = json!({
            "parameters": world.model().parameters(),
            "ranks": self.traffic.len(),
            "bytes": {"landed": self.landed, "sent": self.total(), "received": self.total()},
            "pairs": by_stage.iter().map(pair).collect::<Vec<_>>(),
            "egress": self.balance(world, 0),
            "ingress": self.balance(world, 1),
            "most_peers": peers,
            "message_bytes": message,
            "staging_bytes": 4 * peers * message,
            "rounds": rounds,
            "rounds_over_busiest": figure,
        });
        if let Some(links) = links {
            out["seconds"] = json!(self.seconds(links));
        }
        out
    }

    /// How long the busiest rank's links take.
    fn seconds(&self, links: Links) -> f64 {
        let time = |t: &[[u64; 2]; 2]| {
            let of = |bytes: [u64; 2], rate: f64| bytes[0].max(bytes[1]) as f64 / (rate * 1e9);
            of(t[0], links.same_host).max(of(t[1], links.network))
        };
        self.traffic.iter().map(time).fold(0.0, f64::max)
    }

    fn total(&self) -> u64 {
        self.pairs.values().map(|p| p.bytes).sum()
    }

    /// Bytes of the ranks of each stage, out (0) or in (1).
    fn balance(&self, world: &World, way: usize) -> Vec<Value> {
        let mut stages: BTreeMap<u64, Vec<u64>> = BTreeMap::new();
        for (rank, t) in (0..).zip(&self.traffic) {
            if let Some(stage) = world.sides()[way].stage(rank) {
                stages.entry(stage).or_default().push(t[0][way] + t[1][way]);
            }
        }
        let line = |(stage, ranks): (u64, Vec<u64>)| {
            let (sum, most) = (ranks.iter().sum::<u64>(), ranks.iter().max());
            json!({"stage": stage, "ranks": ranks.len(), "bytes": sum, "busiest": most, "mean": sum / ranks.len() as u64})
        };
        stages.into_iter().map(line).collect()
    }

    /// Number of rounds, and the time that they take together over that of the busiest rank alone.
    fn rounds(&self, message: u64) -> (u64, f64) {
        let mut left: Vec<(u32, u32, u64)> = self.pairs.iter().map(|(&(from, to), p)| (from, to, p.bytes)).collect();
        let (mut rounds, mut sum) = (0, 0);
        let mut now = vec![[0; 2]; self.traffic.len()];
        while !left.is_empty() {
            // As many rounds as all pairs have whole messages for are alike; then one with what is less.
            let times = left.iter().map(|l| l.2 / message).min().unwrap_or(0).max(1);
            now.fill([0; 2]);
            for (from, to, bytes) in &mut left {
                let moved = message.min(*bytes);
                now[*from as usize][0] += moved;
                now[*to as usize][1] += moved;
                *bytes -= moved.saturating_mul(times).min(*bytes);
            }
            left.retain(|l| l.2 > 0);
            sum += now.iter().map(|n| n[0].max(n[1])).max().unwrap_or(0) * times;
            rounds += times;
        }
        let busiest = self.traffic.iter().map(|t| (t[0][0] + t[1][0]).max(t[0][1] + t[1][1])).max().unwrap_or(0);
        (rounds, if busiest == 0 { 1.0 } else { sum as f64 / busiest as f64 })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rounds_take_as_long_as_their_busiest_rank() {
        for (message, pairs, wanted) in [
            (4, &[(0, 1, 8), (2, 3, 4), (2, 4, 4)][..], (2, 1.5)), // 2 sends 8 at once, then 0 its other 4
            (4, &[(0, 1, 10), (0, 2, 4)], (3, 1.0)),               // 8, 4 and 2: what 0 sends in all
            (8, &[(0, 1, 3), (1, 0, 8)], (1, 1.0)),                // a rank sends and receives at once
            (1, &[(0, 1, u64::MAX / 2)], (u64::MAX / 2, 1.0)),
            (4, &[], (0, 1.0)),
        ] {
            let mut sums = Sums { traffic: vec![[[0; 2]; 2]; 5], ..Sums::default() };
            for &(from, to, bytes) in pairs {
                sums.pairs.insert((from, to), Pair { bytes, tier: 3 });
                sums.traffic[from as usize][1][0] += bytes;
                sums.traffic[to as usize][1][1] += bytes;
            }
            assert_eq!(sums.rounds(message), wanted, "{message} {pairs:?}");
        }
    }
}
