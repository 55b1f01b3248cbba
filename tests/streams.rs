//! Syncs that go on after their call has returned: they keep their place on the streams, other calls say so, and they end whatever
//! happens.
//!
//! With RESHARD_MEMORY=cuda, over every communicator that moves GPUs' memory; that the bytes of random layouts are right is for
//! `properties`.

#[allow(dead_code)] // `properties` uses the rest.
mod oracle;

use cudarc::driver::sys;
use fastrand::Rng;
use oracle::gpu::{self, Block};
use oracle::library::{Comm, Container, Failure};
use oracle::model::Case;
use oracle::nccl::{self, Maker};
use oracle::small::{many_rounds, two_alone, two_ranks};
use oracle::world::{self, Wire, World};
use reshard::abi::*;
use std::ffi::{c_int, c_void};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// One test at a time, as they count what is alive. `None`: weights do not go to GPUs in this run, or streams do not wait for words.
fn alone() -> Option<MutexGuard<'static, ()>> {
    static ONE: Mutex<()> = Mutex::new(());
    let lock = gpu::wanted().then(|| ONE.lock().unwrap_or_else(PoisonError::into_inner))?;
    let words = nccl::function::<usize>(c"cuStreamWaitValue64_v2").is_some();
    words.then_some(lock)
}

fn wires() -> Vec<Wire> {
    let mut all = vec![Wire::Loopback, Wire::Local(0)];
    if nccl::usable() {
        all.extend([
            Wire::Nccl(Maker::Library),
            Wire::Nccl(Maker::Test { blocks: true }),
            Wire::Nccl(Maker::Test { blocks: false }),
        ]);
    }
    all
}

fn live() -> u64 {
    nccl::function::<extern "C" fn() -> u64>(c"standin_live").map_or(0, |live| live())
}

/// A connected world of a source and a target that has synced version 1, and its GPUs.
fn at_work(case: &Case, wire: Wire) -> World<'_> {
    let mut world = world::open(case, &mut Rng::with_seed(3), wire).unwrap_or_else(|e| panic!("{}", e[0].1));
    world.all_ok("connect", |_, c| c.connect()).unwrap();
    world.sync(1, None).unwrap();
    world
}

/// A gate on a stream: what is put there later waits until it is opened.
struct Gate {
    word: Block,
}

impl Gate {
    fn on(container: &Container) -> Gate {
        let gpu = container.gpu.expect("weights on a GPU");
        let word = Block::new((RS_DEVICE_CUDA_HOST, gpu), &[0; 8]);
        gpu::on(gpu, || {
            // SAFETY: a live stream of this GPU, and a word that outlives what waits for it.
            let answer = unsafe { sys::cuStreamWaitValue64_v2(container.stream.cast(), word.at(0) as u64, 1, 0) };
            assert_eq!(answer as u32, 0);
        });
        Gate { word }
    }

    fn open(&mut self) {
        self.word.write(&1u64.to_ne_bytes());
    }
}

/// All ranks call, and none has landed when the calls are back.
fn start(world: &mut World<'_>, version: u64) {
    for answer in world.all(|_, c| c.start(version, None)) {
        assert!(!answer.unwrap(), "it has ended although a stream stands still");
    }
}

/// The same where they may have.
fn start_any(world: &mut World<'_>, version: u64) {
    world.all(|_, c| c.start(version, None)).into_iter().for_each(|answer| assert!(answer.is_ok()));
}

/// Polls all ranks until each has an answer.
fn ends(world: &mut World<'_>, within: Duration) -> Vec<Result<(), Failure>> {
    let begun = Instant::now();
    world.all(|_, c| {
        loop {
            match c.poll() {
                Ok(false) => assert!(begun.elapsed() < within, "in progress after {within:?}"),
                Ok(true) => return Ok(()),
                Err(e) => return Err(e),
            }
            std::thread::sleep(Duration::from_micros(50));
        }
    })
}

fn refused(answer: Result<(), Failure>) {
    let failure = answer.expect_err("a sync is in progress");
    assert!(failure.status == RS_ERR_STATE && failure.text.contains("version 2 is in progress"), "{failure}");
}

#[test]
fn a_call_returns_before_its_stream_comes_to_it() {
    let Some(_alone) = alone() else { return };
    let (case, before) = (two_ranks(), live());
    for wire in wires() {
        for gated in [0, 1] {
            let mut world = at_work(&case, wire);
            world.publish(2);
            let expected = world.expected(&[true; 2], 2);
            let mut gate = Gate::on(&world.containers[gated]);
            start(&mut world, 2);
            // What the caller puts on the source's stream next comes after its readers.
            let other = expected[0].iter().map(|b| !b).collect::<Vec<u8>>();
            if world.memories[0].kind().0 == RS_DEVICE_CUDA {
                world.memories[0].write(&other);
            }
            for _ in 0..20 {
                assert!(world.all(|_, c| c.poll()).into_iter().all(|a| !a.unwrap()), "{wire:?}: it has ended");
            }
            let tables: Vec<_> = (0..2).map(|r| world.tables_of(&case, r)).collect();
            for answer in world.all(|r, c| (c.start(3, None).map(|_| ()), c.rebind(&tables[r]), c.connect())) {
                refused(answer.0);
                refused(answer.1);
                refused(answer.2);
            }
            // Where it is says nothing of what is in it.
            let param = world.containers[1].param("left").unwrap();
            assert_eq!((param.state, param.version), (RS_PARAM_SYNCED, 1));
            gate.open();
            ends(&mut world, Duration::from_secs(20)).into_iter().for_each(|a| a.unwrap());
            let param = world.containers[1].param("left").unwrap();
            assert_eq!((param.state, param.version), (RS_PARAM_SYNCED, 2));
            assert_eq!(world.memories[1].bytes(), expected[1], "{wire:?}");
            world.sync(3, None).unwrap();
            world.close().unwrap();
            drop(gate);
            assert_eq!(live(), before, "{wire:?}: something is left");
        }
    }
}

/// The deadline is that of the sync, whoever looks when; the other rank is told, and a new communicator heals both.
#[test]
fn a_stream_that_stands_still_fails_the_sync_on_all_ranks() {
    let Some(_alone) = alone() else { return };
    let (case, before) = (two_ranks(), live());
    for (wire, gated) in [(Wire::Loopback, 0), (Wire::Local(0), 1)] {
        let mut world = at_work(&case, wire);
        world.publish(2);
        // A reader that has given up does not wait for what is on this stream.
        world.memories[0].bytes();
        let mut gate = Gate::on(&world.containers[gated]);
        world.containers.iter_mut().for_each(|c| c.timeout_ms = 300);
        start(&mut world, 2);
        let answers = ends(&mut world, Duration::from_secs(9));
        let text = |r: usize| answers[r].as_ref().expect_err("it cannot have landed").text.clone();
        assert!((0..2).all(|r| text(r).contains("waited 300 ms for the stream of cuda")), "{wire:?}: {answers:?}");
        // Whoever gave up first says whom it waited for.
        let late: &[&str] = match gated {
            0 => &["which has not come to this sync", "rank 0 has not come to its sources"],
            _ => &["rank 1 has not read this rank's sources", "for the stream of cuda:1"],
        };
        assert!(late.iter().any(|words| text(0).contains(words)), "{wire:?}: {answers:?}");
        assert_eq!(world.containers[1].param_at(0).unwrap().state, RS_PARAM_TORN);
        world.containers.iter_mut().for_each(|c| c.timeout_ms = 0);
        world.renew().unwrap();
        // What stood there still finds all that it uses.
        gate.open();
        world.memories.iter().for_each(|m| drop(m.bytes()));
        world.sync(3, None).unwrap();
        world.close().unwrap();
        drop(gate);
        assert_eq!(live(), before, "{wire:?}: something is left");
    }
}

#[test]
fn an_abort_ends_it_on_all_ranks() {
    let Some(_alone) = alone() else { return };
    let (case, before) = (two_ranks(), live());
    for wire in [Wire::Loopback, Wire::Local(0), Wire::Nccl(Maker::Library)] {
        if matches!(wire, Wire::Nccl(_)) && !nccl::usable() {
            continue;
        }
        let mut world = at_work(&case, wire);
        world.publish(2);
        let mut gate = Gate::on(&world.containers[1]);
        // NCCL's abort is one rank's.
        world.containers.iter_mut().for_each(|c| c.timeout_ms = 2_000);
        start(&mut world, 2);
        world.containers[0].aborter().abort();
        gate.open();
        let answers = ends(&mut world, Duration::from_secs(9));
        let statuses: Vec<_> = answers.iter().map(|a| a.as_ref().expect_err("aborted").status).collect();
        assert_eq!(statuses[0], RS_ERR_ABORTED, "{wire:?}: {answers:?}");
        assert!(statuses[1] == RS_ERR_ABORTED || matches!(wire, Wire::Nccl(_)), "{wire:?}: {answers:?}");
        // The answer stays.
        assert_eq!(world.containers[0].poll().unwrap_err().status, RS_ERR_ABORTED);
        world.containers.iter_mut().for_each(|c| c.timeout_ms = 0);
        world.renew().unwrap();
        world.sync(3, None).unwrap();
        world.close().unwrap();
        drop(gate);
        assert_eq!(live(), before, "{wire:?}: something is left");
    }
}

/// Its own copies are over when destroy returns, and so are those of its memory; the other rank is told.
#[test]
fn a_container_may_be_destroyed_meanwhile() {
    let Some(_alone) = alone() else { return };
    let (case, before) = (two_ranks(), live());
    for wire in [Wire::Loopback, Wire::Local(0)] {
        for gone in [0, 1] {
            let mut world = at_work(&case, wire);
            world.publish(2);
            start(&mut world, 2);
            drop(world.containers.remove(gone));
            let image = vec![7; world.memories[gone].bytes().len()];
            world.memories[gone].write(&image);
            let answers = ends(&mut world, Duration::from_secs(9));
            assert!(answers[0].is_err(), "{wire:?}: it has landed without rank {gone}");
            world.close().unwrap();
            assert_eq!(live(), before, "{wire:?}: something is left");
        }
    }
}

/// Connected containers of the same ranks, on the same memory and communicators.
fn more(world: &mut World<'_>) -> Vec<Container> {
    let mut all: Vec<Container> = (0..2)
        .map(|r| {
            let tables = world.tables_of(world.case, r);
            let mut container = Container::create(&world.case.ranks[r], &tables, &world.comms[r], 20_000).unwrap();
            container.stream = world.memories[r].stream();
            container
        })
        .collect();
    std::thread::scope(|scope| all.iter_mut().for_each(|c| drop(scope.spawn(|| c.connect().unwrap()))));
    all
}

/// A communicator that two containers share carries one call at a time.
#[test]
fn another_container_waits_for_its_turn() {
    let Some(_alone) = alone() else { return };
    let case = two_ranks();
    for wire in [Wire::Loopback, Wire::Local(0)] {
        let mut world = at_work(&case, wire);
        let mut others = more(&mut world);
        world.publish(2);
        let expected = world.expected(&[true; 2], 2);
        let mut gate = Gate::on(&world.containers[1]);
        start(&mut world, 2);
        for other in &mut others {
            for answer in [other.connect(), other.start(5, None).map(|_| ())] {
                let failure = answer.expect_err("the communicator is in use");
                assert!(failure.status == RS_ERR_BUSY && failure.text.contains("in progress"), "{failure}");
            }
        }
        gate.open();
        ends(&mut world, Duration::from_secs(20)).into_iter().for_each(|a| a.unwrap());
        world.compare(&expected).unwrap();
        let sync = |c: &mut Container| c.sync(3, None).unwrap();
        std::thread::scope(|scope| others.iter_mut().for_each(|c| drop(scope.spawn(move || sync(c)))));
        drop(others);
        world.close().unwrap();
    }
}

/// With a watchdog nobody need poll for the others to land, and its thread ends with the container.
#[test]
fn a_watchdog_polls() {
    let Some(_alone) = alone() else { return };
    let mut case = two_ranks();
    case.ranks.iter_mut().for_each(|r| r.flags = RS_CONFIG_WATCHDOG);
    // Other threads of this program come and go.
    let threads = || {
        let tasks = std::fs::read_dir("/proc/self/task").expect("reads").map_while(Result::ok);
        tasks.filter(|t| std::fs::read_to_string(t.path().join("comm")).is_ok_and(|name| name.starts_with("reshard-watch"))).count()
    };
    for wire in wires() {
        let (mut world, before) = (at_work(&case, wire), live());
        world.publish(2);
        let expected = world.expected(&[true; 2], 2);
        start_any(&mut world, 2);
        let begun = Instant::now();
        // A parameter's version is that of a sync that all ranks have landed.
        while world.containers[1].param("left").map_or(1, |p| p.version) != 2 {
            assert!(begun.elapsed() < Duration::from_secs(20), "{wire:?}: nobody polls");
            std::thread::sleep(Duration::from_millis(1));
        }
        world.compare(&expected).unwrap();
        assert!(ends(&mut world, Duration::from_secs(1)).iter().all(Result::is_ok));
        assert!(live() <= before, "{wire:?}: something is left");
        assert_eq!(threads(), 2, "{wire:?}");
        world.containers.clear();
        assert_eq!(threads(), 0, "{wire:?}");
        world.close().unwrap();
    }
}

/// Without anybody's poll a dead end is found too: the gate of a stream that waits for a rank that gave up opens.
#[test]
fn a_watchdog_ends_what_fails() {
    let Some(_alone) = alone() else { return };
    let mut case = two_ranks();
    case.ranks.iter_mut().for_each(|r| r.flags = RS_CONFIG_WATCHDOG);
    let mut world = at_work(&case, Wire::Loopback);
    world.publish(2);
    world.memories[0].bytes();
    let mut gate = Gate::on(&world.containers[0]);
    world.containers.iter_mut().for_each(|c| c.timeout_ms = 200);
    start(&mut world, 2);
    // Ends only when the reader's stream does, which waits for the source's.
    world.memories[1].bytes();
    ends(&mut world, Duration::from_secs(9)).into_iter().for_each(|a| assert!(a.is_err()));
    gate.open();
    world.memories[0].bytes();
    world.close().unwrap();
}

/// A graph repeats the copies, of what the sources then hold; states and versions stay as they were.
#[test]
fn a_graph_repeats_what_stays_on_each_rank() {
    let Some(_alone) = alone() else { return };
    let (case, before) = (two_alone(), live());
    for wire in [Wire::Loopback, Wire::Local(0)] {
        let mut world = at_work(&case, wire);
        world.containers.iter_mut().zip(&world.memories).for_each(|(c, m)| c.stream = m.stream());
        let stream = |c: &Container| c.stream.cast();
        let gpu = |c: &Container| c.gpu.expect("weights on a GPU");
        let mode = sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL;
        for c in &world.containers {
            // SAFETY: a live stream.
            gpu::on(gpu(c), || assert_eq!(unsafe { sys::cuStreamBeginCapture_v2(stream(c), mode) } as u32, 0));
        }
        world.containers.iter_mut().for_each(|c| c.flags = RS_SYNC_VERIFY);
        for answer in world.all(|_, c| c.start(2, None)) {
            let refused = answer.expect_err("nothing moves yet that could be verified");
            assert!(refused.status == RS_ERR_UNSUPPORTED && refused.text.contains("RS_SYNC_VERIFY"), "{refused}");
        }
        world.containers.iter_mut().for_each(|c| c.flags = 0);
        let graphs = captured(&mut world, 2);
        assert_eq!(world.containers[0].param("left").unwrap().version, 1, "nothing has moved yet");
        for version in 3..6 {
            world.publish(version);
            let expected = world.expected(&[true; 2], version);
            for (c, &graph) in world.containers.iter().zip(&graphs) {
                // SAFETY: a live graph and a live stream.
                gpu::on(gpu(c), || assert_eq!(unsafe { sys::cuGraphLaunch(graph, stream(c)) } as u32, 0));
            }
            world.compare(&expected).unwrap();
        }
        // Between replays, syncs go on; and when one has failed, replays do.
        world.sync(7, None).unwrap();
        world.containers[0].timeout_ms = 200;
        assert_eq!(world.containers[0].sync(8, None).unwrap_err().status, RS_ERR_TIMEOUT, "rank 1 does not come");
        world.publish(9);
        let expected = world.expected(&[true; 2], 9);
        for (c, &graph) in world.containers.iter().zip(&graphs) {
            // SAFETY: a live graph and a live stream.
            gpu::on(gpu(c), || assert_eq!(unsafe { sys::cuGraphLaunch(graph, stream(c)) } as u32, 0));
        }
        world.compare(&expected).unwrap();
        for (c, &graph) in world.containers.iter().zip(&graphs) {
            // SAFETY: destroyed once.
            gpu::on(gpu(c), || assert_eq!(unsafe { sys::cuGraphExecDestroy(graph) } as u32, 0));
        }
        world.close().unwrap();
        assert_eq!(live(), before, "{wire:?}: something is left");
    }
}

/// A sync on streams that are being captured, and the graphs that come of it.
fn captured(world: &mut World<'_>, version: u64) -> Vec<sys::CUgraphExec> {
    start_any(world, version);
    ends(world, Duration::from_secs(20)).into_iter().for_each(|answer| answer.unwrap());
    let end = |c: &Container| {
        let (mut graph, mut ready) = (std::ptr::null_mut(), std::ptr::null_mut());
        gpu::on(c.gpu.expect("weights on a GPU"), || {
            // SAFETY: the stream is being captured; each call writes its one result.
            unsafe {
                assert_eq!(sys::cuStreamEndCapture(c.stream.cast(), &mut graph) as u32, 0);
                assert_eq!(sys::cuGraphInstantiateWithFlags(&mut ready, graph, 0) as u32, 0);
                assert_eq!(sys::cuGraphDestroy(graph) as u32, 0);
            }
        });
        ready
    };
    world.containers.iter().map(end).collect()
}

#[test]
fn a_graph_cannot_ask_other_ranks() {
    let Some(_alone) = alone() else { return };
    let case = two_ranks();
    for wire in wires() {
        let mut world = at_work(&case, wire);
        let (stream, gpu) = (world.containers[0].stream.cast(), world.containers[0].gpu.expect("weights on a GPU"));
        let mode = sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL;
        // SAFETY: a live stream.
        gpu::on(gpu, || assert_eq!(unsafe { sys::cuStreamBeginCapture_v2(stream, mode) } as u32, 0));
        let answers = world.all(|_, c| c.start(2, None));
        let refused = answers[0].as_ref().expect_err("it is being captured");
        assert!(refused.status == RS_ERR_UNSUPPORTED && refused.text.contains("cannot ask other ranks again"), "{refused}");
        let told = answers[1].as_ref().expect_err("the other rank is refused");
        assert!(told.status == RS_ERR_MISMATCH && told.text.contains("rank 0 refused its call"), "{told}");
        let mut graph = std::ptr::null_mut();
        // SAFETY: the stream is being captured; the graph is destroyed once.
        gpu::on(gpu, || unsafe {
            assert_eq!(sys::cuStreamEndCapture(stream, &mut graph) as u32, 0, "the capture was ended");
            assert_eq!(sys::cuGraphDestroy(graph) as u32, 0);
        });
        world.sync(3, None).unwrap();
        world.close().unwrap();
    }
}

/// NCCL's own errors come up while nobody asks for a result: they are heard at the next poll, not at the deadline.
#[test]
fn an_error_of_nccls_is_heard_while_streams_stand_still() {
    let Some(_alone) = alone() else { return };
    let Some(tell) = nccl::function::<extern "C" fn(*mut c_void, c_int)>(c"standin_nccl_async_error") else { return };
    if !nccl::usable() {
        return;
    }
    let case = two_ranks();
    let mut world = at_work(&case, Wire::Nccl(Maker::Test { blocks: false }));
    world.publish(2);
    let mut gate = Gate::on(&world.containers[0]);
    start(&mut world, 2);
    // ncclRemoteError.
    world.lent.iter().for_each(|lent| tell(lent.raw(), 6));
    let begun = Instant::now();
    // Its stream ends before it is given up.
    gate.open();
    for answer in ends(&mut world, Duration::from_secs(9)) {
        let failure = answer.expect_err("the communicator has failed");
        assert!(failure.status == RS_ERR_COMM && failure.text.contains("remote process"), "{failure}");
    }
    assert!(begun.elapsed() < Duration::from_secs(9));
    world.renew().unwrap();
    world.sync(3, None).unwrap();
    world.close().unwrap();
}

/// Another stream of a rank's GPU, which goes with the process.
fn other_stream(container: &Container) -> *mut c_void {
    let mut stream = std::ptr::null_mut();
    let flags = sys::CUstream_flags::CU_STREAM_NON_BLOCKING as u32;
    // SAFETY: writes its one result.
    gpu::on(container.gpu.expect("weights on a GPU"), || assert_eq!(unsafe { sys::cuStreamCreate(&mut stream, flags) } as u32, 0));
    stream.cast()
}

/// Waits for a stream, and ends one of the test's own.
fn end_stream(container: &Container, stream: *mut c_void, own: bool) {
    gpu::on(container.gpu.expect("weights on a GPU"), || {
        // SAFETY: a live stream, ended once.
        unsafe {
            assert_eq!(sys::cuStreamSynchronize(stream.cast()) as u32, 0);
            if own {
                assert_eq!(sys::cuStreamDestroy_v2(stream.cast()) as u32, 0);
            }
        }
    });
}

/// A refused sync leaves words to be written on a stream that stands still: they outlive the container, and do not undo later ones.
#[test]
fn what_a_refused_sync_leaves_does_no_harm() {
    let Some(_alone) = alone() else { return };
    let case = two_ranks();
    for wire in [Wire::Loopback, Wire::Local(0)] {
        let mut world = at_work(&case, wire);
        let mut gate = Gate::on(&world.containers[0]);
        assert!(world.all(|r, c| c.start(2 + r as u64, None)).iter().all(Result::is_err), "two versions");
        // The next sync is on another stream, and must not wait for ever for what the first one says late.
        let (first, second) = (world.containers[0].stream, other_stream(&world.containers[0]));
        world.containers[0].stream = second;
        let mut late = Gate::on(&world.containers[1]);
        start(&mut world, 5);
        gate.open();
        end_stream(&world.containers[0], first, false);
        late.open();
        ends(&mut world, Duration::from_secs(20)).into_iter().for_each(|answer| answer.unwrap());
        end_stream(&world.containers[0], second, true);
        world.containers[0].stream = first;
        // Refused once more, then all is gone before the stream comes to it.
        let mut gate = Gate::on(&world.containers[0]);
        assert!(world.all(|r, c| c.start(6 + r as u64, None)).iter().all(Result::is_err), "two versions");
        world.containers[0].set_comm(&Comm::loopback(77_777, 0, 2).unwrap()).unwrap();
        gate.open();
        end_stream(&world.containers[0], first, false);
        world.containers.clear();
        world.close().unwrap();
    }
}

/// What a stuck sync writes when its stream goes on comes before the next sync, not over it.
#[test]
fn a_stuck_sync_does_not_overtake_a_later_one() {
    let Some(_alone) = alone() else { return };
    let (case, before) = (two_ranks(), live());
    let mut world = at_work(&case, Wire::Loopback);
    world.publish(2);
    world.memories[0].bytes();
    let (own, stuck) = (world.containers[1].stream, other_stream(&world.containers[1]));
    world.containers[1].stream = stuck;
    let mut gate = Gate::on(&world.containers[1]);
    world.containers.iter_mut().for_each(|c| c.timeout_ms = 200);
    start(&mut world, 2);
    assert!(ends(&mut world, Duration::from_secs(9)).iter().all(Result::is_err));
    world.containers.iter_mut().for_each(|c| c.timeout_ms = 0);
    world.renew().unwrap();
    world.containers[1].stream = own;
    world.publish(3);
    let expected = world.expected(&[true; 2], 3);
    start(&mut world, 3);
    gate.open();
    ends(&mut world, Duration::from_secs(20)).into_iter().for_each(|answer| answer.unwrap());
    end_stream(&world.containers[1], stuck, true);
    world.compare(&expected).unwrap();
    world.close().unwrap();
    drop(gate);
    assert_eq!(live(), before, "something is left");
}

/// More rounds than a stream takes at once: the call waits for a place, and not past its deadline.
#[test]
fn many_rounds_wait_for_their_place() {
    let Some(_alone) = alone() else { return };
    if !nccl::usable() {
        return;
    }
    let (case, before) = (many_rounds(), live());
    let mut world = at_work(&case, Wire::Nccl(Maker::Library));
    world.publish(2);
    let mut gate = Gate::on(&world.containers[0]);
    world.containers.iter_mut().for_each(|c| c.timeout_ms = 300);
    let answers = std::thread::scope(|scope| {
        scope.spawn(|| {
            std::thread::sleep(Duration::from_millis(1500));
            gate.open();
        });
        world.all(|_, c| c.start(2, None))
    });
    let failure = answers[0].as_ref().expect_err("its stream stands still");
    assert!(failure.status == RS_ERR_TIMEOUT && failure.text.contains("takes no more"), "{failure}");
    ends(&mut world, Duration::from_secs(9)).into_iter().for_each(|answer| assert!(answer.is_err()));
    world.containers.iter_mut().for_each(|c| c.timeout_ms = 0);
    world.renew().unwrap();
    world.sync(3, None).unwrap();
    world.close().unwrap();
    drop(gate);
    assert_eq!(live(), before, "something is left");
}
