//! Time and memory of one rank's plan from a world spec, from 8 ranks to 16,384: the spec read, the plan made, nobody asked.
//!
//! `cargo bench --bench scale`; with a file's name after `--`, also a plot (SVG). Memory is what is allocated at the same time, the
//! spec's own included.

use reshard::plan::closed::{places, plan};
use reshard::plan::{Place, Plan};
use reshard::preset::world::World;
use std::alloc::{GlobalAlloc, Layout, System};
use std::fmt::Write;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Instant;

struct Counting;

static LIVE: AtomicUsize = AtomicUsize::new(0);
static PEAK: AtomicUsize = AtomicUsize::new(0);

fn grew(bytes: usize) {
    let live = LIVE.fetch_add(bytes, Ordering::Relaxed) + bytes;
    PEAK.fetch_max(live, Ordering::Relaxed);
}

// SAFETY: the system's allocator, with a count beside it.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        grew(layout.size());
        // SAFETY: the caller's promise is the system's.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, at: *mut u8, layout: Layout) {
        LIVE.fetch_sub(layout.size(), Ordering::Relaxed);
        // SAFETY: as above.
        unsafe { System.dealloc(at, layout) }
    }

    unsafe fn realloc(&self, at: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        grew(size);
        LIVE.fetch_sub(layout.size(), Ordering::Relaxed);
        // SAFETY: as above.
        unsafe { System.realloc(at, layout, size) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

const LLAMA_8B: &str = r#"{"architectures": ["LlamaForCausalLM"], "hidden_size": 4096, "num_hidden_layers": 32,
    "num_attention_heads": 32, "num_key_value_heads": 8, "intermediate_size": 14336, "vocab_size": 128256}"#;
const LLAMA_405B: &str = r#"{"architectures": ["LlamaForCausalLM"], "hidden_size": 16384, "num_hidden_layers": 126,
    "num_attention_heads": 128, "num_key_value_heads": 8, "intermediate_size": 53248, "vocab_size": 128256}"#;

/// Trainer: TP, PP, DP. Engines: their number and TP.
struct Job {
    model: &'static str,
    tp: u32,
    pp: u32,
    dp: u32,
    engines: u32,
    engine_tp: u32,
}

const JOBS: [Job; 9] = [
    Job { model: LLAMA_8B, tp: 2, pp: 2, dp: 1, engines: 2, engine_tp: 2 },
    Job { model: LLAMA_8B, tp: 4, pp: 2, dp: 1, engines: 2, engine_tp: 4 },
    Job { model: LLAMA_8B, tp: 4, pp: 2, dp: 4, engines: 16, engine_tp: 2 },
    Job { model: LLAMA_405B, tp: 8, pp: 16, dp: 1, engines: 8, engine_tp: 16 },
    Job { model: LLAMA_405B, tp: 8, pp: 16, dp: 4, engines: 32, engine_tp: 16 },
    Job { model: LLAMA_405B, tp: 8, pp: 16, dp: 8, engines: 64, engine_tp: 16 },
    Job { model: LLAMA_405B, tp: 8, pp: 16, dp: 16, engines: 128, engine_tp: 16 },
    Job { model: LLAMA_405B, tp: 8, pp: 16, dp: 32, engines: 256, engine_tp: 16 },
    Job { model: LLAMA_405B, tp: 8, pp: 16, dp: 64, engines: 512, engine_tp: 16 },
];

impl Job {
    fn spec(&self) -> String {
        let (sources, targets) = (self.tp * self.pp * self.dp, self.engines * self.engine_tp);
        let account = self.model == LLAMA_405B;
        format!(
            r#"{{"model": {}, "source": {{"framework": "megatron", "ranks": "0-{}", "tensor_model_parallel_size": {},
                "pipeline_model_parallel_size": {}, "account_for_embedding_in_pipeline_split": {account},
                "account_for_loss_in_pipeline_split": {account}}},
                "target": {{"framework": "vllm", "ranks": "{sources}-{}", "tensor_parallel_size": {}, "replicas": {}}}}}"#,
            self.model,
            sources - 1,
            self.tp,
            self.pp,
            sources + targets - 1,
            self.engine_tp,
            self.engines
        )
    }
}

/// Seconds and bytes of a rank's plan: the middle one of several runs.
fn measure(spec: &str, rank: u32, places: &[Place]) -> (f64, usize, usize) {
    let mut runs: Vec<(f64, usize, usize)> = (0..7)
        .map(|_| {
            let before = LIVE.load(Ordering::Relaxed);
            PEAK.store(before, Ordering::Relaxed);
            let begun = Instant::now();
            let world = World::new(spec).expect("a spec");
            let made: Plan = plan(rank, places, 256 << 20, &world).expect("a plan");
            let seconds = begun.elapsed().as_secs_f64();
            let pieces = made.peers.iter().map(|p| p.out.len() + p.into.len()).sum();
            (seconds, PEAK.load(Ordering::Relaxed) - before, pieces)
        })
        .collect();
    runs.sort_by(|a, b| a.0.total_cmp(&b.0));
    runs[runs.len() / 2]
}

const DEEPSEEK_V3: &str = r#"{"architectures": ["DeepseekV3ForCausalLM"], "hidden_size": 7168, "num_hidden_layers": 61,
    "num_attention_heads": 128, "q_lora_rank": 1536, "kv_lora_rank": 512, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64,
    "v_head_dim": 128, "n_routed_experts": 256, "n_shared_experts": 1, "moe_intermediate_size": 2048, "intermediate_size": 18432,
    "first_k_dense_replace": 3, "vocab_size": 129280}"#;

/// Layers and experts of models otherwise like DeepSeek-V3, on its 256 trainers and 32 engines.
const GROWTH: [(u32, u32); 8] = [(19, 256), (33, 256), (61, 256), (117, 256), (61, 64), (61, 128), (61, 512), (61, 1024)];

/// Name, spec, and two ranks with what they are.
type ExpertJob = (&'static str, String, [(&'static str, u32); 2]);

fn megatron(ranks: u32, tp: u32, ep: u32) -> String {
    format!(
        r#""framework": "megatron", "ranks": "0-{}", "tensor_model_parallel_size": {tp}, "pipeline_model_parallel_size": 16,
            "expert_model_parallel_size": {ep}, "expert_tensor_parallel_size": 1, "moe_grouped_gemm": true,
            "num_layers_in_first_pipeline_stage": 3, "num_layers_in_last_pipeline_stage": 2"#,
        ranks - 1
    )
}

fn vllm(ranks: &str, tp: u32, dp: u32, replicas: u32) -> String {
    format!(
        r#""framework": "vllm", "ranks": "{ranks}", "tensor_parallel_size": {tp}, "data_parallel_size": {dp},
            "replicas": {replicas}, "enable_expert_parallel": true"#
    )
}

fn spec(model: &str, source: &str, target: &str) -> String {
    format!(r#"{{"model": {model}, "source": {{{source}}}, "target": {{{target}}}}}"#)
}

fn expert_jobs() -> Vec<ExpertJob> {
    let kimi = DEEPSEEK_V3
        .replace("\"num_attention_heads\": 128", "\"num_attention_heads\": 64")
        .replace("\"n_routed_experts\": 256", "\"n_routed_experts\": 384")
        .replace("\"first_k_dense_replace\": 3", "\"first_k_dense_replace\": 1")
        .replace("\"vocab_size\": 129280", "\"vocab_size\": 163840");
    // Each layer's 256 experts and 32 more of them, in an order of its own.
    let map = |layer: u64| {
        let mut random = fastrand::Rng::with_seed(layer);
        let mut slots: Vec<u64> = (0..256).chain((0..32).map(|_| random.u64(0..256))).collect();
        random.shuffle(&mut slots);
        format!("{slots:?}")
    };
    let maps = (0..58).map(map).collect::<Vec<_>>().join(", ");
    let mindspeed = r#""framework": "megatron", "ranks": "0-255", "tensor_model_parallel_size": 4, "pipeline_model_parallel_size": 8,
        "expert_model_parallel_size": 8, "moe_tp_extend_ep": true, "transformer_impl": "local", "num_layer_list": "7,7,8,8,8,8,8,7""#;
    vec![
        (
            "DeepSeek-V3, 1024 (TP 8 PP 16 EP 64) -> 4 x (TP 8 DP 32, EP 256) on the same",
            spec(DEEPSEEK_V3, &megatron(1024, 8, 64), &vllm("0-1023", 8, 32, 4)),
            [("first stage", 0), ("middle", 500)],
        ),
        (
            "DeepSeek-V3, 256 (TP 1 PP 16 EP 16) -> 32 others (TP 8 DP 4, EP 32)",
            spec(DEEPSEEK_V3, &megatron(256, 1, 16), &vllm("256-287", 8, 4, 1)),
            [("trainer", 100), ("engine", 270)],
        ),
        (
            "Kimi-K2, 16,384 (TP 8 PP 16 EP 64) -> 64 x (TP 8 DP 8, EP 64) on 4,096 of them",
            spec(&kimi, &megatron(16384, 8, 64), &vllm("0-4095", 8, 8, 64)),
            [("both", 3000), ("trainer only", 5000)],
        ),
        (
            "DeepSeek-V3, 256 (TP 4 PP 8 EP 8, extended) -> 8 x (TP 4 DP 8, EP 32) on the same, 288 slots by a map",
            spec(DEEPSEEK_V3, mindspeed, &format!("{}, \"physical_to_logical_map\": [{maps}]", vllm("0-255", 4, 8, 8))),
            [("first stage", 0), ("middle", 100)],
        ),
    ]
}

fn main() {
    println!("| experts | rank | plan | memory | moves |\n|---|---|---|---|---|");
    for (name, spec, ranks) in expert_jobs() {
        let places = places(World::new(&spec).expect("a spec").ranks(), Some(8));
        for (side, rank) in ranks {
            let (seconds, bytes, pieces) = measure(&spec, rank, &places);
            println!("| {name} | {side} | {:.1} ms | {:.1} MiB | {pieces} |", seconds * 1e3, bytes as f64 / 1048576.0);
        }
    }
    println!("\n| layers | experts | trainer's rank | engine's rank |\n|---|---|---|---|");
    for (layers, experts) in GROWTH {
        let model = DEEPSEEK_V3
            .replace("\"num_hidden_layers\": 61", &format!("\"num_hidden_layers\": {layers}"))
            .replace("\"n_routed_experts\": 256", &format!("\"n_routed_experts\": {experts}"));
        let spec = spec(&model, &megatron(256, 1, 16), &vllm("256-287", 8, 4, 1));
        let places = places(288, Some(8));
        let [trainer, engine] = [100, 270].map(|rank| {
            let (seconds, bytes, _) = measure(&spec, rank, &places);
            format!("{:.1} ms, {:.1} MiB", seconds * 1e3, bytes as f64 / 1048576.0)
        });
        println!("| {layers} | {experts} | {trainer} | {engine} |");
    }
    println!("\n| ranks | trainer | engines | rank | plan | memory | moves |\n|---|---|---|---|---|---|---|");
    let mut points = vec![];
    for job in &JOBS {
        let (sources, targets) = (job.tp * job.pp * job.dp, job.engines * job.engine_tp);
        let places = places(sources + targets, Some(8));
        let spec = job.spec();
        // One in the middle of each side: neither the first stage nor the last.
        for (side, rank) in [("trainer", sources / 2), ("engine", sources + targets / 2)] {
            let (seconds, bytes, pieces) = measure(&spec, rank, &places);
            println!(
                "| {} + {} | TP {} PP {} DP {} | {} x TP {} | {side} | {:.1} ms | {:.1} MiB | {pieces} |",
                sources,
                targets,
                job.tp,
                job.pp,
                job.dp,
                job.engines,
                job.engine_tp,
                seconds * 1e3,
                bytes as f64 / 1048576.0
            );
            points.push((side, f64::from(sources + targets), seconds * 1e3));
        }
    }
    if let Some(file) = std::env::args().skip(1).find(|a| !a.starts_with("--")) {
        std::fs::write(&file, plot(&points)).expect("a file that can be written");
    }
}

/// Milliseconds over ranks, both logarithmic.
fn plot(points: &[(&str, f64, f64)]) -> String {
    let x = |ranks: f64| 60.0 + 560.0 * (ranks / 8.0).log2() / 11.0;
    let y = |ms: f64| 260.0 - 220.0 * (ms / 0.1).log10() / 3.0;
    let mut svg = String::from(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 660 310\" font-family=\"sans-serif\" font-size=\"12\">\n\
         <rect width=\"660\" height=\"310\" fill=\"white\"/>\n",
    );
    for ranks in [8.0, 32.0, 128.0, 512.0, 2048.0, 16384.0f64] {
        let _ = writeln!(
            svg,
            "<text x=\"{0:.0}\" y=\"280\" text-anchor=\"middle\">{ranks}</text><path d=\"M{0:.0} 40V262\" stroke=\"#ddd\"/>",
            x(ranks)
        );
    }
    for ms in [0.1, 1.0, 10.0, 100.0f64] {
        let _ = writeln!(
            svg,
            "<text x=\"52\" y=\"{0:.0}\" text-anchor=\"end\">{ms} ms</text><path d=\"M58 {0:.0}H640\" stroke=\"#ddd\"/>",
            y(ms)
        );
    }
    for (side, colour) in [("trainer", "#1f77b4"), ("engine", "#d62728")] {
        let of_side: Vec<(f64, f64)> = points.iter().filter(|p| p.0 == side).map(|p| (x(p.1), y(p.2))).collect();
        let line: Vec<String> = of_side.iter().map(|(x, y)| format!("{x:.0},{y:.0}")).collect();
        let _ = writeln!(svg, "<polyline points=\"{}\" fill=\"none\" stroke=\"{colour}\" stroke-width=\"2\"/>", line.join(" "));
        for (x, y) in &of_side {
            let _ = writeln!(svg, "<circle cx=\"{x:.0}\" cy=\"{y:.0}\" r=\"3\" fill=\"{colour}\"/>");
        }
        if let Some((x, y)) = of_side.last() {
            let _ = writeln!(
                svg,
                "<text x=\"{:.0}\" y=\"{:.0}\" text-anchor=\"end\" fill=\"{colour}\">{side}</text>",
                x - 6.0,
                y - 8.0
            );
        }
    }
    svg.push_str("<text x=\"340\" y=\"300\" text-anchor=\"middle\">ranks in all</text>\n<text x=\"340\" y=\"24\" text-anchor=\"middle\">plan of one rank from a world spec, one core</text>\n</svg>\n");
    svg
}
