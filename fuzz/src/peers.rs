//! A communicator of the caller's (rs_comm_custom) whose other rank is a script: it answers as a rank of this library would, but for
//! the changes that the fuzzer makes to what it says.

use crate::{Input, bytes, ok, received, sized};
use reshard::abi::*;
use reshard::ffi::api::*;
use std::cell::{Cell, RefCell};
use std::ffi::{CStr, c_void};
use std::ptr;

const BF16: rs_dtype_t = rs_dtype_t { code: 4, bits: 16, lanes: 1 };
const F32: rs_dtype_t = rs_dtype_t { code: 2, bits: 32, lanes: 1 };

/// Bytes of each rank's table that connect gathers at once.
const SLICE: usize = 1 << 20;

/// Rank 1 of a world of two, and the functions that lead to it.
#[derive(Default)]
pub struct Peers {
    /// What the fuzzer does to the answers, and to what is moved.
    edits: RefCell<Vec<u8>>,
    /// The table that rank 1 says it has.
    blob: RefCell<Vec<u8>>,
    /// Whether it says that it was given the others' tables.
    imported: Cell<bool>,
    /// Gatherings so far; bytes of tables that are still to come, and that have come.
    gathered: Cell<usize>,
    tables: Cell<[usize; 2]>,
}

impl Peers {
    /// Rank 1 with these changes to what it says.
    pub fn new(edits: &[u8]) -> Box<Peers> {
        Box::new(Peers { edits: RefCell::new(edits.to_vec()), ..Peers::default() })
    }

    /// Its table, and whether it has imported ours.
    pub fn says(&self, blob: &[u8], imported: bool) {
        *self.blob.borrow_mut() = blob.to_vec();
        self.imported.set(imported);
    }

    /// A rank's valid table of a layout.
    pub fn export(&self, layout: usize, rank: i32) -> Vec<u8> {
        let (container, _memory) = container(self, layout, rank);
        // SAFETY: alive until destroyed; the buffer is as long as it says.
        unsafe {
            let blob = bytes(|buf, cap, len| rs_container_export(container, buf.cast(), cap, len));
            rs_container_destroy(container);
            blob.expect("a table")
        }
    }

    /// The next change that the fuzzer makes.
    fn next<R>(&self, take: impl FnOnce(&mut Input<'_>) -> R) -> R {
        let mut edits = self.edits.borrow_mut();
        let mut input = Input(&edits);
        let out = take(&mut input);
        let rest = input.0.len();
        let used = edits.len() - rest;
        edits.drain(..used);
        out
    }

    fn status(&self) -> rs_status_t {
        self.next(|input| match input.byte() {
            0..=250 => RS_OK,
            251 => input.half() as i32,
            b => -40 - i32::from(b - 252),
        })
    }

    fn answer(&self, mine: &[u8]) -> Vec<u8> {
        let n = self.gathered.replace(self.gathered.get() + 1);
        let mut out = mine.to_vec();
        let word = |bytes: &[u8], at: usize| u64::from_le_bytes(bytes[at..at + 8].try_into().expect("8 bytes"));
        let blob = self.blob.borrow();
        let [left, from] = self.tables.get();
        if n == 0 && mine.len() == 128 {
            // Rank 1's record: as ours but for who it is and what its table is.
            out[8] = 1;
            let flags = word(&out, 40) & !(1 << 33) | u64::from(self.imported.get()) << 33;
            out[40..48].copy_from_slice(&flags.to_le_bytes());
            out[56..64].copy_from_slice(&(blob.len() as u64).to_le_bytes());
            if blob.len() >= 32 {
                out[64..72].copy_from_slice(&blob[24..32]);
            }
        } else if left > 0 {
            out = blob.get(from..).unwrap_or(&[]).to_vec();
            out.resize(mine.len(), 0);
            self.tables.set([left - mine.len().min(left), from + mine.len()]);
        }
        self.next(|input| {
            for _ in 0..input.byte() % 4 {
                let at = (usize::from(input.byte()) | usize::from(input.byte()) << 8) % out.len().max(1);
                let bytes = if input.byte() % 2 == 0 { vec![input.byte()] } else { input.number().to_le_bytes().to_vec() };
                for (to, from) in out[at.min(mine.len())..].iter_mut().zip(bytes) {
                    *to = from;
                }
            }
        });
        if n == 0 && mine.len() == 128 {
            let both = word(mine, 40) & word(&out, 40) >> 33 & 1 == 1 && word(mine, 40) >> 33 & 1 == 1;
            let longest = word(mine, 56).max(word(&out, 56));
            if !both && longest <= 1 << 30 {
                self.tables.set([longest as usize, 0]);
            }
        }
        out
    }
}

/// The functions of `rank` of two.
pub fn ops(peers: &Peers, rank: i32) -> rs_comm_ops_t {
    rs_comm_ops_t {
        ctx: ptr::from_ref(peers).cast_mut().cast(),
        rank,
        world_size: 2,
        allgather: Some(allgather),
        group_begin: Some(step),
        group_end: Some(step),
        send: Some(send),
        recv: Some(recv),
        poll: Some(poll),
        ..sized()
    }
}

/// A reference to a communicator of two ranks of which we are `rank`.
pub fn comm(peers: &Peers, rank: i32) -> *mut rs_comm_t {
    let mut out = ptr::null_mut();
    // SAFETY: the functions keep the header's promises; `peers` outlives all containers that use it.
    assert!(ok(unsafe { rs_comm_custom(&ops(peers, rank), &mut out) }));
    out
}

// SAFETY, the functions below: the library gives `ctx` back as it got it, and memory of the lengths it states.
unsafe fn peers<'a>(ctx: *mut c_void) -> &'a Peers {
    // SAFETY: as above.
    unsafe { &*ctx.cast::<Peers>() }
}
unsafe extern "C" fn allgather(ctx: *mut c_void, send: *const c_void, recv: *mut c_void, bytes: u64, _ms: u32) -> rs_status_t {
    // SAFETY: as above.
    unsafe {
        let (peers, n) = (peers(ctx), bytes as usize);
        assert!(n <= SLICE, "a gathering of {n} bytes");
        let mine = std::slice::from_raw_parts(send.cast::<u8>(), n);
        recv.copy_from_nonoverlapping(send, n);
        received(n);
        let answer = peers.answer(mine);
        recv.cast::<u8>().add(n).copy_from_nonoverlapping(answer.as_ptr(), n);
        peers.status()
    }
}
unsafe extern "C" fn step(ctx: *mut c_void) -> rs_status_t {
    // SAFETY: as above.
    unsafe { peers(ctx) }.status()
}
unsafe extern "C" fn poll(ctx: *mut c_void) -> rs_status_t {
    // SAFETY: as above.
    unsafe { peers(ctx) }.next(|input| match input.byte() {
        0..=200 => RS_OK,
        201..=250 => RS_IN_PROGRESS,
        _ => input.half() as i32,
    })
}
unsafe extern "C" fn send(ctx: *mut c_void, data: *const c_void, bytes: u64, peer: i32, _: *mut c_void) -> rs_status_t {
    // SAFETY: as above: all of it may be read.
    unsafe {
        assert_eq!(peer, 1);
        let sum = std::slice::from_raw_parts(data.cast::<u8>(), bytes as usize).iter().fold(0u8, |n, b| n.wrapping_add(*b));
        std::hint::black_box(sum);
        peers(ctx).status()
    }
}
unsafe extern "C" fn recv(ctx: *mut c_void, data: *mut c_void, bytes: u64, peer: i32, _: *mut c_void) -> rs_status_t {
    // SAFETY: as above: all of it may be written.
    unsafe {
        assert_eq!(peer, 1);
        data.cast::<u8>().write_bytes(0x5a, bytes as usize);
        peers(ctx).status()
    }
}

/// A tensor, a buffer and the tile of one in the other.
struct Row {
    tensor: (&'static CStr, &'static [i64]),
    role: u32,
    dtype: rs_dtype_t,
    /// Elements of the buffer, and its tile: view, origin, extent, stride; the first element.
    elements: i64,
    view: &'static [i64],
    origin: &'static [i64],
    extent: &'static [i64],
    stride: &'static [i64],
    first: u64,
}

const fn row(tensor: (&'static CStr, &'static [i64]), role: u32, dtype: rs_dtype_t, elements: i64) -> Row {
    Row { tensor, role, dtype, elements, view: tensor.1, origin: &[0, 0], extent: tensor.1, stride: &[6, 1], first: 0 }
}

const W: (&CStr, &[i64]) = (c"w", &[8, 6]);
const V: (&CStr, &[i64]) = (c"v", &[24]);

/// Layouts of a rank; each gives what the next one wants.
const LAYOUTS: [&[Row]; 6] = [
    &[row(W, RS_SOURCE, F32, 48), Row { stride: &[1], origin: &[0], ..row(V, RS_SOURCE, BF16, 24) }],
    // Columns, transposed, as another type, in a buffer with room; and every third element.
    &[
        Row { origin: &[0, 2], extent: &[8, 3], stride: &[1, 9], first: 3, ..row(W, RS_TARGET, BF16, 40) },
        Row { view: &[8, 3], origin: &[1, 2], extent: &[6, 1], stride: &[1, 1], ..row(V, RS_TARGET, BF16, 6) },
    ],
    // Rows in two buffers of both roles.
    &[
        Row { extent: &[4, 6], ..row(W, RS_SOURCE, F32, 24) },
        Row { origin: &[4, 0], extent: &[4, 6], ..row(W, RS_SOURCE, F32, 24) },
        Row { view: &[4, 3, 2], origin: &[0; 3], extent: &[4, 3, 2], stride: &[3, 1, 12], ..row(V, RS_SOURCE, F32, 24) },
    ],
    &[row(W, RS_TARGET, F32, 48), row(W, RS_TARGET, F32, 48), Row { stride: &[1], origin: &[0], ..row(V, RS_TARGET, F32, 24) }],
    // Cuts that do not divide each other.
    &[
        Row { view: &[6, 8], origin: &[0; 2], extent: &[6, 5], stride: &[5, 1], ..row(W, RS_SOURCE, F32, 30) },
        Row { view: &[16, 3], origin: &[0; 2], extent: &[16, 3], stride: &[3, 1], ..row(W, RS_SOURCE, F32, 48) },
    ],
    &[Row { view: &[12, 4], origin: &[1, 1], extent: &[7, 3], stride: &[3, 1], ..row(W, RS_TARGET, F32, 21) }],
];

/// A container of `rank` with one of a few layouts, and the memory of its weights.
pub fn container(peers: &Peers, layout: usize, rank: i32) -> (*mut rs_container_t, Vec<Vec<u64>>) {
    let rows = LAYOUTS[layout % LAYOUTS.len()];
    let dims = |values: &[i64]| {
        let mut out = [0; RS_MAX_RANK];
        out[..values.len()].copy_from_slice(values);
        out
    };
    let mut names: Vec<(&CStr, &[i64])> = vec![];
    let (mut memory, mut buffers, mut tiles) = (vec![], vec![], vec![]);
    for (i, r) in rows.iter().enumerate() {
        if !names.contains(&r.tensor) {
            names.push(r.tensor);
        }
        let item = u64::from(r.dtype.bits) / 8;
        let mut block = vec![0u64; (r.elements as u64 * item).div_ceil(8) as usize];
        buffers.push(rs_buffer_t {
            name: [c"a", c"b", c"c"][i].as_ptr(),
            data: block.as_mut_ptr().cast(),
            size_bytes: r.elements as u64 * item,
            device_type: RS_DEVICE_CPU,
            device_id: 0,
            role: r.role,
            flags: if r.role == RS_TARGET { RS_BUFFER_PADDED } else { 0 },
            dtype: r.dtype,
            ndim: 1,
            shape: dims(&[r.elements]),
            strides: dims(&[1]),
        });
        memory.push(block);
        tiles.push(rs_tile_t {
            tensor: names.iter().position(|n| *n == r.tensor).unwrap_or(0) as u32,
            buffer: i as u32,
            rank: r.view.len() as u32,
            transform: RS_TRANSFORM_NONE,
            byte_offset: r.first * item,
            view: dims(r.view),
            origin: dims(r.origin),
            extent: dims(r.extent),
            stride: dims(r.stride),
        });
    }
    let tensor = |t: &(&CStr, &[i64])| rs_tensor_t { name: t.0.as_ptr(), rank: t.1.len() as u32, reserved: 0, shape: dims(t.1) };
    let tensors: Vec<rs_tensor_t> = names.iter().map(tensor).collect();
    let layout = rs_layout_t {
        tensors: tensors.as_ptr(),
        tensor_count: tensors.len(),
        tensor_size: size_of::<rs_tensor_t>(),
        buffers: buffers.as_ptr(),
        buffer_count: buffers.len(),
        buffer_size: size_of::<rs_buffer_t>(),
        tiles: tiles.as_ptr(),
        tile_count: tiles.len(),
        tile_size: size_of::<rs_tile_t>(),
        ..sized()
    };
    let comm = comm(peers, rank);
    let config = rs_config_t { abi: RS_ABI, comm, staging_bytes: 1 << 20, timeout_ms: 2000, host_id: 7, ..sized() };
    let mut out = ptr::null_mut();
    // SAFETY: whole structs and tables; the caller keeps the memory.
    unsafe {
        assert!(ok(rs_container_create(&config, &layout, &mut out)), "a layout of the fuzzer's own");
        rs_comm_destroy(comm);
    }
    (out, memory)
}
