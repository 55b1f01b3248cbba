//! What only several ranks can find out, and what becomes of their containers.

use crate::hub::{self, Hub, Tamper, honest};
use crate::tables::*;
use reshard::abi::*;
use reshard::ffi::api::*;
use std::ffi::c_void;
use std::ptr::{null, null_mut};
use std::time::{Duration, Instant};

/// A tensor of `rows` x 3 that rank 0 has as a source and rank 1 as a target, if they agree.
fn tables(rank: i32, memory: &mut [f32], rows: i64) -> Tables {
    let mut t = Tables::default();
    t.tensor("model.w", &[rows, 3]);
    let (name, role) = if rank == 0 { ("trained", RS_SOURCE) } else { ("served", RS_TARGET) };
    t.buffer(name, memory, role, &[rows, 3]);
    t.tile(0, 0, &[0, 0], &[rows, 3], &[3, 1]);
    t
}

fn memory(rank: i32, rows: usize) -> Vec<f32> {
    (0..rows * 3).map(|i| if rank == 0 { i as f32 } else { -1.0 }).collect()
}

#[test]
fn weights_arrive() {
    world(2, |rank, comm| {
        let mut m = memory(rank, 4);
        let c = Container::new(&config(comm), &tables(rank, &mut m, 4));
        ok(c.connect());
        ok(c.sync(1));
        assert_eq!(m, memory(0, 4));
        let mut p = sized();
        ok(c.param(if rank == 0 { c"trained" } else { c"served" }, &mut p));
        assert_eq!((p.state, p.version), (RS_PARAM_SYNCED, 1));
    });
}

#[test]
fn one_tensor_with_two_shapes() {
    world(2, |rank, comm| {
        let rows = 4 + i64::from(rank);
        let mut m = memory(rank, rows as usize);
        let c = Container::new(&config(comm), &tables(rank, &mut m, rows));
        fails(c.connect(), RS_ERR_MISMATCH, &["model.w", "[4, 3]", "[5, 3]"]);
        fails(c.sync(1), RS_ERR_STATE, &[]);
        assert_eq!(m, memory(rank, rows as usize));
    });
}

#[test]
fn one_tensor_with_two_dtypes() {
    world(2, |rank, comm| {
        let mut m = memory(rank, 4);
        let mut t = tables(rank, &mut m, 4);
        t.buffers[0].dtype = if rank == 0 { F32 } else { rs_dtype_t { code: 0, bits: 32, lanes: 1 } };
        let c = Container::new(&config(comm), &t);
        fails(c.connect(), RS_ERR_MISMATCH, &["model.w"]);
    });
}

#[test]
fn an_element_without_a_source() {
    world(2, |rank, comm| {
        let mut m = memory(rank, 4);
        let mut t = tables(rank, &mut m, 4);
        if rank == 0 {
            // The last row is missing.
            t.tiles[0].extent[0] = 3;
        }
        let c = Container::new(&config(comm), &t);
        fails(c.connect(), RS_ERR_COVERAGE, &["served", "rank 1", "3:4"]);
        assert_eq!(m, memory(rank, 4), "nothing moved");
    });
}

#[test]
fn ranks_that_disagree_on_a_sync() {
    world(2, |rank, comm| {
        let mut m = memory(rank, 4);
        let c = Container::new(&config(comm), &tables(rank, &mut m, 4));
        ok(c.connect());
        fails(c.sync(5 + rank as u64), RS_ERR_MISMATCH, &["version 5", "version 6"]);
        let name = c"model.w".as_ptr();
        let only = rs_sync_t { version: 5, only: &name, only_count: (rank == 0) as usize, ..sized() };
        fails(c.sync_as(&only), RS_ERR_MISMATCH, &["only"]);
        assert_eq!(m, memory(rank, 4), "nothing moved");
        // SAFETY: a live handle.
        fails(unsafe { rs_container_poll(c.0) }, RS_ERR_MISMATCH, &["only"]);
        ok(c.sync(5));
        assert_eq!(m, memory(0, 4), "and the containers are as good as before");
    });
}

#[test]
fn a_rank_that_does_not_come() {
    let comm = loopback(hub(), 0, 2);
    let c = Container::new(&rs_config_t { timeout_ms: 200, ..config(comm) }, &Tables::default());
    let begun = Instant::now();
    fails(c.connect(), RS_ERR_TIMEOUT, &["200 ms", "rank 1"]);
    let waited = begun.elapsed();
    assert!((Duration::from_millis(200)..Duration::from_secs(5)).contains(&waited), "{waited:?}");
    // SAFETY: not used any more.
    unsafe { rs_comm_destroy(comm) };
}

#[test]
fn use_after_abort() {
    let next = hub();
    world(2, |rank, comm| {
        let mut m = memory(rank, 4);
        let c = Container::new(&config(comm), &tables(rank, &mut m, 4));
        ok(c.connect());
        ok(c.sync(1));
        if rank == 0 {
            // SAFETY: a live handle.
            ok(unsafe { rs_container_abort(c.0) });
        }
        // The rank that aborts, and the other one.
        fails(c.sync(2), RS_ERR_ABORTED, &["rs_container_abort"]);
        // SAFETY: as above.
        fails(unsafe { rs_container_poll(c.0) }, RS_ERR_ABORTED, &[]);
        fails(c.sync(2), RS_ERR_STATE, &["rs_container_set_comm"]);
        fails(c.connect(), RS_ERR_ABORTED, &[]);
        let mut p = sized();
        ok(c.param(if rank == 0 { c"trained" } else { c"served" }, &mut p));
        assert_eq!((p.state, p.version), (RS_PARAM_SYNCED, 1), "nothing was written after version 1");
        // SAFETY: as above; each communicator is given back once.
        unsafe {
            let comm = loopback(next, rank, 2);
            ok(rs_container_set_comm(c.0, comm));
            rs_comm_destroy(comm);
            ok(rs_container_poll(c.0));
        }
        ok(c.connect());
        ok(c.sync(3));
    });
}

#[test]
fn other_addresses_and_other_boxes() {
    world(2, |rank, comm| {
        let (mut first, mut second, mut third) = (memory(rank, 4), memory(rank, 4), memory(rank, 6));
        let c = Container::new(&config(comm), &tables(rank, &mut first, 4));
        // SAFETY: a live handle and whole structs.
        let rebind = |t: &Tables| unsafe { rs_container_rebind(c.0, &t.layout(), null()) };
        ok(c.connect());
        ok(c.sync(1));
        ok(rebind(&tables(rank, &mut second, 4)));
        let mut p = sized();
        // SAFETY: a live handle.
        ok(unsafe { rs_get_param_at(c.0, 0, &mut p) });
        assert_eq!((p.data, p.state), (second.as_mut_ptr().cast(), RS_PARAM_INITIAL));
        ok(c.sync(2));
        assert_eq!(second, memory(0, 4));

        let mut bad = tables(rank, &mut third, 6);
        bad.tiles[0].extent[0] = 7;
        fails(rebind(&bad), RS_ERR_INVALID, &["tiles[0]"]);
        ok(c.sync(3)); // as before
        ok(rebind(&tables(rank, &mut third, 6)));
        fails(c.sync(4), RS_ERR_STATE, &["rs_container_connect"]);
        ok(c.connect());
        ok(c.sync(4));
        assert_eq!(third, memory(0, 6));
    });
}

#[test]
fn tables_carried_by_the_caller() {
    let blobs = [std::sync::Mutex::new(vec![]), std::sync::Mutex::new(vec![])];
    let both = std::sync::Barrier::new(2);
    world(2, |rank, comm| {
        let mut m = memory(rank, 4);
        let c = Container::new(&config(comm), &tables(rank, &mut m, 4));
        let mut len = 0;
        // SAFETY: a live handle; the vector has room for what is stated.
        unsafe {
            fails(rs_container_export(c.0, null_mut(), 0, &mut len), RS_ERR_TOO_SMALL, &[]);
            let mut blob = vec![0u8; len];
            ok(rs_container_export(c.0, blob.as_mut_ptr().cast(), len, &mut len));
            *blobs[rank as usize].lock().unwrap() = blob;
            both.wait();
            let other = blobs[1 - rank as usize].lock().unwrap().clone();
            ok(rs_container_import(c.0, other.as_ptr().cast(), other.len()));
            for end in [0, 1, other.len() / 2, other.len() - 1] {
                fails(rs_container_import(c.0, other.as_ptr().cast(), end), RS_ERR_INVALID, &[]);
            }
            fails(rs_container_import(c.0, null(), 0), RS_ERR_INVALID, &[]);
        }
        ok(c.connect());
        ok(c.sync(1));
        assert_eq!(m, memory(0, 4));
    });
}

/// Connects two ranks through the caller's communicator, rank 1's bytes changed on their way.
fn tampered(tamper: Tamper, status: rs_status_t, words: &[&str]) {
    let hub = Hub::new(2);
    std::thread::scope(|s| {
        for rank in 0..2 {
            let hub = &hub;
            s.spawn(move || {
                let comm = hub::comm(hub, rank, if rank == 1 { tamper } else { honest });
                let c = Container::new(&config(comm), &Tables::default());
                fails(c.connect(), status, words);
                // SAFETY: not used any more.
                unsafe { rs_comm_destroy(comm) };
            });
        }
    });
}

#[test]
fn other_versions_of_the_library() {
    // Bytes 4 and 5 of a record are the wire version, 6 and 7 the planner's. All ranks see the record, so all refuse it.
    tampered(|n, b| b[4] += u8::from(n == 0), RS_ERR_MISMATCH, &["rank 1 has wire version", "load one libreshard"]);
    tampered(|n, b| b[7] += u8::from(n == 0), RS_ERR_MISMATCH, &["rank 1 has planner version", "load one libreshard"]);
    tampered(|n, b| b[0] ^= u8::from(n == 0), RS_ERR_MISMATCH, &["rank 1 is not in connect"]);
    tampered(|n, b| b[8] ^= u8::from(n == 0), RS_ERR_MISMATCH, &["rank 1"]);
}

unsafe extern "C" fn count(user: *mut c_void, done: u64, total: u64) {
    // SAFETY: `user` is the test's list.
    unsafe { (*user.cast::<Vec<(u64, u64)>>()).push((done, total)) };
}

#[test]
fn progress_is_heard() {
    world(2, |rank, comm| {
        let mut m = memory(rank, 4);
        let c = Container::new(&config(comm), &tables(rank, &mut m, 4));
        ok(c.connect());
        let mut heard: Vec<(u64, u64)> = vec![];
        let user = (&raw mut heard).cast();
        ok(c.sync_as(&rs_sync_t { version: 1, progress: Some(count), progress_user: user, ..sized() }));
        assert!(heard.is_sorted() && heard.iter().all(|h| h.0 <= h.1), "{heard:?}");
        assert!(heard.last().is_some_and(|h| h.0 == h.1), "{heard:?}");
    });
}
