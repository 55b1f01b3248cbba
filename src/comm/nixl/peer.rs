//! What two ranks have told each other, and what each still waits for.
//!
//! Notes of one sender may overtake each other: NIXL's plugins send short ones another way than long ones. So all of them are numbered.
#![forbid(unsafe_code)]

use super::agent::Request;
use super::blocks::Block;
use super::frame::LONGEST_WORD;
use std::collections::{BTreeMap, BTreeSet, VecDeque};

/// As many messages as a group can have: no peer is ahead by more.
const MOST: usize = 4096;

/// What one agent tells another.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Note {
    /// A piece of the metadata of what the sender has registered by now.
    Metadata {
        /// How often it has told us before.
        number: u32,
        /// Which piece this is.
        place: u32,
        /// Of how many.
        of: u32,
        /// A part of the metadata.
        piece: Vec<u8>,
    },
    /// Message number so many of the pair lies there.
    Ready(u64, Vec<Block>),
    /// Message number so many was read.
    Read(u64),
}

impl Note {
    /// For another rank.
    pub fn encode(&self) -> Vec<u8> {
        match self {
            Note::Metadata { number, place, of, piece } => {
                let words = [*number, *place, *of].map(u32::to_le_bytes).concat();
                [b"M".as_slice(), &words, piece].concat()
            }
            Note::Ready(number, blocks) => {
                let blocks: Vec<u8> = blocks.iter().flat_map(Block::encode).collect();
                [b"S".as_slice(), &number.to_le_bytes(), &blocks].concat()
            }
            Note::Read(number) => [b"R".as_slice(), &number.to_le_bytes()].concat(),
        }
    }

    /// `None`: it is no note.
    pub fn decode(bytes: &[u8]) -> Option<Note> {
        let (kind, rest) = bytes.split_first()?;
        let word = || rest.first_chunk().map(|bytes| u64::from_le_bytes(*bytes));
        let half = |at: usize| rest.get(at..)?.first_chunk().map(|bytes| u32::from_le_bytes(*bytes));
        match (kind, rest.len()) {
            (b'M', 12..) => Some(Note::Metadata { number: half(0)?, place: half(4)?, of: half(8)?, piece: rest[12..].to_vec() }),
            (b'S', 8..) => Some(Note::Ready(word()?, Block::decode(&rest[8..])?)),
            (b'R', 8) => Some(Note::Read(word()?)),
            _ => None,
        }
    }
}

/// What passes between this rank and another.
#[derive(Default)]
pub struct Peer {
    /// Of its agent, until it has been loaded.
    pub metadata: Option<Vec<u8>>,
    /// How often it was told what is registered here.
    pub told: u32,
    /// How often it has told what is registered there.
    heard: u32,
    /// Pieces of what it tells next, and later: by number and place; of how many.
    pieces: BTreeMap<(u32, u32), (u32, Vec<u8>)>,
    /// Messages that it was told of, and those of them that it has not read.
    sent: u64,
    unread: BTreeSet<u64>,
    /// Messages that were asked for, and where those go that have not been begun.
    asked: u64,
    waiting: VecDeque<(u64, Vec<Block>)>,
    /// Where its messages lie that have not been begun.
    ready: BTreeMap<u64, Vec<Block>>,
    /// Reads that are under way.
    pub reading: Vec<Request>,
}

impl Peer {
    /// One whose agent has this metadata.
    pub fn new(metadata: Vec<u8>) -> Peer {
        Peer { metadata: Some(metadata), ..Peer::default() }
    }

    /// Whether all messages so far have been read, at both ends.
    pub fn idle(&self) -> bool {
        self.unread.is_empty() && self.waiting.is_empty() && self.reading.is_empty()
    }

    /// Whether it is to send a message, and has not.
    pub fn silent(&self) -> bool {
        self.waiting.front().is_some_and(|(number, _)| !self.ready.contains_key(number))
    }

    /// The number of a message that it is told of now.
    pub fn send(&mut self) -> u64 {
        self.unread.insert(self.sent);
        self.sent += 1;
        self.sent - 1
    }

    /// Its next message goes there.
    pub fn ask(&mut self, blocks: Vec<Block>) {
        self.waiting.push_back((self.asked, blocks));
        self.asked += 1;
    }

    /// A message that can be read now: its number, where it lies, where it goes.
    pub fn next(&mut self) -> Option<(u64, Vec<Block>, Vec<Block>)> {
        let from = self.ready.remove(&self.waiting.front()?.0)?;
        self.waiting.pop_front().map(|(number, into)| (number, from, into))
    }

    /// Its metadata, once all of what comes next is there.
    pub fn registered(&mut self) -> Option<Vec<u8>> {
        let pieces: Vec<&(u32, Vec<u8>)> = self.pieces.range((self.heard, 0)..=(self.heard, u32::MAX)).map(|p| p.1).collect();
        if pieces.len() as u64 != u64::from(pieces.first()?.0) {
            return None;
        }
        let metadata = pieces.into_iter().flat_map(|p| &p.1).copied().collect();
        self.heard += 1;
        self.pieces = self.pieces.split_off(&(self.heard, 0));
        Some(metadata)
    }

    /// `None`: the note makes no sense.
    pub fn take(&mut self, note: Note) -> Option<()> {
        match note {
            Note::Metadata { number, place, of, piece } => {
                let held: usize = self.pieces.values().map(|p| p.1.len()).sum();
                let alike = self.pieces.range((number, 0)..=(number, u32::MAX)).all(|p| p.1.0 == of);
                let fits = (held + piece.len()) as u64 <= LONGEST_WORD && self.pieces.len() < MOST;
                if number < self.heard || place >= of || !alike || !fits {
                    return None;
                }
                self.pieces.insert((number, place), (of, piece)).is_none().then_some(())
            }
            Note::Ready(number, blocks) => {
                // Those begun before are neither waited for nor ready.
                let begun = self.asked - self.waiting.len() as u64;
                let fits = number >= begun && self.ready.len() < MOST;
                (fits && self.ready.insert(number, blocks).is_none()).then_some(())
            }
            Note::Read(number) => self.unread.remove(&number).then_some(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::abi::RS_DEVICE_CPU;

    fn block(addr: u64) -> Vec<Block> {
        vec![Block { addr, len: 8, kind: (RS_DEVICE_CPU, 0) }]
    }

    #[test]
    fn notes_are_what_was_sent() {
        let piece = Note::Metadata { number: 3, place: 0, of: 2, piece: vec![1, 2, 3] };
        let empty = Note::Metadata { number: 0, place: 0, of: 1, piece: vec![] };
        for note in [piece, empty, Note::Ready(7, [block(1), block(9)].concat()), Note::Read(u64::MAX)] {
            assert_eq!(Note::decode(&note.encode()), Some(note));
        }
        for bytes in [&b""[..], b"M", b"M12345678901", b"S", b"S12345678", b"R1234567", b"R123456789", b"X12345678"] {
            assert_eq!(Note::decode(bytes), None, "{bytes:?}");
        }
    }

    #[test]
    fn notes_may_overtake_each_other() {
        let mut peer = Peer::default();
        assert_eq!([peer.send(), peer.send(), peer.send()], [0, 1, 2]);
        peer.ask(block(10));
        peer.ask(block(11));
        assert!(!peer.idle() && peer.silent() && peer.next().is_none());
        peer.take(Note::Ready(1, block(21))).unwrap();
        assert!(peer.silent() && peer.next().is_none());
        // Of the group after this one.
        peer.take(Note::Ready(2, block(22))).unwrap();
        peer.take(Note::Ready(0, block(20))).unwrap();
        assert!(!peer.silent());
        assert_eq!(peer.next(), Some((0, block(20), block(10))));
        assert_eq!(peer.next(), Some((1, block(21), block(11))));
        assert_eq!(peer.next(), None);
        for number in [2, 0, 1] {
            assert!(!peer.idle());
            peer.take(Note::Read(number)).unwrap();
        }
        assert!(peer.idle());
        peer.ask(block(12));
        assert_eq!(peer.next(), Some((2, block(22), block(12))));
    }

    #[test]
    fn metadata_comes_in_any_order() {
        let mut peer = Peer::default();
        let piece = |number, place, of, byte| Note::Metadata { number, place, of, piece: vec![byte; 2] };
        for note in [piece(1, 0, 1, 9), piece(0, 2, 3, 2), piece(0, 0, 3, 0)] {
            peer.take(note).unwrap();
            assert_eq!(peer.registered(), None);
        }
        peer.take(piece(0, 1, 3, 1)).unwrap();
        assert_eq!(peer.registered(), Some(vec![0, 0, 1, 1, 2, 2]));
        assert_eq!(peer.registered(), Some(vec![9, 9]));
        assert_eq!(peer.registered(), None);
    }

    #[test]
    fn notes_that_make_no_sense_are_not_taken() {
        let mut peer = Peer::default();
        let piece = |number, place, of| Note::Metadata { number, place, of, piece: vec![1] };
        assert_eq!(peer.take(Note::Read(0)), None);
        peer.send();
        peer.take(Note::Read(0)).unwrap();
        assert_eq!(peer.take(Note::Read(0)), None, "twice");
        peer.ask(block(1));
        peer.take(Note::Ready(0, block(2))).unwrap();
        assert_eq!(peer.take(Note::Ready(0, block(2))), None, "twice");
        peer.next().unwrap();
        assert_eq!(peer.take(Note::Ready(0, block(2))), None, "it was begun");
        peer.take(piece(0, 0, 2)).unwrap();
        for (number, place, of) in [(0, 0, 2), (0, 2, 2), (0, 1, 3), (1, 0, 0)] {
            assert_eq!(peer.take(piece(number, place, of)), None, "{number} {place} {of}");
        }
        peer.take(piece(0, 1, 2)).unwrap();
        peer.registered().unwrap();
        assert_eq!(peer.take(piece(0, 0, 1)), None, "it was told");
        let long = Note::Metadata { number: 1, place: 0, of: 2, piece: vec![0; LONGEST_WORD as usize] };
        peer.take(long).unwrap();
        assert_eq!(peer.take(piece(1, 1, 2)), None, "too much");
        for number in 1..=MOST as u64 {
            peer.take(Note::Ready(number, block(1))).unwrap();
        }
        assert_eq!(peer.take(Note::Ready(0xFFFF, block(1))), None, "too many");
    }
}
