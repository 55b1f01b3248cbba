//! A Hugging Face config.json as logical tensors.
//!
//! Shapes are those of the checkpoint, as the classes of transformers 4.57 create them.
#![forbid(unsafe_code)]

pub mod config;
pub mod list;

use config::Config;
pub use list::names;

use crate::abi::*;
use crate::error::{Result, bail};
use serde::Serialize;
use serde_json::{Map, Value};
use std::ops::Range;

/// Where in the model a kind of tensor occurs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub enum Part {
    /// Once.
    Once,
    /// Once in every layer of a type.
    Layer(LayerType),
    /// Once in every layer for multi-token prediction, beside what [`Part::Layer`] says of its type.
    Mtp,
    /// Once for every routed expert of every layer of a type.
    Expert(LayerType),
}

/// What a layer is made of.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub enum LayerType {
    /// With an MLP.
    Dense,
    /// With a router and experts.
    Moe,
    /// Of the vision tower.
    Vision,
}

/// A kind of logical tensor.
#[derive(Clone, Debug, Serialize)]
pub struct Kind {
    /// Its name; in a layer what follows the layer's own, `{}` being the expert.
    pub name: String,
    /// Its shape.
    pub shape: Vec<u64>,
    /// Where it occurs.
    pub part: Part,
    /// Whether it is fp32, whatever the model's dtype.
    pub fp32: bool,
}

impl Kind {
    /// Whether it is the weight of a norm.
    pub fn is_norm(&self) -> bool {
        self.name.ends_with("norm.weight")
    }
}

/// A tensor: its kind, layer and expert; 0 where it has none.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Id {
    /// Index of the kind.
    pub kind: usize,
    /// Layer.
    pub layer: u64,
    /// Expert.
    pub expert: u32,
}

/// Grouped-query attention.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct Heads {
    /// num_attention_heads.
    pub q: u64,
    /// num_key_value_heads.
    pub kv: u64,
    /// head_dim, else hidden_size / num_attention_heads.
    pub dim: u64,
    /// Whether q, k and v have biases.
    pub bias: bool,
    /// Whether q and k have norms over a head.
    pub norm: bool,
    /// Whether o has a bias.
    pub out_bias: bool,
    /// Whether each query head has a sink.
    pub sinks: bool,
    /// Whether each query head has a gate of its size, whose rows follow the head's own in q_proj.
    pub gate: bool,
}

impl Heads {
    /// Rows of q_proj.
    pub fn q_rows(&self) -> u64 {
        (1 + u64::from(self.gate)) * self.q * self.dim
    }

    /// Rows of q_proj, k_proj and v_proj.
    pub fn rows(&self) -> u64 {
        self.q_rows() + 2 * self.kv * self.dim
    }
}

/// Multi-head latent attention.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct Latent {
    /// num_attention_heads.
    pub heads: u64,
    /// q_lora_rank.
    pub q_lora: Option<u64>,
    /// kv_lora_rank.
    pub kv_lora: u64,
    /// qk_nope_head_dim, qk_rope_head_dim, v_head_dim.
    pub dims: [u64; 3],
}

/// How a model attends.
#[derive(Clone, Copy, Debug, Serialize)]
pub enum Attention {
    /// Queries in groups.
    Grouped(Heads),
    /// Through a latent vector.
    Latent(Latent),
}

impl Attention {
    /// num_attention_heads.
    pub fn heads(&self) -> u64 {
        match self {
            Attention::Grouped(h) => h.q,
            Attention::Latent(l) => l.heads,
        }
    }

    /// Columns of o_proj.
    pub fn out(&self) -> u64 {
        match self {
            Attention::Grouped(h) => h.q * h.dim,
            Attention::Latent(l) => l.heads * l.dims[2],
        }
    }
}

/// Routed experts.
#[derive(Clone, Debug, Serialize)]
pub struct Moe {
    /// Number of experts.
    pub experts: u64,
    /// Intermediate size of one.
    pub ffn: u64,
    /// Intermediate size of all shared experts together; 0: none.
    pub shared: u64,
    /// Whether the shared expert has a gate.
    pub shared_gate: bool,
    /// What the block is called: `mlp`, `block_sparse_moe`.
    pub block: &'static str,
    /// What the shared experts are called there.
    pub shared_name: &'static str,
    /// Gate, up and down projections of an expert.
    pub names: [&'static str; 3],
    /// Whether the router has an e_score_correction_bias.
    pub correction: bool,
    /// Whether vLLM has the router's weight in fp32.
    pub fp32_router: bool,
    /// Whether the experts of a layer are one tensor for each projection, transposed and with biases, gate and up by turns.
    pub fused: bool,
}

/// A vision tower.
#[derive(Clone, Debug, Serialize)]
pub struct Vision {
    /// depth: its layers.
    pub depth: u64,
    /// hidden_size.
    pub hidden: u64,
    /// num_heads.
    pub heads: u64,
    /// intermediate_size.
    pub ffn: u64,
    /// What patch_embed reads: in_channels, temporal_patch_size, patch_size twice.
    pub patch: [u64; 4],
    /// spatial_merge_size.
    pub merge: u64,
    /// out_hidden_size.
    pub out: u64,
}

impl Vision {
    /// Width of the patches that are merged into one.
    pub fn merged(&self) -> u64 {
        self.hidden * self.merge * self.merge
    }

    /// Sizes that tensor parallelism cuts.
    pub fn cut_sizes(&self) -> [(&'static str, u64); 3] {
        [
            ("vision_config.num_heads", self.heads),
            ("vision_config.intermediate_size", self.ffn),
            ("vision_config.hidden_size * spatial_merge_size^2", self.merged()),
        ]
    }
}

/// The numbers of a decoder that layouts depend on.
#[derive(Clone, Debug, Serialize)]
pub struct Model {
    /// `architectures[0]`.
    pub architecture: String,
    /// hidden_size.
    pub hidden: u64,
    /// How it attends.
    pub attention: Attention,
    /// intermediate_size.
    pub ffn: u64,
    /// vocab_size.
    pub vocab: u64,
    /// tie_word_embeddings.
    pub tied: bool,
    /// torch_dtype or dtype: DLPack code and bits.
    pub dtype: (u8, u8),
    /// Its experts, if it has any.
    pub moe: Option<Moe>,
    /// num_hidden_layers.
    pub text: u64,
    /// Layers for multi-token prediction that are part of this world.
    pub mtp: u64,
    /// Its vision tower, if it has one.
    pub vision: Option<Vision>,
    /// Type of each layer: of the decoder, for multi-token prediction, of the vision tower.
    pub layers: Vec<LayerType>,
    /// All kinds, in the order of the model.
    pub kinds: Vec<Kind>,
    /// Ordinal of the first tensor of each layer.
    firsts: Vec<u64>,
}

/// Architectures that presets know.
const KNOWN: [&str; 13] = [
    "LlamaForCausalLM",
    "MistralForCausalLM",
    "Qwen2ForCausalLM",
    "Qwen3ForCausalLM",
    "MixtralForCausalLM",
    "Qwen2MoeForCausalLM",
    "Qwen3MoeForCausalLM",
    "DeepseekV2ForCausalLM",
    "DeepseekV3ForCausalLM",
    "GptOssForCausalLM",
    "Glm4MoeForCausalLM",
    "Qwen2_5_VLForConditionalGeneration",
    "Qwen3NextForCausalLM",
];

/// Most elements of a tensor, padding included: sums and products with strides stay below 2^63.
pub const MOST_ELEMENTS: u64 = 1 << 56;

/// Most layers, and most experts of one.
pub const MOST_PARTS: u64 = 1 << 16;

/// DLPack's codes of IEEE floats and of bfloat16.
const FLOAT: u8 = 2;
const BFLOAT: u8 = 4;

/// fp32.
pub const FP32: (u8, u8) = (FLOAT, 32);
/// fp16.
pub const FP16: (u8, u8) = (FLOAT, 16);
/// bf16.
pub const BF16: (u8, u8) = (BFLOAT, 16);

impl Model {
    /// From a config.json, with so many of its layers for multi-token prediction. Members that do not change the layout are ignored;
    /// those that would and are not supported are refused by name.
    pub fn new(config: &Map<String, Value>, mtp: u64) -> Result<Model> {
        let architecture = architecture(config)?;
        let c = Config::new(config, &architecture)?;
        c.refuse(&architecture)?;
        let hidden = c.number("hidden_size")?;
        let moe = c.moe(&architecture)?;
        let vision = c.vision(&architecture)?;
        let mut layers = c.layers(&architecture, moe.is_some())?;
        let text = layers.len() as u64;
        let last = layers[layers.len() - 1];
        layers.extend((0..mtp).map(|_| last));
        layers.extend((0..vision.as_ref().map_or(0, |v| v.depth)).map(|_| LayerType::Vision));
        let mut model = Model {
            hidden,
            attention: c.attention(&architecture, hidden)?,
            ffn: c.number("intermediate_size")?,
            vocab: c.number("vocab_size")?,
            tied: c.flag("tie_word_embeddings")?,
            dtype: c.dtype()?,
            text,
            mtp,
            layers,
            moe,
            vision,
            kinds: vec![],
            firsts: vec![],
            architecture,
        };
        model.kinds = list::kinds(&model);
        for k in &model.kinds {
            let elements = k.shape.iter().try_fold(1u64, |n, &e| n.checked_mul(e)).filter(|&n| n <= MOST_ELEMENTS);
            if elements.is_none() {
                bail!(RS_ERR_INVALID, "model: '{}' would have the shape {:?}, of over 2^56 elements", k.name, k.shape);
            }
        }
        let mut next = model.count(Part::Once);
        for layer in 0..model.layers.len() as u64 {
            model.firsts.push(next);
            next += model.own(layer) + model.experts() * model.count(Part::Expert(model.layer(layer)));
        }
        if next > u64::from(u32::MAX) {
            bail!(RS_ERR_INVALID, "model has {next} tensors; at most 2^32 are possible");
        }
        Ok(model)
    }

    /// Type of a layer.
    pub fn layer(&self, layer: u64) -> LayerType {
        self.layers[layer as usize]
    }

    /// The layers for multi-token prediction.
    pub fn mtp_layers(&self) -> Range<u64> {
        self.text..self.text + self.mtp
    }

    /// The layers of the vision tower.
    pub fn vision_layers(&self) -> Range<u64> {
        self.text + self.mtp..self.layers.len() as u64
    }

    /// Number of a layer's tensors that are no expert's.
    fn own(&self, layer: u64) -> u64 {
        let mtp = if self.mtp_layers().contains(&layer) { self.count(Part::Mtp) } else { 0 };
        self.count(Part::Layer(self.layer(layer))) + mtp
    }

    /// What a layer's names begin with.
    pub fn prefix(&self, layer: u64) -> String {
        match self.vision_layers() {
            vision if vision.contains(&layer) => format!("visual.blocks.{}.", layer - vision.start),
            _ => format!("model.layers.{layer}."),
        }
    }

    /// Whether the checkpoint's norms are zero-centred, and so those of all frameworks.
    pub fn has_zero_centered_norms(&self) -> bool {
        self.architecture.starts_with("Qwen3Next")
    }

    /// Index of a kind of this model.
    pub fn kind(&self, part: Part, name: &str) -> usize {
        // Callers name what the model has: their own tables come from the same numbers.
        self.kinds.iter().position(|k| k.part == part && k.name == name).unwrap_or(usize::MAX)
    }

    /// Number of experts of a layer that has any.
    pub fn experts(&self) -> u64 {
        self.moe.as_ref().map_or(0, |m| m.experts)
    }

    /// Sizes that tensor parallelism cuts; `shared`: whether it cuts shared experts.
    pub fn cut_sizes(&self, shared: bool) -> Vec<(&'static str, u64)> {
        let mut out = vec![("num_attention_heads", self.attention.heads())];
        if self.layers.contains(&LayerType::Dense) {
            out.push(("intermediate_size", self.ffn));
        }
        if let Some(moe) = self.moe.as_ref().filter(|m| shared && m.shared > 0) {
            out.push(("the shared experts' intermediate size", moe.shared));
        }
        out
    }

    /// Number of kinds of a part.
    fn count(&self, part: Part) -> u64 {
        self.kinds.iter().filter(|k| k.part == part).count() as u64
    }

    /// Place of a kind among those of its part.
    fn place(&self, kind: usize) -> u64 {
        let part = self.kinds[kind].part;
        self.kinds[..kind].iter().filter(|k| k.part == part).count() as u64
    }

    /// Number of elements of all logical tensors.
    pub fn parameters(&self) -> u64 {
        let layers = |t: LayerType| self.layers.iter().filter(|&&l| l == t).count() as u64;
        let times = |k: &Kind| match k.part {
            Part::Once => 1,
            Part::Layer(t) => layers(t),
            Part::Mtp => self.mtp,
            Part::Expert(t) => layers(t) * self.experts(),
        };
        self.kinds.iter().map(|k| times(k) * k.shape.iter().product::<u64>()).sum()
    }

    /// Ordinal of a tensor: its place in the order of the model.
    pub fn ordinal(&self, id: Id) -> u32 {
        let place = self.place(id.kind);
        let ordinal = match self.kinds[id.kind].part {
            Part::Once => place,
            Part::Layer(_) => self.firsts[id.layer as usize] + place,
            Part::Mtp => self.firsts[id.layer as usize] + self.count(Part::Layer(self.layer(id.layer))) + place,
            Part::Expert(t) => {
                let first = self.firsts[id.layer as usize] + self.own(id.layer);
                first + u64::from(id.expert) * self.count(Part::Expert(t)) + place
            }
        };
        // `new` has seen that all fit.
        ordinal as u32
    }

    /// Full name of a tensor.
    pub fn name(&self, id: Id) -> String {
        let k = &self.kinds[id.kind];
        match k.part {
            Part::Once => k.name.clone(),
            Part::Layer(_) | Part::Mtp => self.prefix(id.layer) + &k.name,
            Part::Expert(_) => self.prefix(id.layer) + &k.name.replace("{}", &id.expert.to_string()),
        }
    }

    /// All tensors in the order of their ordinals.
    pub fn all(&self) -> impl Iterator<Item = Id> + '_ {
        let of = move |part: Part| (0..self.kinds.len()).filter(move |&k| self.kinds[k].part == part);
        let layer = move |(layer, &t): (usize, &LayerType)| {
            let layer = layer as u64;
            let mtp = self.mtp_layers().contains(&layer);
            let own = of(Part::Layer(t)).chain(of(Part::Mtp).filter(move |_| mtp)).map(move |kind| Id { kind, layer, expert: 0 });
            let experts =
                (0..self.experts() as u32).flat_map(move |expert| of(Part::Expert(t)).map(move |kind| Id { kind, layer, expert }));
            own.chain(experts)
        };
        of(Part::Once).map(|kind| Id { kind, layer: 0, expert: 0 }).chain(self.layers.iter().enumerate().flat_map(layer))
    }
}

/// `architectures[0]`, if there is a preset for it.
pub fn architecture(config: &Map<String, Value>) -> Result<String> {
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
    Ok(architecture)
}

/// DLPack code and bits of a dtype's name in PyTorch.
pub fn dtype(name: &Value) -> Result<(u8, u8)> {
    match name.as_str().map(|n| n.trim_start_matches("torch.")) {
        Some("bfloat16") => Ok(BF16),
        Some("float16") => Ok(FP16),
        Some("float32") => Ok(FP32),
        _ => bail!(RS_ERR_UNSUPPORTED, "dtype {name}: there are bfloat16, float16 and float32"),
    }
}
