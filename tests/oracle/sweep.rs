//! Runs a test over many seeds on two threads and tells the smallest case that fails.

use super::model::Case;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};

/// Failures after which no more cases are begun.
const ENOUGH: usize = 12;

fn env(name: &str) -> Option<u64> {
    std::env::var(name).ok().map(|text| text.parse().unwrap_or_else(|e| panic!("{name}={text}: {e}")))
}

/// `RESHARD_CASES` cases, by default 10,000, divided by `share`: seeds 0, 1, ... Or the one of `RESHARD_SEED`. `test` says what was
/// wrong with the case that it made of the seed.
pub fn sweep(share: u64, test: impl Fn(u64) -> Result<(), (Case, String)> + Sync) {
    let (first, end) = match env("RESHARD_SEED") {
        Some(seed) => (seed, seed + 1),
        None => (0, env("RESHARD_CASES").unwrap_or(10_000).div_ceil(share)),
    };
    let (next, failures) = (AtomicU64::new(first), Mutex::new(Vec::new()));
    let work = || {
        while failures.lock().unwrap().len() < ENOUGH {
            let seed = next.fetch_add(1, Ordering::Relaxed);
            if seed >= end {
                break;
            }
            match catch_unwind(AssertUnwindSafe(|| test(seed))) {
                Ok(Ok(())) => {}
                Ok(Err((case, text))) => failures.lock().unwrap().push((case.size(), seed, text, case.to_string())),
                Err(_) => failures.lock().unwrap().push((usize::MAX, seed, "a panic, printed above".into(), String::new())),
            }
        }
    };
    std::thread::scope(|scope| {
        scope.spawn(work);
        scope.spawn(work);
    });
    let mut failures = failures.into_inner().unwrap();
    failures.sort();
    if let Some((_, smallest, _, case)) = failures.first() {
        let texts: Vec<String> = failures.iter().map(|(_, seed, text, _)| format!("seed {seed}: {text}")).collect();
        panic!("{}\nthe smallest of them, again with RESHARD_SEED={smallest}:\n{case}", texts.join("\n"));
    }
}
