//! Megatron's parameters, as `named_parameters()` of each model chunk lists them.
//!
//! From Megatron-core 0.12 to 0.16: models/gpt/gpt_layer_specs.py (names of both specs), tensor_parallel/layers.py,
//! transformer/attention.py (order of linear_qkv), transformer/mlp.py, parallel_state.py (order of ranks), training/tokenizer
//! (vocabulary padding). Context and sequence parallelism change no parameter.
#![forbid(unsafe_code)]

use super::cut::{self, Heads};
use super::mesh::{Axis, Mesh};
use super::model::{Model, names};
use super::pipeline::{Chunk, Placement};
use super::side::{Param, Parts, Section, Shard, Slot, Unused};
use super::spec::{List, Ranks, one, size};
use crate::abi::*;
use crate::error::{Result, bail};
use serde::{Deserialize, Serialize};

/// Members of a side of the framework `megatron`.
#[derive(Debug, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct Options {
    ranks: Ranks,
    #[serde(default = "one")]
    tensor_model_parallel_size: u64,
    #[serde(default = "one")]
    pipeline_model_parallel_size: u64,
    #[serde(default)]
    virtual_pipeline_model_parallel_size: Option<u64>,
    #[serde(default = "one")]
    context_parallel_size: u64,
    /// Default: what the ranks give.
    #[serde(default)]
    data_parallel_size: Option<u64>,
    #[serde(default)]
    use_tp_pp_dp_mapping: bool,
    #[serde(default)]
    transformer_impl: Impl,
    #[serde(default)]
    num_layers_in_first_pipeline_stage: Option<u64>,
    #[serde(default)]
    num_layers_in_last_pipeline_stage: Option<u64>,
    #[serde(default)]
    account_for_embedding_in_pipeline_split: bool,
    #[serde(default)]
    account_for_loss_in_pipeline_split: bool,
    #[serde(default)]
    pipeline_model_parallel_layout: Option<String>,
    #[serde(default)]
    num_layer_list: Option<List>,
    #[serde(default)]
    noop_layers: Option<List>,
    #[serde(default = "divisor")]
    make_vocab_size_divisible_by: u64,
    #[serde(default)]
    padded_vocab_size: Option<u64>,
    #[serde(default)]
    params_dtype: Option<String>,
}

/// Whose layers; it decides where norms are.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, Serialize)]
#[serde(rename_all = "snake_case")]
enum Impl {
    #[default]
    TransformerEngine,
    Local,
}

fn divisor() -> u64 {
    128
}

/// What each rank holds; `target`: whether the side is written.
pub fn parts(model: &Model, o: &Options, target: bool) -> Result<Parts> {
    let tp = size("tensor_model_parallel_size", o.tensor_model_parallel_size)?;
    let pp = size("pipeline_model_parallel_size", o.pipeline_model_parallel_size)?;
    let cp = size("context_parallel_size", o.context_parallel_size)?;
    let vp = o.virtual_pipeline_model_parallel_size.map(|n| size("virtual_pipeline_model_parallel_size", n)).transpose()?;
    let one_copy = tp * pp * cp;
    let dp = o.data_parallel_size.unwrap_or(o.ranks.0.len() as u64 / one_copy).max(1);
    let mesh = if o.use_tp_pp_dp_mapping {
        Mesh::new(tp, &[(Axis::Copy, cp), (Axis::Stage, pp), (Axis::Copy, size("data_parallel_size", dp)?)])
    } else {
        Mesh::new(tp, &[(Axis::Copy, cp), (Axis::Copy, size("data_parallel_size", dp)?), (Axis::Stage, pp)])
    };
    for (what, n) in [("num_attention_heads", model.heads), ("intermediate_size", model.ffn)] {
        if n % tp != 0 {
            bail!(RS_ERR_UNSUPPORTED, "tensor_model_parallel_size {tp}: Megatron wants it to divide {what} {n}");
        }
    }
    if model.kv_heads % tp != 0 && tp % model.kv_heads != 0 {
        bail!(
            RS_ERR_UNSUPPORTED,
            "tensor_model_parallel_size {tp}: Megatron wants num_query_groups (num_key_value_heads) {} to be a multiple of it, or from \
             Megatron-core 0.16 a divisor",
            model.kv_heads
        );
    }
    if (model.heads + 2 * model.kv_heads) * model.head_dim % tp != 0 {
        bail!(
            RS_ERR_UNSUPPORTED,
            "tensor_model_parallel_size {tp}: Megatron wants it to divide the {} rows of linear_qkv, (num_attention_heads {} + 2 * \
             num_query_groups {}) * head_dim {}",
            (model.heads + 2 * model.kv_heads) * model.head_dim,
            model.heads,
            model.kv_heads,
            model.head_dim
        );
    }
    let padded = padded(model, o, tp)?;
    let chunks = Placement {
        layers: model.layers,
        stages: pp,
        chunks: vp,
        ends: [o.num_layers_in_first_pipeline_stage, o.num_layers_in_last_pipeline_stage],
        account: [o.account_for_embedding_in_pipeline_split, o.account_for_loss_in_pipeline_split],
        layout: o.pipeline_model_parallel_layout.as_deref(),
        list: o.num_layer_list.as_ref().map(|l| &l.0[..]),
        noops: o.noop_layers.as_ref().map_or(&[], |l| &l.0[..]),
    }
    .chunks()?;
    // The last stage has an embedding of its own for its output layer. Megatron keeps it equal to the first stage's, which is read.
    let copy = model.tied && pp > 1;
    let unused = Unused {
        stage: pp - 1,
        chunk: chunks[0].len() as u32 - 1,
        name: "output_layer.weight".to_string(),
        shape: vec![padded / tp, model.hidden],
    };
    Ok(Parts {
        mesh,
        ranks: o.ranks.0.clone(),
        dtype: super::spec::dtype("params_dtype", o.params_dtype.as_deref(), model)?,
        stages: chunks.iter().map(|c| slots(c)).collect(),
        shards: (0..tp).map(|r| shard(model, o.transformer_impl, padded, copy && target, r, tp)).collect(),
        unused: if copy && !target { vec![unused] } else { vec![] },
        strip: "module.",
    })
}

/// Rows of the vocabulary over all shards.
fn padded(model: &Model, o: &Options, tp: u64) -> Result<u64> {
    let Some(padded) = o.padded_vocab_size else {
        return Ok(model.vocab.next_multiple_of(size("make_vocab_size_divisible_by", o.make_vocab_size_divisible_by)? * tp));
    };
    let padded = size("padded_vocab_size", padded)?;
    if padded < model.vocab || padded % tp != 0 {
        bail!(
            RS_ERR_INVALID,
            "padded_vocab_size {padded} must be at least vocab_size {} and a multiple of tensor_model_parallel_size {tp}",
            model.vocab
        );
    }
    Ok(padded)
}

fn slots(chunks: &[Chunk]) -> Vec<Slot> {
    let mut out = vec![];
    for (i, chunk) in (0..).zip(chunks) {
        if chunk.front {
            out.push(Slot::new(Section::Front, 0, i, String::new()));
        }
        for (local, layer) in chunk.layers.iter().enumerate() {
            out.extend(layer.map(|l| Slot::new(Section::Layer, l, i, format!("decoder.layers.{local}."))));
        }
        if chunk.back {
            out.push(Slot::new(Section::Back, 0, i, String::new()));
        }
    }
    out
}

fn shard(model: &Model, spec: Impl, padded: u64, copy: bool, r: u64, t: u64) -> Shard {
    let (h, kind) = (model.hidden, |name: &str| model.kind(name));
    let heads = Heads { q: model.heads, kv: model.kv_heads, dim: model.head_dim };
    let vocab = |param: &str, name: &str| Param::new(param, &[padded / t, h], cut::vocab(kind(name), model.vocab, padded, h, r, t));
    let norm = |param: &str, name: &str| {
        let kind = kind(name);
        let n = model.kinds[kind].shape[0];
        Param::new(param, &[n], cut::rows(kind, n, 0, n, 1, 0))
    };
    let [input_norm, mlp_norm] = match spec {
        Impl::TransformerEngine => ["self_attention.linear_qkv.layer_norm_weight", "mlp.linear_fc1.layer_norm_weight"],
        Impl::Local => ["input_layernorm.weight", "pre_mlp_layernorm.weight"],
    };
    let rows = (heads.q + 2 * heads.kv) * heads.dim / t;
    let q = heads.q * heads.dim;
    let mut layer = vec![
        norm(input_norm, names::INPUT_NORM),
        Param::new("self_attention.linear_qkv.weight", &[rows, h], cut::qkv_grouped(names::QKV.map(kind), heads, h, r, t)),
    ];
    if model.qkv_bias {
        let cuts = cut::qkv_grouped(names::QKV_BIAS.map(kind), heads, 1, r, t);
        layer.push(Param::new("self_attention.linear_qkv.bias", &[rows], cuts));
    }
    if model.qk_norm {
        layer.push(norm("self_attention.q_layernorm.weight", names::Q_NORM));
        layer.push(norm("self_attention.k_layernorm.weight", names::K_NORM));
    }
    layer.extend([
        Param::new("self_attention.linear_proj.weight", &[h, q / t], [cut::columns(kind(names::O), h, q, r, t)]),
        norm(mlp_norm, names::POST_NORM),
        Param::new(
            "mlp.linear_fc1.weight",
            &[2 * model.ffn / t, h],
            cut::glu([names::GATE, names::UP].map(kind), model.ffn, h, r, t),
        ),
        Param::new("mlp.linear_fc2.weight", &[h, model.ffn / t], [cut::columns(kind(names::DOWN), h, model.ffn, r, t)]),
    ]);
    let mut back = vec![norm("decoder.final_layernorm.weight", names::NORM)];
    if !model.tied {
        back.push(vocab("output_layer.weight", names::HEAD));
    } else if copy {
        back.push(vocab("output_layer.weight", names::EMBED));
    }
    Shard { front: vec![vocab("embedding.word_embeddings.weight", names::EMBED)], layer, back }
}
