//! All ranks' connections as one: frames swapped with some or all of them, deaths and last words noticed, one failure for ever.
//!
//! Knows ranks, frames, deadlines. Must not know what the frames say, but for the last ones.

use super::socket::{self, Frame, Inbox, Kind, Letter, PACKET, Progress, Socket};
use super::sys::{self, Mapping};
use crate::abi::*;
use crate::comm::Deadline;
use crate::error::{Error, Result, bail, err};
use std::os::fd::{AsFd, OwnedFd};
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Duration, Instant};

/// Least time between two looks at the sockets by [`Mesh::check`].
const LOOK: Duration = Duration::from_millis(1);
/// Most characters of a failure that are told to others.
const TEXT: usize = 4000;

/// One other rank.
#[derive(Debug)]
pub struct Link {
    /// The connection.
    pub socket: Socket,
    /// Readable once its process has ended.
    pub process: Option<OwnedFd>,
    /// The page of its bell.
    pub bell: Mapping,
}

/// The connected ranks.
#[derive(Debug)]
pub struct Mesh {
    /// The name of the run.
    pub name: String,
    /// This rank.
    pub rank: u32,
    /// Number of ranks.
    pub world: u32,
    /// By rank; none for ourselves.
    links: Vec<Option<Link>>,
    /// The page of our own bell.
    bell: Mapping,
    /// Holds our name; let go when we fail.
    listener: Mutex<Option<OwnedFd>>,
    incoming: Mutex<Incoming>,
    failure: OnceLock<Error>,
    /// What errors call the ranks, if not by their numbers here.
    names: OnceLock<Vec<u32>>,
    born: Instant,
    /// Microseconds since `born` at which `check` last looked.
    looked: AtomicU64,
    /// The process that joined. A child made by fork has our sockets too, but not our place.
    process: u32,
}

/// How far a swap is.
#[derive(Debug)]
pub struct Swap {
    sent: Vec<Progress>,
    unsent: Vec<u32>,
    got: Vec<Option<Frame>>,
}

impl Swap {
    /// One that has not begun.
    pub fn new(from: &[u32]) -> Swap {
        Swap { sent: vec![], unsent: vec![], got: from.iter().map(|_| None).collect() }
    }

    fn frames(&mut self) -> Vec<Frame> {
        std::mem::take(&mut self.got).into_iter().flatten().collect()
    }
}

/// What has come from all ranks.
#[derive(Debug)]
struct Incoming {
    boxes: Vec<Inbox>,
    /// Why nothing more comes from a rank.
    gone: Vec<Option<Error>>,
    scratch: Vec<u8>,
}

impl Mesh {
    /// Of connections that have been made and greeted. `links` has one entry a rank.
    pub fn new(name: &str, rank: u32, links: Vec<Option<Link>>, bell: Mapping, listener: OwnedFd) -> Mesh {
        let world = links.len();
        Mesh {
            name: name.to_string(),
            rank,
            world: world as u32,
            links,
            bell,
            listener: Mutex::new(Some(listener)),
            incoming: Mutex::new(Incoming {
                boxes: (0..world).map(|_| Inbox::default()).collect(),
                gone: vec![None; world],
                scratch: vec![0; PACKET],
            }),
            failure: OnceLock::new(),
            names: OnceLock::new(),
            born: Instant::now(),
            looked: AtomicU64::new(0),
            process: std::process::id(),
        }
    }

    /// All other ranks.
    pub fn others(&self) -> Vec<u32> {
        (0..self.world).filter(|&r| r != self.rank).collect()
    }

    /// Our own bell.
    pub fn bell(&self) -> &AtomicU32 {
        self.bell.half(0)
    }

    /// Another rank's connection.
    pub fn link(&self, rank: u32) -> Result<&Link> {
        match self.links.get(rank as usize) {
            Some(Some(link)) => Ok(link),
            _ => {
                Err(err!(RS_ERR_INTERNAL, "rank {rank} is no other rank of '{}' (rank {} of {})", self.name, self.rank, self.world))
            }
        }
    }

    /// `rank 3 (process 77)`.
    pub fn who(&self, rank: u32) -> String {
        let name = self.name_of(rank);
        match self.links.get(rank as usize) {
            Some(Some(link)) => named(name, link.socket.peer.pid),
            _ => format!("rank {name}"),
        }
    }

    /// See [`crate::comm::Comm::rename`].
    pub fn rename(&self, ranks: &[u32]) {
        let _ = self.names.set(ranks.to_vec());
    }

    /// What errors call a rank.
    pub fn name_of(&self, rank: u32) -> u32 {
        self.names.get().and_then(|names| names.get(rank as usize)).copied().unwrap_or(rank)
    }

    /// Sends letters and waits until they are on their way and one frame of `kind` has come from each of `from`, in that order.
    /// `doing` completes "waited for rank 3 to ...". Any error ends the mesh.
    pub fn swap(&self, out: &[(u32, Letter<'_>)], kind: Kind, from: &[u32], doing: &str, deadline: Deadline) -> Result<Vec<Frame>> {
        if self.process != std::process::id() {
            bail!(RS_ERR_STATE, "process {} joined '{}', this one was forked from it: join here", self.process, self.name);
        }
        // The lock is held to the end: of two collectives at once neither could tell its frames.
        let mut incoming = self.lock();
        self.swap_with(&mut incoming, out, kind, from, doing, deadline).map_err(|e| self.fail(e))
    }

    fn swap_with(
        &self,
        incoming: &mut Incoming,
        out: &[(u32, Letter<'_>)],
        kind: Kind,
        from: &[u32],
        doing: &str,
        deadline: Deadline,
    ) -> Result<Vec<Frame>> {
        let mut swap = Swap::new(from);
        loop {
            if self.step(incoming, out, kind, from, doing, &mut swap, deadline)? {
                return Ok(swap.frames());
            }
            self.look(incoming, &swap.unsent, deadline.left())?;
        }
    }

    /// Goes on with a swap of these letters without waiting; `None`: it is not done yet. Any error ends the mesh.
    pub fn try_swap(
        &self,
        out: &[(u32, Letter<'_>)],
        kind: Kind,
        from: &[u32],
        doing: &str,
        swap: &mut Swap,
        deadline: Deadline,
    ) -> Result<Option<Vec<Frame>>> {
        // Another thread looks at the sockets, but for a moment.
        let Ok(mut incoming) = self.incoming.try_lock() else { return Ok(None) };
        let mut go = || {
            self.look(&mut incoming, &[], Duration::ZERO)?;
            self.step(&mut incoming, out, kind, from, doing, swap, deadline)
        };
        Ok(if go().map_err(|e| self.fail(e))? { Some(swap.frames()) } else { None })
    }

    /// Sends and takes what goes without waiting; whether that was the rest. An error if more cannot come.
    #[allow(clippy::too_many_arguments)] // A swap is what all of them say.
    fn step(
        &self,
        incoming: &mut Incoming,
        out: &[(u32, Letter<'_>)],
        kind: Kind,
        from: &[u32],
        doing: &str,
        swap: &mut Swap,
        deadline: Deadline,
    ) -> Result<bool> {
        self.failed()?;
        swap.sent.resize(out.len(), Progress::default());
        swap.unsent.clear();
        for ((to, letter), progress) in out.iter().zip(&mut swap.sent) {
            if !progress.done {
                if let Err(e) = self.link(*to)?.socket.push(letter, progress) {
                    self.lost(incoming, *to, &e);
                }
                if !progress.done {
                    swap.unsent.push(*to);
                }
            }
        }
        let mut missing = swap.unsent.clone();
        for (&rank, slot) in from.iter().zip(&mut swap.got) {
            if slot.is_none() {
                *slot = incoming.boxes[rank as usize].frames.pop_front();
                match slot {
                    Some(frame) if frame.kind != kind => bail!(
                        RS_ERR_MISMATCH,
                        "{} is in {}, rank {} in {}: ranks make their calls in different orders",
                        self.who(rank),
                        frame.kind.text(),
                        self.name_of(self.rank),
                        kind.text()
                    ),
                    Some(_) => {}
                    None => missing.push(rank),
                }
            }
        }
        // Who is gone but has given all that we want from it is no reason to fail.
        if let Some(gone) = missing.iter().find_map(|&r| incoming.gone[r as usize].as_ref()) {
            return Err(gone.clone());
        }
        if !missing.is_empty() {
            deadline.check(|| format!("{} to {doing}", self.list(&missing)))?;
        }
        Ok(missing.is_empty())
    }

    /// Whether a rank's process is known to have ended. Also after a failure.
    pub fn gone(&self, rank: u32) -> bool {
        let process = self.links.get(rank as usize).and_then(|l| l.as_ref()?.process.as_ref());
        let mut fds = [sys::watch(process.map(|p| p.as_fd()), libc::POLLIN)];
        sys::poll(&mut fds, Duration::ZERO).is_ok() && fds[0].revents != 0
    }

    /// The error that ended the mesh, or that a rank's end now ends it with. Looks at the sockets at most once a millisecond.
    pub fn check(&self) -> Result<()> {
        self.failed()?;
        let now = self.born.elapsed().as_micros() as u64;
        let last = self.looked.load(Ordering::Relaxed);
        if now < last + LOOK.as_micros() as u64
            || self.looked.compare_exchange(last, now, Ordering::Relaxed, Ordering::Relaxed).is_err()
        {
            return Ok(());
        }
        // A thread that waits in `swap` looks for us.
        let Ok(mut incoming) = self.incoming.try_lock() else { return Ok(()) };
        self.look(&mut incoming, &[], Duration::ZERO).map_err(|e| self.fail(e))?;
        match incoming.gone.iter().flatten().next() {
            Some(gone) => Err(self.fail(gone.clone())),
            None => self.failed(),
        }
    }

    /// The error that ended it.
    pub fn failed(&self) -> Result<()> {
        self.failure.get().map_or(Ok(()), |e| Err(e.clone()))
    }

    /// Ends it, here and everywhere, for a reason found here. Gives the reason that it ended for, which may be an older one.
    pub fn fail(&self, e: Error) -> Error {
        let told = err!(e.status(), "rank {} gave up: {e}", self.name_of(self.rank));
        self.end(e, &told)
    }

    /// Ends it, here and everywhere, because the caller says so. Any thread may.
    pub fn abort(&self, why: &str) {
        let e = err!(RS_ERR_ABORTED, "rank {} aborted: {why}", self.name_of(self.rank));
        self.end(e.clone(), &e);
    }

    fn end(&self, e: Error, told: &Error) -> Error {
        if self.failure.set(e.clone()).is_ok() && self.process == std::process::id() {
            let text: String = told.text().chars().take(TEXT).collect();
            let bytes = socket::failed(told.status(), &text);
            for link in self.links.iter().flatten() {
                // Also wakes threads of ours that wait for this socket.
                link.socket.last(Kind::Failed, &bytes);
            }
            self.listener.lock().unwrap_or_else(PoisonError::into_inner).take();
        }
        self.failure.get().cloned().unwrap_or(e)
    }

    fn lock(&self) -> MutexGuard<'_, Incoming> {
        self.incoming.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// `ranks 1 (process 76) and 3 (process 77)`.
    fn list(&self, ranks: &[u32]) -> String {
        let mut ranks = ranks.to_vec();
        ranks.sort_unstable();
        ranks.dedup();
        ranks.iter().map(|&r| self.who(r)).collect::<Vec<_>>().join(", ")
    }

    /// Sleeps until something comes, until there is room for those with unsent letters, or until `timeout`; takes what has come.
    fn look(&self, incoming: &mut Incoming, unsent: &[u32], timeout: Duration) -> Result<()> {
        let mut fds = Vec::with_capacity(2 * self.links.len());
        for (rank, link) in self.links.iter().enumerate() {
            let link = link.as_ref().filter(|_| incoming.gone[rank].is_none());
            let events = if unsent.contains(&(rank as u32)) { libc::POLLIN | libc::POLLOUT } else { libc::POLLIN };
            fds.push(sys::watch(link.map(|l| l.socket.as_fd()), events));
            fds.push(sys::watch(link.and_then(|l| l.process.as_ref()).map(|p| p.as_fd()), libc::POLLIN));
        }
        sys::poll(&mut fds, timeout).map_err(|e| err!(RS_ERR_COMM, "cannot poll: {e}"))?;
        for (rank, pair) in fds.chunks_exact(2).enumerate() {
            if pair[0].revents & !libc::POLLOUT != 0 {
                self.take(incoming, rank as u32)?;
            }
            if pair[1].revents != 0 {
                // It is dead; a child of it may keep the connection open. What it sent before counts.
                self.take(incoming, rank as u32)?;
                incoming.gone[rank].get_or_insert_with(|| self.died(rank as u32));
            }
        }
        Ok(())
    }

    /// Takes all that has come from a rank.
    fn take(&self, incoming: &mut Incoming, rank: u32) -> Result<()> {
        let socket = &self.link(rank)?.socket;
        let at = rank as usize;
        let inbox = &mut incoming.boxes[at];
        loop {
            let more = inbox.take(socket, &mut incoming.scratch).map_err(|e| e.context(self.who(rank)))?;
            match inbox.frames.back().map(|f| f.kind) {
                Some(Kind::Failed) => {
                    let e = inbox.frames.pop_back().map_or_else(|| self.died(rank), |f| socket::failure(&f.bytes));
                    self.end(e.clone(), &e);
                    return Err(e);
                }
                Some(Kind::Left) => {
                    inbox.frames.pop_back();
                    incoming.gone[at] = Some(err!(RS_ERR_PEER, "{} left '{}'", self.who(rank), self.name));
                }
                _ => {}
            }
            if !more {
                break;
            }
        }
        if inbox.closed {
            incoming.gone[at].get_or_insert_with(|| self.died(rank));
        }
        Ok(())
    }

    /// A letter did not go: the peer's last words, if any, say why.
    fn lost(&self, incoming: &mut Incoming, rank: u32, e: &std::io::Error) {
        if self.take(incoming, rank).is_ok() {
            incoming.gone[rank as usize].get_or_insert_with(|| match e.raw_os_error() {
                Some(libc::EPIPE | libc::ECONNRESET) => self.died(rank),
                _ => err!(RS_ERR_COMM, "cannot send to {}: {e}", self.who(rank)),
            });
        }
    }

    fn died(&self, rank: u32) -> Error {
        err!(RS_ERR_PEER, "{} died: its connection in '{}' closed without a word", self.who(rank), self.name)
    }
}

impl Drop for Mesh {
    fn drop(&mut self) {
        if self.failure.get().is_none() && self.process == std::process::id() {
            for link in self.links.iter().flatten() {
                link.socket.last(Kind::Left, &[]);
            }
        }
    }
}

/// `rank 3 (process 77)`; a process that cannot be seen from here has no number.
pub fn named(rank: u32, pid: i32) -> String {
    if pid > 0 { format!("rank {rank} (process {pid})") } else { format!("rank {rank}") }
}
