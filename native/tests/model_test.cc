// The C interface end to end: a decoder runs, chunks and threads give one result, a warmed step allocates nothing, and
// a mutated program is refused or runs safely (the sanitizers are the judge of that).
#include <atomic>
#include <cstring>
#include <new>

#include "flat.h"

using test::check;
using test::Decoder;
using test::Model;
using test::OneSequence;

namespace {

std::atomic<int64_t> allocations{0};

constexpr int64_t kBlocks = 64;

// Logits of rows [0, cuts.back()), in steps that end at the cuts.
std::vector<float> run(ih_model* model, const std::vector<int32_t>& cuts) {
  check(ih_state_allocate(model, &kBlocks) == IH_OK, "state is allocated");
  std::vector<float> logits;
  int32_t first = 0;
  for (int32_t cut : cuts) {
    const OneSequence sequence(first, cut - first);
    const ih_step step = sequence.step();
    ih_output out[2];
    check(ih_run(model, 0, &step, out) == IH_OK, "a step runs");
    logits.insert(logits.end(), out[0].data, out[0].data + out[0].rows * out[0].width);
    first = cut;
  }
  return logits;
}

void check_bits(const Decoder& decoder) {
  for (int i = 0; ih_isa_available(i) != nullptr; ++i) {
    const Model one(decoder.flat(), decoder.weights(), 1, ih_isa_available(i));
    const std::vector<float> expected = run(one.handle, {600});
    const std::vector<int32_t> cuts = {1, 17, 300, 512, 513, 600};
    for (int threads : {1, 2, 4}) {
      const Model other(decoder.flat(), decoder.weights(), threads, ih_isa_available(i));
      check(std::memcmp(run(other.handle, cuts).data(), expected.data(), expected.size() * 4) == 0,
            std::string(ih_isa_available(i)) + ": chunks change no bit");
    }
  }
}

void check_allocations(const Decoder& decoder) {
  const Model model(decoder.flat(), decoder.weights(), 2);
  check(ih_reserve(model.handle, 100, 100, 1) == IH_OK, "room is made");
  check(ih_state_allocate(model.handle, &kBlocks) == IH_OK, "state is allocated");
  std::vector<OneSequence> sequences;
  for (int32_t first : {0, 100, 200, 300, 400}) sequences.emplace_back(first, 100);
  for (int32_t first = 500; first < 600; ++first) sequences.emplace_back(first, 1);
  std::vector<ih_step> steps;
  for (const OneSequence& sequence : sequences) steps.push_back(sequence.step());
  ih_output out[2];
  check(ih_run(model.handle, 0, &steps[0], out) == IH_OK, "the first step runs");  // starts the pool
  const int64_t before = allocations;
  for (const ih_step& step : steps) check(ih_run(model.handle, 0, &step, out) == IH_OK, "a step runs");
  const int64_t made = allocations - before;
  check(made == 0, std::to_string(made) + " allocations in warmed steps");
}

// What a wide step needs between gate, up and their codes is there once room is made, and counted.
void check_gated_bytes(const Decoder& decoder) {
  int64_t held[2];
  for (int i = 0; i < 2; ++i) {
    const Model model(decoder.flat(), decoder.weights(), i == 0 ? 1 : 4);
    check(ih_state_allocate(model.handle, &kBlocks) == IH_OK, "state is allocated");
    const OneSequence one(0, 1), many(1, 100);
    const ih_step narrow = one.step(), wide = many.step();
    ih_output out[2];
    check(ih_run(model.handle, 0, &narrow, out) == IH_OK, "a step runs");  // starts the pool
    check(ih_reserve(model.handle, 100, 100, 1) == IH_OK, "room is made");
    const int64_t before = allocations;
    held[i] = ih_model_bytes(model.handle);
    const ih_status status = ih_run(model.handle, 0, &wide, out);
    const int64_t made = allocations - before;  // a check makes strings
    check(status == IH_OK, "a wide step runs");
    check(made == 0, "a wide step allocates nothing once room is made");
    check(ih_model_bytes(model.handle) == held[i], "a wide step holds no more than was counted");
  }
  // Gate and up of 64 rows: of all 64 outputs for one thread, of 32 for each of four.
  check(held[1] - held[0] == (4 * 32 - 64) * 2 * 64 * 4, "floats of gated ops are counted");
}

// Numbers that break things: bounds, neighbours, floats.
int64_t strange(std::mt19937_64& rng, int64_t number) {
  switch (rng() % 8) {
    case 0:
      return -1;
    case 1:
      return static_cast<int64_t>(static_cast<uint64_t>(number) + 1);  // may be a bound already: wraps
    case 2:
      return static_cast<int64_t>(static_cast<uint64_t>(number) - 1);
    case 3:
      return static_cast<int64_t>(rng() % 64);
    case 4:
      return INT64_MAX;
    case 5:
      return INT64_MIN;
    case 6:
      return int64_t{1} << (rng() % 40);
    default:
      return static_cast<int64_t>(rng());
  }
}

void check_mutants(const Decoder& decoder, int count) {
  std::mt19937_64 rng(11);
  const std::vector<int64_t> whole = decoder.flat();
  const OneSequence sequence(0, 40);
  const ih_step step = sequence.step();
  int accepted = 0;
  for (int i = 0; i < count; ++i) {
    std::vector<int64_t> flat = whole;
    for (uint64_t n = rng() % 3 + 1; n > 0; --n) {
      const size_t at = rng() % flat.size();
      flat[at] = strange(rng, flat[at]);
    }
    if (rng() % 16 == 0) flat.resize(rng() % flat.size());
    if (flat[2] < 29 || (flat.size() > 3 && (flat[3] > 1 << 20))) continue;  // the step's own tokens must stay valid
    const Model model(flat, decoder.weights(), 2);
    if (model.handle == nullptr) {
      char text[8];
      check(model.status != IH_OK && ih_error(text, sizeof(text)) > 0, "a refusal has a reason");
      continue;
    }
    ++accepted;
    if (ih_block_bytes(model.handle, 0) > 1 << 20 || ih_state_allocate(model.handle, &kBlocks) != IH_OK) continue;
    ih_output out[64];
    if (flat[flat.size() - 1] < 64) ih_run(model.handle, 0, &step, out);
  }
  std::printf("%d mutants, %d of them still well formed\n", count, accepted);
}

void check_refusals(const Decoder& decoder) {
  const std::vector<int64_t> flat = decoder.flat();
  std::vector<ih_weight> weights = decoder.weights();
  check(Model(flat, weights, 1, "avx9").status == IH_USAGE, "an unknown level is refused");
  check(Model(flat, weights, 1000).status == IH_USAGE, "too many threads are refused");
  weights[0].bytes /= 2;
  check(Model(flat, weights, 1).status == IH_USAGE, "a short weight is refused");
  weights = decoder.weights();
  weights[0].format = 1000;
  check(Model(flat, weights, 1).status == IH_USAGE, "an unknown format is refused");
  weights = decoder.weights();
  weights[0].in = 1 << 30;
  check(Model(flat, weights, 1).status == IH_USAGE, "an impossible shape is refused");
  const Model model(flat, decoder.weights(), 1);
  check(ih_run(model.handle, 1, nullptr, nullptr) == IH_USAGE, "an unknown program is refused");
  const int64_t blocks = INT64_MAX / 1024;
  check(ih_state_allocate(model.handle, &blocks) == IH_CAPACITY, "too much state is refused");
}

}  // namespace

__attribute__((noinline)) void* operator new(size_t bytes) {
  allocations.fetch_add(1, std::memory_order_relaxed);
  void* p = std::malloc(bytes > 0 ? bytes : 1);
  if (p == nullptr) throw std::bad_alloc();
  return p;
}
__attribute__((noinline)) void operator delete(void* p) noexcept { std::free(p); }
__attribute__((noinline)) void operator delete(void* p, size_t) noexcept { std::free(p); }

int main(int argc, char** argv) {
  const Decoder decoder;
  check_bits(decoder);
  check_allocations(decoder);
  check_gated_bytes(decoder);
  check_refusals(decoder);
  check_mutants(decoder, argc > 1 ? std::atoi(argv[1]) : 20000);
  return test::finish();
}
