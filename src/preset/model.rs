//! A Hugging Face config.json as logical tensors.
//!
//! Shapes are those of the checkpoint, as the classes of transformers 4.57 create them.
#![forbid(unsafe_code)]

use super::config::Config;
use crate::abi::*;
use crate::error::{Result, bail};
use serde::Serialize;
use serde_json::{Map, Value};

/// Where in the model a kind of tensor occurs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub enum Part {
    /// Once.
    Once,
    /// Once in every layer of a type.
    Layer(LayerType),
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
    /// Whether the experts of a layer are one tensor for each projection, transposed and with biases, gate and up by turns.
    pub fused: bool,
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
    /// Type of each layer.
    pub layers: Vec<LayerType>,
    /// All kinds, in the order of the model.
    pub kinds: Vec<Kind>,
    /// Ordinal of the first tensor of each layer.
    firsts: Vec<u64>,
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
    pub const Q: &str = QKV[0];
    pub const Q_A: &str = "self_attn.q_a_proj.weight";
    pub const Q_A_NORM: &str = "self_attn.q_a_layernorm.weight";
    pub const Q_B: &str = "self_attn.q_b_proj.weight";
    pub const KV_A: &str = "self_attn.kv_a_proj_with_mqa.weight";
    pub const KV_A_NORM: &str = "self_attn.kv_a_layernorm.weight";
    pub const KV_B: &str = "self_attn.kv_b_proj.weight";
    pub const O: &str = "self_attn.o_proj.weight";
    pub const O_BIAS: &str = "self_attn.o_proj.bias";
    pub const SINKS: &str = "self_attn.sinks";
    pub const ROUTER_BIAS: &str = "mlp.router.bias";
    /// Experts of a layer in one: gate and up, their biases, down, its biases.
    pub const FUSED: [&str; 4] =
        ["mlp.experts.gate_up_proj", "mlp.experts.gate_up_proj_bias", "mlp.experts.down_proj", "mlp.experts.down_proj_bias"];
    pub const MLP: [&str; 3] = ["mlp.gate_proj.weight", "mlp.up_proj.weight", "mlp.down_proj.weight"];
}

/// Architectures that presets know.
const KNOWN: [&str; 10] = [
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
/// bf16.
pub const BF16: (u8, u8) = (BFLOAT, 16);

impl Model {
    /// From a config.json. Members that do not change the layout are ignored; those that would and are not supported are refused by
    /// name.
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
        let c = Config(config);
        c.refuse(&architecture)?;
        let hidden = c.number("hidden_size")?;
        let moe = c.moe(&architecture)?;
        let mut model = Model {
            hidden,
            attention: c.attention(&architecture, hidden)?,
            ffn: c.number("intermediate_size")?,
            vocab: c.number("vocab_size")?,
            tied: c.flag("tie_word_embeddings")?,
            dtype: c.dtype()?,
            layers: c.layers(&architecture, moe.is_some())?,
            moe,
            kinds: vec![],
            firsts: vec![],
            architecture,
        };
        model.kinds = model.list();
        for k in &model.kinds {
            let elements = k.shape.iter().try_fold(1u64, |n, &e| n.checked_mul(e)).filter(|&n| n <= MOST_ELEMENTS);
            if elements.is_none() {
                bail!(RS_ERR_INVALID, "model: '{}' would have the shape {:?}, of over 2^56 elements", k.name, k.shape);
            }
        }
        let mut next = model.count(Part::Once);
        for layer in &model.layers {
            model.firsts.push(next);
            next += model.count(Part::Layer(*layer)) + model.experts() * model.count(Part::Expert(*layer));
        }
        if next > u64::from(u32::MAX) {
            bail!(RS_ERR_INVALID, "model has {next} tensors; at most 2^32 are possible");
        }
        Ok(model)
    }

    fn list(&self) -> Vec<Kind> {
        use names::*;
        let h = self.hidden;
        let mut kinds = vec![];
        let mut add =
            |part: Part, name: String, shape: &[u64], fp32: bool| kinds.push(Kind { name, shape: shape.to_vec(), part, fp32 });
        add(Part::Once, EMBED.into(), &[self.vocab, h], false);
        add(Part::Once, NORM.into(), &[h], false);
        if !self.tied {
            add(Part::Once, HEAD.into(), &[self.vocab, h], false);
        }
        for layer in [LayerType::Dense, LayerType::Moe] {
            if !self.layers.contains(&layer) {
                continue;
            }
            let mut put = |name: &str, shape: &[u64]| add(Part::Layer(layer), name.into(), shape, false);
            put(INPUT_NORM, &[h]);
            match &self.attention {
                Attention::Grouped(a) => {
                    for (i, rows) in [a.q * a.dim, a.kv * a.dim, a.kv * a.dim].into_iter().enumerate() {
                        put(QKV[i], &[rows, h]);
                        if a.bias {
                            put(QKV_BIAS[i], &[rows]);
                        }
                    }
                    if a.norm {
                        put(Q_NORM, &[a.dim]);
                        put(K_NORM, &[a.dim]);
                    }
                }
                Attention::Latent(a) => {
                    let [nope, rope, v] = a.dims;
                    match a.q_lora {
                        Some(rank) => {
                            put(Q_A, &[rank, h]);
                            put(Q_A_NORM, &[rank]);
                            put(Q_B, &[a.heads * (nope + rope), rank]);
                        }
                        None => put(Q, &[a.heads * (nope + rope), h]),
                    }
                    put(KV_A, &[a.kv_lora + rope, h]);
                    put(KV_A_NORM, &[a.kv_lora]);
                    put(KV_B, &[a.heads * (nope + v), a.kv_lora]);
                }
            }
            put(O, &[h, self.attention.out()]);
            if let Attention::Grouped(a) = &self.attention {
                if a.out_bias {
                    put(O_BIAS, &[h]);
                }
                if a.sinks {
                    put(SINKS, &[a.q]);
                }
            }
            put(POST_NORM, &[h]);
            let Some(moe) = self.moe.as_ref().filter(|_| layer == LayerType::Moe) else {
                for (name, shape) in MLP.into_iter().zip([[self.ffn, h], [self.ffn, h], [h, self.ffn]]) {
                    put(name, &shape);
                }
                continue;
            };
            put(&moe.router(), &[moe.experts, h]);
            if moe.fused {
                put(ROUTER_BIAS, &[moe.experts]);
                let (e, f) = (moe.experts, moe.ffn);
                let shapes: [&[u64]; 4] = [&[e, h, 2 * f], &[e, 2 * f], &[e, f, h], &[e, h]];
                FUSED.iter().zip(shapes).for_each(|(name, shape)| put(name, shape));
                continue;
            }
            if moe.shared > 0 {
                for (name, shape) in moe.shared_names().iter().zip([[moe.shared, h], [moe.shared, h], [h, moe.shared]]) {
                    put(name, &shape);
                }
            }
            if moe.shared_gate {
                put(&moe.shared_gate_name(), &[1, h]);
            }
            if moe.correction {
                add(Part::Layer(layer), moe.correction_name(), &[moe.experts], true);
            }
            for (name, shape) in moe.expert_names().into_iter().zip([[moe.ffn, h], [moe.ffn, h], [h, moe.ffn]]) {
                add(Part::Expert(layer), name, &shape, false);
            }
        }
        kinds
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
            Part::Expert(t) => {
                let first = self.firsts[id.layer as usize] + self.count(Part::Layer(t));
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
            Part::Layer(_) => format!("model.layers.{}.{}", id.layer, k.name),
            Part::Expert(_) => format!("model.layers.{}.{}", id.layer, k.name.replace("{}", &id.expert.to_string())),
        }
    }

    /// All tensors in the order of their ordinals.
    pub fn all(&self) -> impl Iterator<Item = Id> + '_ {
        let of = move |part: Part| (0..self.kinds.len()).filter(move |&k| self.kinds[k].part == part);
        let layer = move |(layer, &t): (usize, &LayerType)| {
            let layer = layer as u64;
            let own = of(Part::Layer(t)).map(move |kind| Id { kind, layer, expert: 0 });
            let experts =
                (0..self.experts() as u32).flat_map(move |expert| of(Part::Expert(t)).map(move |kind| Id { kind, layer, expert }));
            own.chain(experts)
        };
        of(Part::Once).map(|kind| Id { kind, layer: 0, expert: 0 }).chain(self.layers.iter().enumerate().flat_map(layer))
    }
}

impl Moe {
    /// Name of the router's weight.
    pub fn router(&self) -> String {
        format!("{}.{}.weight", self.block, if self.fused { "router" } else { "gate" })
    }

    /// Name of the router's e_score_correction_bias.
    pub fn correction_name(&self) -> String {
        format!("{}.gate.e_score_correction_bias", self.block)
    }

    /// Names of the shared experts' projections.
    pub fn shared_names(&self) -> [String; 3] {
        names::MLP.map(|n| n.replacen("mlp.", &format!("{}.{}.", self.block, self.shared_name), 1))
    }

    /// Name of the shared expert's gate.
    pub fn shared_gate_name(&self) -> String {
        format!("{}.{}_gate.weight", self.block, self.shared_name)
    }

    /// Names of an expert's projections, `{}` being its number.
    pub fn expert_names(&self) -> [String; 3] {
        self.names.map(|n| format!("{}.experts.{{}}.{n}", self.block))
    }
}

/// DLPack code and bits of a dtype's name in PyTorch.
pub fn dtype(name: &Value) -> Result<(u8, u8)> {
    match name.as_str().map(|n| n.trim_start_matches("torch.")) {
        Some("bfloat16") => Ok(BF16),
        Some("float16") => Ok((FLOAT, 16)),
        Some("float32") => Ok(FP32),
        _ => bail!(RS_ERR_UNSUPPORTED, "dtype {name}: there are bfloat16, float16 and float32"),
    }
}
