//! Whole Hugging Face tensors, under their own names, on every rank.
#![forbid(unsafe_code)]

use super::cut::rows;
use super::mesh::{Axis, Mesh};
use super::model::{LayerType, Model, Part};
use super::side::{Param, Parts, Section, Slot};
use super::spec::Ranks;
use crate::error::Result;
use serde::Deserialize;

/// Members of a side of the framework `hf`.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Options {
    ranks: Ranks,
    #[serde(default)]
    dtype: Option<String>,
}

/// All kinds whole.
pub fn parts(model: &Model, options: &Options) -> Result<Parts> {
    let whole = |kind: usize, expert: u32| {
        let k = &model.kinds[kind];
        let width = k.shape[1..].iter().product();
        let name = k.name.replace("{}", &expert.to_string());
        let cut = rows(kind, k.shape[0], 0, k.shape[0], width, 0).map(|c| c.of(expert, 0));
        let param = Param::new(name, &k.shape, cut);
        if k.fp32 { param.fp32() } else { param }
    };
    let of = |part: Part, expert: u32| -> Vec<Param> {
        (0..model.kinds.len()).filter(|&k| model.kinds[k].part == part).map(|k| whole(k, expert)).collect()
    };
    let layer = |t: LayerType| {
        let experts = (0..model.experts() as u32).flat_map(|e| of(Part::Expert(t), e));
        Section::new(0, vec![of(Part::Layer(t), 0).into_iter().chain(experts).collect()])
    };
    let mut slots = vec![Slot::new(0, 0, 0, String::new())];
    slots.extend((0..).zip(&model.layers).map(|(l, &t)| {
        let section = if t == LayerType::Dense { 1 } else { 2 };
        Slot::new(section, l, 0, format!("model.layers.{l}."))
    }));
    Ok(Parts {
        meshes: vec![Mesh::new(&[(Axis::Shard, 1), (Axis::Copy, options.ranks.0.len() as u64)], options.ranks.0.len())?],
        ranks: options.ranks.0.clone(),
        dtype: super::spec::dtype("dtype", options.dtype.as_deref(), model)?,
        sections: vec![Section::new(0, vec![of(Part::Once, 0)]), layer(LayerType::Dense), layer(LayerType::Moe)],
        zero_centered: false,
        stages: vec![slots],
        unused: vec![],
        strip: "",
        renamed: &[],
    })
}
