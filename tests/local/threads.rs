//! Ranks as threads of one process.

use crate::support::*;
use reshard::abi::*;
use reshard::comm::local::{Force, join, segment};
use reshard::comm::{Access, Comm, Deadline, Window};
use reshard::device::Mem;
use reshard::geom::StridedCopy;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Barrier, Mutex};
use std::time::{Duration, Instant};

#[test]
fn gathers_of_any_length_give_all_parts_in_rank_order() {
    for world in [1, 2, 5] {
        ranks(world, None, |comm| {
            for len in [0, 1, 1000, 65_535, 65_536, 65_537, 1_000_000] {
                let all = comm.allgather(&pattern(u64::from(comm.rank()), len), soon()).unwrap();
                let want: Vec<u8> = (0..world).flat_map(|r| pattern(u64::from(r), len)).collect();
                assert!(all == want, "{len} bytes of {world}");
            }
        });
    }
}

/// Far more than the sockets hold: who only sent, or sent in turn, would wait for ever.
#[test]
fn large_gathers_do_not_lock_up() {
    const LEN: usize = 20 << 20;
    ranks(4, None, |comm| {
        let all = comm.allgather(&vec![comm.rank() as u8; LEN], soon()).unwrap();
        assert_eq!(all.len(), 4 * LEN);
        assert!(all.chunks(LEN).enumerate().all(|(r, part)| part.iter().all(|&b| b == r as u8)));
    });
}

#[test]
fn gathers_of_unequal_length_end_on_all_ranks() {
    let errors = ranks(3, None, |comm| {
        let e = comm.allgather(&vec![1; 10 + usize::from(comm.rank() == 2)], soon()).unwrap_err();
        assert_eq!(comm.allgather(&[], soon()).unwrap_err(), e, "the same reason for ever");
        e
    });
    for e in errors {
        assert_eq!(e.status(), RS_ERR_MISMATCH);
        assert!(e.text().contains("10 bytes") || e.text().contains("11 bytes"), "{e}");
    }
}

/// A rank that has all it wants leaves; those that have its part already want nothing of it.
#[test]
fn who_leaves_after_its_part_harms_nobody() {
    for _ in 0..30 {
        ranks(4, None, |comm| comm.allgather(&vec![7; 700_000], soon()).map(|_| ()).unwrap());
    }
}

#[test]
fn who_leaves_before_its_part_is_named() {
    // All have joined before one leaves: who leaves while another still joins fails that one's join.
    let joined = Barrier::new(3);
    let results = ranks(3, None, |comm| {
        joined.wait();
        if comm.rank() == 1 { Ok(vec![]) } else { comm.allgather(&[1], soon()) }
    });
    for result in [&results[0], &results[2]] {
        let e = result.as_ref().unwrap_err();
        assert_eq!(e.status(), RS_ERR_PEER);
        assert!(e.text().contains("rank 1") && e.text().contains("left"), "{e}");
    }
}

fn abort_during(wait: impl Fn(&dyn Comm) -> reshard::error::Result<()> + Sync) {
    let barrier = Barrier::new(3);
    let results = ranks(3, None, |comm| {
        let comm = &*comm;
        // All but rank 1 abort by hearing of it; rank 1 aborts from another thread than the one that waits.
        std::thread::scope(|scope| {
            scope.spawn(|| {
                barrier.wait();
                std::thread::sleep(Duration::from_millis(100));
                if comm.rank() == 1 {
                    comm.abort("enough is enough");
                }
            });
            let begun = Instant::now();
            let e = wait(comm).unwrap_err();
            assert_eq!(comm.check().unwrap_err(), e, "the same reason for ever");
            assert_eq!(comm.allgather(&[], soon()).unwrap_err(), e);
            assert_eq!(comm.pipe().unwrap().wait(Duration::ZERO).unwrap_err(), e);
            (e, begun.elapsed())
        })
    });
    for (e, time) in results {
        assert_eq!(e.status(), RS_ERR_ABORTED);
        assert!(e.text().contains("rank 1 aborted: enough is enough"), "{e}");
        assert!(time < Duration::from_secs(5), "{time:?}");
    }
}

#[test]
fn an_abort_ends_every_gather() {
    // Rank 1 never gathers: it waits for messages.
    abort_during(|comm| match comm.rank() {
        1 => loop {
            comm.pipe().unwrap().wait(Duration::from_secs(30))?;
        },
        _ => comm.allgather(&[1], soon()).map(|_| ()),
    });
}

#[test]
fn an_abort_ends_every_wait() {
    abort_during(|comm| match comm.rank() {
        1 => comm.allgather(&[1], soon()).map(|_| ()),
        _ => loop {
            comm.pipe().unwrap().wait(Duration::from_secs(30))?;
        },
    });
}

/// The sockets are full when the abort comes: there is room for it all the same, and it wakes its own rank though no peer moves.
#[test]
fn an_abort_passes_a_full_socket() {
    let barrier = Barrier::new(2);
    let results = ranks(2, None, |comm| {
        if comm.rank() == 0 {
            std::thread::scope(|scope| {
                let gather = scope.spawn(|| comm.allgather(&vec![0; 50 << 20], soon()).unwrap_err());
                std::thread::sleep(Duration::from_millis(200));
                let begun = Instant::now();
                comm.abort("full");
                let e = gather.join().unwrap();
                assert!(begun.elapsed() < LONG / 2);
                barrier.wait();
                e
            })
        } else {
            barrier.wait();
            comm.allgather(&[], soon()).unwrap_err()
        }
    });
    for e in results {
        assert_eq!((e.status(), e.text()), (RS_ERR_ABORTED, "rank 0 aborted: full"));
    }
}

#[test]
fn a_missed_deadline_names_the_late_and_ends_the_run() {
    let results = ranks(4, None, |comm| match comm.rank() {
        2 => {
            std::thread::sleep(Duration::from_millis(600));
            comm.allgather(&[1], soon()).unwrap_err()
        }
        _ => comm.allgather(&[1], Deadline::after(Duration::from_millis(200))).unwrap_err(),
    });
    for e in results {
        assert_eq!(e.status(), RS_ERR_TIMEOUT);
        assert!(e.text().contains("waited 200 ms for rank 2") && !e.text().contains("rank 3 (p"), "{e}");
    }
}

#[test]
fn ranks_in_different_calls_are_told() {
    let results = ranks(2, None, |comm| match comm.rank() {
        0 => comm.allgather(&[1], soon()).map(|_| ()),
        _ => comm.pipe().unwrap().open(&[0], &[0], soon()),
    });
    for result in results {
        assert_eq!(result.unwrap_err().status(), RS_ERR_MISMATCH);
    }
}

#[test]
fn missing_ranks_are_named() {
    let e = join(&fresh(), 1, 4, Duration::from_millis(100), None).err().unwrap();
    assert_eq!(e.status(), RS_ERR_TIMEOUT);
    assert!(e.text().contains("rank 0, rank 2, rank 3 to join"), "{e}");
}

#[test]
fn names_and_ranks_that_cannot_be_are_refused() {
    for (name, rank, world) in [("", 0, 1), ("a\0b", 0, 1), (&"x".repeat(65), 0, 1), ("x", 1, 1), ("x", 0, 0), ("x", 0, 5000)] {
        assert_eq!(join(name, rank, world, LONG, None).err().unwrap().status(), RS_ERR_INVALID, "{name} {rank} {world}");
    }
    assert!(join(&"x".repeat(64), 0, 1, LONG, None).is_ok());
}

#[test]
fn a_rank_is_taken_once() {
    let name = fresh();
    let first = join(&name, 0, 1, LONG, None).unwrap();
    let e = join(&name, 0, 1, LONG, None).err().unwrap();
    assert_eq!(e.status(), RS_ERR_INVALID);
    assert!(e.text().contains(&format!("taken by process {}", std::process::id())), "{e}");
    drop(first);
    let again = join(&name, 0, 1, LONG, None).unwrap();
    again.abort("a run that has failed holds no name");
    assert!(join(&name, 0, 1, LONG, None).is_ok());
}

#[test]
fn runs_that_disagree_are_told() {
    for (worlds, forces, what) in [([2, 3], [None, None], "2 ranks"), ([2, 2], [None, Some(Force::Ring)], "flags")] {
        let name = fresh();
        let errors: Vec<_> = std::thread::scope(|scope| {
            let name = &name;
            let threads: Vec<_> = [0, 1]
                .into_iter()
                .map(|r| scope.spawn(move || join(name, r as u32, worlds[r], LONG, forces[r]).err().unwrap()))
                .collect();
            threads.into_iter().map(|t| t.join().unwrap()).collect()
        });
        // One tells, the other may only see it leave.
        assert!(errors.iter().any(|e| e.status() == RS_ERR_MISMATCH && e.text().contains(what)), "{errors:?}");
        assert!(errors.iter().all(|e| matches!(e.status(), RS_ERR_MISMATCH | RS_ERR_PEER)), "{errors:?}");
    }
}

/// A rank of a run that is complete already.
#[test]
fn late_comers_are_not_let_in() {
    let name = fresh();
    let first = join(&name, 0, 1, LONG, None).unwrap();
    let e = join(&name, 1, 2, Duration::from_millis(200), None).err().unwrap();
    assert_eq!(e.status(), RS_ERR_TIMEOUT);
    assert!(e.text().contains("rank 0 (process") && e.text().contains("silent"), "{e}");
    first.check().unwrap();
}

/// A segment with a pattern, freed when dropped.
struct Segment(Mem);

impl Segment {
    fn new(len: usize, seed: u64) -> Segment {
        let at = segment::alloc(len as u64, 0).unwrap();
        // SAFETY: `len` bytes that live until the drop.
        let mem = unsafe { Mem::new(at.as_ptr(), len) };
        write(mem, &pattern(seed, len));
        Segment(mem)
    }
}

impl Drop for Segment {
    fn drop(&mut self) {
        let at = std::ptr::NonNull::new(self.0.addr() as *mut u8).unwrap();
        // SAFETY: the tests end their use before.
        unsafe { segment::free(at).unwrap() };
    }
}

fn mapped(window: &Window) -> Mem {
    match window {
        Window::Mapped(mem) => *mem,
        other => panic!("{other:?}"),
    }
}

#[test]
fn blocks_of_segments_are_mapped_and_others_sent() {
    ranks(2, None, |comm| {
        let windows = comm.windows().unwrap();
        if comm.rank() == 0 {
            let (a, b) = (Segment::new(10_000, 1), Segment::new(300_000, 2));
            let mut private = vec![5u8; 100];
            let blocks = vec![a.0.cut(10, 90).unwrap(), mem(&mut private), b.0, a.0.cut(9_999, 1).unwrap(), a.0.cut(0, 0).unwrap()];
            let opened = windows.exchange(&[(1, blocks)], &[], soon()).unwrap();
            use Access::*;
            assert_eq!(opened.granted, [[Mapped, Sent, Mapped, Mapped, Mapped]]);
            comm.allgather(&[], soon()).unwrap();
            // What the owner writes now is there at the reader: one memory, no copy.
            write(b.0, &[42; 1000]);
            comm.allgather(&[], soon()).unwrap();
            comm.allgather(&[], soon()).unwrap();
        } else {
            let opened = windows.exchange(&[], &[0], soon()).unwrap();
            let list = &opened.windows[0];
            assert_eq!(bytes(mapped(&list[0])), pattern(1, 10_000)[10..100]);
            assert!(matches!(list[1], Window::Sent));
            assert!(bytes(mapped(&list[2])) == pattern(2, 300_000));
            assert_eq!(bytes(mapped(&list[3])), pattern(1, 10_000)[9_999..]);
            comm.allgather(&[], soon()).unwrap();
            comm.allgather(&[], soon()).unwrap();
            windows.enter(0).unwrap();
            assert_eq!(bytes(mapped(&list[2]).cut(0, 1000).unwrap()), [42; 1000]);
            windows.leave(0);
            comm.allgather(&[], soon()).unwrap();
        }
    });
}

/// Containers share a communicator: the windows of the first must outlive the second's exchange, and go with the owner's memory.
#[test]
fn windows_last_as_long_as_the_memory() {
    ranks(2, None, |comm| {
        let windows = comm.windows().unwrap();
        if comm.rank() == 0 {
            let (a, b) = (Segment::new(5_000, 3), Segment::new(5_000, 4));
            windows.exchange(&[(1, vec![a.0])], &[], soon()).unwrap();
            windows.exchange(&[(1, vec![b.0])], &[], soon()).unwrap();
            windows.exchange(&[(1, vec![a.0])], &[], soon()).unwrap();
            comm.allgather(&[], soon()).unwrap();
            drop(a);
            windows.exchange(&[(1, vec![b.0])], &[], soon()).unwrap();
            comm.allgather(&[], soon()).unwrap();
        } else {
            let one = || mapped(&windows.exchange(&[], &[0], soon()).unwrap().windows[0][0]);
            let (a, b, again) = (one(), one(), one());
            assert_eq!(a, again, "mapped once");
            assert!(bytes(a) == pattern(3, 5_000) && bytes(b) == pattern(4, 5_000));
            comm.allgather(&[], soon()).unwrap();
            assert_eq!(one(), b);
            let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
            let there =
                |m: Mem| maps.lines().any(|l| l.starts_with(&format!("{:x}-", m.addr())) && l.contains("libreshard memory"));
            assert!(there(b) && !there(a));
            comm.allgather(&[], soon()).unwrap();
        }
    });
}

#[test]
fn forced_reads_arrive_and_forced_rings_never_read() {
    ranks(3, Some(Force::Read), |comm| {
        let windows = comm.windows().unwrap();
        assert!(windows.prefers_read(1) && windows.prefers_read(1 << 30));
        let me = comm.rank();
        let mut own = pattern(u64::from(me), 100_000);
        let others: Vec<u32> = (0..3).filter(|&r| r != me).collect();
        let offers: Vec<_> = others.iter().map(|&r| (r, vec![mem(&mut own)])).collect();
        let opened = windows.exchange(&offers, &others, soon()).unwrap();
        assert_eq!(opened.granted, [[Access::Remote], [Access::Remote]]);
        for (&owner, list) in others.iter().zip(&opened.windows) {
            let mut got = vec![0u8; 5_000];
            // Every other 50 bytes of 10,000, from byte 7.
            let copy = StridedCopy::new(1, 7, 0, [(100, 100, 50), (50, 1, 1)]);
            windows.enter(owner).unwrap();
            windows.read(owner, &list[0], mem(&mut got), &copy).unwrap();
            windows.leave(owner);
            let all = pattern(u64::from(owner), 100_000);
            let want: Vec<u8> = all[7..].chunks(100).take(100).flat_map(|row| row[..50].to_vec()).collect();
            assert!(got == want);
            for wrong in [StridedCopy::new(1, 99_999, 0, [(2, 1, 1)]), StridedCopy::new(1, 0, 4_999, [(2, 1, 1)])] {
                assert_eq!(windows.read(owner, &list[0], mem(&mut got), &wrong).unwrap_err().status(), RS_ERR_INTERNAL);
            }
        }
        comm.allgather(&[], soon()).unwrap();
    });
    ranks(2, Some(Force::Ring), |comm| {
        let windows = comm.windows().unwrap();
        assert!(!windows.prefers_read(1) && !windows.prefers_read(1 << 30));
        let mut own = [1u8; 10];
        let other = 1 - comm.rank();
        let opened = windows.exchange(&[(other, vec![mem(&mut own)])], &[other], soon()).unwrap();
        assert_eq!((opened.granted, opened.windows[0][0].access()), (vec![vec![Access::Sent]], Access::Sent));
        comm.allgather(&[], soon()).unwrap();
    });
}

/// Memory that is not mapped at its owner: refused when it is offered, not when it is read.
#[test]
fn a_forced_read_of_no_memory_is_an_error_on_both_ends() {
    let errors = ranks(2, Some(Force::Read), |comm| {
        // SAFETY: never copied by this process; the kernel refuses it to others.
        let nowhere = unsafe { Mem::new(4096 as *mut u8, 10) };
        let other = 1 - comm.rank();
        let offers = if other == 1 { vec![(1, vec![nowhere])] } else { vec![] };
        let owners = if other == 0 { vec![0] } else { vec![] };
        let e = comm.windows().unwrap().exchange(&offers, &owners, soon()).unwrap_err();
        comm.check().unwrap();
        comm.allgather(&[], soon()).unwrap();
        e
    });
    assert!(errors[0].text().contains("rank 1") && errors[1].text().contains("not mapped there"), "{errors:?}");
}

/// All pairs at once, messages of any length, twice over with the pipes opened anew, with several threads a rank.
#[test]
fn messages_of_any_length_arrive_in_order() {
    const WORLD: u32 = 3;
    ranks(WORLD, None, |comm| {
        let pipe = comm.pipe().unwrap();
        let me = comm.rank();
        let others: Vec<u32> = (0..WORLD).filter(|&r| r != me).collect();
        let lengths = |from: u32, to: u32| -> Vec<usize> {
            let mut random = fastrand::Rng::with_seed(u64::from(from * 10 + to));
            let top = pipe.capacity();
            (0..80).map(|i| [random.usize(1..=top), random.usize(1..100), top][i % 3]).collect()
        };
        let seed = |from: u32, to: u32, i: usize| u64::from(from * 10 + to) * 1000 + i as u64;
        for _ in 0..2 {
            pipe.open(&others, &others, soon()).unwrap();
            std::thread::scope(|scope| {
                for &other in &others {
                    scope.spawn(move || {
                        let (out, into) = (lengths(me, other), lengths(other, me));
                        let (mut sent, mut got) = (0, 0);
                        while sent < out.len() || got < into.len() {
                            let before = (sent, got);
                            if let Some(slot) = out.get(sent).and_then(|_| pipe.reserve(other).unwrap()) {
                                assert_eq!(slot.len(), pipe.capacity());
                                write(slot, &pattern(seed(me, other, sent), out[sent]));
                                pipe.commit(other, out[sent]).unwrap();
                                sent += 1;
                            }
                            if let Some(message) = into.get(got).and_then(|&len| pipe.arrived(other, len).unwrap()) {
                                assert!(bytes(message) == pattern(seed(other, me, got), into[got]));
                                pipe.release(other).unwrap();
                                got += 1;
                            }
                            if before == (sent, got) {
                                pipe.wait(LONG).unwrap();
                            }
                        }
                    });
                }
            });
            comm.allgather(&[], soon()).unwrap();
        }
        assert!(pipe.bytes() >= 2 * 2 * pipe.capacity() as u64);
    });
}

/// System calls that a signal interrupts are taken up again.
#[test]
fn signals_disturb_nothing() {
    extern "C" fn ignore(_: i32) {}
    // SAFETY: a struct of integers, for which all zeros is a value; the handler does nothing. No SA_RESTART: calls are interrupted.
    unsafe {
        let mut action: libc::sigaction = std::mem::zeroed();
        action.sa_sigaction = ignore as extern "C" fn(i32) as usize;
        assert_eq!(libc::sigaction(libc::SIGUSR1, &action, std::ptr::null_mut()), 0);
    }
    let (done, threads) = (AtomicBool::new(false), Mutex::new(Vec::<i32>::new()));
    let begun = Instant::now();
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !done.load(Ordering::Relaxed) && begun.elapsed() < LONG {
                for &thread in threads.lock().unwrap().iter() {
                    // SAFETY: no pointer is passed; a thread that has ended is an error, which changes nothing.
                    unsafe { libc::syscall(libc::SYS_tgkill, libc::getpid(), thread, libc::SIGUSR1) };
                }
                std::thread::sleep(Duration::from_micros(50));
            }
        });
        ranks(3, Some(Force::Read), |comm| {
            // SAFETY: takes nothing, changes nothing.
            threads.lock().unwrap().push(unsafe { libc::gettid() });
            let others: Vec<u32> = (0..3).filter(|&r| r != comm.rank()).collect();
            let mut own = pattern(u64::from(comm.rank()), 3_000_000);
            let offers: Vec<_> = others.iter().map(|&r| (r, vec![mem(&mut own)])).collect();
            let opened = comm.windows().unwrap().exchange(&offers, &others, soon()).unwrap();
            for (&owner, list) in others.iter().zip(&opened.windows) {
                let mut got = vec![0; 3_000_000];
                let copy = StridedCopy::new(1, 0, 0, [(3_000_000, 1, 1)]);
                comm.windows().unwrap().read(owner, &list[0], mem(&mut got), &copy).unwrap();
                assert!(got == pattern(u64::from(owner), 3_000_000));
            }
            for round in 0..5 {
                let all = comm.allgather(&vec![round; 2_000_000], soon()).unwrap();
                assert!(all.len() == 6_000_000 && all.iter().all(|&b| b == round));
            }
        });
        done.store(true, Ordering::Relaxed);
    });
}

#[test]
fn a_message_of_another_length_ends_the_run() {
    let errors = ranks(2, None, |comm| {
        let pipe = comm.pipe().unwrap();
        if comm.rank() == 0 {
            pipe.open(&[1], &[], soon()).unwrap();
            assert_eq!(pipe.commit(1, 5).unwrap_err().status(), RS_ERR_INTERNAL, "nothing is reserved");
            pipe.reserve(1).unwrap().unwrap();
            pipe.commit(1, 5).unwrap();
            comm.allgather(&[], soon()).unwrap_err()
        } else {
            pipe.open(&[], &[0], soon()).unwrap();
            assert_eq!(pipe.release(0).unwrap_err().status(), RS_ERR_INTERNAL, "nothing has arrived");
            loop {
                match pipe.arrived(0, 6) {
                    Ok(message) => assert!(message.is_none()),
                    Err(e) => break e,
                }
            }
        }
    });
    for e in errors {
        assert_eq!(e.status(), RS_ERR_MISMATCH);
        assert!(e.text().contains("5 bytes"), "{e}");
    }
}

/// A ring is full when its slots are: the writer waits, and a release wakes it.
#[test]
fn a_full_ring_waits_for_its_reader() {
    let barrier = Arc::new(Barrier::new(2));
    ranks(2, None, |comm| {
        let pipe = comm.pipe().unwrap();
        if comm.rank() == 0 {
            pipe.open(&[1], &[], soon()).unwrap();
            let mut sent = 0;
            while pipe.reserve(1).unwrap().is_some() {
                pipe.commit(1, 1).unwrap();
                sent += 1;
            }
            assert!((2..100).contains(&sent));
            pipe.wait(Duration::from_millis(1)).unwrap();
            assert!(pipe.reserve(1).unwrap().is_none());
            barrier.wait();
            let begun = Instant::now();
            while pipe.reserve(1).unwrap().is_none() {
                pipe.wait(LONG).unwrap();
            }
            assert!(begun.elapsed() < LONG / 2, "woken by the release, not by the end of the slice");
            barrier.wait();
        } else {
            pipe.open(&[], &[0], soon()).unwrap();
            barrier.wait();
            std::thread::sleep(Duration::from_millis(50));
            assert!(pipe.arrived(0, 1).unwrap().is_some());
            pipe.release(0).unwrap();
            barrier.wait();
        }
    });
}
