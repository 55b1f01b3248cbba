//! How the ranks of a run find each other: each listens under an abstract name, each connects to those below it.
//!
//! Both ends of a connection greet first and then read the other's greeting, so nobody waits for a turn. The kernel says whose process
//! is at the other end. Knows names, greetings, users. Must not know what comes after.

use super::mesh::{Link, Mesh, named};
use super::socket::{Frame, Inbox, Kind, Letter, PACKET, Progress, Socket, failed, failure};
use super::sys::{self, Mapping, Peer};
use crate::abi::*;
use crate::comm::Deadline;
use crate::error::{Error, Result, bail, err};
use std::hash::{BuildHasher, RandomState};
use std::io::ErrorKind;
use std::os::fd::{AsFd, OwnedFd};
use std::time::Duration;

/// Longest name of a run, in bytes.
const NAME: usize = 64;
/// Most ranks of a run.
const WORLD: u32 = 4096;
/// "rshlocal", and by its place in the bytes their order.
const MAGIC: u64 = 0x7273_686c_6f63_616c;
/// Number of the greeting and of all that follows it; one more with any change.
const VERSION: u32 = 2;
/// Between two attempts to connect to a rank that does not listen yet.
const RETRY: Duration = Duration::from_millis(5);

/// What one rank says of itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Hello {
    version: u32,
    rank: u32,
    world: u32,
    /// `RS_LOCAL_*`.
    flags: u32,
    /// A number of this very call of `join`.
    token: u64,
}

impl Hello {
    fn encode(&self) -> Vec<u8> {
        let words = [self.version, self.rank, self.world, self.flags].map(u32::to_ne_bytes).concat();
        [&MAGIC.to_ne_bytes()[..], &words, &self.token.to_ne_bytes()].concat()
    }

    fn decode(bytes: &[u8]) -> Option<Hello> {
        let bytes: &[u8; 32] = bytes.try_into().ok()?;
        let half = |at: usize| bytes[at..at + 4].try_into().map_or(0, u32::from_ne_bytes);
        let word = |at: usize| bytes[at..at + 8].try_into().map_or(0, u64::from_ne_bytes);
        let hello = Hello { version: half(8), rank: half(12), world: half(16), flags: half(20), token: word(24) };
        (word(0) == MAGIC).then_some(hello)
    }

    /// Whether a greeting belongs to our run.
    fn matches(&self, theirs: &Hello, run: &str, who: &str) -> Result<()> {
        if theirs.version != self.version {
            bail!(
                RS_ERR_MISMATCH,
                "{who} of '{run}' speaks version {} of the local wire, this rank {}: use one version of the library",
                theirs.version,
                self.version
            );
        }
        if theirs.world != self.world {
            bail!(
                RS_ERR_MISMATCH,
                "{who} of '{run}' says that it has {} ranks, rank {} says {}",
                theirs.world,
                self.rank,
                self.world
            );
        }
        if theirs.flags != self.flags {
            bail!(
                RS_ERR_MISMATCH,
                "{who} of '{run}' has flags {}, rank {} has {}: RS_LOCAL_* are equal on all ranks",
                theirs.flags,
                self.rank,
                self.flags
            );
        }
        Ok(())
    }
}

/// A connection whose other end may not have greeted yet.
struct Greeting {
    socket: Socket,
    inbox: Inbox,
    /// The rank that we called; `None`: it called us.
    called: Option<u32>,
}

/// Ranks that are being gathered.
struct Door<'a> {
    run: &'a str,
    mine: Hello,
    bell: OwnedFd,
    listener: OwnedFd,
    waiting: Vec<Greeting>,
    links: Vec<Option<Link>>,
    tokens: Vec<u64>,
    scratch: Vec<u8>,
}

/// Finds all other ranks of a run: collective. `flags` are equal on all ranks.
pub fn join(run: &str, rank: u32, world: u32, flags: u32, deadline: Deadline) -> Result<Mesh> {
    if run.is_empty() || run.len() > NAME || run.contains('\0') {
        bail!(RS_ERR_INVALID, "name '{run}' has {} bytes; 1 to {NAME}, none of them 0, name a run", run.len());
    }
    if world == 0 || world > WORLD || rank >= world {
        bail!(RS_ERR_INVALID, "rank {rank} of {world}: ranks count from 0 and there are at most {WORLD}");
    }
    let cannot = |what: &str, e: std::io::Error| err!(RS_ERR_COMM, "rank {rank} of '{run}': cannot make {what}: {e}");
    let listener = sys::listen(&address(run, rank)).map_err(|e| taken(run, rank, e))?;
    let memory = sys::shared(c"libreshard bell", sys::page()).map_err(|e| cannot("a bell", e))?;
    let bell = Mapping::new(memory.as_fd(), true).map_err(|e| cannot("a bell", e))?;
    let token = RandomState::new().hash_one((std::process::id(), rank));
    let mut door = Door {
        run,
        mine: Hello { version: VERSION, rank, world, flags, token },
        bell: memory,
        listener,
        waiting: vec![],
        links: (0..world).map(|_| None).collect(),
        tokens: vec![0; world as usize],
        scratch: vec![0; PACKET],
    };
    door.tokens[rank as usize] = token;
    door.gather(deadline).map_err(|e| door.give_up(e))?;
    let Door { links, tokens, listener, .. } = door;
    let mesh = Mesh::new(run, rank, links, bell, listener);
    agree(&mesh, &tokens, deadline)?;
    Ok(mesh)
}

/// That all ranks met the same others: none of them belongs to a run of the same name that is just ending or starting.
fn agree(mesh: &Mesh, tokens: &[u64], deadline: Deadline) -> Result<()> {
    let bytes: Vec<u8> = tokens.iter().flat_map(|t| t.to_ne_bytes()).collect();
    let others = mesh.others();
    let letter = Letter { kind: Kind::Gather, bytes: &bytes, memory: &[], files: &[] };
    let out: Vec<_> = others.iter().map(|&r| (r, letter)).collect();
    let frames = mesh.swap(&out, Kind::Gather, &others, "meet all others", deadline)?;
    for (&rank, frame) in others.iter().zip(&frames) {
        if frame.bytes != bytes {
            let e = err!(
                RS_ERR_MISMATCH,
                "{} met other processes in '{}' than rank {}: two runs have this name; give each its own",
                mesh.who(rank),
                mesh.name,
                mesh.rank
            );
            return Err(mesh.fail(e));
        }
    }
    Ok(())
}

fn address(run: &str, rank: u32) -> String {
    format!("libreshard/{}/{run}/{rank}", sys::user())
}

/// Why our own name cannot be had.
fn taken(run: &str, rank: u32, e: std::io::Error) -> Error {
    if e.kind() != ErrorKind::AddrInUse {
        return err!(RS_ERR_COMM, "rank {rank} of '{run}': cannot listen: {e}");
    }
    let holder = sys::connect(&address(run, rank)).and_then(Socket::new).map(|s| s.peer);
    let holder = holder.map_or_else(|_| "another process".to_string(), |p| format!("process {} of user {}", p.pid, p.uid));
    err!(
        RS_ERR_INVALID,
        "rank {rank} of '{run}' is taken by {holder}: another run has this name, or two processes this rank; end the other or use \
         another name"
    )
}

impl Door<'_> {
    fn gather(&mut self, deadline: Deadline) -> Result<()> {
        loop {
            for rank in self.uncalled() {
                self.call(rank)?;
            }
            while let Some(fd) = sys::accept(self.listener.as_fd()).map_err(|e| self.error("accept a connection", &e))? {
                self.greet(fd, None)?;
            }
            self.hear()?;
            let missing: Vec<u32> =
                (0..self.mine.world).filter(|&r| r != self.mine.rank && self.links[r as usize].is_none()).collect();
            if missing.is_empty() {
                return Ok(());
            }
            deadline.check(|| self.missing(&missing))?;
            let mut fds = vec![sys::watch(Some(self.listener.as_fd()), libc::POLLIN)];
            fds.extend(self.waiting.iter().map(|g| sys::watch(Some(g.socket.as_fd()), libc::POLLIN)));
            // A rank that has greeted may die while others are still to come.
            fds.extend(self.links.iter().flatten().map(|l| sys::watch(Some(l.socket.as_fd()), libc::POLLRDHUP)));
            let sleep = if self.uncalled().is_empty() { deadline.left() } else { RETRY.min(deadline.left()) };
            sys::poll(&mut fds, sleep).map_err(|e| self.error("poll", &e))?;
            let closed = fds[1 + self.waiting.len()..].iter().position(|f| f.revents != 0);
            if let Some(link) = closed.and_then(|at| self.links.iter().flatten().nth(at)) {
                if let Some(why) = last_words(&link.socket, &mut self.scratch) {
                    return Err(why);
                }
                let rank = self.links.iter().position(|l| l.as_ref().is_some_and(|l| std::ptr::eq(l, link))).unwrap_or(0);
                bail!(
                    RS_ERR_PEER,
                    "{} left '{}' while others were still joining",
                    named(rank as u32, link.socket.peer.pid),
                    self.run
                );
            }
        }
    }

    /// Tells those that are there why this rank does not join.
    fn give_up(&self, e: Error) -> Error {
        let bytes = failed(e.status(), &format!("rank {} gave up: {e}", self.mine.rank));
        // Who has not greeted us yet may have read our greeting.
        let sockets = self.links.iter().flatten().map(|l| &l.socket).chain(self.waiting.iter().map(|g| &g.socket));
        sockets.for_each(|socket| socket.last(Kind::Failed, &bytes));
        e
    }

    /// The ranks below us that we have no connection to.
    fn uncalled(&self) -> Vec<u32> {
        let called = |rank: u32| self.waiting.iter().any(|g| g.called == Some(rank));
        (0..self.mine.rank).filter(|&r| self.links[r as usize].is_none() && !called(r)).collect()
    }

    fn error(&self, what: &str, e: &std::io::Error) -> Error {
        err!(RS_ERR_COMM, "rank {} of '{}': cannot {what}: {e}", self.mine.rank, self.run)
    }

    /// What a rank waits for when its time is up.
    fn missing(&self, ranks: &[u32]) -> String {
        let silent = |rank: u32| self.waiting.iter().find(|g| g.called == Some(rank)).map(|g| g.socket.peer.pid);
        let list: Vec<String> = ranks
            .iter()
            .map(|&r| match silent(r) {
                Some(pid) => format!("{} (silent: is it stopped, or in a run that is complete?)", named(r, pid)),
                None => format!("rank {r}"),
            })
            .collect();
        format!("{} to join '{}' (of {} ranks, in one network namespace)", list.join(", "), self.run, self.mine.world)
    }

    /// Connects to a rank below us, if it listens already.
    fn call(&mut self, rank: u32) -> Result<()> {
        match sys::connect(&address(self.run, rank)) {
            Ok(fd) => self.greet(fd, Some(rank)),
            Err(e) if matches!(e.kind(), ErrorKind::ConnectionRefused | ErrorKind::WouldBlock) => Ok(()),
            Err(e) => Err(self.error(&format!("connect to rank {rank}"), &e)),
        }
    }

    /// Says who we are to whom we called or who called us.
    fn greet(&mut self, fd: OwnedFd, called: Option<u32>) -> Result<()> {
        let socket = Socket::new(fd).map_err(|e| self.error("ask who is at the other end of a connection", &e))?;
        if let Err(e) = self.ours(socket.peer) {
            // A name can be held by anybody; calls can be made by anybody, and are no reason to give up.
            match called {
                Some(rank) => return Err(e.context(format_args!("rank {rank} of '{}'", self.run))),
                None => {
                    log::warn!("rank {} of '{}': a caller was refused: {e}", self.mine.rank, self.run);
                    return Ok(());
                }
            }
        }
        let (bytes, memory) = (self.mine.encode(), [self.bell.as_fd()]);
        let letter = Letter { kind: Kind::Hello, bytes: &bytes, memory: &memory, files: &[] };
        // Fits into any new socket. Whoever is gone already is noticed when we listen.
        let _ = socket.push(&letter, &mut Progress::default());
        self.waiting.push(Greeting { socket, inbox: Inbox::default(), called });
        Ok(())
    }

    fn ours(&self, peer: Peer) -> Result<()> {
        if peer.uid != sys::user() {
            bail!(
                RS_ERR_COMM,
                "process {} belongs to user {}, this one to user {}: ranks of other users are refused",
                peer.pid,
                peer.uid,
                sys::user()
            );
        }
        Ok(())
    }

    /// Reads the greetings that have come.
    fn hear(&mut self) -> Result<()> {
        for mut greeting in std::mem::take(&mut self.waiting) {
            // One packet, and no more: what follows it is the mesh's.
            let taken = greeting.inbox.take(&greeting.socket, &mut self.scratch);
            match (greeting.inbox.frames.pop_front(), greeting.called) {
                (Some(frame), _) => self.enter(greeting.socket, frame)?,
                (None, Some(rank)) if greeting.inbox.closed => {
                    log::debug!("rank {} of '{}': rank {rank} closed the connection, trying again", self.mine.rank, self.run);
                }
                (None, None) if greeting.inbox.closed => {}
                (None, _) => {
                    let (me, pid) = (self.mine.rank, greeting.socket.peer.pid);
                    taken.map_err(|e| e.context(format_args!("rank {me} of '{}', hearing process {pid}", self.run)))?;
                    self.waiting.push(greeting);
                }
            }
        }
        Ok(())
    }

    /// A rank that has greeted.
    fn enter(&mut self, socket: Socket, frame: Frame) -> Result<()> {
        let hello = Some(&frame).filter(|f| f.kind == Kind::Hello).and_then(|f| Hello::decode(&f.bytes));
        let bell = frame.memory.into_iter().next().filter(|m| m.len() == sys::page());
        let (Some(hello), Some(bell)) = (hello, bell) else {
            bail!(RS_ERR_COMM, "process {} called as a rank of '{}' but does not speak its language", socket.peer.pid, self.run);
        };
        let who = named(hello.rank, socket.peer.pid);
        self.mine.matches(&hello, self.run, &who)?;
        let at = hello.rank as usize;
        if hello.rank == self.mine.rank || self.links.get(at).is_none_or(Option::is_some) {
            bail!(RS_ERR_MISMATCH, "{who} of '{}' is there twice, or is none of {} ranks", self.run, self.mine.world);
        }
        let other = socket.peer.pid > 0 && socket.peer.pid as u32 != std::process::id();
        let process = other.then(|| sys::process(socket.peer.pid)).flatten();
        self.tokens[at] = hello.token;
        self.links[at] = Some(Link { socket, process, bell });
        Ok(())
    }
}

/// Why a rank has closed its connection, if it said so.
fn last_words(socket: &Socket, scratch: &mut [u8]) -> Option<Error> {
    let mut inbox = Inbox::default();
    while inbox.take(socket, scratch).is_ok_and(|more| more) {}
    inbox.frames.pop_back().filter(|f| f.kind == Kind::Failed).map(|f| failure(&f.bytes))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn greetings_survive_the_way() {
        let hello = Hello { version: 1, rank: 2, world: 3, flags: 4, token: 5 };
        assert_eq!(Hello::decode(&hello.encode()), Some(hello));
        assert_eq!(Hello::decode(&hello.encode()[1..]), None);
        assert_eq!(Hello::decode(&[7; 32]), None);
    }

    /// Two ranks that each met another one than the other did.
    #[test]
    fn ranks_of_two_runs_are_told_apart() {
        let name = format!("unit-{}", std::process::id());
        let page = || sys::shared(c"libreshard bell", sys::page()).unwrap();
        let mesh = |rank: u32, fd: OwnedFd| {
            let map = |memory: OwnedFd| Mapping::new(memory.as_fd(), true).unwrap();
            let mut links = vec![None, None];
            links[1 - rank as usize] = Some(Link { socket: Socket::new(fd).unwrap(), process: None, bell: map(page()) });
            Mesh::new(&name, rank, links, map(page()), sys::socket().unwrap())
        };
        for (tokens, same) in [([[7, 8], [7, 8]], true), ([[7, 8], [7, 9]], false)] {
            let listener = sys::listen(&name).unwrap();
            let far = sys::connect(&name).unwrap();
            let both = [mesh(0, sys::accept(listener.as_fd()).unwrap().unwrap()), mesh(1, far)];
            std::thread::scope(|scope| {
                let threads: Vec<_> = both
                    .iter()
                    .zip(&tokens)
                    .map(|(m, t)| scope.spawn(|| agree(m, t, Deadline::after(Duration::from_secs(60)))))
                    .collect();
                for result in threads.into_iter().map(|t| t.join().unwrap()) {
                    assert_eq!(result.as_ref().err().map(Error::status), (!same).then_some(RS_ERR_MISMATCH));
                    assert!(result.err().is_none_or(|e| e.text().contains("two runs have this name")));
                }
            });
        }
    }

    #[test]
    fn a_greeting_of_another_kind_of_run_is_refused() {
        let mine = Hello { version: 1, rank: 2, world: 3, flags: 0, token: 5 };
        assert!(mine.matches(&Hello { token: 6, rank: 1, ..mine }, "run", "rank 1").is_ok());
        for other in [Hello { version: 2, ..mine }, Hello { world: 4, ..mine }, Hello { flags: 1, ..mine }] {
            let e = mine.matches(&other, "run", "rank 1 (process 9)").unwrap_err();
            assert_eq!(e.status(), RS_ERR_MISMATCH);
            assert!(e.text().contains("rank 1 (process 9)"), "{e}");
        }
    }
}
