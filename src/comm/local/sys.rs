//! The system calls of this communicator in safe terms: packet sockets with abstract names, sealed shared memory, futexes.
//!
//! Knows file descriptors and bytes. Must not know ranks or what a packet means.

use std::io;
use std::mem::{offset_of, size_of, zeroed};
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::ptr::{null, null_mut};
use std::sync::atomic::{AtomicU32, AtomicU64};
use std::time::Duration;

/// Most descriptors that one packet carries.
pub const MAX_FDS: usize = 64;

/// The answer of a system call, asked again while signals interrupt it.
fn call(mut f: impl FnMut() -> isize) -> io::Result<usize> {
    loop {
        if let Ok(n) = usize::try_from(f()) {
            return Ok(n);
        }
        let e = io::Error::last_os_error();
        if e.kind() != io::ErrorKind::Interrupted {
            return Err(e);
        }
    }
}

fn owned(fd: usize) -> OwnedFd {
    // SAFETY: the kernel has just made this descriptor for us, and nobody else knows it.
    unsafe { OwnedFd::from_raw_fd(fd as i32) }
}

/// Who is at the other end of a connection, as the kernel saw it: never what the peer claims.
#[derive(Clone, Copy, Debug)]
pub struct Peer {
    /// Its process in our pid namespace; 0: not visible from here.
    pub pid: i32,
    /// Its effective user.
    pub uid: u32,
}

/// Bytes of a page.
pub fn page() -> usize {
    // SAFETY: takes a number, changes nothing.
    usize::try_from(unsafe { libc::sysconf(libc::_SC_PAGESIZE) }).unwrap_or(4096)
}

/// Our effective user.
pub fn user() -> u32 {
    // SAFETY: takes nothing, changes nothing.
    unsafe { libc::geteuid() }
}

/// A packet socket: ordered, no packet lost or merged, not blocking, closed on exec.
pub fn socket() -> io::Result<OwnedFd> {
    let kind = libc::SOCK_SEQPACKET | libc::SOCK_NONBLOCK | libc::SOCK_CLOEXEC;
    // SAFETY: no pointer is passed.
    call(|| unsafe { libc::socket(libc::AF_UNIX, kind, 0) } as isize).map(owned)
}

/// An abstract address: a name without a file, which goes when its last socket does.
fn address(name: &str) -> io::Result<(libc::sockaddr_un, libc::socklen_t)> {
    // SAFETY: a struct of integers, for which all zeros is a value.
    let mut at: libc::sockaddr_un = unsafe { zeroed() };
    at.sun_family = libc::AF_UNIX as libc::sa_family_t;
    // The first byte stays 0: that makes the name abstract.
    if name.len() + 1 > at.sun_path.len() {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    for (to, from) in at.sun_path[1..].iter_mut().zip(name.bytes()) {
        *to = from as libc::c_char;
    }
    Ok((at, (offset_of!(libc::sockaddr_un, sun_path) + 1 + name.len()) as libc::socklen_t))
}

/// Takes a name and listens under it.
pub fn listen(name: &str) -> io::Result<OwnedFd> {
    let (at, len) = address(name)?;
    let socket = socket()?;
    // SAFETY: `at` is an address of `len` bytes that lives through the call.
    call(|| unsafe { libc::bind(socket.as_raw_fd(), (&raw const at).cast(), len) } as isize)?;
    // SAFETY: no pointer is passed.
    call(|| unsafe { libc::listen(socket.as_raw_fd(), libc::SOMAXCONN) } as isize)?;
    Ok(socket)
}

/// Connects to a name at once, or not at all.
pub fn connect(name: &str) -> io::Result<OwnedFd> {
    let (at, len) = address(name)?;
    let socket = socket()?;
    // SAFETY: `at` is an address of `len` bytes that lives through the call.
    call(|| unsafe { libc::connect(socket.as_raw_fd(), (&raw const at).cast(), len) } as isize)?;
    Ok(socket)
}

/// The next connection of a listening socket; `None`: none yet.
pub fn accept(listener: BorrowedFd<'_>) -> io::Result<Option<OwnedFd>> {
    let flags = libc::SOCK_NONBLOCK | libc::SOCK_CLOEXEC;
    // SAFETY: null pointers ask for no address.
    match call(|| unsafe { libc::accept4(listener.as_raw_fd(), null_mut(), null_mut(), flags) } as isize) {
        Ok(fd) => Ok(Some(owned(fd))),
        Err(e) if matches!(e.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::ConnectionAborted) => Ok(None),
        Err(e) => Err(e),
    }
}

/// Who is at the other end.
pub fn peer(socket: BorrowedFd<'_>) -> io::Result<Peer> {
    // SAFETY: a struct of integers, for which all zeros is a value.
    let mut cred: libc::ucred = unsafe { zeroed() };
    let mut len = size_of::<libc::ucred>() as libc::socklen_t;
    let (level, name, fd) = (libc::SOL_SOCKET, libc::SO_PEERCRED, socket.as_raw_fd());
    // SAFETY: `cred` takes `len` bytes and outlives the call.
    call(|| unsafe { libc::getsockopt(fd, level, name, (&raw mut cred).cast(), &mut len) } as isize)?;
    Ok(Peer { pid: cred.pid, uid: cred.uid })
}

/// Lets a socket hold at least `bytes` of packets that its peer has not taken.
pub fn widen(socket: BorrowedFd<'_>, bytes: i32) {
    let (level, name, len) = (libc::SOL_SOCKET, libc::SO_SNDBUF, size_of::<i32>() as libc::socklen_t);
    // SAFETY: `bytes` is an int that outlives the call. A refusal leaves the limit as it was.
    unsafe { libc::setsockopt(socket.as_raw_fd(), level, name, (&raw const bytes).cast(), len) };
}

/// Ends a connection for both sides; what the peer has not read yet stays readable.
pub fn shutdown(socket: BorrowedFd<'_>) {
    // SAFETY: no pointer is passed. Fails only where the connection has ended already.
    unsafe { libc::shutdown(socket.as_raw_fd(), libc::SHUT_RDWR) };
}

/// Room for the descriptors of one packet, aligned as the kernel wants it.
type Control = [u64; 40];
const _: () = assert!(size_of::<Control>() >= 16 + size_of::<u64>() + MAX_FDS * size_of::<i32>());

fn message(parts: &mut [libc::iovec], control: &mut Control, len: usize) -> libc::msghdr {
    // SAFETY: a struct of integers and pointers, for which all zeros is a value.
    let mut m: libc::msghdr = unsafe { zeroed() };
    m.msg_iov = parts.as_mut_ptr();
    m.msg_iovlen = parts.len() as _;
    if len > 0 {
        m.msg_control = control.as_mut_ptr().cast();
        m.msg_controllen = len as _;
    }
    m
}

/// Sends one packet of a head and a body, with descriptors. `false`: there is no room for it now.
pub fn send(socket: BorrowedFd<'_>, head: &[u8], body: &[u8], fds: &[BorrowedFd<'_>]) -> io::Result<bool> {
    assert!(fds.len() <= MAX_FDS);
    let part = |b: &[u8]| libc::iovec { iov_base: b.as_ptr().cast_mut().cast(), iov_len: b.len() };
    let mut parts = [part(head), part(body)];
    let mut control: Control = [0; 40];
    let bytes = (fds.len() * size_of::<i32>()) as u32;
    // SAFETY: plain arithmetic.
    let space = if fds.is_empty() { 0 } else { unsafe { libc::CMSG_SPACE(bytes) as usize } };
    let m = message(&mut parts, &mut control, space);
    if space > 0 {
        // SAFETY: `control` has room for one header and MAX_FDS descriptors (asserted above), and is aligned for a header.
        unsafe {
            let c = libc::CMSG_FIRSTHDR(&m);
            (*c).cmsg_level = libc::SOL_SOCKET;
            (*c).cmsg_type = libc::SCM_RIGHTS;
            (*c).cmsg_len = libc::CMSG_LEN(bytes) as _;
            let to = libc::CMSG_DATA(c).cast::<i32>();
            for (i, fd) in fds.iter().enumerate() {
                to.add(i).write_unaligned(fd.as_raw_fd());
            }
        }
    }
    let flags = libc::MSG_NOSIGNAL | libc::MSG_DONTWAIT;
    // SAFETY: `m` points to `parts`, which point to the caller's slices, and to `control`; all outlive the call and are only read.
    match call(|| unsafe { libc::sendmsg(socket.as_raw_fd(), &m, flags) }) {
        Ok(_) => Ok(true),
        Err(e) if e.kind() == io::ErrorKind::WouldBlock => Ok(false),
        Err(e) => Err(e),
    }
}

/// What a look at a socket gave.
#[derive(Debug)]
pub enum Received {
    /// A packet of so many bytes, and what it carried.
    Packet(usize, Vec<OwnedFd>),
    /// Nothing yet.
    Nothing,
    /// The peer has closed it.
    End,
}

/// Takes one packet.
pub fn receive(socket: BorrowedFd<'_>, into: &mut [u8]) -> io::Result<Received> {
    let mut parts = [libc::iovec { iov_base: into.as_mut_ptr().cast(), iov_len: into.len() }];
    let mut control: Control = [0; 40];
    let mut m = message(&mut parts, &mut control, size_of::<Control>());
    let flags = libc::MSG_DONTWAIT | libc::MSG_CMSG_CLOEXEC;
    // SAFETY: `m` points to `parts`, which point to `into`, and to `control`; all outlive the call and nobody else uses them.
    let n = match call(|| unsafe { libc::recvmsg(socket.as_raw_fd(), &mut m, flags) }) {
        Ok(n) => n,
        Err(e) if e.kind() == io::ErrorKind::WouldBlock => return Ok(Received::Nothing),
        // The peer closed with something of ours unread. What it sent before is still to be had.
        Err(e) if e.kind() == io::ErrorKind::ConnectionReset => return receive(socket, into),
        Err(e) => return Err(e),
    };
    let mut fds = vec![];
    // SAFETY: the kernel wrote whole headers into `control` and their total length into `m`; each descriptor in them is new and ours.
    unsafe {
        let mut c = libc::CMSG_FIRSTHDR(&m);
        while !c.is_null() {
            if ((*c).cmsg_level, (*c).cmsg_type) == (libc::SOL_SOCKET, libc::SCM_RIGHTS) {
                let bytes = (*c).cmsg_len as usize - libc::CMSG_LEN(0) as usize;
                let from = libc::CMSG_DATA(c).cast::<i32>();
                fds.extend((0..bytes / size_of::<i32>()).map(|i| OwnedFd::from_raw_fd(from.add(i).read_unaligned())));
            }
            c = libc::CMSG_NXTHDR(&m, c);
        }
    }
    if m.msg_flags & libc::MSG_CTRUNC != 0 {
        return Err(io::Error::other("descriptors were lost on the way: is the limit of open files (ulimit -n) reached?"));
    }
    if m.msg_flags & libc::MSG_TRUNC != 0 {
        return Err(io::Error::other("a packet is longer than any of ours"));
    }
    Ok(if n == 0 { Received::End } else { Received::Packet(n, fds) })
}

/// A descriptor to poll for `events`; negative ones are skipped.
pub fn watch(fd: Option<BorrowedFd<'_>>, events: i16) -> libc::pollfd {
    libc::pollfd { fd: fd.map_or(-1, |f| f.as_raw_fd()), events, revents: 0 }
}

/// Sleeps until one of them is ready, a signal comes or `timeout` has passed.
pub fn poll(fds: &mut [libc::pollfd], timeout: Duration) -> io::Result<()> {
    let t = timespec(timeout);
    // SAFETY: the slice and `t` outlive the call; a null mask changes no signal.
    let n = unsafe { libc::ppoll(fds.as_mut_ptr(), fds.len() as libc::nfds_t, &t, null()) };
    match io::Error::last_os_error() {
        e if n < 0 && e.kind() != io::ErrorKind::Interrupted => Err(e),
        _ => Ok(()),
    }
}

fn timespec(d: Duration) -> libc::timespec {
    libc::timespec { tv_sec: d.as_secs().min(1 << 30) as libc::time_t, tv_nsec: d.subsec_nanos() as _ }
}

/// A descriptor that becomes readable when the process ends, even while a child of it keeps its sockets open. `None`: an old kernel,
/// or no such process.
pub fn process(pid: i32) -> Option<OwnedFd> {
    // SAFETY: no pointer is passed. The descriptor is closed on exec by definition.
    call(|| unsafe { libc::syscall(libc::SYS_pidfd_open, pid, 0) } as isize).ok().map(owned)
}

/// Sleeps while `word` is `expected`, at most `timeout`; may wake for no reason.
pub fn futex_wait(word: &AtomicU32, expected: u32, timeout: Duration) {
    let t = timespec(timeout);
    // SAFETY: the word and `t` outlive the call, which writes neither. Not the private kind: other processes wake us.
    unsafe { libc::syscall(libc::SYS_futex, word.as_ptr(), libc::FUTEX_WAIT, expected, &raw const t) };
}

/// Wakes all who sleep on `word`.
pub fn futex_wake(word: &AtomicU32) {
    // SAFETY: the word outlives the call, which does not write it.
    unsafe { libc::syscall(libc::SYS_futex, word.as_ptr(), libc::FUTEX_WAKE, i32::MAX) };
}

/// Bytes of shared memory that are taken at once.
const PART: usize = 4 << 20;

/// Bytes that the system could give without taking any from a process, by its own estimate.
fn available() -> Option<u64> {
    let info = std::fs::read_to_string("/proc/meminfo").ok()?;
    let kib = info.lines().find_map(|l| l.strip_prefix("MemAvailable:")?.trim().strip_suffix(" kB"))?;
    kib.parse::<u64>().ok()?.checked_mul(1024)
}

/// Shared memory of `len` bytes without a name, zeroed, its size fixed for ever: no holder can take a page from under another.
pub fn shared(label: &std::ffi::CStr, len: usize) -> io::Result<OwnedFd> {
    // The kernel does not count this kind of memory against what is there: asked for too much, it kills processes to get it.
    if let Some(free) = available().filter(|&free| len as u64 > free) {
        return Err(io::Error::new(io::ErrorKind::OutOfMemory, format!("the system has {free} available")));
    }
    let make = |flags: u32| {
        // SAFETY: the label is a C string that outlives the call.
        call(|| unsafe { libc::memfd_create(label.as_ptr(), libc::MFD_CLOEXEC | flags) } as isize).map(owned)
    };
    // Some hosts refuse memory that could be executed; kernels before 6.3 do not know how to promise that it cannot.
    let fd = make(libc::MFD_NOEXEC_SEAL).or_else(|_| make(libc::MFD_ALLOW_SEALING))?;
    let size = i64::try_from(len).map_err(|_| io::Error::from(io::ErrorKind::OutOfMemory))?;
    // SAFETY: no pointer is passed.
    call(|| unsafe { libc::ftruncate(fd.as_raw_fd(), size) } as isize)?;
    // Takes the pages now: without memory this is an error, later it would be a signal. By parts: a caller with a timer interrupts
    // this now and then, and old kernels begin an interrupted part anew.
    for at in (0..size).step_by(PART) {
        let part = (size - at).min(PART as i64);
        // SAFETY: no pointer is passed.
        call(|| unsafe { libc::fallocate(fd.as_raw_fd(), 0, at, part) } as isize)?;
    }
    let seals = libc::F_SEAL_SHRINK | libc::F_SEAL_GROW | libc::F_SEAL_SEAL;
    // SAFETY: no pointer is passed.
    call(|| unsafe { libc::fcntl(fd.as_raw_fd(), libc::F_ADD_SEALS, seals) } as isize)?;
    Ok(fd)
}

/// Gives all pages of shared memory back to the system; whoever still maps it reads zeros.
pub fn discard(fd: BorrowedFd<'_>, len: usize) {
    let mode = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
    // SAFETY: no pointer is passed. A refusal leaves the pages to those who map them.
    unsafe { libc::fallocate(fd.as_raw_fd(), mode, 0, len as i64) };
}

/// Shared memory in our address space, until dropped.
#[derive(Debug)]
pub struct Mapping {
    addr: usize,
    len: usize,
    id: (u64, u64),
}

impl Mapping {
    /// All of a piece of sealed shared memory. Refuses what its maker could shrink later: to read that could kill us.
    pub fn new(fd: BorrowedFd<'_>, writable: bool) -> io::Result<Mapping> {
        // SAFETY: no pointer is passed.
        let seals = call(|| unsafe { libc::fcntl(fd.as_raw_fd(), libc::F_GET_SEALS) } as isize)?;
        if seals as i32 & libc::F_SEAL_SHRINK == 0 {
            return Err(io::Error::other("shared memory that its maker could still shrink"));
        }
        // SAFETY: a struct of integers, for which all zeros is a value.
        let mut stat: libc::stat = unsafe { zeroed() };
        // SAFETY: `stat` outlives the call.
        call(|| unsafe { libc::fstat(fd.as_raw_fd(), &mut stat) } as isize)?;
        let len = usize::try_from(stat.st_size).ok().filter(|&len| len > 0).ok_or(io::ErrorKind::InvalidData)?;
        let access = if writable { libc::PROT_READ | libc::PROT_WRITE } else { libc::PROT_READ };
        // SAFETY: the kernel chooses the place, so nothing of ours is covered.
        let at = unsafe { libc::mmap(null_mut(), len, access, libc::MAP_SHARED, fd.as_raw_fd(), 0) };
        if at == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        Ok(Mapping { addr: at as usize, len, id: (stat.st_dev, stat.st_ino) })
    }

    /// Its first byte.
    pub fn addr(&self) -> usize {
        self.addr
    }

    /// Its length in bytes.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Equal for two mappings of the same memory.
    pub fn id(&self) -> (u64, u64) {
        self.id
    }

    /// Maps the pages of a part now rather than at first use. Old kernels cannot; then the first use does it.
    pub fn populate(&self, offset: usize, len: usize, writable: bool) {
        let end = offset.saturating_add(len).min(self.len);
        let offset = offset.min(end) & !(page() - 1);
        let advice = if writable { libc::MADV_POPULATE_WRITE } else { libc::MADV_POPULATE_READ };
        // SAFETY: the range lies in our mapping (cut to it above); the pages are read or written as they are.
        unsafe { libc::madvise((self.addr + offset) as *mut _, end - offset, advice) };
    }

    /// Lets it be written too, as devices want what they are to pin.
    pub fn unlock(&self) -> io::Result<()> {
        let access = libc::PROT_READ | libc::PROT_WRITE;
        // SAFETY: our own mapping; more access than before takes nothing from anybody.
        call(|| unsafe { libc::mprotect(self.addr as *mut _, self.len, access) } as isize).map(drop)
    }

    fn at(&self, offset: usize, bytes: usize) -> usize {
        assert!(offset % bytes == 0 && offset + bytes <= self.len);
        self.addr + offset
    }

    /// A word of it.
    pub fn word(&self, offset: usize) -> &AtomicU64 {
        // SAFETY: aligned and inside (asserted), mapped while `self` lives, and only ever used as an atomic. Written only through
        // writable mappings.
        unsafe { AtomicU64::from_ptr(self.at(offset, 8) as *mut u64) }
    }

    /// A half word of it.
    pub fn half(&self, offset: usize) -> &AtomicU32 {
        // SAFETY: as in `word`.
        unsafe { AtomicU32::from_ptr(self.at(offset, 4) as *mut u32) }
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: our own mapping; references into it cannot outlive `self`, and whoever made a `Mem` of it keeps `self` meanwhile.
        unsafe { libc::munmap(self.addr as *mut _, self.len) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::MetadataExt;

    #[test]
    fn shared_memory_has_all_its_pages_from_the_start() {
        let len = 2 * PART + 3 * page();
        let file = std::fs::File::from(shared(c"libreshard test", len).unwrap());
        let there = file.metadata().unwrap();
        assert_eq!((there.len(), there.blocks() * 512), (len as u64, len as u64));
    }
}
