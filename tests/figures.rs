//! Figures of plans for real models: wire bytes at the lower bound, egress even among replicas, rounds without idle ranks.
//!
//! Only tables are real: every rank is a thread, its parameters are reserved addresses that nobody can touch, and planning does not.

mod balance;

#[allow(dead_code)] // The other test uses the rest.
mod oracle;

mod shapes;

use balance::{Egress, Rounds, Transfer};
use oracle::gpu::HOST;
use oracle::library::{Comm, Container, Tables};
use oracle::model::Case;
use reshard::abi::{RS_SOURCE, RS_TARGET};
use serde_json::Value;
use shapes::{Megatron, Model, VLlm, world};
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::atomic::{AtomicU64, Ordering};

#[test]
fn llama_8b_to_smaller_engines_on_the_same_ranks() {
    let source = Megatron { tp: 4, pp: 2, dp: 2, first: 0, ep: 1 };
    let world = world(&Model::LLAMA_8B, &source, &VLlm { tp: 2, replicas: 8, first: 0, ep: 1 }, 8);
    assert_figures(&world, Expect { rounds: false, egress: 0.9 });
}

#[test]
fn llama_8b_to_engines_on_half_of_the_ranks() {
    let source = Megatron { tp: 4, pp: 2, dp: 2, first: 0, ep: 1 };
    let world = world(&Model::LLAMA_8B, &source, &VLlm { tp: 2, replicas: 4, first: 0, ep: 1 }, 8);
    assert_figures(&world, Expect { rounds: false, egress: 0.9 });
}

#[test]
fn llama_8b_to_engines_elsewhere() {
    let source = Megatron { tp: 2, pp: 2, dp: 2, first: 0, ep: 1 };
    let world = world(&Model::LLAMA_8B, &source, &VLlm { tp: 4, replicas: 2, first: 8, ep: 1 }, 8);
    assert_figures(&world, Expect { rounds: true, egress: 0.9 });
}

#[test]
fn qwen3_30b_a3b_with_experts_on_both_sides() {
    let source = Megatron { tp: 2, pp: 2, dp: 4, first: 0, ep: 8 };
    let world = world(&Model::QWEN3_30B_A3B, &source, &VLlm { tp: 4, replicas: 4, first: 0, ep: 4 }, 8);
    assert_figures(&world, Expect { rounds: false, egress: 0.5 });
}

/// What a configuration must reach beyond the rules that hold for all.
struct Expect {
    /// Whether the sending ranks are alike, so that the rounds figure is asserted.
    rounds: bool,
    /// At least this share of the bytes is in classes whose egress is asserted.
    egress: f64,
}

/// A part of a tensor that every rank holds or wants as a whole or not at all.
struct Cell {
    tensor: usize,
    bounds: Vec<(i64, i64)>,
    bytes: u64,
    holders: BTreeSet<usize>,
    wanting: BTreeSet<usize>,
}

/// The box of a tile in the tensor's own shape: all of them here are rows or columns, in whatever view.
fn bounds(shape: &[i64], tile: &oracle::model::Tile) -> Vec<(i64, i64)> {
    let at = |index: &dyn Fn(usize) -> i64| -> Vec<i64> {
        let mut flat = (0..tile.view.len()).fold(0, |flat, j| flat * tile.view[j] + index(j));
        let mut out: Vec<i64> = shape.iter().rev().map(|n| (flat % n, flat /= n).0).collect();
        out.reverse();
        out
    };
    let (low, high) = (at(&|j| tile.origin[j]), at(&|j| tile.origin[j] + tile.extent[j] - 1));
    let bounds: Vec<(i64, i64)> = low.into_iter().zip(high).map(|(l, h)| (l, h + 1)).collect();
    assert_eq!(bounds.iter().map(|(l, h)| h - l).product::<i64>(), tile.extent.iter().product::<i64>(), "a box in {shape:?}");
    bounds
}

fn cells(case: &Case) -> Vec<Cell> {
    type Owned = (usize, u32, Vec<(i64, i64)>);
    let mut boxes: Vec<Vec<Owned>> = case.tensors.iter().map(|_| Vec::new()).collect();
    for (r, rank) in case.ranks.iter().enumerate() {
        for tile in &rank.tiles {
            boxes[tile.tensor].push((r, rank.buffers[tile.buffer].role, bounds(&case.tensors[tile.tensor].shape, tile)));
        }
    }
    let mut cells = Vec::new();
    for (tensor, boxes) in boxes.iter().enumerate() {
        let mut all: Vec<Vec<(i64, i64)>> = vec![Vec::new()];
        for axis in 0..case.tensors[tensor].shape.len() {
            let cuts: BTreeSet<i64> = boxes.iter().flat_map(|b| [b.2[axis].0, b.2[axis].1]).collect();
            let steps: Vec<(i64, i64)> = cuts.iter().copied().zip(cuts.iter().copied().skip(1)).collect();
            all = all.iter().flat_map(|c| steps.iter().map(|s| [c.as_slice(), &[*s]].concat())).collect();
        }
        for bounds in all {
            let of = |role: u32| {
                let inside = |b: &&Owned| b.1 & role != 0 && b.2.iter().zip(&bounds).all(|(b, c)| b.0 <= c.0 && c.1 <= b.1);
                boxes.iter().filter(inside).map(|b| b.0).collect::<BTreeSet<usize>>()
            };
            let (holders, wanting) = (of(RS_SOURCE), of(RS_TARGET));
            let wanting = wanting.difference(&holders).copied().collect();
            let bytes = bounds.iter().map(|(l, h)| h - l).product::<i64>() as u64 * case.tensors[tensor].item() as u64;
            cells.push(Cell { tensor, bounds, bytes, holders, wanting });
        }
    }
    cells
}

fn assert_figures(case: &Case, expect: Expect) {
    static HUB: AtomicU64 = AtomicU64::new(1 << 40);
    let (hub, ranks) = (HUB.fetch_add(1, Ordering::Relaxed), case.ranks.len());
    let reserved: Vec<_> = case.ranks.iter().map(shapes::Reserved::new).collect();
    let plans: Vec<(Value, Vec<Value>)> = std::thread::scope(|scope| {
        let reserved = &reserved;
        let plan = |r: usize| {
            let rank = &case.ranks[r];
            let comm = Comm::loopback(hub, r, ranks).unwrap_or_else(|e| panic!("{e}"));
            let tables = Tables::new(case, rank, HOST, |b| reserved[r].address(rank, b));
            let mut container = Container::create(rank, &tables, &comm, 120_000).unwrap_or_else(|e| panic!("rank {r}: {e}"));
            container.connect().unwrap_or_else(|e| panic!("rank {r}: {e}"));
            let targets = rank.buffers.iter().filter(|b| b.role == RS_TARGET);
            let boxes = targets.map(|b| container.plan(Some(&b.name)).unwrap_or_else(|e| panic!("rank {r}: {}: {e}", b.name)));
            (container.plan(None).unwrap_or_else(|e| panic!("rank {r}: {e}")), boxes.collect())
        };
        let threads: Vec<_> = (0..ranks).map(|r| scope.spawn(move || plan(r))).collect();
        threads.into_iter().map(|t| t.join().expect("no panic")).collect()
    });
    let cells = cells(case);
    assert_wire(&cells, &plans);
    assert_egress(case, &cells, &plans, expect.egress);
    assert_rounds(&plans, expect.rounds);
}

fn number(json: &Value, key: &str) -> u64 {
    json[key].as_u64().unwrap_or_else(|| panic!("no number {key} in {json}"))
}

fn list<'a>(json: &'a Value, key: &str) -> &'a [Value] {
    json[key].as_array().unwrap_or_else(|| panic!("no list {key} in {json}"))
}

/// Every rank receives what it wants and does not hold, once.
fn assert_wire(cells: &[Cell], plans: &[(Value, Vec<Value>)]) {
    for (r, (plan, _)) in plans.iter().enumerate() {
        let lacks: u64 = cells.iter().filter(|c| c.wanting.contains(&r)).map(|c| c.bytes).sum();
        assert_eq!(number(&plan["bytes"], "received"), lacks, "bytes that rank {r} receives");
    }
}

/// Within each class every replica sends the same.
fn assert_egress(case: &Case, cells: &[Cell], plans: &[(Value, Vec<Value>)], least: f64) {
    let mut egress = Egress::new(case.ranks.iter().map(|r| r.host).collect());
    // With the class of each rank that wants the cell.
    type Classed<'a> = (&'a Cell, BTreeMap<usize, usize>);
    let mut by_tensor: HashMap<&str, Vec<Classed<'_>>> = HashMap::new();
    for cell in cells {
        let classes = egress.classes(&cell.holders, &cell.wanting);
        classes.values().for_each(|&class| egress.wanted(class, cell.bytes));
        by_tensor.entry(&case.tensors[cell.tensor].name).or_default().push((cell, classes));
    }
    for (r, (_, params)) in plans.iter().enumerate() {
        for entry in params.iter().flat_map(|p| list(p, "boxes")) {
            let (from, name) = (number(entry, "from") as usize, entry["tensor"].as_str().expect("a name"));
            let sent: Vec<(i64, i64)> =
                list(entry, "box").iter().map(|b| (b[0].as_i64().expect("a bound"), b[1].as_i64().expect("a bound"))).collect();
            for (cell, classes) in &by_tensor[name] {
                let common =
                    cell.bounds.iter().zip(&sent).map(|(c, s)| (c.1.min(s.1) - c.0.max(s.0)).max(0)).product::<i64>() as u64;
                if let Some(&class) = classes.get(&r).filter(|_| common > 0) {
                    egress.sent(class, from, common * case.tensors[cell.tensor].item() as u64);
                }
            }
        }
    }
    let seen = egress.judge().unwrap_or_else(|e| panic!("{e}"));
    seen.others.iter().for_each(|(_, text)| println!("{text}"));
    let share = seen.asserted as f64 / seen.all as f64;
    println!("egress asserted for {:.1} % of {} bytes in {} classes", 100.0 * share, seen.all, seen.classes);
    assert!(share >= least, "only {} of {} bytes are in classes that are asserted", seen.asserted, seen.all);
}

/// All ranks together are not much slower than the busiest alone.
fn assert_rounds(plans: &[(Value, Vec<Value>)], alike: bool) {
    let mut transfers = Vec::new();
    for (from, (plan, _)) in plans.iter().enumerate() {
        let size = number(plan, "message_bytes");
        transfers.extend(list(plan, "peers").iter().map(|peer| {
            let (bytes, messages) = (number(peer, "sent"), number(peer, "messages_out"));
            Transfer { from, to: number(peer, "rank") as usize, bytes, messages, size }
        }));
    }
    let rounds = Rounds::new(plans.len(), &transfers);
    println!("rounds: {:.3} in {} rounds; senders' peers and bytes {:?}", rounds.figure, rounds.count, rounds.senders);
    assert_eq!(rounds.alike, alike, "whether the sending ranks are alike: {:?}", rounds.senders);
    rounds.judge().unwrap_or_else(|e| panic!("{e}"));
}
