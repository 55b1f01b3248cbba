//! How layers are placed: a layout string such as "Et*3|(tt|)*2..L", num_layer_list, noop_layers and the sizes beside them, in the
//! spec of one small model.
//!
//! Four bytes of sizes, then lines: the layout; num_layer_list; noop_layers; the vLLM side's partition. An empty one is left out.
#![no_main]

use libfuzzer_sys::fuzz_target;
use reshard_fuzz::specs::look;
use reshard_fuzz::{Input, within_budget};

fuzz_target!(|data: &[u8]| within_budget(data.len(), || {
    let mut input = Input(data);
    let (layers, pp, vp, bits) = (input.byte() % 24 + 1, input.byte() % 8 + 1, input.byte(), input.byte());
    let text = String::from_utf8_lossy(input.0).into_owned();
    let mut source = String::new();
    let mut lines = text.split('\n');
    for (member, quoted) in [("pipeline_model_parallel_layout", true), ("num_layer_list", true), ("noop_layers", bits & 1 == 0)] {
        if let Some(line) = lines.next().filter(|l| !l.is_empty()) {
            source += &format!(", \"{member}\": {}", if quoted { json(line) } else { format!("[{}]", plain(line)) });
        }
    }
    let part = lines.next().filter(|l| !l.is_empty());
    let part = part.map_or(String::new(), |line| format!(", \"VLLM_PP_LAYER_PARTITION\": {}", json(line)));
    for (bit, member) in [
        (2, "\"account_for_embedding_in_pipeline_split\": true".to_string()),
        (4, "\"account_for_loss_in_pipeline_split\": true".to_string()),
        (8, "\"schedules_method\": \"dualpipev\"".to_string()),
        (16, format!("\"num_layers_in_first_pipeline_stage\": {}", bits >> 6)),
        (32, format!("\"num_layers_in_last_pipeline_stage\": {}", bits >> 6)),
        (64, format!("\"virtual_pipeline_model_parallel_size\": {vp}")),
        (128, "\"mtp_num_layers\": 1".to_string()),
    ] {
        if bits & bit != 0 {
            source += &format!(", {member}");
        }
    }
    let spec = format!(
        r#"{{"model": {{"architectures": ["Glm4MoeForCausalLM"], "hidden_size": 8, "num_hidden_layers": {layers}, "vocab_size": 9,
        "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 4, "intermediate_size": 4, "n_routed_experts": 2,
        "moe_intermediate_size": 4, "n_shared_experts": 1, "first_k_dense_replace": 1, "num_nextn_predict_layers": 1}},
        "source": {{"framework": "megatron", "ranks": "0-{}", "pipeline_model_parallel_size": {pp}{source}}},
        "target": {{"framework": "vllm", "ranks": "0-1", "pipeline_parallel_size": 2{part}}}}}"#,
        pp - 1
    );
    look(spec.as_bytes(), i32::from(vp % pp));
}));

/// A JSON string.
fn json(text: &str) -> String {
    let plain = |c: char| if c < ' ' || c == '"' || c == '\\' { format!("\\u{:04x}", c as u32) } else { c.to_string() };
    format!("\"{}\"", text.chars().map(plain).collect::<String>())
}

/// What a list may hold.
fn plain(text: &str) -> String {
    text.chars().filter(|c| "0123456789,-.e".contains(*c)).collect()
}
