//! Figures of plans for real models: wire bytes at the lower bound, egress even among replicas, rounds without idle ranks.
//!
//! Only tables are real: every rank is a thread, its parameters are reserved addresses that nobody can touch, and planning does not.

#[allow(dead_code)] // The other test uses the rest.
mod oracle;

mod shapes;

use oracle::library::{Comm, Container, Tables};
use oracle::model::Case;
use reshard::abi::{RS_SOURCE, RS_TARGET};
use serde_json::Value;
use shapes::{Megatron, Model, VLlm, world};
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::atomic::{AtomicU64, Ordering};

/// Boxes smaller than this times the number of their replicas are not cut among them.
const CUT: u64 = 256 * 1024;

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

/// Replicas of a box that serve the same targets in one tier.
#[derive(Default)]
struct Class {
    bytes: u64,
    small: u64,
    egress: BTreeMap<usize, u64>,
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
            let tables = Tables::new(case, rank, |b| reserved[r].address(rank, b));
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

/// Within each class every replica sends the same, within a twentieth.
fn assert_egress(case: &Case, cells: &[Cell], plans: &[(Value, Vec<Value>)], least: f64) {
    let host = |r: &usize| case.ranks[*r].host;
    let mut classes: HashMap<(Vec<usize>, Vec<usize>), Class> = HashMap::new();
    let mut by_tensor: HashMap<&str, Vec<&Cell>> = HashMap::new();
    // The ranks that send a cell to a target, and those that they also send it to.
    let class = |cell: &Cell, target: usize| {
        let tier = |t: &usize| -> Vec<usize> {
            let near: Vec<usize> = cell.holders.iter().copied().filter(|h| host(h) == host(t)).collect();
            if near.is_empty() { cell.holders.iter().copied().collect() } else { near }
        };
        let senders = tier(&target);
        let served = cell.wanting.iter().copied().filter(|t| tier(t) == senders).collect::<Vec<_>>();
        (senders, served)
    };
    for cell in cells {
        by_tensor.entry(&case.tensors[cell.tensor].name).or_default().push(cell);
        for &target in &cell.wanting {
            let key = class(cell, target);
            let small = cell.bytes < key.0.len() as u64 * CUT;
            let entry = classes.entry(key).or_default();
            entry.bytes += cell.bytes;
            entry.small += if small { cell.bytes } else { 0 };
        }
    }
    for (r, (_, params)) in plans.iter().enumerate() {
        for entry in params.iter().flat_map(|p| list(p, "boxes")) {
            let (from, name) = (number(entry, "from") as usize, entry["tensor"].as_str().expect("a name"));
            let sent: Vec<(i64, i64)> =
                list(entry, "box").iter().map(|b| (b[0].as_i64().expect("a bound"), b[1].as_i64().expect("a bound"))).collect();
            for cell in by_tensor[name].iter().filter(|c| c.wanting.contains(&r)) {
                let common =
                    cell.bounds.iter().zip(&sent).map(|(c, s)| (c.1.min(s.1) - c.0.max(s.0)).max(0)).product::<i64>() as u64;
                if common > 0 {
                    let egress = &mut classes.get_mut(&class(cell, r)).expect("counted above").egress;
                    *egress.entry(from).or_default() += common * case.tensors[cell.tensor].item() as u64;
                }
            }
        }
    }
    let (mut all, mut asserted) = (0, 0);
    for ((senders, served), class) in &classes {
        let mean = class.bytes as f64 / senders.len() as f64;
        let most = class.egress.values().copied().max().unwrap_or(0) as f64;
        assert_eq!(
            class.egress.values().sum::<u64>(),
            class.bytes,
            "every byte of {senders:?} to {served:?} is sent by one of them"
        );
        assert!(class.egress.keys().all(|s| senders.contains(s)), "{:?} send what {senders:?} have nearer", class.egress);
        all += class.bytes;
        if senders.len() <= 16 && class.small * 100 < class.bytes {
            asserted += class.bytes;
            assert!(most <= 1.05 * mean, "{senders:?} to {served:?}: the busiest sends {most} bytes, the mean is {mean}");
        } else {
            println!(
                "egress of {senders:?} to {served:?}: {:.3} of the mean, {} bytes, {} small",
                most / mean,
                class.bytes,
                class.small
            );
        }
    }
    println!("egress asserted for {:.1} % of {all} bytes in {} classes", 100.0 * asserted as f64 / all as f64, classes.len());
    assert!(asserted as f64 >= least * all as f64, "only {asserted} of {all} bytes are in classes that are asserted");
}

/// All ranks together are not much slower than the busiest alone.
fn assert_rounds(plans: &[(Value, Vec<Value>)], alike: bool) {
    let (mut rounds, mut totals): (Vec<Vec<[u64; 2]>>, Vec<[u64; 2]>) = (Vec::new(), vec![[0; 2]; plans.len()]);
    let (mut peers, mut senders) = (Vec::new(), Vec::new());
    for (r, (plan, _)) in plans.iter().enumerate() {
        let size = number(plan, "message_bytes");
        for peer in list(plan, "peers") {
            let (to, mut left, messages) = (number(peer, "rank") as usize, number(peer, "sent"), number(peer, "messages_out"));
            for k in 0..messages as usize {
                let bytes = if k + 1 == messages as usize { left } else { size.min(left) };
                left -= bytes;
                rounds.resize(rounds.len().max(k + 1), vec![[0; 2]; plans.len()]);
                for (at, way) in [(r, 0), (to, 1)] {
                    rounds[k][at][way] += bytes;
                    totals[at][way] += bytes;
                }
            }
        }
        let out = list(plan, "peers").iter().filter(|p| number(p, "sent") > 0).count();
        if out > 0 {
            peers.push(out as f64);
            senders.push(number(&plan["bytes"], "sent") as f64);
        }
    }
    let busiest = |round: &Vec<[u64; 2]>| round.iter().map(|r| r[0].max(r[1])).max().unwrap_or(0);
    let figure = rounds.iter().map(busiest).sum::<u64>() as f64 / busiest(&totals) as f64;
    let even = |all: &[f64]| all.iter().all(|x| all.iter().all(|y| *x <= 1.1 * y));
    println!("rounds: {figure:.3} in {} rounds; senders' peers {peers:?}, bytes {senders:?}", rounds.len());
    assert_eq!(even(&peers) && even(&senders), alike, "whether the sending ranks are alike: peers {peers:?}, bytes {senders:?}");
    assert!(!alike || figure <= 1.25, "the rounds take {figure} times the busiest rank's own time");
}
