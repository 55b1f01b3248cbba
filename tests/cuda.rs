//! The library's own device for GPUs. Where there is none, over the stand-in driver: tests/standin/run.sh says how.
//!
//! That the bytes are right is for `properties`, which runs with RESHARD_MEMORY=cuda too. Here: what is refused, and how; what happens
//! when any call of the driver fails; what a sync must not do again.

#[allow(dead_code)] // `properties` uses the rest.
mod oracle;
mod sharing;

use cudarc::driver::sys;
use fastrand::Rng;
use oracle::gpu::{self, Block, FAILING, HOST};
use oracle::library::{Comm, Container, Failure, Tables};
use oracle::model::Case;
use oracle::small::two_ranks;
use oracle::truth::{Memory, compare, write};
use oracle::{generate, model};
use reshard::abi::*;
use std::ffi::{CStr, c_char, c_int};
use std::process::Command;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, OnceLock};

const TIMEOUT_MS: u32 = 20_000;
/// An error that no call gives by itself: CUDA_ERROR_UNKNOWN.
const UNKNOWN: c_int = 999;

/// Tests that count or break calls have the driver for themselves. `None`: weights do not go to GPUs in this run.
fn alone() -> Option<MutexGuard<'static, ()>> {
    static DRIVER: Mutex<()> = Mutex::new(());
    gpu::wanted().then(|| DRIVER.lock().unwrap_or_else(|p| p.into_inner()))
}

/// A function that the stand-in driver has beside a real one's; `None`: the driver is a real one.
fn standin<F: Copy>(name: &CStr) -> Option<F> {
    assert_eq!(size_of::<F>(), size_of::<usize>());
    static DRIVER: OnceLock<usize> = OnceLock::new();
    let library = DRIVER.get_or_init(|| {
        gpu::count();
        // SAFETY: a text that ends with a NUL.
        unsafe { libc::dlopen(c"libcuda.so.1".as_ptr(), libc::RTLD_LAZY | libc::RTLD_NOLOAD) as usize }
    });
    assert_ne!(*library, 0, "no driver is loaded");
    // SAFETY: a library's handle; the caller gives the function's type.
    unsafe {
        let found = libc::dlsym(*library as *mut std::ffi::c_void, name.as_ptr());
        (!found.is_null()).then(|| std::mem::transmute_copy(&found))
    }
}

/// The n-th call of the driver from now fails; 0: none.
fn fail_at(n: u64) {
    let f: extern "C" fn(u64, c_int) = standin(c"standin_fail_at").expect("the stand-in");
    FAILING.store(n > 0, Ordering::Relaxed);
    f(n, UNKNOWN);
}

/// The n-th call from now of one function of the driver fails.
fn fail_in(name: &CStr, n: u64) {
    let f: extern "C" fn(*const c_char, u64, c_int) = standin(c"standin_fail_in").expect("the stand-in");
    f(name.as_ptr(), n, UNKNOWN);
}

/// A number that the stand-in counts.
fn counted(name: &CStr) -> u64 {
    let f: extern "C" fn() -> u64 = standin(name).expect("the stand-in");
    f()
}

/// The ranks of a case over loopback, with their memory.
struct World {
    case: Case,
    memories: Vec<Memory>,
    containers: Vec<Container>,
    comms: Vec<Comm>,
    timeout_ms: u32,
}

impl World {
    /// Memory alone.
    fn new(case: Case, kinds: &[gpu::Kind]) -> World {
        static HUB: AtomicU64 = AtomicU64::new(5000);
        let (hub, world) = (HUB.fetch_add(1, Ordering::Relaxed), case.ranks.len());
        let comms = (0..world).map(|r| Comm::loopback(hub, r, world).unwrap()).collect();
        let memories = case.ranks.iter().zip(kinds).map(|(r, &kind)| Memory::new(kind, &r.blocks, 7)).collect();
        World { case, memories, containers: vec![], comms, timeout_ms: TIMEOUT_MS }
    }

    fn create(&mut self) -> Result<(), Failure> {
        for (r, rank) in self.case.ranks.iter().enumerate() {
            let memory = &mut self.memories[r];
            let kind = memory.kind();
            let tables = Tables::new(&self.case, rank, kind, |b| memory.address(rank.buffers[b].block, rank.buffers[b].at));
            let mut container = Container::create(rank, &tables, &self.comms[r], self.timeout_ms)?;
            container.stream = memory.stream();
            self.containers.push(container);
        }
        Ok(())
    }

    fn all(&mut self, call: impl Fn(&mut Container) -> Result<(), Failure> + Sync) -> Vec<Result<(), Failure>> {
        std::thread::scope(|scope| {
            let threads: Vec<_> = self.containers.iter_mut().map(|c| scope.spawn(|| call(c))).collect();
            threads.into_iter().map(|t| t.join().expect("no panic")).collect()
        })
    }

    /// Writes the sources; what the memories must then become.
    fn publish(&mut self, version: u64) -> Vec<Vec<u8>> {
        let all = vec![true; self.case.tensors.len()];
        let mut expected = vec![];
        for (r, memory) in self.memories.iter_mut().enumerate() {
            let mut image = memory.bytes();
            write(&self.case, r, RS_SOURCE, &all, version, memory, &mut image);
            memory.write(&image);
            write(&self.case, r, RS_TARGET, &all, version, memory, &mut image);
            expected.push(image);
        }
        expected
    }

    fn compare(&self, expected: &[Vec<u8>]) {
        for (r, memory) in self.memories.iter().enumerate() {
            compare(&self.case, r, memory, &expected[r]).unwrap();
        }
    }

    /// New values, moved and compared.
    fn sync(&mut self, version: u64) {
        let expected = self.publish(version);
        self.all(|c| c.sync(version, None)).into_iter().for_each(|result| result.unwrap());
        self.compare(&expected);
    }

    fn connected(case: Case, kinds: &[gpu::Kind]) -> World {
        let mut world = World::new(case, kinds);
        world.create().unwrap();
        world.all(|c| c.connect()).into_iter().for_each(|result| result.unwrap());
        world
    }
}

const GPU_0: gpu::Kind = (RS_DEVICE_CUDA, 0);
const GPU_1: gpu::Kind = (RS_DEVICE_CUDA, 1);
const PINNED: gpu::Kind = (RS_DEVICE_CUDA_HOST, 0);

/// A second GPU; `None`: there is but one.
fn second() -> Option<gpu::Kind> {
    (gpu::count() > 1).then_some(GPU_1)
}

fn says(result: Result<(), Failure>, status: rs_status_t, words: &[&str]) {
    let failure = result.expect_err("must be refused");
    assert_eq!(failure.status, status, "{failure}");
    words.iter().for_each(|w| assert!(failure.text.contains(w), "'{w}' is not in: {failure}"));
}

/// Without a driver, weights on a GPU are refused with a text that says what is missing. (Where there is one, nothing to see.)
#[test]
fn without_a_driver_it_is_a_clear_error() {
    // SAFETY: a text that ends with a NUL.
    let driver = unsafe { libc::dlopen(c"libcuda.so.1".as_ptr(), libc::RTLD_LAZY) };
    if gpu::wanted() || !driver.is_null() {
        eprintln!("there is a driver: not tested");
        return;
    }
    let case = two_ranks();
    let rank = &case.ranks[0];
    let comm = Comm::loopback(4999, 0, 1).unwrap();
    for kind in [GPU_0, PINNED] {
        let tables = Tables::new(&case, rank, kind, |b| std::ptr::without_provenance_mut(4096 * (b + 1)));
        let created = Container::create(rank, &tables, &comm, TIMEOUT_MS).map(|_| ());
        says(created, RS_ERR_UNSUPPORTED, &["no CUDA driver", "libcuda.so.1", "cuda:0"]);
    }
}

#[test]
fn weights_lie_wherever_gpus_reach() {
    let Some(_alone) = alone() else { return };
    let other = second().unwrap_or(GPU_0);
    for kinds in [[GPU_0, GPU_0], [GPU_0, other], [PINNED, GPU_0], [other, PINNED], [PINNED, PINNED]] {
        let mut world = World::connected(two_ranks(), &kinds);
        (1..4).for_each(|version| world.sync(version));
    }
}

#[test]
fn memory_that_is_not_what_it_is_called_is_refused() {
    let Some(_alone) = alone() else { return };
    let case = two_ranks();
    let rank = &case.ranks[0];
    let comm = Comm::loopback(4998, 0, 1).unwrap();
    let bytes = vec![0; 64 * 48 * 4];
    let at = |real: gpu::Kind, called: gpu::Kind, words: &[&str]| {
        let blocks = [Block::new(real, &bytes), Block::new(real, &bytes)];
        let tables = Tables::new(&case, rank, called, |b| blocks[b].at(0));
        let created = Container::create(rank, &tables, &comm, TIMEOUT_MS).map(|_| ());
        says(created, RS_ERR_INVALID, &[&["'a'"], words].concat());
    };
    at(HOST, GPU_0, &["does not know", "type 2, id 0"]);
    at(HOST, PINNED, &["does not know", "type 3"]);
    at(PINNED, GPU_0, &["pinned host memory"]);
    if second().is_some() {
        at(GPU_1, GPU_0, &["memory of cuda:1"]);
    }
    at(GPU_0, PINNED, &["memory of cuda:0"]);
    // Past the end of an allocation.
    let block = Block::new(GPU_0, &bytes[..100]);
    let tables = Tables::new(&case, rank, GPU_0, |_| block.at(0));
    assert!(Container::create(rank, &tables, &comm, TIMEOUT_MS).is_err());
    let tables = Tables::new(&case, rank, (RS_DEVICE_CUDA, 77), |_| block.at(0));
    let created = Container::create(rank, &tables, &comm, TIMEOUT_MS).map(|_| ());
    says(created, RS_ERR_INVALID, &["cuda:77", "CUDA_VISIBLE_DEVICES"]);
}

#[test]
fn pageable_memory_and_a_gpu_do_not_meet() {
    let Some(_alone) = alone() else { return };
    // The reader says why; the other hears that it gave up.
    for (kinds, reader) in [([HOST, GPU_0], "'cuda:0' cannot read"), ([GPU_0, HOST], "'host' cannot read")] {
        let mut world = World::new(two_ranks(), &kinds);
        world.create().unwrap();
        let answers = world.all(|c| c.connect());
        let texts: Vec<String> = answers.into_iter().map(|a| a.expect_err("must be refused").text).collect();
        assert!(texts[1].contains(reader) && texts[1].contains("weights of rank 0") && texts[1].contains("pinned"), "{texts:?}");
    }
}

#[test]
fn streams_that_cannot_be_used_are_refused_and_nothing_moves() {
    let Some(_alone) = alone() else { return };
    let mut world = World::connected(two_ranks(), &[GPU_0, GPU_0]);
    world.sync(1);
    let before: Vec<Vec<u8>> = world.memories.iter().map(Memory::bytes).collect();
    if let Some(other) = second() {
        let block = Block::new(other, &[0; 8]);
        world.containers[1].stream = block.stream();
        let mut answers = world.all(|c| c.sync(2, None)).into_iter();
        says(answers.next().expect("rank 0"), RS_ERR_MISMATCH, &["rank 1 refused its call", "nothing moved"]);
        says(answers.next().expect("rank 1"), RS_ERR_UNSUPPORTED, &["cuda:0", "primary context"]);
        world.compare(&before);
        world.containers[1].stream = world.memories[1].stream();
    }
    world.containers[1].stream = std::ptr::without_provenance_mut(2);
    let mut answers = world.all(|c| c.sync(2, None)).into_iter();
    says(answers.next().expect("rank 0"), RS_ERR_MISMATCH, &["rank 1 refused its call"]);
    says(answers.next().expect("rank 1"), RS_ERR_UNSUPPORTED, &["cudaStreamPerThread"]);
    world.containers[1].stream = world.memories[1].stream();
    if let Some(capture) = standin::<extern "C" fn(*mut std::ffi::c_void, c_int)>(c"standin_capture") {
        gpu::on(0, || capture(world.containers[1].stream, 1));
        let mut answers = world.all(|c| c.sync(3, None)).into_iter();
        says(answers.next().expect("rank 0"), RS_ERR_MISMATCH, &["rank 1 refused its call"]);
        says(answers.next().expect("rank 1"), RS_ERR_UNSUPPORTED, &["captured"]);
        gpu::on(0, || capture(world.containers[1].stream, 0));
        world.compare(&before);
    }
    world.sync(4);
}

/// What is on a stream and does not end is waited for until the deadline, on all ranks.
#[test]
fn a_stream_that_does_not_end_is_an_error_in_time() {
    let Some(_alone) = alone() else { return };
    // An old driver has no words to wait for.
    if standin::<usize>(c"cuStreamWaitValue64_v2").is_none() {
        return;
    }
    let mut world = World::new(two_ranks(), &[GPU_0, GPU_0]);
    world.timeout_ms = 500;
    world.create().unwrap();
    world.all(|c| c.connect()).into_iter().for_each(|result| result.unwrap());
    world.publish(1);
    // A reader that has given up does not wait for what is on this stream.
    world.memories[0].bytes();
    let mut word = Block::new(PINNED, &[0; 8]);
    gpu::on(0, || {
        // SAFETY: a live stream, and a word that outlives what waits for it.
        let answer = unsafe { sys::cuStreamWaitValue64_v2(world.memories[0].stream().cast(), word.at(0) as u64, 1, 0) };
        assert_eq!(answer as u32, 0);
    });
    let begun = std::time::Instant::now();
    let answers = world.all(|c| c.sync(1, None));
    let took = begun.elapsed();
    word.write(&1u64.to_ne_bytes());
    world.memories[0].bytes(); // Nothing waits for the word when it goes.
    // The deadline, and what a device is given to finish what was started.
    assert!(took.as_secs() < 8, "{took:?}");
    for answer in answers {
        let failure = answer.expect_err("the source's stream stands still");
        assert!(failure.status <= RS_ERR_TIMEOUT, "{failure}");
    }
}

/// Somebody else's capture into a graph, in the strictest mode, survives a sync of this library and a new container.
#[test]
fn captures_elsewhere_go_on() {
    let Some(_alone) = alone() else { return };
    let mut world = World::connected(two_ranks(), &[GPU_0, second().unwrap_or(GPU_0)]);
    world.sync(1);
    let expected = world.publish(2);
    let other = Block::new(GPU_0, &[0; 8]);
    other.read();
    let stream = other.stream().cast();
    let mut graph = std::ptr::null_mut();
    gpu::on(0, || {
        let mode = sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_GLOBAL;
        // SAFETY: a live stream.
        assert_eq!(unsafe { sys::cuStreamBeginCapture_v2(stream, mode) } as u32, 0);
    });
    world.all(|c| c.sync(2, None)).into_iter().for_each(|r| r.unwrap());
    world.containers.iter_mut().for_each(|c| c.flags = RS_SYNC_VERIFY);
    world.all(|c| c.sync(2, None)).into_iter().for_each(|r| r.unwrap());
    world.all(|c| c.fingerprint(RS_TARGET, None).map(|_| ())).into_iter().for_each(|r| r.unwrap());
    world.all(|c| c.connect()).into_iter().for_each(|r| r.unwrap());
    // The last containers of GPUs, and the first.
    world.containers.clear();
    world.create().unwrap();
    world.all(|c| c.connect()).into_iter().for_each(|r| r.unwrap());
    gpu::on(0, || {
        // SAFETY: the stream that is captured; the graph is destroyed once.
        unsafe {
            assert_eq!(sys::cuStreamEndCapture(stream, &mut graph) as u32, 0, "the capture was ended");
            assert_eq!(sys::cuGraphDestroy(graph) as u32, 0);
        }
    });
    world.compare(&expected);
}

/// A sync uses what the first one made: nothing is uploaded, allocated or loaded again, and a rank's copies are one launch and
/// another for what it has twice.
#[test]
fn lists_are_made_once() {
    let Some(_alone) = alone() else { return };
    let mut world = World::connected(two_ranks(), &[GPU_0, second().unwrap_or(GPU_0)]);
    if standin::<usize>(c"standin_calls").is_none() {
        return;
    }
    world.sync(1);
    for name in [
        c"cuMemAlloc_v2",
        c"cuMemAllocFromPoolAsync",
        c"cuMemPoolCreate",
        c"cuMemHostAlloc",
        c"cuModuleLoadData",
        c"cuStreamCreate",
    ] {
        let expected = world.publish(2);
        fail_in(name, 1);
        world.all(|c| c.sync(2, None)).into_iter().for_each(|r| r.unwrap_or_else(|e| panic!("{name:?} is called: {e}")));
        fail_in(name, 0);
        world.compare(&expected);
    }
    let expected = world.publish(3);
    let launches = counted(c"standin_launches");
    fail_in(c"cuMemcpyHtoDAsync_v2", 1);
    world.all(|c| c.sync(3, None)).into_iter().for_each(|r| r.unwrap());
    fail_in(c"cuMemcpyHtoDAsync_v2", 0);
    assert_eq!(counted(c"standin_launches") - launches, 2);
    world.compare(&expected);
}

/// Who gives up has its memory back when its call returns: no copy of another rank's reads it any more.
#[test]
fn nobody_reads_what_an_owner_took_back() {
    let Some(_alone) = alone() else { return };
    let mut rng = Rng::with_seed(1);
    let mut ended = [0; 2];
    for _ in 0..150 {
        let mut world = World::connected(two_ranks(), &[GPU_0, second().unwrap_or(GPU_0)]);
        world.sync(1);
        world.publish(2);
        let aborter = world.containers[0].aborter();
        let wait = std::time::Duration::from_micros(rng.u64(0..400));
        let image = world.memories[0].bytes();
        let (owner, reader) = world.containers.split_at_mut(1);
        let memory = &mut world.memories[0];
        std::thread::scope(|scope| {
            scope.spawn(move || {
                std::thread::sleep(wait);
                aborter.abort();
            });
            scope.spawn(|| reader[0].sync(2, None));
            let result = owner[0].sync(2, None);
            // The driver sees whether this overtakes a copy.
            memory.write(&image);
            ended[usize::from(result.is_err())] += 1;
        });
    }
    // A real GPU may be too fast for that, and does not watch.
    assert!(ended[1] >= 20 || standin::<usize>(c"standin_calls").is_none(), "{ended:?}: too few syncs were cut short");
}

/// Memory that peer access does not open is not read by another GPU.
#[test]
fn memory_that_is_mapped_is_not_its_peers() {
    let Some(_alone) = alone() else { return };
    if standin::<usize>(c"standin_calls").is_none() || second().is_none() {
        return;
    }
    if gpu::origin() == gpu::Origin::Whole {
        let test = ["memory_that_is_mapped_is_not_its_peers", "--exact"];
        let program = std::env::current_exe().unwrap();
        assert!(Command::new(program).args(test).env("RESHARD_GPU_MEMORY", "mapped").status().unwrap().success());
        return;
    }
    World::connected(two_ranks(), &[GPU_0, GPU_0]).sync(1);
    let mut world = World::new(two_ranks(), &[GPU_0, GPU_1]);
    world.create().unwrap();
    let answers = world.all(|c| c.connect());
    let texts: Vec<String> = answers.into_iter().map(|a| a.expect_err("must be refused").text).collect();
    assert!(texts[1].contains("weights of rank 0") && texts[1].contains("is not from cudaMalloc()"), "{texts:?}");
}

/// Whichever call of the driver fails: an error that bears CUDA's name for it, on some rank, or none and all bytes are right; nothing
/// is left behind.
#[test]
fn every_call_may_fail() {
    let Some(_alone) = alone() else { return };
    if standin::<usize>(c"standin_calls").is_none() {
        return;
    }
    let cases = (0..3).map(|seed| if seed == 0 { two_ranks() } else { generate::case(seed * 31, Some(3)) });
    for (i, mut case) in cases.enumerate() {
        // The calls that fail are to be the library's.
        case.ranks.iter_mut().for_each(|r| r.lends = false);
        let mut rng = Rng::with_seed(model::mix(i as u64));
        let kinds: Vec<gpu::Kind> = case.ranks.iter().map(|_| gpu::kind(&mut rng)).collect();
        let mut failed = 0;
        // A fingerprint of one world is enough: it is the same calls for each part.
        for phase in (0..5).filter(|&phase| phase != 3 || i == 0) {
            // Until the call that is to fail comes after the phase's last.
            for n in 1.. {
                let (hit, error) = broken(&case, &kinds, phase, n);
                failed += u32::from(error);
                if !hit {
                    assert!(n > 1 || phase == 4, "phase {phase} calls nothing");
                    break;
                }
            }
        }
        assert!(failed >= 20, "case {i}: {failed} failures");
    }
}

/// Runs a world whose `phase` (create, connect, sync, fingerprint, destroy) has the driver's n-th call fail; whether there was an n-th call, and
/// whether anybody was told.
fn broken(case: &Case, kinds: &[gpu::Kind], phase: u32, n: u64) -> (bool, bool) {
    let live = counted(c"standin_live");
    // Told if the stand-in ends the process.
    println!("phase {phase}, call {n}");
    let mut world = World::new(case.clone(), kinds);
    let mut hit = false;
    let mut run = |at: u32, call: &mut dyn FnMut(&mut World) -> Vec<Result<(), Failure>>, world: &mut World| {
        let before = counted(c"standin_calls");
        if at == phase {
            fail_at(n);
        }
        let answers = call(world);
        if at == phase {
            fail_at(0);
            hit = counted(c"standin_calls") - before >= n;
        }
        answers
    };
    let mut expected = vec![];
    let mut told = run(0, &mut |w| vec![w.create()], &mut world);
    if told.iter().all(Result::is_ok) {
        told = run(1, &mut |w| w.all(|c| c.connect()), &mut world);
    }
    if told.iter().all(Result::is_ok) {
        expected = world.publish(1);
        // What publishing put on the streams is the test's, not the library's.
        world.memories.iter().for_each(|m| drop(m.bytes()));
        told = run(2, &mut |w| w.all(|c| c.sync(1, None)), &mut world);
    }
    if phase == 3 && told.iter().all(Result::is_ok) {
        told = run(3, &mut |w| w.all(|c| c.fingerprint(RS_TARGET, None).map(|_| ())), &mut world);
    }
    let failures: Vec<&Failure> = told.iter().filter_map(|t| t.as_ref().err()).collect();
    if let Some(first) = failures.first() {
        let named = failures.iter().any(|f| f.text.contains("CUDA_ERROR_UNKNOWN (999)") && f.text.contains("cu"));
        assert!(named, "phase {phase}, call {n}: no rank names it: {first}");
        // Where it is fatal for one, it is for all: none waits for the others later.
        let fatal = |t: &Result<(), Failure>| t.as_ref().is_err_and(|f| f.status <= RS_ERR_TIMEOUT);
        let alike = told.iter().all(fatal) || !told.iter().any(fatal);
        assert!(phase == 0 || alike, "phase {phase}, call {n}: {told:?}");
    } else {
        world.compare(&expected);
    }
    let error = !failures.is_empty();
    run(
        4,
        &mut |w| {
            w.containers.clear();
            w.comms.clear();
            vec![]
        },
        &mut world,
    );
    drop(world);
    assert_eq!(counted(c"standin_live"), live, "phase {phase}, call {n}: something is left");
    (hit, error)
}
