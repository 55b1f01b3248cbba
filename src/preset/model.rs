//! A Hugging Face config.json as logical tensors.
//!
//! Shapes are those of the checkpoint, as the classes of transformers 4.57 create them: `LlamaForCausalLM`, `MistralForCausalLM`,
//! `Qwen2ForCausalLM`, `Qwen3ForCausalLM`.
#![forbid(unsafe_code)]

use crate::abi::*;
use crate::error::{Result, bail, err};
use serde::Serialize;
use serde_json::{Map, Value};

/// Where in the model a kind of tensor occurs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize)]
pub enum Part {
    /// Once, before the layers.
    Front,
    /// Once in every layer.
    Layer,
    /// Once, after the layers.
    Back,
}

/// A kind of logical tensor: one tensor, or one of every layer.
#[derive(Clone, Debug, Serialize)]
pub struct Kind {
    /// Its name; in a layer what follows `model.layers.{i}.`.
    pub name: &'static str,
    /// Its shape.
    pub shape: Vec<u64>,
    /// Where it occurs.
    pub part: Part,
}

/// The numbers of a dense decoder that layouts depend on.
#[derive(Clone, Debug, Serialize)]
pub struct Model {
    /// `architectures[0]`.
    pub architecture: String,
    /// hidden_size.
    pub hidden: u64,
    /// num_hidden_layers.
    pub layers: u64,
    /// num_attention_heads.
    pub heads: u64,
    /// num_key_value_heads.
    pub kv_heads: u64,
    /// head_dim, else hidden_size / num_attention_heads.
    pub head_dim: u64,
    /// intermediate_size.
    pub ffn: u64,
    /// vocab_size.
    pub vocab: u64,
    /// tie_word_embeddings.
    pub tied: bool,
    /// Whether q, k and v have biases.
    pub qkv_bias: bool,
    /// Whether q and k have norms over a head.
    pub qk_norm: bool,
    /// torch_dtype or dtype: DLPack code and bits.
    pub dtype: (u8, u8),
    /// All kinds, in the order of the model.
    pub kinds: Vec<Kind>,
}

/// Kinds by name; see [`Model::kind`].
pub mod names {
    #![allow(missing_docs)] // The names themselves.
    pub const EMBED: &str = "model.embed_tokens.weight";
    pub const NORM: &str = "model.norm.weight";
    pub const HEAD: &str = "lm_head.weight";
    pub const INPUT_NORM: &str = "input_layernorm.weight";
    pub const POST_NORM: &str = "post_attention_layernorm.weight";
    pub const QKV: [&str; 3] = ["self_attn.q_proj.weight", "self_attn.k_proj.weight", "self_attn.v_proj.weight"];
    pub const QKV_BIAS: [&str; 3] = ["self_attn.q_proj.bias", "self_attn.k_proj.bias", "self_attn.v_proj.bias"];
    pub const Q_NORM: &str = "self_attn.q_norm.weight";
    pub const K_NORM: &str = "self_attn.k_norm.weight";
    pub const O: &str = "self_attn.o_proj.weight";
    pub const GATE: &str = "mlp.gate_proj.weight";
    pub const UP: &str = "mlp.up_proj.weight";
    pub const DOWN: &str = "mlp.down_proj.weight";
}

/// DLPack's codes of IEEE floats and of bfloat16.
const FLOAT: u8 = 2;
const BFLOAT: u8 = 4;

/// Architectures that presets know.
const KNOWN: [&str; 4] = ["LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM"];

/// Largest size that a config may give; products of a few stay below 2^63.
const MOST: u64 = 1 << 28;

impl Model {
    /// From the text of a config.json. Members that do not change the layout are ignored; those that would and are not supported are
    /// refused by name.
    pub fn new(config: &Map<String, Value>) -> Result<Model> {
        let architecture = match config.get("architectures").and_then(Value::as_array).map(|a| &a[..]) {
            Some([Value::String(one)]) => one.clone(),
            _ => bail!(RS_ERR_INVALID, "model.architectures must be a list of one name, such as {KNOWN:?}"),
        };
        if !KNOWN.contains(&architecture.as_str()) {
            bail!(
                RS_ERR_UNSUPPORTED,
                "model.architectures: '{architecture}' has no preset; there are {KNOWN:?}: describe it by tables (rs_layout_t)"
            );
        }
        for member in ["attention_bias", "mlp_bias"] {
            if !matches!(config.get(member), None | Some(Value::Null | Value::Bool(false))) {
                bail!(RS_ERR_UNSUPPORTED, "model.{member}: only false is built for {architecture}; describe it by tables");
            }
        }
        if !config.get("quantization_config").is_none_or(Value::is_null) {
            bail!(
                RS_ERR_UNSUPPORTED,
                "model.quantization_config: quantised layouts are private to their kernels; load the model unquantised"
            );
        }
        let number = |member: &str| match config.get(member) {
            None | Some(Value::Null) => Ok(None),
            Some(v) => match v.as_u64().filter(|n| (1..=MOST).contains(n)) {
                Some(n) => Ok(Some(n)),
                None => bail!(RS_ERR_INVALID, "model.{member} is {v}; it must be a number from 1 to {MOST}"),
            },
        };
        let required = |member: &str| number(member)?.ok_or_else(|| err!(RS_ERR_INVALID, "model.{member} is missing"));
        let (hidden, heads) = (required("hidden_size")?, required("num_attention_heads")?);
        let head_dim = match number("head_dim")? {
            Some(n) => n,
            None if hidden % heads == 0 => hidden / heads,
            None => bail!(
                RS_ERR_INVALID,
                "model.hidden_size {hidden} is no multiple of num_attention_heads {heads}, and there is no head_dim"
            ),
        };
        let kv_heads = number("num_key_value_heads")?.unwrap_or(heads);
        if heads % kv_heads != 0 {
            bail!(RS_ERR_INVALID, "model.num_attention_heads {heads} is no multiple of num_key_value_heads {kv_heads}");
        }
        let tied = match config.get("tie_word_embeddings") {
            None | Some(Value::Null) => false,
            Some(Value::Bool(tied)) => *tied,
            Some(v) => bail!(RS_ERR_INVALID, "model.tie_word_embeddings is {v}; it must be true or false"),
        };
        let dtype = match config.get("torch_dtype").or(config.get("dtype")) {
            None | Some(Value::Null) => (BFLOAT, 16),
            Some(v) => dtype(v).map_err(|e| e.context("model.torch_dtype"))?,
        };
        let mut model = Model {
            hidden,
            layers: required("num_hidden_layers")?,
            heads,
            kv_heads,
            head_dim,
            ffn: required("intermediate_size")?,
            vocab: required("vocab_size")?,
            tied,
            qkv_bias: architecture == "Qwen2ForCausalLM",
            qk_norm: architecture == "Qwen3ForCausalLM",
            dtype,
            kinds: vec![],
            architecture,
        };
        model.kinds = model.list();
        Ok(model)
    }

    fn list(&self) -> Vec<Kind> {
        use names::*;
        let (h, q, kv) = (self.hidden, self.heads * self.head_dim, self.kv_heads * self.head_dim);
        let mut kinds = vec![];
        let mut add = |part: Part, name: &'static str, shape: &[u64]| kinds.push(Kind { name, shape: shape.to_vec(), part });
        add(Part::Front, EMBED, &[self.vocab, h]);
        add(Part::Layer, INPUT_NORM, &[h]);
        for (i, rows) in [q, kv, kv].into_iter().enumerate() {
            add(Part::Layer, QKV[i], &[rows, h]);
            if self.qkv_bias {
                add(Part::Layer, QKV_BIAS[i], &[rows]);
            }
        }
        if self.qk_norm {
            add(Part::Layer, Q_NORM, &[self.head_dim]);
            add(Part::Layer, K_NORM, &[self.head_dim]);
        }
        add(Part::Layer, O, &[h, q]);
        add(Part::Layer, POST_NORM, &[h]);
        add(Part::Layer, GATE, &[self.ffn, h]);
        add(Part::Layer, UP, &[self.ffn, h]);
        add(Part::Layer, DOWN, &[h, self.ffn]);
        add(Part::Back, NORM, &[h]);
        if !self.tied {
            add(Part::Back, HEAD, &[self.vocab, h]);
        }
        kinds
    }

    /// Index of a kind of this model.
    pub fn kind(&self, name: &str) -> usize {
        // Callers name what the model has: their own tables come from the same numbers.
        self.kinds.iter().position(|k| k.name == name).unwrap_or(usize::MAX)
    }

    /// Number of kinds of a part.
    pub fn count(&self, part: Part) -> u64 {
        self.kinds.iter().filter(|k| k.part == part).count() as u64
    }

    /// Number of logical tensors.
    pub fn tensors(&self) -> u64 {
        self.count(Part::Front) + self.layers * self.count(Part::Layer) + self.count(Part::Back)
    }

    /// Number of elements of all logical tensors.
    pub fn parameters(&self) -> u64 {
        let elements = |k: &Kind| k.shape.iter().product::<u64>() * if k.part == Part::Layer { self.layers } else { 1 };
        self.kinds.iter().map(elements).sum()
    }

    /// Ordinal of a tensor: its place in the order of the model. `layer` counts only in a layer.
    pub fn ordinal(&self, kind: usize, layer: u64) -> u64 {
        match self.kinds[kind].part {
            Part::Layer => kind as u64 + layer * self.count(Part::Layer),
            Part::Front => kind as u64,
            Part::Back => kind as u64 + (self.layers - 1) * self.count(Part::Layer),
        }
    }

    /// Full name of a tensor.
    pub fn name(&self, kind: usize, layer: u64) -> String {
        let k = &self.kinds[kind];
        if k.part == Part::Layer { format!("model.layers.{layer}.{}", k.name) } else { k.name.to_string() }
    }

    /// All tensors in the order of their ordinals, as (kind, layer).
    pub fn all(&self) -> impl Iterator<Item = (usize, u64)> + '_ {
        let kinds = &self.kinds;
        let of = move |part: Part| (0..kinds.len()).filter(move |&k| kinds[k].part == part);
        let layers = (0..self.layers).flat_map(move |l| of(Part::Layer).map(move |k| (k, l)));
        of(Part::Front).map(|k| (k, 0)).chain(layers).chain(of(Part::Back).map(|k| (k, 0)))
    }
}

/// DLPack code and bits of a dtype's name in PyTorch.
pub fn dtype(name: &Value) -> Result<(u8, u8)> {
    match name.as_str().map(|n| n.trim_start_matches("torch.")) {
        Some("bfloat16") => Ok((BFLOAT, 16)),
        Some("float16") => Ok((FLOAT, 16)),
        Some("float32") => Ok((FLOAT, 32)),
        _ => bail!(RS_ERR_UNSUPPORTED, "dtype {name}: there are bfloat16, float16 and float32"),
    }
}
