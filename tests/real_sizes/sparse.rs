//! Pairs of models with experts, as [`super::pairs`]: those of MindSpeed-RL's and verl's examples first.
//!
//! What MindSpeed-RL calls TP4 EP16 is an attention TP of 4 and 4 * 16 ranks that share the experts, which vLLM has with tp=4, dp=16
//! and expert parallelism; as many such engines as there are ranks for. verl's TP8 DP8 without a word on expert parallelism is read
//! with it in `DEEPSEEK`, without it in `CUT_OFTEN`.

use super::pairs::Pairs;

#[rustfmt::skip]
pub const MIXTRAL: &[Pairs] = &[
    ("Mixtral-8x7B", &[
        "megatron 0-15 tp=2 pp=2 ep=4 etp=1 grouped -> vllm 0-15 tp=4",
        "megatron 0-15 tp=4 pp=2 ep=2 grouped -> vllm 16-23 tp=8 ep",
        "megatron 0-15 tp=4 pp=2 ep=2 etp=2 -> vllm 0-15 tp=2 dp=4",
        "megatron 0-15 tp=2 pp=2 ep=8 etp=1 legacy -> vllm 0-15 tp=2 dp=2 ep storage=stacked_transposed",
        "megatron 0-15 tp=2 pp=4 ep=2 etp=2 legacy -> vllm 0-7 tp=4 pp=2",
        "megatron 0-7 tp=4 ep=2 extend impl=local -> vllm 8-15 tp=4 pp=2 ep storage=stacked_swapped",
        "megatron 0-15 tp=2 pp=2 vpp=2 ep=2 grouped -> megatron 0-15 tp=4 pp=4 ep=4 etp=1",
        "vllm 0-15 tp=2 dp=4 ep -> vllm 0-15 tp=8 pp=2 storage=stacked_swapped",
        "hf 0-1 -> vllm 0-2 dp=3 ep",
        "vllm 0-7 tp=8 -> hf 8",
    ]),
    ("Mixtral-8x22B", &[
        "megatron 0-31 tp=4 pp=4 ep=8 etp=1 grouped -> vllm 0-31 tp=8",
        "megatron 0-31 tp=8 pp=4 ep=8 etp=1 -> vllm 32-47 tp=8 ep",
        "megatron 0-63 tp=2 pp=8 ep=4 etp=1 order cp=2 grouped -> vllm 0-63 tp=4 dp=2 ep",
        "megatron 0-31 tp=4 pp=2 ep=2 etp=2 grouped impl=local -> vllm 0-31 tp=8 storage=stacked_transposed",
        "megatron 0-31 tp=2 pp=4 ep=4 extend noop=0,1,58,59 -> vllm 0-31 tp=4 dp=2 ep storage=stacked_transposed",
        "vllm 0-15 tp=8 pp=2 -> megatron 16-47 tp=8 pp=2 ep=4 etp=2 grouped vpp=7",
        "hf 0-3 -> megatron 0-31 tp=8 pp=4 ep=4 etp=2",
        "hf 0 -> vllm 0-4 dp=5 ep",
    ]),
];

#[rustfmt::skip]
pub const QWEN_MOE: &[Pairs] = &[
    ("Qwen1.5-MoE-A2.7B", &[
        "megatron 0-7 tp=2 pp=2 ep=4 etp=1 grouped -> vllm 0-7 tp=4",
        "megatron 0-7 tp=4 pp=2 ep=2 etp=2 -> vllm 8-15 tp=8 ep",
        "megatron 0-11 tp=2 ep=6 etp=2 pp=1 grouped -> vllm 0-13 tp=2 dp=7 ep",
        "megatron 0-15 tp=4 pp=4 ep=2 etp=1 legacy -> vllm 0-7 tp=2 dp=2 ep storage=stacked_transposed",
        "megatron 0-7 tp=2 pp=2 ep=2 extend impl=local -> vllm 0-7 tp=4 pp=2 storage=stacked_swapped",
        "megatron 0-7 tp=2 pp=2 ep=1 vpp=3 -> megatron 0-7 tp=4 ep=4 etp=1 grouped",
        "vllm 0-15 tp=16 ep -> vllm 16-23 tp=4 dp=2",
        "hf 0-3 -> vllm 0-7 tp=2 pp=2 dp=2 ep eplb=4",
    ]),
    ("Qwen3-30B-A3B", &[
        "megatron 0-15 tp=4 ep=2 extend -> vllm 0-15 dp=8 ep",
        "megatron 0-15 tp=4 ep=2 extend -> vllm 0-15 dp=8 ep storage=stacked_transposed",
        "megatron 0-15 tp=4 ep=2 extend impl=local -> vllm 16-31 tp=8 dp=2 ep",
        "megatron 0-15 tp=4 pp=2 ep=8 etp=1 grouped -> vllm 0-15 tp=4",
        "megatron 0-31 tp=2 pp=4 ep=8 etp=1 -> vllm 0-31 tp=4 pp=2 dp=2 ep",
        "megatron 0-31 tp=4 pp=4 ep=2 etp=2 grouped vpp=3 -> vllm 32-43 tp=4 dp=3 ep",
        "megatron 0-15 tp=1 pp=2 ep=8 grouped -> megatron 16-31 tp=4 pp=4 ep=4 etp=1 impl=local",
        "vllm 0-15 tp=2 dp=8 ep eplb=16 -> vllm 0-15 tp=4",
        "hf 0-3 -> vllm 4-11 tp=8 storage=stacked_swapped",
        "vllm 0-7 tp=8 -> megatron 0-15 tp=2 pp=2 ep=4 etp=2 legacy",
    ]),
    ("Qwen3-235B-A22B", &[
        "megatron 0-127 tp=2 pp=16 ep=4 extend noop=5,95 -> vllm 0-127 tp=4 dp=8 ep",
        "megatron 0-127 tp=2 pp=16 ep=4 extend noop=5,95 impl=local -> vllm 0-127 tp=4 dp=8 ep storage=stacked_transposed",
        "megatron 0-255 tp=4 pp=8 cp=8 ep=8 first=11 last=11 grouped -> vllm 0-255 tp=4 dp=32 ep",
        "megatron 0-255 tp=4 pp=8 cp=8 ep=8 etp=1 first=11 last=11 grouped -> vllm 0-255 tp=4 dp=32 ep",
        "megatron 0-127 tp=4 pp=8 ep=4 first=11 last=11 grouped -> vllm 0-127 tp=8 dp=8 ep",
        "megatron 0-63 tp=4 pp=8 ep=8 etp=1 first=11 last=11 impl=local grouped -> vllm 64-95 tp=8 dp=2 pp=2 ep",
        "vllm 0-31 tp=8 dp=4 ep -> megatron 0-63 tp=2 pp=2 ep=16 etp=1 grouped",
        "hf 0-3 -> vllm 0-31 tp=8 dp=4 ep eplb=32",
        "megatron 0-31 tp=2 pp=2 ep=8 etp=1 -> vllm 32-47 tp=8 dp=2",
    ]),
];

#[rustfmt::skip]
pub const DEEPSEEK: &[Pairs] = &[
    ("DeepSeek-V3", &[
        "megatron 0-255 tp=4 pp=8 ep=8 extend list=7,7,8,8,8,8,8,7 -> vllm 0-255 tp=4 dp=16 ep storage=stacked_transposed",
        "megatron 0-255 tp=4 pp=8 ep=8 extend list=7,7,8,8,8,8,8,7 impl=local -> vllm 0-255 tp=4 dp=64 ep storage=stacked_transposed",
        "megatron 0-255 tp=4 pp=8 ep=8 extend list=7,7,8,8,8,8,8,7 -> vllm 0-255 tp=4 dp=64 ep eplb=256 storage=stacked_transposed",
        "megatron 0-255 tp=8 pp=16 ep=16 etp=1 first=3 last=2 grouped -> vllm 0-255 tp=8 dp=8 ep",
        "megatron 0-255 pp=16 ep=16 etp=1 first=3 last=2 grouped -> vllm 256-287 tp=8 dp=4 ep",
        "megatron 0-255 pp=16 ep=16 etp=1 first=3 last=2 -> vllm 256-287 tp=8 dp=4 ep eplb=32",
        "megatron 0-127 tp=8 pp=8 ep=16 etp=1 list=7,7,8,8,8,8,8,7 impl=local -> vllm 0-31 tp=4 dp=8 ep deal=round_robin",
        "hf 0-3 -> vllm 8-31 tp=2 dp=12 ep deal=round_robin",
        "vllm 0-31 tp=16 pp=2 ep -> vllm 32-95 tp=8 dp=8 ep storage=stacked_swapped",
    ]),
    ("DeepSeek-V2-Lite", &[
        "megatron 0-7 tp=2 ep=4 etp=2 grouped -> vllm 0-7 tp=4",
        "megatron 0-17 tp=2 pp=9 ep=2 etp=1 -> vllm 18-23 tp=2 dp=3 ep",
        "megatron 0-11 tp=4 pp=3 ep=4 etp=1 impl=local -> vllm 0-11 tp=4 dp=3 ep",
        "megatron 0-11 tp=4 pp=3 ep=2 etp=2 impl=local cut=false legacy -> vllm 0-7 tp=8",
        "megatron 0-7 tp=2 pp=2 ep=4 etp=1 first=14 grouped cut -> vllm 0-7 tp=2 dp=2",
        "megatron 0-11 tp=2 pp=3 vpp=3 ep=2 extend -> vllm 0-7 tp=4 pp=2 ep storage=stacked_transposed",
        "vllm 0-6 dp=7 ep -> vllm 0-7 tp=8 ep",
        "hf 0-1 -> megatron 0-15 tp=4 pp=4 ep=2 etp=2 grouped emb",
        "megatron 0-15 tp=16 ep=2 etp=8 grouped -> hf 16",
    ]),
    ("DeepSeek-V2", &[
        "megatron 0-63 tp=8 pp=4 ep=8 etp=2 grouped -> vllm 0-63 tp=8 dp=2 ep",
        "megatron 0-79 tp=4 pp=10 ep=8 etp=1 -> vllm 0-15 tp=16",
        "megatron 0-63 tp=4 pp=4 ep=4 extend impl=local -> vllm 64-111 tp=8 dp=6 ep",
        "hf 0-3 -> vllm 4-35 tp=8 dp=4 ep deal=round_robin",
    ]),
    ("Moonlight-16B-A3B", &[
        "megatron 0-7 tp=2 pp=4 ep=1 etp=2 first=7 last=6 grouped -> vllm 0-7 tp=4",
        "megatron 0-31 tp=2 pp=4 ep=1 etp=2 first=7 last=6 -> vllm 0-31 tp=4",
        "megatron 0-15 tp=2 pp=2 ep=4 etp=1 first=13 impl=local grouped -> vllm 0-15 tp=2 dp=4 ep",
        "megatron 0-11 tp=4 pp=3 ep=4 etp=1 vpp=3 -> vllm 12-19 tp=4 dp=2",
        "megatron 0-23 tp=4 pp=3 ep=2 extend -> vllm 0-23 tp=2 dp=3 ep storage=stacked_swapped",
        "vllm 0-9 tp=2 dp=5 ep -> megatron 0-11 tp=2 pp=3 ep=2 etp=2 grouped",
        "hf 0-1 -> vllm 0-7 tp=4 pp=2 ep",
        "vllm 0-15 tp=4 dp=4 ep eplb=16 -> vllm 16-23 tp=8",
    ]),
    ("Kimi-K2", &[
        "megatron 0-255 tp=8 pp=16 ep=16 etp=1 first=3 last=2 grouped -> vllm 0-255 tp=8 dp=8 ep",
        "megatron 0-255 tp=1 pp=16 ep=16 etp=1 first=3 last=2 grouped -> vllm 256-319 tp=16 dp=4 ep",
        "megatron 0-127 tp=4 pp=8 ep=16 etp=1 list=7,7,8,8,8,8,8,7 impl=local -> vllm 0-127 tp=16 dp=2 ep eplb=64",
        "hf 0-1 -> vllm 0-15 tp=16 ep storage=stacked_swapped",
    ]),
];

#[rustfmt::skip]
pub const GPT_OSS: &[Pairs] = &[
    ("gpt-oss-20b", &[
        "megatron 0-7 tp=2 ep=2 etp=2 grouped -> vllm 0-7 tp=4",
        "megatron 0-15 tp=4 pp=2 ep=4 etp=2 grouped -> vllm 0-15 tp=4 dp=2",
        "megatron 0-7 tp=2 ep=4 etp=1 grouped pp=2 -> vllm 8-15 tp=4 ep",
        "megatron 0-23 tp=8 pp=3 ep=8 etp=1 grouped vpp=2 -> vllm 0-23 tp=2 dp=3 ep",
        "megatron 0-15 tp=2 pp=4 ep=2 etp=1 grouped -> megatron 0-15 tp=4 pp=2 ep=4 etp=2 grouped",
        "vllm 0-7 tp=8 ep -> megatron 8-15 tp=2 pp=2 ep=2 etp=2 grouped",
        "vllm 0-9 tp=2 dp=5 -> vllm 0-15 tp=8 pp=2",
        "hf 0 -> vllm 1-4 tp=2 pp=2",
        "vllm 0-7 tp=4 ep eplb=8 dp=2 -> hf 0-7",
        "hf 0-3 -> megatron 0-7 tp=4 pp=2 ep=2 etp=2 grouped",
    ]),
    ("gpt-oss-120b", &[
        "megatron 0-31 tp=4 pp=4 ep=8 etp=1 grouped -> vllm 0-31 tp=8",
        "megatron 0-31 tp=2 pp=2 ep=8 etp=1 grouped -> vllm 32-39 tp=8 ep",
        "megatron 0-31 tp=8 pp=4 ep=2 etp=4 grouped -> vllm 32-47 tp=4 dp=4 ep eplb=16",
        "megatron 0-31 pp=4 ep=8 grouped first=8 last=10 -> vllm 0-7 tp=8",
    ]),
];

#[rustfmt::skip]
pub const SOME_LAYERS: &[Pairs] = &[
    ("every second", &[
        "megatron 0-11 tp=2 pp=3 ep=4 etp=1 grouped -> vllm 0-11 tp=4 dp=3 ep",
        "megatron 0-15 tp=4 pp=2 ep=2 etp=2 vpp=3 -> vllm 16-25 dp=5 tp=2 ep",
        "megatron 0-23 tp=4 pp=2 ep=3 extend etp=1 -> vllm 0-7 tp=8 pp=1",
        "hf 0-2 -> megatron 0-15 tp=2 pp=4 ep=2 etp=2 legacy",
    ]),
    ("every third", &[
        "megatron 0-12 pp=13 -> vllm 0-11 tp=3 dp=4 ep",
        "megatron 0-25 tp=2 pp=13 ep=2 etp=1 impl=local grouped -> vllm 0-11 tp=12",
        "hf 0-1 -> vllm 2-13 tp=4 pp=3 ep",
        "megatron 0-11 tp=6 ep=6 etp=2 pp=1 -> megatron 0-11 tp=3 ep=4 etp=3 grouped",
    ]),
    ("shared and gated", &[
        "megatron 0-11 tp=3 pp=2 ep=6 etp=1 grouped -> vllm 0-11 tp=6 dp=2 ep",
        "megatron 0-17 tp=6 pp=3 ep=3 etp=2 -> vllm 18-27 tp=2 dp=5 ep",
        "vllm 0-11 tp=3 pp=4 -> megatron 0-11 tp=6 pp=2 ep=3 etp=2 legacy",
        "hf 0-1 -> vllm 0-11 tp=12",
    ]),
];

/// Each expert in 64 parts: every engine rank has a piece of each of 44,544 tensors.
#[rustfmt::skip]
pub const CUT_OFTEN: &[Pairs] = &[
    ("DeepSeek-V3", &[
        "megatron 0-255 tp=8 pp=16 ep=16 etp=1 first=3 last=2 grouped -> vllm 0-63 tp=8 dp=8",
    ]),
];
