//! Plans of world specs at real sizes, on every rank and without memory, against layouts written down independently.
//!
//! Of every world: what a rank receives and what it holds itself is what it wants, each element once, from where it truly lies to
//! where it truly belongs; no byte more crosses; both ends of a pair agree; replicas send evenly; rounds leave nobody idle.

#[path = "../balance/mod.rs"]
mod balance;
mod agree;
mod cells;
mod check;
mod covers;
mod dense;
mod holds;
mod models;
mod names;
mod newer;
mod pairs;
mod parts;
mod routed;
mod sides;
mod sparse;
mod tensors;

use check::{Seen, check};
use models::Model;
use pairs::{LLAMA, OTHERS, Pairs, QWEN2_5, QWEN3};
use sides::Side;
use sparse::{CUT_OFTEN, DEEPSEEK, GPT_OSS, MIXTRAL, QWEN_MOE, SOME_LAYERS};
use std::collections::BTreeSet;
use std::time::Instant;

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
fn mixtral() {
    run(MIXTRAL);
}

#[test]
fn qwen_with_experts() {
    run(QWEN_MOE);
}

#[test]
fn deepseek_and_kin() {
    let stages = run(DEEPSEEK);
    // No rank of these engines is on a host of the trainer's: all ranks of a stage can send what is no expert, and do.
    let apart: Vec<_> = stages.iter().filter(|s| s.0.contains("-> vllm 256-")).collect();
    assert!(apart.len() >= 3 && apart.iter().all(|s| s.1 <= 1.05), "{apart:?}");
}

#[test]
#[ignore = "minutes: every rank has parts of all experts; tests/long.sh runs it"]
fn experts_cut_often() {
    run(CUT_OFTEN);
}

#[test]
fn gpt_oss() {
    run(GPT_OSS);
}

#[test]
fn experts_in_some_layers() {
    run(SOME_LAYERS);
}

#[test]
fn every_model_has_its_pairs() {
    let dense: Vec<&Pairs> = [LLAMA, QWEN2_5, QWEN3, OTHERS].into_iter().flatten().collect();
    let sparse: Vec<&Pairs> = [MIXTRAL, QWEN_MOE, DEEPSEEK, GPT_OSS, SOME_LAYERS].into_iter().flatten().collect();
    assert_eq!(dense.iter().chain(&sparse).map(|p| p.0).collect::<BTreeSet<_>>(), Model::all().collect());
    for (all, least) in [(dense, 8), (sparse, 4)] {
        for (name, pairs) in all {
            assert!(pairs.iter().collect::<BTreeSet<_>>().len() >= least, "{name} has {} pairs", pairs.len());
        }
    }
}

/// Checks all pairs before it fails; of each, how evenly the ranks of a stage send ([`Seen::stage`]).
fn run(all: &[Pairs]) -> Vec<(&'static str, f64)> {
    let (mut sums, mut failures, mut stages) = (Sums::default(), vec![], vec![]);
    for (name, pairs) in all {
        let model = Model::named(name);
        for pair in *pairs {
            let (source, target) = pair.split_once(" -> ").expect("two sides");
            let begun = Instant::now();
            match check(&model, &Side::new(source), &Side::new(target)) {
                Ok(seen) => {
                    println!("{name}: {pair}: {seen}; {:.2} s", begun.elapsed().as_secs_f64());
                    sums.add(&seen);
                    stages.push((*pair, seen.stage));
                }
                Err(e) => failures.push(format!("{name}: {pair}: {e}")),
            }
        }
    }
    println!("{sums:?}");
    assert!(failures.is_empty(), "{} failures:\n{}", failures.len(), failures.join("\n"));
    let some = sums.alike > 0 || sums.worlds == 1;
    assert!(some && sums.asserted * 2 > sums.bytes, "too little is asserted: {sums:?}");
    stages
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
