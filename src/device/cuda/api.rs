//! The CUDA driver's functions, found in libcuda.so.1 when somebody first asks for a GPU.
//!
//! The types are cudarc's. The library and its functions are looked up here, for three reasons: cudarc panics where a symbol is missing;
//! gives results as an enum, which a newer driver's numbers would not fit; and asks for libcuda.so first, which may be the toolkit's
//! stub, rather than for the driver that the process has loaded.
//!
//! Knows names and signatures. Must not know what they are called for.

use crate::abi::{RS_ERR_DEVICE, RS_ERR_MEMORY, RS_ERR_UNSUPPORTED};
use crate::error::{Result, bail, err};
use cudarc::driver::sys::{
    self, CUcontext, CUdevice, CUdeviceptr, CUevent, CUfunction, CUipcMemHandle, CUmemAccessDesc, CUmemGenericAllocationHandle,
    CUmemPoolProps, CUmemoryPool, CUmodule, CUstream, CUuuid,
};
use once_cell::sync::OnceCell;
use std::ffi::{CStr, c_char, c_int, c_uint, c_ulonglong, c_void};

/// CUDA_SUCCESS.
const SUCCESS: c_int = 0;
const NO_DEVICE: c_int = sys::CUresult::CUDA_ERROR_NO_DEVICE as c_int;
const NOT_INITIALIZED: c_int = sys::CUresult::CUDA_ERROR_NOT_INITIALIZED as c_int;
const OUT_OF_MEMORY: c_int = sys::CUresult::CUDA_ERROR_OUT_OF_MEMORY as c_int;
/// CUDA_ERROR_NOT_READY: an answer, no failure.
pub const NOT_READY: c_int = sys::CUresult::CUDA_ERROR_NOT_READY as c_int;
/// CUDA_ERROR_STREAM_CAPTURE_IMPLICIT.
pub const CAPTURE_IMPLICIT: c_int = sys::CUresult::CUDA_ERROR_STREAM_CAPTURE_IMPLICIT as c_int;
/// CUDA_ERROR_PEER_ACCESS_ALREADY_ENABLED: as good as success.
pub const PEER_ACCESS_ALREADY_ENABLED: c_int = sys::CUresult::CUDA_ERROR_PEER_ACCESS_ALREADY_ENABLED as c_int;

/// Declares [`Api`]: functions that every driver of CUDA 12 has, those that may be missing, and those that are of use together only.
macro_rules! functions {
    (
        required { $($name:ident($($arg:ty),*);)* }
        optional { $($maybe:ident($($other:ty),*);)* }
        $($(#[$doc:meta])* together $group:ident $Group:ident { $($part:ident $args:tt;)* })*
    ) => {
        $(
            $(#[$doc])*
            #[allow(non_snake_case)]
            pub struct $Group {
                $(pub $part: functions!(@pointer $args),)*
            }

            impl $Group {
                /// # Safety
                /// `library` is the driver's.
                unsafe fn load(library: *mut c_void) -> Option<$Group> {
                    // SAFETY: as in `Api::load`.
                    unsafe { Some($Group { $($part: symbol(library, concat!(stringify!($part), "\0"))?,)* }) }
                }
            }
        )*

        /// The functions, under their exported names.
        #[allow(non_snake_case)]
        pub struct Api {
            $(pub $name: unsafe extern "C" fn($($arg),*) -> c_int,)*
            $(pub $maybe: Option<unsafe extern "C" fn($($other),*) -> c_int>,)*
            $(pub $group: Option<$Group>,)*
        }

        impl Api {
            /// # Safety
            /// `library` is the driver's.
            unsafe fn load(library: *mut c_void) -> Result<Api> {
                // SAFETY: the signatures are those of cuda.h 12.8, which keeps them for these names.
                unsafe {
                    Ok(Api {
                        $($name: match symbol(library, concat!(stringify!($name), "\0")) {
                            Some(function) => function,
                            None => bail!(RS_ERR_UNSUPPORTED, "the CUDA driver has no {}: its release is too old", stringify!($name)),
                        },)*
                        $($maybe: symbol(library, concat!(stringify!($maybe), "\0")),)*
                        $($group: $Group::load(library),)*
                    })
                }
            }
        }
    };
    (@pointer ($($arg:ty),*)) => { unsafe extern "C" fn($($arg),*) -> c_int };
}

functions! {
    required {
        cuInit(c_uint);
        cuGetErrorName(c_int, *mut *const c_char);
        cuDeviceGetCount(*mut c_int);
        cuDeviceGet(*mut CUdevice, c_int);
        cuDeviceGetAttribute(*mut c_int, c_int, CUdevice);
        cuDeviceGetUuid_v2(*mut CUuuid, CUdevice);
        cuDeviceCanAccessPeer(*mut c_int, CUdevice, CUdevice);
        cuDevicePrimaryCtxRetain(*mut CUcontext, CUdevice);
        cuDevicePrimaryCtxRelease_v2(CUdevice);
        cuCtxPushCurrent_v2(CUcontext);
        cuCtxPopCurrent_v2(*mut CUcontext);
        cuCtxGetDevice(*mut CUdevice);
        cuThreadExchangeStreamCaptureMode(*mut c_int);
        cuCtxEnablePeerAccess(CUcontext, c_uint);
        cuPointerGetAttributes(c_uint, *mut c_int, *mut *mut c_void, CUdeviceptr);
        cuMemGetAddressRange_v2(*mut CUdeviceptr, *mut usize, CUdeviceptr);
        cuIpcGetMemHandle(*mut CUipcMemHandle, CUdeviceptr);
        cuIpcOpenMemHandle_v2(*mut CUdeviceptr, CUipcMemHandle, c_uint);
        cuIpcCloseMemHandle(CUdeviceptr);
        cuMemAlloc_v2(*mut CUdeviceptr, usize);
        cuMemFree_v2(CUdeviceptr);
        cuMemHostAlloc(*mut *mut c_void, usize, c_uint);
        cuMemFreeHost(*mut c_void);
        cuMemHostRegister_v2(*mut c_void, usize, c_uint);
        cuMemHostUnregister(*mut c_void);
        cuMemcpyAsync(CUdeviceptr, CUdeviceptr, usize, CUstream);
        cuMemcpyHtoDAsync_v2(CUdeviceptr, *const c_void, usize, CUstream);
        cuMemcpyDtoHAsync_v2(*mut c_void, CUdeviceptr, usize, CUstream);
        cuStreamCreate(*mut CUstream, c_uint);
        cuStreamDestroy_v2(CUstream);
        cuStreamSynchronize(CUstream);
        cuStreamGetCtx(CUstream, *mut CUcontext);
        cuStreamIsCapturing(CUstream, *mut c_int);
        cuStreamWaitEvent(CUstream, CUevent, c_uint);
        cuEventCreate(*mut CUevent, c_uint);
        cuEventRecord(CUevent, CUstream);
        cuEventQuery(CUevent);
        cuEventDestroy_v2(CUevent);
        cuModuleLoadData(*mut CUmodule, *const c_void);
        cuModuleGetFunction(*mut CUfunction, CUmodule, *const c_char);
        cuModuleUnload(CUmodule);
        cuLaunchKernel(
            CUfunction, c_uint, c_uint, c_uint, c_uint, c_uint, c_uint, c_uint, CUstream, *mut *mut c_void, *mut *mut c_void
        );
    }
    optional {
        cuStreamWriteValue64_v2(CUstream, CUdeviceptr, u64, c_uint);
        cuStreamWaitValue64_v2(CUstream, CUdeviceptr, u64, c_uint);
    }
    /// Of stream-ordered memory.
    together pools Pools {
        cuMemPoolCreate(*mut CUmemoryPool, *const CUmemPoolProps);
        cuMemPoolDestroy(CUmemoryPool);
        cuMemPoolSetAccess(CUmemoryPool, *const CUmemAccessDesc, usize);
        cuMemAllocFromPoolAsync(*mut CUdeviceptr, usize, CUmemoryPool, CUstream);
        cuMemFreeAsync(CUdeviceptr, CUstream);
    }
    /// Of the virtual memory interface.
    together mappings Mappings {
        cuMemRetainAllocationHandle(*mut CUmemGenericAllocationHandle, *mut c_void);
        cuMemExportToShareableHandle(*mut c_void, CUmemGenericAllocationHandle, c_uint, c_ulonglong);
        cuMemImportFromShareableHandle(*mut CUmemGenericAllocationHandle, *mut c_void, c_uint);
        cuMemRelease(CUmemGenericAllocationHandle);
        cuMemAddressReserve(*mut CUdeviceptr, usize, usize, CUdeviceptr, c_ulonglong);
        cuMemAddressFree(CUdeviceptr, usize);
        cuMemMap(CUdeviceptr, usize, usize, CUmemGenericAllocationHandle, c_ulonglong);
        cuMemUnmap(CUdeviceptr, usize);
        cuMemSetAccess(CUdeviceptr, usize, *const CUmemAccessDesc, usize);
    }
}

/// A library as the process has it loaded; where it has not, it is loaded if `load` says so. It stays loaded. NULL: there is none.
///
/// # Safety
/// Its initialisers may run.
pub(crate) unsafe fn open(name: &CStr, load: bool) -> *mut c_void {
    // SAFETY: a text that ends with a NUL; the rest is this function's promise.
    unsafe {
        let loaded = libc::dlopen(name.as_ptr(), libc::RTLD_LAZY | libc::RTLD_NOLOAD);
        if loaded.is_null() && load { libc::dlopen(name.as_ptr(), libc::RTLD_LAZY) } else { loaded }
    }
}

/// A function of a library, by its name and a NUL; `None`: it has none of that name.
///
/// # Safety
/// `library` is a library's handle, and `F` is the type of that function pointer.
pub(crate) unsafe fn symbol<F: Copy>(library: *mut c_void, name: &'static str) -> Option<F> {
    assert!(size_of::<F>() == size_of::<*mut c_void>() && name.ends_with('\0'));
    // SAFETY: this function's promise; the text ends with a NUL.
    unsafe {
        let found = libc::dlsym(library, name.as_ptr().cast());
        (!found.is_null()).then(|| std::mem::transmute_copy(&found))
    }
}

/// The driver, initialised. One that is not there is not looked for again.
pub fn api() -> Result<&'static Api> {
    static API: OnceCell<Result<Api>> = OnceCell::new();
    let api = API.get_or_init(load).as_ref().map_err(Clone::clone)?;
    // SAFETY: no argument but a number that must be 0; does nothing where it was called before.
    match unsafe { (api.cuInit)(0) } {
        NO_DEVICE => bail!(RS_ERR_UNSUPPORTED, "the CUDA driver sees no GPU (CUDA_VISIBLE_DEVICES chooses which a process sees)"),
        NOT_INITIALIZED => bail!(RS_ERR_UNSUPPORTED, "the CUDA driver does not work in a process forked from one that used it"),
        answer => api.done("cuInit", answer).map(|()| api),
    }
}

fn load() -> Result<Api> {
    const LIBRARY: &CStr = c"libcuda.so.1";
    // SAFETY: loading the driver runs its initialisers, as it does in every CUDA program. It stays loaded.
    unsafe {
        let library = open(LIBRARY, true);
        if library.is_null() {
            bail!(
                RS_ERR_UNSUPPORTED,
                "no CUDA driver: libcuda.so.1 is not found by the dynamic loader; it comes with NVIDIA's driver, and containers get it \
                 from the NVIDIA container toolkit"
            );
        }
        Api::load(library).inspect(|api| {
            if api.mappings.is_none() {
                log::info!("the CUDA driver does not share memory that is mapped piece by piece: its release is too old");
            }
        })
    }
}

impl Api {
    /// What a call answered, as an error that bears CUDA's name for it.
    pub fn done(&self, call: &str, answer: c_int) -> Result<()> {
        if answer == SUCCESS {
            return Ok(());
        }
        let mut name = std::ptr::null();
        // SAFETY: the driver writes a pointer to a text of its own, or nothing.
        unsafe { (self.cuGetErrorName)(answer, &mut name) };
        let name = if name.is_null() {
            "an error that it has no name for".into()
        } else {
            // SAFETY: a text of the driver's, which stays.
            unsafe { CStr::from_ptr(name) }.to_string_lossy()
        };
        let status = if answer == OUT_OF_MEMORY { RS_ERR_MEMORY } else { RS_ERR_DEVICE };
        Err(err!(status, "{call} answered {name} ({answer})"))
    }
}
