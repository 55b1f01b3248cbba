"""Worked examples of Qwen2.5-VL: which stage has which part of the vision tower, under which names, and published numbers of parameters.

vision_vectors.py [--oracle]: only the oracle, in numpy alone; else the library too, by syncs that are compared with the oracle.
"""

import sys

import oracle

PP, NAMES, LIST = "pipeline_model_parallel_size", "vision_names", "vision_num_layer_list"


def config(hidden, layers, heads, kv_heads, mlp, vocab, tied, depth, width, vision_heads, vision_mlp, nested=False, patch=14):
    text = {
        "hidden_size": hidden, "num_hidden_layers": layers, "num_attention_heads": heads, "num_key_value_heads": kv_heads, "intermediate_size": mlp,
        "vocab_size": vocab, "tie_word_embeddings": tied,
    }  # fmt: skip
    vision = {
        "depth": depth, "hidden_size": width, "num_heads": vision_heads, "intermediate_size": vision_mlp, "patch_size": patch,
        "temporal_patch_size": 2, "spatial_merge_size": 2, "out_hidden_size": hidden, "in_channels": 3,
    }  # fmt: skip
    return {
        "architectures": ["Qwen2_5_VLForConditionalGeneration"], "vision_config": vision, **({"text_config": text} if nested else text),
    }  # fmt: skip


TOTALS = [
    ((2048, 36, 16, 2, 11008, 151936, True, 32, 1280, 16, 3420), 3_754_622_976),
    ((3584, 28, 28, 4, 18944, 152064, False, 32, 1280, 16, 3420), 8_292_166_656),
    ((5120, 64, 40, 8, 27648, 152064, False, 32, 1280, 16, 3456), 33_452_718_336),
    ((8192, 80, 64, 8, 29568, 152064, False, 32, 1280, 16, 3456), 73_410_777_344),
]  # fmt: skip

SMALL = (4, 4, 2, 2, 4, 8, False, 4, 4, 2, 4)
MM, BRIDGE = "image_encoder.", "vision_model."
# Members, stages, and of every stage the blocks it has and whether it has the patches' embedding and the projector.
STAGES = [
    ({NAMES: "mindspeed_mm", LIST: "1,0,2,1"}, 4, [([0], True, False), ([], False, False), ([1, 2], False, False), ([3], False, True)]),
    ({NAMES: "mindspeed_mm", LIST: [0, 4, 0, 0]}, 4, [([], False, False), ([0, 1, 2, 3], True, True), ([], False, False), ([], False, False)]),
    ({NAMES: "mindspeed_mm"}, 2, [([0, 1, 2, 3], True, True), ([], False, False)]),
    ({}, 2, [([0, 1, 2, 3], True, True), ([], False, False)]),
    ({"virtual_pipeline_model_parallel_size": 2}, 2, [([0, 1, 2, 3], True, True), ([], False, False)]),
]  # fmt: skip
NORM1 = {MM: "encoder.blocks.layers.{}.input_layernorm.weight", BRIDGE: "decoder.layers.{}.self_attention.linear_qkv.layer_norm_weight"}
PATCH = {MM: "encoder.patch_embed.proj.weight", BRIDGE: "patch_embed.proj.weight"}
PROJECTOR = {MM: "projector.layernorm.weight projector.encoder.linear_fc2.bias", BRIDGE: "decoder.final_layernorm.weight projection.encoder.linear_fc1.weight"}


def same(got, expected, *what):
    assert got == expected, f"{what}: {got} instead of {expected}"


def spec_of(setting, stages):
    target = {"framework": "megatron", "ranks": list(range(1, 1 + stages)), PP: stages, **setting}
    return {"model": config(*SMALL, patch=1), "source": {"framework": "hf", "ranks": [0]}, "target": target}


def check_stages():
    for setting, stages, expected in STAGES:
        spec = spec_of(setting, stages)
        model, tower = oracle.model_of(spec), MM if NAMES in setting else BRIDGE
        for stage, (blocks, patch, projector) in enumerate(expected):
            params = {p.name: p for p in oracle.params(spec, "target", 1 + stage, model)}
            mine = [name for name in params if name.startswith(tower)]
            for local, number in enumerate(blocks):
                same(params[tower + NORM1[tower].format(local)].sources, (f"visual.blocks.{number}.norm1.weight",), setting, stage)
            same(tower + NORM1[tower].format(len(blocks)) in params, False, setting, stage)
            same(tower + PATCH[tower] in params, patch, setting, stage)
            for name in PROJECTOR[tower].split():
                same(tower + name in params, projector, setting, stage, name)
            # A block has two norms, and four projections with their biases; a projector a norm and two.
            same(len(mine), 10 * len(blocks) + patch + 5 * projector, setting, stage)
    return len(STAGES)


def main():
    for sizes, total in TOTALS:
        for nested in (False, True):
            same(oracle.Model(config(*sizes, nested=nested)).elements, total, sizes)
    print(f"vision vectors: {check_stages() + len(TOTALS)} of the oracle")
    if "--oracle" not in sys.argv:
        import worlds

        for setting, stages, _ in STAGES:
            worlds.run(spec_of(setting, stages), 1 + stages)
        print(f"vision vectors: {len(STAGES)} of the library")


if __name__ == "__main__":
    main()
