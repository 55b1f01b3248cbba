//! One version of the weights, from the header to the agreement.
#![forbid(unsafe_code)]

use super::connect::{Connected, Ready};
use super::{Container, Phase, Sync};
use crate::abi::*;
use crate::comm::{Comm, Deadline};
use crate::device::Stream;
use crate::error::{Error, Result, bail, err};
use crate::exec::batches::Places;
use crate::exec::{Run, settle};
use crate::wire::Header;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;
use xxhash_rust::xxh3::xxh3_64;

impl Container {
    /// Collective: moves one version. `true`: every rank has landed it. `progress` hears (bytes done, bytes in all) of this rank.
    pub fn sync(&mut self, request: &Sync, progress: &mut dyn FnMut(u64, u64)) -> Result<bool> {
        let mut connected = match std::mem::replace(&mut self.phase, Phase::Created) {
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
        self.control.started();
        let result = self.comm().and_then(|comm| self.version(&*comm, &mut connected, request, progress));
        self.control.ended(&result);
        self.phase = match &result {
            Err(e) if e.status() <= RS_ERR_TIMEOUT => Phase::Failed(e.text().to_string()),
            _ => Phase::Connected(connected),
        };
        if let Err(e) = &result {
            log::error!("sync of version {} failed: {e}", request.version);
            self.stats.failure = Some(e.text().to_string());
        }
        result.map(|()| true)
    }

    fn version(&mut self, comm: &dyn Comm, c: &mut Connected, request: &Sync, progress: &mut dyn FnMut(u64, u64)) -> Result<()> {
        let begun = Instant::now();
        let deadline = Deadline::after(request.timeout.unwrap_or(self.timeout));
        // What the caller's stream still does to the sources, others must not read.
        let ready = self.device.check_stream(request.stream);
        let ready = ready.and_then(|()| settle(&*self.device, request.stream, comm, deadline));
        let subset = ready.and_then(|()| self.subset(c, request));
        let chosen = subset.as_ref().ok().and_then(Option::as_deref);
        let mine = Header {
            version: request.version,
            plan: c.digest,
            subset: chosen.map_or(0, digest),
            binding: self.binding,
            status: subset.as_ref().err().map_or(RS_OK, Error::status),
        };
        let headers = gather(comm, &mine, deadline).map_err(|e| give_up(comm, e))?;
        // All ranks see the same headers: where one stops here, all do, and nothing has moved.
        let fatal = |e: Error| if e.status() <= RS_ERR_TIMEOUT { give_up(comm, e) } else { e };
        let subset = subset.map_err(fatal)?;
        compare(comm.rank(), &headers, &mine)?;
        let wrote = AtomicBool::new(false);
        let landed = self.land(comm, c, request.stream, (&mine, &headers), subset.as_deref(), &wrote, deadline, progress);
        let agreed = landed.clone().and_then(|()| {
            let all = gather(comm, &mine, deadline)?;
            match all.iter().position(|h| (h.version, h.status) != (mine.version, RS_OK)) {
                None => Ok(()),
                Some(rank) => Err(err!(RS_ERR_PEER, "rank {rank} left the sync of version {}", mine.version)),
            }
        });
        let agreed = agreed.map_err(|e| give_up(comm, e));
        let state = match (&landed, &agreed) {
            (_, Ok(())) => Some(RS_PARAM_SYNCED),
            (Ok(()), Err(_)) => Some(RS_PARAM_LANDED),
            (Err(_), _) => wrote.load(Ordering::Relaxed).then_some(RS_PARAM_TORN),
        };
        if let Some(state) = state {
            self.mark(c, subset.as_deref(), state, request.version);
        }
        if agreed.is_ok() {
            let work = &c.chosen(subset.is_some()).work;
            let s = &mut self.stats;
            (s.version, s.bytes) = (request.version, work.bytes);
            s.rounds = work.group.as_ref().map_or(0, |g| g.rounds());
            s.staging_bytes = work.group.as_ref().map_or(0, |g| g.staging()) + comm.pipe().map_or(0, |p| p.bytes());
            s.seconds = begun.elapsed().as_secs_f64();
            s.syncs += 1;
            s.failure = None;
            log::debug!("version {} in {:.3} s", request.version, s.seconds);
        }
        agreed
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
        if headers.iter().zip(&c.bindings).any(|(h, &known)| h.binding != known) {
            self.open(comm, c, deadline)?;
            c.bindings = headers.iter().map(|h| h.binding).collect();
        }
        if subset.is_some() && c.subset.as_ref().is_none_or(|s| s.0 != mine.subset) {
            c.subset = Some((mine.subset, self.ready(comm, c, subset)?));
        }
        let Ready { work, batches } = c.chosen(subset.is_some());
        let places = Places { mems: &self.mems, windows: &c.links.windows };
        let (device, batches, threads) = (&self.device, batches.as_ref(), self.threads);
        let stuck = AtomicBool::new(false);
        let run = Run { device, comm, places, batches, stream, threads, deadline, wrote, stuck: &stuck };
        let total = work.bytes.work();
        let moved = run.run(work, &mut |done| progress(done, total));
        if stuck.load(Ordering::Relaxed) {
            log::warn!("{} does not finish a failed sync: the memory that it uses is left where it is", self.device.name());
            std::mem::forget((c.ready.batches.take(), c.subset.take(), std::mem::take(&mut c.links.kept)));
        }
        moved
    }

    /// The tensors of `only`, by ordinal.
    fn subset(&self, c: &Connected, request: &Sync) -> Result<Option<Vec<bool>>> {
        if request.version == 0 {
            bail!(RS_ERR_INVALID, "sync.version is 0: give the weights a number, equal on all ranks");
        }
        let Some(only) = &request.only else { return Ok(None) };
        let mut chosen = vec![false; c.union.tensors.len()];
        for (i, entry) in only.iter().enumerate() {
            let named = c.union.named(entry);
            if named.is_empty() {
                bail!(RS_ERR_NOT_FOUND, "only[{i}]: no rank has a tensor '{entry}'");
            }
            named.iter().for_each(|&o| chosen[o as usize] = true);
        }
        // A parameter has one version: all of it moves, or nothing.
        let mut first: Vec<Option<(bool, u32)>> = vec![None; self.layout.buffers().len()];
        for tile in self.layout.tiles() {
            let buffer = &self.layout.buffers()[tile.buffer as usize];
            let inside = chosen[c.ordinals[tile.tensor as usize] as usize];
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
    fn mark(&mut self, c: &Connected, subset: Option<&[bool]>, state: u32, version: u64) {
        // A parameter without tiles holds padding only: it is whole when everything is.
        let mut whole = vec![subset.is_none().then_some(true); self.params.len()];
        for tile in self.layout.tiles() {
            let inside = subset.is_none_or(|s| s[c.ordinals[tile.tensor as usize] as usize]);
            let known = &mut whole[tile.buffer as usize];
            *known = Some(inside && known.unwrap_or(true));
        }
        for ((param, buffer), whole) in self.params.iter_mut().zip(self.layout.buffers()).zip(whole) {
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
    if e.status() <= RS_ERR_TIMEOUT { e } else { Error::new(RS_ERR_COMM, e.text()) }
}

fn digest(chosen: &[bool]) -> u64 {
    let bytes: Vec<u8> = chosen.iter().map(|&b| u8::from(b)).collect();
    // 0 stands for "all tensors".
    xxh3_64(&bytes).max(1)
}

fn gather(comm: &dyn Comm, mine: &Header, deadline: Deadline) -> Result<Vec<Header>> {
    let all = comm.allgather(&mine.encode(), deadline)?;
    Ok(all.chunks_exact(Header::LEN).map(Header::decode).collect())
}

/// All ranks see the same headers, so all come to the same end.
fn compare(me: u32, headers: &[Header], mine: &Header) -> Result<()> {
    for (rank, h) in headers.iter().enumerate() {
        if h.status != RS_OK {
            let status = if h.status <= RS_ERR_TIMEOUT { RS_ERR_PEER } else { RS_ERR_MISMATCH };
            bail!(status, "rank {rank} refused its call of rs_sync_weights (status {}): nothing moved", h.status);
        }
        if h.version != mine.version {
            bail!(RS_ERR_MISMATCH, "rank {me} syncs version {}, rank {rank} version {}: nothing moved", mine.version, h.version);
        }
        if h.plan != mine.plan {
            bail!(RS_ERR_MISMATCH, "rank {rank} connected to other tables than rank {me}: connect all ranks again");
        }
        if h.subset != mine.subset {
            bail!(RS_ERR_MISMATCH, "rank {rank} gives another list in `only` than rank {me}: nothing moved");
        }
    }
    Ok(())
}
