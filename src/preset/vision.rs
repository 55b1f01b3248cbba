//! The vision tower of Qwen2.5-VL, as each framework holds it: before its layers, a layer, and the merger after them.
//!
//! From vLLM 0.32: models/qwen2_5_vl.py; mbridge 0.15: models/qwen2_5_vl; MindSpeed-MM: models/vision.
#![forbid(unsafe_code)]

use super::cut;
use super::model::{Part, Vision, names};
use super::shard::{MERGER, PATCH, Shard};
use super::side::Param;

/// A framework's names: of patch_embed, what a layer's begin with, in a layer its norms and linear layers, the merger's norm and linear
/// layers.
pub struct Names {
    patch: &'static str,
    /// What stands before a layer's number.
    pub layers: &'static str,
    norms: [&'static str; 2],
    linear: [&'static str; 4],
    merger_norm: &'static str,
    merger: [&'static str; 2],
    /// Whether q, k and v of each head lie together.
    grouped: bool,
}

/// vLLM's.
pub const VLLM: Names = Names {
    patch: names::PATCH,
    layers: "visual.blocks.",
    norms: names::VISION_NORMS,
    linear: ["attn.qkv", "attn.proj", "mlp.gate_up_proj", "mlp.down_proj"],
    merger_norm: names::MERGER_NORM,
    merger: ["visual.merger.mlp.0", "visual.merger.mlp.2"],
    grouped: false,
};

/// In a layer of Megatron's.
const MEGATRON: [&str; 4] = ["self_attention.linear_qkv", "self_attention.linear_proj", "mlp.linear_fc1", "mlp.linear_fc2"];

/// mbridge's, with Transformer-Engine's layers.
pub const MBRIDGE: Names = Names {
    patch: "vision_model.patch_embed.proj.weight",
    layers: "vision_model.decoder.layers.",
    norms: ["self_attention.linear_qkv.layer_norm_weight", "mlp.linear_fc1.layer_norm_weight"],
    linear: MEGATRON,
    merger_norm: "vision_model.decoder.final_layernorm.weight",
    merger: ["vision_model.projection.encoder.linear_fc1", "vision_model.projection.encoder.linear_fc2"],
    grouped: true,
};

/// The same with local layers.
pub const MBRIDGE_LOCAL: Names = Names { norms: MINDSPEED.norms, ..MBRIDGE };

/// MindSpeed-MM's, whose layers are local.
pub const MINDSPEED: Names = Names {
    patch: "image_encoder.encoder.patch_embed.proj.weight",
    layers: "image_encoder.encoder.blocks.layers.",
    norms: ["input_layernorm.weight", "pre_mlp_layernorm.weight"],
    linear: MEGATRON,
    merger_norm: "image_encoder.projector.layernorm.weight",
    merger: ["image_encoder.projector.encoder.linear_fc1", "image_encoder.projector.encoder.linear_fc2"],
    grouped: true,
};

/// A shard's parameters of one of the vision tower's sections, under a framework's names.
pub fn params(vision: &Vision, section: usize, shard: &Shard<'_>, of: &Names) -> Vec<Param> {
    let both = |name: &str| [format!("{name}.weight"), format!("{name}.bias")];
    let row_parallel = |name: &str, tensors: [&str; 2]| {
        let [weight, bias] = both(name);
        [shard.columns(&weight, tensors[0]), shard.whole(&bias, tensors[1])]
    };
    if section == PATCH {
        return vec![shard.whole(of.patch, names::PATCH)];
    }
    if section == MERGER {
        let [weight, bias] = both(of.merger[0]);
        let mut out = vec![
            shard.whole(of.merger_norm, names::MERGER_NORM),
            shard.rows(&weight, names::MERGER_IN[0]),
            shard.rows(&bias, names::MERGER_IN[1]),
        ];
        out.extend(row_parallel(of.merger[1], names::MERGER_OUT));
        return out;
    }
    let [qkv, proj, fc1, fc2] = of.linear;
    let (n, t) = (vision.hidden, shard.t);
    let fused = |param: &str, i: usize, width: &[u64]| {
        let heads = [vision.heads, n / vision.heads];
        let cut = cut::qkv_fused(shard.kind(names::VISION_QKV[i]), heads, width.iter().product(), of.grouped, shard.r, t);
        Param::new(param, &[&[3 * n / t], width].concat(), [cut])
    };
    let mut out = vec![shard.whole(of.norms[0], names::VISION_NORMS[0]), shard.whole(of.norms[1], names::VISION_NORMS[1])];
    let [weight, bias] = both(qkv);
    out.extend([fused(&weight, 0, &[n]), fused(&bias, 1, &[])]);
    out.extend(row_parallel(proj, names::VISION_O));
    let glu = |param: &str, i: usize| shard.glu(param, names::VISION_GATE[i], names::VISION_UP[i]);
    let [weight, bias] = both(fc1);
    out.extend([glu(&weight, 0), glu(&bias, 1)]);
    out.extend(row_parallel(fc2, names::VISION_DOWN));
    out
}

/// The same as the Hugging Face module has them, whole on each shard.
pub fn whole(section: usize, shard: &Shard<'_>) -> Vec<Param> {
    let here = |name: &str| match shard.part {
        Part::Once => name.starts_with(if section == PATCH { "visual.patch_embed." } else { "visual.merger." }),
        _ => true,
    };
    let kinds = shard.model.kinds.iter().filter(|k| k.part == shard.part && here(&k.name));
    kinds.map(|k| shard.whole(&k.name, &k.name)).collect()
}
