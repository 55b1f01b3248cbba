//! Communicators of NCCL's that fail: every call ends in time and with a text, what is borrowed stays its owner's, nothing is left over.
//!
//! That the bytes are right is for `properties`. All of this is over the stand-in NCCL, with RESHARD_MEMORY=cuda.

#[allow(dead_code)] // `properties` uses the rest.
mod oracle;

use fastrand::Rng;
use oracle::gpu;
use oracle::library::{Comm, Failure};
use oracle::model::{Buffer, Case, Rank, Tensor, Tile};
use oracle::nccl::{self, Lent, Maker};
use oracle::world::{self, Wire, World};
use reshard::abi::*;
use std::ffi::{CStr, c_char, c_int, c_void};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

const MAKERS: [Maker; 3] = [Maker::Library, Maker::Test { blocks: true }, Maker::Test { blocks: false }];
/// ncclRemoteError.
const REMOTE: c_int = 6;

/// One test at a time, as they count what is alive. `None`: not over the stand-in.
fn alone() -> Option<MutexGuard<'static, ()>> {
    static ONE: Mutex<()> = Mutex::new(());
    nccl::usable().then(|| ONE.lock().unwrap_or_else(PoisonError::into_inner))
}

/// The next calls of a function of NCCL's: the n-th fails.
fn fail_in(name: &CStr, n: u64) {
    let f: extern "C" fn(*const c_char, u64, c_int) = nccl::function(c"standin_fail_in").expect("the stand-in");
    f(name.as_ptr(), n, REMOTE);
}

fn live() -> u64 {
    nccl::function::<extern "C" fn() -> u64>(c"standin_live").expect("the stand-in")()
}

/// A vector that rank 0 has and rank 1 wants, in pieces that do not lie together.
fn case() -> Case {
    let dtype = rs_dtype_t { code: 4, bits: 16, lanes: 1 };
    let tensor = Tensor { name: "A".into(), shape: vec![64], dtype, target: dtype, transform: 0, seed: 1 };
    let rank = |role: u32, step: i64| Rank {
        blocks: vec![64 * 2 * step as usize],
        listed: vec![0],
        buffers: vec![Buffer {
            name: "a".into(),
            role,
            padded: false,
            dtype,
            shape: vec![64],
            strides: vec![step],
            bytes: 64 * 2 * step as usize,
            block: 0,
            at: 0,
        }],
        tiles: vec![Tile {
            tensor: 0,
            buffer: 0,
            transform: 0,
            byte_offset: 0,
            view: vec![64],
            origin: vec![0],
            extent: vec![64],
            stride: vec![step],
        }],
        ..Rank::default()
    };
    Case { seed: 0, tensors: vec![tensor], ranks: vec![rank(RS_SOURCE, 2), rank(RS_TARGET, 1)] }
}

/// A world that has synced once; its next syncs have this long.
fn at_work<'a>(case: &'a Case, maker: Maker, timeout_ms: u32) -> World<'a> {
    let mut world = world::open(case, &mut Rng::with_seed(1), Wire::Nccl(maker)).unwrap_or_else(|e| panic!("{}", e[0].1));
    world.all_ok("connect", |_, c| c.connect()).unwrap();
    world.sync(1, None).unwrap();
    world.containers.iter_mut().for_each(|c| c.timeout_ms = timeout_ms);
    world
}

/// Ends it after a failure: the owners' communicators are as they were lent until they are aborted; nothing is left.
fn end(mut world: World<'_>, before: u64) {
    for lent in &mut world.lent {
        assert_ne!(lent.async_error(), 7, "still in progress");
        lent.abort();
    }
    world.close().unwrap();
    assert_eq!(live(), before, "something is left");
}

fn failed(answer: Result<(), Failure>, status: rs_status_t, word: &str) {
    let failure = answer.expect_err("it must fail");
    assert!(failure.status == status && failure.text.contains(word), "{failure}");
}

#[test]
fn a_rank_that_waits_alone_gives_up_in_time() {
    let Some(_alone) = alone() else { return };
    let (case, before) = (case(), live());
    for maker in MAKERS {
        let mut world = at_work(&case, maker, 300);
        let begun = Instant::now();
        failed(world.containers[0].sync(2, None), RS_ERR_TIMEOUT, "gather");
        assert!(begun.elapsed() < Duration::from_secs(3), "{maker:?}: {:?}", begun.elapsed());
        end(world, before);
    }
}

#[test]
fn an_abort_ends_a_call_at_once() {
    let Some(_alone) = alone() else { return };
    let (case, before) = (case(), live());
    for maker in MAKERS {
        let mut world = at_work(&case, maker, 20_000);
        let (begun, aborter) = (Instant::now(), world.containers[0].aborter());
        std::thread::scope(|scope| {
            scope.spawn(move || {
                std::thread::sleep(Duration::from_millis(100));
                aborter.abort();
            });
            failed(world.containers[0].sync(2, None), RS_ERR_ABORTED, "abort");
        });
        assert!(begun.elapsed() < Duration::from_secs(3), "{maker:?}: {:?}", begun.elapsed());
        end(world, before);
    }
}

/// The library neither aborts nor destroys it, so its owner can go on.
#[test]
fn a_lent_communicator_outlives_what_borrows_it() {
    let Some(_alone) = alone() else { return };
    let before = live();
    for blocks in [true, false] {
        gpu::on(0, || {
            let lent = Lent::new(nccl::id(), 0, 1, blocks);
            for _ in 0..2 {
                drop(Comm::from_nccl(&lent).unwrap());
                assert_eq!(lent.async_error(), 0);
            }
        });
    }
    assert_eq!(live(), before, "something is left");
}

#[test]
fn an_error_of_a_peer_is_told_with_its_text() {
    let Some(_alone) = alone() else { return };
    let (case, before) = (case(), live());
    for blocks in [true, false] {
        let mut world = at_work(&case, Maker::Test { blocks }, 1000);
        let tell: extern "C" fn(*mut c_void, c_int) = nccl::function(c"standin_nccl_async_error").expect("the stand-in");
        world.lent.iter().for_each(|lent| tell(lent.raw(), REMOTE));
        for answer in world.all(|_, c| c.sync(2, None)) {
            failed(answer, RS_ERR_COMM, "remote process");
        }
        end(world, before);
    }
}

#[test]
fn any_call_of_a_sync_may_fail() {
    let Some(_alone) = alone() else { return };
    let (case, before) = (case(), live());
    for name in [c"ncclSend", c"ncclRecv", c"ncclAllGather", c"ncclGroupStart", c"ncclGroupEnd", c"ncclCommGetAsyncError"] {
        for n in 1..4 {
            let mut world = at_work(&case, Maker::Library, 500);
            fail_in(name, n);
            let answers = world.all(|_, c| c.sync(2, None));
            fail_in(c"", 0);
            let told = |e: &Failure| e.text.contains("remote process") || e.status == RS_ERR_TIMEOUT;
            assert!(answers.iter().flat_map(|a| a.as_ref().err()).all(told), "{name:?} {n}: {answers:?}");
            assert!(n > 1 || answers.iter().any(Result::is_err), "{name:?}: {answers:?}");
            end(world, before);
        }
    }
}

#[test]
fn any_call_of_an_init_may_fail() {
    let Some(_alone) = alone() else { return };
    let before = live();
    for name in [c"ncclCommInitRankConfig", c"ncclCommGetAsyncError", c"ncclCommUserRank", c"ncclCommCount", c"ncclCommCuDevice"] {
        let id = nccl::id();
        fail_in(name, 1);
        let failure = gpu::on(0, || Comm::nccl(&id, 0, 1)).err().unwrap_or_else(|| panic!("{name:?} did not fail"));
        fail_in(c"", 0);
        assert!(failure.status == RS_ERR_COMM && failure.text.contains(name.to_str().unwrap()), "{failure}");
        assert_eq!(live(), before, "{name:?}: something is left");
    }
}

/// Its version is read once, so another process looks.
#[test]
fn an_old_release_is_refused() {
    let Some(_alone) = alone() else { return };
    const NAME: &str = "an_old_release_is_refused";
    if std::env::var("STANDIN_NCCL_VERSION").is_ok() {
        let failure = gpu::on(0, || Comm::nccl(&nccl::id(), 0, 1)).err().expect("too old");
        assert!(failure.status == RS_ERR_UNSUPPORTED && failure.text.contains("21705"), "{failure}");
        return;
    }
    let program = std::env::current_exe().unwrap();
    let status = std::process::Command::new(program).args([NAME, "--exact"]).env("STANDIN_NCCL_VERSION", "21705").status().unwrap();
    assert!(status.success());
}
