//! All copies of a plan, made ready for a device that wants that: once a plan and its addresses, used by every sync.
#![forbid(unsafe_code)]

use super::lost;
use super::work::{Origin, Parcel, Step, Unit, Work};
use crate::comm::Window;
use crate::device::{Batch, Copies, Device, Job, Mem, OwnStream, Stream};
use crate::error::Result;
use std::sync::Arc;

/// Where the memory of a plan lies.
#[derive(Clone, Copy)]
pub struct Places<'a> {
    /// The rank's own buffers, by row.
    pub mems: &'a [Mem],
    /// What each owner lets us read: by place in `Work::owners`, by place in that owner's offer.
    pub windows: &'a [Vec<Window>],
    /// Staging for the messages of a group, if it needs some.
    pub staging: Option<Mem>,
}

impl<'a> Places<'a> {
    /// A buffer of this rank.
    pub fn mem(&self, buffer: u32) -> Result<Mem> {
        self.mems.get(buffer as usize).copied().ok_or_else(|| lost(format_args!("buffer row {buffer}")))
    }

    /// From the rank's buffers into a message.
    pub(super) fn packing<'w>(self, parcel: &'w Parcel, into: Mem) -> impl Iterator<Item = Result<Job<'w>>> + use<'a, 'w> {
        parcel.copies.iter().map(move |(buffer, copy)| Job::new(self.mem(*buffer)?, into, copy))
    }

    /// From a message into the rank's buffers.
    pub(super) fn unpacking<'w>(self, parcel: &'w Parcel, from: Mem) -> impl Iterator<Item = Result<Job<'w>>> + use<'a, 'w> {
        parcel.copies.iter().map(move |(buffer, copy)| Ok(Job::new(from, self.mem(*buffer)?, copy)?.streaming()))
    }

    fn jobs<'w>(&self, units: &'w [Unit]) -> Result<Vec<Job<'w>>> {
        units.iter().flat_map(|unit| unit.steps.iter().map(move |step| self.job(unit, step))).collect()
    }

    fn job<'w>(&self, unit: &Unit, step: &'w Step) -> Result<Job<'w>> {
        let src = match unit.origin {
            Origin::Own => self.mem(step.src)?,
            Origin::Owner(at) => match self.windows.get(at).and_then(|list| list.get(step.src as usize)) {
                Some(Window::Mapped(mem)) => *mem,
                _ => return Err(lost(format_args!("mapped window {} of owner {at}", step.src))),
            },
        };
        Job::new(src, self.mem(step.dst)?, &step.copy)
    }
}

/// The lists of a plan, ready.
pub struct Batches {
    /// `Work::units`.
    pub units: Box<dyn Batch>,
    /// `Work::after`.
    pub after: Box<dyn Batch>,
    /// Of each round of `Work::group`: what is packed, what is unpacked.
    pub rounds: Vec<[Box<dyn Batch>; 2]>,
    /// For rounds that are all put on streams: to pack, to send and receive, to unpack.
    streams: Arc<Vec<Box<dyn OwnStream>>>,
}

impl Batches {
    /// `None`: the device takes lists as they are. `other`: lists that never run at the same time, whose streams are used.
    /// `on_streams`: the rounds are put on streams.
    pub fn new(
        device: &Arc<dyn Device>,
        places: Places<'_>,
        work: &Work,
        other: Option<&Batches>,
        on_streams: bool,
    ) -> Result<Option<Batches>> {
        let Copies::Prepared(prepare) = device.copies() else { return Ok(None) };
        let count = if on_streams && work.group.is_some() { 3 } else { 0 };
        let streams = match other.map(|o| o.streams.clone()).filter(|streams| streams.len() >= count) {
            Some(streams) => streams,
            None => Arc::new((0..count).map(|_| prepare.stream()).collect::<Result<_>>()?),
        };
        let mut lists = vec![places.jobs(&work.units)?, places.jobs(&work.after)?];
        if let Some(group) = &work.group {
            for round in 0..group.rounds() {
                lists.push(group.jobs(places, round, 0)?);
                lists.push(group.jobs(places, round, 1)?);
            }
        }
        let mut ready = prepare.prepare(&lists)?.into_iter();
        let mut next = || ready.next().ok_or_else(|| lost("a prepared list"));
        let (units, after) = (next()?, next()?);
        let rounds = work.group.as_ref().map_or(0, |g| g.rounds());
        let rounds = (0..rounds).map(|_| Ok([next()?, next()?])).collect::<Result<_>>()?;
        Ok(Some(Batches { units, after, rounds, streams }))
    }

    /// The streams that the rounds are put on.
    pub(super) fn streams(&self) -> Vec<Stream> {
        self.streams.iter().map(|s| s.raw()).collect()
    }
}
