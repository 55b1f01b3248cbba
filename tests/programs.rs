//! Programs in C, C++ and Python against the shared library, as its users write them.

mod toolchain;

use std::process::Command;
use toolchain::{compile, library, library_folder, program, root, scratch, succeeds};

#[test]
fn dlclose_unmaps_the_library() {
    if library_folder("unload").is_none() {
        return;
    }
    // Not linked against the library: it loads it.
    let out = scratch("unload");
    let mut cc = compile("cc", &["-std=c11", "-D_GNU_SOURCE"], &root().join("tests/programs/unload.c"));
    cc.arg("-o").arg(&out).args(["-ldl", "-lpthread"]);
    succeeds(&mut cc);
    assert_eq!(succeeds(Command::new(&out).arg(library())), "unloaded\n");
}

#[test]
fn the_cpp_handles() {
    let Some(folder) = library_folder("handles") else { return };
    let exe = program("c++", &["-std=c++17", "-g"], "tests/programs/handles.cpp", &folder, "handles");
    assert_eq!(succeeds(&mut Command::new(exe)), "done\n");
}

/// The caller's communicator and device, plain and under the sanitizers.
#[test]
fn own_pipes() {
    let Some(folder) = library_folder("own_pipes") else { return };
    for (name, options) in [
        ("own_pipes", &["-std=c99", "-g"][..]),
        ("own_pipes_sanitized", &["-std=c99", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]),
    ] {
        let exe = program("cc", options, "cpp_examples/own_pipes.c", &folder, name);
        let sanitized = toolchain::symbols(&exe, &[]).contains("__asan_init");
        assert_eq!(sanitized, name.ends_with("sanitized"));
        let said = succeeds(&mut Command::new(exe));
        assert_eq!(said, "two versions arrived, then a rank died and the others knew\n");
    }
}

/// Nothing but Python's standard library and the shared library.
#[test]
fn python_by_ctypes() {
    let Some(folder) = library_folder("python") else { return };
    let script = root().join("tests/programs/python_ctypes.py");
    let said = succeeds(
        Command::new("python3").arg("-B").arg(script).arg(folder.join("libreshard.so")).arg(root().join("include/reshard.h")),
    );
    assert_eq!(said, "ok\n");
}
