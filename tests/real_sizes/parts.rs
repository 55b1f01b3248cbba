//! A piece of a plan as rectangles of its tensor, and where these lie at both ends.

use super::holds::Rect;
use reshard::plan::{Piece, PieceAxis};

/// Elements from a buffer's first to a rectangle's, from row to row, from column to column.
#[derive(Clone, Copy)]
pub struct End {
    at: u64,
    row: u64,
    col: u64,
}

impl End {
    /// Of the element so many rows and columns from the rectangle's first.
    pub fn of(&self, row: u64, col: u64) -> u64 {
        self.at + row * self.row + col * self.col
    }
}

/// One rectangle, at its source and at its target.
#[derive(Clone, Copy)]
pub struct Part {
    pub rect: Rect,
    pub ends: [End; 2],
}

/// All rectangles of a piece of a tensor with rows of `width` elements, where columns of two kinds may take turns; `None`: it is no
/// list of rectangles.
pub fn parts(piece: &Piece, width: u64, interleaved: bool) -> Option<Vec<Part>> {
    if !interleaved {
        return of_rows(piece, width);
    }
    let mut out = vec![];
    for half in halves(piece)? {
        let before = half.key % 2 * (width / 2);
        let mut axes = half.axes.clone();
        axes.iter_mut().for_each(|a| a.key /= 2);
        let shifted = |mut part: Part| {
            part.rect.cols = part.rect.cols.map(|col| col + before);
            part
        };
        out.extend(of_rows(&Piece { key: half.key / 2, axes, ..half }, width / 2)?.into_iter().map(shifted));
    }
    Some(out)
}

/// What a piece has of the even columns, and of the odd ones.
fn halves(piece: &Piece) -> Option<Vec<Piece>> {
    let Some(at) = piece.axes.iter().position(|a| a.key % 2 == 1) else { return Some(vec![piece.clone()]) };
    let axis = piece.axes[at];
    let others = piece.axes.iter().enumerate().all(|(i, a)| i == at || a.key % 2 == 0);
    let half = |first: u64| {
        let mut half = piece.clone();
        half.key += first * axis.key;
        half.src.offset += first * axis.src;
        half.dst.offset += first * axis.dst;
        half.axes[at] =
            PieceAxis { extent: (axis.extent + 1 - first) / 2, key: 2 * axis.key, src: 2 * axis.src, dst: 2 * axis.dst };
        half
    };
    others.then(|| vec![half(0), half(1)])
}

fn of_rows(piece: &Piece, width: u64) -> Option<Vec<Part>> {
    let mut axes = piece.axes.clone();
    axes.sort_by_key(|a| a.key);
    let run = match axes.first() {
        Some(a) if a.key == 1 && width > 1 => axes.remove(0),
        _ => PieceAxis { extent: 1, key: 1, src: 0, dst: 0 },
    };
    let mut out = lines(piece, &run, width);
    for axis in &axes {
        if axis.key % width != 0 {
            return None;
        }
        match &mut out[..] {
            [part] if axis.key == width && part.rect.rows[1] - part.rect.rows[0] == 1 => {
                part.rect.rows[1] = part.rect.rows[0] + axis.extent;
                (part.ends[0].row, part.ends[1].row) = (axis.src, axis.dst);
            }
            _ => out = (0..axis.extent).flat_map(|i| out.iter().map(move |p| shifted(p, i, axis, width))).collect(),
        }
    }
    Some(out)
}

/// A run of elements: whole rows, and what it has of the rows before and after them.
fn lines(piece: &Piece, run: &PieceAxis, width: u64) -> Vec<Part> {
    let (mut out, mut done) = (vec![], 0);
    while done < run.extent {
        let (row, col) = ((piece.key + done) / width, (piece.key + done) % width);
        let left = run.extent - done;
        let (rows, cols) = if col == 0 && left >= width { (left / width, width) } else { (1, left.min(width - col)) };
        let end = |at: u64, step: u64| End { at: at + done * step, row: width * step, col: step };
        let ends = [end(piece.src.offset, run.src), end(piece.dst.offset, run.dst)];
        out.push(Part { rect: Rect { rows: [row, row + rows], cols: [col, col + cols] }, ends });
        done += rows * cols;
    }
    out
}

/// `i` steps on.
fn shifted(part: &Part, i: u64, axis: &PieceAxis, width: u64) -> Part {
    let mut out = *part;
    out.rect.rows = out.rect.rows.map(|row| row + i * (axis.key / width));
    out.ends[0].at += i * axis.src;
    out.ends[1].at += i * axis.dst;
    out
}
