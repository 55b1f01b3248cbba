//! The one way in from C: panics, errors, sized structs, tables, strings, handles.
//!
//! Knows how C hands things over and takes them back. Must not know geometry, plans, or what a sync does.

#[cfg(not(panic = "unwind"))]
compile_error!("build libreshard with panic = \"unwind\": under \"abort\" a bug in here ends the caller's process");

pub mod api;
pub mod api_comm;
mod convert;
mod handle;
mod last_error;
mod logger;
mod preset;
mod read;
mod write;

use crate::abi::*;
use crate::error::{Error, Result, err};
use std::any::Any;
use std::ffi::CString;
use std::panic::{AssertUnwindSafe, catch_unwind};

/// What a successful call answers.
trait Answer {
    fn status(self) -> rs_status_t;
}

impl Answer for () {
    fn status(self) -> rs_status_t {
        RS_OK
    }
}

/// `true`: all is done.
impl Answer for bool {
    fn status(self) -> rs_status_t {
        if self { RS_OK } else { RS_IN_PROGRESS }
    }
}

/// Every export is one of these: an error or a panic becomes a status, its text this thread's last error.
fn call<A: Answer>(body: impl FnOnce() -> Result<A>) -> rs_status_t {
    // What a panic leaves half done lies behind a handle's lock, which it poisons.
    match catch_unwind(AssertUnwindSafe(body)) {
        Ok(Ok(answer)) => answer.status(),
        Ok(Err(error)) => last_error::record(&error),
        Err(payload) => last_error::record(&panicked(&*payload)),
    }
}

/// A text of ours for C.
fn c_string(text: &str) -> Result<CString> {
    CString::new(text).map_err(|_| err!(RS_ERR_INTERNAL, "a text for C with a NUL in it: {text:?}"))
}

/// The default hook has written the place to stderr. No hook of ours: the process may hold other Rust code, whose hook it would be.
fn panicked(payload: &(dyn Any + Send)) -> Error {
    let text = payload.downcast_ref::<&str>().copied();
    let text = text.or_else(|| payload.downcast_ref::<String>().map(String::as_str)).unwrap_or("no text");
    err!(RS_ERR_INTERNAL, "a bug in libreshard, please report it: panic: {text}")
}

#[cfg(test)]
mod tests;
