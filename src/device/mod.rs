//! Who copies: the one thing a device must do is a batch of strided copies between two addresses it can reach.
//!
//! Knows bytes, strides and addresses. Must not know tensors, ranks, rounds or communicators.
#![deny(unsafe_code)]

#[allow(unsafe_code)]
pub mod foreign;
#[allow(unsafe_code)]
pub mod host;
#[allow(unsafe_code)]
pub mod mem;

use crate::abi::RS_ERR_INTERNAL;
use crate::error::{Result, bail};
use crate::geom::StridedCopy;
pub use mem::Mem;

/// One strided copy with both its addresses, checked: every byte it touches lies inside `src` and `dst`.
#[derive(Clone, Copy, Debug)]
pub struct Job<'a> {
    src: Mem,
    dst: Mem,
    copy: &'a StridedCopy,
    streaming: bool,
}

impl<'a> Job<'a> {
    /// `copy` with its offsets counted from the first byte of `src` and `dst`.
    pub fn new(src: Mem, dst: Mem, copy: &'a StridedCopy) -> Result<Job<'a>> {
        if copy.src_end() > src.len() as u64 || copy.dst_end() > dst.len() as u64 {
            bail!(
                RS_ERR_INTERNAL,
                "a copy reads up to byte {} of {} and writes up to byte {} of {}",
                copy.src_end(),
                src.len(),
                copy.dst_end(),
                dst.len()
            );
        }
        Ok(Job { src, dst, copy, streaming: false })
    }

    /// The same copy into a target that is not read again soon, so that its bytes need not stay in a cache: a parameter, not
    /// staging.
    pub fn streaming(self) -> Job<'a> {
        Job { streaming: true, ..self }
    }

    /// Where the copy's first element is read.
    pub fn src_addr(&self) -> usize {
        self.src.addr() + self.copy.src as usize
    }

    /// Where the copy's first element is written.
    pub fn dst_addr(&self) -> usize {
        self.dst.addr() + self.copy.dst as usize
    }

    /// Whether its target need not stay in a cache.
    pub fn is_streaming(&self) -> bool {
        self.streaming
    }

    /// Its shape.
    pub fn copy(&self) -> &'a StridedCopy {
        self.copy
    }
}

/// The caller's stream, as an address; 0 is the device's default stream. Host memory ignores it.
pub type Stream = usize;

/// A point in a stream. Dropped with [`Device::forget`].
#[derive(Debug)]
pub struct Event(pub usize);

/// Something that owns memory and copies it.
pub trait Device: Send + Sync {
    /// Its name in logs and errors.
    fn name(&self) -> &str;
    /// DLPack's `(device_type, device_id)` of the memory it copies.
    fn id(&self) -> (i32, i32);
    /// Whether its copies convert values.
    fn converts(&self) -> bool;
    /// Staging memory.
    fn alloc(&self, bytes: usize) -> Result<Mem>;
    /// Gives back what [`Device::alloc`] gave; nothing may use it any more.
    fn free(&self, mem: Mem);
    /// Starts all copies, in no particular order; source and target of two jobs never overlap.
    fn copy(&self, jobs: &[Job<'_>], stream: Stream) -> Result<()>;
    /// Marks what was started on the stream so far.
    fn record(&self, stream: Stream) -> Result<Event>;
    /// Whether everything before the mark is done.
    fn query(&self, event: &Event) -> Result<bool>;
    /// Lets what is started later on `stream` wait for the mark.
    fn wait(&self, stream: Stream, event: &Event) -> Result<()>;
    /// Gives a mark back.
    fn forget(&self, event: Event);
}
