//! The host path between hosts: the ranks as a tree of TCP connections.
//!
//! Each rank has a connection to its parent and to its children, [`FAN`] at most, so that no rank sends what all say more often than
//! that. In a gather each rank's word goes up to rank 0 as it is, also past ranks that have not spoken yet: rank 0 knows who is missing.
//! What all said comes down. Whoever fails tells its neighbours, who tell theirs.
//!
//! Knows ranks, frames and deadlines. Must not know what words mean, nor anything of weights.
#![forbid(unsafe_code)]

use super::frame::{Frame, Inbox, Kind, LONGEST_WORD, Outbox, nonsense};
use crate::abi::*;
use crate::comm::Deadline;
use crate::comm::local::sys;
use crate::error::{Error, Result, bail, err, is_error};
use std::net::{Shutdown, TcpStream};
use std::os::fd::AsFd;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Duration, Instant};

/// Most children of a rank.
pub const FAN: u32 = 32;
/// Least time between two looks at the connections by [`Tree::check`].
const LOOK: Duration = Duration::from_millis(1);
/// Longest sleep without a look at whether another thread has ended the tree.
const NAP: Duration = Duration::from_millis(50);
/// So long beyond its deadline a rank waits to hear whom rank 0 waits for.
pub const GRACE: Duration = Duration::from_secs(1);
/// So much longer for each rank above its parent: of a line of ranks that hear nothing the first one knows behind whom.
const STEP: Duration = Duration::from_millis(200);
/// Most characters of a failure that are told to others.
const TEXT: usize = 4000;
/// Frames of a neighbour that wait to be asked for, beyond those of a gather.
const SPARE: usize = 16;

/// The rank that a rank's word goes to; not for rank 0.
pub fn parent(rank: u32, fan: u32) -> u32 {
    (rank - 1) / fan
}

/// The ranks whose words come to a rank directly.
pub fn children(rank: u32, fan: u32, world: u32) -> std::ops::Range<u32> {
    let first = u64::from(rank) * u64::from(fan) + 1;
    let end = (first + u64::from(fan)).min(world.into());
    first.min(end) as u32..end as u32
}

/// The first of a rank and those above it, upwards, of which `so` is true. Not of rank 0.
fn upwards(rank: u32, fan: u32, so: impl Fn(u32) -> bool) -> Option<u32> {
    let line = std::iter::successors(Some(rank), |&r| (r > 0).then(|| parent(r, fan)));
    line.take_while(|&r| r > 0).find(|&r| so(r))
}

/// A neighbour.
#[derive(Debug)]
pub struct Link {
    /// Its rank.
    pub rank: u32,
    /// The connection, which never blocks.
    pub stream: TcpStream,
    out: Mutex<Outbox>,
}

impl Link {
    /// Of a connection that was made and greeted.
    pub fn new(rank: u32, stream: TcpStream) -> Link {
        Link { rank, stream, out: Mutex::default() }
    }

    /// Puts a frame behind the others and gives the kernel what it takes. A connection that is gone is noticed when it is read.
    fn push(&self, frame: Arc<[u8]>) {
        lock(&self.out).push(frame);
        self.flush();
    }

    /// Whether all has been given to the kernel, or never will.
    fn flush(&self) -> bool {
        let mut out = lock(&self.out);
        if out.flush(&self.stream).is_err() {
            out.clear();
        }
        out.is_empty()
    }
}

/// One rank's place among all.
#[derive(Debug)]
pub struct Tree {
    /// The address where rank 0 listened, which names the run.
    name: String,
    pub rank: u32,
    pub world: u32,
    fan: u32,
    /// Ranks above this one.
    depth: u32,
    /// The parent first, if there is one, then the children in rank order.
    links: Vec<Link>,
    incoming: Mutex<Incoming>,
    failure: OnceLock<Error>,
    born: Instant,
    /// Microseconds since `born` at which `check` last looked.
    looked: AtomicU64,
    /// The process that joined. A child made by fork has our connections too, but not our place.
    process: u32,
}

/// What has come, by link.
#[derive(Debug)]
struct Incoming {
    boxes: Vec<Inbox>,
    /// Why nothing more comes.
    gone: Vec<Option<Error>>,
    /// Of the next gather.
    number: u64,
}

/// A gather that is going on.
struct Gather {
    number: u64,
    /// By rank; on rank 0 alone.
    words: Vec<Option<Arc<[u8]>>>,
    /// Ranks whose words have come from each link.
    heard: Vec<u32>,
    /// What all said.
    all: Option<Arc<[u8]>>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Tree {
    /// Of connections to the parent and to all children, and what has come over them already.
    pub fn new(name: &str, rank: u32, world: u32, fan: u32, links: Vec<(Link, Inbox)>) -> Tree {
        let (links, boxes): (Vec<_>, Vec<_>) = links.into_iter().unzip();
        let gone = vec![None; boxes.len()];
        Tree {
            name: name.to_string(),
            rank,
            world,
            fan,
            depth: std::iter::successors(Some(rank), |&r| (r > 0).then(|| parent(r, fan))).count() as u32 - 1,
            links,
            incoming: Mutex::new(Incoming { boxes, gone, number: 1 }),
            failure: OnceLock::new(),
            born: Instant::now(),
            looked: AtomicU64::new(0),
            process: std::process::id(),
        }
    }

    /// See [`crate::comm::Comm::allgather`].
    pub fn allgather(&self, mine: &[u8], deadline: Deadline) -> Result<Vec<u8>> {
        if self.process != std::process::id() {
            bail!(RS_ERR_STATE, "process {} joined {}, this one was forked from it: join here", self.process, self.name);
        }
        // The lock is held to the end: of two gathers at once neither could tell its words.
        let mut incoming = lock(&self.incoming);
        self.gather(&mut incoming, mine, deadline).map(|all| all.to_vec()).map_err(|e| self.fail(e))
    }

    fn gather(&self, incoming: &mut Incoming, mine: &[u8], deadline: Deadline) -> Result<Arc<[u8]>> {
        if mine.len() as u64 > LONGEST_WORD {
            bail!(RS_ERR_INTERNAL, "a gather of {} bytes a rank; at most {LONGEST_WORD} are possible", mine.len());
        }
        let number = incoming.number;
        incoming.number += 1;
        let mut gather = Gather { number, words: vec![], heard: vec![0; self.links.len()], all: None };
        let word = Frame { kind: Kind::Word, rank: self.rank, number, body: mine.into() };
        if self.rank == 0 {
            gather.words = vec![None; self.world as usize];
            gather.words[0] = Some(word.body);
        } else {
            self.links[0].push(word.encode());
        }
        let mut late: Option<Deadline> = None;
        loop {
            self.failed()?;
            for link in 0..self.links.len() {
                while let Some(frame) = incoming.boxes[link].next(number) {
                    self.hear(&mut gather, link, frame)?;
                }
            }
            if gather.all.is_none() && self.rank == 0 && gather.words.iter().all(Option::is_some) {
                let all: Arc<[u8]> = self.joined(&gather.words)?.into();
                self.tell(&gather, &all);
                gather.all = Some(all);
            }
            // What a rank passes on is on its way before it returns: it may never come back.
            let unsent: Vec<usize> = (0..self.links.len()).filter(|&i| !self.links[i].flush()).collect();
            if let (Some(all), true) = (&gather.all, unsent.is_empty()) {
                return Ok(all.clone());
            }
            self.complete(incoming, &gather)?;
            let left = match &late {
                None => deadline.left(),
                Some(grace) => grace.left(),
            };
            if left.is_zero() {
                match &late {
                    None if self.rank > 0 && gather.all.is_none() => {
                        // Rank 0 knows whom all wait for.
                        let ms = deadline.whole().as_millis() as u64;
                        let body = ms.to_le_bytes().as_slice().into();
                        self.links[0].push(Frame { kind: Kind::Late, rank: self.rank, number, body }.encode());
                        late = Some(Deadline::after(GRACE + STEP * self.depth));
                    }
                    _ => deadline.check(|| self.missing(&gather, &unsent))?,
                }
            }
            self.look(incoming, &unsent, left.min(NAP))?;
        }
    }

    /// A frame of a gather.
    fn hear(&self, gather: &mut Gather, link: usize, frame: Frame) -> Result<()> {
        let above = self.rank > 0 && link == 0;
        let from = self.links[link].rank;
        let strange = || nonsense().context(self.who(from));
        match frame.kind {
            Kind::All if above && frame.number == gather.number && gather.all.is_none() => {
                if frame.body.len() % self.world as usize != 0 {
                    return Err(strange());
                }
                self.tell(gather, &frame.body);
                gather.all = Some(frame.body);
            }
            Kind::Word if !above && frame.number == gather.number && upwards(frame.rank, self.fan, |r| r == from).is_some() => {
                gather.heard[link] += 1;
                match gather.words.get_mut(frame.rank as usize) {
                    Some(word @ None) => *word = Some(frame.body),
                    Some(Some(_)) => return Err(strange()),
                    // Not rank 0, or a rank that there is not.
                    None if self.rank > 0 => self.links[0].push(frame.encode()),
                    None => return Err(strange()),
                }
            }
            // It was late in an earlier gather, which has ended well since.
            Kind::Late if !above && frame.number < gather.number => {}
            Kind::Late if !above && self.rank > 0 => self.links[0].push(frame.encode()),
            Kind::Late if !above => {
                let (rank, ms) = (self.who(frame.rank), frame.milliseconds());
                bail!(RS_ERR_TIMEOUT, "{rank} waited {ms} ms for {}", self.missing(gather, &[]));
            }
            _ => return Err(strange()),
        }
        Ok(())
    }

    /// Tells the children what all said.
    fn tell(&self, gather: &Gather, all: &Arc<[u8]>) {
        let children = &self.links[usize::from(self.rank > 0)..];
        if !children.is_empty() {
            let frame = Frame { kind: Kind::All, rank: 0, number: gather.number, body: all.clone() }.encode();
            children.iter().for_each(|link| link.push(frame.clone()));
        }
    }

    /// All words in rank order.
    fn joined(&self, words: &[Option<Arc<[u8]>>]) -> Result<Vec<u8>> {
        let words: Vec<&[u8]> = words.iter().flatten().map(|w| &w[..]).collect();
        if let Some(rank) = words.iter().position(|w| w.len() != words[0].len()) {
            let lens = (words[0].len(), words[rank].len());
            bail!(
                RS_ERR_MISMATCH,
                "rank 0 gathers {} bytes, rank {rank} {}: all ranks make the same calls in the same order",
                lens.0,
                lens.1
            );
        }
        Ok(words.concat())
    }

    /// An error if somebody is gone from whom something is still missing.
    fn complete(&self, incoming: &Incoming, gather: &Gather) -> Result<()> {
        if gather.all.is_some() {
            return Ok(());
        }
        for (at, gone) in incoming.gone.iter().enumerate() {
            let above = self.rank > 0 && at == 0;
            if let Some(gone) = gone.as_ref().filter(|_| above || gather.heard[at] < self.below(self.links[at].rank)) {
                return Err(gone.clone());
            }
        }
        Ok(())
    }

    /// Number of ranks whose words come through a child, its own among them.
    fn below(&self, child: u32) -> u32 {
        1 + children(child, self.fan, self.world).map(|c| self.below(c)).sum::<u32>()
    }

    /// Who has not done what.
    fn missing(&self, gather: &Gather, unsent: &[usize]) -> String {
        if gather.all.is_some() {
            let ranks: Vec<u32> = unsent.iter().map(|&i| self.links[i].rank).collect();
            return format!("{} to take what all ranks gathered", self.list(&ranks));
        }
        if self.rank > 0 {
            let through =
                if self.links[0].rank > 0 { format!(" (through {})", self.who(self.links[0].rank)) } else { String::new() };
            return format!("rank 0{through} to tell what all ranks gathered");
        }
        let silent = |rank: u32| gather.words[rank as usize].is_none();
        // Words pass through ranks that are missing themselves: those above come first.
        let first = |rank: &u32| silent(*rank) && upwards(*rank, self.fan, |r| r != *rank && silent(r)).is_none();
        let ranks: Vec<u32> = (1..self.world).filter(first).collect();
        format!("{} to gather", self.list(&ranks))
    }

    fn list(&self, ranks: &[u32]) -> String {
        let shown = ranks.iter().take(16).map(|&r| self.who(r)).collect::<Vec<_>>().join(", ");
        if ranks.len() > 16 { format!("{shown} and {} more", ranks.len() - 16) } else { shown }
    }

    /// `rank 3 (10.0.0.7:4711)`, of a neighbour.
    pub fn who(&self, rank: u32) -> String {
        let at = self.links.iter().find(|l| l.rank == rank).and_then(|l| l.stream.peer_addr().ok());
        at.map_or_else(|| format!("rank {rank}"), |at| format!("rank {rank} ({at})"))
    }

    /// See [`crate::comm::Comm::check`]. Looks at the connections at most once a millisecond. `doing` completes "which waits for ..." where
    /// another rank's deadline has passed in a gather that this one has not come to.
    pub fn check(&self, doing: &dyn Fn() -> String) -> Result<()> {
        self.failed()?;
        let now = self.born.elapsed().as_micros() as u64;
        let last = self.looked.load(Ordering::Relaxed);
        if now < last + LOOK.as_micros() as u64
            || self.looked.compare_exchange(last, now, Ordering::Relaxed, Ordering::Relaxed).is_err()
        {
            return Ok(());
        }
        // A thread that gathers looks for us.
        let Ok(mut incoming) = self.incoming.try_lock() else { return Ok(()) };
        let looked = self.look(&mut incoming, &[], Duration::ZERO).and_then(|()| self.late(&mut incoming, doing));
        looked.map_err(|e| self.fail(e))?;
        match incoming.gone.iter().flatten().next() {
            Some(gone) => Err(self.fail(gone.clone())),
            None => self.failed(),
        }
    }

    /// Passes on that others wait in a gather for this rank; on rank 0 that is an error.
    fn late(&self, incoming: &mut Incoming, doing: &dyn Fn() -> String) -> Result<()> {
        let (next, children) = (incoming.number, usize::from(self.rank > 0));
        for inbox in &mut incoming.boxes[children..] {
            let Some(at) = inbox.frames.iter().position(|f| f.kind == Kind::Late && f.number == next) else { continue };
            let Some(frame) = inbox.frames.remove(at) else { continue };
            if self.rank > 0 {
                self.links[0].push(frame.encode());
                continue;
            }
            bail!(
                RS_ERR_TIMEOUT,
                "{} waited {} ms for rank 0, which waits for {}",
                self.who(frame.rank),
                frame.milliseconds(),
                doing()
            );
        }
        Ok(())
    }

    /// The error that ended it.
    pub fn failed(&self) -> Result<()> {
        self.failure.get().map_or(Ok(()), |e| Err(e.clone()))
    }

    /// Ends it, here and everywhere, for a reason found here. Gives the reason that it ended for, which may be an older one.
    pub fn fail(&self, e: Error) -> Error {
        let told = err!(e.status(), "rank {} gave up: {e}", self.rank);
        self.end(e, &told)
    }

    /// Ends it, here and everywhere, because the caller says so. Any thread may.
    pub fn abort(&self, why: &str) {
        let e = err!(RS_ERR_ABORTED, "rank {} aborted: {why}", self.rank);
        self.end(e.clone(), &e);
    }

    fn end(&self, e: Error, told: &Error) -> Error {
        if self.failure.set(e.clone()).is_ok() && self.process == std::process::id() {
            let text: String = told.text().chars().take(TEXT).collect();
            let frame = Frame::new(Kind::Failed, self.rank, &[&told.status().to_le_bytes(), text.as_bytes()].concat());
            self.last(frame);
        }
        self.failure.get().cloned().unwrap_or(e)
    }

    /// One last frame to all neighbours, as far as it goes without waiting. Also wakes a thread of ours that waits for them.
    fn last(&self, frame: Frame) {
        let frame = frame.encode();
        for link in &self.links {
            link.push(frame.clone());
            let _ = link.stream.shutdown(Shutdown::Both);
        }
    }

    /// Sleeps until something comes, until there is room for links with unsent frames, or until `timeout`; takes what has come.
    fn look(&self, incoming: &mut Incoming, unsent: &[usize], timeout: Duration) -> Result<()> {
        let watched = |(at, link): (usize, &Link)| {
            let fd = incoming.gone[at].is_none().then(|| link.stream.as_fd());
            sys::watch(fd, if unsent.contains(&at) { libc::POLLIN | libc::POLLOUT } else { libc::POLLIN })
        };
        let mut fds: Vec<libc::pollfd> = self.links.iter().enumerate().map(watched).collect();
        sys::poll(&mut fds, timeout).map_err(|e| err!(RS_ERR_COMM, "cannot poll: {e}"))?;
        for (at, fd) in fds.iter().enumerate() {
            if fd.revents & !libc::POLLOUT != 0 {
                self.take(incoming, at)?;
            }
        }
        Ok(())
    }

    /// Takes all that has come over a link.
    fn take(&self, incoming: &mut Incoming, at: usize) -> Result<()> {
        let link = &self.links[at];
        let inbox = &mut incoming.boxes[at];
        // A word and perhaps a complaint of each rank below it, of this gather; more than that nobody sends.
        let most = 2 * self.below(link.rank) as usize + SPARE;
        let taken = inbox.take(&link.stream, self.world, most);
        let taken = taken.and_then(|()| if inbox.frames.len() < most { Ok(()) } else { Err(nonsense()) });
        taken.map_err(|e| e.context(self.who(link.rank)))?;
        match inbox.last() {
            Some(frame) if frame.kind == Kind::Failed => {
                let e = failure(&frame.body);
                self.end(e.clone(), &e);
                return Err(e);
            }
            Some(_) => incoming.gone[at] = Some(err!(RS_ERR_PEER, "{} left {}", self.who(link.rank), self.name)),
            None if inbox.closed && incoming.gone[at].is_none() => {
                // Of our own closing, after a failure, nothing follows.
                self.failed()?;
                let e = err!(RS_ERR_PEER, "{} died: its connection closed without a word", self.who(link.rank));
                incoming.gone[at] = Some(e);
            }
            None => {}
        }
        Ok(())
    }
}

/// What a [`Kind::Failed`] frame says.
pub fn failure(bytes: &[u8]) -> Error {
    let (status, text) = bytes.split_at(bytes.len().min(4));
    let status = status.try_into().map_or(RS_ERR_COMM, i32::from_le_bytes);
    Error::new(if is_error(status) { status } else { RS_ERR_COMM }, String::from_utf8_lossy(text))
}

#[cfg(test)]
impl Tree {
    /// As if its process were killed: the connections close without a word.
    pub fn die(self) {
        let _ = self.failure.set(err!(RS_ERR_PEER, "dead"));
    }
}

impl Drop for Tree {
    fn drop(&mut self) {
        if self.failure.get().is_none() && self.process == std::process::id() {
            self.last(Frame::new(Kind::Left, self.rank, &[]));
        }
    }
}
