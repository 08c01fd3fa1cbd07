#include "sample.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <limits>

namespace inhouse {
namespace {

constexpr float kLowest = -std::numeric_limits<float>::infinity();
constexpr float kGreedyBelow = 1e-5f;
constexpr int64_t kFirstLook = 256;  // candidates that top_p tries before it looks at the whole row
constexpr int kBuckets = 4096;       // of top_p's histogram: sign, exponent and 5 bits of a weight in [0, 1]

bool likelier(const Candidate& a, const Candidate& b) { return a.x != b.x ? a.x > b.x : a.id < b.id; }
// Grows with w.
int bucket(float w) { return static_cast<int>(std::bit_cast<uint32_t>(w) >> 18); }

bool lower_id(const Candidate& a, const Candidate& b) { return a.id < b.id; }

// One row at work: logits ready to draw from, block maxima, and the candidates that are left.
class RowSampler {
 public:
  RowSampler(const Kernels& kernels, SampleScratch& s, const float* x, int64_t n)
      : kernels_(kernels), s_(s), x_(x), n_(n), blocks_((n + kSampleBlock - 1) / kSampleBlock) {
    s_.maxima.resize(blocks_);
    kernels_.block_max(x_, n_, s_.maxima.data());
    bool nan = false;
    for (const float m : s_.maxima) {
      nan |= m != m;
      max_ = std::max(max_, m);
    }
    if (nan || max_ == -kLowest)
      status_ = IH_SAMPLE_NAN;
    else if (max_ == kLowest)
      status_ = IH_SAMPLE_NO_TOKEN;
  }

  int32_t status() const { return status_; }
  float max() const { return max_; }

  int32_t greedy() const {
    const auto block = std::find(s_.maxima.begin(), s_.maxima.end(), max_) - s_.maxima.begin();
    return static_cast<int32_t>(std::find(x_ + block * kSampleBlock, x_ + n_, max_) - x_);
  }

  int32_t draw(const ih_sample_row& row) {
    inverse_ = 1.0f / row.temperature;
    const double u = sample_uniform(row.seed, row.position, row.choice);
    if (!choose_candidates(row)) return draw_from_all(u);
    if (row.typical_p < 1) keep_typical(row.typical_p);
    return draw_from_candidates(u);
  }

  // The k largest to the candidates, in no order; all that are not ruled out if there are no more than k.
  void take_top(int64_t k) {
    float floor = kLowest;
    if (k < blocks_) {  // the k-th largest block maximum: k elements are at least as large
      s_.sums.assign(s_.maxima.begin(), s_.maxima.end());
      std::nth_element(s_.sums.begin(), s_.sums.begin() + (k - 1), s_.sums.end(), std::greater<float>());
      floor = s_.sums[k - 1];
    }
    take_from(floor);
    auto& c = s_.candidates;
    if (static_cast<int64_t>(c.size()) <= k) return;
    std::nth_element(c.begin(), c.begin() + (k - 1), c.end(), likelier);
    c.resize(k);
  }

  // Sum of e^(x - max) / temperature over the row, weights in scratch.
  double weigh_all(float inverse) {
    s_.w.resize(n_);
    s_.sums.resize(blocks_);
    kernels_.exp_weights(x_, n_, max_, inverse, s_.w.data(), s_.sums.data());
    double total = 0;
    for (const float sum : s_.sums) total += sum;
    return total;
  }

 private:
  // False if nothing is filtered.
  bool choose_candidates(const ih_sample_row& row) {
    const bool by_count = row.top_k > 0 && row.top_k < n_;
    if (!by_count && row.min_p <= 0) {
      if (row.top_p < 1) return take_nucleus(row.top_p), true;
      if (row.typical_p >= 1) return false;
    }
    if (by_count)
      take_top(row.top_k);
    else
      take_from(row.min_p > 0 ? safe_floor(row.min_p) : kLowest);
    weigh_candidates();
    by_id_ = !by_count;
    if (row.min_p > 0) std::erase_if(s_.candidates, [&](const Candidate& c) { return c.w < row.min_p; });
    if (row.top_p < 1) {
      std::sort(s_.candidates.begin(), s_.candidates.end(), likelier);
      by_id_ = false;
      keep_shortest(row.top_p * total());
    }
    return true;
  }

  // A little below the logit whose weight is `min_p`.
  float safe_floor(float min_p) const {
    const double floor = max_ + std::log(static_cast<double>(min_p)) / inverse_;
    return static_cast<float>(floor - 1e-4 * (1 + std::fabs(floor) + std::fabs(max_) + 1 / inverse_));
  }

  // Everything at or above `floor` that is not ruled out, in order of id.
  void take_from(float floor) {
    auto& c = s_.candidates;
    c.clear();
    for (int64_t b = 0; b < blocks_; ++b) {
      if (s_.maxima[b] < floor) continue;
      const int64_t end = std::min(n_, (b + 1) * kSampleBlock);
      for (int64_t i = b * kSampleBlock; i < end; ++i) {
        if (x_[i] >= floor && x_[i] > kLowest) c.push_back({x_[i], 0, static_cast<int32_t>(i)});
      }
    }
  }

  void weigh_candidates() {
    auto& c = s_.candidates;
    const int64_t count = static_cast<int64_t>(c.size());
    s_.gathered.resize(count);
    s_.w.resize(count);
    s_.sums.resize(count / kSampleBlock + 1);
    for (int64_t i = 0; i < count; ++i) s_.gathered[i] = c[i].x;
    kernels_.exp_weights(s_.gathered.data(), count, max_, inverse_, s_.w.data(), s_.sums.data());
    for (int64_t i = 0; i < count; ++i) c[i].w = s_.w[i];
  }

  double total() const {
    double sum = 0;
    for (const Candidate& c : s_.candidates) sum += c.w;
    return sum;
  }

  // The candidates, in their order, up to the one at which their weights reach `mass`.
  void keep_shortest(double mass, double sum = 0) {
    auto& c = s_.candidates;
    size_t kept = 0;
    while (kept < c.size() && sum < mass) sum += c[kept++].w;
    c.resize(kept);
  }

  // top_p over the whole row: most rows are peaked, so the likeliest few are tried first.
  void take_nucleus(float p) {
    const double mass = p * weigh_all(inverse_);
    take_top(kFirstLook);
    auto& c = s_.candidates;
    std::sort(c.begin(), c.end(), likelier);
    for (Candidate& one : c) one.w = s_.w[one.id];
    if (total() >= mass || static_cast<int64_t>(c.size()) < kFirstLook)
      keep_shortest(mass);
    else
      take_nucleus_by_histogram(p);
  }

  // The same in O(vocab): mass by leading bits of the weight; only the bucket at the edge is sorted.
  void take_nucleus_by_histogram(float p) {
    double masses[kBuckets] = {}, all = 0, sum = 0;
    for (int64_t i = 0; i < n_; ++i) {
      masses[bucket(s_.w[i])] += s_.w[i];
      all += s_.w[i];
    }
    int edge = kBuckets - 1;
    while (edge > 0 && sum + masses[edge] < p * all) sum += masses[edge--];
    auto& c = s_.candidates;
    c.clear();
    for (int64_t i = 0; i < n_; ++i) {
      if (bucket(s_.w[i]) == edge) c.push_back({x_[i], s_.w[i], static_cast<int32_t>(i)});
    }
    std::sort(c.begin(), c.end(), likelier);
    keep_shortest(p * all, sum);
    const Candidate last = c.empty() ? Candidate{kLowest, 0, -1} : c.back();
    c.clear();
    for (int64_t i = 0; i < n_; ++i) {
      const Candidate one{x_[i], s_.w[i], static_cast<int32_t>(i)};
      if (one.w > 0 && !likelier(last, one)) c.push_back(one);
    }
    by_id_ = true;
  }

  // Locally typical: nearest to the entropy first, ties by id, until they hold the mass.
  void keep_typical(float p) {
    auto& c = s_.candidates;
    const double all = total(), log_all = std::log(all);
    double entropy = 0;
    for (const Candidate& one : c) entropy += one.w / all * (log_all - scaled(one));
    const auto distance = [&](const Candidate& one) { return std::fabs(log_all - scaled(one) - entropy); };
    std::sort(c.begin(), c.end(), [&](const Candidate& a, const Candidate& b) {
      const double x = distance(a), y = distance(b);
      return x != y ? x < y : a.id < b.id;
    });
    keep_shortest(p * all);
    by_id_ = false;
  }

  double scaled(const Candidate& c) const { return (static_cast<double>(c.x) - max_) * inverse_; }

  int32_t draw_from_candidates(double u) {
    auto& c = s_.candidates;
    if (!by_id_) std::sort(c.begin(), c.end(), lower_id);
    const double target = u * total();
    double sum = 0;
    for (const Candidate& one : c) {
      sum += one.w;
      if (sum > target) return one.id;
    }
    return c.back().id;
  }

  int32_t draw_from_all(double u) {
    const double target = u * weigh_all(inverse_);
    double before = 0;
    int64_t block = 0, last = -1;
    while (block < blocks_ - 1 && before + s_.sums[block] <= target) before += s_.sums[block++];
    for (int64_t i = block * kSampleBlock; i < n_; ++i) {
      if (s_.w[i] > 0) last = i;
      before += s_.w[i];
      if (before > target) return static_cast<int32_t>(i);
    }
    return last >= 0 ? static_cast<int32_t>(last) : greedy();
  }

  const Kernels& kernels_;
  SampleScratch& s_;
  const float* x_;
  int64_t n_, blocks_;
  float max_ = kLowest, inverse_ = 1;
  int32_t status_ = IH_SAMPLE_OK;
  bool by_id_ = false;  // the candidates stand in order of id
};

void apply_bias(const SampleInputs& in, const ih_sample_row& row, float* x) {
  for (int64_t i = row.bias_begin; i < row.bias_end; ++i) x[in.bias_ids[i]] += in.bias_values[i];
}

void apply_mask(const SampleInputs& in, const ih_sample_row& row, float* x) {
  const uint32_t* mask = in.masks + row.mask_row * ((in.vocab + 31) / 32);
  for (int64_t i = 0; i < in.vocab; ++i) {
    if (!(mask[i / 32] >> (i % 32) & 1)) x[i] = kLowest;
  }
}

// Counts are -1 for a token that is only in the prompt and still to be treated.
void apply_penalties(const SampleInputs& in, const ih_sample_row& row, SampleScratch& s, float* x) {
  s.counts.resize(std::max<size_t>(s.counts.size(), in.vocab));
  for (int64_t i = row.history_begin; i < row.history_prompt_end; ++i) s.counts[in.history[i]] = -1;
  for (int64_t i = row.history_prompt_end; i < row.history_end; ++i) {
    int32_t& count = s.counts[in.history[i]];
    count = std::max(count, 0) + 1;
  }
  for (int64_t i = row.history_begin; i < row.history_end; ++i) {
    const int32_t id = in.history[i], count = s.counts[id];
    if (!count) continue;  // met before
    s.counts[id] = 0;
    x[id] = x[id] > 0 ? x[id] / row.repetition_penalty : x[id] * row.repetition_penalty;
    if (count > 0) {
      x[id] -= row.frequency_penalty * static_cast<float>(count);
      x[id] -= row.presence_penalty;
    }
  }
}

}  // namespace

double sample_uniform(uint64_t seed, int64_t position, int32_t choice) {
  uint32_t key[2] = {static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32)};
  const uint64_t p = static_cast<uint64_t>(position);
  uint32_t c[4] = {static_cast<uint32_t>(p), static_cast<uint32_t>(p >> 32), static_cast<uint32_t>(choice), 0};
  for (int round = 0; round < 10; ++round) {
    const uint64_t a = uint64_t{0xD2511F53} * c[0], b = uint64_t{0xCD9E8D57} * c[2];
    const uint32_t next[4] = {static_cast<uint32_t>(b >> 32) ^ c[1] ^ key[0], static_cast<uint32_t>(b),
                              static_cast<uint32_t>(a >> 32) ^ c[3] ^ key[1], static_cast<uint32_t>(a)};
    std::copy(next, next + 4, c);
    key[0] += 0x9E3779B9;
    key[1] += 0xBB67AE85;
  }
  return static_cast<double>((uint64_t{c[0]} << 32 | c[1]) >> 11) * 0x1p-53;
}

int32_t sample_row(const Kernels& kernels, SampleScratch& scratch, const SampleInputs& in, const ih_sample_row& row,
                   int32_t* status) {
  const float* x = in.logits + row.logit_row * in.vocab;
  const bool penalties = row.history_end > row.history_begin;
  if (penalties || row.bias_end > row.bias_begin || row.mask_row >= 0) {
    scratch.x.assign(x, x + in.vocab);
    float* changed = scratch.x.data();
    apply_bias(in, row, changed);
    if (row.mask_row >= 0) apply_mask(in, row, changed);
    if (penalties) apply_penalties(in, row, scratch, changed);
    x = changed;
  }
  RowSampler sampler(kernels, scratch, x, in.vocab);
  *status = sampler.status();
  if (*status != IH_SAMPLE_OK) return -1;
  return row.temperature < kGreedyBelow ? sampler.greedy() : sampler.draw(row);
}

void logprob_row(const Kernels& kernels, SampleScratch& scratch, const float* logits, int64_t vocab, int32_t target,
                 int64_t top, const RowLogprobs& out) {
  RowSampler sampler(kernels, scratch, logits, vocab);
  *out.status = sampler.status() == IH_SAMPLE_OK ? IH_SAMPLE_OK : IH_SAMPLE_NAN;
  if (*out.status != IH_SAMPLE_OK) return;
  const double lse = sampler.max() + std::log(sampler.weigh_all(1.0f));
  const float x = logits[target];
  *out.logprob = static_cast<float>(x - lse);
  *out.rank = 1;
  for (int64_t i = 0; i < vocab; ++i) *out.rank += logits[i] > x;
  if (top <= 0) return;
  sampler.take_top(top);
  auto& c = scratch.candidates;
  std::sort(c.begin(), c.end(), likelier);
  for (int64_t i = 0; i < top; ++i) {
    const bool there = i < static_cast<int64_t>(c.size());  // fewer where -inf rules tokens out
    out.top_ids[i] = there ? c[i].id : -1;
    out.top_logprobs[i] = there ? static_cast<float>(c[i].x - lse) : kLowest;
  }
}

}  // namespace inhouse
