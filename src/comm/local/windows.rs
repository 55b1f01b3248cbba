//! What ranks let each other read, and how: mapped, through the kernel, or not at all.
//!
//! Blocks that lie in `rs_mem_alloc` memory are mapped by their reader. Other memory is read through the kernel where the caller forces
//! that, and sent through rings otherwise. Knows blocks, segments, ranks. Must not know what the blocks hold.

use super::mesh::Mesh;
use super::segment::{self, Segment};
use super::socket::{Frame, Kind, Letter};
use super::sys::Mapping;
use super::{Force, vmread};
use crate::abi::*;
use crate::comm::{Access, Deadline, Opened, Window};
use crate::device::{self, Export, HANDLE, Mem};
use crate::error::{Error, Result, bail, err};
use crate::geom::StridedCopy;
use std::os::fd::BorrowedFd;
use std::sync::{Arc, Mutex, PoisonError};

/// Bytes of a block in an offer: address, length, segment (1-based; 0: none; [`EXPORTED`]), place in it or in the exported allocation,
/// DLPack's device type and id, handle of the export.
const BLOCK: usize = 40 + HANDLE;
/// In the place of a segment: device memory with a handle.
const EXPORTED: u64 = u64::MAX;

/// The segments of other ranks that this rank maps, with their owners.
#[derive(Debug, Default)]
pub struct Mapped(Mutex<Vec<(u32, Mapping)>>);

/// What one rank lets another read.
struct Offer {
    bytes: Vec<u8>,
    segments: Vec<Arc<Segment>>,
}

impl Offer {
    fn new(blocks: &[Mem]) -> Result<Offer> {
        let mut offer = Offer { bytes: Vec::with_capacity(blocks.len() * BLOCK), segments: vec![] };
        for (&block, export) in blocks.iter().zip(device::export(blocks)?) {
            let (mut number, mut place, mut handle) = (0, 0, [0; HANDLE]);
            if let Some(export) = export {
                (number, place, handle) = (EXPORTED, export.offset, export.handle);
            } else if let Some((segment, offset)) = segment::find(block) {
                place = offset;
                let known = offer.segments.iter().rposition(|s| Arc::ptr_eq(s, &segment));
                let at = known.unwrap_or_else(|| {
                    offer.segments.push(segment);
                    offer.segments.len() - 1
                });
                number = 1 + at as u64;
            }
            let (kind, id) = block.kind();
            let kind = u64::from(kind as u32) | u64::from(id as u32) << 32;
            let words = [block.addr() as u64, block.len() as u64, number, place, kind];
            offer.bytes.extend(words.iter().flat_map(|w| w.to_ne_bytes()));
            offer.bytes.extend(handle);
        }
        Ok(offer)
    }
}

/// A block as its owner describes it.
struct Block {
    addr: u64,
    len: u64,
    segment: Option<usize>,
    place: usize,
    kind: (i32, i32),
    export: Option<Export>,
}

impl Block {
    fn in_this_process(&self) -> Mem {
        // SAFETY: memory of a rank in this process, which it offers until an exchange without it; copied as any other rank's.
        unsafe { Mem::of(self.kind, std::ptr::with_exposed_provenance_mut(self.addr as usize), self.len as usize) }
    }
}

fn blocks(frame: &Frame) -> Option<Vec<Block>> {
    if frame.bytes.len() % BLOCK != 0 {
        return None;
    }
    let parse = |b: &[u8]| {
        let word = |i: usize| b[8 * i..8 * i + 8].try_into().map_or(0, u64::from_ne_bytes);
        let (len, place) = (word(1), word(3));
        let exported = word(2) == EXPORTED;
        let handle = || b[40..].try_into().unwrap_or([0; HANDLE]);
        let block = Block {
            addr: word(0),
            len,
            segment: if exported { None } else { (word(2) as usize).checked_sub(1) },
            place: place as usize,
            kind: (word(4) as i32, (word(4) >> 32) as i32),
            export: exported.then(|| Export { handle: handle(), offset: place, len }),
        };
        block.addr.checked_add(block.len)?;
        let inside = match block.segment {
            None => true,
            Some(s) => segment::data(frame.memory.get(s)?) as u64 >= (block.place as u64).checked_add(block.len)?,
        };
        inside.then_some(block)
    };
    frame.bytes.chunks_exact(BLOCK).map(parse).collect()
}

/// See [`crate::comm::Windows::exchange`].
pub fn exchange(
    mesh: &Mesh,
    mapped: &Mapped,
    force: Option<Force>,
    offers: &[(u32, Vec<Mem>)],
    owners: &[u32],
    deadline: Deadline,
) -> Result<Opened> {
    let readers: Vec<u32> = offers.iter().map(|o| o.0).collect();
    let made: Vec<Offer> = offers.iter().map(|o| Offer::new(&o.1)).collect::<Result<_>>().map_err(|e| mesh.fail(e))?;
    let memory: Vec<Vec<BorrowedFd<'_>>> = made.iter().map(|o| o.segments.iter().map(|s| s.file()).collect()).collect();
    let letters = made.iter().zip(&memory).map(|(o, memory)| Letter { kind: Kind::Offer, bytes: &o.bytes, memory });
    let out: Vec<_> = readers.iter().copied().zip(letters).collect();
    let frames = mesh.swap(&out, Kind::Offer, owners, "say what it lets this rank read", deadline)?;

    let mut refused = None;
    let mut opened = Opened::default();
    for (&owner, frame) in owners.iter().zip(frames) {
        let Some(blocks) = blocks(&frame) else {
            return Err(mesh.fail(err!(RS_ERR_COMM, "{} offered blocks outside of its memory", mesh.who(owner))));
        };
        let bases = mapped.keep(owner, frame.memory, &blocks);
        let here = mesh.link(owner)?.socket.peer.pid == std::process::id() as i32;
        let mut list = Vec::with_capacity(blocks.len());
        for b in blocks {
            list.push(match b.segment.map(|s| &bases[s]) {
                Some(base) => Window::Mapped(base.block(b.place, b.len as usize)),
                // A process does not open its own memory.
                None if here && b.kind.0 != RS_DEVICE_CPU => Window::Mapped(b.in_this_process()),
                None if b.kind.0 != RS_DEVICE_CPU => b.export.map_or(Window::Sent, Window::Exported),
                None if force == Some(Force::Read) => match probe(mesh, owner, b.addr, b.len) {
                    Ok(()) => Window::Remote { addr: b.addr, len: b.len },
                    Err(e) => {
                        refused.get_or_insert(e);
                        Window::Sent
                    }
                },
                None => Window::Sent,
            });
        }
        opened.windows.push(list);
    }

    let code = |w: &Window| match w.access() {
        Access::Mapped => 0u8,
        Access::Remote => 1,
        Access::Sent => 2,
    };
    let grants: Vec<Vec<u8>> = opened.windows.iter().map(|list| list.iter().map(code).collect()).collect();
    let out: Vec<_> = owners.iter().zip(&grants).map(|(&r, bytes)| (r, Letter { kind: Kind::Grant, bytes, memory: &[] })).collect();
    let frames = mesh.swap(&out, Kind::Grant, &readers, "say how it reads this rank's memory", deadline)?;
    for ((reader, offered), frame) in offers.iter().zip(frames) {
        let access = |&b: &u8| [Access::Mapped, Access::Remote, Access::Sent].get(b as usize).copied();
        let list: Option<Vec<Access>> = frame.bytes.iter().map(access).collect();
        let Some(list) = list.filter(|l| l.len() == offered.len()) else {
            return Err(mesh.fail(err!(RS_ERR_COMM, "{} answers for other blocks than were offered", mesh.who(*reader))));
        };
        if force == Some(Force::Read) && list.contains(&Access::Sent) {
            refused.get_or_insert_with(|| {
                err!(RS_ERR_COMM, "{} may not read this rank's memory, and RS_LOCAL_READ forbids to send it", mesh.who(*reader))
            });
        }
        opened.granted.push(list);
    }
    refused.map_or(Ok(opened), Err)
}

/// A mapped segment's first byte here.
struct Base(usize);

impl Base {
    fn block(&self, place: usize, len: usize) -> Mem {
        // SAFETY: `blocks` has checked that the block lies in the segment; the mapping stays until the communicator goes or the owner
        // frees the segment, which it may only when no plan names it any more. Read only.
        unsafe { Mem::new((self.0 + place) as *mut u8, len) }
    }
}

impl Mapped {
    /// The mapping that a block lies in, as a device can pin it.
    pub fn whole(&self, block: Mem) -> Result<Option<Mem>> {
        let all = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let holds = |m: &Mapping| m.addr() <= block.addr() && block.addr() + block.len() <= m.addr() + m.len();
        let Some((_, mapping)) = all.iter().find(|(_, m)| holds(m)) else { return Ok(None) };
        mapping.unlock().map_err(|e| err!(RS_ERR_MEMORY, "cannot make shared memory writable for a device: {e}"))?;
        Ok(Some(Base(mapping.addr()).block(0, mapping.len())))
    }

    /// Keeps an owner's segments, those that were there already where they are; lets go what the owner has freed. Segments that are not
    /// offered now stay: another container may read them.
    fn keep(&self, owner: u32, new: Vec<Mapping>, blocks: &[Block]) -> Vec<Base> {
        let mut all = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        all.retain(|(rank, m)| *rank != owner || segment::in_use(m));
        let mut known = |(at, m): (usize, Mapping)| match all.iter().find(|(rank, k)| (*rank, k.id()) == (owner, m.id())) {
            Some((_, known)) => Base(known.addr()),
            None => {
                // Now rather than in the first sync.
                for b in blocks.iter().filter(|b| b.segment == Some(at)) {
                    m.populate(b.place, b.len as usize, false);
                }
                let base = Base(m.addr());
                all.push((owner, m));
                base
            }
        };
        new.into_iter().enumerate().map(&mut known).collect()
    }
}

fn probe(mesh: &Mesh, owner: u32, addr: u64, len: u64) -> Result<()> {
    let pid = mesh.link(owner)?.socket.peer.pid;
    vmread::probe(pid, addr, len).map_err(|e| refusal(mesh, owner, &e))
}

/// See [`crate::comm::Windows::read`].
pub fn read(mesh: &Mesh, owner: u32, window: &Window, dst: Mem, copy: &StridedCopy) -> Result<()> {
    let Window::Remote { addr, len } = *window else {
        bail!(RS_ERR_INTERNAL, "a window of rank {owner} of another kind than 'remote' is to be read");
    };
    if copy.src_end() > len || copy.dst_end() > dst.len() as u64 {
        bail!(
            RS_ERR_INTERNAL,
            "a copy reads up to byte {} of {len} of rank {owner} and writes up to byte {} of {}",
            copy.src_end(),
            copy.dst_end(),
            dst.len()
        );
    }
    let pid = mesh.link(owner)?.socket.peer.pid;
    // SAFETY: the copy ends inside `dst` (checked above).
    unsafe { vmread::read(pid, addr, dst, copy) }.map_err(|e| {
        // A dead owner is the better reason.
        mesh.check().err().unwrap_or_else(|| refusal(mesh, owner, &e))
    })
}

fn refusal(mesh: &Mesh, owner: u32, e: &std::io::Error) -> Error {
    let who = mesh.who(owner);
    match e.raw_os_error() {
        Some(libc::ESRCH) => err!(RS_ERR_COMM, "process_vm_readv of {who}: it has ended, or runs in another pid namespace"),
        Some(libc::EPERM | libc::EACCES) => err!(
            RS_ERR_COMM,
            "process_vm_readv of {who} is not allowed here (kernel.yama.ptrace_scope, a container's seccomp filter, a process that \
             cannot be dumped): use memory of rs_mem_alloc, or no RS_LOCAL_READ"
        ),
        Some(libc::EFAULT) => err!(RS_ERR_COMM, "process_vm_readv of {who}: the memory that it offered is not mapped there"),
        _ => err!(RS_ERR_COMM, "process_vm_readv of {who}: {e}"),
    }
}
