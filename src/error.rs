//! What went wrong: a status for the program, a text for the reader.
//!
//! Knows the status numbers of [`crate::abi`] and nothing else. A text names the parameter, rank, box or peer, what was
//! expected and what came, and what to do.
#![forbid(unsafe_code)]

use crate::abi::*;
use std::ffi::CStr;
use std::fmt;

/// A failed operation.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Error {
    status: rs_status_t,
    text: String,
}

/// The result of everything in this crate that can fail.
pub type Result<T> = std::result::Result<T, Error>;

impl Error {
    /// An error of the given status; `status` is one of the negative `RS_ERR_*`.
    pub fn new(status: rs_status_t, text: impl Into<String>) -> Error {
        debug_assert!(status < 0);
        Error { status, text: text.into() }
    }

    /// Its `RS_ERR_*` number.
    pub fn status(&self) -> rs_status_t {
        self.status
    }

    /// Its text, without the status name.
    pub fn text(&self) -> &str {
        &self.text
    }

    /// The same error with `what: ` before its text.
    pub fn context(self, what: impl fmt::Display) -> Error {
        Error { status: self.status, text: format!("{what}: {}", self.text) }
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

impl std::error::Error for Error {}

/// `err!(RS_ERR_LAYOUT, "tile {i} ...")` is an [`Error`]; `bail!` returns it.
macro_rules! err {
    ($status:expr, $($arg:tt)*) => { $crate::error::Error::new($status, format!($($arg)*)) };
}
macro_rules! bail {
    ($status:expr, $($arg:tt)*) => { return Err($crate::error::err!($status, $($arg)*)) };
}
pub(crate) use {bail, err};

/// Whether a number, which a peer has sent perhaps, is that of an error.
pub fn is_error(status: rs_status_t) -> bool {
    status < 0 && status_name(status) != UNKNOWN
}

const UNKNOWN: &CStr = c"unknown status";

/// A status number's name, `RS_ERR_TIMEOUT` for instance; a number that is none is "unknown status".
pub fn status_name(status: rs_status_t) -> &'static CStr {
    match status {
        RS_OK => c"RS_OK",
        RS_IN_PROGRESS => c"RS_IN_PROGRESS",
        RS_ERR_INVALID => c"RS_ERR_INVALID",
        RS_ERR_UNKNOWN_FIELD => c"RS_ERR_UNKNOWN_FIELD",
        RS_ERR_UNSUPPORTED => c"RS_ERR_UNSUPPORTED",
        RS_ERR_NOT_FOUND => c"RS_ERR_NOT_FOUND",
        RS_ERR_AMBIGUOUS => c"RS_ERR_AMBIGUOUS",
        RS_ERR_TOO_SMALL => c"RS_ERR_TOO_SMALL",
        RS_ERR_BUSY => c"RS_ERR_BUSY",
        RS_ERR_STATE => c"RS_ERR_STATE",
        RS_ERR_TORN => c"RS_ERR_TORN",
        RS_ERR_LAYOUT => c"RS_ERR_LAYOUT",
        RS_ERR_COVERAGE => c"RS_ERR_COVERAGE",
        RS_ERR_MISMATCH => c"RS_ERR_MISMATCH",
        RS_ERR_TIMEOUT => c"RS_ERR_TIMEOUT",
        RS_ERR_PEER => c"RS_ERR_PEER",
        RS_ERR_ABORTED => c"RS_ERR_ABORTED",
        RS_ERR_COMM => c"RS_ERR_COMM",
        RS_ERR_DEVICE => c"RS_ERR_DEVICE",
        RS_ERR_MEMORY => c"RS_ERR_MEMORY",
        RS_ERR_INTERNAL => c"RS_ERR_INTERNAL",
        RS_ERR_CORRUPT => c"RS_ERR_CORRUPT",
        _ => UNKNOWN,
    }
}
