//! The rest of the exports, as in [`super::api`]: communicators, memory, what belongs to the process.
#![allow(clippy::missing_safety_doc)] // The whole comment is the promise, in the header's words.

use super::handle::CommHandle;
use super::write::Out;
use super::{call, convert, last_error, logger, read};
use crate::abi::*;
use crate::comm::foreign::ForeignComm;
use crate::comm::nccl::NcclComm;
use crate::comm::{local, loopback, nixl};
use crate::error::status_name;
use std::ffi::{c_char, c_void};
use std::ptr::NonNull;
use std::sync::Arc;

/// A communicator of the processes of one host: memory is read where it lies, or passes through shared memory.
///
/// Processes that give the same name and world meet, whichever comes first; those of another user are refused. Nothing stays behind
/// when they end, however they end.
///
/// - local: copied, with its name.
/// - out: the new communicator, the caller's to destroy.
///
/// Weights on GPUs: GPUs of a pair are the same or peers. Memory of cudaMalloc() is opened by its readers. So is memory that was mapped
/// of allocations with a handle for other processes (CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR), as PyTorch's expandable segments are in
/// recent releases; each takes a file descriptor while ranks connect. So is host memory of rs_mem_alloc(), which a GPU reads over the
/// bus, pinned by its owner or not: that of a trainer that has offloaded its weights. Others cannot open mapped memory without such
/// handles (that of vLLM's sleep mode), memory of pools, or other host memory: connect refuses it. Free what is from cudaMalloc() and
/// read by peers only when their containers are destroyed, have been rebound and synced, or their processes have ended: CUDA leaves it
/// undefined what happens else. Mapped memory may be unmapped or mapped anew between two syncs (a trainer that offloads):
/// rs_container_rebind() it before the next one, which else refuses. Until that sync peers keep the former memory open, and its bytes
/// allocated.
///
/// Collective: waits until all ranks are there, at most `timeout_ms`. Errors: RS_ERR_INVALID (among others a rank that is there
/// already), RS_ERR_UNKNOWN_FIELD, RS_ERR_MISMATCH (ranks with other flags or another world), RS_ERR_TIMEOUT (naming the missing
/// ranks), RS_ERR_COMM.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn rs_comm_local(local: *const rs_comm_local_t, out: *mut *mut rs_comm_t) -> rs_status_t {
    // SAFETY: what the comment asks of the caller.
    call(|| unsafe {
        let out = Out::new(out, "out")?;
        out.put(CommHandle::create(convert::join_local(local)?));
        Ok(())
    })
}

/// A communicator of threads of this process: those that give the same hub number are its ranks. For one process that trains and
/// serves, and for tests.
///
/// - hub: any number; free again when all its ranks are destroyed or the communicator failed.
/// - rank, world: this rank, from 0, and the number of ranks.
/// - out: the new communicator, the caller's to destroy.
///
/// Local: the first collective call waits for the others. Each rank needs a thread of its own in collective calls. Errors:
/// RS_ERR_INVALID (a rank that is there already, another world than the ranks there have).
#[unsafe(no_mangle)]
pub unsafe extern "C" fn rs_comm_loopback(hub: u64, rank: i32, world: i32, out: *mut *mut rs_comm_t) -> rs_status_t {
    // SAFETY: what the comment asks of the caller.
    call(|| unsafe {
        let (out, (rank, world)) = (Out::new(out, "out")?, convert::ranks(rank, world)?);
        out.put(CommHandle::create(loopback::join(hub, rank, world)?));
        Ok(())
    })
}

/// The engine's own NCCL communicator: ranks with a GPU each, on any hosts. The container's weights are in memory of its GPU.
///
/// - nccl_comm: an ncclComm_t of NCCL 2.18 or later, complete (ncclCommGetAsyncError() says ncclSuccess), made by the libnccl.so.2 that
///   the process has loaded. Borrowed: it stays alive until the communicator made here is destroyed and the containers that use it are;
///   nobody else uses it during collective calls of this library, and from a sync's call until rs_container_poll() says that it has ended:
///   NCCL wants the operations of a communicator in the same order on all ranks.
/// - out: the new communicator, the caller's to destroy.
///
/// Where several ranks are threads of one process, NCCL may reach weights from another GPU, where they lie: those that are not from
/// cudaMalloc() must be open to it (cudaMemPoolSetAccess(), cuMemSetAccess()), or NCCL_P2P_DIRECT_DISABLE be 1. The library's staging is,
/// unless the log warns.
///
/// A failure (a dead peer, a deadline) leaves the caller's communicator as it is: its operations may still wait on the GPU, and the
/// library keeps what they use and asks the communicator nothing more. End it with ncclCommAbort(), wait for its streams, then free the
/// weights and destroy what was made here. One that was made to block may also wait inside NCCL while connections to a peer are made, past
/// every deadline. NCCL tells no rank that another one has given up: the others hear of it at their deadlines.
///
/// Local. Errors: RS_ERR_INVALID, RS_ERR_UNSUPPORTED (no CUDA driver, no libnccl.so.2 in the process, too old), RS_ERR_COMM, RS_ERR_DEVICE,
/// RS_ERR_MEMORY.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn rs_comm_from_nccl(nccl_comm: *mut c_void, out: *mut *mut rs_comm_t) -> rs_status_t {
    // SAFETY: what the comment asks of the caller.
    call(|| unsafe {
        let out = Out::new(out, "out")?;
        out.put(CommHandle::create(Arc::new(NcclComm::borrow(nccl_comm)?)));
        Ok(())
    })
}

/// A communicator of NCCL's own for those who have none: ranks with a GPU each, on any hosts. It does not block, and the library aborts
/// it when a sync fails; the other ranks hear of that at their deadlines. NCCL is the libnccl.so.2 that the process has loaded, else the
/// one that the dynamic loader finds.
///
/// - unique_id, id_len: the 128 bytes that ncclGetUniqueId() gave one rank, which has sent them to the others.
/// - rank, world: this rank, from 0, and the number of ranks. The GPU is the one that is current on this thread (cudaSetDevice()).
/// - out: the new communicator, the caller's to destroy.
///
/// Collective: waits until all ranks are there, at most a minute. Errors: RS_ERR_INVALID, RS_ERR_UNSUPPORTED (no CUDA driver, no NCCL, too
/// old), RS_ERR_TIMEOUT, RS_ERR_COMM, RS_ERR_DEVICE, RS_ERR_MEMORY.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn rs_comm_nccl_init(
    unique_id: *const c_void,
    id_len: usize,
    rank: i32,
    world: i32,
    out: *mut *mut rs_comm_t,
) -> rs_status_t {
    // SAFETY: what the comment asks of the caller.
    call(|| unsafe {
        let (out, (rank, world)) = (Out::new(out, "out")?, convert::ranks(rank, world)?);
        let id = read::list(unique_id.cast::<u8>(), id_len, "unique_id")?;
        out.put(CommHandle::create(Arc::new(NcclComm::init(id, rank, world, convert::DEFAULT_TIMEOUT)?)));
        Ok(())
    })
}

/// A communicator of ranks on any hosts, over NVIDIA's NIXL: host memory, and that of CUDA's GPUs, by whatever its plugin UCX finds between
/// two ranks (InfiniBand, RoCE, TCP, shared memory).
///
/// - config_json: an object. "address", required: "host:port" where rank 0 listens, equal on all ranks; all ranks reach it, and each other.
///   "run": a name that is equal on all ranks, so that runs which have the same address by mistake are told apart. "timeout_ms": how long
///   the ranks wait for each other, 60,000 if not given. "library": path of libnixl_capi.so, of NIXL 1.5; the dynamic loader looks for it
///   if not given. "backend": NIXL's plugin, "UCX" if not given. "params": an object of that plugin's parameters, as texts. UCX itself is
///   configured by the environment (UCX_TLS, UCX_NET_DEVICES).
/// - rank, world: this rank, from 0, and the number of ranks.
/// - out: the new communicator, the caller's to destroy.
///
/// A rank's memory is written by that rank alone: what it needs from others it reads there. Weights that messages are read from or into as
/// they are, and staging, are registered with NIXL while containers are connected, until they are rebound or destroyed: registered memory of
/// a GPU or of an InfiniBand card's is pinned. NIXL runs threads of its own, about two for each communicator, as long as it lives; they sleep
/// while nothing comes. Who reaches the address can join the run: it belongs to a network that is trusted, as NCCL's does.
///
/// Collective: waits until all ranks are there. Errors: RS_ERR_INVALID (config_json; a rank that is there already), RS_ERR_UNSUPPORTED (no
/// NIXL, another release, no such backend), RS_ERR_MISMATCH (ranks with another world or run), RS_ERR_TIMEOUT (naming the missing ranks),
/// RS_ERR_COMM, RS_ERR_PEER.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn rs_comm_nixl(config_json: *const c_char, rank: i32, world: i32, out: *mut *mut rs_comm_t) -> rs_status_t {
    // SAFETY: what the comment asks of the caller.
    call(|| unsafe {
        let (out, (rank, world)) = (Out::new(out, "out")?, convert::ranks(rank, world)?);
        let config = read::text(config_json, "config_json")?;
        out.put(CommHandle::create(nixl::join(config, rank, world, convert::DEFAULT_TIMEOUT)?));
        Ok(())
    })
}

/// One communicator of two, chosen by peer: what sources have for targets of the same host never touches the network.
///
/// - near: of the ranks of this host, from rs_comm_local(), its ranks counted in the order of those of wide.
/// - wide: of all ranks, from rs_comm_nixl(), rs_comm_from_nccl(), rs_comm_nccl_init() or rs_comm_custom().
/// - out: the new communicator, with wide's ranks, the caller's to destroy. It holds references to both, and ends both when it fails: nobody
///   else uses them meanwhile.
///
/// Gathers go over wide. On GPUs each sync waits for its stream and is done when it returns. Collective over both, within a minute. Errors:
/// RS_ERR_INVALID (a near rank that wide does not have, or in another order), RS_ERR_UNSUPPORTED (communicators of other kinds),
/// RS_ERR_TIMEOUT, RS_ERR_PEER, RS_ERR_COMM.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn rs_comm_composite(
    near: *const rs_comm_t,
    wide: *const rs_comm_t,
    out: *mut *mut rs_comm_t,
) -> rs_status_t {
    // SAFETY: what the comment asks of the caller.
    call(|| unsafe {
        let out = Out::new(out, "out")?;
        out.put(CommHandle::create(convert::join_composite(near, wide)?));
        Ok(())
    })
}

/// The caller's own communicator, for ranks that nothing built in connects.
///
/// - ops: its functions, copied. On success ops->ctx is the library's until it calls ops->release; after an error it is the caller's
///   still, and release is not called.
/// - out: the new communicator, the caller's to destroy.
///
/// Local. Errors: RS_ERR_INVALID (naming the member that is missing), RS_ERR_UNKNOWN_FIELD.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn rs_comm_custom(ops: *const rs_comm_ops_t, out: *mut *mut rs_comm_t) -> rs_status_t {
    // SAFETY: what the comment asks of the caller.
    call(|| unsafe {
        let out = Out::new(out, "out")?;
        out.put(CommHandle::create(Arc::new(ForeignComm::new(read::sized(ops, "ops")?)?)));
        Ok(())
    })
}

/// Gives the caller's reference back. The communicator ends with its last reference; containers hold their own. NULL is nothing.
///
/// The last use of this handle, on any thread.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn rs_comm_destroy(comm: *mut rs_comm_t) {
    // SAFETY: what the comment asks of the caller.
    call(|| unsafe { CommHandle::destroy(comm) });
}

/// Host memory that the processes of this host can read at memcpy's rate: weights that lie in it are not copied on their way to an
/// rs_comm_local() peer, which may be a GPU's. Pin it with cudaHostRegister() to copy to and from it with a GPU of one's own. Zeroed,
/// aligned to a page, all of it present.
///
/// - bytes: at least 1.
/// - flags: 0.
/// - out: its address; the caller's, to give to rs_mem_free().
///
/// Local; any thread. Errors: RS_ERR_INVALID, RS_ERR_MEMORY.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn rs_mem_alloc(bytes: u64, flags: u32, out: *mut *mut c_void) -> rs_status_t {
    // SAFETY: what the comment asks of the caller.
    call(|| unsafe {
        let out = Out::new(out, "out")?;
        out.put(local::segment::alloc(bytes, flags)?.as_ptr().cast());
        Ok(())
    })
}

/// Gives memory of rs_mem_alloc() back, once no container uses it: rebind or destroy comes first. NULL is nothing. Any thread.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn rs_mem_free(memory: *mut c_void) {
    // SAFETY: what the comment asks of the caller.
    call(|| unsafe { NonNull::new(memory.cast()).map_or(Ok(()), |m| local::segment::free(m)) });
}

/// The library's version: major, minor and patch, a byte each, 0x000102 being 0.1.2. Any thread.
#[unsafe(no_mangle)]
pub extern "C" fn rs_version() -> u32 {
    VERSION
}

/// A status number's name, "RS_ERR_TIMEOUT" for instance; "unknown status" for a number that is none. Static; any thread.
#[unsafe(no_mangle)]
pub extern "C" fn rs_status_name(status: rs_status_t) -> *const c_char {
    status_name(status).as_ptr()
}

/// What went wrong in this thread's last failing call, in English for a reader: the parameter, rank or peer, what was expected, what
/// came, what to do. UTF-8, at most 2,047 bytes, "" before the first failure; a call that succeeds leaves it. Valid until this
/// thread's next failing call.
#[unsafe(no_mangle)]
pub extern "C" fn rs_last_error() -> *const c_char {
    last_error::text()
}

/// Sends log lines up to a level to a function, for the whole library. May be called again, to change or to stop it; when it
/// returns, no thread is inside the former function any more.
///
/// - function: called from any thread that is inside a call, and from that of RS_CONFIG_WATCHDOG, by several at once; its strings are
///   valid during the call. It may not call this library. NULL: no lines.
/// - user: its first argument.
/// - max_level: RS_LOG_ERROR to RS_LOG_TRACE; RS_LOG_OFF: no lines.
///
/// Local; any thread. Errors: RS_ERR_INVALID; RS_ERR_BUSY from inside the function; RS_ERR_STATE where the program links this library
/// as Rust code and has a logger of its own.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn rs_set_log(function: rs_log_fn, user: *mut c_void, max_level: u32) -> rs_status_t {
    call(|| logger::set(function, user, max_level))
}

const VERSION: u32 = number(env!("CARGO_PKG_VERSION_MAJOR")) << 16
    | number(env!("CARGO_PKG_VERSION_MINOR")) << 8
    | number(env!("CARGO_PKG_VERSION_PATCH"));

const fn number(text: &str) -> u32 {
    match u8::from_str_radix(text, 10) {
        Ok(n) => n as u32,
        Err(_) => panic!("a part of the version does not fit in a byte"),
    }
}
