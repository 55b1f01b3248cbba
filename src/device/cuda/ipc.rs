//! Memory of a GPU that another process of the host reads: the driver's IPC handles.
//!
//! A handle is of a whole allocation, which frameworks cut into many blocks: it is asked for once an exchange, and opened once a process.
//! Memory that does not come from cudaMalloc (the virtual memory interface, as behind PyTorch's expandable segments; stream-ordered pools)
//! has none.

use super::gpu::Gpu;
use crate::abi::*;
use crate::device::{Export, HANDLE, Imported, Mem};
use crate::error::{Error, Result, bail};
use cudarc::driver::sys::{self, CUdeviceptr, CUipcMemHandle};
use std::collections::HashMap;
use std::ffi::c_char;
use std::ptr;
use std::sync::{Arc, PoisonError};

/// An allocation of another process, open as long as this lives.
pub struct Opened {
    gpu: Arc<Gpu>,
    base: CUdeviceptr,
}

impl Drop for Opened {
    fn drop(&mut self) {
        if let Some(_current) = self.gpu.current_again() {
            // SAFETY: opened once, and nothing that reads it is running any more.
            unsafe { (self.gpu.api.cuIpcCloseMemHandle)(self.base) };
        }
    }
}

/// What other processes need to open each of these blocks of GPUs' memory; `None`: they cannot.
pub fn export(blocks: &[Mem]) -> Result<Vec<Option<Export>>> {
    let mut known: HashMap<(i32, CUdeviceptr), Option<[u8; HANDLE]>> = HashMap::new();
    let mut out = Vec::with_capacity(blocks.len());
    for block in blocks {
        let (kind, ordinal) = block.kind();
        if kind != RS_DEVICE_CUDA || block.is_empty() {
            out.push(None);
            continue;
        }
        let gpu = Gpu::shared(ordinal)?;
        let (base, _) = gpu.range(block.addr() as u64)?;
        let handle = match known.get(&(ordinal, base)) {
            Some(&handle) => handle,
            None => {
                let handle = gpu.ipc_handle(base);
                if let Err(e) = &handle {
                    log::info!("cuda:{ordinal}: other processes cannot open the memory at {base:#x}: {e}");
                }
                *known.entry((ordinal, base)).or_insert(handle.ok())
            }
        };
        let offset = block.addr() as u64 - base;
        out.push(handle.map(|handle| Export { handle, offset, len: block.len() as u64 }));
    }
    Ok(out)
}

/// A block that another process exported, for as long as the second part lives.
pub fn import(gpu: &Arc<Gpu>, export: &Export) -> Result<Imported> {
    let mut all = gpu.imported.lock().unwrap_or_else(PoisonError::into_inner);
    all.retain(|known| known.1.strong_count() > 0);
    let known = all.iter().find(|known| known.0 == export.handle).and_then(|known| known.1.upgrade());
    let opened = match known {
        Some(opened) => opened,
        None => {
            let base = gpu.open(&export.handle)?;
            let opened = Arc::new(Opened { gpu: gpu.clone(), base });
            all.push((export.handle, Arc::downgrade(&opened)));
            opened
        }
    };
    drop(all);
    let (base, bytes) = gpu.range(opened.base)?;
    if export.offset.checked_add(export.len).is_none_or(|end| end > bytes) {
        bail!(RS_ERR_COMM, "bytes {} to {} more of an allocation of another process, which has {bytes}", export.offset, export.len);
    }
    let (at, len) = ((base + export.offset) as usize, export.len as usize);
    // Of whichever GPU it is, which may have no number in this process.
    // SAFETY: it lies in the allocation (checked above), which stays open as long as `opened`.
    Ok((unsafe { Mem::of((RS_DEVICE_CUDA, gpu.ordinal), ptr::with_exposed_provenance_mut(at), len) }, opened))
}

impl Gpu {
    /// The allocation that an address lies in: its begin and its length in bytes.
    fn range(&self, at: CUdeviceptr) -> Result<(CUdeviceptr, u64)> {
        let _current = self.current()?;
        let (mut base, mut bytes) = (0, 0);
        // SAFETY: writes its two results.
        let answer = unsafe { (self.api.cuMemGetAddressRange_v2)(&mut base, &mut bytes, at) };
        self.api.done("cuMemGetAddressRange", answer).map(|()| (base, bytes as u64))
    }

    fn ipc_handle(&self, base: CUdeviceptr) -> Result<[u8; HANDLE]> {
        let _current = self.current()?;
        let mut handle = CUipcMemHandle { reserved: [0; HANDLE] };
        // SAFETY: writes its one result.
        let answer = unsafe { (self.api.cuIpcGetMemHandle)(&mut handle, base) };
        self.api.done("cuIpcGetMemHandle", answer).map(|()| handle.reserved.map(|c| c as u8))
    }

    fn open(&self, handle: &[u8; HANDLE]) -> Result<CUdeviceptr> {
        let _current = self.current()?;
        let mut base = 0;
        let handle = CUipcMemHandle { reserved: handle.map(|b| b as c_char) };
        let flags = sys::CUipcMem_flags::CU_IPC_MEM_LAZY_ENABLE_PEER_ACCESS as u32;
        // SAFETY: writes its one result.
        let answer = unsafe { (self.api.cuIpcOpenMemHandle_v2)(&mut base, handle, flags) };
        let hint = |e: Error| e.context("memory of another process (its GPU must be the same as this rank's, or a peer)");
        self.api.done("cuIpcOpenMemHandle", answer).map_err(hint).map(|()| base)
    }
}
