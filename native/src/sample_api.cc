// The C interface of sampling: checks every index once, then spreads rows over the pool.
#include <new>
#include <string>

#include "cpu.h"
#include "dispatch.h"
#include "error.h"
#include "sample.h"
#include "threads.h"

namespace inhouse {
namespace {

SampleScratch& scratch_of_thread() {
  thread_local SampleScratch scratch;
  return scratch;
}

bool all_within(const int32_t* ids, int64_t begin, int64_t end, int64_t bound) {
  for (int64_t i = begin; i < end; ++i) {
    if (ids[i] < 0 || ids[i] >= bound) return false;
  }
  return true;
}

Status check_row(const SampleInputs& in, const ih_sample_sizes& sizes, const ih_sample_row& row) {
  if (row.logit_row < 0 || row.logit_row >= sizes.logit_rows) return Status::usage("logit_row beyond the logits");
  if (row.mask_row < -1 || row.mask_row >= sizes.masks) return Status::usage("mask_row beyond the masks");
  if (row.bias_begin < 0 || row.bias_begin > row.bias_end || row.bias_end > sizes.biases) {
    return Status::usage("bias range beyond the biases");
  }
  if (row.history_begin < 0 || row.history_begin > row.history_prompt_end || row.history_prompt_end > row.history_end ||
      row.history_end > sizes.history) {
    return Status::usage("history range beyond the history");
  }
  if (!all_within(in.bias_ids, row.bias_begin, row.bias_end, in.vocab) ||
      !all_within(in.history, row.history_begin, row.history_end, in.vocab)) {
    return Status::usage("a bias or the history names a token beyond the vocabulary");
  }
  return {};
}

constexpr int64_t kWorthThreads = int64_t{1} << 18;  // logits below which waking the pool costs more than it saves

// f(row, worker's scratch) for every row, over the pool where that pays.
template <class F>
Status for_rows(int64_t rows, int64_t vocab, F&& f) try {
  const Kernels* kernels = nullptr;
  const Status status = choose_kernels(nullptr, &kernels);
  if (!status.ok()) return status;
  const FlushScope flush;
  std::atomic<bool> out_of_memory{false};
  Pool::Step pool(Pool::process(), rows * vocab >= kWorthThreads ? default_threads() : 1);
  pool.run(rows, [&](int64_t r, int) {
    try {
      f(*kernels, scratch_of_thread(), r);
    } catch (const std::bad_alloc&) {
      out_of_memory = true;
    }
  });
  return out_of_memory ? Status::capacity("sampling ran out of memory") : Status{};
} catch (const std::exception& error) {
  return Status::failed(error.what());
}

}  // namespace
}  // namespace inhouse

using namespace inhouse;

ih_status ih_sample(const ih_sample_sizes* sizes, const float* logits, const ih_sample_row* rows,
                    const int32_t* bias_ids, const float* bias_values, const int32_t* history, const uint32_t* masks,
                    int32_t* tokens, int32_t* status) {
  const SampleInputs in{logits, sizes->vocab, bias_ids, bias_values, history, masks};
  if (in.vocab < 1) return report(Status::usage("the vocabulary is empty"));
  for (int64_t r = 0; r < sizes->rows; ++r) {
    const Status bad = check_row(in, *sizes, rows[r]);
    if (!bad.ok()) return report(bad);
  }
  return report(for_rows(sizes->rows, in.vocab, [&](const Kernels& kernels, SampleScratch& scratch, int64_t r) {
    tokens[r] = sample_row(kernels, scratch, in, rows[r], &status[r]);
  }));
}

ih_status ih_logprobs(const float* logits, int64_t logit_rows, int64_t vocab, const int32_t* rows,
                      const int32_t* targets, int64_t count, int64_t top, float* logprobs, int32_t* ranks,
                      int32_t* top_ids, float* top_logprobs, int32_t* status) {
  if (vocab < 1 || top < 0 || top > vocab) return report(Status::usage("top must lie in 0..vocabulary"));
  if (!all_within(rows, 0, count, logit_rows)) return report(Status::usage("a row beyond the logits"));
  if (!all_within(targets, 0, count, vocab)) return report(Status::usage("a target beyond the vocabulary"));
  return report(for_rows(count, vocab, [&](const Kernels& kernels, SampleScratch& scratch, int64_t r) {
    const RowLogprobs out{logprobs + r, ranks + r, top_ids + r * top, top_logprobs + r * top, status + r};
    logprob_row(kernels, scratch, logits + rows[r] * vocab, vocab, targets[r], top, out);
  }));
}

double ih_sample_uniform(uint64_t seed, int64_t position, int32_t choice) {
  return sample_uniform(seed, position, choice);
}
