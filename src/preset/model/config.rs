//! Members of a Hugging Face config.json.
#![forbid(unsafe_code)]

use super::{Attention, BF16, Heads, Latent, LayerType, MOST_PARTS, Moe, Vision, dtype};
use crate::abi::*;
use crate::error::{Result, bail, err};
use crate::preset::spec::MOST;
use serde_json::{Map, Value};
use std::borrow::Cow;

/// A config.json, or an object in it, with its name for errors.
pub struct Config<'a> {
    members: Cow<'a, Map<String, Value>>,
    name: &'static str,
}

/// Members that a decoder's layout depends on, which the text_config of a model with a vision tower may have.
const OF_TEXT: [&str; 10] = [
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "intermediate_size",
    "vocab_size",
    "tie_word_embeddings",
    "torch_dtype",
    "dtype",
];

/// Classes whose checkpoints have layers for multi-token prediction.
const PREDICTORS: [&str; 2] = ["DeepseekV3ForCausalLM", "Glm4MoeForCausalLM"];

/// Number of layers for multi-token prediction that a checkpoint has.
pub fn predictors(config: &Map<String, Value>) -> Result<u64> {
    match PREDICTORS.contains(&super::architecture(config)?.as_str()) {
        true => Config { members: Cow::Borrowed(config), name: "model" }.count("num_nextn_predict_layers", 0),
        false => Ok(0),
    }
}

impl Config<'_> {
    /// Members of a model's config.json; with those of its text_config, where a class with a vision tower has one.
    pub fn new<'a>(config: &'a Map<String, Value>, architecture: &str) -> Result<Config<'a>> {
        let members = match config.get("text_config").and_then(Value::as_object) {
            Some(text) if sees(architecture) => {
                let mut all = config.clone();
                for (member, value) in text.iter().filter(|m| !m.1.is_null()) {
                    let other = all.insert(member.clone(), value.clone()).filter(|o| !o.is_null() && o != value);
                    if let Some(other) = other.filter(|_| OF_TEXT.contains(&member.as_str())) {
                        bail!(RS_ERR_INVALID, "model.text_config.{member} {value} contradicts model.{member} {other}");
                    }
                }
                Cow::Owned(all)
            }
            _ => Cow::Borrowed(config),
        };
        Ok(Config { members, name: "model" })
    }

    /// A size, if it is there.
    pub fn number_or_none(&self, member: &str) -> Result<Option<u64>> {
        match self.members.get(member) {
            None | Some(Value::Null) => Ok(None),
            Some(v) => match v.as_u64().filter(|n| (1..=MOST).contains(n)) {
                Some(n) => Ok(Some(n)),
                None => bail!(RS_ERR_INVALID, "{}.{member} is {v}; it must be a number from 1 to {MOST}", self.name),
            },
        }
    }

    /// A size.
    pub fn number(&self, member: &str) -> Result<u64> {
        self.number_or_none(member)?.ok_or_else(|| err!(RS_ERR_INVALID, "{}.{member} is missing", self.name))
    }

    /// A number that may be 0.
    pub fn count(&self, member: &str, default: u64) -> Result<u64> {
        match self.members.get(member) {
            Some(v) if v.as_u64() == Some(0) => Ok(0),
            _ => Ok(self.number_or_none(member)?.unwrap_or(default)),
        }
    }

    /// True or false; false if it is not there.
    pub fn flag(&self, member: &str) -> Result<bool> {
        match self.members.get(member) {
            None | Some(Value::Null) => Ok(false),
            Some(Value::Bool(flag)) => Ok(*flag),
            Some(v) => bail!(RS_ERR_INVALID, "{}.{member} is {v}; it must be true or false", self.name),
        }
    }

    /// torch_dtype, which newer releases call dtype.
    pub fn dtype(&self) -> Result<(u8, u8)> {
        let given = |member: &str| match self.members.get(member) {
            None | Some(Value::Null) => Ok(None),
            Some(v) => dtype(v).map(Some).map_err(|e| e.context(format_args!("model.{member}"))),
        };
        match (given("torch_dtype")?, given("dtype")?) {
            (Some(a), Some(b)) if a != b => bail!(RS_ERR_INVALID, "model.torch_dtype and model.dtype contradict each other"),
            (a, b) => Ok(a.or(b).unwrap_or(BF16)),
        }
    }

    /// Members that would change the layout and are not supported.
    pub fn refuse(&self, architecture: &str) -> Result<()> {
        for member in ["attention_bias", "mlp_bias", "bias", "qkv_bias"] {
            if (architecture, member) == ("Glm4MoeForCausalLM", "attention_bias") {
                continue; // It has it or not.
            }
            // Where a class has it by default, what it is without cannot be had; elsewhere, what it is with.
            let built = match architecture {
                "Qwen2MoeForCausalLM" => member == "qkv_bias",
                "GptOssForCausalLM" => member == "attention_bias",
                _ => false,
            };
            if !matches!(self.members.get(member), None | Some(Value::Null))
                && self.members.get(member) != Some(&Value::Bool(built))
            {
                bail!(RS_ERR_UNSUPPORTED, "model.{member}: only {built} is built for {architecture}; describe it by tables");
            }
        }
        if architecture == "Qwen3NextForCausalLM" && self.members.get("attn_output_gate") == Some(&Value::Bool(false)) {
            bail!(RS_ERR_UNSUPPORTED, "model.attn_output_gate: only true is built for {architecture}; describe it by tables");
        }
        if !self.members.get("quantization_config").is_none_or(Value::is_null) {
            bail!(
                RS_ERR_UNSUPPORTED,
                "model.quantization_config: quantised layouts are private to their kernels; load the model unquantised"
            );
        }
        Ok(())
    }

    /// How the model attends.
    pub fn attention(&self, architecture: &str, hidden: u64) -> Result<Attention> {
        let heads = self.number("num_attention_heads")?;
        if architecture.starts_with("Deepseek") {
            return Ok(Attention::Latent(Latent {
                heads,
                q_lora: self.number_or_none("q_lora_rank")?,
                kv_lora: self.number("kv_lora_rank")?,
                dims: [self.number("qk_nope_head_dim")?, self.number("qk_rope_head_dim")?, self.number("v_head_dim")?],
            }));
        }
        let dim = match self.number_or_none("head_dim")? {
            Some(n) => n,
            None if architecture.starts_with("Qwen3") => self.number("head_dim")?,
            None if hidden % heads == 0 => hidden / heads,
            None => bail!(
                RS_ERR_INVALID,
                "model.hidden_size {hidden} is no multiple of num_attention_heads {heads}, and there is no head_dim"
            ),
        };
        // Other classes have defaults of their own, which depend on the release.
        let kv = match self.number_or_none("num_key_value_heads")? {
            None if architecture != "LlamaForCausalLM" => self.number("num_key_value_heads")?,
            given => given.unwrap_or(heads),
        };
        if heads % kv != 0 {
            bail!(RS_ERR_INVALID, "model.num_attention_heads {heads} is no multiple of num_key_value_heads {kv}");
        }
        let oss = architecture == "GptOssForCausalLM";
        let (bias, norm) = match architecture {
            "Glm4MoeForCausalLM" => (self.flag("attention_bias")?, self.flag("use_qk_norm")?),
            _ => (oss || architecture.starts_with("Qwen2"), architecture.starts_with("Qwen3")),
        };
        let gate = architecture == "Qwen3NextForCausalLM";
        Ok(Attention::Grouped(Heads { q: heads, kv, dim, bias, norm, out_bias: oss, sinks: oss, gate }))
    }

    /// Its experts, if it has any.
    pub fn moe(&self, architecture: &str) -> Result<Option<Moe>> {
        let projections = ["gate_proj.weight", "up_proj.weight", "down_proj.weight"];
        let moe = Moe {
            experts: 0,
            ffn: 0,
            shared: 0,
            shared_gate: false,
            block: "mlp",
            shared_name: "shared_experts",
            names: projections,
            correction: false,
            fp32_router: false,
            fused: false,
        };
        let moe = match architecture {
            "MixtralForCausalLM" => Moe {
                experts: self.number("num_local_experts")?,
                ffn: self.number("intermediate_size")?,
                block: "block_sparse_moe",
                names: ["w1.weight", "w3.weight", "w2.weight"],
                ..moe
            },
            "GptOssForCausalLM" => {
                Moe { experts: self.number("num_local_experts")?, ffn: self.number("intermediate_size")?, fused: true, ..moe }
            }
            "Qwen3MoeForCausalLM" => {
                Moe { experts: self.number("num_experts")?, ffn: self.number("moe_intermediate_size")?, ..moe }
            }
            "Qwen2MoeForCausalLM" | "Qwen3NextForCausalLM" => Moe {
                experts: self.number("num_experts")?,
                ffn: self.number("moe_intermediate_size")?,
                shared: self.number("shared_expert_intermediate_size")?,
                shared_gate: true,
                shared_name: "shared_expert",
                ..moe
            },
            "DeepseekV2ForCausalLM" | "DeepseekV3ForCausalLM" => {
                let Some(experts) = self.number_or_none("n_routed_experts")? else { return Ok(None) };
                let ffn = self.number("moe_intermediate_size")?;
                // V2's routers have none; V3's have where this is their method, which is the default.
                let method = self.members.get("topk_method").and_then(Value::as_str);
                let correction = architecture.contains("V3") && method.is_none_or(|m| m == "noaux_tc");
                Moe { experts, ffn, shared: self.count("n_shared_experts", 0)? * ffn, correction, ..moe }
            }
            "Glm4MoeForCausalLM" => {
                let (experts, ffn) = (self.number("n_routed_experts")?, self.number("moe_intermediate_size")?);
                let shared = self.count("n_shared_experts", 0)? * ffn;
                Moe { experts, ffn, shared, correction: true, fp32_router: true, ..moe }
            }
            _ => return Ok(None),
        };
        if moe.experts > MOST_PARTS {
            bail!(RS_ERR_INVALID, "model has {} experts; at most {MOST_PARTS} are possible", moe.experts);
        }
        Ok(Some(moe))
    }

    /// Its vision tower, if it has one.
    pub fn vision(&self, architecture: &str) -> Result<Option<Vision>> {
        if !sees(architecture) {
            return Ok(None);
        }
        let Some(members) = self.members.get("vision_config").and_then(Value::as_object) else {
            bail!(RS_ERR_INVALID, "model.vision_config is missing; {architecture} has a vision tower");
        };
        let c = Config { members: Cow::Borrowed(members), name: "model.vision_config" };
        let channels = match c.number_or_none("in_channels")? {
            Some(n) => n,
            None => c.number_or_none("in_chans")?.unwrap_or(3),
        };
        let patch = c.number("patch_size")?;
        let vision = Vision {
            depth: c.number("depth")?,
            hidden: c.number("hidden_size")?,
            heads: c.number("num_heads")?,
            ffn: c.number("intermediate_size")?,
            patch: [channels, c.number("temporal_patch_size")?, patch, patch],
            merge: c.number("spatial_merge_size")?,
            out: c.number("out_hidden_size")?,
        };
        if vision.depth > MOST_PARTS {
            bail!(RS_ERR_INVALID, "model.vision_config.depth is {}; at most {MOST_PARTS} are possible", vision.depth);
        }
        if vision.merge > 1 << 16 {
            bail!(RS_ERR_INVALID, "model.vision_config.spatial_merge_size is {}; at most 2^16 is possible", vision.merge);
        }
        if vision.hidden % vision.heads != 0 {
            bail!(RS_ERR_INVALID, "model.vision_config.hidden_size {} is no multiple of num_heads {}", vision.hidden, vision.heads);
        }
        Ok(Some(vision))
    }

    /// Refuses layers that attend in another way than this model's presets know.
    fn refuse_linear(&self, count: u64) -> Result<()> {
        let linear = match self.members.get("layer_types") {
            None | Some(Value::Null) => {
                let every = self.number_or_none("full_attention_interval")?.unwrap_or(4);
                (0..count).find(|l| (l + 1) % every != 0)
            }
            Some(v) => {
                let list = v.as_array().filter(|l| l.len() as u64 == count);
                let list = list
                    .ok_or_else(|| err!(RS_ERR_INVALID, "model.layer_types must be a list of num_hidden_layers {count} names"))?;
                (0..).zip(list).find(|(_, t)| t.as_str() != Some("full_attention")).map(|(l, _)| l)
            }
        };
        match linear {
            None => Ok(()),
            Some(l) => bail!(
                RS_ERR_UNSUPPORTED,
                "model.layer_types (or full_attention_interval): layer {l} is linear_attention, whose layout is not specified; only \
                 full_attention is: describe it by tables"
            ),
        }
    }

    /// Which layers have experts.
    pub fn layers(&self, architecture: &str, moe: bool) -> Result<Vec<LayerType>> {
        let count = self.number("num_hidden_layers")?;
        if count > MOST_PARTS {
            bail!(RS_ERR_INVALID, "model.num_hidden_layers is {count}; at most {MOST_PARTS} are possible");
        }
        if architecture == "Qwen3NextForCausalLM" {
            self.refuse_linear(count)?;
        }
        let step = self.number_or_none("decoder_sparse_step")?.unwrap_or(1);
        let dense = match self.members.get("mlp_only_layers") {
            None | Some(Value::Null) => vec![],
            Some(v) => {
                let list: Option<Vec<u64>> = v.as_array().and_then(|l| l.iter().map(Value::as_u64).collect());
                list.ok_or_else(|| err!(RS_ERR_INVALID, "model.mlp_only_layers is {v}; it must be a list of layers"))?
            }
        };
        let (first, freq) = (self.count("first_k_dense_replace", 0)?, self.number_or_none("moe_layer_freq")?.unwrap_or(1));
        let has = |l: u64| match architecture {
            "MixtralForCausalLM" | "GptOssForCausalLM" => true,
            "Qwen2MoeForCausalLM" | "Qwen3MoeForCausalLM" | "Qwen3NextForCausalLM" => !dense.contains(&l) && (l + 1) % step == 0,
            _ => l >= first && l % freq == 0,
        };
        Ok((0..count).map(|l| if moe && has(l) { LayerType::Moe } else { LayerType::Dense }).collect())
    }
}

/// Whether a class has a vision tower.
fn sees(architecture: &str) -> bool {
    architecture == "Qwen2_5_VLForConditionalGeneration"
}
