//! Every type and constant that C sees. No logic, no `cfg`: `include/reshard.h` is generated from this file and `ffi/api*.rs`.
//!
//! Numbers, field order and the meaning of zero are for ever; new things go to the tail of a struct.
#![forbid(unsafe_code)]
#![allow(non_camel_case_types)]

use std::ffi::{c_char, c_void};

/// Number of this binary interface, the SONAME's number too. It changes only when callers must be recompiled.
pub const RS_ABI: u32 = 1;
/// Most axes of a tensor, buffer or tile.
pub const RS_MAX_RANK: usize = 8;

/// What a call answers: RS_OK, RS_IN_PROGRESS, or a negative RS_ERR_*. An integer, not a C enum: more numbers may come.
pub type rs_status_t = i32;

/// Done. (For rs_sync_weights(): on every rank.)
pub const RS_OK: rs_status_t = 0;
/// Under way: rs_container_poll() tells the end.
pub const RS_IN_PROGRESS: rs_status_t = 1;

/// From here to -19 the call was wrong and nothing changed. This one: an argument is wrong; the text names it.
pub const RS_ERR_INVALID: rs_status_t = -1;
/// A struct is longer than this library knows and uses its unknown part: the caller was built for a newer library.
pub const RS_ERR_UNKNOWN_FIELD: rs_status_t = -2;
/// Understood, but not built (the text says what): nothing is approximated.
pub const RS_ERR_UNSUPPORTED: rs_status_t = -3;
/// No such parameter or tensor.
pub const RS_ERR_NOT_FOUND: rs_status_t = -4;
/// Several parameters have this name (virtual-pipeline chunks); use rs_get_param_at().
pub const RS_ERR_AMBIGUOUS: rs_status_t = -5;
/// The caller's buffer is too small; `*len` says what is needed.
pub const RS_ERR_TOO_SMALL: rs_status_t = -6;
/// Another thread is inside a call on this handle: try again when it is done.
pub const RS_ERR_BUSY: rs_status_t = -7;
/// Not now: the container is not connected, or has failed, or its memory is gone.
pub const RS_ERR_STATE: rs_status_t = -8;
/// A failed sync left this parameter half written; the next successful sync heals it.
pub const RS_ERR_TORN: rs_status_t = -9;

/// From here to -39 the layouts do not fit and nothing moved. This one: a table of one rank is wrong in itself: a tile out of its
/// buffer, two targets on one element, a target element in no tile.
pub const RS_ERR_LAYOUT: rs_status_t = -20;
/// A target element has no source on any rank.
pub const RS_ERR_COVERAGE: rs_status_t = -21;
/// Ranks disagree: shapes, dtypes, versions, the list in `only`, the library itself.
pub const RS_ERR_MISMATCH: rs_status_t = -22;

/// From here on the container failed (RS_IS_FATAL): it needs a new communicator and rs_container_connect(). This one: a deadline
/// passed; the text names who was waited for.
pub const RS_ERR_TIMEOUT: rs_status_t = -40;
/// A peer is dead or failed; the text names it.
pub const RS_ERR_PEER: rs_status_t = -41;
/// rs_container_abort() was called, here or on another rank.
pub const RS_ERR_ABORTED: rs_status_t = -42;
/// The communicator failed.
pub const RS_ERR_COMM: rs_status_t = -43;
/// The device failed.
pub const RS_ERR_DEVICE: rs_status_t = -44;
/// No memory.
pub const RS_ERR_MEMORY: rs_status_t = -45;
/// A bug in this library, a panic for instance. Destroy the container.
pub const RS_ERR_INTERNAL: rs_status_t = -46;
/// RS_SYNC_VERIFY found bytes that are not those that were sent.
pub const RS_ERR_CORRUPT: rs_status_t = -47;

/// `rs_buffer_t.role`, bit: the trainer's side, read by a sync.
pub const RS_SOURCE: u32 = 1;
/// `rs_buffer_t.role`, bit: the engine's side, written by a sync.
pub const RS_TARGET: u32 = 2;

/// `rs_buffer_t.flags`: elements of this target buffer that lie in no tile are padding: never written, never an error.
pub const RS_BUFFER_PADDED: u32 = 1;

/// `rs_tile_t.transform`: the values stay as they are; they are cast if the dtypes differ.
pub const RS_TRANSFORM_NONE: u32 = 0;
/// `rs_tile_t.transform` of a target: it holds the source's values plus one (the source's norms are zero-centred).
pub const RS_TRANSFORM_PLUS_ONE: u32 = 1;
/// `rs_tile_t.transform` of a target: it holds the source's values minus one (its own norms are zero-centred).
pub const RS_TRANSFORM_MINUS_ONE: u32 = 2;

/// `device_type` of host memory (DLPack's kDLCPU).
pub const RS_DEVICE_CPU: i32 = 1;
/// `device_type` of a GPU's memory (DLPack's kDLCUDA); `device_id` is CUDA's number of the GPU in this process.
pub const RS_DEVICE_CUDA: i32 = 2;
/// `device_type` of host memory that is pinned for a GPU (DLPack's kDLCUDAHost): from cudaMallocHost(), cudaHostRegister() or PyTorch's
/// pin_memory(). `device_id` is the GPU that copies from and to it.
pub const RS_DEVICE_CUDA_HOST: i32 = 3;

/// `rs_comm_local_t.flags`: memory that is not from rs_mem_alloc() is always read by the target's process (process_vm_readv), but for
/// elements that are converted on the way; a refused read is an error.
pub const RS_LOCAL_READ: u32 = 1;
/// `rs_comm_local_t.flags`: memory that is not from rs_mem_alloc() always passes through shared-memory rings.
pub const RS_LOCAL_RING: u32 = 2;

/// `rs_config_t.flags`: a thread of the library calls rs_container_poll() while a sync is in progress, so that a peer's death or a deadline
/// ends the sync, and what waits for it on streams, though the caller does not poll. It starts at create and ends in destroy.
pub const RS_CONFIG_WATCHDOG: u32 = 1;
/// `rs_config_t.flags`: this rank passes on to others what its targets get. Where several ranks on other hosts than a box's sources need it
/// in the same elements, the sources then send it once, to the first of them, which passes it on to the second, and so on, message by
/// message: so many replicas cost the sources no more than one. Where messages go in groups: not rs_comm_local() alone; of
/// rs_comm_composite() all that is passed on goes over wide, in a host by the ways that wide knows there. An engine that may leave during a
/// sync does not set it, and gets its weights last.
pub const RS_CONFIG_RELAY: u32 = 2;

/// `rs_sync_t.flags`, on all ranks alike: after moving, what landed is compared with what the sources hold, piece by piece, by a checksum
/// of the elements as the targets have them. A difference is RS_ERR_CORRUPT on all ranks: its text names parameter, box and ranks, and
/// all targets of the sync are torn. Sources and targets are read once more, through host memory, before the call returns, within its
/// timeout: it waits for its stream and answers RS_OK, and nothing may be put behind it on the stream until then.
pub const RS_SYNC_VERIFY: u32 = 1;

/// `rs_param_t.state`: never written by a sync (of a source: nothing is known to be wrong).
pub const RS_PARAM_INITIAL: u32 = 0;
/// `rs_param_t.state`: whole, at `version`.
pub const RS_PARAM_SYNCED: u32 = 1;
/// `rs_param_t.state`: whole here at `version`, but the sync ended without hearing from all ranks.
pub const RS_PARAM_LANDED: u32 = 2;
/// `rs_param_t.state`: a failed sync wrote a part of it; its bytes may be of either version, or of none.
pub const RS_PARAM_TORN: u32 = 3;

/// `what` of rs_container_describe(): the plan (bytes by peer, moves, rounds, staging); with `param`: who sends each box of it. Of
/// rs_preset_describe(): the plan of this rank, made without any peer.
pub const RS_DESCRIBE_PLAN: u32 = 1;
/// `what` of rs_container_describe(): the last sync (bytes, seconds, staging) and the container's state.
pub const RS_DESCRIBE_STATS: u32 = 2;
/// `what` of rs_container_describe(): this rank's tensors, buffers and tiles. Of rs_preset_describe(): this rank's parameters.
pub const RS_DESCRIBE_LAYOUT: u32 = 3;
/// `what` of rs_preset_describe(): what a sync of the whole world moves.
pub const RS_DESCRIBE_WORLD: u32 = 4;

/// `max_level` of rs_set_log(): no lines.
pub const RS_LOG_OFF: u32 = 0;
/// Log level: something failed.
pub const RS_LOG_ERROR: u32 = 1;
/// Log level: something is not as it should be.
pub const RS_LOG_WARN: u32 = 2;
/// Log level: a choice that was made: which way, how much staging.
pub const RS_LOG_INFO: u32 = 3;
/// Log level: a line a step.
pub const RS_LOG_DEBUG: u32 = 4;
/// Log level: everything.
pub const RS_LOG_TRACE: u32 = 5;

/// A container: one rank's weights, its plan and its state. From rs_container_create() to rs_container_destroy(). Each function says
/// what may run beside it; a second thread gets RS_ERR_BUSY.
pub struct rs_container_t;
/// A reference to a communicator: a fixed set of ranks and a way between them. From one of the rs_comm_*() functions to
/// rs_comm_destroy(). It fails once: after an abort, a dead peer or a missed deadline another one must be made.
pub struct rs_comm_t;
/// A world spec with one rank's pointers: layouts of known models, without computing boxes. From rs_preset_create() to
/// rs_preset_destroy(); a second thread gets RS_ERR_BUSY as with a container.
pub struct rs_preset_t;

/// An element type, DLPack's codes: bf16 is {4, 16, 1}, fp16 {2, 16, 1}, fp32 {2, 32, 1}, int8 {0, 8, 1}.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct rs_dtype_t {
    /// DLDataTypeCode.
    pub code: u8,
    /// Bits of one lane: 8, 16, 32, 64 or 128.
    pub bits: u8,
    /// 1.
    pub lanes: u16,
}

/// A row of the tensor table: a logical tensor, a tensor of the Hugging Face checkpoint. All ranks that name it give it the same
/// shape.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct rs_tensor_t {
    /// Hugging Face name, for instance `model.layers.3.self_attn.q_proj.weight`.
    pub name: *const c_char,
    /// Number of axes, 0 to RS_MAX_RANK; the entries of `shape` beyond it are not read.
    pub rank: u32,
    /// 0.
    pub reserved: u32,
    /// Extents in elements, each at least 1.
    pub shape: [i64; RS_MAX_RANK],
}

/// A row of the buffer table: memory that this rank owns, under its own parameter name.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct rs_buffer_t {
    /// The framework's parameter name; unique among this rank's buffers of the same role, but for virtual-pipeline chunks.
    pub name: *const c_char,
    /// First element. Borrowed until rs_container_rebind() or rs_container_destroy().
    pub data: *mut c_void,
    /// Bytes from `data` that belong to it.
    pub size_bytes: u64,
    /// DLPack device type: that of `rs_config_t.device`; without one RS_DEVICE_CPU, RS_DEVICE_CUDA or RS_DEVICE_CUDA_HOST.
    pub device_type: i32,
    /// DLPack device id: that of `rs_config_t.device`; without one CUDA's number of the GPU, 0 for host memory.
    pub device_id: i32,
    /// RS_SOURCE, RS_TARGET or both.
    pub role: u32,
    /// RS_BUFFER_PADDED or 0.
    pub flags: u32,
    /// Element type.
    pub dtype: rs_dtype_t,
    /// Number of axes, 0 to RS_MAX_RANK.
    pub ndim: u32,
    /// Extents in elements, each at least 1.
    pub shape: [i64; RS_MAX_RANK],
    /// Elements from one index to the next, at least 1. They nest: sorted, each is at least the next one times its extent; anything where
    /// the extent is 1.
    pub strides: [i64; RS_MAX_RANK],
}

/// A row of the tile table: the box [origin, origin + extent) of a tensor, seen through `view` (a reshape of it), lies in a buffer,
/// its element i at byte_offset + itemsize * sum((i - origin) * stride).
///
/// A tensor of shape {1024, 64} of which a rank holds the rows from 256 to 511, dense at the start of a buffer: view {1024, 64},
/// origin {256, 0}, extent {256, 64}, stride {64, 1}, byte_offset 0. A view is for cuts that the tensor's own axes do not show: one
/// group of a fused projection's rows, for instance.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct rs_tile_t {
    /// Row of the tensor table.
    pub tensor: u32,
    /// Row of the buffer table.
    pub buffer: u32,
    /// Number of axes of the view, 0 to RS_MAX_RANK.
    pub rank: u32,
    /// RS_TRANSFORM_*. Of a source: RS_TRANSFORM_NONE.
    pub transform: u32,
    /// Bytes from the buffer's `data` to the box's first element; a multiple of the item size.
    pub byte_offset: u64,
    /// A reshape of the tensor: the same number of elements, row-major.
    pub view: [i64; RS_MAX_RANK],
    /// First index on each axis.
    pub origin: [i64; RS_MAX_RANK],
    /// Indices on each axis, at least 1.
    pub extent: [i64; RS_MAX_RANK],
    /// Elements of the buffer from one index to the next: at least 1, and nesting; anything where the extent is 1.
    pub stride: [i64; RS_MAX_RANK],
}

/// One rank's three tables. A row may be longer than this library knows while its unknown tail is zero.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct rs_layout_t {
    /// sizeof(rs_layout_t).
    pub struct_size: usize,
    /// Logical tensors of this rank's tiles.
    pub tensors: *const rs_tensor_t,
    /// Rows of `tensors`.
    pub tensor_count: usize,
    /// sizeof(rs_tensor_t).
    pub tensor_size: usize,
    /// This rank's parameters.
    pub buffers: *const rs_buffer_t,
    /// Rows of `buffers`.
    pub buffer_count: usize,
    /// sizeof(rs_buffer_t).
    pub buffer_size: usize,
    /// What lies where.
    pub tiles: *const rs_tile_t,
    /// Rows of `tiles`.
    pub tile_count: usize,
    /// sizeof(rs_tile_t).
    pub tile_size: usize,
}

/// `rs_device_t.flags`: `copy` obeys the dtypes and the transform of its rows. Without it, a layout that needs them is refused.
pub const RS_DEVICE_CONVERTS: u32 = 1;

/// Most axes of an rs_copy_t.
pub const RS_MAX_COPY_RANK: usize = 8;

/// One strided copy for the caller's device: the run of elements number (i0, i1, ...) goes from src + sum(i * src_stride) to
/// dst + sum(i * dst_stride), each i from 0 to extent - 1. Bytes are copied as they are if `src_dtype.bits` is 0; else each element is
/// read as `src_dtype`, widened to fp32, transformed, and rounded to `dst_dtype` (to nearest, ties to even; infinities and NaNs stay).
#[repr(C)]
#[derive(Clone, Copy)]
pub struct rs_copy_t {
    /// First element read.
    pub src: *const c_void,
    /// First element written.
    pub dst: *mut c_void,
    /// Contiguous bytes of a run at the source; a multiple of the item size, one item where the two sides lie transposed.
    pub run_bytes: u64,
    /// Number of axes; 0: a single run.
    pub rank: u32,
    /// RS_TRANSFORM_*.
    pub transform: u32,
    /// What the source's elements are, if they change on the way: fp32, fp16 or bf16; else zero.
    pub src_dtype: rs_dtype_t,
    /// What the target's elements are, likewise.
    pub dst_dtype: rs_dtype_t,
    /// Indices on each axis, the slowest first; unused entries are 0.
    pub extent: [u64; RS_MAX_COPY_RANK],
    /// Bytes from one index to the next at the source.
    pub src_stride: [u64; RS_MAX_COPY_RANK],
    /// Bytes from one index to the next at the target.
    pub dst_stride: [u64; RS_MAX_COPY_RANK],
}

/// The caller's device, for `rs_config_t.device`. Zero it and set struct_size, device_type, device_id and the functions.
///
/// The functions answer RS_OK or a negative status; any other answer is a failure too, and the text of the library's error holds its
/// number. They may be called on any thread that is inside a call on the container, by several at once; they may not call this library
/// and may not throw. Streams are those of the caller's syncs, NULL being the default stream; the library makes none.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct rs_device_t {
    /// sizeof(rs_device_t).
    pub struct_size: usize,
    /// First argument of every function. From a successful rs_container_create() until `release` it is the library's.
    pub ctx: *mut c_void,
    /// Called once, when the container is destroyed; may be NULL. Not called if rs_container_create() fails.
    pub release: Option<unsafe extern "C" fn(ctx: *mut c_void)>,
    /// DLPack device type of the buffers it copies; not RS_DEVICE_CPU.
    pub device_type: i32,
    /// DLPack device id.
    pub device_id: i32,
    /// RS_DEVICE_CONVERTS or 0.
    pub flags: u32,
    /// 0.
    pub reserved: u32,
    /// Staging memory of at least `bytes`, aligned to 256 bytes, into *out. The communicator sends from it and receives into it.
    /// Required.
    pub alloc: Option<unsafe extern "C" fn(ctx: *mut c_void, bytes: u64, out: *mut *mut c_void) -> rs_status_t>,
    /// Gives staging memory back; copies that were started may still be under way. Required.
    pub free: Option<unsafe extern "C" fn(ctx: *mut c_void, memory: *mut c_void)>,
    /// Starts `count` copies, at least 1, on a stream: after all that was started on it before, in any order among themselves; no two
    /// overlap. The rows are valid during the call only. Required.
    pub copy:
        Option<unsafe extern "C" fn(ctx: *mut c_void, copies: *const rs_copy_t, count: usize, stream: *mut c_void) -> rs_status_t>,
    /// Marks what was started on the stream so far; the mark goes into *out. Required.
    pub event_record: Option<unsafe extern "C" fn(ctx: *mut c_void, stream: *mut c_void, out: *mut *mut c_void) -> rs_status_t>,
    /// Lets what is started later on the stream wait for the mark. Does not wait itself. Required.
    pub event_wait: Option<unsafe extern "C" fn(ctx: *mut c_void, stream: *mut c_void, event: *mut c_void) -> rs_status_t>,
    /// RS_OK: everything before the mark is done; RS_IN_PROGRESS: not yet. Does not wait. Required.
    pub event_query: Option<unsafe extern "C" fn(ctx: *mut c_void, event: *mut c_void) -> rs_status_t>,
    /// Gives the mark back. Required.
    pub event_destroy: Option<unsafe extern "C" fn(ctx: *mut c_void, event: *mut c_void)>,
}

/// What a container is made with. Zero it and set struct_size, abi and comm.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct rs_config_t {
    /// sizeof(rs_config_t).
    pub struct_size: usize,
    /// RS_ABI.
    pub abi: u32,
    /// RS_CONFIG_WATCHDOG, RS_CONFIG_RELAY, both or 0.
    pub flags: u32,
    /// The ranks. The container takes a reference of its own. NULL: rs_container_set_comm() follows.
    pub comm: *mut rs_comm_t,
    /// The caller's device, for buffers on it; NULL: the library copies host memory and GPUs' memory. Copied.
    pub device: *const rs_device_t,
    /// A preset of this rank instead of a layout, with all its parameters bound. Copied. NULL: the layout argument of
    /// rs_container_create() gives the tables.
    pub preset: *const rs_preset_t,
    /// Equal on ranks of one host, for the choice of the nearest sender; 0: found out.
    pub host_id: u64,
    /// Most staging memory of this rank in bytes; 0: 256 MiB. The least of all ranks holds; connect refuses less than 16 KiB for each
    /// rank that one exchanges weights with.
    pub staging_bytes: u64,
    /// Threads that copy host memory during a sync, the caller's included, at most 1,024; 0: 1. They end with the call.
    pub host_threads: u32,
    /// Longest that a connect or a sync may take, in milliseconds; 0: 60,000. Then it fails on all ranks.
    pub timeout_ms: u32,
    /// A label for log lines and errors; NULL: none. Copied.
    pub name: *const c_char,
    /// `staging_bytes` bytes on the container's device to be used as staging, aligned to 256; NULL: what is needed of them is taken from
    /// the device. Only communicators that send (NCCL's, the caller's own) use any. Borrowed as weights are; nobody else uses it during
    /// syncs. A container that is created without buffers leaves it alone.
    pub staging: *mut c_void,
}

/// Hears of the progress of a sync on this rank, in bytes, on the thread that called rs_sync_weights(). It may not call this library,
/// but for rs_container_poll() and rs_container_abort(), and may not throw.
pub type rs_progress_fn = Option<unsafe extern "C" fn(user: *mut c_void, bytes_done: u64, bytes_total: u64)>;

/// One sync. Zero it and set struct_size and version.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct rs_sync_t {
    /// sizeof(rs_sync_t).
    pub struct_size: usize,
    /// The device's stream; NULL: its default stream. Ignored for host memory.
    pub stream: *mut c_void,
    /// The caller's number for these weights, not 0, equal on all ranks.
    pub version: u64,
    /// Logical names, or prefixes ending in `*`: only these tensors move. Equal on all ranks. A target parameter has one version, so
    /// all of its tensors are named or none; an entry that names nothing on any rank is an error. NULL or no entries: all.
    pub only: *const *const c_char,
    /// Entries of `only`.
    pub only_count: usize,
    /// Longest that the sync may take, from the call to its end, in milliseconds; 0: the container's.
    pub timeout_ms: u32,
    /// RS_SYNC_VERIFY or 0.
    pub flags: u32,
    /// Called now and then while bytes move; NULL: never.
    pub progress: rs_progress_fn,
    /// First argument of `progress`.
    pub progress_user: *mut c_void,
}

/// What rs_get_param() tells of a parameter. The caller sets struct_size, the library the rest. Pointers are borrowed from the
/// container until rs_container_rebind() or rs_container_destroy().
#[repr(C)]
#[derive(Clone, Copy)]
pub struct rs_param_t {
    /// sizeof(rs_param_t), set by the caller.
    pub struct_size: usize,
    /// As in the buffer table.
    pub name: *const c_char,
    /// The framework's own pointer, `rs_buffer_t.data`.
    pub data: *mut c_void,
    /// As in the buffer table.
    pub size_bytes: u64,
    /// DLPack device type.
    pub device_type: i32,
    /// DLPack device id.
    pub device_id: i32,
    /// Element type.
    pub dtype: rs_dtype_t,
    /// Number of axes.
    pub ndim: u32,
    /// `ndim` extents in elements.
    pub shape: *const i64,
    /// `ndim` strides in elements.
    pub strides: *const i64,
    /// RS_SOURCE, RS_TARGET or both.
    pub role: u32,
    /// Virtual-pipeline chunk; 0 through tables.
    pub model_chunk: u32,
    /// RS_PARAM_*.
    pub state: u32,
    /// 0.
    pub reserved: u32,
    /// Version of the last sync that this parameter is whole at; 0: none.
    pub version: u64,
}

/// A communicator of the processes of one host. Zero it and set struct_size, name and world.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct rs_comm_local_t {
    /// sizeof(rs_comm_local_t).
    pub struct_size: usize,
    /// Names the run: processes of one user that give the same name, on one host, meet. At most 64 bytes. Copied.
    pub name: *const c_char,
    /// This process's rank, 0-based.
    pub rank: i32,
    /// Number of ranks.
    pub world: i32,
    /// Longest wait for the others, in milliseconds; 0: 60,000.
    pub timeout_ms: u32,
    /// RS_LOCAL_*, equal on all ranks.
    pub flags: u32,
}

/// The caller's communicator, for rs_comm_custom(). Zero it and set struct_size, rank, world_size and the required functions.
///
/// The functions answer RS_OK or a negative status; any other answer is a failure too, and the text of the library's error holds its
/// number. After the first failure the library calls `abort` and `release` only. They are called on the thread that is inside
/// rs_container_connect() or rs_sync_weights(), one at a time; `abort` on any thread, beside any of them. They may not call this
/// library and may not throw. A sync gathers a few words from all ranks, then runs groups, each `group_begin`, some `send` and `recv`,
/// `group_end`, then `poll` until it answers RS_OK; then it gathers again. On all ranks the groups have the same order, but a rank may
/// have a part in some of them only.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct rs_comm_ops_t {
    /// sizeof(rs_comm_ops_t).
    pub struct_size: usize,
    /// First argument of every function. From a successful rs_comm_custom() until `release` it is the library's.
    pub ctx: *mut c_void,
    /// Called once, when the last reference to the communicator goes, on the thread that gives it back; may be NULL.
    pub release: Option<unsafe extern "C" fn(ctx: *mut c_void)>,
    /// This rank, from 0.
    pub rank: i32,
    /// Number of ranks.
    pub world_size: i32,
    /// Collective, host memory: `bytes` (the same number everywhere) from every rank, in rank order, into `recv` (world_size * bytes).
    /// Returns within timeout_ms, with an error if a rank is missing then; neither memory is touched after it has returned. Required.
    pub allgather: Option<
        unsafe extern "C" fn(ctx: *mut c_void, send: *const c_void, recv: *mut c_void, bytes: u64, timeout_ms: u32) -> rs_status_t,
    >,
    /// Opens a group of sends and receives. Required.
    pub group_begin: Option<unsafe extern "C" fn(ctx: *mut c_void) -> rs_status_t>,
    /// Starts the group; may return before it is complete. All its operations progress together: a rank that sends to another before it
    /// receives from it must not wait for ever. Required.
    pub group_end: Option<unsafe extern "C" fn(ctx: *mut c_void) -> rs_status_t>,
    /// Within a group: sends `bytes` at `data` to `peer`. Messages to one peer arrive in order, each whole and as long as its `recv`
    /// says. The memory stays as it is until `poll` answers RS_OK. `stream` is that of the sync: what was started on it before comes
    /// first; host memory ignores it. Required.
    pub send: Option<
        unsafe extern "C" fn(ctx: *mut c_void, data: *const c_void, bytes: u64, peer: i32, stream: *mut c_void) -> rs_status_t,
    >,
    /// Within a group: receives exactly `bytes` from `peer` into `data`. Required.
    pub recv: Option<
        unsafe extern "C" fn(ctx: *mut c_void, data: *mut c_void, bytes: u64, peer: i32, stream: *mut c_void) -> rs_status_t,
    >,
    /// RS_OK: all groups ended so far are complete; RS_IN_PROGRESS: not yet. Does not wait. Required.
    pub poll: Option<unsafe extern "C" fn(ctx: *mut c_void) -> rs_status_t>,
    /// Gives up, once, after rs_container_abort() or the first failure: calls in progress return an error, here and, as far as it can
    /// tell them, on the peers. When it has returned, no memory given to `send` or `recv` is touched any more, but by a call that is
    /// still in progress. May be NULL: then such memory is touched inside calls only, and the peers wait for their deadline.
    pub abort: Option<unsafe extern "C" fn(ctx: *mut c_void)>,
}

/// A parameter of a preset and its memory. Zero it and set struct_size and the rest.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct rs_bind_t {
    /// sizeof(rs_bind_t).
    pub struct_size: usize,
    /// The framework's own name on this rank. In Megatron layers count from 0 in each chunk, and leading `module.` do not matter.
    pub name: *const c_char,
    /// RS_SOURCE or RS_TARGET: which side's parameter it is. Both: one of each side in the same memory; what lies alike is not moved.
    pub role: u32,
    /// Virtual-pipeline chunk, 0 if there is one only.
    pub model_chunk: u32,
    /// As in the buffer table.
    pub data: *mut c_void,
    /// As in the buffer table.
    pub size_bytes: u64,
    /// DLPack device type, RS_DEVICE_CPU for host memory.
    pub device_type: i32,
    /// DLPack device id.
    pub device_id: i32,
    /// Element type.
    pub dtype: rs_dtype_t,
    /// Number of axes.
    pub ndim: u32,
    /// `ndim` extents in elements.
    pub shape: *const i64,
    /// `ndim` strides in elements, which must be dense and row-major; NULL: they are.
    pub strides: *const i64,
}

/// Receives log lines: level (RS_LOG_*), the container's label (`rs_config_t.name`) or, without one, the name of the library's module,
/// and the text. For the rules see rs_set_log().
pub type rs_log_fn = Option<unsafe extern "C" fn(user: *mut c_void, level: u32, label: *const c_char, text: *const c_char)>;
