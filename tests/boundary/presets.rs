//! Presets at the boundary: NULL, sizes of structs, who may be inside at once. What specs and bindings must be refused, and the bytes that
//! they move, `tests/presets` tests through Python.

use crate::tables::*;
use reshard::abi::*;
use reshard::ffi::api::*;
use std::ffi::{CStr, c_char};
use std::ptr::{self, null, null_mut};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering::Relaxed};

const SPEC: &CStr = cr#"{"model": {"architectures": ["LlamaForCausalLM"], "hidden_size": 4, "num_hidden_layers": 1,
    "num_attention_heads": 2, "intermediate_size": 6, "vocab_size": 8, "tie_word_embeddings": true, "dtype": "float32"},
    "source": {"framework": "hf", "ranks": [0]}, "target": {"framework": "vllm", "ranks": "1"}}"#;

/// Names and shapes of the whole model.
const PARAMS: [(&CStr, &[i64]); 11] = [
    (c"model.embed_tokens.weight", &[8, 4]),
    (c"model.layers.0.input_layernorm.weight", &[4]),
    (c"model.layers.0.self_attn.q_proj.weight", &[4, 4]),
    (c"model.layers.0.self_attn.k_proj.weight", &[4, 4]),
    (c"model.layers.0.self_attn.v_proj.weight", &[4, 4]),
    (c"model.layers.0.self_attn.o_proj.weight", &[4, 4]),
    (c"model.layers.0.post_attention_layernorm.weight", &[4]),
    (c"model.layers.0.mlp.gate_proj.weight", &[6, 4]),
    (c"model.layers.0.mlp.up_proj.weight", &[6, 4]),
    (c"model.layers.0.mlp.down_proj.weight", &[4, 6]),
    (c"model.norm.weight", &[4]),
];

struct Preset {
    handle: *mut rs_preset_t,
    memory: Vec<f32>,
}

impl Preset {
    fn new() -> Preset {
        let mut handle = null_mut();
        // SAFETY: a string, and a place for the result.
        ok(unsafe { rs_preset_create(SPEC.as_ptr(), 0, &mut handle) });
        Preset { handle, memory: vec![1.0; 32] }
    }

    /// A binding of a parameter; all share one memory, as sources may.
    fn row(&self, param: usize) -> rs_bind_t {
        let (name, shape) = PARAMS[param];
        rs_bind_t {
            name: name.as_ptr(),
            role: RS_SOURCE,
            data: self.memory.as_ptr().cast_mut().cast(),
            size_bytes: 128,
            device_type: RS_DEVICE_CPU,
            dtype: F32,
            ndim: shape.len() as u32,
            shape: shape.as_ptr(),
            ..sized()
        }
    }

    fn bind_all(&self) {
        for param in 0..PARAMS.len() {
            // SAFETY: a whole struct; the memory lives as long as this preset.
            ok(unsafe { rs_preset_bind(self.handle, &self.row(param)) });
        }
    }
}

impl Drop for Preset {
    fn drop(&mut self) {
        // SAFETY: its last use.
        unsafe { rs_preset_destroy(self.handle) };
    }
}

#[test]
fn null_everywhere() {
    let p = Preset::new();
    let (mut out, mut layout, mut len) = (null_mut(), sized::<rs_layout_t>(), 0);
    // SAFETY: the structs are whole, and NULL is what is tested.
    unsafe {
        let invalid = |status, word: &str| fails(status, RS_ERR_INVALID, &[word, "NULL"]);
        invalid(rs_preset_create(null(), 0, &mut out), "spec_json");
        invalid(rs_preset_create(SPEC.as_ptr(), 0, null_mut()), "out");
        invalid(rs_preset_bind(null_mut(), &p.row(0)), "preset");
        invalid(rs_preset_bind(p.handle, null()), "bind");
        invalid(rs_preset_bind(p.handle, &rs_bind_t { name: null(), ..p.row(0) }), "bind.name");
        invalid(rs_preset_bind(p.handle, &rs_bind_t { shape: null(), ..p.row(0) }), "bind.shape");
        invalid(rs_preset_bind(p.handle, &rs_bind_t { data: null_mut(), ..p.row(0) }), "data");
        let lora = rs_bind_t { name: c"model.layers.0.self_attn.q_proj.lora_A.weight".as_ptr(), ..p.row(0) };
        fails(rs_preset_bind(p.handle, &lora), RS_ERR_UNSUPPORTED, &["lora_A", "merge"]);
        invalid(rs_preset_layout(null(), &mut layout), "preset");
        invalid(rs_preset_layout(p.handle, null_mut()), "out");
        invalid(rs_preset_describe(null(), RS_DESCRIBE_LAYOUT, null_mut(), 0, &mut len), "preset");
        invalid(rs_preset_describe(p.handle, RS_DESCRIBE_LAYOUT, null_mut(), 8, &mut len), "buf");
        invalid(rs_preset_describe(p.handle, RS_DESCRIBE_LAYOUT, null_mut(), 0, null_mut()), "len");
        fails(rs_preset_describe(p.handle, RS_DESCRIBE_STATS, null_mut(), 0, &mut len), RS_ERR_INVALID, &["what is 2"]);
        rs_preset_destroy(null_mut());
    }
    assert!(out.is_null(), "written on success only");
}

#[test]
fn bindings_of_other_sizes() {
    #[repr(C)]
    struct Longer(rs_bind_t, u64);
    let p = Preset::new();
    let bind = |row: &Longer| {
        // SAFETY: it is as long as it says.
        unsafe { rs_preset_bind(p.handle, (&raw const *row).cast()) }
    };
    let longer = |tail| Longer(rs_bind_t { struct_size: size_of::<Longer>(), ..p.row(0) }, tail);
    ok(bind(&longer(0)));
    fails(bind(&longer(1)), RS_ERR_UNKNOWN_FIELD, &["byte 72"]);
    // Shorter than `strides`, the last member: as if it were NULL, whatever lies there.
    let strides = ptr::without_provenance(8);
    ok(bind(&Longer(rs_bind_t { struct_size: size_of::<rs_bind_t>() - 8, strides, ..p.row(0) }, 0)));
    fails(bind(&Longer(rs_bind_t { struct_size: 7, ..p.row(0) }, 0)), RS_ERR_INVALID, &["struct_size"]);
    fails(bind(&Longer(rs_bind_t { ndim: 9, ..p.row(0) }, 0)), RS_ERR_INVALID, &["ndim", "9"]);
}

#[test]
fn a_layout_is_borrowed_and_a_container_is_not() {
    let p = Preset::new();
    let mut layout = sized::<rs_layout_t>();
    let mut container = null_mut();
    let missing = ["11 parameters are not bound", "'model.norm.weight'"];
    // SAFETY: whole structs; the tables are read before the next bind.
    unsafe {
        fails(rs_preset_layout(p.handle, &mut layout), RS_ERR_STATE, &missing);
        let from_preset = rs_config_t { preset: p.handle, ..config(null_mut()) };
        fails(rs_container_create(&from_preset, null(), &mut container), RS_ERR_STATE, &missing);
        p.bind_all();
        ok(rs_preset_layout(p.handle, &mut layout));
        assert_eq!((layout.struct_size, layout.buffer_count, layout.tensor_count), (size_of::<rs_layout_t>(), 11, 11));
        let first = std::slice::from_raw_parts(layout.buffers, layout.buffer_count)[0];
        assert_eq!((CStr::from_ptr(first.name), first.role, first.data), (PARAMS[0].0, RS_SOURCE, p.row(0).data));
        let mut again = sized::<rs_layout_t>();
        ok(rs_preset_layout(p.handle, &mut again));
        assert_eq!(again.buffers, layout.buffers, "until the next bind");

        ok(rs_container_create(&from_preset, null(), &mut container));
        let mut param = sized::<rs_param_t>();
        ok(rs_get_param(container, PARAMS[9].0.as_ptr(), &mut param));
        assert_eq!((std::slice::from_raw_parts(param.shape, 2), param.state), (&[4i64, 6][..], RS_PARAM_INITIAL));
        let mut comm = null_mut();
        ok(rs_comm_loopback(hub(), 0, 1, &mut comm));
        ok(rs_container_set_comm(container, comm));
        fails(rs_container_import(container, c"x".as_ptr().cast(), 1), RS_ERR_STATE, &["world spec"]);
        // The spec has a rank 1, the communicator has not.
        fails(rs_container_connect(container), RS_ERR_MISMATCH, &["ranks up to 1", "1 ranks"]);
        rs_container_destroy(container);
        rs_comm_destroy(comm);
    }
}

/// One binds, others read: each call is served or told that it is busy, and none sees half of a binding.
#[test]
fn threads_on_one_preset() {
    struct Shared(*mut rs_preset_t);
    // SAFETY: what the header promises of a handle, and this test checks.
    unsafe impl Sync for Shared {}
    let p = Preset::new();
    p.bind_all();
    let shared = Shared(p.handle);
    let (done, served) = (AtomicBool::new(false), AtomicUsize::new(0));
    let expected = |status| assert!(matches!(status, RS_OK | RS_ERR_BUSY), "{status}: {}", last());
    std::thread::scope(|scope| {
        for _ in 0..3 {
            let (shared, done, served) = (&shared, &done, &served);
            scope.spawn(move || {
                let mut text: Vec<c_char> = vec![0; 1 << 16];
                while !done.load(Relaxed) {
                    let mut len = 0;
                    // SAFETY: a buffer of that length.
                    let status =
                        unsafe { rs_preset_describe(shared.0, RS_DESCRIBE_LAYOUT, text.as_mut_ptr(), text.len(), &mut len) };
                    expected(status);
                    served.fetch_add(usize::from(status == RS_OK), Relaxed);
                }
            });
        }
        while served.load(Relaxed) < 50 {
            // SAFETY: a whole struct; the memory lives as long as this preset.
            expected(unsafe { rs_preset_bind(p.handle, &p.row(0)) });
        }
        done.store(true, Relaxed);
    });
}
