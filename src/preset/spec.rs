//! A world spec's JSON.
//!
//! Members bear the names that the frameworks give them and have their defaults; one that is unknown is an error that names it.
#![forbid(unsafe_code)]

use super::model::{self, Model};
use super::side::Side;
use super::variant::{Left, Variants};
use super::{hf, megatron, vllm};
use crate::abi::*;
use crate::error::{Error, Result, bail, err};
use serde::de::{DeserializeOwned, Error as _, MapAccess, SeqAccess, Visitor};
use serde::{Deserialize, Deserializer};
use serde_json::{Map, Value};
use std::fmt;
use xxhash_rust::xxh3::xxh3_64;

/// Largest size that a spec or a config may give; products of two stay far below 2^63.
pub const MOST: u64 = 1 << 28;

/// Most ranks of a world.
pub const MOST_RANKS: usize = 1 << 20;

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Text {
    model: Map<String, Value>,
    source: Map<String, Value>,
    target: Map<String, Value>,
    #[serde(default)]
    ranks_per_host: Option<u64>,
    #[serde(default)]
    link_gb_per_s: Option<Links>,
    #[serde(default)]
    ignore: Vec<String>,
}

/// Rates of links, in GB/s of a rank in each direction.
#[derive(Clone, Copy, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Links {
    /// Between ranks of one host.
    pub same_host: f64,
    /// Between hosts.
    pub network: f64,
}

/// A spec, read and checked.
pub struct Spec {
    /// The model.
    pub model: Model,
    /// What is read.
    pub source: Side,
    /// What is written.
    pub target: Side,
    /// Ranks of a host, for plans made without peers; `None`: all are on one.
    pub ranks_per_host: Option<u64>,
    /// For estimates of time.
    pub links: Option<Links>,
    /// Patterns of names that bind accepts and leaves out.
    pub ignore: Vec<String>,
    /// What each side leaves open.
    pub left: [Left; 2],
    /// Equal for specs that mean the same.
    pub digest: u64,
}

impl Spec {
    /// With what has turned out of it. Errors name the member.
    pub fn new(text: &str, variants: &Variants) -> Result<Spec> {
        let Strict(value) = serde_json::from_str(text).map_err(|e| err!(RS_ERR_INVALID, "the spec is not valid JSON: {e}"))?;
        let mut text: Text = take("spec", value)?;
        let left = [&mut text.source, &mut text.target].map(|side| Left::new(framework(side).unwrap_or_default(), side));
        variants.apply(0, &left[0], &mut text.source);
        variants.apply(1, &left[1], &mut text.target);
        let options = [Options::new("source", text.source)?, Options::new("target", text.target)?];
        let model = Model::new(&text.model, predictors(&options, model::config::predictors(&text.model)?)?)?;
        let [source, target] = options;
        let source = side("source", &model, source, false)?;
        let mut target = side("target", &model, target, true)?;
        target.center_norms(&model, source.parts.zero_centered);
        if let Some(n) = text.ranks_per_host {
            size("ranks_per_host", n)?;
        }
        if let Some(l) = text.link_gb_per_s {
            if !(l.same_host > 0.0 && l.network > 0.0) {
                bail!(RS_ERR_INVALID, "link_gb_per_s: both rates must be above 0");
            }
        }
        // What makes the world, not how it was written.
        let meaning = postcard::to_allocvec(&(&model, &source.parts, &target.parts));
        let meaning = meaning.map_err(|e| err!(RS_ERR_INTERNAL, "a spec that does not encode: {e}"))?;
        Ok(Spec {
            model,
            source,
            target,
            ranks_per_host: text.ranks_per_host,
            links: text.link_gb_per_s,
            ignore: text.ignore,
            left,
            // 0 stands for tables.
            digest: xxh3_64(&meaning).max(1),
        })
    }
}

/// The members of a side.
enum Options {
    Megatron(Box<megatron::Options>),
    Vllm(Box<vllm::Options>),
    Hf(hf::Options),
}

impl Options {
    fn new(label: &str, mut text: Map<String, Value>) -> Result<Options> {
        let Some(framework) = framework(&text).map(str::to_string) else {
            bail!(RS_ERR_INVALID, "{label}.framework is missing; it is \"megatron\", \"vllm\" or \"hf\"");
        };
        text.remove("framework");
        let text = Value::Object(text);
        match framework.as_str() {
            "megatron" => take(label, text).map(Options::Megatron),
            "vllm" => take(label, text).map(Options::Vllm),
            "hf" => take(label, text).map(Options::Hf),
            other => bail!(RS_ERR_UNSUPPORTED, "{label}.framework is \"{other}\"; there are \"megatron\", \"vllm\" and \"hf\""),
        }
    }

    /// Layers for multi-token prediction that the side holds, of `all`, and the member that says so; `None`: all that the model has.
    fn predictors(&self, all: u64) -> Result<Option<(u64, &'static str)>> {
        Ok(match self {
            Options::Megatron(o) => Some((megatron::predictors(o, all)?, "mtp_num_layers")),
            Options::Vllm(o) => Some((vllm::predictors(o, all)?, "mtp_drafter")),
            Options::Hf(_) => None,
        })
    }
}

/// How many of `all` layers for multi-token prediction are part of the world: those that a side asks for.
fn predictors([source, target]: &[Options; 2], all: u64) -> Result<u64> {
    let source = source.predictors(all).map_err(|e| e.context("source"))?;
    let target = target.predictors(all).map_err(|e| e.context("target"))?;
    match (source, target) {
        (Some((0, from)), Some((n, to))) if n > 0 => bail!(
            RS_ERR_INVALID,
            "target.{to} wants {n} MTP layers and the source holds none: set source.{from}, or leave target.{to} out"
        ),
        (Some((held, from)), Some((n, to))) if n > 0 && n != held => {
            bail!(RS_ERR_INVALID, "source.{from} says {held} MTP layers, target.{to} {n}: they must be equal")
        }
        (a, b) => Ok(a.map_or(0, |a| a.0).max(b.map_or(0, |b| b.0))),
    }
}

fn side(label: &str, model: &Model, options: Options, target: bool) -> Result<Side> {
    let parts = match &options {
        Options::Megatron(o) => megatron::parts(model, o, target),
        Options::Vllm(o) => vllm::parts(model, o, target),
        Options::Hf(o) => hf::parts(model, o),
    };
    parts.and_then(|p| Side::new(model, label, p)).map_err(|e: Error| e.context(label))
}

fn framework(side: &Map<String, Value>) -> Option<&str> {
    side.get("framework")?.as_str()
}

/// A value as a struct; errors name the member.
fn take<T: DeserializeOwned>(label: &str, value: Value) -> Result<T> {
    serde_path_to_error::deserialize(value).map_err(|e| match e.path().to_string().as_str() {
        "." => err!(RS_ERR_INVALID, "{label}: {}", e.inner()),
        path => err!(RS_ERR_INVALID, "{label}.{path}: {}", e.inner()),
    })
}

/// The default of most sizes.
pub fn one() -> u64 {
    1
}

/// A size that products may use.
pub fn size(member: &str, n: u64) -> Result<u64> {
    if !(1..=MOST).contains(&n) {
        bail!(RS_ERR_INVALID, "{member} is {n}; it must be from 1 to {MOST}");
    }
    Ok(n)
}

/// Refuses a parallel size that does not divide what a framework wants it to.
pub fn divides(framework: &str, member: &str, by: u64, sizes: &[(&str, u64)]) -> Result<()> {
    let wrong: Vec<String> = sizes.iter().filter(|s| s.1 % by != 0).map(|(what, n)| format!("{what} {n}")).collect();
    if !wrong.is_empty() {
        bail!(RS_ERR_UNSUPPORTED, "{member} {by}: {framework} wants it to divide {}", wrong.join(" and "));
    }
    Ok(())
}

/// Refuses members that are given and go with experts, for a model that has none.
pub fn for_experts(model: &Model, given: &[(&str, bool)]) -> Result<()> {
    match given.iter().find(|g| g.1 && model.moe.is_none()) {
        Some((member, _)) => bail!(RS_ERR_INVALID, "{member} is for models with experts; {} has none", model.architecture),
        None => Ok(()),
    }
}

/// A side's dtype: that of the member, else the model's.
pub fn dtype(member: &str, given: Option<&str>, model: &Model) -> Result<(u8, u8)> {
    given.map_or(Ok(model.dtype), |name| model::dtype(&Value::from(name)).map_err(|e| e.context(member)))
}

/// JSON in which no member is given twice: one of the two would not count.
struct Strict(Value);

impl<'de> Deserialize<'de> for Strict {
    fn deserialize<D: Deserializer<'de>>(from: D) -> std::result::Result<Strict, D::Error> {
        from.deserialize_any(StrictVisitor).map(Strict)
    }
}

struct StrictVisitor;

impl<'de> Visitor<'de> for StrictVisitor {
    type Value = Value;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a world spec")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> std::result::Result<Value, A::Error> {
        let mut out = Map::new();
        while let Some((key, Strict(value))) = map.next_entry::<String, Strict>()? {
            if out.contains_key(&key) {
                return Err(A::Error::custom(format!("member \"{key}\" is given twice")));
            }
            out.insert(key, value);
        }
        Ok(Value::Object(out))
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> std::result::Result<Value, A::Error> {
        let mut out = vec![];
        while let Some(Strict(value)) = list.next_element()? {
            out.push(value);
        }
        Ok(Value::Array(out))
    }

    fn visit_bool<E>(self, v: bool) -> std::result::Result<Value, E> {
        Ok(v.into())
    }

    fn visit_u64<E>(self, v: u64) -> std::result::Result<Value, E> {
        Ok(v.into())
    }

    fn visit_i64<E>(self, v: i64) -> std::result::Result<Value, E> {
        Ok(v.into())
    }

    fn visit_f64<E>(self, v: f64) -> std::result::Result<Value, E> {
        Ok(v.into())
    }

    fn visit_str<E>(self, v: &str) -> std::result::Result<Value, E> {
        Ok(v.into())
    }

    fn visit_unit<E>(self) -> std::result::Result<Value, E> {
        Ok(Value::Null)
    }
}

/// Communicator ranks: `"0-3,8"` or a list.
#[derive(Debug)]
pub struct Ranks(pub Vec<u32>);

impl<'de> Deserialize<'de> for Ranks {
    fn deserialize<D: Deserializer<'de>>(from: D) -> std::result::Result<Ranks, D::Error> {
        let too_many = || D::Error::custom(format!("more than {MOST_RANKS}"));
        let out = match Value::deserialize(from)? {
            Value::String(text) => {
                let mut out = vec![];
                for part in text.split(',').map(str::trim) {
                    let (first, last) = part.split_once('-').unwrap_or((part, part));
                    let number = |n: &str| n.trim().parse::<u32>();
                    let (Ok(first), Ok(last)) = (number(first), number(last)) else {
                        return Err(D::Error::custom(format!("'{part}' is no rank and no range such as 0-7")));
                    };
                    if last < first || (last - first) as usize >= MOST_RANKS - out.len().min(MOST_RANKS) {
                        return Err(if last < first { D::Error::custom(format!("'{part}' falls")) } else { too_many() });
                    }
                    out.extend(first..=last);
                }
                out
            }
            Value::Array(list) => {
                let number = |v: &Value| v.as_u64().and_then(|n| u32::try_from(n).ok());
                let numbers: Option<Vec<u32>> = list.iter().map(number).collect();
                numbers.ok_or_else(|| D::Error::custom("the list has something else than ranks"))?
            }
            other => return Err(D::Error::custom(format!("{other} is neither text such as \"0-7\" nor a list"))),
        };
        match out.len() {
            0 => Err(D::Error::custom("there must be one")),
            n if n > MOST_RANKS => Err(too_many()),
            _ if out.iter().any(|&r| r as usize >= MOST_RANKS) => Err(D::Error::custom(format!("one is beyond {MOST_RANKS}"))),
            _ => Ok(Ranks(out)),
        }
    }
}

/// Numbers: `"7,7,8"` or a list.
#[derive(Debug)]
pub struct List(pub Vec<u64>);

impl<'de> Deserialize<'de> for List {
    fn deserialize<D: Deserializer<'de>>(from: D) -> std::result::Result<List, D::Error> {
        let value = Value::deserialize(from)?;
        let numbers: Option<Vec<u64>> = match &value {
            Value::String(text) => text.split(',').map(|n| n.trim().parse().ok()).collect(),
            Value::Array(list) => list.iter().map(Value::as_u64).collect(),
            _ => None,
        };
        match numbers {
            Some(numbers) if numbers.iter().all(|&n| n <= MOST) => Ok(List(numbers)),
            _ => Err(D::Error::custom(format!("{value} is no list of numbers such as \"7,7,8\" or [7, 7, 8]"))),
        }
    }
}
