#include "races.h"
#include "standin.h"

namespace standin {

void join(Clock &into, const Clock &from) {
    if (into.size() < from.size()) into.resize(from.size(), 0);
    for (size_t slot = 0; slot < from.size(); slot++) into[slot] = std::max(into[slot], from[slot]);
}

std::string Note::text() const {
    return what + " (operation " + std::to_string(number) + " of stream " + std::to_string(stream) + ")";
}

static void check(const Access &earlier, const char *did, const Access &by, const char *does, const Clock &clock, uint64_t low) {
    if (earlier.known_to(clock)) return;
    const char *name = earlier.note->lifetime || by.note->lifetime ? "UNORDERED-USE" : "RACE";
    violation(name, "%s %s memory (from its byte %llu on) that %s %s, with no order between the two", by.note->text().c_str(), does,
              (unsigned long long)low, earlier.note->text().c_str(), did);
}

// Makes `at` the start of a piece, where it lies within one; the first piece at or behind it.
Shadow::Pieces::iterator Shadow::split(uint64_t at) {
    auto next = pieces.lower_bound(at);
    if (next == pieces.begin()) return next;
    auto piece = std::prev(next);
    if (piece->second.end <= at) return next;
    Piece tail = piece->second;
    piece->second.end = at;
    return pieces.emplace_hint(next, at, std::move(tail));
}

void Shadow::read(uint64_t low, uint64_t high, const Access &by, const Clock &clock) {
    auto piece = split(low);
    split(high);
    while (low < high) {
        uint64_t start = piece == pieces.end() ? high : std::min(piece->first, high);
        if (low < start) { // not touched before
            pieces.emplace_hint(piece, low, Piece{start, false, {}, {by}});
            low = start;
            continue;
        }
        Piece &seen = piece->second;
        if (seen.written) check(seen.write, "writes", by, "reads", clock, low);
        // Whoever is ordered after this read is ordered after those that it is ordered after.
        size_t kept = 0;
        for (Access &earlier : seen.reads)
            if (!earlier.known_to(clock)) seen.reads[kept++] = earlier;
        seen.reads.resize(kept);
        seen.reads.push_back(by);
        low = seen.end;
        ++piece;
    }
}

void Shadow::write(uint64_t low, uint64_t high, const Access &by, const Clock &clock) {
    if (low >= high) return;
    auto piece = split(low);
    auto end = split(high);
    // Splitting at `high` may have cut the piece that `piece` points to; it still starts there.
    for (auto each = piece; each != end; ++each) {
        const Piece &seen = each->second;
        if (seen.written) check(seen.write, "writes", by, "writes", clock, each->first);
        for (const Access &earlier : seen.reads) check(earlier, "reads", by, "writes", clock, each->first);
    }
    end = pieces.erase(piece, end);
    pieces.emplace_hint(end, low, Piece{high, true, by, {}});
}

const Access *Shadow::unknown_to(const Clock &clock) const {
    for (const auto &[start, piece] : pieces) {
        if (piece.written && !piece.write.known_to(clock)) return &piece.write;
        for (const Access &read : piece.reads)
            if (!read.known_to(clock)) return &read;
    }
    return nullptr;
}

bool Footprint::add(uint64_t low, uint64_t high) {
    bool before = false;
    while (low < high) {
        size_t chunk = low / CHUNK;
        if (chunk >= chunks.size()) chunks.resize(chunk + 1);
        if (!chunks[chunk]) chunks[chunk] = std::make_unique<Bits>();
        uint64_t within = low % 64, length = std::min<uint64_t>(64 - within, high - low);
        uint64_t bits = length == 64 ? ~0ull : ((1ull << length) - 1) << within;
        uint64_t &word = (*chunks[chunk])[low % CHUNK / 64];
        before |= (word & bits) != 0;
        word |= bits;
        low += length;
    }
    return before;
}

bool Footprint::meets(const Footprint &other) const {
    for (size_t chunk = 0; chunk < std::min(chunks.size(), other.chunks.size()); chunk++) {
        if (!chunks[chunk] || !other.chunks[chunk]) continue;
        for (size_t word = 0; word < CHUNK / 64; word++)
            if ((*chunks[chunk])[word] & (*other.chunks[chunk])[word]) return true;
    }
    return false;
}

} // namespace standin
