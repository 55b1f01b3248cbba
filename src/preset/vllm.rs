//! vLLM's parameters, as `named_parameters()` of a worker's model lists them after loading, unquantised.
//!
//! From vLLM 0.11 to 0.33: model_executor/models/{llama,qwen2,qwen3}.py, layers/linear.py (QKVParallelLinear,
//! MergedColumnParallelLinear, RowParallelLinear), layers/vocab_parallel_embedding.py, distributed/utils.py (get_pp_indices),
//! distributed/parallel_state.py (order of ranks).
#![forbid(unsafe_code)]

use super::cut::{self, Heads};
use super::mesh::{Axis, Mesh};
use super::model::{Model, names};
use super::side::{Param, Parts, Section, Shard, Slot};
use super::spec::{List, Ranks, one, size};
use crate::abi::*;
use crate::error::{Result, bail};
use serde::{Deserialize, Serialize};

/// Members of a side of the framework `vllm`.
#[derive(Debug, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct Options {
    ranks: Ranks,
    #[serde(default = "one")]
    tensor_parallel_size: u64,
    #[serde(default = "one")]
    pipeline_parallel_size: u64,
    #[serde(default = "one")]
    data_parallel_size: u64,
    /// Independent engines.
    #[serde(default = "one")]
    replicas: u64,
    /// Layers of each stage.
    #[serde(default, rename = "VLLM_PP_LAYER_PARTITION")]
    partition: Option<List>,
    /// Vocabularies are padded to a multiple of it.
    #[serde(default = "padding")]
    vocab_padding_size: u64,
    #[serde(default)]
    dtype: Option<String>,
}

fn padding() -> u64 {
    64
}

/// What each rank holds.
pub fn parts(model: &Model, o: &Options) -> Result<Parts> {
    let tp = size("tensor_parallel_size", o.tensor_parallel_size)?;
    let pp = size("pipeline_parallel_size", o.pipeline_parallel_size)?;
    let dp = size("data_parallel_size", o.data_parallel_size)?;
    let replicas = size("replicas", o.replicas)?;
    let padding = size("vocab_padding_size", o.vocab_padding_size)?;
    let padded = model.vocab.next_multiple_of(padding);
    let mut wrong = vec![];
    let mut divides = |what: &str, n: u64| {
        if n % tp != 0 {
            wrong.push(format!("{what} {n}"));
        }
    };
    divides("num_attention_heads", model.heads);
    divides("intermediate_size", model.ffn);
    divides("vocab_size padded by vocab_padding_size to", padded);
    if !wrong.is_empty() {
        bail!(RS_ERR_UNSUPPORTED, "tensor_parallel_size {tp}: vLLM wants it to divide {}", wrong.join(" and "));
    }
    if model.kv_heads % tp != 0 && tp % model.kv_heads != 0 {
        bail!(
            RS_ERR_UNSUPPORTED,
            "tensor_parallel_size {tp}: vLLM wants num_key_value_heads {} to be a multiple or a divisor of it",
            model.kv_heads
        );
    }
    if model.architecture == "Qwen2ForCausalLM" && model.heads * model.head_dim != model.hidden {
        bail!(
            RS_ERR_UNSUPPORTED,
            "model.head_dim {}: vLLM's Qwen2 ignores it and uses hidden_size / num_attention_heads, {}/{}",
            model.head_dim,
            model.hidden,
            model.heads
        );
    }
    Ok(Parts {
        mesh: Mesh::new(tp, &[(Axis::Stage, pp), (Axis::Copy, dp), (Axis::Copy, replicas)]),
        ranks: o.ranks.0.clone(),
        dtype: super::spec::dtype("dtype", o.dtype.as_deref(), model)?,
        stages: stages(&layers(model.layers, pp, o.partition.as_ref())?),
        shards: (0..tp).map(|r| shard(model, padded, pp > 1, r, tp)).collect(),
        unused: vec![],
        strip: "",
    })
}

/// Layers of each stage: what does not divide goes, one layer each, to the stages before the last, from behind.
fn layers(all: u64, pp: u64, partition: Option<&List>) -> Result<Vec<u64>> {
    if let Some(List(list)) = partition {
        if list.len() as u64 != pp || list.iter().sum::<u64>() != all {
            bail!(
                RS_ERR_INVALID,
                "VLLM_PP_LAYER_PARTITION {list:?} must have pipeline_parallel_size {pp} numbers whose sum is num_hidden_layers {all}"
            );
        }
        return Ok(list.clone());
    }
    if pp > all {
        bail!(RS_ERR_INVALID, "pipeline_parallel_size {pp} is more than num_hidden_layers {all}");
    }
    let rest = all % pp;
    Ok((0..pp).map(|p| all / pp + u64::from(p + 1 < pp && p + 1 + rest >= pp)).collect())
}

fn stages(counts: &[u64]) -> Vec<Vec<Slot>> {
    let mut next = 0;
    let mut out = vec![];
    for (stage, &count) in counts.iter().enumerate() {
        let mut slots = vec![];
        if stage == 0 {
            slots.push(Slot::new(Section::Front, 0, 0, String::new()));
        }
        slots.extend((next..next + count).map(|l| Slot::new(Section::Layer, l, 0, format!("model.layers.{l}."))));
        if stage + 1 == counts.len() {
            slots.push(Slot::new(Section::Back, 0, 0, String::new()));
        }
        next += count;
        out.push(slots);
    }
    out
}

fn shard(model: &Model, padded: u64, staged: bool, r: u64, t: u64) -> Shard {
    let (h, kind) = (model.hidden, |name: &str| model.kind(name));
    let heads = Heads { q: model.heads, kv: model.kv_heads, dim: model.head_dim };
    let vocab = |param: &str, name: &str| Param::new(param, &[padded / t, h], cut::vocab(kind(name), model.vocab, padded, h, r, t));
    let norm = |name: &str| {
        let kind = kind(name);
        let n = model.kinds[kind].shape[0];
        Param::new(name, &[n], cut::rows(kind, n, 0, n, 1, 0))
    };
    let qkv_rows = (heads.q / t + 2 * (heads.kv / t).max(1)) * heads.dim;
    let mut layer = vec![
        norm(names::INPUT_NORM),
        Param::new("self_attn.qkv_proj.weight", &[qkv_rows, h], cut::qkv_stacked(names::QKV.map(kind), heads, h, r, t)),
    ];
    if model.qkv_bias {
        layer.push(Param::new("self_attn.qkv_proj.bias", &[qkv_rows], cut::qkv_stacked(names::QKV_BIAS.map(kind), heads, 1, r, t)));
    }
    if model.qk_norm {
        layer.extend([norm(names::Q_NORM), norm(names::K_NORM)]);
    }
    let q = heads.q * heads.dim;
    layer.extend([
        Param::new(names::O, &[h, q / t], [cut::columns(kind(names::O), h, q, r, t)]),
        norm(names::POST_NORM),
        Param::new(
            "mlp.gate_up_proj.weight",
            &[2 * model.ffn / t, h],
            cut::glu([names::GATE, names::UP].map(kind), model.ffn, h, r, t),
        ),
        Param::new(names::DOWN, &[h, model.ffn / t], [cut::columns(kind(names::DOWN), h, model.ffn, r, t)]),
    ]);
    let mut back = vec![norm(names::NORM)];
    match (model.tied, staged) {
        (false, _) => back.push(vocab(names::HEAD, names::HEAD)),
        // The last stage has an embedding of its own for its head.
        (true, true) => back.push(vocab(names::EMBED, names::EMBED)),
        (true, false) => {}
    }
    Shard { front: vec![vocab(names::EMBED, names::EMBED)], layer, back }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_stage_is_spared() {
        let even = |all, pp| layers(all, pp, None).unwrap();
        assert_eq!(even(61, 4), [15, 15, 16, 15]);
        assert_eq!(even(94, 4), [23, 24, 24, 23]);
        assert_eq!(even(31, 4), [8, 8, 8, 7]);
        assert_eq!(even(32, 4), [8, 8, 8, 8]);
        assert_eq!(even(5, 1), [5]);
        assert_eq!(layers(5, 2, Some(&List(vec![1, 4]))).unwrap(), [1, 4]);
        assert!(layers(5, 2, Some(&List(vec![2, 2]))).unwrap_err().text().contains("VLLM_PP_LAYER_PARTITION"));
        assert!(layers(5, 6, None).is_err());
    }
}
