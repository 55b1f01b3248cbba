//! Pieces of a pair into messages of a bounded size. Round k holds message k of every pair.
#![forbid(unsafe_code)]

use super::Piece;
use smallvec::SmallVec;

/// Bytes that may stay unused at the end of a message rather than be filled by a crumb.
pub(crate) const CRUMB: u64 = 256;

/// Least bytes of a message: with less, staging is too small for so many peers.
pub const LEAST_MESSAGE: u64 = 4096;

/// Bytes of a message where the rank with the most peers has so many and `staging` bytes: one to pack and one on its way, to each and
/// from each. May be below [`LEAST_MESSAGE`].
pub fn message_size(staging: u64, peers: u64) -> u64 {
    staging / (4 * peers.max(1)) / CRUMB * CRUMB
}

/// Pieces that travel together, one after the other.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Message {
    /// Sum of its pieces.
    pub bytes: u64,
    /// In order, each in its wire order.
    pub pieces: Vec<Piece>,
}

/// Packs pieces, in their order, into messages of `size` bytes: every one but the last is full, less at most one row or `CRUMB`.
pub fn messages(pieces: impl IntoIterator<Item = Piece>, size: u64) -> Vec<Message> {
    let mut out: Vec<Message> = vec![];
    let mut open = Message::default();
    // Pieces still to be packed, the next one last: a cut piece leaves several.
    let mut todo: Vec<Piece> = vec![];
    let mut pieces = pieces.into_iter();
    while let Some(piece) = todo.pop().or_else(|| pieces.next()) {
        let bytes = piece.bytes();
        if open.bytes + bytes <= size {
            open.bytes += bytes;
            open.pieces.push(piece);
            continue;
        }
        let (taken, rest) = cut(piece, size - open.bytes, open.bytes == 0);
        open.bytes += taken.iter().map(Piece::bytes).sum::<u64>();
        open.pieces.extend(taken);
        todo.extend(rest.into_iter().rev());
        out.push(std::mem::take(&mut open));
    }
    if open.bytes > 0 {
        out.push(open);
    }
    out
}

/// Packs pieces, in their order, into messages of `size` bytes without cutting any: one that is longer has a message of its own.
pub fn whole_messages(pieces: impl IntoIterator<Item = Piece>, size: u64) -> Vec<Message> {
    let mut out: Vec<Message> = vec![];
    for piece in pieces {
        let bytes = piece.bytes();
        match out.last_mut() {
            Some(open) if open.bytes + bytes <= size => {
                open.bytes += bytes;
                open.pieces.push(piece);
            }
            _ => out.push(Message { bytes, pieces: vec![piece] }),
        }
    }
    out
}

/// Cuts a piece that is larger than `room` on its slowest axis, the step that does not fit on the next, and so on. `must`: take at
/// least one element.
fn cut(piece: Piece, room: u64, must: bool) -> (SmallVec<[Piece; 2]>, SmallVec<[Piece; 2]>) {
    let (mut taken, mut rest) = (SmallVec::new(), SmallVec::new());
    let item = u64::from(piece.item);
    let Some(slow) = piece.axes.first().copied() else {
        rest.push(piece);
        return (taken, rest);
    };
    let step = piece.bytes() / slow.extent;
    let mut fit = room / step;
    if piece.axes.len() == 1 {
        if fit * item > CRUMB {
            fit -= fit % (CRUMB / item);
        } else if !must {
            fit = 0;
        }
    }
    if fit > 0 {
        taken.push(steps(&piece, 0, fit));
    }
    let left = room - fit * step;
    let mut next = fit;
    if piece.axes.len() > 1 {
        // One step more, cut in turn.
        let (t, r) = cut(steps(&piece, fit, 1), left, must && fit == 0);
        taken.extend(t);
        rest.extend(r);
        next += 1;
    }
    if next < slow.extent {
        rest.push(steps(&piece, next, slow.extent - next));
    }
    (taken, rest)
}

/// `count` steps of a piece's slowest axis.
fn steps(piece: &Piece, from: u64, count: u64) -> Piece {
    let mut out = piece.clone();
    let slow = out.axes[0];
    out.key += from * slow.key;
    out.src.offset += from * slow.src;
    out.dst.offset += from * slow.dst;
    if count == 1 {
        out.axes.remove(0);
    } else {
        out.axes[0].extent = count;
    }
    out
}

#[cfg(test)]
mod tests {
    use super::super::{PieceAxis, Spot};
    use super::*;

    /// Logical, source and target numbers of every element, in wire order.
    fn elements(p: &Piece) -> Vec<(u64, u64, u64)> {
        let mut out = vec![(p.key, p.src.offset, p.dst.offset)];
        for a in &p.axes {
            out = out
                .iter()
                .flat_map(|&(k, s, d)| (0..a.extent).map(move |i| (k + i * a.key, s + i * a.src, d + i * a.dst)))
                .collect();
        }
        out
    }

    #[test]
    fn messages_hold_every_element_once_and_are_full() {
        let mut rng = fastrand::Rng::with_seed(11);
        let mut cuts = 0;
        for _ in 0..300 {
            let pieces: Vec<Piece> = (0..rng.u32(1..20))
                .map(|tensor| {
                    let axes = (0..rng.usize(0..4))
                        .map(|_| PieceAxis {
                            extent: rng.u64(2..30),
                            key: rng.u64(1..99),
                            src: rng.u64(1..99),
                            dst: rng.u64(1..99),
                        })
                        .collect();
                    let spot = Spot { buffer: 0, offset: rng.u64(0..9) };
                    Piece {
                        tensor,
                        item: 1 << rng.u32(0..4),
                        convert: None,
                        stream: None,
                        key: rng.u64(0..9),
                        src: spot,
                        dst: spot,
                        axes,
                    }
                })
                .collect();
            let size = rng.u64(4096..20_000);
            let out = messages(pieces.clone(), size);
            let want: Vec<_> = pieces.iter().flat_map(|p| elements(p).into_iter().map(|e| (p.tensor, e))).collect();
            let mut got = vec![];
            for (i, m) in out.iter().enumerate() {
                assert_eq!(m.bytes, m.pieces.iter().map(Piece::bytes).sum::<u64>());
                assert!(m.bytes <= size);
                let row = 29 * 16;
                assert!(i + 1 == out.len() || m.bytes + row.max(CRUMB) >= size, "message {i} has {} of {size}", m.bytes);
                got.extend(m.pieces.iter().flat_map(|p| elements(p).into_iter().map(|e| (p.tensor, e))));
            }
            cuts += usize::from(out.len() > 1);
            assert_eq!(got, want, "same elements in the same order");
        }
        assert!(cuts > 100);
    }
}
