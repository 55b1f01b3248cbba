//! A communicator of the caller's own, between threads: it sees every byte, delivers late and in any order that the header allows, and
//! notes every misuse.

use super::gpu;
use reshard::abi::*;
use std::collections::{HashMap, VecDeque};
use std::ffi::c_void;
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::time::{Duration, Instant};

/// What all endpoints share.
pub struct Hub {
    world: usize,
    state: Mutex<State>,
    turn: Condvar,
}

#[derive(Default)]
struct State {
    /// By number of the gather: what each rank has given so far.
    gathers: HashMap<u64, Vec<Option<Vec<u8>>>>,
    wires: HashMap<(usize, usize), VecDeque<Vec<u8>>>,
    aborted: bool,
    /// Calls left until the wire breaks.
    fuse: Option<u64>,
    /// Messages left until one has a bit flipped, as a share of its length.
    flip: Option<(u64, f64)>,
    spoils: Vec<Spoil>,
    tally: Tally,
}

/// What went over the wire so far.
#[derive(Clone, Debug, Default)]
pub struct Tally {
    /// Bytes by (sender, receiver).
    pub bytes: HashMap<(usize, usize), u64>,
    /// Length of the longest message.
    pub longest: u64,
    /// Calls that the header forbids.
    pub faults: Vec<String>,
    /// Endpoints released.
    pub released: usize,
}

/// Bits of a rank's memory that change as the rank comes to a gather; or, without any, the end of the wire.
pub struct Spoil {
    pub rank: usize,
    /// Gathers of the rank until then, that one included.
    pub gathers: u64,
    pub address: usize,
    pub bits: u8,
}

/// One rank's end, the `ctx` of its operations.
struct End {
    hub: Arc<Hub>,
    rank: usize,
    inner: Mutex<Inner>,
}

#[derive(Default)]
struct Inner {
    gather: u64,
    open: bool,
    group: Vec<Op>,
    sends: Vec<Op>,
    recvs: Vec<Op>,
}

/// A send or a receive; its memory is the library's until `poll` has said that the group is complete.
struct Op {
    send: bool,
    data: *mut u8,
    bytes: usize,
    peer: usize,
}

// SAFETY: the pointer is used only inside calls that the library makes, which promises the memory until the group is complete.
unsafe impl Send for Op {}

impl Hub {
    pub fn new(world: usize) -> Arc<Hub> {
        Arc::new(Hub { world, state: Mutex::default(), turn: Condvar::new() })
    }

    /// What went over the wire since the last call; faults and releases stay.
    pub fn take(&self) -> Tally {
        let mut state = self.state.lock().unwrap();
        let kept = Tally { faults: state.tally.faults.clone(), released: state.tally.released, ..Tally::default() };
        std::mem::replace(&mut state.tally, kept)
    }

    /// Breaks the wire after some more calls of any rank: from then on everything fails everywhere.
    pub fn break_after(&self, calls: u64) {
        self.state.lock().unwrap().fuse = Some(calls);
    }

    /// Flips a bit in the message after `messages` others, at such a share of its length.
    #[allow(dead_code)] // of `properties` alone
    pub fn flip(&self, messages: u64, place: f64) {
        self.state.lock().unwrap().flip = Some((messages, place));
    }

    /// Whether the message of [`Hub::flip`] has gone.
    #[allow(dead_code)] // of `properties` alone
    pub fn flipped(&self) -> bool {
        self.state.lock().unwrap().flip.is_none()
    }

    #[allow(dead_code)] // of `properties` alone
    pub fn spoil(&self, spoil: Spoil) {
        self.state.lock().unwrap().spoils.push(spoil);
    }

    /// The table of functions for one rank; `release` takes its `ctx` back.
    pub fn ops(self: &Arc<Hub>, rank: usize) -> rs_comm_ops_t {
        let end = Box::new(End { hub: self.clone(), rank, inner: Mutex::default() });
        rs_comm_ops_t {
            struct_size: size_of::<rs_comm_ops_t>(),
            ctx: Box::into_raw(end).cast(),
            release: Some(release),
            rank: rank as i32,
            world_size: self.world as i32,
            allgather: Some(allgather),
            group_begin: Some(group_begin),
            group_end: Some(group_end),
            send: Some(send),
            recv: Some(recv),
            poll: Some(poll),
            abort: Some(abort),
        }
    }
}

impl State {
    /// Counts a call; whether the wire has broken or been aborted.
    fn is_dead(&mut self) -> bool {
        self.aborted |= self.fuse == Some(0);
        self.fuse = self.fuse.map(|left| left.saturating_sub(1));
        self.aborted
    }
}

impl End {
    fn inner(&self) -> MutexGuard<'_, Inner> {
        self.inner.try_lock().expect("one thread at a time")
    }

    /// Notes a misuse.
    fn fault(&self, text: String) -> rs_status_t {
        self.hub.state.lock().unwrap().tally.faults.push(format!("rank {}: {text}", self.rank));
        RS_ERR_INVALID
    }

    fn gather(&self, mine: &[u8], all: &mut [u8], timeout: Duration) -> rs_status_t {
        let number = {
            let mut inner = self.inner();
            inner.gather += 1;
            inner.gather
        };
        let (world, end) = (self.hub.world, Instant::now() + timeout);
        let mut state = self.hub.state.lock().unwrap();
        state.spoils.iter_mut().filter(|s| s.rank == self.rank).for_each(|s| s.gathers -= 1);
        let (due, rest) = std::mem::take(&mut state.spoils).into_iter().partition(|s| s.rank == self.rank && s.gathers == 0);
        state.spoils = rest;
        let due: Vec<Spoil> = due;
        for spoil in due {
            state.aborted |= spoil.bits == 0;
            if state.aborted {
                continue;
            }
            let mut byte = [0];
            let at = spoil.address as *mut u8;
            // SAFETY: memory of the test, which nothing copies while its rank comes to a gather.
            unsafe { gpu::read(at, &mut byte) };
            // SAFETY: as above.
            unsafe { gpu::write(at, &[byte[0] ^ spoil.bits]) };
        }
        if state.is_dead() {
            self.hub.turn.notify_all();
            return RS_ERR_COMM;
        }
        state.gathers.entry(number).or_insert_with(|| vec![None; world])[self.rank] = Some(mine.to_vec());
        self.hub.turn.notify_all();
        loop {
            if state.aborted {
                return RS_ERR_ABORTED;
            }
            if state.gathers[&number].iter().all(Option::is_some) {
                break;
            }
            let left = end.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return RS_ERR_TIMEOUT;
            }
            state = self.hub.turn.wait_timeout(state, left).unwrap().0;
        }
        for (slot, bytes) in all.chunks_mut(mine.len().max(1)).zip(state.gathers[&number].iter().flatten()) {
            if bytes.len() != mine.len() {
                drop(state);
                return self.fault(format!("gathers {} bytes where another rank gathers other than that", mine.len()));
            }
            slot.copy_from_slice(bytes);
        }
        // Everybody who came to this one has read the one before.
        state.gathers.remove(&(number - 1));
        RS_OK
    }

    fn push(&self, op: Op) -> rs_status_t {
        let mut inner = self.inner();
        if !inner.open || op.peer >= self.hub.world || op.peer == self.rank || op.bytes == 0 {
            let (open, bytes, peer) = (inner.open, op.bytes, op.peer);
            drop(inner);
            return self.fault(format!("an operation of {bytes} bytes with rank {peer}, in a group: {open}"));
        }
        inner.group.push(op);
        RS_OK
    }

    /// Delivers one message of this rank's and takes what has arrived, the last asked for first where the order is free.
    fn progress(&self) -> rs_status_t {
        let mut inner = self.inner();
        let mut state = self.hub.state.lock().unwrap();
        if state.is_dead() {
            self.hub.turn.notify_all();
            return RS_ERR_COMM;
        }
        if let Some(last) = inner.sends.last().map(|op| op.peer) {
            let first = inner.sends.iter().position(|op| op.peer == last).expect("it is there");
            let op = inner.sends.remove(first);
            let mut bytes = vec![0; op.bytes];
            // SAFETY: the library promises the bytes it sends until this function says RS_OK.
            unsafe { gpu::read(op.data, &mut bytes) };
            if let Some((messages, place)) = state.flip {
                state.flip = messages.checked_sub(1).map(|left| (left, place));
                if messages == 0 {
                    // Of an fp32 a byte that no rounding drops.
                    let at = (place * op.bytes as f64) as usize | 3;
                    bytes[at.min(op.bytes - 1)] ^= 0x10;
                }
            }
            *state.tally.bytes.entry((self.rank, op.peer)).or_default() += op.bytes as u64;
            state.tally.longest = state.tally.longest.max(op.bytes as u64);
            state.wires.entry((self.rank, op.peer)).or_default().push_back(bytes);
        }
        let mut waiting = Vec::new();
        for op in std::mem::take(&mut inner.recvs) {
            let blocked = waiting.iter().any(|w: &Op| w.peer == op.peer);
            let wire = state.wires.entry((op.peer, self.rank)).or_default();
            let Some(bytes) = (if blocked { None } else { wire.pop_front() }) else {
                waiting.push(op);
                continue;
            };
            if bytes.len() != op.bytes {
                drop(state);
                return self.fault(format!("expects {} bytes from rank {} that sent {}", op.bytes, op.peer, bytes.len()));
            }
            // SAFETY: the library promises the memory it receives into until this function says RS_OK.
            unsafe { gpu::write(op.data, &bytes) };
        }
        inner.recvs = waiting;
        if inner.sends.is_empty() && inner.recvs.is_empty() { RS_OK } else { RS_IN_PROGRESS }
    }
}

/// The endpoint behind a `ctx`.
///
/// # Safety
/// `ctx` is one of [`Hub::ops`] that was not released.
unsafe fn end<'a>(ctx: *mut c_void) -> &'a End {
    // SAFETY: by this function's contract it points to a live End, of which only shared references exist.
    unsafe { &*ctx.cast::<End>() }
}

unsafe extern "C" fn release(ctx: *mut c_void) {
    // SAFETY: the library calls this once, last; the box was leaked by Hub::ops.
    let end = unsafe { Box::from_raw(ctx.cast::<End>()) };
    end.hub.state.lock().unwrap().tally.released += 1;
}

unsafe extern "C" fn allgather(
    ctx: *mut c_void,
    send: *const c_void,
    recv: *mut c_void,
    bytes: u64,
    timeout_ms: u32,
) -> rs_status_t {
    // SAFETY: the library passes the ctx it was given.
    let end = unsafe { end(ctx) };
    if bytes == 0 {
        return end.fault("gathers nothing".into());
    }
    // SAFETY: the header promises `bytes` bytes to read.
    let mine = unsafe { std::slice::from_raw_parts(send.cast::<u8>(), bytes as usize) };
    // SAFETY: the header promises world_size * bytes bytes to write, apart from those to read.
    let all = unsafe { std::slice::from_raw_parts_mut(recv.cast::<u8>(), bytes as usize * end.hub.world) };
    end.gather(mine, all, Duration::from_millis(timeout_ms.into()))
}

unsafe extern "C" fn group_begin(ctx: *mut c_void) -> rs_status_t {
    // SAFETY: the library passes the ctx it was given.
    let end = unsafe { end(ctx) };
    if std::mem::replace(&mut end.inner().open, true) {
        return end.fault("opens a group in a group".into());
    }
    RS_OK
}

unsafe extern "C" fn group_end(ctx: *mut c_void) -> rs_status_t {
    // SAFETY: the library passes the ctx it was given.
    let end = unsafe { end(ctx) };
    let mut inner = end.inner();
    let (open, count) = (std::mem::replace(&mut inner.open, false), inner.group.len());
    if !open || count > 4096 {
        drop(inner);
        return end.fault(format!("ends a group of {count} operations, open: {open}"));
    }
    let (sends, recvs): (Vec<Op>, Vec<Op>) = std::mem::take(&mut inner.group).into_iter().partition(|op| op.send);
    inner.sends.extend(sends);
    inner.recvs.extend(recvs);
    RS_OK
}

unsafe extern "C" fn send(ctx: *mut c_void, data: *const c_void, bytes: u64, peer: i32, _stream: *mut c_void) -> rs_status_t {
    // SAFETY: the library passes the ctx it was given.
    let end = unsafe { end(ctx) };
    end.push(Op { send: true, data: data.cast_mut().cast(), bytes: bytes as usize, peer: peer as usize })
}

unsafe extern "C" fn recv(ctx: *mut c_void, data: *mut c_void, bytes: u64, peer: i32, _stream: *mut c_void) -> rs_status_t {
    // SAFETY: the library passes the ctx it was given.
    let end = unsafe { end(ctx) };
    end.push(Op { send: false, data: data.cast(), bytes: bytes as usize, peer: peer as usize })
}

unsafe extern "C" fn poll(ctx: *mut c_void) -> rs_status_t {
    // SAFETY: the library passes the ctx it was given.
    unsafe { end(ctx) }.progress()
}

unsafe extern "C" fn abort(ctx: *mut c_void) {
    // SAFETY: the library passes the ctx it was given.
    let hub = &unsafe { end(ctx) }.hub;
    hub.state.lock().unwrap().aborted = true;
    hub.turn.notify_all();
}
