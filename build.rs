//! Gives libreshard.so its SONAME: the number of the binary interface, not the version of the crate.

use std::fs;

fn main() {
    println!("cargo::rerun-if-changed=src/abi.rs");
    let abi = fs::read_to_string("src/abi.rs").expect("src/abi.rs");
    let number = abi
        .lines()
        .find_map(|l| l.strip_prefix("pub const RS_ABI: u32 = ")?.strip_suffix(';'))
        .expect("src/abi.rs holds the line `pub const RS_ABI: u32 = N;`");
    println!("cargo::rustc-cdylib-link-arg=-Wl,-soname,libreshard.so.{number}");
}
