//! One rank's parameters and their memory: from names that a framework uses to the rows of tables.
#![forbid(unsafe_code)]

use super::cut::Cut;
use super::left_out::{ignored, lora, matches, quantised};
use super::model::{Id, names};
use super::side::{Param, Slot};
use super::world::World;
use crate::abi::*;
use crate::error::{Error, Result, bail};
use crate::layout::{BufferRow, TensorRow, TileRow};
use serde_json::{Value, json};
use std::borrow::Cow;
use std::collections::HashMap;
use std::sync::Arc;

/// A parameter that the spec says a rank has.
struct Expected {
    side: usize,
    chunk: u32,
    name: String,
    shape: Vec<i64>,
    padded: bool,
    dtype: rs_dtype_t,
    /// Whether a plan uses it; see [`super::side::Unused`].
    used: bool,
    /// Logical tensors that it holds a part of.
    tensors: Vec<String>,
    memory: Option<Memory>,
}

/// Where a parameter is.
#[derive(Clone, Copy)]
struct Memory {
    addr: u64,
    bytes: u64,
    device_type: i32,
    device_id: i32,
}

/// A parameter as the caller binds it.
pub struct Bind<'a> {
    /// The framework's name.
    pub name: &'a str,
    /// `RS_SOURCE | RS_TARGET`.
    pub role: u32,
    /// Virtual-pipeline chunk.
    pub chunk: u32,
    /// Address of the first element.
    pub addr: u64,
    /// Bytes that belong to it.
    pub bytes: u64,
    /// DLPack device type.
    pub device_type: i32,
    /// DLPack device id.
    pub device_id: i32,
    /// Element type.
    pub dtype: rs_dtype_t,
    /// Extents.
    pub shape: Vec<i64>,
    /// Strides in elements; `None`: dense.
    pub strides: Option<Vec<i64>>,
}

/// One rank's tables, as rows.
#[derive(Default)]
pub struct Rows {
    /// Logical tensors, by ordinal.
    pub tensors: Vec<TensorRow>,
    /// Ordinals of `tensors`.
    pub ordinals: Vec<u32>,
    /// Parameters: of the source, then of the target.
    pub buffers: Vec<BufferRow>,
    /// Virtual-pipeline chunk of each parameter.
    pub chunks: Vec<u32>,
    /// What lies where.
    pub tiles: Vec<TileRow>,
}

/// A rank's parameters, bound one by one.
pub struct Preset {
    world: Arc<World>,
    rank: u32,
    /// Source, then target, each in the order of its rows; what is unused comes last.
    expected: Vec<Expected>,
    /// Place in `expected` by side, chunk and name.
    index: HashMap<(usize, u32, String), usize>,
    /// Names and addresses of what was left out as another name of a parameter's memory.
    views: Vec<(String, u64)>,
}

/// What is to be done about them.
const QUANTISED: &str =
    "quantised and private layouts are not built: use the engine's own load_weights for this model, or load it unquantised";

const ROLES: [u32; 2] = [RS_SOURCE, RS_TARGET];
const ROLE_NAMES: [&str; 2] = ["source", "target"];

impl Preset {
    /// Of a rank of the world; it need not play a part.
    pub fn new(world: Arc<World>, rank: u32) -> Preset {
        let mut expected = vec![];
        let signed = |shape: &[u64]| shape.iter().map(|&n| n as i64).collect();
        let mut unused = vec![];
        for (side, s) in world.sides().into_iter().enumerate() {
            let Some(stage) = s.stage(rank) else { continue };
            let dtype = |(code, bits): (u8, u8)| rs_dtype_t { code, bits, lanes: 1 };
            expected.extend(s.params(rank).map(|(slot, param)| Expected {
                side,
                chunk: slot.chunk,
                name: format!("{}{}", slot.prefix, param.name),
                shape: signed(&param.shape),
                padded: param.padded,
                dtype: dtype(s.dtype(param)),
                used: true,
                tensors: tensors(&world, slot, param),
                memory: None,
            }));
            unused.extend(s.parts.unused.iter().filter(|u| u.stage == stage).map(|u| Expected {
                side,
                chunk: u.chunk,
                name: u.name.clone(),
                shape: signed(&u.shape),
                padded: true,
                dtype: dtype(s.parts.dtype),
                used: false,
                tensors: vec![],
                memory: None,
            }));
        }
        expected.extend(unused);
        let index = expected.iter().enumerate().map(|(i, e)| ((e.side, e.chunk, e.name.clone()), i)).collect();
        Preset { world, rank, expected, index, views: vec![] }
    }

    /// The world.
    pub fn world(&self) -> &Arc<World> {
        &self.world
    }

    /// The rank.
    pub fn rank(&self) -> u32 {
        self.rank
    }

    /// Gives a parameter its memory, or other memory than it had. One that does not fit may tell what the spec left open.
    pub fn bind(&mut self, b: &Bind<'_>) -> Result<()> {
        let Err(first) = self.bind_as_is(b) else { return Ok(()) };
        // Another variant has other names, shapes and dtypes, and nothing else.
        if ![RS_ERR_NOT_FOUND, RS_ERR_LAYOUT].contains(&first.status()) {
            return Err(first);
        }
        let fits = |side: usize| self.find(side, b).is_some_and(|at| self.check(&self.expected[at], b).is_ok());
        let Some(side) = (0..2).find(|&s| b.role & ROLES[s] != 0 && !fits(s)) else { return Err(first) };
        let mut tried = vec![];
        match self.resolved(side, b, &mut tried) {
            // Its other side may have to be found out too.
            Some(mut other) => {
                other.bind(b)?;
                *self = other;
                Ok(())
            }
            None if tried.is_empty() => Err(first),
            None => Err(Error::new(first.status(), format!("{}; {}", first.text(), tried.join("; ")))),
        }
    }

    /// This preset with the variant of the fewest members that has the parameter as it is bound, and all that were bound before; what
    /// was tried goes into `tried`.
    fn resolved(&self, side: usize, b: &Bind<'_>, tried: &mut Vec<String>) -> Option<Preset> {
        let left = &self.world.spec.left[side];
        let mut seen = vec![self.find(side, b).map(|at| self.expected[at].shape.clone()).unwrap_or_default()];
        let mut conflict = None;
        for variants in self.world.variants.all(side, left, self.rows_of_vocab(side, b)) {
            // What a model or another member forbids is no variant.
            let Ok(world) = self.world.with(variants) else { continue };
            let mut other = Preset::new(Arc::new(world), self.rank);
            let Some(at) = other.find(side, b) else { continue };
            let shape = &other.expected[at].shape;
            if other.check(&other.expected[at], b).is_err() {
                if !seen.contains(shape) {
                    seen.push(shape.clone());
                    tried.push(format!("with {} it has shape {shape:?}", variants.shown(side, left)));
                }
                continue;
            }
            match other.carry(self, (side, at)) {
                Ok(()) => return Some(other),
                Err(bound) => {
                    let with = variants.shown(side, left);
                    conflict.get_or_insert(format!("it fits with {with}, but then '{bound}', bound before, does not"));
                }
            }
        }
        tried.extend(conflict);
        None
    }

    /// Takes over what was bound, but for a parameter that is bound anew; an error names what does not fit.
    fn carry(&mut self, from: &Preset, anew: (usize, usize)) -> std::result::Result<(), String> {
        for old in &from.expected {
            let Some(memory) = old.memory else { continue };
            let at = self.index.get(&(old.side, old.chunk, old.name.clone())).copied();
            if at == Some(anew.1) && old.side == anew.0 {
                continue;
            }
            let new = at.map(|at| &mut self.expected[at]);
            match new.filter(|n| (&n.shape, n.dtype, n.used) == (&old.shape, old.dtype, old.used)) {
                Some(new) => new.memory = Some(memory),
                None => return Err(old.name.clone()),
            }
        }
        self.views = from.views.clone();
        Ok(())
    }

    /// Rows of the whole padded vocabulary, if the parameter is a shard of it.
    fn rows_of_vocab(&self, side: usize, b: &Bind<'_>) -> Option<u64> {
        let expected = &self.expected[self.find(side, b)?];
        // One may be all padding, or a second copy.
        let of_vocab = expected.tensors.is_empty() || expected.tensors.iter().any(|t| t == names::EMBED || t == names::HEAD);
        let rows = b.shape.first().and_then(|&n| u64::try_from(n).ok()).filter(|_| of_vocab)?;
        let shards = self.world.sides()[side].parts.meshes[0].shards();
        let padded = rows.checked_mul(shards)?;
        // Frameworks pad to multiples of 128 a shard, or of 256. More looks like another model's vocabulary.
        let most = self.world.model().vocab + (128 * shards).max(256);
        (padded < most).then_some(padded)
    }

    fn bind_as_is(&mut self, b: &Bind<'_>) -> Result<()> {
        if b.role == 0 || b.role & !(RS_SOURCE | RS_TARGET) != 0 {
            bail!(RS_ERR_INVALID, "role is {}, it must be RS_SOURCE (1), RS_TARGET (2) or both (3)", b.role);
        }
        let sides = (0..2).filter(|&s| b.role & ROLES[s] != 0);
        let found: Vec<Option<usize>> = sides.clone().map(|s| self.find(s, b)).collect();
        let views = |side: usize| self.world.sides()[side].parts.views;
        let left_out = |p: &str| matches(p, b.name);
        if found.iter().all(Option::is_none) {
            if self.world.spec.ignore.iter().any(|p| left_out(p)) || ignored(b.name) {
                return Ok(());
            }
            if sides.clone().all(|s| views(s).iter().any(|p| left_out(p))) {
                self.views.retain(|v| v.0 != b.name);
                self.views.push((b.name.to_string(), b.addr));
                return Ok(());
            }
        }
        if found.contains(&None) && quantised(b.name) {
            bail!(RS_ERR_UNSUPPORTED, "'{}': only quantised modules have such a parameter; {QUANTISED}", b.name);
        }
        if let Some(mark) = lora(b.name) {
            bail!(
                RS_ERR_UNSUPPORTED,
                "'{}': LoRA's parameters ({mark}) are not built: merge the adapter into the weights, and bind these",
                b.name
            );
        }
        for (side, at) in sides.zip(&found) {
            match at {
                Some(at) => self.check(&self.expected[*at], b)?,
                None => return self.unknown(side, b),
            }
        }
        let memory = Memory { addr: b.addr, bytes: b.bytes, device_type: b.device_type, device_id: b.device_id };
        for at in found.into_iter().flatten() {
            self.expected[at].memory = Some(memory);
        }
        Ok(())
    }

    fn find(&self, side: usize, b: &Bind<'_>) -> Option<usize> {
        self.index.get(&(side, b.chunk, self.bare(side, b.name).into_owned())).copied()
    }

    /// A name without what wrappers put before it, as this version has it.
    fn bare<'a>(&self, side: usize, name: &'a str) -> Cow<'a, str> {
        let parts = &self.world.sides()[side].parts;
        let name = if parts.strip.is_empty() { name } else { name.trim_start_matches(parts.strip) };
        let renamed = parts.renamed.iter().find(|(other, _)| name.contains(other));
        renamed.map_or(Cow::Borrowed(name), |(other, here)| Cow::Owned(name.replacen(other, here, 1)))
    }

    fn unknown(&self, side: usize, b: &Bind<'_>) -> Result<()> {
        let (role, name) = (ROLE_NAMES[side], self.bare(side, b.name));
        let own = || self.expected.iter().filter(|e| e.side == side);
        if own().next().is_none() {
            bail!(RS_ERR_NOT_FOUND, "'{}': rank {} plays no part as {role} in the spec", b.name, self.rank);
        }
        let chunks: Vec<u32> = own().filter(|e| e.name == name).map(|e| e.chunk).collect();
        if !chunks.is_empty() {
            bail!(RS_ERR_NOT_FOUND, "{role} '{name}' is in model_chunk {chunks:?} of rank {}, not in {}", self.rank, b.chunk);
        }
        let mut near: Vec<(usize, &str)> = own().map(|e| (strsim::levenshtein(&e.name, &name), e.name.as_str())).collect();
        near.sort_unstable();
        near.dedup();
        let near: Vec<&str> = near.into_iter().take(3).map(|n| n.1).collect();
        bail!(
            RS_ERR_NOT_FOUND,
            "rank {} has no {role} parameter '{name}' in the spec; the nearest names are {near:?}; if it is memory that no \
             checkpoint has, add it to the spec's `ignore`",
            self.rank
        );
    }

    fn check(&self, e: &Expected, b: &Bind<'_>) -> Result<()> {
        let role = ROLE_NAMES[e.side];
        // DLPack: 0 and 1 are integers, 7 and up floats of at most 8 bits.
        if b.dtype.code >= 7 || (b.dtype.code <= 1 && b.dtype.bits <= 8) {
            bail!(RS_ERR_UNSUPPORTED, "{role} '{}': dtype (code {}, bits {}); {QUANTISED}", e.name, b.dtype.code, b.dtype.bits);
        }
        if b.shape != e.shape {
            bail!(RS_ERR_LAYOUT, "{role} '{}': the spec says shape {:?}, bound was {:?}", e.name, e.shape, b.shape);
        }
        let dense = dense(&e.shape);
        if let Some(strides) = &b.strides {
            // An axis of one element has any stride.
            if (0..dense.len()).any(|i| e.shape[i] > 1 && strides.get(i) != Some(&dense[i])) {
                bail!(
                    RS_ERR_LAYOUT,
                    "{role} '{}': strides {strides:?} instead of {dense:?}: a preset's parameters are dense; describe others by tables",
                    e.name
                );
            }
        }
        let dtype = e.dtype;
        if (b.dtype.code, b.dtype.bits, b.dtype.lanes) != (dtype.code, dtype.bits, dtype.lanes) {
            bail!(
                RS_ERR_LAYOUT,
                "{role} '{}': the spec says dtype (code {}, bits {}), bound was (code {}, bits {}, lanes {})",
                e.name,
                dtype.code,
                dtype.bits,
                b.dtype.code,
                b.dtype.bits,
                b.dtype.lanes
            );
        }
        let bytes = e.shape.iter().product::<i64>() as u64 * u64::from(dtype.bits / 8);
        if b.addr == 0 {
            bail!(RS_ERR_INVALID, "{role} '{}': data is NULL", e.name);
        }
        if b.device_type == 0 {
            bail!(RS_ERR_INVALID, "{role} '{}': device_type is 0; host memory is RS_DEVICE_CPU ({RS_DEVICE_CPU})", e.name);
        }
        if b.bytes < bytes || b.addr.checked_add(b.bytes).is_none() {
            bail!(RS_ERR_LAYOUT, "{role} '{}': {} bytes at {:#x} do not hold its {bytes}", e.name, b.bytes, b.addr);
        }
        Ok(())
    }

    /// The rank's tables; an error lists all that is not bound.
    pub fn rows(&self) -> Result<Rows> {
        let missing: Vec<String> = self.expected.iter().filter(|e| e.used && e.memory.is_none()).map(shown).collect();
        if !missing.is_empty() {
            bail!(RS_ERR_STATE, "rank {}: {} parameters are not bound: {}", self.rank, missing.len(), missing.join(", "));
        }
        let bound = || self.expected.iter().filter_map(|e| e.memory);
        if let Some((name, _)) = self.views.iter().find(|v| !bound().any(|m| (m.addr..m.addr + m.bytes).contains(&v.1))) {
            bail!(
                RS_ERR_LAYOUT,
                "'{name}' lies in no parameter's memory, so it is no view that changes with one: say mla_derived_weights \"copies\""
            );
        }
        let mut out = Rows::default();
        let mut rows: HashMap<u32, u32> = HashMap::new();
        let model = self.world.model();
        for (ordinal, id) in self.world.tensors_of(self.rank) {
            rows.insert(ordinal, out.tensors.len() as u32);
            out.ordinals.push(ordinal);
            let shape = model.kinds[id.kind].shape.iter().map(|&n| n as i64).collect();
            out.tensors.push(TensorRow { name: model.name(id), shape });
        }
        let mut bound = self.expected.iter().filter_map(|e| e.used.then_some((e, e.memory?)));
        for (side, s) in self.world.sides().into_iter().enumerate() {
            for ((slot, param), (e, memory)) in s.params(self.rank).zip(&mut bound) {
                for cut in &param.cuts {
                    let row = rows[&model.ordinal(self.world.id(cut.kind, slot.layer, cut.expert))];
                    let mut tile = cut.row(u64::from(e.dtype.bits / 8), param.transform);
                    (tile.tensor, tile.buffer) = (row, out.buffers.len() as u32);
                    out.tiles.push(tile);
                }
                out.chunks.push(e.chunk);
                out.buffers.push(BufferRow {
                    name: e.name.clone(),
                    addr: memory.addr,
                    bytes: memory.bytes,
                    device_type: memory.device_type,
                    device_id: memory.device_id,
                    role: ROLES[side],
                    flags: if e.padded { RS_BUFFER_PADDED } else { 0 },
                    dtype: e.dtype,
                    shape: e.shape.clone(),
                    strides: dense(&e.shape),
                });
            }
        }
        Ok(out)
    }

    /// Bytes of an element that the source has of each of this rank's tensors, by ordinal.
    pub fn source_items(&self) -> HashMap<u32, u64> {
        let item = |id: Id| u64::from(self.world.sides()[0].kind_dtype(id.kind).1 / 8);
        self.world.tensors_of(self.rank).into_iter().map(|(ordinal, id)| (ordinal, item(id))).collect()
    }

    /// Bytes that the source has of the elements that this rank's targets hold.
    pub fn target_bytes(&self) -> u64 {
        let [source, target] = self.world.sides();
        let item = |c: &Cut| u64::from(source.kind_dtype(c.kind).1 / 8);
        let bytes = |p: &Param| p.cuts.iter().zip(&p.patterns).map(|(c, pattern)| pattern.volume() * item(c)).sum::<u64>();
        target.params(self.rank).map(|(_, p)| bytes(p)).sum()
    }

    /// Every parameter that the spec says this rank has, as JSON.
    pub fn describe(&self) -> Value {
        let param = |e: &Expected| {
            let dtype = e.dtype;
            json!({
                "role": ROLES[e.side],
                "chunk": e.chunk,
                "name": e.name,
                "shape": e.shape,
                "dtype": {"code": dtype.code, "bits": dtype.bits, "lanes": dtype.lanes},
                "required": e.used,
                "bound": e.memory.is_some(),
                "tensors": e.tensors,
            })
        };
        json!({
            "rank": self.rank,
            "params": self.expected.iter().map(param).collect::<Vec<_>>(),
            "found": self.world.found(),
        })
    }
}

/// Names of the tensors that a parameter holds a part of, each once.
fn tensors(world: &World, slot: &Slot, param: &Param) -> Vec<String> {
    let ids = param.cuts.iter().map(|c| world.id(c.kind, slot.layer, c.expert));
    let mut out: Vec<String> = ids.map(|id| world.model().name(id)).collect();
    out.dedup();
    out
}

fn shown(e: &Expected) -> String {
    let chunk = if e.chunk > 0 { format!(" of model_chunk {}", e.chunk) } else { String::new() };
    format!("{} '{}'{chunk}", ROLE_NAMES[e.side], e.name)
}

/// Strides of a dense row-major tensor.
fn dense(shape: &[i64]) -> Vec<i64> {
    (0..shape.len()).map(|i| shape[i + 1..].iter().product()).collect()
}
