//! Structs that say their own size, and tables that say that of their rows: shorter and longer than this library's, with any numbers in
//! them. What the header asks of a caller holds: sizes are those of the memory, pointers are good or NULL.
#![no_main]

use libfuzzer_sys::fuzz_target;
use reshard::abi::*;
use reshard::ffi::api::*;
use reshard_fuzz::peers::{Peers, comm, ops};
use reshard_fuzz::{Input, bytes, describe, ok, sized, within_budget};
use std::ffi::{CStr, c_char, c_void};
use std::ptr::{self, null, null_mut};

fuzz_target!(|data: &[u8]| within_budget(data.len(), || one(&mut Input(data))));

/// Texts that a pointer may lead to.
const TEXTS: [&CStr; 5] = [c"w", c"model.layers.0.self_attn.q_proj.weight", c"", c"model.*", c"\xff\xfe"];

/// A text, or NULL.
fn text(input: &mut Input<'_>) -> *const c_char {
    TEXTS.get(usize::from(input.byte() % 6)).map_or(null(), |t| t.as_ptr())
}

/// A struct in memory of its own, as long as it says.
struct Own<T> {
    memory: Vec<u64>,
    of: std::marker::PhantomData<T>,
}

impl<T: Copy> Own<T> {
    /// `value` with the fuzzer's changes to its bytes, cut or lengthened; `mend` makes its pointers good again.
    fn new(input: &mut Input<'_>, value: T, mend: impl Fn(&mut Input<'_>, &mut T)) -> Own<T> {
        let size = size_of::<T>();
        let says = match input.byte() {
            0..=127 => size,
            128..=199 => size + usize::from(input.byte()),
            n @ 200..=239 => size - usize::from(n - 200).min(size),
            n => usize::from(n - 240),
        };
        let mut memory = vec![0u64; says.max(size).div_ceil(8) + 1];
        // SAFETY: memory of at least the size of `T`, aligned to 8 as the structs of the interface are; any bytes are a `T` but for its
        // pointers, which `mend` sets.
        unsafe {
            memory.as_mut_ptr().cast::<T>().write(value);
            let all = std::slice::from_raw_parts_mut(memory.as_mut_ptr().cast::<u8>(), says.max(size));
            for _ in 0..input.byte() % 8 {
                // Beyond the size, or a number in the middle.
                let at = 8 + usize::from(input.byte()) % (all.len() - 8).max(1);
                let number = input.number().to_le_bytes();
                let n = (1usize << (input.byte() % 4)).min(all.len().saturating_sub(at));
                all[at..at + n].copy_from_slice(&number[..n]);
            }
            mend(input, &mut *memory.as_mut_ptr().cast::<T>());
            memory.as_mut_ptr().cast::<usize>().write(says);
        }
        Own { memory, of: std::marker::PhantomData }
    }

    fn get(&self) -> *const T {
        self.memory.as_ptr().cast()
    }

    fn get_mut(&mut self) -> *mut T {
        self.memory.as_mut_ptr().cast()
    }
}

/// A table of up to eight rows with a row size that need not be this library's.
struct Table {
    memory: Vec<u64>,
    count: usize,
    row: usize,
}

impl Table {
    /// `mend`: as of a struct, for rows that are long enough to have all pointers; shorter ones get none of the fuzzer's changes.
    fn new<T: Copy>(input: &mut Input<'_>, value: T, mend: impl Fn(&mut Input<'_>, &mut T)) -> Table {
        let size = size_of::<T>();
        let count = usize::from(input.byte() % 8);
        let row = match input.byte() {
            0..=199 => size,
            n @ 200..=229 => size + 8 * usize::from(n - 199),
            n => size.saturating_sub(8 * usize::from(n - 229)),
        };
        let mut memory = vec![0u64; (count * row).div_ceil(8) + size / 8 + 1];
        for i in 0..count {
            let one = Own::new(input, value, &mend);
            // SAFETY: room for each row and one more; `value` is plain bytes. The size at its start is that of no row's first member.
            unsafe {
                let to = memory.as_mut_ptr().cast::<u8>().add(i * row);
                let mut row_value = *one.get();
                mend(input, &mut row_value);
                to.copy_from_nonoverlapping(ptr::from_ref(&row_value).cast(), row.min(size));
            }
        }
        Table { memory, count, row }
    }
}

fn one(input: &mut Input<'_>) {
    let peers = Peers::new(&[]);
    let mut weights = [0u64; 64];
    let data: *mut c_void = weights.as_mut_ptr().cast();
    match input.byte() % 6 {
        0 | 1 => {
            let tensors = Table::new(
                input,
                rs_tensor_t { name: c"w".as_ptr(), rank: 2, reserved: 0, shape: [8; RS_MAX_RANK] },
                |input, t| t.name = text(input),
            );
            let buffer = rs_buffer_t {
                name: c"p".as_ptr(),
                data,
                size_bytes: 256,
                device_type: RS_DEVICE_CPU,
                device_id: 0,
                role: RS_TARGET,
                flags: 0,
                dtype: rs_dtype_t { code: 2, bits: 32, lanes: 1 },
                ndim: 2,
                shape: [8; RS_MAX_RANK],
                strides: [8, 1, 0, 0, 0, 0, 0, 0],
            };
            let buffers = Table::new(input, buffer, |input, b| {
                (b.name, b.data) = (text(input), if input.byte() == 0 { null_mut() } else { data })
            });
            let tile = rs_tile_t {
                tensor: 0,
                buffer: 0,
                rank: 2,
                transform: 0,
                byte_offset: 0,
                view: [8; RS_MAX_RANK],
                origin: [0; RS_MAX_RANK],
                extent: [8; RS_MAX_RANK],
                stride: [8, 1, 0, 0, 0, 0, 0, 0],
            };
            // What stands where a struct has its size.
            let tiles = Table::new(input, tile, |input, t| {
                (t.tensor, t.buffer) = (u32::from(input.byte() % 3), u32::from(input.byte() % 3))
            });
            let layout = Own::new(input, sized::<rs_layout_t>(), |_, l| {
                (l.tensors, l.tensor_count, l.tensor_size) = (tensors.memory.as_ptr().cast(), tensors.count, tensors.row);
                (l.buffers, l.buffer_count, l.buffer_size) = (buffers.memory.as_ptr().cast(), buffers.count, buffers.row);
                (l.tiles, l.tile_count, l.tile_size) = (tiles.memory.as_ptr().cast(), tiles.count, tiles.row);
            });
            let comm = comm(&peers, 0);
            let config = Own::new(input, rs_config_t { abi: RS_ABI, comm, timeout_ms: 10, ..sized() }, |input, c| {
                (c.comm, c.device, c.preset, c.staging, c.name) = (comm, null(), null(), null_mut(), text(input));
                c.flags &= !RS_CONFIG_WATCHDOG;
            });
            let mut out = null_mut();
            // SAFETY: memory as long as it says it is, good pointers; nothing is moved, so that the weights' sizes are only numbers.
            unsafe {
                if ok(rs_container_create(config.get(), layout.get(), &mut out)) {
                    let names = [text(input), text(input), c"w".as_ptr()];
                    let sync = Own::new(input, rs_sync_t { version: 1, ..sized() }, |input, s| {
                        (s.stream, s.progress, s.progress_user) = (null_mut(), None, null_mut());
                        (s.only, s.only_count) = (names.as_ptr(), usize::from(input.byte() % 4));
                    });
                    ok(rs_sync_weights(out, sync.get()));
                    let mut param = Own::new(input, sized::<rs_param_t>(), |_, _| {});
                    ok(rs_get_param(out, text(input), param.get_mut()));
                    ok(rs_get_param_at(out, input.number() as usize, param.get_mut()));
                    describe(out);
                    bytes(|buf, cap, len| rs_container_export(out, buf.cast(), cap, len));
                    rs_container_destroy(out);
                }
                rs_comm_destroy(comm);
            }
        }
        2 => {
            let local = Own::new(input, rs_comm_local_t { world: 1, ..sized() }, |input, l| {
                // Others do not come.
                (l.name, l.timeout_ms) = (text(input), 1);
                l.world = l.world.min(3);
            });
            let mut out = null_mut();
            // SAFETY: as above.
            unsafe {
                if ok(rs_comm_local(local.get(), &mut out)) {
                    rs_comm_destroy(out);
                }
            }
        }
        3 => {
            let good = ops(&peers, 0);
            let custom = Own::new(input, good, |input, o| {
                let bits = input.byte();
                (o.ctx, o.release, o.abort) = (good.ctx, None, None);
                o.allgather = good.allgather.filter(|_| bits & 1 == 0);
                o.group_begin = good.group_begin.filter(|_| bits & 2 == 0);
                o.group_end = good.group_end.filter(|_| bits & 4 == 0);
                o.send = good.send.filter(|_| bits & 8 == 0);
                o.recv = good.recv.filter(|_| bits & 16 == 0);
                o.poll = good.poll.filter(|_| bits & 32 == 0);
            });
            let mut out = null_mut();
            // SAFETY: as above.
            unsafe {
                if ok(rs_comm_custom(custom.get(), &mut out)) {
                    rs_comm_destroy(out);
                }
            }
        }
        _ => {
            const SPEC: &CStr =
                c"{\"model\": {\"architectures\": [\"LlamaForCausalLM\"], \"hidden_size\": 8, \"num_hidden_layers\": 1, \
                \"num_attention_heads\": 2, \"num_key_value_heads\": 2, \"intermediate_size\": 16, \"vocab_size\": 8}, \
                \"source\": {\"framework\": \"hf\", \"ranks\": [0]}, \"target\": {\"framework\": \"vllm\", \"ranks\": [0]}}";
            let shapes = [[8i64; RS_MAX_RANK], [input.number(); RS_MAX_RANK]];
            let mut preset = null_mut();
            // SAFETY: as above; the shapes have room for the most axes.
            unsafe {
                assert!(ok(rs_preset_create(SPEC.as_ptr(), 0, &mut preset)));
                for _ in 0..4 {
                    let bind = Own::new(
                        input,
                        rs_bind_t { role: RS_SOURCE, device_type: RS_DEVICE_CPU, size_bytes: 128, ndim: 1, ..sized() },
                        |input, b| {
                            let names = [c"model.norm.weight", c"lm_head.weight", c"model.norm"];
                            (b.name, b.data) = (names[usize::from(input.byte() % 3)].as_ptr(), data);
                            b.shape = shapes[usize::from(input.byte() % 2)].as_ptr();
                            b.strides = if input.byte() % 2 == 0 { null() } else { shapes[usize::from(input.byte() % 2)].as_ptr() };
                        },
                    );
                    ok(rs_preset_bind(preset, bind.get()));
                }
                let mut layout = Own::new(input, sized::<rs_layout_t>(), |_, _| {});
                ok(rs_preset_layout(preset, layout.get_mut()));
                rs_preset_destroy(preset);
            }
        }
    }
}
