//! What an rs_preset_t is.

use super::read::{self, text};
use super::{c_string, convert};
use crate::abi::*;
use crate::error::{Result, bail, err};
use crate::layout::Layout;
use crate::plan::{Peer, Piece, closed, totals::totals};
use crate::preset::bind::{Bind, Preset, Rows};
use crate::preset::spec::MOST_RANKS;
use crate::preset::world::World;
use serde_json::json;
use std::ffi::{CString, c_char};
use std::ptr;
use std::sync::{Arc, Mutex, RwLock, TryLockError};
use std::time::Instant;

/// A rank's part of a world spec, taken by one changing call or by any number of reading ones at a time.
pub struct PresetHandle {
    inner: RwLock<Preset>,
    /// What rs_preset_layout() has handed out since the last bind.
    tables: Mutex<Option<Box<Tables>>>,
}

impl PresetHandle {
    /// A new one.
    ///
    /// # Safety
    /// `spec_json` is NULL or a string.
    pub unsafe fn create(spec_json: *const c_char, rank: i32) -> Result<*mut rs_preset_t> {
        // SAFETY: this function's promise.
        let spec = unsafe { text(spec_json, "spec_json")? };
        let Some(rank) = u32::try_from(rank).ok().filter(|&r| (r as usize) < MOST_RANKS) else {
            bail!(RS_ERR_INVALID, "rank is {rank}; ranks are from 0 to {}", MOST_RANKS - 1)
        };
        let preset = Preset::new(Arc::new(World::new(spec)?), rank);
        let handle = PresetHandle { inner: RwLock::new(preset), tables: Mutex::new(None) };
        Ok(Box::into_raw(Box::new(handle)).cast())
    }

    /// The handle behind the caller's pointer.
    ///
    /// # Safety
    /// `ptr` is NULL or came from [`PresetHandle::create`] and is not destroyed while the reference is used.
    pub unsafe fn of<'a>(ptr: *const rs_preset_t) -> Result<&'a PresetHandle> {
        // SAFETY: this function's promise; only shared references to a handle exist.
        unsafe { ptr.cast::<PresetHandle>().as_ref() }.ok_or_else(|| err!(RS_ERR_INVALID, "preset is NULL"))
    }

    /// Ends it; NULL is nothing.
    ///
    /// # Safety
    /// `ptr` is NULL or came from [`PresetHandle::create`], once, and nobody uses it any more.
    pub unsafe fn destroy(ptr: *mut rs_preset_t) -> Result<()> {
        if !ptr.is_null() {
            // SAFETY: this function's promise: it is the Box of `create`.
            drop(unsafe { Box::from_raw(ptr.cast::<PresetHandle>()) });
        }
        Ok(())
    }

    /// Gives a parameter its memory.
    ///
    /// # Safety
    /// As the header promises for rs_bind_t.
    pub unsafe fn bind(&self, bind: *const rs_bind_t) -> Result<()> {
        // SAFETY: this function's promise, for the struct and what it points to.
        let (b, name, shape, strides) = unsafe {
            let b = read::sized(bind, "bind")?;
            let name = text(b.name, "bind.name")?;
            let n = convert::axes(b.ndim).map_err(|e| e.context(format_args!("bind.ndim of '{name}'")))?;
            let shape = read::list(b.shape, n, "bind.shape")?.to_vec();
            let strides = if b.strides.is_null() { None } else { Some(read::list(b.strides, n, "bind.strides")?.to_vec()) };
            (b, name, shape, strides)
        };
        let bind = Bind {
            name,
            role: b.role,
            chunk: b.model_chunk,
            addr: b.data.expose_provenance() as u64,
            bytes: b.size_bytes,
            device_type: b.device_type,
            device_id: b.device_id,
            dtype: b.dtype,
            shape,
            strides,
        };
        let mut preset = self.inner.try_write().map_err(refusal)?;
        preset.bind(&bind)?;
        *self.tables.lock().unwrap_or_else(|p| p.into_inner()) = None;
        Ok(())
    }

    /// Runs a call that changes nothing; others like it may run beside it.
    pub fn read<R>(&self, body: impl FnOnce(&Preset) -> Result<R>) -> Result<R> {
        body(&*self.inner.try_read().map_err(refusal)?)
    }

    /// The rank's tables for C; they live until the next bind.
    pub fn layout(&self) -> Result<rs_layout_t> {
        self.read(|preset| {
            let mut tables = self.tables.lock().unwrap_or_else(|p| p.into_inner());
            if tables.is_none() {
                let rows = preset.rows()?;
                // All that a container would find, before anybody uses them.
                Layout::new(&rows.tensors, &rows.buffers, &rows.tiles)?;
                *tables = Some(Box::new(Tables::new(&rows)?));
            }
            tables.as_ref().map(|t| t.layout()).ok_or_else(|| err!(RS_ERR_INTERNAL, "no tables"))
        })
    }

    /// JSON with its NUL.
    pub fn describe(&self, what: u32) -> Result<Vec<u8>> {
        let value = self.read(|preset| {
            let world = preset.world();
            let spec = &world.spec;
            let ranks = world.ranks().max(preset.rank() + 1);
            let places = || closed::places(ranks, spec.ranks_per_host);
            match what {
                RS_DESCRIBE_LAYOUT => Ok(preset.describe()),
                RS_DESCRIBE_WORLD => totals(world, &places(), convert::DEFAULT_STAGING, spec.links),
                RS_DESCRIBE_PLAN => {
                    let begun = Instant::now();
                    let plan = closed::plan(preset.rank(), &places(), convert::DEFAULT_STAGING, world)?;
                    let seconds = begun.elapsed().as_secs_f64();
                    let (sent, received) = plan.wire_bytes();
                    let doubled = plan.doubles.iter().map(Piece::bytes).sum::<u64>();
                    // The rest of what its targets hold, it holds itself. All but doubles are counted as the source has them.
                    let twice = {
                        let items = preset.source_items();
                        plan.doubles
                            .iter()
                            .map(|p| p.bytes() / u64::from(p.item) * items.get(&p.tensor).copied().unwrap_or(0))
                            .sum::<u64>()
                    };
                    let local = preset.target_bytes() - received - twice;
                    let peer = |p: &Peer| {
                        let (sent, received) = p.wire_bytes();
                        json!({"rank": p.rank, "sent": sent, "received": received})
                    };
                    Ok(json!({
                        "rank": preset.rank(),
                        "world": ranks,
                        "bytes": {"local": local, "doubled": doubled, "sent": sent, "received": received},
                        "peers": plan.peers.iter().map(peer).collect::<Vec<_>>(),
                        "moves": plan.peers.iter().map(|p| p.out.len() + p.into.len()).sum::<usize>() + plan.doubles.len(),
                        "plan_seconds": seconds,
                    }))
                }
                _ => bail!(
                    RS_ERR_INVALID,
                    "what is {what}; a preset tells RS_DESCRIBE_PLAN, RS_DESCRIBE_LAYOUT and RS_DESCRIBE_WORLD"
                ),
            }
        })?;
        Ok(c_string(&value.to_string())?.into_bytes_with_nul())
    }
}

fn refusal<G>(error: TryLockError<G>) -> crate::error::Error {
    match error {
        TryLockError::WouldBlock => {
            err!(RS_ERR_BUSY, "another thread is inside a call on this preset; one at a time, or wait for it")
        }
        TryLockError::Poisoned(_) => {
            err!(RS_ERR_INTERNAL, "an earlier call on this preset panicked; destroy it and make another one")
        }
    }
}

/// A rank's tables as C reads them.
struct Tables {
    tensors: Vec<rs_tensor_t>,
    buffers: Vec<rs_buffer_t>,
    tiles: Vec<rs_tile_t>,
    /// What their names point to.
    _names: Vec<CString>,
}

impl Tables {
    fn new(rows: &Rows) -> Result<Tables> {
        let mut names = vec![];
        let mut name = |text: &str| -> Result<*const c_char> {
            let name = c_string(text)?;
            let at = name.as_ptr();
            names.push(name);
            Ok(at)
        };
        let extents = |list: &[i64]| {
            let mut out = [0; RS_MAX_RANK];
            out[..list.len()].copy_from_slice(list);
            out
        };
        let mut tensors = vec![];
        for t in &rows.tensors {
            tensors.push(rs_tensor_t { name: name(&t.name)?, rank: t.shape.len() as u32, reserved: 0, shape: extents(&t.shape) });
        }
        let mut buffers = vec![];
        for b in &rows.buffers {
            buffers.push(rs_buffer_t {
                name: name(&b.name)?,
                data: ptr::with_exposed_provenance_mut(b.addr as usize),
                size_bytes: b.bytes,
                device_type: b.device_type,
                device_id: b.device_id,
                role: b.role,
                flags: b.flags,
                dtype: b.dtype,
                ndim: b.shape.len() as u32,
                shape: extents(&b.shape),
                strides: extents(&b.strides),
            });
        }
        let tile = |t: &crate::layout::TileRow| rs_tile_t {
            tensor: t.tensor,
            buffer: t.buffer,
            rank: t.rank,
            transform: t.transform,
            byte_offset: t.byte_offset,
            view: t.view,
            origin: t.origin,
            extent: t.extent,
            stride: t.stride,
        };
        Ok(Tables { tensors, buffers, tiles: rows.tiles.iter().map(tile).collect(), _names: names })
    }

    fn layout(&self) -> rs_layout_t {
        rs_layout_t {
            struct_size: 0,
            tensors: self.tensors.as_ptr(),
            tensor_count: self.tensors.len(),
            tensor_size: size_of::<rs_tensor_t>(),
            buffers: self.buffers.as_ptr(),
            buffer_count: self.buffers.len(),
            buffer_size: size_of::<rs_buffer_t>(),
            tiles: self.tiles.as_ptr(),
            tile_count: self.tiles.len(),
            tile_size: size_of::<rs_tile_t>(),
        }
    }
}
