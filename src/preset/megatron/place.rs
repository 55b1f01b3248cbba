//! Where a Megatron side has what: the slots of each stage, and the copies of the embedding.
#![forbid(unsafe_code)]

use super::{Options, VisionNames};
use crate::abi::*;
use crate::error::{Result, bail};
use crate::preset::model::Model;
use crate::preset::pipeline::Chunk;
use crate::preset::shard::{self, EMBED, EXPERTS, HEAD, MERGER, MTP, NORM, PATCH, VISION};
use crate::preset::side::{Slot, Unused};
use crate::preset::vision;
use std::ops::Range;

/// What a chunk of a stage holds.
pub struct Place {
    text: Chunk,
    /// Layers of the vision tower, counted from its first.
    vision: Range<u64>,
}

/// By stage, by chunk.
pub fn places(model: &Model, o: &Options, chunks: Vec<Vec<Chunk>>) -> Result<Vec<Vec<Place>>> {
    let none = |text| Place { text, vision: 0..0 };
    let mut out: Vec<Vec<Place>> = chunks.into_iter().map(|stage| stage.into_iter().map(none).collect()).collect();
    let Some(v) = &model.vision else { return Ok(out) };
    let names = o.vision_names.unwrap_or_default();
    if names == VisionNames::MindspeedMm {
        if out[0].len() > 1 {
            bail!(
                RS_ERR_UNSUPPORTED,
                "virtual_pipeline_model_parallel_size (or another way to several chunks a stage): not built for vision_names \
                 \"mindspeed_mm\""
            );
        }
        if o.pipeline_model_parallel_layout.is_some() {
            bail!(RS_ERR_UNSUPPORTED, "pipeline_model_parallel_layout: vision_names \"mindspeed_mm\" goes with num_layer_list");
        }
        // Its text decoder is on the stages with layers alone.
        let has = |p: &Place| p.text.layers.iter().any(Option::is_some);
        let (first, last) = (out.iter().position(|s| has(&s[0])), out.iter().rposition(|s| has(&s[0])));
        for (stage, place) in out.iter_mut().enumerate() {
            let text = &mut place[0].text;
            (text.front, text.norm, text.back) = (first == Some(stage), last == Some(stage), last == Some(stage));
        }
    }
    let Some(list) = &o.vision_num_layer_list else {
        out[0][0].vision = 0..v.depth;
        return Ok(out);
    };
    if names != VisionNames::MindspeedMm {
        bail!(RS_ERR_INVALID, "vision_num_layer_list goes with vision_names \"mindspeed_mm\"");
    }
    if list.0.len() != out.len() || list.0.iter().sum::<u64>() != v.depth {
        bail!(
            RS_ERR_INVALID,
            "vision_num_layer_list {:?} must have pipeline_model_parallel_size {} numbers whose sum is model.vision_config.depth {}",
            list.0,
            out.len(),
            v.depth
        );
    }
    let mut next = 0;
    for (stage, count) in out.iter_mut().zip(&list.0) {
        stage[0].vision = next..next + count;
        next += count;
    }
    Ok(out)
}

/// What the names of the text's parameters begin with.
fn prefix(model: &Model, o: &Options) -> &'static str {
    match (&model.vision, o.vision_names.unwrap_or_default()) {
        (None, _) => "",
        (Some(_), VisionNames::MindspeedMm) => "text_decoder.",
        (Some(_), _) => "language_model.",
    }
}

/// Second copies of the embedding: on the chunk with the output layer where embeddings are tied, and on that which predicts, unless it
/// has the embedding itself.
pub fn copies(model: &Model, o: &Options, places: &[Vec<Place>], shape: [u64; 2]) -> Vec<Unused> {
    let mut out = vec![];
    for (stage, chunks) in (0..).zip(places) {
        for (chunk, place) in (0..).zip(chunks).filter(|(_, p)| !p.text.front) {
            let mut put = |there: bool, name: &str| {
                let name = format!("{}{name}", prefix(model, o));
                out.extend(there.then(|| Unused { stage, chunk, name, shape: shape.to_vec() }));
            };
            put(place.text.mtp, "embedding.word_embeddings.weight");
            put(place.text.back && model.tied, "output_layer.weight");
        }
    }
    out
}

/// By stage. A target has the copies too.
pub fn slots(model: &Model, o: &Options, places: &[Vec<Place>], target: bool) -> Vec<Vec<Slot>> {
    let text = prefix(model, o);
    let of_chunk = |(chunk, place): (u32, &Place)| -> Vec<Slot> {
        let one = |there: bool, section: usize, prefix: &str| there.then(|| Slot::new(section, 0, chunk, prefix.to_string()));
        let (vision, p) = (&place.vision, &place.text);
        let names = match o.vision_names.unwrap_or_default() {
            VisionNames::Mbridge => vision::MBRIDGE.layers,
            VisionNames::MindspeedMm => vision::MINDSPEED.layers,
            VisionNames::MegatronBridge => vision::VLLM.layers,
        };
        let tower = model.vision_layers();
        let mut out: Vec<Slot> = one(vision.contains(&0), PATCH, "").into_iter().collect();
        out.extend(
            (0..).zip(vision.clone()).map(|(local, i)| Slot::new(VISION, tower.start + i, chunk, format!("{names}{local}."))),
        );
        out.extend(one(!vision.is_empty() && tower.start + vision.end == tower.end, MERGER, ""));
        out.extend(one(p.front || (p.mtp && target), EMBED, text));
        for (local, layer) in p.layers.iter().enumerate().filter_map(|(i, l)| Some((i, (*l)?))) {
            out.extend(shard::slots(model, layer, chunk, &format!("{text}decoder.layers.{local}."), EXPERTS));
        }
        out.extend(one(p.norm, NORM, text));
        out.extend(one(p.back, HEAD, text));
        let mtp = if p.mtp { model.mtp_layers() } else { 0..0 };
        for (k, layer) in mtp.enumerate() {
            out.push(Slot::new(MTP, layer, chunk, format!("{text}mtp.layers.{k}.")));
            out.extend(shard::slots(model, layer, chunk, &format!("{text}mtp.layers.{k}.transformer_layer."), EXPERTS));
        }
        out
    };
    places.iter().map(|chunks| (0..).zip(chunks).flat_map(of_chunk).collect()).collect()
}
