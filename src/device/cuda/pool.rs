//! Our own memory on a GPU: staging, gathers, lists of copies.
//!
//! It comes from a stream-ordered pool of our own, not from the device's default one, for two reasons. NCCL moves bytes between ranks
//! that are threads of one process from buffer to buffer, each GPU in the other's memory: what comes from a pool it reaches only if the
//! pool is opened to it, and the default pool is the engine's. And what a pool gives again, a stream may have to wait for: here these
//! are our own streams, never the engine's.

use super::api::Pools;
use super::gpu::Gpu;
use crate::error::Result;
use cudarc::driver::sys::{
    CUdeviceptr, CUmemAccess_flags, CUmemAccessDesc, CUmemAllocationHandleType, CUmemAllocationType, CUmemLocation,
    CUmemLocationType, CUmemPoolProps, CUmemoryPool,
};
use std::ptr;

/// A pool, and the calls that it takes.
pub struct Pool {
    calls: &'static Pools,
    handle: CUmemoryPool,
}

fn on(ordinal: i32) -> CUmemLocation {
    CUmemLocation { type_: CUmemLocationType::CU_MEM_LOCATION_TYPE_DEVICE, id: ordinal }
}

impl Pool {
    pub fn new(gpu: &Gpu, calls: &'static Pools) -> Result<Pool> {
        let wanted = CUmemPoolProps {
            allocType: CUmemAllocationType::CU_MEM_ALLOCATION_TYPE_PINNED,
            handleTypes: CUmemAllocationHandleType::CU_MEM_HANDLE_TYPE_NONE,
            location: on(gpu.ordinal),
            win32SecurityAttributes: ptr::null_mut(),
            maxSize: 0,
            usage: 0,
            reserved: [0; 54],
        };
        let mut handle = ptr::null_mut();
        let _current = gpu.current()?;
        // SAFETY: writes its one result; the description outlives the call.
        gpu.api.done("cuMemPoolCreate", unsafe { (calls.cuMemPoolCreate)(&mut handle, &wanted) })?;
        Ok(Pool { calls, handle })
    }

    /// In its GPU's context, once; what it gave goes back to the device as its streams release it.
    pub fn destroy(&self) {
        // SAFETY: nothing is asked of it any more.
        unsafe { (self.calls.cuMemPoolDestroy)(self.handle) };
    }
}

impl Gpu {
    /// Memory that every stream may use at once.
    pub fn alloc(&self, bytes: usize) -> Result<CUdeviceptr> {
        let _current = self.current()?;
        let mut at = 0;
        match &self.pool {
            // SAFETY: writes its one result; our stream lives as long as `self`.
            Some(pool) => unsafe {
                let answer = (pool.calls.cuMemAllocFromPoolAsync)(&mut at, bytes.max(1), pool.handle, self.stream);
                self.api.done("cuMemAllocFromPoolAsync", answer)?;
                let waited = self.api.done("cuStreamSynchronize", (self.api.cuStreamSynchronize)(self.stream));
                waited.inspect_err(|_| self.free(at))?;
            },
            // SAFETY: writes its one result.
            None => self.api.done("cuMemAlloc", unsafe { (self.api.cuMemAlloc_v2)(&mut at, bytes.max(1)) })?,
        }
        Ok(at)
    }

    /// Of [`Gpu::alloc`]; nothing uses it any more.
    pub fn free(&self, at: CUdeviceptr) {
        let Some(_current) = self.current_again() else { return };
        let answer = match &self.pool {
            // SAFETY: `alloc` gave it, and its users are done.
            Some(pool) => unsafe { (pool.calls.cuMemFreeAsync)(at, self.stream) },
            // SAFETY: as above, but for an upload of ours that failed half-way.
            None => unsafe {
                (self.api.cuStreamSynchronize)(self.stream);
                (self.api.cuMemFree_v2)(at)
            },
        };
        if let Err(e) = self.api.done("cuMemFree", answer) {
            log::warn!("cuda:{}: {e}", self.ordinal);
        }
    }

    /// Lets another GPU of this process use what [`Gpu::alloc`] gives and has given here, if it can. What comes from cuMemAlloc is
    /// opened by whoever uses it, with peer access.
    pub fn open_to(&self, other: &Gpu) {
        let Some(pool) = &self.pool else { return };
        let access = CUmemAccessDesc { location: on(other.ordinal), flags: CUmemAccess_flags::CU_MEM_ACCESS_FLAGS_PROT_READWRITE };
        let opened = other.is_peer_of(self.handle).and_then(|is_peer| {
            if !is_peer {
                return Ok(());
            }
            let _current = self.current()?;
            // SAFETY: the description outlives the call.
            self.api.done("cuMemPoolSetAccess", unsafe { (pool.calls.cuMemPoolSetAccess)(pool.handle, &access, 1) })
        });
        if let Err(e) = opened {
            log::warn!(
                "cuda:{}: its staging is not open to cuda:{} ({e}); NCCL between the two in this process needs NCCL_P2P_DIRECT_DISABLE=1",
                self.ordinal,
                other.ordinal
            );
        }
    }
}
