//! What a compiled caller relies on: sizes, offsets and numbers for ever, exactly the header's functions, each behind the one way in.

mod toolchain;

use reshard::abi::*;
use std::collections::BTreeSet;
use std::fmt::Write;
use std::fs;
use std::mem::{offset_of, size_of};
use toolchain::{compile, library, root, scratch, succeeds, symbols};

/// Checks sizes and offsets here, and gives C's static assertions of the same, where no byte may be left over as padding.
macro_rules! layouts {
    ($($name:ident $size:literal { $($field:ident $offset:literal),* $(,)? })*) => {{
        let mut c = String::new();
        $(
            assert_eq!(size_of::<$name>(), $size, stringify!($name));
            writeln!(c, "CHECK(sizeof({0}) == {1});", stringify!($name), $size).unwrap();
            let mut sum = String::from("0");
            $(
                assert_eq!(offset_of!($name, $field), $offset, concat!(stringify!($name), ".", stringify!($field)));
                writeln!(c, "CHECK(offsetof({0}, {1}) == {2});", stringify!($name), stringify!($field), $offset).unwrap();
                write!(sum, " + sizeof((({0} *)0)->{1})", stringify!($name), stringify!($field)).unwrap();
            )*
            writeln!(c, "CHECK({sum} == sizeof({}));", stringify!($name)).unwrap();
        )*
        c
    }};
}

macro_rules! numbers {
    ($($name:ident $value:literal)*) => {{
        let mut c = String::new();
        $(
            assert_eq!($name as i64, $value, stringify!($name));
            writeln!(c, "CHECK({} == {});", stringify!($name), $value).unwrap();
        )*
        c
    }};
}

#[test]
#[cfg(target_pointer_width = "64")]
fn sizes_offsets_and_numbers() {
    let layouts = layouts! {
        rs_dtype_t 4 { code 0, bits 1, lanes 2 }
        rs_tensor_t 80 { name 0, rank 8, reserved 12, shape 16 }
        rs_buffer_t 176 {
            name 0, data 8, size_bytes 16, device_type 24, device_id 28, role 32, flags 36, dtype 40, ndim 44, shape 48, strides 112,
        }
        rs_tile_t 280 {
            tensor 0, buffer 4, rank 8, transform 12, byte_offset 16, view 24, origin 88, extent 152, stride 216,
        }
        rs_layout_t 80 {
            struct_size 0, tensors 8, tensor_count 16, tensor_size 24, buffers 32, buffer_count 40, buffer_size 48, tiles 56,
            tile_count 64, tile_size 72,
        }
        rs_copy_t 232 {
            src 0, dst 8, run_bytes 16, rank 24, transform 28, src_dtype 32, dst_dtype 36, extent 40, src_stride 104, dst_stride 168,
        }
        rs_device_t 96 {
            struct_size 0, ctx 8, release 16, device_type 24, device_id 28, flags 32, reserved 36, alloc 40, free 48, copy 56,
            event_record 64, event_wait 72, event_query 80, event_destroy 88,
        }
        rs_config_t 80 {
            struct_size 0, abi 8, flags 12, comm 16, device 24, preset 32, host_id 40, staging_bytes 48, host_threads 56, timeout_ms 60,
            name 64, staging 72,
        }
        rs_sync_t 64 {
            struct_size 0, stream 8, version 16, only 24, only_count 32, timeout_ms 40, flags 44, progress 48, progress_user 56,
        }
        rs_param_t 88 {
            struct_size 0, name 8, data 16, size_bytes 24, device_type 32, device_id 36, dtype 40, ndim 44, shape 48, strides 56, role 64,
            model_chunk 68, state 72, reserved 76, version 80,
        }
        rs_comm_local_t 32 { struct_size 0, name 8, rank 16, world 20, timeout_ms 24, flags 28 }
        rs_comm_ops_t 88 {
            struct_size 0, ctx 8, release 16, rank 24, world_size 28, allgather 32, group_begin 40, group_end 48, send 56, recv 64,
            poll 72, abort 80,
        }
        rs_bind_t 72 {
            struct_size 0, name 8, role 16, model_chunk 20, data 24, size_bytes 32, device_type 40, device_id 44, dtype 48, ndim 52,
            shape 56, strides 64,
        }
    };
    let numbers = numbers! {
        RS_ABI 1 RS_MAX_RANK 8 RS_MAX_COPY_RANK 8
        RS_OK 0 RS_IN_PROGRESS 1
        RS_ERR_INVALID -1 RS_ERR_UNKNOWN_FIELD -2 RS_ERR_UNSUPPORTED -3 RS_ERR_NOT_FOUND -4 RS_ERR_AMBIGUOUS -5 RS_ERR_TOO_SMALL -6
        RS_ERR_BUSY -7 RS_ERR_STATE -8 RS_ERR_TORN -9
        RS_ERR_LAYOUT -20 RS_ERR_COVERAGE -21 RS_ERR_MISMATCH -22
        RS_ERR_TIMEOUT -40 RS_ERR_PEER -41 RS_ERR_ABORTED -42 RS_ERR_COMM -43 RS_ERR_DEVICE -44 RS_ERR_MEMORY -45 RS_ERR_INTERNAL -46
        RS_ERR_CORRUPT -47
        RS_SOURCE 1 RS_TARGET 2 RS_BUFFER_PADDED 1 RS_TRANSFORM_NONE 0 RS_TRANSFORM_PLUS_ONE 1 RS_TRANSFORM_MINUS_ONE 2
        RS_DEVICE_CPU 1 RS_DEVICE_CUDA 2 RS_DEVICE_CUDA_HOST 3 RS_DEVICE_CONVERTS 1 RS_LOCAL_READ 1 RS_LOCAL_RING 2
        RS_CONFIG_WATCHDOG 1 RS_CONFIG_RELAY 2 RS_SYNC_VERIFY 1
        RS_PARAM_INITIAL 0 RS_PARAM_SYNCED 1 RS_PARAM_LANDED 2 RS_PARAM_TORN 3
        RS_DESCRIBE_PLAN 1 RS_DESCRIBE_STATS 2 RS_DESCRIBE_LAYOUT 3 RS_DESCRIBE_WORLD 4
        RS_LOG_OFF 0 RS_LOG_ERROR 1 RS_LOG_WARN 2 RS_LOG_INFO 3 RS_LOG_DEBUG 4 RS_LOG_TRACE 5
    };
    // The tables above name every struct and number that there is.
    let abi = fs::read_to_string(root().join("src/abi.rs")).unwrap();
    for line in abi.lines() {
        if let Some(name) = line.strip_prefix("pub const ").and_then(|l| l.split(':').next()) {
            assert!(numbers.contains(&format!("CHECK({name} ==")), "{name} is not checked");
        }
        if let Some(name) = line.strip_prefix("pub struct ").and_then(|l| l.strip_suffix(" {")) {
            assert!(layouts.contains(&format!("CHECK(sizeof({name}) ==")), "{name} is not checked");
        }
    }
    let fatal = "CHECK(!RS_IS_FATAL(RS_OK)); CHECK(!RS_IS_FATAL(RS_ERR_MISMATCH)); CHECK(RS_IS_FATAL(RS_ERR_TIMEOUT)); \
                 CHECK(RS_IS_FATAL(RS_ERR_INTERNAL));";
    let source = scratch("abi_layout.c");
    let text = format!("#include \"reshard.h\"\n#define CHECK(x) _Static_assert(x, #x)\n{layouts}{numbers}{fatal}\n");
    fs::write(&source, text).unwrap();
    succeeds(&mut compile("cc", &["-std=c11", "-fsyntax-only"], &source));
}

/// Names of the header's functions.
fn header_functions() -> BTreeSet<String> {
    let header = fs::read_to_string(root().join("include/reshard.h")).unwrap();
    let prototypes = header.lines().filter(|l| l.starts_with(|c: char| c.is_ascii_lowercase()) && l.ends_with(");"));
    prototypes
        .filter(|l| !l.starts_with("typedef"))
        .map(|l| l[..l.find('(').unwrap()].rsplit([' ', '*']).next().unwrap().into())
        .collect()
}

#[test]
fn the_library_exports_the_headers_functions() {
    let exported = symbols(&library(), &["--defined-only"]);
    let exported: BTreeSet<String> = exported.lines().filter_map(|l| l.split(' ').nth(2)).map(Into::into).collect();
    let expected = [
        "rs_comm_composite",
        "rs_comm_custom",
        "rs_comm_destroy",
        "rs_comm_from_nccl",
        "rs_comm_local",
        "rs_comm_loopback",
        "rs_comm_nccl_init",
        "rs_comm_nixl",
        "rs_container_abort",
        "rs_container_connect",
        "rs_container_create",
        "rs_container_describe",
        "rs_container_destroy",
        "rs_container_export",
        "rs_container_import",
        "rs_container_poll",
        "rs_container_rebind",
        "rs_container_set_comm",
        "rs_fingerprint",
        "rs_get_param",
        "rs_get_param_at",
        "rs_last_error",
        "rs_mem_alloc",
        "rs_mem_free",
        "rs_preset_bind",
        "rs_preset_create",
        "rs_preset_describe",
        "rs_preset_destroy",
        "rs_preset_layout",
        "rs_set_log",
        "rs_status_name",
        "rs_sync_weights",
        "rs_version",
    ];
    let expected: BTreeSet<String> = expected.map(String::from).into();
    assert_eq!(header_functions(), expected, "the header's functions");
    // A sanitized build exports the sanitizer's symbols as well.
    let exported: BTreeSet<String> = exported.into_iter().filter(|s| !s.contains("asan") && !s.contains("san_")).collect();
    assert_eq!(exported, expected, "the library's symbols");
}

/// The exported functions of `ffi/api.rs` and `api_comm.rs` with their bodies, comments left out.
fn exports() -> Vec<(String, String)> {
    let api = ["src/ffi/api.rs", "src/ffi/api_comm.rs"].map(|path| fs::read_to_string(root().join(path)).unwrap()).concat();
    let mut out = vec![];
    for part in api.split("#[unsafe(no_mangle)]").skip(1) {
        let name = part.split("fn ").nth(1).unwrap().split('(').next().unwrap();
        let (_, body) = part.split_once(" {\n").unwrap();
        let body = body.split("\n}\n").next().unwrap();
        let code: Vec<&str> = body.lines().map(str::trim).filter(|l| !l.starts_with("//")).collect();
        out.push((name.to_string(), code.join("\n")));
    }
    out
}

/// Whether `code` is one call of `call`, and nothing beside it.
fn is_one_call(code: &str) -> bool {
    let code = code.strip_suffix(';').unwrap_or(code);
    let Some(inside) = code.strip_prefix("call(").and_then(|c| c.strip_suffix(')')) else { return false };
    let mut depth = 0;
    inside.chars().all(|c| {
        depth += i32::from(c == '(') - i32::from(c == ')');
        depth >= 0
    }) && depth == 0
}

#[test]
fn every_export_goes_the_one_way() {
    let exports = exports();
    let names: BTreeSet<String> = exports.iter().map(|e| e.0.clone()).collect();
    assert_eq!(names, header_functions());
    for (name, body) in &exports {
        // These three answer a constant or a pointer, and cannot fail.
        let plain = match name.as_str() {
            "rs_version" => Some("VERSION"),
            "rs_status_name" => Some("status_name(status).as_ptr()"),
            "rs_last_error" => Some("last_error::text()"),
            _ => None,
        };
        let ok = plain.map_or_else(|| is_one_call(body), |plain| body == plain);
        assert!(ok, "{name} is not one call(...):\n{body}");
        assert!(body.lines().count() <= 6, "{name} does more than to hand over:\n{body}");
    }
    assert!(is_one_call("call(|| a(b))") && !is_one_call("call(|| a); call(|| b)") && !is_one_call("x; call(|| a)"));
}
