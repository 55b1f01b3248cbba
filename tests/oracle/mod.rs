//! Random cases against a brute-force oracle. The library is used through its C functions only; no code of it is shared.

pub mod breakage;
pub mod generate;
pub mod gpu;
pub mod library;
pub mod mailbox;
pub mod model;
pub mod naive;
pub mod nccl;
pub mod place;
pub mod plans;
pub mod run;
pub mod sabotage;
#[allow(dead_code)] // `properties` has its own worlds.
pub mod small;
pub mod sums;
pub mod sweep;
pub mod truth;
pub mod valid;
pub mod views;
pub mod world;
