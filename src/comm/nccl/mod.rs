//! `nccl`: ranks with a GPU each, on any hosts, over a communicator of NCCL's: the engine's own, or one that is made here.
//!
//! What ranks tell each other passes through a little memory of the GPU on a stream of our own; messages go as groups of sends and
//! receives on the caller's stream. Operations are collected and handed to NCCL together, so that an abort from another thread never
//! meets a half-open group.
//!
//! Nothing here waits without a deadline, if the communicator does not block, but for ncclCommAbort, which waits for what it ends. One
//! that the caller made to block may wait inside NCCL while connections to a peer are made, at its first messages; only its owner can end
//! that.
//!
//! Knows NCCL, ranks and bytes. Must not know tensors, plans or versions.

mod api;

use super::{Comm, Deadline, Group, Later, one};
use crate::abi::*;
use crate::device::cuda::{CudaDevice, Pinned};
use crate::device::{Device, Event, Mem, OwnStream, Prepare, Stream};
use crate::error::{Error, Result, bail, err};
use api::{BYTES, Config, IN_PROGRESS, Nccl, SUCCESS, nccl};
use cudarc::driver::sys::CUstream;
use cudarc::nccl::sys::{ncclComm_t, ncclUniqueId};
use std::ffi::{c_char, c_int, c_void};
use std::ptr;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::Duration;

/// Bytes gathered at once, of all ranks together.
const GATHER: usize = 4 << 20;

/// How long what a failed communicator left on our stream may take to end.
const GRACE: Duration = Duration::from_secs(2);

/// Length of a unique id in bytes: NCCL_UNIQUE_ID_BYTES.
const ID: usize = size_of::<ncclUniqueId>();

/// A communicator of NCCL's.
pub struct NcclComm {
    nccl: &'static Nccl,
    rank: u32,
    world: u32,
    /// Whether it was made here, and is ours to abort.
    owned: bool,
    gpu: CudaDevice,
    state: Mutex<State>,
    /// Why it ended.
    failed: OnceLock<Error>,
    /// Whether NCCL may still put something on a stream.
    pending: AtomicBool,
    /// Whether NCCL is asked to let go of all that it was given, and whether it has.
    aborting: AtomicBool,
    aborted: Arc<AtomicBool>,
    /// Serves one gather at a time; there until the drop.
    gather: Mutex<Option<Gather>>,
    taken: AtomicBool,
}

struct State {
    /// NULL once it is aborted.
    comm: ncclComm_t,
    open: Vec<Op>,
    flight: Option<Flight>,
}

/// A group that was handed to NCCL.
struct Flight {
    stream: Stream,
    /// Of its end, as soon as it is on the stream.
    end: Option<Event>,
}

struct Op {
    send: bool,
    mem: Mem,
    peer: c_int,
    stream: Stream,
}

/// What a gather needs: `piece` bytes to send, then room for those of all ranks, on the GPU and pinned on the host.
struct Gather {
    stream: Box<dyn OwnStream>,
    piece: usize,
    device: Mem,
    host: Pinned,
    /// What is under way.
    begun: Option<Begun>,
}

/// A gather under way.
struct Begun {
    /// Bytes of each rank.
    bytes: usize,
    /// Of its end, as soon as that is on the stream.
    end: Option<Event>,
}

// SAFETY: NCCL's handle may be used by any thread, one at a time, which the mutex around it sees to; the rest is safe to share.
unsafe impl Send for NcclComm {}
// SAFETY: as above.
unsafe impl Sync for NcclComm {}

impl NcclComm {
    /// The caller's communicator.
    ///
    /// # Safety
    /// `comm` is a communicator of the NCCL that is loaded as libnccl.so.2, alive until this value is dropped, and used by nobody else
    /// during calls of this library.
    pub unsafe fn borrow(comm: *mut c_void) -> Result<NcclComm> {
        if comm.is_null() {
            bail!(RS_ERR_INVALID, "nccl_comm is NULL");
        }
        let nccl = nccl(false)?;
        // SAFETY: this function's promise.
        unsafe { NcclComm::new(nccl, comm.cast(), false) }
    }

    /// A communicator of its own among `world` ranks that give the same id; collective. For the GPU that is current on this thread.
    pub fn init(id: &[u8], rank: u32, world: u32, timeout: Duration) -> Result<NcclComm> {
        if id.len() != ID {
            bail!(RS_ERR_INVALID, "id_len is {}; a unique id of NCCL's has {ID} bytes", id.len());
        }
        let nccl = nccl(true)?;
        // Before NCCL takes whatever is current.
        CudaDevice::current()?;
        let mut unique = ncclUniqueId { internal: [0; ID] };
        unique.internal.iter_mut().zip(id).for_each(|(to, from)| *to = *from as c_char);
        let mut config = Config::not_blocking();
        let deadline = Deadline::after(timeout);
        let mut comm = ptr::null_mut();
        // SAFETY: whole structs; the communicator is written to `comm`.
        let answer = unsafe { (nccl.ncclCommInitRankConfig)(&mut comm, world as c_int, unique, rank as c_int, &mut config) };
        let made = match answer {
            IN_PROGRESS => nccl.ready(comm, || deadline.check(|| format!("NCCL to connect {world} ranks"))),
            answer => nccl.done("ncclCommInitRankConfig", answer),
        };
        // SAFETY: the communicator is ours alone.
        let out = unsafe { made.and_then(|()| NcclComm::new(nccl, comm, true)) };
        if out.is_err() && !comm.is_null() {
            // SAFETY: as above, and nobody has it any more.
            unsafe { (nccl.ncclCommAbort)(comm) };
        }
        out
    }

    /// # Safety
    /// As [`NcclComm::borrow`].
    unsafe fn new(nccl: &'static Nccl, comm: ncclComm_t, owned: bool) -> Result<NcclComm> {
        let (mut rank, mut world, mut ordinal) = (0, 0, 0);
        // SAFETY: this function's promise; each call writes its one result.
        unsafe {
            nccl.done("ncclCommUserRank", (nccl.ncclCommUserRank)(comm, &mut rank))?;
            nccl.done("ncclCommCount", (nccl.ncclCommCount)(comm, &mut world))?;
            nccl.done("ncclCommCuDevice", (nccl.ncclCommCuDevice)(comm, &mut ordinal))?;
        }
        let gpu = CudaDevice::new(ordinal)?;
        let piece = (GATHER / world.max(1) as usize).max(256).next_multiple_of(256);
        let bytes = piece * (world as usize + 1);
        // What nothing gives back by itself comes last.
        let (stream, host) = (gpu.stream()?, gpu.pinned(bytes)?);
        let gather = Gather { stream, piece, host, device: gpu.alloc(bytes)?, begun: None };
        Ok(NcclComm {
            nccl,
            rank: rank as u32,
            world: world as u32,
            owned,
            gpu,
            state: Mutex::new(State { comm, open: vec![], flight: None }),
            failed: OnceLock::new(),
            pending: AtomicBool::new(false),
            aborting: AtomicBool::new(false),
            aborted: Arc::default(),
            gather: Mutex::new(Some(gather)),
            taken: AtomicBool::new(false),
        })
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Ends the communicator for this reason, unless it ended before: the first reason stays.
    fn fail(&self, error: Error) -> Error {
        let first = self.failed.get_or_init(|| error).clone();
        if !self.owned {
            // Without a look at the state: another thread may hold it for as long as the communicator blocks.
            return first.context("of the caller's NCCL communicator, which only its owner can abort");
        }
        let comm = std::mem::replace(&mut self.state().comm, ptr::null_mut());
        if !comm.is_null() {
            self.aborting.store(true, Ordering::Release);
            self.end(comm);
        }
        first
    }

    /// Aborts a communicator of our own on a thread of its own: NCCL waits for what it has on streams, and so for whatever the caller has
    /// there before.
    fn end(&self, comm: ncclComm_t) {
        let (nccl, aborted, comm) = (self.nccl, self.aborted.clone(), comm.expose_provenance());
        let abort = move || {
            // SAFETY: ours alone, and used by nobody after this: the handle is gone.
            unsafe { (nccl.ncclCommAbort)(ptr::with_exposed_provenance_mut(comm)) };
            aborted.store(true, Ordering::Release);
        };
        if let Err(e) = std::thread::Builder::new().name("reshard-abort".into()).spawn(abort) {
            log::warn!("nccl: no thread to abort a communicator on ({e}): it is left as it is");
        }
    }

    /// Whether all that is on a stream ends within [`GRACE`].
    fn ends(&self, stream: Stream) -> bool {
        let deadline = Deadline::after(GRACE);
        while !self.idle() {
            if deadline.passed() {
                return false;
            }
            std::thread::sleep(Duration::from_micros(50));
        }
        let Ok(end) = self.gpu.record(stream) else { return false };
        let ended = loop {
            match self.gpu.query(&end) {
                Ok(false) if !deadline.passed() => std::thread::sleep(Duration::from_micros(50)),
                other => break matches!(other, Ok(true)),
            }
        };
        self.gpu.forget(end);
        ended
    }

    /// Runs `call` on the communicator; what it answers may be that it is under way.
    fn call(&self, what: &str, call: impl FnOnce(ncclComm_t) -> c_int) -> Result<()> {
        let answer = {
            let state = self.state();
            self.check()?;
            call(state.comm)
        };
        match answer {
            IN_PROGRESS => {
                self.pending.store(true, Ordering::Relaxed);
                Ok(())
            }
            answer => self.nccl.done(what, answer).map_err(|e| self.fail(e)),
        }
    }

    /// Whether what was handed to NCCL is on its stream.
    fn enqueued(&self) -> Result<bool> {
        let mut answer = 0;
        self.call("ncclCommGetAsyncError", |comm| {
            // SAFETY: a live communicator; writes its one result.
            unsafe { (self.nccl.ncclCommGetAsyncError)(comm, &mut answer) }
        })?;
        match answer {
            IN_PROGRESS => Ok(false),
            SUCCESS => {
                self.pending.store(false, Ordering::Relaxed);
                Ok(true)
            }
            answer => self.nccl.done("an earlier call of NCCL", answer).map_err(|e| self.fail(e)).map(|()| true),
        }
    }

    /// Begins a gather of at most `Gather::piece` bytes of each rank.
    fn start(&self, g: &mut Gather, mine: &[u8]) -> Result<()> {
        let bytes = mine.len();
        let (from, to) = (cut(g.device, 0, bytes)?, cut(g.device, g.piece, bytes * self.world as usize)?);
        let stream = g.stream.raw();
        g.host.write(mine)?;
        self.gpu.transfer(from, cut(g.host.mem(), 0, bytes)?, stream)?;
        self.call("ncclAllGather", |comm| {
            // SAFETY: a live communicator; so many bytes of memory of its GPU, ours until the stream has done it.
            unsafe { (self.nccl.ncclAllGather)(pointer(from), pointer(to), bytes, BYTES, comm, handle(stream)) }
        })?;
        g.begun = Some(Begun { bytes, end: None });
        Ok(())
    }

    /// What the gather gave, once it is complete.
    fn finish(&self, g: &mut Gather, deadline: Deadline) -> Result<Option<Vec<u8>>> {
        let Some(begun) = &mut g.begun else { bail!(RS_ERR_INTERNAL, "the end of a gather that was not begun") };
        let all = begun.bytes * self.world as usize;
        let wait = || deadline.check(|| format!("all {} ranks to come to a gather", self.world));
        let stream = g.stream.raw();
        let end = match &begun.end {
            Some(end) => end,
            None => {
                if !self.enqueued()? {
                    return wait().map(|()| None);
                }
                self.gpu.transfer(cut(g.host.mem(), g.piece, all)?, cut(g.device, g.piece, all)?, stream)?;
                begun.end.insert(self.gpu.record(stream)?)
            }
        };
        if !self.gpu.query(end)? {
            self.enqueued()?;
            return wait().map(|()| None);
        }
        // An abort, or a peer's error, ends what is on the stream as well, and leaves there whatever it had.
        self.enqueued()?;
        let mut out = vec![0; all];
        g.host.read(g.piece, &mut out)?;
        if let Some(end) = g.begun.take().and_then(|b| b.end) {
            self.gpu.forget(end);
        }
        Ok(Some(out))
    }

    fn gatherer(&self) -> MutexGuard<'_, Option<Gather>> {
        self.gather.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Runs one half of a gather; any error ends the communicator.
    fn half<T>(&self, g: Option<&mut Gather>, half: impl FnOnce(&mut Gather) -> Result<T>) -> Result<T> {
        self.check()?;
        let g = g.ok_or_else(|| err!(RS_ERR_INTERNAL, "no memory to gather with"))?;
        half(g).map_err(|e| self.fail(e))
    }
}

fn cut(mem: Mem, at: usize, len: usize) -> Result<Mem> {
    mem.cut(at, len).ok_or_else(|| err!(RS_ERR_INTERNAL, "a gather of {len} bytes"))
}

impl Comm for NcclComm {
    fn name(&self) -> &str {
        "nccl"
    }

    fn rank(&self) -> u32 {
        self.rank
    }

    fn world(&self) -> u32 {
        self.world
    }

    fn allgather(&self, mine: &[u8], deadline: Deadline) -> Result<Vec<u8>> {
        let mut gather = self.gatherer();
        let mut all = vec![0; mine.len() * self.world as usize];
        let piece = gather.as_ref().map_or(1, |g| g.piece);
        for (i, part) in mine.chunks(piece).enumerate() {
            self.half(gather.as_mut(), |g| self.start(g, part))?;
            let parts = loop {
                match self.half(gather.as_mut(), |g| self.finish(g, deadline))? {
                    Some(parts) => break parts,
                    None => std::thread::sleep(Duration::from_micros(20)),
                }
            };
            for (rank, bytes) in parts.chunks_exact(part.len()).enumerate() {
                all[rank * mine.len() + i * piece..][..bytes.len()].copy_from_slice(bytes);
            }
        }
        Ok(all)
    }

    fn abort(&self, why: &str) {
        self.fail(err!(RS_ERR_ABORTED, "{why}"));
    }

    fn check(&self) -> Result<()> {
        self.failed.get().map_or(Ok(()), |e| Err(e.clone()))
    }

    fn device(&self) -> Option<(i32, i32)> {
        Some(self.gpu.id())
    }

    fn sound(&self) -> Result<()> {
        self.enqueued().map(|_| ())
    }

    fn later(&self) -> Option<&dyn Later> {
        Some(self)
    }

    fn group(&self) -> Option<&dyn Group> {
        Some(self)
    }
}

impl Later for NcclComm {
    fn taken(&self) -> &AtomicBool {
        &self.taken
    }

    fn begin(&self, mine: &[u8]) -> Result<()> {
        self.half(self.gatherer().as_mut(), |g| self.start(g, mine))
    }

    fn ended(&self, deadline: Deadline) -> Result<Option<Vec<u8>>> {
        self.half(self.gatherer().as_mut(), |g| self.finish(g, deadline))
    }
}

impl Group for NcclComm {
    fn begin(&self) -> Result<()> {
        self.check()?;
        self.state().open.clear();
        Ok(())
    }

    fn send(&self, blocks: &[Mem], to: u32, stream: Stream) -> Result<()> {
        let mem = one(blocks)?;
        self.state().open.push(Op { send: true, mem, peer: to as c_int, stream });
        self.check()
    }

    fn recv(&self, blocks: &[Mem], from: u32, stream: Stream) -> Result<()> {
        let mem = one(blocks)?;
        self.state().open.push(Op { send: false, mem, peer: from as c_int, stream });
        self.check()
    }

    fn end(&self) -> Result<()> {
        let mut state = self.state();
        self.check()?;
        let ops = std::mem::take(&mut state.open);
        let Some(first) = ops.first() else { return Ok(()) };
        let (n, comm) = (self.nccl, state.comm);
        let mut answers = vec![];
        // SAFETY: a live communicator, whose GPU has this memory; the executor keeps it until the group is complete.
        unsafe {
            let started = (n.ncclGroupStart)();
            answers.push(("ncclGroupStart", started));
            for op in ops.iter().filter(|_| started == SUCCESS) {
                let (at, len, stream) = (pointer(op.mem), op.mem.len(), handle(op.stream));
                answers.push(match op.send {
                    true => ("ncclSend", (n.ncclSend)(at, len, BYTES, op.peer, comm, stream)),
                    false => ("ncclRecv", (n.ncclRecv)(at, len, BYTES, op.peer, comm, stream)),
                });
            }
            if started == SUCCESS {
                answers.push(("ncclGroupEnd", (n.ncclGroupEnd)()));
            }
        }
        state.flight = Some(Flight { stream: first.stream, end: None });
        drop(state);
        if answers.iter().any(|a| a.1 == IN_PROGRESS) {
            self.pending.store(true, Ordering::Relaxed);
        }
        let failed = answers.into_iter().filter(|a| a.1 != IN_PROGRESS).try_for_each(|(call, answer)| n.done(call, answer));
        failed.map_err(|e| self.fail(e))
    }

    fn on_streams(&self) -> bool {
        true
    }

    fn enqueued(&self) -> Result<bool> {
        NcclComm::enqueued(self)
    }

    fn idle(&self) -> bool {
        // Not by a question to NCCL: the owner of a borrowed communicator may have ended it.
        match self.aborting.load(Ordering::Acquire) {
            true => self.aborted.load(Ordering::Acquire),
            false => !self.pending.load(Ordering::Relaxed),
        }
    }

    fn poll(&self) -> Result<bool> {
        if !self.enqueued()? {
            return Ok(false);
        }
        let mut state = self.state();
        let Some(flight) = &mut state.flight else { return Ok(true) };
        let end = match flight.end.take() {
            Some(end) => end,
            None => self.gpu.record(flight.stream)?,
        };
        match self.gpu.query(&end) {
            Ok(true) => state.flight = None,
            other => {
                flight.end = Some(end);
                return other;
            }
        }
        self.gpu.forget(end);
        drop(state);
        // As after a gather.
        self.enqueued()
    }
}

impl Drop for NcclComm {
    fn drop(&mut self) {
        let state = self.state.get_mut().unwrap_or_else(PoisonError::into_inner);
        if let Some(end) = state.flight.take().and_then(|f| f.end) {
            self.gpu.forget(end);
        }
        if self.owned && !state.comm.is_null() {
            // SAFETY: ours alone, and nobody has it any more.
            unsafe { (self.nccl.ncclCommDestroy)(state.comm) };
        }
        let gather = self.gather.get_mut().unwrap_or_else(PoisonError::into_inner).take();
        let Some(mut gather) = gather else { return };
        if let Some(end) = gather.begun.take().and_then(|b| b.end) {
            self.gpu.forget(end);
        }
        if self.failed.get().is_none() || self.ends(gather.stream.raw()) {
            self.gpu.free(gather.device);
        } else {
            // A communicator of the caller's that is not aborted yet, for one, may still write there.
            log::warn!("nccl: {} bytes that a failed communicator uses are left where they are", gather.device.len());
            std::mem::forget(gather);
        }
    }
}

fn pointer(mem: Mem) -> *mut c_void {
    ptr::with_exposed_provenance_mut(mem.addr())
}

fn handle(stream: Stream) -> CUstream {
    ptr::with_exposed_provenance_mut(stream)
}
