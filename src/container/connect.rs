//! What ranks agree on before they plan, and the plan.
#![forbid(unsafe_code)]

use super::flight::{Stuck, Turn};
use super::ground::Ground;
use super::planned::{Basis, Planned, agreed, same_spec};
use super::sync::give_up;
use super::{Container, Phase, held};
use crate::abi::*;
use crate::comm::{Access, Comm, Deadline, Group, Kept, Window, Windows};
use crate::device::{Copies, Mem};
use crate::error::{Error, Result, bail, err, is_error};
use crate::exec::Staging;
use crate::exec::batches::{Batches, Places};
use crate::exec::signs::Signs;
use crate::exec::work::{Reads, Ways, Work, build, offer};
use crate::plan::parts::Part;
use crate::plan::rounds::{CRUMB, LEAST_MESSAGE, message_size};
use crate::plan::route::relay_piece;
use crate::plan::{PLANNER_VERSION, Peer, Piece, Place, Plan};
use crate::wire::{Outcome, Record, Table, WIRE_VERSION};
use std::collections::HashSet;
use std::sync::Arc;
use std::time::Instant;
use xxhash_rust::xxh3::xxh3_64;

/// Longest table of a rank in bytes: tens of millions of tiles.
const LONGEST_TABLE: u64 = 1 << 30;

/// Bytes of each rank's table that are gathered at once.
const SLICE: usize = 1 << 20;

/// Everything that holds from one connect to the next.
pub(super) struct Connected {
    pub planned: Arc<Planned>,
    /// What each rank said of itself.
    pub records: Vec<Record>,
    /// What this rank holds as source and as target, once it was asked for.
    pub parts: [Option<Vec<Part>>; 2],
    /// Equal on all ranks.
    pub digest: u64,
    /// Bytes of a message.
    pub message: u64,
    /// The binding of each rank whose addresses we know.
    pub bindings: Vec<u64>,
    /// Whether a sync is put on streams, on all ranks alike.
    pub streams: bool,
    /// Whether no rank exchanges weights with another.
    pub alone: bool,
    /// Words that streams wait for, where ranks read each other's memory.
    pub signs: Option<Signs>,
    /// What a refused sync has left on a stream: a write of words.
    pub tail: Option<Stuck>,
    /// Whether a graph repeats the copies.
    pub captured: bool,
    /// Syncs so far whose header was gathered: equal on all ranks.
    pub number: u64,
    pub links: Links,
    /// See [`Container::used`]: of a sync of everything.
    pub used: Vec<bool>,
    /// What other processes have open of this rank's.
    pub lent: Ground,
    pub ready: Ready,
    /// Of the last subset, by its digest.
    pub subset: Option<(u64, Ready)>,
}

/// What a sync does on this rank, with the lists of a device that wants them ready.
#[derive(Default)]
pub(super) struct Ready {
    pub work: Work,
    pub batches: Option<Batches>,
    /// What the communicator has made ready for messages: goes before the staging does, which is a part of it.
    pub registered: Option<Kept>,
    /// For the messages of a group.
    pub staging: Option<Arc<Staging>>,
}

impl Ready {
    /// Where its staging lies, if it needs some.
    pub fn staging(&self) -> Option<Mem> {
        self.staging.as_ref().and_then(|staging| staging.mem())
    }
}

impl Connected {
    /// Lets go what the communicator has made ready: the memory is about to be its owner's again.
    pub fn let_go(&mut self) {
        self.ready.registered = None;
        self.subset = None;
    }

    /// The copies of a sync of the last subset, or of everything.
    pub fn chosen(&self, subset: bool) -> &Ready {
        match &self.subset {
            Some((_, ready)) if subset => ready,
            _ => &self.ready,
        }
    }

    /// Every tensor's copies.
    pub fn work(&self) -> &Work {
        &self.ready.work
    }
}

/// Windows of the ranks that we read from, in the order of `opened`, and what our readers made of ours. See `exec::work::Reads`.
#[derive(Default)]
pub(super) struct Links {
    pub windows: Vec<Vec<Window>>,
    pub opened: Vec<(u32, Vec<u32>, Vec<Access>)>,
    pub granted: Vec<(u32, Vec<u32>, Vec<Access>)>,
    /// What keeps windows open.
    pub kept: Vec<Kept>,
}

impl Container {
    /// Collective: agrees, exchanges tables, plans. Also after a failure, with a communicator that works.
    pub fn connect(&mut self) -> Result<()> {
        self.settled()?;
        let comm = self.comm()?;
        let _turn = Turn::take(&comm)?;
        self.disconnect(Phase::Created);
        self.graphs.clear();
        self.control.started();
        let begun = Instant::now();
        let result = self.agree(&*comm, Deadline::after(self.timeout));
        self.control.ended(&result.as_ref().map(|_| ()).map_err(Error::clone));
        match result {
            Ok(connected) => {
                let (sent, received) = connected.planned.plan.wire_bytes();
                log::info!(
                    "rank {} of {} connected over {}: {} tensors in all, {} peers, sends {sent} and receives {received} bytes a \
                     sync in messages of {} bytes",
                    comm.rank(),
                    comm.world(),
                    comm.name(),
                    connected.planned.union.tensors.len(),
                    connected.planned.plan.peers.len(),
                    connected.message
                );
                let stats = held(&mut self.stats);
                stats.connect_seconds = begun.elapsed().as_secs_f64();
                stats.failure = None;
                self.phase = Phase::Connected(Box::new(connected));
                Ok(())
            }
            Err(e) => {
                log::error!("connect failed: {e}");
                if e.status() <= RS_ERR_TIMEOUT {
                    self.phase = Phase::Failed(e.text().to_string());
                }
                Err(e)
            }
        }
    }

    fn agree(&mut self, comm: &dyn Comm, deadline: Deadline) -> Result<Connected> {
        let (me, world) = (comm.rank(), comm.world());
        if me >= world {
            bail!(RS_ERR_COMM, "the communicator says rank {me} of {world}");
        }
        // With a world spec nobody needs to be told.
        let own = if self.spec.is_some() { None } else { Some(Table::of(&self.layout)) };
        let blob = own.as_ref().map_or(Ok(vec![]), |own| own.encode(me))?;
        let record = Record {
            wire: WIRE_VERSION,
            planner: PLANNER_VERSION,
            rank: me,
            world,
            host: self.host,
            device: self.device.uuid(),
            pid: std::process::id(),
            big_endian: cfg!(target_endian = "big"),
            imported: (0..world).all(|r| r == me || self.imported.contains_key(&r)),
            streams: [self.on_streams(comm), !self.mems.is_empty() && !self.on_streams(comm)],
            relays: self.relays && comm.group().is_some(),
            staging: self.staging,
            table_len: blob.len() as u64,
            table_digest: if own.is_some() { Table::head(&blob)?.1 } else { 0 },
            binding: self.binding,
            spec: self.spec.as_ref().map_or(0, |s| s.world.spec.digest),
            variants: self.spec.as_ref().map_or([0; 2], |s| s.world.variants.words()),
        };
        let all = comm.allgather(&record.encode(), deadline).map_err(|e| give_up(comm, e))?;
        let records: Vec<Record> = (0..world)
            .zip(all.chunks_exact(Record::LEN))
            .map(|(rank, bytes)| Record::decode(bytes, rank, world, PLANNER_VERSION))
            .collect::<Result<_>>()?;
        same_spec(&records)?;
        let tables = own.map(|own| self.tables(comm, own, blob, &records, deadline)).transpose()?;

        let begun = Instant::now();
        let places: Vec<Place> = records.iter().map(|r| Place { host: r.host, device: r.device, relays: r.relays }).collect();
        let staging = records.iter().map(|r| r.staging).min().unwrap_or(0);
        let basis = Basis::of(&records);
        let former = self.former.as_ref().filter(|former| former.basis == basis).cloned();
        let made = former.is_none();
        let planned = self.movable(comm).and_then(|()| match (former, &self.spec, tables) {
            (Some(former), _, Some(tables)) => tables.map(|_| former),
            (Some(former), _, None) => Ok(former),
            (None, Some(spec), _) => {
                let world = agreed(me, &records, spec)?;
                Planned::of_spec(me, &places, staging, world, spec, basis).map(Arc::new)
            }
            (None, None, Some(tables)) => Planned::of_tables(me, &places, staging, tables?, basis).map(Arc::new),
            (None, None, None) => Err(err!(RS_ERR_INTERNAL, "neither tables nor a spec")),
        });
        let planned = planned.and_then(|p| self.convertible(&p.plan).map(|()| p));
        let planned = planned.and_then(|p| self.lendable(comm, &p.plan).map(|()| p));
        let stats = held(&mut self.stats);
        (stats.plan_seconds, stats.plans) = (begun.elapsed().as_secs_f64(), stats.plans + u64::from(made));
        let peers = agree_outcome(comm, planned.as_ref().map(|p| (p.plan.channels(), p.union.digest)), deadline)?;
        let planned = planned?;
        self.former = Some(planned.clone());

        let mut message = message_size(staging, peers.into());
        if comm.group().is_none() {
            message = through_pipe(comm, message);
        }
        if message < LEAST_MESSAGE {
            bail!(
                RS_ERR_INVALID,
                "staging_bytes {staging} (the least of all ranks) is too small: a rank with {peers} peers needs at least {}",
                4 * u64::from(peers) * LEAST_MESSAGE
            );
        }
        // All ranks see the same places, so all come to the same end where some relay.
        if message < relay_piece(staging) && places.iter().any(|p| p.relays) {
            bail!(
                RS_ERR_INVALID,
                "staging_bytes {staging} (the least of all ranks) is too small for ranks that relay (RS_CONFIG_RELAY): with {peers} channels \
                 of a rank it needs at least {}",
                4 * u64::from(peers) * relay_piece(staging)
            );
        }
        let mut hashed: Vec<u8> = [planned.union.digest, message].iter().flat_map(|v| v.to_le_bytes()).collect();
        hashed.extend(records.iter().flat_map(|r| [r.table_digest, r.variants[0], r.variants[1]]).flat_map(u64::to_le_bytes));
        let mut out = Connected {
            planned,
            digest: xxh3_64(&hashed),
            message,
            bindings: records.iter().map(|r| r.binding).collect(),
            streams: records.iter().any(|r| r.streams[0]) && !records.iter().any(|r| r.streams[1]),
            records,
            parts: [None, None],
            alone: peers == 0,
            signs: None,
            tail: None,
            captured: false,
            number: 0,
            links: Links::default(),
            used: vec![],
            lent: Ground::default(),
            ready: Ready::default(),
            subset: None,
        };
        // Others wait for this rank in there, so a failure ends the communicator rather than being agreed on.
        self.open(comm, &mut out, deadline).map_err(|e| give_up(comm, e))?;
        if out.streams {
            out.signs = self.signs(comm, &out.planned.plan, deadline).map_err(|e| give_up(comm, e))?;
        } else if self.device.id().0 != RS_DEVICE_CPU {
            log::info!("rank {me}: not all ranks can wait for each other's streams; each sync waits for its stream itself");
        }
        agree_outcome(comm, Ok((0, 0)), deadline)?;
        Ok(out)
    }

    /// Whether this rank can put a whole sync on a stream.
    fn on_streams(&self, comm: &dyn Comm) -> bool {
        let ordered =
            if comm.windows().is_some() { self.device.signals().is_some() } else { comm.group().is_some_and(Group::on_streams) };
        ordered && comm.later().is_some() && matches!(self.device.copies(), Copies::Prepared(_))
    }

    /// Words between this rank and those that it exchanges weights with. Collective between them.
    fn signs(&self, comm: &dyn Comm, plan: &Plan, deadline: Deadline) -> Result<Option<Signs>> {
        let Some(windows) = comm.windows() else { return Ok(None) };
        let ranks = |has: fn(&Peer) -> bool| plan.peers.iter().filter(|p| has(p)).map(|p| p.rank).collect::<Vec<_>>();
        let (readers, owners) = (ranks(|p| !p.out.is_empty()), ranks(|p| !p.into.is_empty()));
        if readers.is_empty() && owners.is_empty() {
            return Ok(None);
        }
        Signs::new(&self.device, comm, windows, [&readers, &owners], deadline).map(Some)
    }

    /// Whether the communicator can move this device's memory.
    fn movable(&self, comm: &dyn Comm) -> Result<()> {
        if let Some(wanted) = comm.device().filter(|&d| !self.mems.is_empty() && d != self.device.id()) {
            bail!(
                RS_ERR_UNSUPPORTED,
                "communicator '{}' moves memory of device (type {}, id {}), the container's device is '{}'; host memory goes through a \
                 GPU where it is pinned and bound as RS_DEVICE_CUDA_HOST ({RS_DEVICE_CUDA_HOST}) of that GPU",
                comm.name(),
                wanted.0,
                wanted.1,
                self.device.name()
            );
        }
        Ok(())
    }

    /// An error if memory is gone that others are to open.
    fn lendable(&self, comm: &dyn Comm, plan: &Plan) -> Result<()> {
        if comm.windows().is_none() {
            return Ok(());
        }
        let mut used = vec![false; self.mems.len() + 1];
        plan.peers.iter().flat_map(|p| &p.out).for_each(|p| used[p.src.buffer as usize] = true);
        self.ground.check(&*self.device, &used, |row| self.buffer_name(row))
    }

    /// Whether the device can do what the targets want of values.
    fn convertible(&self, plan: &Plan) -> Result<()> {
        if self.device.converts() {
            return Ok(());
        }
        let mut pieces = self.local.pieces.iter().chain(plan.peers.iter().flat_map(|p| &p.into));
        match pieces.find(|p| p.convert.is_some()) {
            Some(p) => bail!(
                RS_ERR_UNSUPPORTED,
                "target '{}' has another dtype than its source, or a transform, and {} does not convert (rs_device_t.flags has no \
                 RS_DEVICE_CONVERTS)",
                self.layout.buffers()[p.dst.buffer as usize].name,
                self.device.name()
            ),
            None => Ok(()),
        }
    }

    /// Every rank's table, in rank order: imported, or exchanged now. The outer error ends the communicator, the inner one is this
    /// rank's opinion.
    pub(super) fn tables(
        &self,
        comm: &dyn Comm,
        own: Table,
        blob: Vec<u8>,
        records: &[Record],
        deadline: Deadline,
    ) -> Result<Result<Vec<Table>>> {
        let me = comm.rank();
        if records.iter().all(|r| r.imported) {
            let table = |(rank, record): (u32, &Record)| match self.imported.get(&rank) {
                _ if rank == me => Ok(own.clone()),
                Some((digest, table)) if *digest == record.table_digest => Ok(table.clone()),
                _ => Err(err!(
                    RS_ERR_MISMATCH,
                    "the imported table of rank {rank} is not the one that it has: export and import it again"
                )),
            };
            return Ok((0..).zip(records).map(table).collect());
        }
        if let Some(rank) = records.iter().position(|r| r.table_len > LONGEST_TABLE) {
            let len = records[rank].table_len;
            bail!(RS_ERR_MISMATCH, "rank {rank} announces a table of {len} bytes; at most {LONGEST_TABLE} are possible");
        }
        let longest = records.iter().map(|r| r.table_len).max().unwrap_or(0) as usize;
        let mut blobs: Vec<Vec<u8>> = vec![vec![]; records.len()];
        for from in (0..longest).step_by(SLICE) {
            // All ranks send slices of one length, zeros beyond the end of theirs.
            let mut slice = blob.get(from..).map_or(&[][..], |rest| &rest[..rest.len().min(SLICE)]).to_vec();
            slice.resize((longest - from).min(SLICE), 0);
            let all = comm.allgather(&slice, deadline).map_err(|e| give_up(comm, e))?;
            for ((have, record), slice) in blobs.iter_mut().zip(records).zip(all.chunks_exact(slice.len())) {
                let missing = record.table_len as usize - have.len();
                have.extend_from_slice(&slice[..missing.min(slice.len())]);
            }
        }
        let names: HashSet<&str> = own.tensors.iter().map(|t| t.name.as_str()).collect();
        let table = |(rank, bytes): (u32, Vec<u8>)| {
            let (from, mut table) =
                Table::decode(&bytes).map_err(|e| e.context(format_args!("the table that rank {rank} sent")))?;
            if from != rank {
                bail!(RS_ERR_MISMATCH, "rank {rank} sent the table of rank {from}");
            }
            // Only rows that may meet this rank's own are kept; their order, which is all that plans use of it, stays.
            let Table { tensors, tiles, .. } = &mut table;
            tiles.retain(|t| names.contains(tensors[t.tensor as usize].name.as_str()));
            tiles.shrink_to_fit();
            Ok(table)
        };
        Ok((0..).zip(blobs).map(table).collect())
    }

    /// Opens windows and channels and lists the copies. Collective between the ranks that exchange weights.
    pub(super) fn open(&self, comm: &dyn Comm, c: &mut Connected, deadline: Deadline) -> Result<()> {
        c.subset = None;
        c.links = Links::default();
        if let Some(windows) = comm.windows() {
            let mut offers = vec![];
            let mut rows = vec![];
            let mut owners = vec![];
            let mut wanted = vec![];
            let plain = |list: &[Piece]| list.iter().any(|p| p.stream.is_none());
            for peer in c.planned.plan.peers.iter().filter(|p| windows.covers(p.rank)) {
                if plain(&peer.out) {
                    let row = offer(&peer.out);
                    offers.push((peer.rank, row.iter().map(|&b| self.mems[b as usize]).collect()));
                    rows.push((peer.rank, row));
                }
                if plain(&peer.into) {
                    owners.push(peer.rank);
                    wanted.push(offer(&peer.into));
                }
            }
            let opened = windows.exchange(&offers, &owners, deadline)?;
            for ((reader, row), access) in rows.into_iter().zip(opened.granted) {
                if access.contains(&Access::Sent) {
                    self.sendable().map_err(|e| e.context(format_args!("weights for rank {reader}")))?;
                }
                c.links.granted.push((reader, row, access));
            }
            let elsewhere = c.links.granted.iter().filter(|granted| windows.elsewhere(granted.0));
            let lent = elsewhere.flat_map(|(_, row, access)| row.iter().zip(access).filter(|(_, a)| **a == Access::Mapped));
            let mut lent: Vec<u32> = lent.map(|(&row, _)| row).collect();
            lent.sort_unstable();
            lent.dedup();
            c.lent = Ground::lent(&*self.device, &self.mems, &lent)?;
            for ((owner, row), mut list) in owners.into_iter().zip(wanted).zip(opened.windows) {
                if list.len() != row.len() {
                    bail!(RS_ERR_PEER, "rank {owner} offered {} buffers where the plan reads {}", list.len(), row.len());
                }
                for window in &mut list {
                    self.reach(windows, window, &mut c.links.kept)
                        .map_err(|e| e.context(format_args!("weights of rank {owner}")))?;
                }
                c.links.opened.push((owner, row, list.iter().map(Window::access).collect()));
                c.links.windows.push(list);
            }
        }
        c.ready = self.ready(comm, c, None, deadline)?;
        c.used = self.used(c, None);
        if let Some(pipe) = comm.pipe() {
            let lanes = &c.work().lanes;
            let to: Vec<u32> = lanes.iter().filter(|l| !l.out.is_empty()).map(|l| l.peer).collect();
            let from: Vec<u32> = lanes.iter().filter(|l| !l.into.is_empty()).map(|l| l.peer).collect();
            pipe.open(&to, &from, deadline)?;
        }
        Ok(())
    }

    /// Makes sure that our device can read another rank's memory; what that opens is kept open by what `kept` gets.
    fn reach(&self, windows: &dyn Windows, window: &mut Window, kept: &mut Vec<Kept>) -> Result<()> {
        match window {
            Window::Exported(export) => {
                let (mem, open) = self.device.import(export)?;
                *window = Window::Mapped(mem);
                kept.push(open);
                Ok(())
            }
            Window::Mapped(mem) => {
                let (kind, id) = mem.kind();
                let shared = if kind == RS_DEVICE_CPU && self.device.id().0 != kind { windows.mapping(*mem)? } else { None };
                if let Some((shared, mapping)) = shared {
                    // In this order: what is pinned goes before the mapping does.
                    kept.push(Arc::new((self.device.register(shared)?, mapping)));
                    return Ok(());
                }
                // Of another device of that type perhaps.
                if !self.device.holds((kind, self.device.id().1)) {
                    bail!(
                        RS_ERR_UNSUPPORTED,
                        "they are in memory of device (type {kind}, id {id}), which '{}' cannot read; host memory that a GPU reads \
                         must be pinned and bound as RS_DEVICE_CUDA_HOST ({RS_DEVICE_CUDA_HOST}), or, of another process, from rs_mem_alloc()",
                        self.device.name()
                    );
                }
                self.device.reach(*mem)
            }
            _ => self.sendable(),
        }
    }

    /// Whether what cannot be mapped can be sent through the communicator's memory.
    fn sendable(&self) -> Result<()> {
        if self.device.id().0 != RS_DEVICE_CPU {
            bail!(
                RS_ERR_UNSUPPORTED,
                "'{}' moves through memory that processes share: a GPU's from cudaMalloc() (or mapped with handles for other processes), \
                 or the host's from rs_mem_alloc(); use these, or rs_comm_from_nccl()",
                self.device.name()
            );
        }
        Ok(())
    }

    /// The copies of all tensors, or of those marked (by ordinal). Collective between the ranks that exchange messages in groups.
    pub(super) fn ready(&self, comm: &dyn Comm, c: &Connected, subset: Option<&[bool]>, deadline: Deadline) -> Result<Ready> {
        let accept = |ordinal: u32| subset.is_none_or(|s| s[ordinal as usize]);
        let accept_local = |row: u32| accept(c.planned.ordinals[row as usize]);
        let message = through_pipe(comm, c.message);
        let reads = comm.windows().map(|windows| Reads { windows, granted: &c.links.granted, opened: &c.links.opened, message });
        // Other memory than the device's own is host memory, which the communicator need not take.
        let direct = |row: u32| self.mems[row as usize].kind() == self.device.id();
        let scatters = comm.group().is_some_and(|group| group.scatters());
        let ways = Ways { reads, direct: &direct, message: c.message, scatters };
        let work = build(&c.planned.plan, &self.local, &accept_local, &accept, &ways);
        if let Some(rounds) = &work.group {
            rounds.check()?;
        }
        // Of everything, where this is a subset: the two never run at the same time.
        let other = Some(&c.ready).filter(|_| subset.is_some());
        let bytes = work.group.as_ref().map_or(0, |g| g.staging());
        let suffices = |s: &Arc<Staging>| s.mem().map_or(0, Mem::len) as u64 >= bytes;
        let staging = match other.and_then(|o| o.staging.clone()).filter(suffices) {
            Some(staging) => staging,
            None => Arc::new(Staging::new(self.device.clone(), bytes, self.staging_at)?),
        };
        let places = Places { mems: &self.mems, windows: &c.links.windows, staging: staging.mem() };
        let batches = Batches::new(&self.device, places, &work, other.and_then(|o| o.batches.as_ref()), c.streams)?;
        let registered = match (&work.group, comm.group()) {
            (Some(rounds), Some(group)) => {
                let own = rounds.direct().into_iter().map(|row| places.mem(row));
                let mems: Vec<Mem> = own.chain(staging.mem().map(Ok)).collect::<Result<_>>()?;
                let [to, from] = rounds.peers();
                group.register(&mems, &to, &from, deadline)?
            }
            _ => None,
        };
        Ok(Ready { work, batches, registered, staging: Some(staging) })
    }
}

/// What of messages of this size fits into those of the communicator's own memory, if it has some.
fn through_pipe(comm: &dyn Comm, message: u64) -> u64 {
    comm.pipe().map_or(message, |pipe| message.min(pipe.capacity() as u64 / CRUMB * CRUMB))
}

/// Gathers how a step went on all ranks. An error of one is an error on all, with its text. Gives the most peers of any rank.
pub(super) fn agree_outcome(comm: &dyn Comm, own: std::result::Result<(u32, u64), &Error>, deadline: Deadline) -> Result<u32> {
    let text = own.err().map_or("", |e| e.text());
    let (peers, union) = own.unwrap_or((0, 0));
    let status = own.err().map_or(RS_OK, |e| e.status());
    let mine = Outcome { status, peers, union, text_len: text.len() as u32 };
    let all = comm.allgather(&mine.encode(), deadline).map_err(|e| give_up(comm, e))?;
    let all: Vec<Outcome> = all.chunks_exact(Outcome::LEN).map(Outcome::decode).collect();
    if all.iter().all(|o| o.status == RS_OK) {
        if let Some(rank) = all.iter().position(|o| o.union != all[0].union) {
            bail!(RS_ERR_MISMATCH, "ranks 0 and {rank} see different unions of logical tensors: their tables changed under way");
        }
        return Ok(all.iter().map(|o| o.peers).max().unwrap_or(0));
    }
    let longest = all.iter().map(|o| o.text_len).max().unwrap_or(0).min(4096) as usize;
    let mut padded = text.as_bytes()[..text.len().min(longest)].to_vec();
    padded.resize(longest.max(1), 0);
    let texts = comm.allgather(&padded, deadline).map_err(|e| give_up(comm, e))?;
    // The cause first: a rank that found the fault rather than one that heard of it.
    let failed: Vec<usize> = (0..all.len()).filter(|&r| all[r].status != RS_OK).collect();
    let text = |r: usize| {
        let bytes = &texts[r * longest.max(1)..][..(all[r].text_len as usize).min(longest)];
        format!("rank {r}: {}", String::from_utf8_lossy(bytes))
    };
    let more = if failed.len() > 1 { format!(" (and {} more ranks failed)", failed.len() - 1) } else { String::new() };
    let first = failed[0];
    let status = all[first].status;
    if !is_error(status) || all[first].text_len == 0 {
        bail!(RS_ERR_PEER, "rank {first} ends connect with status {status} and no reason{more}: it speaks another language");
    }
    Err(Error::new(status, format!("{}{more}", text(first))))
}
