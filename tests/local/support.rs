//! Ranks as threads, ranks as processes, and memory to move.

use reshard::comm::local::{Force, join};
use reshard::comm::{Comm, Deadline};
use reshard::device::Mem;
use reshard::error::{Error, Result};
use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

/// Long enough for anything that works, on a busy machine too.
pub const LONG: Duration = Duration::from_secs(60);

pub fn soon() -> Deadline {
    Deadline::after(LONG)
}

/// A name that no other run of this or another test has.
pub fn fresh() -> String {
    static NEXT: AtomicU32 = AtomicU32::new(0);
    format!("test-{}-{}", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed))
}

/// Runs `f` on every rank of a run of threads; gives what each says.
pub fn ranks<T: Send>(world: u32, force: Option<Force>, f: impl Fn(Arc<dyn Comm>) -> T + Sync) -> Vec<T> {
    let name = fresh();
    std::thread::scope(|scope| {
        let threads: Vec<_> = (0..world)
            .map(|rank| {
                let (name, f) = (&name, &f);
                scope.spawn(move || f(join(name, rank, world, LONG, force).unwrap()))
            })
            .collect();
        threads.into_iter().map(|t| t.join().unwrap()).collect()
    })
}

/// Bytes that the test owns, as the library sees them.
pub fn mem(bytes: &mut [u8]) -> Mem {
    // SAFETY: the tests keep the slice while the library may use it, and touch it only when the protocol lets them.
    unsafe { Mem::new(bytes.as_mut_ptr(), bytes.len()) }
}

/// What lies in a block.
pub fn bytes(mem: Mem) -> Vec<u8> {
    // SAFETY: the tests ask for blocks that are mapped and that nobody writes now.
    unsafe { std::slice::from_raw_parts(mem.addr() as *const u8, mem.len()) }.to_vec()
}

/// Fills a block.
pub fn write(mem: Mem, from: &[u8]) {
    assert!(from.len() <= mem.len());
    // SAFETY: inside the block (asserted), which is the caller's to write now.
    unsafe { std::ptr::copy_nonoverlapping(from.as_ptr(), mem.addr() as *mut u8, from.len()) };
}

/// `len` bytes that tell their seed and place.
pub fn pattern(seed: u64, len: usize) -> Vec<u8> {
    let mut random = fastrand::Rng::with_seed(seed);
    let mut out = vec![0; len];
    random.fill(&mut out);
    out
}

/// A rank in a process of its own.
pub struct Rank {
    pub child: Child,
    out: BufReader<std::process::ChildStdout>,
}

/// Starts `role` as `rank`; as user `nobody` if `stranger` and we may.
pub fn start(role: &str, name: &str, rank: u32, world: u32, stranger: bool) -> Rank {
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args(["--exact", "processes::role", "--nocapture", "--test-threads=1"]);
    command.env("RESHARD_TEST_ROLE", format!("{role} {name} {rank} {world}"));
    command.stdin(Stdio::piped()).stdout(Stdio::piped());
    // SAFETY: takes nothing, changes nothing.
    if stranger && unsafe { libc::geteuid() } == 0 {
        command.uid(65_534).gid(65_534);
    }
    let mut child = command.spawn().unwrap();
    let out = BufReader::new(child.stdout.take().unwrap());
    Rank { child, out }
}

impl Rank {
    pub fn pid(&self) -> i32 {
        self.child.id() as i32
    }

    /// The next line that the rank said; empty once it has ended.
    pub fn heard(&mut self) -> String {
        let mut line = String::new();
        while self.out.read_line(&mut line).unwrap() > 0 {
            if let Some(said) = line.trim_end().split_once("said: ") {
                return said.1.to_string();
            }
            line.clear();
        }
        String::new()
    }

    /// Lets the rank go on where it called [`pause`].
    pub fn go(&mut self) {
        self.child.stdin.as_mut().unwrap().write_all(b"g").unwrap();
    }

    pub fn signal(&self, signal: i32) {
        // SAFETY: a child of ours that has not been waited for.
        unsafe { libc::kill(self.pid(), signal) };
    }

    /// Stops the rank and returns when it has stopped.
    pub fn stop(&self) {
        self.signal(libc::SIGSTOP);
        let mut status = 0;
        // SAFETY: a child of ours; `status` outlives the call. Only its stop is taken, not its end.
        let stopped = unsafe { libc::waitpid(self.pid(), &mut status, libc::WUNTRACED) };
        assert!(stopped == self.pid() && libc::WIFSTOPPED(status));
    }
}

impl Drop for Rank {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// In a rank: tells the test something.
pub fn say(what: impl std::fmt::Display) {
    println!("said: {what}");
}

/// In a rank: waits for the test's [`Rank::go`].
pub fn pause() {
    assert_eq!(std::io::stdin().read(&mut [0]).unwrap(), 1, "the test has ended");
}

/// In a rank: tells how a call went.
pub fn report<T>(result: &Result<T>) {
    match result {
        Ok(_) => say("ok"),
        Err(e) => say(format_args!("{} {}", e.status(), e.text().replace('\n', " "))),
    }
}

/// What [`report`] told.
pub fn parse(line: &str) -> Result<()> {
    match line.split_once(' ') {
        Some((status, text)) => Err(Error::new(status.parse().unwrap(), text)),
        None => {
            assert_eq!(line, "ok");
            Ok(())
        }
    }
}
