#include "relative.h"

#include <algorithm>
#include <cmath>

namespace inhouse {

int64_t relative_bucket(int64_t gap, int64_t buckets, int64_t reach, bool both_ways) {
  int64_t first = 0, distance = std::max<int64_t>(0, -gap);
  if (both_ways) {
    buckets /= 2;
    first = gap > 0 ? buckets : 0;
    distance = std::abs(gap);
  }
  const int64_t exact = buckets / 2;
  if (distance < exact) return first + distance;
  // In float, as checkpoints were trained: the edges of buckets are where rounding puts them.
  const float near = static_cast<float>(exact);
  const float whole = std::log(static_cast<float>(static_cast<double>(reach) / static_cast<double>(exact)));
  const float ratio = std::log(static_cast<float>(distance) / near) / whole;
  const int64_t far = exact + static_cast<int64_t>(ratio * static_cast<float>(buckets - exact));
  return first + std::min(far, buckets - 1);
}

const float* relative_bias(const Op& op, const std::vector<Weight>& weights, const Kernels& kernels,
                           std::vector<Relative>* made) {
  const int64_t buckets = op.integer(12), reach = op.integer(13), heads = op.integer(2);
  const bool both_ways = op.integer(9) != kCausal;
  for (const Relative& r : *made) {
    if (r.weight == op.weights[0] && r.buckets == buckets && r.reach == reach && r.both_ways == both_ways) {
      return r.bias.get();
    }
  }
  std::vector<float> table(static_cast<size_t>(buckets * heads));
  for (int64_t b = 0; b < buckets; ++b) kernels.unpack_row(weights[op.weights[0]], b, table.data() + b * heads);
  const int64_t pitch = relative_pitch(reach);
  std::unique_ptr<float[]> bias = std::make_unique_for_overwrite<float[]>(static_cast<size_t>(heads * pitch));
  for (int64_t i = 0; i < pitch; ++i) {
    const int64_t bucket = relative_bucket(i - reach - 16, buckets, reach, both_ways);
    for (int64_t h = 0; h < heads; ++h) bias[static_cast<size_t>(h * pitch + i)] = table[bucket * heads + h];
  }
  made->push_back({op.weights[0], buckets, reach, both_ways, std::move(bias)});
  return made->back().bias.get();
}

}  // namespace inhouse
