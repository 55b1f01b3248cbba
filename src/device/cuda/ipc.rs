//! Memory of a GPU that another process of the host reads.
//!
//! What comes from cudaMalloc has the driver's IPC handle: of a whole allocation, which frameworks cut into many blocks. It is asked for
//! once an exchange, and opened once a process. What is mapped piece by piece has descriptors ([`pieces`](super::pieces)), where it was
//! made for that. Stream-ordered pools have neither.

use super::gpu::Gpu;
use super::pieces;
use crate::abi::*;
use crate::device::{Allocation, Export, Exports, HANDLE, Imported, Mem, Piece};
use crate::error::{Error, Result, bail};
use cudarc::driver::sys::{self, CUdeviceptr, CUipcMemHandle};
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::ffi::c_char;
use std::ptr;
use std::sync::{Arc, PoisonError, Weak};

/// An allocation of another process, open as long as this lives.
pub struct Opened {
    pub gpu: Arc<Gpu>,
    pub base: CUdeviceptr,
    pub bytes: u64,
    /// Lengths of the pieces that are mapped there; `None`: it was opened by its handle.
    pub pieces: Option<Vec<u64>>,
}

impl Drop for Opened {
    fn drop(&mut self) {
        let Some(_current) = self.gpu.current_again() else { return };
        match &self.pieces {
            Some(lengths) => pieces::unmap(&self.gpu, self.base, self.bytes, lengths),
            None => {
                // SAFETY: opened once, and nothing that reads it is running any more.
                unsafe { (self.gpu.api.cuIpcCloseMemHandle)(self.base) };
            }
        }
    }
}

/// What an allocation that is open was opened by.
pub enum Key {
    Named([u8; HANDLE]),
    /// Of one exchange: descriptors do not say whether they are of the same memory. Weak, so that they are closed once it is open.
    Pieces(Weak<[Piece]>),
}

impl Key {
    fn new(of: &Allocation) -> Key {
        match of {
            Allocation::Named(handle) => Key::Named(*handle),
            Allocation::Pieces(list) => Key::Pieces(Arc::downgrade(list)),
        }
    }

    fn is(&self, of: &Allocation) -> bool {
        match (self, of) {
            (Key::Named(one), Allocation::Named(other)) => one == other,
            (Key::Pieces(one), Allocation::Pieces(other)) => ptr::addr_eq(one.as_ptr(), Arc::as_ptr(other)),
            _ => false,
        }
    }
}

/// See [`crate::device::export`].
pub fn export(lists: &[&[Mem]]) -> Vec<Exports> {
    let mut known = Known::default();
    lists.iter().map(|blocks| known.list(blocks)).collect()
}

/// What has been asked for.
#[derive(Default)]
struct Known {
    /// By GPU and begin of the allocation.
    handles: HashMap<(i32, CUdeviceptr), [u8; HANDLE]>,
    /// By the address at which the piece is mapped, which is of one GPU.
    pieces: BTreeMap<CUdeviceptr, Piece>,
}

/// How a block can be opened.
enum Found {
    Named([u8; HANDLE], u64),
    /// By the known pieces that it lies in.
    Pieces,
}

impl Known {
    fn list(&mut self, blocks: &[Mem]) -> Exports {
        let mut out = Exports::default();
        let mut used = BTreeSet::new();
        let mut find = |block: &Mem| match block.kind() {
            (RS_DEVICE_CUDA, ordinal) if !block.is_empty() => {
                let found = Gpu::shared(ordinal).and_then(|gpu| self.find(&gpu, block, &mut used));
                Some(found.map_err(|e| e.context(format_args!("memory of cuda:{ordinal} at {:#x}", block.addr()))))
            }
            _ => None,
        };
        let found: Vec<Option<Result<Found>>> = blocks.iter().map(&mut find).collect();
        let runs = self.runs(&used);
        for (block, found) in blocks.iter().zip(found) {
            let (at, len) = (block.addr() as u64, block.len() as u64);
            out.blocks.push(match found {
                None => None,
                Some(Ok(Found::Named(handle, offset))) => Some(Export { of: Allocation::Named(handle), offset, len }),
                Some(Ok(Found::Pieces)) => {
                    let run = &runs[runs.partition_point(|run| run.0 <= at) - 1];
                    Some(Export { of: Allocation::Pieces(run.1.clone()), offset: at - run.0, len })
                }
                Some(Err(e)) => {
                    if out.refused.is_none() {
                        log::info!("other processes cannot open {e}");
                    }
                    out.refused.get_or_insert(e);
                    None
                }
            });
        }
        out
    }

    fn find(&mut self, gpu: &Gpu, block: &Mem, used: &mut BTreeSet<CUdeviceptr>) -> Result<Found> {
        let begin = block.addr() as u64;
        if gpu.about(begin)?.named {
            let (base, _) = gpu.range(begin)?;
            let handle = match self.handles.get(&(gpu.ordinal, base)) {
                Some(&handle) => handle,
                None => *self.handles.entry((gpu.ordinal, base)).or_insert(gpu.ipc_handle(base)?),
            };
            return Ok(Found::Named(handle, begin - base));
        }
        let (mut at, end) = (begin, begin + block.len() as u64);
        let mut bases = vec![];
        while at < end {
            let known = self.pieces.range(..=at).next_back().map(|(&base, piece)| (base, piece.1));
            let (base, len) = match known.filter(|&(base, len)| at - base < len) {
                Some(known) => known,
                None => {
                    let (base, piece) = pieces::piece(gpu, at)?;
                    let len = piece.1;
                    self.pieces.insert(base, piece);
                    (base, len)
                }
            };
            bases.push(base);
            at = base + len;
        }
        used.extend(bases);
        Ok(Found::Pieces)
    }

    /// The pieces at these addresses, those that follow each other without a gap together, with the address of the first.
    fn runs(&self, used: &BTreeSet<CUdeviceptr>) -> Vec<(CUdeviceptr, Arc<[Piece]>)> {
        let mut runs: Vec<(CUdeviceptr, CUdeviceptr, Vec<Piece>)> = vec![];
        for &base in used {
            let piece = self.pieces[&base].clone();
            let end = base + piece.1;
            match runs.last_mut().filter(|run| run.1 == base) {
                Some(run) => {
                    run.1 = end;
                    run.2.push(piece);
                }
                None => runs.push((base, end, vec![piece])),
            }
        }
        runs.into_iter().map(|(base, _, pieces)| (base, pieces.into())).collect()
    }
}

/// A block that another process exported, for as long as the second part lives.
pub fn import(gpu: &Arc<Gpu>, export: &Export) -> Result<Imported> {
    let mut all = gpu.imported.lock().unwrap_or_else(PoisonError::into_inner);
    all.retain(|known| known.1.strong_count() > 0);
    let known = all.iter().find(|known| known.0.is(&export.of)).and_then(|known| known.1.upgrade());
    let opened = match known {
        Some(opened) => opened,
        None => {
            let opened = match &export.of {
                Allocation::Named(handle) => gpu.open(handle),
                Allocation::Pieces(list) => pieces::map(gpu, list),
            };
            let hint = |e: Error| e.context("memory of another process (its GPU must be the same as this rank's, or a peer)");
            let opened = Arc::new(opened.map_err(hint)?);
            all.push((Key::new(&export.of), Arc::downgrade(&opened)));
            opened
        }
    };
    drop(all);
    let (base, bytes) = (opened.base, opened.bytes);
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
    pub fn range(&self, at: CUdeviceptr) -> Result<(CUdeviceptr, u64)> {
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

    fn open(self: &Arc<Gpu>, handle: &[u8; HANDLE]) -> Result<Opened> {
        let _current = self.current()?;
        let mut base = 0;
        let handle = CUipcMemHandle { reserved: handle.map(|b| b as c_char) };
        let flags = sys::CUipcMem_flags::CU_IPC_MEM_LAZY_ENABLE_PEER_ACCESS as u32;
        // SAFETY: writes its one result.
        let answer = unsafe { (self.api.cuIpcOpenMemHandle_v2)(&mut base, handle, flags) };
        self.api.done("cuIpcOpenMemHandle", answer)?;
        // From here on dropping it closes it.
        let mut opened = Opened { gpu: self.clone(), base, bytes: 0, pieces: None };
        opened.bytes = self.range(base)?.1;
        Ok(opened)
    }
}
