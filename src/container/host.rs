//! Which host this is.
#![forbid(unsafe_code)]

use xxhash_rust::xxh3::Xxh3;

/// A hash of the boot id and the network, pid and ipc namespaces: ranks with the same number can share memory. Containers of one host
/// share a boot id, so that alone would not do.
pub fn host_id() -> u64 {
    let mut hash = Xxh3::new();
    if let Ok(boot) = std::fs::read("/proc/sys/kernel/random/boot_id") {
        hash.update(&boot);
    }
    for ns in ["net", "pid", "ipc"] {
        if let Ok(link) = std::fs::read_link(format!("/proc/self/ns/{ns}")) {
            hash.update(link.as_os_str().as_encoded_bytes());
        }
    }
    hash.digest()
}
