//! Whole Hugging Face tensors, under their own names, on every rank.
#![forbid(unsafe_code)]

use super::cut::rows;
use super::mesh::{Axis, Mesh};
use super::model::{Model, Part};
use super::side::{Param, Parts, Section, Shard, Slot};
use super::spec::Ranks;
use crate::error::Result;
use serde::{Deserialize, Serialize};

/// Members of a side of the framework `hf`.
#[derive(Debug, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct Options {
    ranks: Ranks,
    #[serde(default)]
    dtype: Option<String>,
}

/// All kinds whole.
pub fn parts(model: &Model, options: &Options) -> Result<Parts> {
    let list = |part: Part| -> Vec<Param> {
        let of_part = model.kinds.iter().enumerate().filter(|(_, k)| k.part == part);
        of_part
            .map(|(i, k)| {
                let width = k.shape[1..].iter().product();
                Param::new(k.name, &k.shape, rows(i, k.shape[0], 0, k.shape[0], width, 0))
            })
            .collect()
    };
    let mut slots = vec![Slot::new(Section::Front, 0, 0, String::new())];
    slots.extend((0..model.layers).map(|l| Slot::new(Section::Layer, l, 0, format!("model.layers.{l}."))));
    slots.push(Slot::new(Section::Back, 0, 0, String::new()));
    Ok(Parts {
        mesh: Mesh::new(1, &[(Axis::Copy, options.ranks.0.len() as u64)]),
        ranks: options.ranks.0.clone(),
        dtype: super::spec::dtype("dtype", options.dtype.as_deref(), model)?,
        stages: vec![slots],
        shards: vec![Shard { front: list(Part::Front), layer: list(Part::Layer), back: list(Part::Back) }],
        unused: vec![],
        strip: "",
    })
}
