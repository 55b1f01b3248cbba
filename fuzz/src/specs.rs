//! A world spec through the C interface.

use crate::{bytes, ok, sized};
use reshard::abi::*;
use reshard::ffi::api::*;
use std::ffi::{CStr, CString, c_char};
use std::ptr;

/// Longest description of one rank's parameters, in bytes, with which the plans are asked for too. They take time and memory in
/// proportion to tensors and ranks, which a spec of a few hundred bytes may give many of.
const SMALL: usize = 1 << 20;

/// Reads a spec, asks for all that it tells, and binds nothing.
pub fn look(spec: &[u8], rank: i32) {
    let spec: Vec<u8> = spec.iter().copied().take_while(|&b| b != 0).collect();
    let spec = CString::new(spec).expect("no NUL");
    let mut preset = ptr::null_mut();
    // SAFETY: a string; a place for the result.
    if !ok(unsafe { rs_preset_create(spec.as_ptr(), rank, &mut preset) }) {
        return;
    }
    let describe = |what: u32| {
        // SAFETY: alive until destroyed; the buffer is as long as it says.
        let text = bytes(|buf, cap, len| unsafe { rs_preset_describe(preset, what, buf.cast::<c_char>(), cap, len) })?;
        let text = CStr::from_bytes_until_nul(&text).expect("a NUL").to_str().expect("UTF-8");
        assert!(text.starts_with('{') && text.ends_with('}'));
        Some(text.len())
    };
    if describe(RS_DESCRIBE_LAYOUT).is_some_and(|n| n <= SMALL) {
        describe(RS_DESCRIBE_PLAN);
        describe(RS_DESCRIBE_WORLD);
    }
    describe(0);
    let mut layout: rs_layout_t = sized();
    // SAFETY: as above.
    unsafe {
        ok(rs_preset_layout(preset, &mut layout));
        rs_preset_destroy(preset);
    }
}
