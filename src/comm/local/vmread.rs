//! Reading another process's memory through the kernel: one copy, no help from the owner.
//!
//! Knows processes, addresses and strided copies. Must not know ranks.

use crate::device::Mem;
use crate::geom::StridedCopy;
use std::io;

/// Most pieces of one system call (the kernel's UIO_MAXIOV).
const PIECES: usize = 1024;
/// Most bytes of one system call: the kernel's limit is just below 2 GiB.
const BYTES: u64 = 1 << 30;

/// Whether one byte at each end of a block can be read. Says why not.
pub fn probe(pid: i32, addr: u64, len: u64) -> io::Result<()> {
    let mut byte = 0u8;
    let last = len.checked_sub(1).and_then(|n| addr.checked_add(n));
    for at in last.into_iter().chain(Some(addr).filter(|_| len > 0)) {
        let mut batch = Batch::default();
        batch.remote.push(piece(at, 1));
        batch.local.push(piece((&raw mut byte) as u64, 1));
        batch.bytes = 1;
        // SAFETY: one byte of ours, which nothing else uses meanwhile.
        unsafe { batch.run(pid)? };
    }
    Ok(())
}

/// Reads `copy` from `base` in a process into `dst`.
///
/// # Safety
/// - `copy.dst_end() <= dst.len()`.
pub unsafe fn read(pid: i32, base: u64, dst: Mem, copy: &StridedCopy) -> io::Result<()> {
    let mut batch = Batch::default();
    let mut index = vec![0u64; copy.axes.len()];
    let (mut src, mut to) = (base.wrapping_add(copy.src), dst.addr() as u64 + copy.dst);
    loop {
        let mut done = 0;
        while done < copy.run {
            if batch.full() {
                // SAFETY: every local piece lies in `dst` (this function's condition).
                unsafe { batch.run(pid)? };
            }
            let n = (copy.run - done).min(BYTES - batch.bytes);
            batch.add(src + done, to + done, n);
            done += n;
        }
        // Counts up like an odometer, the last axis fastest.
        let Some(at) = (0..index.len()).rev().find(|&a| index[a] + 1 < copy.axes[a].extent) else { break };
        index[at] += 1;
        (src, to) = (src + copy.axes[at].src, to + copy.axes[at].dst);
        for (n, axis) in index.iter_mut().zip(&copy.axes).skip(at + 1) {
            (src, to) = (src - *n * axis.src, to - *n * axis.dst);
            *n = 0;
        }
    }
    // SAFETY: as above.
    unsafe { batch.run(pid) }
}

fn piece(addr: u64, len: u64) -> libc::iovec {
    libc::iovec { iov_base: addr as *mut _, iov_len: len as usize }
}

/// Pieces of both sides, in the same order and of the same sum.
#[derive(Default)]
struct Batch {
    remote: Vec<libc::iovec>,
    local: Vec<libc::iovec>,
    bytes: u64,
}

impl Batch {
    fn full(&self) -> bool {
        self.remote.len() == PIECES || self.local.len() == PIECES || self.bytes == BYTES
    }

    /// Pieces that continue the one before, on either side, join it: fewer pages are looked up.
    fn add(&mut self, src: u64, dst: u64, len: u64) {
        for (list, at) in [(&mut self.remote, src), (&mut self.local, dst)] {
            match list.last_mut() {
                Some(last) if last.iov_base as u64 + last.iov_len as u64 == at => last.iov_len += len as usize,
                _ => list.push(piece(at, len)),
            }
        }
        self.bytes += len;
    }

    /// Reads all of it and empties it. A read that ends early is taken up where it ended.
    ///
    /// # Safety
    /// - The local pieces are memory that may be written, and nothing else uses it meanwhile.
    unsafe fn run(&mut self, pid: i32) -> io::Result<()> {
        while self.bytes > 0 {
            let (local, remote) = (&self.local, &self.remote);
            // SAFETY: both lists outlive the call; the local pieces are this function's condition; the kernel checks the remote ones.
            let n = unsafe { libc::process_vm_readv(pid, local.as_ptr(), local.len() as _, remote.as_ptr(), remote.len() as _, 0) };
            if n < 0 {
                return Err(io::Error::last_os_error());
            }
            if n == 0 {
                return Err(io::Error::from_raw_os_error(libc::EFAULT));
            }
            skip(&mut self.local, n as usize);
            skip(&mut self.remote, n as usize);
            self.bytes -= n as u64;
        }
        Ok(())
    }
}

/// Takes `n` bytes from the front.
fn skip(pieces: &mut Vec<libc::iovec>, mut n: usize) {
    let whole = pieces
        .iter()
        .take_while(|p| {
            if p.iov_len <= n {
                n -= p.iov_len;
                true
            } else {
                false
            }
        })
        .count();
    pieces.drain(..whole);
    if let Some(first) = pieces.first_mut().filter(|_| n > 0) {
        *first = piece(first.iov_base as u64 + n as u64, (first.iov_len - n) as u64);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What a strided copy does, byte by byte.
    fn expected(src: &[u8], dst: &mut [u8], copy: &StridedCopy) {
        let total: u64 = copy.axes.iter().map(|a| a.extent).product();
        for n in 0..total {
            let (mut rest, mut from, mut to) = (n, copy.src, copy.dst);
            for a in copy.axes.iter().rev() {
                (from, to) = (from + rest % a.extent * a.src, to + rest % a.extent * a.dst);
                rest /= a.extent;
            }
            for b in 0..copy.run {
                dst[(to + b) as usize] = src[(from + b) as usize];
            }
        }
    }

    fn check(src: &[u8], size: usize, copy: &StridedCopy) {
        let (mut want, mut got) = (vec![0u8; size], vec![0u8; size]);
        expected(src, &mut want, copy);
        let pid = std::process::id() as i32;
        // SAFETY: our own vector, used by nothing else; the copy ends inside it (asserted).
        unsafe {
            assert!(copy.dst_end() <= size as u64 && copy.src_end() <= src.len() as u64);
            read(pid, src.as_ptr() as u64, Mem::new(got.as_mut_ptr(), size), copy).unwrap();
        }
        assert!(want == got, "{copy:?}");
    }

    #[test]
    fn copies_of_any_shape_arrive() {
        let src: Vec<u8> = (0..4_000_000u32).map(|i| (i.wrapping_mul(2_654_435_761) >> 24) as u8).collect();
        // A memcpy, rows, more rows than one call takes, a transpose of single items, three axes with both sides strided.
        check(&src, 1000, &StridedCopy::new(2, 3, 1, [(400, 1, 1)]));
        check(&src, 600_000, &StridedCopy::new(2, 5, 0, [(300, 6000, 1000), (1000, 1, 1)]));
        check(&src, 40_000, &StridedCopy::new(2, 0, 0, [(5000, 300, 4), (4, 1, 1)]));
        check(&src, 80_000, &StridedCopy::new(4, 0, 0, [(100, 1, 200), (200, 100, 1)]));
        check(&src, 2_000_000, &StridedCopy::new(1, 7, 11, [(13, 100_000, 60_000), (17, 3000, 3500), (900, 2, 3)]));
        // Contiguous at one side only.
        check(&src, 2_000_000, &StridedCopy::new(1, 0, 0, [(3000, 1300, 600), (600, 1, 1)]));
    }

    #[test]
    fn memory_that_is_not_there_is_an_error() {
        let pid = std::process::id() as i32;
        let mut got = [0u8; 64];
        let copy = StridedCopy::new(1, 0, 0, [(64, 1, 1)]);
        // SAFETY: 64 bytes of ours.
        let e = unsafe { read(pid, 4096, Mem::new(got.as_mut_ptr(), 64), &copy) }.unwrap_err();
        assert_eq!(e.raw_os_error(), Some(libc::EFAULT));
        assert!(probe(pid, 4096, 64).is_err());
        assert!(probe(pid, got.as_ptr() as u64, 64).is_ok());
        assert!(probe(pid, 4096, 0).is_ok());
    }
}
