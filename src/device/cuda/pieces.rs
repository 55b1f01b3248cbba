//! Memory that is mapped piece by piece: the driver's virtual memory interface, as behind PyTorch's expandable segments.
//!
//! There an allocation (cuMemCreate) has no address of its own. It is mapped into a range of reserved addresses, as a rule several of
//! them one behind the other, and a block lies in one or more. One that was created for it has a descriptor; a process that gets that
//! maps the same memory at an address of its own.
//!
//! What is relied on, as cuda.h has it: CU_POINTER_ATTRIBUTE_MAPPING_BASE_ADDR and _SIZE are of the mapping that an address lies in, not
//! of all that was reserved with it; CU_POINTER_ATTRIBUTE_MEMORY_BLOCK_ID is the allocation's; a mapping begins at its allocation's first
//! byte (cuMemMap takes no other offset); an allocation stays until its last handle and its last mapping in any process are gone. A driver
//! that took the first otherwise would give two ids within what it calls a mapping, or, at the reader, refuse to map more than the
//! allocation has.

use super::gpu::Gpu;
use super::ipc::Opened;
use crate::abi::*;
use crate::device::Piece;
use crate::error::{Error, Result, bail, err};
use cudarc::driver::sys::{
    CUdeviceptr, CUmemAccess_flags, CUmemAccessDesc, CUmemAllocationHandleType, CUmemGenericAllocationHandle, CUmemLocation,
    CUmemLocationType,
};
use std::ffi::{c_int, c_uint, c_void};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::ptr;
use std::sync::Arc;

/// A descriptor of the process, as the driver calls it.
const DESCRIPTOR: c_uint = CUmemAllocationHandleType::CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR.0;

/// The piece that an address lies in, and where it is mapped. An error says why other processes cannot open it.
pub fn piece(gpu: &Gpu, at: CUdeviceptr) -> Result<(CUdeviceptr, Piece)> {
    let Some(calls) = &gpu.api.mappings else {
        bail!(
            RS_ERR_UNSUPPORTED,
            "it is not from cudaMalloc(), and this CUDA driver is too old to share other memory; use rs_comm_from_nccl() with a GPU for \
             each rank"
        );
    };
    let place = gpu.mapping(at)?;
    if place.pool {
        bail!(
            RS_ERR_UNSUPPORTED,
            "it is from a stream-ordered pool (cudaMallocAsync), which other processes cannot open; use cudaMalloc(), or \
             rs_comm_from_nccl() with a GPU for each rank"
        );
    }
    if place.handles & DESCRIPTOR == 0 {
        bail!(
            RS_ERR_UNSUPPORTED,
            "it was created without a handle that other processes can open: requestedHandleTypes is {:#x} and has to have \
             CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR (recent releases of PyTorch ask for it for their expandable segments, but for \
             TORCH_CUDA_EXPANDABLE_SEGMENTS_IPC=0); else use cudaMalloc(), or rs_comm_from_nccl() with a GPU \
             for each rank",
            place.handles
        );
    }
    let inside = at.checked_sub(place.base).is_some_and(|offset| offset < place.len);
    let Some(last) = place.base.checked_add(place.len).filter(|_| inside).map(|end| end - 1) else {
        bail!(RS_ERR_DEVICE, "the driver says that it lies in {} bytes at {:#x}, where it does not", place.len, place.base);
    };
    if gpu.mapping(last)?.id != place.id {
        bail!(
            RS_ERR_UNSUPPORTED,
            "this driver does not tell the allocations apart that are mapped at {:#x}; use rs_comm_from_nccl() with a GPU for each rank",
            place.base
        );
    }
    let _current = gpu.current()?;
    let (mut handle, mut file): (CUmemGenericAllocationHandle, c_int) = (0, -1);
    // SAFETY: each call writes its one result, of which the second is an int for this kind of handle; the handle is given back once.
    let exported = unsafe {
        let kept = (calls.cuMemRetainAllocationHandle)(&mut handle, ptr::with_exposed_provenance_mut(place.base as usize));
        gpu.api.done("cuMemRetainAllocationHandle", kept)?;
        let exported = (calls.cuMemExportToShareableHandle)((&raw mut file).cast(), handle, DESCRIPTOR, 0);
        (calls.cuMemRelease)(handle);
        gpu.api.done("cuMemExportToShareableHandle", exported)
    };
    exported.map_err(open_files)?;
    if file < 0 {
        bail!(RS_ERR_DEVICE, "cuMemExportToShareableHandle gave descriptor {file}");
    }
    // SAFETY: a new descriptor, which the driver has made for us.
    let file = unsafe { OwnedFd::from_raw_fd(file) };
    Ok((place.base, (Arc::new(file), place.len)))
}

/// Each piece takes a descriptor for a moment, on both sides.
fn open_files(e: Error) -> Error {
    err!(e.status(), "{e} (or is the limit of open files, ulimit -n, reached?)")
}

/// Maps pieces that another process exported, one behind the other. It may have sent anything: the driver takes no descriptor that is
/// not of an allocation, and maps no more of one than there is.
pub fn map(gpu: &Arc<Gpu>, pieces: &[Piece]) -> Result<Opened> {
    let Some(calls) = &gpu.api.mappings else {
        bail!(RS_ERR_UNSUPPORTED, "this CUDA driver is too old to open what is mapped piece by piece; use rs_comm_from_nccl()");
    };
    let Some(bytes) = pieces.iter().try_fold(0u64, |sum, piece| sum.checked_add(piece.1)) else {
        bail!(RS_ERR_COMM, "its pieces are longer than an address space");
    };
    let api = gpu.api;
    let _current = gpu.current()?;
    let mut base = 0;
    // SAFETY: writes its one result; no alignment is asked for beyond the driver's own.
    api.done("cuMemAddressReserve", unsafe { (calls.cuMemAddressReserve)(&mut base, bytes as usize, 0, 0, 0) })?;
    // From here on dropping it undoes what was done so far.
    let mut opened = Opened { gpu: gpu.clone(), base, bytes, pieces: Some(vec![]) };
    let mut at = base;
    for (file, len) in pieces {
        let mut handle: CUmemGenericAllocationHandle = 0;
        // This kind of handle is passed as a number.
        let number: *mut c_void = ptr::without_provenance_mut(file.as_raw_fd() as usize);
        // SAFETY: writes its one result. The piece goes to addresses reserved above, behind the last one; the handle is given back
        // once, and the mapping keeps the memory.
        let mapped = unsafe {
            let imported = (calls.cuMemImportFromShareableHandle)(&mut handle, number, DESCRIPTOR);
            api.done("cuMemImportFromShareableHandle", imported)?;
            let mapped = (calls.cuMemMap)(at, *len as usize, 0, handle, 0);
            (calls.cuMemRelease)(handle);
            mapped
        };
        api.done("cuMemMap", mapped)?;
        opened.pieces.get_or_insert_default().push(*len);
        at += len;
    }
    // Reading alone would do; whether that can be had is not said for all kinds of memory.
    let access = CUmemAccessDesc {
        location: CUmemLocation { type_: CUmemLocationType::CU_MEM_LOCATION_TYPE_DEVICE, id: gpu.ordinal },
        flags: CUmemAccess_flags::CU_MEM_ACCESS_FLAGS_PROT_READWRITE,
    };
    // SAFETY: all of the range is mapped; the description outlives the call.
    api.done("cuMemSetAccess", unsafe { (calls.cuMemSetAccess)(base, bytes as usize, &access, 1) })?;
    Ok(opened)
}

/// Undoes [`map`], in its GPU's context: pieces of these lengths were mapped from `base` on, where `bytes` were reserved.
pub fn unmap(gpu: &Gpu, base: CUdeviceptr, bytes: u64, lengths: &[u64]) {
    let Some(calls) = &gpu.api.mappings else { return };
    let mut at = base;
    for len in lengths {
        // SAFETY: mapped once, as a whole, and nothing that reads it is running any more.
        unsafe { (calls.cuMemUnmap)(at, *len as usize) };
        at += len;
    }
    // SAFETY: reserved once; nothing is mapped there any more.
    unsafe { (calls.cuMemAddressFree)(base, bytes as usize) };
}
