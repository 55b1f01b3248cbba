//! Names of a layer's parameters in each framework.

use super::models::{Family, Model};

/// All that a layer may have, less its routed experts; what a framework or a model does not have is empty.
#[derive(Clone, Copy, Default)]
pub struct Names {
    pub norm: &'static str,
    /// The second norm, of a layer with one MLP and of one with experts.
    pub mlp_norm: [&'static str; 2],
    pub qkv: &'static str,
    pub qkv_bias: &'static str,
    pub out: &'static str,
    pub out_bias: &'static str,
    pub sinks: &'static str,
    pub head_norms: [&'static str; 2],
    /// Queries of latent attention: down, norm, up; the last alone where they have no rank.
    pub q: [&'static str; 3],
    pub q_alone: &'static str,
    /// The same of keys and values.
    pub kv: [&'static str; 3],
    /// Gate and up, down.
    pub mlp: [&'static str; 2],
    pub router: &'static str,
    pub router_bias: &'static str,
    pub correction: &'static str,
    pub shared: [&'static str; 2],
    pub shared_gate: &'static str,
}

/// `local`: norms are modules of their own everywhere.
pub fn megatron(model: &Model, local: bool) -> Names {
    Names {
        // Latent attention has no one linear layer that the norm could belong to.
        norm: match local || model.latent.is_some() {
            true => "input_layernorm.weight",
            false => "self_attention.linear_qkv.layer_norm_weight",
        },
        mlp_norm: [if local { "pre_mlp_layernorm.weight" } else { "mlp.linear_fc1.layer_norm_weight" }, "pre_mlp_layernorm.weight"],
        qkv: "self_attention.linear_qkv.weight",
        qkv_bias: "self_attention.linear_qkv.bias",
        out: "self_attention.linear_proj.weight",
        out_bias: "self_attention.linear_proj.bias",
        sinks: "self_attention.core_attention.softmax_offset",
        head_norms: ["self_attention.q_layernorm.weight", "self_attention.k_layernorm.weight"],
        q: [
            "self_attention.linear_q_down_proj.weight",
            if local { "self_attention.q_layernorm.weight" } else { "self_attention.linear_q_up_proj.layer_norm_weight" },
            "self_attention.linear_q_up_proj.weight",
        ],
        q_alone: "self_attention.linear_q_proj.weight",
        kv: [
            "self_attention.linear_kv_down_proj.weight",
            if local { "self_attention.kv_layernorm.weight" } else { "self_attention.linear_kv_up_proj.layer_norm_weight" },
            "self_attention.linear_kv_up_proj.weight",
        ],
        mlp: ["mlp.linear_fc1.weight", "mlp.linear_fc2.weight"],
        router: "mlp.router.weight",
        router_bias: "mlp.router.bias",
        correction: "mlp.router.expert_bias",
        shared: ["mlp.shared_experts.linear_fc1.weight", "mlp.shared_experts.linear_fc2.weight"],
        shared_gate: "mlp.shared_experts.gate_weight",
    }
}

pub fn vllm(model: &Model) -> Names {
    let mut names = Names {
        norm: "input_layernorm.weight",
        mlp_norm: ["post_attention_layernorm.weight"; 2],
        qkv: "self_attn.qkv_proj.weight",
        qkv_bias: "self_attn.qkv_proj.bias",
        out: "self_attn.o_proj.weight",
        out_bias: "",
        sinks: "",
        head_norms: ["self_attn.q_norm.weight", "self_attn.k_norm.weight"],
        q: ["self_attn.fused_qkv_a_proj.weight", "self_attn.q_a_layernorm.weight", "self_attn.q_b_proj.weight"],
        q_alone: "self_attn.q_proj.weight",
        kv: ["self_attn.fused_qkv_a_proj.weight", "self_attn.kv_a_layernorm.weight", "self_attn.kv_b_proj.weight"],
        mlp: ["mlp.gate_up_proj.weight", "mlp.down_proj.weight"],
        router: "mlp.gate.weight",
        router_bias: "",
        correction: "mlp.gate.e_score_correction_bias",
        shared: ["mlp.shared_experts.gate_up_proj.weight", "mlp.shared_experts.down_proj.weight"],
        shared_gate: "",
    };
    if model.latent.is_some_and(|l| l.q == 0) {
        names.kv[0] = "self_attn.kv_a_proj_with_mqa.weight";
    }
    match model.family {
        Family::Mixtral => names.router = "block_sparse_moe.gate.weight",
        Family::Qwen2Moe => {
            names.shared = ["mlp.shared_expert.gate_up_proj.weight", "mlp.shared_expert.down_proj.weight"];
            names.shared_gate = "mlp.shared_expert_gate.weight";
        }
        Family::GptOss => {
            (names.qkv, names.qkv_bias) = ("attn.qkv_proj.weight", "attn.qkv_proj.bias");
            (names.out, names.out_bias) = ("attn.o_proj.weight", "attn.o_proj.bias");
            names.sinks = "attn.sinks";
            (names.router, names.router_bias) = ("mlp.router.weight", "mlp.router.bias");
        }
        _ => {}
    }
    names
}

/// Names of vLLM's experts: gates and ups, downs, and the biases of both.
pub fn vllm_experts(family: Family) -> [&'static str; 4] {
    match family {
        Family::Mixtral => {
            ["block_sparse_moe.experts.routed_experts.w13_weight", "block_sparse_moe.experts.routed_experts.w2_weight", "", ""]
        }
        _ => [
            "mlp.experts.routed_experts.w13_weight",
            "mlp.experts.routed_experts.w2_weight",
            "mlp.experts.routed_experts.w13_bias",
            "mlp.experts.routed_experts.w2_bias",
        ],
    }
}
