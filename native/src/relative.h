// Relative position bias of T5 (arXiv 1910.10683) as one float for each head and distance. Knows no attention.
#pragma once
#include <cstdint>
#include <memory>
#include <vector>

#include "kernels.h"
#include "program.h"

namespace inhouse {

// The bias of a table [buckets, heads], spread over distances: [heads][relative_pitch(reach)].
struct Relative {
  int32_t weight;
  int64_t buckets, reach;
  bool both_ways;
  std::unique_ptr<float[]> bias;
};

// The bucket of a key - query distance: exact when near, logarithmic up to `reach`, one bucket beyond.
int64_t relative_bucket(int64_t gap, int64_t buckets, int64_t reach, bool both_ways);

// The table that an attention op with a relative bias names, made when first asked for; ops that share one share it.
const float* relative_bias(const Op& op, const std::vector<Weight>& weights, const Kernels& kernels,
                           std::vector<Relative>* made);

}  // namespace inhouse
