//! The exports, containers and presets first. Each body is one `call`; the comments here are the header's, so they speak to a C
//! programmer.
#![allow(clippy::missing_safety_doc)] // The whole comment is the promise, in the header's words.

use super::handle::{CommHandle, Handle, Shared};
use super::preset::PresetHandle;
use super::write::{GrowingOut, Out, bytes};
use super::{call, convert, read};
use crate::abi::*;
use std::ffi::{c_char, c_void};

pub use super::api_comm::*;

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
/// boxes. Ranks may have come back in other processes; where all layouts are as before, those that had a plan keep it.
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
/// moved), RS_ERR_BUSY (also: another container has a sync in progress on this communicator), and the fatal ones (RS_ERR_CORRUPT with
/// RS_SYNC_VERIFY only), after which the container needs a new communicator and a connect. RS_SYNC_VERIFY is RS_ERR_UNSUPPORTED with a
/// device of the caller's and on a stream that is captured, RS_ERR_MISMATCH where not all ranks give it.
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

/// A number of 128 bits of the weights that all ranks hold together, which does not depend on how they are cut: of trainer, engine and a
/// checkpoint on disk it is the same, or their weights differ. It tells apart what differs by accident; it is no signature.
///
/// What counts is each element of a tensor that any rank holds in that role, once, however many hold it. (So an engine that wants only a
/// part of a tensor has another number than its trainer.) Sources whose targets have another dtype or a transform count as these would
/// hold them, rounded as a sync rounds, all NaNs being one. The number is the sum over the tensors, modulo p = 2^127 - 1, of
/// `c (n + w[0] r + w[1] r^2 + ...)`: n is how many elements count, `w[i]` are the words of 8 bytes of the dense row-major tensor in
/// little endian, filled up with zeros, as is what nobody holds, r = 0x243f6a8885a308d313198a2e03707344, and c is XXH3's 128 bits
/// (`high64 << 64 | low64`, seed 0) of the tensor's name, a NUL, DLPack's code and bits (a byte each), and the extents as 64-bit words in
/// little endian.
///
/// - role: RS_SOURCE or RS_TARGET.
/// - tensor: a logical name, or a prefix ending in `*`: the sum over those, whether a sync moves them or not; NULL: over all that a sync
///   moves, or, where no rank has a target, over all.
/// - out: 16 bytes, the number in little endian.
///
/// The weights are read as they are, torn ones too, through host memory; a GPU's on a stream of the library's own, so that what
/// writes them must have ended. On rs_config_t.host_threads threads, within rs_config_t.timeout_ms. rs_container_poll() goes on to tell of
/// the last connect or sync.
///
/// Collective: every rank of the communicator calls it, with the same role and tensor; connected, and with no sync in progress. Errors:
/// RS_ERR_INVALID, RS_ERR_NOT_FOUND (a tensor that no rank has, or none in that role), RS_ERR_MISMATCH (ranks hold the same part of a
/// tensor with different bytes: names it; or other arguments on some rank), RS_ERR_UNSUPPORTED (a tensor whose targets have several
/// dtypes; a device of the caller's), RS_ERR_STATE (also: GPU memory that it reads is gone), RS_ERR_BUSY, and the fatal ones.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn rs_fingerprint(
    container: *mut rs_container_t,
    role: u32,
    tensor: *const c_char,
    out: *mut u8,
) -> rs_status_t {
    // SAFETY: what the comment asks of the caller.
    call(|| unsafe {
        let (tensor, out) = (read::optional_text(tensor, "tensor")?, Out::new(out.cast::<[u8; 16]>(), "out")?);
        out.put(Handle::of(container)?.write(|c| c.container.fingerprint(role, tensor))?);
        Ok(())
    })
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
///   has link_gb_per_s), "relayed" ("egress", "ingress" and "seconds" where all targets have RS_CONFIG_RELAY)}.
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
