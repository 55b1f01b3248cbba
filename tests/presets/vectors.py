"""Worked examples, small enough to follow by hand: of the oracle, and of the library where it shows them.

vectors.py [--oracle]: only the oracle, in numpy alone.
"""

import sys

import numpy as np
import oracle

MEGATRON, VLLM = "megatron", "vllm"
TP, PP, VPP = "tensor_model_parallel_size", "pipeline_model_parallel_size", "virtual_pipeline_model_parallel_size"


def config(heads=1, kv_heads=None, layers=1, mlp=8, vocab=1, **more):
    """A model whose heads and rows have one element, so that a shard is a list of labels."""
    return {
        "architectures": ["LlamaForCausalLM"], "hidden_size": 1, "head_dim": 1, "num_hidden_layers": layers, "intermediate_size": mlp,
        "num_attention_heads": heads, "num_key_value_heads": kv_heads or heads, "vocab_size": vocab, **more,
    }  # fmt: skip


def side(framework, tp, **more):
    key = TP if framework == MEGATRON else "tensor_parallel_size"
    padding = {"make_vocab_size_divisible_by": 1} if framework == MEGATRON else {"vocab_padding_size": tp}
    return {"framework": framework, "ranks": list(range(tp)), key: tp, **padding, **more}


# Shards of every rank, as labels: the letter of the tensor and the row.
SHARDS = [
    (MEGATRON, 1, {"heads": 4, "kv_heads": 2}, "qkv", "q0 q1 k0 v0 q2 q3 k1 v1"),
    (MEGATRON, 2, {"heads": 4, "kv_heads": 2}, "qkv", "q0 q1 k0 v0 ; q2 q3 k1 v1"),
    (MEGATRON, 4, {"heads": 4, "kv_heads": 2}, "qkv", "q0 q1 ; k0 v0 ; q2 q3 ; k1 v1"),
    (MEGATRON, 4, {"heads": 8, "kv_heads": 2}, "qkv", "q0 q1 q2 ; q3 k0 v0 ; q4 q5 q6 ; q7 k1 v1"),
    (VLLM,     1, {"heads": 4, "kv_heads": 2}, "qkv", "q0 q1 q2 q3 k0 k1 v0 v1"),
    (VLLM,     2, {"heads": 4, "kv_heads": 2}, "qkv", "q0 q1 k0 v0 ; q2 q3 k1 v1"),
    (VLLM,     4, {"heads": 4, "kv_heads": 2}, "qkv", "q0 k0 v0 ; q1 k0 v0 ; q2 k1 v1 ; q3 k1 v1"),
    (VLLM,     4, {"heads": 8, "kv_heads": 2}, "qkv", "q0 q1 k0 v0 ; q2 q3 k0 v0 ; q4 q5 k1 v1 ; q6 q7 k1 v1"),
    (MEGATRON, 2, {"heads": 2, "mlp": 4}, "gate_up", "g0 g1 u0 u1 ; g2 g3 u2 u3"),
    (VLLM,     2, {"heads": 2, "mlp": 4}, "gate_up", "g0 g1 u0 u1 ; g2 g3 u2 u3"),
    (MEGATRON, 1, {"heads": 2, "mlp": 4}, "gate_up", "g0 g1 g2 g3 u0 u1 u2 u3"),
]  # fmt: skip
NAMES = {
    (MEGATRON, "qkv"): "decoder.layers.0.self_attention.linear_qkv.weight",
    (MEGATRON, "gate_up"): "decoder.layers.0.mlp.linear_fc1.weight",
    (VLLM, "qkv"): "model.layers.0.self_attn.qkv_proj.weight",
    (VLLM, "gate_up"): "model.layers.0.mlp.gate_up_proj.weight",
}
LABELS = {
    "q": "self_attn.q_proj",
    "k": "self_attn.k_proj",
    "v": "self_attn.v_proj",
    "g": "mlp.gate_proj",
    "u": "mlp.up_proj",
}

# (pp, chunk) to (first layer, count).
PLACEMENTS = [
    (16, {PP: 4, VPP: 2}, {(p, c): (8 * c + 2 * p, 2) for c in range(2) for p in range(4)}),
    (61, {PP: 16, "num_layers_in_first_pipeline_stage": 3, "num_layers_in_last_pipeline_stage": 2},
     {(0, 0): (0, 3), (1, 0): (3, 4), (14, 0): (55, 4), (15, 0): (59, 2)}),
    (30, {PP: 4, VPP: 2, "account_for_embedding_in_pipeline_split": True, "account_for_loss_in_pipeline_split": True},
     {(0, 0): (0, 3), (1, 0): (3, 4), (2, 0): (7, 4), (3, 0): (11, 4),
      (0, 1): (15, 4), (1, 1): (19, 4), (2, 1): (23, 4), (3, 1): (27, 3)}),
    (61, {PP: 8, "num_layer_list": "7,7,8,8,8,8,8,7"},
     {(p, 0): (at, n) for p, at, n in zip(range(8), (0, 7, 14, 22, 30, 38, 46, 54), (7, 7, 8, 8, 8, 8, 8, 7))}),
    (4, {PP: 2, "pipeline_model_parallel_layout": "Et|tt|t|L"}, {(0, 0): (0, 1), (0, 1): (3, 1), (1, 0): (1, 2), (1, 1): (4, 0)}),
    # 61 layers on 32 entries, two to most of them.
    (61, {PP: 16, "pipeline_model_parallel_layout": "Et*3|(tt|)*29,|L"},
     {(0, 0): (0, 3), (1, 0): (3, 2), (15, 0): (31, 2), (0, 1): (33, 2), (13, 1): (59, 2), (14, 1): (61, 0), (15, 1): (61, 0)}),
]  # fmt: skip
NOOPS = (94, {PP: 16, "noop_layers": "5,95"},
         {0: dict(zip(range(5), range(5))), 1: dict(zip(range(6), range(5, 11))), 15: dict(zip(range(5), range(89, 94)))})  # fmt: skip
PARTITIONS = [((61, 4), [15, 15, 16, 15]), ((94, 4), [23, 24, 24, 23]), ((31, 4), [8, 8, 8, 7])]

# HF vocabulary: Megatron's rows in all at tp 1, 2, 4, 8, 16 with k 128; vLLM's rows with padding 64.
VOCABULARIES = [
    (32000,  (32000, 32000, 32256, 32768, 32768), 32000),
    (128256, (128256, 128256, 128512, 129024, 129024), 128256),
    (151936, (151936, 152064, 152064, 152576, 153600), 151936),
    (152064, (152064, 152064, 152064, 152576, 153600), 152064),
    (129280, (129280, 129280, 129536, 130048, 131072), 129280),
    (201088, (201088, 201216, 201216, 201728, 202752), 201088),
    (102400, (102400,) * 5, 102400),
    (151552, (151552,) * 5, 151552),
    (163840, (163840,) * 5, 163840),
]  # fmt: skip

# Megatron's rank arithmetic: sizes, rank, coordinates.
COORDINATES = [
    (16, {TP: 2, PP: 2, "data_parallel_size": 4}, 5, {"tp": 1, "cp": 0, "dp": 2, "pp": 0}),
    (16, {TP: 2, PP: 2, "data_parallel_size": 4}, 10, {"tp": 0, "cp": 0, "dp": 1, "pp": 1}),
    (32, {TP: 2, PP: 2, "context_parallel_size": 2}, 13, {"tp": 1, "cp": 0, "dp": 3, "pp": 0}),
    (16, {TP: 2, PP: 2, "use_tp_pp_dp_mapping": True}, 5, {"tp": 1, "cp": 0, "dp": 1, "pp": 0}),
    (16, {TP: 2, PP: 2, "use_tp_pp_dp_mapping": True}, 10, {"tp": 0, "cp": 0, "dp": 2, "pp": 1}),
]  # fmt: skip

# Sizes and number of parameters of published models: hidden, layers, heads, kv heads, head, mlp, vocabulary, tied.
TOTALS = [
    ("Llama", 4096, 32, 32, 32, 128, 11008, 32000, False, 6_738_415_616),
    ("Llama", 8192, 80, 64, 8, 128, 28672, 128256, False, 70_553_706_496),
    ("Llama", 16384, 126, 128, 8, 128, 53248, 128256, False, 405_853_388_800),
    ("Llama", 2048, 16, 32, 8, 64, 8192, 128256, True, 1_235_814_400),
    ("Qwen2", 896, 24, 14, 2, 64, 4864, 151936, True, 494_032_768),
    ("Qwen2", 3584, 28, 28, 4, 128, 18944, 152064, False, 7_615_616_512),
    ("Qwen2", 8192, 80, 64, 8, 128, 29568, 152064, False, 72_706_203_648),
    ("Qwen3", 1024, 28, 16, 8, 128, 3072, 151936, True, 596_049_920),
    ("Qwen3", 2560, 36, 32, 8, 128, 9728, 151936, True, 4_022_468_096),
    ("Qwen3", 5120, 64, 64, 8, 128, 25600, 151936, False, 32_762_123_264),
]  # fmt: skip


def find(params, name):
    return next(p for p in params if p.name == name)


def shard_labels(model, shard):
    starts = {int(model[f"model.layers.0.{name}.weight"][0, 0]): letter for letter, name in LABELS.items()}
    labels = []
    for element in shard.ravel():
        start = max(s for s in starts if s <= element)
        labels.append(f"{starts[start]}{element - start}")
    return " ".join(labels)


def same(got, expected, *what):
    assert got == expected, f"{what}: {got} instead of {expected}"


def placement_cases():
    """(model, side, {(pp, chunk, local layer): layer}, whole): `whole`: what is not said is nowhere."""
    for layers, setting, expected in PLACEMENTS:
        held = {(p, c, i): first + i for (p, c), (first, n) in expected.items() for i in range(n)}
        yield layers, setting, held, list(expected)
    layers, setting, expected = NOOPS
    yield (
        layers,
        setting,
        {(p, 0, i): layer for p, held in expected.items() for i, layer in held.items()},
        [(p, 0) for p in expected],
    )


def oracle_vectors():
    count = 0
    for framework, tp, sizes, which, expected in SHARDS:
        spec = {"model": config(**sizes), "source": side(framework, tp)}
        model = oracle.model_of(spec)
        ranks = (find(oracle.params(spec, "source", r, model), NAMES[framework, which]) for r in range(tp))
        same(" ; ".join(shard_labels(model, p.elements) for p in ranks), expected, framework, tp, sizes)
        count += 1
    for layers, setting, held, stages in placement_cases():
        placed, _, _ = oracle.megatron_placement(setting, layers)
        got = {
            (p, c, i): layer for (p, c), slots in placed.items() for i, layer in enumerate(slots) if layer is not None
        }
        same({k: v for k, v in got.items() if k[:2] in stages}, held, layers, setting)
        same(sorted(got.values()), list(range(layers)), layers, setting)
        count += 1
    for (layers, pp), expected in PARTITIONS:
        same(oracle.vllm_partition({"pipeline_parallel_size": pp}, layers), expected, layers, pp)
        count += 1
    for vocab, megatron, vllm in VOCABULARIES:
        same(tuple(oracle.rounded_up(vocab, 128 * tp) for tp in (1, 2, 4, 8, 16)), megatron, vocab)
        same(oracle.rounded_up(vocab, 64), vllm, vocab)
        count += 1
    for world, setting, rank, expected in COORDINATES:
        same(oracle.megatron_coordinates({"ranks": list(range(world)), **setting}, rank), expected, setting, rank)
        count += 1
    for family, hidden, layers, heads, kv_heads, head, mlp, vocab, tied, total in TOTALS:
        sizes = {
            "hidden_size": hidden,
            "head_dim": head,
            "tie_word_embeddings": tied,
            "architectures": [family + "ForCausalLM"],
        }
        same(oracle.Model(config(heads, kv_heads, layers, mlp, vocab, **sizes)).elements, total, family, hidden, layers)
        count += 1
    # Rows of vocabulary 151936 at tp 4, rank 3, and where they come from.
    spec = {
        "model": config(heads=4, mlp=4, vocab=151936),
        "source": side(MEGATRON, 4),
        "target": side(VLLM, 4, vocab_padding_size=64),
    }
    spec["source"]["make_vocab_size_divisible_by"] = 128
    rows = {}
    for role, name in (("source", "embedding.word_embeddings.weight"), ("target", "model.embed_tokens.weight")):
        rows[role] = [find(oracle.params(spec, role, r), name) for r in (2, 3)]
    third, fourth = rows["source"]
    same((int(fourth.real[0]), int(fourth.real[-1]), fourth.shape[0]), (114048, 151935, 38016), "Megatron's rank 3")
    same((int(rows["target"][1].real[0]), int(rows["target"][1].real[-1])), (113952, 151935), "vLLM's rank 3")
    same(
        [int(x) for x in np.intersect1d(third.real, rows["target"][1].real)[[0, -1]]],
        [113952, 114047],
        "from rank 2 to rank 3",
    )
    return count + 1


def library_vectors():
    """What RS_DESCRIBE_LAYOUT shows: shapes, and which layer is where by the names of its sources. Shards by a sync."""
    import worlds
    from worlds import reshard

    count = 0
    for framework, tp, sizes, which, expected in SHARDS:
        target = side(framework, tp)
        target["ranks"] = [r + 1 for r in target["ranks"]]
        spec = {"model": config(**sizes), "source": {"framework": "hf", "ranks": [0]}, "target": target}
        ranks = worlds.run(spec, tp + 1)
        model, name = ranks[0].model, NAMES[framework, which]
        bits = {}  # of this one parameter's tensors: the labels
        for letter, part in LABELS.items():
            for i, value in enumerate(model.bits[model[f"model.layers.0.{part}.weight"].ravel()]):
                bits.setdefault(int(value), set()).add(f"{letter}{i}")
        for rank, labels in zip(ranks[1:], expected.split(" ; ")):
            got = rank.memory["target"][0, name].ravel()
            assert all(label in bits[int(v)] for v, label in zip(got, labels.split(), strict=True)), (spec, labels)
        count += 1

    def described(model, source, rank):
        preset = reshard.Preset({"model": model, "source": source, "target": {"framework": "hf", "ranks": [0]}}, rank)
        try:
            return [p for p in preset.describe(reshard.DESCRIBE_LAYOUT)["params"] if p["role"] == reshard.SOURCE]
        finally:
            preset.close()

    for layers, setting, held, stages in placement_cases():
        source = {"framework": MEGATRON, "ranks": list(range(setting[PP])), **setting}
        got = {}
        for stage in range(setting[PP]):
            for p in described(config(layers=layers), source, stage):
                if p["name"].endswith("linear_proj.weight"):
                    got[stage, p["chunk"], int(p["name"].split(".")[2])] = int(p["tensors"][0].split(".")[2])
        same({k: v for k, v in got.items() if k[:2] in stages}, held, layers, setting)
        same(sorted(got.values()), list(range(layers)), layers, setting)
        count += 1
    for (layers, pp), expected in PARTITIONS:
        source = {"framework": VLLM, "ranks": list(range(pp)), "pipeline_parallel_size": pp}
        names = [[p["name"] for p in described(config(layers=layers), source, stage)] for stage in range(pp)]
        got = [sum(name.endswith("o_proj.weight") for name in of_stage) for of_stage in names]
        same(got, expected, layers, pp)
        count += 1
    for vocab, megatron, vllm in VOCABULARIES:
        for tp, rows in zip((1, 2, 4, 8, 16), megatron):
            model = config(heads=16, mlp=16, vocab=vocab)
            source = side(MEGATRON, tp, make_vocab_size_divisible_by=128)
            got = {p["name"]: p["shape"] for p in described(model, source, tp - 1)}
            same(got["embedding.word_embeddings.weight"], [rows // tp, 1], vocab, tp)
            if vllm % tp == 0:
                got = {p["name"]: p["shape"] for p in described(model, side(VLLM, tp, vocab_padding_size=64), tp - 1)}
                same(got["lm_head.weight"], [vllm // tp, 1], vocab, tp)
        count += 1
    for world, setting, rank, expected in COORDINATES:
        # Two layers on two stages: the names tell the stage.
        model = config(heads=2, layers=2, mlp=2, vocab=2)
        got = described(model, {"framework": MEGATRON, "ranks": list(range(world)), **setting}, rank)
        same("embedding.word_embeddings.weight" in [p["name"] for p in got], expected["pp"] == 0, setting, rank)
        count += 1
    return count


def main():
    print(f"vectors: {oracle_vectors()} of the oracle")
    if "--oracle" not in sys.argv:
        print(f"vectors: {library_vectors()} of the library")


if __name__ == "__main__":
    main()
