//! What a hostile rank says: its record, its table, how its planning went, the headers and ends of two syncs, with the fuzzer's changes;
//! and statuses of a communicator that fails when it likes.
#![no_main]

use libfuzzer_sys::fuzz_target;
use reshard::abi::*;
use reshard::ffi::api::*;
use reshard_fuzz::peers::{Peers, container};
use reshard_fuzz::{describe, ok, sized, within_budget};
use std::ptr;

fuzz_target!(|data: &[u8]| within_budget(data.len(), || one(data)));

fn one(data: &[u8]) {
    let Some((&choice, edits)) = data.split_first() else { return };
    let own = usize::from(choice / 8);
    let peers = Peers::new(edits);
    let (container, _memory) = container(&peers, own, 0);
    let other = peers.export(own + usize::from(choice % 4), 1);
    peers.says(&other, choice & 4 != 0);
    // SAFETY: alive until destroyed; whole structs; 16 bytes of room.
    unsafe {
        if choice & 4 != 0 {
            assert!(ok(rs_container_import(container, other.as_ptr().cast(), other.len())));
        }
        if ok(rs_container_connect(container)) {
            for (version, flags) in [(1, 0), (2, RS_SYNC_VERIFY)] {
                ok(rs_sync_weights(container, &rs_sync_t { version, flags, ..sized() }));
                ok(rs_container_poll(container));
            }
            let mut number = [0u8; 16];
            ok(rs_fingerprint(container, RS_SOURCE, ptr::null(), number.as_mut_ptr()));
            describe(container);
        }
        rs_container_destroy(container);
    }
}
