"""What elements are worth, in every element type, and how a value of one type is written in another: a part of the oracle (oracle.py).

Integers and numpy's floats alone. bfloat16, which numpy lacks, is the upper half of a float32.
"""

import zlib

import numpy as np

BF16, FP16, FP32 = (4, 16, 1), (2, 16, 1), (2, 32, 1)
DTYPES = {"bfloat16": BF16, "float16": FP16, "float32": FP32}
EXPONENTS = {BF16: 0x7F80, FP16: 0x7C00, FP32: 0x7F800000}  # their bits in a number of the type


def noise(name, count):
    """64 bits for every element of a tensor, by the formula of goldens/README.md."""
    with np.errstate(over="ignore"):
        seed = (zlib.crc32(name.encode()) << 32) + 0x9E3779B97F4A7C15
        z = np.uint64(seed & 0xFFFFFFFFFFFFFFFF) + np.arange(count, dtype=np.uint64)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def values(name, count):
    """The 16 bits of a tensor's elements."""
    return (np.uint64(0x3800) | (noise(name, count) & np.uint64(0x07FF))).astype(np.uint16)


def plain(name, count, dtype):
    """The bits of a tensor's elements where all sides hold the same ones: float32 has the 16 bits as its upper half."""
    bits = values(name, count).astype(np.uint32)
    return bits << np.uint32(16) if dtype == FP32 else bits


def wild(name, count, dtype):
    """The same with signs, and bits that narrower types lack; now and then half-way between two of their numbers, infinite, or any bits."""
    z = noise(name, count)
    low, sign, kind = (((z >> np.uint64(at)) & np.uint64(mask)).astype(np.uint32) for at, mask in ((16, 0xFFFF), (60, 1), (48, 63)))
    bits = plain(name, count, dtype)
    if dtype == FP32:
        low = np.where(kind == 1, 0x8000, low)  # half-way for bfloat16
        low = np.where(kind == 2, low & 0xE000 | 0x1000, low)  # for float16
        bits |= low.astype(np.uint32)
    bits = np.where(kind == 3, EXPONENTS[dtype], bits).astype(np.uint32) | sign << np.uint32(dtype[1] - 1)
    anything = (z >> np.uint64(8)).astype(np.uint32) & np.uint32((1 << dtype[1]) - 1)
    return np.where(kind == 0, anything, bits).astype(np.uint32)


def is_nan(bits, dtype):
    magnitude = bits & np.uint32((1 << (dtype[1] - 1)) - 1)
    return magnitude > EXPONENTS[dtype]


def to_float32(bits, dtype):
    """The bits, of any type, as those of a float32 of the same value."""
    bits = bits.astype(np.uint32)
    if dtype == BF16:
        bits = bits << np.uint32(16)
    if dtype == FP16:
        sign, exponent, fraction = (bits & 0x8000) << np.uint32(16), bits >> np.uint32(10) & 0x1F, bits & 0x3FF
        normal = (exponent + np.uint32(112)) << np.uint32(23) | fraction << np.uint32(13)
        small = (fraction.astype(np.float32) * np.float32(2.0**-24)).view(np.uint32)
        endless = np.uint32(0x7F800000) | fraction << np.uint32(13)
        bits = sign | np.where(exponent == 0, small, np.where(exponent == 0x1F, endless, normal))
    return np.where(is_nan(bits, FP32), bits | 0x00400000, bits).astype(np.uint32)


def from_float32(bits, dtype):
    """The nearest number of a type to a float32's, of two the even one; what is too large is infinite, and no number stays none."""
    if dtype == FP32:
        return bits
    nan = is_nan(bits, FP32)
    if dtype == BF16:
        near = (bits + np.uint32(0x7FFF) + (bits >> np.uint32(16) & 1)) >> np.uint32(16)
        return np.where(nan, bits >> np.uint32(16) | 0x40, near & 0xFFFF).astype(np.uint32)
    sign, magnitude = bits >> np.uint32(16) & 0x8000, bits & 0x7FFFFFFF
    small = magnitude < 0x38800000  # below 2^-14 float16 counts in steps of 2^-24
    finite = np.where(magnitude < 0x47800000, magnitude, 0).astype(np.uint32)
    steps = np.rint(np.where(small, finite, 0).astype(np.uint32).view(np.float32).astype(np.float64) * 2.0**24).astype(np.uint32)
    scaled = np.where(small, 0x38800000, magnitude).astype(np.uint32) - np.uint32(112 << 23)
    near = np.minimum((scaled + np.uint32(0xFFF) + (scaled >> np.uint32(13) & 1)) >> np.uint32(13), 0x7C00)
    quiet = 0x7E00 | magnitude >> np.uint32(13) & 0x3FF
    return (sign | np.where(nan, quiet, np.where(small, steps, near))).astype(np.uint32)


def converted(bits, held, wanted, added=0):
    """Bits of the type `held` as the type `wanted`, with so much added in float32."""
    if held == wanted and not added:
        return bits
    wide = to_float32(bits, held)
    if added:
        with np.errstate(over="ignore", invalid="ignore"):
            wide = (wide.view(np.float32) + np.float32(added)).view(np.uint32)
    return from_float32(wide, wanted)
