//! One rank's weights from creation to the last sync: created -> connected -> synced / torn / failed.
//!
//! [`connect`] agrees with the other ranks and plans, [`sync`] moves one version, [`describe`] tells about both; a fingerprint tells
//! whether weights are the same. What a failed sync
//! half wrote stays marked until another succeeds. A sync that was put on a stream is looked at by poll, beside reading calls
//! (`flight`): what it changes lies behind locks.
//!
//! Knows all the parts and their order in time. Must not know C, nor how a plan comes about or bytes move.
#![forbid(unsafe_code)]

pub mod connect;
pub mod describe;
mod fingerprint;
mod flight;
mod ground;
mod planned;
pub mod host;
pub mod state;
pub mod sync;
mod verify;

use crate::abi::*;
use crate::comm::Comm;
use crate::device::{Device, Mem, Stream, for_memory, home};
use crate::error::{Result, bail, err};
use crate::layout::{Buffer, Layout};
use crate::plan::local::{Local, plan_local};
use crate::preset::world::World;
use crate::wire::Table;
use connect::Connected;
use flight::{Flight, Step, Stuck, Wreck};
use ground::Ground;
use planned::Planned;
pub use state::{Control, Param};
use state::{ParamState, Stats};
use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// What a container is made with; defaults are already filled in.
pub struct Config {
    /// For log lines and errors; see [`Container::label`].
    pub label: String,
    /// Who copies; `None`: the library's own device for the memory at hand.
    pub device: Option<Arc<dyn Device>>,
    /// Identity of the host; `None`: found out.
    pub host_id: Option<u64>,
    /// Whether this rank passes on what its targets get.
    pub relays: bool,
    /// Most staging in bytes.
    pub staging: u64,
    /// The caller's memory for it.
    pub staging_at: Option<Mem>,
    /// Threads that copy, the caller's included.
    pub threads: usize,
    /// Longest time of a collective call.
    pub timeout: Duration,
    /// The ranks, if they are known already.
    pub comm: Option<Arc<dyn Comm>>,
}

/// The world spec that a rank's tables come from.
pub struct FromSpec {
    /// The world.
    pub world: Arc<World>,
    /// The rank that the tables are of.
    pub rank: u32,
    /// Ordinal of each row of its tensor table.
    pub ordinals: Vec<u32>,
}

/// One sync.
#[derive(Clone, Debug, Default)]
pub struct Sync {
    /// The caller's stream.
    pub stream: Stream,
    /// The caller's version, not 0.
    pub version: u64,
    /// Names or prefixes ending in `*`.
    pub only: Option<Vec<String>>,
    /// Longest time of the call, if it is not the container's.
    pub timeout: Option<Duration>,
    /// Whether what landed is compared with what was sent.
    pub verify: bool,
}

/// Where a container is in its life.
enum Phase {
    Created,
    Connected(Box<Connected>),
    /// Why nothing moves any more.
    Failed(String),
}

/// One rank's weights, its plan and its state.
pub struct Container {
    label: String,
    device: Arc<dyn Device>,
    /// Whether the device follows the memory.
    own_device: bool,
    host: u64,
    relays: bool,
    staging: u64,
    staging_at: Option<Mem>,
    threads: usize,
    timeout: Duration,
    comm: Option<Arc<dyn Comm>>,
    control: Arc<Control>,
    layout: Layout,
    mems: Vec<Mem>,
    /// Where they lay when they were bound.
    ground: Ground,
    spec: Option<FromSpec>,
    local: Local,
    /// How often this rank was bound to addresses.
    binding: u64,
    imported: BTreeMap<u32, (u64, Table)>,
    phase: Phase,
    /// Of the last connect that came so far.
    former: Option<Arc<Planned>>,
    params: Mutex<Vec<ParamState>>,
    stats: Mutex<Stats>,
    /// The sync that is on its stream.
    flight: Mutex<Option<Flight>>,
    /// How the last flight broke the container.
    broken: Mutex<Option<Broken>>,
    /// What stuck syncs use.
    wrecks: Vec<Wreck>,
    /// What graphs use that have captured syncs of connections that failed.
    graphs: Vec<Connected>,
}

/// The end of a connection.
struct Broken {
    why: String,
    /// What may still run.
    stuck: Option<Stuck>,
}

impl Container {
    /// Local. `mems[i]` is the memory of row i of the layout's buffers; `spec` is where the layout comes from, if it was not given.
    pub fn new(config: Config, layout: Layout, mems: Vec<Mem>, spec: Option<FromSpec>) -> Result<Container> {
        let own_device = config.device.is_none();
        let device = config.device.map_or_else(|| own(&layout, &mems), Ok)?;
        check_memory(&*device, &layout, &mems)?;
        check_staging(&*device, config.staging_at, &mems)?;
        let control = Arc::new(Control::default());
        control.set_comm(config.comm.clone());
        let ground = Ground::new(&*device, &mems, config.staging_at)?;
        let local = plan_local(&layout)?;
        Ok(Container {
            label: config.label,
            device,
            own_device,
            host: config.host_id.unwrap_or_else(host::host_id),
            relays: config.relays,
            staging: config.staging,
            staging_at: config.staging_at,
            threads: config.threads.max(1),
            timeout: config.timeout,
            comm: config.comm,
            control,
            params: Mutex::new(vec![ParamState::default(); layout.buffers().len()]),
            local,
            layout,
            mems,
            ground,
            spec,
            binding: 1,
            imported: BTreeMap::new(),
            phase: Phase::Created,
            former: None,
            stats: Mutex::default(),
            flight: Mutex::default(),
            broken: Mutex::default(),
            wrecks: vec![],
            graphs: vec![],
        })
    }

    /// What may be used beside a call in progress.
    pub fn control(&self) -> Arc<Control> {
        self.control.clone()
    }

    /// What the log lines and errors of its calls bear; the C interface adds it.
    pub fn label(&self) -> &str {
        &self.label
    }

    /// Another communicator; the next call must be [`Container::connect`].
    pub fn set_comm(&mut self, comm: Arc<dyn Comm>) -> Result<()> {
        self.settled()?;
        self.disconnect(Phase::Created);
        self.imported.clear();
        self.control.set_comm(Some(comm.clone()));
        self.comm = Some(comm);
        Ok(())
    }

    /// This rank's tables as bytes.
    pub fn export(&self) -> Result<Vec<u8>> {
        Table::of(&self.layout).encode(self.comm()?.rank())
    }

    /// Another rank's tables (or this rank's: checked). Once all ranks have all tables, connect exchanges none.
    pub fn import(&mut self, blob: &[u8]) -> Result<()> {
        self.settled()?;
        if self.spec.is_some() {
            bail!(RS_ERR_STATE, "this rank is described by a world spec: there are no tables to import");
        }
        let comm = self.comm()?;
        let (digest, (rank, table)) = (Table::head(blob)?.1, Table::decode(blob)?);
        if rank >= comm.world() {
            bail!(RS_ERR_INVALID, "a table of rank {rank}, but the communicator has {} ranks", comm.world());
        }
        if rank == comm.rank() && table != Table::of(&self.layout) {
            bail!(RS_ERR_MISMATCH, "the table of rank {rank} is not the one that this rank has");
        }
        self.imported.insert(rank, (digest, table));
        self.disconnect(Phase::Created);
        Ok(())
    }

    /// Other memory. With the same boxes, on the same device, a local call: plans stay, the next sync tells the others the addresses.
    /// With others every rank rebinds or not as it likes, and all connect.
    pub fn rebind(&mut self, layout: Layout, mems: Vec<Mem>, spec: Option<FromSpec>) -> Result<()> {
        self.settled()?;
        let mut device = self.device.clone();
        // Pinned memory is for the GPU that it names, though every GPU reaches it.
        if self.own_device && !mems.is_empty() && device.id() != home(mems.iter().map(|m| m.kind())) {
            device = own(&layout, &mems)?;
        }
        check_memory(&*device, &layout, &mems)?;
        check_staging(&*device, self.staging_at, &mems)?;
        let ground = Ground::new(&*device, &mems, self.staging_at)?;
        let local = plan_local(&layout)?;
        let params = self.carried(&layout);
        let digest = |s: &Option<FromSpec>| s.as_ref().map(|s| s.world.spec.digest);
        let moved = device.id() != self.device.id();
        if moved || !self.layout.same_boxes(&layout) || digest(&self.spec) != digest(&spec) {
            self.imported.clear();
            self.disconnect(Phase::Created);
        }
        if let Phase::Connected(connected) = &mut self.phase {
            connected.let_go();
        }
        self.graphs.clear();
        *held(&mut self.params) = params;
        self.binding += 1;
        (self.device, self.layout, self.mems, self.ground, self.spec, self.local) = (device, layout, mems, ground, spec, local);
        Ok(())
    }

    /// The tables, buffers in row order.
    pub fn layout(&self) -> &Layout {
        &self.layout
    }

    /// The target of that name, else the source.
    pub fn param(&self, name: &str) -> Result<Param> {
        let mut found: Vec<usize> = vec![];
        for role in [RS_TARGET, RS_SOURCE] {
            let buffers = self.layout.buffers().iter().enumerate();
            found.extend(buffers.filter(|(_, b)| b.role & role != 0 && b.name == name).map(|(i, _)| i));
            if !found.is_empty() {
                break;
            }
        }
        let param = match found[..] {
            [] => bail!(RS_ERR_NOT_FOUND, "no parameter '{name}' on this rank"),
            [row] => self.param_at(row)?,
            _ => bail!(RS_ERR_AMBIGUOUS, "{} parameters have the name '{name}'; use rs_get_param_at()", found.len()),
        };
        if param.state == RS_PARAM_TORN {
            bail!(
                RS_ERR_TORN,
                "parameter '{name}' is torn: a sync failed while it was written; sync again, or look at it with rs_get_param_at()"
            );
        }
        Ok(param)
    }

    /// The buffer of row `index`, whatever its state.
    pub fn param_at(&self, index: usize) -> Result<Param> {
        let params = lock(&self.params);
        match params.get(index) {
            Some(s) => Ok(Param { buffer: index, state: s.state, version: s.version }),
            None => bail!(RS_ERR_NOT_FOUND, "parameter {index}: this rank has {}", params.len()),
        }
    }

    /// What is known of the memory of another layout: what was torn stays torn, whatever it is called now; the same buffer keeps its
    /// state.
    fn carried(&self, layout: &Layout) -> Vec<ParamState> {
        let params = lock(&self.params);
        layout.buffers().iter().map(|b| self.carried_by(b, &params)).collect()
    }

    fn carried_by(&self, new: &Buffer, params: &[ParamState]) -> ParamState {
        let mut state = ParamState::default();
        for (old, known) in self.layout.buffers().iter().zip(params) {
            if known.state == RS_PARAM_TORN && old.addr < new.addr + new.bytes && new.addr < old.addr + old.bytes {
                return ParamState { state: RS_PARAM_TORN, version: 0 };
            }
            if (&old.name, old.addr, old.bytes, old.role) == (&new.name, new.addr, new.bytes, new.role) {
                state = *known;
            }
        }
        state
    }

    fn comm(&self) -> Result<Arc<dyn Comm>> {
        self.comm.clone().ok_or_else(|| err!(RS_ERR_STATE, "the container has no communicator; call rs_container_set_comm()"))
    }
}

impl Drop for Container {
    fn drop(&mut self) {
        let mut waited = false;
        if let (Phase::Connected(c), Some(mut flight)) = (&self.phase, held(&mut self.flight).take()) {
            flight.fail(err!(RS_ERR_ABORTED, "a container was destroyed while its sync was in progress"), c.signs.as_ref());
            if let Step::Failed { stuck, .. } = sync::finish(&mut flight, c.signs.as_ref()) {
                *held(&mut self.broken) = Some(Broken { why: String::new(), stuck });
            }
            waited = true;
        }
        self.break_off();
        // While all that they use is there.
        self.disconnect(Phase::Created);
        self.graphs.clear();
        // What a refused sync has left on a stream ends with what is before it there, as a rule soon.
        let until = Instant::now() + flight::LAST;
        while !waited && self.wrecks.iter().any(|wreck| wreck.stuck().goes_on()) && Instant::now() < until {
            std::thread::sleep(Duration::from_micros(100));
        }
        self.wrecks.clear();
    }
}

/// Nothing under these locks is left half done, so a panic elsewhere does not make it wrong.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The same where nobody else can hold it.
fn held<T>(mutex: &mut Mutex<T>) -> &mut T {
    mutex.get_mut().unwrap_or_else(PoisonError::into_inner)
}

/// The library's own device for this memory.
fn own(layout: &Layout, mems: &[Mem]) -> Result<Arc<dyn Device>> {
    let first = layout.buffers().iter().find(|b| b.device_type != RS_DEVICE_CPU);
    for_memory(mems.iter().map(|m| m.kind())).map_err(|e| match first {
        Some(b) => e.context(format_args!("buffer '{}'", b.name)),
        None => e,
    })
}

/// The caller's staging lies on the device, beside all weights.
fn check_staging(device: &dyn Device, staging: Option<Mem>, mems: &[Mem]) -> Result<()> {
    let Some(staging) = staging else { return Ok(()) };
    if staging.kind() != device.id() {
        let (kind, id) = staging.kind();
        bail!(RS_ERR_UNSUPPORTED, "config.staging is on device (type {kind}, id {id}), the weights are now on '{}'", device.name());
    }
    device.reach(staging).map_err(|e| e.context("config.staging"))?;
    let end = |m: &Mem| m.addr() + m.len();
    if mems.iter().any(|m| m.addr() < end(&staging) && staging.addr() < end(m)) {
        bail!(RS_ERR_INVALID, "config.staging overlaps a buffer: it needs memory of its own");
    }
    Ok(())
}

/// Every buffer lies on the device, and in the memory given for it.
fn check_memory(device: &dyn Device, layout: &Layout, mems: &[Mem]) -> Result<()> {
    for (buffer, mem) in layout.buffers().iter().zip(mems) {
        if !device.holds(mem.kind()) {
            let (kind, id) = device.id();
            bail!(
                RS_ERR_UNSUPPORTED,
                "buffer '{}' is on device (type {}, id {}), the container's device '{}' is (type {kind}, id {id})",
                buffer.name,
                buffer.device_type,
                buffer.device_id,
                device.name()
            );
        }
        if (mem.addr() as u64, mem.len() as u64, mem.kind()) != (buffer.addr, buffer.bytes, (buffer.device_type, buffer.device_id))
        {
            bail!(RS_ERR_INTERNAL, "buffer '{}' and its memory differ", buffer.name);
        }
        device.reach(*mem).map_err(|e| e.context(format_args!("buffer '{}'", buffer.name)))?;
    }
    if layout.buffers().len() != mems.len() {
        bail!(RS_ERR_INTERNAL, "{} buffers with {} blocks of memory", layout.buffers().len(), mems.len());
    }
    Ok(())
}
