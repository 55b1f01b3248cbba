//! Members of a Hugging Face config.json.
#![forbid(unsafe_code)]

use super::model::{Attention, Heads, Latent, LayerType, MOST_PARTS, Moe, dtype};
use super::spec::MOST;
use crate::abi::*;
use crate::error::{Result, bail, err};
use serde_json::{Map, Value};

/// A config.json with its members' names for errors.
pub struct Config<'a>(pub &'a Map<String, Value>);

impl Config<'_> {
    /// A size, if it is there.
    pub fn number_or_none(&self, member: &str) -> Result<Option<u64>> {
        match self.0.get(member) {
            None | Some(Value::Null) => Ok(None),
            Some(v) => match v.as_u64().filter(|n| (1..=MOST).contains(n)) {
                Some(n) => Ok(Some(n)),
                None => bail!(RS_ERR_INVALID, "model.{member} is {v}; it must be a number from 1 to {MOST}"),
            },
        }
    }

    /// A size.
    pub fn number(&self, member: &str) -> Result<u64> {
        self.number_or_none(member)?.ok_or_else(|| err!(RS_ERR_INVALID, "model.{member} is missing"))
    }

    /// A number that may be 0.
    pub fn count(&self, member: &str, default: u64) -> Result<u64> {
        match self.0.get(member) {
            Some(v) if v.as_u64() == Some(0) => Ok(0),
            _ => Ok(self.number_or_none(member)?.unwrap_or(default)),
        }
    }

    /// True or false; false if it is not there.
    pub fn flag(&self, member: &str) -> Result<bool> {
        match self.0.get(member) {
            None | Some(Value::Null) => Ok(false),
            Some(Value::Bool(flag)) => Ok(*flag),
            Some(v) => bail!(RS_ERR_INVALID, "model.{member} is {v}; it must be true or false"),
        }
    }

    /// torch_dtype, which newer releases call dtype.
    pub fn dtype(&self) -> Result<(u8, u8)> {
        let given = |member: &str| match self.0.get(member) {
            None | Some(Value::Null) => Ok(None),
            Some(v) => dtype(v).map(Some).map_err(|e| e.context(format_args!("model.{member}"))),
        };
        match (given("torch_dtype")?, given("dtype")?) {
            (Some(a), Some(b)) if a != b => bail!(RS_ERR_INVALID, "model.torch_dtype and model.dtype contradict each other"),
            (a, b) => Ok(a.or(b).unwrap_or(super::model::BF16)),
        }
    }

    /// Members that would change the layout and are not supported.
    pub fn refuse(&self, architecture: &str) -> Result<()> {
        for member in ["attention_bias", "mlp_bias", "bias", "qkv_bias"] {
            // Where a class has it by default, what it is without cannot be had; elsewhere, what it is with.
            let built = match architecture {
                "Qwen2MoeForCausalLM" => member == "qkv_bias",
                "GptOssForCausalLM" => member == "attention_bias",
                _ => false,
            };
            if !matches!(self.0.get(member), None | Some(Value::Null)) && self.0.get(member) != Some(&Value::Bool(built)) {
                bail!(RS_ERR_UNSUPPORTED, "model.{member}: only {built} is built for {architecture}; describe it by tables");
            }
        }
        if !self.0.get("quantization_config").is_none_or(Value::is_null) {
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
        Ok(Attention::Grouped(Heads {
            q: heads,
            kv,
            dim,
            bias: oss || architecture.starts_with("Qwen2"),
            norm: architecture.starts_with("Qwen3"),
            out_bias: oss,
            sinks: oss,
        }))
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
            "Qwen2MoeForCausalLM" => Moe {
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
                let method = self.0.get("topk_method").and_then(Value::as_str);
                let correction = architecture.contains("V3") && method.is_none_or(|m| m == "noaux_tc");
                Moe { experts, ffn, shared: self.count("n_shared_experts", 0)? * ffn, correction, ..moe }
            }
            _ => return Ok(None),
        };
        if moe.experts > MOST_PARTS {
            bail!(RS_ERR_INVALID, "model has {} experts; at most {MOST_PARTS} are possible", moe.experts);
        }
        Ok(Some(moe))
    }

    /// Which layers have experts.
    pub fn layers(&self, architecture: &str, moe: bool) -> Result<Vec<LayerType>> {
        let count = self.number("num_hidden_layers")?;
        if count > MOST_PARTS {
            bail!(RS_ERR_INVALID, "model.num_hidden_layers is {count}; at most {MOST_PARTS} are possible");
        }
        let step = self.number_or_none("decoder_sparse_step")?.unwrap_or(1);
        let dense = match self.0.get("mlp_only_layers") {
            None | Some(Value::Null) => vec![],
            Some(v) => {
                let list: Option<Vec<u64>> = v.as_array().and_then(|l| l.iter().map(Value::as_u64).collect());
                list.ok_or_else(|| err!(RS_ERR_INVALID, "model.mlp_only_layers is {v}; it must be a list of layers"))?
            }
        };
        let (first, freq) = (self.count("first_k_dense_replace", 0)?, self.number_or_none("moe_layer_freq")?.unwrap_or(1));
        let has = |l: u64| match architecture {
            "MixtralForCausalLM" | "GptOssForCausalLM" => true,
            "Qwen2MoeForCausalLM" | "Qwen3MoeForCausalLM" => !dense.contains(&l) && (l + 1) % step == 0,
            _ => l >= first && l % freq == 0,
        };
        Ok((0..count).map(|l| if moe && has(l) { LayerType::Moe } else { LayerType::Dense }).collect())
    }
}
