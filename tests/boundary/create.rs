//! What one rank can have wrong by itself.

use crate::hub::{Hub, honest};
use crate::tables::*;
use reshard::abi::*;
use reshard::ffi::api::*;
use std::ptr;
use std::sync::atomic::Ordering::Relaxed;

/// A 4 x 6 tensor of which this rank's only buffer, a target, holds everything.
struct Whole {
    memory: Vec<f32>,
    tables: Tables,
}

fn whole() -> Whole {
    let mut memory = vec![0f32; 24];
    let mut tables = Tables::default();
    let t = tables.tensor("model.w", &[4, 6]);
    let b = tables.buffer("w", &mut memory, RS_TARGET, &[4, 6]);
    tables.tile(t, b, &[0, 0], &[4, 6], &[6, 1]);
    Whole { memory, tables }
}

fn create(tables: &Tables) -> rs_status_t {
    create_from(&config(ptr::null_mut()), &tables.layout())
}

/// Creates and destroys; nothing is written on failure.
fn create_from(config: *const rs_config_t, layout: *const rs_layout_t) -> rs_status_t {
    let none = ptr::without_provenance_mut(77);
    let mut out = none;
    // SAFETY: each test's structs are as large as they state; what they state wrong is refused.
    unsafe {
        let status = rs_container_create(config, layout, &mut out);
        assert_eq!(out == none, status != RS_OK, "written on success only");
        if status == RS_OK {
            rs_container_destroy(out);
        }
        status
    }
}

/// Changes the good tables, which must then be refused so.
#[track_caller]
fn refused(change: impl FnOnce(&mut Tables), status: rs_status_t, words: &[&str]) {
    let mut w = whole();
    change(&mut w.tables);
    fails(create(&w.tables), status, words);
}

#[test]
fn the_good_tables_are_good() {
    let w = whole();
    ok(create(&w.tables));
    ok(create(&Tables::default()));
    assert_eq!(w.memory, vec![0f32; 24]);
}

#[test]
fn configs() {
    let w = whole();
    let layout = w.tables.layout();
    let with = |change: &dyn Fn(&mut rs_config_t)| {
        let mut c = config(ptr::null_mut());
        change(&mut c);
        create_from(&c, &layout)
    };
    fails(with(&|c| c.abi = 0), RS_ERR_INVALID, &["config.abi is 0", "RS_ABI, 1"]);
    fails(with(&|c| c.abi = 2), RS_ERR_INVALID, &["config.abi is 2"]);
    fails(with(&|c| c.flags = 5), RS_ERR_INVALID, &["config.flags", "0x5"]);
    fails(with(&|c| c.name = c"\xff".as_ptr()), RS_ERR_INVALID, &["config.name", "UTF-8"]);
    fails(with(&|c| c.preset = ptr::without_provenance(8)), RS_ERR_INVALID, &["either a layout or a preset", "neither"]);
    ok(with(&|c| (c.staging_bytes, c.host_threads, c.timeout_ms, c.host_id) = (1 << 20, 3, 5, 9)));
    ok(with(&|c| c.name = c"a label".as_ptr()));
}

/// A struct of another length: `extra` bytes more (or less), the last of them `tail`.
fn resized<T: Copy>(value: &T, extra: isize, tail: u8) -> Vec<u64> {
    let size = (size_of::<T>() as isize + extra) as usize;
    let mut out = vec![0u64; size.max(size_of::<T>()).div_ceil(8)];
    let bytes = out.as_mut_ptr().cast::<u8>();
    // SAFETY: the vector has at least as many bytes as either length.
    unsafe {
        bytes.copy_from_nonoverlapping((&raw const *value).cast(), size_of::<T>());
        bytes.cast::<usize>().write(size);
        if tail != 0 {
            bytes.add(size - 1).write(tail);
        }
    }
    out
}

/// Gives a function a struct of many lengths; to one of good length it says `good`.
fn lengths<T: Copy>(value: &T, good: rs_status_t, call: impl Fn(*const T) -> rs_status_t) {
    let name = std::any::type_name::<T>().rsplit("::").next().unwrap();
    let size = size_of::<T>();
    let call = |extra, tail| call(resized(value, extra, tail).as_ptr().cast());
    for extra in [0, 8, 64] {
        assert_eq!(call(extra, 0), good, "{name}, {extra} bytes longer: {}", last());
    }
    fails(call(64, 1), RS_ERR_UNKNOWN_FIELD, &[&format!("byte {} of {name} is 1", size + 63), "newer"]);
    fails(call(8, 200), RS_ERR_UNKNOWN_FIELD, &[&format!("byte {} of {name} is 200", size + 7)]);
    for extra in [-(size as isize), 4 - size as isize, 4, 5000] {
        let stated = size as isize + extra;
        fails(call(extra, 0), RS_ERR_INVALID, &[&format!("struct_size is {stated}, it must be sizeof({name}), {size}")]);
    }
}

#[test]
fn structs_of_any_length() {
    let w = whole();
    let (config, layout) = (config(ptr::null_mut()), w.tables.layout());
    lengths(&config, RS_OK, |c| create_from(c, &layout));
    lengths(&layout, RS_OK, |l| create_from(&config, l));

    let container = Container::new(&config, &w.tables);
    // SAFETY: the struct is as long as it says.
    let sync = |s: *const rs_sync_t| unsafe { rs_sync_weights(container.0, s) };
    lengths(&rs_sync_t { version: 1, ..sized() }, RS_ERR_STATE, sync); // not connected

    // SAFETY: as above.
    let local = |l: *const rs_comm_local_t| unsafe { rs_comm_local(l, &mut ptr::null_mut()) };
    lengths(&rs_comm_local_t { name: c"x".as_ptr(), ..sized() }, RS_ERR_INVALID, local); // a world of 0

    // SAFETY: as above.
    let custom = |o: *const rs_comm_ops_t| unsafe { rs_comm_custom(o, &mut ptr::null_mut()) };
    lengths(&sized::<rs_comm_ops_t>(), RS_ERR_INVALID, custom); // no functions
}

#[test]
fn what_a_short_struct_lacks_is_zero() {
    let w = whole();
    let (config, layout) = (config(ptr::null_mut()), w.tables.layout());
    fails(create_from(resized(&config, 8 - 80, 0).as_ptr().cast(), &layout), RS_ERR_INVALID, &["config.abi is 0"]);
    ok(create_from(resized(&config, 16 - 80, 0).as_ptr().cast(), &layout));
    ok(create_from(&config, resized(&layout, 8 - 80, 0).as_ptr().cast()));

    let hub = Hub::new(1);
    let ops = hub.ops(0, honest);
    let mut comm = ptr::null_mut();
    // SAFETY: the struct is as long as it says.
    unsafe {
        let until_recv = resized(&ops, -16, 0);
        fails(rs_comm_custom(until_recv.as_ptr().cast(), &mut comm), RS_ERR_INVALID, &["rs_comm_ops_t.poll is NULL"]);
        // A caller from before there was `abort`: it is not called.
        let until_poll = resized(&ops, -8, 0);
        ok(rs_comm_custom(until_poll.as_ptr().cast(), &mut comm));
        let c = Container::new(&rs_config_t { comm, ..config }, &w.tables);
        ok(rs_container_abort(c.0));
        rs_comm_destroy(comm);
    }
    assert_eq!((hub.aborted.load(Relaxed), hub.released.load(Relaxed)), (0, 1));
}

#[test]
fn rows_of_other_sizes() {
    let w = whole();
    // Each table with rows of 16 bytes more, zero but for the last byte of the last row.
    fn stretched<T: Copy>(rows: &[T], tail: u8) -> (Vec<u64>, usize) {
        let size = size_of::<T>() + 16;
        let mut out = vec![0u64; rows.len() * size / 8];
        for (i, row) in rows.iter().enumerate() {
            // SAFETY: row i of the new table.
            unsafe {
                out.as_mut_ptr().cast::<u8>().add(i * size).copy_from_nonoverlapping((&raw const *row).cast(), size_of::<T>())
            };
        }
        *out.last_mut().unwrap() = u64::from(tail) << 56;
        (out, size)
    }
    for tail in [0, 3] {
        let mut l = w.tables.layout();
        let (rows, size) = stretched(&w.tables.tensors, tail);
        (l.tensors, l.tensor_size) = (rows.as_ptr().cast(), size);
        let tensors = create_from(&config(ptr::null_mut()), &l);
        let text = last();
        let mut l = w.tables.layout();
        let (rows, size) = stretched(&w.tables.buffers, tail);
        (l.buffers, l.buffer_size) = (rows.as_ptr().cast(), size);
        let buffers = create_from(&config(ptr::null_mut()), &l);
        let mut l = w.tables.layout();
        let (rows, size) = stretched(&w.tables.tiles, tail);
        (l.tiles, l.tile_size) = (rows.as_ptr().cast(), size);
        let tiles = create_from(&config(ptr::null_mut()), &l);
        if tail == 0 {
            assert_eq!([tensors, buffers, tiles], [RS_OK; 3], "{}", last());
        } else {
            assert_eq!([tensors, buffers, tiles], [RS_ERR_UNKNOWN_FIELD; 3]);
            assert!(text.contains("layout.tensors[0]: byte 95 of rs_tensor_t is 3"), "{text}");
        }
    }
    for (name, spoil) in [
        ("layout.tensors", (|l| l.tensor_size = 0) as fn(&mut rs_layout_t)),
        ("layout.buffers", |l| l.buffer_size = 3),
        ("layout.tiles", |l| l.tile_size = 1 << 20),
        ("layout.tensors", |l| l.tensors = ptr::null()),
        ("layout.buffers", |l| l.buffers = ptr::null()),
        ("layout.tiles", |l| l.tiles = ptr::null()),
        ("layout.tensors", |l| l.tensor_count = usize::MAX / 80 + 1),
        ("layout.buffers", |l| l.buffer_count = usize::MAX / 2),
        ("layout.tiles", |l| l.tile_count = usize::MAX),
    ] {
        let mut l = w.tables.layout();
        spoil(&mut l);
        fails(create_from(&config(ptr::null_mut()), &l), RS_ERR_INVALID, &[name]);
    }
}

#[test]
fn tensors_and_buffers() {
    refused(|t| t.tensors[0].name = ptr::null(), RS_ERR_INVALID, &["layout.tensors[0].name is NULL"]);
    refused(|t| t.tensors[0].name = c"\xc3(".as_ptr(), RS_ERR_INVALID, &["layout.tensors[0].name", "UTF-8 from byte 0"]);
    refused(|t| t.tensors[0].rank = 9, RS_ERR_INVALID, &["layout.tensors[0] 'model.w'", "9", "RS_MAX_RANK"]);
    refused(|t| t.tensors[0].rank = u32::MAX, RS_ERR_INVALID, &["RS_MAX_RANK"]);
    refused(|t| t.tensors[0].reserved = 1, RS_ERR_INVALID, &["'model.w'", "reserved is 1"]);
    refused(|t| t.tensors[0].shape[1] = 0, RS_ERR_INVALID, &["'model.w'"]);
    refused(|t| t.tensors[0].shape[1] = -6, RS_ERR_INVALID, &["'model.w'"]);
    refused(|t| assert_eq!(t.tensor("model.w", &[1]), 1), RS_ERR_INVALID, &["'model.w'", "tensors[0]"]);

    refused(|t| t.buffers[0].name = ptr::null(), RS_ERR_INVALID, &["layout.buffers[0].name is NULL"]);
    refused(|t| t.buffers[0].data = ptr::null_mut(), RS_ERR_INVALID, &["'w'"]);
    refused(|t| t.buffers[0].ndim = 9, RS_ERR_INVALID, &["layout.buffers[0] 'w'", "9"]);
    refused(|t| t.buffers[0].role = 0, RS_ERR_INVALID, &["'w'", "role is 0"]);
    refused(|t| t.buffers[0].role = 4, RS_ERR_INVALID, &["'w'", "role is 4"]);
    refused(|t| t.buffers[0].flags = 6, RS_ERR_INVALID, &["'w'", "flags", "0x6"]);
    refused(|t| t.buffers[0].device_type = 8, RS_ERR_UNSUPPORTED, &["'w'", "type 8"]);
    refused(|t| t.buffers[0].device_id = 1, RS_ERR_UNSUPPORTED, &["'w'", "id 1"]);
    for dtype in [(2, 4, 1), (2, 32, 2), (2, 0, 1), (2, 24, 1)] {
        let (code, bits, lanes) = dtype;
        refused(
            |t| t.buffers[0].dtype = rs_dtype_t { code, bits, lanes },
            RS_ERR_UNSUPPORTED,
            &["'w'", "dtype", &format!("bits {bits}, lanes {lanes}")],
        );
    }
    // A wider type than the memory was made for.
    refused(|t| t.buffers[0].dtype.bits = 64, RS_ERR_LAYOUT, &["'w'", "96 bytes"]);
    for stride in [[-6, 1], [6, -1], [0, 1], [6, 0]] {
        refused(|t| t.buffers[0].strides = dims(&stride), RS_ERR_INVALID, &["'w'", "stride", "at least 1"]);
    }
    refused(|t| t.buffers[0].strides = dims(&[5, 1]), RS_ERR_LAYOUT, &["'w'", "nest"]);
    refused(|t| t.buffers[0].size_bytes -= 1, RS_ERR_LAYOUT, &["'w'", "95 bytes"]);
}

#[test]
fn tiles() {
    refused(|t| t.tiles[0].tensor = 1, RS_ERR_INVALID, &["tiles[0]", "tensor is 1", "1 rows"]);
    refused(|t| t.tiles[0].buffer = 1, RS_ERR_INVALID, &["tiles[0]", "buffer is 1", "1 rows"]);
    refused(|t| t.tiles[0].rank = 9, RS_ERR_INVALID, &["tiles[0]", "9"]);
    refused(|t| t.tiles[0].transform = 3, RS_ERR_UNSUPPORTED, &["tiles[0]", "transform 3"]);
    refused(|t| t.tiles[0].view = dims(&[4, 5]), RS_ERR_INVALID, &["tiles[0]", "[4, 5]", "'model.w'"]);
    for stride in [[-6, 1], [6, -1], [0, 1]] {
        refused(|t| t.tiles[0].stride = dims(&stride), RS_ERR_INVALID, &["tiles[0]", "'w'", "stride"]);
    }
    refused(|t| t.tiles[0].stride = dims(&[5, 1]), RS_ERR_LAYOUT, &["tiles[0]", "nest"]);

    // Out of its view by one, on each side and axis.
    for (origin, extent) in
        [([1, 0], [4, 6]), ([0, 1], [4, 6]), ([-1, 0], [4, 6]), ([0, -1], [4, 6]), ([0, 0], [5, 6]), ([0, 0], [4, 7])]
    {
        refused(
            |t| (t.tiles[0].origin, t.tiles[0].extent) = (dims(&origin), dims(&extent)),
            RS_ERR_INVALID,
            &["tiles[0]", "'model.w'", "[4, 6]"],
        );
    }
    refused(|t| t.tiles[0].extent[0] = 0, RS_ERR_INVALID, &["tiles[0]"]);
    // Out of its buffer by one element, and by a byte that is no element.
    refused(|t| t.tiles[0].byte_offset = 4, RS_ERR_LAYOUT, &["tiles[0]", "'w'", "byte 100", "96 bytes"]);
    refused(|t| t.tiles[0].byte_offset = 1, RS_ERR_INVALID, &["tiles[0]", "byte_offset 1"]);
    refused(|t| t.tiles[0].stride[0] = 7, RS_ERR_LAYOUT, &["tiles[0]", "byte 108", "96 bytes"]);
}

#[test]
fn every_element_once() {
    // One element in no tile.
    let last_column = |t: &mut Tables| {
        t.tiles[0].extent = dims(&[4, 5]);
        t.tile(0, 0, &[0, 5], &[3, 1], &[6, 1]).byte_offset = 20;
    };
    refused(last_column, RS_ERR_LAYOUT, &["'w'", "24 elements", "cover 23", "RS_BUFFER_PADDED"]);
    let mut w = whole();
    last_column(&mut w.tables);
    w.tables.buffers[0].flags = RS_BUFFER_PADDED;
    ok(create(&w.tables));
    let mut w = whole();
    last_column(&mut w.tables);
    w.tables.buffers[0].role = RS_SOURCE;
    ok(create(&w.tables));

    // Two targets on one element: two tiles of one buffer, two buffers of one memory.
    refused(
        |t| {
            t.tile(0, 0, &[3, 5], &[1, 1], &[1, 1]).byte_offset = 23 * 4;
        },
        RS_ERR_LAYOUT,
        &["'w'", "tiles[0]", "tiles[1]", "4 bytes"],
    );
    let mut w = whole();
    let second = w.tables.buffer("other", &mut w.memory[23..], RS_TARGET, &[1]);
    w.tables.tile(0, second, &[3, 5], &[1, 1], &[1, 1]);
    fails(create(&w.tables), RS_ERR_LAYOUT, &["'w'", "'other'", "share 4 bytes"]);
    // A source may lie where the target lies only if both mean the same element.
    let mut w = whole();
    let second = w.tables.buffer("trained", &mut w.memory[..], RS_SOURCE, &[6, 4]);
    w.tables.tile(0, second, &[0, 0], &[4, 6], &[1, 4]);
    fails(create(&w.tables), RS_ERR_LAYOUT, &["'w'", "'trained'"]);
    let mut w = whole();
    let second = w.tables.buffer("trained", &mut w.memory[..], RS_SOURCE, &[4, 6]);
    w.tables.tile(0, second, &[0, 0], &[4, 6], &[6, 1]);
    ok(create(&w.tables));
}

#[test]
fn numbers_that_overflow() {
    let big = i64::MAX;
    let none = |t: &mut Tables| {
        t.tiles.clear();
        t.buffers[0].flags = RS_BUFFER_PADDED;
    };
    // A tensor's and a view's number of elements; a buffer's elements, strides and bytes; a tile's reach.
    refused(|t| t.tensors[0].shape = dims(&[big, 2]), RS_ERR_INVALID, &["'model.w'"]);
    refused(|t| t.tensors[0].shape = dims(&[1 << 62, 4]), RS_ERR_INVALID, &["'model.w'"]);
    refused(|t| t.tiles[0].view = dims(&[1 << 32, 1 << 32]), RS_ERR_INVALID, &["tiles[0]"]);
    refused(|t| t.buffers[0].shape = dims(&[1 << 32, 1 << 32]), RS_ERR_INVALID, &["'w'"]);
    refused(|t| t.buffers[0].shape = dims(&[1 << 31, 1 << 31]), RS_ERR_LAYOUT, &["'w'"]);
    refused(|t| t.buffers[0].strides = dims(&[big, 1]), RS_ERR_LAYOUT, &["'w'"]);
    refused(|t| t.buffers[0].strides = dims(&[big / 3 + 1, 1]), RS_ERR_LAYOUT, &["'w'"]);
    refused(|t| t.buffers[0].strides = dims(&[1 << 61, 1 << 60]), RS_ERR_LAYOUT, &["'w'"]);
    refused(|t| t.buffers[0].size_bytes = u64::MAX, RS_ERR_INVALID, &["'w'"]);
    refused(|t| t.tiles[0].byte_offset = u64::MAX - 3, RS_ERR_LAYOUT, &["tiles[0]"]);
    refused(|t| t.tiles[0].byte_offset = !3, RS_ERR_LAYOUT, &["tiles[0]"]);
    refused(|t| t.tiles[0].stride = dims(&[big, 1]), RS_ERR_LAYOUT, &["tiles[0]", "2^64"]);
    refused(|t| t.tiles[0].stride = dims(&[big, big]), RS_ERR_LAYOUT, &["tiles[0]", "2^64"]);
    refused(|t| t.tiles[0].stride = dims(&[1 << 62, 1]), RS_ERR_LAYOUT, &["tiles[0]"]);
    refused(|t| t.tiles[0].origin = dims(&[big, 0]), RS_ERR_INVALID, &["tiles[0]"]);
    refused(|t| t.tiles[0].extent = dims(&[big, 6]), RS_ERR_INVALID, &["tiles[0]"]);
    refused(|t| (t.tiles[0].origin, t.tiles[0].extent) = (dims(&[big, 0]), dims(&[big, 6])), RS_ERR_INVALID, &["tiles[0]"]);
    refused(|t| t.tiles[0].origin = dims(&[i64::MIN, 0]), RS_ERR_INVALID, &["tiles[0]"]);
    // As large as numbers allow, and of no harm.
    let mut w = whole();
    none(&mut w.tables);
    w.tables.tensors[0].shape = dims(&[big, 1]);
    ok(create(&w.tables));
}

#[test]
fn devices() {
    let w = whole();
    let with = |device: &rs_device_t| {
        let mut c = config(ptr::null_mut());
        c.device = device;
        create_from(&c, &w.tables.layout())
    };
    let mut device: rs_device_t = sized();
    device.device_type = 12;
    fails(with(&device), RS_ERR_INVALID, &["rs_device_t.alloc is NULL"]);
    device.struct_size = 0;
    fails(with(&device), RS_ERR_INVALID, &["config.device.struct_size is 0", "rs_device_t"]);
    let long = resized(&sized::<rs_device_t>(), 16, 7);
    let mut c = config(ptr::null_mut());
    c.device = long.as_ptr().cast();
    fails(create_from(&c, &w.tables.layout()), RS_ERR_UNKNOWN_FIELD, &["config.device: byte 111 of rs_device_t is 7"]);
}
