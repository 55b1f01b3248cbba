//! The caller's device, functions of rs_device_t.
//!
//! Knows how to call them and what their answers mean. Must not know what kind of memory they copy.

use super::{Copies, CopyNow, Device, Event, Job, Mem, Stream};
use crate::abi::*;
use crate::convert::{Convert, Float};
use crate::error::{Error, Result, bail, err, status_name};
use crate::geom::{CopyAxis, StridedCopy};
use std::ffi::c_void;
use std::fmt;
use std::ptr;
use std::sync::atomic::{AtomicBool, Ordering};

/// Most rows in one call of the caller's copy function.
const ROWS: usize = 1024;
/// What the caller's staging memory must be aligned to.
const ALIGN: usize = 256;

type AllocFn = unsafe extern "C" fn(*mut c_void, u64, *mut *mut c_void) -> rs_status_t;
type FreeFn = unsafe extern "C" fn(*mut c_void, *mut c_void);
type CopyFn = unsafe extern "C" fn(*mut c_void, *const rs_copy_t, usize, *mut c_void) -> rs_status_t;
type RecordFn = unsafe extern "C" fn(*mut c_void, *mut c_void, *mut *mut c_void) -> rs_status_t;
type WaitFn = unsafe extern "C" fn(*mut c_void, *mut c_void, *mut c_void) -> rs_status_t;
type QueryFn = unsafe extern "C" fn(*mut c_void, *mut c_void) -> rs_status_t;

/// The caller's device.
pub struct ForeignDevice {
    ctx: *mut c_void,
    name: String,
    id: (i32, i32),
    alloc: AllocFn,
    free: FreeFn,
    copy: CopyFn,
    record: RecordFn,
    wait: WaitFn,
    query: QueryFn,
    destroy: FreeFn,
    converts: bool,
    release: Option<unsafe extern "C" fn(*mut c_void)>,
    /// `release` is ours to call.
    owned: AtomicBool,
}

// SAFETY: the header asks for functions that any thread may call with `ctx`.
unsafe impl Send for ForeignDevice {}
// SAFETY: as above, several at once.
unsafe impl Sync for ForeignDevice {}

impl ForeignDevice {
    /// A device of these functions. It does not call `release` before [`ForeignDevice::own`]. An error names what is missing or
    /// wrong.
    ///
    /// # Safety
    /// The functions and `ctx` keep the promises of rs_device_t until `release` has been called, or the device dropped.
    pub unsafe fn new(ops: rs_device_t) -> Result<ForeignDevice> {
        if ops.device_type <= RS_DEVICE_CPU {
            bail!(
                RS_ERR_INVALID,
                "rs_device_t.device_type is {}: it must be the DLPack type of the caller's device; host memory (RS_DEVICE_CPU) the \
                 library copies itself, without a device",
                ops.device_type
            );
        }
        if ops.flags & !RS_DEVICE_CONVERTS != 0 || ops.reserved != 0 {
            bail!(
                RS_ERR_INVALID,
                "rs_device_t.flags is {:#x} and reserved {}: there is RS_DEVICE_CONVERTS (1), and reserved is 0",
                ops.flags,
                ops.reserved
            );
        }
        Ok(ForeignDevice {
            ctx: ops.ctx,
            name: format!("the caller's device {}:{}", ops.device_type, ops.device_id),
            id: (ops.device_type, ops.device_id),
            alloc: required(ops.alloc, "rs_device_t.alloc")?,
            free: required(ops.free, "rs_device_t.free")?,
            copy: required(ops.copy, "rs_device_t.copy")?,
            record: required(ops.event_record, "rs_device_t.event_record")?,
            wait: required(ops.event_wait, "rs_device_t.event_wait")?,
            query: required(ops.event_query, "rs_device_t.event_query")?,
            destroy: required(ops.event_destroy, "rs_device_t.event_destroy")?,
            converts: ops.flags & RS_DEVICE_CONVERTS != 0,
            release: ops.release,
            owned: AtomicBool::new(false),
        })
    }

    /// From here on `ctx` is ours: dropping the device releases it.
    pub fn own(&self) {
        self.owned.store(true, Ordering::Relaxed);
    }

    fn done(&self, what: &str, status: rs_status_t) -> Result<()> {
        match status {
            RS_OK => Ok(()),
            _ => Err(self.answer(what, status)),
        }
    }

    /// What went wrong when a function answered `status`.
    fn answer(&self, what: &str, status: rs_status_t) -> Error {
        let kept = if status == RS_ERR_MEMORY { RS_ERR_MEMORY } else { RS_ERR_DEVICE };
        answered(kept, format_args!("{}: {what}", self.name), status)
    }

    fn start(&self, rows: &mut Vec<rs_copy_t>, stream: Stream) -> Result<()> {
        // SAFETY: the promise given to `new`; a `Job` holds memory that lasts, and its bytes were checked to lie inside.
        let status = unsafe { (self.copy)(self.ctx, rows.as_ptr(), rows.len(), pointer(stream)) };
        let what = format!("copy of {} rows", rows.len());
        rows.clear();
        self.done(&what, status)
    }
}

impl Device for ForeignDevice {
    fn name(&self) -> &str {
        &self.name
    }

    fn id(&self) -> (i32, i32) {
        self.id
    }

    fn converts(&self) -> bool {
        self.converts
    }

    fn alloc(&self, bytes: usize) -> Result<Mem> {
        let mut memory = ptr::null_mut();
        // SAFETY: the promise given to `new`.
        self.done(&format!("alloc of {bytes} bytes"), unsafe { (self.alloc)(self.ctx, bytes as u64, &mut memory) })?;
        if memory.is_null() || memory.addr() % ALIGN != 0 {
            bail!(RS_ERR_DEVICE, "{}: alloc of {bytes} bytes gave {memory:p}, which is not aligned to {ALIGN} bytes", self.name);
        }
        memory.expose_provenance();
        // SAFETY: the promise given to `new`: that many bytes, ours until `free`.
        Ok(unsafe { Mem::of(self.id, memory.cast(), bytes) })
    }

    fn free(&self, mem: Mem) {
        // SAFETY: the promise given to `new`; `alloc` gave this address.
        unsafe { (self.free)(self.ctx, pointer(mem.addr())) }
    }

    fn copies(&self) -> Copies<'_> {
        Copies::AsTheyAre(self)
    }

    fn record(&self, stream: Stream) -> Result<Event> {
        let mut event = ptr::null_mut::<c_void>();
        // SAFETY: the promise given to `new`.
        self.done("event_record", unsafe { (self.record)(self.ctx, pointer(stream), &mut event) })?;
        Ok(Event(event.expose_provenance()))
    }

    fn query(&self, event: &Event) -> Result<bool> {
        // SAFETY: the promise given to `new`; `record` gave this event and it is not forgotten yet.
        match unsafe { (self.query)(self.ctx, pointer(event.0)) } {
            RS_IN_PROGRESS => Ok(false),
            status => self.done("event_query", status).map(|()| true),
        }
    }

    fn wait(&self, stream: Stream, event: &Event) -> Result<()> {
        // SAFETY: as in `query`.
        self.done("event_wait", unsafe { (self.wait)(self.ctx, pointer(stream), pointer(event.0)) })
    }

    fn forget(&self, event: Event) {
        // SAFETY: as in `query`; it is used no more.
        unsafe { (self.destroy)(self.ctx, pointer(event.0)) }
    }
}

impl CopyNow for ForeignDevice {
    fn copy(&self, jobs: &[Job<'_>], stream: Stream) -> Result<()> {
        let mut rows = Vec::new();
        for job in jobs {
            for_each_row(job, |row| {
                rows.push(row);
                if rows.len() == ROWS { self.start(&mut rows, stream) } else { Ok(()) }
            })?;
        }
        if rows.is_empty() { Ok(()) } else { self.start(&mut rows, stream) }
    }
}

impl Drop for ForeignDevice {
    fn drop(&mut self) {
        if let (Some(release), true) = (self.release, *self.owned.get_mut()) {
            // SAFETY: the promise given to `new`; nobody calls anything with `ctx` after the last reference.
            unsafe { release(self.ctx) }
        }
    }
}

/// The job as rows of at most RS_MAX_COPY_RANK axes: those it has beyond that, the slowest, are walked through.
fn for_each_row(job: &Job<'_>, mut each: impl FnMut(rs_copy_t) -> Result<()>) -> Result<()> {
    let copy = job.copy();
    let (walked, kept) = copy.axes.split_at(copy.axes.len().saturating_sub(RS_MAX_COPY_RANK));
    let mut at = vec![0u64; walked.len()];
    loop {
        let offset = |step: fn(&CopyAxis) -> u64| at.iter().zip(walked).map(|(i, a)| i * step(a)).sum::<u64>() as usize;
        each(row(copy, kept, job.src_addr() + offset(|a| a.src), job.dst_addr() + offset(|a| a.dst)))?;
        // One step further, like the digits of a number.
        let Some(axis) = (0..walked.len()).rev().find(|&i| at[i] + 1 < walked[i].extent) else { return Ok(()) };
        at[axis] += 1;
        at[axis + 1..].fill(0);
    }
}

fn row(copy: &StridedCopy, axes: &[CopyAxis], src: usize, dst: usize) -> rs_copy_t {
    let dtype = |of: fn(Convert) -> Float| copy.convert.map_or(rs_dtype_t { code: 0, bits: 0, lanes: 0 }, |c| of(c).dtype());
    let mut row = rs_copy_t {
        src: pointer(src),
        dst: pointer(dst),
        run_bytes: copy.run,
        rank: axes.len() as u32,
        transform: copy.convert.map_or(RS_TRANSFORM_NONE, Convert::transform),
        src_dtype: dtype(|c| c.from),
        dst_dtype: dtype(|c| c.to),
        extent: [0; RS_MAX_COPY_RANK],
        src_stride: [0; RS_MAX_COPY_RANK],
        dst_stride: [0; RS_MAX_COPY_RANK],
    };
    for (i, axis) in axes.iter().enumerate() {
        (row.extent[i], row.src_stride[i], row.dst_stride[i]) = (axis.extent, axis.src, axis.dst);
    }
    row
}

/// A member that the caller must set.
pub(crate) fn required<F>(function: Option<F>, what: &str) -> Result<F> {
    function.ok_or_else(|| err!(RS_ERR_INVALID, "{what} is NULL; this function is required"))
}

/// The error of status `kept` for a function of the caller that answered `status`.
pub(crate) fn answered(kept: rs_status_t, what: impl fmt::Display, status: rs_status_t) -> Error {
    let name = status_name(status).to_string_lossy();
    let hint = if status > 0 { "; it may answer RS_OK or a negative status" } else { "" };
    err!(kept, "{what} answered {status} ({name}){hint}")
}

/// An address that C gave, as C wants it.
pub(crate) fn pointer(addr: usize) -> *mut c_void {
    ptr::with_exposed_provenance_mut(addr)
}

#[cfg(test)]
mod tests;
