//! What a rank has of a layer with experts.

use super::holds::{Rank, share};
use super::models::Family;
use super::names::{Names, vllm_experts};
use super::sides::Framework;
use super::tensors::{CORRECTION, GATE_UP, GATE_UP_BIAS, Key, of_expert, of_shared, router};

/// How a rank's experts lie in memory.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Storage {
    /// Two parameters an expert.
    Each([&'static str; 2]),
    /// Two parameters for all, those of an expert together: gate, up, down.
    Stacked,
    /// The same, but up before gate.
    Swapped,
    /// The same as stacked, but each matrix the other way round, gate and up side by side.
    Transposed([&'static str; 2]),
}

/// `global` is the layer's number in the model, `local` in the names.
impl Rank<'_> {
    pub fn around_experts(&mut self, names: &Names, global: u64, local: u64) {
        let (model, e) = (self.model, self.model.experts.expect("experts"));
        let h = model.hidden;
        let (key, param) = (|name| (Some(global), name, 0), |name| (Some(local), name, 0));
        self.rows(key(router(model.family)), param(names.router), [0, e.count], h, 0);
        match model.family {
            Family::DeepSeekV3 => self.rows(key(CORRECTION), param(names.correction), [0, e.count], 1, 0),
            Family::Qwen2Moe => self.rows(key("mlp.shared_expert_gate.weight"), param(names.shared_gate), [0, 1], h, 0),
            Family::GptOss => self.rows(key("mlp.router.bias"), param(names.router_bias), [0, e.count], 1, 0),
            _ => {}
        }
        if e.shared == 0 {
            return;
        }
        // vLLM spreads the tokens, not the shared expert, where both parallel sizes multiply those of the experts.
        let side = self.side;
        let spread = side.flag("ep") && side.size("tp") > 1 && side.size("dp") > 1;
        let whole = side.framework == Framework::VLlm && model.family != Family::Qwen2Moe && spread;
        let part = if whole { [0, e.shared] } else { share(e.shared, self.place.tp, self.t) };
        self.gated(of_shared(model.family), names.shared, part, global, local);
    }

    /// Its routed experts, slot by slot.
    pub fn experts(&mut self, global: u64, local: u64) {
        let (width, place) = (self.model.experts.expect("experts").width, self.place);
        let part = share(width, place.expert_tp, self.side.expert_tp());
        let storage = self.storage();
        for (slot, expert) in (0..).zip(self.side.experts(self.model, place.expert, global)) {
            if self.model.family == Family::GptOss {
                self.fused(part, global, (local, slot, expert));
            } else {
                self.expert(storage, part, global, (local, slot, expert));
            }
        }
    }

    fn storage(&self) -> Storage {
        let side = self.side;
        let legacy = side.flag("legacy") || (side.flag("grouped") && side.flag("impl"));
        let [w13, w2, ..] = vllm_experts(self.model.family);
        match (side.framework, side.text("storage")) {
            (Framework::VLlm, None | Some("stacked")) => Storage::Stacked,
            (Framework::VLlm, Some("stacked_swapped")) => Storage::Swapped,
            (Framework::VLlm, _) => Storage::Transposed([w13, w2]),
            _ if side.flag("extend") || legacy => Storage::Transposed(["mlp.experts.weight1", "mlp.experts.weight2"]),
            _ if side.flag("grouped") => Storage::Each(["mlp.experts.linear_fc1.weight{}", "mlp.experts.linear_fc2.weight{}"]),
            _ => {
                Storage::Each(["mlp.experts.local_experts.{}.linear_fc1.weight", "mlp.experts.local_experts.{}.linear_fc2.weight"])
            }
        }
    }

    /// `part` of the width of `expert` in `slot`.
    fn expert(&mut self, storage: Storage, part: [u64; 2], global: u64, (local, slot, expert): (u64, u64, u64)) {
        let (h, n) = (self.model.hidden, part[1] - part[0]);
        let of = of_expert(self.model.family).map(|name| (Some(global), name, expert));
        let param = |name, number| (Some(local), name, number);
        let all = [0, h];
        if let Storage::Transposed([w1, w2]) = storage {
            let first = slot * h * 2 * n;
            self.push(of[0], param(w1, 0), [part, all], first, [1, 2 * n]);
            self.push(of[1], param(w1, 0), [part, all], first + n, [1, 2 * n]);
            self.push(of[2], param(w2, 0), [all, part], slot * n * h, [1, h]);
            return;
        }
        let [w13, w2, ..] = vllm_experts(self.model.family);
        let (gates_ups, downs, before) = match storage {
            Storage::Each([fc1, fc2]) => (param(fc1, slot), param(fc2, slot), 0),
            _ => (param(w13, 0), param(w2, 0), slot),
        };
        let [gate, up] = if storage == Storage::Swapped { [1, 0] } else { [0, 1] };
        self.push(of[0], gates_ups, [part, all], (before * 2 + gate) * n * h, [h, 1]);
        self.push(of[1], gates_ups, [part, all], (before * 2 + up) * n * h, [h, 1]);
        self.push(of[2], downs, [all, part], before * h * n, [n, 1]);
    }

    /// The same where the checkpoint has one tensor for all experts, gates and ups taking turns; biases too.
    fn fused(&mut self, part: [u64; 2], global: u64, (local, slot, expert): (u64, u64, u64)) {
        let (h, width, n) = (self.model.hidden, self.model.experts.expect("experts").width, part[1] - part[0]);
        let (one, rows) = ([expert, expert + 1], [expert * h, (expert + 1) * h]);
        let of_down = part.map(|i| expert * width + i);
        let ups = part.map(|i| width + i);
        let key = |name| (Some(global), name, 0);
        let (down, down_bias) = (key("mlp.experts.down_proj"), key("mlp.experts.down_proj_bias"));
        if self.side.framework == Framework::Megatron {
            let param = |name| -> Key { (Some(local), name, slot) };
            let (fc1, bias1) = (param("mlp.experts.linear_fc1.weight{}"), param("mlp.experts.linear_fc1.bias{}"));
            let (fc2, bias2) = (param("mlp.experts.linear_fc2.weight{}"), param("mlp.experts.linear_fc2.bias{}"));
            self.push(key(GATE_UP), fc1, [rows, part], 0, [1, h]);
            self.push(key(GATE_UP), fc1, [rows, ups], n * h, [1, h]);
            self.push(key(GATE_UP_BIAS), bias1, [one, part], 0, [2 * n, 1]);
            self.push(key(GATE_UP_BIAS), bias1, [one, ups], n, [2 * n, 1]);
            self.push(down, fc2, [of_down, [0, h]], 0, [1, n]);
            self.push(down_bias, bias2, [one, [0, h]], 0, [h, 1]);
            return;
        }
        let [w13, w2, bias13, bias2] = vllm_experts(self.model.family).map(|name| (Some(local), name, 0));
        self.push(key(GATE_UP), w13, [rows, part], slot * 2 * n * h, [1, 2 * h]);
        self.push(key(GATE_UP), w13, [rows, ups], slot * 2 * n * h + h, [1, 2 * h]);
        self.push(key(GATE_UP_BIAS), bias13, [one, part], slot * 2 * n, [2 * n, 2]);
        self.push(key(GATE_UP_BIAS), bias13, [one, ups], slot * 2 * n + 1, [2 * n, 2]);
        self.push(down, w2, [of_down, [0, h]], slot * h * n, [1, n]);
        // The others add zeros, so that the sum has the bias once.
        if self.place.expert_tp == 0 {
            self.push(down_bias, bias2, [one, [0, h]], slot * h, [h, 1]);
        }
    }
}
