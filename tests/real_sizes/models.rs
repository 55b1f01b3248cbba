//! Models: what their config.json says, and the logical tensors that follow.

use serde_json::{Value, json};

/// A logical tensor: its layer, if it belongs to one, and the rest of its name.
pub type Key = (Option<u64>, &'static str);

pub const EMBED: &str = "model.embed_tokens.weight";
pub const HEAD: &str = "lm_head.weight";
pub const NORM: &str = "model.norm.weight";

const HALF: &str = "float16";
const BF16: &str = "bfloat16";
const FULL: &str = "float32";

#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Family {
    Llama,
    Qwen2,
    Qwen3,
}

use Family::*;

/// The members of config.json that say how large a model is; `head_dim` 0 where the config has none.
pub struct Model {
    family: Family,
    dtype: &'static str,
    pub hidden: u64,
    pub layers: u64,
    pub heads: u64,
    pub groups: u64,
    head_dim: u64,
    pub ffn: u64,
    pub vocabulary: u64,
    pub tied: bool,
    /// Parameters, where somebody else has counted them.
    pub total: Option<u64>,
}

/// Name, family, dtype; hidden size, layers, heads, groups, head_dim, ffn, vocabulary; tied; total.
type Row = (&'static str, Family, &'static str, [u64; 7], bool, Option<u64>);

/// Public models, with the number of their parameters.
#[rustfmt::skip]
const REAL: [Row; 20] = [
    ("Llama-2-7B",    Llama, HALF, [ 4096,  32,  32, 32,   0, 11008,  32000], false, Some(  6_738_415_616)),
    ("Llama-2-70B",   Llama, HALF, [ 8192,  80,  64,  8,   0, 28672,  32000], false, Some( 68_976_648_192)),
    ("Llama-3.1-8B",  Llama, BF16, [ 4096,  32,  32,  8,   0, 14336, 128256], false, Some(  8_030_261_248)),
    ("Llama-3.1-70B", Llama, BF16, [ 8192,  80,  64,  8,   0, 28672, 128256], false, Some( 70_553_706_496)),
    ("Llama-3.1-405B",Llama, BF16, [16384, 126, 128,  8,   0, 53248, 128256], false, Some(405_853_388_800)),
    ("Llama-3.2-1B",  Llama, BF16, [ 2048,  16,  32,  8,  64,  8192, 128256], true,  Some(  1_235_814_400)),
    ("Llama-3.2-3B",  Llama, BF16, [ 3072,  28,  24,  8, 128,  8192, 128256], true,  Some(  3_212_749_824)),
    ("Qwen2.5-0.5B",  Qwen2, BF16, [  896,  24,  14,  2,   0,  4864, 151936], true,  Some(    494_032_768)),
    ("Qwen2.5-1.5B",  Qwen2, BF16, [ 1536,  28,  12,  2,   0,  8960, 151936], true,  Some(  1_543_714_304)),
    ("Qwen2.5-3B",    Qwen2, BF16, [ 2048,  36,  16,  2,   0, 11008, 151936], true,  Some(  3_085_938_688)),
    ("Qwen2.5-7B",    Qwen2, BF16, [ 3584,  28,  28,  4,   0, 18944, 152064], false, Some(  7_615_616_512)),
    ("Qwen2.5-14B",   Qwen2, BF16, [ 5120,  48,  40,  8,   0, 13824, 152064], false, Some( 14_770_033_664)),
    ("Qwen2.5-32B",   Qwen2, BF16, [ 5120,  64,  40,  8,   0, 27648, 152064], false, Some( 32_763_876_352)),
    ("Qwen2.5-72B",   Qwen2, BF16, [ 8192,  80,  64,  8,   0, 29568, 152064], false, Some( 72_706_203_648)),
    ("Qwen3-0.6B",    Qwen3, BF16, [ 1024,  28,  16,  8, 128,  3072, 151936], true,  Some(    596_049_920)),
    ("Qwen3-1.7B",    Qwen3, BF16, [ 2048,  28,  16,  8, 128,  6144, 151936], true,  Some(  1_720_574_976)),
    ("Qwen3-4B",      Qwen3, BF16, [ 2560,  36,  32,  8, 128,  9728, 151936], true,  Some(  4_022_468_096)),
    ("Qwen3-8B",      Qwen3, BF16, [ 4096,  36,  32,  8, 128, 12288, 151936], false, Some(  8_190_735_360)),
    ("Qwen3-14B",     Qwen3, BF16, [ 5120,  40,  40,  8, 128, 17408, 151936], false, Some( 14_768_307_200)),
    ("Qwen3-32B",     Qwen3, BF16, [ 5120,  64,  64,  8, 128, 25600, 151936], false, Some( 32_762_123_264)),
];

/// For tensor parallel sizes that no public model allows: SmolLM2's configs, and sizes made up. The last is that of
/// Megatron-core's own tests. Vocabularies that are made up are none that Megatron needs no padding for.
#[rustfmt::skip]
const OTHERS: [Row; 8] = [
    ("SmolLM2-135M", Llama, BF16, [ 576, 30,   9,   3,   0,  1536, 49152], true,  Some(134_515_008)),
    ("SmolLM2-360M", Llama, BF16, [ 960, 32,  15,   5,   0,  2560, 49152], true,  Some(361_821_120)),
    ("threes",       Qwen3, BF16, [6144, 12,  24,   6, 128, 18432, 48192], false, None),
    ("fives",        Qwen2, BF16, [5120, 10,  20,   5,   0, 20480, 32320], false, None),
    ("sixes",        Qwen3, FULL, [6144, 12,  36,   6, 144, 20736, 48768], true,  None),
    ("sevens",       Qwen2, BF16, [7168, 14,  28,   7,   0, 28672, 44352], true,  None),
    ("mixtures",     Llama, BF16, [6720, 12, 210, 210,  16, 26880, 20160], false, None),
    ("swaps",        Llama, BF16, [  32,  4,   8,   4,   0,   128,   128], false, None),
];

impl Model {
    pub fn named(name: &str) -> Model {
        let row = REAL.iter().chain(&OTHERS).find(|r| r.0 == name).unwrap_or_else(|| panic!("no model {name}"));
        let &(_, family, dtype, [hidden, layers, heads, groups, head_dim, ffn, vocabulary], tied, total) = row;
        Model { family, dtype, hidden, layers, heads, groups, head_dim, ffn, vocabulary, tied, total }
    }

    pub fn all() -> impl Iterator<Item = &'static str> {
        REAL.iter().chain(&OTHERS).map(|r| r.0)
    }

    pub fn config(&self) -> Value {
        let architecture = match self.family {
            Llama => "LlamaForCausalLM",
            Qwen2 => "Qwen2ForCausalLM",
            Qwen3 => "Qwen3ForCausalLM",
        };
        let mut config = json!({
            "architectures": [architecture], "hidden_size": self.hidden, "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads, "num_key_value_heads": self.groups, "intermediate_size": self.ffn,
            "vocab_size": self.vocabulary, "tie_word_embeddings": self.tied, "torch_dtype": self.dtype,
            "hidden_act": "silu", "rope_theta": 500000.0, "max_position_embeddings": 32768,
        });
        if self.head_dim > 0 {
            config["head_dim"] = self.head_dim.into();
        }
        if self.family != Qwen2 {
            config["attention_bias"] = false.into();
        }
        config
    }

    pub fn head(&self) -> u64 {
        if self.head_dim > 0 { self.head_dim } else { self.hidden / self.heads }
    }

    /// Bytes of an element.
    pub fn item(&self) -> u64 {
        if self.dtype == FULL { 4 } else { 2 }
    }

    /// The tensors of a layer: rows and columns, 0 columns where there is one axis only.
    pub fn of_layer(&self) -> Vec<(&'static str, u64, u64)> {
        let (q, kv, h) = (self.heads * self.head(), self.groups * self.head(), self.hidden);
        let mut out = vec![
            ("input_layernorm.weight", h, 0),
            ("post_attention_layernorm.weight", h, 0),
            ("self_attn.q_proj.weight", q, h),
            ("self_attn.k_proj.weight", kv, h),
            ("self_attn.v_proj.weight", kv, h),
            ("self_attn.o_proj.weight", h, q),
            ("mlp.gate_proj.weight", self.ffn, h),
            ("mlp.up_proj.weight", self.ffn, h),
            ("mlp.down_proj.weight", h, self.ffn),
        ];
        if self.has_bias() {
            out.extend([("self_attn.q_proj.bias", q, 0), ("self_attn.k_proj.bias", kv, 0), ("self_attn.v_proj.bias", kv, 0)]);
        }
        if self.has_head_norms() {
            out.extend([("self_attn.q_norm.weight", self.head(), 0), ("self_attn.k_norm.weight", self.head(), 0)]);
        }
        out
    }

    pub fn has_bias(&self) -> bool {
        self.family == Qwen2
    }

    pub fn has_head_norms(&self) -> bool {
        self.family == Qwen3
    }

    /// All logical tensors, as those of a layer.
    pub fn tensors(&self) -> Vec<(Key, u64, u64)> {
        let mut out = vec![((None, EMBED), self.vocabulary, self.hidden), ((None, NORM), self.hidden, 0)];
        if !self.tied {
            out.push(((None, HEAD), self.vocabulary, self.hidden));
        }
        for layer in 0..self.layers {
            out.extend(self.of_layer().into_iter().map(|(name, rows, cols)| ((Some(layer), name), rows, cols)));
        }
        out
    }
}

/// A tensor's name in the checkpoint.
pub fn name(key: Key) -> String {
    match key {
        (Some(layer), rest) => format!("model.layers.{layer}.{rest}"),
        (None, name) => name.into(),
    }
}
