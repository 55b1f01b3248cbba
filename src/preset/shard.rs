//! The usual parameters of a shard, whole tensors, rows, columns, and gate over up; the sections that a model has.
#![forbid(unsafe_code)]

use super::cut;
use super::model::{LayerType, Model, Part};
use super::side::{Param, Section, Slot};

/// Shard `r` of `t` of a part of a model: of the layers of a type, for instance.
#[derive(Clone, Copy)]
pub struct Shard<'a> {
    /// The model.
    pub model: &'a Model,
    /// Which part.
    pub part: Part,
    /// Its number.
    pub r: u64,
    /// Their number.
    pub t: u64,
}

impl Shard<'_> {
    /// Index of a kind of this part.
    pub fn kind(&self, name: &str) -> usize {
        self.model.kind(self.part, name)
    }

    /// Rows and columns of a kind; a vector has one column.
    fn shape(&self, kind: usize) -> [u64; 2] {
        let shape = &self.model.kinds[kind].shape;
        [shape[0], shape[1..].iter().product()]
    }

    /// A whole tensor, on every shard.
    pub fn whole(&self, param: &str, tensor: &str) -> Param {
        let kind = self.kind(tensor);
        let [n, width] = self.shape(kind);
        let out = Param::new(param, &self.model.kinds[kind].shape, cut::rows(kind, n, 0, n, width, 0));
        if self.model.kinds[kind].fp32 { out.fp32() } else { out }
    }

    /// A column-parallel layer's weight or bias.
    pub fn rows(&self, param: &str, tensor: &str) -> Param {
        let kind = self.kind(tensor);
        let [n, width] = self.shape(kind);
        let part = n / self.t;
        let shape = [&[part], &self.model.kinds[kind].shape[1..]].concat();
        Param::new(param, &shape, cut::rows(kind, n, self.r * part, part, width, 0))
    }

    /// Some rows of each head of a column-parallel layer's weight, whose heads have `rows` of them.
    pub fn of_heads(&self, param: &str, tensor: &str, rows: u64, of: (u64, u64)) -> Param {
        let kind = self.kind(tensor);
        let [n, width] = self.shape(kind);
        let heads = n / rows;
        let cut = cut::of_heads(kind, heads, rows, of, width, self.r, self.t);
        Param::new(param, &[heads / self.t * of.1, width], [cut])
    }

    /// This shard's rows of tensors, one below the other; of a shard of one: whole tensors.
    pub fn stacked(&self, param: &str, tensors: &[&str]) -> Param {
        let (mut at, mut columns, mut cuts) = (0, 0, vec![]);
        for tensor in tensors {
            let kind = self.kind(tensor);
            let [n, width] = self.shape(kind);
            let part = n / self.t;
            cuts.extend(cut::rows(kind, n, self.r * part, part, width, at));
            (at, columns) = (at + part, width);
        }
        Param::new(param, &[at, columns], cuts)
    }

    /// The same rows of each head, transposed, the heads being one axis.
    pub fn of_heads_transposed(&self, param: &str, tensor: &str, rows: u64, of: (u64, u64)) -> Param {
        let kind = self.kind(tensor);
        let [n, width] = self.shape(kind);
        let heads = n / rows;
        let cut = cut::of_heads_transposed(kind, heads, rows, of, width, self.r, self.t);
        Param::new(param, &[heads / self.t, width, of.1], [cut])
    }

    /// A row-parallel layer's weight.
    pub fn columns(&self, param: &str, tensor: &str) -> Param {
        let kind = self.kind(tensor);
        let [n, width] = self.shape(kind);
        Param::new(param, &[n, width / self.t], [cut::columns(kind, n, width, self.r, self.t)])
    }

    /// Rows of a vocabulary padded to `padded`, whatever the part.
    pub fn vocab(&self, param: &str, tensor: &str, padded: u64) -> Param {
        let Shard { model, r, t, .. } = *self;
        let cut = cut::vocab(model.kind(Part::Once, tensor), model.vocab, padded, model.hidden, r, t);
        Param::new(param, &[padded / t, model.hidden], cut)
    }

    /// A merged column-parallel layer's weight or bias.
    pub fn glu(&self, param: &str, gate: &str, up: &str) -> Param {
        let kinds = [self.kind(gate), self.kind(up)];
        let [ffn, width] = self.shape(kinds[0]);
        let shape = [&[2 * ffn / self.t], &self.model.kinds[kinds[0]].shape[1..]].concat();
        Param::new(param, &shape, cut::glu(kinds, ffn, width, self.r, self.t))
    }
}

/// Indices of [`sections`]; those of experts follow.
pub const EMBED: usize = 0;
/// See [`EMBED`]: the final norm.
pub const NORM: usize = 1;
/// See [`EMBED`].
pub const HEAD: usize = 2;
/// See [`EMBED`].
pub const DENSE: usize = 3;
/// See [`EMBED`].
pub const MOE: usize = 4;
/// See [`EMBED`]: what a layer for multi-token prediction has beside a layer of its type.
pub const MTP: usize = 5;
/// See [`EMBED`]: what stands before the vision tower's layers.
pub const PATCH: usize = 6;
/// See [`EMBED`].
pub const VISION: usize = 7;
/// See [`EMBED`]: what stands after the vision tower's layers.
pub const MERGER: usize = 8;
/// See [`EMBED`].
pub const EXPERTS: usize = 9;

/// Which tensors a section has, but for those of experts.
const PARTS: [Part; EXPERTS] = [
    Part::Once,
    Part::Once,
    Part::Once,
    Part::Layer(LayerType::Dense),
    Part::Layer(LayerType::Moe),
    Part::Mtp,
    Part::Once,
    Part::Layer(LayerType::Vision),
    Part::Once,
];

/// What each of `t` shards has of all but routed experts. `params`: of a shard of a section that the model has, by the section's index.
pub fn sections(model: &Model, t: u64, params: impl Fn(usize, &Shard<'_>) -> Vec<Param>) -> Vec<Section> {
    let of = |(section, part): (usize, Part)| {
        let there = model.kinds.iter().any(|k| k.part == part) && (![PATCH, MERGER].contains(&section) || model.vision.is_some());
        let shard = |r| if there { params(section, &Shard { model, part, r, t }) } else { vec![] };
        Section::new(0, (0..t).map(shard).collect())
    };
    PARTS.into_iter().enumerate().map(of).collect()
}

/// Slots of a layer of the decoder's kind; `experts`: the section of its experts, if it has any.
pub fn slots(model: &Model, layer: u64, chunk: u32, prefix: &str, experts: usize) -> impl Iterator<Item = Slot> {
    let sections = if model.layer(layer) == LayerType::Dense { vec![DENSE] } else { vec![MOE, experts] };
    sections.into_iter().map(move |s| Slot::new(s, layer, chunk, prefix.to_string()))
}
