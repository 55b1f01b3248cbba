use super::*;
use smallvec::smallvec;
use std::sync::Mutex;

/// Host memory that plays a device: what the functions were asked, and what they answer next.
struct Caller {
    asked: Mutex<Vec<String>>,
    answer: Mutex<rs_status_t>,
    alloc: Mutex<*mut c_void>,
}

impl Caller {
    fn new() -> Caller {
        Caller { asked: Mutex::default(), answer: Mutex::new(RS_OK), alloc: Mutex::new(ptr::without_provenance_mut(512)) }
    }

    fn ask(&self, what: String) -> rs_status_t {
        self.asked.lock().unwrap().push(what);
        *self.answer.lock().unwrap()
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

// SAFETY, the functions below: the library gives `ctx` back as it got it, and rows as many as it states.
unsafe extern "C" fn alloc(ctx: *mut c_void, bytes: u64, out: *mut *mut c_void) -> rs_status_t {
    // SAFETY: as above.
    unsafe {
        *out = *caller(ctx).alloc.lock().unwrap();
        caller(ctx).ask(format!("alloc {bytes}"))
    }
}
unsafe extern "C" fn free(ctx: *mut c_void, memory: *mut c_void) {
    // SAFETY: as above.
    unsafe { caller(ctx) }.ask(format!("free {}", memory.addr()));
}
unsafe extern "C" fn copy(ctx: *mut c_void, copies: *const rs_copy_t, count: usize, stream: *mut c_void) -> rs_status_t {
    // SAFETY: as above; the rows' memory is the test's.
    unsafe {
        for row in std::slice::from_raw_parts(copies, count) {
            assert!(row.rank as usize <= RS_MAX_COPY_RANK && row.transform == 0 && row.src_dtype.bits == 0);
            copy_row(row, 0, row.src.cast(), row.dst.cast());
        }
        caller(ctx).ask(format!("copy {count} on {}", stream.addr()))
    }
}
unsafe extern "C" fn record(ctx: *mut c_void, stream: *mut c_void, out: *mut *mut c_void) -> rs_status_t {
    // SAFETY: as above.
    unsafe {
        *out = ptr::without_provenance_mut(77);
        caller(ctx).ask(format!("record on {}", stream.addr()))
    }
}
unsafe extern "C" fn wait(ctx: *mut c_void, stream: *mut c_void, event: *mut c_void) -> rs_status_t {
    // SAFETY: as above.
    unsafe { caller(ctx) }.ask(format!("wait on {} for {}", stream.addr(), event.addr()))
}
unsafe extern "C" fn query(ctx: *mut c_void, event: *mut c_void) -> rs_status_t {
    // SAFETY: as above.
    unsafe { caller(ctx) }.ask(format!("query {}", event.addr()))
}
unsafe extern "C" fn destroy(ctx: *mut c_void, event: *mut c_void) {
    // SAFETY: as above.
    unsafe { caller(ctx) }.ask(format!("destroy {}", event.addr()));
}
unsafe extern "C" fn release(ctx: *mut c_void) {
    // SAFETY: as above.
    unsafe { caller(ctx) }.ask("release".into());
}

/// # Safety
/// The row lies in memory of the test.
unsafe fn copy_row(row: &rs_copy_t, axis: usize, src: *const u8, dst: *mut u8) {
    // SAFETY: this function's promise.
    unsafe {
        if axis == row.rank as usize {
            return dst.copy_from_nonoverlapping(src, row.run_bytes as usize);
        }
        for i in 0..row.extent[axis] {
            copy_row(row, axis + 1, src.add((i * row.src_stride[axis]) as usize), dst.add((i * row.dst_stride[axis]) as usize));
        }
    }
}

fn ops(caller: &Caller) -> rs_device_t {
    rs_device_t {
        struct_size: size_of::<rs_device_t>(),
        ctx: (&raw const *caller).cast_mut().cast(),
        release: Some(release),
        device_type: 12,
        device_id: 3,
        flags: 0,
        reserved: 0,
        alloc: Some(alloc),
        free: Some(free),
        copy: Some(copy),
        event_record: Some(record),
        event_wait: Some(wait),
        event_query: Some(query),
        event_destroy: Some(destroy),
    }
}

fn device(ops: rs_device_t) -> Result<ForeignDevice> {
    // SAFETY: the functions above are sound, and each test keeps its caller alive.
    unsafe { ForeignDevice::new(ops) }
}

fn mem(bytes: &mut [u8]) -> Mem {
    // SAFETY: they live as long as the test.
    unsafe { Mem::new(bytes.as_mut_ptr(), bytes.len()) }
}

#[test]
fn calls_reach_the_caller() {
    let caller = Caller::new();
    let device = device(ops(&caller)).unwrap();
    assert_eq!((device.name(), device.id()), ("the caller's device 12:3", (12, 3)));
    let staging = device.alloc(1000).unwrap();
    assert_eq!((staging.addr(), staging.len()), (512, 1000));
    device.free(staging);
    let event = device.record(5).unwrap();
    device.wait(6, &event).unwrap();
    assert!(device.query(&event).unwrap());
    *caller.answer.lock().unwrap() = RS_IN_PROGRESS;
    assert!(!device.query(&event).unwrap());
    device.forget(event);
    let expected = ["alloc 1000", "free 512", "record on 5", "wait on 6 for 77", "query 77", "query 77", "destroy 77"];
    assert_eq!(caller.asked(), expected);
}

#[test]
fn released_once_it_is_owned() {
    let caller = Caller::new();
    drop(device(ops(&caller)).unwrap());
    assert!(caller.asked().is_empty());
    let owned = device(ops(&caller)).unwrap();
    owned.own();
    drop(owned);
    assert_eq!(caller.asked(), ["release"]);
    let owned = device(rs_device_t { release: None, ..ops(&caller) }).unwrap();
    owned.own();
    drop(owned);
    assert!(caller.asked().is_empty());
}

#[test]
fn a_missing_member_is_named() {
    let caller = Caller::new();
    type Remove = fn(&mut rs_device_t);
    let without: [(&str, Remove); 7] = [
        ("alloc", |o| o.alloc = None),
        ("free", |o| o.free = None),
        ("copy", |o| o.copy = None),
        ("event_record", |o| o.event_record = None),
        ("event_wait", |o| o.event_wait = None),
        ("event_query", |o| o.event_query = None),
        ("event_destroy", |o| o.event_destroy = None),
    ];
    for (name, remove) in without {
        let mut o = ops(&caller);
        remove(&mut o);
        assert_eq!(device(o).err().unwrap().text(), format!("rs_device_t.{name} is NULL; this function is required"));
    }
    for device_type in [RS_DEVICE_CPU, 0, -1] {
        let e = device(rs_device_t { device_type, ..ops(&caller) }).err().unwrap();
        assert!(e.text().starts_with(&format!("rs_device_t.device_type is {device_type}:")), "{e}");
    }
}

#[test]
fn failures_keep_the_callers_number() {
    let caller = Caller::new();
    let device = device(ops(&caller)).unwrap();
    let (mut a, mut b) = ([0u8; 4], [0u8; 4]);
    let shape = StridedCopy::new(1, 0, 0, [(4, 1, 1)]);
    let job = Job::new(mem(&mut a), mem(&mut b), &shape).unwrap();
    let event = Event(1);
    let calls: [(&str, &dyn Fn() -> Result<()>); 5] = [
        ("alloc of 8 bytes", &|| device.alloc(8).map(|_| ())),
        ("copy of 1 rows", &|| device.copy(&[job], 0)),
        ("event_record", &|| device.record(0).map(|_| ())),
        ("event_wait", &|| device.wait(0, &event)),
        ("event_query", &|| device.query(&event).map(|_| ())),
    ];
    for (name, call) in calls {
        for (answer, status, text) in [
            (RS_ERR_MEMORY, RS_ERR_MEMORY, "-45 (RS_ERR_MEMORY)"),
            (-700, RS_ERR_DEVICE, "-700 (unknown status)"),
            (2, RS_ERR_DEVICE, "2 (unknown status); it may answer RS_OK or a negative status"),
        ] {
            *caller.answer.lock().unwrap() = answer;
            let e = call().err().unwrap();
            assert_eq!((e.status(), e.text()), (status, &*format!("the caller's device 12:3: {name} answered {text}")));
        }
    }
    *caller.answer.lock().unwrap() = RS_OK;
    for bad in [0, 128] {
        *caller.alloc.lock().unwrap() = ptr::without_provenance_mut(bad);
        let e = device.alloc(8).err().unwrap();
        assert_eq!(e.status(), RS_ERR_DEVICE);
        assert!(e.text().contains("not aligned to 256 bytes"), "{e}");
    }
}

#[test]
fn copies_of_any_rank() {
    let caller = Caller::new();
    let device = device(ops(&caller)).unwrap();
    // A copy of `rank` axes of extent 2, the source's bits in reverse order; 12 axes are 4 walked ones, 16 rows of 8 axes.
    for (rank, rows) in [(0usize, 1), (1, 1), (8, 1), (9, 2), (12, 16)] {
        let n = 1usize << rank;
        let mut src: Vec<u8> = (0..n + 3).map(|i| (i * 7 % 251) as u8).collect();
        let mut dst = vec![0u8; n + 5];
        let axes = (0..rank).map(|i| CopyAxis { extent: 2, src: 1 << i, dst: 1 << (rank - 1 - i) }).collect();
        let shape = StridedCopy { src: 3, dst: 5, item: 1, run: 1, axes, convert: None };
        let job = Job::new(mem(&mut src), mem(&mut dst), &shape).unwrap();
        device.copy(&[job], 9).unwrap();
        assert_eq!(caller.asked(), [format!("copy {rows} on 9")]);
        for i in 0..n {
            let mirrored = (0..rank).filter(|b| i >> b & 1 == 1).map(|b| 1usize << (rank - 1 - b)).sum::<usize>();
            assert_eq!(dst[5 + mirrored], src[3 + i], "rank {rank}, byte {i}");
        }
    }
}

#[test]
fn many_rows_come_in_batches() {
    let caller = Caller::new();
    let device = device(ops(&caller)).unwrap();
    let (mut src, mut dst) = (vec![5u8; 2500], vec![0u8; 2500]);
    let shapes: Vec<StridedCopy> =
        (0..2500).map(|i| StridedCopy { src: i, dst: i, item: 1, run: 1, axes: smallvec![], convert: None }).collect();
    let (src, dst) = (mem(&mut src), mem(&mut dst));
    let jobs: Vec<Job<'_>> = shapes.iter().map(|s| Job::new(src, dst, s).unwrap()).collect();
    device.copy(&jobs, 0).unwrap();
    assert_eq!(caller.asked(), ["copy 1024 on 0", "copy 1024 on 0", "copy 452 on 0"]);
    device.copy(&[], 0).unwrap();
    assert!(caller.asked().is_empty(), "nothing to copy, nothing asked");
}

#[test]
fn a_row_says_what_becomes_of_its_elements() {
    let convert = Convert { from: Float::F32, to: Float::Bf16, add: -1 };
    let shape = StridedCopy::converting(4, Some(convert), 0, 0, [(3, 5, 4), (4, 1, 1)]);
    let (mut src, mut dst) = ([0u8; 100], [0u8; 100]);
    let job = Job::new(mem(&mut src), mem(&mut dst), &shape).unwrap();
    let mut rows = vec![];
    for_each_row(&job, |r| {
        rows.push(r);
        Ok(())
    })
    .unwrap();
    let [r] = rows[..] else { panic!("one row") };
    assert_eq!((r.run_bytes, r.rank, r.extent[0], r.src_stride[0], r.dst_stride[0]), (16, 1, 3, 20, 8));
    assert_eq!((r.src_dtype.code, r.src_dtype.bits, r.dst_dtype.code, r.dst_dtype.bits), (2, 32, 4, 16));
    assert_eq!(r.transform, RS_TRANSFORM_MINUS_ONE);
    let caller = Caller::new();
    assert!(!device(ops(&caller)).unwrap().converts());
    assert!(device(rs_device_t { flags: RS_DEVICE_CONVERTS, ..ops(&caller) }).unwrap().converts());
    for wrong in [rs_device_t { flags: 2, ..ops(&caller) }, rs_device_t { reserved: 1, ..ops(&caller) }] {
        let e = device(wrong).err().expect("refused");
        assert!(e.status() == RS_ERR_INVALID && e.text().contains("flags"), "{e}");
    }
}
