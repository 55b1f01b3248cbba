//! Weights that lie in shared host memory (rs_mem_alloc) on one side and on a GPU on the other, over the communicator for processes: the
//! GPU reads and writes host memory of another rank where it is.

#[allow(dead_code)] // `properties` uses the rest.
mod oracle;

use cudarc::driver::sys;
use oracle::gpu::{self, HOST, Kind};
use oracle::library::{Comm, Container, Failure, Tables};
use oracle::nccl;
use oracle::small::two_ranks;
use oracle::truth::{Memory, compare, write};
use reshard::abi::*;
use reshard::ffi::api::{rs_mem_alloc, rs_mem_free};
use std::ffi::c_void;
use std::ptr::null_mut;
use std::sync::{Mutex, MutexGuard, PoisonError};

const TIMEOUT_MS: u32 = 20_000;
const GPU_0: Kind = (RS_DEVICE_CUDA, 0);
const PINNED: Kind = (RS_DEVICE_CUDA_HOST, 0);

/// One test at a time, as they count what is alive. `None`: weights do not go to GPUs in this run.
fn alone() -> Option<MutexGuard<'static, ()>> {
    static ONE: Mutex<()> = Mutex::new(());
    gpu::wanted().then(|| ONE.lock().unwrap_or_else(PoisonError::into_inner))
}

fn live() -> u64 {
    nccl::function::<extern "C" fn() -> u64>(c"standin_live").map_or(0, |live| live())
}

/// A rank's weights, all in one allocation.
struct Side {
    /// What is there, as the oracle sees it; on a GPU, where it is.
    image: Memory,
    /// Memory of rs_mem_alloc, with what it is called.
    shared: Option<(*mut u8, Kind)>,
}

// SAFETY: memory of its own, which any thread may use.
unsafe impl Send for Side {}

impl Side {
    fn new(rank: &oracle::model::Rank, kind: Kind) -> Side {
        if kind == GPU_0 {
            return Side { image: Memory::new(kind, &rank.blocks, 7), shared: None };
        }
        let image = Memory::new(HOST, &rank.blocks, 7);
        let (mut at, len) = (null_mut(), image.bytes().len());
        // SAFETY: a place for an address; so many bytes, which are pinned until they are unpinned.
        unsafe {
            assert_eq!(rs_mem_alloc(len as u64, 0, &mut at), RS_OK);
            if kind == PINNED {
                gpu::on(0, || assert_eq!(sys::cuMemHostRegister_v2(at, len, 0) as u32, 0));
            }
        }
        Side { image, shared: Some((at.cast(), kind)) }
    }

    fn kind(&self) -> Kind {
        self.shared.map_or(self.image.kind(), |s| s.1)
    }

    fn put(&mut self, bytes: &[u8]) {
        match self.shared {
            // SAFETY: as many bytes as the image has.
            Some((at, _)) => unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), at, bytes.len()) },
            None => self.image.write(bytes),
        }
    }

    /// Brings the image up to date.
    fn look(&mut self) {
        if let Some((at, _)) = self.shared {
            // SAFETY: as many bytes as the image has, which nobody writes now.
            let bytes = unsafe { std::slice::from_raw_parts(at, self.image.bytes().len()) }.to_vec();
            self.image.write(&bytes);
        }
    }
}

impl Drop for Side {
    fn drop(&mut self) {
        let Some((at, kind)) = self.shared else { return };
        let at: *mut c_void = at.cast();
        // SAFETY: made by `new`, and used by nobody any more.
        unsafe {
            if kind == PINNED {
                gpu::on(0, || assert_eq!(sys::cuMemHostUnregister(at) as u32, 0));
            }
            rs_mem_free(at);
        }
    }
}

#[test]
fn gpus_read_and_write_shared_host_memory() {
    let Some(_alone) = alone() else { return };
    let (case, before) = (two_ranks(), live());
    for (run, kinds) in [[HOST, GPU_0], [PINNED, GPU_0], [GPU_0, PINNED], [PINNED, PINNED], [HOST, PINNED]].into_iter().enumerate()
    {
        let mut sides: Vec<Side> = (0..2).map(|r| Side::new(&case.ranks[r], kinds[r])).collect();
        let name = format!("offload {} {run}", std::process::id());
        std::thread::scope(|scope| {
            for (r, side) in sides.iter_mut().enumerate() {
                let (case, name) = (&case, &name);
                scope.spawn(move || {
                    let comm = Comm::local(name, r, 2, 0, TIMEOUT_MS).unwrap();
                    let (rank, kind) = (&case.ranks[r], side.kind());
                    let base = side.shared.map_or(null_mut(), |s| s.0);
                    let tables = Tables::new(case, rank, kind, |b| match base.is_null() {
                        true => side.image.address(rank.buffers[b].block, 0),
                        false => base.wrapping_add(side.image.start(rank, b)),
                    });
                    // Twice, and both at once: pages are pinned once for all who read them.
                    let make = || Container::create(rank, &tables, &comm, TIMEOUT_MS).unwrap();
                    let mut all = [make(), make()];
                    for container in &mut all {
                        container.stream = if kind == GPU_0 { side.image.stream() } else { null_mut() };
                        container.connect().unwrap();
                    }
                    for version in 1..5 {
                        let mut image = side.image.bytes();
                        write(case, r, RS_SOURCE, &[true; 2], version, &side.image, &mut image);
                        side.put(&image);
                        write(case, r, RS_TARGET, &[true; 2], version, &side.image, &mut image);
                        all[version as usize % 2].sync(version, None).unwrap();
                        side.look();
                        compare(case, r, &side.image, &image).unwrap_or_else(|e| panic!("{kinds:?}: {e}"));
                    }
                });
            }
        });
        drop(sides);
        assert_eq!(live(), before, "{kinds:?}: something is left");
    }
}

/// Other host memory of another rank is not read by a GPU, and both ranks are told what is.
#[test]
fn memory_that_nobody_else_can_map_is_refused() {
    let Some(_alone) = alone() else { return };
    let case = two_ranks();
    let connect = |r: usize, kind: Kind| -> Result<(), Failure> {
        let comm = Comm::local(&format!("offload {} plain", std::process::id()), r, 2, 0, TIMEOUT_MS).unwrap();
        let mut memory = Memory::new(kind, &case.ranks[r].blocks, 7);
        let tables = Tables::new(&case, &case.ranks[r], kind, |b| memory.address(case.ranks[r].buffers[b].block, 0));
        Container::create(&case.ranks[r], &tables, &comm, TIMEOUT_MS)?.connect()
    };
    let answers = std::thread::scope(|scope| {
        let source = scope.spawn(|| connect(0, HOST));
        let target = connect(1, GPU_0);
        [source.join().expect("no panic"), target]
    });
    for answer in answers {
        let failure = answer.expect_err("plain memory of another process");
        assert!(failure.text.contains("rs_mem_alloc()"), "{failure}");
    }
}
