//! Random layouts on both sides, moved by the library and checked byte by byte against a brute-force oracle.
//!
//! 10,000 cases; `RESHARD_CASES=N` runs another number, `RESHARD_SEED=N` one case again, with all its tables if it fails.

mod oracle;
mod sums;

use fastrand::Rng;
use oracle::breakage::{self, Broken};
use oracle::gpu::HOST;
use oracle::library::Failure;
use oracle::model::Case;
use oracle::naive::{Slip, move_all};
use oracle::run;
use oracle::sweep::sweep;
use oracle::truth::{Memory, compare, held, write};
use oracle::world::{self, Unmoved, Wire};
use oracle::{generate, model, sabotage, small, valid};
use reshard::abi::*;
use std::collections::HashMap;

/// Whatever the tables say, a sync writes each target element's value and no other byte, and each byte crosses once.
#[test]
fn a_sync_writes_what_the_tables_say_and_nothing_else() {
    sweep(1, |seed| {
        let case = generate::case(seed, None);
        run::run(&case).map_err(|text| (case, text))
    });
}

/// Runs that are longer than random cases have, which some communicators read where they lie; whole and cut by small messages.
#[test]
fn long_runs_go_to_their_places() {
    for seed in 0..6 {
        let mut case = Case { seed, ..small::long_runs() };
        case.ranks.iter_mut().for_each(|rank| rank.staging = if seed % 3 == 0 { 0 } else { seed << 20 });
        run::run(&case).unwrap_or_else(|e| panic!("seed {seed}: {e}"));
    }
}

/// Tables that are wrong or do not fit are refused on every rank, by name, and no byte is written.
#[test]
fn wrong_tables_are_refused_and_move_nothing() {
    sweep(4, |seed| {
        let (valid, case, broken) = breakage::case(seed);
        let told = refusal(&case, &broken).and_then(|own| own.map_or(Ok(()), |r| refused_rebind(&valid, &case, &broken, r)));
        told.map_err(|text| (case, format!("{}: {text}", broken.what)))
    });
}

/// Runs a broken case; the rank whose own tables were refused at once, if that is how it was found.
fn refusal(case: &Case, broken: &Broken) -> Result<Option<usize>, String> {
    let mut rng = Rng::with_seed(model::mix(case.seed));
    let wire = Wire::any(&mut rng);
    let mut world = match world::open(case, &mut rng, wire) {
        Ok(world) => world,
        Err(refused) => {
            for (r, failure, Unmoved(unmoved)) in &refused {
                if Some(*r) != broken.own || !unmoved {
                    return Err(format!("rank {r}: create: {failure}; its memory is as it was: {unmoved}"));
                }
                fits(broken, failure)?;
            }
            return Ok(broken.own);
        }
    };
    world.publish(1);
    let expected = world.expected(&vec![false; case.tensors.len()], 1);
    for (r, answer) in world.all(|_, c| c.connect()).into_iter().enumerate() {
        let failure = answer.err().ok_or(format!("rank {r} connected"))?;
        fits(broken, &failure).map_err(|e| format!("rank {r}: {e}"))?;
    }
    for (r, answer) in world.all(|_, c| c.sync(1, None)).into_iter().enumerate() {
        if answer.as_ref().err().map(|f| f.status) != Some(RS_ERR_STATE) {
            return Err(format!("rank {r}: a sync after a failed connect: {answer:?}"));
        }
    }
    world.compare(&expected)?;
    world.close().map(|()| None)
}

/// A rank at work that is given wrong tables keeps what it had.
fn refused_rebind(valid: &Case, case: &Case, broken: &Broken, rank: usize) -> Result<(), String> {
    let mut rng = Rng::with_seed(model::mix(case.seed));
    let wire = Wire::any(&mut rng);
    let mut world = world::open(valid, &mut rng, wire).map_err(|refused| format!("create: {}", refused[0].1))?;
    world.all_ok("connect", |_, c| c.connect())?;
    world.sync(1, None)?;
    let tables = world.tables_of(case, rank);
    fits(broken, &world.containers[rank].rebind(&tables).err().ok_or(format!("rank {rank} was rebound"))?)?;
    world.sync(2, None).map_err(|e| format!("after a refused rebind: {e}"))?;
    world.close()
}

fn fits(broken: &Broken, failure: &Failure) -> Result<(), String> {
    let said = |any: &Vec<String>| any.iter().any(|word| failure.text.contains(word.as_str()));
    match broken.words.iter().find(|any| !said(any)) {
        _ if !broken.statuses.contains(&failure.status) => Err(format!("not one of {:?}: {failure}", broken.statuses)),
        Some(any) => Err(format!("none of {any:?} in: {failure}")),
        None => Ok(()),
    }
}

/// Ranks that ask for different things, or for part of a parameter, get an error each; nothing is written, the next sync works.
#[test]
fn ranks_that_disagree_move_nothing() {
    sweep(20, |seed| {
        let case = generate::case(seed, Some(2 + seed as usize % 4));
        disagreement(&case).map_err(|text| (case, text))
    });
}

fn disagreement(case: &Case) -> Result<(), String> {
    let mut rng = Rng::with_seed(model::mix(case.seed));
    let wire = Wire::any(&mut rng);
    let mut world = world::open(case, &mut rng, wire).map_err(|refused| format!("create: {}", refused[0].1))?;
    world.all_ok("connect", |_, c| c.connect())?;
    world.publish(7);
    let expected = world.expected(&vec![false; case.tensors.len()], 7);
    let (odd, names) = (rng.usize(0..case.ranks.len()), run::some_names(case, &mut rng));
    let versions = names.is_empty() || rng.bool();
    let answers = world.all(|r, c| match (r == odd, versions) {
        (false, _) => c.sync(7, None),
        (true, true) => c.sync(8, None),
        (true, false) => c.sync(7, Some(&names)),
    });
    for (r, answer) in answers.into_iter().enumerate() {
        if answer.as_ref().err().map(|f| f.status) != Some(RS_ERR_MISMATCH) {
            return Err(format!(
                "rank {r}: rank {odd} asks for another {}: {answer:?}",
                if versions { "version" } else { "subset" }
            ));
        }
    }
    world.compare(&expected)?;
    world.sync(9, None)?;
    // Who has a target that the subset cuts is told so; the others, that this rank refused.
    let cut = |rank: &model::Rank, t: usize| {
        let part = |tile: &model::Tile| tile.tensor == t && rank.tiles.iter().any(|o| o.buffer == tile.buffer && o.tensor != t);
        rank.tiles_of(RS_TARGET).any(part)
    };
    if let Some(t) = (0..case.tensors.len()).find(|&t| case.ranks.iter().any(|rank| cut(rank, t))) {
        let name = [case.tensors[t].name.clone()];
        world.publish(10);
        let expected = world.expected(&vec![false; case.tensors.len()], 10);
        for (r, answer) in world.all(|_, c| c.sync(10, Some(&name))).into_iter().enumerate() {
            let must = if cut(&case.ranks[r], t) { RS_ERR_INVALID } else { RS_ERR_MISMATCH };
            if answer.as_ref().err().map(|f| f.status) != Some(must) {
                return Err(format!("rank {r}: {name:?} alone is part of a target: {answer:?}"));
            }
        }
        world.compare(&expected)?;
        world.sync(11, None)?;
    }
    world.close()
}

/// After a sync that fails at any moment, what is untouched, torn or landed is said to be; new communicators and a sync heal it.
#[test]
fn a_sync_that_fails_says_what_it_left() {
    sweep(4, |seed| {
        let case = generate::case(seed, None);
        sabotage::run(&case).map_err(|text| (case, text))
    });
}

/// The comparison is worth something: an honest mover of single elements passes it, each kind of slip does not.
#[test]
fn the_oracle_passes_an_honest_mover_and_catches_each_slip() {
    for seed in 0..400 {
        let case = generate::case(seed, None);
        let all = vec![true; case.tensors.len()];
        let moved = |slip: Slip| {
            let fresh = |rank: &model::Rank| Memory::new(HOST, &rank.blocks, seed);
            let mut memories: Vec<Memory> = case.ranks.iter().map(fresh).collect();
            let mut expected = Vec::new();
            for (r, memory) in memories.iter_mut().enumerate() {
                let mut image = memory.bytes();
                write(&case, r, RS_SOURCE, &all, 1, memory, &mut image);
                memory.write(&image);
                write(&case, r, RS_TARGET, &all, 1, memory, &mut image);
                expected.push(image);
            }
            move_all(&case, &mut memories, slip);
            let bytes: Vec<Vec<u8>> = memories.iter().map(Memory::bytes).collect();
            (bytes, memories.iter().enumerate().try_for_each(|(r, m)| compare(&case, r, m, &expected[r])))
        };
        let (honest, verdict) = moved(Slip::None);
        verdict.unwrap_or_else(|e| panic!("seed {seed}: {e}"));
        for slip in [Slip::Skips, Slip::Shifts, Slip::Spills, Slip::Scribbles] {
            let (bytes, verdict) = moved(slip);
            assert_eq!(bytes == honest, verdict.is_ok(), "seed {seed}: {slip:?}: {verdict:?}");
        }
    }
}

/// What the generator calls valid is valid by the header's words.
#[test]
fn generated_cases_are_valid() {
    sweep(5, |seed| {
        let case = generate::case(seed, None);
        valid::flaw(&case).map_or(Ok(()), |text| Err((case, text)))
    });
    let seen = ["an element without a source", "two target", "out of its buffer", "in no tile", "over another element"];
    sweep(20, |seed| {
        let (_, case, broken) = breakage::case(seed);
        let flaw = if seen.iter().any(|s| broken.what.contains(s)) { valid::flaw(&case) } else { Some(String::new()) };
        flaw.map(|_| ()).ok_or((case, format!("{} is not seen", broken.what)))
    });
}

/// The generator makes every kind of case that the header allows, each in a fair share of the seeds.
#[test]
fn the_generator_makes_every_kind_of_case() {
    let cases: Vec<Case> = (0..1000).map(|seed| generate::case(seed, None)).collect();
    let tiles = |case: &Case, fits: &dyn Fn(&model::Buffer, &model::Tile) -> bool| {
        case.ranks.iter().any(|r| r.tiles.iter().any(|t| fits(&r.buffers[t.buffer], t)))
    };
    let buffers = |case: &Case, fits: &dyn Fn(&model::Rank, &model::Buffer) -> bool| {
        case.ranks.iter().any(|r| r.buffers.iter().any(|b| fits(r, b)))
    };
    let doubled = |case: &Case, r: usize| held(case, r, RS_TARGET).iter().flatten().any(|&n| n > 1);
    let replicated = |case: &Case| {
        let all: Vec<_> = (0..case.ranks.len()).map(|r| held(case, r, RS_SOURCE)).collect();
        (0..case.tensors.len()).any(|t| (0..case.tensors[t].len()).any(|e| all.iter().filter(|h| h[t][e] > 0).count() > 1))
    };
    let falling = |t: &model::Tile| {
        let wide: Vec<i64> = (0..t.view.len()).filter(|&j| t.extent[j] > 1).map(|j| t.stride[j]).collect();
        wide.is_sorted_by(|a, b| a > b)
    };
    type Kind<'a> = (&'a str, &'a dyn Fn(&Case) -> bool);
    let kinds: [Kind; 14] = [
        ("one rank", &|c| c.ranks.len() == 1),
        ("a rank without a role", &|c| c.ranks.iter().any(|r| r.buffers.is_empty())),
        ("a scalar", &|c| c.tensors.iter().any(|t| t.shape.is_empty())),
        ("five axes", &|c| c.tensors.iter().any(|t| t.shape.len() == 5)),
        ("a view of its own", &|c| tiles(c, &|_, t| t.view != c.tensors[t.tensor].shape)),
        ("permuted axes", &|c| tiles(c, &|_, t| !falling(t))),
        ("an offset", &|c| tiles(c, &|_, t| t.byte_offset > 0)),
        ("padding", &|c| buffers(c, &|_, b| b.padded)),
        ("strided buffers", &|c| buffers(c, &|_, b| b.role == RS_TARGET && !b.padded && b.strides.iter().all(|&s| s > 1))),
        ("fused buffers", &|c| buffers(c, &|r, b| r.tiles.iter().filter(|t| r.buffers[t.buffer].name == b.name).count() > 2)),
        ("memory of both roles", &|c| buffers(c, &|_, b| b.role == RS_SOURCE | RS_TARGET)),
        ("two rows on one memory", &|c| buffers(c, &|r, b| r.buffers.iter().filter(|o| o.block == b.block).count() > 1)),
        ("doubles", &|c| (0..c.ranks.len()).any(|r| doubled(c, r))),
        ("replicas", &replicated),
    ];
    for (what, has) in kinds {
        let count = cases.iter().filter(|c| has(c)).count();
        assert!(count >= 20, "{what}: {count} of 1000 cases");
    }
    let mut broken: HashMap<&str, u32> = HashMap::new();
    (0..1000).for_each(|seed| *broken.entry(breakage::case(seed).2.what).or_default() += 1);
    assert!(broken.len() >= 13 && broken.values().all(|&n| n >= 20), "{broken:?} of 1000 broken cases");
}

/// A subset reads what it needs from whom it needs it, whoever else takes part in a whole sync.
#[test]
fn a_subset_reads_from_its_own_owners() {
    let dtype = rs_dtype_t { code: 4, bits: 16, lanes: 1 };
    let tensor =
        |name: &str, seed: u64| model::Tensor { name: name.into(), shape: vec![4], dtype, target: dtype, transform: 0, seed };
    let buffer = |name: &str, role: u32, block: usize| model::Buffer {
        name: name.into(),
        role,
        padded: false,
        dtype,
        shape: vec![4],
        strides: vec![1],
        bytes: 8,
        block,
        at: 0,
    };
    let tile = |tensor: usize, buffer: usize| model::Tile {
        tensor,
        buffer,
        transform: 0,
        byte_offset: 0,
        view: vec![4],
        origin: vec![0],
        extent: vec![4],
        stride: vec![1],
    };
    let rank = |buffers: Vec<model::Buffer>, tiles: Vec<model::Tile>| model::Rank {
        blocks: vec![8; buffers.len()],
        listed: vec![0, 1],
        buffers,
        tiles,
        ..model::Rank::default()
    };
    let target = rank(vec![buffer("a", RS_TARGET, 0), buffer("b", RS_TARGET, 1)], vec![tile(0, 0), tile(1, 1)]);
    let sources =
        [rank(vec![buffer("a", RS_SOURCE, 0)], vec![tile(0, 0)]), rank(vec![buffer("b", RS_SOURCE, 0)], vec![tile(1, 0)])];
    let case = Case { seed: 0, tensors: vec![tensor("A", 1), tensor("B", 2)], ranks: [vec![target], sources.to_vec()].concat() };
    let mut world = world::open(&case, &mut Rng::with_seed(0), Wire::Loopback).map_err(|refused| refused[0].1.to_string()).unwrap();
    world.all_ok("connect", |_, c| c.connect()).unwrap();
    world.sync(1, Some(&["B".into()])).unwrap();
    world.sync(2, Some(&["A".into()])).unwrap();
    world.close().unwrap();
}
