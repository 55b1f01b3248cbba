//! Tables of real models as Megatron's and vLLM's ranks hold them, written down by hand: fused QKV, gate and up, experts.

use super::oracle::model::{Buffer, Case, Rank, Tensor, Tile, dense};
use reshard::abi::{RS_SOURCE, RS_TARGET, rs_dtype_t};
use std::collections::HashMap;

const BF16: rs_dtype_t = rs_dtype_t { code: 4, bits: 16, lanes: 1 };

/// A decoder of the Llama family; `experts` 0 is a dense one.
pub struct Model {
    layers: i64,
    hidden: i64,
    heads: i64,
    groups: i64,
    head: i64,
    ffn: i64,
    experts: i64,
    vocabulary: i64,
}

impl Model {
    pub const LLAMA_8B: Model =
        Model { layers: 32, hidden: 4096, heads: 32, groups: 8, head: 128, ffn: 14336, experts: 0, vocabulary: 128_256 };
    pub const QWEN3_30B_A3B: Model =
        Model { layers: 48, hidden: 2048, heads: 32, groups: 4, head: 128, ffn: 768, experts: 128, vocabulary: 151_936 };
}

/// tp fastest, then data parallel, then pipeline; experts on runs of `ep` ranks of a stage.
pub struct Megatron {
    pub tp: i64,
    pub pp: i64,
    pub dp: i64,
    pub ep: i64,
    pub first: usize,
}

/// Engines of `tp` ranks each; with `ep` greater than 1 they hold whole experts.
pub struct VLlm {
    pub tp: i64,
    pub replicas: i64,
    pub ep: i64,
    pub first: usize,
}

/// Both sides' tables, on hosts of `per_host` ranks.
pub fn world(model: &Model, source: &Megatron, target: &VLlm, per_host: usize) -> Case {
    let sources = (source.tp * source.dp * source.pp) as usize;
    let targets = (target.tp * target.replicas) as usize;
    let count = (source.first + sources).max(target.first + targets);
    let host = |r: usize| 1 + (r / per_host) as u64;
    let mut case =
        Case { seed: 0, tensors: Vec::new(), ranks: (0..count).map(|r| Rank { host: host(r), ..Rank::default() }).collect() };
    let mut known = HashMap::new();
    for r in 0..sources {
        let mut rank = Builder { model, case: &mut case, known: &mut known, rank: source.first + r, role: RS_SOURCE };
        rank.megatron(source, r as i64);
    }
    for r in 0..targets {
        let mut rank = Builder { model, case: &mut case, known: &mut known, rank: target.first + r, role: RS_TARGET };
        rank.vllm(target, r as i64);
    }
    for rank in &mut case.ranks {
        rank.listed = rank.tiles.iter().map(|t| t.tensor).collect();
        rank.listed.sort();
        rank.listed.dedup();
    }
    case
}

/// Part of a tensor: on each axis of the view (extent of the view, first index, indices).
type Cut = Vec<(i64, i64, i64)>;

struct Builder<'a> {
    model: &'a Model,
    case: &'a mut Case,
    known: &'a mut HashMap<String, usize>,
    rank: usize,
    role: u32,
}

fn all(n: i64) -> (i64, i64, i64) {
    (n, 0, n)
}

fn share(n: i64, part: i64, parts: i64) -> (i64, i64, i64) {
    (n, part * n / parts, (part + 1) * n / parts - part * n / parts)
}

impl Builder<'_> {
    /// The number of a logical tensor, made at its first mention.
    fn tensor(&mut self, name: String, shape: &[i64]) -> usize {
        let tensors = &mut self.case.tensors;
        *self.known.entry(name.clone()).or_insert_with(|| {
            tensors.push(Tensor { name, shape: shape.to_vec(), dtype: BF16, target: BF16, transform: 0, seed: 0 });
            tensors.len() - 1
        })
    }

    fn buffer(&mut self, name: String, shape: Vec<i64>) {
        let (strides, bytes) = (dense(&shape), shape.iter().product::<i64>() as usize * 2);
        let rank = &mut self.case.ranks[self.rank];
        rank.blocks.push(bytes);
        let block = rank.blocks.len() - 1;
        rank.buffers.push(Buffer { name, role: self.role, padded: false, dtype: BF16, shape, strides, bytes, block, at: 0 });
    }

    /// A tile in the last buffer, `offset` elements into it; dense but for the stride of its first axis where one is given.
    fn tile(&mut self, tensor: usize, cut: Cut, offset: i64, outer: Option<i64>) {
        let extent: Vec<i64> = cut.iter().map(|c| c.2).collect();
        let mut stride = dense(&extent);
        if let Some(outer) = outer {
            stride[0] = outer;
        }
        let rank = &mut self.case.ranks[self.rank];
        let (view, origin) = (cut.iter().map(|c| c.0).collect(), cut.iter().map(|c| c.1).collect());
        let byte_offset = offset as u64 * 2;
        rank.tiles.push(Tile { tensor, buffer: rank.buffers.len() - 1, transform: 0, byte_offset, view, origin, extent, stride });
    }

    /// A parameter that is one box of one tensor.
    fn plain(&mut self, name: &str, tensor: String, cut: Cut) {
        let shape: Vec<i64> = cut.iter().map(|c| c.0).collect();
        let tensor = self.tensor(tensor, &shape);
        self.buffer(name.into(), cut.iter().map(|c| c.2).collect());
        self.tile(tensor, cut, 0, None);
    }

    fn norms(&mut self, name: &str, layer: i64) {
        let hidden = self.model.hidden;
        for norm in ["input_layernorm", "post_attention_layernorm"] {
            self.plain(&format!("{name}.{norm}"), format!("model.layers.{layer}.{norm}.weight"), vec![all(hidden)]);
        }
    }

    /// The number of a projection of a layer: `rows` by hidden.
    fn projection(&mut self, layer: i64, which: &str, rows: i64) -> usize {
        let hidden = self.model.hidden;
        self.tensor(format!("model.layers.{layer}.{which}.weight"), &[rows, hidden])
    }

    fn out_and_norms(&mut self, name: &str, layer: i64, part: i64, parts: i64) {
        let (hidden, rows) = (self.model.hidden, self.model.heads * self.model.head);
        let cut = vec![all(hidden), share(rows, part, parts)];
        self.plain(&format!("{name}.o_proj"), format!("model.layers.{layer}.self_attn.o_proj.weight"), cut);
        self.norms(name, layer);
    }

    /// Gate over up, and down, of one feed-forward block.
    fn feed_forward(&mut self, name: &str, prefix: String, part: i64, parts: i64) {
        let (hidden, ffn) = (self.model.hidden, self.model.ffn);
        let rows = share(ffn, part, parts);
        self.buffer(format!("{name}.gate_up"), vec![2 * rows.2, hidden]);
        for (half, which) in ["gate_proj", "up_proj"].into_iter().enumerate() {
            let tensor = self.tensor(format!("{prefix}.{which}.weight"), &[ffn, hidden]);
            self.tile(tensor, vec![rows, all(hidden)], half as i64 * rows.2 * hidden, None);
        }
        self.plain(&format!("{name}.down"), format!("{prefix}.down_proj.weight"), vec![all(hidden), rows]);
    }

    fn megatron(&mut self, mesh: &Megatron, rank: i64) {
        let m = self.model;
        let (tp, stage) = (rank % mesh.tp, rank / (mesh.tp * mesh.dp));
        let (_, first, count) = share(m.layers, stage, mesh.pp);
        let per_group = m.heads / m.groups;
        for layer in first..first + count {
            let name = format!("decoder.layers.{}", layer - first);
            let (groups, block) = (share(m.groups, tp, mesh.tp), (per_group + 2) * m.head * m.hidden);
            self.buffer(format!("{name}.linear_qkv"), vec![groups.2 * (per_group + 2) * m.head, m.hidden]);
            let q = self.projection(layer, "self_attn.q_proj", m.heads * m.head);
            self.tile(q, vec![groups, all(per_group), all(m.head), all(m.hidden)], 0, Some(block));
            for (slot, which) in ["self_attn.k_proj", "self_attn.v_proj"].into_iter().enumerate() {
                let tensor = self.projection(layer, which, m.groups * m.head);
                let offset = (per_group + slot as i64) * m.head * m.hidden;
                self.tile(tensor, vec![groups, all(m.head), all(m.hidden)], offset, Some(block));
            }
            self.out_and_norms(&name, layer, tp, mesh.tp);
            if m.experts == 0 {
                self.feed_forward(&name, format!("model.layers.{layer}.mlp"), tp, mesh.tp);
                continue;
            }
            self.plain(
                &format!("{name}.router"),
                format!("model.layers.{layer}.mlp.gate.weight"),
                vec![all(m.experts), all(m.hidden)],
            );
            let (_, expert, experts) = share(m.experts, rank % mesh.ep, mesh.ep);
            for e in 0..experts {
                self.feed_forward(
                    &format!("{name}.local_experts.{e}"),
                    format!("model.layers.{layer}.mlp.experts.{}", expert + e),
                    0,
                    1,
                );
            }
        }
        let vocabulary = vec![share(m.vocabulary, tp, mesh.tp), all(m.hidden)];
        if stage == 0 {
            self.plain("embedding.word_embeddings", "model.embed_tokens.weight".into(), vocabulary.clone());
        }
        if stage == mesh.pp - 1 {
            self.plain("output_layer", "lm_head.weight".into(), vocabulary);
            self.plain("decoder.final_layernorm", "model.norm.weight".into(), vec![all(m.hidden)]);
        }
    }

    fn vllm(&mut self, mesh: &VLlm, rank: i64) {
        let m = self.model;
        let tp = rank % mesh.tp;
        for layer in 0..m.layers {
            let name = format!("model.layers.{layer}");
            let (q, kv) = (share(m.heads * m.head, tp, mesh.tp), share(m.groups * m.head, tp, mesh.tp));
            self.buffer(format!("{name}.qkv_proj"), vec![q.2 + 2 * kv.2, m.hidden]);
            let mut row = 0;
            for (which, rows) in [("self_attn.q_proj", q), ("self_attn.k_proj", kv), ("self_attn.v_proj", kv)] {
                let tensor = self.projection(layer, which, rows.0);
                self.tile(tensor, vec![rows, all(m.hidden)], row * m.hidden, None);
                row += rows.2;
            }
            self.out_and_norms(&name, layer, tp, mesh.tp);
            if m.experts == 0 {
                self.feed_forward(&name, format!("{name}.mlp"), tp, mesh.tp);
                continue;
            }
            self.plain(&format!("{name}.router"), format!("{name}.mlp.gate.weight"), vec![all(m.experts), all(m.hidden)]);
            let (_, first, experts) = share(m.experts, rank % mesh.ep, mesh.ep);
            self.buffer(format!("{name}.w13"), vec![experts, 2 * m.ffn, m.hidden]);
            for e in 0..experts {
                for (half, which) in ["gate_proj", "up_proj"].into_iter().enumerate() {
                    let tensor = self.tensor(format!("{name}.mlp.experts.{}.{which}.weight", first + e), &[m.ffn, m.hidden]);
                    self.tile(tensor, vec![all(m.ffn), all(m.hidden)], (2 * e + half as i64) * m.ffn * m.hidden, None);
                }
            }
            self.buffer(format!("{name}.w2"), vec![experts, m.hidden, m.ffn]);
            for e in 0..experts {
                let tensor = self.tensor(format!("{name}.mlp.experts.{}.down_proj.weight", first + e), &[m.hidden, m.ffn]);
                self.tile(tensor, vec![all(m.hidden), all(m.ffn)], e * m.ffn * m.hidden, None);
            }
        }
        let vocabulary = vec![share(m.vocabulary, tp, mesh.tp), all(m.hidden)];
        self.plain("model.embed_tokens", "model.embed_tokens.weight".into(), vocabulary.clone());
        self.plain("lm_head", "lm_head.weight".into(), vocabulary);
        self.plain("model.norm", "model.norm.weight".into(), vec![all(m.hidden)]);
    }
}

/// Addresses for one rank's parameters: honest ones, of memory that faults when touched.
pub struct Reserved {
    base: usize,
    bytes: usize,
    starts: Vec<usize>,
}

impl Reserved {
    pub fn new(rank: &Rank) -> Reserved {
        let (mut starts, mut bytes) = (Vec::new(), 0);
        for block in &rank.blocks {
            starts.push(bytes);
            bytes += block.next_multiple_of(4096);
        }
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
        // SAFETY: a fresh mapping at an address of the kernel's choice.
        let base = unsafe { libc::mmap(std::ptr::null_mut(), bytes.max(1), libc::PROT_NONE, flags, -1, 0) };
        assert_ne!(base, libc::MAP_FAILED, "{bytes} bytes of addresses");
        Reserved { base: base as usize, bytes: bytes.max(1), starts }
    }

    pub fn address(&self, rank: &Rank, buffer: usize) -> *mut u8 {
        (self.base + self.starts[rank.buffers[buffer].block]) as *mut u8
    }
}

impl Drop for Reserved {
    fn drop(&mut self) {
        // SAFETY: the mapping is this value's own, and the containers that knew of it are gone.
        unsafe { libc::munmap(self.base as *mut libc::c_void, self.bytes) };
    }
}
