/*
 * libreshard: moves the weights of a training job into an inference engine, in place.
 *
 * A logical tensor is a tensor of the Hugging Face checkpoint. A buffer is memory that a rank owns, under its framework's own name. A
 * tile says which box of a tensor lies in which buffer, where and with which strides. Each rank gives its three tables to a container
 * (rs_container_create), the ranks connect (rs_container_connect), and from then on each rs_sync_weights() fills every target with what
 * the sources hold:
 *
 *     rs_comm_t *comm;
 *     rs_container_t *container;
 *     rs_comm_local_t local = {0};
 *     rs_config_t config = {0};
 *     rs_sync_t sync = {0};
 *
 *     local.struct_size = sizeof local;
 *     local.name = "run-17";
 *     local.rank = rank;
 *     local.world = world;
 *     config.struct_size = sizeof config;
 *     config.abi = RS_ABI;
 *     sync.struct_size = sizeof sync;
 *     sync.version = 1;
 *
 *     if (rs_comm_local(&local, &comm) != RS_OK) die(rs_last_error());
 *     config.comm = comm;
 *     if (rs_container_create(&config, &layout, &container) != RS_OK) die(rs_last_error());
 *     if (rs_container_connect(container) != RS_OK) die(rs_last_error());
 *     if (rs_sync_weights(container, &sync) != RS_OK) die(rs_last_error());
 *
 * Errors. A function that can fail answers an rs_status_t: RS_OK (0), RS_IN_PROGRESS (1), or a negative RS_ERR_*. rs_last_error() is the
 * text of this thread's last failing call. Results are written on success only, except *len with RS_ERR_TOO_SMALL. The number tells
 * what is lost:
 *   -1 to -19   the call was wrong; nothing changed.
 *   -20 to -39  the layouts do not fit each other; nothing moved.
 *   -40 and on  the container failed (RS_IS_FATAL): give it a new communicator and connect again. After RS_ERR_INTERNAL, destroy it.
 * A bug in the library (a Rust panic) is RS_ERR_INTERNAL and never ends the process.
 *
 * Growth. A struct that starts with struct_size may grow at its end: zero it, set struct_size to sizeof, fill in what you need. A
 * struct shorter than the library's is filled up with zeros, and zero always means the old behaviour; a longer one is fine while the
 * part that the library does not know is zero, else RS_ERR_UNKNOWN_FIELD names the first byte that is not. A table states the size
 * of its rows, to the same rule. Of a struct that is a result (rs_param_t) only struct_size is read; the rest is written, zeros where
 * the library has nothing. Reserved fields and unknown flags must be 0.
 *
 * Ownership. Structs, tables and strings that go in are copied. Weight memory is borrowed until rebind or destroy. What comes out is
 * borrowed from its handle and says until when. Handles are counted: a container holds its own reference to its communicator, so the
 * two may be destroyed in any order. Several containers may share a communicator, which then must sync one after the other, in the
 * same order on all ranks.
 *
 * Threads. A function that takes a const handle may run beside others like it; a handle that is not const serves one thread at a time.
 * Who comes second gets RS_ERR_BUSY. rs_container_poll() and rs_container_abort() run beside anything, and destroy beside nothing. No
 * thread of the library outlives a call, but that of RS_CONFIG_WATCHDOG, and one that ncclCommAbort() keeps. A fork()ed child may not use
 * a handle of its parent.
 *
 * Collective. rs_comm_local(), rs_container_connect(), rs_sync_weights() and rs_fingerprint() are called by every rank of the
 * communicator, by ranks without weights too. All other functions are local: they wait for nobody. No wait is longer than its timeout,
 * whatever has happened to the other ranks.
 *
 * Streams. With weights on GPUs a sync is put on rs_sync_t.stream: behind what is there, which may still write the sources or read the
 * targets, and before what comes there next, which may read the targets and write the sources again. rs_sync_weights() asks the other
 * ranks, on the host, puts its work there and answers RS_IN_PROGRESS. It does not wait for the stream, but for a place on it where there
 * are hundreds of rounds, and for memory the first time after a rebind or with another `only`; never past its deadline. The stream's end
 * means that this rank has landed, unless poll then answers an error: a sync that fails lets its streams go on, over torn targets. Every
 * rank calls rs_container_poll(), which does not wait, until it answers otherwise, within the sync's timeout: RS_OK means that all have
 * landed. Until then no other call may change the container, nor use its communicator. Without polls nobody sees a deadline pass or
 * a peer die, and what then stands still on the stream goes on standing: poll, or set RS_CONFIG_WATCHDOG. With NCCL do not wait for the
 * whole device (cudaDeviceSynchronize(), cudaFree()) between polls: a little kernel on it waits for the polls of other ranks. Where any
 * rank has weights in host memory that no GPU copies, or a caller's device (rs_device_t), with a caller's communicator (rs_comm_ops_t),
 * and where streams cannot wait for words of memory (an old driver: the log says so), the call returns when all is done, on all ranks.
 * NULL is the device's default stream.
 *
 * GPUs. Buffers of RS_DEVICE_CUDA and RS_DEVICE_CUDA_HOST are copied by the library itself: the CUDA driver is loaded when a container is
 * given the first of them, or for a communicator of NCCL's, and never else. All of a container's are on one GPU, in its primary context,
 * which is that of cudaMalloc() and PyTorch. Each call leaves the thread the context that it had.
 *
 * Units and codes. Shapes, extents and strides count elements; offsets and sizes count bytes; timeouts milliseconds. Element types
 * and devices have DLPack's codes. Strings are UTF-8 and end with NUL. What is long or changes often is JSON.
 */

#ifndef RESHARD_H
#define RESHARD_H

#include <stddef.h>
#include <stdint.h>

/* Whether a status says that the container failed: it needs a new communicator and rs_container_connect(). */
#define RS_IS_FATAL(status) ((status) <= -40)

/** Number of this binary interface, the SONAME's number too. It changes only when callers must be recompiled. */
#define RS_ABI 1

/** Most axes of a tensor, buffer or tile. */
#define RS_MAX_RANK 8

/** What a call answers: RS_OK, RS_IN_PROGRESS, or a negative RS_ERR_*. An integer, not a C enum: more numbers may come. */
typedef int32_t rs_status_t;

/** Done. (For rs_sync_weights(): on every rank.) */
#define RS_OK 0

/** Under way: rs_container_poll() tells the end. */
#define RS_IN_PROGRESS 1

/** From here to -19 the call was wrong and nothing changed. This one: an argument is wrong; the text names it. */
#define RS_ERR_INVALID -1

/** A struct is longer than this library knows and uses its unknown part: the caller was built for a newer library. */
#define RS_ERR_UNKNOWN_FIELD -2

/** Understood, but not built (the text says what): nothing is approximated. */
#define RS_ERR_UNSUPPORTED -3

/** No such parameter or tensor. */
#define RS_ERR_NOT_FOUND -4

/** Several parameters have this name (virtual-pipeline chunks); use rs_get_param_at(). */
#define RS_ERR_AMBIGUOUS -5

/** The caller's buffer is too small; `*len` says what is needed. */
#define RS_ERR_TOO_SMALL -6

/** Another thread is inside a call on this handle: try again when it is done. */
#define RS_ERR_BUSY -7

/** Not now: the container is not connected, or has failed, or its memory is gone. */
#define RS_ERR_STATE -8

/** A failed sync left this parameter half written; the next successful sync heals it. */
#define RS_ERR_TORN -9

/**
 * From here to -39 the layouts do not fit and nothing moved. This one: a table of one rank is wrong in itself: a tile out of its
 * buffer, two targets on one element, a target element in no tile.
 */
#define RS_ERR_LAYOUT -20

/** A target element has no source on any rank. */
#define RS_ERR_COVERAGE -21

/** Ranks disagree: shapes, dtypes, versions, the list in `only`, the library itself. */
#define RS_ERR_MISMATCH -22

/**
 * From here on the container failed (RS_IS_FATAL): it needs a new communicator and rs_container_connect(). This one: a deadline
 * passed; the text names who was waited for.
 */
#define RS_ERR_TIMEOUT -40

/** A peer is dead or failed; the text names it. */
#define RS_ERR_PEER -41

/** rs_container_abort() was called, here or on another rank. */
#define RS_ERR_ABORTED -42

/** The communicator failed. */
#define RS_ERR_COMM -43

/** The device failed. */
#define RS_ERR_DEVICE -44

/** No memory. */
#define RS_ERR_MEMORY -45

/** A bug in this library, a panic for instance. Destroy the container. */
#define RS_ERR_INTERNAL -46

/** RS_SYNC_VERIFY found bytes that are not those that were sent. */
#define RS_ERR_CORRUPT -47

/** `rs_buffer_t.role`, bit: the trainer's side, read by a sync. */
#define RS_SOURCE 1

/** `rs_buffer_t.role`, bit: the engine's side, written by a sync. */
#define RS_TARGET 2

/** `rs_buffer_t.flags`: elements of this target buffer that lie in no tile are padding: never written, never an error. */
#define RS_BUFFER_PADDED 1

/** `rs_tile_t.transform`: the values stay as they are; they are cast if the dtypes differ. */
#define RS_TRANSFORM_NONE 0

/** `rs_tile_t.transform` of a target: it holds the source's values plus one (the source's norms are zero-centred). */
#define RS_TRANSFORM_PLUS_ONE 1

/** `rs_tile_t.transform` of a target: it holds the source's values minus one (its own norms are zero-centred). */
#define RS_TRANSFORM_MINUS_ONE 2

/** `device_type` of host memory (DLPack's kDLCPU). */
#define RS_DEVICE_CPU 1

/** `device_type` of a GPU's memory (DLPack's kDLCUDA); `device_id` is CUDA's number of the GPU in this process. */
#define RS_DEVICE_CUDA 2

/**
 * `device_type` of host memory that is pinned for a GPU (DLPack's kDLCUDAHost): from cudaMallocHost(), cudaHostRegister() or PyTorch's
 * pin_memory(). `device_id` is the GPU that copies from and to it.
 */
#define RS_DEVICE_CUDA_HOST 3

/**
 * `rs_comm_local_t.flags`: memory that is not from rs_mem_alloc() is always read by the target's process (process_vm_readv), but for
 * elements that are converted on the way; a refused read is an error.
 */
#define RS_LOCAL_READ 1

/** `rs_comm_local_t.flags`: memory that is not from rs_mem_alloc() always passes through shared-memory rings. */
#define RS_LOCAL_RING 2

/**
 * `rs_config_t.flags`: a thread of the library calls rs_container_poll() while a sync is in progress, so that a peer's death or a deadline
 * ends the sync, and what waits for it on streams, though the caller does not poll. It starts at create and ends in destroy.
 */
#define RS_CONFIG_WATCHDOG 1

/**
 * `rs_config_t.flags`: this rank passes on to others what its targets get. Where several ranks on other hosts than a box's sources need it
 * in the same elements, the sources then send it once, to the first of them, which passes it on to the second, and so on, message by
 * message: so many replicas cost the sources no more than one. Where messages go in groups: not rs_comm_local() alone; of
 * rs_comm_composite() all that is passed on goes over wide, in a host by the ways that wide knows there. An engine that may leave during a
 * sync does not set it, and gets its weights last.
 */
#define RS_CONFIG_RELAY 2

/**
 * `rs_sync_t.flags`, on all ranks alike: after moving, what landed is compared with what the sources hold, piece by piece, by a checksum
 * of the elements as the targets have them. A difference is RS_ERR_CORRUPT on all ranks: its text names parameter, box and ranks, and
 * all targets of the sync are torn. Sources and targets are read once more, through host memory, before the call returns, within its
 * timeout: it waits for its stream and answers RS_OK, and nothing may be put behind it on the stream until then.
 */
#define RS_SYNC_VERIFY 1

/** `rs_param_t.state`: never written by a sync (of a source: nothing is known to be wrong). */
#define RS_PARAM_INITIAL 0

/** `rs_param_t.state`: whole, at `version`. */
#define RS_PARAM_SYNCED 1

/** `rs_param_t.state`: whole here at `version`, but the sync ended without hearing from all ranks. */
#define RS_PARAM_LANDED 2

/** `rs_param_t.state`: a failed sync wrote a part of it; its bytes may be of either version, or of none. */
#define RS_PARAM_TORN 3

/**
 * `what` of rs_container_describe(): the plan (bytes by peer, moves, rounds, staging); with `param`: who sends each box of it. Of
 * rs_preset_describe(): the plan of this rank, made without any peer.
 */
#define RS_DESCRIBE_PLAN 1

/** `what` of rs_container_describe(): the last sync (bytes, seconds, staging) and the container's state. */
#define RS_DESCRIBE_STATS 2

/** `what` of rs_container_describe(): this rank's tensors, buffers and tiles. Of rs_preset_describe(): this rank's parameters. */
#define RS_DESCRIBE_LAYOUT 3

/** `what` of rs_preset_describe(): what a sync of the whole world moves. */
#define RS_DESCRIBE_WORLD 4

/** `max_level` of rs_set_log(): no lines. */
#define RS_LOG_OFF 0

/** Log level: something failed. */
#define RS_LOG_ERROR 1

/** Log level: something is not as it should be. */
#define RS_LOG_WARN 2

/** Log level: a choice that was made: which way, how much staging. */
#define RS_LOG_INFO 3

/** Log level: a line a step. */
#define RS_LOG_DEBUG 4

/** Log level: everything. */
#define RS_LOG_TRACE 5

/**
 * A container: one rank's weights, its plan and its state. From rs_container_create() to rs_container_destroy(). Each function says
 * what may run beside it; a second thread gets RS_ERR_BUSY.
 */
typedef struct rs_container_t rs_container_t;

/**
 * A reference to a communicator: a fixed set of ranks and a way between them. From one of the rs_comm_*() functions to
 * rs_comm_destroy(). It fails once: after an abort, a dead peer or a missed deadline another one must be made.
 */
typedef struct rs_comm_t rs_comm_t;

/**
 * A world spec with one rank's pointers: layouts of known models, without computing boxes. From rs_preset_create() to
 * rs_preset_destroy(); a second thread gets RS_ERR_BUSY as with a container.
 */
typedef struct rs_preset_t rs_preset_t;

/** An element type, DLPack's codes: bf16 is {4, 16, 1}, fp16 {2, 16, 1}, fp32 {2, 32, 1}, int8 {0, 8, 1}. */
typedef struct rs_dtype_t {
    /** DLDataTypeCode. */
    uint8_t code;
    /** Bits of one lane: 8, 16, 32, 64 or 128. */
    uint8_t bits;
    /** 1. */
    uint16_t lanes;
} rs_dtype_t;

/**
 * A row of the tensor table: a logical tensor, a tensor of the Hugging Face checkpoint. All ranks that name it give it the same
 * shape.
 */
typedef struct rs_tensor_t {
    /** Hugging Face name, for instance `model.layers.3.self_attn.q_proj.weight`. */
    const char *name;
    /** Number of axes, 0 to RS_MAX_RANK; the entries of `shape` beyond it are not read. */
    uint32_t rank;
    /** 0. */
    uint32_t reserved;
    /** Extents in elements, each at least 1. */
    int64_t shape[RS_MAX_RANK];
} rs_tensor_t;

/** A row of the buffer table: memory that this rank owns, under its own parameter name. */
typedef struct rs_buffer_t {
    /** The framework's parameter name; unique among this rank's buffers of the same role, but for virtual-pipeline chunks. */
    const char *name;
    /** First element. Borrowed until rs_container_rebind() or rs_container_destroy(). */
    void *data;
    /** Bytes from `data` that belong to it. */
    uint64_t size_bytes;
    /** DLPack device type: that of `rs_config_t.device`; without one RS_DEVICE_CPU, RS_DEVICE_CUDA or RS_DEVICE_CUDA_HOST. */
    int32_t device_type;
    /** DLPack device id: that of `rs_config_t.device`; without one CUDA's number of the GPU, 0 for host memory. */
    int32_t device_id;
    /** RS_SOURCE, RS_TARGET or both. */
    uint32_t role;
    /** RS_BUFFER_PADDED or 0. */
    uint32_t flags;
    /** Element type. */
    rs_dtype_t dtype;
    /** Number of axes, 0 to RS_MAX_RANK. */
    uint32_t ndim;
    /** Extents in elements, each at least 1. */
    int64_t shape[RS_MAX_RANK];
    /**
     * Elements from one index to the next, at least 1. They nest: sorted, each is at least the next one times its extent; anything where
     * the extent is 1.
     */
    int64_t strides[RS_MAX_RANK];
} rs_buffer_t;

/**
 * A row of the tile table: the box [origin, origin + extent) of a tensor, seen through `view` (a reshape of it), lies in a buffer,
 * its element i at byte_offset + itemsize * sum((i - origin) * stride).
 *
 * A tensor of shape {1024, 64} of which a rank holds the rows from 256 to 511, dense at the start of a buffer: view {1024, 64},
 * origin {256, 0}, extent {256, 64}, stride {64, 1}, byte_offset 0. A view is for cuts that the tensor's own axes do not show: one
 * group of a fused projection's rows, for instance.
 */
typedef struct rs_tile_t {
    /** Row of the tensor table. */
    uint32_t tensor;
    /** Row of the buffer table. */
    uint32_t buffer;
    /** Number of axes of the view, 0 to RS_MAX_RANK. */
    uint32_t rank;
    /** RS_TRANSFORM_*. Of a source: RS_TRANSFORM_NONE. */
    uint32_t transform;
    /** Bytes from the buffer's `data` to the box's first element; a multiple of the item size. */
    uint64_t byte_offset;
    /** A reshape of the tensor: the same number of elements, row-major. */
    int64_t view[RS_MAX_RANK];
    /** First index on each axis. */
    int64_t origin[RS_MAX_RANK];
    /** Indices on each axis, at least 1. */
    int64_t extent[RS_MAX_RANK];
    /** Elements of the buffer from one index to the next: at least 1, and nesting; anything where the extent is 1. */
    int64_t stride[RS_MAX_RANK];
} rs_tile_t;

/** One rank's three tables. A row may be longer than this library knows while its unknown tail is zero. */
typedef struct rs_layout_t {
    /** sizeof(rs_layout_t). */
    size_t struct_size;
    /** Logical tensors of this rank's tiles. */
    const rs_tensor_t *tensors;
    /** Rows of `tensors`. */
    size_t tensor_count;
    /** sizeof(rs_tensor_t). */
    size_t tensor_size;
    /** This rank's parameters. */
    const rs_buffer_t *buffers;
    /** Rows of `buffers`. */
    size_t buffer_count;
    /** sizeof(rs_buffer_t). */
    size_t buffer_size;
    /** What lies where. */
    const rs_tile_t *tiles;
    /** Rows of `tiles`. */
    size_t tile_count;
    /** sizeof(rs_tile_t). */
    size_t tile_size;
} rs_layout_t;

/** `rs_device_t.flags`: `copy` obeys the dtypes and the transform of its rows. Without it, a layout that needs them is refused. */
#define RS_DEVICE_CONVERTS 1

/** Most axes of an rs_copy_t. */
#define RS_MAX_COPY_RANK 8

/**
 * One strided copy for the caller's device: the run of elements number (i0, i1, ...) goes from src + sum(i * src_stride) to
 * dst + sum(i * dst_stride), each i from 0 to extent - 1. Bytes are copied as they are if `src_dtype.bits` is 0; else each element is
 * read as `src_dtype`, widened to fp32, transformed, and rounded to `dst_dtype` (to nearest, ties to even; infinities and NaNs stay).
 */
typedef struct rs_copy_t {
    /** First element read. */
    const void *src;
    /** First element written. */
    void *dst;
    /** Contiguous bytes of a run at the source; a multiple of the item size, one item where the two sides lie transposed. */
    uint64_t run_bytes;
    /** Number of axes; 0: a single run. */
    uint32_t rank;
    /** RS_TRANSFORM_*. */
    uint32_t transform;
    /** What the source's elements are, if they change on the way: fp32, fp16 or bf16; else zero. */
    rs_dtype_t src_dtype;
    /** What the target's elements are, likewise. */
    rs_dtype_t dst_dtype;
    /** Indices on each axis, the slowest first; unused entries are 0. */
    uint64_t extent[RS_MAX_COPY_RANK];
    /** Bytes from one index to the next at the source. */
    uint64_t src_stride[RS_MAX_COPY_RANK];
    /** Bytes from one index to the next at the target. */
    uint64_t dst_stride[RS_MAX_COPY_RANK];
} rs_copy_t;

/**
 * The caller's device, for `rs_config_t.device`. Zero it and set struct_size, device_type, device_id and the functions.
 *
 * The functions answer RS_OK or a negative status; any other answer is a failure too, and the text of the library's error holds its
 * number. They may be called on any thread that is inside a call on the container, by several at once; they may not call this library
 * and may not throw. Streams are those of the caller's syncs, NULL being the default stream; the library makes none.
 */
typedef struct rs_device_t {
    /** sizeof(rs_device_t). */
    size_t struct_size;
    /** First argument of every function. From a successful rs_container_create() until `release` it is the library's. */
    void *ctx;
    /** Called once, when the container is destroyed; may be NULL. Not called if rs_container_create() fails. */
    void (*release)(void *ctx);
    /** DLPack device type of the buffers it copies; not RS_DEVICE_CPU. */
    int32_t device_type;
    /** DLPack device id. */
    int32_t device_id;
    /** RS_DEVICE_CONVERTS or 0. */
    uint32_t flags;
    /** 0. */
    uint32_t reserved;
    /**
     * Staging memory of at least `bytes`, aligned to 256 bytes, into *out. The communicator sends from it and receives into it.
     * Required.
     */
    rs_status_t (*alloc)(void *ctx, uint64_t bytes, void **out);
    /** Gives staging memory back; copies that were started may still be under way. Required. */
    void (*free)(void *ctx, void *memory);
    /**
     * Starts `count` copies, at least 1, on a stream: after all that was started on it before, in any order among themselves; no two
     * overlap. The rows are valid during the call only. Required.
     */
    rs_status_t (*copy)(void *ctx, const rs_copy_t *copies, size_t count, void *stream);
    /** Marks what was started on the stream so far; the mark goes into *out. Required. */
    rs_status_t (*event_record)(void *ctx, void *stream, void **out);
    /** Lets what is started later on the stream wait for the mark. Does not wait itself. Required. */
    rs_status_t (*event_wait)(void *ctx, void *stream, void *event);
    /** RS_OK: everything before the mark is done; RS_IN_PROGRESS: not yet. Does not wait. Required. */
    rs_status_t (*event_query)(void *ctx, void *event);
    /** Gives the mark back. Required. */
    void (*event_destroy)(void *ctx, void *event);
} rs_device_t;

/** What a container is made with. Zero it and set struct_size, abi and comm. */
typedef struct rs_config_t {
    /** sizeof(rs_config_t). */
    size_t struct_size;
    /** RS_ABI. */
    uint32_t abi;
    /** RS_CONFIG_WATCHDOG, RS_CONFIG_RELAY, both or 0. */
    uint32_t flags;
    /** The ranks. The container takes a reference of its own. NULL: rs_container_set_comm() follows. */
    rs_comm_t *comm;
    /** The caller's device, for buffers on it; NULL: the library copies host memory and GPUs' memory. Copied. */
    const rs_device_t *device;
    /**
     * A preset of this rank instead of a layout, with all its parameters bound. Copied. NULL: the layout argument of
     * rs_container_create() gives the tables.
     */
    const rs_preset_t *preset;
    /** Equal on ranks of one host, for the choice of the nearest sender; 0: found out. */
    uint64_t host_id;
    /**
     * Most staging memory of this rank in bytes; 0: 256 MiB. The least of all ranks holds; connect refuses less than 16 KiB for each
     * rank that one exchanges weights with.
     */
    uint64_t staging_bytes;
    /** Threads that copy host memory during a sync, the caller's included, at most 1,024; 0: 1. They end with the call. */
    uint32_t host_threads;
    /** Longest that a connect or a sync may take, in milliseconds; 0: 60,000. Then it fails on all ranks. */
    uint32_t timeout_ms;
    /** A label for log lines and errors; NULL: none. Copied. */
    const char *name;
    /**
     * `staging_bytes` bytes on the container's device to be used as staging, aligned to 256; NULL: what is needed of them is taken from
     * the device. Only communicators that send (NCCL's, the caller's own) use any. Borrowed as weights are; nobody else uses it during
     * syncs. A container that is created without buffers leaves it alone.
     */
    void *staging;
} rs_config_t;

/**
 * Hears of the progress of a sync on this rank, in bytes, on the thread that called rs_sync_weights(). It may not call this library,
 * but for rs_container_poll() and rs_container_abort(), and may not throw.
 */
typedef void (*rs_progress_fn)(void *user, uint64_t bytes_done, uint64_t bytes_total);

/** One sync. Zero it and set struct_size and version. */
typedef struct rs_sync_t {
    /** sizeof(rs_sync_t). */
    size_t struct_size;
    /** The device's stream; NULL: its default stream. Ignored for host memory. */
    void *stream;
    /** The caller's number for these weights, not 0, equal on all ranks. */
    uint64_t version;
    /**
     * Logical names, or prefixes ending in `*`: only these tensors move. Equal on all ranks. A target parameter has one version, so
     * all of its tensors are named or none; an entry that names nothing on any rank is an error. NULL or no entries: all.
     */
    const char *const *only;
    /** Entries of `only`. */
    size_t only_count;
    /** Longest that the sync may take, from the call to its end, in milliseconds; 0: the container's. */
    uint32_t timeout_ms;
    /** RS_SYNC_VERIFY or 0. */
    uint32_t flags;
    /** Called now and then while bytes move; NULL: never. */
    rs_progress_fn progress;
    /** First argument of `progress`. */
    void *progress_user;
} rs_sync_t;

/**
 * What rs_get_param() tells of a parameter. The caller sets struct_size, the library the rest. Pointers are borrowed from the
 * container until rs_container_rebind() or rs_container_destroy().
 */
typedef struct rs_param_t {
    /** sizeof(rs_param_t), set by the caller. */
    size_t struct_size;
    /** As in the buffer table. */
    const char *name;
    /** The framework's own pointer, `rs_buffer_t.data`. */
    void *data;
    /** As in the buffer table. */
    uint64_t size_bytes;
    /** DLPack device type. */
    int32_t device_type;
    /** DLPack device id. */
    int32_t device_id;
    /** Element type. */
    rs_dtype_t dtype;
    /** Number of axes. */
    uint32_t ndim;
    /** `ndim` extents in elements. */
    const int64_t *shape;
    /** `ndim` strides in elements. */
    const int64_t *strides;
    /** RS_SOURCE, RS_TARGET or both. */
    uint32_t role;
    /** Virtual-pipeline chunk; 0 through tables. */
    uint32_t model_chunk;
    /** RS_PARAM_*. */
    uint32_t state;
    /** 0. */
    uint32_t reserved;
    /** Version of the last sync that this parameter is whole at; 0: none. */
    uint64_t version;
} rs_param_t;

/** A communicator of the processes of one host. Zero it and set struct_size, name and world. */
typedef struct rs_comm_local_t {
    /** sizeof(rs_comm_local_t). */
    size_t struct_size;
    /** Names the run: processes of one user that give the same name, on one host, meet. At most 64 bytes. Copied. */
    const char *name;
    /** This process's rank, 0-based. */
    int32_t rank;
    /** Number of ranks. */
    int32_t world;
    /** Longest wait for the others, in milliseconds; 0: 60,000. */
    uint32_t timeout_ms;
    /** RS_LOCAL_*, equal on all ranks. */
    uint32_t flags;
} rs_comm_local_t;

/**
 * The caller's communicator, for rs_comm_custom(). Zero it and set struct_size, rank, world_size and the required functions.
 *
 * The functions answer RS_OK or a negative status; any other answer is a failure too, and the text of the library's error holds its
 * number. After the first failure the library calls `abort` and `release` only. They are called on the thread that is inside
 * rs_container_connect() or rs_sync_weights(), one at a time; `abort` on any thread, beside any of them. They may not call this
 * library and may not throw. A sync gathers a few words from all ranks, then runs groups, each `group_begin`, some `send` and `recv`,
 * `group_end`, then `poll` until it answers RS_OK; then it gathers again. On all ranks the groups have the same order, but a rank may
 * have a part in some of them only.
 */
typedef struct rs_comm_ops_t {
    /** sizeof(rs_comm_ops_t). */
    size_t struct_size;
    /** First argument of every function. From a successful rs_comm_custom() until `release` it is the library's. */
    void *ctx;
    /** Called once, when the last reference to the communicator goes, on the thread that gives it back; may be NULL. */
    void (*release)(void *ctx);
    /** This rank, from 0. */
    int32_t rank;
    /** Number of ranks. */
    int32_t world_size;
    /**
     * Collective, host memory: `bytes` (the same number everywhere) from every rank, in rank order, into `recv` (world_size * bytes).
     * Returns within timeout_ms, with an error if a rank is missing then; neither memory is touched after it has returned. Required.
     */
    rs_status_t (*allgather)(void *ctx, const void *send, void *recv, uint64_t bytes, uint32_t timeout_ms);
    /** Opens a group of sends and receives. Required. */
    rs_status_t (*group_begin)(void *ctx);
    /**
     * Starts the group; may return before it is complete. All its operations progress together: a rank that sends to another before it
     * receives from it must not wait for ever. Required.
     */
    rs_status_t (*group_end)(void *ctx);
    /**
     * Within a group: sends `bytes` at `data` to `peer`. Messages to one peer arrive in order, each whole and as long as its `recv`
     * says. The memory stays as it is until `poll` answers RS_OK. `stream` is that of the sync: what was started on it before comes
     * first; host memory ignores it. Required.
     */
    rs_status_t (*send)(void *ctx, const void *data, uint64_t bytes, int32_t peer, void *stream);
    /** Within a group: receives exactly `bytes` from `peer` into `data`. Required. */
    rs_status_t (*recv)(void *ctx, void *data, uint64_t bytes, int32_t peer, void *stream);
    /** RS_OK: all groups ended so far are complete; RS_IN_PROGRESS: not yet. Does not wait. Required. */
    rs_status_t (*poll)(void *ctx);
    /**
     * Gives up, once, after rs_container_abort() or the first failure: calls in progress return an error, here and, as far as it can
     * tell them, on the peers. When it has returned, no memory given to `send` or `recv` is touched any more, but by a call that is
     * still in progress. May be NULL: then such memory is touched inside calls only, and the peers wait for their deadline.
     */
    void (*abort)(void *ctx);
} rs_comm_ops_t;

/** A parameter of a preset and its memory. Zero it and set struct_size and the rest. */
typedef struct rs_bind_t {
    /** sizeof(rs_bind_t). */
    size_t struct_size;
    /** The framework's own name on this rank. In Megatron layers count from 0 in each chunk, and leading `module.` do not matter. */
    const char *name;
    /** RS_SOURCE or RS_TARGET: which side's parameter it is. Both: one of each side in the same memory; what lies alike is not moved. */
    uint32_t role;
    /** Virtual-pipeline chunk, 0 if there is one only. */
    uint32_t model_chunk;
    /** As in the buffer table. */
    void *data;
    /** As in the buffer table. */
    uint64_t size_bytes;
    /** DLPack device type, RS_DEVICE_CPU for host memory. */
    int32_t device_type;
    /** DLPack device id. */
    int32_t device_id;
    /** Element type. */
    rs_dtype_t dtype;
    /** Number of axes. */
    uint32_t ndim;
    /** `ndim` extents in elements. */
    const int64_t *shape;
    /** `ndim` strides in elements, which must be dense and row-major; NULL: they are. */
    const int64_t *strides;
} rs_bind_t;

/**
 * Receives log lines: level (RS_LOG_*), the container's label (`rs_config_t.name`) or, without one, the name of the library's module,
 * and the text. For the rules see rs_set_log().
 */
typedef void (*rs_log_fn)(void *user, uint32_t level, const char *label, const char *text);

#ifdef __cplusplus
extern "C" {
#endif

/**
 * Makes a container for this rank's weights.
 *
 * Checks everything that one rank can check alone: bounds of every tile, strides, overlaps, target elements in no tile. The error
 * names the row by its number and name.
 *
 * - config: how to work. Copied, with config.device and config.name; a reference of its own is taken on config.comm.
 * - layout: the tables; NULL with config.preset, which says the same of a known model. Copied, with all names. The weights themselves
 *   (`rs_buffer_t.data`, `rs_bind_t.data`) are borrowed: they stay where they are until rs_container_rebind() or rs_container_destroy().
 *   A GPU's memory that no other process reads may be unmapped between two syncs and mapped at the same addresses before the next one
 *   (an engine that sleeps); a sync refuses to use what is not there (RS_ERR_STATE). A rank without weights gives tables of no rows.
 * - out: the new container, the caller's to destroy.
 *
 * Local: asks no other rank. Errors: RS_ERR_INVALID, RS_ERR_UNKNOWN_FIELD, RS_ERR_UNSUPPORTED (transforms, memory of a device that
 * config.device is not for, no CUDA driver), RS_ERR_LAYOUT (tables that contradict themselves), RS_ERR_STATE (parameters of the preset
 * that are not bound), RS_ERR_DEVICE and RS_ERR_MEMORY (of a GPU).
 */
rs_status_t rs_container_create(const rs_config_t *config, const rs_layout_t *layout, rs_container_t **out);

/**
 * Agrees with the other ranks, exchanges the tables (with a world spec there are none to exchange) and plans: afterwards every element
 * of every target has exactly one sender. Either all ranks have a preset, of the same spec, or none has.
 *
 * Also connects again after a failure, once rs_container_set_comm() has given a new communicator, and after a rebind with other
 * boxes. Ranks may have come back in other processes; where all layouts are as before, those that had a plan keep it.
 *
 * Collective: every rank of the communicator calls it, a rank without weights too. Waits for the others, at most
 * `rs_config_t.timeout_ms`. An error that one rank finds comes back on all ranks, with its text.
 *
 * Errors: RS_ERR_STATE (no communicator, or memory for others to open is gone), RS_ERR_COVERAGE (an element that no rank holds: names
 * parameter and box), RS_ERR_LAYOUT, RS_ERR_MISMATCH (one tensor with two shapes or dtypes, another world spec or version of this
 * library on some rank), RS_ERR_UNSUPPORTED, RS_ERR_BUSY, and the fatal ones.
 */
rs_status_t rs_container_connect(rs_container_t *container);

/**
 * This rank's tables as bytes, for callers that carry them to the other ranks themselves: give rs_container_import() the bytes of
 * every rank before connect, and connect exchanges digests only. The bytes hold names, shapes and boxes; no addresses, no weights.
 *
 * - buf, cap: the caller's buffer and its length in bytes; with cap 0 buf may be NULL.
 * - len: the number of bytes written; with RS_ERR_TOO_SMALL the number needed.
 *
 * Local. Errors: RS_ERR_INVALID, RS_ERR_TOO_SMALL, RS_ERR_STATE (no communicator yet: the bytes name the rank), RS_ERR_BUSY.
 */
rs_status_t rs_container_export(const rs_container_t *container, void *buf, size_t cap, size_t *len);

/**
 * Takes the tables of one rank, as rs_container_export() gave them there. Copied; connect follows. Where every rank has imported all
 * the others' tables, connect exchanges none. A new communicator, or other boxes, forgets them.
 *
 * Local. Errors: RS_ERR_INVALID (bytes that are not such tables), RS_ERR_MISMATCH (of another version of this library),
 * RS_ERR_STATE (no communicator yet, a world spec, or a sync in progress), RS_ERR_BUSY.
 */
rs_status_t rs_container_import(rs_container_t *container, const void *blob, size_t len);

/**
 * Gives the container another layout: exactly one of layout and preset, the other is NULL. What rs_get_param() gave so far ends.
 *
 * Local. With the same boxes at other addresses that is all: the next sync tells the other ranks. (A GPU's old memory that processes of
 * an rs_comm_local() read is theirs too until that sync has ended: free it then.) With other boxes, or on another device,
 * rs_container_connect() follows on every rank of the communicator, before any sync, also on ranks whose layout stays. A parameter of
 * the same name at the same address keeps its state, others start over as RS_PARAM_INITIAL; but what lies in torn memory is torn.
 *
 * Errors: as rs_container_create(), RS_ERR_BUSY, and RS_ERR_STATE (a sync is in progress). After an error the former layout holds.
 */
rs_status_t rs_container_rebind(rs_container_t *container, const rs_layout_t *layout, const rs_preset_t *preset);

/**
 * Gives the container a communicator: its first, or another one after a failure. The container takes a reference of its own and
 * gives the former back; rs_container_connect() follows.
 *
 * Local. Errors: RS_ERR_INVALID, RS_ERR_BUSY, RS_ERR_STATE (a sync is in progress).
 */
rs_status_t rs_container_set_comm(rs_container_t *container, rs_comm_t *comm);

/**
 * Moves the weights: what the sources hold goes into the targets' own memory.
 *
 * RS_OK: every rank has landed this version. RS_IN_PROGRESS, with weights on GPUs: all is put on sync->stream; then rs_container_poll() on
 * every rank tells the end, and errors as below. "Streams" above says more.
 *
 * While it runs, no source may be written and no target read, but by what comes behind it on its stream. When it has ended, whatever the
 * answer, no rank reads this rank's sources any more, and nothing of it is on this rank's streams. (After a failure that takes up to 6
 * seconds beyond the deadline: GPUs finish what they began. One whose stream has not come that far by then, because of what its caller
 * has there, may still read and write weights later: do not free them before the streams of all ranks have ended.) After an error each
 * target says by its state what it holds: RS_PARAM_TORN once a byte of the sync's targets was written here, RS_PARAM_LANDED where all
 * arrived but not every rank could be heard; rs_get_param() refuses torn ones until a sync succeeds.
 *
 * Collective: every rank of the communicator calls it, with the same version and the same `only`. No rank waits longer than its
 * timeout, which runs from this call, over the polls. sync is copied; the progress function is called on this thread, during the call, and
 * not at all after RS_IN_PROGRESS.
 *
 * A stream that is being captured into a CUDA graph is taken where all weights of every rank stay on that rank (else
 * RS_ERR_UNSUPPORTED), on all ranks at once and without `only`. Then nothing moves now, and polls tell that all ranks have put it into
 * their graphs. The graph repeats the copies, until this container is rebound, connected or destroyed, whatever syncs do; it asks
 * nobody, and changes no parameter's state or version.
 *
 * Errors: RS_ERR_INVALID (version 0; an `only` that takes a part of a parameter), RS_ERR_STATE (not connected, or failed: connect again;
 * a sync is in progress: poll; or GPU memory that it uses was freed, unmapped or replaced since it was bound: nothing moved, rebind),
 * RS_ERR_NOT_FOUND (an entry of `only` that is no tensor of any rank), RS_ERR_MISMATCH (another version or subset on some rank: nothing
 * moved), RS_ERR_BUSY (also: another container has a sync in progress on this communicator), and the fatal ones (RS_ERR_CORRUPT with
 * RS_SYNC_VERIFY only), after which the container needs a new communicator and a connect. RS_SYNC_VERIFY is RS_ERR_UNSUPPORTED with a
 * device of the caller's and on a stream that is captured, RS_ERR_MISMATCH where not all ranks give it.
 */
rs_status_t rs_sync_weights(rs_container_t *container, const rs_sync_t *sync);

/**
 * How the last connect or sync stands: RS_OK (all ranks have connected or landed; also before the first), RS_IN_PROGRESS (also while one
 * runs on another thread), or the error that it ended with. After an RS_IN_PROGRESS of rs_sync_weights() every rank calls it until it
 * answers otherwise: it is what finds a passed deadline or a dead peer, ends what waits for them on the stream, and agrees with the
 * others.
 *
 * Does not wait. Any thread, at any time, beside any other call.
 */
rs_status_t rs_container_poll(const rs_container_t *container);

/**
 * Gives up: calls in progress on this container, and on the other ranks of its communicator, end soon with RS_ERR_ABORTED. The
 * communicator is of no use afterwards: rs_container_set_comm() and rs_container_connect() start over.
 *
 * Does not wait. Any thread, at any time, beside any other call.
 */
rs_status_t rs_container_abort(const rs_container_t *container);

/**
 * The parameter of this name as the framework knows it: the target of that name, else the source.
 *
 * While a sync is in progress on a stream, state and version are those before it.
 *
 * - name: `rs_buffer_t.name`.
 * - out: set out->struct_size; the rest is written. Its pointers are borrowed from the container until rebind or destroy.
 *
 * Local; other reading calls may run beside it. Errors: RS_ERR_NOT_FOUND, RS_ERR_AMBIGUOUS (several have it: use
 * rs_get_param_at()), RS_ERR_TORN (a failed sync left it half written), RS_ERR_BUSY (a sync is running).
 */
rs_status_t rs_get_param(const rs_container_t *container, const char *name, rs_param_t *out);

/**
 * The parameter of buffer row `index`, torn or not: out->state tells. For all parameters, count up from 0 until RS_ERR_NOT_FOUND.
 *
 * Otherwise as rs_get_param().
 */
rs_status_t rs_get_param_at(const rs_container_t *container, size_t index, rs_param_t *out);

/**
 * Tells about the plan, the last sync or the layout, as JSON. Readers skip members that they do not know: more may come.
 *
 * - what: RS_DESCRIBE_PLAN, RS_DESCRIBE_STATS or RS_DESCRIBE_LAYOUT.
 * - param: NULL; or a parameter's name: with RS_DESCRIBE_PLAN, who sends each of its boxes.
 * - buf, cap: the caller's buffer and its length in bytes; with cap 0 buf may be NULL.
 * - len: the bytes written, the final NUL among them; with RS_ERR_TOO_SMALL the bytes needed.
 *
 * Local; other reading calls may run beside it. Errors: RS_ERR_INVALID, RS_ERR_TOO_SMALL, RS_ERR_NOT_FOUND, RS_ERR_STATE (a plan
 * before connect), RS_ERR_BUSY.
 */
rs_status_t rs_container_describe(const rs_container_t *container, uint32_t what, const char *param, char *buf, size_t cap, size_t *len);

/**
 * A number of 128 bits of the weights that all ranks hold together, which does not depend on how they are cut: of trainer, engine and a
 * checkpoint on disk it is the same, or their weights differ. It tells apart what differs by accident; it is no signature.
 *
 * What counts is each element of a tensor that any rank holds in that role, once, however many hold it. (So an engine that wants only a
 * part of a tensor has another number than its trainer.) Sources whose targets have another dtype or a transform count as these would
 * hold them, rounded as a sync rounds, all NaNs being one. The number is the sum over the tensors, modulo p = 2^127 - 1, of
 * `c (n + w[0] r + w[1] r^2 + ...)`: n is how many elements count, `w[i]` are the words of 8 bytes of the dense row-major tensor in
 * little endian, filled up with zeros, as is what nobody holds, r = 0x243f6a8885a308d313198a2e03707344, and c is XXH3's 128 bits
 * (`high64 << 64 | low64`, seed 0) of the tensor's name, a NUL, DLPack's code and bits (a byte each), and the extents as 64-bit words in
 * little endian.
 *
 * - role: RS_SOURCE or RS_TARGET.
 * - tensor: a logical name, or a prefix ending in `*`: the sum over those, whether a sync moves them or not; NULL: over all that a sync
 *   moves, or, where no rank has a target, over all.
 * - out: 16 bytes, the number in little endian.
 *
 * The weights are read as they are, torn ones too, through host memory; a GPU's on a stream of the library's own, so that what
 * writes them must have ended. On rs_config_t.host_threads threads, within rs_config_t.timeout_ms. rs_container_poll() goes on to tell of
 * the last connect or sync.
 *
 * Collective: every rank of the communicator calls it, with the same role and tensor; connected, and with no sync in progress. Errors:
 * RS_ERR_INVALID, RS_ERR_NOT_FOUND (a tensor that no rank has, or none in that role), RS_ERR_MISMATCH (ranks hold the same part of a
 * tensor with different bytes: names it; or other arguments on some rank), RS_ERR_UNSUPPORTED (a tensor whose targets have several
 * dtypes; a device of the caller's), RS_ERR_STATE (also: GPU memory that it reads is gone), RS_ERR_BUSY, and the fatal ones.
 */
rs_status_t rs_fingerprint(rs_container_t *container, uint32_t role, const char *tensor, uint8_t *out);

/**
 * Ends a container: its references on communicator and device go, the weights are the caller's alone again. NULL is nothing.
 *
 * The last call on it, on any thread, beside no other. It does not wait for other ranks, but where a sync is in progress: that fails, on
 * all ranks, and what GPUs have begun of it is waited for, at most 6 seconds (rs_sync_weights() says what may still run then), as is
 * what a refused sync has left on its stream, at most a second.
 */
void rs_container_destroy(rs_container_t *container);

/**
 * Reads a world spec: a model and how trainer and engine cut it. It says what every rank holds, so that no rank computes boxes and
 * none is asked for its tables.
 *
 * ```json
 * {"model":  {"architectures": ["Qwen3ForCausalLM"], "hidden_size": 4096, "num_hidden_layers": 36, "...": "..."},
 *  "source": {"framework": "megatron", "ranks": "0-15", "tensor_model_parallel_size": 4, "pipeline_model_parallel_size": 2},
 *  "target": {"framework": "vllm", "ranks": "16-23", "tensor_parallel_size": 2, "replicas": 4},
 *  "ranks_per_host": 8, "link_gb_per_s": {"same_host": 100, "network": 25}, "ignore": ["*.rotary_emb.inv_freq"]}
 * ```
 *
 * `model` is the model's own config.json: Llama, Mistral, Qwen2 and Qwen3 (...ForCausalLM), with experts Mixtral, Qwen2Moe,
 * Qwen3Moe, DeepseekV2, DeepseekV3, GptOss, Glm4Moe and Qwen3Next (full_attention alone), with a vision tower
 * Qwen2_5_VLForConditionalGeneration. `ranks` are ranks of the communicator, in the framework's own order, as text or as a
 * list; both sides may have the same. Either side may be any framework, and of another dtype: its elements are cast. Members
 * bear the framework's own names and have its defaults:
 *
 * - megatron: tensor_model_parallel_size, pipeline_model_parallel_size, virtual_pipeline_model_parallel_size, context_parallel_size,
 *   data_parallel_size, use_tp_pp_dp_mapping, transformer_impl ("transformer_engine" or "local"),
 *   num_layers_in_first_pipeline_stage, num_layers_in_last_pipeline_stage, account_for_embedding_in_pipeline_split,
 *   account_for_loss_in_pipeline_split, pipeline_model_parallel_layout, make_vocab_size_divisible_by, padded_vocab_size,
 *   params_dtype, layernorm_zero_centered_gamma, mtp_num_layers, expert_model_parallel_size, expert_tensor_parallel_size,
 *   moe_grouped_gemm, moe_use_legacy_grouped_gemm, moe_single_grouped_weight, mla_down_proj_fusion; MindSpeed's
 *   num_layer_list, noop_layers, moe_tp_extend_ep, mla_mm_split and schedules_method ("dualpipev"). Ours: mla_down_proj_cut,
 *   whether MLA's down projections are cut (default: with local layers), mla_weights, whose names MLA has ("core",
 *   "mindspeed", "mindspeed_qb"), vision_names, whose names a model with a vision tower has ("mbridge", "mindspeed_mm",
 *   "megatron_bridge"), and with MindSpeed-MM's vision_num_layer_list, the vision tower's layers of each stage.
 *   data_parallel_size follows from the ranks.
 * - vllm: tensor_parallel_size, pipeline_parallel_size, data_parallel_size, VLLM_PP_LAYER_PARTITION, dtype,
 *   enable_expert_parallel, expert_placement_strategy, mm_encoder_tp_mode ("weights" or "data"). Ours: vocab_padding_size
 *   (64); padded_vocab_size; shared_experts ("cut" or "whole", as with vllm-ascend's enable_shared_expert_dp; default: as vLLM
 *   has them); replicas, independent engines, each an equal block of `ranks`; physical_to_logical_map: with redundant experts,
 *   a list for each layer that has any; expert_storage: how w13 and w2 lie after loading, "stacked", "stacked_swapped" (up
 *   before gate) or "stacked_transposed" (vllm-ascend); mtp_drafter, whether the drafter's parameters, which are in model
 *   chunk 1, are there; mla_derived_weights, whether W_UK_T and W_UV are "views" of kv_b_proj, which are left out, or "copies"
 *   (vllm-ascend), which are written; fused_qkv_a_proj (true);
 *   e_score_correction_bias_dtype ("float32"); moe_padded_intermediate_size and moe_padded_hidden_size, a rank's experts as a kernel
 *   has rounded them up.
 * - hf: whole Hugging Face tensors on each rank; dtype.
 *
 * Layers for multi-token prediction are part of the world if a side asks for them; both sides that do must hold equally many, and a
 * target's come from a source that holds them. The drafter shares the main model's embedding and has no parameter for it.
 *
 * The last three members of the example may be left out: ranks_per_host and link_gb_per_s are for rs_preset_describe() only, ignore
 * is for rs_preset_bind().
 *
 * ```c
 * rs_preset_create(spec, rank, &preset);
 * rs_preset_bind(preset, &bind);                       // for each of this rank's parameters
 * config.preset = preset;
 * rs_container_create(&config, NULL, &container);      // then connect and sync as with tables
 * ```
 *
 * - spec_json: read, not kept. Equal in meaning on all ranks: connect compares.
 * - rank: this process's rank of the communicator; it need not play a part.
 * - out: the new preset, the caller's to destroy.
 *
 * Local; any thread. Errors, which name the member: RS_ERR_INVALID (unknown, missing or contradictory), RS_ERR_UNSUPPORTED (what the
 * framework forbids, and what is not built).
 */
rs_status_t rs_preset_create(const char *spec_json, int32_t rank, rs_preset_t **out);

/**
 * Gives one of this rank's parameters its memory, by the name that the framework calls it; a second time: other memory. Every
 * parameter that the spec says this rank has must be bound before the preset is used; rs_preset_describe() lists them.
 *
 * A framework's release or patch may hold a tensor in another way than the default. Where the spec does not give the member that says
 * how, a parameter that fits another value decides it for the whole preset: mla_down_proj_cut, mla_down_proj_fusion, mla_weights,
 * mla_mm_split and the padded vocabulary of megatron; expert_storage, shared_experts, fused_qkv_a_proj, e_score_correction_bias_dtype
 * and the padded vocabulary of vllm. So a rank's parameters may be bound in any order, but describe tells the final names and shapes
 * only afterwards. Connect tells the other ranks what was found; rs_container_describe() lists all of it.
 *
 * - bind: copied, with its name and lists. The memory is borrowed by containers made from the preset, as rs_container_create() says.
 *
 * Local; one thread at a time. Errors: RS_ERR_NOT_FOUND (no such parameter on this rank: tells the nearest names; or add it to the
 * spec's `ignore`, where a `*` stands for anything: then it is left out, as rotary inv_freq, scales of the KV cache, expert
 * maps and loads are in any case), RS_ERR_LAYOUT (another shape, dtype or strides than any value of the spec says: tells
 * them), RS_ERR_UNSUPPORTED (LoRA's parameters, and those of quantised modules), RS_ERR_INVALID, RS_ERR_UNKNOWN_FIELD,
 * RS_ERR_BUSY.
 */
rs_status_t rs_preset_bind(rs_preset_t *preset, const rs_bind_t *bind);

/**
 * This rank's tables, as the spec says: for a look, or to add rows of one's own and create a container from them.
 *
 * - out: set out->struct_size; the rest is written. Its tables are borrowed from the preset until the next rs_preset_bind() or
 *   rs_preset_destroy().
 *
 * Local; other reading calls may run beside it. Errors: RS_ERR_STATE (lists what is not bound), RS_ERR_LAYOUT (memory that
 * overlaps), RS_ERR_INVALID, RS_ERR_BUSY.
 */
rs_status_t rs_preset_layout(const rs_preset_t *preset, rs_layout_t *out);

/**
 * Tells about the spec, as JSON, without any other rank. Readers skip members that they do not know: more may come.
 *
 * Hosts are runs of `ranks_per_host` ranks; without it, all ranks are on one. All sizes are in bytes.
 *
 * - what: RS_DESCRIBE_LAYOUT, this rank's parameters: {"rank", "params": [{"role", "chunk", "name", "shape", "dtype", "bound",
 *   "required" (false: it may be bound and is not used), "tensors" (logical tensors that it holds a part of)}], "found": {"source",
 *   "target"} (members that parameters decided, in words)}.
 *   RS_DESCRIBE_PLAN, what this rank does in a sync, as far as its own parameters tell: {"rank", "world", "bytes": {"local",
 *   "doubled" (copied to a second place after it arrived, as the target has it), "sent", "received"}, "peers": [{"rank", "sent",
 *   "received"}], "moves", "plan_seconds"}.
 *   RS_DESCRIBE_WORLD, what all ranks do: {"parameters" (elements of the model), "ranks", "bytes": {"landed" (what all targets hold,
 *   as the source has it), "sent", "received"}, "pairs": [{"source_stage", "target_stage", "tier", "pairs", "bytes"}], "egress" and
 *   "ingress": [{"stage", "ranks", "bytes", "busiest", "mean"}], "most_peers", "message_bytes", "staging_bytes" (of a rank), "rounds"
 *   (of messages, one of each pair), "rounds_over_busiest" (their time over that of the busiest rank alone), "seconds" (if the spec
 *   has link_gb_per_s), "relayed" ("egress", "ingress" and "seconds" where all targets have RS_CONFIG_RELAY)}.
 * - buf, cap, len: as in rs_container_describe().
 *
 * Local; other reading calls may run beside it. Errors: RS_ERR_INVALID, RS_ERR_TOO_SMALL, RS_ERR_COVERAGE (a target element that no
 * source holds), RS_ERR_BUSY.
 */
rs_status_t rs_preset_describe(const rs_preset_t *preset, uint32_t what, char *buf, size_t cap, size_t *len);

/**
 * Ends a preset; containers made from it stay. NULL is nothing.
 *
 * The last call on it, on any thread, beside no other.
 */
void rs_preset_destroy(rs_preset_t *preset);

/**
 * A communicator of the processes of one host: memory is read where it lies, or passes through shared memory.
 *
 * Processes that give the same name and world meet, whichever comes first; those of another user are refused. Nothing stays behind
 * when they end, however they end.
 *
 * - local: copied, with its name.
 * - out: the new communicator, the caller's to destroy.
 *
 * Weights on GPUs: GPUs of a pair are the same or peers. Memory of cudaMalloc() is opened by its readers. So is memory that was mapped
 * of allocations with a handle for other processes (CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR), as PyTorch's expandable segments are in
 * recent releases; each takes a file descriptor while ranks connect. So is host memory of rs_mem_alloc(), which a GPU reads over the
 * bus, pinned by its owner or not: that of a trainer that has offloaded its weights. Others cannot open mapped memory without such
 * handles (that of vLLM's sleep mode), memory of pools, or other host memory: connect refuses it. Free what is from cudaMalloc() and
 * read by peers only when their containers are destroyed, have been rebound and synced, or their processes have ended: CUDA leaves it
 * undefined what happens else. Mapped memory may be unmapped or mapped anew between two syncs (a trainer that offloads):
 * rs_container_rebind() it before the next one, which else refuses. Until that sync peers keep the former memory open, and its bytes
 * allocated.
 *
 * Collective: waits until all ranks are there, at most `timeout_ms`. Errors: RS_ERR_INVALID (among others a rank that is there
 * already), RS_ERR_UNKNOWN_FIELD, RS_ERR_MISMATCH (ranks with other flags or another world), RS_ERR_TIMEOUT (naming the missing
 * ranks), RS_ERR_COMM.
 */
rs_status_t rs_comm_local(const rs_comm_local_t *local, rs_comm_t **out);

/**
 * A communicator of threads of this process: those that give the same hub number are its ranks. For one process that trains and
 * serves, and for tests.
 *
 * - hub: any number; free again when all its ranks are destroyed or the communicator failed.
 * - rank, world: this rank, from 0, and the number of ranks.
 * - out: the new communicator, the caller's to destroy.
 *
 * Local: the first collective call waits for the others. Each rank needs a thread of its own in collective calls. Errors:
 * RS_ERR_INVALID (a rank that is there already, another world than the ranks there have).
 */
rs_status_t rs_comm_loopback(uint64_t hub, int32_t rank, int32_t world, rs_comm_t **out);

/**
 * The engine's own NCCL communicator: ranks with a GPU each, on any hosts. The container's weights are in memory of its GPU.
 *
 * - nccl_comm: an ncclComm_t of NCCL 2.18 or later, complete (ncclCommGetAsyncError() says ncclSuccess), made by the libnccl.so.2 that
 *   the process has loaded. Borrowed: it stays alive until the communicator made here is destroyed and the containers that use it are;
 *   nobody else uses it during collective calls of this library, and from a sync's call until rs_container_poll() says that it has ended:
 *   NCCL wants the operations of a communicator in the same order on all ranks.
 * - out: the new communicator, the caller's to destroy.
 *
 * Where several ranks are threads of one process, NCCL may reach weights from another GPU, where they lie: those that are not from
 * cudaMalloc() must be open to it (cudaMemPoolSetAccess(), cuMemSetAccess()), or NCCL_P2P_DIRECT_DISABLE be 1. The library's staging is,
 * unless the log warns.
 *
 * A failure (a dead peer, a deadline) leaves the caller's communicator as it is: its operations may still wait on the GPU, and the
 * library keeps what they use and asks the communicator nothing more. End it with ncclCommAbort(), wait for its streams, then free the
 * weights and destroy what was made here. One that was made to block may also wait inside NCCL while connections to a peer are made, past
 * every deadline. NCCL tells no rank that another one has given up: the others hear of it at their deadlines.
 *
 * Local. Errors: RS_ERR_INVALID, RS_ERR_UNSUPPORTED (no CUDA driver, no libnccl.so.2 in the process, too old), RS_ERR_COMM, RS_ERR_DEVICE,
 * RS_ERR_MEMORY.
 */
rs_status_t rs_comm_from_nccl(void *nccl_comm, rs_comm_t **out);

/**
 * A communicator of NCCL's own for those who have none: ranks with a GPU each, on any hosts. It does not block, and the library aborts
 * it when a sync fails; the other ranks hear of that at their deadlines. NCCL is the libnccl.so.2 that the process has loaded, else the
 * one that the dynamic loader finds.
 *
 * - unique_id, id_len: the 128 bytes that ncclGetUniqueId() gave one rank, which has sent them to the others.
 * - rank, world: this rank, from 0, and the number of ranks. The GPU is the one that is current on this thread (cudaSetDevice()).
 * - out: the new communicator, the caller's to destroy.
 *
 * Collective: waits until all ranks are there, at most a minute. Errors: RS_ERR_INVALID, RS_ERR_UNSUPPORTED (no CUDA driver, no NCCL, too
 * old), RS_ERR_TIMEOUT, RS_ERR_COMM, RS_ERR_DEVICE, RS_ERR_MEMORY.
 */
rs_status_t rs_comm_nccl_init(const void *unique_id, size_t id_len, int32_t rank, int32_t world, rs_comm_t **out);

/**
 * A communicator of ranks on any hosts, over NVIDIA's NIXL: host memory, and that of CUDA's GPUs, by whatever its plugin UCX finds between
 * two ranks (InfiniBand, RoCE, TCP, shared memory).
 *
 * - config_json: an object. "address", required: "host:port" where rank 0 listens, equal on all ranks; all ranks reach it, and each other.
 *   "run": a name that is equal on all ranks, so that runs which have the same address by mistake are told apart. "timeout_ms": how long
 *   the ranks wait for each other, 60,000 if not given. "library": path of libnixl_capi.so, of NIXL 1.5; the dynamic loader looks for it
 *   if not given. "backend": NIXL's plugin, "UCX" if not given. "params": an object of that plugin's parameters, as texts. UCX itself is
 *   configured by the environment (UCX_TLS, UCX_NET_DEVICES).
 * - rank, world: this rank, from 0, and the number of ranks.
 * - out: the new communicator, the caller's to destroy.
 *
 * A rank's memory is written by that rank alone: what it needs from others it reads there. Weights that messages are read from or into as
 * they are, and staging, are registered with NIXL while containers are connected, until they are rebound or destroyed: registered memory of
 * a GPU or of an InfiniBand card's is pinned. NIXL runs threads of its own, about two for each communicator, as long as it lives; they sleep
 * while nothing comes. Who reaches the address can join the run: it belongs to a network that is trusted, as NCCL's does.
 *
 * Collective: waits until all ranks are there. Errors: RS_ERR_INVALID (config_json; a rank that is there already), RS_ERR_UNSUPPORTED (no
 * NIXL, another release, no such backend), RS_ERR_MISMATCH (ranks with another world or run), RS_ERR_TIMEOUT (naming the missing ranks),
 * RS_ERR_COMM, RS_ERR_PEER.
 */
rs_status_t rs_comm_nixl(const char *config_json, int32_t rank, int32_t world, rs_comm_t **out);

/**
 * One communicator of two, chosen by peer: what sources have for targets of the same host never touches the network.
 *
 * - near: of the ranks of this host, from rs_comm_local(), its ranks counted in the order of those of wide.
 * - wide: of all ranks, from rs_comm_nixl(), rs_comm_from_nccl(), rs_comm_nccl_init() or rs_comm_custom().
 * - out: the new communicator, with wide's ranks, the caller's to destroy. It holds references to both, and ends both when it fails: nobody
 *   else uses them meanwhile.
 *
 * Gathers go over wide. On GPUs each sync waits for its stream and is done when it returns. Collective over both, within a minute. Errors:
 * RS_ERR_INVALID (a near rank that wide does not have, or in another order), RS_ERR_UNSUPPORTED (communicators of other kinds),
 * RS_ERR_TIMEOUT, RS_ERR_PEER, RS_ERR_COMM.
 */
rs_status_t rs_comm_composite(const rs_comm_t *near, const rs_comm_t *wide, rs_comm_t **out);

/**
 * The caller's own communicator, for ranks that nothing built in connects.
 *
 * - ops: its functions, copied. On success ops->ctx is the library's until it calls ops->release; after an error it is the caller's
 *   still, and release is not called.
 * - out: the new communicator, the caller's to destroy.
 *
 * Local. Errors: RS_ERR_INVALID (naming the member that is missing), RS_ERR_UNKNOWN_FIELD.
 */
rs_status_t rs_comm_custom(const rs_comm_ops_t *ops, rs_comm_t **out);

/**
 * Gives the caller's reference back. The communicator ends with its last reference; containers hold their own. NULL is nothing.
 *
 * The last use of this handle, on any thread.
 */
void rs_comm_destroy(rs_comm_t *comm);

/**
 * Host memory that the processes of this host can read at memcpy's rate: weights that lie in it are not copied on their way to an
 * rs_comm_local() peer, which may be a GPU's. Pin it with cudaHostRegister() to copy to and from it with a GPU of one's own. Zeroed,
 * aligned to a page, all of it present.
 *
 * - bytes: at least 1.
 * - flags: 0.
 * - out: its address; the caller's, to give to rs_mem_free().
 *
 * Local; any thread. Errors: RS_ERR_INVALID, RS_ERR_MEMORY.
 */
rs_status_t rs_mem_alloc(uint64_t bytes, uint32_t flags, void **out);

/** Gives memory of rs_mem_alloc() back, once no container uses it: rebind or destroy comes first. NULL is nothing. Any thread. */
void rs_mem_free(void *memory);

/** The library's version: major, minor and patch, a byte each, 0x000102 being 0.1.2. Any thread. */
uint32_t rs_version(void);

/** A status number's name, "RS_ERR_TIMEOUT" for instance; "unknown status" for a number that is none. Static; any thread. */
const char *rs_status_name(rs_status_t status);

/**
 * What went wrong in this thread's last failing call, in English for a reader: the parameter, rank or peer, what was expected, what
 * came, what to do. UTF-8, at most 2,047 bytes, "" before the first failure; a call that succeeds leaves it. Valid until this
 * thread's next failing call.
 */
const char *rs_last_error(void);

/**
 * Sends log lines up to a level to a function, for the whole library. May be called again, to change or to stop it; when it
 * returns, no thread is inside the former function any more.
 *
 * - function: called from any thread that is inside a call, and from that of RS_CONFIG_WATCHDOG, by several at once; its strings are
 *   valid during the call. It may not call this library. NULL: no lines.
 * - user: its first argument.
 * - max_level: RS_LOG_ERROR to RS_LOG_TRACE; RS_LOG_OFF: no lines.
 *
 * Local; any thread. Errors: RS_ERR_INVALID; RS_ERR_BUSY from inside the function; RS_ERR_STATE where the program links this library
 * as Rust code and has a logger of its own.
 */
rs_status_t rs_set_log(rs_log_fn function, void *user, uint32_t max_level);

#ifdef __cplusplus
}
#endif

#endif /* RESHARD_H */
