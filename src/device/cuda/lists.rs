//! Lists of copies in the GPU's memory, started by a launch.

use super::batch::{BLOCK, Descriptors};
use super::gpu::{Gpu, handle};
use crate::device::{Batch, Stream};
use crate::error::Result;
use cudarc::driver::sys::CUdeviceptr;
use std::ffi::c_void;
use std::ptr;
use std::sync::Arc;

/// Most blocks of a launch, for each multiprocessor: as many as can be resident at once, twice, so that none idles at the end.
const BLOCKS: u32 = 16;

/// Memory of the GPU that several lists lie in.
struct Uploaded {
    gpu: Arc<Gpu>,
    at: CUdeviceptr,
}

impl Drop for Uploaded {
    fn drop(&mut self) {
        self.gpu.free(self.at);
    }
}

/// One list.
struct List {
    uploaded: Arc<Uploaded>,
    /// Of its descriptors and of the number of the first chunk of each.
    descs: CUdeviceptr,
    first: CUdeviceptr,
    count: u32,
    chunks: u32,
    /// Target, source, bytes.
    copies: Vec<(u64, u64, u64)>,
}

/// Uploads lists of descriptors. All of them lie in one block, which goes with the last of them.
pub fn upload(gpu: &Arc<Gpu>, lists: Vec<Descriptors>) -> Result<Vec<Box<dyn Batch>>> {
    let mut bytes: Vec<u8> = vec![];
    let mut places = vec![];
    for list in &lists {
        let mut put = |part: &[u8]| {
            bytes.resize(bytes.len().next_multiple_of(16), 0);
            let at = bytes.len() as u64;
            bytes.extend_from_slice(part);
            at
        };
        places.push((put(list.bytes()), put(&list.first_bytes())));
    }
    let uploaded = Arc::new(Uploaded { gpu: gpu.clone(), at: gpu.alloc(bytes.len())? });
    gpu.upload(uploaded.at, &bytes)?;
    let list = |(list, (descs, first)): (Descriptors, (u64, u64))| -> Box<dyn Batch> {
        Box::new(List {
            descs: uploaded.at + descs,
            first: uploaded.at + first,
            count: list.count(),
            chunks: list.chunks,
            copies: list.copies,
            uploaded: uploaded.clone(),
        })
    };
    Ok(lists.into_iter().zip(places).map(list).collect())
}

impl Batch for List {
    fn start(&self, stream: Stream) -> Result<()> {
        let gpu = &*self.uploaded.gpu;
        for &(dst, src, bytes) in &self.copies {
            gpu.copy(dst, src, bytes as usize, stream)?;
        }
        if self.chunks == 0 {
            return Ok(());
        }
        let _current = gpu.current()?;
        let (mut descs, mut first, mut count, mut chunks) = (self.descs, self.first, self.count, self.chunks);
        let mut arguments: [*mut c_void; 4] = [
            ptr::from_mut(&mut descs).cast(),
            ptr::from_mut(&mut first).cast(),
            ptr::from_mut(&mut count).cast(),
            ptr::from_mut(&mut chunks).cast(),
        ];
        let grid = self.chunks.min(gpu.processors * BLOCKS);
        // SAFETY: the kernel's four arguments, copied during the call; descriptors that were made of checked jobs and lie in memory of
        // this list's own.
        let answer = unsafe {
            (gpu.api.cuLaunchKernel)(
                gpu.kernel,
                grid,
                1,
                1,
                BLOCK,
                1,
                1,
                0,
                handle(stream),
                arguments.as_mut_ptr(),
                ptr::null_mut(),
            )
        };
        gpu.api.done("cuLaunchKernel", answer)
    }
}
