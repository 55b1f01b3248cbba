//! Processes of one host.
//!
//! Ranks meet on abstract Unix sockets, which the kernel takes away with their process: nothing is left behind, and a hang-up says that
//! a rank has died. The sockets carry the host path and pass shared memory. Weights move in one of two ways: memory of `rs_mem_alloc`
//! (`segment`) is mapped by its readers; other memory passes through rings of slots that stay in cache (`pipe`), or, by force, is read
//! by the kernel (`vmread`).
//!
//! Every mapping that a rank reads weights from belongs to that rank alone, so a rank that fails can leave at once: there is nobody to
//! wait for. What a stopped process writes when it is continued goes to slots that nobody reads any more.

mod mesh;
mod pipe;
mod rendezvous;
mod ring;
pub mod segment;
mod socket;
pub(super) mod sys;
mod vmread;
mod windows;

use super::page::Page;
use super::{Comm, Deadline, Kept, Later, Opened, Pipe, Window, Windows};
use crate::abi::*;
use crate::device::Mem;
use crate::error::{Result, err};
use crate::geom::StridedCopy;
use mesh::{Mesh, Swap};
use pipe::Pipes;
use socket::{Frame, Kind, Letter};
use std::os::fd::AsFd;
use std::sync::atomic::AtomicBool;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

/// How memory that is not from `rs_mem_alloc` moves, whatever measures faster.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Force {
    /// Its reader reads it (process_vm_readv); a refusal is an error.
    Read,
    /// Through rings.
    Ring,
}

/// One rank of a run.
struct Local {
    mesh: Mesh,
    force: Option<Force>,
    mapped: windows::Mapped,
    pipes: Pipes,
    taken: AtomicBool,
    begun: Mutex<Option<Begun>>,
}

/// A gather that was begun.
enum Begun {
    /// This rank's part, and how far it is.
    Going(Vec<u8>, Swap),
    Ended(Vec<u8>),
}

impl Local {
    /// Goes on with a gather without waiting.
    fn go_on(&self, begun: &mut Begun, deadline: Deadline) -> Result<()> {
        let Begun::Going(mine, swap) = begun else { return Ok(()) };
        let others = self.mesh.others();
        let letter = Letter { kind: Kind::Gather, bytes: mine, memory: &[], files: &[] };
        let out: Vec<_> = others.iter().map(|&r| (r, letter)).collect();
        if let Some(frames) = self.mesh.try_swap(&out, Kind::Gather, &others, "gather", swap, deadline)? {
            *begun = Begun::Ended(self.gathered(mine, frames)?);
        }
        Ok(())
    }

    /// What a gather of this rank's part and the others' frames gives.
    fn gathered(&self, mine: &[u8], frames: Vec<Frame>) -> Result<Vec<u8>> {
        let mut frames = frames.into_iter();
        let mut all = Vec::with_capacity(mine.len() * self.mesh.world as usize);
        for rank in 0..self.mesh.world {
            if rank == self.mesh.rank {
                all.extend_from_slice(mine);
                continue;
            }
            let theirs = frames.next().map_or_else(Vec::new, |f| f.bytes);
            if theirs.len() != mine.len() {
                let who = self.mesh.who(rank);
                let me = self.mesh.name_of(self.mesh.rank);
                let e = err!(RS_ERR_MISMATCH, "{who} gathers {} bytes, rank {me} {}", theirs.len(), mine.len());
                return Err(self.mesh.fail(e));
            }
            all.extend_from_slice(&theirs);
        }
        Ok(all)
    }
}

/// Joins the run `name` of `world` processes (or threads) of one user on one host as `rank`: collective. Returns when all have joined,
/// or after `timeout` with an error that names those who have not. `force` is equal on all ranks.
pub fn join(name: &str, rank: u32, world: u32, timeout: Duration, force: Option<Force>) -> Result<Arc<dyn Comm>> {
    let flags = match force {
        None => 0,
        Some(Force::Read) => RS_LOCAL_READ,
        Some(Force::Ring) => RS_LOCAL_RING,
    };
    let mesh = rendezvous::join(name, rank, world, flags, Deadline::after(timeout))?;
    let other = match force {
        None => "passes through rings (which measure faster than process_vm_readv for runs of any length)",
        Some(Force::Read) => "is read with process_vm_readv (RS_LOCAL_READ)",
        Some(Force::Ring) => "passes through rings (RS_LOCAL_RING)",
    };
    log::info!(
        "rank {rank} of {world} joined local '{name}': memory of rs_mem_alloc is mapped by its readers, other memory {other}"
    );
    let (mapped, pipes) = (windows::Mapped::default(), Pipes::new(world));
    Ok(Arc::new(Local { mesh, force, mapped, pipes, taken: AtomicBool::new(false), begun: Mutex::default() }))
}

impl Comm for Local {
    fn name(&self) -> &str {
        "local"
    }

    fn rank(&self) -> u32 {
        self.mesh.rank
    }

    fn world(&self) -> u32 {
        self.mesh.world
    }

    fn allgather(&self, mine: &[u8], deadline: Deadline) -> Result<Vec<u8>> {
        let others = self.mesh.others();
        let letter = Letter { kind: Kind::Gather, bytes: mine, memory: &[], files: &[] };
        let out: Vec<_> = others.iter().map(|&r| (r, letter)).collect();
        let frames = self.mesh.swap(&out, Kind::Gather, &others, "gather", deadline)?;
        self.gathered(mine, frames)
    }

    fn abort(&self, why: &str) {
        self.mesh.abort(why);
    }

    fn check(&self) -> Result<()> {
        self.mesh.check()
    }

    fn gone(&self, rank: u32) -> bool {
        self.mesh.gone(rank)
    }

    fn rename(&self, ranks: &[u32]) {
        self.mesh.rename(ranks);
    }

    fn later(&self) -> Option<&dyn Later> {
        Some(self)
    }

    fn windows(&self) -> Option<&dyn Windows> {
        Some(self)
    }

    fn pipe(&self) -> Option<&dyn Pipe> {
        Some(self)
    }
}

impl Later for Local {
    fn taken(&self) -> &AtomicBool {
        &self.taken
    }

    fn begin(&self, mine: &[u8]) -> Result<()> {
        self.check()?;
        let mut begun = self.begun.lock().unwrap_or_else(PoisonError::into_inner);
        let begun = begun.insert(Begun::Going(mine.to_vec(), Swap::new(&self.mesh.others())));
        // The others need it now, whenever the end is asked for.
        self.go_on(begun, Deadline::never())
    }

    fn ended(&self, deadline: Deadline) -> Result<Option<Vec<u8>>> {
        let mut begun = self.begun.lock().unwrap_or_else(PoisonError::into_inner);
        self.go_on(begun.as_mut().ok_or_else(|| err!(RS_ERR_INTERNAL, "the end of a gather that was not begun"))?, deadline)?;
        Ok(match begun.take() {
            Some(Begun::Ended(all)) => Some(all),
            going => {
                *begun = going;
                None
            }
        })
    }
}

impl Windows for Local {
    fn exchange(&self, offers: &[(u32, Vec<Mem>)], owners: &[u32], deadline: Deadline) -> Result<Opened> {
        windows::exchange(&self.mesh, &self.mapped, self.force, offers, owners, deadline)
    }

    fn elsewhere(&self, rank: u32) -> bool {
        self.mesh.link(rank).is_ok_and(|link| link.socket.peer.pid != std::process::id() as i32)
    }

    fn mapping(&self, block: Mem) -> Result<Option<(Mem, Kept)>> {
        self.mapped.whole(block)
    }

    fn share(&self, words: usize, peers: &[u32], deadline: Deadline) -> Result<Vec<Arc<Page>>> {
        let (page, file) = Page::new(words).map_err(|e| self.mesh.fail(e))?;
        let letter = Letter { kind: Kind::Words, bytes: &[], memory: &[file.as_fd()], files: &[] };
        let out: Vec<_> = peers.iter().map(|&r| (r, letter)).collect();
        let frames = self.mesh.swap(&out, Kind::Words, peers, "share its words", deadline)?;
        let mut pages = vec![Arc::new(page)];
        for (&peer, mut frame) in peers.iter().zip(frames) {
            match frame.memory.pop().map(Page::of).filter(|p| p.words() >= words) {
                Some(page) => pages.push(Arc::new(page)),
                None => return Err(self.mesh.fail(err!(RS_ERR_COMM, "{} shares less than {words} words", self.mesh.who(peer)))),
            }
        }
        Ok(pages)
    }

    fn prefers_read(&self, _run: u64) -> bool {
        self.force == Some(Force::Read)
    }

    fn read(&self, owner: u32, window: &Window, dst: Mem, copy: &StridedCopy) -> Result<()> {
        windows::read(&self.mesh, owner, window, dst, copy)
    }

    fn enter(&self, _owner: u32) -> Result<()> {
        self.check()
    }

    fn leave(&self, _owner: u32) {}

    /// A mapping outlives the owner's interest in it, and a read of memory that is gone fails: there is nobody to wait for.
    fn revoke(&self) {}
}

impl Pipe for Local {
    fn capacity(&self) -> usize {
        pipe::SLOT
    }

    fn open(&self, to: &[u32], from: &[u32], deadline: Deadline) -> Result<()> {
        self.pipes.open(&self.mesh, to, from, deadline)
    }

    fn bytes(&self) -> u64 {
        self.pipes.bytes()
    }

    fn reserve(&self, to: u32) -> Result<Option<Mem>> {
        self.pipes.reserve(&self.mesh, to)
    }

    fn commit(&self, to: u32, bytes: usize) -> Result<()> {
        self.pipes.commit(&self.mesh, to, bytes)
    }

    fn arrived(&self, from: u32, bytes: usize) -> Result<Option<Mem>> {
        self.pipes.arrived(&self.mesh, from, bytes)
    }

    fn release(&self, from: u32) -> Result<()> {
        self.pipes.release(&self.mesh, from)
    }

    fn wait(&self, slice: Duration) -> Result<()> {
        self.pipes.wait(&self.mesh, slice)
    }
}
