//! Plans of small random worlds: both ends agree, and every element that a rank lacks comes to it once.
use super::facts::{classes, facts, plan};
use super::*;
use crate::layout::{Tensor, Tile};
use crate::wire::{Table, TableBuffer};
use std::collections::BTreeMap;

const ROWS: u64 = 12;
const COLS: u64 = 20;

fn tile(buffer: u32, rows: (u64, u64), cols: (u64, u64), turned: bool) -> Tile {
    let (nr, nc) = (rows.1 - rows.0, cols.1 - cols.0);
    let (r, c) = if turned { (1, nr) } else { (nc, 1) };
    let axes = [Axis { extent: nr, key: COLS, val: r }, Axis { extent: nc, key: 1, val: c }];
    let key = rows.0 * COLS + cols.0;
    Tile { tensor: 0, buffer, pattern: Pattern { key, val: 0, axes: axes.into_iter().collect() }.coalesce(), transform: 0 }
}

fn range(rng: &mut fastrand::Rng, n: u64) -> (u64, u64) {
    let lo = rng.u64(0..n);
    (lo, rng.u64(lo + 1..=n))
}

fn world(rng: &mut fastrand::Rng) -> (Vec<Table>, Vec<Place>) {
    let tensors = vec![Tensor { name: "w".into(), shape: vec![ROWS, COLS], elements: ROWS * COLS }];
    let mut tables = vec![];
    for rank in 0..rng.u32(2..7) {
        let mut t = Table { tensors: tensors.clone(), buffers: vec![], tiles: vec![] };
        // Rank 0 holds everything, so that nothing is missing.
        for i in 0..rng.u32(u32::from(rank == 0)..4) {
            let whole = rank == 0 && i == 0;
            let (rows, cols) = if whole { ((0, ROWS), (0, COLS)) } else { (range(rng, ROWS), range(rng, COLS)) };
            let role = if whole { 1 } else { rng.u32(1..3) };
            t.buffers.push(TableBuffer { name: format!("b{i}"), role, dtype: (4, 16) });
            t.tiles.push(tile(i, rows, cols, rng.bool()));
        }
        tables.push(t);
    }
    let places = tables.iter().map(|_| Place { host: rng.u64(1..3), device: [rng.u64(0..2), 0], relays: rng.bool() }).collect();
    (tables, places)
}

/// Logical numbers of a piece's elements with their offsets at both ends.
fn elements(p: &Piece) -> Vec<(u64, u64, u64)> {
    let mut out = vec![(p.key, p.src.offset, p.dst.offset)];
    for a in &p.axes {
        out = out.iter().flat_map(|&(k, s, d)| (0..a.extent).map(move |i| (k + i * a.key, s + i * a.src, d + i * a.dst))).collect();
    }
    out
}

fn of_tile(t: &Tile) -> BTreeMap<u64, u64> {
    let mut out = vec![(t.pattern.key, t.pattern.val)];
    for a in &t.pattern.axes {
        out = out.iter().flat_map(|&(k, v)| (0..a.extent).map(move |i| (k + i * a.key, v + i * a.val))).collect();
    }
    out.into_iter().collect()
}

#[test]
fn both_ends_agree_and_nothing_crosses_twice() {
    let mut rng = fastrand::Rng::with_seed(2);
    let (mut crossed, mut doubled) = (0, 0);
    for _ in 0..400 {
        let (tables, places) = world(&mut rng);
        let plans: Vec<Plan> = (0..tables.len() as u32)
            .map(|me| plan(me, &places, 1 << 20, &facts(me, &tables, &classes(9)).unwrap().1).unwrap())
            .collect();
        for (a, plan) in plans.iter().enumerate() {
            for peer in &plan.peers {
                let back = plans[peer.rank as usize].peers.iter().find(|p| p.rank == a as u32).expect("the other end knows");
                assert_eq!((&peer.out, &peer.into), (&back.into, &back.out));
            }
            // Element by element: what arrives, from where it truly lies, to where it truly belongs.
            let own = |role: u32| {
                let t = &tables[a];
                t.tiles.iter().filter(move |x| t.buffers[x.buffer as usize].role & role != 0)
            };
            let held: Vec<u64> = own(1).flat_map(of_tile).map(|e| e.0).collect();
            let mut got: BTreeMap<u64, u32> = BTreeMap::new();
            let mut written: Vec<(u32, u64)> = vec![];
            for (from, p) in plan.peers.iter().flat_map(|peer| peer.into.iter().map(move |p| (peer.rank, p))) {
                let src = &tables[from as usize].tiles[p.src.buffer as usize];
                let dst = &tables[a].tiles[p.dst.buffer as usize];
                for (k, s, d) in elements(p) {
                    assert_eq!((of_tile(src)[&k], of_tile(dst)[&k]), (s, d));
                    *got.entry(k).or_default() += 1;
                    written.push((p.dst.buffer, d));
                }
            }
            assert!(got.iter().all(|(k, &n)| n == 1 && !held.contains(k)), "crossed twice, or for nothing");
            for p in &plan.doubles {
                for (k, s, d) in elements(p) {
                    assert!(written.contains(&(p.src.buffer, s)) && got.contains_key(&k), "a double of what did not land");
                    assert_eq!(of_tile(&tables[a].tiles[p.dst.buffer as usize])[&k], d);
                    written.push((p.dst.buffer, d));
                    doubled += 1;
                }
            }
            let mut want: Vec<(u32, u64)> = own(2)
                .flat_map(|t| of_tile(t).into_iter().map(|(k, v)| (k, t.buffer, v)))
                .filter(|e| !held.contains(&e.0))
                .map(|e| (e.1, e.2))
                .collect();
            crossed += got.len();
            written.sort_unstable();
            want.sort_unstable();
            assert_eq!(written, want, "every lacking element once");
        }
    }
    assert!(crossed > 10_000 && doubled > 500, "{crossed} {doubled}");
}

#[test]
fn boxes_are_shown_in_the_tensors_own_shape() {
    let p = tile(0, (2, 5), (0, 20), false).pattern;
    assert_eq!(shown(&p, &[ROWS, COLS]), "box [2:5, 0:20]");
    assert_eq!(shown(&p, &[1, ROWS, 1, COLS]), "box [0:1, 2:5, 0:1, 0:20]");
    assert_eq!(shown(&p, &[ROWS * COLS]), "box [40:100]");
    assert_eq!(shown(&tile(0, (2, 5), (1, 9), false).pattern, &[ROWS * COLS]), "24 elements from [41] to [88]");
}

#[test]
fn large_boxes_are_cut_over_replicas_in_turn() {
    let tensors = vec![Tensor { name: "w".into(), shape: vec![4096, 256], elements: 1 << 20 }];
    let whole = |role| Table {
        tensors: tensors.clone(),
        buffers: vec![TableBuffer { name: "p".into(), role, dtype: (4, 16) }],
        tiles: vec![Tile {
            tensor: 0,
            buffer: 0,
            pattern: Pattern { key: 0, val: 0, axes: [Axis { extent: 1 << 20, key: 1, val: 1 }].into_iter().collect() },
            transform: 0,
        }],
    };
    // Four sources on two hosts, a target beside two of them, one on a host of its own.
    let tables: Vec<Table> = [1, 1, 1, 1, 2, 2].map(whole).into();
    let places: Vec<Place> = [1, 1, 2, 2, 2, 3].map(|host| Place { host, device: [0, 0], relays: false }).into();
    let sent = |rank: u32, to: u32| -> u64 {
        let p = plan(rank, &places, 1 << 20, &facts(rank, &tables, &classes(6)).unwrap().1).unwrap();
        p.peers.iter().filter(|p| p.rank == to).flat_map(|p| &p.out).map(Piece::bytes).sum()
    };
    let mib = 1 << 20;
    assert_eq!([0, 1, 2, 3].map(|r| sent(r, 4)), [0, 0, mib, mib]);
    assert_eq!([0, 1, 2, 3].map(|r| sent(r, 5)), [mib / 2; 4]);
}

#[test]
fn replicas_pass_on_what_sources_send_once() {
    const MIB: u64 = 1 << 20;
    let tensors = vec![Tensor { name: "w".into(), shape: vec![2048, 1024], elements: 2 * MIB }];
    let rows = |role, rows: (u64, u64)| Table {
        tensors: tensors.clone(),
        buffers: vec![TableBuffer { name: "p".into(), role, dtype: (4, 16) }],
        tiles: vec![Tile {
            tensor: 0,
            buffer: 0,
            pattern: Pattern {
                key: rows.0 * 1024,
                val: 0,
                axes: [Axis { extent: (rows.1 - rows.0) * 1024, key: 1, val: 1 }].into_iter().collect(),
            },
            transform: 0,
        }],
    };
    // Two sources with a half each; replicas on hosts of their own, of which the last passes nothing on where there are several.
    for (replicas, relays) in [(1, true), (4, false), (4, true), (16, true)] {
        let world = 2 + replicas;
        let mut tables = vec![rows(1, (0, 1024)), rows(1, (1024, 2048))];
        tables.extend((0..replicas).map(|_| rows(2, (0, 2048))));
        let place =
            |r: usize| Place { host: r.saturating_sub(1) as u64, device: [0; 2], relays: relays && (2..world - 1).contains(&r) };
        let places: Vec<Place> = (0..world).map(place).collect();
        let classes = classes(world as u32);
        let plans: Vec<Plan> =
            (0..world as u32).map(|me| plan(me, &places, 256 * MIB, &facts(me, &tables, &classes).unwrap().1).unwrap()).collect();
        let bytes: Vec<(u64, u64)> = plans.iter().map(Plan::wire_bytes).collect();
        let copies = if relays { 1 } else { replicas as u64 };
        assert!(bytes[..2].iter().all(|b| *b == (copies * 2 * MIB, 0)), "{replicas} replicas, relays {relays}: {bytes:?}");
        assert!(bytes[2..].iter().all(|b| b.0 <= 4 * MIB && b.1 == 4 * MIB), "{replicas} replicas, relays {relays}: {bytes:?}");
        for (rank, plan) in plans.iter().enumerate() {
            for p in plan.peers.iter().flat_map(|peer| peer.out.iter().chain(&peer.into)) {
                assert!(p.stream.is_none() || p.bytes() <= route::relay_piece(256 * MIB), "rank {rank}");
            }
        }
    }
}

#[test]
fn small_boxes_go_round_the_replicas() {
    // 64 tensors too small to be cut, on 4 sources and 2 targets: which replica sends turns with the tensor and with the target.
    let tensors: Vec<Tensor> = (0..64).map(|i| Tensor { name: format!("w{i:02}"), shape: vec![100], elements: 100 }).collect();
    let whole = |role| Table {
        tensors: tensors.clone(),
        buffers: vec![TableBuffer { name: "p".into(), role, dtype: (4, 16) }],
        tiles: (0..64)
            .map(|tensor| {
                let axes = [Axis { extent: 100, key: 1, val: 1 }].into_iter().collect();
                Tile { tensor, buffer: 0, pattern: Pattern { key: 0, val: u64::from(tensor) * 100, axes }, transform: 0 }
            })
            .collect(),
    };
    let tables: Vec<Table> = [1, 1, 1, 1, 2, 2].map(whole).into();
    let places = [Place { host: 1, device: [0, 0], relays: false }; 6];
    for source in 0..4 {
        let plan = plan(source, &places, 1 << 20, &facts(source, &tables, &classes(6)).unwrap().1).unwrap();
        let sent: Vec<(u32, usize)> = plan.peers.iter().map(|p| (p.rank, p.out.len())).collect();
        assert_eq!(sent, [(4, 16), (5, 16)], "source {source}");
    }
}

#[test]
fn ten_thousand_tiles_of_one_tensor() {
    // Row by row on both sides: looked at pair by pair this would take many seconds.
    const N: u64 = 10_000;
    let tensors = vec![Tensor { name: "w".into(), shape: vec![N, 4], elements: N * 4 }];
    let rows = |role| Table {
        tensors: tensors.clone(),
        buffers: vec![TableBuffer { name: "p".into(), role, dtype: (4, 16) }],
        tiles: (0..N)
            .map(|r| {
                // Backwards in the target, so that no two rows are one box.
                let val = if role == 1 { r } else { N - 1 - r } * 8;
                let axes = [Axis { extent: 4, key: 1, val: 2 }].into_iter().collect();
                Tile { tensor: 0, buffer: 0, pattern: Pattern { key: r * 4, val, axes }, transform: 0 }
            })
            .collect(),
    };
    let tables = [rows(1), rows(2)];
    let places = [Place { host: 1, device: [0, 0], relays: false }; 2];
    let classes = classes(2);
    let (_, facts) = facts(1, &tables, &classes).unwrap();
    let plan = plan(1, &places, 1 << 20, &facts).unwrap();
    assert_eq!(plan.peers[0].into.len() as u64, N);
}
