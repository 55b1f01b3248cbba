// The kernel's host build against a copy of one element at a time: random shapes of every path, in batches, with every thread
// order. Every byte outside the copies must stay as it was; every access lies in its buffer. `copy SEEDS`.

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <tuple>
#include <vector>

#define WATCH_THREAD(thread) watch_thread(thread)
#define WATCH_SHARED(at, bytes) watch_shared(at, bytes)
static void watch_thread(unsigned thread);
static void watch_shared(const unsigned char *at, size_t bytes);

#include "../../src/device/kernels/copy.cu"

#define CHECK(condition, ...)                                                                                                      \
    if (!(condition)) {                                                                                                            \
        printf("seed %llu: ", current_seed);                                                                                       \
        printf(__VA_ARGS__);                                                                                                       \
        printf("\n");                                                                                                              \
        exit(1);                                                                                                                   \
    }

static u64 current_seed;
static std::mt19937_64 rng;
static u32 below(u32 n) { return rng() % n; }
static bool one_in(u32 n) { return below(n) == 0; }

// ---- device memory: four buffers at addresses of their own

struct Buffer {
    u64 at;
    std::vector<u8> bytes;
    int writable;
};
static Buffer source{0x100000000, {}, 0}, target{0x900000000, {}, 1}, descs_at{0x10000, {}, 0}, first_at{0x50000000, {}, 0};

extern "C" u8 *rs_at(u64 addr, u32 bytes, int write) {
    for (Buffer *buffer : {&source, &target, &descs_at, &first_at}) {
        if (addr >= buffer->at && addr + bytes <= buffer->at + buffer->bytes.size()) {
            CHECK(write == buffer->writable, "wrong direction at %llx", addr);
            return &buffer->bytes[addr - buffer->at];
        }
    }
    CHECK(false, "%u bytes at %llx are nobody's", bytes, addr);
}

// ---- values, from their types' definitions

enum Float { F32, F16, BF16 };
static int fraction_bits(Float f) { return f == F32 ? 23 : f == F16 ? 10 : 7; }
static int exponent_bits(Float f) { return f == F16 ? 5 : 8; }
static u32 item_of(Float f) { return f == F32 ? 4 : 2; }

static double value_of(Float f, u32 bits) {
    const int fb = fraction_bits(f), eb = exponent_bits(f), bias = (1 << (eb - 1)) - 1;
    const int exponent = bits >> fb & ((1 << eb) - 1), fraction = bits & ((1 << fb) - 1);
    const double sign = bits >> (fb + eb) & 1 ? -1 : 1;
    if (exponent == (1 << eb) - 1) return fraction ? NAN : sign * INFINITY;
    if (exponent == 0) return sign * std::ldexp(fraction, 1 - bias - fb);
    return sign * std::ldexp(fraction + (1 << fb), exponent - bias - fb);
}

// Rounded to a multiple of the step between numbers of its size; nearbyint takes the even one of two as near.
static u32 nearest(Float f, double value) {
    const int fb = fraction_bits(f), eb = exponent_bits(f), bias = (1 << (eb - 1)) - 1;
    const u32 sign = std::signbit(value) ? 1u << (fb + eb) : 0, infinity = ((1u << eb) - 1) << fb;
    value = std::fabs(value);
    if (std::isinf(value)) return sign | infinity;
    const int power = value == 0 ? 1 - bias : std::max(std::ilogb(value), 1 - bias);
    const double steps = std::nearbyint(std::ldexp(value, fb - power));
    const u32 bits = (u32)((power - 1 + bias) << fb) + (u32)steps; // without the leading bit's own place, which adds one exponent
    return sign | (bits < infinity ? bits : infinity);
}

// ---- a copy, told as loops

struct Loop {
    u32 extent, src, dst;
};
struct Case {
    u64 src, dst;
    u32 from_item, to_item;
    bool cast;
    Float from, to;
    int add;
    std::vector<Loop> loops;
};

static void naive(const Case &c, std::vector<u8> &expected) {
    u64 count = 1;
    for (const Loop &loop : c.loops) count *= loop.extent;
    for (u64 n = 0; n < count; n++) {
        u64 rest = n, src = c.src - source.at, dst = c.dst - target.at;
        for (const Loop &loop : c.loops) {
            src += rest % loop.extent * loop.src;
            dst += rest % loop.extent * loop.dst;
            rest /= loop.extent;
        }
        u8 *to = &expected[dst];
        if (!c.cast) {
            memcpy(to, &source.bytes[src], c.to_item);
            continue;
        }
        u32 bits = 0;
        memcpy(&bits, &source.bytes[src], c.from_item);
        double value = value_of(c.from, bits);
        if (c.add) value = (float)(value + c.add);
        if (std::isnan(value)) { // any NaN will do
            u32 got = 0;
            memcpy(&got, &target.bytes[dst], c.to_item);
            CHECK(std::isnan(value_of(c.to, got)), "%x, not a number, became %x", bits, got);
            memcpy(to, &target.bytes[dst], c.to_item);
        } else {
            bits = nearest(c.to, value);
            memcpy(to, &bits, c.to_item);
        }
    }
}

// ---- random cases, and their Descs

static Axis axis(u32 extent, u32 src, u32 dst) {
    u32 shift = 0;
    while ((1ull << shift) < extent) shift++;
    return Axis{extent, (u32)((1ull << (31 + shift)) / extent + 1), shift, src, dst};
}

// Strides of `loops` in a random order, from `step` on, with gaps of multiples of `unit`; loop `inner`, if any, is the fastest.
static u64 stride(std::vector<Loop> &loops, u32 Loop::*side, u32 step, u32 unit, int inner) {
    std::vector<u32> order;
    for (u32 i = 0; i < loops.size(); i++) order.push_back(i);
    std::shuffle(order.begin(), order.end(), rng);
    u64 next = step;
    auto lay = [&](u32 i) {
        loops[i].*side = next;
        next *= loops[i].extent;
        if (one_in(3)) next += (unit == 1 ? 1 : step) * (1 + below(20));
        next = (next + unit - 1) / unit * unit;
    };
    if (inner >= 0) lay(inner);
    else if (one_in(3)) next += step * (1 + below(3));
    for (u32 i : order)
        if ((int)i != inner) lay(i);
    return next;
}

static std::vector<u32> extents(u32 rank, u32 most) {
    std::vector<u32> out;
    for (u32 i = 0; i < rank; i++) {
        u32 n = 1 + below(one_in(2) ? std::min(most, 6u) : std::min(most, 400u));
        out.push_back(n);
        most = std::max(1u, most / n);
    }
    std::shuffle(out.begin(), out.end(), rng);
    return out;
}

static void set_cast(Case &c, Desc &d, u32 from_item, u32 to_item) {
    c.cast = true;
    c.from = from_item == 4 ? F32 : one_in(2) ? F16 : BF16;
    c.to = to_item == 4 ? F32 : one_in(2) ? F16 : BF16;
    c.add = (int)below(3) - 1;
    d.add = c.add ? c.add : -0.0f;
    d.src_f16 = c.from == F16;
    d.dst_f16 = c.to == F16;
}

// Places the case at random in source and target, which grow, at multiples of `src_unit` and `dst_unit`.
static void settle(Case &c, Desc &d, u64 src_span, u64 dst_span, u32 src_unit, u32 dst_unit) {
    const u64 src = (source.bytes.size() + 15) / 16 * 16 + src_unit * below(32);
    const u64 dst = (target.bytes.size() + 15) / 16 * 16 + dst_unit * below(32);
    source.bytes.resize(src + src_span);
    target.bytes.resize(dst + dst_span + below(40));
    d.src = c.src = source.at + src;
    d.dst = c.dst = target.at + dst;
    d.per_chunk = 1 + below(one_in(2) ? d.items : std::min(d.items, 5u));
}

static void make_rows(Case &c, Desc &d) {
    static const u32 paths[] = {COPY_1,  COPY_2,  COPY_4,  COPY_8,  COPY_16, CAST_22, CAST_24, CAST_42, CAST_44,
                                WIDE_22, WIDE_24, WIDE_42, WIDE_44, ODD_22,  ODD_24,  ODD_42,  ODD_44};
    d.path = paths[below(17)];
    const bool odd = d.path >= ODD_22;
    u32 lanes = 1;
    if (d.path >= CAST_22) {
        c.from_item = (d.path - CAST_22) % 4 < 2 ? 2 : 4, c.to_item = d.path % 2 ? 4 : 2;
        lanes = odd || d.path < WIDE_22 ? 1 : 16 / std::max(c.from_item, c.to_item);
        set_cast(c, d, c.from_item, c.to_item);
    } else {
        c.from_item = c.to_item = 1u << d.path;
    }
    for (u32 n : extents(1 + below(6), one_in(20) ? 20000 : 3000)) c.loops.push_back({n, 0, 0});
    const u32 src_unit = c.from_item * lanes, dst_unit = c.to_item * lanes;
    const u64 src_span = stride(c.loops, &Loop::src, src_unit, odd ? 1 : src_unit, -1);
    const u64 dst_span = stride(c.loops, &Loop::dst, dst_unit, odd ? 1 : dst_unit, -1);
    d.items = 1;
    for (const Loop &loop : c.loops) {
        d.axes[d.rank++] = axis(loop.extent, loop.src, loop.dst);
        d.items *= loop.extent;
    }
    if (lanes > 1) c.loops.push_back({lanes, c.from_item, c.to_item});
    settle(c, d, src_span, dst_span, odd ? 1 : src_unit, odd ? 1 : dst_unit);
}

static void make_tiles(Case &c, Desc &d) {
    const bool cast = one_in(3);
    const u32 log = cast ? 1 + below(2) : below(5);
    c.to_item = 1u << log;
    c.from_item = cast ? 2 << below(2) : c.to_item;
    const bool units = !cast && one_in(2), wide = log < 4 && one_in(2);
    d.tiles = 1;
    d.path = units ? (u32)UNITS : cast ? CAST_22 + (c.from_item == 4) * 2 + (c.to_item == 4) : log;
    d.store = log + (wide ? STORE_WIDE : 0);
    if (cast) set_cast(c, d, c.from_item, c.to_item);
    const u32 per_unit = 16 / c.to_item, columns = 128 / c.to_item;
    auto extent = [&](bool whole) {
        u32 n = 1 + below(one_in(2) ? 20 : 300);
        return whole ? (n + per_unit - 1) / per_unit * per_unit : n;
    };
    d.s_extent = extent(units), d.d_extent = extent(wide);
    c.loops = {{d.s_extent, 0, 0}, {d.d_extent, 0, 0}};
    for (u32 n : extents(below(5), std::max(1u, 20000 / (d.s_extent * d.d_extent)))) c.loops.push_back({n, 0, 0});
    const u32 src_unit = units ? 16 : c.from_item, dst_unit = wide ? 16 : c.to_item;
    const u64 src_span = stride(c.loops, &Loop::src, c.from_item, src_unit, units ? 0 : -1);
    const u64 dst_span = stride(c.loops, &Loop::dst, c.to_item, dst_unit, wide ? 1 : -1);
    d.s_src = c.loops[0].src, d.s_dst = c.loops[0].dst, d.d_src = c.loops[1].src, d.d_dst = c.loops[1].dst;
    d.axes[0] = axis((d.s_extent + columns - 1) / columns, d.s_src * columns, d.s_dst * columns);
    d.axes[1] = axis((d.d_extent + 127) / 128, d.d_src * 128, d.d_dst * 128);
    d.items = d.axes[0].extent * d.axes[1].extent;
    d.rank = 2;
    for (u32 i = 2; i < c.loops.size(); i++) {
        d.axes[d.rank++] = axis(c.loops[i].extent, c.loops[i].src, c.loops[i].dst);
        d.items *= c.loops[i].extent;
    }
    settle(c, d, src_span, dst_span, src_unit, dst_unit);
}

// ---- bank conflicts

struct Touch {
    u32 number, thread, at, bytes; // the thread's how manieth access, and its place in the tile
    bool operator<(const Touch &other) const { return std::tie(number, thread) < std::tie(other.number, other.thread); }
};
static std::vector<Touch> touches;
static const u8 *watched_tile; // null: nobody watches
static u32 watched_thread, touch_number;
static u64 served;

static void watch_thread(unsigned thread) {
    watched_thread = thread;
    touch_number = 0;
}

static void watch_shared(const unsigned char *at, size_t bytes) {
    if (watched_tile && at >= watched_tile && at < watched_tile + TILE_ROWS * ROW) {
        touches.push_back({touch_number++, watched_thread, (u32)(at - watched_tile), (u32)bytes});
    }
}

// Lanes that are served at once, which is 128 bytes in all, ask for at most one word of each bank.
static void check_touches() {
    std::sort(touches.begin(), touches.end());
    for (size_t i = 0; i < touches.size(); served++) {
        const Touch begin = touches[i];
        const u32 lanes = std::min(32u, 128 / begin.bytes);
        std::vector<u32> word_of(32, ~0u);
        for (; i < touches.size() && touches[i].number == begin.number && touches[i].thread / lanes == begin.thread / lanes; i++) {
            for (u32 word = touches[i].at / 4; word * 4 < touches[i].at + touches[i].bytes; word++) {
                u32 &had = word_of[word % 32];
                CHECK(had == ~0u || had == word, "words %u and %u are in one bank, by %u bytes", had, word, begin.bytes);
                had = word;
            }
        }
    }
    touches.clear();
}

// Whole tiles of every path in and out.
static void bank_conflicts() {
    for (u32 way = 0; way < 20; way++) {
        const u32 log = way / 4, item = 1u << log;
        const bool units = way & 1, wide = way & 2 && log < 4;
        source.bytes.assign(TILE_ROWS * ROW, 1);
        target.bytes.assign(TILE_ROWS * ROW, 0);
        Shared shared = {};
        Desc &d = shared.desc;
        d.src = source.at, d.dst = target.at, d.items = d.per_chunk = d.tiles = 1, d.rank = 2;
        d.path = units ? (u32)UNITS : log, d.store = log + (wide ? STORE_WIDE : 0);
        d.s_extent = ROW / item, d.d_extent = TILE_ROWS, d.s_src = d.d_dst = item, d.d_src = ROW, d.s_dst = TILE_ROWS * item;
        d.axes[0] = d.axes[1] = axis(1, 0, 0);
        watched_tile = shared.tile;
        PHASE(fill(shared, thread, 0));
        check_touches();
        PHASE(drain(shared, thread, 0));
        check_touches();
        watched_tile = nullptr;
        CHECK(target.bytes == source.bytes, "a whole tile");
    }
    CHECK(served > 1000, "only %llu accesses to shared memory were seen", served);
    printf("%llu accesses to shared memory, each by lanes that are served at once: no bank conflict\n", served);
}

// ---- all of it

static void run_batch(const std::vector<Case> &cases, const std::vector<Desc> &descs) {
    std::vector<u32> first;
    u32 chunks = 0;
    for (const Desc &d : descs) {
        first.push_back(chunks);
        chunks += (d.items + d.per_chunk - 1) / d.per_chunk;
    }
    descs_at.bytes.assign((const u8 *)descs.data(), (const u8 *)(descs.data() + descs.size()));
    first_at.bytes.assign((const u8 *)first.data(), (const u8 *)(first.data() + first.size()));
    for (u8 &byte : target.bytes) byte = rng();
    std::vector<u8> expected = target.bytes;
    reshard_copy_order = below(BLOCK);
    reshard_copy_host(one_in(2) ? chunks : 1 + below(chunks + 3), BLOCK, descs_at.at, first_at.at, descs.size(), chunks);
    for (const Case &c : cases) naive(c, expected);
    for (size_t i = 0; i < expected.size(); i++) {
        CHECK(target.bytes[i] == expected[i], "byte %zu of the target is %x instead of %x", i, target.bytes[i], expected[i]);
    }
}

// Numbers of fp32 near ties of both narrow types, at their limits, subnormal, and anything.
static void fill_source() {
    for (size_t i = 0; i + 4 <= source.bytes.size(); i += 4) {
        static const u32 specials[] = {0,          1,          0x7F800000, 0x7F800001, 0x7FFFFFFF,
                                       0x33000000, 0x33800000, 0x387FC000, 0x477FF000, 0x7F7F8000};
        u32 bits = rng(), kind = below(8), sign = bits & 0x80000000;
        if (kind == 0) bits = sign | (specials[below(10)] + below(3) - 1);
        if (kind == 1) bits = (bits & 0xFFFF0000) + 0x8000 + below(3) - 1;
        if (kind == 2) bits = sign | (((0x33000000 + below(0x15000000)) & 0xFFFFE000) + 0x1000 + below(3) - 1);
        memcpy(&source.bytes[i], &bits, 4);
    }
}

// All values of the narrow types and many of fp32, through every cast.
static void every_value() {
    for (u32 kind = 0; kind < 27; kind++) {
        const Float from = Float(kind % 3), to = Float(kind / 3 % 3);
        const int add = (int)(kind / 9) - 1;
        Case c = {source.at, target.at, item_of(from), item_of(to), true, from, to, add, {{65536, item_of(from), item_of(to)}}};
        Desc d = {};
        d.src = c.src, d.dst = c.dst, d.items = 65536, d.per_chunk = 5000, d.rank = 1;
        d.path = CAST_22 + (from == F32) * 2 + (to == F32);
        d.add = add ? add : -0.0f, d.src_f16 = from == F16, d.dst_f16 = to == F16;
        d.axes[0] = axis(65536, c.from_item, c.to_item);
        source.bytes.assign(65536 * c.from_item, 0);
        target.bytes.assign(65536 * c.to_item, 0);
        fill_source();
        for (u32 i = 0; from != F32 && i < 65536; i++) memcpy(&source.bytes[i * 2], &i, 2);
        run_batch({c}, {d});
    }
}

static void divisions() {
    for (u32 i = 0; i < 500000; i++) {
        const u32 extent = 1 + (below(0x7FFFFFFF) >> below(31)), any = below(0x80000000) >> below(31);
        const u32 number = one_in(2) ? any : any / extent * extent;
        for (u32 n : {number, number ? number - 1 : 0, 0x7FFFFFFFu}) {
            u32 rest;
            const u32 quotient = divide(axis(extent, 0, 0), n, rest);
            CHECK(quotient == n / extent && rest == n % extent, "%u / %u is not %u", n, extent, quotient);
        }
    }
}

int main(int, char **arguments) {
    const u64 seeds = strtoull(arguments[1], nullptr, 10);
    divisions();
    bank_conflicts();
    every_value();
    u64 bytes = 0, number = 0;
    for (current_seed = 1; current_seed <= seeds; current_seed++) {
        rng.seed(current_seed);
        source.bytes.clear();
        target.bytes.clear();
        std::vector<Case> cases(1 + below(one_in(10) ? 30 : 4));
        std::vector<Desc> descs;
        for (Case &c : cases) {
            c = Case();
            Desc d = {};
            if (one_in(2)) make_rows(c, d);
            else make_tiles(c, d);
            descs.push_back(d);
        }
        fill_source();
        run_batch(cases, descs);
        bytes += target.bytes.size();
        number += cases.size();
    }
    printf("%llu copies, targets of %llu bytes: all as one element at a time\n", number, bytes);
}
