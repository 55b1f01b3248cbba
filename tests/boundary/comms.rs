//! Communicators of other hosts and of two: what is refused, with which words.

use crate::hub::{Hub, comm, honest};
use crate::tables::*;
use reshard::abi::*;
use reshard::ffi::api::*;
use std::ffi::CString;
use std::ptr::{null, null_mut};
use std::sync::atomic::Ordering::Relaxed;

fn nixl(config: &str, status: rs_status_t, words: &[&str]) {
    let (config, mut out) = (CString::new(config).unwrap(), null_mut());
    // SAFETY: a text that ends with a NUL; `out` is a place for a handle.
    fails(unsafe { rs_comm_nixl(config.as_ptr(), 0, 1, &mut out) }, status, words);
    assert!(out.is_null(), "nothing is written on failure");
}

#[test]
fn a_config_that_is_wrong_is_refused_by_the_name_of_its_member() {
    nixl("", RS_ERR_INVALID, &["config_json", "EOF"]);
    nixl("{}", RS_ERR_INVALID, &["config_json", "address"]);
    nixl(r#"{"address": 4711}"#, RS_ERR_INVALID, &["config_json", "address", "expected a string"]);
    nixl(r#"{"address": "127.0.0.1:1", "adress": ""}"#, RS_ERR_INVALID, &["config_json", "unknown field `adress`", "library"]);
    nixl(
        r#"{"address": "127.0.0.1:1", "params": {"num_workers": 2}}"#,
        RS_ERR_INVALID,
        &["params.num_workers", "expected a string"],
    );
    let mut out = null_mut();
    // SAFETY: NULL, and ranks that there are not, are what is tested.
    unsafe {
        fails(rs_comm_nixl(null(), 0, 1, &mut out), RS_ERR_INVALID, &["config_json is NULL"]);
        fails(rs_comm_nixl(c"{}".as_ptr(), 1, 1, &mut out), RS_ERR_INVALID, &["rank 1 of a world of 1"]);
        fails(rs_comm_nixl(c"{}".as_ptr(), 0, 1, null_mut()), RS_ERR_INVALID, &["out is NULL"]);
    }
    assert!(out.is_null(), "nothing is written on failure");
}

#[test]
fn without_nixl_the_call_says_how_to_get_it() {
    let words = ["no NIXL", "/nowhere/libnixl_capi.so", "nixl-cu12", "`library`"];
    nixl(r#"{"address": "127.0.0.1:1", "library": "/nowhere/libnixl_capi.so"}"#, RS_ERR_UNSUPPORTED, &words);
    // A library that is another one.
    nixl(
        r#"{"address": "127.0.0.1:1", "library": "libc.so.6"}"#,
        RS_ERR_UNSUPPORTED,
        &["nixl_capi_create_configured_agent", "NIXL 1.5"],
    );
}

#[test]
fn two_that_do_not_fit_are_refused_by_kind() {
    let hub = Hub::new(1);
    let wide = comm(&hub, 0, honest);
    let (mut near, mut out) = (null_mut(), null_mut());
    // SAFETY: live handles, NULL where that is tested; places for handles.
    unsafe {
        ok(rs_comm_loopback(77_001, 0, 1, &mut near));
        fails(rs_comm_composite(null(), wide, &mut out), RS_ERR_INVALID, &["near", "comm is NULL"]);
        fails(rs_comm_composite(near, null(), &mut out), RS_ERR_INVALID, &["wide", "comm is NULL"]);
        fails(rs_comm_composite(near, wide, null_mut()), RS_ERR_INVALID, &["out is NULL"]);
        fails(rs_comm_composite(wide, wide, &mut out), RS_ERR_UNSUPPORTED, &["near is 'custom'", "rs_comm_local()"]);
        fails(rs_comm_composite(near, near, &mut out), RS_ERR_UNSUPPORTED, &["wide is 'loopback'", "rs_comm_nixl()"]);
        assert!(out.is_null(), "nothing is written on failure");
        ok(rs_comm_composite(near, wide, &mut out));
        rs_comm_destroy(wide);
        assert_eq!(hub.released.load(Relaxed), 0, "it holds a reference of its own");
        rs_comm_destroy(out);
        assert_eq!(hub.released.load(Relaxed), 1);
        rs_comm_destroy(near);
    }
}

#[test]
fn near_ranks_in_another_order_are_refused_everywhere() {
    let hub = Hub::new(3);
    let errors: Vec<(rs_status_t, String)> = std::thread::scope(|scope| {
        let rank = |r: i32| {
            let hub = &hub;
            move || {
                let (wide, mut near, mut out) = (comm(hub, r as usize, honest), null_mut(), null_mut());
                // SAFETY: live handles, places for handles.
                unsafe {
                    // Ranks 1 and 2 share a host, and count there the other way round.
                    let (number, rank, world) = if r == 0 { (77_002, 0, 1) } else { (77_003, 2 - r, 2) };
                    ok(rs_comm_loopback(number, rank, world, &mut near));
                    let status = rs_comm_composite(near, wide, &mut out);
                    let text = last();
                    rs_comm_destroy(near);
                    rs_comm_destroy(wide);
                    (status, text)
                }
            }
        };
        let threads: Vec<_> = (0..3).map(|r| scope.spawn(rank(r))).collect();
        threads.into_iter().map(|t| t.join().unwrap()).collect()
    });
    for (status, text) in errors {
        assert_eq!(status, RS_ERR_INVALID, "{text}");
        assert!(text.contains("near communicator of rank 1") && text.contains("in another order"), "{text}");
    }
}
