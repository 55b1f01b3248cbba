//! Names of memory that bind leaves out, or refuses as a whole class.
#![forbid(unsafe_code)]

use wildmatch::WildMatchPattern;

/// Memory beside the parameters that no checkpoint has: what is computed from the config, scales of the KV cache, where experts are and
/// how often they were chosen.
const IGNORED: [&str; 15] = [
    "*rotary_emb.inv_freq",
    "*rotary_pos_emb.inv_freq",
    "*.k_scale",
    "*.v_scale",
    "*.q_scale",
    "*.prob_scale",
    "*._k_scale",
    "*._v_scale",
    "*._q_scale",
    "*._prob_scale",
    "*.expert_map",
    "*._expert_map",
    "*.expert_load_view",
    "*.logical_to_physical_map",
    "*.logical_replica_count",
];

/// Ends of the names of parameters that only quantised modules have; before them may stand `w13_` and `w2_`.
const OF_QUANTISED: [&str; 14] = [
    "weight_scale",
    "weight_scale_inv",
    "weight_scale_2",
    "weight_packed",
    "weight_shape",
    "weight_zero_point",
    "weight_g_idx",
    "input_scale",
    "input_scale_inv",
    "qweight",
    "qzeros",
    "scales",
    "g_idx",
    "weight_offset",
];

/// Marks of a LoRA adapter's parameters.
const OF_LORA: [&str; 3] = ["lora_A", "lora_B", ".base_layer."];

/// Whether a name is on the list of what bind leaves out.
pub fn ignored(name: &str) -> bool {
    IGNORED.iter().any(|p| matches(p, name))
}

/// Whether only a quantised module has such a name.
pub fn quantised(name: &str) -> bool {
    let last = name.rsplit('.').next().unwrap_or(name);
    let last = last.strip_prefix("w13_").or(last.strip_prefix("w2_")).unwrap_or(last);
    OF_QUANTISED.contains(&last)
}

/// The mark of a LoRA adapter that a name has.
pub fn lora(name: &str) -> Option<&'static str> {
    OF_LORA.into_iter().find(|mark| name.contains(mark))
}

/// Whether a name fits a pattern, in which `*` stands for any run of characters. No name has the other wildcard.
pub fn matches(pattern: &str, name: &str) -> bool {
    WildMatchPattern::<'*', '\0'>::new(pattern).matches(name)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn stars_stand_for_anything() {
        for (pattern, name, fits) in [
            ("a", "a", true),
            ("a", "ab", false),
            ("*.inv_freq", "l.3.inv_freq", true),
            ("*.inv_freq", "l.3.inv_freqs", false),
            ("l.*.k*", "l.30.attn.k_scale", true),
            ("l.*.k*", "x.30.attn.k_scale", false),
            ("*", "", true),
            ("a*b*c", "aXbXbYc", true),
            ("a*b*c", "aXcXb", false),
            ("**a**", "bab", true),
        ] {
            assert_eq!(matches(pattern, name), fits, "{pattern} {name}");
        }
    }
}
