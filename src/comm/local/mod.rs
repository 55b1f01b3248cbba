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
mod sys;
mod vmread;
mod windows;

use super::{Comm, Deadline, Opened, Pipe, Window, Windows};
use crate::abi::*;
use crate::device::Mem;
use crate::error::{Result, err};
use crate::geom::StridedCopy;
use mesh::Mesh;
use pipe::Pipes;
use socket::{Kind, Letter};
use std::sync::Arc;
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
    Ok(Arc::new(Local { mesh, force, mapped: windows::Mapped::default(), pipes: Pipes::new(world) }))
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
        let letter = Letter { kind: Kind::Gather, bytes: mine, memory: &[] };
        let out: Vec<_> = others.iter().map(|&r| (r, letter)).collect();
        let mut frames = self.mesh.swap(&out, Kind::Gather, &others, "gather", deadline)?.into_iter();
        let mut all = Vec::with_capacity(mine.len() * self.mesh.world as usize);
        for rank in 0..self.mesh.world {
            if rank == self.mesh.rank {
                all.extend_from_slice(mine);
                continue;
            }
            let theirs = frames.next().map_or_else(Vec::new, |f| f.bytes);
            if theirs.len() != mine.len() {
                let who = self.mesh.who(rank);
                let e = err!(RS_ERR_MISMATCH, "{who} gathers {} bytes, rank {} {}", theirs.len(), self.mesh.rank, mine.len());
                return Err(self.mesh.fail(e));
            }
            all.extend_from_slice(&theirs);
        }
        Ok(all)
    }

    fn abort(&self, why: &str) {
        self.mesh.abort(why);
    }

    fn check(&self) -> Result<()> {
        self.mesh.check()
    }

    fn windows(&self) -> Option<&dyn Windows> {
        Some(self)
    }

    fn pipe(&self) -> Option<&dyn Pipe> {
        Some(self)
    }
}

impl Windows for Local {
    fn exchange(&self, offers: &[(u32, Vec<Mem>)], owners: &[u32], deadline: Deadline) -> Result<Opened> {
        windows::exchange(&self.mesh, &self.mapped, self.force, offers, owners, deadline)
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
