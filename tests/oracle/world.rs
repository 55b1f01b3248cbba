//! The ranks of a case at work in the library, every rank a thread, and comparisons of each byte they have.

use super::gpu;
use super::library::{Comm, Container, Failure, Tables};
use super::mailbox::{Hub, Tally};
use super::model::Case;
use super::nccl::{self, Lent, Maker};
use super::plans;
use super::sums;
use super::truth::{Memory, compare, lower_bound, write};
use super::views::chance;
use fastrand::Rng;
use reshard::abi::*;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

/// Longest wait in one call. Reaching it is a failure, so it only bounds how long a hang lasts.
const TIMEOUT_MS: u32 = 120_000;

/// A world at work. Fields drop in this order: containers before what they borrow.
pub struct World<'a> {
    pub case: &'a Case,
    pub containers: Vec<Container>,
    pub comms: Vec<Comm>,
    /// What they borrow.
    pub lent: Vec<Lent>,
    pub wire: Wire,
    pub hub: Option<Arc<Hub>>,
    pub memories: Vec<Memory>,
    /// Memory that a rebind left, as it was then.
    retired: Vec<(&'a Case, usize, Memory, Vec<u8>)>,
    /// By rank and buffer row: the version that the last syncs left there, where they say one.
    versions: Vec<Vec<Option<u64>>>,
}

/// How the ranks reach each other.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Wire {
    /// The library's own, between threads.
    Loopback,
    /// The test's own.
    Custom,
    /// The one for processes of a host, here all one process, with these RS_LOCAL_* flags.
    Local(u32),
    /// NCCL's, by whom it is made.
    Nccl(Maker),
    /// NIXL's: RESHARD_NIXL is the path of its library.
    Nixl,
    /// The test's own between hosts, and on each host the one for its processes, or for its threads.
    Composite { processes: bool },
}

impl Wire {
    pub fn any(rng: &mut Rng) -> Wire {
        match rng.u32(0..100) {
            _ if std::env::var_os("RESHARD_NIXL").is_some() => Wire::Nixl,
            // Moves host memory only.
            0..3 if gpu::wanted() => Wire::Loopback,
            0..3 => Wire::Local(*rng.choice(&[0, RS_LOCAL_READ, RS_LOCAL_RING]).expect("not empty")),
            3..20 if nccl::usable() => Wire::Nccl(Maker::Library),
            20..26 if nccl::usable() => Wire::Nccl(Maker::Test { blocks: true }),
            26..32 if nccl::usable() => Wire::Nccl(Maker::Test { blocks: false }),
            3..40 => Wire::Loopback,
            // A GPU's memory is not sent through that of processes.
            40..55 => Wire::Composite { processes: !gpu::wanted() && rng.bool() },
            _ => Wire::Custom,
        }
    }
}

/// A communicator for each rank of a case, whose weights lie in this memory.
fn communicators(case: &Case, memories: &[Memory], wire: Wire) -> (Vec<Lent>, Vec<Comm>, Option<Arc<Hub>>) {
    static RUNS: AtomicU64 = AtomicU64::new(1);
    let world = memories.len();
    let (number, hub) = (RUNS.fetch_add(1, Ordering::Relaxed), Hub::new(world));
    let id = matches!(wire, Wire::Nccl(_)).then(nccl::id);
    // Of a port that is free now.
    let address = std::net::TcpListener::bind("127.0.0.1:0").and_then(|l| l.local_addr()).expect("a port").to_string();
    let comm = |r: usize| match (wire, id) {
        (Wire::Nccl(maker), Some(id)) => gpu::on(memories[r].kind().1, || match maker {
            Maker::Library => (None, Comm::nccl(&id, r, world)),
            Maker::Test { blocks } => {
                let lent = Lent::new(id, r, world, blocks);
                let comm = Comm::from_nccl(&lent);
                (Some(lent), comm)
            }
        }),
        (Wire::Custom, _) => (None, Comm::custom(&hub.ops(r))),
        (Wire::Composite { processes }, _) => {
            let host = case.ranks[r].host;
            let of_host = |ranks: std::ops::Range<usize>| ranks.filter(|&o| case.ranks[o].host == host).count();
            let (rank, ranks) = (of_host(0..r), of_host(0..world));
            let near = match processes {
                true => Comm::local(&format!("{} {number} {host}", std::process::id()), rank, ranks, 0, TIMEOUT_MS),
                false => Comm::loopback(number | (host + 1) << 32, rank, ranks),
            };
            (None, near.and_then(|near| Comm::composite(&near, &Comm::custom(&hub.ops(r))?)))
        }
        (Wire::Local(flags), _) => {
            (None, Comm::local(&format!("properties {} {number}", std::process::id()), r, world, flags, TIMEOUT_MS))
        }
        (Wire::Nixl, _) => (None, Comm::nixl(&address, r, world)),
        _ => (None, Comm::loopback(number, r, world)),
    };
    let (lent, comms): (Vec<_>, Vec<_>) = std::thread::scope(|scope| {
        let comm = &comm;
        let threads: Vec<_> = (0..world).map(|r| scope.spawn(move || comm(r))).collect();
        threads.into_iter().map(|t| t.join().expect("no panic")).unzip()
    });
    let comms = comms.into_iter().enumerate().map(|(r, end)| end.unwrap_or_else(|e| panic!("rank {r}: {wire:?}: {e}")));
    let watched = matches!(wire, Wire::Custom | Wire::Composite { .. });
    (lent.into_iter().flatten().collect(), comms.collect(), watched.then_some(hub))
}

/// Makes the containers of all ranks. Ranks whose tables are refused give a failure.
pub fn open<'a>(case: &'a Case, rng: &mut Rng, wire: Wire) -> Result<World<'a>, Vec<(usize, Failure, Unmoved)>> {
    let mut memories: Vec<Memory> = case.ranks.iter().map(|r| Memory::new(gpu::kind(rng), &r.blocks, rng.u64(..))).collect();
    let (lent, comms, hub) = communicators(case, &memories, wire);
    let (mut containers, mut refused) = (Vec::new(), Vec::new());
    for (r, (rank, memory)) in case.ranks.iter().zip(&mut memories).enumerate() {
        let before = memory.bytes();
        let tables = Tables::new(case, rank, memory.kind(), |b| memory.address(rank.buffers[b].block, rank.buffers[b].at));
        match Container::create(rank, &tables, &comms[r], TIMEOUT_MS) {
            Ok(mut container) => {
                container.stream = memory.stream();
                container.gpu = memory.gpu();
                containers.push(container);
            }
            Err(failure) => refused.push((r, failure, Unmoved(memory.bytes() == before))),
        }
    }
    if !refused.is_empty() {
        return Err(refused);
    }
    let versions = case.ranks.iter().map(|r| vec![Some(0); r.buffers.len()]).collect();
    Ok(World { case, containers, comms, lent, wire, hub, memories, retired: Vec::new(), versions })
}

/// Whether a refused rank's memory is as it was.
pub struct Unmoved(pub bool);

impl<'a> World<'a> {
    /// One call on every rank at the same time.
    pub fn all<T: Send>(&mut self, call: impl Fn(usize, &mut Container) -> T + Sync) -> Vec<T> {
        std::thread::scope(|scope| {
            let call = &call;
            let threads: Vec<_> = self
                .containers
                .iter_mut()
                .enumerate()
                .map(|(r, c)| scope.spawn(move || gpu::as_some_thread(r, || call(r, c))))
                .collect();
            threads.into_iter().map(|t| t.join().unwrap_or_else(|p| std::panic::resume_unwind(p))).collect()
        })
    }

    /// The same, where all must succeed.
    pub fn all_ok(&mut self, what: &str, call: impl Fn(usize, &mut Container) -> Result<(), Failure> + Sync) -> Result<(), String> {
        let failed = |(r, result): (usize, Result<(), Failure>)| result.err().map(|e| format!("rank {r}: {what}: {e}"));
        match self.all(call).into_iter().enumerate().find_map(failed) {
            Some(text) => Err(text),
            None => Ok(()),
        }
    }

    /// Puts the values of a version into all sources; what the memories then hold. On GPUs that may come about later.
    pub fn publish(&mut self, version: u64) -> Vec<Vec<u8>> {
        let all = vec![true; self.case.tensors.len()];
        let publish = |(r, memory): (usize, &mut Memory)| {
            let mut image = memory.bytes();
            write(self.case, r, RS_SOURCE, &all, version, memory, &mut image);
            memory.write(&image);
            image
        };
        self.memories.iter_mut().enumerate().map(publish).collect()
    }

    /// What every rank's memory must be after a sync of `only`, by tensor, at `version`.
    pub fn expected(&self, only: &[bool], version: u64) -> Vec<Vec<u8>> {
        let image = |(r, memory): (usize, &Memory)| {
            let mut image = memory.bytes();
            write(self.case, r, RS_TARGET, only, version, memory, &mut image);
            image
        };
        self.memories.iter().enumerate().map(image).collect()
    }

    /// Compares every rank's memory.
    pub fn compare(&self, expected: &[Vec<u8>]) -> Result<(), String> {
        for (r, memory) in self.memories.iter().enumerate() {
            compare(self.case, r, memory, &expected[r])?;
        }
        for (case, r, memory, was) in &self.retired {
            compare(case, *r, memory, was).map_err(|e| format!("memory given up by a rebind: {e}"))?;
        }
        Ok(())
    }

    /// New values at the sources and a sync of the tensors that `patterns` name, or of all; everything is looked at afterwards.
    pub fn sync(&mut self, version: u64, patterns: Option<&[String]>) -> Result<(), String> {
        let case = self.case;
        let matches = |p: &String, name: &str| p.strip_suffix('*').map_or(p == name, |prefix| name.starts_with(prefix));
        let only: Vec<bool> =
            case.tensors.iter().map(|t| patterns.is_none_or(|all| all.iter().any(|p| matches(p, &t.name)))).collect();
        // Nothing waits for the sources here: the sync must.
        let mut expected = self.publish(version);
        for (r, image) in expected.iter_mut().enumerate() {
            write(case, r, RS_TARGET, &only, version, &self.memories[r], image);
        }
        self.tally();
        self.all_ok("sync", |_, c| c.sync(version, patterns))?;
        self.compare(&expected)?;
        if let Some(tally) = self.tally() {
            self.check_wire(&tally, &only)?;
        }
        self.check_params(&only, version)
    }

    /// What all ranks hold as sources, and what as targets once these are at the sources' version, of the tensors of `pattern` or of all.
    pub fn check_sums(&mut self, version: u64, pattern: Option<&str>) -> Result<(), String> {
        let named = |name: &str| pattern.is_some_and(|p| p.strip_suffix('*').map_or(p == name, |prefix| name.starts_with(prefix)));
        for role in [RS_SOURCE, RS_TARGET] {
            let wanted = sums::fingerprint(self.case, role, version, if pattern.is_some() { Some(&named) } else { None });
            for (r, result) in self.all(|_, c| c.fingerprint(role, pattern)).into_iter().enumerate() {
                match (&result, wanted) {
                    (Ok(sum), Some(wanted)) if *sum == wanted => {}
                    (Err(e), None) if e.status == RS_ERR_NOT_FOUND => {}
                    _ => return Err(format!("rank {r}: fingerprint of role {role}, {pattern:?}: {result:x?}, not {wanted:x?}")),
                }
            }
        }
        Ok(())
    }

    /// What the test's own communicator saw since the last call.
    fn tally(&self) -> Option<Tally> {
        self.hub.as_ref().map(|hub| hub.take())
    }

    fn check_wire(&self, tally: &Tally, only: &[bool]) -> Result<(), String> {
        if !tally.faults.is_empty() {
            return Err(format!("misuse of the caller's communicator: {}", tally.faults.join("; ")));
        }
        let mixed = matches!(self.wire, Wire::Composite { .. });
        let near = |a: usize, b: usize| mixed && self.case.ranks[a].host == self.case.ranks[b].host;
        // What a rank passes on goes the same way to all.
        let passes_on = |r: usize| self.case.ranks[r].flags & RS_CONFIG_RELAY != 0;
        if let Some((from, to)) = tally.bytes.keys().find(|(from, to)| near(*from, *to) && !passes_on(*from)) {
            return Err(format!("ranks {from} and {to} of one host exchange bytes between hosts"));
        }
        for r in 0..self.case.ranks.len() {
            let came: u64 = tally.bytes.iter().filter(|((_, to), _)| *to == r).map(|(_, bytes)| bytes).sum();
            if mixed && only.contains(&false) {
                continue;
            }
            let passed: u64 = tally.bytes.iter().filter(|((p, to), _)| *to == r && near(r, *p)).map(|(_, bytes)| bytes).sum();
            let least = lower_bound(self.case, r, only) + passed - plans::received(&self.containers[r], |p| near(r, p));
            if came != least {
                return Err(format!("rank {r} received {came} bytes; it lacks {least}"));
            }
        }
        let most = plans::message_bytes(&self.containers[0]);
        if tally.longest > most {
            return Err(format!("a message of {} bytes; the plan says at most {most}", tally.longest));
        }
        Ok(())
    }

    fn check_params(&mut self, only: &[bool], version: u64) -> Result<(), String> {
        for (r, rank) in self.case.ranks.iter().enumerate() {
            for (b, buffer) in rank.buffers.iter().enumerate() {
                let target_too = |o: &super::model::Buffer| o.name == buffer.name && o.role & RS_TARGET != 0;
                if buffer.role == RS_SOURCE && rank.buffers.iter().any(target_too) {
                    continue;
                }
                let param = self.containers[r].param(&buffer.name).map_err(|e| format!("rank {r}: {}: {e}", buffer.name))?;
                let address = self.memories[r].address(buffer.block, buffer.at) as usize;
                if (param.data, param.role) != (address, buffer.role) {
                    return Err(format!("rank {r}: {}: {param:x?}, at {address:x}", buffer.name));
                }
                if buffer.role & RS_TARGET == 0 {
                    continue;
                }
                let mut own = rank.tiles.iter().filter(|t| t.buffer == b).map(|t| only[t.tensor]);
                let known = &mut self.versions[r][b];
                *known = match (own.clone().all(|x| x), own.any(|x| x)) {
                    (true, _) => Some(version),
                    (false, true) => None,
                    (false, false) => *known,
                };
                let state = |v: u64| (if v == 0 { RS_PARAM_INITIAL } else { RS_PARAM_SYNCED }, v);
                if known.is_some_and(|v| state(v) != (param.state, param.version)) {
                    return Err(format!("rank {r}: {}: {param:x?} after version {version}; must be at {known:?}", buffer.name));
                }
            }
        }
        Ok(())
    }

    /// Some ranks give the same tables with other addresses; the old memory must not be touched again. Which ranks did it.
    pub fn move_house(&mut self, rng: &mut Rng) -> Result<Vec<usize>, String> {
        let mut moved = Vec::new();
        for (r, rank) in self.case.ranks.iter().enumerate() {
            if !chance(rng, 60) {
                continue;
            }
            let mut memory = Memory::new(self.memories[r].kind(), &rank.blocks, rng.u64(..));
            let tables = Tables::new(self.case, rank, memory.kind(), |b| memory.address(rank.buffers[b].block, rank.buffers[b].at));
            self.containers[r].rebind(&tables).map_err(|e| format!("rank {r}: rebind to other addresses: {e}"))?;
            self.containers[r].stream = memory.stream();
            let old = std::mem::replace(&mut self.memories[r], memory);
            let was = old.bytes();
            self.retired.push((self.case, r, old, was));
            self.versions[r].fill(None);
            moved.push(r);
        }
        Ok(moved)
    }

    /// A rank's rows of another case that lies in the memory of this one.
    pub fn tables_of(&mut self, case: &Case, r: usize) -> Tables {
        let (rank, memory) = (&case.ranks[r], &mut self.memories[r]);
        Tables::new(case, rank, memory.kind(), |b| memory.address(rank.buffers[b].block, rank.buffers[b].at))
    }

    /// All ranks give other tables, in other memory, and connect again.
    pub fn rebuild(&mut self, case: &'a Case, rng: &mut Rng) -> Result<(), String> {
        let fresh = |(rank, old): (&super::model::Rank, &Memory)| Memory::new(old.kind(), &rank.blocks, rng.u64(..));
        let memories: Vec<Memory> = case.ranks.iter().zip(&self.memories).map(fresh).collect();
        for (r, old) in std::mem::replace(&mut self.memories, memories).into_iter().enumerate() {
            let was = old.bytes();
            self.retired.push((self.case, r, old, was));
        }
        let tables: Vec<Tables> = (0..case.ranks.len()).map(|r| self.tables_of(case, r)).collect();
        self.all_ok("rebind to other boxes", |r, c| c.rebind(&tables[r]))?;
        self.containers.iter_mut().zip(&self.memories).for_each(|(c, memory)| c.stream = memory.stream());
        self.case = case;
        self.versions = case.ranks.iter().map(|r| vec![Some(0); r.buffers.len()]).collect();
        self.all_ok("connect again", |_, c| c.connect())
    }

    /// New communicators for containers whose old ones failed, and a new connect.
    pub fn renew(&mut self) -> Result<(), String> {
        self.lent.iter_mut().for_each(Lent::abort);
        let (lent, comms, hub) = communicators(self.case, &self.memories, self.wire);
        self.all_ok("set_comm", |r, c| c.set_comm(&comms[r]))?;
        (self.comms, self.lent, self.hub) = (comms, lent, hub);
        self.all_ok("connect after a failure", |_, c| c.connect())
    }

    /// The end of all handles; the caller's communicators must have been released, each once.
    pub fn close(self) -> Result<(), String> {
        let World { containers, comms, hub, case, lent, .. } = self;
        drop((comms, containers));
        drop(lent);
        let released = hub.map_or(case.ranks.len(), |hub| hub.take().released);
        if released == case.ranks.len() {
            Ok(())
        } else {
            Err(format!("{released} of {} communicators released", case.ranks.len()))
        }
    }
}
