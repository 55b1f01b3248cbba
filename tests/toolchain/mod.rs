//! C and C++ compilers for tests, and the shared library that `cargo test` has built.
#![allow(dead_code)] // Each test uses a part.

use std::env;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

/// Every warning is an error.
pub const STRICT: [&str; 4] = ["-Wall", "-Wextra", "-Wpedantic", "-Werror"];

/// The repository.
pub fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// A file or folder that tests may make, named so that two of them do not meet.
pub fn scratch(name: &str) -> PathBuf {
    Path::new(env!("CARGO_TARGET_TMPDIR")).join(name)
}

/// The shared library of this very build.
pub fn library() -> PathBuf {
    let exe = env::current_exe().expect("this program's path");
    let path = exe.parent().expect("its folder").join("libreshard.so");
    assert!(path.exists(), "{} is not there: cargo test builds it beside its tests", path.display());
    path
}

/// A folder with the library under the name that programs ask the loader for. `None` where it was built with the address sanitizer:
/// it loads into programs with Rust's sanitizer runtime only.
pub fn library_folder(test: &str) -> Option<PathBuf> {
    let library = library();
    if symbols(&library, &[]).contains("__asan_init") {
        eprintln!("{test}: the library is sanitized, not run");
        return None;
    }
    let folder = scratch(&format!("{test}.lib"));
    fs::create_dir_all(&folder).expect("a folder");
    let soname = format!("libreshard.so.{}", reshard::abi::RS_ABI);
    for name in [soname.as_str(), "libreshard.so"] {
        let link = folder.join(name);
        let _ = fs::remove_file(&link);
        std::os::unix::fs::symlink(&library, &link).expect("a link");
    }
    Some(folder)
}

/// What `nm -D` says, with more options.
pub fn symbols(library: &Path, options: &[&str]) -> String {
    succeeds(Command::new("nm").arg("-D").args(options).arg(library))
}

/// Compiles `source` with the headers in reach; `options` say the standard and where the output goes.
pub fn compile(compiler: &str, options: &[&str], source: &Path) -> Command {
    let mut command = Command::new(compiler);
    command.args(options).args(STRICT).arg("-I").arg(root().join("include")).arg(source);
    command
}

/// Compiles a program against the shared library in `folder`.
pub fn program(compiler: &str, options: &[&str], source: &str, folder: &Path, name: &str) -> PathBuf {
    let out = scratch(name);
    let rpath = format!("-Wl,-rpath,{}", folder.display());
    let mut command = compile(compiler, options, &root().join(source));
    command.arg("-o").arg(&out).arg("-L").arg(folder).args(["-lreshard", "-lpthread", "-ldl", &rpath]);
    succeeds(&mut command);
    out
}

/// Runs a command that must succeed; what it wrote to standard output.
pub fn succeeds(command: &mut Command) -> String {
    let Output { status, stdout, stderr } = command.output().unwrap_or_else(|e| panic!("{command:?}: {e}"));
    let (out, err) = (String::from_utf8_lossy(&stdout), String::from_utf8_lossy(&stderr));
    assert!(status.success(), "{command:?}: {status}\n{out}\n{err}");
    out.into_owned()
}
