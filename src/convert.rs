//! Values that change on the way: casts between floating-point types, and one added or taken away.
//!
//! A conversion belongs to the target: a message carries the source's elements, and whoever writes the target converts them, once.
//! Knows element types. Must not know geometry, tensors or ranks.
#![forbid(unsafe_code)]

use crate::abi::*;
use crate::error::{Result, bail};

/// A type that can be cast.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Float {
    /// IEEE binary32.
    F32,
    /// IEEE binary16.
    F16,
    /// The upper half of a binary32.
    Bf16,
}

impl Float {
    /// From DLPack's code and bits.
    pub fn of(dtype: (u8, u8)) -> Option<Float> {
        match dtype {
            (2, 32) => Some(Float::F32),
            (2, 16) => Some(Float::F16),
            (4, 16) => Some(Float::Bf16),
            _ => None,
        }
    }

    /// Bytes of an element.
    pub fn item(self) -> u32 {
        if self == Float::F32 { 4 } else { 2 }
    }

    /// DLPack's.
    pub fn dtype(self) -> rs_dtype_t {
        let (code, bits) = match self {
            Float::F32 => (2, 32),
            Float::F16 => (2, 16),
            Float::Bf16 => (4, 16),
        };
        rs_dtype_t { code, bits, lanes: 1 }
    }
}

/// What becomes of an element: widened to binary32, one added or taken away there, rounded to the target's type (to nearest, ties to
/// even; infinities stay, NaNs stay NaNs). Without the one, a value is rounded once, or not at all.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Convert {
    /// The source's type.
    pub from: Float,
    /// The target's type.
    pub to: Float,
    /// 1, -1 or 0.
    pub add: i8,
}

impl Convert {
    /// What an element of type `source` needs for a target of type `target`, whose tile has `transform`; `None`: its bytes are copied.
    pub fn between(source: (u8, u8), target: (u8, u8), transform: u32) -> Result<Option<Convert>> {
        let add = match transform {
            RS_TRANSFORM_NONE => 0,
            RS_TRANSFORM_PLUS_ONE => 1,
            RS_TRANSFORM_MINUS_ONE => -1,
            other => {
                bail!(RS_ERR_UNSUPPORTED, "transform {other}: there are RS_TRANSFORM_NONE (0), _PLUS_ONE (1) and _MINUS_ONE (2)")
            }
        };
        if source == target && add == 0 {
            return Ok(None);
        }
        match (Float::of(source), Float::of(target)) {
            (Some(from), Some(to)) => Ok(Some(Convert { from, to, add })),
            _ => bail!(
                RS_ERR_MISMATCH,
                "dtype (code {}, bits {}) cannot become (code {}, bits {}) with transform {transform}: only fp32, fp16 and bf16 are \
                 converted",
                source.0,
                source.1,
                target.0,
                target.1
            ),
        }
    }

    /// RS_TRANSFORM_*.
    pub fn transform(self) -> u32 {
        match self.add {
            0 => RS_TRANSFORM_NONE,
            1 => RS_TRANSFORM_PLUS_ONE,
            _ => RS_TRANSFORM_MINUS_ONE,
        }
    }
}
