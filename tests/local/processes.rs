//! Ranks as processes: what threads cannot show, above all how they die.

use crate::support::*;
use reshard::abi::*;
use reshard::comm::local::{Force, join, segment};
use reshard::comm::{Comm, Deadline, Window};
use reshard::device::Mem;
use reshard::error::Result;
use reshard::geom::StridedCopy;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::sync::{Arc, Barrier};
use std::time::{Duration, Instant};

/// The longest that a death may stay unnoticed.
const NOTICED: Duration = Duration::from_secs(5);
const VICTIM: u32 = 1;

/// No test of its own: what a process started by [`start`] does.
#[test]
fn role() {
    let Ok(text) = std::env::var("RESHARD_TEST_ROLE") else { return };
    let words: Vec<&str> = text.split(' ').collect();
    let (rank, world) = (words[2].parse().unwrap(), words[3].parse().unwrap());
    let enter = |force| join(words[1], rank, world, LONG, force).unwrap();
    match words[0] {
        "join" => report(&join(words[1], rank, world, LONG, None)),
        "work" => work(&*enter(None)),
        "read" => read(&*enter(Some(Force::Read))),
        "refuse" => refuse(words[1], rank),
        "leak" => leak(words[1]),
        "late" => late(enter(None)),
        "fork" => fork(enter(None)),
        wait => die(&*enter(None), wait),
    }
}

fn run(role: &str, world: u32) -> Vec<Rank> {
    let name = fresh();
    (0..world).map(|rank| start(role, &name, rank, world, false)).collect()
}

/// Everything that works, once: gather, mapped reading, messages.
fn work(comm: &dyn Comm) {
    let (me, world) = (comm.rank(), comm.world());
    for len in [10, 3_000_000] {
        let all = comm.allgather(&pattern(u64::from(me), len), soon()).unwrap();
        assert!(all.chunks(len).enumerate().all(|(r, part)| part == pattern(r as u64, len)));
    }
    let others: Vec<u32> = (0..world).filter(|&r| r != me).collect();
    let at = segment::alloc(100_000, 0).unwrap();
    // SAFETY: never freed.
    let own = unsafe { Mem::new(at.as_ptr(), 100_000) };
    write(own, &pattern(u64::from(me) + 50, 100_000));
    let offers: Vec<_> = others.iter().map(|&r| (r, vec![own])).collect();
    let opened = comm.windows().unwrap().exchange(&offers, &others, soon()).unwrap();
    for (&owner, list) in others.iter().zip(&opened.windows) {
        let Window::Mapped(mem) = list[0] else { panic!("{list:?}") };
        assert!(bytes(mem) == pattern(u64::from(owner) + 50, 100_000));
    }
    let pipe = comm.pipe().unwrap();
    pipe.open(&others, &others, soon()).unwrap();
    let mut random = fastrand::Rng::with_seed(9);
    let lengths: Vec<usize> = (0..200).map(|_| random.usize(1..=pipe.capacity())).collect();
    let (mut sent, mut got) = (vec![0; world as usize], vec![0; world as usize]);
    while others.iter().any(|&r| sent[r as usize] + got[r as usize] < 2 * lengths.len()) {
        let mut moved = false;
        for &r in &others {
            let (s, g) = (&mut sent[r as usize], &mut got[r as usize]);
            if *s < lengths.len() {
                if let Some(slot) = pipe.reserve(r).unwrap() {
                    write(slot, &pattern(u64::from(me * 100 + r) + *s as u64, lengths[*s]));
                    pipe.commit(r, lengths[*s]).unwrap();
                    (*s, moved) = (*s + 1, true);
                }
            }
            if *g < lengths.len() {
                if let Some(message) = pipe.arrived(r, lengths[*g]).unwrap() {
                    assert!(bytes(message) == pattern(u64::from(r * 100 + me) + *g as u64, lengths[*g]));
                    pipe.release(r).unwrap();
                    (*g, moved) = (*g + 1, true);
                }
            }
        }
        if !moved {
            pipe.wait(Duration::from_secs(1)).unwrap();
        }
    }
    comm.allgather(&[], soon()).unwrap();
    say("ok");
}

#[test]
fn processes_gather_read_and_send() {
    for mut rank in run("work", 3) {
        assert_eq!(rank.heard(), "ok");
    }
}

fn read(comm: &dyn Comm) {
    let me = comm.rank();
    let mut own = pattern(u64::from(me), 5_000_000);
    let opened = comm.windows().unwrap().exchange(&[(1 - me, vec![mem(&mut own)])], &[1 - me], soon());
    let Ok(opened) = opened else { return report(&opened) };
    let mut got = vec![0; 2_500_000];
    let copy = StridedCopy::new(1, 0, 0, [(5000, 1000, 500), (500, 1, 1)]);
    comm.windows().unwrap().read(1 - me, &opened.windows[0][0], mem(&mut got), &copy).unwrap();
    let want: Vec<u8> = pattern(u64::from(1 - me), 5_000_000).chunks(1000).flat_map(|row| row[..500].to_vec()).collect();
    assert!(got == want);
    comm.allgather(&[], soon()).unwrap();
    say("ok");
}

/// Where Yama forbids it, the error says so.
#[test]
fn processes_read_each_other_by_force() {
    let scope = std::fs::read_to_string("/proc/sys/kernel/yama/ptrace_scope").map_or(0, |s| s.trim().parse().unwrap());
    // SAFETY: takes nothing, changes nothing.
    let allowed = scope == 0 || unsafe { libc::geteuid() } == 0 && scope < 3;
    for mut rank in run("read", 2) {
        match parse(&rank.heard()) {
            Ok(()) => assert!(allowed),
            Err(e) => assert!(!allowed && e.text().contains("ptrace_scope"), "{e}"),
        }
    }
}

/// The kernel refuses to read a process that cannot be dumped.
fn refuse(name: &str, rank: u32) {
    // SAFETY: no pointer is passed.
    unsafe { libc::prctl(libc::PR_SET_DUMPABLE, 0, 0, 0, 0) };
    let mut own = vec![1; 100];
    for (n, force) in [Some(Force::Read), None].into_iter().enumerate() {
        let comm = join(&format!("{name}-{n}"), rank, 2, LONG, force).unwrap();
        let offers = if rank == 0 { vec![(1, vec![mem(&mut own)])] } else { vec![] };
        let owners = if rank == 1 { vec![0] } else { vec![] };
        report(&comm.windows().unwrap().exchange(&offers, &owners, soon()));
        comm.allgather(&[], soon()).unwrap();
    }
}

#[test]
fn a_refused_read_is_an_error_by_force_and_none_otherwise() {
    let name = fresh();
    let mut both: Vec<Rank> = (0..2).map(|rank| start("refuse", &name, rank, 2, true)).collect();
    for (rank, text) in both.iter_mut().zip(["rank 1 (process", "not allowed here"]) {
        let e = parse(&rank.heard()).unwrap_err();
        assert_eq!(e.status(), RS_ERR_COMM);
        assert!(e.text().contains(text), "{e}");
        assert_eq!(rank.heard(), "ok");
    }
}

/// Survivors wait in one way each; the victim does nothing until it dies.
fn die(comm: &dyn Comm, wait: &str) {
    let all: Vec<u32> = (0..comm.world()).filter(|&r| r != comm.rank()).collect();
    let pipe = comm.pipe().unwrap();
    if matches!(wait, "wait" | "check") {
        pipe.open(&all, &all, soon()).unwrap();
    }
    let spare = segment::alloc(4096, 0).unwrap();
    // SAFETY: never freed.
    let spare = unsafe { Mem::new(spare.as_ptr(), 4096) };
    comm.allgather(&[], soon()).unwrap();
    say("ready");
    if comm.rank() == VICTIM {
        pause();
    }
    let result = match wait {
        "gather" => comm.allgather(&[1], soon()).map(|_| ()),
        "large" => comm.allgather(&vec![1; 5 << 20], soon()).map(|_| ()),
        "exchange" => {
            let offers: Vec<_> = all.iter().map(|&r| (r, vec![spare])).collect();
            comm.windows().unwrap().exchange(&offers, &all, soon()).map(|_| ())
        }
        "open" => pipe.open(&all, &all, soon()),
        "wait" => wait_for_message(comm),
        "check" => loop {
            if let Err(e) = comm.windows().unwrap().enter(VICTIM) {
                break Err(e);
            }
            comm.windows().unwrap().leave(VICTIM);
        },
        "deadline" => comm.allgather(&[1], Deadline::after(Duration::from_millis(700))).map(|_| ()),
        other => panic!("no role '{other}'"),
    };
    report(&result);
}

fn wait_for_message(comm: &dyn Comm) -> Result<()> {
    let pipe = comm.pipe().unwrap();
    while pipe.arrived(VICTIM, 1)?.is_none() {
        pipe.wait(LONG)?;
    }
    Ok(())
}

#[test]
fn a_killed_rank_is_named_at_once_in_every_wait() {
    for wait in ["gather", "large", "exchange", "open", "wait", "check"] {
        let mut ranks = run(wait, 4);
        for rank in &mut ranks {
            assert_eq!(rank.heard(), "ready", "{wait}");
        }
        std::thread::sleep(Duration::from_millis(100));
        let begun = Instant::now();
        let pid = ranks[VICTIM as usize].pid();
        ranks[VICTIM as usize].signal(libc::SIGKILL);
        for at in [0, 2, 3] {
            let e = parse(&ranks[at].heard()).unwrap_err();
            assert_eq!(e.status(), RS_ERR_PEER, "{wait}: {e}");
            assert!(e.text().contains(&format!("rank 1 (process {pid}) died")), "{wait}: {e}");
        }
        assert!(begun.elapsed() < NOTICED, "{wait}: {:?}", begun.elapsed());
    }
}

/// A rank that dies while others are still joining.
#[test]
fn a_rank_killed_while_others_join_is_named() {
    let name = fresh();
    let mut first = start("join", &name, 0, 3, false);
    let second = start("join", &name, 1, 3, false);
    std::thread::sleep(Duration::from_millis(700));
    let pid = second.pid();
    second.signal(libc::SIGKILL);
    let begun = Instant::now();
    let e = parse(&first.heard()).unwrap_err();
    assert_eq!(e.status(), RS_ERR_PEER);
    assert!(e.text().contains(&format!("rank 1 (process {pid})")), "{e}");
    assert!(begun.elapsed() < NOTICED);
}

#[test]
fn a_second_run_of_the_same_name_is_refused_and_the_first_lives() {
    let name = fresh();
    let mut first: Vec<Rank> = (0..2).map(|rank| start("deadline", &name, rank, 2, false)).collect();
    for rank in &mut first {
        assert_eq!(rank.heard(), "ready");
    }
    for rank in 0..2 {
        let e = parse(&start("join", &name, rank, 2, false).heard()).unwrap_err();
        assert_eq!(e.status(), RS_ERR_INVALID);
        assert!(e.text().contains(&format!("taken by process {}", first[rank as usize].pid())), "{e}");
    }
    first[VICTIM as usize].go();
    // The one that waited may have missed its deadline meanwhile; nothing else may have happened to it.
    for rank in &mut first {
        assert!(parse(&rank.heard()).map_or_else(|e| e.status(), |()| RS_OK) != RS_ERR_PEER);
    }
}

/// A stopped rank is not dead: the others miss their deadline, say for whom, and its own call fails once it is continued.
#[test]
fn a_stopped_rank_is_named_after_the_deadline_and_fails_when_it_is_continued() {
    let mut ranks = run("deadline", 3);
    for rank in &mut ranks {
        assert_eq!(rank.heard(), "ready");
    }
    let pid = ranks[VICTIM as usize].pid();
    ranks[VICTIM as usize].stop();
    ranks[VICTIM as usize].go();
    for at in [0, 2] {
        let e = parse(&ranks[at].heard()).unwrap_err();
        assert_eq!(e.status(), RS_ERR_TIMEOUT);
        assert!(e.text().contains(&format!("waited 700 ms for rank 1 (process {pid}) to gather")), "{e}");
    }
    ranks[VICTIM as usize].signal(libc::SIGCONT);
    let e = parse(&ranks[VICTIM as usize].heard()).unwrap_err();
    assert_eq!(e.status(), RS_ERR_TIMEOUT);
    assert!(e.text().contains("gave up"), "{e}");
}

/// The victim holds a slot when it is stopped. When it is continued it writes all of it and commits, while the others use new rings.
fn late(comm: Arc<dyn Comm>) {
    let (me, name) = (comm.rank(), std::env::var("RESHARD_TEST_ROLE").unwrap());
    let pipe = comm.pipe().unwrap();
    let size = pipe.capacity();
    if me == VICTIM {
        pipe.open(&[0], &[0], soon()).unwrap();
        let slot = pipe.reserve(0).unwrap().unwrap();
        say("ready");
        pause();
        write(slot, &vec![0xee; size]);
        report(&pipe.commit(0, size).and_then(|()| comm.check()));
        return;
    }
    let to = if me == 0 { vec![VICTIM] } else { vec![] };
    pipe.open(&to, &to, soon()).unwrap();
    say("ready");
    pause();
    report(&comm.allgather(&[], Deadline::after(Duration::from_millis(300))));
    drop(comm);
    // The survivors meet again, as ranks 0 and 1.
    let comm = join(&format!("{}-again", name.split(' ').nth(1).unwrap()), me / 2, 2, LONG, None).unwrap();
    let (other, pipe) = (1 - me / 2, comm.pipe().unwrap());
    pipe.open(&[other], &[other], soon()).unwrap();
    let mut slots = vec![];
    while let Some(slot) = pipe.reserve(other).unwrap() {
        write(slot, &pattern(slots.len() as u64, size));
        slots.push(slot);
        pipe.commit(other, size).unwrap();
    }
    say("refilled");
    pause();
    for at in 0..slots.len() {
        let message = loop {
            match pipe.arrived(other, size).unwrap() {
                Some(message) => break message,
                None => pipe.wait(LONG).unwrap(),
            }
        };
        assert!(bytes(message) == pattern(at as u64, size));
        pipe.release(other).unwrap();
    }
    comm.allgather(&[], soon()).unwrap();
    say("whole");
}

#[test]
fn a_stopped_rank_changes_nothing_when_it_is_continued() {
    let mut ranks = run("late", 3);
    for rank in &mut ranks {
        assert_eq!(rank.heard(), "ready");
    }
    ranks[VICTIM as usize].stop();
    for at in [0, 2] {
        ranks[at].go();
        assert_eq!(parse(&ranks[at].heard()).unwrap_err().status(), RS_ERR_TIMEOUT);
    }
    for at in [0, 2] {
        assert_eq!(ranks[at].heard(), "refilled");
    }
    ranks[VICTIM as usize].signal(libc::SIGCONT);
    ranks[VICTIM as usize].go();
    let e = parse(&ranks[VICTIM as usize].heard()).unwrap_err();
    assert!(matches!(e.status(), RS_ERR_TIMEOUT | RS_ERR_PEER), "{e}");
    for at in [0, 2] {
        ranks[at].go();
    }
    for at in [0, 2] {
        assert_eq!(ranks[at].heard(), "whole");
    }
}

/// What a process holds: open files and mappings of ours.
fn held() -> (usize, usize) {
    let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
    let files = std::fs::read_dir("/proc/self/fd").unwrap().count();
    (files, maps.lines().filter(|l| l.contains("libreshard")).count())
}

fn leak(name: &str) {
    let before = held();
    let together = Barrier::new(3);
    for round in 0..3 {
        std::thread::scope(|scope| {
            let together = &together;
            for rank in 0..3u32 {
                scope.spawn(move || {
                    let comm = join(&format!("{name}-{round}"), rank, 3, LONG, None).unwrap();
                    let others: Vec<u32> = (0..3).filter(|&r| r != rank).collect();
                    let at = segment::alloc(10_000, 0).unwrap();
                    // SAFETY: freed below, when nobody reads it.
                    let own = unsafe { Mem::new(at.as_ptr(), 10_000) };
                    let offers: Vec<_> = others.iter().map(|&r| (r, vec![own])).collect();
                    for _ in 0..2 {
                        comm.windows().unwrap().exchange(&offers, &others, soon()).unwrap();
                        comm.pipe().unwrap().open(&others, &others, soon()).unwrap();
                    }
                    assert!(held() > before);
                    together.wait();
                    if round == 2 {
                        comm.abort("a failed run gives all back too");
                    }
                    // SAFETY: no other rank reads it any more.
                    unsafe { segment::free(at).unwrap() };
                });
            }
        });
        assert_eq!(held(), before, "round {round}");
    }
    say("ok");
}

#[test]
fn nothing_is_left_when_a_run_ends() {
    assert_eq!(start("leak", &fresh(), 0, 1, false).heard(), "ok");
}

/// A child made by fork has the sockets and the memory, but is no rank: what it drops harms nobody, and a child that drops nothing and
/// lives on does not hide its parent's death.
fn fork(comm: Arc<dyn Comm>) {
    let at = segment::alloc(4096, 0).unwrap();
    // SAFETY: freed by nobody but the child, which may not succeed in taking the parent's pages.
    let own = unsafe { Mem::new(at.as_ptr(), 4096) };
    write(own, &[9; 4096]);
    comm.allgather(&[], soon()).unwrap();
    if comm.rank() == VICTIM {
        // SAFETY: this test runs alone in its process, so no other thread holds a lock that a child needs.
        if unsafe { libc::fork() } == 0 {
            let refused = comm.allgather(&[], soon()).is_err_and(|e| e.status() == RS_ERR_STATE);
            drop(comm);
            // SAFETY: the child uses it no more.
            let freed = unsafe { segment::free(at) }.is_ok();
            // What is registered for a normal end, a leak check for instance, knows only the parent's threads and stacks.
            // SAFETY: no destructor of this process matters any more.
            unsafe { libc::_exit(i32::from(!refused || !freed)) };
        }
        let mut status = 0;
        // SAFETY: `status` outlives the call.
        unsafe { libc::wait(&mut status) };
        // SAFETY: as above.
        let child = unsafe { libc::fork() };
        if child == 0 {
            std::thread::sleep(LONG);
            // SAFETY: as above.
            unsafe { libc::_exit(0) };
        }
        say(format_args!("{status} {child}"));
    }
    pause();
    assert_eq!(bytes(own), [9; 4096]);
    comm.allgather(&[], soon()).unwrap();
    say("gathered");
    if comm.rank() == VICTIM {
        pause();
    }
    report(&comm.allgather(&[], soon()));
}

#[test]
fn a_forked_child_is_no_rank() {
    let mut ranks = run("fork", 3);
    let said = ranks[VICTIM as usize].heard();
    let (status, child) = said.split_once(' ').unwrap();
    assert_eq!(status, "0", "the first child's end");
    for rank in &mut ranks {
        rank.go();
    }
    for rank in &mut ranks {
        assert_eq!(rank.heard(), "gathered");
    }
    let begun = Instant::now();
    ranks[VICTIM as usize].signal(libc::SIGKILL);
    for at in [0, 2] {
        let e = parse(&ranks[at].heard()).unwrap_err();
        assert!(e.status() == RS_ERR_PEER && e.text().contains("rank 1 (process"), "{e}");
    }
    assert!(begun.elapsed() < NOTICED);
    // SAFETY: the second child, which still sleeps.
    unsafe { libc::kill(child.parse().unwrap(), libc::SIGKILL) };
}

/// Makes this thread another user's, for the kernel and for nobody else.
fn become_stranger() {
    // SAFETY: no pointer is passed. The raw call, unlike libc's, changes this thread alone.
    assert_eq!(unsafe { libc::syscall(libc::SYS_setresuid, -1, 65_534, -1) }, 0);
}

fn raw(name: &str, listen: bool) -> OwnedFd {
    // SAFETY: a struct of integers, filled below; the calls get its address and length, and it outlives them.
    unsafe {
        let fd = OwnedFd::from_raw_fd(libc::socket(libc::AF_UNIX, libc::SOCK_SEQPACKET, 0));
        let mut at: libc::sockaddr_un = std::mem::zeroed();
        at.sun_family = libc::AF_UNIX as libc::sa_family_t;
        for (to, from) in at.sun_path[1..].iter_mut().zip(name.bytes()) {
            *to = from as libc::c_char;
        }
        let len = (3 + name.len()) as libc::socklen_t;
        let address = (&raw const at).cast();
        if listen {
            assert_eq!(libc::bind(fd.as_raw_fd(), address, len), 0);
            assert_eq!(libc::listen(fd.as_raw_fd(), 5), 0);
        } else {
            while libc::connect(fd.as_raw_fd(), address, len) != 0 {
                std::thread::sleep(Duration::from_millis(1));
            }
        }
        fd
    }
}

/// Needs root, which may become another user; without it there is no other user to try.
#[test]
fn other_users_are_refused() {
    // SAFETY: takes nothing, changes nothing.
    if unsafe { libc::geteuid() } != 0 {
        return;
    }
    // A stranger that holds the name of rank 0 is an error for who calls it.
    let name = fresh();
    let path = format!("libreshard/0/{name}/0");
    let listener = std::thread::spawn(move || {
        become_stranger();
        raw(&path, true)
    });
    let listener = listener.join().unwrap();
    let e = join(&name, 1, 2, LONG, None).err().unwrap();
    assert_eq!(e.status(), RS_ERR_COMM);
    assert!(e.text().contains("user 65534") && e.text().contains("rank 0"), "{e}");
    drop(listener);
    // A stranger that calls is sent away, and the run goes on.
    let name = fresh();
    let path = format!("libreshard/0/{name}/0");
    std::thread::scope(|scope| {
        let rank = scope.spawn(|| join(&name, 0, 2, LONG, None).unwrap());
        let closed = scope.spawn(move || {
            become_stranger();
            let socket = raw(&path, false);
            // SAFETY: one byte of ours; 0: the other end has closed the connection.
            unsafe { libc::recv(socket.as_raw_fd(), (&raw mut *Box::new(0u8)).cast(), 1, 0) }
        });
        assert_eq!(closed.join().unwrap(), 0, "no greeting for a stranger");
        let other = join(&name, 1, 2, LONG, None).unwrap();
        let both = [rank.join().unwrap(), other];
        assert!(both.iter().all(|c| c.check().is_ok()));
    });
}
