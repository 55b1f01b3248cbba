//! The library as a C caller sees it: rows of tables, handles, statuses and texts. Only the exported functions are used.

use super::gpu::{self, Block, HOST, Kind};
use super::model::{Case, Rank};
use super::nccl::{self, Lent};
use reshard::abi::*;
use reshard::ffi::api::*;
use std::ffi::{CStr, CString, c_char, c_void};
use std::ptr::{null, null_mut};

/// A call that failed.
#[derive(Clone, Debug)]
pub struct Failure {
    pub status: rs_status_t,
    pub text: String,
}

impl std::fmt::Display for Failure {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "status {}: {}", self.status, self.text)
    }
}

/// The status of a call that gives weights to the library; the thread's GPU context must be the one that it was before.
fn restoring(call: impl FnOnce() -> rs_status_t) -> Result<(), Failure> {
    let before = gpu::current();
    let result = checked(call());
    assert_eq!(gpu::current(), before, "another GPU context is current after the call");
    result
}

/// The same for a call that may leave something in progress: whether it has ended.
fn ended(call: impl FnOnce() -> rs_status_t) -> Result<bool, Failure> {
    let mut under_way = false;
    restoring(|| match call() {
        RS_IN_PROGRESS => {
            under_way = true;
            RS_OK
        }
        status => status,
    })?;
    Ok(!under_way)
}

/// The call's status; its text must be there where it failed.
fn checked(status: rs_status_t) -> Result<(), Failure> {
    if status == RS_OK {
        return Ok(());
    }
    // SAFETY: the library returns a NUL-terminated text, valid until this thread's next failing call.
    let text = unsafe { CStr::from_ptr(rs_last_error()) }.to_string_lossy().into_owned();
    assert!(!text.is_empty(), "status {status} without a text");
    Err(Failure { status, text })
}

/// A rank's three tables, with addresses, as C rows. `layout` borrows from it.
pub struct Tables {
    /// Where the weights lie.
    kind: Kind,
    _names: Vec<CString>,
    tensors: Vec<rs_tensor_t>,
    buffers: Vec<rs_buffer_t>,
    tiles: Vec<rs_tile_t>,
}

/// The first entries of a C array; what lies past them must not matter.
fn array(values: &[i64]) -> [i64; RS_MAX_RANK] {
    let mut out = [-77; RS_MAX_RANK];
    out[..values.len()].copy_from_slice(values);
    out
}

// SAFETY: once made, the rows are only read.
unsafe impl Sync for Tables {}

impl Tables {
    /// `address` gives each buffer's data pointer, by its row.
    pub fn new(case: &Case, rank: &Rank, kind: Kind, mut address: impl FnMut(usize) -> *mut u8) -> Tables {
        let (device_type, device_id) = kind;
        let mut names = Vec::new();
        let mut name = |text: &str| {
            names.push(CString::new(text).expect("no NUL in a name"));
            names[names.len() - 1].as_ptr()
        };
        let tensors = rank.listed.iter().map(|&t| {
            let shape = &case.tensors[t].shape;
            rs_tensor_t { name: name(&case.tensors[t].name), rank: shape.len() as u32, reserved: 0, shape: array(shape) }
        });
        let tensors = tensors.collect();
        let buffers = rank.buffers.iter().enumerate().map(|(row, b)| rs_buffer_t {
            name: name(&b.name),
            data: address(row).cast(),
            size_bytes: b.bytes as u64,
            device_type,
            device_id,
            role: b.role,
            flags: if b.padded { RS_BUFFER_PADDED } else { 0 },
            dtype: b.dtype,
            ndim: b.shape.len() as u32,
            shape: array(&b.shape),
            strides: array(&b.strides),
        });
        let buffers = buffers.collect();
        let tiles = rank.tiles.iter().map(|t| rs_tile_t {
            tensor: rank.listed.iter().position(|&l| l == t.tensor).map_or(u32::MAX, |row| row as u32),
            buffer: t.buffer as u32,
            rank: t.view.len() as u32,
            transform: t.transform,
            byte_offset: t.byte_offset,
            view: array(&t.view),
            origin: array(&t.origin),
            extent: array(&t.extent),
            stride: array(&t.stride),
        });
        let tiles = tiles.collect();
        Tables { kind, _names: names, tensors, buffers, tiles }
    }

    fn layout(&self) -> rs_layout_t {
        fn start<T>(rows: &[T]) -> *const T {
            if rows.is_empty() { null() } else { rows.as_ptr() }
        }
        rs_layout_t {
            struct_size: size_of::<rs_layout_t>(),
            tensors: start(&self.tensors),
            tensor_count: self.tensors.len(),
            tensor_size: size_of::<rs_tensor_t>(),
            buffers: start(&self.buffers),
            buffer_count: self.buffers.len(),
            buffer_size: size_of::<rs_buffer_t>(),
            tiles: start(&self.tiles),
            tile_count: self.tiles.len(),
            tile_size: size_of::<rs_tile_t>(),
        }
    }
}

/// A communicator handle.
pub struct Comm(*mut rs_comm_t);

// SAFETY: the header lets a handle be used from any thread, one at a time, and shared by several containers.
unsafe impl Send for Comm {}
// SAFETY: as above; through a shared reference it is only handed on.
unsafe impl Sync for Comm {}

impl Comm {
    pub fn loopback(hub: u64, rank: usize, world: usize) -> Result<Comm, Failure> {
        let mut out = null_mut();
        // SAFETY: `out` is a valid place for a handle.
        checked(unsafe { rs_comm_loopback(hub, rank as i32, world as i32, &mut out) })?;
        Ok(Comm(out))
    }

    pub fn local(name: &str, rank: usize, world: usize, flags: u32, timeout_ms: u32) -> Result<Comm, Failure> {
        let name = CString::new(name).expect("no NUL");
        let (struct_size, rank, world) = (size_of::<rs_comm_local_t>(), rank as i32, world as i32);
        let local = rs_comm_local_t { struct_size, name: name.as_ptr(), rank, world, timeout_ms, flags };
        let mut out = null_mut();
        // SAFETY: a whole struct with a NUL-terminated name; `out` is a valid place for a handle.
        checked(unsafe { rs_comm_local(&local, &mut out) })?;
        Ok(Comm(out))
    }

    /// Of two, which it keeps.
    pub fn composite(near: &Comm, wide: &Comm) -> Result<Comm, Failure> {
        let mut out = null_mut();
        // SAFETY: live handles; `out` is a valid place for a handle.
        checked(unsafe { rs_comm_composite(near.0, wide.0, &mut out) })?;
        Ok(Comm(out))
    }

    /// `address`: where rank 0 listens.
    pub fn nixl(address: &str, rank: usize, world: usize) -> Result<Comm, Failure> {
        let library = std::env::var("RESHARD_NIXL").expect("the path of libnixl_capi.so");
        let config = CString::new(format!(r#"{{"address": "{address}", "library": "{library}"}}"#)).expect("no NUL");
        let mut out = null_mut();
        // SAFETY: a NUL-terminated text; `out` is a valid place for a handle.
        checked(unsafe { rs_comm_nixl(config.as_ptr(), rank as i32, world as i32, &mut out) })?;
        Ok(Comm(out))
    }

    /// For the GPU that is current.
    pub fn nccl(id: &nccl::Id, rank: usize, world: usize) -> Result<Comm, Failure> {
        let (id, mut out) = (nccl::bytes(id), null_mut());
        // SAFETY: so many bytes of an id; `out` is a valid place for a handle.
        checked(unsafe { rs_comm_nccl_init(id.as_ptr().cast(), id.len(), rank as i32, world as i32, &mut out) })?;
        Ok(Comm(out))
    }

    /// `lent` outlives it and the containers that use it.
    pub fn from_nccl(lent: &Lent) -> Result<Comm, Failure> {
        let mut out = null_mut();
        // SAFETY: a live communicator, by this function's contract; `out` is a valid place for a handle.
        checked(unsafe { rs_comm_from_nccl(lent.raw(), &mut out) })?;
        Ok(Comm(out))
    }

    /// `ops` comes from [`super::mailbox::Hub::ops`].
    pub fn custom(ops: &rs_comm_ops_t) -> Result<Comm, Failure> {
        let mut out = null_mut();
        // SAFETY: a whole struct whose functions keep the header's promises; `out` is a valid place for a handle.
        checked(unsafe { rs_comm_custom(ops, &mut out) })?;
        Ok(Comm(out))
    }
}

impl Drop for Comm {
    fn drop(&mut self) {
        // SAFETY: the handle is live and dropped once.
        unsafe { rs_comm_destroy(self.0) }
    }
}

/// A container handle.
pub struct Container {
    handle: *mut rs_container_t,
    /// Where its syncs are put.
    pub stream: *mut c_void,
    /// The GPU that copies.
    pub gpu: Option<i32>,
    /// Of its syncs; 0: that of its creation.
    pub timeout_ms: u32,
    /// RS_SYNC_* of its syncs.
    pub flags: u32,
    /// The staging that it was lent.
    staging: Option<Lending>,
}

/// Memory for staging between two fences.
struct Lending {
    block: Block,
    at: usize,
    len: usize,
}

impl Lending {
    const FENCE: usize = 512;

    fn new(kind: Kind, len: usize) -> Lending {
        // Pinned memory is not a GPU's own.
        let kind = if kind == HOST { HOST } else { (RS_DEVICE_CUDA, kind.1) };
        let block = Block::new(kind, &vec![0xee; len + 2 * Self::FENCE]);
        // The library puts nothing behind what is on this stream.
        drop(block.read());
        let at = (block.at(Self::FENCE) as usize).next_multiple_of(256) - block.at(0) as usize;
        Lending { block, at, len }
    }

    fn whole(&self) -> bool {
        let bytes = self.block.read();
        bytes[..self.at].iter().chain(&bytes[self.at + self.len..]).all(|&b| b == 0xee)
    }
}

// SAFETY: the header lets a handle be used from any thread, one at a time.
unsafe impl Send for Container {}

/// What rs_get_param tells, as far as it is compared.
#[derive(Debug, PartialEq, Eq)]
pub struct Param {
    pub data: usize,
    pub role: u32,
    pub state: u32,
    pub version: u64,
}

impl Param {
    fn told(call: impl FnOnce(&mut rs_param_t) -> rs_status_t) -> Result<Param, Failure> {
        // SAFETY: a struct of integers and pointers; all zeros is a value of it.
        let mut out: rs_param_t = unsafe { std::mem::zeroed() };
        out.struct_size = size_of::<rs_param_t>();
        checked(call(&mut out))?;
        Ok(Param { data: out.data as usize, role: out.role, state: out.state, version: out.version })
    }
}

/// See [`Container::aborter`].
pub struct Aborter(*const rs_container_t);

// SAFETY: the header lets abort be called from any thread at any time.
unsafe impl Send for Aborter {}

impl Aborter {
    pub fn abort(self) {
        // SAFETY: the container outlives this value, as Container::aborter asks.
        let status = unsafe { rs_container_abort(self.0) };
        assert_eq!(status, RS_OK);
    }
}

impl Container {
    pub fn create(rank: &Rank, tables: &Tables, comm: &Comm, timeout_ms: u32) -> Result<Container, Failure> {
        let staging = rank.lends.then(|| Lending::new(tables.kind, rank.staging as usize));
        let config = rs_config_t {
            struct_size: size_of::<rs_config_t>(),
            abi: RS_ABI,
            flags: rank.flags,
            comm: comm.0,
            device: null(),
            preset: null(),
            host_id: rank.host,
            staging_bytes: rank.staging,
            host_threads: rank.threads,
            timeout_ms,
            name: null(),
            staging: staging.as_ref().map_or(null_mut(), |s| s.block.at(s.at).cast()),
        };
        let mut out = null_mut();
        // SAFETY: whole structs; the tables' memory outlives the container by the test's order of drops.
        restoring(|| unsafe { rs_container_create(&config, &tables.layout(), &mut out) })?;
        Ok(Container { handle: out, stream: null_mut(), gpu: None, timeout_ms: 0, flags: 0, staging })
    }

    pub fn connect(&mut self) -> Result<(), Failure> {
        // SAFETY: the handle is live.
        restoring(|| unsafe { rs_container_connect(self.handle) })
    }

    pub fn rebind(&mut self, tables: &Tables) -> Result<(), Failure> {
        // SAFETY: the handle is live, the struct whole, and the memory outlives the container by the test's order of drops.
        restoring(|| unsafe { rs_container_rebind(self.handle, &tables.layout(), null()) })
    }

    pub fn set_comm(&mut self, comm: &Comm) -> Result<(), Failure> {
        // SAFETY: both handles are live.
        checked(unsafe { rs_container_set_comm(self.handle, comm.0) })
    }

    /// A sync of the names in `only`, or of everything; the library must be done when it returns.
    pub fn sync(&mut self, version: u64, only: Option<&[String]>) -> Result<(), Failure> {
        let mut landed = self.start(version, only)?;
        while !landed {
            std::thread::sleep(std::time::Duration::from_micros(20));
            landed = self.poll()?;
        }
        Ok(())
    }

    /// How the last call stands: whether it has ended.
    pub fn poll(&self) -> Result<bool, Failure> {
        // SAFETY: the handle is live.
        ended(|| unsafe { rs_container_poll(self.handle) })
    }

    /// The same as `sync`, which it may leave in progress: whether it has ended.
    pub fn start(&mut self, version: u64, only: Option<&[String]>) -> Result<bool, Failure> {
        let names: Vec<CString> = only.iter().flat_map(|o| o.iter()).map(|n| CString::new(n.as_str()).expect("no NUL")).collect();
        let pointers: Vec<*const c_char> = names.iter().map(|n| n.as_ptr()).collect();
        let request = rs_sync_t {
            struct_size: size_of::<rs_sync_t>(),
            stream: self.stream,
            version,
            only: if only.is_some() { pointers.as_ptr() } else { null() },
            only_count: pointers.len(),
            timeout_ms: self.timeout_ms,
            flags: self.flags,
            progress: None,
            progress_user: null_mut(),
        };
        // SAFETY: the handle is live, the struct whole, and the names live during the call.
        ended(|| unsafe { rs_sync_weights(self.handle, &request) })
    }

    /// Of what all ranks hold as `role`.
    pub fn fingerprint(&mut self, role: u32, tensor: Option<&str>) -> Result<u128, Failure> {
        let name = tensor.map(|t| CString::new(t).expect("no NUL"));
        let mut out = [0xaa; 16];
        // SAFETY: the handle is live, the name NUL-terminated, `out` has 16 bytes.
        restoring(|| unsafe { rs_fingerprint(self.handle, role, name.as_ref().map_or(null(), |n| n.as_ptr()), out.as_mut_ptr()) })
            .inspect_err(|_| assert_eq!(out, [0xaa; 16], "written by a call that failed"))?;
        Ok(u128::from_le_bytes(out))
    }

    /// What may end a call of this container from another thread, while the container lives.
    pub fn aborter(&self) -> Aborter {
        Aborter(self.handle)
    }

    pub fn param(&self, name: &str) -> Result<Param, Failure> {
        let name = CString::new(name).expect("no NUL");
        // SAFETY: the handle is live, the name NUL-terminated, `out` whole.
        Param::told(|out| unsafe { rs_get_param(self.handle, name.as_ptr(), out) })
    }

    pub fn param_at(&self, row: usize) -> Result<Param, Failure> {
        // SAFETY: the handle is live, `out` whole.
        Param::told(|out| unsafe { rs_get_param_at(self.handle, row, out) })
    }

    /// The plan, or of one parameter who sends each box, as JSON.
    pub fn plan(&self, param: Option<&str>) -> Result<serde_json::Value, Failure> {
        let name = param.map(|p| CString::new(p).expect("no NUL"));
        let name = name.as_ref().map_or(null(), |n| n.as_ptr());
        let mut len = 0;
        let mut text = Vec::<u8>::new();
        loop {
            // SAFETY: the handle is live, `text` has `capacity` bytes to write and `len` is a valid place.
            let status = unsafe {
                rs_container_describe(self.handle, RS_DESCRIBE_PLAN, name, text.as_mut_ptr().cast(), text.capacity(), &mut len)
            };
            if status != RS_ERR_TOO_SMALL {
                checked(status)?;
                break;
            }
            text.reserve(len + 1);
        }
        // SAFETY: the library wrote a NUL-terminated text into it.
        let text = unsafe { CStr::from_ptr(text.as_ptr().cast()) }.to_str().expect("UTF-8");
        Ok(serde_json::from_str(text).unwrap_or_else(|e| panic!("{e} in {text}")))
    }
}

impl Drop for Container {
    fn drop(&mut self) {
        // SAFETY: the handle is live and dropped once.
        unsafe { rs_container_destroy(self.handle) }
        assert!(self.staging.as_ref().is_none_or(Lending::whole), "bytes beside the staging are written");
    }
}
