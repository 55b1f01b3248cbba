//! Where the ranks' weights lie: in host memory, or, with RESHARD_MEMORY=cuda, in the memory of GPUs and in pinned host memory.
//!
//! RESHARD_GPU_MEMORY: how that of a GPU is allocated.

use cudarc::driver::sys;
use reshard::abi::*;
use std::ffi::{c_int, c_void};
use std::ptr::null_mut;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, Ordering};

/// DLPack's (device_type, device_id).
pub type Kind = (i32, i32);

pub const HOST: Kind = (RS_DEVICE_CPU, 0);

/// Whether weights go to GPUs.
pub fn wanted() -> bool {
    static WANTED: OnceLock<bool> = OnceLock::new();
    *WANTED.get_or_init(|| match std::env::var("RESHARD_MEMORY").as_deref() {
        Ok("cuda") => true,
        Ok("host") | Err(_) => false,
        Ok(other) => panic!("RESHARD_MEMORY is '{other}'; it is host or cuda"),
    })
}

/// Where a rank's weights lie: on any GPU, now and then in pinned memory.
pub fn kind(rng: &mut fastrand::Rng) -> Kind {
    if !wanted() {
        return HOST;
    }
    let gpu = rng.i32(0..count());
    if rng.u32(0..5) == 0 { (RS_DEVICE_CUDA_HOST, gpu) } else { (RS_DEVICE_CUDA, gpu) }
}

/// How memory of a GPU is allocated.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Origin {
    /// By cudaMalloc.
    Whole,
    /// Mapped piece by piece, as by PyTorch's expandable segments.
    Mapped,
    /// The same, without handles for other processes.
    Private,
    /// From a stream-ordered pool.
    Pool,
}

/// How this process allocates it.
pub fn origin() -> Origin {
    match std::env::var("RESHARD_GPU_MEMORY").as_deref() {
        Err(_) => Origin::Whole,
        Ok("mapped") => Origin::Mapped,
        Ok("private") => Origin::Private,
        Ok("pool") => Origin::Pool,
        Ok(other) => panic!("RESHARD_GPU_MEMORY is '{other}'; it is mapped, private or pool"),
    }
}

fn check(what: &str, answer: sys::CUresult) {
    assert_eq!(answer as u32, 0, "{what}: {answer:?}");
}

/// Number of GPUs; the driver is loaded then.
pub fn count() -> i32 {
    let mut count: c_int = 0;
    // SAFETY: each call writes its one result.
    unsafe {
        check("cuInit", sys::cuInit(0));
        check("cuDeviceGetCount", sys::cuDeviceGetCount(&mut count));
    }
    count
}

/// Runs `body` with a GPU's primary context current on this thread.
pub fn on<R>(gpu: i32, body: impl FnOnce() -> R) -> R {
    let (mut context, mut popped) = (null_mut(), null_mut());
    // SAFETY: each call writes its one result; the context is retained until it is taken off the stack.
    unsafe {
        check("cuInit", sys::cuInit(0));
        check("cuDevicePrimaryCtxRetain", sys::cuDevicePrimaryCtxRetain(&mut context, gpu));
        check("cuCtxPushCurrent", sys::cuCtxPushCurrent_v2(context));
    }
    let out = body();
    // SAFETY: as above.
    unsafe {
        check("cuCtxPopCurrent", sys::cuCtxPopCurrent_v2(&mut popped));
        assert_eq!(popped, context, "another context is current");
        check("cuDevicePrimaryCtxRelease", sys::cuDevicePrimaryCtxRelease_v2(gpu));
    }
    out
}

/// Set while the driver's calls fail on purpose, which are to be the library's calls alone.
pub static FAILING: AtomicBool = AtomicBool::new(false);

/// The context that is current on this thread; NULL: none, or nobody can ask.
pub fn current() -> usize {
    let mut context = null_mut();
    if wanted() && !FAILING.load(Ordering::Relaxed) {
        // SAFETY: each call writes its one result.
        unsafe {
            check("cuInit", sys::cuInit(0));
            check("cuCtxGetCurrent", sys::cuCtxGetCurrent(&mut context));
        }
    }
    context as usize
}

/// Runs `body` as a caller's thread would: for some ranks some GPU's context is current, for others none.
pub fn as_some_thread<R>(rank: usize, body: impl FnOnce() -> R) -> R {
    let asked = wanted() && !FAILING.load(Ordering::Relaxed);
    if asked && rank % 3 > 0 { on(rank as i32 % count(), body) } else { body() }
}

/// Addresses of a GPU at which pieces of memory of several lengths are mapped one behind the other.
struct Range {
    gpu: i32,
    wanted: sys::CUmemAllocationProp,
    base: u64,
    /// Where the block begins: inside a piece.
    start: u64,
    pieces: Vec<usize>,
}

impl Range {
    /// Room for so many bytes. The first of two blocks in them ends in another piece than it begins in, if they are of some length, and
    /// the second begins where the first ends.
    fn new(gpu: i32, len: usize, shareable: bool) -> Range {
        use sys::CUmemAllocationHandleType as Handles;
        let location = sys::CUmemLocation { type_: sys::CUmemLocationType::CU_MEM_LOCATION_TYPE_DEVICE, id: gpu };
        let wanted = sys::CUmemAllocationProp {
            type_: sys::CUmemAllocationType::CU_MEM_ALLOCATION_TYPE_PINNED,
            requestedHandleTypes: if shareable {
                Handles::CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR
            } else {
                Handles::CU_MEM_HANDLE_TYPE_NONE
            },
            location,
            win32HandleMetaData: null_mut(),
            allocFlags: sys::CUmemAllocationProp_st__bindgen_ty_1 {
                compressionType: 0,
                gpuDirectRDMACapable: 0,
                usage: 0,
                reserved: [0; 4],
            },
        };
        let mut range = Range { gpu, wanted, base: 0, start: 0, pieces: vec![] };
        let mut unit = 0;
        let least = sys::CUmemAllocationGranularity_flags::CU_MEM_ALLOC_GRANULARITY_MINIMUM;
        // SAFETY: each call writes its one result; the description outlives its call.
        unsafe {
            check("cuMemGetAllocationGranularity", sys::cuMemGetAllocationGranularity(&mut unit, &range.wanted, least));
            let start = unit - (len / 4 % unit) / 256 * 256;
            while range.pieces.iter().sum::<usize>() < start + len {
                range.pieces.push(unit * (1 + range.pieces.len() % 3));
            }
            range.start = start as u64;
            let bytes = range.pieces.iter().sum();
            check("cuMemAddressReserve", sys::cuMemAddressReserve(&mut range.base, bytes, 0, 0, 0));
        }
        range.map();
        range
    }

    /// Memory for all of it.
    fn map(&self) {
        let location = sys::CUmemLocation { type_: sys::CUmemLocationType::CU_MEM_LOCATION_TYPE_DEVICE, id: self.gpu };
        let access = sys::CUmemAccessDesc { location, flags: sys::CUmemAccess_flags::CU_MEM_ACCESS_FLAGS_PROT_READWRITE };
        let mut at = self.base;
        // SAFETY: each call writes its one result; descriptions outlive their calls; pieces go to addresses that were reserved.
        unsafe {
            for &piece in &self.pieces {
                let mut handle = 0;
                check("cuMemCreate", sys::cuMemCreate(&mut handle, piece, &self.wanted, 0));
                check("cuMemMap", sys::cuMemMap(at, piece, 0, handle, 0));
                check("cuMemRelease", sys::cuMemRelease(handle));
                at += piece as u64;
            }
            check("cuMemSetAccess", sys::cuMemSetAccess(self.base, (at - self.base) as usize, &access, 1));
        }
    }

    fn unmap(&self) {
        let mut at = self.base;
        for &piece in &self.pieces {
            // SAFETY: `map` mapped it, and nobody uses it any more.
            check("cuMemUnmap", unsafe { sys::cuMemUnmap(at, piece) });
            at += piece as u64;
        }
    }
}

impl Drop for Range {
    fn drop(&mut self) {
        self.unmap();
        // SAFETY: `new` reserved them, and nothing is mapped there any more.
        check("cuMemAddressFree", unsafe { sys::cuMemAddressFree(self.base, self.pieces.iter().sum()) });
    }
}

/// A block of memory of some kind, with its bytes. A GPU's is written and read in the order of a stream of its own.
pub struct Block {
    kind: Kind,
    at: *mut u8,
    len: usize,
    stream: sys::CUstream,
    range: Option<Range>,
}

// SAFETY: memory of its own, which any thread may use.
unsafe impl Send for Block {}
// SAFETY: as above; it is written through `&mut` alone.
unsafe impl Sync for Block {}

impl Block {
    pub fn new(kind: Kind, bytes: &[u8]) -> Block {
        let (kind, len) = (kind, bytes.len());
        let mut block = Block { kind, at: null_mut(), len, stream: null_mut(), range: None };
        if kind == HOST {
            block.at = Box::into_raw(bytes.to_vec().into_boxed_slice()).cast();
            return block;
        }
        // SAFETY: each call writes its one result. The context stays as long as the block.
        on(kind.1, || unsafe {
            check("cuDevicePrimaryCtxRetain", sys::cuDevicePrimaryCtxRetain(&mut null_mut(), kind.1));
            check("cuStreamCreate", sys::cuStreamCreate(&mut block.stream, sys::CUstream_flags::CU_STREAM_NON_BLOCKING as u32));
            if kind.0 == RS_DEVICE_CUDA {
                let mut at = 0;
                match origin() {
                    Origin::Whole => check("cuMemAlloc", sys::cuMemAlloc_v2(&mut at, len)),
                    Origin::Pool => check("cuMemAllocAsync", sys::cuMemAllocAsync(&mut at, len, block.stream)),
                    how => {
                        let range = block.range.insert(Range::new(kind.1, len, how == Origin::Mapped));
                        at = range.base + range.start;
                    }
                }
                block.at = at as *mut u8;
            } else {
                let mut at: *mut c_void = null_mut();
                check("cuMemHostAlloc", sys::cuMemHostAlloc(&mut at, len, 0));
                block.at = at.cast();
            }
        });
        block.write(bytes);
        block
    }

    /// Gives mapped memory back and keeps its address, as an engine that sleeps.
    #[allow(dead_code)] // of `cuda` alone
    pub fn sleep(&mut self) {
        let range = self.range.as_ref().expect("it is mapped piece by piece");
        on(self.kind.1, || {
            // SAFETY: a stream of its own.
            check("cuStreamSynchronize", unsafe { sys::cuStreamSynchronize(self.stream) });
            range.unmap();
        });
    }

    /// Other memory at the address, with other bytes.
    #[allow(dead_code)] // of `cuda` alone
    pub fn wake(&mut self) {
        let range = self.range.as_ref().expect("it is mapped piece by piece");
        on(self.kind.1, || range.map());
    }

    /// For syncs of this memory.
    pub fn stream(&self) -> *mut c_void {
        self.stream.cast()
    }

    pub fn kind(&self) -> Kind {
        self.kind
    }

    pub fn at(&self, offset: usize) -> *mut u8 {
        self.at.wrapping_add(offset)
    }

    /// Its bytes after all that is on its stream.
    pub fn read(&self) -> Vec<u8> {
        let mut out = vec![0; self.len];
        // SAFETY: so many bytes of a live block.
        unsafe {
            if self.kind.0 == RS_DEVICE_CUDA {
                on(self.kind.1, || {
                    let to = out.as_mut_ptr().cast();
                    check("cuMemcpyDtoHAsync", sys::cuMemcpyDtoHAsync_v2(to, self.at as u64, self.len, self.stream));
                    check("cuStreamSynchronize", sys::cuStreamSynchronize(self.stream));
                });
            } else {
                std::ptr::copy_nonoverlapping(self.at, out.as_mut_ptr(), self.len);
            }
        }
        out
    }

    /// Other bytes, as many. Of a GPU's memory: put on its stream, and perhaps not written yet.
    pub fn write(&mut self, bytes: &[u8]) {
        assert_eq!(bytes.len(), self.len);
        // SAFETY: so many bytes of a live block; what is copied from pageable memory the driver has taken when it returns.
        unsafe {
            if self.kind.0 == RS_DEVICE_CUDA {
                on(self.kind.1, || {
                    let from = bytes.as_ptr().cast();
                    check("cuMemcpyHtoDAsync", sys::cuMemcpyHtoDAsync_v2(self.at as u64, from, self.len, self.stream));
                });
            } else {
                std::ptr::copy_nonoverlapping(bytes.as_ptr(), self.at, self.len);
            }
        }
    }
}

impl Drop for Block {
    fn drop(&mut self) {
        // SAFETY: `new` made all of it, and nobody uses it any more.
        unsafe {
            if self.kind == HOST {
                return drop(Box::from_raw(std::ptr::slice_from_raw_parts_mut(self.at, self.len)));
            }
            on(self.kind.1, || {
                check("cuStreamSynchronize", sys::cuStreamSynchronize(self.stream));
                check("cuStreamDestroy", sys::cuStreamDestroy_v2(self.stream));
                match self.kind.0 {
                    RS_DEVICE_CUDA if self.range.is_some() => drop(self.range.take()),
                    // Of a pool too: on the default stream, whatever is there.
                    RS_DEVICE_CUDA => check("cuMemFree", sys::cuMemFree_v2(self.at as u64)),
                    _ => check("cuMemFreeHost", sys::cuMemFreeHost(self.at.cast())),
                }
            });
            check("cuDevicePrimaryCtxRelease", sys::cuDevicePrimaryCtxRelease_v2(self.kind.1));
        }
    }
}

/// The GPU whose memory an address is of, if it is of one.
fn gpu_of(at: *const u8) -> Option<i32> {
    if !wanted() {
        return None;
    }
    let (mut kind, mut ordinal) = (0u32, 0i32);
    let about = |out: *mut c_void, what| {
        // SAFETY: writes its one result, of 4 bytes for both attributes; an address that is none of the driver's is an error.
        on(0, || unsafe { sys::cuPointerGetAttribute(out, what, at as u64) }) as u32 == 0
    };
    let device = about((&raw mut kind).cast(), sys::CUpointer_attribute::CU_POINTER_ATTRIBUTE_MEMORY_TYPE)
        && kind == sys::CUmemorytype::CU_MEMORYTYPE_DEVICE as u32
        && about((&raw mut ordinal).cast(), sys::CUpointer_attribute::CU_POINTER_ATTRIBUTE_DEVICE_ORDINAL);
    device.then_some(ordinal)
}

/// Reads memory, wherever it is.
///
/// # Safety
/// `from` is that many bytes of live memory.
pub unsafe fn read(from: *const u8, to: &mut [u8]) {
    let gpu = gpu_of(from);
    // SAFETY: the caller's promise.
    unsafe {
        match gpu {
            Some(gpu) => on(gpu, || check("cuMemcpyDtoH", sys::cuMemcpyDtoH_v2(to.as_mut_ptr().cast(), from as u64, to.len()))),
            None => std::ptr::copy_nonoverlapping(from, to.as_mut_ptr(), to.len()),
        }
    }
}

/// Writes memory, wherever it is.
///
/// # Safety
/// `to` is that many bytes of live memory.
pub unsafe fn write(to: *mut u8, from: &[u8]) {
    let gpu = gpu_of(to);
    // SAFETY: the caller's promise.
    unsafe {
        match gpu {
            // Of pageable memory the driver may still be writing when that call returns.
            Some(gpu) => on(gpu, || {
                check("cuMemcpyHtoD", sys::cuMemcpyHtoD_v2(to as u64, from.as_ptr().cast(), from.len()));
                check("cuStreamSynchronize", sys::cuStreamSynchronize(null_mut()));
            }),
            None => std::ptr::copy_nonoverlapping(from.as_ptr(), to, from.len()),
        }
    }
}
