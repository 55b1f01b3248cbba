//! Models: what their config.json says.

use serde_json::{Value, json};

const HALF: &str = "float16";
const BF16: &str = "bfloat16";
const FULL: &str = "float32";

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Family {
    Llama,
    Qwen2,
    Qwen3,
    Mixtral,
    Qwen2Moe,
    Qwen3Moe,
    DeepSeekV2,
    DeepSeekV3,
    GptOss,
}

use Family::*;

/// The members of config.json that say how large a model is; `head_dim` 0 where the config has none.
pub struct Model {
    pub family: Family,
    dtype: &'static str,
    pub hidden: u64,
    pub layers: u64,
    pub heads: u64,
    pub groups: u64,
    head_dim: u64,
    pub ffn: u64,
    pub vocabulary: u64,
    pub tied: bool,
    pub experts: Option<Experts>,
    pub latent: Option<Latent>,
    /// Parameters, where somebody else has counted them.
    pub total: Option<u64>,
}

/// Routed experts and the one that all tokens share.
#[derive(Clone, Copy)]
pub struct Experts {
    pub count: u64,
    pub width: u64,
    /// Width of the shared one; 0: none.
    pub shared: u64,
    /// Layers before the first with experts.
    dense: u64,
    /// Only every so manieth layer has experts.
    every: u64,
}

/// Attention with latent keys and values.
#[derive(Clone, Copy)]
pub struct Latent {
    /// Rank of the queries; 0: they have none.
    pub q: u64,
    pub kv: u64,
    /// Per head: what is not rotated, what is, values.
    pub nope: u64,
    pub rope: u64,
    pub value: u64,
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

/// Name, family; as above; experts, their width, that of the shared one, first layers without; every so manieth layer with; rank of
/// the queries; total.
type Sparse = (&'static str, Family, [u64; 7], [u64; 4], u64, u64, Option<u64>);

/// Public models with experts, then sizes made up: experts in some layers only.
#[rustfmt::skip]
const SPARSE: [Sparse; 15] = [
    ("Mixtral-8x7B",     Mixtral,    [4096, 32,  32,   8,   0, 14336,  32000], [  8, 14336,    0, 0], 1,    0, Some(   46_702_792_704)),
    ("Mixtral-8x22B",    Mixtral,    [6144, 56,  48,   8,   0, 16384,  32000], [  8, 16384,    0, 0], 1,    0, Some(  140_620_634_112)),
    ("Qwen1.5-MoE-A2.7B",Qwen2Moe,   [2048, 24,  16,  16,   0,  5632, 151936], [ 60,  1408, 5632, 0], 1,    0, None),
    ("Qwen3-30B-A3B",    Qwen3Moe,   [2048, 48,  32,   4, 128,  6144, 151936], [128,   768,    0, 0], 1,    0, Some(   30_532_122_624)),
    ("Qwen3-235B-A22B",  Qwen3Moe,   [4096, 94,  64,   4, 128, 12288, 151936], [128,  1536,    0, 0], 1,    0, Some(  235_093_634_560)),
    ("DeepSeek-V2-Lite", DeepSeekV2, [2048, 27,  16,  16,   0, 10944, 102400], [ 64,  1408, 2816, 1], 1,    0, Some(   15_706_484_224)),
    ("DeepSeek-V2",      DeepSeekV2, [5120, 60, 128, 128,   0, 12288, 102400], [160,  1536, 3072, 1], 1, 1536, Some(  235_741_434_880)),
    ("DeepSeek-V3",      DeepSeekV3, [7168, 61, 128, 128,   0, 18432, 129280], [256,  2048, 2048, 3], 1, 1536, Some(  671_026_419_200)),
    ("Kimi-K2",          DeepSeekV3, [7168, 61,  64,  64,   0, 18432, 163840], [384,  2048, 2048, 1], 1, 1536, Some(1_026_408_232_448)),
    ("Moonlight-16B-A3B",DeepSeekV3, [2048, 27,  16,  16,   0, 11264, 163840], [ 64,  1408, 2816, 1], 1,    0, Some(   15_960_110_208)),
    ("gpt-oss-20b",      GptOss,     [2880, 24,  64,   8,  64,  2880, 201088], [ 32,  2880,    0, 0], 1,    0, Some(   20_914_757_184)),
    ("gpt-oss-120b",     GptOss,     [2880, 36,  64,   8,  64,  2880, 201088], [128,  2880,    0, 0], 1,    0, Some(  116_829_156_672)),
    ("every second",     Qwen3Moe,   [2048, 12,  16,   4, 128,  6144,  48192], [ 24,   768,    0, 0], 2,    0, None),
    ("every third",      DeepSeekV3, [2048, 13,  12,  12,   0,  6144,  48192], [ 36,  1536, 1536, 2], 3,  768, None),
    ("shared and gated", Qwen2Moe,   [3072, 12,  24,   6,   0,  9216,  48192], [ 18,  1152, 4608, 0], 3,    0, None),
];

impl Model {
    pub fn named(name: &str) -> Model {
        if let Some(row) = SPARSE.iter().find(|r| r.0 == name) {
            let &(
                _,
                family,
                [hidden, layers, heads, groups, head_dim, ffn, vocabulary],
                [count, width, shared, dense],
                every,
                q,
                total,
            ) = row;
            let deep = matches!(family, DeepSeekV2 | DeepSeekV3);
            // These are the same in all of them.
            let latent = deep.then_some(Latent { q, kv: 512, nope: 128, rope: 64, value: 128 });
            let experts = Some(Experts { count, width, shared, dense, every });
            let (dtype, tied) = (BF16, false);
            return Model { family, dtype, hidden, layers, heads, groups, head_dim, ffn, vocabulary, tied, experts, latent, total };
        }
        let row = REAL.iter().chain(&OTHERS).find(|r| r.0 == name).unwrap_or_else(|| panic!("no model {name}"));
        let &(_, family, dtype, [hidden, layers, heads, groups, head_dim, ffn, vocabulary], tied, total) = row;
        let (experts, latent) = (None, None);
        Model { family, dtype, hidden, layers, heads, groups, head_dim, ffn, vocabulary, tied, experts, latent, total }
    }

    pub fn all() -> impl Iterator<Item = &'static str> {
        REAL.iter().chain(&OTHERS).map(|r| r.0).chain(SPARSE.iter().map(|r| r.0))
    }

    pub fn config(&self) -> Value {
        let architecture = match self.family {
            Llama => "LlamaForCausalLM",
            Qwen2 => "Qwen2ForCausalLM",
            Qwen3 => "Qwen3ForCausalLM",
            Mixtral => "MixtralForCausalLM",
            Qwen2Moe => "Qwen2MoeForCausalLM",
            Qwen3Moe => "Qwen3MoeForCausalLM",
            DeepSeekV2 => "DeepseekV2ForCausalLM",
            DeepSeekV3 => "DeepseekV3ForCausalLM",
            GptOss => "GptOssForCausalLM",
        };
        let mut config = json!({
            "architectures": [architecture], "hidden_size": self.hidden, "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads, "num_key_value_heads": self.groups, "intermediate_size": self.ffn,
            "vocab_size": self.vocabulary, "tie_word_embeddings": self.tied, "torch_dtype": self.dtype,
            "hidden_act": "silu", "rope_theta": 500000.0, "max_position_embeddings": 32768,
        });
        let mut set = |name: &str, value: Value| config[name] = value;
        if self.head_dim > 0 {
            set("head_dim", self.head_dim.into());
        }
        match self.family {
            GptOss => set("attention_bias", true.into()),
            Qwen2 | Qwen2Moe | Mixtral => {}
            _ => set("attention_bias", false.into()),
        }
        if let Some(e) = self.experts {
            match self.family {
                Mixtral | GptOss => set("num_local_experts", e.count.into()),
                Qwen2Moe | Qwen3Moe => {
                    set("num_experts", e.count.into());
                    set("moe_intermediate_size", e.width.into());
                    set("decoder_sparse_step", e.every.into());
                    set("mlp_only_layers", json!([]));
                    if e.shared > 0 {
                        set("shared_expert_intermediate_size", e.shared.into());
                    }
                }
                _ => {
                    set("n_routed_experts", e.count.into());
                    set("moe_intermediate_size", e.width.into());
                    set("n_shared_experts", (e.shared / e.width).into());
                    set("first_k_dense_replace", e.dense.into());
                    set("moe_layer_freq", e.every.into());
                    let grouped = [160, 256].contains(&e.count);
                    let greedy = if grouped { "group_limited_greedy" } else { "greedy" };
                    set("topk_method", if self.family == DeepSeekV3 { "noaux_tc" } else { greedy }.into());
                    set("num_nextn_predict_layers", 1.into());
                    // vLLM deals experts out only where they are grouped.
                    set("n_group", if grouped { 8 } else { 1 }.into());
                }
            }
        }
        if let Some(l) = self.latent {
            set("q_lora_rank", if l.q > 0 { l.q.into() } else { Value::Null });
            set("kv_lora_rank", l.kv.into());
            set("qk_nope_head_dim", l.nope.into());
            set("qk_rope_head_dim", l.rope.into());
            set("v_head_dim", l.value.into());
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

    pub fn has_bias(&self) -> bool {
        matches!(self.family, Qwen2 | Qwen2Moe | GptOss)
    }

    pub fn has_head_norms(&self) -> bool {
        matches!(self.family, Qwen3 | Qwen3Moe)
    }

    /// Whether a layer has experts in place of one MLP.
    pub fn has_experts(&self, layer: u64) -> bool {
        self.experts.is_some_and(|e| match self.family {
            Qwen2Moe | Qwen3Moe => (layer + 1) % e.every == 0,
            _ => layer >= e.dense && layer % e.every == 0,
        })
    }
}
