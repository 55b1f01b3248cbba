//! Ranks on any hosts, over NVIDIA's NIXL: its plugin UCX finds the fastest way between two of them.
//!
//! Messages are sent by being read: the sender tells the receiver where a message lies (a note), the receiver reads it into its own
//! memory, and NIXL tells the sender when that is done (another note). So a rank's memory is written by that rank alone, and a message
//! is one transfer, of as many parts as its blocks at both ends make. Gathers, deaths and last words go over TCP (`tree`).
//!
//! NIXL starts threads of its own, which run as long as the communicator does: one that moves its connections on, and one of UCX's for
//! what comes in between. The library starts none.
//!
//! Knows ranks, memory and notes. Must not know tensors or plans.

mod agent;
mod api;
mod blocks;
mod frame;
mod meet;
mod peer;
mod tree;

use super::{Comm, Deadline, Group, Kept};
use crate::abi::*;
use crate::device::{Mem, Stream};
use crate::error::{Error, Result, bail, err};
use agent::Agent;
use blocks::{Block, bytes, meet_in};
use peer::{Note, Peer};
use serde::Deserialize;
use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use tree::Tree;

/// What `config_json` says.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Config {
    /// Where rank 0 listens, `host:port`; equal on all ranks.
    address: String,
    /// Names the run; equal on all ranks.
    #[serde(default)]
    run: String,
    /// How long the ranks wait for each other.
    timeout_ms: Option<u32>,
    /// NIXL's plugin.
    #[serde(default = "ucx")]
    backend: String,
    /// Its parameters, under its own names.
    #[serde(default)]
    params: BTreeMap<String, String>,
    /// Path of libnixl_capi.so.
    library: Option<String>,
}

impl Config {
    fn of(text: &str) -> Result<Config> {
        let mut json = serde_json::Deserializer::from_str(text);
        let config = serde_path_to_error::deserialize(&mut json).map_err(|e| match e.path().to_string().as_str() {
            "." => err!(RS_ERR_INVALID, "config_json: {}", e.inner()),
            path => err!(RS_ERR_INVALID, "config_json: {path}: {}", e.inner()),
        })?;
        json.end().map_err(|e| err!(RS_ERR_INVALID, "config_json: {e}"))?;
        Ok(config)
    }
}

fn ucx() -> String {
    "UCX".into()
}

/// Longest piece of a note: metadata of much memory is sent in several.
const NOTE: usize = 32 << 10;

/// Between two looks at what has come.
const PAUSE: Duration = Duration::from_micros(50);

/// How long a failed transfer waits to hear of the peer's end, which is the better reason.
const REASON: Duration = Duration::from_millis(500);

struct State {
    /// Gone once the communicator has ended: nobody reads or writes memory through it any more.
    agent: Option<Agent>,
    /// Of the group that is open.
    sends: Vec<(u32, Vec<Block>)>,
    recvs: Vec<(u32, Vec<Block>)>,
    peers: Vec<Peer>,
}

struct Shared {
    tree: Tree,
    /// Of this run: part of every agent's name.
    token: u64,
    state: Mutex<State>,
}

/// A rank of a run.
pub struct NixlComm(Arc<Shared>);

/// Memory that is registered as long as this lives.
struct Registered {
    of: Arc<Shared>,
    blocks: Vec<Block>,
}

impl Drop for Registered {
    fn drop(&mut self) {
        if let Some(agent) = &mut self.of.state().agent {
            self.blocks.iter().for_each(|&block| agent.deregister(block));
        }
    }
}

/// Joins a run as `rank` of `world`: collective. Returns when all have joined, or after the timeout with an error that names those who
/// have not.
pub fn join(config: &str, rank: u32, world: u32, timeout: Duration) -> Result<Arc<dyn Comm>> {
    let config = Config::of(config)?;
    let nixl = api::nixl(config.library.as_deref())?;
    let timeout = config.timeout_ms.filter(|&ms| ms > 0).map_or(timeout, |ms| Duration::from_millis(ms.into()));
    let deadline = Deadline::after(timeout);
    let place = meet::Place { address: &config.address, run: &config.run, rank, world, fan: tree::FAN };
    let (tree, token) = meet::join(place, deadline)?;
    let agent = Agent::new(nixl, &name(token, rank), &config.backend, &config.params);
    let made = agent.and_then(|mut agent| Ok((agent.metadata()?, agent)));
    let (metadata, agent) = made.map_err(|e| tree.fail(e))?;
    let longest = tree.allgather(&(metadata.len() as u64).to_le_bytes(), deadline)?;
    let len = |bytes: &[u8]| bytes.try_into().map_or(0, u64::from_le_bytes) as usize;
    let lens: Vec<usize> = longest.chunks_exact(8).map(len).collect();
    let longest = lens.iter().copied().max().unwrap_or(0);
    if longest as u64 > frame::LONGEST_WORD {
        return Err(tree.fail(err!(RS_ERR_COMM, "a rank's agent has metadata of {longest} bytes")));
    }
    let mut padded = metadata;
    padded.resize(longest, 0);
    let all = tree.allgather(&padded, deadline)?;
    let metadata = |(rank, &len): (usize, &usize)| all[rank * longest..][..len].to_vec();
    let peers = lens.iter().enumerate().map(metadata).map(Peer::new).collect();
    log::info!("rank {rank} of {world} joined '{}' over NIXL ({})", config.address, config.backend);
    let state = State { agent: Some(agent), sends: vec![], recvs: vec![], peers };
    Ok(Arc::new(NixlComm(Arc::new(Shared { tree, token, state: Mutex::new(state) }))))
}

fn name(token: u64, rank: u32) -> String {
    format!("{}{rank}", run(token))
}

/// How the names of a run's agents begin.
fn run(token: u64) -> String {
    format!("libreshard-{token:016x}-")
}

impl Shared {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Ends the communicator, here and everywhere. Gives the reason that it ended for, which may be an older one.
    fn fail(&self, state: &mut State, e: Error) -> Error {
        let e = self.tree.fail(e);
        state.stop();
        e
    }

    /// Why a transfer with a rank failed: that the rank is gone, if it is.
    fn lost(&self, state: &mut State, rank: u32, e: Error) -> Error {
        let end = Deadline::after(REASON);
        while !end.passed() && self.check(state).is_ok() {
            std::thread::sleep(Duration::from_millis(1));
        }
        self.fail(state, err!(RS_ERR_PEER, "a transfer with {} failed: {e}", self.tree.who(rank)))
    }

    fn check(&self, state: &State) -> Result<()> {
        self.tree.check(&|| self.missing(state))
    }

    /// What messages are waited for.
    fn missing(&self, state: &State) -> String {
        let ranks = |so: fn(&Peer) -> bool| -> Vec<String> {
            let found = (0..self.tree.world).zip(&state.peers).filter(|(_, p)| so(p));
            found.take(16).map(|(rank, _)| self.tree.who(rank)).collect()
        };
        match (ranks(Peer::silent), ranks(|p| !p.idle())) {
            (silent, _) if !silent.is_empty() => format!("{} to send a message", silent.join(", ")),
            (_, busy) if !busy.is_empty() => format!("messages to or from {}", busy.join(", ")),
            _ => "its own copies".into(),
        }
    }

    /// What has come, and what may go now.
    fn pump(&self, state: &mut State) -> Result<()> {
        self.check(state)?;
        for (from, note) in state.agent()?.notes()? {
            let known = from.strip_prefix(&run(self.token)).and_then(|rank| rank.parse::<u32>().ok());
            let Some(rank) = known.filter(|&r| r < self.tree.world) else {
                log::warn!("a note of agent '{from}', which is none of this run, was dropped");
                continue;
            };
            let strange = || err!(RS_ERR_COMM, "{} sent a note that makes no sense", self.tree.who(rank));
            state.peers[rank as usize].take(Note::decode(&note).ok_or_else(strange)?).ok_or_else(strange)?;
        }
        for rank in 0..self.tree.world {
            self.read(state, rank).map_err(|e| if e.status() == RS_ERR_COMM { self.lost(state, rank, e) } else { e })?;
        }
        Ok(())
    }

    /// Starts reads of messages that are ready, and notices those that are done.
    fn read(&self, state: &mut State, rank: u32) -> Result<()> {
        let State { agent, peers, .. } = state;
        let (Some(agent), Some(peer)) = (agent, peers.get_mut(rank as usize)) else { return Ok(()) };
        while let Some((number, from, into)) = peer.next() {
            let Some(parts) = meet_in(&from, &into) else {
                bail!(
                    RS_ERR_MISMATCH,
                    "{} sent message {number} of {} bytes, this rank expects one of {}",
                    self.tree.who(rank),
                    bytes(&from),
                    bytes(&into)
                );
            };
            let request = agent.read(&name(self.token, rank), &parts, &Note::Read(number).encode())?;
            peer.reading.push(request);
        }
        let mut at = 0;
        while let Some(request) = peer.reading.get(at) {
            if agent.done(request)? {
                agent.release(peer.reading.remove(at));
            } else {
                at += 1;
            }
        }
        Ok(())
    }

    /// See [`Group::register`].
    fn register(&self, mems: &[Mem], to: &[u32], from: &[u32], deadline: Deadline) -> Result<Vec<Block>> {
        let mut blocks: Vec<Block> = mems.iter().filter(|m| !m.is_empty()).map(|&m| Block::of(m)).collect();
        blocks.sort_unstable();
        blocks.dedup();
        let mut state = self.state();
        let registered = self.tell(&mut state, &blocks, to);
        registered.map_err(|e| self.fail(&mut state, e))?;
        for &rank in from {
            loop {
                if let Some(metadata) = state.peers[rank as usize].registered() {
                    let loaded = state.agent().and_then(|agent| agent.load(&name(self.token, rank), &metadata));
                    loaded.map_err(|e| self.fail(&mut state, e.context(self.tree.who(rank))))?;
                    // It has all that was in the first.
                    state.peers[rank as usize].metadata = None;
                    break;
                }
                let late = deadline.check(|| format!("{} to tell what it has registered", self.tree.who(rank)));
                late.and_then(|()| self.pump(&mut state)).map_err(|e| self.fail(&mut state, e))?;
                drop(state);
                std::thread::sleep(PAUSE);
                state = self.state();
            }
        }
        Ok(blocks)
    }

    /// Registers memory and tells these ranks.
    fn tell(&self, state: &mut State, blocks: &[Block], to: &[u32]) -> Result<()> {
        let agent = state.agent()?;
        for &block in blocks {
            let at = format_args!("{} bytes at {:#x}", block.len, block.addr).to_string();
            agent.register(block).map_err(|e| err!(RS_ERR_MEMORY, "cannot register {at}: {e}"))?;
        }
        if to.is_empty() {
            return Ok(());
        }
        let metadata = agent.metadata()?;
        let pieces: Vec<&[u8]> = metadata.chunks(NOTE).collect();
        for &rank in to {
            let peer = &mut state.peers[rank as usize];
            let number = peer.told;
            peer.told += 1;
            for (place, piece) in (0..).zip(&pieces) {
                self.note(state, rank, &Note::Metadata { number, place, of: pieces.len() as u32, piece: piece.to_vec() })?;
            }
        }
        Ok(())
    }

    /// Sends a note to a rank.
    fn note(&self, state: &mut State, rank: u32, note: &Note) -> Result<()> {
        let name = name(self.token, rank);
        if let Some(metadata) = state.peers[rank as usize].metadata.take() {
            state.agent()?.load(&name, &metadata).map_err(|e| e.context(self.tree.who(rank)))?;
        }
        state.agent()?.notify(&name, &note.encode()).map_err(|e| self.lost(state, rank, e))
    }

    /// Tells the receivers of a group where its messages lie.
    fn start(&self, state: &mut State) -> Result<()> {
        self.check(state)?;
        for (rank, blocks) in std::mem::take(&mut state.recvs) {
            state.peers[rank as usize].ask(blocks);
        }
        for (rank, blocks) in std::mem::take(&mut state.sends) {
            let number = state.peers[rank as usize].send();
            self.note(state, rank, &Note::Ready(number, blocks))?;
        }
        Ok(())
    }

    /// An error if a rank is none of the others.
    fn other(&self, rank: u32) -> Result<()> {
        if rank >= self.tree.world || rank == self.tree.rank {
            bail!(RS_ERR_INTERNAL, "rank {} has no peer {rank} in a world of {}", self.tree.rank, self.tree.world);
        }
        Ok(())
    }
}

impl State {
    fn agent(&mut self) -> Result<&mut Agent> {
        self.agent.as_mut().ok_or_else(|| err!(RS_ERR_ABORTED, "the communicator has ended"))
    }

    /// Nobody reads or writes memory through this rank after that.
    fn stop(&mut self) {
        if let Some(mut agent) = self.agent.take() {
            self.peers.iter_mut().flat_map(|p| p.reading.drain(..)).for_each(|request| agent.release(request));
        }
    }
}

impl Comm for NixlComm {
    fn name(&self) -> &str {
        "nixl"
    }

    fn rank(&self) -> u32 {
        self.0.tree.rank
    }

    fn world(&self) -> u32 {
        self.0.tree.world
    }

    fn allgather(&self, mine: &[u8], deadline: Deadline) -> Result<Vec<u8>> {
        self.0.tree.allgather(mine, deadline)
    }

    fn abort(&self, why: &str) {
        self.0.tree.abort(why);
        self.0.state().stop();
    }

    fn check(&self) -> Result<()> {
        self.0.check(&self.0.state())
    }

    fn group(&self) -> Option<&dyn Group> {
        Some(self)
    }
}

impl Group for NixlComm {
    fn register(&self, mems: &[Mem], to: &[u32], from: &[u32], deadline: Deadline) -> Result<Option<Kept>> {
        to.iter().chain(from).try_for_each(|&rank| self.0.other(rank))?;
        let blocks = self.0.register(mems, to, from, deadline)?;
        Ok(Some(Arc::new(Registered { of: self.0.clone(), blocks })))
    }

    fn begin(&self) -> Result<()> {
        self.check()
    }

    fn scatters(&self) -> bool {
        true
    }

    fn send(&self, blocks: &[Mem], to: u32, _stream: Stream) -> Result<()> {
        self.0.other(to)?;
        self.0.state().sends.push((to, blocks.iter().map(|&mem| Block::of(mem)).collect()));
        Ok(())
    }

    fn recv(&self, blocks: &[Mem], from: u32, _stream: Stream) -> Result<()> {
        self.0.other(from)?;
        self.0.state().recvs.push((from, blocks.iter().map(|&mem| Block::of(mem)).collect()));
        Ok(())
    }

    fn end(&self) -> Result<()> {
        let mut state = self.0.state();
        self.0.start(&mut state).map_err(|e| self.0.fail(&mut state, e))
    }

    fn poll(&self) -> Result<bool> {
        let mut state = self.0.state();
        self.0.pump(&mut state).map_err(|e| self.0.fail(&mut state, e))?;
        Ok(state.peers.iter().all(Peer::idle))
    }

    fn missing(&self) -> String {
        self.0.missing(&self.0.state())
    }
}

#[cfg(test)]
mod tests;
