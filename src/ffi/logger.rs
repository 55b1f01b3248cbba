//! The `log` crate's lines as calls of the caller's function.
//!
//! A shared library has a `log` of its own, so installing a logger there disturbs nobody; Rust code that links this crate and has
//! installed its own is told so.

use crate::abi::*;
use crate::error::{Result, bail};
use log::{Level, LevelFilter, Log, Metadata, Record};
use std::cell::Cell;
use std::ffi::{CStr, CString, c_char, c_void};
use std::ptr;
use std::sync::{OnceLock, PoisonError, RwLock};

struct Sink {
    function: unsafe extern "C" fn(user: *mut c_void, level: u32, label: *const c_char, text: *const c_char),
    user: *mut c_void,
}

// SAFETY: the header asks for a function that any thread may call with `user`.
unsafe impl Send for Sink {}
// SAFETY: as above; several threads may call it at once.
unsafe impl Sync for Sink {}

static SINK: RwLock<Option<Sink>> = RwLock::new(None);

thread_local! {
    /// The label of the container that this thread is inside; NULL: none.
    static LABEL: Cell<*const c_char> = const { Cell::new(ptr::null()) };
    /// This thread is inside the caller's function.
    static INSIDE: Cell<bool> = const { Cell::new(false) };
}

/// Until dropped, this thread's lines bear `label` (an empty one: the module's name).
pub fn labelled(label: &CStr) -> Labelled<'_> {
    let before = LABEL.replace(if label.is_empty() { ptr::null() } else { label.as_ptr() });
    Labelled { before, _label: label }
}

/// See [`labelled`].
pub struct Labelled<'a> {
    before: *const c_char,
    _label: &'a CStr,
}

impl Drop for Labelled<'_> {
    fn drop(&mut self) {
        LABEL.set(self.before);
    }
}

/// Sends lines up to `max_level` to `function`; `None`: to nobody. When it returns, no thread is inside the former function.
pub fn set(function: rs_log_fn, user: *mut c_void, max_level: u32) -> Result<()> {
    let level = match max_level {
        RS_LOG_OFF => LevelFilter::Off,
        RS_LOG_ERROR => LevelFilter::Error,
        RS_LOG_WARN => LevelFilter::Warn,
        RS_LOG_INFO => LevelFilter::Info,
        RS_LOG_DEBUG => LevelFilter::Debug,
        RS_LOG_TRACE => LevelFilter::Trace,
        _ => bail!(RS_ERR_INVALID, "max_level is {max_level}, it must be RS_LOG_OFF (0) to RS_LOG_TRACE (5)"),
    };
    if INSIDE.get() {
        bail!(RS_ERR_BUSY, "the log function may not call this library");
    }
    static OURS: OnceLock<bool> = OnceLock::new();
    if !*OURS.get_or_init(|| log::set_logger(&Logger).is_ok()) {
        bail!(RS_ERR_STATE, "this program's Rust code has installed a logger of its own");
    }
    let sink = function.map(|function| Sink { function, user });
    log::set_max_level(if sink.is_some() { level } else { LevelFilter::Off });
    *SINK.write().unwrap_or_else(PoisonError::into_inner) = sink;
    Ok(())
}

struct Logger;

impl Log for Logger {
    fn enabled(&self, _: &Metadata<'_>) -> bool {
        // log::max_level() is the only filter.
        true
    }

    fn log(&self, record: &Record<'_>) {
        if INSIDE.get() {
            return;
        }
        let level = match record.level() {
            Level::Error => RS_LOG_ERROR,
            Level::Warn => RS_LOG_WARN,
            Level::Info => RS_LOG_INFO,
            Level::Debug => RS_LOG_DEBUG,
            Level::Trace => RS_LOG_TRACE,
        };
        let (Ok(module), Ok(text)) = (CString::new(record.target()), CString::new(record.args().to_string())) else {
            return;
        };
        let label = LABEL.get();
        let label = if label.is_null() { module.as_ptr() } else { label };
        let sink = SINK.read().unwrap_or_else(PoisonError::into_inner);
        if let Some(sink) = &*sink {
            INSIDE.set(true);
            // SAFETY: the promise in rs_set_log(); both strings live until it returns, a label as long as its guard.
            unsafe { (sink.function)(sink.user, level, label, text.as_ptr()) };
            INSIDE.set(false);
        }
    }

    fn flush(&self) {}
}
