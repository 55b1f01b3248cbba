use super::*;
use std::ffi::c_void;
use std::sync::Mutex;
use std::time::Duration;

/// What the caller's functions were asked, and what they answer next.
#[derive(Default)]
struct Caller {
    asked: Mutex<Vec<String>>,
    answer: Mutex<rs_status_t>,
}

impl Caller {
    fn ask(&self, what: String) -> rs_status_t {
        self.asked.lock().unwrap().push(what);
        *self.answer.lock().unwrap()
    }

    fn answer(&self, status: rs_status_t) {
        *self.answer.lock().unwrap() = status;
    }

    fn asked(&self) -> Vec<String> {
        std::mem::take(&mut *self.asked.lock().unwrap())
    }
}

/// The caller behind `ctx`.
///
/// # Safety
/// `ctx` is that of [`ops`], whose caller lives.
unsafe fn caller<'a>(ctx: *mut c_void) -> &'a Caller {
    // SAFETY: this function's promise.
    unsafe { &*ctx.cast::<Caller>() }
}

// SAFETY, the functions below: the library gives `ctx` back as it got it, and memory of the length it states.
unsafe extern "C" fn allgather(ctx: *mut c_void, send: *const c_void, recv: *mut c_void, bytes: u64, ms: u32) -> rs_status_t {
    // SAFETY: as above.
    unsafe {
        for rank in 0..3 {
            recv.cast::<u8>().add(rank * bytes as usize).copy_from_nonoverlapping(send.cast(), bytes as usize);
            *recv.cast::<u8>().add(rank * bytes as usize) += rank as u8;
        }
        caller(ctx).ask(format!("allgather {bytes} within a minute: {}", (59_000..=60_000).contains(&ms)))
    }
}
unsafe extern "C" fn begin(ctx: *mut c_void) -> rs_status_t {
    // SAFETY: as above.
    unsafe { caller(ctx) }.ask("begin".into())
}
unsafe extern "C" fn end(ctx: *mut c_void) -> rs_status_t {
    // SAFETY: as above.
    unsafe { caller(ctx) }.ask("end".into())
}
unsafe extern "C" fn send(ctx: *mut c_void, data: *const c_void, bytes: u64, peer: i32, stream: *mut c_void) -> rs_status_t {
    // SAFETY: as above.
    unsafe { caller(ctx).ask(format!("send {} {bytes} to {peer} on {}", *data.cast::<u8>(), stream.addr())) }
}
unsafe extern "C" fn recv(ctx: *mut c_void, data: *mut c_void, bytes: u64, peer: i32, stream: *mut c_void) -> rs_status_t {
    // SAFETY: as above.
    unsafe {
        *data.cast::<u8>() = 7;
        caller(ctx).ask(format!("recv {bytes} from {peer} on {}", stream.addr()))
    }
}
unsafe extern "C" fn poll(ctx: *mut c_void) -> rs_status_t {
    // SAFETY: as above.
    unsafe { caller(ctx) }.ask("poll".into())
}
unsafe extern "C" fn abort(ctx: *mut c_void) {
    // SAFETY: as above.
    unsafe { caller(ctx) }.ask("abort".into());
}
unsafe extern "C" fn release(ctx: *mut c_void) {
    // SAFETY: as above.
    unsafe { caller(ctx) }.ask("release".into());
}

fn ops(caller: &Caller) -> rs_comm_ops_t {
    rs_comm_ops_t {
        struct_size: size_of::<rs_comm_ops_t>(),
        ctx: (&raw const *caller).cast_mut().cast(),
        release: Some(release),
        rank: 1,
        world_size: 3,
        allgather: Some(allgather),
        group_begin: Some(begin),
        group_end: Some(end),
        send: Some(send),
        recv: Some(recv),
        poll: Some(poll),
        abort: Some(abort),
    }
}

fn comm(ops: rs_comm_ops_t) -> Result<ForeignComm> {
    // SAFETY: the functions above are sound, and each test keeps its caller alive.
    unsafe { ForeignComm::new(ops) }
}

fn minute() -> Deadline {
    Deadline::after(Duration::from_secs(60))
}

/// One byte that a test owns.
fn mem(byte: &mut [u8; 5]) -> Mem {
    // SAFETY: it lives as long as the test.
    unsafe { Mem::new(byte.as_mut_ptr(), 5) }
}

#[test]
fn calls_reach_the_caller() {
    let caller = Caller::default();
    let comm = comm(ops(&caller)).unwrap();
    assert_eq!((comm.name(), comm.rank(), comm.world()), ("custom", 1, 3));
    assert_eq!(comm.allgather(&[10, 20], minute()).unwrap(), [10, 20, 11, 20, 12, 20]);
    let (mut out, mut into) = ([42; 5], [0; 5]);
    let group = comm.group().unwrap();
    group.begin().unwrap();
    group.send(&[mem(&mut out)], 2, 16).unwrap();
    group.recv(&[mem(&mut into)], 0, 0).unwrap();
    group.end().unwrap();
    assert!(group.poll().unwrap());
    caller.answer(RS_IN_PROGRESS);
    assert!(!group.poll().unwrap());
    assert_eq!(into[0], 7);
    let expected =
        ["allgather 2 within a minute: true", "begin", "send 42 5 to 2 on 16", "recv 5 from 0 on 0", "end", "poll", "poll"];
    assert_eq!(caller.asked(), expected);
    assert_eq!(group.send(&[mem(&mut out)], 3, 0).err().unwrap().status(), RS_ERR_INTERNAL);
    assert_eq!(group.send(&[mem(&mut out)], 1, 0).err().unwrap().status(), RS_ERR_INTERNAL);
    drop(comm);
    assert_eq!(caller.asked(), ["release"]);
}

#[test]
fn a_missing_member_is_named() {
    let caller = Caller::default();
    type Remove = fn(&mut rs_comm_ops_t);
    let without: [(&str, Remove); 6] = [
        ("allgather", |o| o.allgather = None),
        ("group_begin", |o| o.group_begin = None),
        ("group_end", |o| o.group_end = None),
        ("send", |o| o.send = None),
        ("recv", |o| o.recv = None),
        ("poll", |o| o.poll = None),
    ];
    for (name, remove) in without {
        let mut o = ops(&caller);
        remove(&mut o);
        let e = comm(o).err().unwrap();
        assert_eq!(e.text(), format!("rs_comm_ops_t.{name} is NULL; this function is required"));
    }
    for (rank, world) in [(3, 3), (-1, 3), (0, 0), (0, -1)] {
        let e = comm(rs_comm_ops_t { rank, world_size: world, ..ops(&caller) }).err().unwrap();
        assert_eq!((e.status(), e.text()), (RS_ERR_INVALID, &*format!("rs_comm_ops_t: rank {rank} of a world_size of {world}")));
    }
    assert!(caller.asked().is_empty(), "a communicator that could not be made releases nothing");
}

#[test]
fn optional_members() {
    let caller = Caller::default();
    let comm = comm(rs_comm_ops_t { abort: None, release: None, ..ops(&caller) }).unwrap();
    comm.abort("enough");
    assert_eq!(comm.check().err().unwrap().text(), "enough");
    drop(comm);
    assert!(caller.asked().is_empty());
}

#[test]
fn the_first_failure_ends_it() {
    // What the caller answers, and what becomes of it.
    let cases = [
        (RS_ERR_TIMEOUT, RS_ERR_TIMEOUT, "-40 (RS_ERR_TIMEOUT)"),
        (RS_ERR_PEER, RS_ERR_PEER, "-41 (RS_ERR_PEER)"),
        (RS_ERR_ABORTED, RS_ERR_ABORTED, "-42 (RS_ERR_ABORTED)"),
        (RS_ERR_MEMORY, RS_ERR_MEMORY, "-45 (RS_ERR_MEMORY)"),
        (RS_ERR_BUSY, RS_ERR_COMM, "-7 (RS_ERR_BUSY)"),
        (-1234, RS_ERR_COMM, "-1234 (unknown status)"),
        (RS_IN_PROGRESS, RS_ERR_COMM, "1 (RS_IN_PROGRESS); it may answer RS_OK or a negative status"),
        (99, RS_ERR_COMM, "99 (unknown status); it may answer RS_OK or a negative status"),
    ];
    for (answer, status, text) in cases {
        let caller = Caller::default();
        let comm = comm(ops(&caller)).unwrap();
        caller.answer(answer);
        let e = comm.allgather(&[1], minute()).err().unwrap();
        assert_eq!((e.status(), e.text()), (status, &*format!("the caller's communicator: allgather answered {text}")));
        caller.answer(RS_OK);
        assert_eq!(caller.asked(), ["allgather 1 within a minute: true", "abort"]);
        let mut block = [0; 5];
        assert_eq!(comm.check(), Err(e.clone()));
        assert_eq!(comm.allgather(&[1], minute()), Err(e.clone()));
        assert_eq!(comm.begin(), Err(e.clone()));
        assert_eq!(comm.send(&[mem(&mut block)], 0, 0), Err(e.clone()));
        assert_eq!(comm.recv(&[mem(&mut block)], 0, 0), Err(e.clone()));
        assert_eq!(comm.end(), Err(e.clone()));
        assert_eq!(comm.poll(), Err(e.clone()));
        assert!(caller.asked().is_empty(), "nothing is asked of a communicator that failed");
        comm.abort("too late for a reason");
        assert_eq!(comm.check(), Err(e));
        drop(comm);
        assert_eq!(caller.asked(), ["release"]);
    }
}

#[test]
fn an_abort_ends_it_once() {
    let caller = Caller::default();
    let comm = comm(ops(&caller)).unwrap();
    comm.abort("enough");
    comm.abort("again");
    let e = comm.allgather(&[1], minute()).err().unwrap();
    assert_eq!((e.status(), e.text()), (RS_ERR_ABORTED, "enough"));
    assert_eq!(caller.asked(), ["abort"]);
}

#[test]
fn each_function_fails() {
    let mut block = [0; 5];
    let mem = mem(&mut block);
    type Call<'a> = &'a dyn Fn(&ForeignComm) -> Result<()>;
    let calls: [(&str, Call); 5] = [
        ("group_begin", &|c| c.begin()),
        ("send of 5 bytes to rank 0", &|c| c.send(&[mem], 0, 0)),
        ("recv of 5 bytes from rank 2", &|c| c.recv(&[mem], 2, 0)),
        ("group_end", &|c| c.end()),
        ("poll", &|c| Group::poll(c).map(|_| ())),
    ];
    for (name, call) in calls {
        let caller = Caller::default();
        let comm = comm(ops(&caller)).unwrap();
        caller.answer(RS_ERR_INVALID);
        let e = call(&comm).err().unwrap();
        assert_eq!(e.text(), format!("the caller's communicator: {name} answered -1 (RS_ERR_INVALID)"));
        assert_eq!(comm.check(), Err(e));
    }
}

#[test]
fn a_passed_deadline_asks_nothing() {
    let caller = Caller::default();
    let comm = comm(ops(&caller)).unwrap();
    let e = comm.allgather(&[1], Deadline::after(Duration::ZERO)).err().unwrap();
    assert_eq!(e.status(), RS_ERR_TIMEOUT);
    assert_eq!(caller.asked(), ["abort"]);
    assert_eq!(comm.check(), Err(e));
}
