//! What a fingerprint tells apart, and how calls of it end that cannot be answered. Its value is compared in every random case (`run`).

mod verify;

use super::oracle::library::{Comm, Container, Failure, Tables};
use super::oracle::model::{Buffer, Case, Rank, Tensor, Tile, dense};
use super::oracle::small;
use super::oracle::sums::of_tensor;
use super::oracle::truth::Memory;
use super::oracle::world::{self, Wire, World};
use fastrand::Rng;
use reshard::abi::*;

const BF16: rs_dtype_t = rs_dtype_t { code: 4, bits: 16, lanes: 1 };

/// A source, and two engines that hold the same.
fn replicas() -> Case {
    let mut case = small::two_ranks();
    case.ranks.push(case.ranks[1].clone());
    case
}

fn connected<'a>(case: &'a Case, wire: Wire) -> World<'a> {
    let opened = world::open(case, &mut Rng::with_seed(7), wire);
    let mut world = opened.map_err(|refused| refused[0].1.to_string()).unwrap();
    world.all_ok("connect", |_, c| c.connect()).unwrap();
    world
}

fn ask(world: &mut World<'_>, role: u32, tensor: Option<&str>) -> Vec<Result<u128, Failure>> {
    world.all(|_, c| c.fingerprint(role, tensor))
}

/// What all ranks say alike.
fn sum(world: &mut World<'_>, role: u32, tensor: Option<&str>) -> u128 {
    let all: Vec<u128> = ask(world, role, tensor).into_iter().map(|s| s.unwrap_or_else(|e| panic!("{e}"))).collect();
    assert!(all.iter().all(|s| *s == all[0]), "{all:x?}");
    all[0]
}

/// The status of a call that all ranks refuse, whose texts name `what`.
fn refused(answers: Vec<Result<u128, Failure>>, what: &str) -> rs_status_t {
    let all: Vec<Failure> = answers.into_iter().map(|a| a.expect_err("refused")).collect();
    assert!(all.iter().all(|f| f.status == all[0].status && f.text.contains(what)), "{all:?}");
    all[0].status
}

fn flip(memory: &mut Memory, at: usize, bits: u8) {
    let mut image = memory.bytes();
    image[at] ^= bits;
    write(memory, &image);
}

/// Other bytes, which are there when this returns: on a GPU too.
fn write(memory: &mut Memory, image: &[u8]) {
    memory.write(image);
    assert_eq!(memory.bytes(), image);
}

#[test]
fn one_bit_in_one_replica_is_named() {
    let case = replicas();
    for wire in [Wire::Custom, Wire::Local(0)] {
        let mut world = connected(&case, wire);
        world.sync(3, None).unwrap();
        world.check_sums(3, None).unwrap();
        let mut rng = Rng::with_seed(1);
        for (buffer, tensor, other) in [(0, "A", "B"), (1, "A", "B"), (2, "B", "A")] {
            let rank = rng.usize(1..3);
            let owner = &case.ranks[rank];
            let at = world.memories[rank].start(owner, buffer) + rng.usize(..owner.buffers[buffer].bytes);
            let bits = 1 << rng.u8(..8);
            flip(&mut world.memories[rank], at, bits);
            let named = format!("'{tensor}'");
            assert_eq!(refused(ask(&mut world, RS_TARGET, None), &named), RS_ERR_MISMATCH);
            assert_eq!(refused(ask(&mut world, RS_TARGET, Some(tensor)), &named), RS_ERR_MISMATCH);
            assert_eq!(sum(&mut world, RS_TARGET, Some(other)), sum(&mut world, RS_SOURCE, Some(other)));
            flip(&mut world.memories[rank], at, bits);
            world.check_sums(3, None).unwrap();
        }
        world.close().unwrap();
    }
}

/// What one replica has too much and another too little does not even out.
#[test]
fn two_replicas_that_differ_the_other_way_are_named() {
    let mut case = replicas();
    case.ranks.push(case.ranks[1].clone());
    let mut world = connected(&case, Wire::Custom);
    world.sync(1, None).unwrap();
    for (rank, low) in [(2, 0x40), (3, 0x20)] {
        let start = world.memories[rank].start(&case.ranks[rank], 2);
        let mut image = world.memories[rank].bytes();
        image[start] = low;
        write(&mut world.memories[rank], &image);
    }
    let start = world.memories[1].start(&case.ranks[1], 2);
    let mut image = world.memories[1].bytes();
    image[start] = 0x30;
    write(&mut world.memories[1], &image);
    assert_eq!(refused(ask(&mut world, RS_TARGET, None), "'B'"), RS_ERR_MISMATCH);
    world.close().unwrap();
}

/// A tensor whose targets have two dtypes has no number; the others have theirs.
#[test]
fn a_tensor_of_two_dtypes_is_refused_alone() {
    let mut case = replicas();
    let narrow = &mut case.ranks[2].buffers[2];
    narrow.dtype = rs_dtype_t { code: 2, bits: 16, lanes: 1 };
    let mut world = connected(&case, Wire::Custom);
    world.all_ok("sync", |_, c| c.sync(1, None)).unwrap();
    for role in [RS_SOURCE, RS_TARGET] {
        assert_eq!(refused(ask(&mut world, role, None), "'B'"), RS_ERR_UNSUPPORTED);
        assert_eq!(refused(ask(&mut world, role, Some("B")), "'B'"), RS_ERR_UNSUPPORTED);
    }
    assert_eq!(sum(&mut world, RS_SOURCE, Some("A")), sum(&mut world, RS_TARGET, Some("A")));
    world.close().unwrap();
}

#[test]
fn a_changed_source_shows_until_it_is_synced() {
    let case = replicas();
    let mut world = connected(&case, Wire::Custom);
    world.sync(1, None).unwrap();
    let before = sum(&mut world, RS_SOURCE, None);
    let by_tensor = ["A", "B"].map(|t| sum(&mut world, RS_SOURCE, Some(t)));
    assert_ne!(by_tensor[0], by_tensor[1]);
    // One bit.
    let first = world.memories[0].start(&case.ranks[0], 0);
    flip(&mut world.memories[0], first + 1000, 4);
    assert_ne!(sum(&mut world, RS_SOURCE, None), before);
    assert_ne!(sum(&mut world, RS_SOURCE, Some("A")), by_tensor[0]);
    flip(&mut world.memories[0], first + 1000, 4);
    assert_eq!(sum(&mut world, RS_SOURCE, None), before);
    // Two rows of B change places.
    let (row, start) = (48 * 4, world.memories[0].start(&case.ranks[0], 1));
    let mut image = world.memories[0].bytes();
    let (upper, lower) = image[start..].split_at_mut(5 * row);
    assert_ne!(upper[2 * row..3 * row], lower[..row]);
    upper[2 * row..3 * row].swap_with_slice(&mut lower[..row]);
    write(&mut world.memories[0], &image);
    assert_ne!(sum(&mut world, RS_SOURCE, None), before);
    assert_ne!(sum(&mut world, RS_SOURCE, Some("B")), by_tensor[1]);
    assert_eq!(sum(&mut world, RS_SOURCE, Some("A")), by_tensor[0]);
    assert_eq!(sum(&mut world, RS_TARGET, None), before);
    world.all_ok("sync", |_, c| c.sync(2, None)).unwrap();
    let after = sum(&mut world, RS_SOURCE, None);
    assert_ne!(after, before);
    assert_eq!(sum(&mut world, RS_TARGET, None), after);
    world.close().unwrap();
}

/// A vector of zeros on two ranks, the second with `rest` elements of it: a shard that is left out shows, though it holds nothing.
#[test]
fn a_shard_of_zeros_that_is_left_out_shows() {
    let mut found = vec![];
    for rest in [300, 299, 0] {
        let tensor = Tensor { name: "z".into(), shape: vec![500], dtype: BF16, target: BF16, transform: 0, seed: 1 };
        let rank = |from: i64, extent: i64| {
            let view = vec![500];
            let stride = dense(&[extent]);
            let tile =
                Tile { tensor: 0, buffer: 0, transform: 0, byte_offset: 0, view, origin: vec![from], extent: vec![extent], stride };
            let (shape, bytes) = (vec![extent], extent as usize * 2);
            let strides = vec![1];
            let (name, role) = ("p".into(), RS_SOURCE);
            let buffer = Buffer { name, role, padded: false, dtype: BF16, shape, strides, bytes, block: 0, at: 0 };
            Rank { blocks: vec![bytes], listed: vec![0], buffers: vec![buffer], tiles: vec![tile], ..Rank::default() }
        };
        let none = Rank { listed: vec![0], ..Rank::default() };
        let case =
            Case { seed: 0, tensors: vec![tensor], ranks: vec![rank(0, 200), if rest > 0 { rank(200, rest) } else { none }] };
        let mut world = connected(&case, Wire::Custom);
        for memory in &mut world.memories {
            let zeros = vec![0; memory.bytes().len()];
            write(memory, &zeros);
        }
        let got = sum(&mut world, RS_SOURCE, None);
        assert_eq!(got, of_tensor("z", BF16, &[500], &[0; 1000], 200 + rest as u128));
        found.push(got);
        world.close().unwrap();
    }
    assert!(found[0] != found[1] && found[1] != found[2]);
}

#[test]
fn what_ranks_do_not_agree_on_is_refused_and_the_next_call_works() {
    let case = replicas();
    for wire in [Wire::Custom, Wire::Local(0)] {
        let mut world = connected(&case, wire);
        world.sync(1, None).unwrap();
        let odd = |r: usize, usual: u32, other: u32| if r == 1 { other } else { usual };
        let answers = world.all(|r, c| c.fingerprint(odd(r, RS_SOURCE, RS_TARGET), None));
        assert_eq!(refused(answers, "another role or tensor"), RS_ERR_MISMATCH);
        let answers = world.all(|r, c| c.fingerprint(RS_SOURCE, Some(["A", "B"][odd(r, 0, 1) as usize])));
        assert_eq!(refused(answers, "another role or tensor"), RS_ERR_MISMATCH);
        let answers = world.all(|r, c| if r == 1 { c.sync(2, None).map(|()| 0) } else { c.fingerprint(RS_TARGET, None) });
        let calls = format!("{answers:?}");
        assert!(calls.contains("rs_sync_weights") && calls.contains("rs_fingerprint"), "{calls}");
        assert_eq!(refused(answers, "rank "), RS_ERR_MISMATCH);
        assert_eq!(refused(ask(&mut world, RS_SOURCE | RS_TARGET, None), "role is 3"), RS_ERR_INVALID);
        assert_eq!(refused(ask(&mut world, RS_TARGET, Some("C")), "'C'"), RS_ERR_NOT_FOUND);
        // One rank's mistake is an error on all, not a wait for it.
        let answers = world.all(|r, c| c.fingerprint(odd(r, RS_SOURCE, 0), None));
        let statuses: Vec<rs_status_t> = answers.iter().map(|a| a.as_ref().expect_err("refused").status).collect();
        assert_eq!(statuses, [RS_ERR_MISMATCH, RS_ERR_INVALID, RS_ERR_MISMATCH]);
        // Poll tells of syncs: of that which rank 1 called last, and of the first one.
        let polled: Vec<_> = world.containers.iter().map(|c| c.poll().map_err(|e| e.status)).collect();
        assert_eq!(polled, [Ok(true), Err(RS_ERR_MISMATCH), Ok(true)]);
        world.check_sums(1, None).unwrap();
        world.sync(4, None).unwrap();
        world.close().unwrap();
    }
}

#[test]
fn a_rank_that_gives_up_ends_it_everywhere() {
    let case = replicas();
    let mut world = connected(&case, Wire::Custom);
    let answers = world.all(|r, c| {
        if r == 2 {
            c.aborter().abort();
        }
        c.fingerprint(RS_SOURCE, None)
    });
    assert!(answers.iter().all(|a| a.as_ref().is_err_and(|e| e.status <= RS_ERR_TIMEOUT)), "{answers:?}");
    assert_eq!(refused(ask(&mut world, RS_SOURCE, None), "connect"), RS_ERR_STATE);
    world.renew().unwrap();
    world.sync(1, None).unwrap();
    world.check_sums(1, None).unwrap();
    world.close().unwrap();
}

/// One rank, no other: a checkpoint in memory.
#[test]
fn a_container_that_is_not_connected_says_so() {
    let case = small::two_ranks();
    let rank = &case.ranks[0];
    let mut memory = Memory::new(super::HOST, &rank.blocks, 1);
    let tables = Tables::new(&case, rank, memory.kind(), |b| memory.address(rank.buffers[b].block, rank.buffers[b].at));
    let comm = Comm::loopback(1 << 40, 0, 1).unwrap();
    let mut container = Container::create(rank, &tables, &comm, 1000).unwrap();
    assert_eq!(container.fingerprint(RS_SOURCE, None).unwrap_err().status, RS_ERR_STATE);
    container.connect().unwrap();
    assert_eq!(container.fingerprint(RS_TARGET, None).unwrap_err().status, RS_ERR_NOT_FOUND);
    let start = memory.start(rank, 0);
    let bytes = memory.bytes()[start..start + 64 * 48 * 4].to_vec();
    let wanted = of_tensor("A", case.tensors[0].dtype, &[64, 48], &bytes, 64 * 48);
    assert_eq!(container.fingerprint(RS_SOURCE, Some("A")).unwrap(), wanted);
}
