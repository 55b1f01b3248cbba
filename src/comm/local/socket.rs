//! Frames of any length, shared memory and other descriptors over a packet socket to one peer.
//!
//! A frame is cut into packets, each with a head that says where it belongs; a packet travels whole, so any thread may send a last
//! word between the packets of another thread's frame. Knows bytes, mappings and descriptors. Must not know what a frame means.

use super::sys::{self, Mapping, Peer, Received};
use crate::abi::{RS_ERR_COMM, rs_status_t};
use crate::error::{Error, Result, err, is_error};
use std::cmp::Ordering;
use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::Duration;

/// What a frame is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum Kind {
    /// The first one: who we are. Carries our bell.
    Hello = 1,
    /// A part of a gather.
    Gather,
    /// Blocks that the peer may read. Carries their segments, and what opens those of a device.
    Offer,
    /// How we reach the blocks that the peer offered.
    Grant,
    /// A ring that we made. Carries it.
    Ring,
    /// Words for streams. Carries them.
    Words,
    /// The last one: our communicator has failed, and why.
    Failed,
    /// The last one: we need the peer no more.
    Left,
}

impl Kind {
    fn known(number: u32) -> Option<Kind> {
        use Kind::*;
        [Hello, Gather, Offer, Grant, Ring, Words, Failed, Left].into_iter().find(|&k| k as u32 == number)
    }

    /// For errors.
    pub fn text(self) -> &'static str {
        match self {
            Kind::Hello => "a greeting",
            Kind::Gather => "a gather",
            Kind::Offer => "an exchange of windows",
            Kind::Grant => "the end of an exchange of windows",
            Kind::Ring => "an opening of pipes",
            Kind::Words => "a sharing of words",
            Kind::Failed | Kind::Left => "an end",
        }
    }
}

/// Longest frame: far more than anybody has to say.
const LONGEST: u64 = 1 << 30;
/// Longest body of a packet.
const BODY: usize = 64 << 10;
/// Kind, number of mappings and number of descriptors of the frame (4 bytes each), its length and the packet's place in it (8 bytes each).
const HEAD: usize = 28;
/// Longest packet.
pub const PACKET: usize = HEAD + BODY;
/// Room for packets in a socket, more than it has by default: a last word always finds some.
const LAST_ROOM: i32 = 4 * PACKET as i32;

/// A frame on its way out.
#[derive(Clone, Copy, Debug)]
pub struct Letter<'a> {
    /// Its kind.
    pub kind: Kind,
    /// What it says.
    pub bytes: &'a [u8],
    /// Shared memory that it carries.
    pub memory: &'a [BorrowedFd<'a>],
    /// Descriptors of something else that it carries; an offer alone has them.
    pub files: &'a [BorrowedFd<'a>],
}

/// How far a letter is.
#[derive(Clone, Copy, Debug, Default)]
pub struct Progress {
    bytes: usize,
    fds: usize,
    /// All of it is with the kernel, which delivers it whatever becomes of us.
    pub done: bool,
}

/// A frame that has come in whole.
#[derive(Debug)]
pub struct Frame {
    /// Its kind.
    pub kind: Kind,
    /// What it says.
    pub bytes: Vec<u8>,
    /// The shared memory that it carried, mapped: readable, and writable where both sides write it (bells, rings, words).
    pub memory: Vec<Mapping>,
    /// The other descriptors, of whatever the peer chose.
    pub files: Vec<OwnedFd>,
    /// Mappings, descriptors and bytes of the whole frame.
    whole: (u32, u32, u64),
}

/// A connection to one peer.
#[derive(Debug)]
pub struct Socket {
    fd: OwnedFd,
    /// Who is there.
    pub peer: Peer,
}

impl AsFd for Socket {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

impl Socket {
    /// A connection that has just been made.
    pub fn new(fd: OwnedFd) -> io::Result<Socket> {
        Ok(Socket { peer: sys::peer(fd.as_fd())?, fd })
    }

    /// Sends as much of a letter as goes without waiting.
    pub fn push(&self, letter: &Letter<'_>, progress: &mut Progress) -> io::Result<()> {
        while !progress.done {
            let body = &letter.bytes[progress.bytes..];
            let body = &body[..body.len().min(BODY)];
            let fds = letter.memory.iter().chain(letter.files).skip(progress.fds).take(sys::MAX_FDS);
            let fds: Vec<BorrowedFd<'_>> = fds.copied().collect();
            let mut head = [0; HEAD];
            head[..4].copy_from_slice(&(letter.kind as u32).to_ne_bytes());
            head[4..8].copy_from_slice(&(letter.memory.len() as u32).to_ne_bytes());
            head[8..12].copy_from_slice(&(letter.files.len() as u32).to_ne_bytes());
            head[12..20].copy_from_slice(&(letter.bytes.len() as u64).to_ne_bytes());
            head[20..].copy_from_slice(&(progress.bytes as u64).to_ne_bytes());
            match sys::send(self.as_fd(), &head, body, &fds) {
                Ok(true) => {}
                Ok(false) => break,
                // Too many descriptors of this user are on their way: the peers will take some.
                Err(e) if e.raw_os_error() == Some(libc::ETOOMANYREFS) => {
                    std::thread::sleep(Duration::from_millis(1));
                    break;
                }
                Err(e) => return Err(e),
            }
            progress.bytes += body.len();
            progress.fds += fds.len();
            progress.done = progress.bytes == letter.bytes.len() && progress.fds == letter.memory.len() + letter.files.len();
        }
        Ok(())
    }

    /// Sends one last short frame and closes the connection for both. Needs no lock and does not wait.
    pub fn last(&self, kind: Kind, bytes: &[u8]) {
        sys::widen(self.as_fd(), LAST_ROOM);
        let letter = Letter { kind, bytes: &bytes[..bytes.len().min(BODY)], memory: &[], files: &[] };
        // The peer sees the connection close in any case.
        let _ = self.push(&letter, &mut Progress::default());
        sys::shutdown(self.as_fd());
    }
}

/// What has come from one peer and waits to be asked for.
#[derive(Debug, Default)]
pub struct Inbox {
    partial: Option<Frame>,
    /// Whole frames, oldest first.
    pub frames: VecDeque<Frame>,
    /// Nothing more will come.
    pub closed: bool,
}

impl Inbox {
    /// Takes one packet from a socket; `false`: there is none now.
    pub fn take(&mut self, socket: &Socket, scratch: &mut [u8]) -> Result<bool> {
        match sys::receive(socket.as_fd(), scratch) {
            Ok(Received::Packet(len, fds)) => {
                self.packet(&scratch[..len], fds)?;
                Ok(true)
            }
            Ok(Received::Nothing) => Ok(false),
            Ok(Received::End) => {
                self.closed = true;
                Ok(false)
            }
            Err(e) => Err(err!(RS_ERR_COMM, "cannot receive: {e}")),
        }
    }

    fn packet(&mut self, packet: &[u8], fds: Vec<OwnedFd>) -> Result<()> {
        let nonsense = || err!(RS_ERR_COMM, "it sent a packet that makes no sense: is it another version of this library?");
        let (head, body) = packet.split_at_checked(HEAD).ok_or_else(nonsense)?;
        let half = |at: usize| head[at..at + 4].try_into().map_or(0, u32::from_ne_bytes);
        let word = |at: usize| head[at..at + 8].try_into().map_or(0, u64::from_ne_bytes);
        let kind = Kind::known(half(0)).ok_or_else(nonsense)?;
        let whole = (half(4), half(8), word(12));
        if whole.1 > 0 && kind != Kind::Offer || whole.2 > LONGEST {
            return Err(nonsense());
        }
        // A last word comes between the packets of a frame that will never be whole.
        let mut frame = match self.partial.take() {
            Some(f) if !matches!(kind, Kind::Failed | Kind::Left) => f,
            _ => Frame { kind, bytes: vec![], memory: vec![], files: vec![], whole },
        };
        if (frame.kind, frame.whole, frame.bytes.len() as u64) != (kind, whole, word(20)) {
            return Err(nonsense());
        }
        frame.bytes.extend_from_slice(body);
        for fd in fds {
            // Mappings come first, and are made at once: each holds a descriptor no longer than that.
            if frame.memory.len() == whole.0 as usize {
                frame.files.push(fd);
                continue;
            }
            let mapping = Mapping::new(fd.as_fd(), matches!(kind, Kind::Hello | Kind::Ring | Kind::Words));
            frame.memory.push(mapping.map_err(|e| err!(RS_ERR_COMM, "cannot map the memory that it shares: {e}"))?);
        }
        let fds = (frame.memory.len() + frame.files.len()) as u64;
        match (fds.cmp(&(u64::from(whole.0) + u64::from(whole.1))), (frame.bytes.len() as u64).cmp(&whole.2)) {
            (Ordering::Equal, Ordering::Equal) => self.frames.push_back(frame),
            (Ordering::Greater, _) | (_, Ordering::Greater) => return Err(nonsense()),
            _ => self.partial = Some(frame),
        }
        Ok(())
    }
}

/// What a [`Kind::Failed`] frame says.
pub fn failure(bytes: &[u8]) -> Error {
    let (status, text) = bytes.split_at(bytes.len().min(4));
    let status = status.try_into().map_or(RS_ERR_COMM, i32::from_ne_bytes);
    Error::new(if is_error(status) { status } else { RS_ERR_COMM }, String::from_utf8_lossy(text))
}

/// The bytes of a [`Kind::Failed`] frame.
pub fn failed(status: rs_status_t, text: &str) -> Vec<u8> {
    [&status.to_ne_bytes(), text.as_bytes()].concat()
}
