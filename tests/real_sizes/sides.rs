//! A side as a line of text: for the library its JSON, for this test who stands where and which layers a stage has.
//!
//! `megatron 0-15 tp=4 pp=2 emb`: framework, ranks, settings.

use super::models::Model;
use serde_json::{Map, Value};

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Framework {
    Megatron,
    VLlm,
    Hf,
}

use Framework::*;

/// Short names of the settings that a line may give.
const MEGATRON: [(&str, &str); 22] = [
    ("tp", "tensor_model_parallel_size"),
    ("pp", "pipeline_model_parallel_size"),
    ("vpp", "virtual_pipeline_model_parallel_size"),
    ("cp", "context_parallel_size"),
    ("dp", "data_parallel_size"),
    ("order", "use_tp_pp_dp_mapping"),
    ("impl", "transformer_impl"),
    ("first", "num_layers_in_first_pipeline_stage"),
    ("last", "num_layers_in_last_pipeline_stage"),
    ("emb", "account_for_embedding_in_pipeline_split"),
    ("loss", "account_for_loss_in_pipeline_split"),
    ("layout", "pipeline_model_parallel_layout"),
    ("list", "num_layer_list"),
    ("noop", "noop_layers"),
    ("div", "make_vocab_size_divisible_by"),
    ("padded", "padded_vocab_size"),
    ("ep", "expert_model_parallel_size"),
    ("etp", "expert_tensor_parallel_size"),
    ("grouped", "moe_grouped_gemm"),
    ("legacy", "moe_use_legacy_grouped_gemm"),
    ("extend", "moe_tp_extend_ep"),
    ("cut", "mla_down_proj_cut"),
];
const VLLM: [(&str, &str); 9] = [
    ("tp", "tensor_parallel_size"),
    ("pp", "pipeline_parallel_size"),
    ("dp", "data_parallel_size"),
    ("replicas", "replicas"),
    ("parts", "VLLM_PP_LAYER_PARTITION"),
    ("ep", "enable_expert_parallel"),
    ("deal", "expert_placement_strategy"),
    ("storage", "expert_storage"),
    ("eplb", "physical_to_logical_map"), // here the number of redundant slots
];

pub struct Side {
    pub framework: Framework,
    text: String,
    /// Ranks in the framework's own order.
    pub ranks: Vec<u32>,
    settings: Vec<(String, String)>,
}

/// Where a rank stands.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct Place {
    pub tp: u64,
    pub stage: u64,
    /// Which share of the experts it has, and which part of each.
    pub expert: u64,
    pub expert_tp: u64,
}

/// What a pipeline stage has of the model.
#[derive(Default)]
pub struct Chunk {
    /// By place in the chunk; `None` is a no-op.
    pub layers: Vec<Option<u64>>,
    pub embedding: bool,
    /// The final norm and the output layer.
    pub output: bool,
}

impl Side {
    pub fn new(line: &str) -> Side {
        let mut words = line.split_whitespace();
        let framework = match words.next() {
            Some("megatron") => Megatron,
            Some("vllm") => VLlm,
            Some("hf") => Hf,
            other => panic!("{line}: framework {other:?}"),
        };
        let text = words.next().expect("ranks").to_string();
        let number = |n: &str| n.parse::<u32>().expect("a rank");
        let ranks: Vec<u32> = text
            .split(',')
            .flat_map(|run| {
                let (first, last) = run.split_once('-').unwrap_or((run, run));
                number(first)..=number(last)
            })
            .collect();
        let pair = |word: &str| {
            let (key, value) = word.split_once('=').unwrap_or((word, "true"));
            (key.to_string(), value.to_string())
        };
        let mut side = Side { framework, text, ranks, settings: words.map(pair).collect() };
        if framework == VLlm && side.get("replicas").is_none() {
            let replicas = side.ranks.len() as u64 / (side.size("tp") * side.size("pp") * side.size("dp"));
            side.settings.push(("replicas".into(), replicas.to_string()));
        }
        side
    }

    fn get(&self, key: &str) -> Option<&str> {
        self.settings.iter().find(|s| s.0 == key).map(|s| s.1.as_str())
    }

    pub fn flag(&self, key: &str) -> bool {
        self.get(key).is_some()
    }

    /// One that is on or off.
    pub fn switch(&self, key: &str) -> Option<bool> {
        self.get(key).map(|value| value == "true")
    }

    pub fn text(&self, key: &str) -> Option<&str> {
        self.get(key)
    }

    pub fn number(&self, key: &str) -> Option<u64> {
        self.get(key).map(|n| n.parse().expect("a number"))
    }

    fn numbers(&self, key: &str) -> Vec<u64> {
        self.get(key).map_or(vec![], |l| l.split(',').map(|n| n.parse().expect("a number")).collect())
    }

    /// A parallel size.
    pub fn size(&self, key: &str) -> u64 {
        self.number(key).unwrap_or(1)
    }

    /// As the library reads it.
    pub fn json(&self, model: &Model) -> Value {
        let (framework, names): (_, &[(&str, &str)]) = match self.framework {
            Megatron => ("megatron", &MEGATRON),
            VLlm => ("vllm", &VLLM),
            Hf => ("hf", &[]),
        };
        let mut out = Map::new();
        out.insert("framework".into(), framework.into());
        out.insert("ranks".into(), self.text.clone().into());
        for (key, text) in &self.settings {
            let name = names.iter().find(|n| n.0 == key).unwrap_or_else(|| panic!("no setting {key}")).1;
            let list = ["list", "noop", "parts", "layout"].contains(&key.as_str());
            let value = match text.parse::<u64>() {
                Ok(_) if key == "eplb" => self.slots(model).into(),
                Ok(number) if !list => number.into(),
                _ if ["true", "false"].contains(&text.as_str()) => (text == "true").into(),
                _ => Value::from(text.as_str()),
            };
            out.insert(name.into(), value);
        }
        Value::Object(out)
    }

    /// Of the rank at a place of `ranks`.
    pub fn place(&self, at: u64) -> Place {
        let (tp, pp, count) = (self.size("tp"), self.size("pp"), self.ranks.len() as u64);
        match self.framework {
            Hf => Place { tp: 0, stage: 0, expert: 0, expert_tp: 0 },
            VLlm => {
                // All ranks of a stage in an engine share the experts.
                let of_all = at / (tp * pp) % self.size("dp") * tp + at % tp;
                let (expert, expert_tp) = if self.flag("ep") { (of_all, 0) } else { (0, of_all) };
                Place { tp: at % tp, stage: at / tp % pp, expert, expert_tp }
            }
            Megatron => {
                let cp = self.size("cp");
                let dp = count / (tp * cp * pp);
                let stage = if self.flag("order") { at / (tp * cp) % pp } else { at / (tp * cp * dp) };
                let etp = self.expert_tp();
                Place { tp: at % tp, stage, expert: at / etp % self.shares(), expert_tp: at % etp }
            }
        }
    }

    /// In how many parts an expert is cut.
    pub fn expert_tp(&self) -> u64 {
        match self.framework {
            Hf => 1,
            VLlm if self.flag("ep") => 1,
            VLlm => self.size("tp") * self.size("dp"),
            // The ranks of tensor parallelism share the experts too.
            Megatron if self.flag("extend") => 1,
            Megatron => self.number("etp").unwrap_or(self.size("tp")),
        }
    }

    /// Among how many the experts are shared.
    fn shares(&self) -> u64 {
        match self.framework {
            VLlm if self.flag("ep") => self.size("tp") * self.size("dp"),
            Megatron if self.flag("extend") => self.size("tp") * self.size("ep"),
            Megatron => self.size("ep"),
            _ => 1,
        }
    }

    /// Whether some ranks have more experts than others.
    pub fn uneven(&self, model: &Model) -> bool {
        model.experts.is_some_and(|e| (e.count + self.number("eplb").unwrap_or(0)) % self.shares() > 0)
    }

    /// The experts of a share in a layer, by slot.
    pub fn experts(&self, model: &Model, share: u64, layer: u64) -> Vec<u64> {
        let (count, shares) = (model.experts.expect("experts").count, self.shares());
        if let Some(more) = self.number("eplb") {
            let each = (count + more) / shares;
            return (share * each..(share + 1) * each).map(|slot| expert_of(slot, layer, count)).collect();
        }
        if self.get("deal") == Some("round_robin") {
            return (share..count).step_by(shares as usize).collect();
        }
        assert!(self.framework == VLlm || count % shares == 0, "{count} experts on {shares}");
        let (base, more) = (count / shares, count % shares);
        let first = share * base + share.min(more);
        (first..first + base + u64::from(share < more)).collect()
    }

    /// The experts of all slots, of each layer that has any.
    fn slots(&self, model: &Model) -> Vec<Vec<u64>> {
        let count = model.experts.expect("experts").count;
        let slots = count + self.size("eplb");
        let of = |layer: u64| (0..slots).map(|slot| expert_of(slot, layer, count)).collect();
        (0..model.layers).filter(|&layer| model.has_experts(layer)).map(of).collect()
    }

    /// Whether each layer has its experts elsewhere.
    pub fn mapped(&self) -> bool {
        self.flag("eplb")
    }

    /// The stage of each layer.
    pub fn stage_of(&self, model: &Model) -> Vec<usize> {
        let mut out = vec![0; model.layers as usize];
        for (stage, chunks) in self.stages(model).iter().enumerate() {
            chunks.iter().flat_map(|c| c.layers.iter().flatten()).for_each(|&layer| out[layer as usize] = stage);
        }
        out
    }

    /// The chunks of each stage.
    pub fn stages(&self, model: &Model) -> Vec<Vec<Chunk>> {
        let (pp, vpp) = (self.size("pp"), self.size("vpp"));
        let mut stages: Vec<Vec<Chunk>> = (0..pp).map(|_| (0..vpp).map(|_| Chunk::default()).collect()).collect();
        if let Some(layout) = self.get("layout") {
            let mut next = 0;
            for (entry, symbols) in expand(layout).split('|').enumerate() {
                let chunk = &mut stages[entry % pp as usize][entry / pp as usize];
                for symbol in symbols.chars() {
                    match symbol {
                        'E' => chunk.embedding = true,
                        'L' => chunk.output = true,
                        't' => {
                            chunk.layers.push(Some(next));
                            next += 1;
                        }
                        other => panic!("{layout}: {other}"),
                    }
                }
            }
            assert_eq!(next, model.layers, "{layout}");
            return stages;
        }
        let noops = self.numbers("noop");
        let slots = model.layers + noops.len() as u64;
        let sizes = if self.framework == Megatron { self.megatron_sizes(slots) } else { self.vllm_sizes(slots) };
        let mut slot = 0;
        for (c, p) in (0..vpp as usize).flat_map(|c| (0..pp as usize).map(move |p| (c, p))) {
            let (first, last) = ((p, c) == (0, 0), (p as u64 + 1, c as u64 + 1) == (pp, vpp));
            let mut count = sizes[p] / vpp;
            assert_eq!(count * vpp, sizes[p], "chunks of a stage are equal");
            count -= u64::from(first && self.flag("emb")) + u64::from(last && self.flag("loss"));
            let chunk = &mut stages[p][c];
            chunk.embedding = first;
            chunk.output = last;
            for slot in slot..slot + count {
                let before = noops.iter().filter(|&&n| n < slot).count() as u64;
                chunk.layers.push((!noops.contains(&slot)).then_some(slot - before));
            }
            slot += count;
        }
        assert_eq!(slot, slots, "every layer has a place");
        stages
    }

    fn megatron_sizes(&self, slots: u64) -> Vec<u64> {
        let pp = self.size("pp");
        let list = self.numbers("list");
        if !list.is_empty() {
            return list;
        }
        let (first, last) = (self.number("first"), self.number("last"));
        let given = u64::from(first.is_some()) + u64::from(last.is_some());
        let all = slots + u64::from(self.flag("emb")) + u64::from(self.flag("loss"));
        let rest = all - first.unwrap_or(0) - last.unwrap_or(0);
        let even = if pp == given { 0 } else { rest / (pp - given) };
        assert_eq!(even * (pp - given), rest, "{slots} layers on {pp} stages");
        let mut sizes = vec![even; pp as usize];
        sizes[0] = first.unwrap_or(sizes[0]);
        sizes[pp as usize - 1] = last.unwrap_or(sizes[pp as usize - 1]);
        sizes
    }

    fn vllm_sizes(&self, layers: u64) -> Vec<u64> {
        let parts = self.numbers("parts");
        if !parts.is_empty() {
            return parts;
        }
        let pp = self.size("pp");
        let mut sizes = vec![layers / pp; pp as usize];
        for i in 0..layers % pp {
            sizes[(pp - 2 - i) as usize] += 1;
        }
        sizes
    }
}

/// Some order of the experts, another in each layer, again and again: slots that follow each other have different ones.
fn expert_of(slot: u64, layer: u64, count: u64) -> u64 {
    (slot * 7 + layer * 11) % count
}

/// A layout with its repetitions written out and its commas left out.
fn expand(layout: &str) -> String {
    fn sequence(rest: &mut std::iter::Peekable<std::str::Chars<'_>>) -> String {
        let mut out = String::new();
        while let Some(symbol) = rest.next_if(|c| *c != ')') {
            let item = match symbol {
                ',' => continue,
                '(' => {
                    let inner = sequence(rest);
                    assert_eq!(rest.next(), Some(')'));
                    inner
                }
                other => other.to_string(),
            };
            let mut times = String::new();
            if rest.next_if_eq(&'*').is_some() {
                while let Some(digit) = rest.next_if(char::is_ascii_digit) {
                    times.push(digit);
                }
            }
            out.push_str(&item.repeat(times.parse().unwrap_or(1)));
        }
        out
    }
    sequence(&mut layout.chars().peekable())
}

#[test]
fn layouts_are_expanded_as_megatron_does() {
    assert_eq!(expand("Et*3|(tt|)*2,t|L"), "Ettt|tt|tt|t|L");
    // 61 layers over 32 chunks, without what follows the last.
    assert_eq!(expand("Et*3|(tt|)*29,|L").matches('t').count(), 61);
}
