//! What is known of parameters and of the last sync, and what other threads may ask or do meanwhile.
#![forbid(unsafe_code)]

use crate::abi::RS_PARAM_INITIAL;
use crate::comm::Comm;
use crate::error::{Error, Result};
use crate::exec::work::Bytes;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

/// A parameter and its state.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Param {
    /// Row of the layout's buffers.
    pub buffer: usize,
    /// `RS_PARAM_*`.
    pub state: u32,
    /// Version of the last sync that it is whole at; 0: none.
    pub version: u64,
}

/// The state of one buffer.
#[derive(Clone, Copy, Debug)]
pub(super) struct ParamState {
    pub state: u32,
    pub version: u64,
}

impl Default for ParamState {
    fn default() -> ParamState {
        ParamState { state: RS_PARAM_INITIAL, version: 0 }
    }
}

/// Figures of connect and of the last sync that moved something.
#[derive(Clone, Debug, Default)]
pub(super) struct Stats {
    pub plan_seconds: f64,
    /// How often this rank has planned.
    pub plans: u64,
    pub connect_seconds: f64,
    pub seconds: f64,
    pub version: u64,
    pub bytes: Bytes,
    pub staging_bytes: u64,
    pub rounds: usize,
    pub syncs: u64,
    pub failure: Option<String>,
}

/// The part of a container that any thread may use at any time.
#[derive(Default)]
pub struct Control {
    inner: Mutex<Inner>,
    changed: Condvar,
}

#[derive(Default)]
struct Inner {
    comm: Option<Arc<dyn Comm>>,
    running: bool,
    /// A sync is on its stream: whoever asks looks at it.
    flying: bool,
    /// Nobody shall wait for syncs any more.
    closing: bool,
    failure: Option<Error>,
}

impl Control {
    /// Ends the call in progress on all ranks, and the communicator with it.
    pub fn abort(&self, why: &str) {
        // Not under the lock: the communicator may take its time, and poll must not wait.
        let comm = self.lock().comm.clone();
        if let Some(comm) = comm {
            comm.abort(why);
        }
    }

    /// `true`: the last connect or sync is complete on all ranks (or there was none); `false`: one is in progress; else why it failed.
    pub fn status(&self) -> Result<bool> {
        let inner = self.lock();
        match &inner.failure {
            Some(e) if !inner.running => Err(e.clone()),
            _ => Ok(!inner.running),
        }
    }

    pub(super) fn set_comm(&self, comm: Option<Arc<dyn Comm>>) {
        let mut inner = self.lock();
        inner.comm = comm;
        inner.failure = None;
    }

    /// Whether a sync is on its stream: [`Container::poll`](super::Container::poll) tells how it stands.
    pub fn flying(&self) -> bool {
        self.lock().flying
    }

    pub(super) fn started(&self) {
        self.lock().running = true;
    }

    /// The call has put its sync on the stream.
    pub(super) fn took_off(&self) {
        self.lock().flying = true;
        self.changed.notify_all();
    }

    /// For a thread that looks at syncs: returns when it is time for the next look, `pause` after the last, or, with `false`, when
    /// [`Control::close`] was called.
    pub fn watch(&self, pause: Duration) -> bool {
        let mut inner = self.lock();
        if inner.flying {
            inner = self.changed.wait_timeout_while(inner, pause, |i| !i.closing).unwrap_or_else(PoisonError::into_inner).0;
        }
        inner = self.changed.wait_while(inner, |i| !i.flying && !i.closing).unwrap_or_else(PoisonError::into_inner);
        !inner.closing
    }

    /// Ends [`Control::watch`].
    pub fn close(&self) {
        self.lock().closing = true;
        self.changed.notify_all();
    }

    /// The call is over; what is said of the last connect or sync stays.
    pub(super) fn rested(&self) {
        self.lock().running = false;
    }

    pub(super) fn ended(&self, result: &Result<()>) {
        let mut inner = self.lock();
        (inner.running, inner.flying) = (false, false);
        inner.failure = result.as_ref().err().cloned();
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(|p| p.into_inner())
    }
}
