//! What all targets share: calls as C makes them, and what must hold whatever comes in.
//!
//! A panic ends the process (libfuzzer-sys sees to that) though the library would turn it into a status. So does memory beyond a
//! budget: an allocator counts what lives and aborts, so that the input at fault is known.

pub mod peers;
pub mod specs;

use reshard::abi::*;
use reshard::ffi::api::*;
use std::alloc::{GlobalAlloc, Layout, System};
use std::ffi::CStr;
use std::ptr;
use std::sync::atomic::{AtomicI64, Ordering::Relaxed};

/// Memory that any input may take, and how much more for each of its bytes.
const BASE: i64 = 64 << 20;
const PER_BYTE: i64 = 4 << 10;

/// Longest text of an error, without its NUL.
const LONGEST_TEXT: usize = 2047;

struct Counted;

/// Bytes that live now, and how many may.
static LIVE: AtomicI64 = AtomicI64::new(0);
static MOST: AtomicI64 = AtomicI64::new(i64::MAX);

#[global_allocator]
static ALLOCATOR: Counted = Counted;

fn count(by: i64) {
    let live = LIVE.fetch_add(by, Relaxed) + by;
    let most = MOST.load(Relaxed);
    if by > 0 && live > most {
        // First, as a message allocates.
        MOST.store(i64::MAX, Relaxed);
        eprintln!("fuzz: {live} bytes live where {most} may: a block of {by}");
        std::process::abort();
    }
}

// SAFETY: System's, and counting changes no pointer.
unsafe impl GlobalAlloc for Counted {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        count(layout.size() as i64);
        // SAFETY: the caller's promise, here and below.
        unsafe { System.alloc(layout) }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        count(layout.size() as i64);
        // SAFETY: as above.
        unsafe { System.alloc_zeroed(layout) }
    }

    unsafe fn dealloc(&self, at: *mut u8, layout: Layout) {
        count(-(layout.size() as i64));
        // SAFETY: as above.
        unsafe { System.dealloc(at, layout) }
    }

    unsafe fn realloc(&self, at: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        count(size as i64 - layout.size() as i64);
        // SAFETY: as above.
        unsafe { System.realloc(at, layout, size) }
    }
}

/// Runs one input of so many bytes within its budget of memory.
pub fn within_budget(len: usize, body: impl FnOnce()) {
    MOST.store(LIVE.load(Relaxed) + BASE + PER_BYTE * len as i64, Relaxed);
    body();
    MOST.store(i64::MAX, Relaxed);
}

/// What a peer sends is input too: so many bytes more.
pub fn received(bytes: usize) {
    MOST.fetch_add(4 * bytes as i64, Relaxed);
}

/// Whether a call succeeded. A refusal says why, in words of bounded length, and is no bug of the library's.
pub fn ok(status: rs_status_t) -> bool {
    if status >= 0 {
        return true;
    }
    // SAFETY: this thread's text, NUL-terminated.
    let text = unsafe { CStr::from_ptr(rs_last_error()) };
    let text = text.to_str().expect("an error's text is UTF-8");
    assert!(!text.is_empty() && text.len() <= LONGEST_TEXT, "an error's text of {} bytes", text.len());
    // What the hostile rank says of itself is its own affair.
    assert!(status != RS_ERR_INTERNAL || text.starts_with("rank 1: "), "a bug: {text}");
    // SAFETY: static text.
    assert!(unsafe { CStr::from_ptr(rs_status_name(status)) } != c"unknown status", "status {status}");
    false
}

/// Calls a function that gives text or bytes (buf, cap, len) as the header asks for: once for the length, once for the bytes.
pub fn bytes(call: impl Fn(*mut u8, usize, *mut usize) -> rs_status_t) -> Option<Vec<u8>> {
    let mut len = 0;
    let asked = call(ptr::null_mut(), 0, &mut len);
    if asked != RS_ERR_TOO_SMALL {
        assert!(asked < 0, "a call without room for its answer succeeded");
        ok(asked);
        return None;
    }
    let mut out = vec![0; len];
    // Text whose numbers are measured (seconds) may be another time a little longer.
    out.resize(len + 64, 0);
    if !ok(call(out.as_mut_ptr(), out.len(), &mut len)) {
        return None;
    }
    assert!(len <= out.len());
    out.truncate(len);
    Some(out)
}

/// What a container tells of itself: must be had, or be refused with words.
///
/// # Safety
/// `container` is alive.
pub unsafe fn describe(container: *const rs_container_t) {
    for what in [RS_DESCRIBE_PLAN, RS_DESCRIBE_STATS, RS_DESCRIBE_LAYOUT] {
        // SAFETY: this function's promise; the buffer is as long as it says.
        let text = bytes(|buf, cap, len| unsafe { rs_container_describe(container, what, ptr::null(), buf.cast(), cap, len) });
        assert!(text.is_none_or(|t| CStr::from_bytes_with_nul(&t).is_ok_and(|t| t.to_str().is_ok())));
    }
}

/// A struct of zeros with its size set.
pub fn sized<T: Copy>() -> T {
    // SAFETY: the structs of `abi` hold integers, pointers and optional functions, and those that grow start with their size.
    unsafe {
        let mut out: T = std::mem::zeroed();
        (&raw mut out).cast::<usize>().write(size_of::<T>());
        out
    }
}

/// Numbers out of the fuzzer's bytes; zeros when they have run out.
pub struct Input<'a>(pub &'a [u8]);

impl Input<'_> {
    pub fn byte(&mut self) -> u8 {
        self.take(1)[0]
    }

    pub fn half(&mut self) -> u32 {
        let b = self.take(4);
        u32::from_le_bytes([b[0], b[1], b[2], b[3]])
    }

    pub fn word(&mut self) -> u64 {
        u64::from(self.half()) | u64::from(self.half()) << 32
    }

    /// A number of any size, small ones likely, and those next to the ends of the types.
    pub fn number(&mut self) -> i64 {
        match self.byte() {
            b @ 0..=199 => i64::from(b % 64),
            b @ 200..=219 => 1 << (b - 200),
            220..=229 => i64::from(self.half() as i32),
            230..=239 => i64::MAX - i64::from(self.byte()),
            240..=244 => -i64::from(self.byte()),
            245..=249 => (1 << 32) - 2 + i64::from(self.byte() % 4),
            _ => self.word() as i64,
        }
    }

    pub fn done(&self) -> bool {
        self.0.is_empty()
    }

    /// The next `n` bytes, filled up with zeros.
    pub fn take(&mut self, n: usize) -> Vec<u8> {
        let (head, tail) = self.0.split_at(n.min(self.0.len()));
        self.0 = tail;
        let mut out = head.to_vec();
        out.resize(n, 0);
        out
    }

    /// Changes some bytes: each step is a place and what to do there.
    pub fn edit(&mut self, bytes: &mut Vec<u8>, most: usize) {
        for _ in 0..most {
            if self.done() || bytes.is_empty() {
                return;
            }
            let at = usize::from(self.byte()) | usize::from(self.byte()) << 8;
            let at = at % bytes.len();
            match self.byte() % 8 {
                0 => bytes[at] ^= 1 << (self.byte() % 8),
                1 => bytes[at] = self.byte(),
                2 => bytes.truncate(at),
                3 => bytes.insert(at, self.byte()),
                4 => drop(bytes.remove(at)),
                5 => {
                    // A number as postcard writes it.
                    let mut n = self.number() as u64;
                    let mut varint = vec![];
                    while n > 127 {
                        varint.push(n as u8 | 128);
                        n >>= 7;
                    }
                    varint.push(n as u8);
                    let old = bytes[at..].iter().position(|b| b & 128 == 0).map_or(1, |n| n + 1);
                    bytes.splice(at..(at + old).min(bytes.len()), varint);
                }
                6 => {
                    let word = self.number().to_le_bytes();
                    let n = word.len().min(bytes.len() - at);
                    bytes[at..at + n].copy_from_slice(&word[..n]);
                }
                _ => {
                    let n = usize::from(self.byte() % 32).min(bytes.len() - at);
                    let copy = bytes[at..at + n].to_vec();
                    bytes.splice(at..at, copy);
                }
            }
        }
    }
}

/// A table of `rank` with this body: what stands before it is right.
pub fn sealed(rank: u64, body: &[u8]) -> Vec<u8> {
    let digest = xxhash_rust::xxh3::xxh3_64(body);
    // Magic and version, as a container of this library writes them.
    let head = u64::from(u32::from_le_bytes(*b"RSHT")) | u64::from(reshard::wire::WIRE_VERSION) << 32;
    let words = [head, rank, body.len() as u64, digest];
    words.iter().flat_map(|w| w.to_le_bytes()).chain(body.iter().copied()).collect()
}
