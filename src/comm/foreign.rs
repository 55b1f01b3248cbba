//! `custom`: the caller's communicator, functions of rs_comm_ops_t.
//!
//! Knows how to call them and what their answers mean. Must not know how they reach the other ranks.

use super::{Comm, Deadline, Group, one};
use crate::abi::*;
use crate::device::foreign::{answered, pointer, required};
use crate::device::{Mem, Stream};
use crate::error::{Error, Result, bail, err};
use std::ffi::c_void;
use std::sync::{Once, OnceLock};

type AllgatherFn = unsafe extern "C" fn(*mut c_void, *const c_void, *mut c_void, u64, u32) -> rs_status_t;
type StepFn = unsafe extern "C" fn(*mut c_void) -> rs_status_t;
type SendFn = unsafe extern "C" fn(*mut c_void, *const c_void, u64, i32, *mut c_void) -> rs_status_t;
type RecvFn = unsafe extern "C" fn(*mut c_void, *mut c_void, u64, i32, *mut c_void) -> rs_status_t;

/// The caller's communicator.
pub struct ForeignComm {
    ctx: *mut c_void,
    rank: u32,
    world: u32,
    allgather: AllgatherFn,
    begin: StepFn,
    end: StepFn,
    send: SendFn,
    recv: RecvFn,
    poll: StepFn,
    abort: Option<unsafe extern "C" fn(*mut c_void)>,
    release: Option<unsafe extern "C" fn(*mut c_void)>,
    /// Why it ended. Set once.
    failed: OnceLock<Error>,
    /// `abort` was called.
    told: Once,
}

// SAFETY: the header asks for functions that any thread may call with `ctx`, abort beside another, the others one at a time.
unsafe impl Send for ForeignComm {}
// SAFETY: as above; the executor makes collectives and groups of one communicator one at a time.
unsafe impl Sync for ForeignComm {}

impl ForeignComm {
    /// Takes the functions over, and `ctx` with them: `release` is called when the communicator is dropped. An error names what is
    /// missing or wrong, and takes nothing.
    ///
    /// # Safety
    /// The functions and `ctx` keep the promises of rs_comm_ops_t until `release` has been called.
    pub unsafe fn new(ops: rs_comm_ops_t) -> Result<ForeignComm> {
        if ops.world_size < 1 || ops.rank < 0 || ops.rank >= ops.world_size {
            bail!(RS_ERR_INVALID, "rs_comm_ops_t: rank {} of a world_size of {}", ops.rank, ops.world_size);
        }
        Ok(ForeignComm {
            ctx: ops.ctx,
            rank: ops.rank as u32,
            world: ops.world_size as u32,
            allgather: required(ops.allgather, "rs_comm_ops_t.allgather")?,
            begin: required(ops.group_begin, "rs_comm_ops_t.group_begin")?,
            end: required(ops.group_end, "rs_comm_ops_t.group_end")?,
            send: required(ops.send, "rs_comm_ops_t.send")?,
            recv: required(ops.recv, "rs_comm_ops_t.recv")?,
            poll: required(ops.poll, "rs_comm_ops_t.poll")?,
            abort: ops.abort,
            release: ops.release,
            failed: OnceLock::new(),
            told: Once::new(),
        })
    }

    /// The answer of a function that is done when it returns.
    fn done(&self, what: &str, status: rs_status_t) -> Result<()> {
        match status {
            RS_OK => Ok(()),
            _ => Err(self.fail(answer(what, status))),
        }
    }

    /// Ends the communicator for this reason, unless it ended before: the first reason stays. The peers hear of it through the
    /// caller's abort.
    fn fail(&self, error: Error) -> Error {
        let first = self.failed.get_or_init(|| error).clone();
        if let Some(abort) = self.abort {
            // Who comes second waits for the first: after `abort`, and not before, no memory given to a group is touched any more.
            // SAFETY: the promise given to `new`.
            self.told.call_once(|| unsafe { abort(self.ctx) });
        }
        first
    }

    fn peer(&self, rank: u32) -> Result<i32> {
        if rank >= self.world || rank == self.rank {
            bail!(RS_ERR_INTERNAL, "rank {} has no peer {rank} in a world of {}", self.rank, self.world);
        }
        Ok(rank as i32)
    }
}

/// What went wrong when a function answered `status`.
fn answer(what: &str, status: rs_status_t) -> Error {
    // What a fatal number says of the world stays true for our caller; any other says something of a call that is not his.
    let kept = match status {
        RS_ERR_TIMEOUT | RS_ERR_PEER | RS_ERR_ABORTED | RS_ERR_MEMORY => status,
        _ => RS_ERR_COMM,
    };
    answered(kept, format_args!("the caller's communicator: {what}"), status)
}

impl Comm for ForeignComm {
    fn name(&self) -> &str {
        "custom"
    }

    fn rank(&self) -> u32 {
        self.rank
    }

    fn world(&self) -> u32 {
        self.world
    }

    fn allgather(&self, mine: &[u8], deadline: Deadline) -> Result<Vec<u8>> {
        self.check()?;
        deadline.check(|| "the caller's allgather".into()).map_err(|e| self.fail(e))?;
        let mut all = vec![];
        let len = mine.len().checked_mul(self.world as usize);
        if len.is_none_or(|len| all.try_reserve_exact(len).is_err()) {
            return Err(self.fail(err!(
                RS_ERR_MEMORY,
                "no memory to gather {} bytes from each of {} ranks",
                mine.len(),
                self.world
            )));
        }
        all.resize(mine.len() * self.world as usize, 0);
        let ms = deadline.left().as_millis().clamp(1, u32::MAX.into()) as u32;
        // SAFETY: the promise given to `new`; `all` has room for `mine.len()` bytes from every rank.
        let status = unsafe { (self.allgather)(self.ctx, mine.as_ptr().cast(), all.as_mut_ptr().cast(), mine.len() as u64, ms) };
        self.done("allgather", status)?;
        Ok(all)
    }

    fn abort(&self, why: &str) {
        self.fail(err!(RS_ERR_ABORTED, "{why}"));
    }

    fn check(&self) -> Result<()> {
        self.failed.get().map_or(Ok(()), |e| Err(e.clone()))
    }

    fn group(&self) -> Option<&dyn Group> {
        Some(self)
    }
}

impl Group for ForeignComm {
    fn begin(&self) -> Result<()> {
        self.check()?;
        // SAFETY: the promise given to `new`.
        self.done("group_begin", unsafe { (self.begin)(self.ctx) })
    }

    fn send(&self, blocks: &[Mem], to: u32, stream: Stream) -> Result<()> {
        let mem = one(blocks)?;
        self.check()?;
        let peer = self.peer(to)?;
        // SAFETY: the promise given to `new`; a `Mem` is memory that may be read for as long as the group runs.
        let status = unsafe { (self.send)(self.ctx, pointer(mem.addr()), mem.len() as u64, peer, pointer(stream)) };
        self.done(&format!("send of {} bytes to rank {to}", mem.len()), status)
    }

    fn recv(&self, blocks: &[Mem], from: u32, stream: Stream) -> Result<()> {
        let mem = one(blocks)?;
        self.check()?;
        let peer = self.peer(from)?;
        // SAFETY: the promise given to `new`; the executor gives memory that may be written for as long as the group runs.
        let status = unsafe { (self.recv)(self.ctx, pointer(mem.addr()), mem.len() as u64, peer, pointer(stream)) };
        self.done(&format!("recv of {} bytes from rank {from}", mem.len()), status)
    }

    fn end(&self) -> Result<()> {
        self.check()?;
        // SAFETY: the promise given to `new`.
        self.done("group_end", unsafe { (self.end)(self.ctx) })
    }

    fn poll(&self) -> Result<bool> {
        self.check()?;
        // SAFETY: the promise given to `new`.
        match unsafe { (self.poll)(self.ctx) } {
            RS_IN_PROGRESS => Ok(false),
            status => self.done("poll", status).map(|()| true),
        }
    }
}

impl Drop for ForeignComm {
    fn drop(&mut self) {
        if let Some(release) = self.release {
            // SAFETY: the promise given to `new`; nobody calls anything with `ctx` after the last reference.
            unsafe { release(self.ctx) }
        }
    }
}

#[cfg(test)]
mod tests;
