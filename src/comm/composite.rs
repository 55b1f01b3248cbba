//! Two communicators as one, chosen by peer: one for the ranks of this host, one for all.
//!
//! Weights for ranks that the near communicator has pass through it, others through the wide one; so do all gathers, in which every rank
//! takes part. It fails as one.
//!
//! Knows ranks of both. Must not know how either reaches them.
#![forbid(unsafe_code)]

use super::page::Page;
use super::{Comm, Deadline, Group, Kept, Opened, Pipe, Window, Windows};
use crate::abi::*;
use crate::device::Mem;
use crate::error::{Result, bail, err};
use crate::geom::StridedCopy;
use std::sync::Arc;
use std::time::Duration;

/// See the module.
struct Composite {
    near: Near,
    wide: Arc<dyn Comm>,
}

/// The near communicator, by the ranks of the wide one.
struct Near {
    comm: Arc<dyn Comm>,
    /// Its ranks' numbers in the wide one, rising.
    ranks: Vec<u32>,
}

/// Makes one of both; collective over both. The near ranks are in the order of the wide ones.
pub fn join(near: Arc<dyn Comm>, wide: Arc<dyn Comm>, deadline: Deadline) -> Result<Arc<dyn Comm>> {
    if near.windows().is_none() || near.pipe().is_none() && near.name() != "loopback" {
        bail!(
            RS_ERR_UNSUPPORTED,
            "near is '{}', whose ranks do not read each other's memory: rs_comm_local() makes one that does",
            near.name()
        );
    }
    if wide.group().is_none() {
        bail!(
            RS_ERR_UNSUPPORTED,
            "wide is '{}', which does not send and receive: rs_comm_nixl(), rs_comm_from_nccl() or rs_comm_custom() make one that does",
            wide.name()
        );
    }
    let all = near.allgather(&wide.rank().to_le_bytes(), deadline)?;
    let ranks: Vec<u32> = all.chunks_exact(4).map(|r| r.try_into().map_or(u32::MAX, u32::from_le_bytes)).collect();
    let fits = ranks.is_sorted_by(|a, b| a < b) && ranks.iter().all(|&r| r < wide.world());
    // All near ranks see the same numbers; the others are told, who else would wait.
    let word = wide.allgather(&[u8::from(fits)], deadline)?;
    if let Some(rank) = word.iter().position(|&ok| ok != 1) {
        bail!(
            RS_ERR_INVALID,
            "the near communicator of rank {rank} has other ranks than wide has, or in another order: its ranks are counted in the order \
             of those of wide{}",
            if fits { String::new() } else { format!("; here they are {ranks:?} there") }
        );
    }
    near.rename(&ranks);
    Ok(Arc::new(Composite { near: Near { comm: near, ranks }, wide }))
}

impl Near {
    /// A rank's number in the near communicator, if it is there.
    fn find(&self, rank: u32) -> Option<u32> {
        self.ranks.binary_search(&rank).ok().map(|at| at as u32)
    }

    fn rank(&self, rank: u32) -> Result<u32> {
        self.find(rank).ok_or_else(|| err!(RS_ERR_INTERNAL, "rank {rank} is none of {:?}, which are near", self.ranks))
    }

    fn all(&self, ranks: &[u32]) -> Result<Vec<u32>> {
        ranks.iter().map(|&r| self.rank(r)).collect()
    }

    fn windows(&self) -> Result<&dyn Windows> {
        self.comm.windows().ok_or_else(|| err!(RS_ERR_INTERNAL, "the near communicator reads no memory"))
    }

    fn pipe(&self) -> Result<&dyn Pipe> {
        self.comm.pipe().ok_or_else(|| err!(RS_ERR_INTERNAL, "the near communicator has no pipe"))
    }
}

impl Comm for Composite {
    fn name(&self) -> &str {
        "composite"
    }

    fn rank(&self) -> u32 {
        self.wide.rank()
    }

    fn world(&self) -> u32 {
        self.wide.world()
    }

    fn allgather(&self, mine: &[u8], deadline: Deadline) -> Result<Vec<u8>> {
        // A near rank that is gone is known of here first.
        self.near.comm.check()?;
        self.wide.allgather(mine, deadline)
    }

    fn abort(&self, why: &str) {
        self.wide.abort(why);
        self.near.comm.abort(why);
    }

    fn device(&self) -> Option<(i32, i32)> {
        self.wide.device().or_else(|| self.near.comm.device())
    }

    fn check(&self) -> Result<()> {
        self.wide.check().and_then(|()| self.near.comm.check())
    }

    fn sound(&self) -> Result<()> {
        self.wide.sound().and_then(|()| self.near.comm.sound())
    }

    fn gone(&self, rank: u32) -> bool {
        self.wide.gone(rank) || self.near.find(rank).is_some_and(|r| self.near.comm.gone(r))
    }

    fn windows(&self) -> Option<&dyn Windows> {
        Some(&self.near)
    }

    fn pipe(&self) -> Option<&dyn Pipe> {
        self.near.comm.pipe().map(|_| &self.near as &dyn Pipe)
    }

    fn group(&self) -> Option<&dyn Group> {
        self.wide.group()
    }
}

impl Windows for Near {
    fn covers(&self, rank: u32) -> bool {
        self.find(rank).is_some()
    }

    fn exchange(&self, offers: &[(u32, Vec<Mem>)], owners: &[u32], deadline: Deadline) -> Result<Opened> {
        let offers: Vec<_> = offers.iter().map(|(r, mems)| Ok((self.rank(*r)?, mems.clone()))).collect::<Result<_>>()?;
        self.windows()?.exchange(&offers, &self.all(owners)?, deadline)
    }

    fn elsewhere(&self, rank: u32) -> bool {
        self.find(rank).is_some_and(|r| self.windows().is_ok_and(|w| w.elsewhere(r)))
    }

    fn mapping(&self, block: Mem) -> Result<Option<(Mem, Kept)>> {
        self.windows()?.mapping(block)
    }

    fn share(&self, words: usize, peers: &[u32], deadline: Deadline) -> Result<Vec<Arc<Page>>> {
        self.windows()?.share(words, &self.all(peers)?, deadline)
    }

    fn prefers_read(&self, run: u64) -> bool {
        self.windows().is_ok_and(|w| w.prefers_read(run))
    }

    fn read(&self, owner: u32, window: &Window, dst: Mem, copy: &StridedCopy) -> Result<()> {
        self.windows()?.read(self.rank(owner)?, window, dst, copy)
    }

    fn enter(&self, owner: u32) -> Result<()> {
        self.windows()?.enter(self.rank(owner)?)
    }

    fn leave(&self, owner: u32) {
        if let (Ok(windows), Some(owner)) = (self.windows(), self.find(owner)) {
            windows.leave(owner);
        }
    }

    fn revoke(&self) {
        if let Ok(windows) = self.windows() {
            windows.revoke();
        }
    }
}

impl Pipe for Near {
    fn capacity(&self) -> usize {
        self.comm.pipe().map_or(usize::MAX, Pipe::capacity)
    }

    fn open(&self, to: &[u32], from: &[u32], deadline: Deadline) -> Result<()> {
        self.pipe()?.open(&self.all(to)?, &self.all(from)?, deadline)
    }

    fn bytes(&self) -> u64 {
        self.comm.pipe().map_or(0, Pipe::bytes)
    }

    fn reserve(&self, to: u32) -> Result<Option<Mem>> {
        self.pipe()?.reserve(self.rank(to)?)
    }

    fn commit(&self, to: u32, bytes: usize) -> Result<()> {
        self.pipe()?.commit(self.rank(to)?, bytes)
    }

    fn arrived(&self, from: u32, bytes: usize) -> Result<Option<Mem>> {
        self.pipe()?.arrived(self.rank(from)?, bytes)
    }

    fn release(&self, from: u32) -> Result<()> {
        self.pipe()?.release(self.rank(from)?)
    }

    fn wait(&self, slice: Duration) -> Result<()> {
        self.pipe()?.wait(slice)
    }
}
