//! A plan on a device and a communicator: the only place that moves bytes.
//!
//! Three ways, by what the communicator can do: the target reads the source's memory; messages pass through memory that the
//! communicator lends; or staging of our own is sent and received in rounds. [`work`] turns pieces into lists of copies once a plan,
//! this file runs the first two ways, [`group`] the third; [`batches`] makes the lists ready for a device that wants that.
//!
//! [`Run::run`] returns when all is done. Where lists are ready and others' streams can be waited for ([`signs`], or a communicator that
//! works on streams), [`Run::enqueue`] puts all of it on the caller's stream and returns.
//!
//! Knows copies, ranks, messages. Must not know tensors' names, versions, or how the others were agreed with.
#![forbid(unsafe_code)]

pub mod batches;
pub mod group;
pub mod scan;
pub mod signs;
pub mod work;

use crate::abi::{RS_DEVICE_CPU, RS_ERR_DEVICE, RS_ERR_INTERNAL, RS_ERR_MEMORY};
use crate::comm::{Comm, Deadline, Window, Windows};
use crate::device::{Copies, Device, Event, Job, Mem, Stream};
use crate::error::{Result, err};
use batches::{Batches, Places};
use signs::Signs;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;
use work::{Lane, Origin, Parcel, Unit, Work};

/// Longest sleep between two looks at deadline and peers.
const SLICE: Duration = Duration::from_millis(5);

/// How long a device may take beyond the deadline for copies that were started.
pub const GRACE: Duration = Duration::from_secs(5);

/// All that one sync needs besides its [`Work`].
pub struct Run<'a> {
    /// Who copies.
    pub device: &'a Arc<dyn Device>,
    /// Who the others are.
    pub comm: &'a dyn Comm,
    /// Where the memory is.
    pub places: Places<'a>,
    /// The lists of the work that is run, where the device wants them ready.
    pub batches: Option<&'a Batches>,
    /// The caller's stream.
    pub stream: Stream,
    /// Threads that copy, the caller's included.
    pub threads: usize,
    /// End of all waiting.
    pub deadline: Deadline,
    /// Set before the first byte of a target is written.
    pub wrote: &'a AtomicBool,
    /// Set when the device does not finish what was started: what that uses must not be given back.
    pub stuck: &'a AtomicBool,
}

impl Run<'_> {
    /// Moves everything; `progress` hears the bytes done so far. On an error some bytes may have moved (see `wrote`), and no thread
    /// of ours touches memory any more.
    pub fn run(&self, work: &Work, progress: &mut dyn FnMut(u64)) -> Result<()> {
        let result = self.all(work, progress);
        if result.is_err() {
            // Copies that were started may still be under way, and the caller is about to get its memory back.
            let _ = self.drain();
        }
        result
    }

    fn all(&self, work: &Work, progress: &mut dyn FnMut(u64)) -> Result<()> {
        let done = AtomicU64::new(0);
        match self.batches {
            None => self.phase(&work.units, &work.lanes, work, &done, progress)?,
            Some(batches) => self.started(batches, work, &done)?,
        }
        if let Some(group) = &work.group {
            group.run(self, &done, progress)?;
        }
        // Doubles read what has just landed.
        self.settle()?;
        match self.batches {
            None => self.phase(&work.after, &[], work, &done, progress)?,
            Some(batches) => {
                batches.after.start(self.stream)?;
                done.fetch_add(work.bytes.doubled, Ordering::Relaxed);
            }
        }
        self.settle()?;
        progress(done.load(Ordering::Relaxed));
        Ok(())
    }

    /// Puts everything on the stream, behind what is there and, with words, behind the owners' streams. `signs`: the words, and the
    /// number of this sync. An error may leave a part of it on the stream.
    pub fn enqueue(&self, work: &Work, batches: &Batches, signs: Option<(&Signs, u64)>) -> Result<()> {
        if let Some((signs, number)) = signs {
            signs.enter(self.stream, number)?;
        }
        if !work.units.is_empty() {
            self.wrote.store(true, Ordering::Relaxed);
            batches.units.start(self.stream)?;
        }
        if let Some((signs, number)) = signs {
            signs.leave(self.stream, number)?;
        }
        if let Some(group) = &work.group {
            group.enqueue(self, batches)?;
        }
        // Doubles read what has just landed.
        batches.after.start(self.stream)
    }

    fn settle(&self) -> Result<()> {
        settle(&**self.device, self.stream, self.comm, self.deadline)
    }

    /// Returns when the device has come to a mark.
    fn reach(&self, mark: &Event) -> Result<()> {
        let what = || format!("the stream of {}, which takes no more before it has done some", self.device.name());
        until(&**self.device, mark, || self.comm.sound().and_then(|()| self.deadline.check(what)))
    }

    /// Returns when the device has done all that was started, dead peers or not; a device that does not within the deadline and
    /// [`GRACE`], or the latter alone where the communicator has ended, is stuck: that is found out once.
    fn drain(&self) -> Result<()> {
        if self.stuck.load(Ordering::Relaxed) {
            return Err(err!(RS_ERR_DEVICE, "{} did not finish copies of a failed sync", self.device.name()));
        }
        let wait = if self.comm.check().is_err() { GRACE } else { self.deadline.left() + GRACE };
        let end = Deadline::after(wait);
        let done = until_done(&**self.device, self.stream, || end.check(|| "the device to finish copies of a failed sync".into()));
        if done.is_err() {
            self.stuck.store(true, Ordering::Relaxed);
        }
        done
    }

    /// All units at once, from lists that are ready.
    fn started(&self, batches: &Batches, work: &Work, done: &AtomicU64) -> Result<()> {
        if work.units.is_empty() {
            return Ok(());
        }
        self.wrote.store(true, Ordering::Relaxed);
        let mut reading = vec![];
        if let Some(windows) = self.comm.windows() {
            reading = work.owners.iter().map(|&rank| Reading::begin(windows, rank)).collect::<Result<_>>()?;
        }
        let settled = batches.units.start(self.stream).and_then(|()| self.settle());
        if settled.is_err() {
            // Owners may take their memory back as soon as we leave.
            let _ = self.drain();
        }
        drop(reading);
        done.fetch_add(work.units.iter().map(|u| u.bytes).sum(), Ordering::Relaxed);
        settled
    }

    /// Units and lanes together, on all threads.
    fn phase(&self, units: &[Unit], lanes: &[Lane], work: &Work, done: &AtomicU64, progress: &mut dyn FnMut(u64)) -> Result<()> {
        if units.is_empty() && lanes.is_empty() {
            return Ok(());
        }
        let next = AtomicUsize::new(0);
        let failed: Mutex<Option<crate::error::Error>> = Mutex::new(None);
        let stop = AtomicBool::new(false);
        let threads = self.threads.clamp(1, (units.len() + lanes.len()).max(1));
        let worker = |me: usize, progress: &mut dyn FnMut(u64)| {
            let mut cursors: Vec<Cursor<'_>> =
                lanes.iter().skip(me).step_by(threads).map(|lane| Cursor { lane, sent: 0, got: 0 }).collect();
            let mut step = || -> Result<bool> {
                let mut moved = false;
                for c in &mut cursors {
                    moved |= self.lane(c, done)?;
                }
                cursors.retain(|c| !c.done());
                let unit = units.get(next.fetch_add(1, Ordering::Relaxed));
                if let Some(unit) = unit {
                    self.unit(unit, work)?;
                    done.fetch_add(unit.bytes, Ordering::Relaxed);
                } else if cursors.is_empty() {
                    return Ok(false);
                }
                self.comm.check()?;
                self.deadline.check(|| match cursors.first() {
                    Some(c) => format!("messages between this rank and rank {}", c.lane.peer),
                    None => "the copies of this rank".to_string(),
                })?;
                if let (false, None, Some(pipe)) = (moved, unit, self.comm.pipe()) {
                    pipe.wait(SLICE.min(self.deadline.left()))?;
                }
                Ok(true)
            };
            loop {
                if stop.load(Ordering::Relaxed) {
                    return;
                }
                match step() {
                    Ok(true) => progress(done.load(Ordering::Relaxed)),
                    Ok(false) => return,
                    Err(e) => {
                        stop.store(true, Ordering::Relaxed);
                        failed.lock().unwrap_or_else(|p| p.into_inner()).get_or_insert(e);
                        return;
                    }
                }
            }
        };
        std::thread::scope(|scope| {
            for me in 1..threads {
                let worker = &worker;
                if let Err(e) = std::thread::Builder::new().spawn_scoped(scope, move || worker(me, &mut |_| {})) {
                    // Lanes are dealt to threads by number: without one of them nothing goes.
                    stop.store(true, Ordering::Relaxed);
                    let e = err!(RS_ERR_MEMORY, "thread {me} of host_threads {} cannot start: {e}", self.threads);
                    failed.lock().unwrap_or_else(|p| p.into_inner()).get_or_insert(e);
                    return;
                }
            }
            worker(0, progress);
        });
        failed.into_inner().unwrap_or_else(|p| p.into_inner()).map_or(Ok(()), Err)
    }

    fn mem(&self, buffer: u32) -> Result<Mem> {
        self.places.mem(buffer)
    }

    /// One unit of reading or of copying inside the rank.
    fn unit(&self, unit: &Unit, work: &Work) -> Result<()> {
        self.wrote.store(true, Ordering::Relaxed);
        match unit.origin {
            Origin::Own => {
                self.jobs(unit.steps.iter().map(|s| Ok(Job::new(self.mem(s.src)?, self.mem(s.dst)?, &s.copy)?.streaming())))
            }
            Origin::Owner(at) => {
                let rank = work.owners[at];
                let windows = self.comm.windows().ok_or_else(|| lost("the communicator's windows"))?;
                let _reading = Reading::begin(windows, rank)?;
                let lists = self.places.windows.get(at).map_or(&[][..], |w| w);
                let started = self.jobs(unit.steps.iter().filter_map(|s| self.read(windows, rank, lists, s).transpose()));
                // The owner may take its memory back as soon as we leave.
                if self.device.id().0 == RS_DEVICE_CPU { started } else { started.and(self.drain()) }
            }
        }
    }

    /// A copy out of an owner's memory: a job where it is mapped, else done here.
    fn read<'s>(&self, windows: &dyn Windows, owner: u32, list: &[Window], s: &'s work::Step) -> Result<Option<Job<'s>>> {
        match list.get(s.src as usize) {
            Some(Window::Mapped(mem)) => Ok(Some(Job::new(*mem, self.mem(s.dst)?, &s.copy)?.streaming())),
            Some(window @ Window::Remote { .. }) => windows.read(owner, window, self.mem(s.dst)?, &s.copy).map(|()| None),
            _ => Err(lost(format_args!("window {} of rank {owner}", s.src))),
        }
    }

    fn jobs<'j>(&self, jobs: impl Iterator<Item = Result<Job<'j>>>) -> Result<()> {
        let jobs: smallvec::SmallVec<[Job<'j>; 16]> = jobs.collect::<Result<_>>()?;
        match self.device.copies() {
            _ if jobs.is_empty() => Ok(()),
            Copies::AsTheyAre(device) => device.copy(&jobs, self.stream),
            Copies::Prepared(_) => Err(lost("a prepared list")),
        }
    }

    /// From the rank's buffers into a message.
    fn pack(&self, parcel: &Parcel, into: Mem) -> Result<()> {
        self.jobs(self.places.packing(parcel, into))
    }

    /// From a message into the rank's buffers.
    fn unpack(&self, parcel: &Parcel, from: Mem) -> Result<()> {
        self.wrote.store(true, Ordering::Relaxed);
        self.jobs(self.places.unpacking(parcel, from))
    }

    /// As many messages of one pair as go without waiting, one of each direction at most.
    fn lane(&self, c: &mut Cursor<'_>, done: &AtomicU64) -> Result<bool> {
        let pipe = self.comm.pipe().ok_or_else(|| lost("the communicator's pipe"))?;
        let mut moved = false;
        if let Some(parcel) = c.lane.out.get(c.sent) {
            if let Some(slot) = pipe.reserve(c.lane.peer)? {
                self.pack(parcel, slot)?;
                pipe.commit(c.lane.peer, parcel.bytes as usize)?;
                done.fetch_add(parcel.bytes, Ordering::Relaxed);
                c.sent += 1;
                moved = true;
            }
        }
        if let Some(parcel) = c.lane.into.get(c.got) {
            if let Some(slot) = pipe.arrived(c.lane.peer, parcel.bytes as usize)? {
                self.unpack(parcel, slot)?;
                pipe.release(c.lane.peer)?;
                done.fetch_add(parcel.bytes, Ordering::Relaxed);
                c.got += 1;
                moved = true;
            }
        }
        Ok(moved)
    }
}

/// Returns when the device has done all that was put on the stream, or when there is no point in waiting on.
pub fn settle(device: &dyn Device, stream: Stream, comm: &dyn Comm, deadline: Deadline) -> Result<()> {
    until_done(device, stream, || comm.check().and_then(|()| deadline.check(|| format!("the stream of {}", device.name()))))
}

fn until_done(device: &dyn Device, stream: Stream, wait_on: impl Fn() -> Result<()>) -> Result<()> {
    let event = device.record(stream)?;
    let waited = until(device, &event, wait_on);
    device.forget(event);
    waited
}

fn until(device: &dyn Device, event: &Event, wait_on: impl Fn() -> Result<()>) -> Result<()> {
    while !device.query(event)? {
        wait_on()?;
        std::thread::sleep(Duration::from_micros(20));
    }
    Ok(())
}

/// A place in a pair's two lists of messages.
struct Cursor<'a> {
    lane: &'a Lane,
    sent: usize,
    got: usize,
}

impl Cursor<'_> {
    fn done(&self) -> bool {
        self.sent == self.lane.out.len() && self.got == self.lane.into.len()
    }
}

/// A chunk being read from an owner that may give up meanwhile.
struct Reading<'a> {
    windows: &'a dyn Windows,
    owner: u32,
}

impl<'a> Reading<'a> {
    fn begin(windows: &'a dyn Windows, owner: u32) -> Result<Reading<'a>> {
        windows.enter(owner)?;
        Ok(Reading { windows, owner })
    }
}

impl Drop for Reading<'_> {
    fn drop(&mut self) {
        self.windows.leave(self.owner);
    }
}

/// Staging memory, the caller's or the device's, which is given back when dropped: nothing that uses it may be running then.
pub struct Staging {
    device: Arc<dyn Device>,
    mem: Option<Mem>,
    given: bool,
}

impl Staging {
    /// `given`: the caller's memory, if it is to be used.
    pub fn new(device: Arc<dyn Device>, bytes: u64, given: Option<Mem>) -> Result<Staging> {
        let mem = match given {
            _ if bytes == 0 => None,
            None => Some(device.alloc(bytes as usize)?),
            Some(mem) => Some(mem.cut(0, bytes as usize).ok_or_else(|| lost("a part of the caller's staging"))?),
        };
        Ok(Staging { device, mem, given: given.is_some() })
    }

    /// `None`: none is needed.
    pub fn mem(&self) -> Option<Mem> {
        self.mem
    }
}

impl Drop for Staging {
    fn drop(&mut self) {
        if let Some(mem) = self.mem.take().filter(|_| !self.given) {
            self.device.free(mem);
        }
    }
}

fn lost(what: impl std::fmt::Display) -> crate::error::Error {
    err!(RS_ERR_INTERNAL, "{what} is missing in a plan that uses it")
}
