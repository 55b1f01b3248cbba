//! NULL, texts that go out, threads on one handle, what is released when.

use crate::hub::{self, Hub, honest};
use crate::tables::*;
use reshard::abi::*;
use reshard::ffi::api::*;
use std::ffi::{CStr, CString, c_char, c_void};
use std::ptr::{self, null, null_mut};
use std::sync::Mutex;
use std::sync::atomic::Ordering::Relaxed;

#[test]
fn null_everywhere() {
    let c = Container::new(&config(null_mut()), &Tables::default());
    let (config, layout) = (config(null_mut()), Tables::default().layout());
    let mut out = null_mut();
    let (mut comm, mut memory) = (null_mut(), null_mut());
    let mut param = sized::<rs_param_t>();
    let (mut len, mut buf) = (0usize, [0u8; 64]);
    let sync = rs_sync_t { version: 1, ..sized() };
    let local = rs_comm_local_t { world: 1, ..sized() };
    let hub = Hub::new(1);
    let ops = hub.ops(0, honest);
    // SAFETY: the structs are whole, and NULL is what is tested.
    unsafe {
        let invalid = |status, word: &str| fails(status, RS_ERR_INVALID, &[word, "NULL"]);
        invalid(rs_container_create(null(), &layout, &mut out), "config");
        invalid(rs_container_create(&config, null(), &mut out), "layout");
        invalid(rs_container_create(&config, &layout, null_mut()), "out");
        invalid(rs_container_connect(null_mut()), "container");
        invalid(rs_container_export(null(), buf.as_mut_ptr().cast(), 64, &mut len), "container");
        invalid(rs_container_import(null_mut(), buf.as_ptr().cast(), 64), "container");
        invalid(rs_container_import(c.0, null(), 64), "blob");
        invalid(rs_container_rebind(null_mut(), &layout, null()), "container");
        invalid(rs_container_rebind(c.0, null(), null()), "layout");
        invalid(rs_container_set_comm(null_mut(), null_mut()), "comm");
        invalid(rs_container_set_comm(c.0, null_mut()), "comm");
        invalid(rs_sync_weights(null_mut(), &sync), "container");
        invalid(rs_sync_weights(c.0, null()), "sync");
        invalid(rs_container_poll(null()), "container");
        invalid(rs_container_abort(null()), "container");
        invalid(rs_get_param(null(), c"w".as_ptr(), &mut param), "container");
        invalid(rs_get_param(c.0, null(), &mut param), "name");
        invalid(rs_get_param(c.0, c"w".as_ptr(), null_mut()), "out");
        invalid(rs_get_param_at(null(), 0, &mut param), "container");
        invalid(rs_get_param_at(c.0, 0, null_mut()), "out");
        let text = buf.as_mut_ptr().cast::<c_char>();
        invalid(rs_container_describe(null(), RS_DESCRIBE_STATS, null(), text, 64, &mut len), "container");
        invalid(rs_container_describe(c.0, RS_DESCRIBE_STATS, null(), null_mut(), 64, &mut len), "buf");
        invalid(rs_container_describe(c.0, RS_DESCRIBE_STATS, null(), text, 64, null_mut()), "len");
        let mut number = [0; 16];
        invalid(rs_fingerprint(null_mut(), RS_SOURCE, null(), number.as_mut_ptr()), "container");
        invalid(rs_fingerprint(c.0, RS_SOURCE, null(), null_mut()), "out");
        fails(rs_fingerprint(c.0, RS_SOURCE, c"\xff".as_ptr(), number.as_mut_ptr()), RS_ERR_INVALID, &["tensor", "UTF-8"]);
        invalid(rs_comm_local(null(), &mut comm), "local");
        invalid(rs_comm_local(&local, &mut comm), "local.name");
        invalid(rs_comm_local(&local, null_mut()), "out");
        invalid(rs_comm_loopback(0, 0, 1, null_mut()), "out");
        invalid(rs_comm_custom(null(), &mut comm), "ops");
        invalid(rs_comm_custom(&ops, null_mut()), "out");
        invalid(rs_comm_custom(&rs_comm_ops_t { world_size: 1, ..sized() }, &mut comm), "rs_comm_ops_t.allgather");
        invalid(rs_comm_nixl(null(), 0, 1, &mut comm), "config_json");
        invalid(rs_comm_nixl(c"{}".as_ptr(), 0, 1, null_mut()), "out");
        invalid(rs_comm_composite(null(), null(), null_mut()), "out");
        invalid(rs_comm_composite(null(), null(), &mut comm), "near");
        invalid(rs_mem_alloc(64, 0, null_mut()), "out");
        rs_container_destroy(null_mut());
        rs_comm_destroy(null_mut());
        rs_mem_free(null_mut());

        invalid(rs_comm_from_nccl(null_mut(), null_mut()), "out");
        invalid(rs_comm_from_nccl(null_mut(), &mut comm), "nccl_comm");
        let id = [0u8; 128];
        invalid(rs_comm_nccl_init(null(), 128, 0, 1, &mut comm), "unique_id");
        fails(rs_comm_nccl_init(id.as_ptr().cast(), 5, 0, 1, &mut comm), RS_ERR_INVALID, &["id_len is 5"]);
        fails(rs_comm_nccl_init(id.as_ptr().cast(), 128, 1, 1, &mut comm), RS_ERR_INVALID, &["rank 1"]);
        invalid(rs_container_rebind(c.0, &layout, ptr::without_provenance(8)), "neither is NULL");
        invalid(rs_container_rebind(c.0, null(), null()), "both are NULL");

        fails(rs_mem_alloc(64, 2, &mut memory), RS_ERR_INVALID, &["flags is 2"]);
        fails(rs_mem_alloc(0, 0, &mut memory), RS_ERR_INVALID, &["bytes is 0"]);
        for flags in [3, 4, 1 << 31] {
            let local = rs_comm_local_t { name: c"x".as_ptr(), flags, ..local };
            fails(rs_comm_local(&local, &mut comm), RS_ERR_INVALID, &["local.flags", &format!("{flags:#x}")]);
        }
        for (rank, world) in [(0, 0), (-1, 1), (1, 1), (0, -1)] {
            let local = rs_comm_local_t { name: c"x".as_ptr(), rank, world, ..local };
            fails(rs_comm_local(&local, &mut comm), RS_ERR_INVALID, &[&format!("rank {rank} of a world of {world}")]);
        }
        for (rank, world) in [(0, 0), (-1, 1), (1, 1), (0, -1)] {
            fails(rs_comm_loopback(0, rank, world, &mut comm), RS_ERR_INVALID, &[&format!("rank {rank} of a world of {world}")]);
        }
        assert!(out.is_null() && comm.is_null() && memory.is_null() && len == 0, "nothing is written on failure");
        // No rank ever took this seat.
        ops.release.unwrap()(ops.ctx);
    }
}

#[test]
fn the_last_error_is_the_threads_own() {
    // SAFETY: NULL is refused.
    let poll = || unsafe { rs_container_poll(null()) };
    assert_eq!(last(), "");
    assert_eq!(poll(), RS_ERR_INVALID);
    assert_eq!(last(), "container is NULL");
    std::thread::spawn(|| assert_eq!(last(), "")).join().unwrap();
    let c = Container::new(&config(null_mut()), &Tables::default());
    assert_eq!(last(), "container is NULL", "a call that succeeds leaves it");
    // SAFETY: a live handle.
    ok(unsafe { rs_container_poll(c.0) });
}

#[test]
fn names_and_versions() {
    // SAFETY: static texts.
    let name = |status| unsafe { CStr::from_ptr(rs_status_name(status)) }.to_str().unwrap();
    let abi = std::fs::read_to_string(concat!(env!("CARGO_MANIFEST_DIR"), "/src/abi.rs")).unwrap();
    let mut n = 0;
    for line in abi.lines().filter(|l| l.contains(": rs_status_t = ")) {
        let (id, value) = line.strip_prefix("pub const ").unwrap().split_once(": rs_status_t = ").unwrap();
        assert_eq!(name(value.trim_end_matches(';').parse().unwrap()), id);
        n += 1;
    }
    assert_eq!(n, 22);
    for unknown in [2, -10, -19, -39, -48, i32::MIN, i32::MAX] {
        assert_eq!(name(unknown), "unknown status");
    }
    let parts: Vec<u32> = env!("CARGO_PKG_VERSION").split('.').map(|p| p.parse().unwrap()).collect();
    assert_eq!(rs_version(), parts[0] * 65536 + parts[1] * 256 + parts[2]);
}

#[test]
fn texts_and_their_length() {
    let c = Container::new(&config(null_mut()), &Tables::default());
    let (mut len, mut buf) = (0usize, vec![7u8; 4096]);
    // SAFETY: a live handle; `cap` is at most the buffer.
    let mut describe = |what, param: Option<&CStr>, cap, len: &mut usize| unsafe {
        let text = buf.as_mut_ptr().cast();
        let status = rs_container_describe(c.0, what, param.map_or(null(), CStr::as_ptr), text, cap, len);
        (status, buf.iter().take_while(|&&b| b != 7).copied().collect::<Vec<u8>>())
    };
    let (status, text) = describe(RS_DESCRIBE_LAYOUT, None, 0, &mut len);
    fails(status, RS_ERR_TOO_SMALL, &["cap is 0", &format!("{len} bytes")]);
    assert!(text.is_empty());
    let needed = len;
    let (status, text) = describe(RS_DESCRIBE_LAYOUT, None, needed - 1, &mut len);
    assert_eq!((status, len, text), (RS_ERR_TOO_SMALL, needed, vec![]), "not a byte of a text that does not fit");
    let (status, text) = describe(RS_DESCRIBE_LAYOUT, None, needed, &mut len);
    ok(status);
    assert_eq!((len, text.len(), text.last()), (needed, needed, Some(&0)), "the final NUL counts");
    let text = CString::from_vec_with_nul(text).unwrap().into_string().unwrap();
    assert_eq!(text, r#"{"buffers":[],"tensors":[],"tiles":[]}"#);

    for what in [0, 4, u32::MAX] {
        fails(describe(what, None, 0, &mut len).0, RS_ERR_INVALID, &[&format!("what is {what}")]);
    }
    fails(describe(RS_DESCRIBE_PLAN, None, 0, &mut len).0, RS_ERR_STATE, &["rs_container_connect"]);
    fails(describe(RS_DESCRIBE_STATS, Some(c"w"), 0, &mut len).0, RS_ERR_INVALID, &["param"]);
    fails(describe(RS_DESCRIBE_STATS, Some(c"\xff"), 0, &mut len).0, RS_ERR_INVALID, &["param", "UTF-8"]);
}

#[test]
fn parameters() {
    let (mut a, mut b) = (vec![0f32; 6], vec![0f32; 6]);
    let mut t = Tables::default();
    t.tensor("model.w", &[2, 3]);
    for (name, memory, role) in [("w", &mut a, RS_SOURCE), ("w", &mut b, RS_TARGET)] {
        let row = t.buffer(name, memory, role, &[2, 3]);
        t.tile(0, row, &[0, 0], &[2, 3], &[3, 1]);
    }
    let c = Container::new(&config(null_mut()), &t);
    let mut p = sized::<rs_param_t>();
    ok(c.param(c"w", &mut p));
    // SAFETY: borrowed from the container.
    unsafe {
        assert_eq!(CStr::from_ptr(p.name), c"w");
        assert_eq!(std::slice::from_raw_parts(p.shape, p.ndim as usize), [2, 3]);
        assert_eq!(std::slice::from_raw_parts(p.strides, p.ndim as usize), [3, 1]);
    }
    assert_eq!((p.data, p.size_bytes, p.role), (b.as_mut_ptr().cast(), 24, RS_TARGET), "the target of that name");
    assert_eq!((p.dtype, p.device_type, p.device_id), (F32, RS_DEVICE_CPU, 0));
    assert_eq!((p.state, p.version, p.struct_size), (RS_PARAM_INITIAL, 0, size_of::<rs_param_t>()));
    // SAFETY: a live handle; `p` is as long as it says.
    unsafe {
        ok(rs_get_param_at(c.0, 0, &mut p));
        assert_eq!((p.data, p.role), (a.as_mut_ptr().cast(), RS_SOURCE));
        ok(rs_get_param_at(c.0, 1, &mut p));
        fails(rs_get_param_at(c.0, 2, &mut p), RS_ERR_NOT_FOUND, &["parameter 2"]);
        fails(rs_get_param_at(c.0, usize::MAX, &mut p), RS_ERR_NOT_FOUND, &[]);
        fails(c.param(c"v", &mut p), RS_ERR_NOT_FOUND, &["'v'"]);
        assert_eq!(p.data, b.as_mut_ptr().cast(), "nothing is written on failure");

        // Room for the name only, and nothing is touched beyond it; then more room than the library needs.
        let mut short = rs_param_t { struct_size: 16, version: 99, ..sized() };
        ok(rs_get_param_at(c.0, 1, &mut short));
        assert_eq!((CStr::from_ptr(short.name), short.data, short.version), (c"w", null_mut(), 99));
        let mut long = [u64::MAX; 16];
        long[0] = 120;
        ok(rs_get_param_at(c.0, 1, long.as_mut_ptr().cast()));
        assert_eq!((long[0], &long[11..]), (120, &[0, 0, 0, 0, u64::MAX][..]));
        short.struct_size = 0;
        fails(rs_get_param_at(c.0, 1, &mut short), RS_ERR_INVALID, &["out.struct_size is 0"]);
    }

    let third = t.buffer("w", &mut [], RS_TARGET, &[2, 3]);
    let mut more = vec![0f32; 6];
    (t.buffers[third as usize].data, t.buffers[third as usize].size_bytes) = (more.as_mut_ptr().cast(), 24);
    t.tile(0, third, &[0, 0], &[2, 3], &[3, 1]);
    let c = Container::new(&config(null_mut()), &t);
    fails(c.param(c"w", &mut p), RS_ERR_AMBIGUOUS, &["'w'", "rs_get_param_at"]);
}

#[test]
fn requests() {
    let comm = loopback(hub(), 0, 1);
    let c = Container::new(&config(comm), &Tables::default());
    fails(c.sync(1), RS_ERR_STATE, &["rs_container_connect"]);
    ok(c.connect());
    let with = |change: &dyn Fn(&mut rs_sync_t)| {
        let mut s = rs_sync_t { version: 1, ..sized() };
        change(&mut s);
        c.sync_as(&s)
    };
    fails(with(&|s| s.version = 0), RS_ERR_INVALID, &["version is 0"]);
    fails(with(&|s| s.flags = 2), RS_ERR_INVALID, &["sync.flags", "0x2"]);
    ok(with(&|s| s.flags = RS_SYNC_VERIFY));
    fails(with(&|s| s.only_count = 1), RS_ERR_INVALID, &["sync.only is NULL", "count is 1"]);
    let texts = [c"a".as_ptr(), null(), c"\xff".as_ptr()];
    fails(with(&|s| (s.only, s.only_count) = (texts.as_ptr(), 2)), RS_ERR_INVALID, &["sync.only[1] is NULL"]);
    fails(with(&|s| (s.only, s.only_count) = (texts[2..].as_ptr(), 1)), RS_ERR_INVALID, &["sync.only[0]", "UTF-8"]);
    fails(with(&|s| (s.only, s.only_count) = (texts.as_ptr(), usize::MAX)), RS_ERR_INVALID, &["sync.only", "more than memory"]);
    fails(with(&|s| (s.only, s.only_count) = (texts.as_ptr(), 1)), RS_ERR_NOT_FOUND, &["only[0]", "'a'"]);
    ok(with(&|s| (s.only, s.only_count) = (texts.as_ptr(), 0)));
    ok(with(&|s| s.stream = ptr::without_provenance_mut(64)));
    // SAFETY: a live handle; the communicator is not used any more.
    unsafe {
        ok(rs_container_poll(c.0));
        rs_comm_destroy(comm);
    }
}

#[test]
fn two_threads_on_one_handle() {
    let hub = Hub::new(2);
    let comm = hub::comm(&hub, 0, honest);
    let label = rs_config_t { name: c"left".as_ptr(), ..config(comm) };
    let c = Container::new(&label, &Tables::default());
    std::thread::scope(|s| {
        let first = s.spawn(|| {
            let status = c.connect();
            (status, last())
        });
        // The first one waits for a rank that never comes.
        hub.wait_for(0, 0);
        let (mut param, mut len, mut buf) = (sized::<rs_param_t>(), 0, [0u8; 16]);
        let layout = Tables::default().layout();
        // SAFETY: a live handle and whole structs.
        unsafe {
            let busy = |status| fails(status, RS_ERR_BUSY, &["left: ", "another thread"]);
            busy(c.connect());
            busy(c.sync(1));
            busy(rs_container_rebind(c.0, &layout, null()));
            busy(rs_container_set_comm(c.0, comm));
            busy(rs_container_import(c.0, buf.as_ptr().cast(), 8));
            busy(rs_container_export(c.0, buf.as_mut_ptr().cast(), 8, &mut len));
            busy(rs_get_param(c.0, c"w".as_ptr(), &mut param));
            busy(rs_get_param_at(c.0, 0, &mut param));
            busy(rs_fingerprint(c.0, RS_SOURCE, null(), buf.as_mut_ptr().cast()));
            busy(rs_container_describe(c.0, RS_DESCRIBE_STATS, null(), buf.as_mut_ptr().cast(), 8, &mut len));
            // These two never wait.
            assert_eq!(rs_container_poll(c.0), RS_IN_PROGRESS);
            ok(rs_container_abort(c.0));
        }
        let (status, text) = first.join().unwrap();
        assert_eq!(status, RS_ERR_ABORTED, "{text}");
        assert!(text.contains("rs_container_abort"), "{text}");
    });
    fails(c.connect(), RS_ERR_ABORTED, &["rs_container_abort"]);
    assert_eq!(hub.aborted.load(Relaxed), 1, "the caller hears of it once");

    // The handle's reference goes; the container holds its own until it ends.
    // SAFETY: not used any more.
    unsafe { rs_comm_destroy(comm) };
    assert_eq!(hub.released.load(Relaxed), 0);
    drop(c);
    assert_eq!(hub.released.load(Relaxed), 1);
}

#[test]
fn another_communicator_gives_the_first_back() {
    let (first, second) = (Hub::new(1), Hub::new(1));
    let comm = hub::comm(&first, 0, honest);
    let c = Container::new(&config(comm), &Tables::default());
    let next = hub::comm(&second, 0, honest);
    // SAFETY: live handles, each destroyed once.
    unsafe {
        rs_comm_destroy(comm);
        ok(rs_container_set_comm(c.0, next));
        assert_eq!((first.released.load(Relaxed), second.released.load(Relaxed)), (1, 0));
        rs_comm_destroy(next);
    }
    ok(c.connect());
    ok(c.sync(1));
    drop(c);
    assert_eq!(second.released.load(Relaxed), 1);
}

type Lines = Mutex<Vec<(u32, String, String)>>;

unsafe extern "C" fn keep(user: *mut c_void, level: u32, label: *const c_char, text: *const c_char) {
    // SAFETY: `user` is the test's list; the strings are valid during the call.
    let (lines, label, text) = unsafe { (&*user.cast::<Lines>(), CStr::from_ptr(label), CStr::from_ptr(text)) };
    let owned = |s: &CStr| s.to_str().unwrap().to_string();
    lines.lock().unwrap().push((level, owned(label), owned(text)));
}

#[test]
fn log_lines_reach_the_caller() {
    let lines: Lines = Mutex::new(vec![]);
    let user = (&raw const lines).cast_mut().cast();
    let comm = loopback(hub(), 0, 1);
    let c = Container::new(&rs_config_t { name: c"the logged one".as_ptr(), ..config(comm) }, &Tables::default());
    // SAFETY: the list outlives its use: the function is taken away below.
    unsafe {
        fails(rs_set_log(Some(keep), user, 6), RS_ERR_INVALID, &["max_level is 6"]);
        ok(rs_set_log(Some(keep), user, RS_LOG_INFO));
        ok(c.connect());
        ok(rs_set_log(None, null_mut(), RS_LOG_TRACE));
        ok(c.connect());
        rs_comm_destroy(comm);
    }
    // Other tests' containers have no such label.
    let mine: Vec<_> = lines.into_inner().unwrap().into_iter().filter(|l| l.1 == "the logged one").collect();
    assert_eq!(mine.len(), 1, "{mine:?}");
    assert_eq!(mine[0].0, RS_LOG_INFO);
    assert!(mine[0].2.starts_with("rank 0 of 1 connected over loopback"), "{mine:?}");
}
