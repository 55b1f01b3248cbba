#include "team.hpp"

#include <linux/futex.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include <atomic>
#include <chrono>
#include <cstring>
#include <limits>
#include <stdexcept>
#include <string>

namespace {
constexpr auto kPatience = std::chrono::seconds(60);

// Only futex words that lie in memory shared by processes: no FUTEX_PRIVATE_FLAG.
void futex(std::atomic<uint32_t> &word, int operation, uint32_t value, const timespec *timeout) {
  syscall(SYS_futex, reinterpret_cast<uint32_t *>(&word), operation, value, timeout, nullptr, 0);
}
}  // namespace

struct alignas(64) Team::Shared {
  std::atomic<uint32_t> arrived, turn;  // a new memfd is zero
};
static_assert(std::atomic<uint32_t>::is_always_lock_free, "words of shared memory must be lock-free");

Team::Team(int fd, int rank, int ranks, size_t floats) : rank_(rank), ranks_(ranks), floats_(floats) {
  bytes_ = sizeof(Shared) + 2 * static_cast<size_t>(ranks) * floats * sizeof(float);
  if (ftruncate(fd, static_cast<off_t>(bytes_)) != 0)  // to the same length by every rank
    throw std::runtime_error(std::string("team: ftruncate: ") + std::strerror(errno));
  void *memory = mmap(nullptr, bytes_, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
  if (memory == MAP_FAILED) throw std::runtime_error(std::string("team: mmap: ") + std::strerror(errno));
  shared_ = static_cast<Shared *>(memory);
}

Team::~Team() { munmap(shared_, bytes_); }

// Two sets of slots in turn: a rank that is ahead writes the other set, and can be one turn ahead at most.
float *Team::slot(int rank) const {
  float *slots = reinterpret_cast<float *>(shared_ + 1);
  return slots + (static_cast<size_t>(turn_ % 2) * ranks_ + rank) * floats_;
}

void Team::meet() {
  if (shared_->arrived.fetch_add(1, std::memory_order_acq_rel) + 1 == static_cast<uint32_t>(ranks_)) {
    shared_->arrived.store(0, std::memory_order_relaxed);
    shared_->turn.fetch_add(1, std::memory_order_release);
    futex(shared_->turn, FUTEX_WAKE, std::numeric_limits<int32_t>::max(), nullptr);
    return;
  }
  const auto end = std::chrono::steady_clock::now() + kPatience;
  const timespec second = {1, 0};
  while (shared_->turn.load(std::memory_order_acquire) == turn_) {
    if (std::chrono::steady_clock::now() > end)
      throw std::runtime_error("engine rank " + std::to_string(rank_) + " waited 60 s for the engine's other ranks");
    futex(shared_->turn, FUTEX_WAIT, turn_, &second);
  }
}

void Team::all_reduce(float *x, size_t count) {
  if (ranks_ == 1) return;
  std::memcpy(slot(rank_), x, count * sizeof(float));
  meet();
  std::memcpy(x, slot(0), count * sizeof(float));
  for (int rank = 1; rank < ranks_; rank++) {
    const float *other = slot(rank);
    for (size_t i = 0; i < count; i++) x[i] += other[i];
  }
  turn_++;
}

int32_t Team::all_best(float score, int32_t token) {
  struct Entry {
    float score;
    int32_t token;
  } best = {score, token};
  static_assert(sizeof(Entry) == 2 * sizeof(float), "an entry takes two floats of a slot");
  std::memcpy(slot(rank_), &best, sizeof best);
  meet();
  for (int rank = 0; rank < ranks_; rank++) {
    Entry entry;
    std::memcpy(&entry, slot(rank), sizeof entry);
    if (entry.score > best.score || (entry.score == best.score && entry.token < best.token)) best = entry;
  }
  turn_++;
  return best.token;
}
