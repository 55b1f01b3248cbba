//! All plans of one world against what its ranks hold and want.

use super::balance::{Egress, Judgement, Rounds, Transfer};
use super::cells::{Cells, Owned};
use super::holds::{self, Held, Param, Rect, held};
use super::models::{self, Model};
use super::parts::{Part, parts};
use super::sides::Side;
use reshard::plan::closed::{places, plan};
use reshard::plan::{Peer, Piece, Plan};
use reshard::preset::world::World;
use serde_json::json;
use std::collections::HashMap;
use std::fmt;
use std::rc::Rc;

const RANKS_PER_HOST: u64 = 8;

/// Staging of a rank, and what a message of it is cut to.
const STAGING: u64 = 256 << 20;
const UNIT: u64 = 256;

macro_rules! ensure {
    ($condition:expr, $($text:tt)*) => { if !$condition { return Err(format!($($text)*)); } };
}

/// What was seen of a world.
pub struct Seen {
    pub ranks: usize,
    pub pieces: usize,
    pub egress: Judgement,
    pub rounds: Rounds,
}

impl fmt::Display for Seen {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (egress, rounds) = (&self.egress, &self.rounds);
        let share = 100.0 * egress.asserted as f64 / egress.all.max(1) as f64;
        let others = egress.others.iter().map(|o| o.0).fold(0.0, f64::max);
        write!(f, "{} ranks, {} pieces; {} classes, egress {:.4} ", self.ranks, self.pieces, egress.classes, egress.busiest)?;
        write!(f, "in {share:.1} %, else {others:.3}; ")?;
        write!(f, "{} rounds, {:.3}{}", rounds.count, rounds.figure, if rounds.alike { "" } else { " (not alike)" })
    }
}

/// A world and what is expected of it.
struct Job<'a> {
    model: &'a Model,
    sides: [&'a Side; 2],
    world: World,
    /// Names, and elements of a row, by ordinal.
    tensors: Vec<(String, u64)>,
    /// By side, rank and ordinal.
    held: [Vec<Vec<Vec<Held>>>; 2],
    /// Parameters that rows of ranks were found to be.
    params: HashMap<(usize, usize, u32), Param>,
}

/// Plans all ranks and looks at every piece.
pub fn check(model: &Model, source: &Side, target: &Side) -> Result<Seen, String> {
    let spec = json!({"model": model.config(), "source": source.json(), "target": target.json(), "ranks_per_host": RANKS_PER_HOST});
    let world = World::new(&spec.to_string()).map_err(|e| format!("{e}: {spec}"))?;
    if let Some(total) = model.total {
        ensure!(world.model().parameters() == total, "{} parameters, not {total}", world.model().parameters());
    }
    let mut job = Job::new(model, [source, target], world)?;
    let ranks = job.world.ranks();
    let places = places(ranks, Some(RANKS_PER_HOST));
    let made: Result<Vec<Plan>, _> = (0..ranks).map(|r| plan(r, &places, &job.world)).collect();
    let plans = made.map_err(|e| format!("{e}: {spec}"))?;
    both_ends_agree(&job, &plans)?;
    let mut egress = Egress::new((0..u64::from(ranks)).map(|r| r / RANKS_PER_HOST).collect());
    let cells = job.cells(&mut egress);
    let mut pieces = 0;
    for (r, plan) in plans.iter().enumerate() {
        let rank = |e: String| format!("rank {r}: {e}");
        pieces += plan.peers.iter().map(|p| p.into.len()).sum::<usize>();
        job.covered(r, plan, &cells, &mut egress).map_err(rank)?;
    }
    let (egress, rounds) = (egress.judge()?, Rounds::new(plans.len(), &transfers(&plans)));
    rounds.judge()?;
    Ok(Seen { ranks: plans.len(), pieces, egress, rounds })
}

/// What a says that it sends to b is what b says that it receives from a, in the same order.
fn both_ends_agree(job: &Job<'_>, plans: &[Plan]) -> Result<(), String> {
    for (a, plan) in plans.iter().enumerate() {
        ensure!(plan.doubles.is_empty(), "rank {a}: no parameter is twice on a rank");
        ensure!(plan.peers.windows(2).all(|p| p[0].rank < p[1].rank), "rank {a}: peers out of order");
        for peer in &plan.peers {
            let b = peer.rank as usize;
            let none = Peer::default();
            let back = plans[b].peers.iter().find(|p| p.rank as usize == a).unwrap_or(&none);
            ensure!(a != b, "rank {a} is its own peer");
            ensure!(peer.into.len() == back.out.len() && peer.out.len() == back.into.len(), "ranks {a} and {b}: other pieces");
            // A receiver counts all its buffers, a sender those of the receiver's target side.
            let sources = job.world.sides()[0].count(a as u32);
            for (into, out) in peer.into.iter().zip(&back.out) {
                let mut same = out.clone();
                same.dst.buffer += sources;
                ensure!(same == *into, "{a} receives {into:?}, {b} sends {out:?}");
            }
        }
    }
    Ok(())
}

fn transfers(plans: &[Plan]) -> Vec<Transfer> {
    let most = plans.iter().map(|p| p.peers.len()).max().unwrap_or(0).max(1) as u64;
    let size = (STAGING / (4 * most) / UNIT * UNIT).max(UNIT);
    let mut out = vec![];
    for (from, plan) in plans.iter().enumerate() {
        for peer in &plan.peers {
            let bytes = peer.out.iter().map(Piece::bytes).sum::<u64>();
            out.push(Transfer { from, to: peer.rank as usize, bytes, messages: bytes.div_ceil(size), size });
        }
    }
    out
}

impl<'a> Job<'a> {
    fn new(model: &'a Model, sides: [&'a Side; 2], world: World) -> Result<Job<'a>, String> {
        let mut tensors = vec![];
        let mut ordinals = HashMap::new();
        for tensor in world.tensors() {
            ordinals.insert(tensor.name.clone(), (tensors.len(), tensor.shape.clone()));
            tensors.push((tensor.name, *tensor.shape.get(1).unwrap_or(&1)));
        }
        let all = model.tensors();
        ensure!(all.len() == tensors.len(), "{} tensors, not {}", tensors.len(), all.len());
        let mut of = HashMap::new();
        for (key, rows, cols) in all {
            let shape = if cols == 0 { vec![rows] } else { vec![rows, cols] };
            let (ordinal, found) = ordinals.get(&models::name(key)).ok_or_else(|| format!("no {}", models::name(key)))?;
            ensure!(*found == shape, "{} is {found:?}, not {shape:?}", models::name(key));
            of.insert(key, *ordinal);
        }
        let by_ordinal = |side: usize| {
            let mut out: Vec<Vec<Vec<Held>>> = (0..world.ranks()).map(|_| tensors.iter().map(|_| vec![]).collect()).collect();
            for (&rank, list) in sides[side].ranks.iter().zip(held(sides[side], model, side == 1)) {
                list.into_iter().for_each(|h| out[rank as usize][of[&h.key]].push(h));
            }
            out
        };
        let held = [by_ordinal(0), by_ordinal(1)];
        Ok(Job { model, sides, world, tensors, held, params: HashMap::new() })
    }

    /// The cells of each tensor, one object for all that lie alike.
    fn cells(&self, egress: &mut Egress) -> Vec<Rc<Cells>> {
        let mut known: HashMap<Vec<Owned>, Rc<Cells>> = HashMap::new();
        let of = |tensor: usize| {
            let mut boxes: Vec<Owned> = vec![];
            for (side, ranks) in self.held.iter().enumerate() {
                for (r, rank) in ranks.iter().enumerate() {
                    boxes.extend(merged(&rank[tensor]).into_iter().map(|rect| (r, side == 1, rect)));
                }
            }
            let cells = known.entry(boxes).or_insert_with_key(|boxes| Rc::new(Cells::new(boxes, egress))).clone();
            cells.wanted(self.model.item(), egress);
            cells
        };
        (0..self.tensors.len()).map(of).collect()
    }

    /// What rank `r` receives and what it holds itself is what it wants, each element once, and no byte more crosses.
    fn covered(&mut self, r: usize, plan: &Plan, cells: &[Rc<Cells>], egress: &mut Egress) -> Result<(), String> {
        let item = self.model.item();
        let mut got: Vec<Vec<Rect>> = vec![vec![]; self.tensors.len()];
        for peer in &plan.peers {
            for piece in &peer.into {
                let tensor = piece.tensor as usize;
                let width = self.tensors[tensor].1;
                let context = |e: String| format!("{} from {}: {e}: {piece:?}", self.tensors[tensor].0, peer.rank);
                let parts = parts(piece, width).ok_or_else(|| context("no rectangles".into()))?;
                ensure!(u64::from(piece.item) == item, "{}", context(format!("elements of {} bytes", piece.item)));
                for part in parts {
                    let ends = [(0, peer.rank as usize, piece.src.buffer), (1, r, piece.dst.buffer)];
                    for end in ends {
                        lies(&self.held, &mut self.params, (&self.world, self.sides), end, tensor, &part).map_err(context)?;
                    }
                    cells[tensor].sent(&part.rect, item, (peer.rank as usize, r), egress);
                    got[tensor].push(part.rect);
                }
            }
        }
        let mut lacks = 0;
        for (tensor, got) in got.iter_mut().enumerate() {
            let [own, want] = [0, 1].map(|side| merged(&self.held[side][r][tensor]));
            let here = common(&own, &want);
            let missing = want.iter().map(Rect::area).sum::<u64>() - here;
            lacks += missing;
            let name = &self.tensors[tensor].0;
            ensure!(got.iter().map(Rect::area).sum::<u64>() == missing, "{name}: {got:?} for {want:?} less {own:?}");
            ensure!(common(got, &want) == missing, "{name}: {got:?} is not in {want:?}");
            ensure!(common(got, &own) == 0, "{name}: {got:?}, but there was {own:?}");
            got.sort_unstable();
            for (i, one) in got.iter().enumerate() {
                let others = got[i + 1..].iter().take_while(|o| o.rows[0] < one.rows[1]);
                ensure!(others.into_iter().all(|o| o.meet(one).is_none()), "{name}: twice in {got:?}");
            }
        }
        ensure!(plan.wire_bytes().1 == lacks * item, "{:?} bytes on the wire, {} are lacking", plan.wire_bytes(), lacks * item);
        Ok(())
    }
}

/// That a part lies at an end (side, rank, row of its buffers) where that rank has it: looked at in its corners.
fn lies(
    held: &[Vec<Vec<Vec<Held>>>; 2],
    params: &mut HashMap<(usize, usize, u32), Param>,
    (world, sides): (&World, [&Side; 2]),
    (side, rank, buffer): (usize, usize, u32),
    tensor: usize,
    part: &Part,
) -> Result<(), String> {
    let rect = part.rect;
    for row in [rect.rows[0], rect.rows[1] - 1] {
        for col in [rect.cols[0], rect.cols[1] - 1] {
            let inside = |h: &&Held| h.rect.meet(&Rect { rows: [row, row + 1], cols: [col, col + 1] }).is_some();
            let Some(h) = held[side][rank][tensor].iter().find(inside) else {
                return Err(format!("rank {rank}, side {side}, does not have row {row}, column {col}"));
            };
            let expected = h.at + (row - h.rect.rows[0]) * h.stride + col - h.rect.cols[0];
            let given = part.ends[side].of(row - rect.rows[0], col - rect.cols[0]);
            ensure!(given == expected, "rank {rank}, side {side}: ({row}, {col}) is at {expected}, not {given}");
            let sources = if side == 1 { world.sides()[0].count(rank as u32) } else { 0 };
            let param = params.entry((side, rank, buffer)).or_insert_with(|| {
                let name = world.param_name(side, rank as u32, buffer - sources);
                let right = name.is_some_and(|n| n == holds::name(sides[side].framework, h.param));
                if right { h.param } else { (None, "another") }
            });
            ensure!(*param == h.param, "rank {rank}, side {side}: buffer {buffer} is {param:?}, not {:?}", h.param);
        }
    }
    Ok(())
}

/// The same elements in fewer rectangles: those that follow each other are one.
fn merged(held: &[Held]) -> Vec<Rect> {
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
