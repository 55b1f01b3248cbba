//! Models that the rest of this test does not write down: their public totals, and plans of every rank of some worlds of theirs, which
//! find a sender for every element of every target or fail.

use super::check::ensure;
use reshard::plan::closed::{places, plan};
use reshard::preset::world::World;
use serde_json::{Value, json};

/// Name; hidden size, layers, heads, groups, head_dim, ffn, vocabulary; experts, their width, shared ones, layers before the first with
/// experts; q and k norms; total without the layer for multi-token prediction.
type Glm = (&'static str, [u64; 7], [u64; 4], bool, u64);

#[rustfmt::skip]
const GLM: [Glm; 2] = [
    ("GLM-4.5",     [5120, 92, 96, 8, 128, 12288, 151552], [160, 1536, 1, 3], true,  352_797_829_024),
    ("GLM-4.5-Air", [4096, 46, 96, 8, 128, 10944, 151552], [128, 1408, 1, 1], false, 106_852_251_264),
];

/// Name; hidden size, layers, heads, groups, ffn, vocabulary; tied; the vision tower's ffn; total.
type Sees = (&'static str, [u64; 6], bool, u64, u64);

#[rustfmt::skip]
const QWEN2_5_VL: [Sees; 4] = [
    ("Qwen2.5-VL-3B",  [2048, 36, 16, 2, 11008, 151936], true,  3420,  3_754_622_976),
    ("Qwen2.5-VL-7B",  [3584, 28, 28, 4, 18944, 152064], false, 3420,  8_292_166_656),
    ("Qwen2.5-VL-32B", [5120, 64, 40, 8, 27648, 152064], false, 3456, 33_452_718_336),
    ("Qwen2.5-VL-72B", [8192, 80, 64, 8, 29568, 152064], false, 3456, 73_410_777_344),
];

fn glm(row: &Glm) -> Value {
    let &(_, [hidden, layers, heads, groups, dim, ffn, vocabulary], [experts, width, shared, dense], norms, _) = row;
    json!({
        "architectures": ["Glm4MoeForCausalLM"], "hidden_size": hidden, "num_hidden_layers": layers, "num_attention_heads": heads,
        "num_key_value_heads": groups, "head_dim": dim, "intermediate_size": ffn, "vocab_size": vocabulary,
        "n_routed_experts": experts, "moe_intermediate_size": width, "n_shared_experts": shared, "first_k_dense_replace": dense,
        "use_qk_norm": norms, "attention_bias": true, "partial_rotary_factor": 0.5, "num_nextn_predict_layers": 1,
        "tie_word_embeddings": false, "torch_dtype": "bfloat16", "num_experts_per_tok": 8, "n_group": 1, "topk_group": 1,
    })
}

fn sees(row: &Sees) -> Value {
    let &(_, [hidden, layers, heads, groups, ffn, vocabulary], tied, tower, _) = row;
    json!({
        "architectures": ["Qwen2_5_VLForConditionalGeneration"], "hidden_size": hidden, "num_hidden_layers": layers,
        "num_attention_heads": heads, "num_key_value_heads": groups, "intermediate_size": ffn, "vocab_size": vocabulary,
        "tie_word_embeddings": tied, "torch_dtype": "bfloat16", "image_token_id": 151655,
        "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]},
        "vision_config": {
            "depth": 32, "hidden_size": 1280, "num_heads": 16, "intermediate_size": tower, "out_hidden_size": hidden, "in_chans": 3,
            "patch_size": 14, "spatial_merge_size": 2, "spatial_patch_size": 14, "temporal_patch_size": 2, "window_size": 112,
            "tokens_per_second": 2, "fullatt_block_indexes": [7, 15, 23, 31],
        },
    })
}

/// Texts of config.json written after the published ones, with the members that no layout needs too; the totals are the public ones.
const CONFIGS: [(&str, &str, u64); 13] = [
    ("Llama-3.1-8B", include_str!("configs/Llama-3.1-8B.json"), 8_030_261_248),
    ("Qwen2.5-7B", include_str!("configs/Qwen2.5-7B.json"), 7_615_616_512),
    ("Qwen3-8B", include_str!("configs/Qwen3-8B.json"), 8_190_735_360),
    ("Qwen3-30B-A3B", include_str!("configs/Qwen3-30B-A3B.json"), 30_532_122_624),
    ("Mixtral-8x7B", include_str!("configs/Mixtral-8x7B.json"), 46_702_792_704),
    ("Qwen1.5-MoE-A2.7B", include_str!("configs/Qwen1.5-MoE-A2.7B.json"), 14_315_784_192),
    ("DeepSeek-V2-Lite", include_str!("configs/DeepSeek-V2-Lite.json"), 15_706_484_224),
    ("DeepSeek-V3", include_str!("configs/DeepSeek-V3.json"), 671_026_419_200),
    ("Kimi-K2", include_str!("configs/Kimi-K2.json"), 1_026_408_232_448),
    ("Moonlight-16B-A3B", include_str!("configs/Moonlight-16B-A3B.json"), 15_960_110_208),
    ("GLM-4.5-Air", include_str!("configs/GLM-4.5-Air.json"), 106_852_251_264),
    ("gpt-oss-20b", include_str!("configs/gpt-oss-20b.json"), 20_914_757_184),
    ("Qwen2.5-VL-7B", include_str!("configs/Qwen2.5-VL-7B.json"), 8_292_166_656),
];

/// A config as publishers write it is taken whole, unless it is of a quantised checkpoint.
#[test]
fn published_configs() {
    let world = |config: &Value| {
        let hf = json!({"framework": "hf", "ranks": [0]});
        World::new(&json!({"model": config, "source": hf, "target": hf}).to_string())
    };
    for (name, text, total) in CONFIGS {
        let mut config: Value = serde_json::from_str(text).unwrap();
        if config.get("quantization_config").is_some() {
            let e = world(&config).err().unwrap_or_else(|| panic!("{name} is quantised"));
            assert!(e.text().contains("quantization_config"), "{name}: {e}");
            config.as_object_mut().unwrap().remove("quantization_config");
        }
        assert_eq!(world(&config).unwrap_or_else(|e| panic!("{name}: {e}")).model().parameters(), total, "{name}");
    }
    let next: Value = serde_json::from_str(include_str!("configs/Qwen3-Next-80B-A3B.json")).unwrap();
    let e = world(&next).err().expect("linear attention");
    assert!(e.text().contains("linear_attention") && e.text().contains("layer 0"), "{e}");
}

#[test]
fn public_totals() {
    let models = GLM.iter().map(|r| (r.0, glm(r), r.4)).chain(QWEN2_5_VL.iter().map(|r| (r.0, sees(r), r.4)));
    for (name, config, total) in models {
        let hf = json!({"framework": "hf", "ranks": [0]});
        let world = World::new(&json!({"model": config, "source": hf, "target": hf}).to_string()).unwrap();
        assert_eq!(world.model().parameters(), total, "{name}");
    }
}

#[test]
fn every_rank_plans() {
    let megatron = |ranks: u32, more: Value| side("megatron", 0..ranks, more);
    let moe = json!({"tensor_model_parallel_size": 4, "pipeline_model_parallel_size": 2, "expert_model_parallel_size": 8,
        "expert_tensor_parallel_size": 1, "moe_grouped_gemm": true, "mtp_num_layers": 1});
    let other = json!({"tensor_model_parallel_size": 8, "expert_model_parallel_size": 4, "moe_grouped_gemm": true,
        "moe_single_grouped_weight": true, "expert_tensor_parallel_size": 2, "mtp_num_layers": 1});
    let tower = json!({"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 4, "vision_names": "mindspeed_mm",
        "vision_num_layer_list": "32,0,0,0", "num_layer_list": "4,10,11,11"});
    let bridge = json!({"tensor_model_parallel_size": 4, "vision_names": "megatron_bridge"});
    let engine = |ranks, more: Value| side("vllm", ranks, more);
    let all = [
        (glm(&GLM[1]), megatron(16, moe), megatron(16, other.clone())),
        (glm(&GLM[1]), side("hf", 16..17, json!({})), megatron(16, other.clone())),
        // The engine's routers are in fp32.
        (
            glm(&GLM[0]),
            megatron(16, other.clone()),
            engine(0..16, json!({"tensor_parallel_size": 8, "data_parallel_size": 2, "enable_expert_parallel": true})),
        ),
        (glm(&GLM[1]), megatron(16, other), engine(16..24, json!({"tensor_parallel_size": 8, "mtp_drafter": true}))),
        (sees(&QWEN2_5_VL[0]), megatron(8, tower), engine(0..8, json!({"tensor_parallel_size": 2, "replicas": 4}))),
        (
            sees(&QWEN2_5_VL[1]),
            megatron(4, json!({"tensor_model_parallel_size": 4})),
            engine(4..8, json!({"tensor_parallel_size": 4})),
        ),
        (
            sees(&QWEN2_5_VL[3]),
            megatron(8, json!({"tensor_model_parallel_size": 4, "pipeline_model_parallel_size": 2})),
            engine(8..16, json!({"tensor_parallel_size": 8, "mm_encoder_tp_mode": "data"})),
        ),
        (sees(&QWEN2_5_VL[2]), megatron(4, bridge), engine(0..4, json!({"tensor_parallel_size": 2, "pipeline_parallel_size": 2}))),
    ];
    for (config, source, target) in all {
        let spec = json!({"model": config, "source": source, "target": target}).to_string();
        all_plan(&spec).unwrap_or_else(|e| panic!("{e}: {spec}"));
    }
}

fn side(framework: &str, ranks: std::ops::Range<u32>, members: Value) -> Value {
    let mut out = members;
    out["framework"] = framework.into();
    out["ranks"] = format!("{}-{}", ranks.start, ranks.end - 1).into();
    out
}

/// What all ranks send is what all receive, and every target is filled.
fn all_plan(spec: &str) -> Result<(), String> {
    let world = World::new(spec).map_err(|e| e.to_string())?;
    let places = places(world.ranks(), Some(8));
    let (mut sent, mut received) = (0, 0);
    for rank in 0..world.ranks() {
        let plan = plan(rank, &places, 256 << 20, &world).map_err(|e| format!("rank {rank}: {e}"))?;
        let (out, into) = plan.wire_bytes();
        (sent, received) = (sent + out, received + into);
    }
    ensure!(sent == received && sent > 0, "{sent} bytes sent, {received} received");
    Ok(())
}
