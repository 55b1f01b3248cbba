//! The host path alone: many ranks as threads, few children each.

use super::frame::{Frame, Kind};
use super::meet::{self, Place};
use super::tree::{Tree, children, parent};
use crate::abi::*;
use crate::comm::Deadline;
use crate::error::Result;
use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::time::{Duration, Instant};

const LONG: Duration = Duration::from_secs(60);

/// An address with a port that is free now.
fn address() -> String {
    TcpListener::bind("127.0.0.1:0").and_then(|l| l.local_addr()).unwrap().to_string()
}

fn join(address: &str, rank: u32, world: u32, fan: u32, timeout: Duration) -> Result<(Tree, u64)> {
    meet::join(Place { address, run: "unit", rank, world, fan }, Deadline::after(timeout))
}

/// Each rank of these in a thread of its own; what they gave, in this order.
fn each<T: Send>(ranks: impl IntoIterator<Item = u32>, work: impl Fn(u32) -> T + Sync) -> Vec<T> {
    let work = &work;
    std::thread::scope(|scope| {
        let threads: Vec<_> = ranks.into_iter().map(|r| scope.spawn(move || work(r))).collect();
        threads.into_iter().map(|t| t.join().unwrap()).collect()
    })
}

fn trees(world: u32, fan: u32) -> Vec<Tree> {
    let address = address();
    let joined = each(0..world, |rank| join(&address, rank, world, fan, LONG).unwrap());
    assert!(joined.iter().all(|(_, token)| *token == joined[0].1), "all have one token");
    joined.into_iter().map(|(tree, _)| tree).collect()
}

#[test]
fn every_rank_but_the_first_is_the_child_of_its_parent() {
    for (world, fan) in [(1, 2), (2, 2), (7, 2), (8, 3), (100, 32), (5000, 32)] {
        let mut seen = vec![0; world as usize];
        for rank in 0..world {
            for child in children(rank, fan, world) {
                assert_eq!(parent(child, fan), rank);
                seen[child as usize] += 1;
            }
        }
        assert!(seen[0] == 0 && seen[1..].iter().all(|&n| n == 1));
    }
}

#[test]
fn all_hear_what_all_said() {
    for (world, fan) in [(1, 2), (2, 2), (3, 2), (11, 2), (14, 3)] {
        let trees = trees(world, fan);
        for len in [0, 1, 48, 300_000] {
            let word = |rank: u32| (0..len).map(|i| (i * 7 + rank * 13 + len) as u8).collect::<Vec<u8>>();
            let wanted: Vec<u8> = (0..world).flat_map(word).collect();
            for heard in each(0..world, |r| trees[r as usize].allgather(&word(r), Deadline::after(LONG)).unwrap()) {
                assert!(heard == wanted, "{world} ranks, {fan} children, {len} bytes");
            }
        }
        // Who has what all said may go at once; the others are not disturbed.
        for (rank, heard) in each(0..world, |r| trees[r as usize].allgather(b"last", Deadline::after(LONG))).into_iter().enumerate()
        {
            assert_eq!(heard.unwrap().len(), 4 * world as usize, "rank {rank}");
        }
    }
}

#[test]
fn a_rank_may_go_as_soon_as_it_has_heard_all() {
    for round in 0..20 {
        let address = address();
        let heard = each(0..9, |rank| {
            let (tree, _) = join(&address, rank, 9, 2, LONG).unwrap();
            std::thread::sleep(Duration::from_millis(u64::from((rank * 7 + round) % 5)));
            tree.allgather(&vec![rank as u8; 10_000], Deadline::after(LONG))
        });
        assert!(heard.iter().all(|h| h.as_ref().is_ok_and(|h| h.len() == 90_000)), "{heard:?}");
    }
}

#[test]
fn missing_ranks_are_named_everywhere_in_time() {
    // Those missing, and those to blame: the word of 9 comes through 4.
    for (missing, blamed) in [(vec![5], vec![5]), (vec![1], vec![1]), (vec![2, 10], vec![2, 10]), (vec![4, 9], vec![4])] {
        let trees = trees(11, 2);
        let begun = Instant::now();
        let there: Vec<u32> = (0..11).filter(|r| !missing.contains(r)).collect();
        let gather = |r: u32| trees[r as usize].allgather(&[0], Deadline::after(Duration::from_millis(300))).unwrap_err();
        for (&rank, e) in there.iter().zip(each(there.iter().copied(), gather)) {
            assert_eq!(e.status(), RS_ERR_TIMEOUT, "rank {rank}: {e}");
            // Behind a missing rank nobody hears of the others.
            let mut line = std::iter::successors(Some(rank), |&r| (r > 0).then(|| parent(r, 2)));
            let wanted = match line.find(|r| missing.contains(r)) {
                Some(behind) => vec![behind],
                None => blamed.clone(),
            };
            let waited = e.text().rsplit("ms for ").next().unwrap();
            let named: Vec<u32> =
                (1..11).filter(|r| waited.contains(&format!("rank {r} ")) || waited.contains(&format!("rank {r},"))).collect();
            assert_eq!(named, wanted, "rank {rank}: {e}");
        }
        assert!(begun.elapsed() < Duration::from_millis(300) + super::tree::GRACE + Duration::from_secs(5));
    }
}

#[test]
fn a_rank_that_dies_is_named_everywhere_at_once() {
    for dead in [0, 1, 4, 10] {
        let mut trees = trees(11, 2);
        // Not a word: as the kernel closes what a killed process leaves.
        trees.remove(dead as usize).die();
        let begun = Instant::now();
        let heard = each(0..10, |at| trees[at as usize].allgather(&[0], Deadline::after(LONG)));
        assert!(begun.elapsed() < Duration::from_secs(20));
        for (at, heard) in heard.into_iter().enumerate() {
            let e = heard.unwrap_err();
            assert_eq!(e.status(), RS_ERR_PEER, "{e}");
            assert!(e.text().contains(&format!("rank {dead}")) && e.text().contains("died"), "the {at}th: {e}");
        }
    }
}

#[test]
fn who_is_late_hears_what_the_first_rank_waits_for() {
    let trees = trees(11, 2);
    let busy = |rank: u32| {
        // Ranks 0 and 1, which is above 3, are not there yet, but look.
        loop {
            match trees[rank as usize].check(&|| format!("rank 9, says {rank}")) {
                Ok(()) => std::thread::sleep(Duration::from_millis(1)),
                Err(e) => return e,
            }
        }
    };
    let gather = |rank: u32| trees[rank as usize].allgather(&[0], Deadline::after(Duration::from_millis(200))).unwrap_err();
    for (rank, e) in each(0..11, |rank| if rank < 2 { busy(rank) } else { gather(rank) }).into_iter().enumerate() {
        assert_eq!(e.status(), RS_ERR_TIMEOUT, "rank {rank}: {e}");
        assert!(e.text().contains("waited 200 ms for rank 0, which waits for rank 9, says 0"), "rank {rank}: {e}");
    }
}

#[test]
fn an_abort_ends_it_on_all_ranks() {
    let trees = trees(11, 2);
    let heard = each(0..11, |rank| {
        if rank == 7 {
            std::thread::sleep(Duration::from_millis(50));
            trees[7].abort("enough");
        }
        trees[rank as usize].allgather(&[0], Deadline::after(LONG)).unwrap_err()
    });
    for e in heard {
        assert_eq!((e.status(), e.text()), (RS_ERR_ABORTED, "rank 7 aborted: enough"));
    }
}

#[test]
fn words_of_different_lengths_are_refused_everywhere() {
    let trees = trees(5, 2);
    for e in
        each(0..5, |rank| trees[rank as usize].allgather(&vec![0; 3 + usize::from(rank == 3)], Deadline::after(LONG)).unwrap_err())
    {
        assert_eq!(e.status(), RS_ERR_MISMATCH);
        assert!(e.text().contains("rank 0 gathers 3 bytes, rank 3 4"), "{e}");
    }
}

#[test]
fn who_does_not_join_is_named() {
    let address = address();
    let errors = each([0, 1, 3], |rank| join(&address, rank, 4, 2, Duration::from_millis(400)).unwrap_err());
    for e in errors {
        assert_eq!(e.status(), RS_ERR_TIMEOUT, "{e}");
        assert!(e.text().contains("400 ms for rank 2 to join"), "{e}");
    }
    let e = join(&address, 1, 2, 2, Duration::from_millis(100)).unwrap_err();
    assert!(e.status() == RS_ERR_TIMEOUT && e.text().contains("does it run, with this address?"), "{e}");
}

#[test]
fn strangers_and_those_of_other_runs_are_refused_and_the_run_begins() {
    let address = address();
    let strangers = || {
        // A scanner of ports, which waits; a browser; one that goes at once; a frame that is none of a greeting; a length beyond all.
        let silent = until_there(&address);
        let mut browser = until_there(&address);
        browser.write_all(b"GET / HTTP/1.1\r\nHost: somewhere\r\n\r\n").unwrap();
        drop(until_there(&address));
        let mut word = until_there(&address);
        word.write_all(&Frame::new(Kind::Word, 1, b"hello").encode()).unwrap();
        let mut long = until_there(&address);
        let mut head = Frame::new(Kind::Hello, 1, &[]).encode().to_vec();
        head[16..24].copy_from_slice(&u64::MAX.to_le_bytes());
        long.write_all(&head).unwrap();
        let place = |rank, world, run| Place { address: &address, run, rank, world, fan: 2 };
        let refused = |place| meet::join(place, Deadline::after(LONG)).unwrap_err();
        let other = refused(place(1, 3, "another"));
        assert!(other.status() == RS_ERR_MISMATCH && other.text().contains("joins run 'another'"), "{other}");
        let world = refused(place(1, 4, "unit"));
        assert!(world.status() == RS_ERR_MISMATCH && world.text().contains("says that there are 4 ranks"), "{world}");
        let mut answer = vec![];
        browser.read_to_end(&mut answer).unwrap();
        assert!(answer.windows(14).any(|w| w == b"make no sense:"), "{:?}", String::from_utf8_lossy(&answer));
        silent
    };
    let (silent, trees) = std::thread::scope(|scope| {
        let root = scope.spawn(|| join(&address, 0, 3, 2, LONG).unwrap().0);
        let silent = strangers();
        let rest = each(1..3, |rank| join(&address, rank, 3, 2, LONG).unwrap().0);
        let trees: Vec<Tree> = std::iter::once(root.join().unwrap()).chain(rest).collect();
        (silent, trees)
    });
    each(0..3, |r| trees[r as usize].allgather(&[r as u8], Deadline::after(LONG)).unwrap());
    drop(silent);
}

#[test]
fn a_rank_that_is_there_twice_is_refused() {
    let address = address();
    std::thread::scope(|scope| {
        let first: Vec<_> = (0..2)
            .map(|r| {
                scope.spawn({
                    let a = address.clone();
                    move || join(&a, r, 3, 2, LONG)
                })
            })
            .collect();
        std::thread::sleep(Duration::from_millis(200));
        let again = join(&address, 1, 3, 2, LONG).unwrap_err();
        assert!(again.status() == RS_ERR_INVALID && again.text().contains("rank 1 is there already"), "{again}");
        let root = join(&address, 0, 3, 2, LONG).unwrap_err();
        assert!(root.status() == RS_ERR_COMM && root.text().contains("cannot listen"), "{root}");
        let last = join(&address, 2, 3, 2, LONG);
        let all: Vec<_> = first.into_iter().map(|t| t.join().unwrap()).chain([last]).collect();
        assert!(all.iter().all(|t| t.is_ok()));
    });
}

fn until_there(address: &str) -> TcpStream {
    loop {
        match TcpStream::connect(address) {
            Ok(stream) => return stream,
            Err(_) => std::thread::sleep(Duration::from_millis(5)),
        }
    }
}
