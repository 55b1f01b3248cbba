//! Streams and pinned memory of the library's own, and what it has pinned, given back when dropped.

use super::gpu::Gpu;
use crate::abi::*;
use crate::device::{HostBlock, Mem, OwnStream, Stream};
use crate::error::{Result, bail};
use cudarc::driver::sys::{self, CUstream};
use std::ffi::c_void;
use std::ptr;
use std::sync::{Arc, Mutex, PoisonError, Weak};

/// A stream that does not wait for the default stream.
pub struct CudaStream {
    gpu: Arc<Gpu>,
    stream: CUstream,
}

// SAFETY: as for `Gpu`.
unsafe impl Send for CudaStream {}
// SAFETY: as for `Gpu`.
unsafe impl Sync for CudaStream {}

impl CudaStream {
    /// Of a GPU.
    pub fn new(gpu: &Arc<Gpu>) -> Result<CudaStream> {
        let _current = gpu.current()?;
        let mut stream = ptr::null_mut();
        // SAFETY: writes its one result.
        let answer = unsafe { (gpu.api.cuStreamCreate)(&mut stream, sys::CUstream_flags::CU_STREAM_NON_BLOCKING as u32) };
        gpu.api.done("cuStreamCreate", answer)?;
        Ok(CudaStream { gpu: gpu.clone(), stream })
    }
}

impl OwnStream for CudaStream {
    fn raw(&self) -> Stream {
        self.stream.expose_provenance()
    }
}

impl Drop for CudaStream {
    fn drop(&mut self) {
        if let Some(_current) = self.gpu.current_again() {
            // SAFETY: made by `new`; what is on it, the driver still finishes.
            unsafe { (self.gpu.api.cuStreamDestroy_v2)(self.stream) };
        }
    }
}

/// Memory of a GPU, of the library's own, that the CPU sees a copy of. Not pinned: to make such memory and to give it back may wait for all
/// that GPUs do, other ranks' part in it included.
pub struct Shown {
    gpu: Arc<Gpu>,
    mem: Mem,
    seen: Vec<u8>,
}

impl Shown {
    /// So many bytes.
    pub fn new(gpu: &Arc<Gpu>, bytes: usize) -> Result<Shown> {
        let at = gpu.alloc(bytes)?;
        // SAFETY: an allocation of its own of so many bytes, until `drop`.
        let mem = unsafe { Mem::of((RS_DEVICE_CUDA, gpu.ordinal), ptr::with_exposed_provenance_mut(at as usize), bytes) };
        Ok(Shown { gpu: gpu.clone(), mem, seen: vec![0; bytes] })
    }
}

impl HostBlock for Shown {
    fn mem(&self) -> Mem {
        self.mem
    }

    fn show(&mut self, bytes: usize, stream: Stream) -> Result<&[u8]> {
        let Some(seen) = self.seen.get_mut(..bytes) else {
            bail!(RS_ERR_INTERNAL, "{bytes} bytes of a block of {}", self.mem.len());
        };
        self.gpu.download(seen, self.mem.addr() as u64, stream)?;
        Ok(seen)
    }
}

impl Drop for Shown {
    fn drop(&mut self) {
        self.gpu.free(self.mem.addr() as u64);
    }
}

/// Host memory that a GPU reads and writes.
pub struct Pinned {
    gpu: Arc<Gpu>,
    mem: Mem,
}

impl Pinned {
    /// So many bytes, for all GPUs.
    pub fn new(gpu: &Arc<Gpu>, bytes: usize) -> Result<Pinned> {
        let _current = gpu.current()?;
        let mut at = ptr::null_mut();
        // SAFETY: writes its one result.
        let answer = unsafe { (gpu.api.cuMemHostAlloc)(&mut at, bytes, sys::CU_MEMHOSTALLOC_PORTABLE) };
        gpu.api.done("cuMemHostAlloc", answer)?;
        // SAFETY: an allocation of so many bytes, until `drop`.
        let mem = unsafe { Mem::of((RS_DEVICE_CUDA_HOST, gpu.ordinal), at.cast(), bytes) };
        Ok(Pinned { gpu: gpu.clone(), mem })
    }

    /// As it is named in copies.
    pub fn mem(&self) -> Mem {
        self.mem
    }

    /// Writes its first bytes. No copy from it may be under way.
    pub fn write(&mut self, bytes: &[u8]) -> Result<()> {
        if bytes.len() > self.mem.len() {
            bail!(RS_ERR_INTERNAL, "{} bytes to {} of pinned memory", bytes.len(), self.mem.len());
        }
        // SAFETY: inside the allocation, which is host memory of our own.
        unsafe { ptr::copy_nonoverlapping(bytes.as_ptr(), self.mem.addr() as *mut u8, bytes.len()) };
        Ok(())
    }

    /// Reads bytes from `at` on. No copy to it may be under way.
    pub fn read(&self, at: usize, bytes: &mut [u8]) -> Result<()> {
        let Some(from) = self.mem.cut(at, bytes.len()) else {
            bail!(RS_ERR_INTERNAL, "{} bytes from {at} of {} of pinned memory", bytes.len(), self.mem.len());
        };
        // SAFETY: inside the allocation, which is host memory of our own.
        unsafe { ptr::copy_nonoverlapping(from.addr() as *const u8, bytes.as_mut_ptr(), bytes.len()) };
        Ok(())
    }
}

impl Drop for Pinned {
    fn drop(&mut self) {
        if let Some(_current) = self.gpu.current_again() {
            // SAFETY: made by `new`; whoever drops it knows that no copy uses it.
            unsafe { (self.gpu.api.cuMemFreeHost)(self.mem.addr() as *mut c_void) };
        }
    }
}

/// What is pinned. Held while something is pinned or let go, so that nobody finds it half done.
static REGISTERED: Mutex<Vec<(Mem, Weak<RegisteredHost>)>> = Mutex::new(Vec::new());

/// Host memory of others that all GPUs may use.
pub struct RegisteredHost {
    gpu: Arc<Gpu>,
    at: usize,
}

impl RegisteredHost {
    /// Pins it, unless it is: once for all who use it.
    pub fn shared(gpu: &Arc<Gpu>, mem: Mem) -> Result<Arc<RegisteredHost>> {
        let mut all = REGISTERED.lock().unwrap_or_else(PoisonError::into_inner);
        all.retain(|known| known.1.strong_count() > 0);
        if let Some(known) = all.iter().find(|known| known.0 == mem).and_then(|known| known.1.upgrade()) {
            return Ok(known);
        }
        let new = Arc::new(RegisteredHost::new(gpu, mem)?);
        all.push((mem, Arc::downgrade(&new)));
        Ok(new)
    }

    fn new(gpu: &Arc<Gpu>, mem: Mem) -> Result<RegisteredHost> {
        if !gpu.host_addresses {
            bail!(RS_ERR_UNSUPPORTED, "this GPU does not use registered host memory at the host's addresses");
        }
        let _current = gpu.current()?;
        let portable = sys::CU_MEMHOSTREGISTER_PORTABLE | sys::CU_MEMHOSTREGISTER_DEVICEMAP;
        // SAFETY: memory of whoever made the `Mem`, there for as long as it is pinned.
        let answer = unsafe { (gpu.api.cuMemHostRegister_v2)(ptr::with_exposed_provenance_mut(mem.addr()), mem.len(), portable) };
        gpu.api.done("cuMemHostRegister", answer)?;
        Ok(RegisteredHost { gpu: gpu.clone(), at: mem.addr() })
    }
}

impl Drop for RegisteredHost {
    fn drop(&mut self) {
        let _all = REGISTERED.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(_current) = self.gpu.current_again() {
            // SAFETY: pinned by `new`; whoever drops it knows that no stream uses it.
            unsafe { (self.gpu.api.cuMemHostUnregister)(ptr::with_exposed_provenance_mut(self.at)) };
        }
    }
}
