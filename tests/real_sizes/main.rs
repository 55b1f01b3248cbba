//! Plans of world specs at real sizes, on every rank and without memory, against layouts written down independently.
//!
//! Of every world: what a rank receives and what it holds itself is what it wants, each element once, from where it truly lies to
//! where it truly belongs; no byte more crosses; both ends of a pair agree; replicas send evenly; rounds leave nobody idle.

#[path = "../balance/mod.rs"]
mod balance;
mod cells;
mod check;
mod holds;
mod models;
mod pairs;
mod parts;
mod sides;

use check::{Seen, check};
use models::Model;
use pairs::{LLAMA, OTHERS, Pairs, QWEN2_5, QWEN3};
use sides::Side;
use std::collections::BTreeSet;

#[test]
fn llama() {
    run(LLAMA);
}

#[test]
fn qwen2_5() {
    run(QWEN2_5);
}

#[test]
fn qwen3() {
    run(QWEN3);
}

#[test]
fn tensor_parallel_sizes_that_are_no_powers_of_two() {
    run(OTHERS);
}

#[test]
fn every_model_has_its_pairs() {
    let all: Vec<&Pairs> = [LLAMA, QWEN2_5, QWEN3, OTHERS].into_iter().flatten().collect();
    assert_eq!(all.iter().map(|p| p.0).collect::<BTreeSet<_>>(), Model::all().collect());
    for (name, pairs) in all {
        assert!(pairs.iter().collect::<BTreeSet<_>>().len() >= 8, "{name} has {} pairs", pairs.len());
    }
}

/// Checks all pairs before it fails.
fn run(all: &[Pairs]) {
    let (mut sums, mut failures) = (Sums::default(), vec![]);
    for (name, pairs) in all {
        let model = Model::named(name);
        for pair in *pairs {
            let (source, target) = pair.split_once(" -> ").expect("two sides");
            match check(&model, &Side::new(source), &Side::new(target)) {
                Ok(seen) => {
                    println!("{name}: {pair}: {seen}");
                    sums.add(&seen);
                }
                Err(e) => failures.push(format!("{name}: {pair}: {e}")),
            }
        }
    }
    println!("{sums:?}");
    assert!(failures.is_empty(), "{} failures:\n{}", failures.len(), failures.join("\n"));
    assert!(sums.alike > 0 && sums.asserted * 2 > sums.bytes, "too little is asserted: {sums:?}");
}

/// What was seen of all worlds.
#[derive(Debug, Default)]
struct Sums {
    worlds: usize,
    ranks: usize,
    pieces: usize,
    bytes: u64,
    asserted: u64,
    egress: f64,
    /// Worlds whose rounds figure is asserted.
    alike: usize,
    rounds: f64,
}

impl Sums {
    fn add(&mut self, seen: &Seen) {
        self.worlds += 1;
        self.ranks += seen.ranks;
        self.pieces += seen.pieces;
        self.bytes += seen.egress.all;
        self.asserted += seen.egress.asserted;
        self.egress = self.egress.max(seen.egress.busiest);
        if seen.rounds.alike {
            self.alike += 1;
            self.rounds = self.rounds.max(seen.rounds.figure);
        }
    }
}
