//! A world spec's JSON, with the model's config.json in it: read, told about in all ways, and laid out for a rank.
#![no_main]

use libfuzzer_sys::fuzz_target;
use reshard_fuzz::specs::look;
use reshard_fuzz::within_budget;

// The first byte chooses the rank.
fuzz_target!(|data: &[u8]| within_budget(data.len(), || {
    let Some((&rank, spec)) = data.split_first() else { return };
    look(spec, i32::from(rank as i8) % 20);
}));
