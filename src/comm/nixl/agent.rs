//! One agent of NIXL's: memory registered, reads posted, notes sent and taken. No call waits.
//!
//! Knows agents' names, memory and NIXL. Must not know ranks, plans or deadlines.

use super::api::{AgentConfig, Handle, IN_PROGRESS, Nixl, READ};
use super::blocks::{Block, Part};
use crate::abi::*;
use crate::error::{Result, bail, err};
use std::collections::BTreeMap;
use std::ffi::{CStr, CString, c_int, c_void};
use std::ptr::{null, null_mut};

/// A read that was posted. Given back to its agent, or gone with it.
#[derive(Debug)]
pub struct Request(Handle);

/// One agent and its backend.
pub struct Agent {
    nixl: &'static Nixl,
    agent: Handle,
    backend: Handle,
    /// Options that name the backend.
    options: Handle,
    /// What is registered, how often, and NIXL's list of it.
    registered: BTreeMap<Block, (usize, Handle)>,
}

// SAFETY: a handle that any thread may use, one at a time, together with its agent.
unsafe impl Send for Request {}
// SAFETY: NIXL's handles may be used by any thread, one at a time, which `&mut` and the mutex around an agent see to.
unsafe impl Send for Agent {}

/// A handle that is destroyed when it goes.
struct Held {
    handle: Handle,
    destroy: unsafe extern "C" fn(Handle) -> c_int,
}

impl Held {
    fn new(
        call: &str,
        nixl: &Nixl,
        destroy: unsafe extern "C" fn(Handle) -> c_int,
        make: impl FnOnce(*mut Handle) -> c_int,
    ) -> Result<Held> {
        let mut handle = null_mut();
        nixl.done(call, make(&mut handle))?;
        Ok(Held { handle, destroy })
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        // SAFETY: made by NIXL, destroyed once.
        unsafe { (self.destroy)(self.handle) };
    }
}

fn c_string(text: &str, what: &str) -> Result<CString> {
    CString::new(text).map_err(|_| err!(RS_ERR_INVALID, "{what} has a zero byte in it"))
}

impl Agent {
    /// An agent with a backend and parameters of that backend.
    pub fn new(nixl: &'static Nixl, name: &str, backend: &str, params: &BTreeMap<String, String>) -> Result<Agent> {
        let name = c_string(name, "an agent's name")?;
        let plugin = c_string(backend, "`backend`")?;
        let mut made = null_mut();
        let config = AgentConfig {
            enable_prog_thread: true,
            enable_listen_thread: false,
            listen_port: 0,
            thread_sync: 0,
            num_workers: 1,
            // It sleeps until something comes; this is for what it may not be woken for. NIXL's default, 0, keeps a core busy for ever.
            pthr_delay_us: 10_000,
            lthr_delay_us: 100_000,
            capture_telemetry: false,
        };
        // SAFETY: texts that end with a NUL; each call writes its results. Here and below: handles are NIXL's, in use by this thread alone.
        nixl.done("create_agent", unsafe { (nixl.create_configured_agent)(name.as_ptr(), &config, &mut made) })?;
        let mut agent = Agent { nixl, agent: made, backend: null_mut(), options: null_mut(), registered: BTreeMap::new() };
        let mut kinds = null_mut();
        // SAFETY: as above.
        let list = Held::new("get_plugin_params", nixl, nixl.destroy_params, |out| unsafe {
            (nixl.get_plugin_params)(made, plugin.as_ptr(), &mut kinds, out)
        });
        let list = list.map_err(|e| err!(RS_ERR_UNSUPPORTED, "NIXL has no backend '{backend}': {e}"))?;
        // SAFETY: as above; nobody wants the list of kinds of memory.
        unsafe { (nixl.destroy_mem_list)(kinds) };
        for (key, value) in params {
            let (key, value) = (c_string(key, "`params`")?, c_string(value, "`params`")?);
            // SAFETY: as above.
            nixl.done("params_add", unsafe { (nixl.params_add)(list.handle, key.as_ptr(), value.as_ptr()) })?;
        }
        // SAFETY: as above.
        unsafe {
            let answer = (nixl.create_backend)(made, plugin.as_ptr(), list.handle, &mut agent.backend);
            nixl.done("create_backend", answer).map_err(|e| e.context(format_args!("backend '{backend}'")))?;
            nixl.done("create_opt_args", (nixl.create_opt_args)(&mut agent.options))?;
            nixl.done("opt_args_add_backend", (nixl.opt_args_add_backend)(agent.options, agent.backend))?;
        }
        Ok(agent)
    }

    /// What others need to reach this agent and all that it has registered.
    pub fn metadata(&mut self) -> Result<Vec<u8>> {
        let (mut data, mut len) = (null_mut(), 0);
        // SAFETY: see `new`; the bytes are ours until they are freed.
        unsafe {
            self.nixl.done("get_local_md", (self.nixl.get_local_md)(self.agent, &mut data, &mut len))?;
            let bytes = if data.is_null() { vec![] } else { std::slice::from_raw_parts(data.cast::<u8>(), len).to_vec() };
            self.nixl.free(data);
            Ok(bytes)
        }
    }

    /// Takes the metadata of another agent, which must have this name.
    pub fn load(&mut self, name: &str, metadata: &[u8]) -> Result<()> {
        let mut found = null_mut();
        // SAFETY: see `new`; the name is ours until it is freed.
        let found = unsafe {
            let answer = (self.nixl.load_remote_md)(self.agent, metadata.as_ptr().cast(), metadata.len(), &mut found);
            self.nixl.done("load_remote_md", answer)?;
            let text = if found.is_null() { String::new() } else { CStr::from_ptr(found).to_string_lossy().into_owned() };
            self.nixl.free(found.cast());
            text
        };
        if found != name {
            bail!(RS_ERR_COMM, "metadata of agent '{found}' came where that of '{name}' was expected");
        }
        Ok(())
    }

    /// Registers memory, once however often it is asked for. Memory that is registered must stay until it is [`Agent::deregister`]ed.
    pub fn register(&mut self, block: Block) -> Result<()> {
        if let Some((count, _)) = self.registered.get_mut(&block) {
            *count += 1;
            return Ok(());
        }
        let (kind, id) = block.place()?;
        let nixl = self.nixl;
        // SAFETY: see `new`; the memory is the caller's, and stays (this method's contract).
        unsafe {
            let list = Held::new("create_reg_dlist", nixl, nixl.destroy_reg_dlist, |out| (nixl.create_reg_dlist)(kind, out))?;
            let added = (nixl.reg_dlist_add_desc)(list.handle, block.addr as usize, block.len as usize, id, null(), 0);
            nixl.done("reg_dlist_add_desc", added)?;
            nixl.done("register_mem", (nixl.register_mem)(self.agent, list.handle, self.options))?;
            self.registered.insert(block, (1, list.handle));
            std::mem::forget(list);
        }
        Ok(())
    }

    /// Takes one registration back.
    pub fn deregister(&mut self, block: Block) {
        let Some((count, list)) = self.registered.get_mut(&block) else { return };
        *count -= 1;
        if *count > 0 {
            return;
        }
        // SAFETY: see `new`; the list is destroyed once, here or in `drop`.
        let answer = unsafe {
            let answer = (self.nixl.deregister_mem)(self.agent, *list, self.options);
            (self.nixl.destroy_reg_dlist)(*list);
            answer
        };
        self.registered.remove(&block);
        if let Err(e) = self.nixl.done("deregister_mem", answer) {
            log::warn!("{e}");
        }
    }

    /// Sends a note to another agent.
    pub fn notify(&mut self, to: &str, note: &[u8]) -> Result<()> {
        let to = c_string(to, "an agent's name")?;
        // SAFETY: see `new`.
        let answer = unsafe { (self.nixl.gen_notif)(self.agent, to.as_ptr(), note.as_ptr().cast(), note.len(), self.options) };
        self.nixl.done("gen_notif", answer)
    }

    /// Takes the notes that have come, with their senders' names; those of one sender in order.
    pub fn notes(&mut self) -> Result<Vec<(String, Vec<u8>)>> {
        let nixl = self.nixl;
        let mut out = vec![];
        // SAFETY: see `new`; names and bytes stay as long as the map does.
        unsafe {
            let map = Held::new("create_notif_map", nixl, nixl.destroy_notif_map, |out| (nixl.create_notif_map)(out))?;
            nixl.done("get_notifs", (nixl.get_notifs)(self.agent, map.handle, self.options))?;
            let mut senders = 0;
            nixl.done("notif_map_size", (nixl.notif_map_size)(map.handle, &mut senders))?;
            for i in 0..senders {
                let (mut name, mut count) = (null(), 0);
                nixl.done("notif_map_get_agent_at", (nixl.notif_map_get_agent_at)(map.handle, i, &mut name))?;
                nixl.done("notif_map_get_notifs_size", (nixl.notif_map_get_notifs_size)(map.handle, name, &mut count))?;
                let sender = CStr::from_ptr(name).to_string_lossy().into_owned();
                for j in 0..count {
                    let (mut data, mut len): (*const c_void, usize) = (null(), 0);
                    nixl.done("notif_map_get_notif", (nixl.notif_map_get_notif)(map.handle, name, j, &mut data, &mut len))?;
                    let bytes = if len == 0 { &[] } else { std::slice::from_raw_parts(data.cast::<u8>(), len) };
                    out.push((sender.clone(), bytes.to_vec()));
                }
            }
        }
        Ok(out)
    }

    /// Starts to read parts of a message of another agent, all in one, all registered where they are; when it is done and
    /// [`Agent::done`] has said so, the owner gets `note`. The memory stays until then, or until the agent is dropped.
    pub fn read(&mut self, owner: &str, parts: &[Part], note: &[u8]) -> Result<Request> {
        let nixl = self.nixl;
        let owner = c_string(owner, "an agent's name")?;
        // SAFETY: see `new`; the memory is registered, which NIXL checks, and stays (this method's contract). NIXL keeps copies of the
        // lists and of the note.
        unsafe {
            let list = |block: fn(&Part) -> Block| -> Result<Held> {
                let (kind, id) = parts.first().map_or_else(|| bail!(RS_ERR_INTERNAL, "an empty message"), |p| block(p).place())?;
                let list =
                    Held::new("create_xfer_dlist", nixl, nixl.destroy_xfer_dlist, |out| (nixl.create_xfer_dlist)(kind, out))?;
                for Block { addr, len, .. } in parts.iter().map(block) {
                    let answer = (nixl.xfer_dlist_add_desc)(list.handle, addr as usize, len as usize, id);
                    nixl.done("xfer_dlist_add_desc", answer)?;
                }
                Ok(list)
            };
            let (into, from) = (list(|p| p.into)?, list(|p| p.from)?);
            let options = Held::new("create_opt_args", nixl, nixl.destroy_opt_args, |out| (nixl.create_opt_args)(out))?;
            nixl.done("opt_args_add_backend", (nixl.opt_args_add_backend)(options.handle, self.backend))?;
            nixl.done("opt_args_set_notif_msg", (nixl.opt_args_set_notif_msg)(options.handle, note.as_ptr().cast(), note.len()))?;
            nixl.done("opt_args_set_has_notif", (nixl.opt_args_set_has_notif)(options.handle, true))?;
            let mut request = null_mut();
            let made =
                (nixl.create_xfer_req)(self.agent, READ, into.handle, from.handle, owner.as_ptr(), &mut request, options.handle);
            nixl.done("create_xfer_req", made)?;
            let request = Request(request);
            match (nixl.post_xfer_req)(self.agent, request.0, options.handle) {
                0 | IN_PROGRESS => Ok(request),
                answer => {
                    self.release(request);
                    Err(nixl.done("post_xfer_req", answer).err().unwrap_or_else(|| err!(RS_ERR_COMM, "post_xfer_req failed")))
                }
            }
        }
    }

    /// Whether a read is done.
    pub fn done(&mut self, request: &Request) -> Result<bool> {
        // SAFETY: see `new`.
        match unsafe { (self.nixl.get_xfer_status)(self.agent, request.0) } {
            IN_PROGRESS => Ok(false),
            answer => self.nixl.done("get_xfer_status", answer).map(|()| true),
        }
    }

    /// Gives a request back. One that is not done is cancelled, which may leave its bytes on their way until the agent is dropped.
    pub fn release(&mut self, request: Request) {
        // SAFETY: see `new`; in this order.
        unsafe {
            (self.nixl.release_xfer_req)(self.agent, request.0);
            (self.nixl.destroy_xfer_req)(request.0);
        }
    }
}

impl Drop for Agent {
    /// Closes all connections: after this nobody reads or writes memory through this agent, on neither side.
    fn drop(&mut self) {
        let nixl = self.nixl;
        // SAFETY: see `new`; each handle is destroyed once, those that name the backend before it goes with the agent.
        unsafe {
            for (_, list) in std::mem::take(&mut self.registered).into_values() {
                (nixl.deregister_mem)(self.agent, list, self.options);
                (nixl.destroy_reg_dlist)(list);
            }
            if !self.options.is_null() {
                (nixl.destroy_opt_args)(self.options);
            }
            (nixl.destroy_agent)(self.agent);
            if !self.backend.is_null() {
                (nixl.destroy_backend)(self.backend);
            }
        }
    }
}
