//! Order among the streams of ranks that read each other's memory, by words that they share.
//!
//! A sync has a number, which counts up from 1 on all ranks alike. An owner's stream writes it once its sources are ready, its readers'
//! streams wait for that, read, and write it in turn, and the owner's stream goes on behind all of them. Every wait is put on its stream
//! after the write that ends it was put on the other one, which the caller sees to: so no order of streams in the hardware, nor one
//! stream that two ranks share, can make them wait for ever. What a dead rank does not write, the one who waits for it writes itself.
//!
//! Knows ranks, words, streams. Must not know what is read.
#![forbid(unsafe_code)]

use super::lost;
use crate::abi::RS_ERR_PEER;
use crate::comm::page::Page;
use crate::comm::{Comm, Deadline, Windows};
use crate::device::{Device, Signals, Stream};
use crate::error::{Result, bail};
use std::sync::Arc;
use std::sync::atomic::AtomicU64;
use std::sync::atomic::Ordering::SeqCst;

/// Word of a page: the last sync whose reads its rank has begun to put on its stream. The host's.
const ENTERED: usize = 0;
/// Word of a page: not 0 once nobody may begin to read its rank's memory. The host's.
const REVOKED: usize = 1;
/// Words before those of each rank of the world: that what is for it is ready, that what is its own has been read.
const HEAD: usize = 2;

/// More than any number, in a comparison of differences as streams make it.
const END: u64 = i64::MAX as u64;

/// The words of a rank and of those that it exchanges weights with.
pub struct Signs {
    device: Arc<dyn Device>,
    me: u32,
    mine: Arc<Page>,
    /// Who reads us, and who we read.
    readers: Vec<(u32, Arc<Page>)>,
    owners: Vec<(u32, Arc<Page>)>,
}

fn ready(rank: u32) -> usize {
    HEAD + 2 * rank as usize
}

fn done(rank: u32) -> usize {
    ready(rank) + 1
}

impl Signs {
    /// Collective among ranks that exchange weights. Both lists are sorted; the lists of two ranks match.
    pub fn new(
        device: &Arc<dyn Device>,
        comm: &dyn Comm,
        windows: &dyn Windows,
        [readers, owners]: [&[u32]; 2],
        deadline: Deadline,
    ) -> Result<Signs> {
        let mut peers = [readers, owners].concat();
        peers.sort_unstable();
        peers.dedup();
        let mut pages = windows.share(HEAD + 2 * comm.world() as usize, &peers, deadline)?.into_iter();
        let mine = pages.next().ok_or_else(|| lost("a page of words"))?;
        let theirs: Vec<(u32, Arc<Page>)> = peers.into_iter().zip(pages).collect();
        let of = |ranks: &[u32]| theirs.iter().filter(|t| ranks.contains(&t.0)).cloned().collect();
        let signs = Signs { device: device.clone(), me: comm.rank(), mine, readers: of(readers), owners: of(owners) };
        signs.mine.register(&**device)?;
        theirs.iter().try_for_each(|(_, page)| page.register(&**device))?;
        Ok(signs)
    }

    fn signals(&self) -> Result<&dyn Signals> {
        self.device.signals().ok_or_else(|| lost("a device whose streams wait for words"))
    }

    /// Behind what is on the stream, readers may read.
    pub fn ready(&self, stream: Stream, number: u64) -> Result<()> {
        self.readers.iter().try_for_each(|(rank, _)| self.signals()?.write(stream, self.mine.mem(ready(*rank)), number))
    }

    /// Lets what follows on the stream read the owners' memory: after they have been asked to put [`Signs::ready`] on theirs. An error if
    /// one has taken its memory back.
    pub fn enter(&self, stream: Stream, number: u64) -> Result<()> {
        // Before the look at what owners say: one that says it later finds us here.
        self.mine.word(ENTERED).store(number, SeqCst);
        self.kept()?;
        self.owners.iter().try_for_each(|(_, page)| self.signals()?.wait(stream, page.mem(ready(self.me)), number))
    }

    /// Behind what is on the stream, owners may take their memory back.
    pub fn leave(&self, stream: Stream, number: u64) -> Result<()> {
        self.owners.iter().try_for_each(|(rank, _)| self.signals()?.write(stream, self.mine.mem(done(*rank)), number))
    }

    /// Lets what follows on the stream wait for all readers: after they have put [`Signs::leave`] on theirs.
    pub fn take_back(&self, stream: Stream, number: u64) -> Result<()> {
        self.readers.iter().try_for_each(|(_, page)| self.signals()?.wait(stream, page.mem(done(self.me)), number))
    }

    /// An error if an owner has taken its memory back: what was read since may be anything.
    pub fn kept(&self) -> Result<()> {
        match self.owners.iter().find(|(_, page)| page.word(REVOKED).load(SeqCst) != 0) {
            Some((rank, _)) => bail!(RS_ERR_PEER, "rank {rank} gave up and took its memory back"),
            None => Ok(()),
        }
    }

    /// This rank gives up: nobody begins to read its memory any more.
    pub fn revoke(&self) {
        self.mine.word(REVOKED).store(1, SeqCst);
    }

    /// After [`Signs::revoke`]: whether somebody still reads what it began to read. Dead processes do not.
    pub fn read(&self, comm: &dyn Comm, number: u64) -> bool {
        let reads = |page: &Page| page.word(ENTERED).load(SeqCst) >= number && page.word(done(self.me)).load(SeqCst) < number;
        self.readers.iter().any(|(rank, page)| reads(page) && !comm.gone(*rank))
    }

    /// What our stream may be waiting for, in words.
    pub fn late(&self, number: u64) -> Vec<String> {
        let low = |page: &Page, at| page.word(at).load(SeqCst) < number;
        if self.readers.iter().any(|(rank, _)| low(&self.mine, ready(*rank))) {
            return vec![", which has not come to this sync".into()];
        }
        let owners = self.owners.iter().filter(|(_, page)| low(page, ready(self.me)));
        let readers = self.readers.iter().filter(|(_, page)| low(page, done(self.me)));
        owners
            .map(|(rank, _)| format!("; the stream of rank {rank} has not come to its sources"))
            .chain(readers.map(|(rank, _)| format!("; the stream of rank {rank} has not read this rank's sources")))
            .collect()
    }

    /// Nothing that reads owners' memory is on a stream of ours any more, whatever was left unsaid.
    pub fn left(&self, number: u64) {
        self.owners.iter().for_each(|(rank, _)| grow(self.mine.word(done(*rank)), number));
    }

    /// Ends our streams' waits for what ranks whose process has ended do not write any more; or for all ranks.
    pub fn release(&self, comm: &dyn Comm, all: bool) {
        let over = |rank: &u32| all || comm.gone(*rank);
        self.owners.iter().filter(|(rank, _)| over(rank)).for_each(|(_, page)| grow(page.word(ready(self.me)), END));
        self.readers.iter().filter(|(rank, _)| over(rank)).for_each(|(_, page)| grow(page.word(done(self.me)), END));
    }
}

fn grow(word: &AtomicU64, to: u64) {
    word.fetch_max(to, SeqCst);
}
