//! One rank's plan against what the rank has and wants.

use super::check::{Job, ensure};
use super::holds::{self, Held, Rect};
use super::parts::{Part, parts};
use super::tensors::Key;
use reshard::plan::Plan;

/// What a side's rank has of a tensor.
pub fn of(has: &[Held], tensor: usize) -> &[Held] {
    let end = |limit: usize| has.partition_point(|h| (h.tensor as usize) < limit);
    let first = end(tensor);
    let more = has[first..].iter().take_while(|h| h.tensor as usize == tensor).count();
    &has[first..first + more]
}

impl Job<'_> {
    /// What rank `r` receives and what it holds itself is what it wants, each element once, and no byte more crosses. The number of
    /// rectangles that it receives.
    pub fn covered(&mut self, r: usize, plan: &Plan) -> Result<usize, String> {
        ensure!(plan.doubles.is_empty(), "no parameter is twice on a rank");
        let mut got: Vec<(usize, Rect)> = vec![];
        for peer in &plan.peers {
            let from = peer.rank as usize;
            for piece in &peer.into {
                let tensor = piece.tensor as usize;
                let lies = &self.tensors[tensor];
                let context = |e: String| format!("{} from {from}: {e}: {piece:?}", lies.name);
                let parts = parts(piece, lies.width, lies.interleaved).ok_or_else(|| context("no rectangles".into()))?;
                ensure!(u64::from(piece.item) == lies.item, "{}", context(format!("elements of {} bytes", piece.item)));
                let (item, routed) = (lies.item, lies.routed);
                for part in parts {
                    for end in [(0, from, piece.src.buffer), (1, r, piece.dst.buffer)] {
                        self.lies(end, tensor, &part)
                            .map_err(|e| format!("{} from {from}: {e}: {piece:?}", self.tensors[tensor].name))?;
                    }
                    self.cells[tensor].sent(&part.rect, item, (from, r), &mut self.egress);
                    self.dense[from] += if routed { 0 } else { part.rect.area() * item };
                    got.push((tensor, part.rect));
                }
            }
        }
        got.sort_unstable();
        let (mut lacks, mut rest) = (0, &got[..]);
        let [own, want] = [0, 1].map(|side| self.has[side][r].clone());
        for want in want.chunk_by(|a, b| a.tensor == b.tensor) {
            let tensor = want[0].tensor as usize;
            let (mine, others) = rest.split_at(rest.partition_point(|g| g.0 <= tensor));
            rest = others;
            let mine: Vec<Rect> = mine.iter().map(|g| g.1).collect();
            let missing = exact(&mine, &merged(of(&own, tensor)), &merged(want));
            let missing = missing.map_err(|e| format!("{}: {e}, {} rectangles", self.tensors[tensor].name, mine.len()))?;
            ensure!(got_in(&got, tensor) == mine.len(), "{}: received, but not wanted before", self.tensors[tensor].name);
            lacks += missing * self.tensors[tensor].item;
        }
        ensure!(rest.is_empty(), "received, but not wanted: {:?}", rest[0]);
        ensure!(plan.wire_bytes().1 == lacks, "{:?} bytes on the wire, {lacks} are lacking", plan.wire_bytes());
        Ok(got.len())
    }

    /// That a part lies at an end (side, rank, row of its buffers) where that rank has it: looked at in its corners.
    fn lies(&mut self, (side, rank, buffer): (usize, usize, u32), tensor: usize, part: &Part) -> Result<(), String> {
        let has = self.has[side][rank].clone();
        let (has, rect) = (of(&has, tensor), part.rect);
        let within = |h: &&Held, rect: &Rect| h.rect.meet(rect) == Some(*rect);
        let whole = has.iter().find(|h| within(h, &rect));
        if let Some(h) = whole {
            self.named((side, rank, buffer), h.param)?;
        }
        for row in [rect.rows[0], rect.rows[1] - 1] {
            for col in [rect.cols[0], rect.cols[1] - 1] {
                let one = Rect { rows: [row, row + 1], cols: [col, col + 1] };
                let Some(h) = whole.or_else(|| has.iter().find(|h| within(h, &one))) else {
                    return Err(format!("rank {rank}, side {side}, does not have row {row}, column {col}"));
                };
                let expected = h.at + (row - h.rect.rows[0]) * h.steps[0] + (col - h.rect.cols[0]) * h.steps[1];
                let given = part.ends[side].of(row - rect.rows[0], col - rect.cols[0]);
                ensure!(given == expected, "rank {rank}, side {side}: ({row}, {col}) is at {expected}, not {given}");
                if whole.is_none() {
                    self.named((side, rank, buffer), h.param)?;
                }
            }
        }
        Ok(())
    }

    /// That a row of a rank's buffers is that parameter.
    fn named(&mut self, (side, rank, buffer): (usize, usize, u32), param: Key) -> Result<(), String> {
        let (rows, at) = (&mut self.params[side][rank], buffer as usize);
        rows.resize(rows.len().max(at + 1), None);
        if rows[at] != Some(param) {
            let sources = if side == 1 { self.world.sides()[0].count(rank as u32) } else { 0 };
            let (name, right) =
                (self.world.param_name(side, rank as u32, buffer - sources), holds::name(self.sides[side].framework, param));
            ensure!(name.as_ref() == Some(&right), "rank {rank}, side {side}: buffer {buffer} is {name:?}, not {right}");
            rows[at] = Some(param);
        }
        Ok(())
    }
}

/// How many rectangles of a tensor there are.
fn got_in(got: &[(usize, Rect)], tensor: usize) -> usize {
    got.partition_point(|g| g.0 <= tensor) - got.partition_point(|g| g.0 < tensor)
}

/// That rectangles in order are what is wanted less what is there, each element once: how many elements these are.
fn exact(got: &[Rect], own: &[Rect], want: &[Rect]) -> Result<u64, String> {
    let missing = want.iter().map(Rect::area).sum::<u64>() - common(own, want);
    ensure!(got.iter().map(Rect::area).sum::<u64>() == missing, "other than {want:?} less {own:?}");
    ensure!(common(got, want) == missing, "not all in {want:?}");
    ensure!(common(got, own) == 0, "some are in {own:?}");
    for (i, one) in got.iter().enumerate() {
        let others = got[i + 1..].iter().take_while(|o| o.rows[0] < one.rows[1]);
        ensure!(others.into_iter().all(|o| o.meet(one).is_none()), "twice: {one:?}");
    }
    Ok(missing)
}

/// The same elements in fewer rectangles: those that follow each other are one.
pub fn merged(held: &[Held]) -> Vec<Rect> {
    let mut all: Vec<Rect> = held.iter().map(|h| h.rect).collect();
    all.sort_unstable();
    let mut out: Vec<Rect> = vec![];
    for rect in all {
        match out.last_mut() {
            Some(last) if last.cols == rect.cols && last.rows[1] == rect.rows[0] => last.rows[1] = rect.rows[1],
            _ => out.push(rect),
        }
    }
    out
}

/// Elements that two lists of disjoint rectangles have in common.
fn common(a: &[Rect], b: &[Rect]) -> u64 {
    a.iter().flat_map(|x| b.iter().filter_map(|y| x.meet(y))).map(|r| r.area()).sum()
}
