//! How fast bytes pass between processes of one host, each way by itself: `cargo bench --bench local_pipe [-- MIB]`.
//!
//! 2 sources, 2 targets, each target takes half of its bytes from either source, whole or as the left halves of rows. Figures are
//! ratios to two processes that copy the same bytes of private memory in the same run: "long", with one memcpy of each half; "part",
//! with a memcpy of every 16 MiB, as tensors are; or a memcpy a row.

use reshard::comm::local::{Force, join, segment};
use reshard::comm::{Comm, Deadline, Pipe, Window};
use reshard::device::host::HostDevice;
use reshard::device::{CopyNow, Job, Mem};
use reshard::geom::StridedCopy;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

const TIMEOUT: Duration = Duration::from_secs(60);
const ROUNDS: usize = 7;
const TARGETS: usize = 2;
const WORLD: u32 = 4;
/// Bytes that a reader copies at a time.
const UNIT: usize = 2 << 20;

fn main() {
    let args: Vec<String> = std::env::args().collect();
    if let Some(at) = args.iter().position(|a| a == "child") {
        return child(&args[at + 1..]);
    }
    let mib: usize = args.iter().find_map(|a| a.parse().ok()).unwrap_or(512);
    println!("{mib} MiB into each of {TARGETS} targets; GB/s of all targets, median of {ROUNDS}");
    let (long, part) = (run("memcpy", mib, mib << 20), run("memcpy", mib, 0));
    println!("memcpy long {long:.2}, memcpy part {part:.2}");
    for mode in ["ring", "read", "mapped"] {
        let rate = run(mode, mib, 0);
        println!("  {mode:<8} {rate:6.2}   {:.2} of long, {:.2} of part", rate / long, rate / part);
    }
    for row in [1, 4, 16, 256].map(|kib| kib << 10) {
        let loops = run("memcpy", mib, row);
        println!("rows of {} KiB: memcpy {loops:.2}", row >> 10);
        for mode in ["ring", "read", "mapped"] {
            let rate = run(mode, mib, row);
            println!("  {mode:<8} {rate:6.2}   {:.2} of it", rate / loops);
        }
    }
}

/// GB/s of one way; `row` 0: whole blocks.
fn run(mode: &str, mib: usize, row: usize) -> f64 {
    let name = format!("bench-{}-{mode}-{row}", std::process::id());
    let me = std::env::current_exe().expect("this program");
    let start = |rank: u32| {
        let args = ["child", mode, &name, &rank.to_string(), &mib.to_string(), &row.to_string()];
        Command::new(&me).args(args).stdout(Stdio::piped()).spawn().expect("a child")
    };
    let children: Vec<_> = (0..WORLD).map(start).collect();
    let mut seconds = 0f64;
    for child in children {
        let out = child.wait_with_output().expect("its end");
        assert!(out.status.success(), "{mode}: a child failed");
        seconds = seconds.max(String::from_utf8_lossy(&out.stdout).trim().parse().expect("seconds"));
    }
    (TARGETS * (mib << 20)) as f64 / seconds / 1e9
}

/// Memory of this process with all pages present.
fn block(bytes: usize, shared: bool, fill: u8) -> Mem {
    let at = match shared {
        true => segment::alloc(bytes as u64, 0).expect("memory").as_ptr(),
        false => Box::leak(vec![0u8; bytes].into_boxed_slice()).as_mut_ptr(),
    };
    // SAFETY: `bytes` bytes that are never freed and used by nothing but this program's copies.
    unsafe {
        at.write_bytes(fill, bytes);
        Mem::new(at, bytes)
    }
}

/// Bytes `from..from + len` of what one source gives one target, as a copy out of its block.
fn copy_of(row: usize, from: usize, len: usize, to: usize) -> StridedCopy {
    let (from, len, to, row) = (from as u64, len as u64, to as u64, row as u64);
    match row {
        0 => StridedCopy::new(1, from, to, [(len, 1, 1)]),
        // The left halves of rows of twice the length.
        _ => StridedCopy::new(1, 2 * from, to, [(len / row, 2 * row, row), (row, 1, 1)]),
    }
}

struct Rank {
    comm: std::sync::Arc<dyn Comm>,
    device: HostDevice,
    mem: Mem,
    /// Bytes from each source to each target.
    part: usize,
    row: usize,
}

fn child(args: &[String]) {
    let (mode, name) = (args[0].as_str(), &args[1]);
    let [rank, mib, row] = [2, 3, 4].map(|i| args[i].parse::<usize>().expect("a number"));
    let force = (mode == "read").then_some(Force::Read);
    let comm = join(name, rank as u32, WORLD, TIMEOUT, force).expect("join");
    let part = (mib << 20) / 2;
    let source = rank < 2;
    let wide = if row == 0 || row > part { part } else { 2 * part };
    let bytes = match (mode, source) {
        ("memcpy", true) => 1,
        ("memcpy", false) => 2 * (wide + part),
        (_, true) => 2 * wide,
        (_, false) => 2 * part,
    };
    let mem = block(bytes, mode == "mapped" && source, rank as u8 + 1);
    let deadline = Deadline::after(Duration::from_secs(600));
    let (sources, targets) = ([0, 1], [2, 3]);
    let mut windows = vec![];
    if mode == "ring" {
        let (to, from) = if source { (&targets[..], &[][..]) } else { (&[][..], &sources[..]) };
        comm.pipe().expect("pipe").open(to, from, deadline).expect("open");
    } else if mode != "memcpy" {
        let offer = |i: usize| (targets[i], vec![mem.cut(i * wide, wide).expect("a half")]);
        let (offers, owners) = if source { (vec![offer(0), offer(1)], &[][..]) } else { (vec![], &sources[..]) };
        windows = comm.windows().expect("windows").exchange(&offers, owners, deadline).expect("exchange").windows;
    }
    let me = Rank { comm, device: HostDevice::new(), mem, part, row };
    let mut times = vec![];
    for _ in 0..=ROUNDS {
        me.comm.allgather(&[], deadline).expect("all");
        let begun = Instant::now();
        match (mode, source) {
            ("memcpy", false) => me.memcpy(wide),
            ("ring", true) => me.send(wide),
            ("ring", false) => me.receive(),
            (_, false) => me.read(&windows),
            _ => {}
        }
        let own = begun.elapsed().as_secs_f64();
        let all = me.comm.allgather(&own.to_le_bytes(), deadline).expect("all");
        times.push(all.chunks_exact(8).map(|b| f64::from_le_bytes(b.try_into().expect("8"))).fold(0.0, f64::max));
    }
    if !source && mode != "memcpy" {
        for at in (0..2 * part).step_by(4099) {
            // SAFETY: inside `mem`, which nobody writes any more.
            let byte = unsafe { *((me.mem.addr() + at) as *const u8) };
            assert_eq!(byte as usize, at / part + 1, "byte {at}");
        }
    }
    // The first round warms pages and caches.
    let mut times = times.split_off(1);
    times.sort_by(f64::total_cmp);
    println!("{}", times[ROUNDS / 2]);
}

impl Rank {
    fn memcpy(&self, wide: usize) {
        let (run, step) = match self.row {
            0 => (16 << 20, 16 << 20),
            row if row > self.part => (self.part, self.part),
            row => (row, 2 * row),
        };
        for half in 0..2 {
            let (from, to) = (self.mem.addr() + 2 * self.part + half * wide, self.mem.addr() + half * self.part);
            for at in 0..self.part / run {
                // SAFETY: two parts of a block that nothing else uses; the runs end inside them.
                unsafe { std::ptr::copy_nonoverlapping((from + at * step) as *const u8, (to + at * run) as *mut u8, run) };
            }
        }
    }

    fn copy(&self, src: Mem, dst: Mem, copy: &StridedCopy, streaming: bool) {
        let job = Job::new(src, dst, copy).expect("a copy");
        self.device.copy(&[if streaming { job.streaming() } else { job }], 0).expect("copies");
    }

    /// Calls `step` with both peers of this rank, by turns, until each has had all its bytes.
    fn both(&self, mut step: impl FnMut(&dyn Pipe, usize, usize, usize) -> bool) {
        let pipe = self.comm.pipe().expect("pipe");
        let mut done = [0; 2];
        while done != [self.part; 2] {
            let before = done;
            for (peer, done) in done.iter_mut().enumerate() {
                let n = pipe.capacity().min(self.part - *done);
                if n > 0 && step(pipe, peer, *done, n) {
                    *done += n;
                }
            }
            if before == done {
                pipe.wait(Duration::from_millis(5)).expect("wait");
            }
        }
    }

    fn send(&self, wide: usize) {
        self.both(|pipe, target, at, n| {
            let to = 2 + target as u32;
            let Some(slot) = pipe.reserve(to).expect("reserve") else { return false };
            let half = self.mem.cut(target * wide, wide).expect("a half");
            self.copy(half, slot, &copy_of(self.row, at, n, 0), false);
            pipe.commit(to, n).expect("commit");
            true
        });
    }

    fn receive(&self) {
        self.both(|pipe, source, at, n| {
            let Some(slot) = pipe.arrived(source as u32, n).expect("arrived") else { return false };
            self.copy(slot, self.mem, &copy_of(0, 0, n, source * self.part + at), true);
            pipe.release(source as u32).expect("release");
            true
        });
    }

    fn read(&self, windows: &[Vec<Window>]) {
        for (source, list) in windows.iter().enumerate() {
            for at in (0..self.part).step_by(UNIT) {
                let copy = copy_of(self.row, at, UNIT.min(self.part - at), source * self.part + at);
                match &list[0] {
                    Window::Mapped(src) => self.copy(*src, self.mem, &copy, true),
                    window => {
                        let windows = self.comm.windows().expect("windows");
                        windows.read(source as u32, window, self.mem, &copy).expect("read");
                    }
                }
            }
        }
    }
}
