//! What a rank holds of each logical tensor, row by row and head by head, as the frameworks have it.

use super::models::{EMBED, HEAD, Key, Model, NORM};
use super::sides::{Framework, Side};

/// Half-open ranges of rows and columns; a tensor of one axis has one column.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Rect {
    pub rows: [u64; 2],
    pub cols: [u64; 2],
}

impl Rect {
    pub fn area(&self) -> u64 {
        (self.rows[1] - self.rows[0]) * (self.cols[1] - self.cols[0])
    }

    pub fn meet(&self, other: &Rect) -> Option<Rect> {
        let both = |a: [u64; 2], b: [u64; 2]| [a[0].max(b[0]), a[1].min(b[1])];
        let out = Rect { rows: both(self.rows, other.rows), cols: both(self.cols, other.cols) };
        (out.rows[0] < out.rows[1] && out.cols[0] < out.cols[1]).then_some(out)
    }
}

/// A parameter: its layer as the framework counts, if it belongs to one, and the rest of its name.
pub type Param = (Option<u64>, &'static str);

/// Where a rectangle of a tensor lies.
pub struct Held {
    pub key: Key,
    pub rect: Rect,
    pub param: Param,
    /// Elements from the parameter's first to the rectangle's.
    pub at: u64,
    /// Elements from row to row.
    pub stride: u64,
}

/// A parameter's full name.
pub fn name(framework: Framework, param: Param) -> String {
    match param {
        (Some(layer), rest) if framework == Framework::Megatron => format!("decoder.layers.{layer}.{rest}"),
        (Some(layer), rest) => format!("model.layers.{layer}.{rest}"),
        (None, name) => name.into(),
    }
}

/// Names of a layer's parameters: both norms, QKV, its bias, output, norms of heads, gate and up, down.
struct Names([&'static str; 9]);

const TRANSFORMER_ENGINE: Names = Names([
    "self_attention.linear_qkv.layer_norm_weight",
    "mlp.linear_fc1.layer_norm_weight",
    "self_attention.linear_qkv.weight",
    "self_attention.linear_qkv.bias",
    "self_attention.linear_proj.weight",
    "self_attention.q_layernorm.weight",
    "self_attention.k_layernorm.weight",
    "mlp.linear_fc1.weight",
    "mlp.linear_fc2.weight",
]);
const VLLM: Names = Names([
    "input_layernorm.weight",
    "post_attention_layernorm.weight",
    "self_attn.qkv_proj.weight",
    "self_attn.qkv_proj.bias",
    "self_attn.o_proj.weight",
    "self_attn.q_norm.weight",
    "self_attn.k_norm.weight",
    "mlp.gate_up_proj.weight",
    "mlp.down_proj.weight",
]);

/// One of `parts` equal runs.
fn share(n: u64, part: u64, parts: u64) -> [u64; 2] {
    assert_eq!(n % parts, 0, "{n} in {parts}");
    [part * n / parts, (part + 1) * n / parts]
}

/// Rows of the fused matrix that a rank has, in its order: the projection, and rows of it.
type Rows = Vec<(usize, [u64; 2])>;

/// Megatron: group by group its query heads, its key head, its value head; the whole cut in equal runs.
fn megatron_qkv(model: &Model, t: u64, r: u64) -> Rows {
    let (per_group, d) = (model.heads / model.groups, model.head());
    let mine = share(model.groups * (per_group + 2) * d, r, t);
    let (mut out, mut full) = (vec![], 0);
    for group in 0..model.groups {
        for (which, rows) in [per_group * d, d, d].into_iter().enumerate() {
            let (low, high) = (mine[0].max(full), mine[1].min(full + rows));
            if low < high {
                out.push((which, [group * rows + low - full, group * rows + high - full]));
            }
            full += rows;
        }
    }
    out
}

/// vLLM: the rank's query heads, then its key heads, then its value heads; these are replicated where there are more ranks.
fn vllm_qkv(model: &Model, t: u64, r: u64) -> Rows {
    let d = model.head();
    let q = share(model.heads, r, t);
    let kv = if model.groups >= t { share(model.groups, r, t) } else { share(model.groups, r * model.groups / t, model.groups) };
    assert!(model.groups % t == 0 || t % model.groups == 0);
    [q, kv, kv].into_iter().enumerate().map(|(which, heads)| (which, heads.map(|h| h * d))).collect()
}

/// Collects what one rank has.
struct Rank<'a> {
    model: &'a Model,
    t: u64,
    r: u64,
    out: Vec<Held>,
}

impl Rank<'_> {
    fn push(&mut self, key: Key, param: Param, rows: [u64; 2], cols: [u64; 2], at: u64, stride: u64) {
        if rows[0] < rows[1] {
            self.out.push(Held { key, rect: Rect { rows, cols }, param, at, stride });
        }
    }

    fn whole(&mut self, key: Key, param: Param, rows: u64, cols: u64) {
        self.push(key, param, [0, rows], [0, cols.max(1)], 0, cols.max(1));
    }

    /// Rows of a vocabulary of `padded` rows; those beyond the tensor's are nobody's.
    fn vocabulary(&mut self, key: Key, param: &'static str, padded: u64) {
        let rows = share(padded, self.r, self.t).map(|row| row.min(self.model.vocabulary));
        self.push(key, (None, param), rows, [0, self.model.hidden], 0, self.model.hidden);
    }

    /// `global` is the layer's number in the model, `local` in the names.
    fn layer(&mut self, names: &Names, qkv: &Rows, global: u64, local: u64) {
        let (model, t, r) = (self.model, self.t, self.r);
        let (h, q) = (model.hidden, model.heads * model.head());
        let key = |name| (Some(global), name);
        let [norm, mlp_norm, fused, bias, out, q_norm, k_norm, gate_up, down] = names.0.map(|name| (Some(local), name));
        self.whole(key("input_layernorm.weight"), norm, h, 0);
        self.whole(key("post_attention_layernorm.weight"), mlp_norm, h, 0);
        let weights = ["self_attn.q_proj.weight", "self_attn.k_proj.weight", "self_attn.v_proj.weight"];
        let biases = ["self_attn.q_proj.bias", "self_attn.k_proj.bias", "self_attn.v_proj.bias"];
        let mut at = 0;
        for &(which, rows) in qkv {
            self.push(key(weights[which]), fused, rows, [0, h], at * h, h);
            if model.has_bias() {
                self.push(key(biases[which]), bias, rows, [0, 1], at, 1);
            }
            at += rows[1] - rows[0];
        }
        self.push(key("self_attn.o_proj.weight"), out, [0, h], share(q, r, t), 0, q / t);
        if model.has_head_norms() {
            self.whole(key("self_attn.q_norm.weight"), q_norm, model.head(), 0);
            self.whole(key("self_attn.k_norm.weight"), k_norm, model.head(), 0);
        }
        let rows = share(model.ffn, r, t);
        self.push(key("mlp.gate_proj.weight"), gate_up, rows, [0, h], 0, h);
        self.push(key("mlp.up_proj.weight"), gate_up, rows, [0, h], model.ffn / t * h, h);
        self.push(key("mlp.down_proj.weight"), down, [0, h], rows, 0, model.ffn / t);
    }
}

/// What each rank of a side has, in the order of `side.ranks`.
pub fn held(side: &Side, model: &Model, target: bool) -> Vec<Vec<Held>> {
    let stages = side.stages(model);
    let t = side.size("tp");
    let rank = |at: u64| {
        let (r, stage) = side.coordinates(at);
        let mut rank = Rank { model, t, r, out: vec![] };
        match side.framework {
            Framework::Megatron => megatron(&mut rank, side, &stages[stage as usize], target),
            Framework::VLlm => vllm(&mut rank, side, &stages[stage as usize][0]),
            Framework::Hf => model.tensors().into_iter().for_each(|(key, rows, cols)| rank.whole(key, key, rows, cols)),
        }
        rank.out
    };
    (0..side.ranks.len() as u64).map(rank).collect()
}

fn megatron(rank: &mut Rank<'_>, side: &Side, chunks: &[super::sides::Chunk], target: bool) {
    let model = rank.model;
    let unit = side.number("div").unwrap_or(128) * rank.t;
    let padded = side.number("padded").unwrap_or(model.vocabulary.next_multiple_of(unit));
    let qkv = megatron_qkv(model, rank.t, rank.r);
    let mut names = TRANSFORMER_ENGINE;
    if side.flag("impl") {
        names.0[0] = "input_layernorm.weight";
        names.0[1] = "pre_mlp_layernorm.weight";
    }
    for chunk in chunks {
        for (local, layer) in (0..).zip(&chunk.layers) {
            if let Some(layer) = layer {
                rank.layer(&names, &qkv, *layer, local);
            }
        }
        if chunk.embedding {
            rank.vocabulary((None, EMBED), "embedding.word_embeddings.weight", padded);
        }
        if chunk.output {
            rank.whole((None, NORM), (None, "decoder.final_layernorm.weight"), model.hidden, 0);
            if !model.tied {
                rank.vocabulary((None, HEAD), "output_layer.weight", padded);
            } else if side.size("pp") > 1 && target {
                // As a source the copy is not read.
                rank.vocabulary((None, EMBED), "output_layer.weight", padded);
            }
        }
    }
}

fn vllm(rank: &mut Rank<'_>, side: &Side, chunk: &super::sides::Chunk) {
    let model = rank.model;
    let padded = model.vocabulary.next_multiple_of(64);
    let qkv = vllm_qkv(model, rank.t, rank.r);
    for layer in chunk.layers.iter().flatten() {
        rank.layer(&VLLM, &qkv, *layer, *layer);
    }
    if chunk.embedding || (chunk.output && model.tied && side.size("pp") > 1) {
        rank.vocabulary((None, EMBED), EMBED, padded);
    }
    if chunk.output {
        rank.whole((None, NORM), (None, NORM), model.hidden, 0);
        if !model.tied {
            rank.vocabulary((None, HEAD), HEAD, padded);
        }
    }
}
