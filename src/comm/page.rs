//! 64-bit words in memory that ranks of one host share, and that their devices' streams write and wait for.
//!
//! Knows words and who may use them. Must not know what they count.

use super::local::sys::{self, Mapping};
use crate::device::{Device, Mem, Registered};
use crate::error::{Result, err};
use std::os::fd::{AsFd, OwnedFd};
use std::sync::atomic::AtomicU64;
use std::sync::{Mutex, PoisonError};

/// Words of one rank, as one process maps them.
pub struct Page {
    /// What lets streams use it: goes before the memory does.
    registered: Mutex<Option<Registered>>,
    memory: Mapping,
}

impl Page {
    /// So many words, all 0, and what another process maps them by.
    pub fn new(words: usize) -> Result<(Page, OwnedFd)> {
        let none = |e: std::io::Error| err!(crate::abi::RS_ERR_MEMORY, "cannot make {words} words of shared memory: {e}");
        let file = sys::shared(c"libreshard words", (8 * words).next_multiple_of(sys::page())).map_err(none)?;
        Ok((Page::of(Mapping::new(file.as_fd(), true).map_err(none)?), file))
    }

    /// Of memory that another process made, mapped to be written.
    pub(super) fn of(memory: Mapping) -> Page {
        Page { registered: Mutex::default(), memory }
    }

    /// Number of words.
    pub fn words(&self) -> usize {
        self.memory.len() / 8
    }

    /// One word, for the host.
    pub fn word(&self, at: usize) -> &AtomicU64 {
        self.memory.word(8 * at)
    }

    /// One word, for streams, once they may use the page.
    pub fn mem(&self, at: usize) -> Mem {
        // SAFETY: an aligned word of our mapping, checked by `word`; who puts it on a stream keeps the page until that is done.
        unsafe { Mem::new(self.word(at).as_ptr().cast(), 8) }
    }

    /// Lets the streams of all devices of this process use it, as long as it is there. Once is enough, whoever asks.
    pub fn register(&self, device: &dyn Device) -> Result<()> {
        let mut registered = self.registered.lock().unwrap_or_else(PoisonError::into_inner);
        if registered.is_none() {
            // SAFETY: our mapping, which outlives what is registered here.
            let all = unsafe { Mem::new(self.memory.addr() as *mut u8, self.memory.len()) };
            *registered = Some(device.register(all)?);
        }
        Ok(())
    }
}
