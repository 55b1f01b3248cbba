//! One version of the weights, from the header to the agreement.
#![forbid(unsafe_code)]

use super::connect::{Connected, Ready};
use super::flight::{Flight, Step, Stuck, Turn, Wreck, mark};
use super::{Broken, Container, Phase, Sync, held, lock};
use crate::abi::*;
use crate::comm::{Comm, Deadline};
use crate::device::Stream;
use crate::error::{Error, Result, bail, err};
use crate::exec::batches::Places;
use crate::exec::scan::shown;
use crate::exec::signs::Signs;
use crate::exec::{Run, settle};
use crate::wire::{Call, Header};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};
use xxhash_rust::xxh3::xxh3_64;

impl Container {
    /// Collective: moves one version. `true`: every rank has landed it; `false`: it is on the stream, and [`Container::poll`] tells the
    /// end. `progress` hears (bytes done, bytes in all) of this rank, where the call waits for them.
    pub fn sync(&mut self, request: &Sync, progress: &mut dyn FnMut(u64, u64)) -> Result<bool> {
        let (mut connected, comm, turn) = self.begin()?;
        self.control.started();
        let result = if connected.streams {
            let put = self.put(&comm, &mut connected, request, turn);
            if request.verify { put.and_then(|()| self.landed(&*comm, &connected)).map(|()| true) } else { put.map(|()| false) }
        } else {
            let result = self.version(&*comm, &mut connected, request, progress);
            self.ended(format_args!("sync of version {}", request.version), &result, None);
            result.map(|()| true)
        };
        self.phase = Phase::Connected(connected);
        self.break_off();
        result
    }

    /// What a collective call of a connected container needs; the connection goes back into `phase` when it ends.
    pub(super) fn begin(&mut self) -> Result<(Box<Connected>, Arc<dyn Comm>, Turn)> {
        self.settled()?;
        let connected = match std::mem::replace(&mut self.phase, Phase::Created) {
            Phase::Connected(c) => c,
            Phase::Created => bail!(RS_ERR_STATE, "the container is not connected; call rs_container_connect() on every rank"),
            Phase::Failed(why) => {
                let e = err!(
                    RS_ERR_STATE,
                    "the container has failed ({why}); give it a communicator that works with rs_container_set_comm() and connect"
                );
                self.phase = Phase::Failed(why);
                return Err(e);
            }
        };
        match self.comm().and_then(|comm| Turn::take(&comm).map(|turn| (comm, turn))) {
            Ok((comm, turn)) => Ok((connected, comm, turn)),
            Err(e) => {
                self.phase = Phase::Connected(connected);
                Err(e)
            }
        }
    }

    /// How the last call stands, as [`super::Control::status`] tells it, after a look at the sync that is on its stream. Does not wait.
    pub fn poll(&self) -> Result<bool> {
        // Whoever else looks at it tells.
        let Ok(mut flight) = self.flight.try_lock() else { return Ok(false) };
        if let (Some(flying), Phase::Connected(c)) = (&mut *flight, &self.phase) {
            match flying.step(c.signs.as_ref()) {
                Step::Going => return Ok(false),
                over => self.conclude(c, flying, over),
            }
            *flight = None;
        }
        drop(flight);
        self.control.status()
    }

    /// What a sync came to: states of parameters, figures, the answer of poll.
    fn conclude(&self, c: &Connected, flight: &Flight, over: Step) {
        let version = flight.header.version;
        let (state, result, stuck) = match over {
            Step::Going => return,
            Step::Landed if flight.captured => (None, Ok(()), None),
            Step::Landed => {
                self.count(c, &*flight.comm, flight.subset.is_some(), version, flight.begun);
                (Some(RS_PARAM_SYNCED), Ok(()), None)
            }
            Step::Failed { error, landed: true, stuck } => (Some(RS_PARAM_LANDED), Err(error), stuck),
            Step::Failed { error, landed: false, stuck } => (flight.wrote.then_some(RS_PARAM_TORN), Err(error), stuck),
        };
        if let Some(state) = state {
            self.mark(c, flight.subset.as_deref(), state, version);
        }
        self.ended(format_args!("sync of version {version}"), &result, stuck);
    }

    /// The end of a call, for those who ask.
    pub(super) fn ended(&self, what: impl std::fmt::Display, result: &Result<()>, stuck: Option<Stuck>) {
        if let Err(e) = result {
            log::error!("{what} failed: {e}");
            lock(&self.stats).failure = Some(e.text().to_string());
            if e.status() <= RS_ERR_TIMEOUT {
                *lock(&self.broken) = Some(Broken { why: e.text().to_string(), stuck });
            }
        }
        self.control.ended(result);
    }

    /// An error while a sync is on its stream; what the last one left is taken over.
    pub(super) fn settled(&mut self) -> Result<()> {
        if let Some(flight) = held(&mut self.flight) {
            bail!(
                RS_ERR_STATE,
                "the sync of version {} is in progress: call rs_container_poll() until it says that it has ended",
                flight.header.version
            );
        }
        self.break_off();
        Ok(())
    }

    /// Ends the connection, if it broke.
    pub(super) fn break_off(&mut self) {
        let Some(Broken { why, stuck }) = held(&mut self.broken).take() else { return };
        if let (Phase::Connected(c), Some(stuck)) = (&mut self.phase, stuck) {
            c.tail = Some(stuck);
        }
        self.disconnect(Phase::Failed(why));
    }

    /// Leaves a connection; what streams or graphs still use of it stays.
    pub(super) fn disconnect(&mut self, next: Phase) {
        self.wrecks.retain(|wreck| !wreck.stuck().over());
        let Phase::Connected(mut c) = std::mem::replace(&mut self.phase, next) else { return };
        match c.tail.take().filter(|tail| !tail.over()) {
            Some(tail) => self.wrecks.push(Wreck::new(tail, c)),
            None if c.captured => self.graphs.push(*c),
            None => {}
        }
    }

    /// Lets the stream come behind what earlier syncs have left on others.
    fn behind(&self, c: &Connected, stream: Stream) -> Result<()> {
        self.wrecks.iter().map(Wreck::stuck).chain(&c.tail).filter(|left| !left.over()).try_for_each(|left| left.before(stream))
    }

    /// Figures of a sync that every rank has landed.
    fn count(&self, c: &Connected, comm: &dyn Comm, subset: bool, version: u64, begun: Instant) {
        let work = &c.chosen(subset).work;
        let mut s = lock(&self.stats);
        (s.version, s.bytes) = (version, work.bytes);
        s.rounds = work.group.as_ref().map_or(0, |g| g.rounds());
        s.staging_bytes = work.group.as_ref().map_or(0, |g| g.staging()) + comm.pipe().map_or(0, |p| p.bytes());
        s.seconds = begun.elapsed().as_secs_f64();
        s.syncs += 1;
        s.failure = None;
        log::debug!("version {version} in {:.3} s", s.seconds);
    }

    /// Puts one version on the stream. Fails only when nothing of it runs any more, unless it is stuck.
    fn put(&mut self, comm: &Arc<dyn Comm>, c: &mut Connected, request: &Sync, turn: Turn) -> Result<()> {
        let deadline = Deadline::after(request.timeout.unwrap_or(self.timeout));
        c.number += 1;
        let captured = self.capturing(c, request);
        let ready = captured.clone().and_then(|_| self.behind(c, request.stream));
        // Before the header: whoever has that, may let its stream wait for ours.
        let ready = ready.and_then(|()| c.signs.as_ref().map_or(Ok(()), |s| s.ready(request.stream, c.number)));
        let subset = ready.and_then(|()| self.subset(c, request));
        let subset = subset.and_then(|s| self.able(c, comm.rank(), s.as_deref(), request).map(|()| s));
        let header = self.header(c, request, &subset);
        let mut flight = Flight::new(&self.device, comm, request.stream, deadline, header, c.number, turn);
        // A stream that was refused has nothing of ours.
        let taken = captured.is_ok();
        flight.captured = captured.unwrap_or(false);
        // All ranks see the same headers: where one stops here, all do, and nothing has moved.
        let headers = gather(&**comm, &header, deadline).map_err(fatal);
        let agreed = headers.and_then(|h| subset.and_then(|s| compare(comm.rank(), &h, &header).map(|()| (h, s))));
        let put = match agreed {
            Err(e) if e.status() > RS_ERR_TIMEOUT => {
                if taken && c.signs.is_some() {
                    c.tail = Some(Stuck::on(&self.device, request.stream));
                }
                let refused = Err(e);
                self.ended(format_args!("sync of version {}", request.version), &refused, None);
                return refused;
            }
            Err(e) => Err(e),
            Ok((headers, subset)) => {
                flight.subset = subset;
                c.tail = None;
                c.captured |= flight.captured;
                self.take_off(c, &headers, &mut flight)
            }
        };
        let Err(error) = put else {
            *held(&mut self.flight) = Some(flight);
            self.control.took_off();
            return Ok(());
        };
        if flight.end.is_none() && taken && !flight.captured {
            flight.end = mark(&*self.device, request.stream);
            flight.stuck |= flight.end.is_none();
        }
        flight.fail(error, c.signs.as_ref());
        let over = finish(&mut flight, c.signs.as_ref());
        let error = match &over {
            Step::Failed { error, .. } => error.clone(),
            _ => err!(RS_ERR_INTERNAL, "a failed sync that landed"),
        };
        self.conclude(c, &flight, over);
        Err(error)
    }

    /// Waits for the sync that was put on the stream, and verifies it.
    fn landed(&mut self, comm: &dyn Comm, c: &Connected) -> Result<()> {
        let Some(mut flight) = held(&mut self.flight).take() else { return Ok(()) };
        let over = match finish(&mut flight, c.signs.as_ref()) {
            Step::Landed => match self.verify(comm, c, flight.subset.as_deref(), flight.deadline) {
                Ok(()) => Step::Landed,
                Err(error) => {
                    let corrupt = error.status() == RS_ERR_CORRUPT;
                    flight.wrote |= corrupt;
                    Step::Failed { error, landed: !corrupt, stuck: None }
                }
            },
            over => over,
        };
        let result = match &over {
            Step::Failed { error, .. } => Err(error.clone()),
            _ => Ok(()),
        };
        self.conclude(c, &flight, over);
        result
    }

    /// Everything from the header to the mark at its end on the stream.
    fn take_off(&mut self, c: &mut Connected, headers: &[Header], flight: &mut Flight) -> Result<()> {
        let comm = flight.comm.clone();
        self.arrange(&*comm, c, headers, &flight.header, flight.subset.as_deref(), flight.deadline)?;
        let ready = c.chosen(flight.subset.is_some());
        let Ready { work, batches, .. } = ready;
        let (wrote, stuck) = (AtomicBool::new(false), AtomicBool::new(false));
        if let Some(batches) = batches {
            let run = Run {
                device: &self.device,
                comm: &*comm,
                places: Places { mems: &self.mems, windows: &c.links.windows, staging: ready.staging() },
                batches: Some(batches),
                stream: flight.stream,
                threads: 1,
                deadline: flight.deadline,
                wrote: &wrote,
                stuck: &stuck,
            };
            let put = run.enqueue(work, batches, c.signs.as_ref().map(|s| (s, flight.number)));
            (flight.wrote, flight.stuck) = (wrote.into_inner(), stuck.into_inner());
            put?;
        }
        if comm.windows().is_some() {
            // After this, all readers have said on their streams when they are done.
            comm.allgather(&[0], flight.deadline)?;
            c.signs.as_ref().map_or(Ok(()), |s| s.take_back(flight.stream, flight.number))?;
        }
        if flight.captured {
            // Nothing has run, and nothing tells when something does.
            flight.wrote = false;
        } else {
            flight.end = Some(self.device.record(flight.stream)?);
        }
        Ok(())
    }

    /// Whether the stream is being captured into a graph. An error where a graph could not repeat the sync.
    fn capturing(&self, c: &Connected, request: &Sync) -> Result<bool> {
        let capturing = self.device.check_stream(request.stream)?;
        if capturing && !(c.streams && c.alone) {
            bail!(
                RS_ERR_UNSUPPORTED,
                "the stream is being captured into a graph, which cannot ask other ranks again: only a sync in which all weights of every \
                 rank stay on that rank can be"
            );
        }
        if capturing && request.verify {
            bail!(
                RS_ERR_UNSUPPORTED,
                "the stream is being captured into a graph: RS_SYNC_VERIFY waits for what is moved, which nothing is now"
            );
        }
        if capturing && request.only.is_some() {
            bail!(RS_ERR_UNSUPPORTED, "the stream is being captured into a graph: such a sync takes all tensors, without `only`");
        }
        Ok(capturing)
    }

    /// What this rank says of its sync.
    fn header(&self, c: &Connected, request: &Sync, subset: &Result<Option<Vec<bool>>>) -> Header {
        Header {
            call: if request.verify { Call::VerifiedSync } else { Call::Sync },
            version: request.version,
            plan: c.digest,
            subset: subset.as_ref().ok().and_then(Option::as_deref).map_or(0, digest),
            binding: self.binding,
            status: subset.as_ref().err().map_or(RS_OK, Error::status),
        }
    }

    /// Moves one version, and waits for it.
    fn version(&mut self, comm: &dyn Comm, c: &mut Connected, request: &Sync, progress: &mut dyn FnMut(u64, u64)) -> Result<()> {
        let begun = Instant::now();
        let deadline = Deadline::after(request.timeout.unwrap_or(self.timeout));
        // What the caller's stream still does to the sources, others must not read.
        let ready = self.capturing(c, request).and_then(|_| self.behind(c, request.stream));
        let ready = ready.and_then(|_| settle(&*self.device, request.stream, comm, deadline));
        let subset = ready.and_then(|()| self.subset(c, request));
        let subset = subset.and_then(|s| self.able(c, comm.rank(), s.as_deref(), request).map(|()| s));
        let mine = self.header(c, request, &subset);
        let headers = gather(comm, &mine, deadline).map_err(|e| give_up(comm, e))?;
        // All ranks see the same headers: where one stops here, all do, and nothing has moved.
        let stop = |e: Error| if e.status() <= RS_ERR_TIMEOUT { give_up(comm, e) } else { e };
        let subset = subset.map_err(stop)?;
        compare(comm.rank(), &headers, &mine)?;
        let wrote = AtomicBool::new(false);
        let landed = self.land(comm, c, request.stream, (&mine, &headers), subset.as_deref(), &wrote, deadline, progress);
        let agreed = landed.clone().and_then(|()| agreed(&mine, &comm.allgather(&mine.encode(), deadline)?));
        let agreed = agreed.map_err(|e| give_up(comm, e));
        // What this finds, all ranks find: nobody need be told.
        let verify = |()| if request.verify { self.verify(comm, c, subset.as_deref(), deadline) } else { Ok(()) };
        let whole = agreed.clone().and_then(verify);
        let state = match (&landed, &agreed, &whole) {
            (_, _, Ok(())) => Some(RS_PARAM_SYNCED),
            (_, Ok(()), Err(e)) if e.status() == RS_ERR_CORRUPT => Some(RS_PARAM_TORN),
            (Ok(()), _, _) => Some(RS_PARAM_LANDED),
            (Err(_), _, _) => wrote.load(Ordering::Relaxed).then_some(RS_PARAM_TORN),
        };
        if let Some(state) = state {
            self.mark(c, subset.as_deref(), state, request.version);
        }
        if whole.is_ok() {
            self.count(c, comm, subset.is_some(), request.version, begun);
        }
        whole
    }

    /// New addresses of other ranks, and the lists of a new subset.
    fn arrange(
        &self,
        comm: &dyn Comm,
        c: &mut Connected,
        headers: &[Header],
        mine: &Header,
        subset: Option<&[bool]>,
        deadline: Deadline,
    ) -> Result<()> {
        if headers.iter().zip(&c.bindings).any(|(h, &known)| h.binding != known) {
            // Where nobody exchanges weights, others' addresses are nothing to us.
            let own = comm.rank() as usize;
            if !c.alone || c.bindings.get(own) != Some(&self.binding) {
                self.open(comm, c, deadline)?;
            }
            c.bindings = headers.iter().map(|h| h.binding).collect();
        }
        if subset.is_some() && c.subset.as_ref().is_none_or(|s| s.0 != mine.subset) {
            c.subset = Some((mine.subset, self.ready(comm, c, subset, deadline)?));
        }
        Ok(())
    }

    /// Everything between the header and the agreement.
    #[allow(clippy::too_many_arguments)] // All of it is what `version` has agreed on.
    fn land(
        &self,
        comm: &dyn Comm,
        c: &mut Connected,
        stream: Stream,
        (mine, headers): (&Header, &[Header]),
        subset: Option<&[bool]>,
        wrote: &AtomicBool,
        deadline: Deadline,
        progress: &mut dyn FnMut(u64, u64),
    ) -> Result<()> {
        self.arrange(comm, c, headers, mine, subset, deadline)?;
        let ready = c.chosen(subset.is_some());
        let Ready { work, batches, .. } = ready;
        let places = Places { mems: &self.mems, windows: &c.links.windows, staging: ready.staging() };
        let (device, batches, threads) = (&self.device, batches.as_ref(), self.threads);
        let stuck = AtomicBool::new(false);
        let run = Run { device, comm, places, batches, stream, threads, deadline, wrote, stuck: &stuck };
        let total = work.bytes.work();
        let moved = run.run(work, &mut |done| progress(done, total));
        if stuck.load(Ordering::Relaxed) {
            log::warn!("{} does not finish a failed sync: the memory that it uses is left where it is", self.device.name());
            std::mem::forget((c.ready.batches.take(), c.ready.staging.take(), c.subset.take(), std::mem::take(&mut c.links.kept)));
        }
        moved
    }

    /// An error if memory is gone that this sync uses, or cannot be looked at where it must be.
    fn able(&self, c: &Connected, me: u32, subset: Option<&[bool]>, request: &Sync) -> Result<()> {
        if request.verify {
            shown(&*self.device).map_err(|e| e.context("RS_SYNC_VERIFY"))?;
        }
        self.grounded(c, me, subset)
    }

    fn grounded(&self, c: &Connected, me: u32, subset: Option<&[bool]>) -> Result<()> {
        // After a rebind others open what is new.
        let lent = (c.bindings.get(me as usize) == Some(&self.binding)).then_some(&c.lent);
        if self.ground.is_empty() {
            return Ok(());
        }
        let used = match (subset, &lent) {
            (None, Some(_)) => &c.used,
            // The list is of the memory before a rebind.
            (some, _) => &self.used(c, some),
        };
        let mut grounds = [Some(&self.ground), lent].into_iter().flatten();
        grounds.try_for_each(|ground| ground.check(&*self.device, used, |row| self.buffer_name(row)))
    }

    /// By row whether a sync of these tensors uses it; the one behind the last is staging.
    pub(super) fn used(&self, c: &Connected, subset: Option<&[bool]>) -> Vec<bool> {
        let accept = |tensor: u32| subset.is_none_or(|s| s[tensor as usize]);
        let mut used = vec![false; self.mems.len() + 1];
        let own = self.local.pieces.iter().filter(|p| accept(c.planned.ordinals[p.tensor as usize]));
        for p in own.chain(c.planned.plan.doubles.iter().filter(|p| accept(p.tensor))) {
            used[p.src.buffer as usize] = true;
            used[p.dst.buffer as usize] = true;
        }
        for peer in &c.planned.plan.peers {
            peer.out.iter().filter(|p| accept(p.tensor)).for_each(|p| used[p.src.buffer as usize] = true);
            peer.into.iter().filter(|p| accept(p.tensor)).for_each(|p| used[p.dst.buffer as usize] = true);
        }
        used[self.mems.len()] = c.work().group.as_ref().is_some_and(|group| group.staging() > 0);
        used
    }

    /// Of a row, or of the one behind the last.
    pub(super) fn buffer_name(&self, row: u32) -> &str {
        self.layout.buffers().get(row as usize).map_or("config.staging", |b| &b.name)
    }

    /// The tensors of `only`, by ordinal.
    fn subset(&self, c: &Connected, request: &Sync) -> Result<Option<Vec<bool>>> {
        if request.version == 0 {
            bail!(RS_ERR_INVALID, "sync.version is 0: give the weights a number, equal on all ranks");
        }
        let Some(only) = &request.only else { return Ok(None) };
        let mut chosen = vec![false; c.planned.union.tensors.len()];
        for (i, entry) in only.iter().enumerate() {
            let named = c.planned.union.named(entry);
            if named.is_empty() {
                bail!(RS_ERR_NOT_FOUND, "only[{i}]: no rank has a tensor '{entry}'");
            }
            named.iter().for_each(|&o| chosen[o as usize] = true);
        }
        // A parameter has one version: all of it moves, or nothing.
        let mut first: Vec<Option<(bool, u32)>> = vec![None; self.layout.buffers().len()];
        for tile in self.layout.tiles() {
            let buffer = &self.layout.buffers()[tile.buffer as usize];
            let inside = chosen[c.planned.ordinals[tile.tensor as usize] as usize];
            match first[tile.buffer as usize] {
                Some((other, tensor)) if other != inside && buffer.role & RS_TARGET != 0 => {
                    let name = |t: u32| self.layout.tensors()[t as usize].name.as_str();
                    let (in_, out) = if inside { (tile.tensor, tensor) } else { (tensor, tile.tensor) };
                    bail!(
                        RS_ERR_INVALID,
                        "`only` cuts target '{}': '{}' is chosen, '{}' is not; choose all tensors of a parameter or none",
                        buffer.name,
                        name(in_),
                        name(out)
                    );
                }
                Some(_) => {}
                None => first[tile.buffer as usize] = Some((inside, tile.tensor)),
            }
        }
        Ok(Some(chosen))
    }

    /// Sets the state of the buffers that hold chosen tensors only. Sources are never torn: a sync does not write them.
    fn mark(&self, c: &Connected, subset: Option<&[bool]>, state: u32, version: u64) {
        // A parameter without tiles holds padding only: it is whole when everything is.
        let mut params = lock(&self.params);
        let mut whole = vec![subset.is_none().then_some(true); params.len()];
        for tile in self.layout.tiles() {
            let inside = subset.is_none_or(|s| s[c.planned.ordinals[tile.tensor as usize] as usize]);
            let known = &mut whole[tile.buffer as usize];
            *known = Some(inside && known.unwrap_or(true));
        }
        for ((param, buffer), whole) in params.iter_mut().zip(self.layout.buffers()).zip(whole) {
            if whole == Some(true) && (buffer.role & RS_TARGET != 0 || state == RS_PARAM_SYNCED) {
                param.state = state;
                if state != RS_PARAM_TORN {
                    param.version = version;
                }
            }
        }
    }
}

/// This rank cannot go on, so none can: ends the communicator, so that the others learn of it now, and waits until nobody reads this
/// rank's memory any more, which its caller is about to get back. The error as it is then: that of a failed container.
pub(super) fn give_up(comm: &dyn Comm, e: Error) -> Error {
    comm.abort(e.text());
    if let Some(windows) = comm.windows() {
        windows.revoke();
    }
    fatal(e)
}

/// The error as one of a failed container.
pub(super) fn fatal(e: Error) -> Error {
    if e.status() <= RS_ERR_TIMEOUT { e } else { Error::new(RS_ERR_COMM, e.text()) }
}

/// Looks at a failed sync until it is over.
pub(super) fn finish(flight: &mut Flight, signs: Option<&Signs>) -> Step {
    loop {
        match flight.step(signs) {
            Step::Going => std::thread::sleep(Duration::from_micros(20)),
            over => return over,
        }
    }
}

/// Whether all ranks have landed what this one has.
pub(super) fn agreed(mine: &Header, all: &[u8]) -> Result<()> {
    let mut headers = all.chunks_exact(Header::LEN).map(Header::decode);
    match headers.position(|h| (h.version, h.status) != (mine.version, RS_OK)) {
        None => Ok(()),
        Some(rank) => Err(err!(RS_ERR_PEER, "rank {rank} left the sync of version {}", mine.version)),
    }
}

fn digest(chosen: &[bool]) -> u64 {
    let bytes: Vec<u8> = chosen.iter().map(|&b| u8::from(b)).collect();
    // 0 stands for "all tensors".
    xxh3_64(&bytes).max(1)
}

pub(super) fn gather(comm: &dyn Comm, mine: &Header, deadline: Deadline) -> Result<Vec<Header>> {
    let all = comm.allgather(&mine.encode(), deadline)?;
    Ok(all.chunks_exact(Header::LEN).map(Header::decode).collect())
}

/// All ranks see the same headers, so all come to the same end.
pub(super) fn compare(me: u32, headers: &[Header], mine: &Header) -> Result<()> {
    for (rank, h) in headers.iter().enumerate() {
        if h.status != RS_OK {
            let status = if h.status <= RS_ERR_TIMEOUT { RS_ERR_PEER } else { RS_ERR_MISMATCH };
            bail!(status, "rank {rank} refused its call of {} (status {}): nothing moved", h.call.name(), h.status);
        }
        if h.call != mine.call {
            bail!(RS_ERR_MISMATCH, "rank {me} calls {}, rank {rank} {}: nothing moved", mine.call.name(), h.call.name());
        }
        if h.version != mine.version {
            bail!(RS_ERR_MISMATCH, "rank {me} syncs version {}, rank {rank} version {}: nothing moved", mine.version, h.version);
        }
        if h.plan != mine.plan {
            bail!(RS_ERR_MISMATCH, "rank {rank} connected to other tables than rank {me}: connect all ranks again");
        }
        if h.subset != mine.subset && mine.call == Call::Fingerprint {
            bail!(RS_ERR_MISMATCH, "rank {rank} asks for the fingerprint of another role or tensor than rank {me}");
        }
        if h.subset != mine.subset {
            bail!(RS_ERR_MISMATCH, "rank {rank} gives another list in `only` than rank {me}: nothing moved");
        }
    }
    Ok(())
}
