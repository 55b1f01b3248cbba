//! Layouts of frameworks by name: a world spec (a model's config.json, and how each side cuts it) says what every rank holds, in closed
//! form.
//!
//! [`spec`] reads the JSON. [`model`] turns the Hugging Face config ([`model::config`]) into *kinds* of logical tensors; all layers of a
//! type have the same. Each framework ([`megatron`], [`vllm`], [`hf`]) says what a [`side`] looks like: which ranks ([`mesh`]) hold which
//! layers, under which names, and which boxes of which kinds ([`cut`], [`shard`], [`experts`], [`vision`]) a shard of them holds.
//! [`world`] puts both sides together for a planner, [`bind`] gives a rank's parameters their memory, and from them finds out what the
//! spec left open ([`variant`]).
//!
//! The only place that knows models, frameworks and parallelisms. Must not know plans, devices or communicators.
#![forbid(unsafe_code)]

pub mod bind;
pub mod cut;
pub mod experts;
pub mod hf;
pub mod left_out;
pub mod megatron;
pub mod mesh;
pub mod model;
pub mod pipeline;
pub mod shard;
pub mod side;
pub mod spec;
pub mod variant;
pub mod vision;
pub mod vllm;
pub mod world;
