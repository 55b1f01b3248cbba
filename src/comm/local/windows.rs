//! What ranks let each other read, and how: mapped, through the kernel, or not at all.
//!
//! Blocks that lie in `rs_mem_alloc` memory are mapped by their reader. Other memory is read through the kernel where the caller forces
//! that, and sent through rings otherwise. A device's memory is opened by the reader's device. Knows blocks, segments, ranks. Must not
//! know what the blocks hold.

use super::mesh::Mesh;
use super::segment::{self, Segment};
use super::socket::{Frame, Kind, Letter};
use super::sys::Mapping;
use super::{Force, vmread};
use crate::abi::*;
use crate::comm::{Access, Deadline, Kept, Opened, Window};
use crate::device::{self, Allocation, Export, Exports, HANDLE, Mem, Piece};
use crate::error::{Error, Result, bail, err};
use crate::geom::StridedCopy;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::{Arc, Mutex, PoisonError};

/// Bytes of a block in an offer: address, length, what it lies in ([`PRIVATE`], ...), the number of that, place in it, DLPack's device
/// type and id, name of the allocation. Before all of them stands their number. Behind them, of each descriptor: the piece's length in
/// bytes, and whether it is the [`LAST`] of those that lie one behind the other. Then why a block of a device cannot be opened.
const BLOCK: usize = 48 + HANDLE;
/// Memory that the reader cannot open.
const PRIVATE: u64 = 0;
/// One of the letter's segments.
const SEGMENT: u64 = 1;
/// An allocation of a device that has a name.
const NAMED: u64 = 2;
/// Pieces of a device's memory, by the letter's descriptors.
const PIECES: u64 = 3;
const LAST: u64 = 1 << 63;

/// The segments of other ranks that this rank maps, with their owners.
#[derive(Debug, Default)]
pub struct Mapped(Mutex<Vec<(u32, Arc<Mapping>)>>);

/// What one rank lets another read.
#[derive(Default)]
struct Offer {
    bytes: Vec<u8>,
    segments: Vec<Arc<Segment>>,
    files: Vec<Arc<OwnedFd>>,
    /// Why a block of a device cannot be read.
    refused: Option<Error>,
}

impl Offer {
    fn new(blocks: &[Mem], exports: Exports) -> Offer {
        let mut offer = Offer { refused: exports.refused, bytes: (blocks.len() as u64).to_ne_bytes().to_vec(), ..Offer::default() };
        let mut runs: Vec<Arc<[Piece]>> = vec![];
        for (&block, export) in blocks.iter().zip(exports.blocks) {
            let (mut what, mut place, mut name) = ((PRIVATE, 0), 0, [0; HANDLE]);
            if let Some(export) = export {
                place = export.offset;
                what = match export.of {
                    Allocation::Named(handle) => {
                        name = handle;
                        (NAMED, 0)
                    }
                    Allocation::Pieces(run) => (PIECES, number(&mut runs, run)),
                };
            } else if let Some((segment, offset)) = segment::find(block) {
                place = offset;
                what = (SEGMENT, number(&mut offer.segments, segment));
            }
            let (kind, id) = block.kind();
            let kind = u64::from(kind as u32) | u64::from(id as u32) << 32;
            let words = [block.addr() as u64, block.len() as u64, what.0, what.1, place, kind];
            offer.bytes.extend(words.iter().flat_map(|w| w.to_ne_bytes()));
            offer.bytes.extend(name);
        }
        for run in runs {
            for (i, (file, len)) in run.iter().enumerate() {
                let word = if i + 1 == run.len() { len | LAST } else { *len };
                offer.bytes.extend(word.to_ne_bytes());
                offer.files.push(file.clone());
            }
        }
        offer.bytes.extend(offer.refused.iter().flat_map(|e| e.text().bytes()));
        offer
    }
}

/// The place of something in a list, at whose end it comes if it is not there yet.
fn number<T: ?Sized>(list: &mut Vec<Arc<T>>, one: Arc<T>) -> u64 {
    let known = list.iter().rposition(|known| Arc::ptr_eq(known, &one));
    known.unwrap_or_else(|| {
        list.push(one);
        list.len() - 1
    }) as u64
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

/// The blocks of an offer, and why those of a device that cannot be opened cannot; `None`: it makes no sense. Takes its descriptors,
/// which may be of anything.
fn blocks(frame: &mut Frame) -> Option<(Vec<Block>, String)> {
    let files = std::mem::take(&mut frame.files);
    if !frame.memory.iter().all(segment::fits) {
        return None;
    }
    let (count, rest) = frame.bytes.split_first_chunk()?;
    let (list, rest) = rest.split_at_checked(usize::try_from(u64::from_ne_bytes(*count)).ok()?.checked_mul(BLOCK)?)?;
    let (lengths, refused) = rest.split_at_checked(8 * files.len())?;
    let word = |b: &[u8], i: usize| b[8 * i..8 * i + 8].try_into().map_or(0, u64::from_ne_bytes);
    let (mut runs, mut run): (Vec<Arc<[Piece]>>, Vec<Piece>) = (vec![], vec![]);
    for (i, file) in files.into_iter().enumerate() {
        run.push((Arc::new(file), word(lengths, i) & !LAST));
        if word(lengths, i) & LAST != 0 {
            runs.push(std::mem::take(&mut run).into());
        }
    }
    let parse = |b: &[u8]| {
        let word = |i: usize| word(b, i);
        let (addr, len, number, place) = (word(0), word(1), word(3) as usize, word(4));
        addr.checked_add(len)?;
        let mut block =
            Block { addr, len, segment: None, place: place as usize, kind: (word(5) as i32, (word(5) >> 32) as i32), export: None };
        // Where the length of what it lies in is known.
        let bytes = match word(2) {
            PRIVATE => return Some(block),
            SEGMENT => {
                block.segment = Some(number);
                segment::data(frame.memory.get(number)?) as u64
            }
            NAMED => {
                block.export = Some(Export { of: Allocation::Named(b[48..].try_into().ok()?), offset: place, len });
                return Some(block);
            }
            PIECES => {
                let run = runs.get(number)?;
                block.export = Some(Export { of: Allocation::Pieces(run.clone()), offset: place, len });
                run.iter().try_fold(0u64, |sum, piece| sum.checked_add(piece.1))?
            }
            _ => return None,
        };
        (bytes >= place.checked_add(len)?).then_some(block)
    };
    // Of pieces without an end nobody could name one.
    let blocks = if run.is_empty() { list.chunks_exact(BLOCK).map(parse).collect() } else { None };
    blocks.map(|blocks| (blocks, String::from_utf8_lossy(refused).into_owned()))
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
    let lists: Vec<&[Mem]> = offers.iter().map(|o| &o.1[..]).collect();
    let made: Vec<Offer> = lists.iter().zip(device::export(&lists)).map(|(list, exports)| Offer::new(list, exports)).collect();
    let memory: Vec<Vec<BorrowedFd<'_>>> = made.iter().map(|o| o.segments.iter().map(|s| s.file()).collect()).collect();
    let files: Vec<Vec<BorrowedFd<'_>>> = made.iter().map(|o| o.files.iter().map(|f| f.as_fd()).collect()).collect();
    let letters = made.iter().zip(&memory).zip(&files);
    let letters = letters.map(|((o, memory), files)| Letter { kind: Kind::Offer, bytes: &o.bytes, memory, files });
    let out: Vec<_> = readers.iter().copied().zip(letters).collect();
    let frames = mesh.swap(&out, Kind::Offer, owners, "say what it lets this rank read", deadline)?;

    let mut refused = None;
    let mut opened = Opened::default();
    for (&owner, mut frame) in owners.iter().zip(frames) {
        let Some((blocks, why)) = blocks(&mut frame) else {
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
                None if b.kind.0 != RS_DEVICE_CPU => b.export.map_or_else(
                    || {
                        if !why.is_empty() {
                            refused.get_or_insert_with(|| err!(RS_ERR_UNSUPPORTED, "weights of {}: {why}", mesh.who(owner)));
                        }
                        Window::Sent
                    },
                    Window::Exported,
                ),
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
    let out: Vec<_> =
        owners.iter().zip(&grants).map(|(&r, bytes)| (r, Letter { kind: Kind::Grant, bytes, memory: &[], files: &[] })).collect();
    let frames = mesh.swap(&out, Kind::Grant, &readers, "say how it reads this rank's memory", deadline)?;
    for (((reader, offered), offer), frame) in offers.iter().zip(&made).zip(frames) {
        let access = |&b: &u8| [Access::Mapped, Access::Remote, Access::Sent].get(b as usize).copied();
        let list: Option<Vec<Access>> = frame.bytes.iter().map(access).collect();
        let Some(list) = list.filter(|l| l.len() == offered.len()) else {
            return Err(mesh.fail(err!(RS_ERR_COMM, "{} answers for other blocks than were offered", mesh.who(*reader))));
        };
        // As the reader is told.
        let lost = offered.iter().zip(&list).any(|(block, access)| block.kind().0 != RS_DEVICE_CPU && *access == Access::Sent);
        if let Some(why) = offer.refused.as_ref().filter(|_| lost) {
            refused.get_or_insert_with(|| why.clone().context(format_args!("weights for {}", mesh.who(*reader))));
        }
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
    pub fn whole(&self, block: Mem) -> Result<Option<(Mem, Kept)>> {
        let all = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let holds = |m: &Mapping| m.addr() <= block.addr() && block.addr() + block.len() <= m.addr() + m.len();
        let Some((_, mapping)) = all.iter().find(|(_, m)| holds(m)) else { return Ok(None) };
        mapping.unlock().map_err(|e| err!(RS_ERR_MEMORY, "cannot make shared memory writable for a device: {e}"))?;
        Ok(Some((Base(mapping.addr()).block(0, mapping.len()), mapping.clone())))
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
                all.push((owner, Arc::new(m)));
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

#[cfg(test)]
mod tests {
    use super::super::socket::{Inbox, PACKET, Progress, Socket};
    use super::super::sys;
    use super::*;

    /// A letter as it arrives.
    fn sent(name: &str, letter: &Letter<'_>) -> Result<Frame> {
        let name = format!("unit-{name}-{}", std::process::id());
        let listener = sys::listen(&name).unwrap();
        let far = Socket::new(sys::connect(&name).unwrap()).unwrap();
        let near = Socket::new(sys::accept(listener.as_fd()).unwrap().unwrap()).unwrap();
        near.push(letter, &mut Progress::default()).unwrap();
        let mut inbox = Inbox::default();
        inbox.take(&far, &mut vec![0; PACKET])?;
        Ok(inbox.frames.pop_front().unwrap())
    }

    fn null() -> Arc<OwnedFd> {
        Arc::new(std::fs::File::open("/dev/null").unwrap().into())
    }

    /// Three blocks, of which two lie in the first of two runs of pieces, and none of the third can be opened.
    fn offer() -> Offer {
        // SAFETY: never copied from or to; only its numbers count.
        let blocks = [100, 200, 300, 400].map(|at| unsafe { Mem::of((RS_DEVICE_CUDA, 0), at as *mut u8, 50) });
        let run = |lengths: &[u64]| Allocation::Pieces(lengths.iter().map(|&len| (null(), len)).collect());
        let (first, second) = (run(&[64, 32]), run(&[128]));
        let export = |of: &Allocation, offset| Some(Export { of: of.clone(), offset, len: 50 });
        let exports = vec![export(&first, 10), export(&second, 78), export(&first, 46), None];
        Offer::new(&blocks, Exports { blocks: exports, refused: Some(err!(RS_ERR_UNSUPPORTED, "of a pool")) })
    }

    #[test]
    fn pieces_arrive_with_the_blocks_that_lie_in_them() {
        let offer = offer();
        let files: Vec<_> = offer.files.iter().map(|f| f.as_fd()).collect();
        let letter = Letter { kind: Kind::Offer, bytes: &offer.bytes, memory: &[], files: &files };
        let mut frame = sent("pieces", &letter).unwrap();
        assert_eq!((frame.memory.len(), frame.files.len()), (0, 3));
        let (blocks, why) = blocks(&mut frame).unwrap();
        assert_eq!(why, "of a pool");
        let pieces = |b: &Block| match &b.export {
            Some(Export { of: Allocation::Pieces(run), offset, len: 50 }) => Some((run.clone(), *offset)),
            _ => None,
        };
        let found: Vec<_> = blocks.iter().map(pieces).collect();
        let [Some(one), Some(two), Some(three), None] = &found[..] else { panic!("{found:?}") };
        assert!(Arc::ptr_eq(&one.0, &three.0) && !Arc::ptr_eq(&one.0, &two.0));
        assert_eq!([one.1, two.1, three.1], [10, 78, 46]);
        assert_eq!(one.0.iter().map(|p| p.1).collect::<Vec<_>>(), [64, 32]);
    }

    #[test]
    fn offers_that_make_no_sense_are_none() {
        let right = offer();
        let spoilt = |at: usize, word: u64, files: usize| {
            let mut bytes = right.bytes.clone();
            bytes[at..at + 8].copy_from_slice(&word.to_ne_bytes());
            let files: Vec<_> = right.files.iter().take(files).map(|f| f.as_fd()).collect();
            let letter = Letter { kind: Kind::Offer, bytes: &bytes, memory: &[], files: &files };
            blocks(&mut sent("nonsense", &letter).unwrap()).map(|_| ())
        };
        let lengths = 8 + 4 * BLOCK;
        assert!(spoilt(0, 4, 3).is_some());
        // More blocks than there are; a block of a run that is not there, beyond one, of an unknown kind.
        for (at, word) in [(0, 1 << 40), (0, u64::MAX), (8 + 24, 2), (8 + 32, 47), (8 + 32, u64::MAX), (8 + 16, 9)] {
            assert!(spoilt(at, word, 3).is_none(), "{word} at {at}");
        }
        // Shorter pieces; pieces without an end; fewer descriptors.
        for (at, word) in [(0, 10), (16, 128)] {
            assert!(spoilt(lengths + at, word, 3).is_none(), "{word} at {at}");
        }
        assert!(spoilt(0, 4, 1).is_none());
        // Memory that is no allocation, with no block in it: its state would be looked for where there is none.
        for (len, fits) in [(5, false), (4_099, false), (sys::page(), false), (2 * sys::page(), true)] {
            let file = sys::shared(c"nonsense", len).unwrap();
            let letter = Letter { kind: Kind::Offer, bytes: &[0; 8], memory: &[file.as_fd()], files: &[] };
            assert_eq!(blocks(&mut sent("memory", &letter).unwrap()).is_some(), fits, "{len} bytes");
        }
        // Others than offers carry none.
        let files = [right.files[0].as_fd()];
        assert!(sent("gather", &Letter { kind: Kind::Gather, bytes: &[], memory: &[], files: &files }).is_err());
    }
}
