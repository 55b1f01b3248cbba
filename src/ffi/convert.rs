//! Structs of the header as the crate's own types.

use super::handle::CommHandle;
use super::preset::PresetHandle;
use super::read::{flags, list, optional_text, reserved, sized, table, text};
use crate::abi::*;
use crate::comm::{Comm, Deadline, composite, local};
use crate::container::{Config, FromSpec, Sync};
use crate::device::foreign::ForeignDevice;
use crate::device::{Device, Mem};
use crate::error::{Result, bail, err};
use crate::layout::{BufferRow, Layout, TensorRow, TileRow};
use std::sync::Arc;
use std::time::Duration;

/// Staging where a config gives none.
pub const DEFAULT_STAGING: u64 = 256 << 20;
/// The longest wait where the caller gives none.
pub const DEFAULT_TIMEOUT: Duration = Duration::from_secs(60);
const MOST_THREADS: u32 = 1024;

/// One rank's checked tables, whoever wrote them.
pub struct Described {
    pub layout: Layout,
    /// Of each buffer.
    pub mems: Vec<Mem>,
    /// Virtual-pipeline chunk of each buffer.
    pub chunks: Vec<u32>,
    pub spec: Option<FromSpec>,
}

/// The tables of a layout or of a preset, one of which is NULL.
///
/// # Safety
/// As the header promises for both; the buffers' memory is what [`Mem::of`] wants.
pub unsafe fn described(tables: *const rs_layout_t, preset: *const rs_preset_t) -> Result<Described> {
    if tables.is_null() == preset.is_null() {
        let which = if preset.is_null() { "both are NULL" } else { "neither is NULL" };
        bail!(RS_ERR_INVALID, "give either a layout or a preset: {which}");
    }
    if preset.is_null() {
        // SAFETY: this function's promise.
        let (layout, mems) = unsafe { layout(tables)? };
        return Ok(Described { chunks: vec![0; mems.len()], layout, mems, spec: None });
    }
    // SAFETY: this function's promise.
    unsafe { PresetHandle::of(preset)? }.read(|preset| {
        let rows = preset.rows()?;
        let layout = Layout::new(&rows.tensors, &rows.buffers, &rows.tiles)?;
        // SAFETY: this function's promise.
        let mems = rows.buffers.iter().map(|b| unsafe { memory(b) }).collect::<Result<_>>()?;
        let spec = FromSpec { world: preset.world().clone(), rank: preset.rank(), ordinals: rows.ordinals };
        Ok(Described { layout, mems, chunks: rows.chunks, spec: Some(spec) })
    })
}

/// Tables checked row by row and as a whole, and the memory of each buffer.
///
/// # Safety
/// As the header promises for rs_layout_t; the buffers' memory is what [`Mem::of`] wants.
unsafe fn layout(layout: *const rs_layout_t) -> Result<(Layout, Vec<Mem>)> {
    // SAFETY: this function's promise, for the struct, its tables and their strings.
    unsafe {
        let l = sized(layout, "layout")?;
        let tensors = table(l.tensors, l.tensor_count, l.tensor_size, "layout.tensors")?;
        let buffers = table(l.buffers, l.buffer_count, l.buffer_size, "layout.buffers")?;
        let tiles = table(l.tiles, l.tile_count, l.tile_size, "layout.tiles")?;
        let tensors = tensors.iter().enumerate().map(|(i, t)| tensor(i, t)).collect::<Result<Vec<_>>>()?;
        let buffers = buffers.iter().enumerate().map(|(i, b)| buffer(i, b)).collect::<Result<Vec<_>>>()?;
        let tiles: Vec<TileRow> = tiles.iter().map(tile).collect();
        let layout = Layout::new(&tensors, &buffers, &tiles)?;
        let mems = buffers.iter().map(|b| memory(b)).collect::<Result<_>>()?;
        Ok((layout, mems))
    }
}

/// # Safety
/// `row.name` is NULL or a string.
unsafe fn tensor(i: usize, row: &rs_tensor_t) -> Result<TensorRow> {
    // SAFETY: this function's promise.
    let name = unsafe { text(row.name, format_args!("layout.tensors[{i}].name"))? };
    reserved(row.reserved, format_args!("layout.tensors[{i}] '{name}': reserved"))?;
    let n = axes(row.rank).map_err(|e| e.context(format_args!("layout.tensors[{i}] '{name}': rank")))?;
    Ok(TensorRow { name: name.to_string(), shape: row.shape[..n].to_vec() })
}

/// # Safety
/// `row.name` is NULL or a string.
unsafe fn buffer(i: usize, row: &rs_buffer_t) -> Result<BufferRow> {
    // SAFETY: this function's promise.
    let name = unsafe { text(row.name, format_args!("layout.buffers[{i}].name"))? };
    flags(row.flags, RS_BUFFER_PADDED, format_args!("layout.buffers[{i}] '{name}': flags"))?;
    let n = axes(row.ndim).map_err(|e| e.context(format_args!("layout.buffers[{i}] '{name}': ndim")))?;
    Ok(BufferRow {
        name: name.to_string(),
        addr: row.data.expose_provenance() as u64,
        bytes: row.size_bytes,
        device_type: row.device_type,
        device_id: row.device_id,
        role: row.role,
        flags: row.flags,
        dtype: row.dtype,
        shape: row.shape[..n].to_vec(),
        strides: row.strides[..n].to_vec(),
    })
}

fn tile(row: &rs_tile_t) -> TileRow {
    TileRow {
        tensor: row.tensor,
        buffer: row.buffer,
        rank: row.rank,
        transform: row.transform,
        byte_offset: row.byte_offset,
        view: row.view,
        origin: row.origin,
        extent: row.extent,
        stride: row.stride,
    }
}

/// A number of axes.
pub fn axes(n: u32) -> Result<usize> {
    if n as usize > RS_MAX_RANK {
        bail!(RS_ERR_INVALID, "{n}, at most RS_MAX_RANK ({RS_MAX_RANK}) is possible");
    }
    Ok(n as usize)
}

/// # Safety
/// As [`Mem::of`] for the row's memory.
unsafe fn memory(row: &BufferRow) -> Result<Mem> {
    let len = usize::try_from(row.bytes)
        .map_err(|_| err!(RS_ERR_INVALID, "buffer '{}': {} bytes are more than this process can address", row.name, row.bytes))?;
    // SAFETY: this function's promise; the address has its provenance exposed.
    Ok(unsafe { Mem::of((row.device_type, row.device_id), std::ptr::with_exposed_provenance_mut(row.addr as usize), len) })
}

/// What a container is asked for.
pub struct Asked {
    pub config: Config,
    pub tables: Described,
    /// The caller's device, which a container that could not be made must not release.
    pub device: Option<Arc<ForeignDevice>>,
    /// Whether a thread looks at syncs in progress.
    pub watchdog: bool,
}

/// A config with the tables that it and `tables` give.
///
/// # Safety
/// As the header promises for rs_config_t and rs_layout_t; the buffers' memory is what [`Mem::of`] wants.
pub unsafe fn config(config: *const rs_config_t, tables: *const rs_layout_t) -> Result<Asked> {
    // SAFETY: this function's promise, for the struct and what it points to.
    let (c, label, comm, foreign, tables) = unsafe {
        let c = sized(config, "config")?;
        let comm = if c.comm.is_null() { None } else { Some(CommHandle::share(c.comm)?) };
        let foreign =
            if c.device.is_null() { None } else { Some(Arc::new(ForeignDevice::new(sized(c.device, "config.device")?)?)) };
        let label = optional_text(c.name, "config.name")?.unwrap_or_default();
        check(&c)?;
        (c, label, comm, foreign, described(tables, c.preset)?)
    };
    let device = foreign.clone().map(|device| device as Arc<dyn Device>);
    let given = match c.staging.expose_provenance() {
        0 => None,
        // Nobody knows whose device it would be.
        _ if device.is_none() && tables.mems.is_empty() => None,
        at if c.staging_bytes == 0 || at % 256 != 0 => bail!(
            RS_ERR_INVALID,
            "config.staging is {at:#x} of {} bytes (staging_bytes); it must be aligned to 256 and its length given",
            c.staging_bytes
        ),
        _ => {
            let kind = device.as_ref().map_or_else(|| crate::device::home(tables.mems.iter().map(|m| m.kind())), |d| d.id());
            let len = usize::try_from(c.staging_bytes).map_err(|e| err!(RS_ERR_INVALID, "config.staging_bytes: {e}"))?;
            // SAFETY: this function's promise: memory on the container's device.
            Some(unsafe { Mem::of(kind, c.staging.cast(), len) })
        }
    };
    let config = Config {
        label: label.to_string(),
        device,
        host_id: (c.host_id != 0).then_some(c.host_id),
        relays: c.flags & RS_CONFIG_RELAY != 0,
        staging: if c.staging_bytes == 0 { DEFAULT_STAGING } else { c.staging_bytes },
        staging_at: given,
        threads: threads(c.host_threads)?,
        timeout: timeout(c.timeout_ms).unwrap_or(DEFAULT_TIMEOUT),
        comm,
    };
    Ok(Asked { config, tables, device: foreign, watchdog: c.flags & RS_CONFIG_WATCHDOG != 0 })
}

fn check(c: &rs_config_t) -> Result<()> {
    if c.abi != RS_ABI {
        bail!(RS_ERR_INVALID, "config.abi is {}, it must be RS_ABI, {RS_ABI} in this library", c.abi);
    }
    flags(c.flags, RS_CONFIG_WATCHDOG | RS_CONFIG_RELAY, "config.flags")
}

fn threads(host_threads: u32) -> Result<usize> {
    if host_threads > MOST_THREADS {
        bail!(RS_ERR_INVALID, "config.host_threads is {host_threads}; at most {MOST_THREADS} are possible");
    }
    Ok(host_threads.max(1) as usize)
}

/// A communicator of the processes of one host, joined.
///
/// # Safety
/// As the header promises for rs_comm_local_t.
pub unsafe fn join_local(given: *const rs_comm_local_t) -> Result<Arc<dyn Comm>> {
    // SAFETY: this function's promise, for the struct and its name.
    let (l, name) = unsafe {
        let l = sized(given, "local")?;
        (l, text(l.name, "local.name")?)
    };
    let force = match l.flags {
        0 => None,
        RS_LOCAL_READ => Some(local::Force::Read),
        RS_LOCAL_RING => Some(local::Force::Ring),
        f => bail!(RS_ERR_INVALID, "local.flags is {f:#x}, it must be 0, RS_LOCAL_READ (1) or RS_LOCAL_RING (2)"),
    };
    let (rank, world) = ranks(l.rank, l.world)?;
    let timeout = timeout(l.timeout_ms).unwrap_or(DEFAULT_TIMEOUT);
    local::join(name, rank, world, timeout, force)
}

/// Two communicators as one, within the default time.
///
/// # Safety
/// As [`CommHandle::share`].
pub unsafe fn join_composite(near: *const rs_comm_t, wide: *const rs_comm_t) -> Result<Arc<dyn Comm>> {
    // SAFETY: this function's promise.
    let share = |comm, what: &str| unsafe { CommHandle::share(comm) }.map_err(|e| e.context(what));
    composite::join(share(near, "near")?, share(wide, "wide")?, Deadline::after(DEFAULT_TIMEOUT))
}

/// A rank and a world size as numbers from 0 and from 1.
pub fn ranks(rank: i32, world: i32) -> Result<(u32, u32)> {
    if world < 1 || rank < 0 || rank >= world {
        bail!(RS_ERR_INVALID, "rank {rank} of a world of {world}: the world has at least 1 rank, and ranks count from 0");
    }
    Ok((rank as u32, world as u32))
}

/// What to sync; the caller's progress function goes with it.
///
/// # Safety
/// As the header promises for rs_sync_t.
pub unsafe fn sync(sync: *const rs_sync_t) -> Result<(Sync, impl FnMut(u64, u64))> {
    // SAFETY: this function's promise, for the struct, its list and the list's strings.
    let (s, only) = unsafe {
        let s = sized(sync, "sync")?;
        let only = list(s.only, s.only_count, "sync.only")?;
        let only = only.iter().enumerate().map(|(i, &t)| Ok(text(t, format_args!("sync.only[{i}]"))?.to_string()));
        (s, only.collect::<Result<Vec<_>>>()?)
    };
    flags(s.flags, RS_SYNC_VERIFY, "sync.flags")?;
    let progress = move |done: u64, total: u64| {
        if let Some(call) = s.progress {
            // SAFETY: the header: the function may be called with its user pointer during the sync.
            unsafe { call(s.progress_user, done, total) }
        }
    };
    let only = (!only.is_empty()).then_some(only);
    let (stream, timeout, verify) = (s.stream.expose_provenance(), timeout(s.timeout_ms), s.flags & RS_SYNC_VERIFY != 0);
    Ok((Sync { stream, version: s.version, only, timeout, verify }, progress))
}

/// 0: the default.
fn timeout(ms: u32) -> Option<Duration> {
    (ms != 0).then(|| Duration::from_millis(ms.into()))
}
