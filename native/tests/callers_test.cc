// Several callers at a time, each with a model of its own over shared weights (floats, or 8 bits, which go through the
// quantised inputs of a step): the bits of a run alone, errors and guarded ranges that stay with their caller.
// ThreadSanitizer is the second judge.
#include <cstring>
#include <thread>

#include "flat.h"

using test::check;
using test::Decoder;
using test::Model;
using test::OneSequence;

namespace {

constexpr int64_t kBlocks = 64;
constexpr int kRounds = 3;
const std::vector<int32_t> kCuts = {1, 17, 120, 121, 160};

struct Free {
  void operator()(uint8_t* p) const { std::free(p); }
};

// The decoder's linear weights in q8_0 where the format takes their shape.
class Narrow {
 public:
  explicit Narrow(const Decoder& decoder) : weights_(decoder.weights()) {
    int format = 0;
    while (std::strcmp(inhouse::kFormats[format].name, "q8_0") != 0) ++format;
    for (const int64_t at : decoder.linears()) {
      if (at < 0 || weights_[at].format != 0) continue;
      const ih_weight whole = weights_[at];
      if (!inhouse::layout_of(inhouse::kFormats[format], whole.in).valid) continue;
      std::vector<float> values(static_cast<size_t>(whole.out * whole.in));
      std::vector<int64_t> ids(static_cast<size_t>(whole.out));
      for (size_t i = 0; i < ids.size(); ++i) ids[i] = static_cast<int64_t>(i);
      check(ih_unpack_rows(nullptr, &whole, ids.data(), whole.out, values.data()) == IH_OK, "rows are read");
      const int64_t bytes = inhouse::packed_bytes(inhouse::kFormats[format], whole.out, whole.in);
      memory_.emplace_back(static_cast<uint8_t*>(std::aligned_alloc(64, static_cast<size_t>(bytes + 63) / 64 * 64)));
      weights_[at] = {format, 0, whole.out, whole.in, memory_.back().get(), bytes};
      check(ih_quantize_tiles(nullptr, &weights_[at], values.data()) == IH_OK, "a weight is quantised");
    }
    check(memory_.size() >= 5, "most matrices are narrow");
  }
  const std::vector<ih_weight>& weights() const { return weights_; }

 private:
  std::vector<ih_weight> weights_;
  std::vector<std::unique_ptr<uint8_t, Free>> memory_;
};

std::vector<float> run(ih_model* model, const char* what) {
  check(ih_state_allocate(model, &kBlocks) == IH_OK, "state is allocated");
  std::vector<float> logits;
  int32_t first = 0;
  for (const int32_t cut : kCuts) {
    const OneSequence sequence(first, cut - first);
    const ih_step step = sequence.step();
    ih_output out[2];
    check(ih_run(model, 0, &step, out) == IH_OK, what);
    logits.insert(logits.end(), out[0].data, out[0].data + out[0].rows * out[0].width);
    first = cut;
  }
  return logits;
}

struct Shared {
  std::vector<int64_t> flat;
  const std::vector<ih_weight>* weights;
  const char* isa;
  std::vector<float> expected;
};

void call(const Shared& shared, int threads) {
  for (int round = 0; round < kRounds; ++round) {
    const Model model(shared.flat, *shared.weights, threads, shared.isa);
    const int64_t guard = ih_guard_add((*shared.weights)[0].data, (*shared.weights)[0].bytes);
    const bool same = std::memcmp(run(model.handle, "a step of one of many callers runs").data(),
                                  shared.expected.data(), shared.expected.size() * sizeof(float)) == 0;
    check(same, std::string(shared.isa) + ", " + std::to_string(threads) + " threads: other callers change no bit");
    const std::string wrong = "level" + std::to_string(threads);
    check(Model(shared.flat, *shared.weights, 1, wrong.c_str()).status == IH_USAGE, "an unknown level is refused");
    char text[256];
    ih_error(text, sizeof(text));
    check(std::strstr(text, wrong.c_str()) != nullptr, "a caller reads its own error");
    check(ih_guard_damaged(guard) == 0, "a whole range is not damaged");
    ih_guard_remove(guard);
  }
}

void check_callers(const Decoder& decoder, const std::vector<ih_weight>& weights, const char* isa) {
  Shared shared = {decoder.flat(), &weights, isa, {}};
  shared.expected = run(Model(shared.flat, weights, 1, isa).handle, "a step runs alone");
  std::vector<std::thread> callers;
  for (int threads = 1; threads <= 3; ++threads) {
    callers.emplace_back([&shared, threads] { call(shared, threads); });
  }
  for (std::thread& caller : callers) caller.join();
}

}  // namespace

int main() {
  const Decoder decoder;
  const Narrow narrow(decoder);
  for (int i = 0; ih_isa_available(i) != nullptr; ++i) {
    if (!test::wanted(ih_isa_available(i))) continue;
    check_callers(decoder, decoder.weights(), ih_isa_available(i));
    check_callers(decoder, narrow.weights(), ih_isa_available(i));
  }
  return test::finish();
}
