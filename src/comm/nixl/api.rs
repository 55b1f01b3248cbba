//! NIXL's C interface, from the library that the process has loaded or that the caller names.
//!
//! The functions are those of nixl_capi.h, NIXL 1.5, under its names; each answers 0, 1 (in progress) or a negative number, and says
//! no more. Knows names and signatures. Must not know what they are called for.

use crate::abi::{RS_ERR_COMM, RS_ERR_INVALID, RS_ERR_UNSUPPORTED};
use crate::device::cuda::{open, symbol};
use crate::error::{Result, bail};
use std::ffi::{CString, c_char, c_int, c_uint, c_void};
use std::sync::Mutex;

/// NIXL_CAPI_IN_PROG.
pub const IN_PROGRESS: c_int = 1;
/// NIXL_CAPI_MEM_DRAM: the host's.
pub const DRAM: c_int = 0;
/// NIXL_CAPI_MEM_VRAM: a GPU's.
pub const VRAM: c_int = 1;
/// NIXL_CAPI_XFER_OP_READ.
pub const READ: c_int = 0;

/// What the dynamic loader looks for.
const LIBRARY: &str = "libnixl_capi.so";

/// Any of its handles.
pub type Handle = *mut c_void;

/// nixl_capi_agent_config_t.
#[repr(C)]
pub struct AgentConfig {
    /// Whether a thread of NIXL's moves its connections on.
    pub enable_prog_thread: bool,
    /// Whether another one serves NIXL's own exchange of metadata, on this port.
    pub enable_listen_thread: bool,
    /// See above.
    pub listen_port: u16,
    /// NIXL_CAPI_THREAD_SYNC_NONE: 0.
    pub thread_sync: c_int,
    /// UCX workers of a backend.
    pub num_workers: c_uint,
    /// How long the first thread sleeps when nothing comes, in microseconds. With 0 it does not sleep.
    pub pthr_delay_us: u64,
    /// The same of the second.
    pub lthr_delay_us: u64,
    /// Whether NIXL counts what it does.
    pub capture_telemetry: bool,
}

macro_rules! functions {
    ($($name:ident($($arg:ty),*);)*) => {
        /// The functions, named without `nixl_capi_`.
        pub struct Nixl {
            $(pub $name: unsafe extern "C" fn($($arg),*) -> c_int,)*
            /// Frees what it gives; releases that lack it give what free() takes.
            mem_free: Option<unsafe extern "C" fn(*mut c_void)>,
        }

        impl Nixl {
            /// # Safety
            /// `library` is a handle of NIXL's.
            unsafe fn of(library: *mut c_void) -> Result<Nixl> {
                // SAFETY: the signatures are those of nixl_capi.h.
                unsafe {
                    Ok(Nixl {
                        $($name: match symbol(library, concat!("nixl_capi_", stringify!($name), "\0")) {
                            Some(function) => function,
                            None => bail!(RS_ERR_UNSUPPORTED, "{LIBRARY} has no nixl_capi_{}: use NIXL 1.5", stringify!($name)),
                        },)*
                        mem_free: symbol(library, "nixl_capi_mem_free\0"),
                    })
                }
            }
        }
    };
}

functions! {
    create_configured_agent(*const c_char, *const AgentConfig, *mut Handle);
    destroy_agent(Handle);
    get_plugin_params(Handle, *const c_char, *mut Handle, *mut Handle);
    params_add(Handle, *const c_char, *const c_char);
    destroy_mem_list(Handle);
    destroy_params(Handle);
    create_backend(Handle, *const c_char, Handle, *mut Handle);
    destroy_backend(Handle);
    create_opt_args(*mut Handle);
    destroy_opt_args(Handle);
    opt_args_add_backend(Handle, Handle);
    opt_args_set_notif_msg(Handle, *const c_void, usize);
    opt_args_set_has_notif(Handle, bool);
    get_local_md(Handle, *mut *mut c_void, *mut usize);
    load_remote_md(Handle, *const c_void, usize, *mut *mut c_char);
    create_reg_dlist(c_int, *mut Handle);
    destroy_reg_dlist(Handle);
    reg_dlist_add_desc(Handle, usize, usize, u64, *const c_void, usize);
    register_mem(Handle, Handle, Handle);
    deregister_mem(Handle, Handle, Handle);
    create_xfer_dlist(c_int, *mut Handle);
    destroy_xfer_dlist(Handle);
    xfer_dlist_add_desc(Handle, usize, usize, u64);
    create_xfer_req(Handle, c_int, Handle, Handle, *const c_char, *mut Handle, Handle);
    post_xfer_req(Handle, Handle, Handle);
    get_xfer_status(Handle, Handle);
    release_xfer_req(Handle, Handle);
    destroy_xfer_req(Handle);
    gen_notif(Handle, *const c_char, *const c_void, usize, Handle);
    create_notif_map(*mut Handle);
    destroy_notif_map(Handle);
    get_notifs(Handle, Handle, Handle);
    notif_map_size(Handle, *mut usize);
    notif_map_get_agent_at(Handle, usize, *mut *const c_char);
    notif_map_get_notifs_size(Handle, *const c_char, *mut usize);
    notif_map_get_notif(Handle, *const c_char, usize, *mut *const c_void, *mut usize);
}

/// NIXL, as it is loaded, else loaded from `path`, or from where the dynamic loader finds it. It stays loaded.
pub fn nixl(path: Option<&str>) -> Result<&'static Nixl> {
    static FOUND: Mutex<Option<&'static Nixl>> = Mutex::new(None);
    let mut found = FOUND.lock().unwrap_or_else(|p| p.into_inner());
    if let Some(nixl) = *found {
        return Ok(nixl);
    }
    let Ok(name) = CString::new(path.unwrap_or(LIBRARY)) else {
        bail!(RS_ERR_INVALID, "config_json: `library` has a zero byte in it")
    };
    // SAFETY: loading NIXL runs its initialisers, as it does in every program that uses it.
    let library = unsafe { open(&name, true) };
    if library.is_null() {
        bail!(
            RS_ERR_UNSUPPORTED,
            "no NIXL: the dynamic loader cannot load {name:?}. The Python package nixl-cu12 (or nixl-cu13) has {LIBRARY}, in a folder \
             .nixl_cu12.mesonpy.libs beside its module: give the file's path as `library` in config_json, or its folder in LD_LIBRARY_PATH"
        );
    }
    // SAFETY: a handle of NIXL's; only whether the function is there is asked.
    if unsafe { symbol::<*mut c_void>(library, "nixl_capi_xfer_dlist_is_sorted\0") }.is_some() {
        bail!(RS_ERR_UNSUPPORTED, "{name:?} is a release of NIXL whose functions take other arguments: use NIXL 1.5");
    }
    // SAFETY: the handle is NIXL's.
    let nixl = unsafe { Nixl::of(library)? };
    Ok(*found.insert(Box::leak(Box::new(nixl))))
}

impl Nixl {
    /// What a call answered, as an error.
    pub fn done(&self, call: &str, answer: c_int) -> Result<()> {
        let why = match answer {
            0 => return Ok(()),
            -1 => "invalid parameter",
            -2 => "the backend failed",
            -3 => "invalid state",
            -4 => "an exception inside NIXL",
            _ => "unknown",
        };
        bail!(RS_ERR_COMM, "nixl_capi_{call}() answered {answer} ({why}); NIXL_LOG_LEVEL=INFO makes it say more")
    }

    /// Frees what NIXL has given to be freed.
    ///
    /// # Safety
    /// `given` came from a function that gives memory away, or is NULL, and nobody uses it any more.
    pub unsafe fn free(&self, given: *mut c_void) {
        // SAFETY: this function's promise; NULL is nothing to free().
        unsafe {
            match self.mem_free {
                Some(free) if !given.is_null() => free(given),
                Some(_) => {}
                None => libc::free(given),
            }
        }
    }
}
