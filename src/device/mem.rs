//! Memory that somebody promised: an address and a length that safe code can cut but not forge.

use crate::abi::RS_DEVICE_CPU;

/// A block of memory, addressable by the [`super::Device`] that will copy it. A plain value: copying it copies the promise,
/// not the bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Mem {
    addr: usize,
    len: usize,
    kind: (i32, i32),
}

impl Mem {
    /// Takes the promise that all later copies rely on, for host memory.
    ///
    /// # Safety
    /// As [`Mem::of`].
    pub unsafe fn new(addr: *mut u8, len: usize) -> Mem {
        // SAFETY: this function's promise.
        unsafe { Mem::of((RS_DEVICE_CPU, 0), addr, len) }
    }

    /// Takes the promise that all later copies rely on. `kind` is DLPack's `(device_type, device_id)`.
    ///
    /// # Safety
    /// - It is memory of that kind.
    /// - `[addr, addr + len)` is one allocation, mapped and accessible to the device that copies it, for as long as the value
    ///   or one cut from it is used.
    /// - It may be read, and written where the value is used as a target, without a Rust reference to it existing meanwhile.
    /// - Nobody writes a part of it while it is being read, or touches it while it is being written, except as the
    ///   communicator's protocol orders.
    pub unsafe fn of(kind: (i32, i32), addr: *mut u8, len: usize) -> Mem {
        Mem { addr: addr as usize, len, kind }
    }

    /// DLPack's `(device_type, device_id)`.
    pub fn kind(self) -> (i32, i32) {
        self.kind
    }

    /// Its first byte.
    pub fn addr(self) -> usize {
        self.addr
    }

    /// Its length in bytes.
    pub fn len(self) -> usize {
        self.len
    }

    /// Whether it holds no byte.
    pub fn is_empty(self) -> bool {
        self.len == 0
    }

    /// `len` bytes from `offset`; `None` if they do not lie inside.
    pub fn cut(self, offset: usize, len: usize) -> Option<Mem> {
        let end = offset.checked_add(len)?;
        (end <= self.len).then(|| Mem { addr: self.addr + offset, len, kind: self.kind })
    }
}
