//! How long a rank plans 100,000 of its own tiles through tables: `cargo bench --bench plan`.
//!
//! Two trainer ranks (TP 2) and two engine ranks (TP 2, cut the other way) of a model with 12,500 blocks of 8 tensors, so that every
//! rank has 100,000 tiles and every tile is met by two others. Timed on one core, without a communicator: decoding of all tables,
//! facts, plan, lists of copies.

use reshard::exec::work::{Ways, build};
use reshard::geom::{Axis, Pattern};
use reshard::layout::{Tensor, Tile};
use reshard::plan::facts::{classes, facts, plan};
use reshard::plan::local::Local;
use reshard::plan::{Place, Plan};
use reshard::wire::{Table, TableBuffer};
use std::time::Instant;

const BLOCKS: u32 = 12_500;
const ROWS: u64 = 512;
const COLS: u64 = 256;

fn table(role: u32, half: u64, by_rows: bool) -> Table {
    let mut t = Table { tensors: vec![], buffers: vec![], tiles: vec![] };
    for block in 0..BLOCKS {
        for i in 0..8 {
            let name = format!("model.layers.{block}.mlp.experts.{i}.down_proj.weight");
            let id = t.tensors.len() as u32;
            t.tensors.push(Tensor { name: name.clone(), shape: vec![ROWS, COLS], elements: ROWS * COLS });
            t.buffers.push(TableBuffer { name, role, dtype: (4, 16) });
            let (rows, cols, key) =
                if by_rows { (ROWS / 2, COLS, half * ROWS / 2 * COLS) } else { (ROWS, COLS / 2, half * COLS / 2) };
            let axes = [Axis { extent: rows, key: COLS, val: cols }, Axis { extent: cols, key: 1, val: 1 }];
            let pattern = Pattern { key, val: 0, axes: axes.into_iter().collect() }.coalesce();
            t.tiles.push(Tile { tensor: id, buffer: id, pattern, transform: 0 });
        }
    }
    t
}

fn main() {
    let tables = [table(1, 0, true), table(1, 1, true), table(2, 0, false), table(2, 1, false)];
    let blobs: Vec<Vec<u8>> = (0..).zip(&tables).map(|(r, t)| t.encode(r).expect("encodes")).collect();
    let places = vec![Place { host: 1, device: [0, 0], relays: false }; 4];
    let classes = classes(4);
    let mut seconds = vec![];
    let mut bytes = 0;
    for _ in 0..5 {
        let begun = Instant::now();
        let tables: Vec<Table> = blobs.iter().map(|b| Table::decode(b).expect("decodes").1).collect();
        let decoded = begun.elapsed().as_secs_f64();
        let (_, facts) = facts(2, &tables, &classes).expect("facts");
        let plan: Plan = plan(2, &places, 256 << 20, &facts).expect("plan");
        let planned = begun.elapsed().as_secs_f64();
        let ways = Ways { reads: None, direct: &|_| true, message: 1 << 20, scatters: false };
        let work = build(&plan, &Local::default(), &|_| true, &|_| true, &ways);
        bytes = work.bytes.received;
        seconds.push((begun.elapsed().as_secs_f64(), decoded, planned - decoded));
    }
    assert_eq!(bytes, u64::from(BLOCKS) * 8 * ROWS * COLS / 2 * 2);
    seconds.sort_by(|a, b| a.0.total_cmp(&b.0));
    let (all, decode, plan) = seconds[seconds.len() / 2];
    println!(
        "100,000 tiles on each of 4 ranks, tables of {:.1} MB: decode {decode:.3} s, facts and plan {plan:.3} s, lists of copies \
         {:.3} s, in all {all:.3} s (median of 5)",
        blobs[0].len() as f64 / 1e6,
        all - decode - plan
    );
}
