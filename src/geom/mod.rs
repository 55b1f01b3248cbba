//! Boxes and patterns: the whole arithmetic of layouts, in about a dozen operations.
//!
//! A tensor's elements are numbered row-major, a buffer's by their distance from its first. A [`Pattern`] is a grid of elements with
//! its number in both spaces: that is all a tile is once its view has been used to compute the strides. To compare patterns, the
//! space is written in a mixed [`Radix`] (digits, slowest first) in which every pattern is a few axis-parallel boxes, [`Patch`]es.
//! The cut points of that radix are the common refinement of the views in use. On boxes of one radix everything is easy: see
//! [`Region`].
//!
//! Knows integers. Must not know tensors, ranks or memory.
#![forbid(unsafe_code)]

pub mod copy;
pub mod pattern;
pub mod region;

pub use copy::{CopyAxis, StridedCopy};
pub use pattern::{Axis, Patch, Pattern, Radix};
pub use region::{Index, Region};

/// A few extents, origins or strides.
pub type Dims = smallvec::SmallVec<[u64; 4]>;
