//! Frames over one TCP connection: whole at both ends, taken and given without waiting.
//!
//! Knows kinds, lengths and bytes. Must not know ranks' places in the tree, or deadlines.
#![forbid(unsafe_code)]

use crate::abi::RS_ERR_COMM;
use crate::error::{Error, Result, err};
use std::collections::VecDeque;
use std::io::{self, ErrorKind, Read, Write};
use std::net::TcpStream;
use std::sync::Arc;

/// What a frame is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum Kind {
    /// The first one, from who connects: who it is.
    Hello = 1,
    /// The answer of rank 0: where the caller's parent listens.
    Welcome,
    /// Up: a rank's part of a gather.
    Word,
    /// Down: what all ranks said.
    All,
    /// Up: a rank's deadline has passed; its milliseconds.
    Late,
    /// The last one: the sender has failed, and why.
    Failed,
    /// The last one: the sender needs the others no more.
    Left,
}

impl Kind {
    fn known(number: u32) -> Option<Kind> {
        use Kind::*;
        [Hello, Welcome, Word, All, Late, Failed, Left].into_iter().find(|&k| k as u32 == number)
    }

    /// Longest body that a peer may announce, in a run of `world` ranks.
    fn longest(self, world: u32) -> u64 {
        match self {
            Kind::Hello | Kind::Welcome => 1 << 10,
            Kind::Word => LONGEST_WORD,
            Kind::All => LONGEST_WORD * u64::from(world),
            Kind::Failed => 16 << 10,
            Kind::Late => 8,
            Kind::Left => 0,
        }
    }
}

/// Longest part of one rank in a gather: far more than anybody gathers at once.
pub const LONGEST_WORD: u64 = 64 << 20;

/// Kind and rank (4 bytes each), number of the gather and length of the body (8 bytes each), in little-endian order on all hosts.
const HEAD: usize = 24;

/// Bytes taken from a connection at a time.
const CHUNK: usize = 64 << 10;

/// A frame.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Frame {
    /// Its kind.
    pub kind: Kind,
    /// The rank that it is of: a word passes through others.
    pub rank: u32,
    /// The gather that it belongs to.
    pub number: u64,
    /// What it says.
    pub body: Arc<[u8]>,
}

impl Frame {
    /// Outside of gathers.
    pub fn new(kind: Kind, rank: u32, body: &[u8]) -> Frame {
        Frame { kind, rank, number: 0, body: body.into() }
    }

    /// What a [`Kind::Late`] frame says.
    pub fn milliseconds(&self) -> u64 {
        self.body.first_chunk().map_or(0, |ms| u64::from_le_bytes(*ms))
    }

    /// Its bytes on the wire.
    pub fn encode(&self) -> Arc<[u8]> {
        let halves = [self.kind as u32, self.rank].map(u32::to_le_bytes).concat();
        let words = [self.number, self.body.len() as u64].map(u64::to_le_bytes).concat();
        [&halves, &words, &self.body[..]].concat().into()
    }
}

/// Frames that wait for room in a connection.
#[derive(Debug, Default)]
pub struct Outbox {
    queue: VecDeque<Arc<[u8]>>,
    /// Bytes of the first that are gone.
    sent: usize,
}

impl Outbox {
    /// Puts an encoded frame behind the others.
    pub fn push(&mut self, frame: Arc<[u8]>) {
        self.queue.push_back(frame);
    }

    /// Whether all has been given to the kernel.
    pub fn is_empty(&self) -> bool {
        self.queue.is_empty()
    }

    /// Drops what cannot be sent any more.
    pub fn clear(&mut self) {
        self.queue.clear();
        self.sent = 0;
    }

    /// Gives as much to the kernel as it takes without waiting.
    pub fn flush(&mut self, mut stream: &TcpStream) -> io::Result<()> {
        while let Some(frame) = self.queue.front() {
            // Not with `write_vectored`, which raises SIGPIPE where the peer is gone.
            match stream.write(&frame[self.sent..]) {
                Ok(0) => return Err(ErrorKind::WriteZero.into()),
                Ok(n) => self.sent += n,
                Err(e) if e.kind() == ErrorKind::WouldBlock => return Ok(()),
                Err(e) if e.kind() == ErrorKind::Interrupted => {}
                Err(e) => return Err(e),
            }
            if self.sent == frame.len() {
                self.queue.pop_front();
                self.sent = 0;
            }
        }
        Ok(())
    }
}

/// What has come over a connection.
#[derive(Debug, Default)]
pub struct Inbox {
    /// Of the frame that is not whole yet, its head included.
    partial: Vec<u8>,
    /// Whole frames, oldest first.
    pub frames: VecDeque<Frame>,
    /// Nothing more will come.
    pub closed: bool,
}

impl Inbox {
    /// Takes what is there without waiting, `most` whole frames at most: a peer that sends without end fills no memory.
    pub fn take(&mut self, mut stream: &TcpStream, world: u32, most: usize) -> Result<()> {
        let mut chunk = [0; CHUNK];
        while !self.closed && self.frames.len() < most {
            match stream.read(&mut chunk) {
                Ok(0) => self.closed = true,
                Ok(n) => self.feed(&chunk[..n], world)?,
                Err(e) if e.kind() == ErrorKind::WouldBlock => return Ok(()),
                Err(e) if e.kind() == ErrorKind::Interrupted => {}
                // The connection is gone, as if it had been closed.
                Err(_) => self.closed = true,
            }
        }
        Ok(())
    }

    /// The oldest frame, if it is of this gather or an earlier one.
    pub fn next(&mut self, number: u64) -> Option<Frame> {
        self.frames.front().is_some_and(|f| f.number <= number).then(|| self.frames.pop_front())?
    }

    /// The sender's last word, if it has spoken one, whatever it said before.
    pub fn last(&mut self) -> Option<Frame> {
        self.frames.back().is_some_and(|f| matches!(f.kind, Kind::Failed | Kind::Left)).then(|| self.frames.pop_back())?
    }

    /// Makes frames of the next bytes.
    pub fn feed(&mut self, mut bytes: &[u8], world: u32) -> Result<()> {
        while !bytes.is_empty() {
            let whole = self.whole(world)?.unwrap_or(HEAD as u64);
            let missing = (whole - self.partial.len() as u64).min(bytes.len() as u64) as usize;
            self.partial.extend_from_slice(&bytes[..missing]);
            bytes = &bytes[missing..];
            if self.whole(world)? == Some(self.partial.len() as u64) {
                let partial = std::mem::take(&mut self.partial);
                self.frames.push_back(frame(&partial).ok_or_else(nonsense)?);
            }
        }
        Ok(())
    }

    /// Length of the partial frame once it is known, its head included.
    fn whole(&self, world: u32) -> Result<Option<u64>> {
        let Some((head, _)) = self.partial.split_first_chunk::<HEAD>() else { return Ok(None) };
        let (kind, _, _, len) = parts(head);
        match Kind::known(kind) {
            Some(kind) if len <= kind.longest(world) => Ok(Some(HEAD as u64 + len)),
            _ => Err(nonsense()),
        }
    }
}

fn parts(head: &[u8; HEAD]) -> (u32, u32, u64, u64) {
    let half = |at: usize| head[at..at + 4].try_into().map_or(0, u32::from_le_bytes);
    let word = |at: usize| head[at..at + 8].try_into().map_or(0, u64::from_le_bytes);
    (half(0), half(4), word(8), word(16))
}

fn frame(bytes: &[u8]) -> Option<Frame> {
    let (head, body) = bytes.split_first_chunk::<HEAD>()?;
    let (kind, rank, number, _) = parts(head);
    Some(Frame { kind: Kind::known(kind)?, rank, number, body: body.into() })
}

/// A peer sent what none of ours sends.
pub fn nonsense() -> Error {
    err!(RS_ERR_COMM, "it sent bytes that make no sense: is it another program, or another version of this library?")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn frames_arrive_whole_however_they_are_cut() {
        let frames = [
            Frame { kind: Kind::Word, rank: 7, number: 3, body: (0..200).collect::<Vec<u8>>().into() },
            Frame { kind: Kind::Late, rank: 1, number: 3, body: 5u64.to_le_bytes().as_slice().into() },
            Frame { kind: Kind::Word, rank: 2, number: u64::MAX, body: [].into() },
            Frame::new(Kind::Left, 9, &[]),
        ];
        let all: Vec<u8> = frames.iter().flat_map(|f| f.encode().to_vec()).collect();
        for cut in 1..all.len() {
            let mut inbox = Inbox::default();
            for piece in all.chunks(cut) {
                inbox.feed(piece, 10).unwrap();
            }
            assert_eq!(inbox.frames, frames, "in pieces of {cut} bytes");
        }
    }

    #[test]
    fn what_makes_no_sense_is_refused_before_memory_is_taken() {
        let right = Frame::new(Kind::Failed, 0, b"why").encode().to_vec();
        for (at, value) in [(0, 0u8), (0, 8), (3, 1), (18, 1), (23, 255)] {
            let mut wrong = right.clone();
            wrong[at] = value;
            let mut inbox = Inbox::default();
            assert!(inbox.feed(&wrong, 4).is_err(), "byte {at} is {value}");
            assert!(inbox.frames.is_empty());
        }
        // A body as long as is allowed is waited for, without memory for it.
        let mut inbox = Inbox::default();
        let mut head = Frame::new(Kind::All, 0, &[]).encode().to_vec();
        head[16..24].copy_from_slice(&(4 * LONGEST_WORD).to_le_bytes());
        inbox.feed(&head, 4).unwrap();
        assert!(inbox.frames.is_empty() && inbox.partial.capacity() < 1 << 10);
        let mut inbox = Inbox::default();
        assert!(inbox.feed(&head, 3).is_err());
    }
}
