// What the kernel needs of a machine, on a device (NVRTC or clang, no headers) and on a host (C++17, no headers): all that differs
// between the two builds.

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;

// N bytes in registers.
template <u32 N> struct alignas(N < 4 ? 4 : N) Vec {
    u32 word[(N + 3) / 4];
};

#ifdef __CUDA_ARCH__
#define FN static __device__ __forceinline__
#define AS_TEXT(text) #text
#define UNROLLED _Pragma("unroll")
#define UNROLLED_BY(n) _Pragma(AS_TEXT(unroll n))

// A phase of a block's program, and a barrier.
#define PHASE(call)                                                                                                                \
    call;                                                                                                                          \
    __syncthreads()

// In PTX, since of an address out of memory the compiler does not know that it is global, and must not reorder: the loads before
// the stores are what hides their latency.
FN void load(u64 at, Vec<16> &v) {
    u32 *w = v.word;
    asm volatile("ld.global.v4.u32 {%0, %1, %2, %3}, [%4];" : "=r"(w[0]), "=r"(w[1]), "=r"(w[2]), "=r"(w[3]) : "l"(at));
}
FN void load(u64 at, Vec<8> &v) { asm volatile("ld.global.v2.u32 {%0, %1}, [%2];" : "=r"(v.word[0]), "=r"(v.word[1]) : "l"(at)); }
FN void load(u64 at, Vec<4> &v) { asm volatile("ld.global.u32 %0, [%1];" : "=r"(v.word[0]) : "l"(at)); }
FN void load(u64 at, Vec<2> &v) { asm volatile("ld.global.u16 %0, [%1];" : "=r"(v.word[0]) : "l"(at)); }
FN void load(u64 at, Vec<1> &v) { asm volatile("ld.global.u8 %0, [%1];" : "=r"(v.word[0]) : "l"(at)); }
FN void store(u64 at, const Vec<16> &v) {
    const u32 *w = v.word;
    asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(at), "r"(w[0]), "r"(w[1]), "r"(w[2]), "r"(w[3]));
}
FN void store(u64 at, const Vec<8> &v) {
    asm volatile("st.global.v2.u32 [%0], {%1, %2};" ::"l"(at), "r"(v.word[0]), "r"(v.word[1]));
}
FN void store(u64 at, const Vec<4> &v) { asm volatile("st.global.u32 [%0], %1;" ::"l"(at), "r"(v.word[0])); }
FN void store(u64 at, const Vec<2> &v) { asm volatile("st.global.u16 [%0], %1;" ::"l"(at), "r"(v.word[0])); }
FN void store(u64 at, const Vec<1> &v) { asm volatile("st.global.u8 [%0], %1;" ::"l"(at), "r"(v.word[0])); }

// Shared memory.
template <class T> FN T peek(const u8 *at) { return *(const T *)at; }
template <class T> FN void poke(u8 *at, const T &value) { *(T *)at = value; }

FN u32 high_product(u32 a, u32 b) { return __umulhi(a, b); }
FN float float_of(u32 bits) { return __uint_as_float(bits); }
FN u32 bits_of(float value) { return __float_as_uint(value); }
FN float widen_f16(u32 bits) {
    float value;
    asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"((u16)bits));
    return value;
}
FN u32 narrow_f16(float value) {
    u16 bits;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(value));
    return bits;
}
#else
#define FN static inline
#define UNROLLED
#define UNROLLED_BY(n)

extern "C" u8 *rs_at(u64 addr, u32 bytes, int write);

extern "C" {
u32 reshard_copy_order = 0;
}

// For a test that watches how shared memory is used.
#ifndef WATCH_THREAD
#define WATCH_THREAD(thread)
#define WATCH_SHARED(at, bytes)
#endif

// A phase of a block's program, for all threads.
#define PHASE(call)                                                                                                                \
    for (u32 turn = 0; turn < BLOCK; turn++) {                                                                                     \
        const u32 thread = turn ^ reshard_copy_order;                                                                              \
        WATCH_THREAD(thread);                                                                                                      \
        call;                                                                                                                      \
    }

template <u32 N> FN u8 *place_of(u64 at, int write) {
    if (at % N) {
        __builtin_trap(); // as on the device
    }
    return rs_at(at, N, write);
}
template <u32 N> FN void load(u64 at, Vec<N> &v) {
    v = Vec<N>();
    __builtin_memcpy(v.word, place_of<N>(at, 0), N);
}
template <u32 N> FN void store(u64 at, const Vec<N> &v) { __builtin_memcpy(place_of<N>(at, 1), v.word, N); }

template <class T> FN T peek(const u8 *at) {
    T value;
    WATCH_SHARED(at, sizeof value);
    __builtin_memcpy(&value, at, sizeof value);
    return value;
}
template <class T> FN void poke(u8 *at, const T &value) {
    WATCH_SHARED(at, sizeof value);
    __builtin_memcpy(at, &value, sizeof value);
}

FN u32 high_product(u32 a, u32 b) { return (u32)((u64)a * b >> 32); }
FN float float_of(u32 bits) {
    float value;
    __builtin_memcpy(&value, &bits, sizeof value);
    return value;
}
FN u32 bits_of(float value) {
    u32 bits;
    __builtin_memcpy(&bits, &value, sizeof bits);
    return bits;
}

// What the device does in one instruction. 2^112 is the quotient of the two types' scales: the products are exact.
FN float widen_f16(u32 bits) {
    u32 sign = (bits & 0x8000) << 16, rest = (bits & 0x7FFF) << 13;
    if (rest >= 0x7C00u << 13) {
        return float_of(sign | 0x7F800000 | rest);
    }
    return float_of(sign | bits_of(float_of(rest) * 0x1p112f));
}
FN u32 narrow_f16(float value) {
    u32 bits = bits_of(value), sign = bits >> 16 & 0x8000, rest = bits & 0x7FFFFFFF;
    if (rest > 0x7F800000) {
        return 0x7FFF;
    }
    if (rest >= 0x477FF000) { // nearer to 2^16 than to the largest number, or as near
        return sign | 0x7C00;
    }
    if (rest < 0x38800000) { // subnormal: the sum has 0.5 as its leading bit and fp16's smallest step as its last
        return sign | (bits_of(float_of(rest) + 0.5f) - 0x3F000000);
    }
    return sign | (((rest + 0xFFF + (rest >> 13 & 1)) >> 13) - (112 << 10));
}
#endif
