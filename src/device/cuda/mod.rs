//! `cuda`: NVIDIA GPUs, by the driver's interface.
//!
//! All work goes where the caller says, onto a stream, and nothing here waits for a stream of the caller's, a context or a device. Lists
//! of copies are made into descriptors in the GPU's memory once ([`batch`]) and started by one launch of one kernel
//! (`kernels/copy.cu`) as often as wanted; large contiguous moves are left to the copy engines.
//!
//! Works in the device's primary context, that of the CUDA runtime and so of PyTorch, vLLM and NCCL, and leaves each thread the context
//! that it had.
//!
//! Knows the driver. Must not know who asks for a copy or why.

mod api;
pub mod batch;
mod gpu;
mod held;
mod ipc;
mod lists;
mod own;
mod pieces;
mod pool;

use super::{
    Batch, Copies, Device, Event, Export, Held, HostBlock, Imported, Job, Mem, Missing, OwnStream, Prepare, Registered, Shows,
    Signals, Stream,
};
use crate::abi::*;
use crate::error::{Result, bail};
pub(crate) use api::{open, symbol};
use batch::Descriptors;
use gpu::Gpu;
pub use ipc::export;
pub use own::Pinned;
use own::{CudaStream, RegisteredHost, Shown};
use std::ptr;
use std::sync::Arc;

/// One GPU.
pub struct CudaDevice {
    gpu: Arc<Gpu>,
    name: String,
}

impl CudaDevice {
    /// The GPU that CUDA counts as `ordinal`.
    pub fn new(ordinal: i32) -> Result<CudaDevice> {
        let gpu = Gpu::shared(ordinal).map_err(|e| e.context(format_args!("cuda:{ordinal}")))?;
        Ok(CudaDevice { gpu, name: format!("cuda:{ordinal}") })
    }

    /// CUDA's number of the GPU that is current on this thread.
    pub fn current() -> Result<i32> {
        gpu::current()
    }

    /// Host memory that the GPU reads and writes, of its own.
    pub fn pinned(&self, bytes: usize) -> Result<Pinned> {
        self.named(Pinned::new(&self.gpu, bytes))
    }

    /// Starts to copy `src` to the begin of `dst`, each in memory of this GPU or pinned.
    pub fn transfer(&self, dst: Mem, src: Mem, stream: Stream) -> Result<()> {
        if dst.len() < src.len() {
            bail!(RS_ERR_INTERNAL, "{} bytes to a place of {}", src.len(), dst.len());
        }
        self.named(self.gpu.copy(dst.addr() as u64, src.addr() as u64, src.len(), stream))
    }

    fn named<T>(&self, result: Result<T>) -> Result<T> {
        result.map_err(|e| e.context(&self.name))
    }
}

impl Device for CudaDevice {
    fn name(&self) -> &str {
        &self.name
    }

    fn id(&self) -> (i32, i32) {
        (RS_DEVICE_CUDA, self.gpu.ordinal)
    }

    fn uuid(&self) -> [u64; 2] {
        self.gpu.uuid
    }

    /// Also host memory that is pinned, for whichever GPU: all can read it.
    fn holds(&self, kind: (i32, i32)) -> bool {
        kind == self.id() || kind.0 == RS_DEVICE_CUDA_HOST
    }

    fn reach(&self, mem: Mem) -> Result<()> {
        if mem.is_empty() {
            return Ok(());
        }
        let (first, last) = (mem.addr() as u64, (mem.addr() + mem.len() - 1) as u64);
        self.named(self.gpu.reach(mem.kind(), first).and_then(|()| self.gpu.reach(mem.kind(), last)))
    }

    fn import(&self, export: &Export) -> Result<Imported> {
        self.named(ipc::import(&self.gpu, export))
    }

    fn held(&self, blocks: &[Mem]) -> Result<Vec<Held>> {
        self.named(held::held(&self.gpu, blocks))
    }

    fn held_open(&self, blocks: &[Mem]) -> Result<Vec<Held>> {
        self.named(held::held_open(&self.gpu, blocks))
    }

    fn missing(&self, held: &[&Held]) -> Result<Option<Missing>> {
        self.named(held::missing(&self.gpu, held))
    }

    fn register(&self, host: Mem) -> Result<Registered> {
        Ok(self.named(RegisteredHost::shared(&self.gpu, host))?)
    }

    fn shows(&self) -> Option<&dyn Shows> {
        Some(self)
    }

    fn converts(&self) -> bool {
        true
    }

    fn check_stream(&self, stream: Stream) -> Result<bool> {
        self.named(self.gpu.check_stream(stream))
    }

    fn alloc(&self, bytes: usize) -> Result<Mem> {
        let at = self.named(self.gpu.alloc(bytes).map_err(|e| e.context(format_args!("{bytes} bytes of staging"))))?;
        // SAFETY: an allocation of its own of so many bytes, until `free`.
        Ok(unsafe { Mem::of(self.id(), ptr::with_exposed_provenance_mut(at as usize), bytes) })
    }

    fn free(&self, mem: Mem) {
        self.gpu.free(mem.addr() as u64);
    }

    fn copies(&self) -> Copies<'_> {
        Copies::Prepared(self)
    }

    fn record(&self, stream: Stream) -> Result<Event> {
        self.named(self.gpu.record(stream)).map(Event)
    }

    fn query(&self, event: &Event) -> Result<bool> {
        self.named(self.gpu.query(event.0))
    }

    fn wait(&self, stream: Stream, event: &Event) -> Result<()> {
        self.named(self.gpu.wait(stream, event.0))
    }

    fn forget(&self, event: Event) {
        self.gpu.destroy(event.0);
    }

    fn signals(&self) -> Option<&dyn Signals> {
        self.gpu.words.is_some().then_some(self)
    }
}

impl Shows for CudaDevice {
    fn block(&self, bytes: usize) -> Result<Box<dyn HostBlock>> {
        Ok(Box::new(self.named(Shown::new(&self.gpu, bytes))?))
    }
}

impl Signals for CudaDevice {
    fn write(&self, stream: Stream, word: Mem, value: u64) -> Result<()> {
        self.named(self.gpu.write_word(stream, word.addr() as u64, value))
    }

    fn wait(&self, stream: Stream, word: Mem, value: u64) -> Result<()> {
        self.named(self.gpu.wait_word(stream, word.addr() as u64, value))
    }
}

impl Prepare for CudaDevice {
    fn prepare(&self, lists: &[Vec<Job<'_>>]) -> Result<Vec<Box<dyn Batch>>> {
        let lists = lists.iter().map(|jobs| Descriptors::new(jobs)).collect();
        self.named(lists::upload(&self.gpu, lists))
    }

    fn stream(&self) -> Result<Box<dyn OwnStream>> {
        Ok(Box::new(self.named(CudaStream::new(&self.gpu))?))
    }
}
