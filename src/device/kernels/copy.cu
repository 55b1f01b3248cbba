// The batched strided copy: one launch does all moves of a round.
//
//   reshard_copy(descs, first, count, chunks)     blocks of 256 threads, no dynamic shared memory, any grid of one dimension
//
//     descs    address of `count` Desc in device memory, aligned to 8 bytes
//     first    address of `count` u32 in device memory: number of the first chunk of each Desc, rising, first[0] = 0
//     count    Descs, at least 1
//     chunks   chunks in all, at least 1, below 2^31
//
// Work is split by bytes, not by Desc: each is cut into chunks of about equal cost, and a block takes the chunks blockIdx.x,
// + gridDim.x, ...: one embedding and ten thousand norms keep all multiprocessors busy. src/device/cuda/batch.rs writes the Descs;
// what it promises about them stands at `Desc`.
//
// The program of a block is a sequence of phases with a barrier after each. A phase is a function of (block, thread, shared
// memory). No phase reads shared memory that another thread writes in the same phase, nothing but shared memory lives longer than a
// phase, and what decides which phase is next is the same for all threads. So the same source is also host C++ (C++17, no headers):
// there each phase runs for all threads before the next begins.
//
//   void reshard_copy_host(uint32_t grid, uint32_t block, uint64_t descs, uint64_t first, uint32_t count, uint32_t chunks)
//   unsigned char *rs_at(uint64_t addr, uint32_t bytes, int write)     to be supplied: where device memory lies, or no return
//   uint32_t reshard_copy_order     0; another number below 256: the threads of a phase run in another order
//
// All three are extern "C".

#include "elements.h"

#define BLOCK 256u // threads of a block

// ---------------------------------------------------------------------------------------------------------------------------------
// What a Desc holds. The Rust side is src/device/cuda/batch/desc.rs; a test compares the two.

// `extent` steps of `src` and `dst` bytes. A number below 2^31 is divided by `extent` with one multiplication, by `magic` and
// `shift`.
struct Axis {
    u32 extent, magic, shift, src, dst;
};

// `items` vectors (rows) or tiles (transposes) over `axes`, the fastest first. Promised: items below 2^31, at least 1, the product
// of the extents; all bytes within 2^31 of `src` and `dst`; rank 1 to 6; every access aligned to its size.
struct Desc {
    u64 src, dst;       // first element
    u32 items;          // vectors, or tiles
    u32 per_chunk;      // of these
    u32 path;           // Path; for tiles, how elements come into the tile
    u32 rank;           // axes in use
    float add;          // 1, -1, or -0: adding that changes nothing, not even the sign of a zero
    u32 src_f16;        // what elements of 2 bytes are if they are cast: fp16, else bf16
    u32 dst_f16;        // likewise at the target
    u32 store;          // tiles only: log2 of the target's element, plus STORE_WIDE where 16 bytes of it are stored at once
    u32 tiles;          // 1: tiles. axes[0] steps from tile to tile along `s`, axes[1] along `d`
    u32 s_extent;       // elements along `s`, the source's densest axis; whole units of 16 bytes where `path` is UNITS
    u32 d_extent;       // elements along `d`, the target's; whole units of 16 bytes where `store` is wide
    u32 s_src, s_dst;   // bytes from element to element along `s`
    u32 d_src, d_dst;   // and along `d`
    u32 zero;
    Axis axes[6];
};

static_assert(sizeof(Axis) == 20 && sizeof(Desc) == 200, "as in desc.rs");

// How an item is moved.
enum Path : u32 {
    COPY_1, COPY_2, COPY_4, COPY_8, COPY_16, // so many bytes
    UNITS,                                   // tiles only: 16 bytes at once, several elements along `s`
    CAST_22 = 8, CAST_24, CAST_42, CAST_44,  // one element, of so many bytes at the source and at the target
    WIDE_22, WIDE_24, WIDE_42, WIDE_44,      // rows only: as many elements as make 16 bytes on the larger side
    ODD_22, ODD_24, ODD_42, ODD_44,          // rows only: one element, byte by byte, at any address
};
#define STORE_WIDE 8u

// A tile is 128 rows, one for each step along `d`, of 128 bytes along `s`.
#define TILE_ROWS 128u
#define ROW 128u

struct Shared {
    alignas(16) u8 tile[TILE_ROWS * ROW];
    Desc desc;
    u32 first;
};

// ---------------------------------------------------------------------------------------------------------------------------------
// Phase `find`: the chunk's Desc, the last whose first chunk is not after it, into shared memory.

FN u32 word_at(u64 at) {
    Vec<4> v;
    load(at, v);
    return v.word[0];
}

FN void find(Shared &shared, u32 thread, u64 descs, u64 first, u32 count, u32 chunk) {
    u32 low = 0, high = count;
    while (high - low > 1) {
        u32 middle = low + (high - low) / 2;
        if (word_at(first + u64(middle) * 4) <= chunk) {
            low = middle;
        } else {
            high = middle;
        }
    }
    if (thread < sizeof(Desc) / 4) {
        poke((u8 *)&shared.desc + thread * 4, word_at(descs + u64(low) * sizeof(Desc) + thread * 4));
    } else if (thread == sizeof(Desc) / 4) {
        shared.first = word_at(first + u64(low) * 4);
    }
}

// Quotient and remainder; why this is right stands where `magic` is made.
FN u32 divide(const Axis &axis, u32 number, u32 &rest) {
    u32 quotient = high_product(number * 2, axis.magic) >> axis.shift;
    rest = number - quotient * axis.extent;
    return quotient;
}

// Bytes from the first element to items, several at once since each is a chain of divisions.
template <u32 N> FN void locate(const Desc &desc, u32 (&item)[N], u32 (&src)[N], u32 (&dst)[N]) {
    UNROLLED for (u32 k = 0; k < N; k++) {
        src[k] = dst[k] = 0;
    }
    for (u32 a = 0; a + 1 < desc.rank; a++) {
        const Axis axis = desc.axes[a];
        UNROLLED for (u32 k = 0; k < N; k++) {
            u32 index;
            item[k] = divide(axis, item[k], index);
            src[k] += index * axis.src;
            dst[k] += index * axis.dst;
        }
    }
    const Axis &last = desc.axes[desc.rank - 1];
    UNROLLED for (u32 k = 0; k < N; k++) {
        src[k] += item[k] * last.src;
        dst[k] += item[k] * last.dst;
    }
}

// ---------------------------------------------------------------------------------------------------------------------------------
// Phase `rows`: the vectors of a chunk. Neighbouring threads take neighbouring vectors.

// What happens to a vector on its way: nothing,
template <u32 N> struct Same {
    enum : u32 { FROM = N, TO = N, AT_ONCE = 4, ODD = 0 };
    FN Vec<N> change(const Desc &, const Vec<N> &v) { return v; }
};
// or a cast of L elements of S bytes to D bytes.
template <u32 S, u32 D, u32 L, bool LOOSE = false> struct Cast {
    enum : u32 { FROM = S * L, TO = D * L, AT_ONCE = L == 1 && !LOOSE ? 4 : 2, ODD = LOOSE };
    FN Vec<TO> change(const Desc &desc, const Vec<FROM> &v) {
        Vec<TO> out = {};
        UNROLLED for (u32 i = 0; i < L; i++) {
            put<D>(out, i, narrow<D>(widen<S>(get<S>(v, i), desc.src_f16) + desc.add, desc.dst_f16));
        }
        return out;
    }
};

template <bool ODD, u32 N> FN void load_from(u64 at, Vec<N> &v) {
    if constexpr (ODD) {
        UNROLLED for (u32 i = 0; i < N; i++) {
            Vec<1> byte;
            load(at + i, byte);
            put<1>(v, i, byte.word[0]);
        }
    } else {
        load(at, v);
    }
}

template <bool ODD, u32 N> FN void store_to(u64 at, const Vec<N> &v) {
    if constexpr (ODD) {
        UNROLLED for (u32 i = 0; i < N; i++) {
            store(at + i, Vec<1>{{get<1>(v, i)}});
        }
    } else {
        store(at, v);
    }
}

template <class Way> FN void rows_by(const Desc &desc, u32 thread, u32 begin, u32 end) {
    constexpr u32 UNROLL = Way::AT_ONCE;
    for (u32 at = begin + thread; at < end; at += BLOCK * UNROLL) {
        u32 item[UNROLL], src[UNROLL], dst[UNROLL];
        Vec<Way::FROM> v[UNROLL] = {}; // or they would be kept from turn to turn
        UNROLLED for (u32 k = 0; k < UNROLL; k++) {
            item[k] = at + k * BLOCK;
        }
        locate(desc, item, src, dst);
        UNROLLED for (u32 k = 0; k < UNROLL; k++) {
            if (at + k * BLOCK < end) {
                load_from<Way::ODD>(desc.src + src[k], v[k]);
            }
        }
        UNROLLED for (u32 k = 0; k < UNROLL; k++) {
            if (at + k * BLOCK < end) {
                store_to<Way::ODD>(desc.dst + dst[k], Way::change(desc, v[k]));
            }
        }
    }
}

FN void rows(const Desc &desc, u32 thread, u32 begin, u32 end) {
    switch (desc.path) {
        case COPY_1: return rows_by<Same<1>>(desc, thread, begin, end);
        case COPY_2: return rows_by<Same<2>>(desc, thread, begin, end);
        case COPY_4: return rows_by<Same<4>>(desc, thread, begin, end);
        case COPY_8: return rows_by<Same<8>>(desc, thread, begin, end);
        case COPY_16: return rows_by<Same<16>>(desc, thread, begin, end);
        case CAST_22: return rows_by<Cast<2, 2, 1>>(desc, thread, begin, end);
        case CAST_24: return rows_by<Cast<2, 4, 1>>(desc, thread, begin, end);
        case CAST_42: return rows_by<Cast<4, 2, 1>>(desc, thread, begin, end);
        case CAST_44: return rows_by<Cast<4, 4, 1>>(desc, thread, begin, end);
        case WIDE_22: return rows_by<Cast<2, 2, 8>>(desc, thread, begin, end);
        case WIDE_24: return rows_by<Cast<2, 4, 4>>(desc, thread, begin, end);
        case WIDE_42: return rows_by<Cast<4, 2, 4>>(desc, thread, begin, end);
        case WIDE_44: return rows_by<Cast<4, 4, 4>>(desc, thread, begin, end);
        case ODD_22: return rows_by<Cast<2, 2, 1, true>>(desc, thread, begin, end);
        case ODD_24: return rows_by<Cast<2, 4, 1, true>>(desc, thread, begin, end);
        case ODD_42: return rows_by<Cast<4, 2, 1, true>>(desc, thread, begin, end);
        case ODD_44: return rows_by<Cast<4, 4, 1, true>>(desc, thread, begin, end);
    }
}

// ---------------------------------------------------------------------------------------------------------------------------------
// Phases `fill` and `drain`: a tile from the source, and to the target.
//
// The tile holds the target's elements: a row of 128 bytes along `s` for each step along `d`. It is read in units of 16 bytes or
// element by element along `s`, as the source lies; written in vectors of W elements along `d`, as the target lies.
//
// No two lanes that are served together want different words of a bank, of which a row has each once:
// - Row r holds its unit u at u ^ (r / W % 8).
// - fill: eight lanes write the eight units of a row, in whatever order; or a warp writes neighbouring elements, all of one row or,
//   where elements are larger than 4 bytes, of rows that are served one after another.
// - drain: a warp gathers eight neighbouring vectors in each of four neighbouring columns. At each step eight lanes read the same
//   column in rows W apart, so at eight different places of units, and the four columns lie beside each other in one unit, or for
//   elements of 8 and 16 bytes, whose lanes are served in halves and quarters of a warp, in as many as one is served at once.

// Part of the plane that a tile covers.
struct Tile {
    u64 src, dst;   // its first element
    u32 wide, tall; // elements along `s` and `d`
};

FN Tile tile_of(const Desc &desc, u32 number) {
    u32 item[1] = {number}, src[1], dst[1], s, d;
    divide(desc.axes[1], divide(desc.axes[0], number, s), d);
    locate(desc, item, src, dst);
    const u32 columns = ROW >> (desc.store & 7);
    const u32 wide = desc.s_extent - s * columns, tall = desc.d_extent - d * TILE_ROWS;
    return Tile{desc.src + src[0], desc.dst + dst[0], wide < columns ? wide : columns, tall < TILE_ROWS ? tall : TILE_ROWS};
}

// Where byte `byte` of a row lies, with vectors of 1 << log_w elements.
FN u32 place(u32 row, u32 byte, u32 log_w) { return row * ROW + (byte ^ (row >> log_w & 7) << 4); }

template <class Way> FN void fill_by(Shared &shared, u32 thread, const Tile &tile, u32 log_w, u32 wide, u32 step) {
    constexpr u32 UNROLL = Way::AT_ONCE, per_row = ROW / Way::TO, rows = BLOCK / per_row;
    const u32 s = thread % per_row;
    for (u32 row = thread / per_row; s < wide && row < tile.tall; row += rows * UNROLL) {
        Vec<Way::FROM> v[UNROLL] = {}; // or they would be kept from turn to turn
        UNROLLED for (u32 k = 0; k < UNROLL; k++) {
            if (row + k * rows < tile.tall) {
                load(tile.src + ((row + k * rows) * shared.desc.d_src + s * step), v[k]);
            }
        }
        UNROLLED for (u32 k = 0; k < UNROLL; k++) {
            if (row + k * rows < tile.tall) {
                poke(shared.tile + place(row + k * rows, s * Way::TO, log_w), Way::change(shared.desc, v[k]));
            }
        }
    }
}

FN void fill(Shared &shared, u32 thread, u32 number) {
    const Desc &desc = shared.desc;
    const Tile tile = tile_of(desc, number);
    const u32 item = desc.store & 7, log_w = desc.store & STORE_WIDE ? 4 - item : 0;
    switch (desc.path) {
        case COPY_1: return fill_by<Same<1>>(shared, thread, tile, log_w, tile.wide, desc.s_src);
        case COPY_2: return fill_by<Same<2>>(shared, thread, tile, log_w, tile.wide, desc.s_src);
        case COPY_4: return fill_by<Same<4>>(shared, thread, tile, log_w, tile.wide, desc.s_src);
        case COPY_8: return fill_by<Same<8>>(shared, thread, tile, log_w, tile.wide, desc.s_src);
        case COPY_16: return fill_by<Same<16>>(shared, thread, tile, log_w, tile.wide, desc.s_src);
        case UNITS: return fill_by<Same<16>>(shared, thread, tile, log_w, tile.wide << item >> 4, 16);
        case CAST_22: return fill_by<Cast<2, 2, 1>>(shared, thread, tile, log_w, tile.wide, desc.s_src);
        case CAST_24: return fill_by<Cast<2, 4, 1>>(shared, thread, tile, log_w, tile.wide, desc.s_src);
        case CAST_42: return fill_by<Cast<4, 2, 1>>(shared, thread, tile, log_w, tile.wide, desc.s_src);
        case CAST_44: return fill_by<Cast<4, 4, 1>>(shared, thread, tile, log_w, tile.wide, desc.s_src);
    }
}

template <u32 E, u32 W> FN void drain_by(const Shared &shared, u32 thread, const Tile &tile) {
    const u32 eights = TILE_ROWS / W / 8; // of vectors in a column
    UNROLLED_BY(1) for (u32 at = thread; at < TILE_ROWS / W * (ROW / E); at += BLOCK) {
        const u32 vector = at % 8 + at / 32 % eights * 8, s = at / 8 % 4 + at / 32 / eights * 4;
        if (s < tile.wide && vector * W < tile.tall) {
            // As `place` says; the rows of a vector are alike.
            const u8 *from = shared.tile + vector * W * ROW + (s * E ^ (vector & 7) << 4);
            Vec<E * W> out = {};
            UNROLLED for (u32 k = 0; k < W; k++) {
                gather<E>(out, k, from + k * ROW);
            }
            store(tile.dst + (vector * W * shared.desc.d_dst + s * shared.desc.s_dst), out);
        }
    }
}

FN void drain(const Shared &shared, u32 thread, u32 number) {
    const Tile tile = tile_of(shared.desc, number);
    switch (shared.desc.store) {
        case 0: return drain_by<1, 1>(shared, thread, tile);
        case 1: return drain_by<2, 1>(shared, thread, tile);
        case 2: return drain_by<4, 1>(shared, thread, tile);
        case 3: return drain_by<8, 1>(shared, thread, tile);
        case 4: return drain_by<16, 1>(shared, thread, tile);
        case STORE_WIDE + 0: return drain_by<1, 16>(shared, thread, tile);
        case STORE_WIDE + 1: return drain_by<2, 8>(shared, thread, tile);
        case STORE_WIDE + 2: return drain_by<4, 4>(shared, thread, tile);
        case STORE_WIDE + 3: return drain_by<8, 2>(shared, thread, tile);
    }
}

// ---------------------------------------------------------------------------------------------------------------------------------
// A block.

FN void block(Shared &shared, u32 thread, u32 own, u32 grid, u64 descs, u64 first, u32 count, u32 chunks) {
    (void)thread;
    for (u32 chunk = own; chunk < chunks; chunk += grid) {
        PHASE(find(shared, thread, descs, first, count, chunk));
        const u32 begin = (chunk - shared.first) * shared.desc.per_chunk, left = shared.desc.items - begin;
        const u32 end = begin + (left < shared.desc.per_chunk ? left : shared.desc.per_chunk);
        if (!shared.desc.tiles) {
            PHASE(rows(shared.desc, thread, begin, end));
        } else {
            for (u32 tile = begin; tile < end; tile++) {
                PHASE(fill(shared, thread, tile));
                PHASE(drain(shared, thread, tile));
            }
        }
    }
}

#ifdef __CUDA_ARCH__
extern "C" __global__ void __launch_bounds__(BLOCK, 5) reshard_copy(u64 descs, u64 first, u32 count, u32 chunks) {
    static __shared__ Shared shared;
    block(shared, threadIdx.x, blockIdx.x, gridDim.x, descs, first, count, chunks);
}
#else
extern "C" void reshard_copy_host(u32 grid, u32 threads, u64 descs, u64 first, u32 count, u32 chunks) {
    if (threads != BLOCK) {
        __builtin_trap();
    }
    for (u32 b = 0; b < grid; b++) {
        Shared shared;
        block(shared, 0, b, grid, descs, first, count, chunks);
    }
}
#endif
