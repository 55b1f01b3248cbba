//! `loopback`: the ranks are threads of one process.
//!
//! Ranks that name the same hub number meet in a table of the process. A hub holds one mutex with everything its ranks share and
//! one condition variable that every change wakes; weights are read where they lie, so nothing here touches a weight.
//!
//! Knows threads, hub numbers and deadlines. Must not know tensors, plans or other processes.
#![forbid(unsafe_code)]

use super::page::Page;
use super::{Access, Comm, Deadline, Later, Opened, Window, Windows};
use crate::abi::*;
use crate::device::Mem;
use crate::error::{Error, Result, bail, err};
use crate::geom::StridedCopy;
use std::collections::{BTreeMap, VecDeque};
use std::sync::atomic::AtomicBool;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

#[cfg(test)]
mod tests;

/// Every hub that has a rank. Locked before a hub's own state, never after it.
static HUBS: Mutex<BTreeMap<u64, Arc<Hub>>> = Mutex::new(BTreeMap::new());

/// Far more threads than a process has: a larger world is a mistake, and would only cost memory.
const MAX_WORLD: u32 = 1 << 16;

/// Joins hub `hub` of this process as `rank` of `world`. Returns at once: the first collective waits for the other ranks.
///
/// A number is free again once all its ranks are dropped, or once its communicator failed. Errors: `RS_ERR_INVALID` for a rank
/// outside the world or taken, for a world of more than 65,536, and for another world size than the ranks already there.
pub fn join(hub: u64, rank: u32, world: u32) -> Result<Arc<dyn Comm>> {
    if rank >= world {
        bail!(RS_ERR_INVALID, "loopback hub {hub}: rank {rank} of {world}; ranks count from 0 to one less than the world");
    }
    if world > MAX_WORLD {
        bail!(
            RS_ERR_INVALID,
            "loopback hub {hub}: a world of {world} ranks; each is a thread of this process, {MAX_WORLD} at most"
        );
    }
    let mut hubs = lock(&HUBS);
    let found = match hubs.get(&hub) {
        Some(old) if old.lock().failed.is_none() => old.clone(),
        _ => {
            let new = Arc::new(Hub { number: hub, world, shared: Mutex::new(Shared::new(world)), changed: Condvar::new() });
            hubs.insert(hub, new.clone());
            new
        }
    };
    if found.world != world {
        bail!(
            RS_ERR_INVALID,
            "loopback hub {hub}: rank {rank} says the world has {world} ranks, the ranks there say {}",
            found.world
        );
    }
    {
        let mut shared = found.lock();
        let seat = &mut shared.seats[rank as usize];
        if seat.joined {
            bail!(RS_ERR_INVALID, "loopback hub {hub}: there is a rank {rank} already; each rank joins once");
        }
        seat.joined = true;
    }
    Ok(Arc::new(Loopback { hub: found, rank, taken: AtomicBool::new(false), begun: Mutex::default() }))
}

/// What the ranks of one number share.
struct Hub {
    number: u64,
    world: u32,
    shared: Mutex<Shared>,
    changed: Condvar,
}

struct Shared {
    seats: Vec<Seat>,
    /// The end of the communicator: the first reason stays.
    failed: Option<Error>,
    /// Number of gathers completed, and what the last of them gave. One is enough: the next completes only with the word of every
    /// rank, and a rank speaks only after it took the last one.
    gathers: u64,
    gathered: Arc<Vec<u8>>,
    /// Blocks on their way from an owner to a reader, one entry per exchange.
    offers: BTreeMap<(u32, u32), VecDeque<Vec<Mem>>>,
    /// Pages of words, likewise.
    pages: BTreeMap<(u32, u32), VecDeque<Arc<Page>>>,
}

/// One rank as the others see it.
#[derive(Default)]
struct Seat {
    joined: bool,
    /// Its word in the gather that is going on.
    word: Option<Vec<u8>>,
    /// Chunks of its memory being read now.
    readers: u32,
    /// It gave up: nobody may begin to read its memory.
    revoked: bool,
}

impl Shared {
    fn new(world: u32) -> Shared {
        Shared {
            seats: (0..world).map(|_| Seat::default()).collect(),
            failed: None,
            gathers: 0,
            gathered: Arc::default(),
            offers: BTreeMap::new(),
            pages: BTreeMap::new(),
        }
    }

    fn check(&self) -> Result<()> {
        self.failed.clone().map_or(Ok(()), Err)
    }
}

impl Hub {
    fn lock(&self) -> MutexGuard<'_, Shared> {
        lock(&self.shared)
    }

    /// Ends the communicator with `error`, or with the earlier reason, which it returns.
    fn fail(&self, shared: &mut Shared, error: Error) -> Error {
        let first = shared.failed.get_or_insert_with(|| error.context(format_args!("loopback hub {}", self.number))).clone();
        self.changed.notify_all();
        first
    }

    /// Waits until `ready` gives something. What is ready counts even if the communicator failed since: a gather that completed
    /// is complete on every rank. A missed deadline ends the communicator; `missing` says who did not do what.
    fn wait<T>(
        &self,
        mut shared: MutexGuard<'_, Shared>,
        deadline: Deadline,
        mut ready: impl FnMut(&mut Shared) -> Option<T>,
        missing: impl Fn(&Shared) -> String,
    ) -> Result<T> {
        loop {
            if let Some(found) = ready(&mut shared) {
                return Ok(found);
            }
            shared.check()?;
            if let Err(late) = deadline.check(|| missing(&shared)) {
                return Err(self.fail(&mut shared, late));
            }
            shared = self.changed.wait_timeout(shared, deadline.left()).unwrap_or_else(PoisonError::into_inner).0;
        }
    }
}

/// Nothing that is done under these locks can be left half done, so a panic elsewhere does not make their content wrong.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// One rank's end.
struct Loopback {
    hub: Arc<Hub>,
    rank: u32,
    taken: AtomicBool,
    /// Of a gather that was begun and has not ended: the gathers before it.
    begun: Mutex<Option<u64>>,
}

impl Loopback {
    /// Gives this rank's word; the number of gathers before the one that it is of.
    fn speak(&self, shared: &mut Shared, mine: &[u8]) -> Result<u64> {
        shared.check()?;
        if shared.seats[self.rank as usize].word.is_some() {
            bail!(RS_ERR_BUSY, "rank {} gathers in two threads at once; collectives of a communicator are serial", self.rank);
        }
        let first = shared.seats.iter().enumerate().find_map(|(rank, seat)| Some((rank, seat.word.as_ref()?.len())));
        if let Some((other, bytes)) = first.filter(|(_, bytes)| *bytes != mine.len()) {
            let error = err!(
                RS_ERR_COMM,
                "rank {} gathers {} bytes where rank {other} gathers {bytes}; all ranks make the same calls in the same order",
                self.rank,
                mine.len()
            );
            return Err(self.hub.fail(shared, error));
        }
        let before = shared.gathers;
        shared.seats[self.rank as usize].word = Some(mine.to_vec());
        if shared.seats.iter().all(|seat| seat.word.is_some()) {
            let words: Vec<Vec<u8>> = shared.seats.iter_mut().filter_map(|seat| seat.word.take()).collect();
            shared.gathered = Arc::new(words.concat());
            shared.gathers += 1;
            self.hub.changed.notify_all();
        }
        Ok(before)
    }

    /// Who is missing in a gather that this rank is in.
    fn missing(&self, shared: &Shared) -> String {
        format!("{} to join a gather that rank {} is in", silent(&shared.seats), self.rank)
    }

    fn seat<'a>(&self, shared: &'a mut Shared, rank: u32) -> Result<&'a mut Seat> {
        let world = self.hub.world;
        shared.seats.get_mut(rank as usize).ok_or_else(|| err!(RS_ERR_INTERNAL, "rank {rank} of a world of {world}"))
    }
}

/// `rank 1, rank 4 (never joined)`: those whose word is missing.
fn silent(seats: &[Seat]) -> String {
    let name = |(rank, seat): (usize, &Seat)| match (&seat.word, seat.joined) {
        (Some(_), _) => None,
        (None, true) => Some(format!("rank {rank}")),
        (None, false) => Some(format!("rank {rank} (never joined)")),
    };
    seats.iter().enumerate().filter_map(name).collect::<Vec<_>>().join(", ")
}

impl Comm for Loopback {
    fn name(&self) -> &str {
        "loopback"
    }

    fn rank(&self) -> u32 {
        self.rank
    }

    fn world(&self) -> u32 {
        self.hub.world
    }

    fn allgather(&self, mine: &[u8], deadline: Deadline) -> Result<Vec<u8>> {
        let mut shared = self.hub.lock();
        let before = self.speak(&mut shared, mine)?;
        let ready = |shared: &mut Shared| (shared.gathers > before).then(|| shared.gathered.clone());
        let gathered = self.hub.wait(shared, deadline, ready, |shared| self.missing(shared))?;
        Ok(gathered.to_vec())
    }

    fn abort(&self, why: &str) {
        self.hub.fail(&mut self.hub.lock(), err!(RS_ERR_ABORTED, "rank {} aborted: {why}", self.rank));
    }

    fn check(&self) -> Result<()> {
        self.hub.lock().check()
    }

    fn later(&self) -> Option<&dyn Later> {
        Some(self)
    }

    fn windows(&self) -> Option<&dyn Windows> {
        Some(self)
    }
}

impl Later for Loopback {
    fn taken(&self) -> &AtomicBool {
        &self.taken
    }

    fn begin(&self, mine: &[u8]) -> Result<()> {
        let before = self.speak(&mut self.hub.lock(), mine)?;
        *lock(&self.begun) = Some(before);
        Ok(())
    }

    fn ended(&self, deadline: Deadline) -> Result<Option<Vec<u8>>> {
        let mut begun = lock(&self.begun);
        let Some(before) = *begun else { bail!(RS_ERR_INTERNAL, "the end of a gather that was not begun") };
        let mut shared = self.hub.lock();
        if shared.gathers > before {
            *begun = None;
            return Ok(Some(shared.gathered.to_vec()));
        }
        shared.check()?;
        match deadline.check(|| self.missing(&shared)) {
            Ok(()) => Ok(None),
            Err(late) => Err(self.hub.fail(&mut shared, late)),
        }
    }
}

impl Windows for Loopback {
    fn exchange(&self, offers: &[(u32, Vec<Mem>)], owners: &[u32], deadline: Deadline) -> Result<Opened> {
        let mut shared = self.hub.lock();
        shared.check()?;
        if self.seat(&mut shared, self.rank)?.revoked {
            bail!(RS_ERR_STATE, "rank {} has taken its memory back from its readers; make another communicator", self.rank);
        }
        for (reader, blocks) in offers {
            self.seat(&mut shared, *reader)?;
            shared.offers.entry((self.rank, *reader)).or_default().push_back(blocks.clone());
        }
        self.hub.changed.notify_all();
        drop(shared);
        let mut windows = Vec::with_capacity(owners.len());
        for owner in owners {
            let blocks = self.hub.wait(
                self.hub.lock(),
                deadline,
                |shared| shared.offers.get_mut(&(*owner, self.rank))?.pop_front(),
                |_| format!("rank {owner} to tell rank {} which memory it may read", self.rank),
            )?;
            windows.push(blocks.into_iter().map(Window::Mapped).collect());
        }
        let granted = offers.iter().map(|(_, blocks)| vec![Access::Mapped; blocks.len()]).collect();
        Ok(Opened { windows, granted })
    }

    fn share(&self, words: usize, peers: &[u32], deadline: Deadline) -> Result<Vec<Arc<Page>>> {
        let mut pages = vec![Arc::new(Page::new(words)?.0)];
        let mut shared = self.hub.lock();
        shared.check()?;
        for peer in peers {
            self.seat(&mut shared, *peer)?;
            shared.pages.entry((self.rank, *peer)).or_default().push_back(pages[0].clone());
        }
        self.hub.changed.notify_all();
        drop(shared);
        for peer in peers {
            pages.push(self.hub.wait(
                self.hub.lock(),
                deadline,
                |shared| shared.pages.get_mut(&(*peer, self.rank))?.pop_front(),
                |_| format!("rank {peer} to share its words with rank {}", self.rank),
            )?);
        }
        Ok(pages)
    }

    fn prefers_read(&self, _run: u64) -> bool {
        true
    }

    fn read(&self, owner: u32, window: &Window, _dst: Mem, _copy: &StridedCopy) -> Result<()> {
        bail!(RS_ERR_INTERNAL, "a read of rank {owner} through {window:?}: loopback maps every window")
    }

    fn enter(&self, owner: u32) -> Result<()> {
        let mut shared = self.hub.lock();
        shared.check()?;
        let seat = self.seat(&mut shared, owner)?;
        if seat.revoked {
            bail!(RS_ERR_PEER, "rank {owner} gave up and took its memory back");
        }
        seat.readers += 1;
        Ok(())
    }

    fn leave(&self, owner: u32) {
        let mut shared = self.hub.lock();
        let seat = &mut shared.seats[owner as usize];
        seat.readers -= 1;
        if seat.revoked && seat.readers == 0 {
            self.hub.changed.notify_all();
        }
    }

    fn revoke(&self) {
        let mut shared = self.hub.lock();
        shared.seats[self.rank as usize].revoked = true;
        // No deadline: a reader is a thread of this process within one chunk of a copy.
        while shared.seats[self.rank as usize].readers > 0 {
            shared = self.hub.changed.wait(shared).unwrap_or_else(PoisonError::into_inner);
        }
    }
}

impl Drop for Loopback {
    fn drop(&mut self) {
        let mut hubs = lock(&HUBS);
        let mut shared = self.hub.lock();
        shared.seats[self.rank as usize].joined = false;
        if shared.seats.iter().any(|seat| seat.joined) {
            self.hub.fail(&mut shared, err!(RS_ERR_PEER, "rank {} left the communicator", self.rank));
        } else if hubs.get(&self.hub.number).is_some_and(|hub| Arc::ptr_eq(hub, &self.hub)) {
            hubs.remove(&self.hub.number);
        }
    }
}
