//! A plan as JSON, for people and tests.
#![forbid(unsafe_code)]

use super::rounds::messages;
use super::{Piece, Plan, index};
use serde_json::{Value, json};

/// Bytes and messages by peer, at `message` bytes a message.
pub fn peers(plan: &Plan, message: u64) -> Vec<Value> {
    let count = |list: &[Piece]| messages(list.iter().cloned(), message).len();
    let line = |p: &super::Peer| {
        let (sent, received) = p.wire_bytes();
        json!({"rank": p.rank, "sent": sent, "received": received, "messages_out": count(&p.out), "messages_in": count(&p.into)})
    };
    plan.peers.iter().map(line).collect()
}

/// A piece's tensor, box and bytes; the caller adds the two ends.
pub fn piece(p: &Piece, name: &str, shape: &[u64]) -> Value {
    let region = match p.ranges(shape) {
        Some(r) => json!(r),
        None => {
            let (first, last) = p.ends();
            json!({"first": index(first, shape), "last": index(last, shape), "elements": p.bytes() / u64::from(p.item)})
        }
    };
    json!({"tensor": name, "box": region, "bytes": p.bytes()})
}
