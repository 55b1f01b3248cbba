// The ranks of one engine: sums of vectors over all ranks, through shared memory.
//
// Knows ranks and floats; must not know models. A rank that dies leaves the others with an error after kPatience, never waiting.
#pragma once

#include <cstddef>
#include <cstdint>

class Team {
 public:
  // All ranks map the same memfd; `floats` is the longest vector that one call exchanges.
  Team(int fd, int rank, int ranks, size_t floats);
  ~Team();
  Team(const Team &) = delete;
  Team &operator=(const Team &) = delete;

  int rank() const { return rank_; }
  int ranks() const { return ranks_; }

  // x becomes the sum over all ranks, added in rank order: the same bits on every rank.
  void all_reduce(float *x, size_t count);

  // The token of the greatest score of all ranks; of equals, the lowest token.
  int32_t all_best(float score, int32_t token);

 private:
  struct Shared;
  float *slot(int rank) const;  // of this turn
  void meet();                  // until all ranks have filled their slots

  int rank_, ranks_;
  size_t floats_, bytes_;
  uint32_t turn_ = 0;
  Shared *shared_;
};
