"""Worked examples of values: casts, and norms that hold one less than Hugging Face's. Of the oracle alone, in numpy alone."""

import numpy as np
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


def main():
    print(f"value vectors: {check_examples()} examples, {check_against_numpy() + check_wild()} checks of all values")


if __name__ == "__main__":
    main()
