//! The exports. Each body is one `call`; the comments here are the header's, so they speak to a C programmer.
#![allow(clippy::missing_safety_doc)] // The whole comment is the promise, in the header's words.

use super::handle::{CommHandle, Handle, Shared};
use super::preset::PresetHandle;
use super::write::{GrowingOut, Out, bytes};
use super::{call, convert, last_error, logger, read};
use crate::abi::*;
use crate::comm::foreign::ForeignComm;
use crate::comm::nccl::NcclComm;
use crate::comm::{local, loopback};
use crate::error::status_name;
use std::ffi::{c_char, c_void};
use std::ptr::NonNull;
use std::sync::Arc;

/// Makes a container for this rank's weights.
///
/// Checks everything that one rank can check alone: bounds of every tile, strides, overlaps, target elements in no tile. The error
/// names the row by its number and name.
///
/// - config: how to work. Copied, with config.device and config.name; a reference of its own is taken on config.comm.
/// - layout: the tables; NULL with config.preset, which says the same of a known model. Copied, with all names. The weights themselves
///   (`rs_buffer_t.data`, `rs_bind_t.data`) are borrowed: they stay where they are until rs_container_rebind() or rs_container_destroy().
///   A GPU's memory that no other process reads may be unmapped between two syncs and mapped at the same addresses before the next one
///   (an engine that sleeps); a sync refuses to use what is not there (RS_ERR_STATE). A rank without weights gives tables of no rows.
/// - out: the new container, the caller's to destroy.
///
/// Local: asks no other rank. Errors: RS_ERR_INVALID, RS_ERR_UNKNOWN_FIELD, RS_ERR_UNSUPPORTED (transforms, memory of a device that
/// config.device is not for, no CUDA driver), RS_ERR_LAYOUT (tables that contradict themselves), RS_ERR_STATE (parameters of the preset
/// that are not bound), RS_ERR_DEVICE and RS_ERR_MEMORY (of a GPU).
#[unsafe(no_mangle)]
pub unsafe extern "C" fn rs_container_create(
    config: *const rs_config_t,
    layout: *const rs_layout_t,
    out: *mut *mut rs_container_t,
) -> rs_status_t {
    // SAFETY: what the comment asks of the caller.
    call(|| unsafe {
        let out = Out::new(out, "out")?;
        out.put(Handle::create(config, layout)?);
        Ok(())
    })
}

/// Agrees with the other ranks, exchanges the tables (with a world spec there are none to exchange) and plans: afterwards every element
/// of every target has exactly one sender. Either all ranks have a preset, of the same spec, or none has.
///
/// Also connects again after a failure, once rs_container_set_comm() has given a new communicator, and after a rebind with other
/// boxes.
///
/// Collective: every rank of the communicator calls it, a rank without weights too. Waits for the others, at most
/// `rs_config_t.timeout_ms`. An error that one rank finds comes back on all ranks, with its text.
///
/// Errors: RS_ERR_STATE (no communicator, or memory for others to open is gone), RS_ERR_COVERAGE (an element that no rank holds: names
/// parameter and box), RS_ERR_LAYOUT, RS_ERR_MISMATCH (one tensor with two shapes or dtypes, another world spec or version of this
/// library on some rank), RS_ERR_UNSUPPORTED, RS_ERR_BUSY, and the fatal ones.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn rs_container_connect(container: *mut rs_container_t) -> rs_status_t {
    // SAFETY: what the comment asks of the caller.
    call(|| unsafe { Handle::of(container) }?.write(|c| c.container.connect()))
}

/// This rank's tables as bytes, for callers that carry them to the other ranks themselves: give rs_container_import() the bytes of
/// every rank before connect, and connect exchanges digests only. The bytes hold names, shapes and boxes; no addresses, no weights.
///
/// - buf, cap: the caller's buffer and its length in bytes; with cap 0 buf may be NULL.
/// - len: the number of bytes written; with RS_ERR_TOO_SMALL the number needed.
///
/// Local. Errors: RS_ERR_INVALID, RS_ERR_TOO_SMALL, RS_ERR_STATE (no communicator yet: the bytes name the rank), RS_ERR_BUSY.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn rs_container_export(
    container: *const rs_container_t,
    buf: *mut c_void,
    cap: usize,
    len: *mut usize,
) -> rs_status_t {
    // SAFETY: what the comment asks of the caller.
    call(|| unsafe { bytes(&Handle::of(container)?.read(|c| c.container.export())?, buf.cast(), cap, len) })
}

/// Takes the tables of one rank, as rs_container_export() gave them there. Copied; connect follows. Where every rank has imported all
/// the others' tables, connect exchanges none. A new communicator, or other boxes, forgets them.
///
/// Local. Errors: RS_ERR_INVALID (bytes that are not such tables), RS_ERR_MISMATCH (of another version of this library),
/// RS_ERR_STATE (no communicator yet, a world spec, or a sync in progress), RS_ERR_BUSY.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn rs_container_import(container: *mut rs_container_t, blob: *const c_void, len: usize) -> rs_status_t {
    // SAFETY: what the comment asks of the caller.
    call(|| unsafe {
        let blob = read::list(blob.cast::<u8>(), len, "blob")?;
        Handle::of(container)?.write(|c| c.container.import(blob))
    })
}

/// Gives the container another layout: exactly one of layout and preset, the other is NULL. What rs_get_param() gave so far ends.
///
/// Local. With the same boxes at other addresses that is all: the next sync tells the other ranks. (A GPU's old memory that processes of
/// an rs_comm_local() read is theirs too until that sync has ended: free it then.) With other boxes, or on another device,
/// rs_container_connect() follows on every rank of the communicator, before any sync, also on ranks whose layout stays. A parameter of
/// the same name at the same address keeps its state, others start over as RS_PARAM_INITIAL; but what lies in torn memory is torn.
///
/// Errors: as rs_container_create(), RS_ERR_BUSY, and RS_ERR_STATE (a sync is in progress). After an error the former layout holds.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn rs_container_rebind(
    container: *mut rs_container_t,
    layout: *const rs_layout_t,
    preset: *const rs_preset_t,
) -> rs_status_t {
    // SAFETY: what the comment asks of the caller.
    call(|| unsafe { Handle::of(container)?.write(|c| c.rebind(layout, preset)) })
}

/// Gives the container a communicator: its first, or another one after a failure. The container takes a reference of its own and
/// gives the former back; rs_container_connect() follows.
///
/// Local. Errors: RS_ERR_INVALID, RS_ERR_BUSY, RS_ERR_STATE (a sync is in progress).
#[unsafe(no_mangle)]
pub unsafe extern "C" fn rs_container_set_comm(container: *mut rs_container_t, comm: *mut rs_comm_t) -> rs_status_t {
    // SAFETY: what the comment asks of the caller.
    call(|| unsafe {
        let comm = CommHandle::share(comm)?;
        Handle::of(container)?.write(|c| c.container.set_comm(comm))
    })
}

/// Moves the weights: what the sources hold goes into the targets' own memory.
///
/// RS_OK: every rank has landed this version. RS_IN_PROGRESS, with weights on GPUs: all is put on sync->stream; then rs_container_poll() on
/// every rank tells the end, and errors as below. "Streams" above says more.
///
/// While it runs, no source may be written and no target read, but by what comes behind it on its stream. When it has ended, whatever the
/// answer, no rank reads this rank's sources any more, and nothing of it is on this rank's streams. (After a failure that takes up to 6
/// seconds beyond the deadline: GPUs finish what they began. One whose stream has not come that far by then, because of what its caller
/// has there, may still read and write weights later: do not free them before the streams of all ranks have ended.) After an error each
/// target says by its state what it holds: RS_PARAM_TORN once a byte of the sync's targets was written here, RS_PARAM_LANDED where all
/// arrived but not every rank could be heard; rs_get_param() refuses torn ones until a sync succeeds.
///
/// Collective: every rank of the communicator calls it, with the same version and the same `only`. No rank waits longer than its
/// timeout, which runs from this call, over the polls. sync is copied; the progress function is called on this thread, during the call, and
/// not at all after RS_IN_PROGRESS.
///
/// A stream that is being captured into a CUDA graph is taken where all weights of every rank stay on that rank (else
/// RS_ERR_UNSUPPORTED), on all ranks at once and without `only`. Then nothing moves now, and polls tell that all ranks have put it into
/// their graphs. The graph repeats the copies, until this container is rebound, connected or destroyed, whatever syncs do; it asks
/// nobody, and changes no parameter's state or version.
///
/// Errors: RS_ERR_INVALID (version 0; an `only` that takes a part of a parameter), RS_ERR_STATE (not connected, or failed: connect again;
/// a sync is in progress: poll; or GPU memory that it uses was freed, unmapped or replaced since it was bound: nothing moved, rebind),
/// RS_ERR_NOT_FOUND (an entry of `only` that is no tensor of any rank), RS_ERR_MISMATCH (another version or subset on some rank: nothing
/// moved), RS_ERR_BUSY (also: another container has a sync in progress on this communicator), and the fatal ones, after which the
/// container needs a new communicator and a connect.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn rs_sync_weights(container: *mut rs_container_t, sync: *const rs_sync_t) -> rs_status_t {
    // SAFETY: what the comment asks of the caller.
    call(|| unsafe {
        let (request, mut progress) = convert::sync(sync)?;
        Handle::of(container)?.write(|c| c.container.sync(&request, &mut progress))
    })
}

/// How the last connect or sync stands: RS_OK (all ranks have connected or landed; also before the first), RS_IN_PROGRESS (also while one
/// runs on another thread), or the error that it ended with. After an RS_IN_PROGRESS of rs_sync_weights() every rank calls it until it
/// answers otherwise: it is what finds a passed deadline or a dead peer, ends what waits for them on the stream, and agrees with the
/// others.
///
/// Does not wait. Any thread, at any time, beside any other call.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn rs_container_poll(container: *const rs_container_t) -> rs_status_t {
    // SAFETY: what the comment asks of the caller.
    call(|| unsafe { Handle::of(container) }?.status())
}

/// Gives up: calls in progress on this container, and on the other ranks of its communicator, end soon with RS_ERR_ABORTED. The
/// communicator is of no use afterwards: rs_container_set_comm() and rs_container_connect() start over.
///
/// Does not wait. Any thread, at any time, beside any other call.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn rs_container_abort(container: *const rs_container_t) -> rs_status_t {
    // SAFETY: what the comment asks of the caller.
    call(|| unsafe { Handle::of(container) }.map(Shared::abort))
}

/// The parameter of this name as the framework knows it: the target of that name, else the source.
///
/// While a sync is in progress on a stream, state and version are those before it.
///
/// - name: `rs_buffer_t.name`.
/// - out: set out->struct_size; the rest is written. Its pointers are borrowed from the container until rebind or destroy.
///
/// Local; other reading calls may run beside it. Errors: RS_ERR_NOT_FOUND, RS_ERR_AMBIGUOUS (several have it: use
/// rs_get_param_at()), RS_ERR_TORN (a failed sync left it half written), RS_ERR_BUSY (a sync is running).
#[unsafe(no_mangle)]
pub unsafe extern "C" fn rs_get_param(container: *const rs_container_t, name: *const c_char, out: *mut rs_param_t) -> rs_status_t {
    // SAFETY: what the comment asks of the caller.
    call(|| unsafe {
        let (name, out) = (read::text(name, "name")?, GrowingOut::new(out, "out")?);
        out.put(Handle::of(container)?.read(|c| c.param(c.container.param(name)?))?);
        Ok(())
    })
}

/// The parameter of buffer row `index`, torn or not: out->state tells. For all parameters, count up from 0 until RS_ERR_NOT_FOUND.
///
/// Otherwise as rs_get_param().
#[unsafe(no_mangle)]
pub unsafe extern "C" fn rs_get_param_at(container: *const rs_container_t, index: usize, out: *mut rs_param_t) -> rs_status_t {
    // SAFETY: what the comment asks of the caller.
    call(|| unsafe {
        let out = GrowingOut::new(out, "out")?;
        out.put(Handle::of(container)?.read(|c| c.param(c.container.param_at(index)?))?);
        Ok(())
    })
}

/// Tells about the plan, the last sync or the layout, as JSON. Readers skip members that they do not know: more may come.
///
/// - what: RS_DESCRIBE_PLAN, RS_DESCRIBE_STATS or RS_DESCRIBE_LAYOUT.
/// - param: NULL; or a parameter's name: with RS_DESCRIBE_PLAN, who sends each of its boxes.
/// - buf, cap: the caller's buffer and its length in bytes; with cap 0 buf may be NULL.
/// - len: the bytes written, the final NUL among them; with RS_ERR_TOO_SMALL the bytes needed.
///
/// Local; other reading calls may run beside it. Errors: RS_ERR_INVALID, RS_ERR_TOO_SMALL, RS_ERR_NOT_FOUND, RS_ERR_STATE (a plan
/// before connect), RS_ERR_BUSY.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn rs_container_describe(
    container: *const rs_container_t,
    what: u32,
    param: *const c_char,
    buf: *mut c_char,
    cap: usize,
    len: *mut usize,
) -> rs_status_t {
    // SAFETY: what the comment asks of the caller.
    call(|| unsafe { bytes(&Handle::of(container)?.read(|c| c.describe(what, param))?, buf.cast(), cap, len) })
}

/// Ends a container: its references on communicator and device go, the weights are the caller's alone again. NULL is nothing.
///
/// The last call on it, on any thread, beside no other. It does not wait for other ranks, but where a sync is in progress: that fails, on
/// all ranks, and what GPUs have begun of it is waited for, at most 6 seconds (rs_sync_weights() says what may still run then), as is
/// what a refused sync has left on its stream, at most a second.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn rs_container_destroy(container: *mut rs_container_t) {
    // SAFETY: what the comment asks of the caller.
    call(|| unsafe { Handle::destroy(container) });
}

/// Reads a world spec: a model and how trainer and engine cut it. It says what every rank holds, so that no rank computes boxes and
/// none is asked for its tables.
///
/// ```json
/// {"model":  {"architectures": ["Qwen3ForCausalLM"], "hidden_size": 4096, "num_hidden_layers": 36, "...": "..."},
///  "source": {"framework": "megatron", "ranks": "0-15", "tensor_model_parallel_size": 4, "pipeline_model_parallel_size": 2},
///  "target": {"framework": "vllm", "ranks": "16-23", "tensor_parallel_size": 2, "replicas": 4},
///  "ranks_per_host": 8, "link_gb_per_s": {"same_host": 100, "network": 25}, "ignore": ["*.rotary_emb.inv_freq"]}
/// ```
///
/// `model` is the model's own config.json: Llama, Mistral, Qwen2 and Qwen3 (...ForCausalLM), with experts Mixtral, Qwen2Moe,
/// Qwen3Moe, DeepseekV2, DeepseekV3, GptOss, Glm4Moe and Qwen3Next (full_attention alone), with a vision tower
/// Qwen2_5_VLForConditionalGeneration. `ranks` are ranks of the communicator, in the framework's own order, as text or as a
/// list; both sides may have the same. Either side may be any framework, and of another dtype: its elements are cast. Members
/// bear the framework's own names and have its defaults:
///
/// - megatron: tensor_model_parallel_size, pipeline_model_parallel_size, virtual_pipeline_model_parallel_size, context_parallel_size,
///   data_parallel_size, use_tp_pp_dp_mapping, transformer_impl ("transformer_engine" or "local"),
///   num_layers_in_first_pipeline_stage, num_layers_in_last_pipeline_stage, account_for_embedding_in_pipeline_split,
///   account_for_loss_in_pipeline_split, pipeline_model_parallel_layout, make_vocab_size_divisible_by, padded_vocab_size,
///   params_dtype, layernorm_zero_centered_gamma, mtp_num_layers, expert_model_parallel_size, expert_tensor_parallel_size,
///   moe_grouped_gemm, moe_use_legacy_grouped_gemm, moe_single_grouped_weight, mla_down_proj_fusion; MindSpeed's
///   num_layer_list, noop_layers, moe_tp_extend_ep, mla_mm_split and schedules_method ("dualpipev"). Ours: mla_down_proj_cut,
///   whether MLA's down projections are cut (default: with local layers), mla_weights, whose names MLA has ("core",
///   "mindspeed", "mindspeed_qb"), vision_names, whose names a model with a vision tower has ("mbridge", "mindspeed_mm",
///   "megatron_bridge"), and with MindSpeed-MM's vision_num_layer_list, the vision tower's layers of each stage.
///   data_parallel_size follows from the ranks.
/// - vllm: tensor_parallel_size, pipeline_parallel_size, data_parallel_size, VLLM_PP_LAYER_PARTITION, dtype,
///   enable_expert_parallel, expert_placement_strategy, mm_encoder_tp_mode ("weights" or "data"). Ours: vocab_padding_size
///   (64); padded_vocab_size; shared_experts ("cut" or "whole", as with vllm-ascend's enable_shared_expert_dp; default: as vLLM
///   has them); replicas, independent engines, each an equal block of `ranks`; physical_to_logical_map: with redundant experts,
///   a list for each layer that has any; expert_storage: how w13 and w2 lie after loading, "stacked", "stacked_swapped" (up
///   before gate) or "stacked_transposed" (vllm-ascend); mtp_drafter, whether the drafter's parameters, which are in model
///   chunk 1, are there; mla_derived_weights, whether W_UK_T and W_UV are "views" of kv_b_proj, which are left out, or "copies"
///   (vllm-ascend), which are written; fused_qkv_a_proj (true);
///   e_score_correction_bias_dtype ("float32"); moe_padded_intermediate_size and moe_padded_hidden_size, a rank's experts as a kernel
///   has rounded them up.
/// - hf: whole Hugging Face tensors on each rank; dtype.
///
/// Layers for multi-token prediction are part of the world if a side asks for them; both sides that do must hold equally many, and a
/// target's come from a source that holds them. The drafter shares the main model's embedding and has no parameter for it.
///
/// The last three members of the example may be left out: ranks_per_host and link_gb_per_s are for rs_preset_describe() only, ignore
/// is for rs_preset_bind().
///
/// ```c
/// rs_preset_create(spec, rank, &preset);
/// rs_preset_bind(preset, &bind);                       // for each of this rank's parameters
/// config.preset = preset;
/// rs_container_create(&config, NULL, &container);      // then connect and sync as with tables
/// ```
///
/// - spec_json: read, not kept. Equal in meaning on all ranks: connect compares.
/// - rank: this process's rank of the communicator; it need not play a part.
/// - out: the new preset, the caller's to destroy.
///
/// Local; any thread. Errors, which name the member: RS_ERR_INVALID (unknown, missing or contradictory), RS_ERR_UNSUPPORTED (what the
/// framework forbids, and what is not built).
#[unsafe(no_mangle)]
pub unsafe extern "C" fn rs_preset_create(spec_json: *const c_char, rank: i32, out: *mut *mut rs_preset_t) -> rs_status_t {
    // SAFETY: what the comment asks of the caller.
    call(|| unsafe {
        let out = Out::new(out, "out")?;
        out.put(PresetHandle::create(spec_json, rank)?);
        Ok(())
    })
}

/// Gives one of this rank's parameters its memory, by the name that the framework calls it; a second time: other memory. Every
/// parameter that the spec says this rank has must be bound before the preset is used; rs_preset_describe() lists them.
///
/// A framework's release or patch may hold a tensor in another way than the default. Where the spec does not give the member that says
/// how, a parameter that fits another value decides it for the whole preset: mla_down_proj_cut, mla_down_proj_fusion, mla_weights,
/// mla_mm_split and the padded vocabulary of megatron; expert_storage, shared_experts, fused_qkv_a_proj, e_score_correction_bias_dtype
/// and the padded vocabulary of vllm. So a rank's parameters may be bound in any order, but describe tells the final names and shapes
/// only afterwards. Connect tells the other ranks what was found; rs_container_describe() lists all of it.
///
/// - bind: copied, with its name and lists. The memory is borrowed by containers made from the preset, as rs_container_create() says.
///
/// Local; one thread at a time. Errors: RS_ERR_NOT_FOUND (no such parameter on this rank: tells the nearest names; or add it to the
/// spec's `ignore`, where a `*` stands for anything: then it is left out, as rotary inv_freq, scales of the KV cache, expert
/// maps and loads are in any case), RS_ERR_LAYOUT (another shape, dtype or strides than any value of the spec says: tells
/// them), RS_ERR_UNSUPPORTED (LoRA's parameters, and those of quantised modules), RS_ERR_INVALID, RS_ERR_UNKNOWN_FIELD,
/// RS_ERR_BUSY.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn rs_preset_bind(preset: *mut rs_preset_t, bind: *const rs_bind_t) -> rs_status_t {
    // SAFETY: what the comment asks of the caller.
    call(|| unsafe { PresetHandle::of(preset)?.bind(bind) })
}

/// This rank's tables, as the spec says: for a look, or to add rows of one's own and create a container from them.
///
/// - out: set out->struct_size; the rest is written. Its tables are borrowed from the preset until the next rs_preset_bind() or
///   rs_preset_destroy().
///
/// Local; other reading calls may run beside it. Errors: RS_ERR_STATE (lists what is not bound), RS_ERR_LAYOUT (memory that
/// overlaps), RS_ERR_INVALID, RS_ERR_BUSY.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn rs_preset_layout(preset: *const rs_preset_t, out: *mut rs_layout_t) -> rs_status_t {
    // SAFETY: what the comment asks of the caller.
    call(|| unsafe {
        let out = GrowingOut::new(out, "out")?;
        out.put(PresetHandle::of(preset)?.layout()?);
        Ok(())
    })
}

/// Tells about the spec, as JSON, without any other rank. Readers skip members that they do not know: more may come.
///
/// Hosts are runs of `ranks_per_host` ranks; without it, all ranks are on one. All sizes are in bytes.
///
/// - what: RS_DESCRIBE_LAYOUT, this rank's parameters: {"rank", "params": [{"role", "chunk", "name", "shape", "dtype", "bound",
///   "required" (false: it may be bound and is not used), "tensors" (logical tensors that it holds a part of)}], "found": {"source",
///   "target"} (members that parameters decided, in words)}.
///   RS_DESCRIBE_PLAN, what this rank does in a sync, as far as its own parameters tell: {"rank", "world", "bytes": {"local",
///   "doubled" (copied to a second place after it arrived, as the target has it), "sent", "received"}, "peers": [{"rank", "sent",
///   "received"}], "moves", "plan_seconds"}.
///   RS_DESCRIBE_WORLD, what all ranks do: {"parameters" (elements of the model), "ranks", "bytes": {"landed" (what all targets hold,
///   as the source has it), "sent", "received"}, "pairs": [{"source_stage", "target_stage", "tier", "pairs", "bytes"}], "egress" and
///   "ingress": [{"stage", "ranks", "bytes", "busiest", "mean"}], "most_peers", "message_bytes", "staging_bytes" (of a rank), "rounds"
///   (of messages, one of each pair), "rounds_over_busiest" (their time over that of the busiest rank alone), "seconds" (if the spec
///   has link_gb_per_s)}.
/// - buf, cap, len: as in rs_container_describe().
///
/// Local; other reading calls may run beside it. Errors: RS_ERR_INVALID, RS_ERR_TOO_SMALL, RS_ERR_COVERAGE (a target element that no
/// source holds), RS_ERR_BUSY.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn rs_preset_describe(
    preset: *const rs_preset_t,
    what: u32,
    buf: *mut c_char,
    cap: usize,
    len: *mut usize,
) -> rs_status_t {
    // SAFETY: what the comment asks of the caller.
    call(|| unsafe { bytes(&PresetHandle::of(preset)?.describe(what)?, buf.cast(), cap, len) })
}

/// Ends a preset; containers made from it stay. NULL is nothing.
///
/// The last call on it, on any thread, beside no other.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn rs_preset_destroy(preset: *mut rs_preset_t) {
    // SAFETY: what the comment asks of the caller.
    call(|| unsafe { PresetHandle::destroy(preset) });
}

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
