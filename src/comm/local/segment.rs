//! Memory that other processes of the host can map: what `rs_mem_alloc` gives.
//!
//! Each allocation is a piece of sealed shared memory without a name. A process-wide list tells which addresses belong to one, so a
//! caller passes plain pointers. Knows addresses and pages. Must not know communicators.
//!
//! A page after the data says whether the memory is still in use: freeing gives all pages back to the system, also those that a reader
//! maps, and a reader that finds the word gone lets its mapping go.

use super::sys::{self, Mapping};
use crate::abi::*;
use crate::device::Mem;
use crate::error::{Result, bail, err};
use std::collections::BTreeMap;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::ptr::NonNull;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// The word of memory in use.
const LIVE: u64 = 0x6c69_7665_6d65_6d31;

/// One allocation.
#[derive(Debug)]
pub struct Segment {
    file: OwnedFd,
    memory: Mapping,
    /// Freed by a forked child it must stay whole in its parent.
    process: u32,
}

/// All allocations of this process by their first address.
static SEGMENTS: Mutex<BTreeMap<usize, Arc<Segment>>> = Mutex::new(BTreeMap::new());

fn segments() -> MutexGuard<'static, BTreeMap<usize, Arc<Segment>>> {
    SEGMENTS.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Page-aligned, zeroed host memory that peers of this host can read in place, all pages present. `flags` is 0. Owned by the caller
/// until [`free`].
pub fn alloc(bytes: u64, flags: u32) -> Result<NonNull<u8>> {
    if flags != 0 {
        bail!(RS_ERR_INVALID, "flags is {flags}; no flag of rs_mem_alloc is known");
    }
    if bytes == 0 {
        bail!(RS_ERR_INVALID, "bytes is 0; allocate at least 1");
    }
    let none = |why: &dyn std::fmt::Display| err!(RS_ERR_MEMORY, "cannot allocate {bytes} bytes of shared memory: {why}");
    let page = sys::page();
    let len = usize::try_from(bytes).ok().and_then(|b| b.checked_next_multiple_of(page)?.checked_add(page));
    let len = len.filter(|&l| l <= isize::MAX as usize).ok_or_else(|| none(&"more than an address space"))?;
    let file = sys::shared(c"libreshard memory", len).map_err(|e| none(&e))?;
    let memory = Mapping::new(file.as_fd(), true).map_err(|e| none(&e))?;
    memory.populate(0, len, true);
    live(&memory).store(LIVE, std::sync::atomic::Ordering::Release);
    let addr = NonNull::new(memory.addr() as *mut u8).ok_or_else(|| none(&"no address"))?;
    segments().insert(memory.addr(), Arc::new(Segment { file, memory, process: std::process::id() }));
    Ok(addr)
}

/// Gives memory of [`alloc`] back.
///
/// # Safety
/// - Nobody in this process uses the memory any more: no container names it, no sync is in progress on it.
pub unsafe fn free(addr: NonNull<u8>) -> Result<()> {
    let Some(segment) = segments().remove(&(addr.as_ptr() as usize)) else {
        bail!(RS_ERR_INVALID, "{addr:p} is no memory of rs_mem_alloc, or was freed before");
    };
    if segment.process == std::process::id() {
        sys::discard(segment.file.as_fd(), segment.memory.len());
    }
    Ok(())
}

/// The allocation that holds a block, and the block's place in it.
pub fn find(block: Mem) -> Option<(Arc<Segment>, u64)> {
    let all = segments();
    let (_, segment) = all.range(..=block.addr()).next_back()?;
    let offset = block.addr() - segment.memory.addr();
    let end = offset.checked_add(block.len())?;
    (end <= data(&segment.memory)).then(|| (segment.clone(), offset as u64))
}

impl Segment {
    /// What a peer maps.
    pub fn file(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }

    /// Its first address here.
    pub fn addr(&self) -> usize {
        self.memory.addr()
    }
}

/// Bytes of data in the mapping of an allocation, here or at a peer.
pub fn data(memory: &Mapping) -> usize {
    memory.len().saturating_sub(sys::page())
}

/// Whether what a peer sent can be an allocation: whole pages, the last of which tells whether it is in use.
pub fn fits(memory: &Mapping) -> bool {
    memory.len() % sys::page() == 0 && data(memory) > 0
}

/// Whether the owner of a mapped allocation has not freed it.
pub fn in_use(memory: &Mapping) -> bool {
    live(memory).load(std::sync::atomic::Ordering::Acquire) == LIVE
}

fn live(memory: &Mapping) -> &std::sync::atomic::AtomicU64 {
    memory.word(data(memory))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn mem(addr: NonNull<u8>, offset: usize, len: usize) -> Mem {
        // SAFETY: never copied from or to; only its numbers count.
        unsafe { Mem::new(addr.as_ptr().wrapping_add(offset), len) }
    }

    #[test]
    fn blocks_are_found_in_the_allocation_that_holds_them() {
        let (a, b) = (alloc(10_000, 0).unwrap(), alloc(1, 0).unwrap());
        let (segment, offset) = find(mem(a, 100, 9_900)).unwrap();
        assert_eq!((segment.addr(), offset), (a.as_ptr() as usize, 100));
        assert_eq!(find(mem(b, 0, 1)).unwrap().1, 0);
        // The page of the state is not the caller's.
        assert!(find(mem(a, 0, 10_000usize.next_multiple_of(sys::page()))).is_some());
        assert!(find(mem(a, 0, 10_000usize.next_multiple_of(sys::page()) + 1)).is_none());
        let other = 5u8;
        assert!(find(mem(NonNull::from(&other), 0, 1)).is_none());
        // SAFETY: nothing uses them.
        unsafe {
            free(a).unwrap();
            free(b).unwrap();
            assert_eq!(free(a).unwrap_err().status(), RS_ERR_INVALID);
        }
        assert!(find(mem(a, 0, 1)).is_none());
    }

    #[test]
    fn freeing_gives_the_pages_back_under_a_reader() {
        let a = alloc(5, 0).unwrap();
        // SAFETY: five bytes of ours.
        unsafe { a.write_bytes(7, 5) };
        let (segment, _) = find(mem(a, 0, 5)).unwrap();
        let reader = Mapping::new(segment.file(), false).unwrap();
        drop(segment);
        assert!(in_use(&reader));
        assert_eq!(reader.word(0).load(std::sync::atomic::Ordering::Relaxed).to_ne_bytes()[..5], [7; 5]);
        // SAFETY: nothing uses it; the reader has a mapping of its own.
        unsafe { free(a).unwrap() };
        assert!(!in_use(&reader));
        assert_eq!(reader.word(0).load(std::sync::atomic::Ordering::Relaxed), 0);
    }

    #[test]
    fn no_holder_can_shrink_an_allocation() {
        let a = alloc(5, 0).unwrap();
        let (segment, _) = find(mem(a, 0, 5)).unwrap();
        let file = std::fs::File::from(segment.file().try_clone_to_owned().unwrap());
        assert!(file.set_len(0).is_err());
        assert!(file.set_len(1 << 30).is_err());
        drop(segment);
        // SAFETY: nothing uses it.
        unsafe { free(a).unwrap() };
    }

    #[test]
    fn memory_that_its_maker_could_shrink_is_not_mapped() {
        let file = std::fs::File::open("/proc/self/exe").unwrap();
        assert!(Mapping::new(file.as_fd(), false).is_err());
    }

    #[test]
    fn wrong_requests_say_why() {
        assert_eq!(alloc(0, 0).unwrap_err().status(), RS_ERR_INVALID);
        assert_eq!(alloc(1, 2).unwrap_err().status(), RS_ERR_INVALID);
        for much in [u64::MAX, u64::MAX / 2, 1 << 60, 1 << 45] {
            assert_eq!(alloc(much, 0).unwrap_err().status(), RS_ERR_MEMORY);
        }
        assert!(alloc(1 << 45, 0).unwrap_err().text().contains("the system has "));
    }
}
