//! The order of the shared words: a ring of slots between one writer and one reader, and the bell that wakes a rank.
//!
//! Knows words and their order in memory. Must not know where they lie, processes, or what a slot holds. Words only grow, so whoever
//! looks late sees a later state, never an older one again. Generic over the words: `cargo test` under `--cfg loom` tries every order
//! in which two threads can see them.
#![cfg_attr(not(loom), forbid(unsafe_code))]

use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::time::Duration;

/// A shared number with one writer.
pub trait Count {
    /// Reads it.
    fn load(&self, order: Ordering) -> u64;
    /// Writes it.
    fn store(&self, to: u64, order: Ordering);

    /// Reads it, and everything that was written before it was set.
    fn get(&self) -> u64 {
        self.load(Ordering::Acquire)
    }

    /// Sets it, after everything written so far.
    fn set(&self, to: u64) {
        self.store(to, Ordering::Release);
    }
}

impl Count for AtomicU64 {
    fn load(&self, order: Ordering) -> u64 {
        self.load(order)
    }

    fn store(&self, to: u64, order: Ordering) {
        self.store(to, order);
    }
}

/// The shared words of one ring.
pub trait Words {
    /// The kind of number.
    type Count: Count;
    /// Number of slots.
    fn slots(&self) -> u64;
    /// Messages committed so far. Set by the writer.
    fn head(&self) -> &Self::Count;
    /// Messages released so far. Set by the reader.
    fn tail(&self) -> &Self::Count;
    /// Bytes of the message in a slot. Set by the writer.
    fn len(&self, slot: u64) -> &Self::Count;
}

/// The peer wrote words that no peer of ours would write: a bug there, or a stranger in its memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Nonsense;

/// The writing end of a ring. There is one.
pub struct Writer<W> {
    words: W,
    head: u64,
    /// As last seen; the reader may be further.
    tail: u64,
}

impl<W: Words> Writer<W> {
    /// Of a ring whose words are all 0.
    pub fn new(words: W) -> Writer<W> {
        Writer { words, head: 0, tail: 0 }
    }

    /// The words.
    pub fn words(&self) -> &W {
        &self.words
    }

    /// The slot of the next message, the same until it is committed; `None` while the ring is full.
    pub fn reserve(&mut self) -> Result<Option<u64>, Nonsense> {
        let slots = self.words.slots();
        if self.head - self.tail == slots {
            let tail = self.words.tail().get();
            if tail < self.tail || tail > self.head {
                return Err(Nonsense);
            }
            self.tail = tail;
        }
        Ok((self.head - self.tail < slots).then(|| self.head % slots))
    }

    /// Sends the slot that [`Writer::reserve`] gave.
    pub fn commit(&mut self, bytes: u64) {
        self.words.len(self.head % self.words.slots()).set(bytes);
        self.head += 1;
        self.words.head().set(self.head);
    }
}

/// The reading end of a ring. There is one.
pub struct Reader<W> {
    words: W,
    tail: u64,
    /// As last seen; the writer may be further.
    head: u64,
}

impl<W: Words> Reader<W> {
    /// Of a ring whose words were all 0 when it was made.
    pub fn new(words: W) -> Reader<W> {
        Reader { words, tail: 0, head: 0 }
    }

    /// The words.
    pub fn words(&self) -> &W {
        &self.words
    }

    /// Slot and bytes of the oldest message, the same until it is released; `None` while the ring is empty.
    pub fn arrived(&mut self) -> Result<Option<(u64, u64)>, Nonsense> {
        if self.head == self.tail {
            let head = self.words.head().get();
            if head < self.head || head - self.tail > self.words.slots() {
                return Err(Nonsense);
            }
            self.head = head;
        }
        let slot = self.tail % self.words.slots();
        Ok((self.head > self.tail).then(|| (slot, self.words.len(slot).get())))
    }

    /// Gives the slot that [`Reader::arrived`] named back to the writer.
    pub fn release(&mut self) {
        self.tail += 1;
        self.words.tail().set(self.tail);
    }
}

/// A shared word on which one rank sleeps.
pub trait Futex {
    /// Reads it.
    fn load(&self, order: Ordering) -> u32;
    /// Adds and gives what was there.
    fn fetch_add(&self, n: u32, order: Ordering) -> u32;
    /// Sets bits and gives what was there.
    fn fetch_or(&self, bits: u32, order: Ordering) -> u32;
    /// Keeps only these bits.
    fn fetch_and(&self, bits: u32, order: Ordering) -> u32;
    /// Sleeps while it is `expected`, at most `timeout`; may wake for no reason.
    fn wait(&self, expected: u32, timeout: Duration);
    /// Wakes all who sleep.
    fn wake(&self);
}

impl Futex for AtomicU32 {
    fn load(&self, order: Ordering) -> u32 {
        self.load(order)
    }

    fn fetch_add(&self, n: u32, order: Ordering) -> u32 {
        self.fetch_add(n, order)
    }

    fn fetch_or(&self, bits: u32, order: Ordering) -> u32 {
        self.fetch_or(bits, order)
    }

    fn fetch_and(&self, bits: u32, order: Ordering) -> u32 {
        self.fetch_and(bits, order)
    }

    fn wait(&self, expected: u32, timeout: Duration) {
        super::sys::futex_wait(self, expected, timeout);
    }

    fn wake(&self) {
        super::sys::futex_wake(self);
    }
}

/// The lowest bit of a bell: somebody sleeps, or is about to. The other bits count how often it rang.
const SLEEPER: u32 = 1;

/// Rings a bell, after everything written so far. A system call only where somebody sleeps.
pub fn ring(bell: &impl Futex) {
    if bell.fetch_add(2, Ordering::AcqRel) & SLEEPER != 0 {
        bell.fetch_and(!SLEEPER, Ordering::AcqRel);
        bell.wake();
    }
}

/// How often a bell rang (times 2, wrapping): what [`sleep`] wants to hear.
pub fn rung(bell: &impl Futex) -> u32 {
    bell.load(Ordering::Acquire) & !SLEEPER
}

/// Sleeps until a bell rang more often than `seen`, at most `timeout`; may wake for no reason.
pub fn sleep(bell: &impl Futex, seen: u32, timeout: Duration) {
    if rung(bell) == seen && bell.fetch_or(SLEEPER, Ordering::AcqRel) & !SLEEPER == seen {
        bell.wait(seen | SLEEPER, timeout);
    }
}

#[cfg(all(test, loom))]
mod tests {
    use super::*;
    use loom::cell::UnsafeCell;
    use loom::sync::atomic::{AtomicU32, AtomicU64};
    use loom::sync::{Arc, Condvar, Mutex};

    impl Count for AtomicU64 {
        fn load(&self, order: Ordering) -> u64 {
            self.load(order)
        }

        fn store(&self, to: u64, order: Ordering) {
            self.store(to, order);
        }
    }

    struct Shared {
        head: AtomicU64,
        tail: AtomicU64,
        lens: [AtomicU64; SLOTS],
        /// loom refuses a cell that is read while it is written.
        slots: [UnsafeCell<u64>; SLOTS],
    }

    const SLOTS: usize = 2;

    impl Words for Arc<Shared> {
        type Count = AtomicU64;

        fn slots(&self) -> u64 {
            SLOTS as u64
        }

        fn head(&self) -> &AtomicU64 {
            &self.head
        }

        fn tail(&self) -> &AtomicU64 {
            &self.tail
        }

        fn len(&self, slot: u64) -> &AtomicU64 {
            &self.lens[slot as usize]
        }
    }

    /// A futex of loom's parts: the value is compared and the sleep begun in one step.
    struct Bell {
        word: AtomicU32,
        lock: Mutex<()>,
        woken: Condvar,
    }

    impl Bell {
        fn new() -> Bell {
            Bell { word: AtomicU32::new(0), lock: Mutex::new(()), woken: Condvar::new() }
        }
    }

    impl Futex for Bell {
        fn load(&self, order: Ordering) -> u32 {
            self.word.load(order)
        }

        fn fetch_add(&self, n: u32, order: Ordering) -> u32 {
            self.word.fetch_add(n, order)
        }

        fn fetch_or(&self, bits: u32, order: Ordering) -> u32 {
            self.word.fetch_or(bits, order)
        }

        fn fetch_and(&self, bits: u32, order: Ordering) -> u32 {
            self.word.fetch_and(bits, order)
        }

        fn wait(&self, expected: u32, _never_in_time: Duration) {
            let guard = self.lock.lock().unwrap();
            if self.word.load(Ordering::SeqCst) == expected {
                drop(self.woken.wait(guard).unwrap());
            }
        }

        fn wake(&self) {
            drop(self.lock.lock().unwrap());
            self.woken.notify_all();
        }
    }

    /// All orders with at most so many switches where a thread could have gone on; all orders without any limit would take days.
    fn model(switches: usize, f: impl Fn() + Sync + Send + 'static) {
        let mut builder = loom::model::Builder::new();
        builder.preemption_bound = Some(switches);
        builder.check(f);
    }

    /// One writer and one reader: no slot is read while it is written, no message is lost, and nobody sleeps for ever though no sleep
    /// ends by itself.
    #[test]
    fn ring_carries_every_message_in_every_order() {
        const MESSAGES: u64 = 3;
        model(3, || {
            let shared = Arc::new(Shared {
                head: AtomicU64::new(0),
                tail: AtomicU64::new(0),
                lens: [AtomicU64::new(0), AtomicU64::new(0)],
                slots: [UnsafeCell::new(0), UnsafeCell::new(0)],
            });
            let bells = Arc::new([Bell::new(), Bell::new()]);
            let writer = {
                let (mut writer, shared, bells) = (Writer::new(shared.clone()), shared.clone(), bells.clone());
                loom::thread::spawn(move || {
                    let mut seen = 0;
                    for m in 0..MESSAGES {
                        let slot = loop {
                            match writer.reserve().unwrap() {
                                Some(slot) => break slot as usize,
                                None => {
                                    sleep(&bells[0], seen, Duration::MAX);
                                    seen = rung(&bells[0]);
                                }
                            }
                        };
                        // SAFETY: the slot is ours; loom fails the test if it is not.
                        shared.slots[slot].with_mut(|p| unsafe { *p = 100 + m });
                        writer.commit(10 + m);
                        ring(&bells[1]);
                    }
                })
            };
            let mut reader = Reader::new(shared.clone());
            let mut seen = 0;
            for m in 0..MESSAGES {
                let (slot, len) = loop {
                    match reader.arrived().unwrap() {
                        Some(message) => break message,
                        None => {
                            sleep(&bells[1], seen, Duration::MAX);
                            seen = rung(&bells[1]);
                        }
                    }
                };
                assert_eq!(len, 10 + m);
                // SAFETY: the slot is ours; loom fails the test if it is not.
                assert_eq!(shared.slots[slot as usize].with(|p| unsafe { *p }), 100 + m);
                reader.release();
                ring(&bells[0]);
            }
            writer.join().unwrap();
        });
    }

    /// Two sleepers on one bell: one ring wakes both.
    #[test]
    fn ring_wakes_all_sleepers_in_every_order() {
        model(3, || {
            let bell = Arc::new(Bell::new());
            let sleeper = |bell: Arc<Bell>| {
                move || {
                    while rung(&*bell) == 0 {
                        sleep(&*bell, 0, Duration::MAX);
                    }
                }
            };
            let other = loom::thread::spawn(sleeper(bell.clone()));
            let third = loom::thread::spawn(sleeper(bell.clone()));
            ring(&*bell);
            other.join().unwrap();
            third.join().unwrap();
        });
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;
    use std::sync::Arc;

    #[derive(Default)]
    struct Plain {
        head: AtomicU64,
        tail: AtomicU64,
        lens: [AtomicU64; 4],
    }

    impl Words for Arc<Plain> {
        type Count = AtomicU64;

        fn slots(&self) -> u64 {
            4
        }

        fn head(&self) -> &AtomicU64 {
            &self.head
        }

        fn tail(&self) -> &AtomicU64 {
            &self.tail
        }

        fn len(&self, slot: u64) -> &AtomicU64 {
            &self.lens[slot as usize]
        }
    }

    #[test]
    fn a_full_ring_gives_no_slot_and_an_empty_one_no_message() {
        let words = Arc::new(Plain::default());
        let (mut w, mut r) = (Writer::new(words.clone()), Reader::new(words));
        assert_eq!(r.arrived(), Ok(None));
        for i in 0..4 {
            assert_eq!(w.reserve(), Ok(Some(i)));
            assert_eq!(w.reserve(), Ok(Some(i)), "the same slot until it is committed");
            w.commit(i * 7);
        }
        assert_eq!(w.reserve(), Ok(None));
        assert_eq!(r.arrived(), Ok(Some((0, 0))));
        r.release();
        assert_eq!(r.arrived(), Ok(Some((1, 7))));
        assert_eq!(r.arrived(), Ok(Some((1, 7))), "the same message until it is released");
        assert_eq!(w.reserve(), Ok(Some(0)));
    }

    #[test]
    fn words_that_no_peer_writes_are_refused() {
        for bad in [5, u64::MAX] {
            let words = Arc::new(Plain::default());
            words.head.set(bad);
            assert_eq!(Reader::new(words).arrived(), Err(Nonsense));
        }
        let words = Arc::new(Plain::default());
        let mut w = Writer::new(words.clone());
        for _ in 0..4 {
            w.reserve().unwrap();
            w.commit(1);
        }
        words.tail.set(5);
        assert_eq!(w.reserve(), Err(Nonsense));
        words.tail.set(2);
        assert_eq!(w.reserve(), Ok(Some(0)));
        w.commit(1);
        w.commit(1);
        words.tail.set(1);
        assert_eq!(w.reserve(), Err(Nonsense), "a word that went back");
    }
}
