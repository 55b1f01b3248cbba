// Who has seen what: vector clocks over the streams, and for every byte the last operation that wrote it and those that read it
// since.
//
// Two operations on one byte, one of them writing, without an order between them (streams, events, words, synchronisation) are a
// race, whatever order the schedule happened to run them in.
#pragma once
#include <array>
#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <vector>

namespace standin __attribute__((visibility("default"))) {

// How many operations of each stream slot somebody knows to be finished.
using Clock = std::vector<uint32_t>;

void join(Clock &into, const Clock &from);

// An operation as messages name it.
struct Note {
    std::string what;
    uint64_t stream;
    uint64_t number;
    bool lifetime; // the memory's own allocation or release on a stream
    std::string text() const;
};
using NotePtr = std::shared_ptr<const Note>;

// One operation, by its stream's slot and its count there.
struct Access {
    uint32_t slot = 0;
    uint32_t tick = 0;
    NotePtr note;
    bool known_to(const Clock &clock) const { return slot < clock.size() && tick <= clock[slot]; }
};

// The accesses to one piece of memory. Offsets count from its first byte.
class Shadow {
  public:
    void read(uint64_t low, uint64_t high, const Access &by, const Clock &clock);
    void write(uint64_t low, uint64_t high, const Access &by, const Clock &clock);
    // The first access that `clock` does not know.
    const Access *unknown_to(const Clock &clock) const;

  private:
    struct Piece {
        uint64_t end;
        bool written;
        Access write;
        std::vector<Access> reads;
    };
    using Pieces = std::map<uint64_t, Piece>;
    Pieces::iterator split(uint64_t at);
    Pieces pieces;
};

// The bytes of one piece of memory that a kernel touches, one bit each, in chunks that are there once touched.
class Footprint {
  public:
    // Whether one of the bytes was there before.
    bool add(uint64_t low, uint64_t high);
    bool meets(const Footprint &other) const;
    // Calls `seen(low, high)` for every longest run of touched bytes.
    template <typename Seen> void each(Seen seen) const;
    bool empty() const { return chunks.empty(); }

  private:
    static constexpr uint64_t CHUNK = 1 << 16;
    using Bits = std::array<uint64_t, CHUNK / 64>;
    std::vector<std::unique_ptr<Bits>> chunks;
};

template <typename Seen> void Footprint::each(Seen seen) const {
    uint64_t low = 0, high = 0; // the open run
    auto extend = [&](uint64_t from, uint64_t to) {
        if (from != high) {
            if (low < high) seen(low, high);
            low = from;
        }
        high = to;
    };
    for (size_t chunk = 0; chunk < chunks.size(); chunk++) {
        if (!chunks[chunk]) continue;
        for (size_t word = 0; word < CHUNK / 64; word++) {
            uint64_t bits = (*chunks[chunk])[word], start = chunk * CHUNK + word * 64;
            if (bits == ~0ull) {
                extend(start, start + 64);
                continue;
            }
            while (bits) {
                unsigned first = __builtin_ctzll(bits), length = __builtin_ctzll(~(bits >> first));
                extend(start + first, start + first + length);
                bits &= ~(((1ull << length) - 1) << first);
            }
        }
    }
    if (low < high) seen(low, high);
}

} // namespace standin
