//! What a spec may leave open: members that decide how a parameter lies, and that the parameter itself answers when it is bound.
//!
//! A framework's release, backend or patch may store a tensor in one of a few ways. Where the spec gives the member that says which, it
//! holds; where it does not, the default does until a parameter is bound whose name, shape or dtype fits another value. A variant is
//! thus nothing but a member of the spec given later. Ranks tell each other their variants when they connect.
#![forbid(unsafe_code)]

use crate::abi::RS_ERR_MISMATCH;
use crate::error::{Result, bail};
use serde_json::{Map, Value};

/// A value of a member.
#[derive(Clone, Copy, Debug)]
enum Choice {
    Flag(bool),
    Text(&'static str),
}

/// A member that may be left open, with the values that it can turn out to have.
#[derive(Debug)]
pub struct Open {
    /// The member, then others that decide the same.
    members: &'static [&'static str],
    choices: &'static [Choice],
}

use Choice::{Flag, Text};

/// By place in [`Variants`].
const MEGATRON: &[Open] = &[
    Open { members: &["mla_down_proj_cut"], choices: &[Flag(false), Flag(true)] },
    Open { members: &["mla_weights"], choices: &[Text("core"), Text("mindspeed"), Text("mindspeed_qb")] },
    Open { members: &["mla_mm_split"], choices: &[Flag(false), Flag(true)] },
    Open { members: &["mla_down_proj_fusion"], choices: &[Flag(false), Flag(true)] },
];

const VLLM: &[Open] = &[
    Open { members: &["shared_experts"], choices: &[Text("cut"), Text("whole")] },
    Open { members: &["expert_storage"], choices: &[Text("stacked"), Text("stacked_transposed")] },
    Open { members: &["fused_qkv_a_proj"], choices: &[Flag(false), Flag(true)] },
    Open { members: &["e_score_correction_bias_dtype"], choices: &[Text("float32"), Text("bfloat16"), Text("float16")] },
];

/// Members that give the padded size of the vocabulary, the first as a number of rows.
const VOCAB: &[&str] = &["padded_vocab_size", "make_vocab_size_divisible_by", "vocab_padding_size"];

/// Members with choices that a framework has at most.
const OPEN: usize = 4;

/// What has turned out, by side: a number for each member, 0 or the place of its value from 1 on; then rows of the padded vocabulary, or
/// 0.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Variants([[u32; OPEN + 1]; 2]);

/// Members that a side of a spec leaves open.
#[derive(Clone, Copy, Debug)]
pub struct Left {
    open: &'static [Open],
    /// Whether each is, by place in [`Variants`].
    left: [bool; OPEN + 1],
}

impl Left {
    /// By the members that are given.
    pub fn new(framework: &str, given: &Map<String, Value>) -> Left {
        let open = match framework {
            "megatron" => MEGATRON,
            "vllm" => VLLM,
            _ => &[],
        };
        let is_open = |members: &[&str]| !members.iter().any(|m| given.contains_key(*m));
        let mut left = [false; OPEN + 1];
        open.iter().zip(&mut left).for_each(|(o, left)| *left = is_open(o.members));
        left[OPEN] = !open.is_empty() && is_open(VOCAB);
        Left { open, left }
    }
}

impl Variants {
    /// As two words: a byte for each member, then the rows.
    pub fn words(self) -> [u64; 2] {
        self.0.map(|[a, b, c, d, rows]| u64::from(rows) << 32 | u64::from(u32::from_le_bytes([a, b, c, d].map(|n| n as u8))))
    }

    /// From two words.
    pub fn from_words(words: [u64; 2]) -> Variants {
        Variants(words.map(|word| {
            let [a, b, c, d, rows @ ..] = word.to_le_bytes();
            [a.into(), b.into(), c.into(), d.into(), u32::from_le_bytes(rows)]
        }))
    }

    /// Members that have turned out, for a side.
    fn members(&self, side: usize, left: &Left) -> Vec<(&'static str, Value)> {
        let mut out = vec![];
        for (open, code) in left.open.iter().zip(self.0[side]) {
            if let Some(choice) = (code as usize).checked_sub(1).and_then(|at| open.choices.get(at)) {
                let value = match choice {
                    Flag(flag) => Value::from(*flag),
                    Text(text) => Value::from(*text),
                };
                out.push((open.members[0], value));
            }
        }
        let rows = self.0[side][OPEN];
        if rows > 0 {
            out.push((VOCAB[0], Value::from(rows)));
        }
        out
    }

    /// Gives a side what has turned out.
    pub fn apply(&self, side: usize, left: &Left, text: &mut Map<String, Value>) {
        text.extend(self.members(side, left).into_iter().map(|(member, value)| (member.to_string(), value)));
    }

    /// The members of a side, in words.
    pub fn shown(&self, side: usize, left: &Left) -> String {
        let list: Vec<String> = self.members(side, left).into_iter().map(|(member, value)| format!("{member} {value}")).collect();
        list.join(", ")
    }

    /// All that the left-open members of a side may turn out to be, the fewest members first; `rows`: of a padded vocabulary, if not as
    /// before.
    pub fn all(&self, side: usize, left: &Left, rows: Option<u64>) -> Vec<Variants> {
        let mut out = vec![*self];
        if let Some(rows) = rows.and_then(|r| u32::try_from(r).ok()).filter(|_| left.left[OPEN]) {
            out[0].0[side][OPEN] = rows;
        }
        for (at, open) in left.open.iter().enumerate().filter(|(at, _)| left.left[*at]) {
            let codes = 0..=open.choices.len() as u32;
            let with = |v: &Variants, code: u32| {
                let mut v = *v;
                v.0[side][at] = code;
                v
            };
            out = out.iter().flat_map(|v| codes.clone().map(move |code| with(v, code))).collect();
        }
        out.sort_by_key(|v| v.0[side][..OPEN].iter().filter(|&&code| code != 0).count());
        out
    }

    /// What has turned out on any rank. Two ranks that disagree are an error, and what this rank's spec does not leave open.
    pub fn of_all(all: impl Iterator<Item = (u32, Variants)>, left: [&Left; 2]) -> Result<Variants> {
        let mut out = Variants::default();
        let mut by = [[0; OPEN + 1]; 2];
        for (rank, found) in all {
            for (side, name) in ["source", "target"].into_iter().enumerate() {
                let with = |v: &Variants| v.shown(side, left[side]);
                for at in (0..=OPEN).filter(|&at| found.0[side][at] != 0) {
                    if !left[side].left[at] {
                        bail!(
                            RS_ERR_MISMATCH,
                            "rank {rank} has bound {name} parameters as with {}, which the spec of this rank does not leave open",
                            with(&found)
                        );
                    }
                    if ![0, found.0[side][at]].contains(&out.0[side][at]) {
                        bail!(
                            RS_ERR_MISMATCH,
                            "ranks {} and {rank} have bound {name} parameters that lie in two ways, the first as with {}, the other as with {}",
                            by[side][at],
                            with(&out),
                            with(&found)
                        );
                    }
                    out.0[side][at] = found.0[side][at];
                    by[side][at] = rank;
                }
            }
        }
        Ok(out)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn members_that_are_given_do_not_turn_out_otherwise() {
        let given = serde_json::json!({"mla_weights": "core", "make_vocab_size_divisible_by": 8});
        let left = Left::new("megatron", given.as_object().unwrap());
        let shown = |v: &Variants| v.shown(0, &left);
        let all: Vec<String> = Variants::default().all(0, &left, Some(128)).iter().map(shown).collect();
        assert_eq!(all.len(), 27);
        assert_eq!(all[..3], ["", "mla_down_proj_fusion false", "mla_down_proj_fusion true"]);
        assert!(all.contains(&"mla_down_proj_cut true, mla_down_proj_fusion true".to_string()));
        assert!(!all.iter().any(|v| v.contains("mla_weights") || v.contains("vocab")));
        assert_eq!(Variants::default().all(0, &Left::new("hf", &Map::new()), Some(8)), [Variants::default()]);
        let open = Left::new("vllm", &Map::new());
        let rows = Variants::default().all(1, &open, Some(70_000))[0];
        assert_eq!(rows.shown(1, &open), "padded_vocab_size 70000");
        assert!(rows.all(1, &open, None).iter().all(|v| v.0[1][OPEN] == 70_000));
        assert_eq!(Variants::from_words(rows.words()), rows);
    }

    #[test]
    fn ranks_must_agree() {
        let left = Left::new("vllm", &Map::new());
        let of = |[a, b, c, d]: [u32; 4], rows: u32| Variants([[0; 5], [a, b, c, d, rows]]);
        let (cut, stacked, rows) = (of([1, 0, 0, 0], 0), of([0, 1, 0, 0], 0), of([0; 4], 128));
        let none = Variants::default();
        let union = Variants::of_all([(0, none), (1, cut), (2, stacked), (3, rows), (4, cut)].into_iter(), [&left; 2]).unwrap();
        assert_eq!(union.shown(1, &left), "shared_experts \"cut\", expert_storage \"stacked\", padded_vocab_size 128");
        let e = Variants::of_all([(0, none), (3, cut), (7, of([2, 0, 0, 0], 0))].into_iter(), [&left; 2]).unwrap_err();
        let words = ["ranks 3 and 7", "target", "shared_experts \"cut\"", "shared_experts \"whole\""];
        words.iter().for_each(|w| assert!(e.text().contains(w), "{e}"));
        let more = of([0; 4], 256);
        assert!(Variants::of_all([(0, rows), (1, more)].into_iter(), [&left; 2]).unwrap_err().text().contains("256"));
        let given = serde_json::json!({"shared_experts": "cut"});
        let left = Left::new("vllm", given.as_object().unwrap());
        let e = Variants::of_all([(5, cut)].into_iter(), [&left; 2]).unwrap_err();
        assert!(e.text().contains("rank 5") && e.text().contains("does not leave open"), "{e}");
    }
}
