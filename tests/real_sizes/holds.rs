//! What a rank holds of each logical tensor, row by row and head by head, as the frameworks have it.

use super::dense::{megatron_qkv, vllm_qkv};
use super::models::{Family, Model};
use super::names::{self, Names};
use super::sides::{Chunk, Framework, Place, Side};
use super::tensors::{EMBED, HEAD, Key, NORM, filled};
use std::collections::HashMap;
use std::rc::Rc;

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

/// Where a rectangle of a tensor lies.
pub struct Held {
    /// The tensor's ordinal.
    pub tensor: u32,
    pub rect: Rect,
    /// The parameter, its layer as the framework counts.
    pub param: Key,
    /// Elements from the parameter's first to the rectangle's.
    pub at: u64,
    /// Elements from row to row and from column to column.
    pub steps: [u64; 2],
}

/// A parameter's full name.
pub fn name(framework: Framework, (layer, rest, number): Key) -> String {
    let rest = filled(rest, number);
    match layer {
        Some(layer) if framework == Framework::Megatron => format!("decoder.layers.{layer}.{rest}"),
        Some(layer) => format!("model.layers.{layer}.{rest}"),
        None => rest,
    }
}

/// One of `parts` equal runs.
pub fn share(n: u64, part: u64, parts: u64) -> [u64; 2] {
    assert_eq!(n % parts, 0, "{n} in {parts}");
    [part * n / parts, (part + 1) * n / parts]
}

/// Collects what one rank has.
pub struct Rank<'a> {
    pub model: &'a Model,
    pub side: &'a Side,
    pub place: Place,
    pub t: u64,
    ordinals: &'a HashMap<Key, u32>,
    out: Vec<Held>,
}

impl Rank<'_> {
    pub fn push(&mut self, key: Key, param: Key, [rows, cols]: [[u64; 2]; 2], at: u64, steps: [u64; 2]) {
        if rows[0] < rows[1] {
            self.out.push(Held { tensor: self.ordinals[&key], rect: Rect { rows, cols }, param, at, steps });
        }
    }

    /// Some rows, `at` elements into a parameter of whole rows.
    pub fn rows(&mut self, key: Key, param: Key, rows: [u64; 2], width: u64, at: u64) {
        self.push(key, param, [rows, [0, width]], at, [width, 1]);
    }

    /// Some columns of all rows.
    pub fn cols(&mut self, key: Key, param: Key, rows: u64, cols: [u64; 2]) {
        self.push(key, param, [[0, rows], cols], 0, [cols[1] - cols[0], 1]);
    }

    /// Rows of a vocabulary of `padded` rows; those beyond the tensor's are nobody's.
    fn vocabulary(&mut self, key: Key, param: &'static str, padded: u64) {
        let rows = share(padded, self.place.tp, self.t).map(|row| row.min(self.model.vocabulary));
        self.rows(key, (None, param, 0), rows, self.model.hidden, 0);
    }

    /// `global` is the layer's number in the model, `local` in the names.
    fn layer(&mut self, names: &Names, qkv: &[(usize, [u64; 2])], global: u64, local: u64) {
        self.norms(names, global, local);
        match self.model.latent {
            Some(latent) => self.latent(names, &latent, global, local),
            None => self.attention(names, qkv, global, local),
        }
        if self.model.has_experts(global) {
            self.around_experts(names, global, local);
            self.experts(global, local);
        } else {
            self.mlp(names, global, local);
        }
    }
}

/// What each rank of a side has, in the order of `side.ranks`, by tensor; ranks that have the same share it.
pub fn held(side: &Side, model: &Model, target: bool, ordinals: &HashMap<Key, u32>) -> Vec<Rc<Vec<Held>>> {
    let stages = side.stages(model);
    let t = side.size("tp");
    let mut known: HashMap<Place, Rc<Vec<Held>>> = HashMap::new();
    let rank = |at: u64| {
        let place = side.place(at);
        let make = || {
            let mut rank = Rank { model, side, place, t, ordinals, out: vec![] };
            match side.framework {
                Framework::Megatron => megatron(&mut rank, &stages[place.stage as usize], target),
                Framework::VLlm => vllm(&mut rank, &stages[place.stage as usize][0]),
                Framework::Hf => hf(&mut rank),
            }
            rank.out.sort_by_key(|h| h.tensor);
            Rc::new(rank.out)
        };
        known.entry(place).or_insert_with(make).clone()
    };
    (0..side.ranks.len() as u64).map(rank).collect()
}

fn hf(rank: &mut Rank<'_>) {
    for tensor in rank.model.tensors() {
        let width = tensor.width();
        let rows = [0, tensor.shape.iter().product::<u64>() / width];
        if tensor.interleaved() {
            rank.push(tensor.key, tensor.key, [rows, [0, width / 2]], 0, [width, 2]);
            rank.push(tensor.key, tensor.key, [rows, [width / 2, width]], 1, [width, 2]);
        } else {
            rank.rows(tensor.key, tensor.key, rows, width, 0);
        }
    }
}

fn megatron(rank: &mut Rank<'_>, chunks: &[Chunk], target: bool) {
    let (model, side) = (rank.model, rank.side);
    let unit = side.number("div").unwrap_or(128) * rank.t;
    let padded = side.number("padded").unwrap_or(model.vocabulary.next_multiple_of(unit));
    let qkv = megatron_qkv(model, rank.t, rank.place.tp);
    let names = names::megatron(model, side.flag("impl"));
    for chunk in chunks {
        for (local, layer) in (0..).zip(&chunk.layers) {
            if let Some(layer) = layer {
                rank.layer(&names, &qkv, *layer, local);
            }
        }
        if chunk.embedding {
            rank.vocabulary(EMBED, "embedding.word_embeddings.weight", padded);
        }
        if chunk.output {
            rank.rows(NORM, (None, "decoder.final_layernorm.weight", 0), [0, model.hidden], 1, 0);
            if !model.tied {
                rank.vocabulary(HEAD, "output_layer.weight", padded);
            } else if side.size("pp") > 1 && target {
                // As a source the copy is not read.
                rank.vocabulary(EMBED, "output_layer.weight", padded);
            }
        }
    }
}

fn vllm(rank: &mut Rank<'_>, chunk: &Chunk) {
    let (model, pp) = (rank.model, rank.side.size("pp"));
    let padded = model.vocabulary.next_multiple_of(64);
    let qkv = vllm_qkv(model, rank.t, rank.place.tp);
    let names = names::vllm(model);
    for layer in chunk.layers.iter().flatten() {
        rank.layer(&names, &qkv, *layer, *layer);
    }
    // Some families build these on all stages.
    let always = matches!(model.family, Family::Mixtral | Family::Qwen2Moe | Family::Qwen3Moe | Family::GptOss);
    if always || chunk.embedding || (chunk.output && model.tied && pp > 1) {
        let gpt_oss = model.family == Family::GptOss;
        rank.vocabulary(EMBED, if gpt_oss { "model.embedding.weight" } else { EMBED.1 }, padded);
    }
    if always || chunk.output {
        rank.rows(NORM, NORM, [0, model.hidden], 1, 0);
        if !model.tied {
            rank.vocabulary(HEAD, HEAD.1, padded);
        }
    }
}
