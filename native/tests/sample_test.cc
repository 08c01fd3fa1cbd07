// Sampling at every level of this machine: the two passes over a row, draws that are the same at all levels, ranges
// that are refused. What the distribution must be is tested from Python against the reference.
#include "sample.h"

#include <algorithm>

#include "check.h"
#include "dispatch.h"

using namespace inhouse;
using test::check;
using test::noise;

namespace {

constexpr int64_t kSizes[] = {1, 15, 16, 17, 255, 256, 257, 1000, 5000};

void check_passes(const Kernels& k) {
  for (const int64_t n : kSizes) {
    const std::vector<float> x = noise(static_cast<uint32_t>(n), n, 3);
    const int64_t blocks = (n + kSampleBlock - 1) / kSampleBlock;
    std::vector<float> maxima(blocks), sums(blocks), w(n);
    k.block_max(x.data(), n, maxima.data());
    const float top = *std::max_element(x.begin(), x.end());
    k.exp_weights(x.data(), n, top, 0.7f, w.data(), sums.data());
    double total = 0, exact = 0;
    for (int64_t i = 0; i < n; ++i) exact += std::exp((static_cast<double>(x[i]) - top) * 0.7f);
    for (const float sum : sums) total += sum;
    check(std::fabs(total / exact - 1) < 1e-6, std::string(k.isa) + " sum of weights of " + std::to_string(n));
    for (int64_t b = 0; b < blocks; ++b) {
      const auto begin = x.begin() + b * kSampleBlock, end = x.begin() + std::min(n, (b + 1) * kSampleBlock);
      check(maxima[b] == *std::max_element(begin, end), std::string(k.isa) + " maximum of a block");
    }
    std::vector<float> broken = x;
    broken[n / 2] = NAN;
    k.block_max(broken.data(), n, maxima.data());
    check(std::isnan(maxima[n / 2 / kSampleBlock]), std::string(k.isa) + " NaN of a block");
  }
}

ih_sample_row plain_row() {
  ih_sample_row row{};
  row.mask_row = -1;
  row.temperature = row.top_p = row.typical_p = row.repetition_penalty = 1;
  return row;
}

// Tokens of many rows with every filter, at one level.
std::vector<int32_t> draw_many(const Kernels& k, const std::vector<float>& logits) {
  SampleScratch scratch;
  const int64_t vocab = static_cast<int64_t>(logits.size());
  const std::vector<int32_t> history = {0, 0, static_cast<int32_t>(vocab - 1)};
  const SampleInputs in{logits.data(), vocab, nullptr, nullptr, history.data(), nullptr};
  std::vector<int32_t> tokens;
  for (int i = 0; i < 400; ++i) {
    ih_sample_row row = plain_row();
    row.seed = 99;
    row.position = i;
    if (i & 1) row.top_k = 1 + i % 70;
    if (i & 2) row.top_p = 0.3f + 0.0017f * static_cast<float>(i);
    if (i & 4) row.min_p = 0.02f;
    if (i & 8) row.typical_p = 0.8f;
    if (i & 16) row.temperature = 0.6f;
    if (i & 32) row.history_end = 3, row.history_prompt_end = 1, row.frequency_penalty = 0.3f;
    int32_t status = -1;
    const int32_t token = sample_row(k, scratch, in, row, &status);
    check(status == IH_SAMPLE_OK && token >= 0 && token < vocab, std::string(k.isa) + " a token is drawn");
    tokens.push_back(token);
  }
  return tokens;
}

void check_levels() {
  for (const int64_t n : kSizes) {
    const std::vector<float> logits = noise(static_cast<uint32_t>(n), n, 2);
    const std::vector<int32_t> first = draw_many(*available_kernels(0), logits);
    for (int i = 1; const Kernels* k = available_kernels(i); ++i) {
      check(draw_many(*k, logits) == first, std::string(k->isa) + " draws otherwise than scalar, " + std::to_string(n));
    }
  }
}

void check_refusals() {
  const std::vector<float> logits(40, 0.0f);
  const std::vector<int32_t> ids = {3, 40, -1};
  const std::vector<float> values(3, 0.0f);
  int32_t token, status;
  const auto refused = [&](const ih_sample_row& row) {
    const ih_sample_sizes sizes{1, 40, 1, 3, 3, 0};
    return ih_sample(&sizes, logits.data(), &row, ids.data(), values.data(), ids.data(), nullptr, &token, &status) ==
           IH_USAGE;
  };
  ih_sample_row row = plain_row();
  row.bias_end = 1;
  check(!refused(row), "a good bias passes");
  row.bias_end = 2;
  check(refused(row), "a bias beyond the vocabulary");
  row = plain_row();
  row.history_end = row.history_prompt_end = 3;
  check(refused(row), "a negative token");
  row = plain_row();
  row.logit_row = 1;
  check(refused(row), "a row beyond the logits");
  row = plain_row();
  row.mask_row = 0;
  check(refused(row), "a mask that is not there");
}

}  // namespace

int main() {
  for (int i = 0; const Kernels* k = available_kernels(i); ++i) check_passes(*k);
  check_levels();
  check_refusals();
  return test::finish();
}
