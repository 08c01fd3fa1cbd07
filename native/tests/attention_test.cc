// Attention bodies at every level: against double arithmetic over the cached values; partitions apart and merged are
// the same bits as all at once; a row has the same bits alone and in any task; bf16 has the same bits with and without
// the machine's own dot products.
#include <algorithm>
#include <cstring>
#include <memory>

#include "check.h"
#include "cpu.h"
#include "dispatch.h"
#include "isa/avx512_bf16.h"
#include "kernels.h"
#include "kv_codes.h"

using namespace inhouse;
using test::check;
using test::noise;

namespace {

struct Shape {
  int heads, kv_heads, dim, v_dim, window;
  Mask mask;
  bool slopes, sinks;
  float softcap;
  int prefix = 0, reach = 0;
  bool v_from_k = false;
  int sink = 0, stride = 0, k_bits = 0, v_bits = 0, recent = 0;
};

float rounded_f16(float x) {
  int exponent;
  std::frexp(x, &exponent);
  const double unit = std::ldexp(1.0, std::max(exponent - 11, -24));  // the last place of an f16
  return static_cast<float>(std::nearbyint(x / unit) * unit);
}

double rounded_bf16(double x) {
  int exponent;
  std::frexp(x, &exponent);
  const double unit = std::ldexp(1.0, exponent - 8);
  return std::nearbyint(x / unit) * unit;
}

// How far a weight of bf16 may be off because it lies so near the middle of two that float arithmetic may round it to
// the other one.
double doubt_bf16(double x) {
  int exponent;
  std::frexp(x, &exponent);
  const double unit = std::ldexp(1.0, exponent - 8), at = x / unit;
  return std::fabs(at - std::floor(at) - 0.5) < 256 * 1e-5 ? unit : 0;
}

float coded(float x, float scale, float minimum, float levels) {
  const float inverse = scale > 0 ? 1.0f / scale : 0.0f;
  return std::fma(scale, std::nearbyint(std::clamp((x - minimum) * inverse, 0.0f, levels)), minimum);
}

// What the codes of a block's keys [16][dim] stand for, in the words of kv_codes.h; f16 numbers.
void keys_through_codes(float levels, size_t dim, std::vector<float>& keys) {
  std::vector<float> low(dim, INFINITY), high(dim, -INFINITY), wide(dim);
  for (size_t i = 0; i < 16 * dim; ++i) {
    low[i % dim] = std::min(low[i % dim], keys[i]);
    high[i % dim] = std::max(high[i % dim], keys[i]);
  }
  const float base = *std::min_element(low.begin(), low.end());
  const float step = (*std::max_element(low.begin(), low.end()) - base) / 255.0f;
  for (size_t d = 0; d < dim; ++d) {
    low[d] = base + step * (step > 0 ? std::floor((low[d] - base) / step) : 0.0f);
    wide[d] = (high[d] - low[d]) / levels;
  }
  const float unit = std::max(0.0f, *std::max_element(wide.begin(), wide.end())) / 255.0f;
  for (float& w : wide) w = unit > 0 && w > 0 ? unit * std::min(255.0f, std::ceil(w / unit)) : 0.0f;
  for (size_t i = 0; i < 16 * dim; ++i) keys[i] = coded(keys[i], wide[i % dim], low[i % dim], levels);
}

// The same of values [16][v_dim].
void values_through_codes(float levels, size_t v_dim, std::vector<float>& values) {
  for (size_t begin = 0; begin < values.size(); begin += begin % v_dim + 32 < v_dim ? 32 : v_dim - begin % v_dim) {
    const auto first = values.begin() + static_cast<int64_t>(begin);
    const auto last = first + static_cast<int64_t>(std::min<size_t>(32, v_dim - begin % v_dim));
    const float minimum = *std::min_element(first, last);
    const float scale = rounded_f16((*std::max_element(first, last) - minimum) / levels);
    for (auto at = first; at < last; ++at) *at = coded(*at, scale, minimum, levels);
  }
}

// One sequence of `length` positions in blocks that lie in no order, each block as large as it must be and no larger.
class Sequence {
 public:
  Sequence(const Kernels& k, const Shape& s, KvType type, int length)
      : k_(k),
        length_(length),
        q_(noise(1, static_cast<size_t>(length * s.heads * s.dim))),
        keys_(noise(2, static_cast<size_t>(length * s.kv_heads * s.dim))),
        values_(noise(3, static_cast<size_t>(length * s.kv_heads * s.v_dim))),
        slopes_(noise(4, static_cast<size_t>(s.heads), 0.05f)),
        sinks_(noise(5, static_cast<size_t>(s.heads))),
        relative_(noise(6, static_cast<size_t>(s.heads * relative_pitch(s.reach)))),
        prefix_(s.prefix) {
    shape_.heads = s.heads;
    shape_.kv_heads = s.kv_heads;
    shape_.head_dim = s.dim;
    shape_.v_dim = s.v_dim;
    shape_.window = s.window;
    shape_.mask = s.mask;
    shape_.v_from_k = s.v_from_k;
    shape_.kv_type = type;
    shape_.scale = 0.3f;
    shape_.softcap = s.softcap;
    shape_.reach = s.reach;
    if (s.slopes) shape_.slopes = slopes_.data();
    if (s.sinks) shape_.sinks = sinks_.data();
    if (s.reach > 0) shape_.relative = relative_.data();
    shape_.head_bytes = kv_head_bytes(type, s.dim, s.v_from_k ? 0 : s.v_dim);
    shape_.sink = s.sink;
    shape_.stride = s.stride;
    shape_.k_bits = s.k_bits;
    shape_.v_bits = s.v_bits;
    shape_.recent = s.recent;
    if (s.k_bits > 0) shape_.far_bytes = KvCodes{s.k_bits, s.v_bits, s.dim, s.v_dim}.bytes();
    level_far_distances();
    const int blocks = (length + kCacheBlock - 1) / kCacheBlock;
    for (int b = 0; b < blocks; ++b) table_.push_back((b * 7 + 3) % blocks);
    if (blocks % 7 == 0) std::swap(table_[0], table_[blocks - 1]);
    const size_t bytes = static_cast<size_t>((blocks * stride() + 128) / 64 * 64);
    memory_.reset(static_cast<uint8_t*>(std::aligned_alloc(64, bytes)));
    std::memset(memory_.get(), 0xFF, bytes);  // NaN of every type
    for (int p = 0; p < length; ++p) {
      k_.store_kv(shape_, &keys_[p * s.kv_heads * s.dim], &values_[p * s.kv_heads * s.v_dim],
                  memory_.get() + table_[p / kCacheBlock] * stride(), p % kCacheBlock);
    }
    if (s.k_bits > 0) make_codes(s);
  }

  int64_t stride() const { return shape_.head_bytes * shape_.kv_heads; }
  int64_t width() const { return int64_t{shape_.heads} * shape_.v_dim; }

  AttentionTask task(int first, int rows, int kv_head, std::vector<float>& y) {
    AttentionTask t = {};
    t.shape = &shape_;
    t.ldq = int64_t{shape_.heads} * shape_.head_dim;
    t.q = q_.data() + first * t.ldq;
    t.ldy = width();
    t.y = y.data() + first * t.ldy;
    t.table = table_.data();
    t.blocks = memory_.get();
    t.block_stride = stride();
    t.position = first;
    t.prefix = prefix_;
    t.length = length_;
    t.rows = rows;
    t.kv_head = kv_head;
    t.far_table = table_.data();
    t.far_blocks = codes_.get();
    t.far_stride = shape_.far_bytes * shape_.kv_heads;
    return t;
  }

  // Rows in tasks of `step`.
  std::vector<float> run(int step) {
    std::vector<float> y(static_cast<size_t>(length_ * width()), NAN);
    for (int first = 0; first < length_; first += step) {
      const int rows = std::min(step, length_ - first);
      std::vector<float> scratch(static_cast<size_t>(attention_scratch(shape_, rows)));
      for (int h = 0; h < shape_.kv_heads; ++h) k_.attend(task(first, rows, h, y), scratch.data());
    }
    return y;
  }

  // The same, each partition apart, then merged.
  std::vector<float> run_apart(int step) {
    std::vector<float> y(static_cast<size_t>(length_ * width()), NAN);
    for (int first = 0; first < length_; first += step) {
      const int rows = std::min(step, length_ - first);
      const int64_t size = rows * (shape_.heads / shape_.kv_heads) * partial_pitch(shape_.v_dim);
      std::vector<float> scratch(static_cast<size_t>(attention_scratch(shape_, rows)));
      const int units = units_of(shape_, first, rows, length_, prefix_).count();
      std::vector<float> partials(static_cast<size_t>(size * units));
      for (int h = 0; h < shape_.kv_heads; ++h) {
        const AttentionTask t = task(first, rows, h, y);
        for (int u = 0; u < units; ++u) k_.attend_partition(t, u, scratch.data(), partials.data() + u * size);
        k_.attend_merge(t, 0, units, partials.data(), size);
      }
    }
    return y;
  }

  // `doubt` is how far each element may be off by weights that could be rounded either way.
  std::vector<double> exact(std::vector<double>& doubt) {
    std::vector<double> y;
    for (int p = 0; p < length_; ++p) {
      for (int h = 0; h < shape_.heads; ++h) exact_row(p, h, y, doubt);
    }
    return y;
  }

 private:
  // Codes of every whole block, in memory as large as they are, and what they stand for.
  void make_codes(const Shape& s) {
    const int64_t each = shape_.far_bytes * s.kv_heads, blocks = (length_ + kCacheBlock - 1) / kCacheBlock;
    const size_t bytes = static_cast<size_t>((blocks * each + 63) / 64 * 64);
    codes_.reset(static_cast<uint8_t*>(std::aligned_alloc(64, bytes)));
    std::memset(codes_.get(), 0xFF, bytes);
    far_keys_ = keys_;
    far_values_ = values_;
    for (int64_t b = 0; b < length_ / kCacheBlock; ++b) {
      k_.code_block(shape_, memory_.get() + table_[b] * stride(), codes_.get() + table_[b] * each);
      for (int64_t h = 0; h < s.kv_heads; ++h) {
        block_through(far_keys_, b, h, s.dim, [&](std::vector<float>& keys) {
          keys_through_codes(s.k_bits == 8 ? 255.0f : 15.0f, static_cast<size_t>(s.dim), keys);
        });
        block_through(far_values_, b, h, s.v_dim, [&](std::vector<float>& values) {
          values_through_codes(s.v_bits == 8 ? 255.0f : 15.0f, static_cast<size_t>(s.v_dim), values);
        });
      }
    }
  }

  // One head's f16 numbers of a block [16][width] through `change` and back to their places.
  template <class Change>
  void block_through(std::vector<float>& whole, int64_t block, int64_t head, int64_t width, Change change) {
    std::vector<float> held;
    const auto each = [&](auto use) {
      for (int64_t p = block * kCacheBlock; p < (block + 1) * kCacheBlock; ++p) {
        for (int64_t d = 0; d < width; ++d) use(whole[(p * shape_.kv_heads + head) * width + d]);
      }
    };
    each([&](float x) { held.push_back(rounded_f16(x)); });
    change(held);
    size_t i = 0;
    each([&](float& x) { x = held[i++]; });
  }

  // As relative.h makes it: beyond `reach` the bias is that of `reach`.
  void level_far_distances() {
    const int64_t reach = shape_.reach, pitch = relative_pitch(reach);
    for (int64_t h = 0; h < shape_.heads; ++h) {
      float* row = relative_.data() + h * pitch;
      for (int64_t i = 0; i < 16; ++i) row[i] = row[16];
      for (int64_t i = 2 * reach + 17; i < pitch; ++i) row[i] = row[2 * reach + 16];
    }
  }

  bool sees(int p, int j) const {
    const bool kept = j < shape_.sink || (shape_.stride > 0 && j / kCacheBlock % shape_.stride == 0);
    if (shape_.window > 0 && std::abs(p - j) >= shape_.window && !kept) return false;
    return j <= p || shape_.mask == kBidirectional || (shape_.mask == kPrefix && j < prefix_);
  }

  // What the cache keeps of element i, one of `width` that share a scale.
  double cached(const std::vector<float>& source, int64_t i, int64_t width) const {
    if (shape_.kv_type == kKvInt8) {
      float most = 0;
      for (int64_t j = i / width * width; j < (i / width + 1) * width; ++j)
        most = std::fmax(most, std::fabs(source[j]));
      return std::nearbyint(source[i] * (127.0f / most)) * double{most / 127.0f};
    }
    if (shape_.kv_type == kKvBF16) return rounded_bf16(source[i]);
    return shape_.kv_type == kKvF32 ? source[i] : rounded_f16(source[i]);
  }

  bool is_far(int p, int j) const { return shape_.k_bits > 0 && j < (p - shape_.recent) / kCacheBlock * kCacheBlock; }

  double score(int p, int h, int j) const {
    const int kv = h / (shape_.heads / shape_.kv_heads), dim = shape_.head_dim;
    double sum = 0;
    for (int d = 0; d < dim; ++d) {
      const int64_t at = (int64_t{j} * shape_.kv_heads + kv) * dim + d;
      const double q = q_[(int64_t{p} * shape_.heads + h) * dim + d];
      sum +=
          (shape_.kv_type == kKvBF16 ? rounded_bf16(q) : q) * (is_far(p, j) ? far_keys_[at] : cached(keys_, at, dim));
    }
    sum *= 0.3f;
    if (shape_.softcap > 0) sum = shape_.softcap * std::tanh(sum / shape_.softcap);
    if (shape_.slopes) sum -= slopes_[h] * std::abs(p - j);
    if (shape_.relative) {
      const int64_t gap = std::clamp<int64_t>(j - p, -shape_.reach, shape_.reach);
      sum += relative_[h * relative_pitch(shape_.reach) + gap + shape_.reach + 16];
    }
    return sum;
  }

  double value(int p, int h, int j, int d) const {
    const int64_t at = int64_t{j} * shape_.kv_heads + h / (shape_.heads / shape_.kv_heads);
    if (is_far(p, j)) return far_values_[at * shape_.v_dim + d];
    if (shape_.v_from_k) return cached(keys_, at * shape_.head_dim + d, shape_.head_dim);
    return cached(values_, at * shape_.v_dim + d, shape_.v_dim);
  }

  void exact_row(int p, int h, std::vector<double>& y, std::vector<double>& doubt) {
    const size_t first = y.size(), width = static_cast<size_t>(shape_.v_dim);
    y.resize(first + width);
    doubt.resize(first + width);
    double total = shape_.sinks ? std::exp(double{sinks_[h]}) : 0;
    for (int j = 0; j < length_; ++j) {
      if (!sees(p, j)) continue;
      double weight = std::exp(score(p, h, j)), unsure = 0;
      if (shape_.kv_type == kKvBF16) {
        unsure = doubt_bf16(weight);
        weight = rounded_bf16(weight);
      }
      total += weight;
      for (int d = 0; d < shape_.v_dim; ++d) {
        const double v = value(p, h, j, d);
        y[first + d] += weight * v;
        doubt[first + d] += unsure * (std::fabs(v) + 3);  // 3: about the most that y itself can be
      }
    }
    for (size_t i = first; i < y.size(); ++i) {
      y[i] /= total;
      doubt[i] /= total;
    }
  }

  const Kernels& k_;
  int length_;
  AttentionShape shape_ = {};
  std::vector<float> q_, keys_, values_, slopes_, sinks_, relative_;
  int prefix_;
  std::vector<int32_t> table_;
  struct Free {
    void operator()(void* p) const { std::free(p); }
  };
  std::unique_ptr<uint8_t, Free> memory_, codes_;
  std::vector<float> far_keys_, far_values_;
};

void check_shape(const Kernels& k, const Shape& s, KvType type, int length) {
  Sequence sequence(k, s, type, length);
  const std::string what = std::string(k.isa) + " type " + std::to_string(type) + " heads " + std::to_string(s.heads) +
                           "/" + std::to_string(s.kv_heads) + " dim " + std::to_string(s.dim) + " window " +
                           std::to_string(s.window) + " codes " + std::to_string(s.k_bits);
  const std::vector<float> alone = sequence.run(1);
  std::vector<double> doubt, exact = sequence.exact(doubt);
  for (size_t i = 0; i < exact.size(); ++i) {  // within what is in doubt, the float result counts
    if (std::fabs(exact[i] - alone[i]) <= doubt[i]) exact[i] = alone[i];
  }
  const double off = test::worst(alone, exact);
  check(off < (type == kKvInt8 ? 4e-4
               : s.k_bits > 0  ? 1e-5
                               : 5e-6),
        what + " is off by " + std::to_string(off * 1e6) + "e-6");
  const size_t bytes = alone.size() * sizeof(float);
  for (int step : {2, 7, 16, 64}) {
    check(std::memcmp(alone.data(), sequence.run(step).data(), bytes) == 0,
          what + " in tasks of " + std::to_string(step));
  }
  for (int step : {1, 5}) {
    check(std::memcmp(alone.data(), sequence.run_apart(step).data(), bytes) == 0, what + " with partitions apart");
  }
#if defined(__x86_64__)
  if (type != kKvBF16 || std::strcmp(k.isa, "avx512") != 0) return;
  Sequence plain(*kernels_avx512_plain(), s, type, length);
  check(std::memcmp(alone.data(), plain.run(7).data(), bytes) == 0, what + " without dot products of pairs");
#endif
}

}  // namespace

int main() {
  const FlushScope flushed;  // as in a step
  int levels = 0;
  for (const Kernels* k; (k = available_kernels(levels)) != nullptr; ++levels) {
    if (!test::wanted(k->isa)) continue;
    for (KvType type : {kKvF32, kKvF16, kKvBF16, kKvInt8}) {
      check_shape(*k, {4, 2, 16, 16, 0, kCausal, false, false, 0}, type, 299);
      check_shape(*k, {3, 1, 24, 20, 0, kCausal, true, true, 5.0f}, type, 280);
      check_shape(*k, {2, 2, 8, 8, 30, kCausal, false, false, 0}, type, 270);
      check_shape(*k, {7, 1, 8, 33, 0, kBidirectional, false, true, 0}, type, 70);
      check_shape(*k, {2, 1, 16, 64, 20, kBidirectional, false, false, 0}, type, 260);
      check_shape(*k, {2, 1, 16, 16, 0, kPrefix, false, false, 0, 265}, type, 290);
      check_shape(*k, {4, 2, 16, 16, 0, kBidirectional, false, false, 0, 0, 40}, type, 150);
      check_shape(*k, {5, 1, 40, 24, 0, kCausal, false, false, 0, 0, 0, true}, type, 270);
      check_shape(*k, {4, 2, 16, 16, 30, kCausal, false, true, 3.0f, 0, 0, false, 32, 3}, type, 600);
      check_shape(*k, {2, 1, 8, 20, 17, kCausal, false, false, 0, 0, 0, false, 0, 2}, type, 620);
      check_shape(*k, {2, 2, 16, 16, 40, kCausal, false, false, 0, 0, 0, false, 64, 0}, type, 290);
      check_shape(*k, {3, 1, 21, 7, 0, kCausal, false, false, 0}, type, 275);
      check_shape(*k, {9, 1, 131, 72, 0, kCausal, false, false, 0}, type, 40);
      check_shape(*k, {3, 1, 3, 1, 5, kCausal, false, false, 0}, type, 37);
    }
    check_shape(*k, {3, 1, 70, 64, 0, kCausal, false, true, 0}, kKvBF16, 290);
    check_shape(*k, {7, 1, 20, 72, 0, kCausal, false, false, 0, 0, 0, false, 0, 0, 4, 4, 100}, kKvF16, 300);
    check_shape(*k, {1, 1, 1, 1, 0, kCausal, false, false, 0, 0, 0, false, 0, 0, 4, 8, 16}, kKvF16, 290);
    for (int recent : {16, 100, 256}) {
      check_shape(*k, {4, 2, 16, 16, 0, kCausal, true, true, 5.0f, 0, 0, false, 0, 0, 4, 4, recent}, kKvF16, 590);
      check_shape(*k, {3, 1, 24, 41, 0, kCausal, false, false, 0, 0, 0, false, 0, 0, 8, 4, recent}, kKvF16, 310);
      check_shape(*k, {2, 2, 8, 8, 0, kCausal, false, false, 0, 0, 0, false, 0, 0, 4, 8, recent}, kKvF16, 270);
    }
    std::printf("%s done\n", k->isa);
  }
  return test::finish();
}
