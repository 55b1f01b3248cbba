//! The caller's communicator for tests: ranks of one process that gather through a shared table, which a test may hold or change.

use reshard::abi::*;
use std::ffi::c_void;
use std::ptr;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex};
use std::time::{Duration, Instant};

/// Changes what a rank sends; `n` counts its gatherings from 0.
pub type Tamper = fn(n: usize, bytes: &mut [u8]);

/// Where the ranks meet.
pub struct Hub {
    world: usize,
    table: Mutex<Table>,
    changed: Condvar,
    /// Communicators that were released.
    pub released: AtomicUsize,
    /// Calls of `abort`.
    pub aborted: AtomicUsize,
}

struct Table {
    rounds: Vec<Vec<Option<Vec<u8>>>>,
    ended: bool,
}

struct Seat {
    hub: Arc<Hub>,
    rank: usize,
    tamper: Tamper,
    gathered: AtomicUsize,
}

impl Hub {
    pub fn new(world: usize) -> Arc<Hub> {
        let table = Mutex::new(Table { rounds: vec![], ended: false });
        Arc::new(Hub { world, table, changed: Condvar::new(), released: AtomicUsize::new(0), aborted: AtomicUsize::new(0) })
    }

    /// A rank's functions; the library owns the seat once rs_comm_custom() has succeeded.
    pub fn ops(self: &Arc<Hub>, rank: usize, tamper: Tamper) -> rs_comm_ops_t {
        let seat = Box::new(Seat { hub: self.clone(), rank, tamper, gathered: AtomicUsize::new(0) });
        rs_comm_ops_t {
            struct_size: size_of::<rs_comm_ops_t>(),
            ctx: Box::into_raw(seat).cast(),
            release: Some(release),
            rank: rank as i32,
            world_size: self.world as i32,
            allgather: Some(allgather),
            group_begin: Some(refused),
            group_end: Some(refused),
            send: Some(send),
            recv: Some(recv),
            poll: Some(refused),
            abort: Some(abort),
        }
    }

    /// Waits until `rank` has come to its gathering `n`.
    pub fn wait_for(&self, rank: usize, n: usize) {
        let table = self.table.lock().unwrap();
        let there = |t: &mut Table| t.rounds.get(n).is_none_or(|r| r[rank].is_none());
        let (_table, out) = self.changed.wait_timeout_while(table, Duration::from_secs(30), there).unwrap();
        assert!(!out.timed_out(), "rank {rank} never came");
    }
}

impl Seat {
    fn gather(&self, mine: &[u8], all: &mut [u8], timeout: Duration) -> rs_status_t {
        let n = self.gathered.fetch_add(1, Ordering::Relaxed);
        let mut mine = mine.to_vec();
        (self.tamper)(n, &mut mine);
        let hub = &*self.hub;
        let mut table = hub.table.lock().unwrap();
        while table.rounds.len() <= n {
            table.rounds.push(vec![None; hub.world]);
        }
        table.rounds[n][self.rank] = Some(mine);
        hub.changed.notify_all();
        let end = Instant::now() + timeout;
        while !table.ended && table.rounds[n].iter().any(Option::is_none) {
            let left = end.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return RS_ERR_TIMEOUT;
            }
            table = hub.changed.wait_timeout(table, left).unwrap().0;
        }
        if table.ended {
            return RS_ERR_ABORTED;
        }
        let bytes: Vec<u8> = table.rounds[n].iter().flatten().flatten().copied().collect();
        all.copy_from_slice(&bytes);
        RS_OK
    }
}

/// # Safety
/// `ctx` is a seat that was not released.
unsafe fn seat<'a>(ctx: *mut c_void) -> &'a Seat {
    // SAFETY: this function's promise.
    unsafe { &*ctx.cast::<Seat>() }
}

// SAFETY, the functions below: the library gives `ctx` back as it got it, and memory of the lengths it states.
unsafe extern "C" fn allgather(ctx: *mut c_void, send: *const c_void, recv: *mut c_void, bytes: u64, ms: u32) -> rs_status_t {
    // SAFETY: as above.
    unsafe {
        let seat = seat(ctx);
        let mine = std::slice::from_raw_parts(send.cast::<u8>(), bytes as usize);
        let all = std::slice::from_raw_parts_mut(recv.cast::<u8>(), bytes as usize * seat.hub.world);
        seat.gather(mine, all, Duration::from_millis(ms.into()))
    }
}
unsafe extern "C" fn refused(_: *mut c_void) -> rs_status_t {
    RS_ERR_UNSUPPORTED
}
unsafe extern "C" fn send(_: *mut c_void, _: *const c_void, _: u64, _: i32, _: *mut c_void) -> rs_status_t {
    RS_ERR_UNSUPPORTED
}
unsafe extern "C" fn recv(_: *mut c_void, _: *mut c_void, _: u64, _: i32, _: *mut c_void) -> rs_status_t {
    RS_ERR_UNSUPPORTED
}
unsafe extern "C" fn abort(ctx: *mut c_void) {
    // SAFETY: as above.
    let hub = unsafe { &seat(ctx).hub };
    hub.aborted.fetch_add(1, Ordering::Relaxed);
    hub.table.lock().unwrap().ended = true;
    hub.changed.notify_all();
}
unsafe extern "C" fn release(ctx: *mut c_void) {
    // SAFETY: as above; the library calls this once, last.
    let seat = unsafe { Box::from_raw(ctx.cast::<Seat>()) };
    seat.hub.released.fetch_add(1, Ordering::Relaxed);
}

/// Leaves what a rank sends as it is.
pub fn honest(_: usize, _: &mut [u8]) {}

/// The communicator of a rank.
pub fn comm(hub: &Arc<Hub>, rank: usize, tamper: Tamper) -> *mut rs_comm_t {
    let mut out = ptr::null_mut();
    // SAFETY: the functions above keep the header's promises.
    assert_eq!(unsafe { reshard::ffi::api::rs_comm_custom(&hub.ops(rank, tamper), &mut out) }, RS_OK);
    out
}
