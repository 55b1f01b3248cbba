//! What goes out: nothing but on success, except the length of a text that did not fit.

use super::read::{Growing, stated_size};
use crate::abi::*;
use crate::error::{Result, bail};
use std::mem::size_of;

/// Where a result goes.
pub struct Out<T>(*mut T);

impl<T> Out<T> {
    /// Refuses NULL, before any work is done.
    ///
    /// # Safety
    /// `ptr` is NULL or points to memory for a `T` that nobody else uses during the call.
    pub unsafe fn new(ptr: *mut T, what: &str) -> Result<Out<T>> {
        if ptr.is_null() {
            bail!(RS_ERR_INVALID, "{what} is NULL, there is no place for the result");
        }
        Ok(Out(ptr))
    }

    /// Hands the result over.
    pub fn put(self, value: T) {
        // SAFETY: the promise given to `new`.
        unsafe { self.0.write_unaligned(value) }
    }
}

/// Where a struct goes whose size the caller states.
pub struct GrowingOut<T> {
    to: *mut T,
    size: usize,
}

impl<T: Growing> GrowingOut<T> {
    /// Reads the caller's `struct_size`, and nothing else: the rest of the struct may be anything.
    ///
    /// # Safety
    /// `ptr` is NULL or points to a struct of `struct_size` bytes that nobody else uses during the call.
    pub unsafe fn new(ptr: *mut T, what: &str) -> Result<GrowingOut<T>> {
        // SAFETY: this function's promise.
        let size = unsafe { stated_size(ptr, what)? };
        Ok(GrowingOut { to: ptr, size })
    }

    /// Hands over as much of the result as the caller has room for; zeros where the caller has more; `struct_size` stays.
    pub fn put(self, value: T) {
        let known = self.size.min(size_of::<T>());
        let (to, from) = (self.to.cast::<u8>(), (&raw const value).cast::<u8>());
        let head = size_of::<usize>();
        // SAFETY: head <= known <= size, a checked size being a multiple of a usize's alignment, and `to` has `size` bytes by the
        // promise given to `new`.
        unsafe {
            to.add(head).copy_from_nonoverlapping(from.add(head), known - head);
            to.add(known).write_bytes(0, self.size - known);
        }
    }
}

/// Copies `bytes` to the caller's `buf` of `cap` bytes and sets `*len`; if they do not fit, sets `*len` alone.
///
/// # Safety
/// `buf` is NULL with `cap` 0, or points to `cap` bytes; `len` is NULL or points to a size_t; nobody else uses them during the call.
pub unsafe fn bytes(bytes: &[u8], buf: *mut u8, cap: usize, len: *mut usize) -> Result<()> {
    // SAFETY: this function's promise.
    let len = unsafe { Out::new(len, "len")? };
    if cap > 0 && buf.is_null() {
        bail!(RS_ERR_INVALID, "buf is NULL, but cap is {cap}; to ask for the length only, cap is 0");
    }
    len.put(bytes.len());
    if cap < bytes.len() {
        bail!(RS_ERR_TOO_SMALL, "cap is {cap}, {} bytes are needed", bytes.len());
    }
    // SAFETY: `buf` has room for `cap`, which is at least their number; they are ours, so the two do not overlap.
    unsafe { buf.copy_from_nonoverlapping(bytes.as_ptr(), bytes.len()) };
    Ok(())
}
