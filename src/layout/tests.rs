//! What one rank's tables are refused for, and what they are not.
#![allow(clippy::cloned_ref_to_slice_refs)] // `&[row.clone()]` reads as the table that it is
use super::*;

const BF16: rs_dtype_t = rs_dtype_t { code: 4, bits: 16, lanes: 1 };

fn arr(v: &[i64]) -> [i64; 8] {
    let mut a = [0; 8];
    a[..v.len()].copy_from_slice(v);
    a
}

fn t(name: &str, shape: &[i64]) -> TensorRow {
    TensorRow { name: name.into(), shape: shape.into() }
}

fn b(name: &str, addr: u64, role: u32, shape: &[i64], strides: &[i64]) -> BufferRow {
    let span: i64 = shape.iter().zip(strides).map(|(n, s)| (n - 1) * s).sum();
    BufferRow {
        name: name.into(),
        addr,
        bytes: (span as u64 + 1) * 2,
        device_type: 1,
        device_id: 0,
        role,
        flags: 0,
        dtype: BF16,
        shape: shape.into(),
        strides: strides.into(),
    }
}

fn tile(buffer: u32, offset: u64, view: &[i64], origin: &[i64], extent: &[i64], stride: &[i64]) -> TileRow {
    TileRow {
        tensor: 0,
        buffer,
        rank: view.len() as u32,
        transform: 0,
        byte_offset: offset * 2,
        view: arr(view),
        origin: arr(origin),
        extent: arr(extent),
        stride: arr(stride),
    }
}

fn fails(tensors: &[TensorRow], buffers: &[BufferRow], tiles: &[TileRow], status: i32, words: &[&str]) {
    let e = Layout::new(tensors, buffers, tiles).expect_err("must be refused");
    assert_eq!(e.status(), status, "{e}");
    for w in words {
        assert!(e.text().contains(w), "'{e}' does not say '{w}'");
    }
}

#[test]
fn a_fused_buffer_with_gaps_is_accepted() {
    // Two groups of [q 4 rows | k 2 rows], rows padded from 5 to 8 elements.
    let buffers = [b("qkv", 4096, RS_TARGET, &[12, 5], &[8, 1])];
    let q = tile(0, 0, &[2, 4, 5], &[0, 0, 0], &[2, 4, 5], &[48, 8, 1]);
    let k = TileRow { tensor: 1, ..tile(0, 32, &[2, 2, 5], &[0, 0, 0], &[2, 2, 5], &[48, 8, 1]) };
    let layout = Layout::new(&[t("q", &[8, 5]), t("k", &[4, 5])], &buffers, &[q, k]).unwrap();
    assert_eq!(layout.tiles().len(), 2);
    fails(&[t("q", &[8, 5]), t("k", &[4, 5])], &buffers, &[q], RS_ERR_LAYOUT, &["'qkv'", "60", "40"]);
    // One element to the right is in the gap: still inside the bytes, but not an element of the buffer.
    let mut shifted = k;
    shifted.byte_offset -= 2;
    fails(&[t("q", &[8, 5]), t("k", &[4, 5])], &buffers, &[q, shifted], RS_ERR_LAYOUT, &["'qkv'", "'k'", "not its own"]);
    shifted.byte_offset += 4;
    fails(&[t("q", &[8, 5]), t("k", &[4, 5])], &buffers, &[q, shifted], RS_ERR_LAYOUT, &["ends at byte"]);
}

#[test]
fn overlapping_targets_are_refused_and_interleaved_ones_are_not() {
    let two = |o: i64| [tile(0, 0, &[4, 6], &[0, 0], &[4, 3], &[6, 1]), tile(0, 3, &[4, 6], &[0, o], &[4, 3], &[6, 1])];
    Layout::new(&[t("w", &[4, 6])], &[b("p", 4096, RS_TARGET, &[4, 6], &[6, 1])], &two(3)).unwrap();
    let mut over = two(3);
    over[1].byte_offset = 4;
    fails(
        &[t("w", &[4, 6])],
        &[b("p", 4096, RS_TARGET, &[4, 6], &[6, 1])],
        &over,
        RS_ERR_LAYOUT,
        &["tiles[0]", "tiles[1]", "8 bytes"],
    );
}

#[test]
fn shared_memory_is_allowed_only_for_the_same_element_at_the_same_address() {
    let whole = |buffer| tile(buffer, 0, &[4, 4], &[0, 0], &[4, 4], &[4, 1]);
    let rows = [t("w", &[4, 4])];
    let at = |addr, role| b("p", addr, role, &[4, 4], &[4, 1]);
    Layout::new(&rows, &[at(4096, RS_SOURCE), at(4096, RS_TARGET)], &[whole(0), whole(1)]).unwrap();
    Layout::new(&rows, &[at(4096, RS_SOURCE | RS_TARGET)], &[whole(0)]).unwrap();
    Layout::new(&rows, &[at(4096, RS_SOURCE), at(4128, RS_TARGET)], &[whole(0), whole(1)]).unwrap();
    fails(&rows, &[at(4096, RS_SOURCE), at(4104, RS_TARGET)], &[whole(0), whole(1)], RS_ERR_LAYOUT, &["24 bytes", "same address"]);
    let turned = tile(1, 0, &[4, 4], &[0, 0], &[4, 4], &[1, 4]);
    fails(&rows, &[at(4096, RS_SOURCE), at(4096, RS_TARGET)], &[whole(0), turned], RS_ERR_LAYOUT, &["32 bytes"]);
    // Two sources may share what they like.
    Layout::new(&rows, &[at(4096, RS_SOURCE), at(4104, RS_SOURCE)], &[whole(0), whole(1)]).unwrap();
}

#[test]
fn every_product_is_checked() {
    let huge = i64::MAX / 2;
    fails(&[t("w", &[huge, 3])], &[], &[], RS_ERR_INVALID, &["2^63"]);
    let mut wide = b("p", 4096, RS_SOURCE, &[4, 4], &[4, 1]);
    wide.strides = vec![huge, 1];
    fails(&[t("w", &[4, 4])], &[wide], &[], RS_ERR_LAYOUT, &["does not fit"]);
    let buf = b("p", 4096, RS_SOURCE, &[4, 4], &[4, 1]);
    let far = tile(0, 0, &[4, 4], &[0, 0], &[4, 4], &[huge, 1]);
    fails(&[t("w", &[4, 4])], std::slice::from_ref(&buf), &[far], RS_ERR_LAYOUT, &["beyond 2^64"]);
    let view = tile(0, 0, &[huge, 8], &[0, 0], &[4, 4], &[4, 1]);
    fails(&[t("w", &[4, 4])], std::slice::from_ref(&buf), &[view], RS_ERR_INVALID, &["2^63"]);
    let out = tile(0, 0, &[4, 4], &[i64::MAX, 0], &[4, 4], &[4, 1]);
    fails(&[t("w", &[4, 4])], std::slice::from_ref(&buf), &[out], RS_ERR_INVALID, &["does not lie"]);
    let mut late = tile(0, 0, &[4, 4], &[0, 0], &[4, 4], &[4, 1]);
    late.byte_offset = u64::MAX - 1;
    fails(&[t("w", &[4, 4])], std::slice::from_ref(&buf), &[late], RS_ERR_LAYOUT, &["beyond 2^64"]);
    let mut end = b("p", u64::MAX - 8, RS_SOURCE, &[4, 4], &[4, 1]);
    end.bytes = 32;
    fails(&[], &[end], &[], RS_ERR_INVALID, &["no block of memory"]);
}

#[test]
fn rows_are_named() {
    let buf = b("p", 4096, RS_SOURCE, &[4, 4], &[4, 1]);
    let ok = tile(0, 0, &[4, 4], &[0, 0], &[4, 4], &[4, 1]);
    let ten = [t("w", &[4, 4])];
    fails(&[t("w", &[2]), t("w", &[2])], &[], &[], RS_ERR_INVALID, &["tensors[1]", "tensors[0]"]);
    fails(&ten, &[buf.clone()], &[TileRow { tensor: 9, ..ok }], RS_ERR_INVALID, &["tiles[0]", "'p'", "9"]);
    fails(&ten, &[buf.clone()], &[TileRow { buffer: 1, ..ok }], RS_ERR_INVALID, &["buffer is 1"]);
    fails(&ten, &[buf.clone()], &[TileRow { transform: 3, ..ok }], RS_ERR_UNSUPPORTED, &["transform 3"]);
    fails(&ten, &[buf.clone()], &[TileRow { transform: 1, ..ok }], RS_ERR_INVALID, &["transform 1", "only a target"]);
    let whole = BufferRow { role: RS_TARGET, dtype: rs_dtype_t { code: 0, bits: 16, lanes: 1 }, ..buf.clone() };
    fails(&ten, &[whole], &[TileRow { transform: 1, ..ok }], RS_ERR_MISMATCH, &["code 0, bits 16", "transform 1"]);
    fails(&ten, &[buf.clone()], &[TileRow { rank: 9, ..ok }], RS_ERR_INVALID, &["rank is 9"]);
    fails(&ten, &[buf.clone()], &[TileRow { stride: arr(&[-4, 1]), ..ok }], RS_ERR_INVALID, &["stride[0] is -4"]);
    fails(&ten, &[buf.clone()], &[TileRow { stride: arr(&[3, 1]), ..ok }], RS_ERR_LAYOUT, &["nest"]);
    fails(&ten, &[buf.clone()], &[TileRow { byte_offset: 1, ..ok }], RS_ERR_INVALID, &["multiple"]);
    fails(&ten, &[buf.clone()], &[TileRow { extent: arr(&[4, 0]), ..ok }], RS_ERR_INVALID, &["without elements"]);
    fails(&ten, &[BufferRow { role: 4, ..buf.clone() }], &[], RS_ERR_INVALID, &["role is 4"]);
    fails(&ten, &[BufferRow { flags: 2, ..buf.clone() }], &[], RS_ERR_INVALID, &["0x2"]);
    fails(&ten, &[BufferRow { bytes: 31, ..buf.clone() }], &[], RS_ERR_LAYOUT, &["31 bytes"]);
    fails(&ten, &[BufferRow { strides: vec![-4, 1], ..buf.clone() }], &[], RS_ERR_INVALID, &["strides[0] is -4"]);
    fails(&ten, &[BufferRow { strides: vec![3, 1], ..buf.clone() }], &[], RS_ERR_LAYOUT, &["nest"]);
    let fp4 = rs_dtype_t { code: 17, bits: 4, lanes: 1 };
    fails(&ten, &[BufferRow { dtype: fp4, ..buf }], &[], RS_ERR_UNSUPPORTED, &["bits 4"]);
}

#[test]
fn ten_thousand_tiles_of_one_buffer() {
    // Columns, whose spans of memory all interleave: looked at pair by pair this would take minutes.
    const N: i64 = 10_000;
    let buffers = [b("p", 4096, RS_TARGET, &[16, N], &[N, 1])];
    let mut tiles: Vec<TileRow> = (0..N).map(|c| tile(0, c as u64, &[16, N], &[0, c], &[16, 1], &[N, 1])).collect();
    Layout::new(&[t("w", &[16, N])], &buffers, &tiles).unwrap();
    tiles[77].byte_offset = 78 * 2;
    fails(&[t("w", &[16, N])], &buffers, &tiles, RS_ERR_LAYOUT, &["tiles[77]", "tiles[78]", "32 bytes"]);
}
