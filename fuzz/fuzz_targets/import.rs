//! Another rank's tables, as a caller carries them (rs_container_import) or as that rank sends them at connect, and what is planned
//! from them.
//!
//! The first byte chooses: bytes as they are; a body of the fuzzer's own under a right head; or the valid tables of one of a few
//! layouts with edits, their length and digest put right.
#![no_main]

use libfuzzer_sys::fuzz_target;
use reshard::ffi::api::*;
use reshard_fuzz::peers::{Peers, container};
use reshard_fuzz::{Input, describe, ok, sealed, within_budget};

fuzz_target!(|data: &[u8]| within_budget(data.len(), || one(data)));

fn one(data: &[u8]) {
    let mut input = Input(data);
    let choice = input.byte();
    let own = usize::from(choice >> 3);
    let peers = Peers::new(&[]);
    let (container, _memory) = container(&peers, own, 0);
    let blob = match choice % 8 {
        0 => input.0.to_vec(),
        1 => sealed(1, input.0),
        n => {
            let mut body = peers.export(own + usize::from(n), 1)[32..].to_vec();
            input.edit(&mut body, 24);
            sealed(1, &body)
        }
    };
    // SAFETY: alive until destroyed; the bytes are as many as said.
    unsafe {
        // Where this rank refuses them, they come again as that rank's own.
        let imported = ok(rs_container_import(container, blob.as_ptr().cast(), blob.len()));
        peers.says(&blob, imported);
        if ok(rs_container_connect(container)) {
            describe(container);
        }
        rs_container_destroy(container);
    }
}
