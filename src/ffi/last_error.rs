//! The text of this thread's last failing call.

use crate::abi::rs_status_t;
use crate::error::Error;
use std::cell::Cell;
use std::ffi::c_char;

/// Longest text in bytes, its NUL included.
const CAPACITY: usize = 2048;
/// Ends a text that was cut.
const CUT: &str = " ...";

thread_local! {
    // A plain array: a thread-local with a destructor would keep the library mapped after dlclose.
    static TEXT: Cell<[u8; CAPACITY]> = const { Cell::new([0; CAPACITY]) };
}

/// Keeps the error's text for [`text`]; its status.
pub fn record(error: &Error) -> rs_status_t {
    let (head, tail) = fit(error.text());
    let mut bytes = [0; CAPACITY];
    bytes[..head.len()].copy_from_slice(head.as_bytes());
    bytes[head.len()..head.len() + tail.len()].copy_from_slice(tail.as_bytes());
    TEXT.set(bytes);
    error.status()
}

/// The text, NUL-terminated; valid until this thread's next failing call.
pub fn text() -> *const c_char {
    TEXT.with(|t| t.as_ptr()) as *const c_char
}

fn fit(text: &str) -> (&str, &str) {
    if text.len() < CAPACITY {
        return (text, "");
    }
    let mut end = CAPACITY - 1 - CUT.len();
    while !text.is_char_boundary(end) {
        end -= 1;
    }
    (&text[..end], CUT)
}
