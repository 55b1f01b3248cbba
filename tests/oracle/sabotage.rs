//! Syncs that fail at a random moment: what each rank says about its memory must be what its memory is.

use super::library::Failure;
use super::model::{Case, mix};
use super::nccl::Maker;
use super::truth::write;
use super::world::{Wire, World, open};
use fastrand::Rng;
use reshard::abi::*;
use std::time::Duration;

/// A sync at version 1, then one at version 2 that is cut short, then new communicators and version 3.
pub fn run(case: &Case) -> Result<(), String> {
    let mut rng = Rng::with_seed(mix(case.seed));
    let wire = match Wire::any(&mut rng) {
        // Where one rank gives up, the others wait until their owners end the communicator, or for their deadlines.
        Wire::Nccl(_) => Wire::Nccl(Maker::Library),
        other => other,
    };
    let mut world = open(case, &mut rng, wire).map_err(|refused| format!("create: {}", refused[0].1))?;
    world.all_ok("connect", |_, c| c.connect())?;
    world.sync(1, None)?;
    let before = {
        world.publish(2);
        world.expected(&vec![false; case.tensors.len()], 2)
    };
    let after = world.expected(&vec![true; case.tensors.len()], 2);
    let answers = cut_short(&mut world, &mut rng);
    if answers.iter().all(Result::is_ok) {
        world.compare(&after)?;
        return world.close();
    }
    for r in 0..case.ranks.len() {
        check_rank(&world, r, &answers, &before[r], &after[r]).map_err(|e| format!("{wire:?}, {answers:?}: rank {r} {e}"))?;
    }
    world.renew().map_err(|e| format!("{wire:?}, {answers:?}: {e}"))?;
    world.sync(3, None).map_err(|e| format!("{wire:?}, after {answers:?} and new communicators: {e}"))?;
    world.close()
}

/// A sync at version 2 during which a wire breaks or a rank is told to give up.
fn cut_short(world: &mut World, rng: &mut Rng) -> Vec<Result<(), Failure>> {
    if let Some(hub) = world.hub.clone() {
        hub.break_after(rng.u64(0..60));
        return world.all(|_, c| c.sync(2, None));
    }
    let (victim, wait) = (rng.usize(0..world.containers.len()), Duration::from_micros(rng.u64(0..250)));
    let aborter = world.containers[victim].aborter();
    if matches!(world.wire, Wire::Nccl(_)) {
        // An abort of NCCL's is one rank's: the others learn of it by their deadlines.
        world.containers.iter_mut().for_each(|c| c.timeout_ms = 1000);
    }
    let answers = std::thread::scope(|scope| {
        scope.spawn(move || {
            std::thread::sleep(wait);
            aborter.abort();
        });
        world.all(|_, c| c.sync(2, None))
    });
    world.containers.iter_mut().for_each(|c| c.timeout_ms = 0);
    answers
}

/// Which bytes of a rank's memory are of a target.
fn written(world: &World, r: usize) -> Vec<bool> {
    let image = |fill: u8| {
        let mut image = vec![fill; world.memories[r].bytes().len()];
        write(world.case, r, RS_TARGET, &vec![true; world.case.tensors.len()], 1, &world.memories[r], &mut image);
        image
    };
    image(0).into_iter().zip(image(0xff)).map(|(zero, one)| zero == one).collect()
}

/// One rank after a sync that failed on some rank.
fn check_rank(world: &World, r: usize, answers: &[Result<(), Failure>], before: &[u8], after: &[u8]) -> Result<(), String> {
    let (case, now) = (world.case, world.memories[r].bytes());
    // Where NCCL's messages are unpacked by a stream that nobody stops, what did not come is unpacked too: into targets, which are torn.
    let written = written(world, r);
    let any = |i: usize| matches!(world.wire, Wire::Nccl(_)) && written[i];
    if let Some(byte) = (0..now.len()).find(|&i| now[i] != before[i] && now[i] != after[i] && !any(i)) {
        return Err(format!("has a byte at {byte} that is of neither version"));
    }
    let (untouched, landed) = (now == before, now == after);
    if answers.iter().any(Result::is_ok) && !landed {
        return Err("has not landed where another rank was told that all did".into());
    }
    for (b, buffer) in case.ranks[r].buffers.iter().enumerate().filter(|(_, b)| b.role & RS_TARGET != 0) {
        let param = world.containers[r].param_at(b).map_err(|e| format!("param {b}: {e}"))?;
        let fits = match (param.state, param.version) {
            (RS_PARAM_SYNCED, 1) => untouched,
            (RS_PARAM_SYNCED, 2) => landed && answers[r].is_ok(),
            (RS_PARAM_LANDED, 2) => landed && answers[r].is_err(),
            (RS_PARAM_TORN, _) => answers[r].is_err(),
            _ => false,
        };
        if !fits {
            return Err(format!("says {param:?} of {}; untouched: {untouched}, landed: {landed}", buffer.name));
        }
        let asked = world.containers[r].param(&buffer.name);
        if asked.is_err() != (param.state == RS_PARAM_TORN) || asked.is_err_and(|e| e.status != RS_ERR_TORN) {
            return Err(format!("answers wrongly for {}, {param:?}", buffer.name));
        }
    }
    Ok(())
}
