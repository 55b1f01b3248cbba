//! A sync that is on its stream: what each look at it does, until all ranks have landed or a failed one is over.
//!
//! Nothing here waits. A failed sync is over when nothing of it runs any more on this rank's streams and nobody reads this rank's
//! memory, or when that has taken too long.
#![forbid(unsafe_code)]

use super::connect::Connected;
use super::sync::fatal;
use crate::abi::*;
use crate::comm::{Comm, Deadline};
use crate::device::{Device, Event, Stream};
use crate::error::{Error, Result, err};
use crate::exec::GRACE;
use crate::exec::signs::Signs;
use crate::wire::Header;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

/// How long a stream may take once all its waits were ended.
pub(super) const LAST: Duration = Duration::from_secs(1);

/// One sync under way.
pub(super) struct Flight {
    pub device: Arc<dyn Device>,
    pub comm: Arc<dyn Comm>,
    pub stream: Stream,
    pub deadline: Deadline,
    pub begun: Instant,
    /// What all ranks agreed on.
    pub header: Header,
    /// The count of this sync, for words.
    pub number: u64,
    /// The tensors that move, by ordinal; `None`: all.
    pub subset: Option<Vec<bool>>,
    /// Whether a byte of a target may have been written.
    pub wrote: bool,
    /// Whether what was put on streams cannot be seen to end.
    pub stuck: bool,
    /// Whether it was put into a graph: nothing has moved.
    pub captured: bool,
    /// Behind all of it on the stream; `None`: nothing is there.
    pub end: Option<Event>,
    stage: Stage,
    _turn: Turn,
}

enum Stage {
    Moving,
    Agreeing,
    Failing { error: Error, landed: bool, until: Deadline, released: bool },
}

/// What a look at a flight found.
pub(super) enum Step {
    Going,
    Landed,
    /// Over. `landed`: all had arrived on this rank. `stuck`: something of it may still run.
    Failed {
        error: Error,
        landed: bool,
        stuck: Option<Stuck>,
    },
}

/// A mark behind all that is on a stream: once more where that fails, as it may with an error of earlier work.
pub(super) fn mark(device: &dyn Device, stream: Stream) -> Option<Event> {
    device.record(stream).or_else(|_| device.record(stream)).ok()
}

/// Something on a stream that nobody waits for.
pub(super) struct Stuck {
    device: Arc<dyn Device>,
    /// Its end, if that can be seen at all.
    end: Option<Event>,
}

impl Stuck {
    /// All that is on the stream so far.
    pub fn on(device: &Arc<dyn Device>, stream: Stream) -> Stuck {
        Stuck { device: device.clone(), end: mark(&**device, stream) }
    }

    /// The same where that mark does not tell.
    fn unseen(mut self) -> Stuck {
        self.end.take().into_iter().for_each(|end| self.device.forget(end));
        self
    }

    /// Whether it is known to be over.
    pub fn over(&self) -> bool {
        self.end.as_ref().is_some_and(|end| self.device.query(end) == Ok(true))
    }

    /// Whether it is known not to be over yet.
    pub fn goes_on(&self) -> bool {
        self.end.as_ref().is_some_and(|end| self.device.query(end) == Ok(false))
    }

    /// Lets what is started later on the stream wait for it.
    pub fn before(&self, stream: Stream) -> Result<()> {
        match &self.end {
            Some(end) => self.device.wait(stream, end),
            None => Err(err!(
                RS_ERR_STATE,
                "{} may still be busy with a failed sync, and cannot be asked: destroy the container, and reset the device if need be",
                self.device.name()
            )),
        }
    }
}

impl Drop for Stuck {
    fn drop(&mut self) {
        if let Some(end) = self.end.take() {
            self.device.forget(end);
        }
    }
}

/// A connection that something stuck uses: given back with it if that has ended by then, else left where it is.
pub(super) struct Wreck {
    stuck: Stuck,
    connected: Option<Box<Connected>>,
}

impl Wreck {
    pub fn new(stuck: Stuck, connected: Box<Connected>) -> Wreck {
        log::warn!("{} has not finished what was put on a stream: the memory that it uses is kept", stuck.device.name());
        Wreck { stuck, connected: Some(connected) }
    }

    /// See [`Stuck`].
    pub fn stuck(&self) -> &Stuck {
        &self.stuck
    }
}

impl Drop for Wreck {
    fn drop(&mut self) {
        if !self.stuck.over() {
            log::warn!(
                "{} is not through with a stream: the memory that is used there is left where it is",
                self.stuck.device.name()
            );
            std::mem::forget(self.connected.take());
        }
    }
}

impl Flight {
    #[allow(clippy::too_many_arguments)] // What the others' fields begin with is the same for all.
    pub fn new(
        device: &Arc<dyn Device>,
        comm: &Arc<dyn Comm>,
        stream: Stream,
        deadline: Deadline,
        header: Header,
        number: u64,
        turn: Turn,
    ) -> Flight {
        Flight {
            device: device.clone(),
            comm: comm.clone(),
            stream,
            deadline,
            begun: Instant::now(),
            header,
            number,
            subset: None,
            wrote: false,
            stuck: false,
            captured: false,
            end: None,
            stage: Stage::Moving,
            _turn: turn,
        }
    }

    /// Ends it for this reason, here and everywhere.
    pub fn fail(&mut self, error: Error, signs: Option<&Signs>) {
        if matches!(self.stage, Stage::Failing { .. }) {
            return;
        }
        // What landed stays whole, whatever happens to the agreement.
        let landed = matches!(self.stage, Stage::Agreeing);
        self.comm.abort(error.text());
        if let Some(signs) = signs {
            signs.revoke();
        }
        self.stage = Stage::Failing { error: fatal(error), landed, until: Deadline::after(GRACE), released: false };
    }

    /// Looks at it.
    pub fn step(&mut self, signs: Option<&Signs>) -> Step {
        let looked = match self.stage {
            Stage::Moving => self.moving(signs).map(|_| false),
            Stage::Agreeing => self.agreeing(),
            Stage::Failing { .. } => Ok(false),
        };
        match looked {
            Ok(true) => return Step::Landed,
            Ok(false) => {}
            Err(e) => self.fail(e, signs),
        }
        if matches!(self.stage, Stage::Failing { .. }) { self.failing(signs) } else { Step::Going }
    }

    /// Whether the stream has done all of it; then the agreement begins.
    fn moving(&mut self, signs: Option<&Signs>) -> Result<()> {
        if let Some(end) = &self.end {
            if !self.device.query(end)? {
                self.comm.sound()?;
                return self.deadline.check(|| {
                    let late = signs.map_or(vec![], |s| s.late(self.number));
                    format!("the stream of {}{}", self.device.name(), late.join(""))
                });
            }
        }
        self.forget();
        // What is done may be so because somebody gave up.
        self.comm.sound()?;
        if let Err(gone) = signs.map_or(Ok(()), Signs::kept) {
            // Why it gave up, it has told before it did: that is a moment away.
            return if self.deadline.passed() { Err(gone) } else { Ok(()) };
        }
        self.stage = Stage::Agreeing;
        self.later()?.begin(&self.header.encode())
    }

    fn agreeing(&self) -> Result<bool> {
        match self.later()?.ended(self.deadline)? {
            None => Ok(false),
            Some(all) => super::sync::agreed(&self.header, &all).map(|()| true),
        }
    }

    fn later(&self) -> Result<&dyn crate::comm::Later> {
        self.comm.later().ok_or_else(|| err!(RS_ERR_INTERNAL, "the communicator's later gathers are missing"))
    }

    fn failing(&mut self, signs: Option<&Signs>) -> Step {
        if let Some(signs) = signs {
            signs.release(&*self.comm, false);
        }
        // A question that fails says nothing of the stream.
        if self.end.as_ref().is_some_and(|end| self.device.query(end) == Ok(true)) {
            self.forget();
        }
        let idle = !self.stuck && self.comm.group().is_none_or(|g| g.idle());
        let over = self.end.is_none() && idle;
        if let Some(signs) = signs.filter(|_| over) {
            signs.left(self.number);
        }
        let read = signs.is_some_and(|s| s.read(&*self.comm, self.number));
        let Stage::Failing { error, landed, until, released } = &mut self.stage else { return Step::Going };
        if (!over || read) && !(until.passed() && *released) {
            if until.passed() {
                if let Some(signs) = signs {
                    signs.release(&*self.comm, true);
                }
                (*until, *released) = (Deadline::after(LAST), true);
            }
            return Step::Going;
        }
        let (error, landed) = (error.clone(), *landed);
        let end = self.end.take();
        let stuck = (!over).then(|| Stuck { device: self.device.clone(), end });
        let stuck = stuck.map(|s| if idle { s } else { s.unseen() });
        Step::Failed { error, landed, stuck }
    }

    fn forget(&mut self) {
        if let Some(end) = self.end.take() {
            self.device.forget(end);
        }
    }
}

/// The right to make collective calls on a communicator that several containers share.
pub(super) struct Turn(Option<Arc<dyn Comm>>);

impl Turn {
    /// Takes it, if nobody has it.
    pub fn take(comm: &Arc<dyn Comm>) -> Result<Turn> {
        match comm.later() {
            None => Ok(Turn(None)),
            Some(later) if !later.taken().swap(true, Ordering::Acquire) => Ok(Turn(Some(comm.clone()))),
            Some(_) => Err(err!(
                RS_ERR_BUSY,
                "another container's call is in progress on this communicator: poll that until it has ended, on all ranks"
            )),
        }
    }
}

impl Drop for Turn {
    fn drop(&mut self) {
        if let Some(later) = self.0.as_ref().and_then(|comm| comm.later()) {
            later.taken().store(false, Ordering::Release);
        }
    }
}
