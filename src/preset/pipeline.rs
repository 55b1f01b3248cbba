//! Megatron's pipeline: which layers lie in which virtual chunk of which stage.
//!
//! From Megatron-core 0.12 to 0.16: transformer_block.py (get_num_layers_to_build), transformer_layer.py (get_transformer_layer_offset),
//! pipeline_parallel_layer_layout.py; `num_layer_list` and `noop_layers` from MindSpeed-LLM.
#![forbid(unsafe_code)]

use crate::abi::RS_ERR_INVALID;
use crate::error::{Result, bail, err};

/// What a stage's chunk holds.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Chunk {
    /// The embedding.
    pub front: bool,
    /// The model's layer at each local index; `None`: a no-op.
    pub layers: Vec<Option<u64>>,
    /// The final norm.
    pub norm: bool,
    /// The layers for multi-token prediction.
    pub mtp: bool,
    /// The output layer.
    pub back: bool,
}

/// Members of the spec that place layers.
#[derive(Clone, Debug, Default)]
pub struct Placement<'a> {
    /// num_hidden_layers.
    pub layers: u64,
    /// pipeline_model_parallel_size.
    pub stages: u64,
    /// virtual_pipeline_model_parallel_size.
    pub chunks: Option<u64>,
    /// num_layers_in_first_pipeline_stage and num_layers_in_last_pipeline_stage.
    pub ends: [Option<u64>; 2],
    /// account_for_embedding_in_pipeline_split and account_for_loss_in_pipeline_split.
    pub account: [bool; 2],
    /// pipeline_model_parallel_layout.
    pub layout: Option<&'a str>,
    /// num_layer_list.
    pub list: Option<&'a [u64]>,
    /// noop_layers.
    pub noops: &'a [u64],
    /// mtp_num_layers.
    pub mtp: u64,
    /// Two chunks a stage, the second in falling order.
    pub v_shaped: bool,
}

/// Most entries of an expanded layout.
const MOST: usize = 1 << 16;

impl Placement<'_> {
    /// By stage, by chunk.
    pub fn chunks(&self) -> Result<Vec<Vec<Chunk>>> {
        let stages = self.stages;
        let all = self.layers + self.noops.len() as u64;
        let mut noops = self.noops.to_vec();
        noops.sort_unstable();
        if noops.windows(2).any(|w| w[0] == w[1]) || noops.last().is_some_and(|&n| n >= all) {
            bail!(
                RS_ERR_INVALID,
                "noop_layers {:?}: each must be there once and below {all}, the layers with the no-ops among them",
                self.noops
            );
        }
        if self.chunks.is_some_and(|c| c > 1) && stages == 1 {
            bail!(
                RS_ERR_INVALID,
                "virtual_pipeline_model_parallel_size {} wants pipeline_model_parallel_size above 1",
                self.chunks.unwrap_or(1)
            );
        }
        // Of each entry; and which has the layers for multi-token prediction, if it is not the last.
        let (counts, mtp) = match (self.layout, self.list) {
            _ if self.v_shaped => (self.of_v(all)?, None),
            (Some(layout), None) => self.of_layout(layout, all)?,
            (None, Some(list)) => (self.of_list(list, all)?, None),
            (None, None) => (self.of_sizes(all)?, None),
            (Some(_), Some(_)) => bail!(RS_ERR_INVALID, "pipeline_model_parallel_layout and num_layer_list contradict each other"),
        };
        // In the order of the layers: all first chunks, then all second ones.
        let chunks = counts.len() as u64 / stages;
        let mut out = vec![vec![Chunk::default(); chunks as usize]; stages as usize];
        let mut next = 0;
        let mut real = 0;
        for (i, &count) in counts.iter().enumerate() {
            let (pass, place) = (i / stages as usize, i % stages as usize);
            let stage = if self.v_shaped && pass == 1 { stages as usize - 1 - place } else { place };
            let chunk = &mut out[stage][pass];
            for at in next..next + count {
                let noop = noops.binary_search(&at).is_ok();
                chunk.layers.push((!noop).then_some(real));
                real += u64::from(!noop);
            }
            chunk.front = i == 0;
            chunk.back = i + 1 == counts.len();
            chunk.mtp = self.mtp > 0 && i == mtp.unwrap_or(counts.len() - 1);
            next += count;
            // With layers for multi-token prediction the norm follows the last layer, even where the output layer is elsewhere.
            chunk.norm = if self.mtp > 0 { count > 0 && next == all } else { chunk.back };
        }
        Ok(out)
    }

    /// Layers of each entry, chunk by chunk: from the sizes of stages.
    fn of_sizes(&self, all: u64) -> Result<Vec<u64>> {
        let (p, c) = (self.stages, self.chunks.unwrap_or(1));
        let account = self.account.map(u64::from);
        let even = |layers: u64, stages: u64, what: &str| {
            if layers % stages != 0 {
                bail!(
                    RS_ERR_INVALID,
                    "{layers} layers{what} are no multiple of {stages} stages of pipeline_model_parallel_size {p}: say how they are cut, \
                     with num_layers_in_first_pipeline_stage for instance"
                );
            }
            Ok(layers / stages)
        };
        let sizes: Vec<u64> = if self.ends == [None, None] {
            let what = if self.account == [false, false] {
                ""
            } else {
                " (with account_for_embedding_in_pipeline_split and account_for_loss_in_pipeline_split)"
            };
            vec![even(all + account[0] + account[1], p, what)?; p as usize]
        } else {
            if self.account != [false, false] {
                bail!(
                    RS_ERR_INVALID,
                    "account_for_embedding_in_pipeline_split and account_for_loss_in_pipeline_split contradict \
                     num_layers_in_first_pipeline_stage and num_layers_in_last_pipeline_stage"
                );
            }
            let shown_ends = self.ends.map(|e| e.map_or("-".to_string(), |n| n.to_string())).join(" and ");
            let given = self.ends.iter().flatten().count() as u64;
            let rest = all.checked_sub(self.ends.iter().flatten().sum()).ok_or_else(|| {
                err!(RS_ERR_INVALID, "num_layers_in_first_pipeline_stage and num_layers_in_last_pipeline_stage {shown_ends} are more than all {all} layers")
            })?;
            if p < 2 || p < given || (p == given && (rest != 0 || c > 1)) {
                bail!(
                    RS_ERR_INVALID,
                    "num_layers_in_first_pipeline_stage and num_layers_in_last_pipeline_stage {shown_ends} do not fit {p} pipeline stages of \
                     {all} layers (with two stages and both given, there is no virtual pipeline)"
                );
            }
            let middle = if p == given { 0 } else { even(rest, p - given, " between first and last")? };
            let mut sizes = vec![middle; p as usize];
            for (end, at) in self.ends.iter().zip([0, p as usize - 1]) {
                sizes[at] = end.unwrap_or(sizes[at]);
            }
            sizes
        };
        let mut out = vec![];
        for chunk in 0..c {
            for (stage, &size) in sizes.iter().enumerate() {
                if size % c != 0 {
                    bail!(
                        RS_ERR_INVALID,
                        "the {size} layers of pipeline stage {stage} are no multiple of virtual_pipeline_model_parallel_size {c}"
                    );
                }
                let first = chunk == 0 && stage == 0;
                let last = chunk + 1 == c && stage + 1 == sizes.len();
                let less = if first { account[0] } else { 0 } + if last { account[1] } else { 0 };
                let count = (size / c).checked_sub(less);
                out.push(count.ok_or_else(|| err!(RS_ERR_INVALID, "pipeline stage {stage} has no room for embedding or loss"))?);
            }
        }
        Ok(out)
    }

    /// Two chunks a stage, of equal size.
    fn of_v(&self, all: u64) -> Result<Vec<u64>> {
        self.alone("schedules_method dualpipev")?;
        if self.layout.is_some() || self.list.is_some() || self.chunks.is_some_and(|c| c != 2) {
            bail!(
                RS_ERR_INVALID,
                "schedules_method dualpipev contradicts pipeline_model_parallel_layout, num_layer_list, and a \
                 virtual_pipeline_model_parallel_size other than 2"
            );
        }
        let parts = 2 * self.stages;
        if all % parts != 0 {
            bail!(RS_ERR_INVALID, "schedules_method dualpipev: {all} layers are no multiple of 2 * {} stages", self.stages);
        }
        Ok(vec![all / parts; parts as usize])
    }

    fn of_list(&self, list: &[u64], all: u64) -> Result<Vec<u64>> {
        self.alone("num_layer_list")?;
        if self.chunks.is_some_and(|c| c > 1) {
            bail!(RS_ERR_INVALID, "num_layer_list contradicts virtual_pipeline_model_parallel_size");
        }
        if list.len() as u64 != self.stages || list.iter().sum::<u64>() != all {
            bail!(
                RS_ERR_INVALID,
                "num_layer_list {list:?} must have pipeline_model_parallel_size {} numbers whose sum is {all}, the layers with no-ops",
                self.stages
            );
        }
        Ok(list.to_vec())
    }

    fn of_layout(&self, layout: &str, all: u64) -> Result<(Vec<u64>, Option<usize>)> {
        self.alone("pipeline_model_parallel_layout")?;
        if !self.noops.is_empty() {
            bail!(RS_ERR_INVALID, "noop_layers contradicts pipeline_model_parallel_layout");
        }
        let name = |e: crate::error::Error| e.context(format_args!("pipeline_model_parallel_layout '{layout}'"));
        let symbols = expand(&mut layout.chars().filter(|c| *c != ',' && !c.is_whitespace()).peekable(), 0).map_err(name)?;
        let entries: Vec<&[char]> = symbols.split(|&c| c == '|').collect();
        let count = |entry: &[char], symbol: char| entry.iter().filter(|&&c| c == symbol).count() as u64;
        let check = || {
            if let Some(odd) = symbols.iter().find(|c| !"Etm|L".contains(**c)) {
                bail!(RS_ERR_INVALID, "'{odd}' is none of E, t, m, L and |");
            }
            if count(&symbols, 'm') != self.mtp {
                let given = count(&symbols, 'm');
                bail!(RS_ERR_INVALID, "it has {given} m, one for each MTP layer, and mtp_num_layers is {}", self.mtp);
            }
            if self.stages == 1 && entries.len() > 1 {
                bail!(RS_ERR_INVALID, "{} entries want pipeline_model_parallel_size above 1", entries.len());
            }
            if entries.len() as u64 % self.stages != 0 {
                bail!(RS_ERR_INVALID, "{} entries are no multiple of {} pipeline stages", entries.len(), self.stages);
            }
            if self.chunks.is_some_and(|c| c != entries.len() as u64 / self.stages) {
                bail!(
                    RS_ERR_INVALID,
                    "{} entries on {} pipeline stages contradict virtual_pipeline_model_parallel_size {}",
                    entries.len(),
                    self.stages,
                    self.chunks.unwrap_or(1)
                );
            }
            let layers: u64 = entries.iter().map(|e| count(e, 't')).sum();
            if layers != all {
                bail!(RS_ERR_INVALID, "it has {layers} t, the model has {all} layers");
            }
            let (first, last) = (entries[0].first(), entries[entries.len() - 1].last());
            if (first, last) != (Some(&'E'), Some(&'L')) || count(&symbols, 'E') != 1 || count(&symbols, 'L') != 1 {
                bail!(RS_ERR_INVALID, "it must have one E, at its beginning, and one L, at its end");
            }
            Ok(())
        };
        let mtp = entries.iter().position(|e| e.contains(&'m'));
        let check_mtp = || {
            let (Some(at), stages) = (mtp, self.stages as usize) else { return Ok(()) };
            if count(entries[at], 'm') != self.mtp {
                bail!(RS_ERR_INVALID, "all m must be in one entry");
            }
            if symbols.iter().skip_while(|&&c| c != 'm').any(|&c| c == 't') {
                bail!(RS_ERR_INVALID, "no t may follow m");
            }
            if at + stages < entries.len() || (stages > 1 && at % stages == 0) {
                bail!(RS_ERR_INVALID, "m must be in the last virtual chunk of its stage, and not in the first of several stages");
            }
            Ok(())
        };
        check().and_then(|()| check_mtp()).map_err(name)?;
        Ok((entries.iter().map(|e| count(e, 't')).collect(), mtp))
    }

    fn alone(&self, member: &str) -> Result<()> {
        if self.ends != [None, None] || self.account != [false, false] {
            bail!(
                RS_ERR_INVALID,
                "{member} contradicts num_layers_in_first_pipeline_stage, num_layers_in_last_pipeline_stage, \
                 account_for_embedding_in_pipeline_split and account_for_loss_in_pipeline_split"
            );
        }
        Ok(())
    }
}

/// Symbols with their repetitions written out, up to the end or, inside of a group, to its `)`.
fn expand(text: &mut std::iter::Peekable<impl Iterator<Item = char>>, depth: usize) -> Result<Vec<char>> {
    let mut out = vec![];
    while let Some(c) = text.next() {
        let item = match c {
            '(' if depth < 8 => expand(text, depth + 1)?,
            ')' if depth > 0 => return Ok(out),
            '(' | ')' | '*' => bail!(RS_ERR_INVALID, "unexpected '{c}'"),
            c => vec![c],
        };
        let mut times = 1;
        if text.next_if_eq(&'*').is_some() {
            let mut digits = String::new();
            while let Some(d) = text.next_if(char::is_ascii_digit) {
                digits.push(d);
            }
            times = digits.parse().map_err(|_| err!(RS_ERR_INVALID, "a number must follow '*'"))?;
        }
        if item.len().saturating_mul(times) > MOST - out.len().min(MOST) {
            bail!(RS_ERR_INVALID, "more than {MOST} symbols");
        }
        out.extend(item.repeat(times));
    }
    if depth > 0 {
        bail!(RS_ERR_INVALID, "a ')' is missing");
    }
    Ok(out)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// First layer and number of layers of each chunk, by stage.
    fn spans(p: &Placement<'_>) -> Vec<Vec<(u64, usize)>> {
        let chunks = p.chunks().unwrap();
        let mut seen: Vec<u64> = chunks.iter().flatten().flat_map(|c| c.layers.iter().flatten().copied()).collect();
        seen.sort_unstable();
        assert!(seen.into_iter().eq(0..p.layers), "each layer once");
        let span = |c: &Chunk| (c.layers.iter().flatten().next().copied().unwrap_or(0), c.layers.len());
        chunks.iter().map(|s| s.iter().map(span).collect()).collect()
    }

    #[test]
    fn virtual_chunks_go_round() {
        let s = spans(&Placement { layers: 16, stages: 4, chunks: Some(2), ..Placement::default() });
        assert_eq!(s, [[(0, 2), (8, 2)], [(2, 2), (10, 2)], [(4, 2), (12, 2)], [(6, 2), (14, 2)]]);
        let account = [true, true];
        let s = spans(&Placement { layers: 30, stages: 4, chunks: Some(2), account, ..Placement::default() });
        assert_eq!(s, [[(0, 3), (15, 4)], [(3, 4), (19, 4)], [(7, 4), (23, 4)], [(11, 4), (27, 3)]]);
    }

    #[test]
    fn uneven_stages() {
        let s = spans(&Placement { layers: 61, stages: 16, ends: [Some(3), Some(2)], ..Placement::default() });
        assert_eq!([s[0][0], s[1][0], s[14][0], s[15][0]], [(0, 3), (3, 4), (55, 4), (59, 2)]);
        let list = [7, 7, 8, 8, 8, 8, 8, 7];
        let s = spans(&Placement { layers: 61, stages: 8, list: Some(&list), ..Placement::default() });
        assert!(s.iter().map(|c| c[0].0).eq([0, 7, 14, 22, 30, 38, 46, 54]));
        let s = spans(&Placement { layers: 126, stages: 16, account: [true, true], ..Placement::default() });
        assert_eq!([s[0][0], s[1][0], s[15][0]], [(0, 7), (7, 8), (119, 7)]);
    }

    #[test]
    fn no_ops_take_a_place() {
        let p = Placement { layers: 94, stages: 16, noops: &[5, 95], ..Placement::default() };
        let chunks = p.chunks().unwrap();
        assert_eq!(chunks[0][0].layers, [Some(0), Some(1), Some(2), Some(3), Some(4), None]);
        assert_eq!(chunks[1][0].layers, [5, 6, 7, 8, 9, 10].map(Some));
        assert_eq!(chunks[15][0].layers, [Some(89), Some(90), Some(91), Some(92), Some(93), None]);
    }

    #[test]
    fn a_pipeline_that_comes_back() {
        let p = Placement { layers: 16, stages: 4, v_shaped: true, ..Placement::default() };
        assert_eq!(spans(&p), [[(0, 2), (14, 2)], [(2, 2), (12, 2)], [(4, 2), (10, 2)], [(6, 2), (8, 2)]]);
        let chunks = p.chunks().unwrap();
        assert!(chunks[0][0].front && chunks[0][1].back, "the first stage has both ends");
    }

    #[test]
    fn layouts_in_words() {
        let of = |layout, layers, stages| Placement { layout: Some(layout), layers, stages, ..Placement::default() };
        assert_eq!(spans(&of("Et|tt|t|L", 4, 2)), [[(0, 1), (3, 1)], [(1, 2), (0, 0)]]);
        let back: Vec<bool> = of("Et|tt|t|L", 4, 2).chunks().unwrap().iter().map(|s| s[1].back).collect();
        assert_eq!(back, [false, true]);
        let s = spans(&of("Et*3|(tt|)*29|L", 61, 16));
        assert_eq!((s[0][0], s[1][0], s[13][1], s[14][1], s[15][1]), ((0, 3), (3, 2), (59, 2), (0, 0), (0, 0)));
        let of_mtp = |layout, layers, stages, mtp| Placement { mtp, ..of(layout, layers, stages) };
        let at = |p: &Placement<'_>, what: fn(&Chunk) -> bool| -> Vec<(usize, usize)> {
            let chunks = p.chunks().unwrap();
            let all = chunks.iter().enumerate().flat_map(|(s, c)| c.iter().enumerate().map(move |(i, c)| ((s, i), c)));
            all.filter(|(_, c)| what(c)).map(|(at, _)| at).collect()
        };
        // Of 32 entries the one before the last, alone; the norm is with the last layer.
        let p = of_mtp("Et*3|(tt|)*29,m|L", 61, 16, 1);
        assert_eq!((at(&p, |c| c.mtp), at(&p, |c| c.norm), at(&p, |c| c.back)), (vec![(14, 1)], vec![(13, 1)], vec![(15, 1)]));
        let p = of_mtp("Ett|ttmmL", 4, 2, 2);
        assert_eq!((at(&p, |c| c.mtp), at(&p, |c| c.norm)), (vec![(1, 0)], vec![(1, 0)]));
        let p = Placement { layers: 4, stages: 2, chunks: Some(2), mtp: 1, ..Placement::default() };
        assert_eq!((at(&p, |c| c.mtp), at(&p, |c| c.norm)), (vec![(1, 1)], vec![(1, 1)]));
        for (layout, mtp, word) in [
            ("Et|tt|t|L", 1, "0 m"),
            ("Et|tt|tm|mL", 2, "one entry"),
            ("Et|tt|tm|L", 1, "first of several"),
            ("Et|tt|m|tL", 1, "no t may follow"),
            ("Ett|ttm|L|", 1, "one L"),
        ] {
            let e = of_mtp(layout, 4, 2, mtp).chunks().unwrap_err();
            assert!(e.text().contains(word), "{layout}: {e}");
        }
        for (layout, word) in [
            ("Et|tt|t|", "one L"),
            ("tEt|t|t|L", "one E"),
            ("Et|tt|L", "no multiple"),
            ("Et|tt|tt|L", "it has 5 t"),
            ("Et|tx|t|L", "'x'"),
            ("Et|(tt|t|L", "')'"),
            ("Et*|tt|t|L", "number"),
            ("Et*99999999|tt|t|L", "more than"),
            ("Et|tt|mt|L", "MTP"),
        ] {
            let e = of(layout, 4, 2).chunks().unwrap_err();
            assert!(e.text().contains(word), "{layout}: {e}");
        }
    }

    #[test]
    fn what_does_not_fit_is_refused() {
        let base = Placement { layers: 10, stages: 4, ..Placement::default() };
        assert!(base.chunks().unwrap_err().text().contains("no multiple of 4"));
        let chunks = Some(3);
        assert!(
            Placement { layers: 16, chunks, ..base.clone() }
                .chunks()
                .unwrap_err()
                .text()
                .contains("virtual_pipeline_model_parallel_size 3")
        );
        let ends = [Some(6), Some(6)];
        assert!(Placement { ends, ..base.clone() }.chunks().unwrap_err().text().contains("6 and 6 are more than all"));
        let account = [true, false];
        let e = Placement { ends: [Some(1), None], account, ..base.clone() }.chunks().unwrap_err();
        assert!(e.text().contains("contradict"));
        assert!(Placement { noops: &[12], ..base.clone() }.chunks().unwrap_err().text().contains("noop_layers"));
        assert!(Placement { list: Some(&[1, 2, 3]), ..base }.chunks().unwrap_err().text().contains("num_layer_list"));
    }
}
