//! How fast the host device copies, next to memcpy of the same bytes in the same run.
//!
//! `cargo bench --bench copy [-- WORDS]` runs the cases whose name contains one of the words. For each case a table line per number of threads,
//! each thread with memory of its own, pages touched: memcpy of the bytes in one piece; memcpy row by row where the case has rows;
//! the device; the device without AVX2. Figures are GB/s of payload, all threads together, and the ratios to the first column: medians over
//! rounds that run all columns in turn, so that a busy machine slows all alike.

use reshard::convert::{Convert, Float};
use reshard::device::host::HostDevice;
use reshard::device::{CopyNow, Job, Mem};
use reshard::geom::StridedCopy;
use std::sync::Barrier;
use std::time::Instant;

/// Payload of a case and thread.
const BYTES: usize = 256 << 20;
/// Rounds per case.
const ROUNDS: usize = 7;

/// What a case copies.
struct Case {
    name: String,
    /// All of `BYTES`, from and to the begin of each block; or of one slot, in turn over the whole of the other side.
    copy: StridedCopy,
    slot: Slot,
}

/// Whether one side is a small buffer that is used again and again.
#[derive(Clone, Copy, PartialEq)]
enum Slot {
    None,
    /// It is the source: an arrived message.
    Source,
    /// It is the target: a message to send.
    Target,
}

/// One thread's memory.
struct Memory {
    src: Mem,
    dst: Mem,
}

/// Pages of 4 KiB, as a framework's allocator gives them.
fn small_pages(bytes: usize) -> Mem {
    // SAFETY: a new private mapping, never unmapped; nothing else refers to it.
    unsafe {
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
        let addr = libc::mmap(std::ptr::null_mut(), bytes, libc::PROT_READ | libc::PROT_WRITE, flags, -1, 0);
        assert!(addr != libc::MAP_FAILED);
        libc::madvise(addr, bytes, libc::MADV_NOHUGEPAGE);
        addr.cast::<u8>().write_bytes(1, bytes);
        Mem::new(addr.cast(), bytes)
    }
}

/// Elements of `item` bytes in `rows` rows of `columns`, of which the source has `pitch`.
fn rows(item: u32, rows: usize, columns: usize, pitch: usize, dst_pitch: usize) -> StridedCopy {
    StridedCopy::new(item, 0, 0, [(rows as u64, pitch as u64, dst_pitch as u64), (columns as u64, 1, 1)])
}

/// A transpose of a source of `rows` rows of `columns`.
fn turned(item: u32, rows: usize, columns: usize) -> StridedCopy {
    StridedCopy::new(item, 0, 0, [(rows as u64, columns as u64, 1), (columns as u64, 1, rows as u64)])
}

/// Megatron's grouped experts, `rows` of `columns` each, as vLLM has them.
fn experts(count: usize, rows: usize, columns: usize) -> StridedCopy {
    let (one, rows, columns) = ((rows * columns) as u64, rows as u64, columns as u64);
    StridedCopy::new(2, 0, 0, [(count as u64, one, one), (rows, columns, 1), (columns, 1, rows)])
}

/// Elements without gaps, of another type on either side.
fn cast(from: Float, to: Float) -> StridedCopy {
    StridedCopy::converting(from.item(), Some(Convert { from, to, add: 0 }), 0, 0, [(BYTES as u64 / 4, 1, 1)])
}

/// fp32 in rows of so many elements, half as many as the source has, to bf16.
fn cast_rows(columns: u64) -> StridedCopy {
    let rows = BYTES as u64 / 8 / columns;
    StridedCopy::converting(
        4,
        Some(Convert { from: Float::F32, to: Float::Bf16, add: 0 }),
        0,
        0,
        [(rows, 2 * columns, columns), (columns, 1, 1)],
    )
}

/// A transpose of fp32 to bf16.
fn cast_turned(side: u64) -> StridedCopy {
    StridedCopy::converting(
        4,
        Some(Convert { from: Float::F32, to: Float::Bf16, add: 0 }),
        0,
        0,
        [(side, side, 1), (side, 1, side)],
    )
}

fn cases() -> Vec<Case> {
    let mut cases = Vec::new();
    let mut case = |name: &str, slot, copy| cases.push(Case { name: name.to_owned(), copy, slot });
    case("dense", Slot::None, rows(2, 1, BYTES / 2, BYTES / 2, BYTES / 2));
    for run in [128, 256, 512, 1 << 10, 4 << 10, 16 << 10, 64 << 10] {
        let name = format!("rows of {run}, gathered");
        case(&name, Slot::None, rows(1, BYTES / run, run, 2 * run, run));
    }
    case("rows of 1024, scattered", Slot::None, rows(1, BYTES / 1024, 1024, 1024, 2048));
    case("column cut, o_proj TP 2 to 1", Slot::None, rows(2, BYTES / 4096, 2048, 2048, 4096));
    case("column cut, down_proj TP 2", Slot::None, rows(2, 4096, 7168, 14_336, 7168));
    case("column cut of 1152 at odd bytes", Slot::None, rows(2, BYTES / 1152, 576, 1001, 577));
    case("transpose 14336 x 4096 bf16", Slot::None, turned(2, 14_336, 4096));
    case("transpose 4096 x 14336 bf16", Slot::None, turned(2, 4096, 14_336));
    case("transpose 4096 x 4096 bf16", Slot::None, turned(2, 4096, 4096));
    case("transpose 131072 x 576 bf16", Slot::None, turned(2, 131_072, 576));
    case("transpose 5001 x 4099 bf16", Slot::None, turned(2, 5001, 4099));
    case("transpose 4096 x 4096 f32", Slot::None, turned(4, 4096, 4096));
    case("transpose 4096 x 4096 fp8", Slot::None, turned(1, 4096, 4096));
    case("experts, DeepSeek-V3's weight1 to w13", Slot::None, experts(4, 7168, 4096));
    case("experts, DeepSeek-V3's weight2 to w2", Slot::None, experts(9, 2048, 7168));
    case("experts, Qwen3-30B-A3B's weight1 to w13", Slot::None, experts(42, 2048, 1536));
    case("experts, Qwen3-30B-A3B's weight2 to w2", Slot::None, experts(85, 768, 2048));
    case("cast fp32 to bf16", Slot::None, cast(Float::F32, Float::Bf16));
    case("cast bf16 to fp32", Slot::None, cast(Float::Bf16, Float::F32));
    case("cast fp32 to bf16, rows of 4 elements", Slot::None, cast_rows(4));
    case("cast fp32 to bf16, rows of 576 elements", Slot::None, cast_rows(576));
    case("cast fp32 to bf16, 8192 x 8192 transposed", Slot::None, cast_turned(8192));
    case("cast fp32 to fp16", Slot::None, cast(Float::F32, Float::F16));
    for slot in [256 << 10, 1 << 20] {
        for (name, side) in [("unpack from", Slot::Source), ("pack to", Slot::Target)] {
            let kib = slot >> 10;
            case(&format!("{name} a hot slot of {kib} KiB, dense"), side, rows(1, 1, slot, slot, slot));
            let (from, to) = if side == Slot::Source { (1, 2) } else { (2, 1) };
            for run in [1 << 10, 4 << 10] {
                let copy = rows(1, slot / run, run, from * run, to * run);
                case(&format!("{name} a hot slot of {kib} KiB, rows of {run}"), side, copy);
            }
        }
    }
    case("unpack from a hot slot of 256 KiB, transposed bf16", Slot::Source, turned(2, 32, 4096));
    cases
}

/// Ways to copy.
#[derive(Clone, Copy)]
enum Way<'a> {
    Memcpy,
    Loop,
    Device(&'a HostDevice),
}

impl Case {
    /// Where repetition `i` reads and writes.
    fn place(&self, memory: &Memory, i: usize) -> (Mem, Mem) {
        let (from, to) = (self.copy.src_end() as usize, self.copy.dst_end() as usize);
        let at = |mem: Mem, len: usize, moves: bool| mem.cut(if moves { i * len } else { 0 }, len).expect("memory is large enough");
        (at(memory.src, from, self.slot == Slot::Target), at(memory.dst, to, self.slot == Slot::Source))
    }

    fn repeats(&self) -> usize {
        if self.slot == Slot::None { 1 } else { BYTES / self.copy.bytes() as usize }
    }

    fn copy(&self, memory: &Memory, way: Way<'_>) {
        let copy = &self.copy;
        for i in 0..self.repeats() {
            let (src, dst) = self.place(memory, i);
            let move_bytes = |from: usize, to: usize, bytes: usize| {
                // SAFETY: both lie in mappings of this thread alone; source and target are two of them.
                unsafe { std::ptr::copy_nonoverlapping((src.addr() + from) as *const u8, (dst.addr() + to) as *mut u8, bytes) }
            };
            match way {
                Way::Memcpy => move_bytes(0, 0, copy.bytes() as usize),
                Way::Loop => {
                    let axis = copy.axes[0];
                    for row in 0..axis.extent {
                        move_bytes((row * axis.src) as usize, (row * axis.dst) as usize, copy.run as usize);
                    }
                }
                Way::Device(device) => {
                    let job = Job::new(src, dst, copy).expect("lies inside");
                    let job = if self.slot == Slot::Target { job } else { job.streaming() };
                    device.copy(&[job], 0).expect("host copies do not fail");
                }
            }
        }
    }

    /// Seconds that `ways` take on all of `memories` at once, for each round and way.
    fn measure(&self, memories: &[Memory], ways: &[Way<'_>]) -> Vec<Vec<f64>> {
        let barrier = Barrier::new(memories.len());
        let timed = |memory: &Memory| {
            let round = |_| {
                let one = |way: &Way<'_>| {
                    barrier.wait();
                    let start = Instant::now();
                    self.copy(memory, *way);
                    barrier.wait();
                    start.elapsed().as_secs_f64()
                };
                ways.iter().map(one).collect()
            };
            (0..ROUNDS).map(round).collect::<Vec<Vec<f64>>>()
        };
        std::thread::scope(|scope| {
            let others: Vec<_> = memories[1..].iter().map(|memory| scope.spawn(|| timed(memory))).collect();
            let seconds = timed(&memories[0]);
            others.into_iter().for_each(|other| drop(other.join().expect("no panic")));
            seconds
        })
    }
}

fn median(values: impl Iterator<Item = f64>) -> f64 {
    let mut values: Vec<f64> = values.collect();
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

fn main() {
    let words: Vec<String> = std::env::args().skip(1).filter(|word| !word.starts_with('-')).collect();
    let (fast, portable) = (HostDevice::new(), HostDevice::portable());
    let memories = [0, 1].map(|_| Memory { src: small_pages(2 * BYTES + (8 << 20)), dst: small_pages(2 * BYTES + (8 << 20)) });
    println!("{:<52} thr  memcpy | rows memcpy |     device |   portable   (GB/s and ratio to memcpy)", "");
    for case in cases().iter().filter(|case| words.is_empty() || words.iter().any(|word| case.name.contains(word))) {
        let is_rows = case.copy.axes.len() == 1 && case.copy.run > 16;
        let ways = [Way::Memcpy, if is_rows { Way::Loop } else { Way::Memcpy }, Way::Device(&fast), Way::Device(&portable)];
        for threads in 1..=memories.len() {
            let seconds = case.measure(&memories[..threads], &ways);
            let bytes = (case.copy.bytes() as usize * case.repeats() * threads) as f64;
            let rate = |way: usize| median(seconds.iter().map(|round| bytes / round[way] / 1e9));
            let ratio = |way: usize| median(seconds.iter().map(|round| round[0] / round[way]));
            let cell = |way: usize| format!("{:>5.1} {:>5.2}", rate(way), ratio(way));
            let loops = if is_rows { cell(1) } else { " ".repeat(11) };
            println!("{:<52} {threads:>3} {:>7.1} | {loops} | {} | {}", case.name, rate(0), cell(2), cell(3));
        }
    }
}
