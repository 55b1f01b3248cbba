//! Messages through rings in shared memory, one ring for each ordered pair of ranks that uses it.
//!
//! The sender makes the ring. Its slots are so few and small that a message is still in cache when the receiver unpacks it. Knows
//! ranks, slots and bells. Must not know what a message holds.

use super::mesh::Mesh;
use super::ring::{Nonsense, Reader, Words, Writer, ring, rung, sleep};
use super::socket::{Kind, Letter};
use super::sys::{self, Mapping};
use crate::abi::*;
use crate::comm::Deadline;
use crate::device::Mem;
use crate::error::{Error, Result, bail, err};
use std::cell::Cell;
use std::os::fd::AsFd;
use std::sync::atomic::AtomicU64;
use std::sync::{Mutex, PoisonError, RwLock, RwLockReadGuard};
use std::time::{Duration, Instant};

/// Bytes of a slot.
pub const SLOT: usize = 256 << 10;
/// Slots of a ring.
const SLOTS: usize = 8;
/// Bytes between two words, so that no two share a line of a cache (or a pair of lines that is fetched together).
const LINE: usize = 128;
/// Bytes before the first slot: head, tail, a length per slot; a multiple of any page.
const WORDS: usize = 64 << 10;
const RING: usize = WORDS + SLOTS * SLOT;
/// Longest sleep without a look at the peers.
const NAP: Duration = Duration::from_millis(20);

/// A ring in shared memory.
#[derive(Debug)]
struct Ring {
    memory: Mapping,
}

impl Words for Ring {
    type Count = AtomicU64;

    fn slots(&self) -> u64 {
        SLOTS as u64
    }

    fn head(&self) -> &AtomicU64 {
        self.memory.word(0)
    }

    fn tail(&self) -> &AtomicU64 {
        self.memory.word(LINE)
    }

    fn len(&self, slot: u64) -> &AtomicU64 {
        self.memory.word((2 + slot as usize) * LINE)
    }
}

impl Ring {
    fn new(memory: Mapping) -> Ring {
        memory.populate(0, memory.len(), true);
        Ring { memory }
    }

    fn slot(&self, slot: u64) -> Mem {
        let at = WORDS + slot as usize % SLOTS * SLOT;
        // SAFETY: inside the mapping, which has RING bytes (checked in `open`) and lives until this pair's pipe is opened again or the
        // communicator goes; the ring's words say which end uses the slot.
        unsafe { Mem::new((self.memory.addr() + at) as *mut u8, SLOT) }
    }
}

/// An end of a ring and whether the caller holds its slot.
struct End<E> {
    end: E,
    held: bool,
}

/// By rank.
type Ends<E> = RwLock<Vec<Option<Mutex<End<E>>>>>;

/// The rings of one rank.
pub struct Pipes {
    to: Ends<Writer<Ring>>,
    from: Ends<Reader<Ring>>,
}

thread_local! {
    /// The bell that this thread last looked at and how often it had rung then. Only ever compared: a wrong guess costs one look.
    static SEEN: Cell<(usize, u32)> = const { Cell::new((0, 0)) };
}

impl Pipes {
    /// None yet.
    pub fn new(world: u32) -> Pipes {
        fn none<E>(world: u32) -> Ends<E> {
            RwLock::new((0..world).map(|_| None).collect())
        }
        Pipes { to: none(world), from: none(world) }
    }

    /// See [`crate::comm::Pipe::open`]. A pair that was open gets a new ring; other pairs keep theirs.
    pub fn open(&self, mesh: &Mesh, to: &[u32], from: &[u32], deadline: Deadline) -> Result<()> {
        let failed = |e: std::io::Error| err!(RS_ERR_MEMORY, "cannot make a ring of {RING} bytes of shared memory: {e}");
        let mut made = vec![];
        for _ in to {
            let file = sys::shared(c"libreshard ring", RING).map_err(|e| mesh.fail(failed(e)))?;
            made.push((Mapping::new(file.as_fd(), true).map_err(|e| mesh.fail(failed(e)))?, file));
        }
        let memory: Vec<_> = made.iter().map(|(_, file)| [file.as_fd()]).collect();
        let out: Vec<_> = to
            .iter()
            .zip(&memory)
            .map(|(&rank, memory)| (rank, Letter { kind: Kind::Ring, bytes: &[], memory, files: &[] }))
            .collect();
        let frames = mesh.swap(&out, Kind::Ring, from, "open its pipes", deadline)?;
        for (&rank, frame) in from.iter().zip(frames) {
            match frame.memory.into_iter().next() {
                Some(memory) if memory.len() == RING => put(&self.from, rank, Reader::new(Ring::new(memory))),
                _ => return Err(mesh.fail(err!(RS_ERR_COMM, "{} sent a ring that is not one of ours", mesh.who(rank)))),
            }
        }
        for (&rank, (memory, _)) in to.iter().zip(made) {
            put(&self.to, rank, Writer::new(Ring::new(memory)));
        }
        Ok(())
    }

    /// Bytes of all open rings.
    pub fn bytes(&self) -> u64 {
        let count = look(&self.to).iter().flatten().count() + look(&self.from).iter().flatten().count();
        (count * RING) as u64
    }

    /// See [`crate::comm::Pipe::reserve`].
    pub fn reserve(&self, mesh: &Mesh, to: u32) -> Result<Option<Mem>> {
        mesh.failed()?;
        with(&self.to, to, |w| {
            let slot = w.end.reserve().map_err(|n| strange(mesh, to, n))?;
            w.held = slot.is_some();
            Ok(slot.map(|s| w.end.words().slot(s)))
        })
    }

    /// See [`crate::comm::Pipe::commit`].
    pub fn commit(&self, mesh: &Mesh, to: u32, bytes: usize) -> Result<()> {
        with(&self.to, to, |w| {
            if !w.held || bytes > SLOT {
                bail!(
                    RS_ERR_INTERNAL,
                    "a message of {bytes} bytes to rank {to}: {} bytes were reserved",
                    if w.held { SLOT } else { 0 }
                );
            }
            w.end.commit(bytes as u64);
            w.held = false;
            Ok(())
        })?;
        ring(mesh.link(to)?.bell.half(0));
        Ok(())
    }

    /// See [`crate::comm::Pipe::arrived`].
    pub fn arrived(&self, mesh: &Mesh, from: u32, bytes: usize) -> Result<Option<Mem>> {
        mesh.failed()?;
        with(&self.from, from, |r| {
            let Some((slot, len)) = r.end.arrived().map_err(|n| strange(mesh, from, n))? else { return Ok(None) };
            if len != bytes as u64 {
                let e = err!(RS_ERR_MISMATCH, "{} sent a message of {len} bytes, this rank expects {bytes}", mesh.who(from));
                return Err(mesh.fail(e));
            }
            r.held = true;
            Ok(r.end.words().slot(slot).cut(0, bytes))
        })
    }

    /// See [`crate::comm::Pipe::release`].
    pub fn release(&self, mesh: &Mesh, from: u32) -> Result<()> {
        with(&self.from, from, |r| {
            if !std::mem::take(&mut r.held) {
                bail!(RS_ERR_INTERNAL, "no message from rank {from} is held");
            }
            r.end.release();
            Ok(())
        })?;
        ring(mesh.link(from)?.bell.half(0));
        Ok(())
    }

    /// See [`crate::comm::Pipe::wait`]. "Since the last call" is since this thread's.
    pub fn wait(&self, mesh: &Mesh, slice: Duration) -> Result<()> {
        let bell = mesh.bell();
        let place = std::ptr::from_ref(bell) as usize;
        let before = rung(bell);
        let begun = Instant::now();
        while SEEN.get() == (place, before) && rung(bell) == before && begun.elapsed() < slice {
            sleep(bell, before, NAP.min(slice.saturating_sub(begun.elapsed())));
            mesh.check()?;
        }
        SEEN.set((place, rung(bell)));
        mesh.check()
    }
}

fn look<T>(lock: &RwLock<T>) -> RwLockReadGuard<'_, T> {
    lock.read().unwrap_or_else(PoisonError::into_inner)
}

fn put<E>(ends: &Ends<E>, rank: u32, end: E) {
    let mut all = ends.write().unwrap_or_else(PoisonError::into_inner);
    all[rank as usize] = Some(Mutex::new(End { end, held: false }));
}

fn with<E, T>(ends: &Ends<E>, rank: u32, f: impl FnOnce(&mut End<E>) -> Result<T>) -> Result<T> {
    match look(ends).get(rank as usize) {
        Some(Some(end)) => f(&mut end.lock().unwrap_or_else(PoisonError::into_inner)),
        _ => Err(err!(RS_ERR_INTERNAL, "no pipe to or from rank {rank} is open")),
    }
}

fn strange(mesh: &Mesh, rank: u32, _: Nonsense) -> Error {
    mesh.fail(err!(RS_ERR_PEER, "{} wrote nonsense into the words of a ring", mesh.who(rank)))
}
