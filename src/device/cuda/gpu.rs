//! One GPU: its primary context, our kernel and our stream in it, and the driver's calls as functions that fail with a text.

use super::api::{Api, CAPTURE_IMPLICIT, NOT_READY, PEER_ACCESS_ALREADY_ENABLED, api};
use super::ipc::{Key, Opened};
use super::pool::Pool;
use crate::abi::*;
use crate::device::Stream;
use crate::error::{Result, bail};
use cudarc::driver::sys::{self, CUcontext, CUdevice, CUdeviceptr, CUfunction, CUmodule, CUstream, CUuuid};
use std::ffi::{c_int, c_uint, c_void};
use std::ptr;
use std::sync::{Arc, Mutex, PoisonError, Weak};
use sys::CUdevice_attribute as Attribute;
use sys::CUpointer_attribute as About;

/// The kernel, for compute capability 8.0 and up: the driver translates it for the GPU at hand.
const PTX: &str = concat!(include_str!("../kernels/copy.ptx"), "\0");

/// cuStreamWriteValue64 or cuStreamWaitValue64.
type WordFn = unsafe extern "C" fn(CUstream, CUdeviceptr, u64, c_uint) -> c_int;

/// CU_STREAM_PER_THREAD.
const PER_THREAD: Stream = 2;

/// What the driver knows of an address.
pub struct Address {
    /// CU_MEMORYTYPE_*; 0: it knows nothing.
    pub kind: u32,
    /// The GPU that it belongs to.
    pub ordinal: i32,
    /// Whether it is managed memory, which the driver moves between GPUs and host.
    pub managed: bool,
    /// Whether it is of an allocation that has an IPC handle.
    pub named: bool,
    /// Whether memory is mapped there, as the driver says it.
    pub mapped: bool,
    /// Of the allocation, which no other one of the process has had.
    pub id: u64,
}

/// What the driver knows of an address in mapped memory.
pub struct Mapping {
    /// Whether it is of a stream-ordered pool.
    pub pool: bool,
    /// Kinds of handles for other processes that its allocation was created for.
    pub handles: c_uint,
    /// Where the mapping begins, and its length in bytes.
    pub base: CUdeviceptr,
    pub len: u64,
    /// Of what is mapped.
    pub id: u64,
}

/// What lists of copies need to live.
pub struct Gpu {
    pub api: &'static Api,
    pub ordinal: i32,
    pub handle: CUdevice,
    context: CUcontext,
    module: CUmodule,
    pub kernel: CUfunction,
    /// Our own: for memory and uploads alone, so that waiting for it is short.
    pub stream: CUstream,
    /// Streaming multiprocessors.
    pub processors: u32,
    pub uuid: [u64; 2],
    /// Where our memory comes from; `None`: from cuMemAlloc.
    pub pool: Option<Pool>,
    /// Whether registered host memory has the host's addresses here.
    pub host_addresses: bool,
    /// How streams write and wait for words of host memory, if they can.
    pub words: Option<[WordFn; 2]>,
    /// Allocations of other processes that are open.
    pub imported: Mutex<Vec<(Key, Weak<Opened>)>>,
}

// SAFETY: the driver's handles may be used by any thread, several at once; each use makes the context current first.
unsafe impl Send for Gpu {}
// SAFETY: as above.
unsafe impl Sync for Gpu {}

/// The GPU's context, current on this thread until dropped; and a capture into a graph that goes on elsewhere in the process is left
/// alone meanwhile, where calls such as cuEventQuery would end it.
pub struct Current<'a> {
    gpu: &'a Gpu,
    capture: c_int,
}

impl Drop for Current<'_> {
    fn drop(&mut self) {
        let mut popped = ptr::null_mut();
        // SAFETY: takes away what `Gpu::current` put on this thread's stack, and gives back the mode that it took.
        unsafe {
            (self.gpu.api.cuThreadExchangeStreamCaptureMode)(&mut self.capture);
            (self.gpu.api.cuCtxPopCurrent_v2)(&mut popped);
        }
    }
}

impl Gpu {
    /// The one that the process has already, or a new one.
    pub fn shared(ordinal: i32) -> Result<Arc<Gpu>> {
        static ALL: Mutex<Vec<(i32, Weak<Gpu>)>> = Mutex::new(Vec::new());
        let mut all = ALL.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(gpu) = all.iter().find(|g| g.0 == ordinal).and_then(|g| g.1.upgrade()) {
            return Ok(gpu);
        }
        let gpu = Arc::new(Gpu::new(ordinal)?);
        all.retain(|g| g.0 != ordinal);
        for other in all.iter().filter_map(|g| g.1.upgrade()) {
            gpu.open_to(&other);
            other.open_to(&gpu);
        }
        all.push((ordinal, Arc::downgrade(&gpu)));
        Ok(gpu)
    }

    fn new(ordinal: i32) -> Result<Gpu> {
        let api = api()?;
        let (mut count, mut handle, mut context) = (0, 0, ptr::null_mut());
        // SAFETY: each call writes its one result.
        unsafe {
            api.done("cuDeviceGetCount", (api.cuDeviceGetCount)(&mut count))?;
            if !(0..count).contains(&ordinal) {
                bail!(RS_ERR_INVALID, "device_id {ordinal}: this process sees {count} GPUs (CUDA_VISIBLE_DEVICES chooses them)");
            }
            api.done("cuDeviceGet", (api.cuDeviceGet)(&mut handle, ordinal))?;
            api.done("cuDevicePrimaryCtxRetain", (api.cuDevicePrimaryCtxRetain)(&mut context, handle))?;
        }
        // From here on dropping it gives back what it has so far.
        let mut gpu = Gpu {
            api,
            ordinal,
            handle,
            context,
            module: ptr::null_mut(),
            kernel: ptr::null_mut(),
            stream: ptr::null_mut(),
            processors: 0,
            uuid: [0; 2],
            pool: None,
            host_addresses: false,
            words: None,
            imported: Mutex::default(),
        };
        gpu.prepare()?;
        Ok(gpu)
    }

    fn prepare(&mut self) -> Result<()> {
        let api = self.api;
        let major = self.attribute(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)?;
        if major < 8 {
            bail!(RS_ERR_UNSUPPORTED, "its compute capability is {major}.x; the copy kernel is built for 8.0 and up");
        }
        self.processors = self.attribute(Attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)?.max(1) as u32;
        let pools = self.attribute(Attribute::CU_DEVICE_ATTRIBUTE_MEMORY_POOLS_SUPPORTED)? != 0;
        match api.pools.as_ref().filter(|_| pools).map(|calls| Pool::new(self, calls)) {
            Some(Ok(pool)) => self.pool = Some(pool),
            Some(Err(e)) => log::warn!("cuda:{}: no memory pool ({e}); staging comes from cuMemAlloc", self.ordinal),
            None => log::info!("cuda:{}: no stream-ordered memory pool; staging comes from cuMemAlloc", self.ordinal),
        }
        self.host_addresses = self.attribute(Attribute::CU_DEVICE_ATTRIBUTE_CAN_USE_HOST_POINTER_FOR_REGISTERED_MEM)? != 0;
        let words = self.attribute(Attribute::CU_DEVICE_ATTRIBUTE_CAN_USE_64_BIT_STREAM_MEM_OPS)? != 0 && self.host_addresses;
        self.words = match (api.cuStreamWriteValue64_v2, api.cuStreamWaitValue64_v2) {
            (Some(write), Some(wait)) if words => Some([write, wait]),
            _ => {
                log::info!("cuda:{}: streams cannot wait for words of host memory; a sync waits for them itself", self.ordinal);
                None
            }
        };
        let mut uuid = CUuuid { bytes: [0; 16] };
        // SAFETY: writes its one result.
        api.done("cuDeviceGetUuid", unsafe { (api.cuDeviceGetUuid_v2)(&mut uuid, self.handle) })?;
        let bytes = uuid.bytes.map(|b| b as u8);
        let half = |at: usize| bytes[at..at + 8].iter().rev().fold(0, |word, &b| word << 8 | u64::from(b));
        self.uuid = [half(0), half(8)];

        let (mut module, mut kernel, mut stream) = (ptr::null_mut(), ptr::null_mut(), ptr::null_mut());
        let non_blocking = sys::CUstream_flags::CU_STREAM_NON_BLOCKING as u32;
        {
            let _current = self.current()?;
            // SAFETY: the text ends with a NUL; each call writes its one result, in the current context.
            unsafe {
                api.done("cuModuleLoadData", (api.cuModuleLoadData)(&mut module, PTX.as_ptr().cast()))?;
                let found = (api.cuModuleGetFunction)(&mut kernel, module, c"reshard_copy".as_ptr());
                let created = api
                    .done("cuModuleGetFunction", found)
                    .and_then(|()| api.done("cuStreamCreate", (api.cuStreamCreate)(&mut stream, non_blocking)));
                if let Err(e) = created {
                    (api.cuModuleUnload)(module);
                    return Err(e);
                }
            }
        }
        (self.module, self.kernel, self.stream) = (module, kernel, stream);
        Ok(())
    }

    fn attribute(&self, attribute: Attribute) -> Result<i32> {
        let mut value = 0;
        // SAFETY: writes its one result.
        let answer = unsafe { (self.api.cuDeviceGetAttribute)(&mut value, attribute as c_int, self.handle) };
        self.api.done("cuDeviceGetAttribute", answer).map(|()| value)
    }

    pub fn current(&self) -> Result<Current<'_>> {
        // SAFETY: the context was retained and is released by `drop` alone.
        self.api.done("cuCtxPushCurrent", unsafe { (self.api.cuCtxPushCurrent_v2)(self.context) })?;
        let mut mode = sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_RELAXED as c_int;
        // SAFETY: exchanges the mode of this thread for the one given.
        let exchanged = unsafe { (self.api.cuThreadExchangeStreamCaptureMode)(&mut mode) };
        if let Err(e) = self.api.done("cuThreadExchangeStreamCaptureMode", exchanged) {
            // SAFETY: takes away what was pushed above.
            unsafe { (self.api.cuCtxPopCurrent_v2)(&mut ptr::null_mut()) };
            return Err(e);
        }
        Ok(Current { gpu: self, capture: mode })
    }

    /// The same, to give something back: any call may answer with an error of earlier work, and what it was to do is to be done all the
    /// same.
    pub fn current_again(&self) -> Option<Current<'_>> {
        self.current().or_else(|_| self.current()).ok()
    }

    pub fn record(&self, stream: Stream) -> Result<usize> {
        let _current = self.current()?;
        let mut event = ptr::null_mut();
        let no_timing = sys::CUevent_flags::CU_EVENT_DISABLE_TIMING as u32;
        // SAFETY: writes its one result; the stream is the caller's promise of a live one of this context.
        unsafe {
            self.api.done("cuEventCreate", (self.api.cuEventCreate)(&mut event, no_timing))?;
            if let Err(e) = self.api.done("cuEventRecord", (self.api.cuEventRecord)(event, handle(stream))) {
                (self.api.cuEventDestroy_v2)(event);
                return Err(e);
            }
        }
        Ok(event.expose_provenance())
    }

    pub fn query(&self, event: usize) -> Result<bool> {
        let _current = self.current()?;
        // SAFETY: `record` gave the event and it is not destroyed yet.
        match unsafe { (self.api.cuEventQuery)(ptr::with_exposed_provenance_mut(event)) } {
            NOT_READY => Ok(false),
            answer => self.api.done("cuEventQuery", answer).map(|()| true),
        }
    }

    pub fn wait(&self, stream: Stream, event: usize) -> Result<()> {
        let _current = self.current()?;
        // SAFETY: as in `query`; the stream is one of this context.
        let answer = unsafe { (self.api.cuStreamWaitEvent)(handle(stream), ptr::with_exposed_provenance_mut(event), 0) };
        self.api.done("cuStreamWaitEvent", answer)
    }

    /// Puts a word of pinned host memory on a stream, behind a barrier for all that is there.
    pub fn write_word(&self, stream: Stream, at: u64, value: u64) -> Result<()> {
        self.word(
            0,
            "cuStreamWriteValue64",
            stream,
            at,
            value,
            sys::CUstreamWriteValue_flags::CU_STREAM_WRITE_VALUE_DEFAULT as c_uint,
        )
    }

    /// Lets a stream wait until a word of pinned host memory is at least `value`.
    pub fn wait_word(&self, stream: Stream, at: u64, value: u64) -> Result<()> {
        self.word(1, "cuStreamWaitValue64", stream, at, value, sys::CUstreamWaitValue_flags::CU_STREAM_WAIT_VALUE_GEQ as c_uint)
    }

    fn word(&self, which: usize, call: &str, stream: Stream, at: u64, value: u64, flags: c_uint) -> Result<()> {
        let Some(functions) = self.words else { bail!(RS_ERR_INTERNAL, "{call} without words") };
        let _current = self.current()?;
        // SAFETY: an aligned word of memory that is pinned for as long as the stream uses it.
        self.api.done(call, unsafe { functions[which](handle(stream), at, value, flags) })
    }

    pub fn destroy(&self, event: usize) {
        if let Some(_current) = self.current_again() {
            // SAFETY: as in `query`; nobody uses it any more.
            unsafe { (self.api.cuEventDestroy_v2)(ptr::with_exposed_provenance_mut::<_>(event)) };
        }
    }

    /// Writes host bytes to memory of [`Gpu::alloc`].
    pub fn upload(&self, to: CUdeviceptr, bytes: &[u8]) -> Result<()> {
        let _current = self.current()?;
        // SAFETY: the target has room for them; they stay until the stream, which is our own, has done this.
        unsafe {
            let copied = (self.api.cuMemcpyHtoDAsync_v2)(to, bytes.as_ptr().cast(), bytes.len(), self.stream);
            self.api.done("cuMemcpyHtoDAsync", copied)?;
            self.api.done("cuStreamSynchronize", (self.api.cuStreamSynchronize)(self.stream))
        }
    }

    /// Reads memory of [`Gpu::alloc`], behind what is on the stream.
    pub fn download(&self, bytes: &mut [u8], from: CUdeviceptr, stream: Stream) -> Result<()> {
        let _current = self.current()?;
        // SAFETY: the source has so many bytes; to memory that is not pinned the call returns when all have come.
        unsafe {
            let copied = (self.api.cuMemcpyDtoHAsync_v2)(bytes.as_mut_ptr().cast(), from, bytes.len(), handle(stream));
            self.api.done("cuMemcpyDtoHAsync", copied)?;
            self.api.done("cuStreamSynchronize", (self.api.cuStreamSynchronize)(handle(stream)))
        }
    }

    /// Starts a copy between two addresses that the GPU knows.
    pub fn copy(&self, dst: CUdeviceptr, src: CUdeviceptr, bytes: usize, stream: Stream) -> Result<()> {
        let _current = self.current()?;
        // SAFETY: both blocks lie in memory whose owners promised it to whoever made the `Mem`s that the addresses are of.
        let answer = unsafe { (self.api.cuMemcpyAsync)(dst, src, bytes, handle(stream)) };
        self.api.done("cuMemcpyAsync", answer)
    }

    /// Refuses a stream of another context; whether it is being captured.
    pub fn check_stream(&self, stream: Stream) -> Result<bool> {
        if stream == PER_THREAD {
            bail!(RS_ERR_UNSUPPORTED, "the stream is cudaStreamPerThread, which is another one on every thread: make a stream");
        }
        let _current = self.current()?;
        let (mut context, mut capturing) = (ptr::null_mut(), 0);
        // SAFETY: each call writes its one result; the caller promised a live stream.
        unsafe {
            self.api.done("cuStreamGetCtx", (self.api.cuStreamGetCtx)(handle(stream), &mut context))?;
            if context != self.context {
                bail!(
                    RS_ERR_UNSUPPORTED,
                    "the stream is not of the device's primary context, in which the CUDA runtime and PyTorch make theirs"
                );
            }
            match (self.api.cuStreamIsCapturing)(handle(stream), &mut capturing) {
                CAPTURE_IMPLICIT => bail!(
                    RS_ERR_UNSUPPORTED,
                    "the default stream cannot be used while another stream that waits for it is captured into a graph"
                ),
                answer => self.api.done("cuStreamIsCapturing", answer)?,
            }
        }
        Ok(capturing != sys::CUstreamCaptureStatus::CU_STREAM_CAPTURE_STATUS_NONE as c_int)
    }

    /// Makes sure that kernels can use an address that was described as memory of `kind`.
    pub fn reach(&self, (kind, id): (i32, i32), at: u64) -> Result<()> {
        const HOST: u32 = sys::CUmemorytype::CU_MEMORYTYPE_HOST as u32;
        const DEVICE: u32 = sys::CUmemorytype::CU_MEMORYTYPE_DEVICE as u32;
        let found = self.about(at)?;
        match (kind, found.kind) {
            (RS_DEVICE_CUDA_HOST, HOST) => Ok(()),
            (RS_DEVICE_CUDA, DEVICE) if found.ordinal == id && id == self.ordinal => Ok(()),
            // Of the virtual memory interface or a pool, which say for themselves who may reach it.
            (RS_DEVICE_CUDA, DEVICE) if found.ordinal == id && !found.named && !found.managed => bail!(
                RS_ERR_UNSUPPORTED,
                "memory of cuda:{id} at {at:#x} is not from cudaMalloc() (of a pool, or of PyTorch's expandable segments): peer access \
                 does not open it to other GPUs"
            ),
            (RS_DEVICE_CUDA, DEVICE) if found.ordinal == id => self.enable_peer(id),
            (_, other) => {
                let what = match other {
                    DEVICE => format!("memory of cuda:{}", found.ordinal),
                    HOST => "pinned host memory".to_string(),
                    _ => "memory that the CUDA driver does not know".to_string(),
                };
                bail!(RS_ERR_INVALID, "address {at:#x} was given as device (type {kind}, id {id}); it is {what}")
            }
        }
    }

    /// What the driver knows of an address. Of one that is none of its own that is no error.
    pub fn about(&self, at: u64) -> Result<Address> {
        self.current()?.about(at)
    }

    /// What the driver knows of an address in mapped memory; older ones do not answer.
    pub fn mapping(&self, at: u64) -> Result<Mapping> {
        self.current()?.mapping(at)
    }

    /// Whether it can reach the memory of another one.
    pub fn is_peer_of(&self, other: CUdevice) -> Result<bool> {
        let mut can = 0;
        // SAFETY: writes its one result.
        let answer = unsafe { (self.api.cuDeviceCanAccessPeer)(&mut can, self.handle, other) };
        self.api.done("cuDeviceCanAccessPeer", answer).map(|()| can != 0)
    }

    /// Lets kernels of this GPU read and write the memory of another one.
    fn enable_peer(&self, other: i32) -> Result<()> {
        let (mut peer, mut context) = (0, ptr::null_mut());
        let api = self.api;
        // SAFETY: each call writes its one result; the peer's context is retained while it is used.
        unsafe {
            api.done("cuDeviceGet", (api.cuDeviceGet)(&mut peer, other))?;
            if !self.is_peer_of(peer)? {
                bail!(RS_ERR_UNSUPPORTED, "it cannot reach the memory of cuda:{other}: the two GPUs are no peers");
            }
            api.done("cuDevicePrimaryCtxRetain", (api.cuDevicePrimaryCtxRetain)(&mut context, peer))?;
            let enabled = self.current().and_then(|_current| match (api.cuCtxEnablePeerAccess)(context, 0) {
                PEER_ACCESS_ALREADY_ENABLED => Ok(()),
                answer => api.done("cuCtxEnablePeerAccess", answer),
            });
            (api.cuDevicePrimaryCtxRelease_v2)(peer);
            enabled
        }
    }
}

impl Current<'_> {
    /// See [`Gpu::about`].
    pub fn about(&self, at: u64) -> Result<Address> {
        let words = self.ask(
            at,
            [
                About::CU_POINTER_ATTRIBUTE_MEMORY_TYPE,
                About::CU_POINTER_ATTRIBUTE_DEVICE_ORDINAL,
                About::CU_POINTER_ATTRIBUTE_IS_MANAGED,
                About::CU_POINTER_ATTRIBUTE_IS_LEGACY_CUDA_IPC_CAPABLE,
                About::CU_POINTER_ATTRIBUTE_MAPPED,
                About::CU_POINTER_ATTRIBUTE_BUFFER_ID,
            ],
        )?;
        let [kind, ordinal, managed, named, mapped, id] = words;
        // A truth value has one byte or four.
        let truth = |word: [u8; 8]| int(word) != 0;
        Ok(Address {
            kind: int(kind),
            ordinal: int(ordinal) as i32,
            managed: truth(managed),
            named: truth(named),
            mapped: truth(mapped),
            id: u64::from_ne_bytes(id),
        })
    }

    /// See [`Gpu::mapping`].
    pub fn mapping(&self, at: u64) -> Result<Mapping> {
        let words = self.ask(
            at,
            [
                About::CU_POINTER_ATTRIBUTE_MEMPOOL_HANDLE,
                About::CU_POINTER_ATTRIBUTE_ALLOWED_HANDLE_TYPES,
                About::CU_POINTER_ATTRIBUTE_MAPPING_BASE_ADDR,
                About::CU_POINTER_ATTRIBUTE_MAPPING_SIZE,
                About::CU_POINTER_ATTRIBUTE_MEMORY_BLOCK_ID,
            ],
        )?;
        let [pool, handles, base, len, id] = words;
        let whole = u64::from_ne_bytes;
        Ok(Mapping { pool: whole(pool) != 0, handles: int(handles), base: whole(base), len: whole(len), id: whole(id) })
    }

    /// Attributes of an address, none of which is longer than 8 bytes.
    fn ask<const N: usize>(&self, at: u64, attributes: [About; N]) -> Result<[[u8; 8]; N]> {
        let mut asked = attributes.map(|a| a as c_int);
        let mut words = [[0u8; 8]; N];
        let mut answers = words.each_mut().map(|word| word.as_mut_ptr().cast::<c_void>());
        // SAFETY: so many attributes, each with a place for the answer.
        let answer = unsafe { (self.gpu.api.cuPointerGetAttributes)(N as c_uint, asked.as_mut_ptr(), answers.as_mut_ptr(), at) };
        self.gpu.api.done("cuPointerGetAttributes", answer).map(|()| words)
    }
}

impl Drop for Gpu {
    fn drop(&mut self) {
        if let Some(_current) = self.current_again() {
            // SAFETY: nothing of ours runs any more: lists and staging hold a reference.
            unsafe {
                if !self.stream.is_null() {
                    (self.api.cuStreamSynchronize)(self.stream);
                    (self.api.cuStreamDestroy_v2)(self.stream);
                    (self.api.cuModuleUnload)(self.module);
                }
            }
            if let Some(pool) = &self.pool {
                pool.destroy();
            }
        }
        // SAFETY: retained once, in `new`.
        unsafe { (self.api.cuDevicePrimaryCtxRelease_v2)(self.handle) };
    }
}

/// An answer of 4 bytes.
fn int(word: [u8; 8]) -> u32 {
    u32::from_ne_bytes([word[0], word[1], word[2], word[3]])
}

/// A stream as the driver names it: NULL is its default stream.
pub fn handle(stream: Stream) -> CUstream {
    ptr::with_exposed_provenance_mut(stream)
}

/// CUDA's number of the GPU that is current on this thread.
pub fn current() -> Result<i32> {
    let api = api()?;
    let mut handle = 0;
    // SAFETY: writes its one result.
    let answer = unsafe { (api.cuCtxGetDevice)(&mut handle) };
    let what = "no GPU is current on this thread: call cudaSetDevice() first (in PyTorch, use the GPU once on this thread)";
    api.done("cuCtxGetDevice", answer).map_err(|e| e.context(what)).map(|()| handle)
}
