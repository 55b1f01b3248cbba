//! How fast one rank adds up what it holds, next to memcpy of the same bytes in the same run, and what RS_SYNC_VERIFY costs.
//!
//! `cargo bench --bench fingerprint`. A line for each way in which a tensor of 256 MiB lies: GB/s of memcpy by one thread, and the ratio of
//! rs_fingerprint() to it with one and with two threads; medians over rounds that run all columns in turn. Then the time of a verified sync
//! of such a tensor between two ranks, threads with memory of their own, over that of a plain one in the same round.

use reshard::abi::*;
use reshard::comm::{Comm, loopback};
use reshard::container::{Config, Container, Sync};
use reshard::device::Mem;
use reshard::layout::{BufferRow, Layout, TensorRow, TileRow};
use std::hint::black_box;
use std::sync::Arc;
use std::time::{Duration, Instant};

const BYTES: usize = 256 << 20;
const ROUNDS: usize = 7;

const BF16: rs_dtype_t = rs_dtype_t { code: 4, bits: 16, lanes: 1 };
const FP32: rs_dtype_t = rs_dtype_t { code: 2, bits: 32, lanes: 1 };

/// A buffer that holds one box of the tensor, whose elements lie `stride` apart in it.
struct Shard {
    dtype: rs_dtype_t,
    role: u32,
    origin: Vec<i64>,
    extent: Vec<i64>,
    stride: Vec<i64>,
}

fn source(origin: &[i64], extent: &[i64], stride: &[i64]) -> Shard {
    Shard { dtype: BF16, role: RS_SOURCE, origin: origin.into(), extent: extent.into(), stride: stride.into() }
}

/// Ways to hold a tensor of a shape.
fn cases() -> Vec<(&'static str, Vec<i64>, Vec<Shard>)> {
    let (n, m) = (16_384, 8192);
    let half = m / 2;
    let cast = |dtype, role| Shard { dtype, role, ..source(&[0, 0], &[half, n], &[n, 1]) };
    vec![
        ("whole", vec![n, m], vec![source(&[0, 0], &[n, m], &[m, 1])]),
        (
            "two halves of each row, of 8 KiB",
            vec![n, m],
            vec![source(&[0, 0], &[n, half], &[half, 1]), source(&[0, half], &[n, half], &[half, 1])],
        ),
        ("rows of 256 bytes", vec![n, 64, 128], (0..64).map(|i| source(&[0, i, 0], &[n, 1, 128], &[128, 0, 1])).collect()),
        ("transposed", vec![n, m], vec![source(&[0, 0], &[n, m], &[1, n])]),
        ("every second element", vec![n, half, 2], (0..2).map(|i| source(&[0, 0, i], &[n, half, 1], &[half, 1, 0])).collect()),
        ("fp32 of bf16 targets", vec![half, n], vec![cast(FP32, RS_SOURCE), cast(BF16, RS_TARGET)]),
    ]
}

fn pad(values: &[i64]) -> [i64; RS_MAX_RANK] {
    let mut out = [0; RS_MAX_RANK];
    out[..values.len()].copy_from_slice(values);
    out
}

/// A rank that holds these; the memory lives as long.
fn container(comm: Arc<dyn Comm>, threads: usize, shape: &[i64], shards: &[Shard], memory: &mut [Vec<u8>]) -> Container {
    let (mut buffers, mut tiles, mut mems) = (vec![], vec![], vec![]);
    for (row, (shard, memory)) in shards.iter().zip(memory).enumerate() {
        // SAFETY: the memory outlives the container, and nobody touches it meanwhile.
        let mem = unsafe { Mem::new(memory.as_mut_ptr(), memory.len()) };
        let elements = shard.extent.iter().product();
        buffers.push(BufferRow {
            name: format!("shard {row}"),
            addr: mem.addr() as u64,
            bytes: mem.len() as u64,
            device_type: RS_DEVICE_CPU,
            device_id: 0,
            role: shard.role,
            flags: 0,
            dtype: shard.dtype,
            shape: vec![elements],
            strides: vec![1],
        });
        tiles.push(TileRow {
            tensor: 0,
            buffer: row as u32,
            rank: shape.len() as u32,
            transform: 0,
            byte_offset: 0,
            view: pad(shape),
            origin: pad(&shard.origin),
            extent: pad(&shard.extent),
            stride: pad(&shard.stride),
        });
        mems.push(mem);
    }
    let layout = Layout::new(&[TensorRow { name: "w".into(), shape: shape.to_vec() }], &buffers, &tiles).expect("a layout");
    let config = Config {
        label: String::new(),
        device: None,
        host_id: None,
        relays: false,
        staging: 1 << 20,
        staging_at: None,
        threads,
        timeout: Duration::from_secs(60),
        comm: Some(comm),
    };
    let mut out = Container::new(config, layout, mems, None).expect("a container");
    out.connect().expect("connects");
    out
}

fn median(mut times: Vec<f64>) -> f64 {
    times.sort_by(f64::total_cmp);
    times[times.len() / 2]
}

fn main() {
    println!("{:34} {:>12} {:>10} {:>10}", "256 MiB, lying", "memcpy GB/s", "1 thread", "2 threads");
    let (from, mut to) = (vec![1u8; BYTES], vec![0u8; BYTES]);
    for (i, (name, shape, shards)) in (1..).zip(cases()) {
        let bytes = |s: &Shard| s.extent.iter().product::<i64>() as usize * usize::from(s.dtype.bits) / 8;
        let mut memory: Vec<Vec<u8>> = shards.iter().map(|s| (0..bytes(s)).map(|at| (at * 7) as u8).collect()).collect();
        let alone = |threads: u64| loopback::join(10 * i + threads, 0, 1).expect("a rank alone");
        let mut ranks = [1, 2].map(|threads| container(alone(threads), threads as usize, &shape, &shards, &mut memory));
        let mut times = [vec![], vec![], vec![]];
        for _ in 0..ROUNDS {
            let mut timed = |column: usize, run: &mut dyn FnMut()| {
                let begun = Instant::now();
                run();
                times[column].push(begun.elapsed().as_secs_f64());
            };
            timed(0, &mut || black_box(&mut to[..]).copy_from_slice(black_box(&from)));
            for (column, rank) in ranks.iter_mut().enumerate() {
                timed(1 + column, &mut || {
                    black_box(rank.fingerprint(RS_SOURCE, None).expect("a number"));
                });
            }
        }
        let [memcpy, one, two] = times.map(median);
        println!("{name:34} {:12.2} {:10.2} {:10.2}", BYTES as f64 / 1e9 / memcpy, memcpy / one, memcpy / two);
    }
    let shape = [16_384, 8192];
    for (name, target) in [("whole", source(&[0, 0], &shape, &[8192, 1])), ("transposed", source(&[0, 0], &shape, &[1, 16_384]))] {
        let shards = [source(&[0, 0], &shape, &[8192, 1]), Shard { role: RS_TARGET, ..target }];
        println!("verified over plain sync, {name}: {:.2}", verified(if name == "whole" { 1 } else { 2 }, &shape, shards));
    }
}

/// The time of a verified sync over that of a plain one.
fn verified(hub: u64, shape: &[i64], shards: [Shard; 2]) -> f64 {
    let rank = |number: u32, shard: Shard| {
        let mut memory = [vec![number as u8; BYTES]];
        let mut rank = container(loopback::join(hub, number, 2).expect("a hub"), 1, shape, &[shard], &mut memory);
        let mut times = [vec![], vec![]];
        for round in 0..2 * ROUNDS as u64 + 2 {
            let verify = round % 2 == 1;
            let begun = Instant::now();
            rank.sync(&Sync { version: 1 + round, verify, ..Sync::default() }, &mut |_, _| {}).expect("lands");
            // The first of each touches memory for the first time.
            if round >= 2 {
                times[usize::from(verify)].push(begun.elapsed().as_secs_f64());
            }
        }
        let [plain, verified] = times.map(median);
        verified / plain
    };
    let [source, target] = shards;
    std::thread::scope(|scope| {
        scope.spawn(|| rank(0, source));
        rank(1, target)
    })
}
