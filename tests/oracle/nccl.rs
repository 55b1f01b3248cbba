//! NCCL as an engine uses it: unique ids, and communicators of the test's own that the library borrows.

use super::gpu;
use cudarc::nccl::sys::{ncclComm_t, ncclUniqueId};
use std::ffi::{CStr, c_int, c_void};
use std::ptr::null_mut;
use std::sync::OnceLock;
use std::time::Duration;

pub type Id = ncclUniqueId;

/// How a communicator is made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Maker {
    /// By the library, of a unique id.
    Library,
    /// By the test, which lends it; whether its calls block.
    Test { blocks: bool },
}

const IN_PROGRESS: c_int = 7;

/// A function of NCCL's, or one that the stand-in has beside them.
pub fn function<F: Copy>(name: &CStr) -> Option<F> {
    assert_eq!(size_of::<F>(), size_of::<usize>());
    static LIBRARY: OnceLock<usize> = OnceLock::new();
    // SAFETY: a text that ends with a NUL.
    let library = *LIBRARY.get_or_init(|| unsafe { libc::dlopen(c"libnccl.so.2".as_ptr(), libc::RTLD_LAZY) } as usize);
    if library == 0 {
        return None;
    }
    // SAFETY: a library's handle; the caller gives the function's type.
    unsafe {
        let found = libc::dlsym(library as *mut c_void, name.as_ptr());
        (!found.is_null()).then(|| std::mem::transmute_copy(&found))
    }
}

/// Whether any number of ranks can have a communicator: with the stand-in. The real one wants a GPU for each.
pub fn usable() -> bool {
    static USABLE: OnceLock<bool> = OnceLock::new();
    *USABLE.get_or_init(|| {
        let share = if gpu::wanted() { function::<extern "C" fn()>(c"standin_nccl_share_gpus") } else { None };
        share.inspect(|share| share()).is_some()
    })
}

fn check(what: &str, answer: c_int) {
    assert_eq!(answer, 0, "{what}");
}

pub fn id() -> Id {
    let get: unsafe extern "C" fn(*mut Id) -> c_int = function(c"ncclGetUniqueId").expect("NCCL");
    let mut id = Id { internal: [0; 128] };
    // SAFETY: writes its one result.
    check("ncclGetUniqueId", unsafe { get(&mut id) });
    id
}

/// The bytes of an id as one rank sends them to the others.
pub fn bytes(id: &Id) -> [u8; 128] {
    id.internal.map(|c| c as u8)
}

/// ncclConfig_t of release 2.18 on.
#[repr(C)]
struct Config {
    size: usize,
    magic: u32,
    version: u32,
    blocking: c_int,
    undefined: [c_int; 3],
    net_name: *const c_void,
    split_share: c_int,
}

/// A communicator of the test's own for the GPU that is current; destroyed when dropped, unless it was aborted.
pub struct Lent(ncclComm_t);

// SAFETY: NCCL lets any thread use a communicator, one at a time.
unsafe impl Send for Lent {}
// SAFETY: as above; shared, it is only handed on.
unsafe impl Sync for Lent {}

impl Lent {
    pub fn new(id: Id, rank: usize, world: usize, blocks: bool) -> Lent {
        type Init = unsafe extern "C" fn(*mut ncclComm_t, c_int, Id, c_int, *mut Config) -> c_int;
        let init: Init = function(c"ncclCommInitRankConfig").expect("NCCL");
        let mut config = Config {
            size: size_of::<Config>(),
            magic: 0xcafe_beef,
            version: 21800,
            blocking: blocks.into(),
            undefined: [c_int::MIN; 3],
            net_name: std::ptr::null(),
            split_share: c_int::MIN,
        };
        let mut comm = null_mut();
        // SAFETY: whole structs; the communicator is written to `comm`.
        let mut answer = unsafe { init(&mut comm, world as c_int, id, rank as c_int, &mut config) };
        let lent = Lent(comm);
        while answer == IN_PROGRESS {
            std::thread::sleep(Duration::from_micros(100));
            answer = lent.async_error();
        }
        check("ncclCommInitRankConfig", answer);
        lent
    }

    pub fn raw(&self) -> *mut c_void {
        self.0.cast()
    }

    pub fn async_error(&self) -> c_int {
        let ask: unsafe extern "C" fn(ncclComm_t, *mut c_int) -> c_int = function(c"ncclCommGetAsyncError").expect("NCCL");
        let mut error = 0;
        // SAFETY: a live communicator; writes its one result.
        check("ncclCommGetAsyncError", unsafe { ask(self.0, &mut error) });
        error
    }

    /// After a call that used it failed.
    pub fn abort(&mut self) {
        self.end(c"ncclCommAbort");
    }

    fn end(&mut self, how: &CStr) {
        let end: unsafe extern "C" fn(ncclComm_t) -> c_int = function(how).expect("NCCL");
        // SAFETY: a live communicator that nobody uses any more.
        check("the end of a communicator", unsafe { end(std::mem::replace(&mut self.0, null_mut())) });
    }
}

impl Drop for Lent {
    fn drop(&mut self) {
        if !self.0.is_null() {
            self.end(c"ncclCommDestroy");
        }
    }
}
