"""Presets against what real frameworks held: goldens.py [--oracle]

The files of tests/goldens tell what vLLM 0.32 and Megatron-core 0.16.1 had in memory: shapes and hashes of every parameter of every rank.
First the oracle must say the same, in numpy alone (--oracle: only that); then the library's targets must.
"""

import copy
import glob
import hashlib
import json
import os
import sys

import numpy as np
import oracle

EP, ETP = "expert_model_parallel_size", "expert_tensor_parallel_size"
GROUPED, LEGACY, EXTEND = "moe_grouped_gemm", "moe_use_legacy_grouped_gemm", "moe_tp_extend_ep"
DERIVED = "mla_derived_weights"
FOLDER = os.path.join(os.path.dirname(os.path.abspath(__file__)), "../goldens")


class Golden:
    """One file: its config, the side that made it, and by rank {(chunk, name): (shape, hash)}."""

    def __init__(self, path):
        with open(path) as f:
            content = json.load(f)
        self.name = "/".join(path.split("/")[-2:])
        self.config = content["config"]
        # The layer for multi-token prediction follows the others. None of the files asks for it; its embedding and head are those of the model.
        drafts = f"model.layers.{self.config['num_hidden_layers']}."
        again = (drafts + "embed_tokens.weight", drafts + "shared_head.head.weight")
        self.all_shapes = {n: tuple(s) for n, s in content["hf_tensors"].items() if n not in again}
        self.shapes = {n: s for n, s in self.all_shapes.items() if not n.startswith(drafts)}
        s, self.framework = content["setting"], path.split("/")[-2]
        if self.framework == "vllm":
            sizes = "tensor_parallel_size", "pipeline_parallel_size", "data_parallel_size"
            self.side = dict(zip(sizes, (s["tp"], s["pp"], s["dp"])))
            if s["ep"]:
                self.side["enable_expert_parallel"] = True
        else:
            self.side = {
                "tensor_model_parallel_size": s["tp"],
                "pipeline_model_parallel_size": s["pp"],
                "virtual_pipeline_model_parallel_size": s["vpp"],
                "context_parallel_size": s["cp"],
                "data_parallel_size": s["sizes"]["dp"],
                "use_tp_pp_dp_mapping": s["order"] != "tp-cp-ep-dp-pp",
                "make_vocab_size_divisible_by": s["make_vocab_size_divisible_by"],
                "transformer_impl": {"te": "transformer_engine", "local": "local"}[content["spec"]],
                **experts(s),
                **s["config_overrides"],
            }
        self.ranks = []
        for rank in sorted(content["ranks"], key=lambda r: r["rank"]):
            chunks = rank.get("chunks", [rank])
            params = {
                (i, name): p
                for i, chunk in enumerate(chunks)
                for name, p in chunk["params"].items()
            }
            assert all("stride" not in p or p["stride"] == dense(p["shape"]) for p in params.values()), self.name
            self.ranks.append({key: (tuple(p["shape"]), p["sha256"]) for key, p in params.items()})
        # Views of MLA's projections, which vLLM has after loading. Where they are copies their bytes are the same.
        self.derived = [
            {(0, name): (tuple(p["shape"]), p["sha256"]) for name, p in rank.get("post_new_params", {}).items()}
            for rank in sorted(content["ranks"], key=lambda r: r["rank"])
        ]

    def with_copies(self):
        """The same where the views are copies."""
        other = copy.copy(self)
        other.side, other.name = {**self.side, DERIVED: "copies"}, self.name + " with copies"
        other.ranks = [held | more for held, more in zip(self.ranks, self.derived)]
        return other

    def side_at(self, first):
        """The side, on communicator ranks from `first` on."""
        return {"framework": self.framework, "ranks": list(range(first, first + len(self.ranks))), **self.side}

    def compare(self, rank, found):
        """`found`: what a rank of this side has, padding being zero."""
        found = {key: (array.shape, hashlib.sha256(array.tobytes()).hexdigest()) for key, array in found.items()}
        expected = self.ranks[rank]
        wrong = sorted(key for key in found.keys() | expected.keys() if found.get(key) != expected.get(key))
        assert not wrong, f"{self.name}, rank {rank}: {len(wrong)} parameters differ, the first: {wrong[0]}"
        return len(found)


def experts(setting):
    """The members for experts of a Megatron file's setting."""
    if not (module := setting.get("experts_module")):
        return {}
    side = {EP: setting["ep"], GROUPED: module in ("TEGroupedMLP", "GroupedMLP(legacy)")}
    if setting["etp"]:
        side[ETP] = setting["etp"]
    return side


def dense(shape):
    return [int(np.prod(shape[i + 1 :])) for i in range(len(shape))]


def files(framework="*"):
    # The oracle does not know gpt-oss; gpt_oss.py reads its file.
    paths = (path for path in sorted(glob.glob(f"{FOLDER}/{framework}/*.json")) if "gpt_oss" not in path)
    found = [Golden(path) for path in paths]
    return found + [golden.with_copies() for golden in found if any(golden.derived)]


def check_oracle():
    count = 0
    for golden in files():
        spec = {"model": golden.config, "source": golden.side_at(0), "target": golden.side_at(0)}
        model = oracle.model_of(spec)
        assert model.shapes == golden.shapes, f"{golden.name}: other Hugging Face tensors"
        mtp = golden.config.get("num_nextn_predict_layers", 0)
        assert oracle.Model(golden.config, mtp).shapes == golden.all_shapes, f"{golden.name}: other tensors for multi-token prediction"
        for side in ("target",) if DERIVED in golden.side else ("source", "target"):
            for rank in range(len(golden.ranks)):
                count += golden.compare(rank, {p.key: p.data(0) for p in oracle.params(spec, side, rank, model)})
    return count


def check_targets(golden, first, ranks):
    """The library's targets, once their padding, which must hold the poison still (worlds.run has looked), is zeroed."""
    count = 0
    for own in range(len(golden.ranks)):
        rank, found = ranks[first + own], {}
        for param in rank.params["target"]:
            found[param.key] = np.where(param.pads, 0, rank.memory["target"][param.key]).astype(param.kind)
        count += golden.compare(own, found)
    return count


def check_from_hf():
    """Hugging Face tensors, on one rank or on two, into every file's layout."""
    import worlds

    count = 0
    for golden in files():
        for holders in (1, 2):
            source = {"framework": "hf", "ranks": list(range(holders))}
            spec = {"model": golden.config, "source": source, "target": golden.side_at(holders)}
            count += check_targets(golden, holders, worlds.run(spec, holders + len(golden.ranks)))
    return count


def megatron_settings(config):
    """Settings that a config with 4 layers allows, and the number of ranks."""
    tp, pp, vpp = "tensor_model_parallel_size", "pipeline_model_parallel_size", "virtual_pipeline_model_parallel_size"
    settings = [
        (1, {}),
        (2, {tp: 2}),
        (2, {tp: 2, "transformer_impl": "local", "make_vocab_size_divisible_by": 16}),
        (4, {tp: 4}),
        (2, {pp: 2, "transformer_impl": "local"}),
        (2, {pp: 2, vpp: 2}),
        (2, {pp: 2, "num_layers_in_first_pipeline_stage": 1}),
        (2, {pp: 2, "num_layers_in_last_pipeline_stage": 1, "padded_vocab_size": config["vocab_size"]}),
        (4, {tp: 2, pp: 2}),
        (8, {tp: 2, pp: 2, "data_parallel_size": 2}),
        (8, {tp: 2, pp: 2, "data_parallel_size": 2, "use_tp_pp_dp_mapping": True}),
        (4, {tp: 2, "context_parallel_size": 2}),
        (3, {pp: 3, "account_for_embedding_in_pipeline_split": True, "account_for_loss_in_pipeline_split": True}),
        (2, {pp: 2, "pipeline_model_parallel_layout": "Et|tt|t|L"}),
        (4, {tp: 2, pp: 2, "num_layer_list": "1,3"}),
        (2, {pp: 2, vpp: 2, "noop_layers": "0,2,5,7"}),
        (8, {tp: 8}),
        (2, {EP: 2}),
        (2, {EP: 2, GROUPED: True, "transformer_impl": "local"}),
        (4, {EP: 2, GROUPED: True}),
        (2, {ETP: 2, GROUPED: True}),
        (2, {ETP: 2, LEGACY: True}),
        (4, {EP: 2, ETP: 2}),
        (4, {tp: 2, EP: 2, GROUPED: True}),
        (4, {tp: 2, EP: 2, ETP: 1, LEGACY: True}),
        (4, {tp: 2, EP: 2, "transformer_impl": "local", "mla_down_proj_cut": False}),
        (2, {tp: 2, EXTEND: True, "mla_down_proj_cut": True}),
        (8, {tp: 2, EP: 4, ETP: 1, EXTEND: False, GROUPED: True}),
        (4, {tp: 2, EP: 2, EXTEND: True, GROUPED: True, "transformer_impl": "local"}),
        (4, {tp: 4, EP: 3, ETP: 1}),
        (6, {EP: 3, ETP: 2, GROUPED: True, LEGACY: True}),
        (4, {pp: 2, EP: 2, GROUPED: True}),
        (8, {tp: 2, pp: 2, vpp: 2, EP: 2, "transformer_impl": "local"}),
        (8, {tp: 2, pp: 2, "context_parallel_size": 2, "use_tp_pp_dp_mapping": True, EP: 2, GROUPED: True}),
        (2, {pp: 2, "pipeline_model_parallel_layout": "Et|tt|t|L", GROUPED: True}),
        (4, {EP: 2, ETP: 2, GROUPED: True, "moe_single_grouped_weight": True}),
        (2, {tp: 2, "mla_down_proj_fusion": True}),
        (2, {tp: 2, "mla_down_proj_fusion": True, "mla_down_proj_cut": True}),
        (2, {pp: 2, "mtp_num_layers": 1}),  # which nobody reads
        (2, {tp: 2, "vision_names": "mindspeed_mm"}),
        (2, {pp: 2, "vision_names": "mindspeed_mm", "vision_num_layer_list": "0,4"}),
        (4, {tp: 2, pp: 2, "vision_names": "megatron_bridge"}),
    ]
    for ranks, setting in settings:
        side = {"framework": "megatron", "ranks": list(range(ranks)), **setting}
        try:
            for rank in range(ranks):
                oracle.params({"model": config, "source": side}, "source", rank)
        except oracle.Refused:
            continue
        yield ranks, side


def check_from_megatron():
    """Every Megatron setting into every vLLM file: the shards are those that the library made of Hugging Face tensors. On ranks of their own or
    on the same, by turns; with RESHARD_GOLDENS=all in both ways."""
    import worlds

    count, made, turn, both = 0, {}, 0, os.environ.get("RESHARD_GOLDENS") == "all"
    for golden in files("vllm"):
        for ranks, side in megatron_settings(golden.config):
            key = json.dumps([golden.config, side], sort_keys=True)
            if key not in made:
                shards = {**side, "ranks": list(range(1, 1 + ranks))}
                spec = {"model": golden.config, "source": {"framework": "hf", "ranks": "0"}, "target": shards}
                first = worlds.run(spec, 1 + ranks)
                made[key] = {rank: first[1 + rank].memory["target"] for rank in range(ranks)}
            turn += 1
            for first in (0, ranks) if both else (ranks * (turn % 2),):
                spec = {"model": golden.config, "source": side, "target": golden.side_at(first)}
                world = max(ranks, first + len(golden.ranks))
                count += check_targets(golden, first, worlds.run(spec, world, sources=made[key]))
    return count


def main():
    print(f"goldens: the oracle says the same of {check_oracle()} sources and targets")
    if "--oracle" not in sys.argv:
        print(f"goldens: {check_from_hf()} parameters from Hugging Face tensors")
        print(f"goldens: {check_from_megatron()} parameters from Megatron shards")


if __name__ == "__main__":
    main()
