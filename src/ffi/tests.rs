use super::handle::{CommHandle, Handle, Shared};
use super::read;
use super::write::{self, GrowingOut};
use super::*;
use std::ffi::CStr;
use std::mem::{offset_of, size_of};
use std::ptr;

fn last() -> String {
    // SAFETY: this thread's text, NUL-terminated.
    unsafe { CStr::from_ptr(last_error::text()) }.to_str().expect("UTF-8").to_string()
}

fn fail(text: impl Into<String>) -> rs_status_t {
    let error = Error::new(RS_ERR_STATE, text);
    call(|| -> Result<()> { Err(error) })
}

#[test]
fn a_call_answers_what_its_body_says() {
    assert_eq!(call(|| Ok(())), RS_OK);
    assert_eq!(call(|| Ok(true)), RS_OK);
    assert_eq!(call(|| Ok(false)), RS_IN_PROGRESS);
    assert_eq!(fail("not now"), RS_ERR_STATE);
    assert_eq!(last(), "not now");
    assert_eq!(call(|| Ok(())), RS_OK);
    assert_eq!(last(), "not now", "a call that succeeds leaves the text");
}

#[test]
fn a_panic_becomes_a_status() {
    assert_eq!(call(|| -> Result<()> { panic!("lost {} of {}", 3, 4) }), RS_ERR_INTERNAL);
    assert!(last().contains("lost 3 of 4"), "{}", last());
    assert_eq!(call(|| -> Result<()> { panic!("plain") }), RS_ERR_INTERNAL);
    assert!(last().ends_with("panic: plain"), "{}", last());
    assert_eq!(call(|| -> Result<()> { std::panic::panic_any(7) }), RS_ERR_INTERNAL);
    assert!(last().ends_with("panic: no text"), "{}", last());
}

#[test]
fn the_text_is_the_threads_own_and_fits() {
    fail("of this thread");
    std::thread::spawn(|| {
        assert_eq!(last(), "");
        fail("of the other");
        assert_eq!(last(), "of the other");
    })
    .join()
    .unwrap();
    assert_eq!(last(), "of this thread");

    fail("x".repeat(2047));
    assert_eq!(last(), "x".repeat(2047));
    // 2,048 bytes do not fit; the cut falls inside a two-byte character and moves to its start.
    fail(format!("{}{}", "x".repeat(2042), "é".repeat(3)));
    assert_eq!(last(), format!("{} ...", "x".repeat(2042)));
    fail(format!("x{}", "é".repeat(2000)));
    assert_eq!(last(), format!("x{} ...", "é".repeat(1021)));
}

/// A config in memory of `size` bytes, 0xff behind the first `used` of them.
fn config_bytes(size: usize, used: usize) -> Vec<u8> {
    let mut bytes = vec![0u8; size];
    bytes[..8].copy_from_slice(&size.to_ne_bytes());
    if size >= 12 {
        bytes[8..12].copy_from_slice(&RS_ABI.to_ne_bytes());
    }
    bytes[used.min(size)..].fill(0xff);
    bytes
}

fn read_config(bytes: &[u8]) -> Result<rs_config_t> {
    // SAFETY: the bytes are as many as the struct states, or it states a size that is refused.
    unsafe { read::sized(bytes.as_ptr().cast(), "config") }
}

#[test]
fn structs_of_every_size() {
    let whole = size_of::<rs_config_t>();
    for size in (8..=whole + 64).step_by(8) {
        let config = read_config(&config_bytes(size, size)).unwrap();
        assert_eq!((config.struct_size, config.abi), (size, if size > 8 { RS_ABI } else { 0 }), "what is missing is zero");
    }
    for byte in [whole, whole + 1, whole + 63] {
        let mut bytes = config_bytes(whole + 64, whole + 64);
        bytes[byte] = 1;
        let e = read_config(&bytes).err().unwrap();
        assert_eq!(e.status(), RS_ERR_UNKNOWN_FIELD);
        assert!(e.text().starts_with(&format!("config: byte {byte} of rs_config_t is 1;")), "{e}");
    }
    for size in [0usize, 1, 7, 12, whole + 4, 4104, usize::MAX] {
        let mut bytes = config_bytes(whole, whole);
        bytes[..8].copy_from_slice(&size.to_ne_bytes());
        let e = read_config(&bytes).err().unwrap();
        assert_eq!(e.status(), RS_ERR_INVALID);
        let expected = format!("config.struct_size is {size}, it must be sizeof(rs_config_t), {whole} in this library");
        assert_eq!(e.text(), expected);
    }
    // SAFETY: NULL is allowed.
    let e = unsafe { read::sized::<rs_sync_t>(ptr::null(), "sync") }.err().unwrap();
    assert_eq!(e.text(), "sync is NULL, it must point to a rs_sync_t");
}

#[test]
fn structs_need_no_alignment() {
    let mut bytes = vec![0u8];
    bytes.extend(config_bytes(size_of::<rs_config_t>(), size_of::<rs_config_t>()));
    assert_eq!(read_config(&bytes[1..]).unwrap().abi, RS_ABI);
}

fn tensor(rank: u32) -> rs_tensor_t {
    rs_tensor_t { name: ptr::null(), rank, reserved: 0, shape: [0; RS_MAX_RANK] }
}

#[test]
fn tables_of_other_row_sizes() {
    let row = size_of::<rs_tensor_t>();
    // SAFETY: the table holds `count` rows of `size` bytes, or what it states is refused before it is read.
    let read = |rows: *const rs_tensor_t, count, size| unsafe { read::table(rows, count, size, "rows") };
    let rows = [tensor(1), tensor(2), tensor(3)];
    let ranks = |t: Vec<rs_tensor_t>| t.iter().map(|r| r.rank).collect::<Vec<_>>();
    assert_eq!(ranks(read(rows.as_ptr(), 3, row).unwrap()), [1, 2, 3]);
    assert!(read(ptr::null(), 0, 0).unwrap().is_empty());

    // Rows as an older caller would have them: the name alone.
    let names = [ptr::null::<u8>(); 3];
    assert_eq!(ranks(read(names.as_ptr().cast(), 3, 8).unwrap()), [0, 0, 0]);

    // Rows of a newer caller: one more field.
    let mut long = vec![0u8; 3 * (row + 8)];
    for i in 0..3 {
        long[i * (row + 8) + offset_of!(rs_tensor_t, rank)] = i as u8 + 1;
    }
    assert_eq!(ranks(read(long.as_ptr().cast(), 3, row + 8).unwrap()), [1, 2, 3]);
    long[2 * (row + 8) + row + 5] = 9;
    let e = read(long.as_ptr().cast(), 3, row + 8).err().unwrap();
    assert_eq!(e.status(), RS_ERR_UNKNOWN_FIELD);
    assert!(e.text().starts_with(&format!("rows[2]: byte {} of rs_tensor_t is 9;", row + 5)), "{e}");

    for (count, size) in [(3, 0), (3, row - 4), (usize::MAX / row + 1, row), (isize::MAX as usize / row + 1, row)] {
        let e = read(rows.as_ptr(), count, size).err().unwrap();
        assert_eq!(e.status(), RS_ERR_INVALID, "{e}");
        assert!(e.text().contains("rows"), "{e}");
    }
    assert_eq!(read(ptr::null(), 3, row).err().unwrap().text(), "rows is NULL, but its count is 3");
}

#[test]
fn lists_and_strings() {
    let numbers = [1u32, 2, 3];
    // SAFETY: the list or string is there, or what is stated is refused before it is read.
    unsafe {
        assert_eq!(read::list(numbers.as_ptr(), 3, "list").unwrap(), [1, 2, 3]);
        assert_eq!(read::list::<u32>(ptr::null(), 0, "list").unwrap(), [0; 0]);
        assert_eq!(read::list::<u32>(ptr::null(), 1, "list").err().unwrap().text(), "list is NULL, but its count is 1");
        let odd = numbers.as_ptr().wrapping_byte_add(1);
        assert!(read::list(odd, 1, "list").err().unwrap().text().contains("not aligned to 4 bytes"));
        assert!(read::list(numbers.as_ptr(), usize::MAX / 2, "list").err().unwrap().text().contains("more than memory can hold"));

        assert_eq!(read::text(c"q é".as_ptr(), "name").unwrap(), "q é");
        assert_eq!(read::text(ptr::null(), "name").err().unwrap().text(), "name is NULL, it must be a string");
        let e = read::text(c"ab\xffc".as_ptr(), "name").err().unwrap();
        assert_eq!((e.status(), e.text()), (RS_ERR_INVALID, "name ('ab\u{fffd}c') is not UTF-8 from byte 2 on"));
        assert_eq!(read::optional_text(ptr::null(), "name").unwrap(), None);
    }
    assert_eq!(read::flags(3, 3, "flags"), Ok(()));
    assert_eq!(read::flags(7, 3, "flags").err().unwrap().text(), "flags is 0x7, of which this library does not know 0x4");
    assert_eq!(read::reserved(2, "reserved").err().unwrap().text(), "reserved is 2, it must be 0");
}

#[test]
fn texts_go_out_whole_or_not_at_all() {
    let mut buf = [9u8; 6];
    let mut len = 77;
    // SAFETY: `buf` has 6 bytes, `cap` is at most that.
    let put = |buf: *mut u8, cap, len: *mut usize| unsafe { write::bytes(b"abcd", buf, cap, len) };
    let e = put(buf.as_mut_ptr(), 3, &mut len).err().unwrap();
    assert_eq!((e.status(), len, buf), (RS_ERR_TOO_SMALL, 4, [9; 6]));
    assert_eq!(e.text(), "cap is 3, 4 bytes are needed");
    len = 77;
    assert_eq!((put(ptr::null_mut(), 0, &mut len).err().unwrap().status(), len), (RS_ERR_TOO_SMALL, 4));
    len = 77;
    assert_eq!((put(ptr::null_mut(), 4, &mut len).err().unwrap().status(), len), (RS_ERR_INVALID, 77));
    assert_eq!(put(buf.as_mut_ptr(), 6, ptr::null_mut()).err().unwrap().status(), RS_ERR_INVALID);
    assert_eq!(put(buf.as_mut_ptr(), 4, &mut len), Ok(()));
    assert_eq!((len, &buf), (4, b"abcd\x09\x09"));
}

fn param(version: u64) -> rs_param_t {
    rs_param_t {
        struct_size: 0,
        name: ptr::null(),
        data: ptr::null_mut(),
        size_bytes: 5,
        device_type: 1,
        device_id: 0,
        dtype: rs_dtype_t { code: 2, bits: 32, lanes: 1 },
        ndim: 0,
        shape: ptr::null(),
        strides: ptr::null(),
        role: 0,
        model_chunk: 0,
        state: 0,
        reserved: 0,
        version,
    }
}

#[test]
fn a_result_fills_what_the_caller_has() {
    let whole = size_of::<rs_param_t>();
    for size in (8..whole + 32).step_by(8) {
        let mut bytes = vec![0xaau8; whole + 40];
        bytes[..8].copy_from_slice(&size.to_ne_bytes());
        // SAFETY: there are more bytes than the struct states.
        unsafe { GrowingOut::new(bytes.as_mut_ptr().cast(), "out") }.unwrap().put(param(0x0101_0101_0101_0101));
        assert_eq!(bytes[..8], size.to_ne_bytes());
        assert!(bytes[size..].iter().all(|&b| b == 0xaa), "nothing beyond struct_size {size}");
        let at = offset_of!(rs_param_t, version);
        if size > at {
            assert_eq!(bytes[at..at + 8], [1; 8]);
        }
        assert!(size <= whole || bytes[whole..size].iter().all(|&b| b == 0), "zeros where the library has nothing");
    }
}

fn config() -> rs_config_t {
    rs_config_t {
        struct_size: size_of::<rs_config_t>(),
        abi: RS_ABI,
        flags: 0,
        comm: ptr::null_mut(),
        device: ptr::null(),
        preset: ptr::null(),
        host_id: 0,
        staging_bytes: 0,
        host_threads: 0,
        timeout_ms: 0,
        name: c"left".as_ptr(),
        staging: ptr::null_mut(),
    }
}

fn empty_layout() -> rs_layout_t {
    // SAFETY: all its fields are integers and pointers.
    let zeros = unsafe { std::mem::zeroed() };
    rs_layout_t { struct_size: size_of::<rs_layout_t>(), ..zeros }
}

/// A container without weights, labelled "left".
struct Owned(*mut rs_container_t);

impl Owned {
    fn new() -> Owned {
        // SAFETY: both structs are whole.
        Owned(unsafe { Handle::create(&config(), &empty_layout()) }.unwrap())
    }

    fn handle(&self) -> &Shared {
        // SAFETY: it lives as long as `self`.
        unsafe { Handle::of(self.0) }.unwrap()
    }
}

impl Drop for Owned {
    fn drop(&mut self) {
        // SAFETY: created by `new`, destroyed here.
        unsafe { Handle::destroy(self.0) }.unwrap();
    }
}

#[test]
fn one_changes_or_many_read() {
    let owned = Owned::new();
    let h = owned.handle();
    let busy = |r: Result<()>| {
        let e = r.err().unwrap();
        assert_eq!(e.status(), RS_ERR_BUSY, "{e}");
    };
    // A lock does not ask which thread holds it.
    h.read(|_| {
        h.read(|_| Ok(())).unwrap();
        busy(h.write(|_| Ok(())));
        Ok(())
    })
    .unwrap();
    h.write(|_| {
        busy(h.read(|_| Ok(())));
        busy(h.write(|_| Ok(())));
        Ok(())
    })
    .unwrap();
    h.write(|_| Ok(())).unwrap();
}

#[test]
fn errors_bear_the_label() {
    let owned = Owned::new();
    let error = || Error::new(RS_ERR_LAYOUT, "wrong");
    assert_eq!(owned.handle().read(|_| -> Result<()> { Err(error()) }).err().unwrap().text(), "left: wrong");
    assert_eq!(owned.handle().write(|_| -> Result<()> { Err(error()) }).err().unwrap().text(), "left: wrong");
}

#[test]
fn a_panic_inside_ends_the_container() {
    let owned = Owned::new();
    let h = owned.handle();
    let comm = crate::comm::loopback::join(0xffee, 0, 2).unwrap();
    h.write(|c| c.container.set_comm(comm.clone())).unwrap();
    assert_eq!(call(|| h.write(|_| -> Result<()> { panic!("forced") })), RS_ERR_INTERNAL);
    assert!(last().contains("forced"), "{}", last());
    assert_eq!(comm.check().err().unwrap().status(), RS_ERR_ABORTED, "so that no rank waits for it");
    let later: [&dyn Fn() -> rs_status_t; 3] =
        [&|| call(|| h.write(|_| Ok(()))), &|| call(|| h.read(|_| Ok(()))), &|| call(|| h.status())];
    for later in later {
        assert_eq!(later(), RS_ERR_INTERNAL);
        assert_eq!(last(), "left: an earlier call on this container panicked; destroy it and make another one");
    }
}

#[test]
fn a_panic_while_reading_ends_nothing() {
    let owned = Owned::new();
    let h = owned.handle();
    assert_eq!(call(|| h.read(|_| -> Result<()> { panic!("forced") })), RS_ERR_INTERNAL);
    assert_eq!(call(|| h.write(|_| Ok(()))), RS_OK);
}

#[test]
fn null_handles() {
    // SAFETY: NULL is allowed.
    unsafe {
        assert_eq!(Handle::of(ptr::null()).err().unwrap().text(), "container is NULL");
        assert_eq!(CommHandle::share(ptr::null()).err().unwrap().text(), "comm is NULL");
        assert_eq!((Handle::destroy(ptr::null_mut()), CommHandle::destroy(ptr::null_mut())), (Ok(()), Ok(())));
    }
}

mod log_lines {
    use super::*;
    use std::ffi::{c_char, c_void};
    use std::sync::Mutex;

    type Lines = Mutex<Vec<(u32, String, String)>>;

    unsafe extern "C" fn keep(user: *mut c_void, level: u32, label: *const c_char, text: *const c_char) {
        // SAFETY: `user` is the test's list; the strings live during the call.
        let (lines, label, text) = unsafe { (&*user.cast::<Lines>(), CStr::from_ptr(label), CStr::from_ptr(text)) };
        let line = (level, label.to_str().unwrap().to_string(), text.to_str().unwrap().to_string());
        // Other tests log too.
        if line.2.contains("test line") {
            lines.lock().unwrap().push(line);
        }
        log::error!("test line from inside the function: not seen");
        assert_eq!(call(|| logger::set(None, ptr::null_mut(), 0)), RS_ERR_BUSY);
    }

    #[test]
    fn reach_the_function() {
        let lines: Lines = Mutex::new(vec![]);
        let user = (&raw const lines).cast_mut().cast::<c_void>();
        logger::set(Some(keep), user, RS_LOG_INFO).unwrap();
        let owned = Owned::new();
        log::info!(target: "module", "test line {}", 1);
        let say = |_: &_| {
            log::warn!("test line 2");
            Ok(())
        };
        owned.handle().read(say).unwrap();
        log::debug!("test line 3: beyond the level");
        log::error!(target: "module", "test line 4");
        assert_eq!(logger::set(Some(keep), user, 6).err().unwrap().status(), RS_ERR_INVALID);
        logger::set(None, user, RS_LOG_TRACE).unwrap();
        log::error!("test line 5: nobody listens");
        logger::set(Some(keep), user, RS_LOG_OFF).unwrap();
        log::error!("test line 6: at no level");
        logger::set(None, ptr::null_mut(), RS_LOG_OFF).unwrap();
        let expected =
            [(RS_LOG_INFO, "module", "test line 1"), (RS_LOG_WARN, "left", "test line 2"), (RS_LOG_ERROR, "module", "test line 4")];
        let got = lines.into_inner().unwrap();
        let got: Vec<_> = got.iter().map(|l| (l.0, l.1.as_str(), l.2.as_str())).collect();
        assert_eq!(got, expected);
    }
}
