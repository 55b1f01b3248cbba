//! How the ranks of a run find each other: all call rank 0, which tells each where its parent listens.
//!
//! Rank 0 takes the callers in any order and refuses those that do not fit, with the reason; others, a scanner of ports say, do not
//! disturb it. Knows addresses and greetings. Must not know what comes after.
#![forbid(unsafe_code)]

use super::frame::{Frame, Inbox, Kind, nonsense};
use super::tree::{GRACE, Link, Tree, children, failure, parent};
use crate::abi::*;
use crate::comm::Deadline;
use crate::comm::local::sys;
use crate::error::{Error, Result, bail, err};
use serde::{Deserialize, Serialize};
use std::hash::{BuildHasher, RandomState};
use std::io::{self, ErrorKind};
use std::net::{SocketAddr, TcpListener, TcpStream, ToSocketAddrs};
use std::os::fd::AsFd;
use std::time::Duration;

/// Number of the greetings and of all that follows them; one more with any change.
const VERSION: u32 = 1;
/// Most ranks of a run.
const WORLD: u32 = 1 << 16;
/// Longest name of a run, in bytes.
const NAME: usize = 64;
/// Between two attempts to reach a rank that does not listen yet.
const RETRY: Duration = Duration::from_millis(100);
/// Longest attempt.
const ATTEMPT: Duration = Duration::from_secs(2);
/// Longest sleep while callers are awaited.
const NAP: Duration = Duration::from_millis(50);
/// Most callers whose greetings are awaited at once: of those that never greet the oldest go.
const CALLERS: usize = 1024;

/// Which run, and our place in it.
#[derive(Clone, Copy, Debug)]
pub struct Place<'a> {
    /// Where rank 0 listens: `host:port`.
    pub address: &'a str,
    /// Equal on all ranks.
    pub run: &'a str,
    pub rank: u32,
    pub world: u32,
    /// Most children of a rank; equal on all ranks.
    pub fan: u32,
}

/// What a caller says of itself.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Hello {
    version: u32,
    run: String,
    rank: u32,
    world: u32,
    /// 0 where rank 0 is called, else what rank 0 told.
    token: u64,
    /// Where it listens, if it has children.
    listens: Option<SocketAddr>,
}

/// What rank 0 answers.
#[derive(Clone, Debug, Serialize, Deserialize)]
struct Welcome {
    /// Of this very run.
    token: u64,
    /// Where the caller's parent listens; none: it is rank 0.
    parent: Option<SocketAddr>,
}

/// A connection whose greeting is awaited.
struct Caller {
    stream: TcpStream,
    inbox: Inbox,
}

/// Joins a run: collective. Gives the tree, and a number that no other run has.
pub fn join(place: Place<'_>, deadline: Deadline) -> Result<(Tree, u64)> {
    let Place { address, run, rank, world, fan } = place;
    if run.len() > NAME {
        bail!(RS_ERR_INVALID, "run '{run}' has {} bytes; at most {NAME} name a run", run.len());
    }
    if world > WORLD {
        bail!(RS_ERR_INVALID, "a world of {world} ranks: there are at most {WORLD}");
    }
    let (links, token) = if rank == 0 { root(place, deadline)? } else { member(place, deadline)? };
    Ok((Tree::new(address, rank, world, fan, links), token))
}

type Links = Vec<(Link, Inbox)>;

/// Rank 0: waits for all others and tells them their parents.
fn root(place: Place<'_>, deadline: Deadline) -> Result<(Links, u64)> {
    let Place { address, world, fan, .. } = place;
    let token = RandomState::new().hash_one(std::process::id()).max(1);
    let listener = resolve(address).and_then(|all| {
        all.iter().map(TcpListener::bind).reduce(|a, b| a.or(b)).unwrap_or(Err(ErrorKind::AddrNotAvailable.into()))
    });
    let listener = listener.map_err(|e| {
        err!(
            RS_ERR_COMM,
            "rank 0 cannot listen at '{address}': {e}; `address` is one of the host of rank 0, with a port that nobody else has"
        )
    })?;
    let mut door = Door::new(place, listener, 0)?;
    door.gather(1..world, deadline).map_err(|e| door.refuse_all(e))?;
    let listens = |rank: u32| door.members[rank as usize].as_ref().and_then(|m| m.1.listens);
    let mut welcomes = vec![];
    for rank in 1..world {
        let parent = match parent(rank, fan) {
            0 => None,
            p => Some(listens(p).ok_or_else(|| err!(RS_ERR_INTERNAL, "rank {p} has children and does not listen"))?),
        };
        welcomes.push((rank, Welcome { token, parent }));
    }
    for (rank, welcome) in welcomes {
        let Some((caller, _)) = &mut door.members[rank as usize] else { continue };
        // A short first answer fits into any connection; whoever is gone is noticed by its parent.
        let _ = send(&caller.stream, Frame::new(Kind::Welcome, 0, &encoded(&welcome)?));
    }
    Ok((door.links(children(0, fan, world)), token))
}

/// Any other rank: calls rank 0, then its parent, and waits for its children.
fn member(place: Place<'_>, deadline: Deadline) -> Result<(Links, u64)> {
    let Place { address, rank, world, fan, .. } = place;
    let late =
        |e: &io::Error| format!("rank 0 at '{address}' to take the call of rank {rank} ({e}); does it run, with this address?");
    let stream = call(|| resolve(address), deadline, late)?;
    let own = stream.local_addr().map_err(|e| err!(RS_ERR_COMM, "rank {rank} cannot ask for its own address: {e}"))?;
    let below = children(rank, fan, world);
    let listener = if below.is_empty() {
        None
    } else {
        // The interface that rank 0 is reached through is one that others reach.
        let bound = TcpListener::bind((own.ip(), 0)).and_then(|l| Ok((l.local_addr()?, l)));
        Some(bound.map_err(|e| err!(RS_ERR_COMM, "rank {rank} cannot listen at {}: {e}", own.ip()))?)
    };
    let hello = hello(place, 0, listener.as_ref().map(|l| l.0));
    let mut above = Caller::new(stream);
    let greeted = above
        .as_mut()
        .map_err(|e| e.kind().into())
        .and_then(|c| send(&c.stream, Frame::new(Kind::Hello, rank, &encoded_io(&hello)?)));
    let lost = |e: io::Error| err!(RS_ERR_COMM, "rank {rank} cannot speak with rank 0 at '{address}': {e}");
    greeted.map_err(lost)?;
    let mut above = above.map_err(lost)?;
    let welcome: Welcome = answer(&mut above, world, deadline).map_err(|e| e.context(format_args!("rank 0 at '{address}'")))?;
    let mut links: Links = vec![];
    match welcome.parent {
        None => links.push(above.link(0)),
        Some(at) => {
            let up = parent(rank, fan);
            let late = |e: &io::Error| format!("rank {up} at {at} to take the call of rank {rank} ({e})");
            let stream = call(|| Ok(vec![at]), deadline, late)?;
            let caller = Caller::new(stream).and_then(|c| {
                send(&c.stream, Frame::new(Kind::Hello, rank, &encoded_io(&self::hello(place, welcome.token, None))?))?;
                Ok(c)
            });
            links.push(caller.map_err(|e| err!(RS_ERR_COMM, "rank {rank} cannot speak with rank {up} at {at}: {e}"))?.link(up));
        }
    }
    if let Some((_, listener)) = listener {
        let mut door = Door::new(place, listener, welcome.token)?;
        door.gather(below.clone(), deadline).map_err(|e| door.refuse_all(e))?;
        links.extend(door.links(below));
    }
    Ok((links, welcome.token))
}

fn hello(place: Place<'_>, token: u64, listens: Option<SocketAddr>) -> Hello {
    Hello { version: VERSION, run: place.run.into(), rank: place.rank, world: place.world, token, listens }
}

fn resolve(address: &str) -> io::Result<Vec<SocketAddr>> {
    address.to_socket_addrs().map(Iterator::collect)
}

fn encoded(value: &impl Serialize) -> Result<Vec<u8>> {
    postcard::to_allocvec(value).map_err(|e| err!(RS_ERR_INTERNAL, "cannot encode a greeting: {e}"))
}

fn encoded_io(value: &impl Serialize) -> io::Result<Vec<u8>> {
    postcard::to_allocvec(value).map_err(io::Error::other)
}

/// Sends a short frame over a new connection.
fn send(stream: &TcpStream, frame: Frame) -> io::Result<()> {
    let mut out = super::frame::Outbox::default();
    out.push(frame.encode());
    out.flush(stream)?;
    if out.is_empty() { Ok(()) } else { Err(ErrorKind::WouldBlock.into()) }
}

/// Connects, however long nobody listens; `late` completes "waited for ..." with what went wrong last.
fn call(
    resolve: impl Fn() -> io::Result<Vec<SocketAddr>>,
    deadline: Deadline,
    late: impl Fn(&io::Error) -> String,
) -> Result<TcpStream> {
    let mut last = io::Error::from(ErrorKind::AddrNotAvailable);
    loop {
        match resolve() {
            Ok(all) => {
                for at in all {
                    // 0 would be refused.
                    let left = deadline.left().clamp(Duration::from_millis(1), ATTEMPT);
                    match TcpStream::connect_timeout(&at, left) {
                        Ok(stream) => return Ok(stream),
                        Err(e) => last = e,
                    }
                }
            }
            Err(e) => last = e,
        }
        deadline.check(|| late(&last))?;
        std::thread::sleep(RETRY.min(deadline.left()));
    }
}

/// The answer of rank 0, which comes when all ranks are there.
fn answer(above: &mut Caller, world: u32, deadline: Deadline) -> Result<Welcome> {
    // Rank 0 knows who is missing, and says so at its own deadline.
    let end = Deadline::after(deadline.left() + GRACE);
    loop {
        above.inbox.take(&above.stream, world, 1)?;
        match above.inbox.frames.pop_front() {
            Some(f) if f.kind == Kind::Welcome => return postcard::from_bytes(&f.body).map_err(|_| nonsense()),
            Some(f) if f.kind == Kind::Failed => return Err(failure(&f.body)),
            Some(_) => return Err(nonsense()),
            None if above.inbox.closed => bail!(RS_ERR_PEER, "it closed the connection without a word"),
            None => {}
        }
        end.check(|| "all ranks to join".into())?;
        let mut fds = [sys::watch(Some(above.stream.as_fd()), libc::POLLIN)];
        sys::poll(&mut fds, NAP.min(end.left())).map_err(|e| err!(RS_ERR_COMM, "cannot poll: {e}"))?;
    }
}

impl Caller {
    fn new(stream: TcpStream) -> io::Result<Caller> {
        stream.set_nonblocking(true)?;
        stream.set_nodelay(true)?;
        Ok(Caller { stream, inbox: Inbox::default() })
    }

    fn link(self, rank: u32) -> (Link, Inbox) {
        (Link::new(rank, self.stream), self.inbox)
    }

    fn who(&self) -> String {
        self.stream.peer_addr().map_or_else(|_| "a caller".into(), |at| format!("the caller from {at}"))
    }
}

/// Callers that are being gathered.
struct Door<'a> {
    place: Place<'a>,
    listener: TcpListener,
    /// Of the run; 0 where callers cannot know it yet.
    token: u64,
    waiting: Vec<Caller>,
    /// By rank.
    members: Vec<Option<(Caller, Hello)>>,
    /// Why the last caller was refused.
    refused: Option<Error>,
}

impl<'a> Door<'a> {
    fn new(place: Place<'a>, listener: TcpListener, token: u64) -> Result<Door<'a>> {
        listener.set_nonblocking(true).map_err(|e| err!(RS_ERR_COMM, "rank {} cannot listen: {e}", place.rank))?;
        let members = (0..place.world).map(|_| None).collect();
        Ok(Door { place, listener, token, waiting: vec![], members, refused: None })
    }

    /// Waits for these ranks.
    fn gather(&mut self, ranks: std::ops::Range<u32>, deadline: Deadline) -> Result<()> {
        loop {
            self.accept()?;
            self.hear(&ranks);
            let missing: Vec<u32> = ranks.clone().filter(|&r| self.members[r as usize].is_none()).collect();
            if missing.is_empty() {
                return Ok(());
            }
            deadline.check(|| self.missing(&missing))?;
            let mut fds = vec![sys::watch(Some(self.listener.as_fd()), libc::POLLIN)];
            fds.extend(self.waiting.iter().map(|c| sys::watch(Some(c.stream.as_fd()), libc::POLLIN)));
            let members = self.members.iter().map(|m| m.as_ref().map(|(c, _)| c.stream.as_fd()));
            fds.extend(members.map(|fd| sys::watch(fd, libc::POLLIN)));
            sys::poll(&mut fds, NAP.min(deadline.left())).map_err(|e| err!(RS_ERR_COMM, "cannot poll: {e}"))?;
            // Who has joined says nothing more until all have: it is gone.
            if let Some(rank) = fds[1 + self.waiting.len()..].iter().position(|fd| fd.revents != 0) {
                self.left(rank)?;
            }
        }
    }

    /// A member of whom something has come before all are there.
    fn left(&mut self, rank: usize) -> Result<()> {
        let Some((caller, _)) = &mut self.members[rank] else { return Ok(()) };
        if self.token != 0 {
            // Its run goes on for it: what it says is for the tree.
            return caller.inbox.take(&caller.stream, self.place.world, 2);
        }
        bail!(RS_ERR_PEER, "rank {rank} ({}) left while others were still joining", caller.who());
    }

    fn accept(&mut self) -> Result<()> {
        loop {
            match self.listener.accept() {
                Ok((stream, _)) => match Caller::new(stream) {
                    Ok(caller) => self.waiting.push(caller),
                    Err(e) => log::warn!("rank {}: a caller is gone again: {e}", self.place.rank),
                },
                Err(e) if e.kind() == ErrorKind::WouldBlock => break,
                Err(e) if matches!(e.kind(), ErrorKind::Interrupted | ErrorKind::ConnectionAborted) => {}
                Err(e) => bail!(RS_ERR_COMM, "rank {} cannot accept a connection: {e}", self.place.rank),
            }
        }
        let many = self.waiting.len().saturating_sub(CALLERS);
        self.waiting.drain(..many);
        Ok(())
    }

    /// Reads the greetings that have come.
    fn hear(&mut self, ranks: &std::ops::Range<u32>) {
        for mut caller in std::mem::take(&mut self.waiting) {
            let taken = caller.inbox.take(&caller.stream, self.place.world, 1);
            let greeting = match (taken, caller.inbox.frames.pop_front()) {
                (Err(e), _) => Err(e),
                (Ok(()), Some(f)) if f.kind == Kind::Hello => postcard::from_bytes::<Hello>(&f.body).map_err(|_| nonsense()),
                (Ok(()), Some(_)) => Err(nonsense()),
                (Ok(()), None) if caller.inbox.closed => continue,
                (Ok(()), None) => {
                    self.waiting.push(caller);
                    continue;
                }
            };
            match greeting.and_then(|hello| self.fits(&hello, ranks).map(|()| hello)) {
                Ok(hello) => {
                    let rank = hello.rank as usize;
                    self.members[rank] = Some((caller, hello));
                }
                Err(e) => {
                    let e = e.context(caller.who());
                    log::warn!("rank {} at '{}': refused: {e}", self.place.rank, self.place.address);
                    refuse(&caller, self.place.rank, &e);
                    self.refused = Some(e);
                }
            }
        }
    }

    /// Whether a caller belongs to our run.
    fn fits(&self, hello: &Hello, ranks: &std::ops::Range<u32>) -> Result<()> {
        let Place { rank, world, run, .. } = self.place;
        let theirs = hello.rank;
        if hello.version != VERSION {
            bail!(
                RS_ERR_MISMATCH,
                "rank {theirs} speaks version {} of the host path, rank {rank} {VERSION}: use one version of the library",
                hello.version
            );
        }
        if hello.run != run {
            bail!(RS_ERR_MISMATCH, "rank {theirs} joins run '{}', rank {rank} is of '{run}': give each run its address", hello.run);
        }
        if hello.world != world {
            bail!(RS_ERR_MISMATCH, "rank {theirs} says that there are {} ranks, rank {rank} says {world}", hello.world);
        }
        if hello.token != self.token {
            bail!(RS_ERR_MISMATCH, "rank {theirs} belongs to another run that had this address");
        }
        if !ranks.contains(&theirs) {
            bail!(RS_ERR_MISMATCH, "rank {theirs} calls rank {rank}, which does not wait for it");
        }
        if self.members[theirs as usize].is_some() {
            bail!(RS_ERR_INVALID, "rank {theirs} is there already: another process has this rank, or another run this address");
        }
        Ok(())
    }

    fn missing(&self, ranks: &[u32]) -> String {
        let shown: Vec<String> = ranks.iter().take(16).map(|r| format!("rank {r}")).collect();
        let more = if ranks.len() > 16 { format!(" and {} more", ranks.len() - 16) } else { String::new() };
        let refused = self.refused.as_ref().map_or_else(String::new, |e| format!("; refused: {e}"));
        format!("{}{more} to join at '{}' (of {} ranks{refused})", shown.join(", "), self.place.address, self.place.world)
    }

    /// Tells all that are there why the run does not begin.
    fn refuse_all(&self, e: Error) -> Error {
        let told = err!(e.status(), "rank {} gave up: {e}", self.place.rank);
        self.members.iter().flatten().for_each(|(caller, _)| refuse(caller, self.place.rank, &told));
        e
    }

    /// The connections to these ranks.
    fn links(self, ranks: std::ops::Range<u32>) -> Links {
        let wanted = |(rank, member): (usize, Option<(Caller, Hello)>)| {
            let (caller, _) = member.filter(|_| ranks.contains(&(rank as u32)))?;
            Some(caller.link(rank as u32))
        };
        self.members.into_iter().enumerate().filter_map(wanted).collect()
    }
}

/// Tells a caller why it cannot join.
fn refuse(caller: &Caller, rank: u32, e: &Error) {
    let text: String = e.text().chars().take(1000).collect();
    let _ = send(&caller.stream, Frame::new(Kind::Failed, rank, &[&e.status().to_le_bytes(), text.as_bytes()].concat()));
}
