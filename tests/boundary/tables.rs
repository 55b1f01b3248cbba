//! Tables, handles and calls as a C program would have them, with less to write.

use reshard::abi::*;
use reshard::ffi::api::*;
use std::ffi::{CStr, CString, c_char};
use std::mem::zeroed;
use std::ptr;
use std::sync::atomic::{AtomicU64, Ordering};

/// A struct of zeros with its size set.
pub fn sized<T: Copy>() -> T {
    // SAFETY: the structs of `abi` hold integers, pointers and optional functions, and those that grow start with their size.
    unsafe {
        let mut out: T = zeroed();
        (&raw mut out).cast::<usize>().write(size_of::<T>());
        out
    }
}

/// This thread's last error.
pub fn last() -> String {
    // SAFETY: NUL-terminated, of this thread.
    unsafe { CStr::from_ptr(rs_last_error()) }.to_str().expect("UTF-8").to_string()
}

/// A call that must succeed.
#[track_caller]
pub fn ok(status: rs_status_t) {
    assert_eq!(status, RS_OK, "{}", last());
}

/// A call that must fail so, with these words in its text.
#[track_caller]
pub fn fails(status: rs_status_t, expected: rs_status_t, words: &[&str]) {
    let text = last();
    assert_eq!(status, expected, "{text}");
    for word in words {
        assert!(text.contains(word), "'{word}' is not in: {text}");
    }
}

/// First entries of an array of RS_MAX_RANK.
pub fn dims(values: &[i64]) -> [i64; RS_MAX_RANK] {
    let mut out = [0; RS_MAX_RANK];
    out[..values.len()].copy_from_slice(values);
    out
}

pub const F32: rs_dtype_t = rs_dtype_t { code: 2, bits: 32, lanes: 1 };

/// One rank's tables; names live as long as they do.
#[derive(Default)]
pub struct Tables {
    names: Vec<CString>,
    pub tensors: Vec<rs_tensor_t>,
    pub buffers: Vec<rs_buffer_t>,
    pub tiles: Vec<rs_tile_t>,
}

impl Tables {
    fn name(&mut self, name: &str) -> *const c_char {
        self.names.push(CString::new(name).unwrap());
        // A CString's bytes stay where they are.
        self.names.last().unwrap().as_ptr()
    }

    pub fn tensor(&mut self, name: &str, shape: &[i64]) -> u32 {
        let name = self.name(name);
        self.tensors.push(rs_tensor_t { name, rank: shape.len() as u32, reserved: 0, shape: dims(shape) });
        self.tensors.len() as u32 - 1
    }

    /// A dense buffer of `memory`.
    pub fn buffer(&mut self, name: &str, memory: &mut [f32], role: u32, shape: &[i64]) -> u32 {
        let name = self.name(name);
        let strides: Vec<i64> = (0..shape.len()).map(|i| shape[i + 1..].iter().product()).collect();
        self.buffers.push(rs_buffer_t {
            name,
            data: memory.as_mut_ptr().cast(),
            size_bytes: size_of_val(memory) as u64,
            device_type: RS_DEVICE_CPU,
            device_id: 0,
            role,
            flags: 0,
            dtype: F32,
            ndim: shape.len() as u32,
            shape: dims(shape),
            strides: dims(&strides),
        });
        self.buffers.len() as u32 - 1
    }

    /// A box of a tensor, seen through its own shape.
    pub fn tile(&mut self, tensor: u32, buffer: u32, origin: &[i64], extent: &[i64], stride: &[i64]) -> &mut rs_tile_t {
        let t = &self.tensors[tensor as usize];
        self.tiles.push(rs_tile_t {
            tensor,
            buffer,
            rank: t.rank,
            transform: RS_TRANSFORM_NONE,
            byte_offset: 0,
            view: t.shape,
            origin: dims(origin),
            extent: dims(extent),
            stride: dims(stride),
        });
        self.tiles.last_mut().unwrap()
    }

    pub fn layout(&self) -> rs_layout_t {
        rs_layout_t {
            struct_size: size_of::<rs_layout_t>(),
            tensors: self.tensors.as_ptr(),
            tensor_count: self.tensors.len(),
            tensor_size: size_of::<rs_tensor_t>(),
            buffers: self.buffers.as_ptr(),
            buffer_count: self.buffers.len(),
            buffer_size: size_of::<rs_buffer_t>(),
            tiles: self.tiles.as_ptr(),
            tile_count: self.tiles.len(),
            tile_size: size_of::<rs_tile_t>(),
        }
    }
}

pub fn config(comm: *mut rs_comm_t) -> rs_config_t {
    rs_config_t { abi: RS_ABI, comm, timeout_ms: 20_000, ..sized() }
}

/// A container that destroys itself.
pub struct Container(pub *mut rs_container_t);

// SAFETY: the header lets any thread use a handle.
unsafe impl Send for Container {}
// SAFETY: as above; a second thread gets RS_ERR_BUSY.
unsafe impl Sync for Container {}

impl Container {
    #[track_caller]
    pub fn new(config: &rs_config_t, tables: &Tables) -> Container {
        let mut out = ptr::null_mut();
        // SAFETY: whole structs; the tests keep their memory.
        ok(unsafe { rs_container_create(config, &tables.layout(), &mut out) });
        Container(out)
    }

    pub fn connect(&self) -> rs_status_t {
        // SAFETY: a live handle, here and below.
        unsafe { rs_container_connect(self.0) }
    }

    pub fn sync(&self, version: u64) -> rs_status_t {
        self.sync_as(&rs_sync_t { version, ..sized() })
    }

    pub fn sync_as(&self, request: &rs_sync_t) -> rs_status_t {
        // SAFETY: as above.
        unsafe { rs_sync_weights(self.0, request) }
    }

    pub fn param(&self, name: &CStr, out: &mut rs_param_t) -> rs_status_t {
        // SAFETY: as above.
        unsafe { rs_get_param(self.0, name.as_ptr(), out) }
    }
}

impl Drop for Container {
    fn drop(&mut self) {
        // SAFETY: created by a test, destroyed here.
        unsafe { rs_container_destroy(self.0) }
    }
}

/// A hub number that no other test has.
pub fn hub() -> u64 {
    static NEXT: AtomicU64 = AtomicU64::new(1);
    NEXT.fetch_add(1, Ordering::Relaxed)
}

pub fn loopback(hub: u64, rank: i32, world: i32) -> *mut rs_comm_t {
    let mut out = ptr::null_mut();
    // SAFETY: a place for the result.
    ok(unsafe { rs_comm_loopback(hub, rank, world, &mut out) });
    out
}

/// Runs a rank of a loopback world on each of `world` threads, with a communicator that is given back afterwards.
pub fn world(world: i32, rank: impl Fn(i32, *mut rs_comm_t) + Sync) {
    let hub = hub();
    std::thread::scope(|s| {
        let ranks: Vec<_> = (0..world)
            .map(|r| {
                let rank = &rank;
                s.spawn(move || {
                    let comm = loopback(hub, r, world);
                    rank(r, comm);
                    // SAFETY: made above, not used any more.
                    unsafe { rs_comm_destroy(comm) };
                })
            })
            .collect();
        for r in ranks {
            r.join().unwrap();
        }
    });
}
