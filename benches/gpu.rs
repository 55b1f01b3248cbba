//! How fast the kernel of batched copies is on a GPU, next to a memcpy of as many bytes on it in the same run.
//!
//! `cargo bench --bench gpu [-- WORDS]` runs the cases whose name contains one of the words, on the GPU that CUDA counts as 0; where
//! there is none it says so and ends. Each case is one list of copies, with the sizes of real shards. First its bytes are compared with
//! those that the host device makes of the same copies. Then the list and one cuMemcpyAsync from device to device take turns, each
//! several times between two events; medians over the rounds. GB/s count a byte that is read and written once; of a cast, half of what
//! is read and written. A goal that is missed is said, and fails nothing.
//!
//! RESHARD_BENCH=tiny: all cases with few rows, timed once, for runs that only compare bytes (stand-in driver, compute-sanitizer).

use cudarc::driver::sys::{self, CUcontext, CUevent, CUresult, CUstream};
use reshard::convert::{Convert, Float};
use reshard::device::cuda::CudaDevice;
use reshard::device::cuda::batch::Descriptors;
use reshard::device::host::HostDevice;
use reshard::device::{CopyNow, Device, Job, Mem, Prepare};
use reshard::error::Error;
use reshard::geom::StridedCopy;
use std::ffi::{CStr, c_char};
use std::process::ExitCode;
use std::ptr::{null_mut, with_exposed_provenance_mut};

/// The GPU.
const GPU: i32 = 0;
/// Rounds of a case.
const ROUNDS: usize = 9;
/// Bytes of a round that are enough to measure.
const ENOUGH: u64 = 4 << 30;
/// Where a tensor begins: as PyTorch's allocator aligns it.
const ALIGN: u64 = 512;
/// A list may need so many launches of the kernel, and not one more.
const LAUNCHES: u32 = 9;

/// Goals, of memcpy.
const ROWS: Option<f64> = Some(0.9);
const TRANSPOSES: Option<f64> = Some(0.8);

const F32_TO_BF16: Convert = Convert { from: Float::F32, to: Float::Bf16, add: 0 };
const BF16_TO_F32: Convert = Convert { from: Float::Bf16, to: Float::F32, add: 0 };

/// One list of copies, out of one block into another.
struct Case {
    name: &'static str,
    goal: Option<f64>,
    copies: Vec<StridedCopy>,
    /// Bytes of the blocks so far.
    src: u64,
    dst: u64,
}

impl Case {
    fn new(name: &'static str, goal: Option<f64>) -> Case {
        Case { name, goal, copies: vec![], src: 0, dst: 0 }
    }

    /// One more copy, its first elements counted from the begin of the blocks.
    fn at(&mut self, item: u32, convert: Option<Convert>, (src, dst): (u64, u64), axes: &[(u64, u64, u64)]) {
        let copy = StridedCopy::converting(item, convert, src, dst, axes.iter().copied());
        self.src = self.src.max(copy.src_end()).next_multiple_of(ALIGN);
        self.dst = self.dst.max(copy.dst_end()).next_multiple_of(ALIGN);
        self.copies.push(copy);
    }

    /// One more copy, whose tensors lie behind those before it.
    fn and(&mut self, item: u32, convert: Option<Convert>, axes: &[(u64, u64, u64)]) {
        let to = convert.map_or(item, |c| c.to.item());
        self.at(item, convert, (self.src / u64::from(item), self.dst / u64::from(to)), axes);
    }

    /// `count` tensors of so many elements, dense and each the same on both sides.
    fn dense(mut self, item: u32, convert: Option<Convert>, count: u64, elements: u64) -> Case {
        (0..count).for_each(|_| self.and(item, convert, &[(elements, 1, 1)]));
        self
    }

    /// `count` matrices of `rows` rows, one behind the other on both sides, transposed.
    fn transposed(mut self, item: u32, convert: Option<Convert>, (count, rows, columns): (u64, u64, u64)) -> Case {
        let one = rows * columns;
        self.and(item, convert, &[(count, one, one), (rows, columns, 1), (columns, 1, rows)]);
        self
    }

    /// `count` matrices of `rows` rows of bf16 in shards of so many columns: all shards, each dense, into the whole matrices, or out of
    /// them.
    fn columns(mut self, gather: bool, (count, rows, columns, shards): (u64, u64, u64, u64)) -> Case {
        let (one, whole) = ((rows * columns).next_multiple_of(ALIGN), columns * shards);
        for _ in 0..count {
            let (src, dst) = (self.src / 2, self.dst / 2);
            for shard in 0..shards {
                let (dense, cut) = (shard * one, shard * columns);
                let (first, axis) = match gather {
                    false => ((src + dense, dst + cut), (rows, columns, whole)),
                    true => ((src + cut, dst + dense), (rows, whole, columns)),
                };
                self.at(2, None, first, &[axis, (columns, 1, 1)]);
            }
        }
        self
    }

    /// Queries, keys and values with 8 KV heads and four times as many query heads, of 128 rows: from group by group to kind by kind.
    fn qkv(mut self, count: u64, columns: u64) -> Case {
        const GROUPS: u64 = 8;
        for _ in 0..count {
            let (mut src, mut dst) = (self.src / 2, self.dst / 2);
            for rows in [4 * 128, 128, 128] {
                let piece = rows * columns;
                self.at(2, None, (src, dst), &[(GROUPS, 6 * 128 * columns, piece), (piece, 1, 1)]);
                (src, dst) = (src + piece, dst + GROUPS * piece);
            }
        }
        self
    }

    /// A dense model's layers, embedding and last norm, from two ranks with tensor parallel 2 to one that has all.
    fn model(mut self, layers: u64, hidden: u64, ffn: u64, vocab: u64) -> Case {
        self = self.dense(2, None, 2, vocab / 2 * hidden);
        for _ in 0..layers {
            self = self.dense(2, None, 2, hidden).qkv(1, hidden).columns(false, (1, hidden, hidden / 2, 2));
            self = self.dense(2, None, 4, ffn / 2 * hidden).columns(false, (1, hidden, ffn / 2, 2));
        }
        self.dense(2, None, 1, hidden)
    }

    /// Bytes that a memcpy moves with as much read and written.
    fn bytes(&self) -> u64 {
        let both = |copy: &StridedCopy| {
            let item = u64::from(copy.item);
            copy.bytes() + copy.bytes() / item * copy.convert.map_or(item, |c| u64::from(c.to.item()))
        };
        self.copies.iter().map(both).sum::<u64>() / 2
    }

    fn jobs(&self, src: Mem, dst: Mem) -> Vec<Job<'_>> {
        self.copies.iter().map(|copy| Job::new(src, dst, copy).expect("lies inside")).collect()
    }
}

/// All cases. The second of two sizes is the tiny one: as many kinds of accesses, few bytes.
fn cases(tiny: bool) -> Vec<Case> {
    let size = |full: u64, small: u64| if tiny { small } else { full };
    let mut cases = vec![];

    let case = Case::new("rows of 1 and 4 MiB: Llama-3.1-8B's qkv, Megatron's order to vLLM's", ROWS);
    cases.push(case.qkv(size(16, 1), size(4096, 16)));
    let case = Case::new("rows of 8 MiB: DeepSeek-V3's kv_a_proj of 61 layers", ROWS);
    cases.push(case.dense(2, None, size(61, 3), 576 * size(7168, 56)));

    let mut columns = |name, goal, gather, (count, rows, columns, shards)| {
        cases.push(Case::new(name, goal).columns(gather, (size(count, 1), size(rows, 19), columns, shards)));
    };
    columns("rows of 256 bytes: DeepSeek-V3's shared down_proj, TP 16 to 1", None, false, (24, 7168, 128, 16));
    columns("rows of 1 KiB: DeepSeek-V3's shared down_proj, TP 4 to 1", ROWS, false, (24, 7168, 512, 4));
    columns("rows of 1 KiB: the same, TP 1 to 4", ROWS, true, (24, 7168, 512, 4));
    columns("rows of 2 KiB: DeepSeek-V3's w2 of 24 experts, TP 2 to 1", ROWS, false, (24, 7168, 1024, 2));
    columns("rows of 4 KiB: Llama-3.1-8B's o_proj, TP 2 to 1", ROWS, false, (24, 4096, 2048, 2));
    columns("rows of 4 KiB: the same, TP 1 to 2", ROWS, true, (24, 4096, 2048, 2));
    columns("rows of 14 KiB: Llama-3.1-8B's down_proj, TP 2 to 1", ROWS, false, (8, 4096, 7168, 2));
    columns("rows of 14 KiB: the same, TP 1 to 2", ROWS, true, (8, 4096, 7168, 2));

    let mut transposed = |name, goal, shape| cases.push(Case::new(name, goal).transposed(2, None, shape));
    let shape = |count, rows, columns| (size(count, 2), size(rows, rows / 32), size(columns, columns / 32));
    transposed("transposed: Llama-3.1-8B's down_proj of 6 layers", TRANSPOSES, shape(6, 14_336, 4096));
    transposed("transposed: DeepSeek-V3's weight1 of 12 experts to w13", TRANSPOSES, shape(12, 7168, 4096));
    transposed("transposed: DeepSeek-V3's weight2 of 24 experts to w2", TRANSPOSES, shape(24, 2048, 7168));
    transposed("transposed: 15001 x 14999, rows at odd addresses", None, (1, size(15_001, 301), size(14_999, 299)));

    let elements = shape(1, 7168, 4096).1 * shape(1, 7168, 4096).2;
    let case = Case::new("fp32 to bf16: DeepSeek-V3's w13 of 8 experts", None);
    cases.push(case.dense(4, Some(F32_TO_BF16), 1, size(8, 1) * elements));
    let case = Case::new("bf16 to fp32: the same", None);
    cases.push(case.dense(2, Some(BF16_TO_F32), 1, size(8, 1) * elements));
    let case = Case::new("fp32 to bf16, transposed: DeepSeek-V3's weight1 of 8 experts", None);
    cases.push(case.transposed(4, Some(F32_TO_BF16), shape(8, 7168, 4096)));

    let (norms, wide, embedding) = (size(5000, 700), size(4096, 96), size(128_256, 1003));
    let mut small = |name, goal, item, convert| {
        let case = Case::new(name, goal).dense(item, convert, norms, wide);
        cases.push(case.dense(item, convert, 1, embedding * wide).dense(item, convert, norms, wide));
    };
    small("10,000 norms of 8 KiB and an embedding of 1 GB", ROWS, 2, None);
    small("the same, fp32 to bf16", None, 4, Some(F32_TO_BF16));
    cases.push(Case::new("10,000 norms of 8 KiB", ROWS).dense(2, None, 2 * norms, wide));
    let case = Case::new("Llama-3.1-8B, 4 layers and embedding, TP 2 to 1", ROWS);
    cases.push(case.model(size(4, 1), size(4096, 256), size(14_336, 224), size(128_256, 502)));
    cases
}

fn check(call: &str, answer: CUresult) {
    assert!(answer == CUresult::CUDA_SUCCESS, "{call}: {answer:?}");
}

/// The GPU's primary context, current on this thread until dropped.
struct Context;

impl Context {
    fn new() -> Context {
        let mut context: CUcontext = null_mut();
        // SAFETY: each call writes its one result or none; the context is retained until it is dropped.
        unsafe {
            check("cuDevicePrimaryCtxRetain", sys::cuDevicePrimaryCtxRetain(&mut context, GPU));
            check("cuCtxPushCurrent", sys::cuCtxPushCurrent_v2(context));
        }
        Context
    }
}

impl Drop for Context {
    fn drop(&mut self) {
        // SAFETY: undoes what `new` did.
        unsafe {
            check("cuCtxPopCurrent", sys::cuCtxPopCurrent_v2(&mut null_mut()));
            check("cuDevicePrimaryCtxRelease", sys::cuDevicePrimaryCtxRelease_v2(GPU));
        }
    }
}

/// A time in a stream.
struct Mark(CUevent);

impl Mark {
    fn new() -> Mark {
        let mut event = null_mut();
        // SAFETY: writes its one result; a context is current, as for all calls here.
        check("cuEventCreate", unsafe { sys::cuEventCreate(&mut event, sys::CUevent_flags::CU_EVENT_DEFAULT as u32) });
        Mark(event)
    }

    fn record(&self, stream: CUstream) {
        // SAFETY: a live event and a live stream.
        check("cuEventRecord", unsafe { sys::cuEventRecord(self.0, stream) });
    }

    /// Seconds from another mark to this one, both of which the GPU has passed.
    fn since(&self, begin: &Mark) -> f64 {
        let mut milliseconds = 0.0;
        // SAFETY: writes its one result, of two live events.
        check("cuEventElapsedTime", unsafe { sys::cuEventElapsedTime(&mut milliseconds, begin.0, self.0) });
        f64::from(milliseconds) / 1e3
    }
}

impl Drop for Mark {
    fn drop(&mut self) {
        // SAFETY: made by `new`, and nobody waits for it.
        check("cuEventDestroy", unsafe { sys::cuEventDestroy_v2(self.0) });
    }
}

/// A block of the GPU's memory.
struct Block<'a> {
    device: &'a CudaDevice,
    mem: Mem,
}

impl Block<'_> {
    fn new(device: &CudaDevice, bytes: u64) -> Result<Block<'_>, String> {
        let mem = device.alloc(bytes as usize).map_err(|e| e.to_string())?;
        Ok(Block { device, mem })
    }

    /// Put on the stream: the driver's other copies may end after their call does.
    fn write(&self, bytes: &[u8], stream: CUstream) {
        assert!(bytes.len() <= self.mem.len());
        // SAFETY: the block is that large; the driver has taken pageable memory's bytes when it returns.
        let answer = unsafe { sys::cuMemcpyHtoDAsync_v2(self.mem.addr() as u64, bytes.as_ptr().cast(), bytes.len(), stream) };
        check("cuMemcpyHtoDAsync", answer);
    }

    fn read(&self) -> Vec<u8> {
        let mut out = vec![0; self.mem.len()];
        // SAFETY: the block is that large.
        check("cuMemcpyDtoH", unsafe { sys::cuMemcpyDtoH_v2(out.as_mut_ptr().cast(), self.mem.addr() as u64, out.len()) });
        out
    }
}

impl Drop for Block<'_> {
    fn drop(&mut self) {
        self.device.free(self.mem);
    }
}

/// What a list took.
struct Measured {
    /// GB/s.
    memcpy: f64,
    list: f64,
    /// Of memcpy's speed.
    ratio: f64,
    /// By the driver's memcpy, as the list says.
    copies: usize,
    launches: u32,
    parts: u32,
}

/// Random bytes, none of which is of a NaN if they are cast.
fn noise(seed: u64, bytes: usize, case: &Case) -> Vec<u8> {
    let mut out = vec![0; bytes];
    fastrand::Rng::with_seed(seed).fill(&mut out);
    if case.copies.iter().any(|copy| copy.convert.is_some()) {
        out.iter_mut().skip(1).step_by(2).for_each(|byte| *byte &= 0xbf);
    }
    out
}

fn host(bytes: &mut [u8]) -> Mem {
    // SAFETY: its users copy while the bytes live, and nobody looks at them meanwhile.
    unsafe { Mem::new(bytes.as_mut_ptr(), bytes.len()) }
}

fn median(values: impl Iterator<Item = f64>) -> f64 {
    let mut values: Vec<f64> = values.collect();
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

/// Compares a list's bytes with the host device's, then takes its time.
fn run(device: &CudaDevice, case: &Case, tiny: bool) -> Result<Measured, String> {
    let text = |e: Error| e.to_string();
    let own = device.stream().map_err(text)?;
    let stream: CUstream = with_exposed_provenance_mut(own.raw());
    // SAFETY: a live stream.
    let wait = || check("cuStreamSynchronize", unsafe { sys::cuStreamSynchronize(stream) });
    // The memcpy goes from block to block too.
    let (src, dst) = (Block::new(device, case.src.max(case.bytes()))?, Block::new(device, case.dst.max(case.bytes()))?);
    let jobs = case.jobs(src.mem, dst.mem);
    let list = Descriptors::new(&jobs);
    let batch = device.prepare(&[jobs]).map_err(text)?.remove(0);
    let start = || batch.start(own.raw()).map_err(text);

    let (mut from, mut expected) = (noise(1, src.mem.len(), case), noise(2, dst.mem.len(), case));
    src.write(&from, stream);
    dst.write(&expected, stream);
    start()?;
    wait();
    HostDevice::new().copy(&case.jobs(host(&mut from), host(&mut expected)), 0).map_err(text)?;
    let found = dst.read();
    if found != expected {
        let at = (0..found.len()).find(|&at| found[at] != expected[at]).unwrap_or_default();
        return Err(format!("byte {at} of the target is {:#04x}, and {:#04x} on the host", found[at], expected[at]));
    }
    drop((from, expected, found));

    let bytes = case.bytes();
    let source = src.mem.cut(0, bytes as usize).expect("the block is that large");
    let (rounds, repeats) = if tiny { (1, 1) } else { (ROUNDS, (ENOUGH / bytes).clamp(3, 100)) };
    let [begin, middle, end] = [(); 3].map(|()| Mark::new());
    let mut times = vec![];
    for round in 0..rounds + 1 {
        begin.record(stream);
        (0..repeats).try_for_each(|_| device.transfer(dst.mem, source, own.raw())).map_err(text)?;
        middle.record(stream);
        (0..repeats).try_for_each(|_| start())?;
        end.record(stream);
        wait();
        // The first warms up.
        if round > 0 {
            times.push((middle.since(&begin) / repeats as f64, end.since(&middle) / repeats as f64));
        }
    }
    let rate = |seconds: f64| bytes as f64 / seconds / 1e9;
    Ok(Measured {
        memcpy: median(times.iter().map(|t| rate(t.0))),
        list: median(times.iter().map(|t| rate(t.1))),
        ratio: median(times.iter().map(|t| t.0 / t.1)),
        copies: list.copies.len(),
        launches: u32::from(list.chunks > 0),
        parts: list.count(),
    })
}

/// Number of GPUs; `Err`: why there is none.
fn gpus() -> Result<i32, String> {
    let mut count = 0;
    // SAFETY: the library is asked for before its functions are; each call writes its one result or none.
    unsafe {
        if !sys::is_culib_present() {
            return Err("there is no CUDA driver (libcuda.so.1)".into());
        }
        match sys::cuInit(0) {
            CUresult::CUDA_SUCCESS => {}
            answer => return Err(format!("the CUDA driver finds none (cuInit answered {})", answer as u32)),
        }
        check("cuDeviceGetCount", sys::cuDeviceGetCount(&mut count));
    }
    if count > 0 { Ok(count) } else { Err("the CUDA driver finds none".into()) }
}

/// Bytes of the GPU's memory: free, all.
fn memory() -> (u64, u64) {
    let (mut free, mut all) = (0, 0);
    // SAFETY: writes its two results; a context is current.
    check("cuMemGetInfo", unsafe { sys::cuMemGetInfo_v2(&mut free, &mut all) });
    (free as u64, all as u64)
}

/// The GPU and the driver, for the table's head.
fn about() -> String {
    let (mut name, mut version) = ([0 as c_char; 100], 0);
    // SAFETY: each call writes its one result, the name no more than it has room for, with a NUL at its end.
    let name = unsafe {
        check("cuDeviceGetName", sys::cuDeviceGetName(name.as_mut_ptr(), name.len() as i32, GPU));
        check("cuDriverGetVersion", sys::cuDriverGetVersion(&mut version));
        CStr::from_ptr(name.as_ptr()).to_string_lossy().into_owned()
    };
    format!("{name}, {} GiB, driver of CUDA {}.{}", memory().1 >> 30, version / 1000, version % 1000 / 10)
}

fn main() -> ExitCode {
    if let Err(why) = gpus() {
        println!("no GPU: {why}; nothing is measured");
        return ExitCode::SUCCESS;
    }
    let tiny = match std::env::var("RESHARD_BENCH").as_deref() {
        Ok("tiny") => true,
        Ok("full") | Err(_) => false,
        Ok(other) => panic!("RESHARD_BENCH is '{other}'; it is full or tiny"),
    };
    let words: Vec<String> = std::env::args().skip(1).filter(|word| !word.starts_with('-')).collect();
    let _context = Context::new();
    let device = match CudaDevice::new(GPU) {
        Ok(device) => device,
        Err(e) => {
            println!("{e}");
            return ExitCode::FAILURE;
        }
    };
    println!("{}{}\n", about(), if tiny { "; tiny sizes, whose times mean nothing" } else { "" });
    println!("| {:<76} |    MB | memcpy GB/s | list GB/s | ratio | goal | launches | memcpys | parts |", "one list");
    println!("|{}|------:|------------:|----------:|------:|-----:|---------:|--------:|------:|", "-".repeat(78));
    let (mut missed, mut wrong) = (vec![], vec![]);
    for case in cases(tiny).iter().filter(|case| words.is_empty() || words.iter().any(|word| case.name.contains(word))) {
        let (wanted, free) = (case.src.max(case.bytes()) + case.dst.max(case.bytes()), memory().0);
        if wanted > free {
            println!("| {:<76} | left out: wants {} MB of the GPU's memory, {} are free", case.name, wanted >> 20, free >> 20);
            continue;
        }
        match run(&device, case, tiny) {
            Ok(m) => {
                let goal = case.goal.map_or(String::new(), |goal| goal.to_string());
                println!(
                    "| {:<76} | {:>5} | {:>11.0} | {:>9.0} | {:>5.2} | {goal:>4} | {:>8} | {:>7} | {:>5} |",
                    case.name,
                    case.bytes() / 1_000_000,
                    m.memcpy,
                    m.list,
                    m.ratio,
                    m.launches,
                    m.copies,
                    m.parts
                );
                if let Some(goal) = case.goal.filter(|&goal| !tiny && m.ratio < goal) {
                    missed.push(format!("{}: {:.2}, not {goal}", case.name, m.ratio));
                }
                if m.launches > LAUNCHES {
                    missed.push(format!("{}: {} launches, not {LAUNCHES} at most", case.name, m.launches));
                }
            }
            Err(e) => {
                println!("| {:<76} | WRONG: {e}", case.name);
                wrong.push(case.name);
            }
        }
    }
    println!("\nbytes as the host device's: {}", if wrong.is_empty() { "in all cases" } else { "NOT in all cases" });
    match missed.as_slice() {
        _ if tiny => {}
        [] => println!("goals: all met"),
        missed => missed.iter().for_each(|what| println!("goal missed: {what}")),
    }
    if wrong.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}
