//! The usual parameters of a layer's shard: whole tensors, rows, columns, and gate over up.
#![forbid(unsafe_code)]

use super::cut;
use super::model::{LayerType, Model, Part, names};
use super::side::Param;

/// Shard `r` of `t` of the layers of a type.
#[derive(Clone, Copy)]
pub struct Shard<'a> {
    /// The model.
    pub model: &'a Model,
    /// Which layers.
    pub layer: LayerType,
    /// Its number.
    pub r: u64,
    /// Their number.
    pub t: u64,
}

impl Shard<'_> {
    /// Index of a kind of these layers.
    pub fn kind(&self, name: &str) -> usize {
        self.model.kind(Part::Layer(self.layer), name)
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

    /// A column-parallel layer's weight.
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

    /// Whole tensors one below the other, on every shard.
    pub fn stacked(&self, param: &str, tensors: &[&str]) -> Param {
        let (mut at, mut columns, mut cuts) = (0, 0, vec![]);
        for tensor in tensors {
            let kind = self.kind(tensor);
            let [n, width] = self.shape(kind);
            cuts.extend(cut::rows(kind, n, 0, n, width, at));
            (at, columns) = (at + n, width);
        }
        Param::new(param, &[at, columns], cuts)
    }

    /// A row-parallel layer's weight.
    pub fn columns(&self, param: &str, tensor: &str) -> Param {
        let kind = self.kind(tensor);
        let [n, width] = self.shape(kind);
        Param::new(param, &[n, width / self.t], [cut::columns(kind, n, width, self.r, self.t)])
    }

    /// A merged column-parallel layer's weight.
    pub fn glu(&self, param: &str, gate: &str, up: &str) -> Param {
        let kinds = [self.kind(gate), self.kind(up)];
        let [ffn, width] = self.shape(kinds[0]);
        Param::new(param, &[2 * ffn / self.t, width], cut::glu(kinds, ffn, width, self.r, self.t))
    }
}

/// Rows `r` of `t` of a vocabulary padded to `padded`.
pub fn vocab(model: &Model, param: &str, tensor: &str, padded: u64, r: u64, t: u64) -> Param {
    let cut = cut::vocab(model.kind(Part::Once, tensor), model.vocab, padded, model.hidden, r, t);
    Param::new(param, &[padded / t, model.hidden], cut)
}

/// The norm after the last layer.
pub fn final_norm(model: &Model, param: &str) -> Param {
    let kind = model.kind(Part::Once, names::NORM);
    Param::new(param, &[model.hidden], cut::rows(kind, model.hidden, 0, model.hidden, 1, 0))
}
