//! libreshard: moves an LLM's weights from a training job into an inference engine, in place.
//!
//! The one idea: a layout is data. A *logical tensor* is a tensor of the Hugging Face checkpoint; a *buffer* is memory of a rank; a
//! *tile* says which box of a tensor lies in which buffer, where, with which strides. Whatever a framework does to its weights is a
//! list of tiles, and a sync copies boxes from tiles to tiles.
//!
//! A module may use only what stands above it in this file; `tests/layers.rs` enforces that.

pub mod abi;
pub mod error;
pub mod convert;
pub mod digest;
pub mod geom;
pub mod layout;
pub mod wire;
pub mod preset;
pub mod plan;
pub mod device;
pub mod comm;
pub mod exec;
pub mod container;
pub mod ffi;
