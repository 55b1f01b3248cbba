//! What the handles point to, and who may be inside one.

use super::convert::{self, Asked, Described};
use super::read::optional_text;
use super::{c_string, logger};
use crate::abi::*;
use crate::comm::Comm;
use crate::container::{Container, Control, Param};
use crate::error::{Error, Result, bail, err};
use crate::layout::Layout;
use std::ffi::CString;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::ptr;
use std::sync::{Arc, Mutex, RwLock, TryLockError};
use std::thread::JoinHandle;
use std::time::Duration;

/// What an rs_container_t is: a container, taken by one changing call or by any number of reading ones at a time.
pub struct Handle {
    /// Ends before the container does.
    watchdog: Option<Watchdog>,
    shared: Arc<Shared>,
}

/// What the caller's threads and the watchdog share.
pub struct Shared {
    label: CString,
    control: Arc<Control>,
    inner: RwLock<Named>,
    /// Held by who looks at a sync in progress, which makes him a reader for a moment.
    polling: Mutex<()>,
}

/// A container with its buffers' names as C wants them and their virtual-pipeline chunks, replaced together.
pub struct Named {
    pub container: Container,
    names: Vec<CString>,
    chunks: Vec<u32>,
}

impl Handle {
    /// A new container from the caller's structs.
    ///
    /// # Safety
    /// As the header promises for rs_container_create().
    pub unsafe fn create(config: *const rs_config_t, layout: *const rs_layout_t) -> Result<*mut rs_container_t> {
        // SAFETY: this function's promise.
        let Asked { config, tables, device, watchdog } = unsafe { convert::config(config, layout)? };
        let Described { layout, mems, chunks, spec } = tables;
        let names = names(&layout)?;
        let container = Container::new(config, layout, mems, spec)?;
        let label = c_string(container.label())?;
        let control = container.control();
        let inner = RwLock::new(Named { container, names, chunks });
        let shared = Arc::new(Shared { label, control, inner, polling: Mutex::default() });
        let watchdog = if watchdog { Some(Watchdog::new(&shared)?) } else { None };
        if let Some(device) = device {
            device.own();
        }
        Ok(Box::into_raw(Box::new(Handle { watchdog, shared })).cast())
    }

    /// The handle behind the caller's pointer.
    ///
    /// # Safety
    /// `ptr` is NULL or came from [`Handle::create`] and is not destroyed while the reference is used.
    pub unsafe fn of<'a>(ptr: *const rs_container_t) -> Result<&'a Shared> {
        // SAFETY: this function's promise; only shared references to a handle exist.
        let handle = unsafe { ptr.cast::<Handle>().as_ref() };
        handle.map(|h| &*h.shared).ok_or_else(|| err!(RS_ERR_INVALID, "container is NULL"))
    }

    /// Ends it; NULL is nothing.
    ///
    /// # Safety
    /// `ptr` is NULL or came from [`Handle::create`], once, and nobody uses it any more.
    pub unsafe fn destroy(ptr: *mut rs_container_t) -> Result<()> {
        if !ptr.is_null() {
            // SAFETY: this function's promise: it is the Box of `create`.
            let Handle { watchdog, shared } = *unsafe { Box::from_raw(ptr.cast::<Handle>()) };
            drop(watchdog);
            drop(shared);
        }
        Ok(())
    }
}

impl Shared {
    /// Ends the calls in progress. Never kept waiting, whoever is inside.
    pub fn abort(&self) {
        let _label = logger::labelled(&self.label);
        self.control.abort("rs_container_abort() was called");
    }

    /// How the last sync stands, after a look at one that is on its stream. Never kept waiting either.
    pub fn status(&self) -> Result<bool> {
        if self.inner.is_poisoned() {
            return Err(self.named(broken()));
        }
        if self.control.flying() {
            let _label = logger::labelled(&self.label);
            let _polling = match self.polling.try_lock() {
                Ok(polling) => polling,
                Err(TryLockError::WouldBlock) => return Ok(false),
                Err(TryLockError::Poisoned(_)) => return Err(self.named(broken())),
            };
            return match self.inner.try_read() {
                Ok(named) => named.container.poll().map_err(|e| self.named(e)),
                // Inside is somebody who will be told that a sync is in progress.
                Err(_) => Ok(false),
            };
        }
        self.control.status().map_err(|e| self.named(e))
    }

    /// Runs a call that changes nothing; others like it may run beside it.
    pub fn read<R>(&self, body: impl FnOnce(&Named) -> Result<R>) -> Result<R> {
        let _label = logger::labelled(&self.label);
        self.inner.try_read().map_err(refusal).and_then(|inner| body(&inner)).map_err(|e| self.named(e))
    }

    /// Runs a call that may change everything, alone. A panic in it ends the container and, so that nobody waits for this rank,
    /// its communicator.
    pub fn write<R>(&self, body: impl FnOnce(&mut Named) -> Result<R>) -> Result<R> {
        let _label = logger::labelled(&self.label);
        let inner = self.inner.try_write().or_else(|e| match e {
            // Whoever only looks at a sync in progress is soon done.
            TryLockError::WouldBlock => {
                let _polling = self.polling.lock();
                self.inner.try_write()
            }
            poisoned => Err(poisoned),
        });
        let mut inner = inner.map_err(|e| self.named(refusal(e)))?;
        match catch_unwind(AssertUnwindSafe(|| body(&mut inner))) {
            Ok(result) => result.map_err(|e| self.named(e)),
            Err(payload) => {
                let _ = catch_unwind(AssertUnwindSafe(|| self.control.abort("a bug in libreshard: it panicked")));
                // With the guard alive, which poisons the lock.
                resume_unwind(payload)
            }
        }
    }

    fn named(&self, error: Error) -> Error {
        if self.label.is_empty() { error } else { error.context(self.label.to_string_lossy()) }
    }
}

/// The thread of RS_CONFIG_WATCHDOG.
struct Watchdog {
    control: Arc<Control>,
    thread: Option<JoinHandle<()>>,
}

impl Watchdog {
    /// Between two looks at a sync in progress.
    const PAUSE: Duration = Duration::from_millis(1);

    fn new(shared: &Arc<Shared>) -> Result<Watchdog> {
        let (control, shared) = (shared.control.clone(), shared.clone());
        let work = move || {
            while shared.control.watch(Self::PAUSE) {
                // Whoever asks is told; a bug is told too, as the container is of no use then.
                if catch_unwind(AssertUnwindSafe(|| drop(shared.status()))).is_err() {
                    log::error!("the watchdog of container '{}' ends: a bug in libreshard", shared.label.to_string_lossy());
                    return;
                }
            }
        };
        let thread = std::thread::Builder::new().name("reshard-watchdog".into()).spawn(work);
        let thread = thread.map_err(|e| err!(RS_ERR_MEMORY, "the thread of RS_CONFIG_WATCHDOG cannot start: {e}"))?;
        Ok(Watchdog { control, thread: Some(thread) })
    }
}

impl Drop for Watchdog {
    fn drop(&mut self) {
        self.control.close();
        if let Some(thread) = self.thread.take() {
            // It catches its panics.
            let _ = thread.join();
        }
    }
}

fn refusal<G>(error: TryLockError<G>) -> Error {
    match error {
        TryLockError::WouldBlock => {
            err!(RS_ERR_BUSY, "another thread is inside a call on this container; one at a time, or wait for it")
        }
        TryLockError::Poisoned(_) => broken(),
    }
}

fn broken() -> Error {
    err!(RS_ERR_INTERNAL, "an earlier call on this container panicked; destroy it and make another one")
}

impl Named {
    /// Another layout.
    ///
    /// # Safety
    /// As the header promises for rs_container_rebind().
    pub unsafe fn rebind(&mut self, layout: *const rs_layout_t, preset: *const rs_preset_t) -> Result<()> {
        // SAFETY: this function's promise.
        let Described { layout, mems, chunks, spec } = unsafe { convert::described(layout, preset)? };
        let names = names(&layout)?;
        self.container.rebind(layout, mems, spec)?;
        (self.names, self.chunks) = (names, chunks);
        Ok(())
    }

    /// A parameter for C; its pointers live as long as this container's layout.
    pub fn param(&self, param: Param) -> Result<rs_param_t> {
        let buffer = self.container.layout().buffers().get(param.buffer);
        let (Some(b), Some(name)) = (buffer, self.names.get(param.buffer)) else {
            bail!(RS_ERR_INTERNAL, "no buffer row {}", param.buffer);
        };
        Ok(rs_param_t {
            struct_size: 0,
            name: name.as_ptr(),
            data: ptr::with_exposed_provenance_mut(b.addr as usize),
            size_bytes: b.bytes,
            device_type: b.device_type,
            device_id: b.device_id,
            dtype: b.dtype,
            ndim: b.shape.len() as u32,
            shape: b.shape.as_ptr(),
            strides: b.strides.as_ptr(),
            role: b.role,
            model_chunk: self.chunks.get(param.buffer).copied().unwrap_or(0),
            state: param.state,
            reserved: 0,
            version: param.version,
        })
    }

    /// JSON with its NUL.
    ///
    /// # Safety
    /// `param` is NULL or a string.
    pub unsafe fn describe(&self, what: u32, param: *const std::ffi::c_char) -> Result<Vec<u8>> {
        // SAFETY: this function's promise.
        let param = unsafe { optional_text(param, "param")? };
        Ok(c_string(&self.container.describe(what, param)?)?.into_bytes_with_nul())
    }
}

fn names(layout: &Layout) -> Result<Vec<CString>> {
    layout.buffers().iter().map(|b| c_string(&b.name)).collect()
}

/// What an rs_comm_t is: one reference to a communicator.
pub struct CommHandle(Arc<dyn Comm>);

impl CommHandle {
    /// A handle of its own for a communicator.
    pub fn create(comm: Arc<dyn Comm>) -> *mut rs_comm_t {
        Box::into_raw(Box::new(CommHandle(comm))).cast()
    }

    /// Another reference to the communicator behind the caller's pointer.
    ///
    /// # Safety
    /// `ptr` is NULL or came from [`CommHandle::create`] and is not destroyed during the call.
    pub unsafe fn share(ptr: *const rs_comm_t) -> Result<Arc<dyn Comm>> {
        // SAFETY: this function's promise.
        let handle = unsafe { ptr.cast::<CommHandle>().as_ref() };
        handle.map(|h| h.0.clone()).ok_or_else(|| err!(RS_ERR_INVALID, "comm is NULL"))
    }

    /// Ends the handle; NULL is nothing.
    ///
    /// # Safety
    /// `ptr` is NULL or came from [`CommHandle::create`], once, and nobody uses it any more.
    pub unsafe fn destroy(ptr: *mut rs_comm_t) -> Result<()> {
        if !ptr.is_null() {
            // SAFETY: this function's promise: it is the Box of `create`.
            drop(unsafe { Box::from_raw(ptr.cast::<CommHandle>()) });
        }
        Ok(())
    }
}
