// Low-rank adapters (LoRA, Hu et al. 2021, arXiv 2106.09685): for each slot, pairs of small matrices beside weights.
#pragma once
#include <cstdint>
#include <memory>
#include <vector>

#include "error.h"
#include "inhouse.h"
#include "kernels.h"

namespace inhouse {

constexpr int64_t kAdapterRows = 64;   // rows that are worked on together
constexpr int64_t kAdapterTiles = 16;  // output tiles that are a thread's at a time

// y += b (a x): a [rank, in], b [out, rank], both f32 in tiles; the scale is in b.
struct AdapterPair {
  Weight a = {}, b = {};
};

// The pairs of every slot by weight; slot 0 has none. Not thread-safe: changed between steps only.
class Adapters {
 public:
  // Puts pairs into a slot in place of what was there; none: empties it.
  Status set(int32_t slot, const ih_adapter_pair* pairs, int64_t count, const std::vector<Weight>& weights);
  bool any() const { return !slots_.empty(); }
  // The pair of a weight in a slot, null where there is none.
  const AdapterPair* find(int32_t slot, int32_t weight) const {
    if (slot <= 0 || static_cast<size_t>(slot) > slots_.size() || slots_[slot - 1].empty()) return nullptr;
    const AdapterPair& pair = slots_[slot - 1][weight];
    return pair.a.data == nullptr ? nullptr : &pair;
  }

  // Working memory, made when the first adapter comes.
  std::vector<float> input;    // [kAdapterRows][widest input]
  std::vector<float> middle;   // [pairs of an op][kAdapterRows][largest rank]
  std::vector<float> scratch;  // for each thread [kAdapterRows][kAdapterTiles * kTileRows]
  int64_t largest_rank = 0;

 private:
  std::vector<std::vector<AdapterPair>> slots_;
  int64_t widest_ = 0;
};

}  // namespace inhouse
