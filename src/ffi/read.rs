//! What comes in: structs that state their size, tables that state their row size, strings, slices.
//!
//! Nothing is believed that can be checked, and a struct is copied before it is looked at: a reference to one that is shorter than
//! this library's would be undefined behaviour.

use crate::abi::*;
use crate::error::{Result, bail, err};
use std::ffi::{CStr, c_char};
use std::fmt::Display;
use std::mem::{MaybeUninit, align_of, offset_of, size_of};
use std::slice;

/// No struct comes near this size: whoever states a larger one has not set it.
const MAX_SIZE: usize = 4096;

/// A struct of `abi`.
///
/// # Safety
/// It is `repr(C)`, holds integers, pointers and optional C functions only, and has no padding: any bytes that a caller who keeps
/// the header's promises writes are a value of it.
pub unsafe trait Plain: Copy {
    /// Its name in the header.
    const NAME: &'static str;
}

/// A [`Plain`] struct that starts with its own size.
///
/// # Safety
/// Its first field is `struct_size: usize`.
pub unsafe trait Growing: Plain {}

macro_rules! plain {
    ($($name:ident),*) => { $(
        // SAFETY: such are all structs of `abi`; tests/abi.rs compares each size with the sum of its fields.
        unsafe impl Plain for $name {
            const NAME: &'static str = stringify!($name);
        }
    )* };
}
macro_rules! starts_with_size {
    ($($name:ident),*) => { $(
        plain!($name);
        // SAFETY: its offset is checked here, its type where `write` and `sized` use it as a usize.
        unsafe impl Growing for $name {}
        const _: () = assert!(offset_of!($name, struct_size) == 0);
        const _: fn(&$name) -> &usize = |s| &s.struct_size;
    )* };
}
plain!(rs_tensor_t, rs_buffer_t, rs_tile_t);
starts_with_size!(rs_layout_t, rs_config_t, rs_sync_t, rs_param_t, rs_comm_local_t, rs_comm_ops_t, rs_device_t, rs_bind_t);

/// The struct at `ptr`, called `what` by the caller: zeros where it is shorter than ours, refused where it uses what we do not know.
///
/// # Safety
/// `ptr` is NULL or points to a struct of at least its own `struct_size` bytes, or of `size_of::<usize>()` if that is less.
pub unsafe fn sized<T: Growing>(ptr: *const T, what: &str) -> Result<T> {
    // SAFETY: this function's promise; the size was checked.
    unsafe { copy(ptr.cast(), stated_size(ptr, what)?, what) }
}

/// The `struct_size` at `ptr`, checked.
///
/// # Safety
/// As [`sized`].
pub unsafe fn stated_size<T: Growing>(ptr: *const T, what: &str) -> Result<usize> {
    if ptr.is_null() {
        bail!(RS_ERR_INVALID, "{what} is NULL, it must point to a {}", T::NAME);
    }
    // SAFETY: not NULL, and a `Growing` struct starts with its size.
    let size = unsafe { ptr.cast::<usize>().read_unaligned() };
    check_size::<T>(size, format_args!("{what}.struct_size"))?;
    Ok(size)
}

/// `count` rows of `size` bytes each, called `what` by the caller.
///
/// # Safety
/// `rows` is NULL or points to that many bytes.
pub unsafe fn table<T: Plain>(rows: *const T, count: usize, size: usize, what: &str) -> Result<Vec<T>> {
    if count == 0 {
        return Ok(vec![]);
    }
    if rows.is_null() {
        bail!(RS_ERR_INVALID, "{what} is NULL, but its count is {count}");
    }
    check_size::<T>(size, format_args!("the row size of {what}"))?;
    fits(count, size, what)?;
    let mut out = vec![];
    if out.try_reserve_exact(count).is_err() {
        bail!(RS_ERR_MEMORY, "no memory for the {count} rows of {what}");
    }
    for i in 0..count {
        // SAFETY: row i lies inside the table.
        out.push(unsafe { copy(rows.cast::<u8>().add(i * size), size, format_args!("{what}[{i}]"))? });
    }
    Ok(out)
}

/// `count` values at `ptr`; (NULL, 0) is an empty list.
///
/// # Safety
/// `ptr` is NULL or points to that many values, which stay as they are while the slice is used.
pub unsafe fn list<'a, T>(ptr: *const T, count: usize, what: &str) -> Result<&'a [T]> {
    if count == 0 {
        return Ok(&[]);
    }
    if ptr.is_null() {
        bail!(RS_ERR_INVALID, "{what} is NULL, but its count is {count}");
    }
    if !ptr.is_aligned() {
        bail!(RS_ERR_INVALID, "{what} ({ptr:p}) is not aligned to {} bytes", align_of::<T>());
    }
    fits(count, size_of::<T>(), what)?;
    // SAFETY: not NULL, aligned, no longer than memory can be; the rest is this function's promise.
    Ok(unsafe { slice::from_raw_parts(ptr, count) })
}

/// The UTF-8 text at `ptr`.
///
/// # Safety
/// `ptr` is NULL or points to a NUL-terminated string that stays as it is while the text is used.
pub unsafe fn text<'a>(ptr: *const c_char, what: impl Display) -> Result<&'a str> {
    if ptr.is_null() {
        bail!(RS_ERR_INVALID, "{what} is NULL, it must be a string");
    }
    // SAFETY: this function's promise.
    let bytes = unsafe { CStr::from_ptr(ptr) };
    bytes
        .to_str()
        .map_err(|e| err!(RS_ERR_INVALID, "{what} ('{}') is not UTF-8 from byte {} on", bytes.to_string_lossy(), e.valid_up_to()))
}

/// As [`text`], NULL meaning none.
///
/// # Safety
/// As [`text`].
pub unsafe fn optional_text<'a>(ptr: *const c_char, what: &str) -> Result<Option<&'a str>> {
    if ptr.is_null() {
        return Ok(None);
    }
    // SAFETY: this function's promise.
    unsafe { text(ptr, what) }.map(Some)
}

/// Refuses bits that this library does not know.
pub fn flags(given: u32, known: u32, what: impl Display) -> Result<()> {
    if given & !known != 0 {
        bail!(RS_ERR_INVALID, "{what} is {given:#x}, of which this library does not know {:#x}", given & !known);
    }
    Ok(())
}

/// Refuses a reserved field that is not zero.
pub fn reserved(given: u32, what: impl Display) -> Result<()> {
    if given != 0 {
        bail!(RS_ERR_INVALID, "{what} is {given}, it must be 0");
    }
    Ok(())
}

/// C's sizeof is a multiple of the alignment, so a struct that is cut there is cut between fields, never inside a pointer.
fn check_size<T: Plain>(size: usize, what: impl Display) -> Result<()> {
    if size == 0 || size > MAX_SIZE || size % align_of::<T>() != 0 {
        bail!(RS_ERR_INVALID, "{what} is {size}, it must be sizeof({}), {} in this library", T::NAME, size_of::<T>());
    }
    Ok(())
}

fn fits(count: usize, size: usize, what: &str) -> Result<()> {
    if count.checked_mul(size).is_none_or(|bytes| bytes > isize::MAX as usize) {
        bail!(RS_ERR_INVALID, "{what}: {count} rows of {size} bytes are more than memory can hold");
    }
    Ok(())
}

/// # Safety
/// `from` points to `size` bytes.
unsafe fn copy<T: Plain>(from: *const u8, size: usize, what: impl Display) -> Result<T> {
    let known = size.min(size_of::<T>());
    for at in known..size {
        // SAFETY: at < size.
        let byte = unsafe { *from.add(at) };
        if byte != 0 {
            bail!(
                RS_ERR_UNKNOWN_FIELD,
                "{what}: byte {at} of {} is {byte}; this libreshard, {}, knows {known} bytes of it and the caller, built for a newer \
                 one, uses more",
                T::NAME,
                env!("CARGO_PKG_VERSION")
            );
        }
    }
    let mut out = MaybeUninit::<T>::zeroed();
    // SAFETY: `known` bytes fit in both; then every byte of `out` is set, and `Plain` says that such bytes are a value.
    unsafe {
        out.as_mut_ptr().cast::<u8>().copy_from_nonoverlapping(from, known);
        Ok(out.assume_init())
    }
}
