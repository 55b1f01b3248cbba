//! Syncs of four layers of Llama-3.1-8B, as ratios to memcpy of the same bytes in the same run: `cargo bench --bench sync`.
//!
//! `local`: two source processes (PP 2: two layers each) and two target processes (TP 2), so that all bytes cross processes. Row cuts
//! are long runs; column cuts (o_proj, down_proj) are rows of 4 and 14 KiB. Baseline: as many processes as there are targets, each
//! copying as many bytes at the same time, with one memcpy a run. `loopback`: one process, TP 4 -> TP 2, two threads.
//!
//! RESHARD_BENCH_REPEATS: syncs of each kind (7). Medians.

mod model;

use model::{Cut, Side};
use reshard::abi::*;
use reshard::comm::local::{Force, join};
use reshard::comm::{Comm, Deadline, loopback};
use reshard::container::{Config, Container, Sync};
use reshard::device::Mem;
use reshard::layout::Layout;
use std::process::Command;
use std::sync::Arc;
use std::time::{Duration, Instant};

const MINUTE: Duration = Duration::from_secs(60);

/// Page-aligned memory, written once. `shared`: memory that peers of the host can map.
fn memory(bytes: usize, shared: bool, fill: u8) -> Mem {
    let mut data = std::ptr::null_mut();
    if shared {
        // SAFETY: `data` is an output.
        assert_eq!(unsafe { reshard::ffi::api::rs_mem_alloc(bytes as u64, 0, &mut data) }, RS_OK);
    } else {
        let layout = std::alloc::Layout::from_size_align(bytes, 4096).expect("a size");
        // SAFETY: not of size 0.
        data = unsafe { std::alloc::alloc(layout) }.cast();
    }
    assert!(!data.is_null());
    // SAFETY: `bytes` bytes were just allocated, and are never freed.
    unsafe {
        std::ptr::write_bytes(data.cast::<u8>(), fill, bytes);
        Mem::new(data.cast(), bytes)
    }
}

fn container(comm: Arc<dyn Comm>, side: &Side, mems: Vec<Mem>) -> Container {
    let rows = side.buffers(&mems);
    let layout = Layout::new(&side.tensors, &rows, &side.tiles).expect("a layout");
    let config = Config {
        label: String::new(),
        device: None,
        host_id: None,
        relays: false,
        staging: 256 << 20,
        staging_at: None,
        threads: 1,
        timeout: MINUTE,
        comm: Some(comm),
    };
    let mut out = Container::new(config, layout, mems, None).expect("a container");
    out.connect().expect("connects");
    out
}

fn repeats() -> usize {
    std::env::var("RESHARD_BENCH_REPEATS").ok().map_or(7, |v| v.parse().expect("a number"))
}

fn median(mut v: Vec<f64>) -> f64 {
    v.sort_by(f64::total_cmp);
    v[v.len() / 2]
}

/// The most bytes that this process has had in memory.
fn peak() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").expect("reads");
    let line = status.lines().find_map(|l| l.strip_prefix("VmHWM:")).expect("a peak");
    line.trim().trim_end_matches(" kB").parse::<u64>().expect("a number") * 1024
}

/// Seconds until the last rank is done with `work`, all starting together.
fn together(comm: &dyn Comm, work: impl FnOnce()) -> f64 {
    let deadline = Deadline::after(MINUTE);
    comm.allgather(&[0; 8], deadline).expect("gathers");
    let begun = Instant::now();
    work();
    let own = begun.elapsed().as_secs_f64();
    let all = comm.allgather(&own.to_le_bytes(), deadline).expect("gathers");
    all.chunks_exact(8).map(|b| f64::from_le_bytes(b.try_into().expect("8 bytes"))).fold(0.0, f64::max)
}

/// One memcpy a run, as many bytes as a target rank gets in a sync of these tensors.
struct Baseline {
    from: Mem,
    to: Mem,
    runs: Vec<(usize, usize, usize)>,
}

impl Baseline {
    fn copy(&self) {
        for &(from, to, len) in &self.runs {
            // SAFETY: `model` lays the runs out inside the two blocks, which nobody else uses.
            unsafe {
                let from = (self.from.addr() as *const u8).add(from);
                std::ptr::copy_nonoverlapping(from, (self.to.addr() as *mut u8).add(to), len);
            }
        }
    }
}

/// One process of the `local` bench.
fn rank(rank: u32, name: &str, force: Option<Force>, shared: bool) {
    let comm = join(name, rank, 4, MINUTE, force).expect("joins");
    // Timed apart, so that a rank's barrier is not part of what is measured.
    let clock = join(&format!("{name}-clock"), rank, 4, MINUTE, None).expect("joins");
    let side = if rank < 2 { model::pipeline_stage(rank, 2) } else { model::tensor_parallel(rank - 2, 2, RS_TARGET) };
    let mems = side.bytes().into_iter().map(|n| memory(n, shared, rank as u8)).collect();
    let own: usize = side.bytes().iter().sum();
    let mut c = container(comm, &side, mems);
    let mut version = 1;
    assert!(c.sync(&Sync { version, ..Sync::default() }, &mut |_, _| {}).expect("syncs"));
    let above = (peak() - own as u64).to_le_bytes();
    let above = clock.allgather(&above, Deadline::after(MINUTE)).expect("gathers");
    let above = above.chunks_exact(8).map(|b| u64::from_le_bytes(b.try_into().expect("8 bytes"))).max();
    if let (0, false, Some(above)) = (rank, shared, above) {
        println!("peak memory of a rank above its parameters: {:.1} MB (staging bound 268 MB)", above as f64 / 1e6);
    }
    for cut in [Cut::Rows, Cut::Columns] {
        let names = model::names(cut);
        let (total, runs) = model::runs(cut, 2);
        let block = model::span(&runs);
        let base = (rank >= 2).then(|| Baseline { from: memory(block.0, false, 1), to: memory(block.1, false, 2), runs });
        let (mut syncs, mut copies) = (vec![], vec![]);
        for i in 0..=repeats() {
            version += 1;
            let request = Sync { version, only: Some(names.clone()), ..Sync::default() };
            let sync = together(&*clock, || assert!(c.sync(&request, &mut |_, _| {}).expect("syncs")));
            let copy = together(&*clock, || {
                if let Some(b) = &base {
                    b.copy();
                }
            });
            // The first time touches pages.
            if i > 0 {
                syncs.push(sync);
                copies.push(copy);
            }
        }
        if rank == 0 {
            let (sync, copy) = (median(syncs), median(copies));
            let gb = total as f64 / 1e9;
            println!(
                "local {:>7} {:>7} {:>7}  {gb:.2} GB  sync {:5.2} GB/s  memcpy {:5.2} GB/s  ratio {:.2}",
                match force {
                    Some(Force::Read) => "read",
                    Some(Force::Ring) => "ring",
                    None => "default",
                },
                if shared { "shared" } else { "private" },
                if matches!(cut, Cut::Rows) { "rows" } else { "columns" },
                gb / sync,
                gb / copy,
                copy / sync
            );
        }
    }
}

/// One process, TP 4 -> TP 2 over loopback: two target threads copy.
fn one_process() {
    const HUB: u64 = 0x5EED;
    let (total, _) = model::runs(Cut::Rows, 1);
    let (more, _) = model::runs(Cut::Columns, 1);
    let total = total + more;
    let mut syncs = vec![];
    let mut copies = vec![];
    std::thread::scope(|scope| {
        let threads: Vec<_> = (0..6)
            .map(|r| {
                scope.spawn(move || {
                    let comm = loopback::join(HUB, r, 6).expect("joins");
                    let clock = loopback::join(HUB + 1, r, 6).expect("joins");
                    let side =
                        if r < 4 { model::tensor_parallel(r, 4, RS_SOURCE) } else { model::tensor_parallel(r - 4, 2, RS_TARGET) };
                    let mems = side.bytes().into_iter().map(|n| memory(n, false, r as u8)).collect();
                    let mut c = container(comm, &side, mems);
                    let base = (r >= 4).then(|| Baseline {
                        from: memory(total / 2, false, 1),
                        to: memory(total / 2, false, 2),
                        runs: vec![(0, 0, total / 2)],
                    });
                    let mut times = vec![];
                    for i in 0..=repeats() {
                        let request = Sync { version: i as u64 + 1, ..Sync::default() };
                        let sync = together(&*clock, || assert!(c.sync(&request, &mut |_, _| {}).expect("syncs")));
                        let copy = together(&*clock, || {
                            if let Some(b) = &base {
                                b.copy();
                            }
                        });
                        if i > 0 {
                            times.push((sync, copy));
                        }
                    }
                    times
                })
            })
            .collect();
        for (r, t) in threads.into_iter().enumerate() {
            let times = t.join().expect("a rank");
            if r == 0 {
                (syncs, copies) = times.into_iter().unzip();
            }
        }
    });
    let (sync, copy, gb) = (median(syncs), median(copies), total as f64 / 1e9);
    println!(
        "loopback 4 -> 2 ranks, whole model  {gb:.2} GB  sync {:5.2} GB/s  memcpy {:5.2} GB/s  ratio {:.2}",
        gb / sync,
        gb / copy,
        copy / sync
    );
}

fn main() {
    if let Ok(spec) = std::env::var("RESHARD_BENCH_RANK") {
        let f: Vec<&str> = spec.split(',').collect();
        let force = match f[2] {
            "read" => Some(Force::Read),
            "ring" => Some(Force::Ring),
            _ => None,
        };
        return rank(f[0].parse().expect("rank"), f[1], force, f[3] == "shared");
    }
    if std::env::var("RESHARD_BENCH_LOOPBACK").is_ok() {
        return one_process();
    }
    let me = std::env::current_exe().expect("this program");
    for (i, (force, kind)) in
        [("default", "shared"), ("default", "private"), ("read", "private"), ("ring", "private")].iter().enumerate()
    {
        let name = format!("bench-{}-{i}", std::process::id());
        let spec = |r: u32| format!("{r},{name},{force},{kind}");
        let ranks: Vec<_> = (0..4).map(|r| Command::new(&me).env("RESHARD_BENCH_RANK", spec(r)).spawn().expect("starts")).collect();
        for mut r in ranks {
            assert!(r.wait().expect("waits").success());
        }
    }
    let mut one = Command::new(&me).env("RESHARD_BENCH_LOOPBACK", "1").spawn().expect("starts");
    assert!(one.wait().expect("waits").success());
}
