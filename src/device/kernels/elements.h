// Elements of vectors: their bits, and what casts make of them.

#include "machine.h"

// Element `i` of a vector of elements of E bytes, at most 4.
template <u32 E, u32 N> FN u32 get(const Vec<N> &v, u32 i) {
    u32 word = v.word[i * E / 4];
    return E == 4 ? word : word >> i * E % 4 * 8 & ((1u << E % 4 * 8) - 1);
}
// Adds one to a vector of zeros.
template <u32 E, u32 N> FN void put(Vec<N> &v, u32 i, u32 element) { v.word[i * E / 4] |= element << i * E % 4 * 8; }

template <u32 E> FN float widen(u32 bits, u32 f16) {
    if (E == 4) {
        return float_of(bits);
    }
    return f16 ? widen_f16(bits) : float_of(bits << 16);
}

// To nearest, ties to even; a NaN stays one.
template <u32 E> FN u32 narrow(float value, u32 f16) {
    u32 bits = bits_of(value);
    if (E == 4) {
        return bits;
    }
    if (f16) {
        return narrow_f16(value);
    }
    return value != value ? 0x7FFF : (bits + 0x7FFF + (bits >> 16 & 1)) >> 16;
}

// A vector into shared memory.
template <u32 N> FN void poke(u8 *at, const Vec<N> &v) {
    if constexpr (N == 1) {
        poke(at, (u8)v.word[0]);
    } else if constexpr (N == 2) {
        poke(at, (u16)v.word[0]);
    } else {
        poke<Vec<N>>(at, v);
    }
}

// An element out of shared memory to place `i` of a vector of zeros.
template <u32 E, u32 N> FN void gather(Vec<N> &v, u32 i, const u8 *at) {
    if constexpr (E == N) {
        v = peek<Vec<N>>(at);
    } else if constexpr (E == 8) {
        const Vec<8> pair = peek<Vec<8>>(at);
        v.word[i * 2] = pair.word[0];
        v.word[i * 2 + 1] = pair.word[1];
    } else {
        put<E>(v, i, E == 4 ? peek<u32>(at) : E == 2 ? peek<u16>(at) : peek<u8>(at));
    }
}
