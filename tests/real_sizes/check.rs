//! All plans of one world against what its ranks hold and want.

use super::agree::{Agree, difference};
use super::balance::{Egress, Judgement, Rounds};
use super::cells::{Cells, Owned};
use super::covers::{merged, of};
use super::holds::{Held, held};
use super::models::Model;
use super::sides::Side;
use super::tensors::{self, Key};
use reshard::plan::closed::{places, plan};
use reshard::preset::world::World;
use serde_json::json;
use std::collections::HashMap;
use std::fmt;
use std::rc::Rc;

const RANKS_PER_HOST: u64 = 8;

macro_rules! ensure {
    ($condition:expr, $($text:tt)*) => { if !$condition { return Err(format!($($text)*)); } };
}
pub(super) use ensure;

/// What was seen of a world.
pub struct Seen {
    pub ranks: usize,
    pub pieces: usize,
    pub egress: Judgement,
    pub rounds: Rounds,
    /// Of what is no routed expert: the busiest sender of a stage over the mean of the stage, the worst stage's.
    pub stage: f64,
}

impl fmt::Display for Seen {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (egress, rounds) = (&self.egress, &self.rounds);
        let share = 100.0 * egress.asserted as f64 / egress.all.max(1) as f64;
        let others = egress.others.iter().map(|o| o.0).fold(0.0, f64::max);
        write!(f, "{} ranks, {} pieces; {} classes, egress {:.4} ", self.ranks, self.pieces, egress.classes, egress.busiest)?;
        write!(f, "in {share:.1} %, else {others:.3}; ")?;
        write!(f, "stage {:.4}; ", self.stage)?;
        write!(f, "{} rounds, {:.3}{}", rounds.count, rounds.figure, if rounds.alike { "" } else { " (not alike)" })
    }
}

/// How a tensor lies in the checkpoint.
pub struct Shape {
    pub name: String,
    pub width: u64,
    pub interleaved: bool,
    pub item: u64,
    /// Of a routed expert.
    pub routed: bool,
    key: Key,
}

/// A world and what is expected of it.
pub struct Job<'a> {
    pub sides: [&'a Side; 2],
    pub world: World,
    /// By ordinal.
    pub tensors: Vec<Shape>,
    /// By side and rank.
    pub has: [Vec<Rc<Vec<Held>>>; 2],
    /// Of each tensor, one object for all that lie alike.
    pub cells: Vec<Rc<Cells>>,
    pub egress: Egress,
    /// Bytes that a rank sends of what is no routed expert.
    pub dense: Vec<u64>,
    /// By side, rank and row of its buffers: the parameter that it was found to be.
    pub params: [Vec<Vec<Option<Key>>>; 2],
}

/// Plans all ranks and looks at every piece.
pub fn check(model: &Model, source: &Side, target: &Side) -> Result<Seen, String> {
    let (from, to) = (source.json(model), target.json(model));
    let spec = json!({"model": model.config(), "source": from, "target": to, "ranks_per_host": RANKS_PER_HOST});
    let shown = || spec.to_string().chars().take(2000).collect::<String>();
    let world = World::new(&spec.to_string()).map_err(|e| format!("{e}: {}", shown()))?;
    if let Some(total) = model.total {
        ensure!(world.model().parameters() == total, "{} parameters, not {total}", world.model().parameters());
    }
    let counted: u64 = model.tensors().iter().map(|t| t.shape.iter().product::<u64>()).sum();
    ensure!(world.model().parameters() == counted, "{} parameters, not {counted}", world.model().parameters());
    let mut job = Job::new(model, [source, target], world)?;
    let ranks = job.world.ranks();
    let places = places(ranks, Some(RANKS_PER_HOST));
    let (mut agree, mut pieces) = (Agree::default(), 0);
    for r in 0..ranks {
        let plan = plan(r, &places, 256 << 20, &job.world).map_err(|e| format!("rank {r}: {e}: {}", shown()))?;
        agree.add(r as usize, &plan, job.world.sides()[0].count(r))?;
        pieces += job.covered(r as usize, &plan).map_err(|e| format!("rank {r}: {e}"))?;
    }
    let transfers = agree.judge().map_err(|(a, b)| {
        let of = |r: usize| plan(r as u32, &places, 256 << 20, &job.world).expect("planned before");
        difference(&of(a), &of(b), (a, b), job.world.sides()[0].count(b as u32))
    })?;
    let (egress, rounds) = (job.egress.judge()?, Rounds::new(ranks as usize, &transfers));
    // A rank with one expert more than others gets more of the same senders, and a round takes as long as its fullest pair.
    if !target.uneven(model) {
        rounds.judge()?;
    }
    Ok(Seen { ranks: ranks as usize, pieces, egress, rounds, stage: job.stage() })
}

impl<'a> Job<'a> {
    fn new(model: &Model, sides: [&'a Side; 2], world: World) -> Result<Job<'a>, String> {
        let ordinals: HashMap<String, (u32, Vec<u64>)> =
            (0..).zip(world.tensors()).map(|(ordinal, t)| (t.name, (ordinal, t.shape))).collect();
        let all = model.tensors();
        ensure!(all.len() == ordinals.len(), "{} tensors, not {}", ordinals.len(), all.len());
        let (mut tensors, mut of_key) = (vec![], HashMap::new());
        for tensor in all {
            let name = tensors::name(tensor.key);
            let Some((ordinal, shape)) = ordinals.get(&name) else { return Err(format!("no {name}")) };
            ensure!(*shape == tensor.shape, "{name} is {shape:?}, not {:?}", tensor.shape);
            of_key.insert(tensor.key, *ordinal);
            let (key, width, interleaved, item) = (tensor.key, tensor.width(), tensor.interleaved(), tensor.item);
            tensors.push((*ordinal, Shape { routed: name.contains(".experts."), name, width, interleaved, item, key }));
        }
        tensors.sort_by_key(|t| t.0);
        let tensors: Vec<Shape> = tensors.into_iter().map(|t| t.1).collect();
        let has = [0, 1].map(|side| {
            let nothing = Rc::new(vec![]);
            let mut out = vec![nothing; world.ranks() as usize];
            let held = held(sides[side], model, side == 1, &of_key);
            sides[side].ranks.iter().zip(held).for_each(|(&rank, held)| out[rank as usize] = held);
            out
        });
        let dense = vec![0; world.ranks() as usize];
        let egress = Egress::new((0..u64::from(world.ranks())).map(|r| r / RANKS_PER_HOST).collect());
        let params = [0, 1].map(|_| vec![vec![]; world.ranks() as usize]);
        let mut job = Job { sides, world, tensors, has, cells: vec![], egress, dense, params };
        job.find_cells(model);
        Ok(job)
    }

    /// Tensors of the same name lie alike in layers that are of one stage on either side.
    fn find_cells(&mut self, model: &Model) {
        let stages = self.sides.map(|side| side.stage_of(model));
        let mapped = self.sides.iter().any(|side| side.mapped());
        let mut known: HashMap<_, Rc<Cells>> = HashMap::new();
        for tensor in 0..self.tensors.len() {
            let (layer, name, number) = self.tensors[tensor].key;
            let stage = |of: &Vec<usize>| layer.map(|layer| of[layer as usize]);
            let alike =
                (name, number, stage(&stages[0]), stage(&stages[1]), layer.filter(|_| mapped && self.tensors[tensor].routed));
            let cells = known.entry(alike).or_insert_with(|| {
                let mut boxes: Vec<Owned> = vec![];
                for (side, ranks) in self.has.iter().enumerate() {
                    for (r, has) in ranks.iter().enumerate() {
                        boxes.extend(merged(of(has, tensor)).into_iter().map(|rect| (r, side == 1, rect)));
                    }
                }
                Rc::new(Cells::new(&boxes, &mut self.egress))
            });
            cells.wanted(self.tensors[tensor].item, &mut self.egress);
            self.cells.push(cells.clone());
        }
    }

    /// See [`Seen::stage`].
    fn stage(&self) -> f64 {
        let side = self.sides[0];
        let mut stages: HashMap<u64, Vec<u64>> = HashMap::new();
        for (at, &rank) in (0..).zip(&side.ranks) {
            stages.entry(side.place(at).stage).or_default().push(self.dense[rank as usize]);
        }
        let figure = |sent: &Vec<u64>| {
            let all = sent.iter().sum::<u64>().max(1);
            sent.iter().copied().max().unwrap_or(0) as f64 * sent.len() as f64 / all as f64
        };
        stages.values().map(figure).fold(0.0, f64::max)
    }
}
