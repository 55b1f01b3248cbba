//! Processes that die or stop at random moments of a sync.
//!
//! Four processes, two sources and two targets, sync one version after the other. The parent kills or stops one or more of them at a
//! random moment and checks what the others say: an error that names the rank, in time; parameters that are whole or refused; not a
//! byte changed by a process that comes back late. Then the survivors and fresh processes connect again and the next version lands.
//!
//! RESHARD_KILLS: how many rounds (5). RESHARD_SEED: the first seed. Ranks are this test program, started again. With RESHARD_MEMORY=cuda
//! the weights are on GPUs, which the processes share; with RESHARD_NIXL, the path of libnixl_capi.so, they go over NIXL.

#[allow(dead_code)] // `properties` uses the rest.
#[path = "oracle/gpu.rs"]
mod gpu;

use reshard::abi::*;
use reshard::ffi::api::*;
use std::ffi::{CStr, CString};
use std::io::{BufRead, BufReader, Write};
use std::mem::zeroed;
use std::net::TcpListener;
use std::process::{Child, ChildStdin, Command, Stdio};
use std::ptr::{null, null_mut};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::time::{Duration, Instant};

const RANKS: i32 = 4;
const SIDE: usize = 2048;
const TENSORS: usize = 4;
const TIMEOUT_MS: u32 = 3000;
const HEALING: u64 = 1 << 40;

fn value(tensor: usize, row: usize, col: usize, version: u64) -> u16 {
    (row * 31 + col * 7 + tensor * 1009) as u16 ^ (version as u16).wrapping_mul(0x9E37)
}

// ---------------------------------------------------------------- a rank

/// Half of each tensor: a source holds rows, a target columns.
struct Rank {
    rank: i32,
    /// From rs_mem_alloc rather than the process's own.
    shared: bool,
    memory: Vec<*mut u16>,
    /// What the memory is of, on GPUs.
    blocks: Vec<gpu::Block>,
    container: *mut rs_container_t,
}

fn say(line: &str) {
    let mut out = std::io::stdout().lock();
    writeln!(out, "@{line}").expect("the parent reads");
    out.flush().expect("the parent reads");
}

fn last_error() -> String {
    // SAFETY: the library returns a NUL-terminated text of this thread.
    unsafe { CStr::from_ptr(rs_last_error()) }.to_string_lossy().replace('\n', " ")
}

/// A new run's name: over NIXL an address with a port that is free now.
fn run_name(label: &str) -> String {
    match nixl() {
        Some(_) => TcpListener::bind("127.0.0.1:0").and_then(|l| l.local_addr()).expect("a port").to_string(),
        None => label.to_string(),
    }
}

fn nixl() -> Option<String> {
    std::env::var("RESHARD_NIXL").ok()
}

fn join(name: &str, rank: i32, flags: u32) -> *mut rs_comm_t {
    let mut comm = null_mut();
    if let Some(library) = nixl() {
        let config = format!(r#"{{"address": "{name}", "library": "{library}", "timeout_ms": 20000}}"#);
        let config = CString::new(config).expect("no NUL");
        // SAFETY: a NUL-terminated text and an output.
        assert_eq!(unsafe { rs_comm_nixl(config.as_ptr(), rank, RANKS, &mut comm) }, RS_OK, "{}", last_error());
        return comm;
    }
    let name = CString::new(name).expect("no NUL");
    // SAFETY: a zeroed struct with its size set, as the header asks.
    unsafe {
        let mut c: rs_comm_local_t = zeroed();
        c.struct_size = size_of::<rs_comm_local_t>();
        (c.name, c.rank, c.world, c.flags) = (name.as_ptr(), rank, RANKS, flags);
        c.timeout_ms = 20_000;
        assert_eq!(rs_comm_local(&c, &mut comm), RS_OK, "{}", last_error());
    }
    comm
}

impl Rank {
    fn is_source(&self) -> bool {
        self.rank < RANKS / 2
    }

    fn new(rank: i32, comm: *mut rs_comm_t, shared: bool) -> Rank {
        let (rows, cols) = if rank < RANKS / 2 { (SIDE / 2, SIDE) } else { (SIDE, SIDE / 2) };
        let half = (rank % 2) as i64 * SIDE as i64 / 2;
        let names: Vec<CString> = (0..TENSORS).map(|t| CString::new(format!("model.{t}")).expect("no NUL")).collect();
        let (mut tensors, mut buffers, mut tiles, mut memory, mut blocks) = (vec![], vec![], vec![], vec![], vec![]);
        let (device_type, device_id) = if gpu::wanted() { (RS_DEVICE_CUDA, rank % gpu::count()) } else { gpu::HOST };
        let pad = |v: &[i64]| {
            let mut out = [0; RS_MAX_RANK];
            out[..v.len()].copy_from_slice(v);
            out
        };
        for (t, name) in names.iter().enumerate() {
            let bytes = (rows * cols * 2) as u64;
            let mut data = null_mut();
            if gpu::wanted() {
                let block = gpu::Block::new((device_type, device_id), &vec![0; bytes as usize]);
                block.read();
                data = block.at(0).cast();
                blocks.push(block);
            } else if shared {
                // SAFETY: `data` is an output.
                assert_eq!(unsafe { rs_mem_alloc(bytes, 0, &mut data) }, RS_OK, "{}", last_error());
            } else {
                data = Box::leak(vec![0u16; rows * cols].into_boxed_slice()).as_mut_ptr().cast();
            }
            memory.push(data.cast::<u16>());
            tensors.push(rs_tensor_t { name: name.as_ptr(), rank: 2, reserved: 0, shape: pad(&[SIDE as i64; 2]) });
            buffers.push(rs_buffer_t {
                name: name.as_ptr(),
                data,
                size_bytes: bytes,
                device_type,
                device_id,
                role: if rank < RANKS / 2 { RS_SOURCE } else { RS_TARGET },
                flags: 0,
                dtype: rs_dtype_t { code: 4, bits: 16, lanes: 1 },
                ndim: 2,
                shape: pad(&[rows as i64, cols as i64]),
                strides: pad(&[cols as i64, 1]),
            });
            tiles.push(rs_tile_t {
                tensor: t as u32,
                buffer: t as u32,
                rank: 2,
                transform: RS_TRANSFORM_NONE,
                byte_offset: 0,
                view: pad(&[SIDE as i64; 2]),
                origin: pad(if rank < RANKS / 2 { [half, 0] } else { [0, half] }.as_slice()),
                extent: pad(&[rows as i64, cols as i64]),
                stride: pad(&[cols as i64, 1]),
            });
        }
        let mut out = Rank { rank, shared, memory, blocks, container: null_mut() };
        // SAFETY: zeroed structs with their sizes set; the tables live until the call returns, the memory until `free`.
        unsafe {
            let layout = rs_layout_t {
                struct_size: size_of::<rs_layout_t>(),
                tensors: tensors.as_ptr(),
                tensor_count: tensors.len(),
                tensor_size: size_of::<rs_tensor_t>(),
                buffers: buffers.as_ptr(),
                buffer_count: buffers.len(),
                buffer_size: size_of::<rs_buffer_t>(),
                tiles: tiles.as_ptr(),
                tile_count: tiles.len(),
                tile_size: size_of::<rs_tile_t>(),
            };
            let mut config: rs_config_t = zeroed();
            config.struct_size = size_of::<rs_config_t>();
            config.abi = RS_ABI;
            config.comm = comm;
            config.timeout_ms = TIMEOUT_MS;
            config.staging_bytes = 64 << 20;
            assert_eq!(rs_container_create(&config, &layout, &mut out.container), RS_OK, "{}", last_error());
        }
        out
    }

    /// After the container is gone.
    fn free(self) {
        for m in self.memory.into_iter().filter(|_| self.blocks.is_empty()) {
            // SAFETY: `new` made the memory so, with this many elements on either side, and nobody uses it any more.
            unsafe {
                if self.shared {
                    rs_mem_free(m.cast());
                } else {
                    drop(Box::from_raw(std::ptr::slice_from_raw_parts_mut(m, SIDE * SIDE / 2)));
                }
            }
        }
    }

    /// Every element of tensor `t` here, with what it should be at a version.
    fn whole(&self, t: usize, version: u64) -> bool {
        let (rows, cols) = (SIDE, SIDE / 2);
        let first = (self.rank % 2) as usize * cols;
        let data = self.bytes(t);
        let data: Vec<u16> = data.chunks_exact(2).map(|b| u16::from_ne_bytes([b[0], b[1]])).collect();
        (0..rows).all(|r| (0..cols).all(|c| data[r * cols + c] == value(t, r, first + c, version)))
    }

    fn bytes(&self, t: usize) -> Vec<u8> {
        let mut bytes = vec![0; SIDE * SIDE];
        // SAFETY: `new` made the memory with this many bytes.
        unsafe { gpu::read(self.memory[t].cast(), &mut bytes) };
        bytes
    }

    fn fill(&self, version: u64) {
        let (rows, cols) = (SIDE / 2, SIDE);
        let first = (self.rank % 2) as usize * rows;
        for (t, &m) in self.memory.iter().enumerate() {
            let values = (0..rows * cols).map(|i| value(t, first + i / cols, i % cols, version));
            let bytes: Vec<u8> = values.flat_map(u16::to_ne_bytes).collect();
            // SAFETY: `new` made the memory with this many elements, and no sync is in progress.
            unsafe { gpu::write(m.cast(), &bytes) };
        }
    }

    /// How often this rank has planned.
    fn plans(&self) -> u64 {
        let (mut text, mut len) = (vec![0u8; 1 << 16], 0);
        // SAFETY: a live handle, and room for so many bytes.
        let status = unsafe {
            rs_container_describe(self.container, RS_DESCRIBE_STATS, null(), text.as_mut_ptr().cast(), text.len(), &mut len)
        };
        assert_eq!(status, RS_OK, "{}", last_error());
        let stats: serde_json::Value = serde_json::from_slice(&text[..len - 1]).expect("JSON");
        stats["plans"].as_u64().expect("a number")
    }

    fn sum(&self) -> u64 {
        (0..TENSORS).fold(0, |sum, t| sum ^ xxhash_rust::xxh3::xxh3_64_with_seed(&self.bytes(t), t as u64))
    }

    fn sync(&self, version: u64) -> rs_status_t {
        if self.is_source() {
            self.fill(version);
        }
        // SAFETY: a zeroed struct with its size set.
        unsafe {
            let mut s: rs_sync_t = zeroed();
            s.struct_size = size_of::<rs_sync_t>();
            s.version = version;
            let mut status = rs_sync_weights(self.container, &s);
            while status == RS_IN_PROGRESS {
                std::thread::sleep(Duration::from_micros(50));
                status = rs_container_poll(self.container);
            }
            status
        }
    }

    /// Whether every parameter is either refused or whole at the version that it claims.
    fn check_params(&self) -> String {
        let mut counts = [0; 4];
        for t in 0..TENSORS {
            // SAFETY: outputs with their sizes set; the name is NUL-terminated.
            let (by_name, status) = unsafe {
                let mut p: rs_param_t = zeroed();
                p.struct_size = size_of::<rs_param_t>();
                assert_eq!(rs_get_param_at(self.container, t, &mut p), RS_OK, "{}", last_error());
                let mut q: rs_param_t = zeroed();
                q.struct_size = size_of::<rs_param_t>();
                let status = rs_get_param(self.container, p.name, &mut q);
                (p, status)
            };
            counts[by_name.state as usize] += 1;
            match by_name.state {
                RS_PARAM_TORN => assert_eq!(status, RS_ERR_TORN, "a torn parameter was given out"),
                RS_PARAM_SYNCED | RS_PARAM_LANDED => {
                    assert_eq!(status, RS_OK);
                    let claimed = format!("tensor {t} claims version {}", by_name.version);
                    assert!(self.is_source() || self.whole(t, by_name.version), "{claimed}");
                }
                _ => assert_eq!(status, RS_OK),
            }
        }
        format!("initial {} synced {} landed {} torn {}", counts[0], counts[1], counts[2], counts[3])
    }
}

/// Not a test of its own: what a started process does.
#[test]
fn child() {
    let Ok(spec) = std::env::var("RESHARD_KILLS_CHILD") else { return };
    let f: Vec<&str> = spec.split(',').collect();
    let (rank, name, flags, shared): (i32, &str, u32, bool) =
        (f[0].parse().expect("rank"), f[1], f[2].parse().expect("flags"), f[3] == "1");
    let heal_only = f[4] == "heal";
    let mut comm = join(name, rank, flags);
    let me = Rank::new(rank, comm, shared);
    let connect = || {
        // SAFETY: a live handle.
        let status = unsafe { rs_container_connect(me.container) };
        assert_eq!(status, RS_OK, "{}", last_error());
        say("connected");
    };
    let heal = || {
        assert_eq!(me.sync(HEALING), RS_OK, "{}", last_error());
        assert!(me.is_source() || (0..TENSORS).all(|t| me.whole(t, HEALING)));
        say(&format!("healed {} plans {}", me.check_params(), me.plans()));
    };
    connect();
    if heal_only {
        heal();
    } else {
        for version in 1.. {
            let begun = Instant::now();
            let status = me.sync(version);
            if status != RS_OK {
                let (text, ms) = (last_error(), begun.elapsed().as_millis());
                let again = me.sync(version);
                assert_eq!(again, RS_ERR_STATE, "a failed container must say so: {}", last_error());
                say(&format!("error {status} {ms} {}; {text}", me.check_params()));
                break;
            }
            assert!(me.is_source() || (0..TENSORS).all(|t| me.whole(t, version)), "version {version}");
        }
    }
    for line in std::io::stdin().lines() {
        let line = line.expect("the parent writes");
        match line.split_once(' ').unwrap_or((&line, "")) {
            ("sum", _) => say(&format!("sum {:x}", me.sum())),
            ("join", name) => {
                let old = comm;
                comm = join(name, rank, flags);
                // SAFETY: live handles; the container holds references of its own.
                unsafe {
                    assert_eq!(rs_container_set_comm(me.container, comm), RS_OK, "{}", last_error());
                    rs_comm_destroy(old);
                }
                connect();
                heal();
            }
            _ => break,
        }
    }
    // SAFETY: destroyed once, and not used after.
    unsafe {
        rs_container_destroy(me.container);
        rs_comm_destroy(comm);
    }
    me.free();
    say("bye");
}

// ---------------------------------------------------------------- the parent

struct Process {
    rank: i32,
    child: Child,
    stdin: Option<ChildStdin>,
    lines: Receiver<String>,
}

impl Process {
    fn start(rank: i32, name: &str, flags: u32, shared: bool, mode: &str) -> Process {
        let mut child = Command::new(std::env::current_exe().expect("this program"))
            .args(["child", "--exact", "--nocapture"])
            .env("RESHARD_KILLS_CHILD", format!("{rank},{name},{flags},{},{mode}", u8::from(shared)))
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .expect("starts");
        let (send, lines) = channel();
        let stdout = child.stdout.take().expect("piped");
        std::thread::spawn(move || {
            for line in BufReader::new(stdout).lines().map_while(Result::ok) {
                // libtest prints "test child ... " on the line of the first word.
                if let Some((_, text)) = line.split_once('@') {
                    let _ = send.send(text.to_string());
                }
            }
        });
        Process { rank, stdin: child.stdin.take(), child, lines }
    }

    fn line(&self, wait: Duration) -> Result<String, String> {
        match self.lines.recv_timeout(wait) {
            Ok(line) => Ok(line),
            Err(RecvTimeoutError::Timeout) => Err(format!("rank {} says nothing for {wait:?}", self.rank)),
            Err(RecvTimeoutError::Disconnected) => Err(format!("rank {} ended", self.rank)),
        }
    }

    fn expect(&self, word: &str, wait: Duration) -> String {
        let line = self.line(wait).unwrap_or_else(|e| panic!("waiting for '{word}': {e}"));
        assert!(line.starts_with(word), "rank {}: expected '{word}', got '{line}'", self.rank);
        line
    }

    fn tell(&mut self, line: &str) {
        writeln!(self.stdin.as_mut().expect("piped"), "{line}").expect("the child reads");
    }

    fn signal(&self, signal: i32) {
        // SAFETY: a process that we started and have not waited for.
        assert_eq!(unsafe { libc::kill(self.child.id() as i32, signal) }, 0);
    }

    fn end(mut self) {
        self.tell("quit");
        self.expect("bye", Duration::from_secs(10));
        assert!(self.child.wait().expect("waits").success(), "rank {}", self.rank);
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn setting(name: &str, default: u64) -> u64 {
    std::env::var(name).ok().map_or(default, |v| v.parse().unwrap_or_else(|_| panic!("{name}={v} is no number")))
}

#[test]
fn dead_and_stopped_processes_are_named_and_change_nothing() {
    let (count, seed) = (setting("RESHARD_KILLS", 5), setting("RESHARD_SEED", 1));
    let mut slowest = [Duration::ZERO; 2];
    for round in 0..count {
        let mut rng = fastrand::Rng::with_seed(seed + round);
        // Each way of moving in turn, each kind of victim in turn.
        let (flags, shared) = [(RS_LOCAL_RING, false), (0, true), (RS_LOCAL_READ, false)][(round % 3) as usize];
        let stop = round % 2 == 1;
        let victims: Vec<i32> = match (round / 2) % 3 {
            0 => vec![rng.i32(0..RANKS / 2)],
            1 => vec![rng.i32(RANKS / 2..RANKS)],
            _ if stop => vec![rng.i32(0..RANKS)],
            _ => (0..RANKS).collect(),
        };
        let pause = Duration::from_micros(rng.u64(0..300_000));
        println!(
            "round {round} seed {}: {} {victims:?} after {pause:?}, flags {flags}",
            seed + round,
            if stop { "stop" } else { "kill" }
        );
        let name = run_name(&format!("kills-{}-{round}", std::process::id()));
        let late = &mut slowest[usize::from(stop)];
        *late = one_round(&name, flags, shared, stop, &victims, pause).max(*late);
        let names = std::fs::read_to_string("/proc/net/unix").expect("reads");
        assert!(!names.contains(&name), "a socket name is left behind");
    }
    println!(
        "survivors' calls ended within {:?} of a kill, {:?} of a stop with deadlines of {TIMEOUT_MS} ms",
        slowest[0], slowest[1]
    );
}

/// How long the survivors took to hear of it.
fn one_round(name: &str, flags: u32, shared: bool, stop: bool, victims: &[i32], pause: Duration) -> Duration {
    let long = Duration::from_secs(40);
    let mut all: Vec<Process> = (0..RANKS).map(|r| Process::start(r, name, flags, shared, "loop")).collect();
    for p in &all {
        p.expect("connected", long);
    }
    std::thread::sleep(pause);
    for &v in victims {
        all[v as usize].signal(if stop { libc::SIGSTOP } else { libc::SIGKILL });
    }
    let struck = Instant::now();
    // A GPU's streams are given 5 seconds more than the deadline, those of a stopped process too.
    let bound = Duration::from_secs(if gpu::wanted() { 7 } else { 5 })
        + if stop { Duration::from_millis(TIMEOUT_MS.into()) } else { Duration::ZERO };
    let mut slowest = Duration::ZERO;
    let mut named = false;
    for p in all.iter().filter(|p| !victims.contains(&p.rank)) {
        let line = p.expect("error", bound + Duration::from_secs(2));
        slowest = struck.elapsed();
        println!("  rank {} after {slowest:?}: {line}", p.rank);
        assert!(slowest < bound, "rank {} took {slowest:?}", p.rank);
        named = true;
        assert!(
            victims.iter().any(|v| line.contains(&format!("rank {v}"))),
            "rank {} names no victim of {victims:?}: {line}",
            p.rank
        );
    }
    assert!(named || victims.len() == RANKS as usize);
    let next = run_name(&format!("{name}-again"));
    if stop {
        let survivors: Vec<usize> = (0..all.len()).filter(|&i| !victims.contains(&(i as i32))).collect();
        let sums = |all: &mut Vec<Process>| -> Vec<String> {
            let ask = |&i: &usize| {
                all[i].tell("sum");
                all[i].expect("sum", long)
            };
            survivors.iter().map(ask).collect()
        };
        let before = sums(&mut all);
        for &v in victims {
            all[v as usize].signal(libc::SIGCONT);
            let line = all[v as usize].expect("error", Duration::from_secs(5));
            println!("  rank {v}, continued: {line}");
        }
        std::thread::sleep(Duration::from_millis(50));
        assert_eq!(before, sums(&mut all), "a process that came back late changed another's memory");
    } else {
        for &v in victims {
            let fresh = Process::start(v, &next, flags, shared, "heal");
            drop(std::mem::replace(&mut all[v as usize], fresh));
        }
    }
    for p in all.iter_mut().filter(|p| stop || !victims.contains(&p.rank)) {
        p.tell(&format!("join {next}"));
    }
    for p in &all {
        p.expect("connected", long);
        let line = p.expect("healed", long);
        // Of the same layouts: who has planned, need not do so again for one that has come back.
        assert!(line.ends_with(" plans 1"), "rank {}: {line}", p.rank);
    }
    // Readers first: a GPU's memory is not freed while another process has it open.
    for p in all.into_iter().rev() {
        p.end();
    }
    slowest
}
