//! The C boundary, called as C calls it: what is refused and with which words, what a refusal leaves, who may be inside at once.

mod comms;
mod create;
mod handles;
mod hub;
mod presets;
mod ranks;
mod tables;
