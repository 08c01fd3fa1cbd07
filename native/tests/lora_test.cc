// Adapters through the C interface: the numbers of weights with the adapter merged in; in a batch of sequences with
// different adapters the bits that each has alone, at every level and for any number of threads; a slot that is empty
// changes no bit; what does not fit is refused. Buffers are exactly as large as asked for, for the sanitizers.
#include <cstring>
#include <new>

#include "flat.h"

using inhouse::kFormats;
using inhouse::packed_bytes;
using test::check;
using test::Decoder;
using test::Model;
using test::noise;

namespace {

constexpr int32_t kSequences = 7, kRows = 75, kBlocksEach = 5;  // more rows than are worked on together

// Weights must begin at a multiple of 64 bytes; what std::vector allocates does so only by luck.
template <typename T>
struct Aligned {
  using value_type = T;
  Aligned() = default;
  template <typename U>
  Aligned(const Aligned<U>&) {}
  T* allocate(size_t n) { return static_cast<T*>(::operator new(n * sizeof(T), std::align_val_t{64})); }
  void deallocate(T* p, size_t) { ::operator delete(p, std::align_val_t{64}); }
  bool operator==(const Aligned&) const { return true; }
};

// An f32 matrix in tiles of sixteen rows.
struct Matrix {
  Matrix(int64_t out, int64_t in, uint32_t seed) : out(out), in(in) {
    const std::vector<float> random = noise(seed, padded(), 0.3f);
    values.assign(random.begin(), random.end());
  }
  size_t padded() const { return packed_bytes(kFormats[0], out, in) / 4; }
  float at(int64_t o, int64_t k) const { return values[(o / 16 * in + k) * 16 + o % 16]; }
  ih_weight weight() const { return {0, 0, out, in, values.data(), static_cast<int64_t>(values.size() * 4)}; }
  int64_t out, in;
  std::vector<float, Aligned<float>> values;
};

// One adapter on every second linear of the decoder, or on all; the embedding's table has none, as its rows are also
// read.
struct Adapter {
  // With `mergeable`, linears of codes have none: what is merged into codes would be rounded.
  Adapter(const Decoder& decoder, int64_t rank, size_t every, uint32_t seed, bool mergeable = false) {
    for (size_t i = 0; i < decoder.linears().size(); i += every) {
      const int64_t name = decoder.linears()[i];
      const ih_weight& base = decoder.weights()[name];
      if (name == 0 || (mergeable && base.format != 0)) continue;
      names.push_back(name);
      a.emplace_back(rank, base.in, seed++);
      b.emplace_back(base.out, rank, seed++);
    }
  }
  std::vector<ih_adapter_pair> pairs() const {
    std::vector<ih_adapter_pair> made;
    for (size_t i = 0; i < names.size(); ++i) {
      made.push_back({static_cast<int32_t>(names[i]), 0, a[i].weight(), b[i].weight()});
    }
    return made;
  }
  // The decoder's weights with the adapter in them; `memory` holds those that are new.
  std::vector<ih_weight> merged(const Decoder& decoder, std::vector<Matrix>& memory) const {
    std::vector<ih_weight> weights = decoder.weights();
    memory.reserve(names.size());
    for (size_t i = 0; i < names.size(); ++i) {
      ih_weight& weight = weights[names[i]];
      Matrix& sum = memory.emplace_back(weight.out, weight.in, 0);
      std::memcpy(sum.values.data(), weight.data, sum.values.size() * 4);
      for (int64_t o = 0; o < sum.out; ++o) {
        for (int64_t k = 0; k < sum.in; ++k) {
          double both = sum.at(o, k);
          for (int64_t r = 0; r < a[i].out; ++r) both += static_cast<double>(b[i].at(o, r)) * a[i].at(r, k);
          sum.values[(o / 16 * sum.in + k) * 16 + o % 16] = static_cast<float>(both);
        }
      }
      weight = sum.weight();
    }
    return weights;
  }
  std::vector<int64_t> names;
  std::vector<Matrix> a, b;
};

// Sequences [first, first + count) of seven, kRows rows each, all rows sampled; sequence i has slot i % 3.
std::vector<float> run(const Model& model, int32_t first, int32_t count, bool adapters = true) {
  const int64_t blocks = kSequences * kBlocksEach;
  check(ih_state_allocate(model.handle, &blocks) == IH_OK, "state is allocated");
  std::vector<int32_t> tokens, positions, owners, sampled, lengths(count, kRows), table, slots;
  for (int32_t n = 0; n < count; ++n) {
    for (int32_t i = 0; i < kRows; ++i) {
      tokens.push_back((i * 7 + first + n) % static_cast<int32_t>(Decoder::kVocab));
      positions.push_back(i);
      owners.push_back(n);
      sampled.push_back(n * kRows + i);
    }
    for (int32_t b = 0; b < kBlocksEach; ++b) table.push_back(n * kBlocksEach + b);
    slots.push_back((first + n) % 3);
  }
  const std::vector<int32_t> zeros(tokens.size(), 0);
  const int32_t* const tables[] = {table.data()};
  const int64_t widths[] = {kBlocksEach};
  const ih_step step = {static_cast<int64_t>(tokens.size()),
                        count,
                        static_cast<int64_t>(sampled.size()),
                        tokens.data(),
                        positions.data(),
                        owners.data(),
                        lengths.data(),
                        sampled.data(),
                        tables,
                        widths,
                        zeros.data(),
                        zeros.data(),
                        zeros.data(),
                        adapters ? slots.data() : nullptr};
  ih_output out[2];
  const bool ran = ih_run(model.handle, 0, &step, out) == IH_OK;
  check(ran, "a step runs");
  return ran ? std::vector<float>(out[0].data, out[0].data + out[0].rows * out[0].width) : std::vector<float>();
}

bool same(const std::vector<float>& a, const float* b) { return std::memcmp(a.data(), b, a.size() * 4) == 0; }

void set(const Model& model, int32_t slot, const Adapter& adapter) {
  const std::vector<ih_adapter_pair> pairs = adapter.pairs();
  check(ih_set_adapter(model.handle, slot, pairs.data(), static_cast<int64_t>(pairs.size())) == IH_OK, "a slot is set");
}

void check_level(const Decoder& decoder, const Adapter& one, const Adapter& two, const char* isa) {
  const std::string at = std::string(isa) + ": ";
  const Model plain(decoder.flat(), decoder.weights(), 1, isa), model(decoder.flat(), decoder.weights(), 1, isa);
  set(model, 1, one);
  set(model, 2, two);
  const std::vector<float> crowd = run(model, 0, kSequences), without = run(plain, 0, kSequences);
  const size_t each = crowd.size() / kSequences;
  check(each == kRows * Decoder::kVocab, at + "every row has logits");
  for (int32_t n = 0; n < kSequences; ++n) {
    check(same(run(model, n, 1), crowd.data() + n * each), at + "a sequence alone has its bits");
    const bool untouched = same({crowd.begin() + n * each, crowd.begin() + (n + 1) * each}, without.data() + n * each);
    check(untouched == (n % 3 == 0), at + "slot 0 alone changes nothing");
  }
  const Adapter mergeable(decoder, 17, 1, 3000, true);
  std::vector<Matrix> memory;
  const Model merged(decoder.flat(), mergeable.merged(decoder, memory), 1, isa),
      apart(decoder.flat(), decoder.weights(), 1, isa);
  set(apart, 1, mergeable);
  check(test::worst(run(apart, 1, 1), run(merged, 1, 1, false)) < 1e-3, at + "an adapter is what it is merged");
  const Model three(decoder.flat(), decoder.weights(), 3, isa);
  set(three, 2, two);
  set(three, 1, one);
  check(same(crowd, run(three, 0, kSequences).data()), at + "threads change no bit");
  check(ih_set_adapter(three.handle, 1, nullptr, 0) == IH_OK && ih_set_adapter(three.handle, 2, nullptr, 0) == IH_OK,
        at + "slots are emptied");
  check(same(without, run(three, 0, kSequences).data()), at + "empty slots change nothing");
}

void check_refusals(const Decoder& decoder, const Adapter& adapter) {
  const Model model(decoder.flat(), decoder.weights(), 1);
  const auto refused = [&](int32_t slot, const ih_adapter_pair& pair) {
    return ih_set_adapter(model.handle, slot, &pair, 1) == IH_USAGE;
  };
  const ih_adapter_pair good = adapter.pairs()[0];
  check(refused(0, good) && refused(-1, good) && refused(INT32_MAX, good), "a slot that cannot be is refused");
  check(ih_set_adapter(model.handle, 1, nullptr, 1) == IH_USAGE, "no pairs are refused");
  check(ih_set_adapter(model.handle, 1, &good, -1) == IH_USAGE, "a negative count is refused");
  for (int32_t weight : {-1, static_cast<int32_t>(decoder.weights().size()), INT32_MAX}) {
    ih_adapter_pair bad = good;
    bad.weight = weight;
    check(refused(1, bad), "a weight that is not there is refused");
  }
  for (int64_t size : {int64_t{0}, int64_t{-1}, good.a.out + 1, int64_t{1} << 20, INT64_MAX}) {
    for (int64_t ih_weight::* side : {&ih_weight::out, &ih_weight::in, &ih_weight::bytes}) {
      ih_adapter_pair a = good, b = good, both = good;
      a.a.*side = b.b.*side = size;
      both.a.out = both.b.in = size;
      check(refused(1, a) && refused(1, b) && refused(1, both), "a matrix that does not fit is refused");
    }
  }
  ih_adapter_pair half = good, nothing = good;
  half.a.format = 1;
  nothing.b.data = nullptr;
  check(refused(1, half) && refused(1, nothing), "only f32 that is there is taken");
}

}  // namespace

int main() {
  const Decoder decoder;
  const Adapter one(decoder, 5, 1, 1000), two(decoder, 17, 2, 2000);
  for (int i = 0; ih_isa_available(i) != nullptr; ++i) check_level(decoder, one, two, ih_isa_available(i));
  check_refusals(decoder, one);
  return test::finish();
}
