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

/// Of the first tensors, of a layer of each type, and of what layers for multi-token prediction have beside theirs.
const SECTIONS: [Part; 5] =
    [Part::Once, Part::Layer(LayerType::Dense), Part::Layer(LayerType::Moe), Part::Layer(LayerType::Vision), Part::Mtp];

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
    let section = |part: Part| {
        let mut params = of(part, 0);
        if let Part::Layer(t) = part {
            params.extend((0..model.experts() as u32).flat_map(|e| of(Part::Expert(t), e)));
        }
        Section::new(0, vec![params])
    };
    let mut slots = vec![Slot::new(0, 0, 0, String::new())];
    for layer in 0..model.layers.len() as u64 {
        let mut put = |part: Part| {
            let section = SECTIONS.iter().position(|&p| p == part).unwrap_or(0);
            slots.push(Slot::new(section, layer, 0, model.prefix(layer)));
        };
        put(Part::Layer(model.layer(layer)));
        if model.mtp_layers().contains(&layer) {
            put(Part::Mtp);
        }
    }
    Ok(Parts {
        meshes: vec![Mesh::new(&[(Axis::Shard, 1), (Axis::Copy, options.ranks.0.len() as u64)], options.ranks.0.len())?],
        ranks: options.ranks.0.clone(),
        dtype: super::spec::dtype("dtype", options.dtype.as_deref(), model)?,
        zero_centered: false,
        sections: SECTIONS.into_iter().map(section).collect(),
        stages: vec![slots],
        unused: vec![],
        strip: "",
        views: &[],
        // As newer releases of transformers write a model with a vision tower.
        renamed: if model.vision.is_some() { &[("model.language_model.", "model."), ("model.visual.", "visual.")] } else { &[] },
    })
}
