//! Who the others are and how bytes reach them.
//!
//! A communicator is a fixed set of ranks. Each can gather a few bytes from all (the host path: connect, headers, agreements) and
//! offers at least one way for weights: memory of another rank that can be read ([`Windows`]), messages through memory that the
//! communicator lends ([`Pipe`]), or grouped sends and receives of our memory ([`Group`]).
//!
//! Knows ranks, bytes, addresses and deadlines. Must not know tensors, plans or versions.
//!
//! A communicator fails once: after an abort, a dead peer or a missed deadline every later call fails with the same reason, and the
//! caller makes another one. So nothing that a late process still writes can reach memory that anybody reads.
#![deny(unsafe_code)]

pub mod composite;
#[allow(unsafe_code)]
pub mod foreign;
#[allow(unsafe_code)]
pub mod local;
pub mod loopback;
#[allow(unsafe_code)]
pub mod nccl;
#[allow(unsafe_code)]
pub mod nixl;
#[allow(unsafe_code)]
pub mod page;

use crate::abi::{RS_ERR_INTERNAL, RS_ERR_TIMEOUT};
use crate::device::{Export, Mem, Stream};
use crate::error::{Result, bail};
use crate::geom::StridedCopy;
use page::Page;
use std::any::Any;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::{Duration, Instant};

/// The end of all waiting in one call.
#[derive(Clone, Copy, Debug)]
pub struct Deadline {
    end: Instant,
    whole: Duration,
}

impl Deadline {
    /// `timeout` from now.
    pub fn after(timeout: Duration) -> Deadline {
        Deadline { end: Instant::now() + timeout, whole: timeout }
    }

    /// For what is not waited for.
    pub fn never() -> Deadline {
        Deadline::after(Duration::from_secs(1 << 30))
    }

    /// What is left, zero once it has passed.
    pub fn left(&self) -> Duration {
        self.end.saturating_duration_since(Instant::now())
    }

    /// All that there was at first.
    pub fn whole(&self) -> Duration {
        self.whole
    }

    /// Whether nothing is left.
    pub fn passed(&self) -> bool {
        self.left().is_zero()
    }

    /// An error once it has passed; `what` was waited for ("rank 3 to send its header").
    pub fn check(&self, what: impl FnOnce() -> String) -> Result<()> {
        if self.passed() {
            bail!(RS_ERR_TIMEOUT, "waited {} ms for {}", self.whole.as_millis(), what());
        }
        Ok(())
    }
}

/// A fixed set of ranks. All methods may be called by several threads, collectives by one at a time.
pub trait Comm: Send + Sync {
    /// `loopback`, `local`, ...: for logs and errors.
    fn name(&self) -> &str;
    /// This rank, 0-based.
    fn rank(&self) -> u32;
    /// Number of ranks.
    fn world(&self) -> u32;
    /// Every rank's `mine`, all of one length, in rank order. Collective. Ends with an error that names the missing ranks when the
    /// deadline passes, when a rank is dead or when one aborted.
    fn allgather(&self, mine: &[u8], deadline: Deadline) -> Result<Vec<u8>>;
    /// Ends the communicator everywhere, at once: calls in progress on any rank return an error with `why`. From any thread. (NCCL's: on
    /// this rank; the others hear of it at their deadlines.)
    fn abort(&self, why: &str);
    /// DLPack's `(device_type, device_id)` of the only memory that it moves, if it is so.
    fn device(&self) -> Option<(i32, i32)> {
        None
    }
    /// The error that ended it, or that a peer's death now ends it with. Cheap enough for every chunk of a copy.
    fn check(&self) -> Result<()>;
    /// The same after what was put on streams is done: whether that moved as it should. Also while it is under way.
    fn sound(&self) -> Result<()> {
        self.check()
    }
    /// Whether the process of a rank is known to have ended: nothing that it put on a stream runs any more.
    fn gone(&self, _rank: u32) -> bool {
        false
    }
    /// How its errors call its ranks from now on: by their numbers in a larger communicator.
    fn rename(&self, _ranks: &[u32]) {}
    /// Gathers that do not wait, if it can.
    fn later(&self) -> Option<&dyn Later> {
        None
    }
    /// Reading other ranks' memory, if it can.
    fn windows(&self) -> Option<&dyn Windows> {
        None
    }
    /// Messages through memory that it lends, if it can.
    fn pipe(&self) -> Option<&dyn Pipe> {
        None
    }
    /// Sends and receives of our own memory, if it can.
    fn group(&self) -> Option<&dyn Group> {
        None
    }
}

/// A gather in halves, neither of which waits.
pub trait Later: Sync {
    /// Held by whoever makes collective calls, from the first to the end of the last: in between no others fit.
    fn taken(&self) -> &AtomicBool;
    /// Gives this rank's part of the next gather. No other collective may begin before it has ended.
    fn begin(&self, mine: &[u8]) -> Result<()>;
    /// What [`Comm::allgather`] would give, once it is complete. Fails as that does.
    fn ended(&self, deadline: Deadline) -> Result<Option<Vec<u8>>>;
}

/// What keeps something there while it lives.
pub type Kept = Arc<dyn Any + Send + Sync>;

/// How a reader reaches one block of memory of an owner. Both ends of a pair know it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    /// The reader addresses it: a copy like any other.
    Mapped,
    /// The reader can have it read ([`Windows::read`]), one copy, or be sent it; [`Windows::prefers_read`] says which.
    Remote,
    /// It cannot be read; the owner sends it ([`Comm::pipe`]).
    Sent,
}

/// One block of memory of an owner as its reader sees it.
#[derive(Clone, Debug)]
pub enum Window {
    /// Addressable here. The [`Mem`] covers exactly what the owner offered.
    Mapped(Mem),
    /// In a device's memory of another process: its reader's device opens it.
    Exported(Export),
    /// At `addr` in the owner's process, `len` bytes.
    Remote {
        /// Address in the owner.
        addr: u64,
        /// Length in bytes.
        len: u64,
    },
    /// Not readable from here.
    Sent,
}

impl Window {
    /// The part of it that both ends know.
    pub fn access(&self) -> Access {
        match self {
            Window::Mapped(_) | Window::Exported(_) => Access::Mapped,
            Window::Remote { .. } => Access::Remote,
            Window::Sent => Access::Sent,
        }
    }
}

/// What an exchange of windows gave.
#[derive(Debug, Default)]
pub struct Opened {
    /// For each owner asked, in the order asked: its blocks in the order it offered them.
    pub windows: Vec<Vec<Window>>,
    /// For each reader offered to, in the order offered: what it could make of each block.
    pub granted: Vec<Vec<Access>>,
}

/// Reading other ranks' memory.
///
/// A read is ordered by the communicator's collectives alone: owners enter a collective when their memory is ready, readers read,
/// all enter another. [`Windows::enter`] and [`Windows::leave`] bracket each chunk so that an owner that gives up can wait for the
/// chunk being read, however late its reader is.
pub trait Windows: Sync {
    /// Whether weights from and to a rank move this way, and through the communicator's pipe, rather than in groups.
    fn covers(&self, _rank: u32) -> bool {
        true
    }
    /// Tells each reader in `offers` which blocks of ours it may read, and learns what each of `owners` lets us read. Both lists are
    /// sorted by rank; a rank is in one's `offers` exactly where it has us in its `owners`. Windows of an earlier exchange end.
    fn exchange(&self, offers: &[(u32, Vec<Mem>)], owners: &[u32], deadline: Deadline) -> Result<Opened>;
    /// Whether a rank is in another process, which opens memory for itself.
    fn elsewhere(&self, _rank: u32) -> bool {
        false
    }
    /// All of the shared memory that a mapped block of host memory lies in, if it does, as a device can register it; mapped as long as
    /// the second part lives.
    fn mapping(&self, _block: Mem) -> Result<Option<(Mem, Kept)>> {
        Ok(None)
    }
    /// Gives each of `peers`, which are sorted and ask for the same, so many words of this rank: its own page, then those of the peers.
    fn share(&self, words: usize, peers: &[u32], deadline: Deadline) -> Result<Vec<Arc<Page>>>;
    /// Whether a block of access [`Access::Remote`] is read by its reader rather than sent, for pieces whose contiguous runs at the
    /// source have `run` bytes. Equal on both ends of a pair.
    fn prefers_read(&self, run: u64) -> bool;
    /// Reads from a [`Window::Remote`] of `owner`: `copy`'s source offsets count from the window's first byte.
    fn read(&self, owner: u32, window: &Window, dst: Mem, copy: &StridedCopy) -> Result<()>;
    /// Before a chunk is read from `owner`: an error once the owner gave up. Followed by [`Windows::leave`].
    fn enter(&self, owner: u32) -> Result<()>;
    /// After the chunk.
    fn leave(&self, owner: u32);
    /// This rank gives up: nobody may begin to read its memory any more, and those who do have finished when this returns (or will
    /// never run again). Called when a sync fails, before its caller gets its memory back.
    fn revoke(&self);
}

/// Messages in order between pairs of ranks, each in one piece of memory that the communicator lends at both ends. Both ends know
/// how many messages there are and how long each is. The methods for one peer are called by one thread at a time.
pub trait Pipe: Sync {
    /// The longest message, in bytes; equal on all ranks.
    fn capacity(&self) -> usize;
    /// Makes the channels, before the first message: to each of `to`, from each of `from`, both sorted. The lists of two ranks match.
    fn open(&self, to: &[u32], from: &[u32], deadline: Deadline) -> Result<()>;
    /// Bytes of shared memory that the open channels take on this rank.
    fn bytes(&self) -> u64;
    /// Memory of `capacity()` bytes for the next message to a peer; `None`: not yet.
    fn reserve(&self, to: u32) -> Result<Option<Mem>>;
    /// Sends what was written to the memory last reserved.
    fn commit(&self, to: u32, bytes: usize) -> Result<()>;
    /// The next message from a peer; `None`: not yet. An error if its length is not `bytes`.
    fn arrived(&self, from: u32, bytes: usize) -> Result<Option<Mem>>;
    /// Gives the memory of the message that arrived last back to its sender.
    fn release(&self, from: u32) -> Result<()>;
    /// Sleeps until a peer committed or released something since the last call, or until `slice` has passed. Also notices dead peers.
    fn wait(&self, slice: Duration) -> Result<()>;
}

/// The block of a message that must be one.
fn one(blocks: &[Mem]) -> Result<Mem> {
    match blocks {
        &[mem] => Ok(mem),
        _ => bail!(RS_ERR_INTERNAL, "a message in {} blocks, over a communicator that takes one", blocks.len()),
    }
}

/// Sends and receives of memory that the executor names, in groups: everything between `begin` and `end` progresses together.
pub trait Group: Sync {
    /// Makes memory ready for messages, before the first group that uses it, and tells those that we send `to`; learns the same of those
    /// that we receive `from`. The lists of two ranks match. The memory stays until what this gives is dropped.
    fn register(&self, _mems: &[Mem], _to: &[u32], _from: &[u32], _deadline: Deadline) -> Result<Option<Kept>> {
        Ok(None)
    }
    /// What the groups that are not complete wait for: completes "waited for ...".
    fn missing(&self) -> String {
        "the communicator to complete a group of sends and receives".into()
    }
    /// Opens a group.
    fn begin(&self) -> Result<()>;
    /// Whether a message may lie in several blocks of memory, which the receiver need not cut as the sender does.
    fn scatters(&self) -> bool {
        false
    }
    /// Within a group: sends a message to a peer. It is one block, or several, one after the other, if it [`Group::scatters`].
    fn send(&self, blocks: &[Mem], to: u32, stream: Stream) -> Result<()>;
    /// Within a group: receives exactly as many bytes as the blocks have from a peer.
    fn recv(&self, blocks: &[Mem], from: u32, stream: Stream) -> Result<()>;
    /// Starts the group.
    fn end(&self) -> Result<()>;
    /// Whether a group is done in the order of its stream: what is put there later sees what came, and may write what went.
    fn on_streams(&self) -> bool {
        false
    }
    /// Whether all groups ended so far are on their streams.
    fn enqueued(&self) -> Result<bool> {
        Ok(true)
    }
    /// After a failure: whether what was handed over either never runs or is on its stream, so that the stream's end is the end of it.
    fn idle(&self) -> bool {
        true
    }
    /// Whether all groups ended so far are complete.
    fn poll(&self) -> Result<bool>;
}
