//! The usual parameters of a shard: of a layer whole tensors, rows, columns, and gate over up; what comes before and after the layers.
#![forbid(unsafe_code)]

use super::cut;
use super::model::{LayerType, Model, Part, names};
use super::side::{Param, Section};

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

/// What follows the last layer, by the names of its norm and its head; `copy`: that of the head where embeddings are tied, if it has
/// some of its own.
pub fn back(model: &Model, [norm, head]: [&str; 2], copy: Option<&str>, padded: u64, r: u64, t: u64) -> Vec<Param> {
    let kind = model.kind(Part::Once, names::NORM);
    let mut out = vec![Param::new(norm, &[model.hidden], cut::rows(kind, model.hidden, 0, model.hidden, 1, 0))];
    let head = if model.tied { copy.map(|c| (c, names::EMBED)) } else { Some((head, names::HEAD)) };
    out.extend(head.map(|(param, tensor)| vocab(model, param, tensor, padded, r, t)));
    out
}

/// Indices of [`sections`]; those of experts follow.
pub const FRONT: usize = 0;
/// See [`FRONT`].
pub const BACK: usize = 1;
/// See [`FRONT`].
pub const DENSE: usize = 2;
/// See [`FRONT`].
pub const MOE: usize = 3;
/// See [`FRONT`].
pub const EXPERTS: usize = 4;

/// What each of `t` shards has of all but routed experts: before the layers, after them, and in a layer of each type.
pub fn sections(
    model: &Model,
    t: u64,
    front: impl Fn(u64) -> Vec<Param>,
    back: impl Fn(u64) -> Vec<Param>,
    layer: impl Fn(&Shard<'_>) -> Vec<Param>,
) -> Vec<Section> {
    let of_type = |of: LayerType| {
        let shard = |r| if model.layers.contains(&of) { layer(&Shard { model, layer: of, r, t }) } else { vec![] };
        Section::new(0, (0..t).map(shard).collect())
    };
    vec![
        Section::new(0, (0..t).map(front).collect()),
        Section::new(0, (0..t).map(back).collect()),
        of_type(LayerType::Dense),
        of_type(LayerType::Moe),
    ]
}
