//! NCCL's functions, from the copy of the library that the process has loaded.
//!
//! A communicator belongs to the copy of NCCL that made it, and another copy would corrupt it. So the name that NVIDIA's and PyTorch's
//! packages give the library, libnccl.so.2, is looked for among those that are loaded before one is loaded anew.
//!
//! Knows names and signatures. Must not know what they are called for.

use crate::abi::{RS_ERR_COMM, RS_ERR_UNSUPPORTED};
use crate::device::cuda::{open, symbol};
use crate::error::{Result, bail, err};
use cudarc::driver::sys::CUstream;
use cudarc::nccl::sys::{self, ncclComm_t, ncclUniqueId};
use std::ffi::{CStr, c_char, c_int, c_uint, c_void};
use std::sync::Mutex;
use std::time::Duration;

/// ncclSuccess.
pub const SUCCESS: c_int = 0;
/// ncclInProgress: of a communicator that does not block.
pub const IN_PROGRESS: c_int = sys::ncclResult_t::ncclInProgress as c_int;
/// ncclInt8: bytes.
pub const BYTES: c_int = sys::ncclDataType_t::ncclInt8 as c_int;

/// The oldest release whose communicators can be made without blocking and be aborted at any time: 2.18.
pub const OLDEST: c_int = 21800;

/// ncclConfig_t as release 2.18 has it; later ones go by its size and version.
#[repr(C)]
pub struct Config {
    pub size: usize,
    pub magic: c_uint,
    pub version: c_int,
    pub blocking: c_int,
    /// cgaClusterSize, minCTAs, maxCTAs.
    pub undefined: [c_int; 3],
    pub net_name: *const c_char,
    pub split_share: c_int,
}

impl Config {
    /// For a communicator that does not block, all else as NCCL likes.
    pub fn not_blocking() -> Config {
        const UNDEFINED: c_int = c_int::MIN;
        Config {
            size: size_of::<Config>(),
            magic: 0xcafe_beef,
            version: OLDEST,
            blocking: 0,
            undefined: [UNDEFINED; 3],
            net_name: std::ptr::null(),
            split_share: UNDEFINED,
        }
    }
}

const LIBRARY: &CStr = c"libnccl.so.2";

macro_rules! functions {
    ($($name:ident($($arg:ty),*) -> $out:ty;)*) => {
        /// The functions, under their exported names.
        #[allow(non_snake_case)]
        pub struct Nccl {
            $(pub $name: unsafe extern "C" fn($($arg),*) -> $out,)*
        }

        impl Nccl {
            /// # Safety
            /// `library` is a handle of NCCL's.
            unsafe fn of(library: *mut c_void) -> Result<Nccl> {
                Ok(Nccl {
                    // SAFETY: the signatures are those of nccl.h 2.18, which later releases keep.
                    $($name: match unsafe { symbol(library, concat!(stringify!($name), "\0")) } {
                        Some(function) => function,
                        None => bail!(RS_ERR_UNSUPPORTED, "{LIBRARY:?} has no {}: its release is too old", stringify!($name)),
                    },)*
                })
            }
        }
    };
}

functions! {
    ncclGetVersion(*mut c_int) -> c_int;
    ncclGetErrorString(c_int) -> *const c_char;
    ncclGetLastError(ncclComm_t) -> *const c_char;
    ncclCommInitRankConfig(*mut ncclComm_t, c_int, ncclUniqueId, c_int, *mut Config) -> c_int;
    ncclCommCount(ncclComm_t, *mut c_int) -> c_int;
    ncclCommUserRank(ncclComm_t, *mut c_int) -> c_int;
    ncclCommCuDevice(ncclComm_t, *mut c_int) -> c_int;
    ncclCommGetAsyncError(ncclComm_t, *mut c_int) -> c_int;
    ncclCommAbort(ncclComm_t) -> c_int;
    ncclCommDestroy(ncclComm_t) -> c_int;
    ncclGroupStart() -> c_int;
    ncclGroupEnd() -> c_int;
    ncclSend(*const c_void, usize, c_int, c_int, ncclComm_t, CUstream) -> c_int;
    ncclRecv(*mut c_void, usize, c_int, c_int, ncclComm_t, CUstream) -> c_int;
    ncclAllGather(*const c_void, *mut c_void, usize, c_int, ncclComm_t, CUstream) -> c_int;
}

/// NCCL, as it is loaded; where it is not, it is loaded if `load` says so. It stays loaded.
pub fn nccl(load: bool) -> Result<&'static Nccl> {
    static FOUND: Mutex<Option<&'static Nccl>> = Mutex::new(None);
    let mut found = FOUND.lock().unwrap_or_else(|p| p.into_inner());
    if let Some(nccl) = *found {
        return Ok(nccl);
    }
    // SAFETY: loading NCCL runs its initialisers, as it does in every program that uses it.
    let library = unsafe { open(LIBRARY, load) };
    if library.is_null() {
        if load {
            bail!(
                RS_ERR_UNSUPPORTED,
                "no NCCL: libnccl.so.2 is neither loaded nor found by the dynamic loader; the package nvidia-nccl has it, and its folder \
                 goes into LD_LIBRARY_PATH"
            );
        }
        bail!(
            RS_ERR_UNSUPPORTED,
            "libnccl.so.2 is not loaded in this process, so the communicator belongs to a copy of NCCL that is linked statically, whose \
             functions cannot be found: give rs_comm_nccl_init() a unique id instead"
        );
    }
    // SAFETY: the handle is NCCL's.
    let nccl = unsafe { Nccl::of(library)? };
    let mut version = 0;
    // SAFETY: writes its one result.
    nccl.done("ncclGetVersion", unsafe { (nccl.ncclGetVersion)(&mut version) })?;
    if version < OLDEST {
        bail!(RS_ERR_UNSUPPORTED, "NCCL's version is {version}; at least {OLDEST} (2.18) is needed");
    }
    Ok(*found.insert(Box::leak(Box::new(nccl))))
}

impl Nccl {
    /// What a call answered, as an error that bears NCCL's text for it.
    pub fn done(&self, call: &str, answer: c_int) -> Result<()> {
        if answer == SUCCESS {
            return Ok(());
        }
        // SAFETY: the texts are NCCL's and stay; without a communicator the last one is of the whole library.
        let (name, last) = unsafe {
            let text = |at: *const c_char| if at.is_null() { "".into() } else { CStr::from_ptr(at).to_string_lossy() };
            (text((self.ncclGetErrorString)(answer)), text((self.ncclGetLastError)(std::ptr::null_mut())))
        };
        let more = if last.is_empty() { String::new() } else { format!(": {}", last.trim_end()) };
        Err(err!(RS_ERR_COMM, "{call} answered '{name}' ({answer}){more}"))
    }

    /// Waits until a communicator that does not block is made.
    pub fn ready(&self, comm: ncclComm_t, wait_on: impl Fn() -> Result<()>) -> Result<()> {
        loop {
            let mut answer = 0;
            // SAFETY: a communicator that its maker has; writes its one result.
            self.done("ncclCommGetAsyncError", unsafe { (self.ncclCommGetAsyncError)(comm, &mut answer) })?;
            match answer {
                IN_PROGRESS => wait_on()?,
                answer => return self.done("ncclCommInitRankConfig", answer),
            }
            std::thread::sleep(Duration::from_millis(1));
        }
    }
}
