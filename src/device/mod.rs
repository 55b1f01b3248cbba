//! Who copies: the one thing a device must do is a batch of strided copies between two addresses it can reach.
//!
//! Knows bytes, strides and addresses. Must not know tensors, ranks, rounds or communicators.
#![deny(unsafe_code)]

#[allow(unsafe_code)]
pub mod cuda;
#[allow(unsafe_code)]
pub mod foreign;
#[allow(unsafe_code)]
pub mod host;
#[allow(unsafe_code)]
pub mod mem;

use crate::abi::{RS_DEVICE_CPU, RS_DEVICE_CUDA, RS_DEVICE_CUDA_HOST, RS_ERR_INTERNAL, RS_ERR_UNSUPPORTED};
use crate::error::{Error, Result, bail};
use crate::geom::StridedCopy;
pub use mem::Mem;
use std::any::Any;
use std::os::fd::OwnedFd;
use std::sync::Arc;

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
    /// DLPack's `(device_type, device_id)`.
    fn id(&self) -> (i32, i32);
    /// Identity of the hardware, equal in all processes that use it; zeros: nothing that two processes could share.
    fn uuid(&self) -> [u64; 2] {
        [0; 2]
    }
    /// Whether it copies from and to memory of a DLPack `(device_type, device_id)`.
    fn holds(&self, kind: (i32, i32)) -> bool {
        kind == self.id()
    }
    /// Makes sure that it can reach memory of a type that it [`holds`](Device::holds), this rank's or another's. An error says why not.
    fn reach(&self, _mem: Mem) -> Result<()> {
        Ok(())
    }
    /// Opens a block that another process exported.
    fn import(&self, _export: &Export) -> Result<Imported> {
        bail!(RS_ERR_UNSUPPORTED, "'{}' cannot open memory of another process", self.name())
    }
    /// Places by which [`Device::missing`] tells later whether the allocations are still there in which blocks of its own memory lie.
    fn held(&self, _blocks: &[Mem]) -> Result<Vec<Held>> {
        Ok(vec![])
    }
    /// The same of memory that is mapped piece by piece and open elsewhere: whether it is still the same.
    fn held_open(&self, _blocks: &[Mem]) -> Result<Vec<Held>> {
        Ok(vec![])
    }
    /// The first of these places where nothing is any more, or another allocation than was there.
    fn missing(&self, _held: &[&Held]) -> Result<Option<Missing>> {
        Ok(None)
    }
    /// Lets its streams use a block of host memory at the host's address, until what this gives is dropped.
    fn register(&self, _host: Mem) -> Result<Registered> {
        bail!(RS_ERR_UNSUPPORTED, "'{}' cannot use host memory", self.name())
    }
    /// Letting the CPU see what its memory holds, if it can.
    fn shows(&self) -> Option<&dyn Shows> {
        None
    }
    /// Whether its copies convert values.
    fn converts(&self) -> bool;
    /// Refuses a stream that work cannot be put on; whether it is being captured into a graph, which repeats what is put there.
    fn check_stream(&self, _stream: Stream) -> Result<bool> {
        Ok(false)
    }
    /// Staging memory.
    fn alloc(&self, bytes: usize) -> Result<Mem>;
    /// Gives back what [`Device::alloc`] gave; nothing may use it any more.
    fn free(&self, mem: Mem);
    /// How it takes lists of copies.
    fn copies(&self) -> Copies<'_>;
    /// Marks what was started on the stream so far.
    fn record(&self, stream: Stream) -> Result<Event>;
    /// Whether everything before the mark is done.
    fn query(&self, event: &Event) -> Result<bool>;
    /// Lets what is started later on `stream` wait for the mark.
    fn wait(&self, stream: Stream, event: &Event) -> Result<()>;
    /// Gives a mark back.
    fn forget(&self, event: Event);
    /// Words that its streams write and wait for, if it can.
    fn signals(&self) -> Option<&dyn Signals> {
        None
    }
}

/// Lets what is started later on `then` wait for what was started on `first`.
pub fn order(device: &dyn Device, first: Stream, then: Stream) -> Result<()> {
    let event = device.record(first)?;
    let waits = device.wait(then, &event);
    device.forget(event);
    waits
}

/// 64-bit words of host memory by which streams of several ranks wait for each other. They only grow.
pub trait Signals: Sync {
    /// Makes the word `value` once all that is on the stream is done and can be seen by everybody.
    fn write(&self, stream: Stream, word: Mem, value: u64) -> Result<()>;
    /// Lets what is started later on the stream wait until the word is at least `value`.
    fn wait(&self, stream: Stream, word: Mem, value: u64) -> Result<()>;
}

/// A device whose memory the CPU can see a copy of.
pub trait Shows: Sync {
    /// Memory that its copies write and the CPU sees.
    fn block(&self, bytes: usize) -> Result<Box<dyn HostBlock>>;
}

/// Memory that a device's copies write and the CPU sees. Dropped when none writes it any more. Neither it nor making it waits for what else
/// a device does.
pub trait HostBlock {
    /// As it is named in copies.
    fn mem(&self) -> Mem;
    /// Its first bytes, once all copies to it are done. `stream` is one that they were on.
    fn show(&mut self, bytes: usize, stream: Stream) -> Result<&[u8]>;
}

/// Host memory that streams may use as long as this lives.
pub type Registered = Arc<dyn Any + Send + Sync>;

/// How a device takes lists of copies.
pub enum Copies<'a> {
    /// As they are, each time.
    AsTheyAre(&'a dyn CopyNow),
    /// Made ready once, then started as often as wanted.
    Prepared(&'a dyn Prepare),
}

/// A device that takes lists of copies as they are.
pub trait CopyNow: Sync {
    /// Starts all copies, in no particular order; source and target of two jobs never overlap.
    fn copy(&self, jobs: &[Job<'_>], stream: Stream) -> Result<()>;
}

/// A device that wants lists of copies ready before it starts them.
pub trait Prepare: Sync {
    /// Makes each list ready. The addresses in it are then those that every start uses.
    fn prepare(&self, lists: &[Vec<Job<'_>>]) -> Result<Vec<Box<dyn Batch>>>;
    /// A stream of its own, which waits for no other by itself.
    fn stream(&self) -> Result<Box<dyn OwnStream>>;
}

/// A stream that goes when dropped; what is on it is still done.
pub trait OwnStream: Send + Sync {
    /// As work is put on it.
    fn raw(&self) -> Stream;
}

/// A list of copies that is ready. Dropped when nothing that it started is running any more.
pub trait Batch: Send + Sync {
    /// Starts all copies, in no particular order; source and target of two of them never overlap.
    fn start(&self, stream: Stream) -> Result<()>;
}

/// Bytes of a name by which another process opens an allocation.
pub const HANDLE: usize = 64;

/// Memory of a device as another process of the host opens it.
#[derive(Clone, Debug)]
pub enum Allocation {
    /// By the device's name for it.
    Named([u8; HANDLE]),
    /// By descriptors of pieces that lie one behind the other.
    Pieces(Arc<[Piece]>),
}

/// The descriptor by which another process opens a piece of memory, and its length in bytes.
pub type Piece = (Arc<OwnedFd>, u64);

/// A block of such memory.
#[derive(Clone, Debug)]
pub struct Export {
    /// What it lies in.
    pub of: Allocation,
    /// Where in it the block begins, in bytes.
    pub offset: u64,
    /// Length in bytes.
    pub len: u64,
}

/// A place in an allocation.
pub struct Held {
    /// An address in the first of the blocks.
    pub at: u64,
    /// What the allocation is known by there.
    pub identity: Identity,
    /// Blocks that lie in it, by their place in the list.
    pub blocks: Vec<u32>,
}

/// What an allocation is known by.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Identity {
    /// That there is one: another would do as well.
    Present {
        /// Whether the device said that something is mapped there.
        mapped: bool,
    },
    /// The number of the whole.
    Whole(u64),
    /// The number of a piece that is mapped.
    Piece(u64),
}

/// What [`Device::missing`] finds.
pub struct Missing {
    /// Which of those that were asked for.
    pub which: usize,
    /// Whether another allocation is there.
    pub replaced: bool,
}

/// What other processes of the host need to open blocks of memory.
#[derive(Debug, Default)]
pub struct Exports {
    /// By block; `None`: they cannot.
    pub blocks: Vec<Option<Export>>,
    /// Why not, of the first such block that lies in a device's own memory.
    pub refused: Option<Error>,
}

/// A block of another process, open as long as the second part lives.
pub type Imported = (Mem, Arc<dyn Any + Send + Sync>);

/// What other processes of the host need to open the blocks of each list. What several lists share is asked for once.
pub fn export(lists: &[&[Mem]]) -> Vec<Exports> {
    cuda::export(lists)
}

/// DLPack's `(device_type, device_id)` of the library's own device for memory of these: the GPU that the first of them is of, else the one
/// that the first is pinned for, else the host.
pub fn home(kinds: impl Iterator<Item = (i32, i32)> + Clone) -> (i32, i32) {
    let first = |kind: i32| kinds.clone().find(|k| k.0 == kind);
    let gpu = first(RS_DEVICE_CUDA).or_else(|| first(RS_DEVICE_CUDA_HOST));
    gpu.map_or((RS_DEVICE_CPU, 0), |(_, id)| (RS_DEVICE_CUDA, id))
}

/// The library's own device for memory of these DLPack `(device_type, device_id)`.
pub fn for_memory(kinds: impl Iterator<Item = (i32, i32)> + Clone) -> Result<Arc<dyn Device>> {
    match home(kinds) {
        (RS_DEVICE_CUDA, id) => Ok(Arc::new(cuda::CudaDevice::new(id)?)),
        _ => Ok(Arc::new(host::HostDevice::new())),
    }
}
