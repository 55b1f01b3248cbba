//! Ranks as threads: what they gather, how they fail, who reads whom. Every test has hub numbers of its own.
use super::*;
use crate::device::{Device, host::HostDevice};
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

/// Long enough for a loaded machine; no test that passes waits for it.
fn soon() -> Deadline {
    Deadline::after(Duration::from_secs(20))
}

fn world(hub: u64, n: u32) -> Vec<Arc<dyn Comm>> {
    (0..n).map(|rank| join(hub, rank, n).unwrap()).collect()
}

/// Waits until `rank`'s word lies in the gather that is going on.
fn until_waiting(hub: u64, rank: usize) {
    while lock(&HUBS)[&hub].lock().seats[rank].word.is_none() {
        thread::yield_now();
    }
}

#[test]
fn gathers_in_rank_order_many_times() {
    let ranks = world(1, 5);
    thread::scope(|scope| {
        for comm in &ranks {
            scope.spawn(move || {
                for round in 0..200_u32 {
                    let mine = [comm.rank() as u8, round as u8];
                    let all = comm.allgather(&mine, soon()).unwrap();
                    let expected: Vec<u8> = (0..5).flat_map(|rank| [rank, round as u8]).collect();
                    assert_eq!(all, expected, "rank {} round {round}", comm.rank());
                }
            });
        }
    });
    assert_eq!((ranks[3].name(), ranks[3].rank(), ranks[3].world()), ("loopback", 3, 5));
}

#[test]
fn empty_words_and_a_world_of_one() {
    let alone = join(2, 0, 1).unwrap();
    assert_eq!(alone.allgather(b"x", soon()).unwrap(), b"x");
    assert_eq!(alone.allgather(b"", soon()).unwrap(), b"");
}

#[test]
fn words_of_two_lengths_fail_everywhere() {
    let ranks = world(3, 3);
    thread::scope(|scope| {
        let first = scope.spawn(|| ranks[0].allgather(b"four", soon()).unwrap_err());
        until_waiting(3, 0);
        let error = ranks[1].allgather(b"three", soon()).unwrap_err();
        assert_eq!(error.status(), RS_ERR_COMM);
        assert!(error.text().contains("rank 1 gathers 5 bytes where rank 0 gathers 4"), "{error}");
        assert_eq!(first.join().unwrap(), error);
        assert_eq!(ranks[2].allgather(b"four", soon()).unwrap_err(), error);
    });
}

#[test]
fn a_missed_deadline_names_who_is_missing_and_ends_the_communicator() {
    let ranks: Vec<_> = [0, 1, 3].map(|rank| join(4, rank, 4).unwrap()).into();
    thread::scope(|scope| {
        let patient = scope.spawn(|| ranks[0].allgather(b"a", soon()).unwrap_err());
        until_waiting(4, 0);
        let start = Instant::now();
        let error = ranks[1].allgather(b"a", Deadline::after(Duration::from_millis(50))).unwrap_err();
        assert!(start.elapsed() >= Duration::from_millis(50));
        assert_eq!(error.status(), RS_ERR_TIMEOUT);
        assert!(error.text().contains("waited 50 ms for rank 2 (never joined), rank 3 to join"), "{error}");
        assert_eq!(patient.join().unwrap(), error, "the patient rank learns at once");
        assert_eq!(ranks[2].check().unwrap_err(), error);
    });
}

#[test]
fn an_abort_wakes_who_waits_and_the_first_reason_stays() {
    let ranks = world(5, 3);
    thread::scope(|scope| {
        let gather = scope.spawn(|| ranks[0].allgather(b"a", soon()).unwrap_err());
        let exchange = scope.spawn(|| ranks[1].windows().unwrap().exchange(&[], &[2], soon()).unwrap_err());
        until_waiting(5, 0);
        assert_eq!(ranks[2].check(), Ok(()));
        ranks[2].abort("the user pressed stop");
        ranks[1].abort("later");
        let error = gather.join().unwrap();
        assert_eq!(error.status(), RS_ERR_ABORTED);
        assert!(error.text().contains("rank 2 aborted: the user pressed stop"), "{error}");
        assert_eq!(exchange.join().unwrap(), error);
        assert_eq!(ranks[2].allgather(b"a", soon()).unwrap_err(), error);
    });
}

#[test]
fn a_rank_that_leaves_is_named() {
    let mut ranks = world(6, 3);
    let last = ranks.pop().unwrap();
    thread::scope(|scope| {
        let waiting = scope.spawn(|| ranks[0].allgather(b"a", soon()).unwrap_err());
        until_waiting(6, 0);
        drop(last);
        let error = waiting.join().unwrap();
        assert_eq!(error.status(), RS_ERR_PEER);
        assert!(error.text().contains("rank 2 left"), "{error}");
        assert_eq!(ranks[1].check().unwrap_err(), error);
    });
}

/// A rank may leave right after a gather that the others have not returned from yet.
#[test]
fn a_complete_gather_is_complete_on_every_rank() {
    for _ in 0..300 {
        let ranks = world(7, 3);
        thread::scope(|scope| {
            for comm in ranks {
                scope.spawn(move || assert_eq!(comm.allgather(&[comm.rank() as u8], soon()).unwrap(), [0, 1, 2]));
            }
        });
    }
}

#[test]
fn one_rank_gathers_in_one_thread_at_a_time() {
    let ranks = world(8, 2);
    thread::scope(|scope| {
        let first = scope.spawn(|| ranks[0].allgather(b"a", soon()));
        until_waiting(8, 0);
        assert_eq!(ranks[0].allgather(b"b", soon()).unwrap_err().status(), RS_ERR_BUSY);
        ranks[1].allgather(b"c", soon()).unwrap();
        assert_eq!(first.join().unwrap().unwrap(), b"ac");
    });
}

#[test]
fn joining_wrong() {
    let error = |rank, world| join(9, rank, world).map(|_| ()).unwrap_err();
    let _there = join(9, 1, 4).unwrap();
    for (rank, world, text) in [
        (4, 4, "rank 4 of 4"),
        (0, 0, "rank 0 of 0"),
        (1, 4, "already"),
        (0, 5, "5 ranks, the ranks there say 4"),
        (0, MAX_WORLD + 1, "at most"),
    ] {
        let e = error(rank, world);
        assert_eq!(e.status(), RS_ERR_INVALID);
        assert!(e.text().contains(text), "{e}");
    }
}

#[test]
fn a_number_is_free_after_all_left_or_after_a_failure() {
    drop(world(10, 2));
    assert!(!lock(&HUBS).contains_key(&10), "an empty hub is forgotten");
    let old = world(10, 3);
    old[0].abort("start again");
    let new = world(10, 2);
    thread::scope(|scope| {
        scope.spawn(|| new[0].allgather(b"a", soon()).unwrap());
        // The old ranks leave late, without harm to the new ones of their number.
        drop(old);
        assert!(join(10, 0, 2).is_err(), "the number still means the new ranks");
        new[1].allgather(b"b", soon()).unwrap();
    });
    assert_eq!(new[0].check(), Ok(()));
    drop(new);
    assert!(!lock(&HUBS).contains_key(&10));
}

#[test]
fn windows_are_the_owners_memory() {
    let device = HostDevice::new();
    let [a, b, c] = [10, 20, 30].map(|bytes| device.alloc(bytes).unwrap());
    let ranks = world(11, 3);
    // Rank 0 shows two blocks to rank 2, rank 1 one block to rank 0, twice with other blocks.
    for (first, second) in [(vec![a, b], vec![c]), (vec![c], vec![b])] {
        let to_two = [(2, first.clone())];
        let to_zero = [(0, second.clone())];
        thread::scope(|scope| {
            let zero = scope.spawn(|| ranks[0].windows().unwrap().exchange(&to_two, &[1], soon()).unwrap());
            let one = scope.spawn(|| ranks[1].windows().unwrap().exchange(&to_zero, &[], soon()).unwrap());
            let two = ranks[2].windows().unwrap().exchange(&[], &[0], soon()).unwrap();
            let seen = |windows: &[Window]| -> Vec<Mem> {
                windows.iter().map(|w| if let Window::Mapped(mem) = w { *mem } else { panic!("{w:?}") }).collect()
            };
            let zero = zero.join().unwrap();
            assert_eq!(seen(&two.windows[0]), first);
            assert_eq!(seen(&zero.windows[0]), second);
            assert_eq!(zero.granted, [vec![Access::Mapped; first.len()]]);
            assert!(one.join().unwrap().windows.is_empty());
        });
    }
}

#[test]
fn an_owner_that_never_offers_is_named() {
    let ranks = world(12, 2);
    let error = ranks[0].windows().unwrap().exchange(&[], &[1], Deadline::after(Duration::from_millis(20))).unwrap_err();
    assert_eq!(error.status(), RS_ERR_TIMEOUT);
    assert!(error.text().contains("rank 1 to tell rank 0"), "{error}");
    assert_eq!(ranks[1].check().unwrap_err(), error);
}

#[test]
fn revoke_waits_for_the_chunk_being_read_and_admits_no_other() {
    let ranks = world(13, 3);
    let windows: Vec<&dyn Windows> = ranks.iter().map(|comm| comm.windows().unwrap()).collect();
    windows[1].enter(0).unwrap();
    windows[2].enter(0).unwrap();
    let revoked = AtomicBool::new(false);
    thread::scope(|scope| {
        let owner = scope.spawn(|| {
            windows[0].revoke();
            revoked.store(true, Ordering::SeqCst);
        });
        let refused = loop {
            match windows[2].enter(0) {
                Ok(()) => windows[2].leave(0),
                Err(error) => break error,
            }
        };
        assert_eq!(refused.status(), RS_ERR_PEER);
        assert!(refused.text().contains("rank 0"), "{refused}");
        windows[2].leave(0);
        thread::sleep(Duration::from_millis(30));
        assert!(!revoked.load(Ordering::SeqCst), "rank 1 still reads");
        windows[1].leave(0);
        owner.join().unwrap();
    });
    windows[1].enter(2).unwrap();
    windows[1].leave(2);
    assert_eq!(windows[0].exchange(&[], &[], soon()).unwrap_err().status(), RS_ERR_STATE);
}

/// What an owner writes after `revoke` no reader sees, under load.
#[test]
fn no_chunk_is_read_after_revoke() {
    for round in 0..100 {
        let ranks = world(14, 4);
        let mine_again = AtomicBool::new(false);
        thread::scope(|scope| {
            for reader in &ranks[1..] {
                let mine_again = &mine_again;
                scope.spawn(move || {
                    let windows = reader.windows().unwrap();
                    while windows.enter(0).is_ok() {
                        assert!(!mine_again.load(Ordering::SeqCst), "round {round}: read after revoke");
                        windows.leave(0);
                    }
                });
            }
            ranks[0].windows().unwrap().revoke();
            mine_again.store(true, Ordering::SeqCst);
        });
    }
}

#[test]
fn nobody_reads_from_a_communicator_that_failed() {
    let ranks = world(15, 2);
    ranks[0].abort("enough");
    assert_eq!(ranks[1].windows().unwrap().enter(0).unwrap_err().status(), RS_ERR_ABORTED);
}
