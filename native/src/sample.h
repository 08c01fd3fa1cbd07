// Drawing tokens from rows of logits. Knows numbers only; runtime/sampling.py says what every parameter means and has
// the reference that this is tested against.
#pragma once
#include <cstdint>
#include <vector>

#include "inhouse.h"
#include "kernels.h"

namespace inhouse {

struct Candidate {
  float x;  // logit after bias, mask and penalties
  float w;  // e^((x - max) / temperature)
  int32_t id;
};

// What one thread works in; grows to the vocabulary and stays.
struct SampleScratch {
  std::vector<float> x, w, maxima, sums, gathered;
  std::vector<int32_t> counts;  // of each token in the output; all zero between rows
  std::vector<Candidate> candidates;
};

// The flat arrays that rows point into; `vocab` bounds every id.
struct SampleInputs {
  const float* logits;  // [][vocab]
  int64_t vocab;
  const int32_t* bias_ids;
  const float* bias_values;
  const int32_t* history;
  const uint32_t* masks;  // [][(vocab + 31) / 32]
};

// u in [0, 1) of (seed, position, choice): Philox4x32-10.
double sample_uniform(uint64_t seed, int64_t position, int32_t choice);

// Draws one token; gives its id, or -1 with a reason in *status.
int32_t sample_row(const Kernels& kernels, SampleScratch& scratch, const SampleInputs& in, const ih_sample_row& row,
                   int32_t* status);

// Log-probability and rank of `target`, and the `top` likeliest, under softmax(logits [vocab]).
struct RowLogprobs {
  float* logprob;
  int32_t* rank;
  int32_t* top_ids;     // [top]
  float* top_logprobs;  // [top]
  int32_t* status;
};
void logprob_row(const Kernels& kernels, SampleScratch& scratch, const float* logits, int64_t vocab, int32_t target,
                 int64_t top, const RowLogprobs& out);

}  // namespace inhouse
