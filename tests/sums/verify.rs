//! RS_SYNC_VERIFY finds a bit that flips on its way, in a target or in a source; that it finds nothing else, `run` shows.

use super::super::oracle::library::Failure;
use super::super::oracle::mailbox::Spoil;
use super::super::oracle::model::{Case, Tensor};
use super::super::oracle::world::{Wire, World};
use super::super::oracle::{generate, gpu, small};
use super::{connected, replicas};
use fastrand::Rng;
use reshard::abi::*;

fn verified<'a>(case: &'a Case) -> World<'a> {
    let mut world = connected(case, Wire::Custom);
    world.containers.iter_mut().for_each(|c| c.flags = RS_SYNC_VERIFY);
    world.sync(1, None).unwrap();
    world
}

/// All ranks say so; what has targets there is torn. The first text.
fn corrupt(world: &World<'_>, answers: Vec<Result<(), Failure>>) -> String {
    let all: Vec<Failure> = answers.into_iter().map(|a| a.expect_err("a difference")).collect();
    assert!(all.iter().all(|f| f.status == RS_ERR_CORRUPT && f.text == all[0].text), "{all:?}");
    for (rank, container) in world.case.ranks.iter().zip(&world.containers) {
        for (row, buffer) in rank.buffers.iter().enumerate() {
            let state = container.param_at(row).unwrap().state;
            let tiles = rank.tiles.iter().any(|t| t.buffer == row);
            assert_eq!(state == RS_PARAM_TORN, buffer.role & RS_TARGET != 0 && tiles, "{}: state {state}", buffer.name);
        }
    }
    all[0].text.clone()
}

#[test]
fn a_bit_that_flips_in_a_message_is_found() {
    let case = replicas();
    let mut rng = Rng::with_seed(3);
    for message in 0..2 {
        let mut world = verified(&case);
        world.publish(2);
        let hub = world.hub.clone().unwrap();
        hub.flip(message, rng.f64());
        let answers = world.all(|_, c| c.sync(2, None));
        assert!(hub.flipped());
        let text = corrupt(&world, answers);
        assert!(text.contains("parameter '") && text.contains("box [") && text.contains("rank 0, which sent it"), "{text}");
        world.renew().unwrap();
        world.sync(3, None).unwrap();
        world.close().unwrap();
    }
}

/// In copies inside a rank too, and in tensors that are cast.
#[test]
fn a_bit_that_flips_in_a_target_is_found_and_named() {
    let mut rng = Rng::with_seed(4);
    for (case, rank) in [(replicas(), 2), (small::two_alone(), 1)] {
        for (row, buffer) in case.ranks[rank].buffers.iter().enumerate().filter(|(_, b)| b.role == RS_TARGET) {
            let mut world = verified(&case);
            world.publish(2);
            let address = world.memories[rank].address(buffer.block, buffer.at) as usize + rng.usize(..buffer.bytes);
            // The first gather is of the headers, the second after all has landed.
            world.hub.as_ref().unwrap().spoil(Spoil { rank, gathers: 2, address, bits: 1 << rng.u8(..8) });
            let answers = world.all(|_, c| c.sync(2, None));
            let text = corrupt(&world, answers);
            assert!(text.contains(&format!("rank {rank}: parameter '{}'", buffer.name)), "row {row}: {text}");
            world.renew().unwrap();
            world.sync(3, None).unwrap();
            world.close().unwrap();
        }
    }
}

#[test]
fn a_source_that_changes_under_way_is_found() {
    let case = replicas();
    let mut rng = Rng::with_seed(5);
    for row in 0..2 {
        let mut world = verified(&case);
        world.publish(2);
        let buffer = &case.ranks[0].buffers[row];
        let address = world.memories[0].address(buffer.block, buffer.at) as usize + rng.usize(..buffer.bytes / 4) * 4 + 3;
        for gathers in [1, 2] {
            world.hub.as_ref().unwrap().spoil(Spoil { rank: 0, gathers, address, bits: 0x80 });
        }
        let answers = world.all(|_, c| c.sync(2, None));
        let text = corrupt(&world, answers);
        assert!(text.contains("rank 0, which sent it"), "{text}");
        world.close().unwrap();
    }
}

/// A flag that not all ranks give.
#[test]
fn ranks_that_do_not_all_verify_move_nothing() {
    let case = replicas();
    let mut world = verified(&case);
    world.containers[1].flags = 0;
    let answers = world.all(|_, c| c.sync(2, None));
    assert!(answers.iter().all(|a| a.as_ref().is_err_and(|e| e.status == RS_ERR_MISMATCH && e.text.contains("RS_SYNC_VERIFY"))));
    world.containers[1].flags = RS_SYNC_VERIFY;
    world.sync(3, None).unwrap();
    world.close().unwrap();
}

/// In random worlds a flipped message is found wherever it is.
#[test]
fn no_flipped_message_goes_unseen() {
    let (mut flipped, mut rng) = (0, Rng::with_seed(6));
    // What a cast rounds away is no difference.
    let exact = |case: &Case| !case.tensors.iter().any(Tensor::converts);
    // Over the stand-in driver this is one test of many schedules.
    let worlds = if gpu::wanted() { 15 } else { 150 };
    for case in (0..worlds).map(|seed| generate::case(seed, None)).filter(exact) {
        let seed = case.seed;
        let mut world = verified(&case);
        world.publish(2);
        let hub = world.hub.clone().unwrap();
        hub.flip(rng.u64(0..6), rng.f64());
        let answers = world.all(|_, c| c.sync(2, None));
        if !hub.flipped() {
            assert!(answers.iter().all(Result::is_ok), "seed {seed}: {answers:?}");
            continue;
        }
        flipped += 1;
        assert!(answers.iter().all(|a| a.as_ref().is_err_and(|e| e.status == RS_ERR_CORRUPT)), "seed {seed}: {answers:?}");
    }
    assert!(flipped >= worlds / 8, "{flipped} worlds with so many messages");
}

/// Who is lost while the others look at what has landed leaves it as it is.
#[test]
fn a_rank_lost_while_it_is_verified_tears_nothing() {
    let case = replicas();
    let mut world = verified(&case);
    world.publish(2);
    let expected = world.expected(&[true; 2], 2);
    // After the headers and the agreement.
    world.hub.as_ref().unwrap().spoil(Spoil { rank: 1, gathers: 3, address: 0, bits: 0 });
    let answers = world.all(|_, c| c.sync(2, None));
    assert!(
        answers.iter().all(|a| a.as_ref().is_err_and(|e| e.status <= RS_ERR_TIMEOUT && e.status != RS_ERR_CORRUPT)),
        "{answers:?}"
    );
    world.compare(&expected).unwrap();
    for container in &world.containers[1..] {
        assert_eq!(container.param_at(0).unwrap().state, RS_PARAM_LANDED);
    }
    world.renew().unwrap();
    world.sync(3, None).unwrap();
    world.close().unwrap();
}
