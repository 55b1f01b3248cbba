"""Worked examples of values: casts, and norms that hold one less than Hugging Face's. Of the oracle alone, in numpy alone."""

import numpy as np
import oracle
from oracle_values import BF16, EXPONENTS, FP16, FP32, converted, from_float32, is_nan, to_float32, wild

# Bits of one type, one added or less, bits of another.
EXAMPLES = [
    (FP32, 0x3F800000, 0, BF16, 0x3F80),  # 1
    (FP32, 0x3F808000, 0, BF16, 0x3F80),  # half-way: down to the even one
    (FP32, 0x3F818000, 0, BF16, 0x3F82),  # half-way: up to it
    (FP32, 0x3F808001, 0, BF16, 0x3F81),
    (FP32, 0x3F817FFF, 0, BF16, 0x3F81),
    (FP32, 0x7F7FFFFF, 0, BF16, 0x7F80),  # the largest: infinite
    (FP32, 0xFF7F7FFF, 0, BF16, 0xFF7F),
    (FP32, 0x00000001, 0, BF16, 0x0000),
    (FP32, 0x80018000, 0, BF16, 0x8002),  # below the normal ones it is the same
    (FP32, 0x7F800001, 0, BF16, 0x7FC0),  # a NaN of which nothing would be left
    (FP32, 0x3F801000, 0, FP16, 0x3C00),
    (FP32, 0x3F803000, 0, FP16, 0x3C02),
    (FP32, 0x3F801001, 0, FP16, 0x3C01),
    (FP32, 0x477FEFFF, 0, FP16, 0x7BFF),  # just below 65520
    (FP32, 0x477FF000, 0, FP16, 0x7C00),
    (FP32, 0xFF800000, 0, FP16, 0xFC00),
    (FP32, 0x38800000, 0, FP16, 0x0400),  # 2^-14
    (FP32, 0x387FF000, 0, FP16, 0x0400),
    (FP32, 0x33000000, 0, FP16, 0x0000),  # 2^-25, half-way
    (FP32, 0x33000001, 0, FP16, 0x0001),
    (FP32, 0xB3C00000, 0, FP16, 0x8002),  # -1.5 steps
    (FP32, 0x7F800001, 0, FP16, 0x7E00),
    (FP16, 0x0001, 0, FP32, 0x33800000),
    (FP16, 0x83FF, 0, FP32, 0xB87FC000),
    (FP16, 0x7C01, 0, FP32, 0x7FC02000),
    (FP16, 0x3C04, 0, BF16, 0x3F80),
    (FP16, 0x3C0C, 0, BF16, 0x3F82),
    (FP16, 0x3C05, 0, BF16, 0x3F81),
    (BF16, 0x4780, 0, FP16, 0x7C00),  # 65536
    (BF16, 0xBF81, 0, FP16, 0xBC08),
    (BF16, 0x3F81, 0, FP32, 0x3F810000),
    (BF16, 0x0000, 1, BF16, 0x3F80),
    (BF16, 0x3B80, 1, BF16, 0x3F80),  # 1 + 2^-8
    (BF16, 0x3B81, 1, BF16, 0x3F81),
    (BF16, 0x3C40, 1, BF16, 0x3F82),  # 1 + 3 * 2^-8
    (BF16, 0x3F80, -1, BF16, 0x0000),
    (BF16, 0x3F81, -1, FP32, 0x3C000000),
    (FP32, 0x3B800001, 1, BF16, 0x3F80),  # what float32 cannot add is gone before the type changes
    (FP32, 0x34000000, 1, FP32, 0x3F800001),
    (FP32, 0xBF800000, 1, FP16, 0x0000),
    (BF16, 0xFF80, 1, FP16, 0xFC00),
]  # fmt: skip


def check_examples():
    for held, bits, added, wanted, expected in EXAMPLES:
        got = int(converted(np.array([bits], np.uint32), held, wanted, added)[0])
        assert got == expected, f"{bits:#x} {held} + {added} in {wanted}: {got:#x} instead of {expected:#x}"
    return len(EXAMPLES)


def every(dtype):
    return np.arange(1 << 16, dtype=np.uint32) if dtype[1] == 16 else wild("any float32 at all", 1 << 18, FP32)


def check_against_numpy():
    """numpy's own float16; and that what a wider type has been given comes back."""
    for dtype in (BF16, FP16, FP32):
        bits = every(dtype)
        wide = to_float32(bits, dtype)
        with np.errstate(over="ignore", invalid="ignore"):
            halves = wide.view(np.float32).astype(np.float16).view(np.uint16)
        got = from_float32(wide, FP16)
        numbers = ~is_nan(wide, FP32)
        assert (got == halves)[numbers].all(), f"{dtype} in float16 is not as numpy has it"
        assert (is_nan(bits, dtype) == ~numbers).all() and (is_nan(got, FP16) == ~numbers).all(), "a NaN came or went"
        assert (from_float32(wide, dtype) == bits)[numbers].all(), f"{dtype} did not come back"
    own = np.arange(1 << 16, dtype=np.uint16).view(np.float16).astype(np.float32).view(np.uint32)
    assert (own == to_float32(every(FP16), FP16))[~is_nan(own, FP32)].all(), "float16 is not as numpy reads it"
    wide = to_float32(every(FP32), FP32)
    finite = (wide & 0x7FFFFFFF) < 0x7F7F0000
    near = to_float32(from_float32(wide, BF16), BF16).view(np.float32).astype(np.float64)[finite]
    # No bfloat16 is nearer: the error is at most half of the step to the next one.
    exact = wide.view(np.float32).astype(np.float64)[finite]
    step = np.maximum(2.0 ** (np.floor(np.log2(np.maximum(np.abs(exact), 2.0**-126))) - 7), 2.0**-133)
    assert (np.abs(near - exact) <= step / 2).all(), "a nearer bfloat16"
    return 4


def check_wild():
    """Values of converting worlds: most are no number of a narrower type, and there are NaNs, infinities and halves among them."""
    bits = wild("model.norm.weight", 1 << 18, FP32)
    for narrow in (BF16, FP16):
        back = to_float32(from_float32(bits, narrow), narrow)
        assert (back != bits).mean() > 0.9, narrow
    assert 0 < is_nan(bits, FP32).mean() < 0.01 and ((bits & 0xFFFF) == 0x8000).mean() > 0.01
    for dtype in (BF16, FP16):
        bits = wild("model.norm.weight", 1 << 18, dtype)
        assert bits.max() < 1 << 16 and 0 < is_nan(bits, dtype).mean() < 0.01
        assert (bits & 0x7FFF == EXPONENTS[dtype]).any()
    return 3


MODEL = {
    "architectures": ["Qwen3ForCausalLM"], "hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2,
    "head_dim": 2, "intermediate_size": 4, "vocab_size": 4,
}  # fmt: skip
EXPERTS = {"moe_intermediate_size": 4, "n_routed_experts": 4, "n_shared_experts": 1, "first_k_dense_replace": 0}
GLM = {**MODEL, "architectures": ["Glm4MoeForCausalLM"], **EXPERTS}
NEXT = {
    **MODEL, "architectures": ["Qwen3NextForCausalLM"], "full_attention_interval": 1, "num_experts": 4, "moe_intermediate_size": 4,
    "shared_expert_intermediate_size": 4,
}  # fmt: skip
HF, VLLM, MEGATRON = ({"framework": name} for name in ("hf", "vllm", "megatron"))
CENTRED = {**MEGATRON, "layernorm_zero_centered_gamma": True}
NORM, M_NORM = "model.layers.0.input_layernorm.weight", "decoder.layers.0.self_attention.linear_qkv.layer_norm_weight"
Q_NORM, M_Q_NORM = "model.layers.0.self_attn.q_norm.weight", "decoder.layers.0.self_attention.q_layernorm.weight"
LINEAR, M_LINEAR = "model.layers.0.self_attn.o_proj.weight", "decoder.layers.0.self_attention.linear_proj.weight"
GATE, M_GATE = "model.layers.0.mlp.gate.weight", "decoder.layers.0.mlp.router.weight"
BIAS, M_BIAS = "model.layers.0.mlp.gate.e_score_correction_bias", "decoder.layers.0.mlp.router.expert_bias"
# Model, source, target, a name of each, what the target has more, the element types of the source's memory and of the target's.
HELD = [
    (MODEL, HF, VLLM, NORM, NORM, 0, BF16, BF16),
    (MODEL, HF, CENTRED, NORM, M_NORM, -1, BF16, BF16),
    (MODEL, HF, CENTRED, Q_NORM, M_Q_NORM, -1, BF16, BF16),
    (MODEL, CENTRED, VLLM, M_NORM, NORM, 1, BF16, BF16),
    (MODEL, CENTRED, MEGATRON, M_NORM, M_NORM, 1, BF16, BF16),
    (MODEL, CENTRED, CENTRED, M_NORM, M_NORM, 0, BF16, BF16),
    (MODEL, CENTRED, VLLM, M_LINEAR, LINEAR, 0, BF16, BF16),
    (MODEL, {**CENTRED, "params_dtype": "float32"}, {**VLLM, "dtype": "float16"}, M_NORM, NORM, 1, FP32, FP16),
    (MODEL, {**CENTRED, "params_dtype": "float32"}, VLLM, M_LINEAR, LINEAR, 0, FP32, BF16),
    (MODEL, {**HF, "dtype": "float16"}, {**CENTRED, "params_dtype": "float32"}, NORM, M_NORM, -1, FP16, FP32),
    (NEXT, HF, CENTRED, NORM, M_NORM, 0, BF16, BF16),
    (NEXT, CENTRED, {**VLLM, "dtype": "float16"}, M_NORM, NORM, 0, BF16, FP16),
    (GLM, MEGATRON, VLLM, M_GATE, GATE, 0, BF16, FP32),
    (GLM, VLLM, {**MEGATRON, "params_dtype": "float16"}, GATE, M_GATE, 0, FP32, FP16),
    (GLM, VLLM, HF, GATE, GATE, 0, FP32, BF16),
    (GLM, VLLM, VLLM, GATE, GATE, 0, FP32, FP32),
    (GLM, {**MEGATRON, "params_dtype": "float16"}, VLLM, M_BIAS, BIAS, 0, FP32, FP32),
    (NEXT, HF, VLLM, GATE, GATE, 0, BF16, BF16),
]  # fmt: skip


def numbers(bits, dtype):
    """As numpy has them, which reads and rounds float16 itself."""
    if dtype == FP16:
        return bits.astype(np.uint16).view(np.float16).astype(np.float32)
    return (bits.astype(np.uint32) << np.uint32(0 if dtype == FP32 else 16)).view(np.float32)


def check_held():
    """Memory of both sides of a world on one rank: the target's is as near to the source's, and what is added, as its type allows."""
    for model, source, target, from_name, to_name, added, held, wanted in HELD:
        spec = {"model": model, "source": {**source, "ranks": [0]}, "target": {**target, "ranks": [0]}}
        made, what = oracle.model_of(spec), (source, target, to_name)
        sides = {"source": from_name, "target": to_name}
        ours, theirs = (next(p for p in oracle.params(spec, role, 0, made) if p.name == name) for role, name in sides.items())
        assert (ours.dtype, theirs.dtype) == (held, wanted), (what, ours.dtype, theirs.dtype)
        assert theirs.changes == bool(added or held != wanted) and not ours.changes, what
        before, after = (numbers(p.data(0), p.dtype).astype(np.float64) for p in (ours, theirs))
        with np.errstate(invalid="ignore"):
            exact = before + added
        looked = np.isfinite(exact) & (np.abs(exact) < 60000) & (np.abs(exact) > 2.0**-13)
        error = np.abs(after[looked] - exact[looked]) / np.abs(exact[looked])
        assert looked.sum() >= min(before.size, 48) // 2, (what, looked.sum())
        assert error.max() <= 2.0**-8 + 2.0**-22 if wanted == BF16 else error.max() <= 2.0**-11 + 2.0**-22, (what, error.max())
        if not theirs.changes:
            assert (ours.data(0) == theirs.data(0)).all(), what
    return len(HELD)


def main():
    print(f"value vectors: {check_examples() + check_held()} examples, {check_against_numpy() + check_wild()} checks of all values")


if __name__ == "__main__":
    main()
