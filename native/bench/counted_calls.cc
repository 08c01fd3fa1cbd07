// Calls whose instructions tools/count_instructions.py counts: each runs once inside counted(), on fixed numbers and
// one thread. With INHOUSE_STEPPED set it counts them itself, by stepped.h, and prints a count a line. Arguments: the
// level, then one word a call:
//   linear:FORMAT:OUT:IN:BYTES:ROWS:QUANTIZED   ih_linear, which quantises its inputs where the last is 1
//   pairs:FORMAT:OUT:IN:BYTES:ROWS              a step's linear of inputs rounded to bf16, and the look-up of its
//   inputs coded:FORMAT:OUT:IN:BYTES:ROWS              a step's linear of codes whose scales are powers of two, and
//   their making gated:FORMAT:OUT:IN:BYTES:ROWS              a step's gate, up, glu and codes as one, and the codes of
//   its input attention:KV_TYPE:CONTEXT:ROWS:HEADS:KV     a step's attention over heads of 64, and the look-up of q k v
//   rms:WIDTH:ROWS, layer:WIDTH:ROWS            a step's norm and the look-up of its input
//   quantize:WIDTH:ROWS:POWERS                  a step's quantize_rows and the look-up of its input
//   embed:WIDTH:ROWS                            the look-up alone
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>

#include "inhouse.h"
#include "program.h"
#include "stepped.h"

using inhouse::OpKind;

namespace {

bool steps = false;  // counted here, one by one, and printed

}  // namespace

// Valgrind counts from its entry to its end.
extern "C" __attribute__((noinline)) int counted(int (*call)(void*), void* context) {
  if (steps) stepped::begin();
  const int result = call(context);
  if (steps) std::printf("%lld\n", static_cast<long long>(stepped::end()));
  __asm__ volatile("");  // or the call would be the function's end
  return result;
}

namespace {

constexpr int64_t kVocab = 64, kDim = 64, kPositions = 4096;
constexpr int kF32 = 0;

[[noreturn]] void fail(const char* what) {
  char text[512];
  ih_error(text, sizeof text);
  std::fprintf(stderr, "%s: %s\n", what, text);
  std::exit(1);
}

template <class F>
void count(F f) {
  const auto call = [](void* context) { return (*static_cast<F*>(context))(); };
  if (counted(call, &f) != IH_OK) fail("a call failed");
}

void* allocate(int64_t bytes) {
  void* data = std::aligned_alloc(64, static_cast<size_t>(bytes + 63) / 64 * 64);
  if (data == nullptr) fail("memory");
  return data;
}

ih_weight coded(int64_t format, int64_t out, int64_t in, int64_t bytes) {
  void* data = allocate(bytes);
  std::memset(data, 0x35, static_cast<size_t>(bytes));  // 0x3535 is 0.33 in f16
  return {static_cast<int32_t>(format), 0, out, in, data, bytes};
}

// Packed f32, or a vector where `out` is 1.
ih_weight floats(int64_t out, int64_t in) {
  const int64_t count = (out == 1 ? in : (out + 15) / 16 * 16 * in);
  float* data = static_cast<float*>(allocate(count * 4));
  for (int64_t i = 0; i < (count + 15) / 16 * 16; ++i) data[i] = static_cast<float>(i * 7919 % 1009) / 500.0f - 1.0f;
  return {out == 1 ? -1 : kF32, 0, out, in, data, (count * 4 + 63) / 64 * 64};
}

int64_t bits(double value) { return __builtin_bit_cast(int64_t, value); }

// A program without outputs beside its last value, in the flat form.
struct Flat {
  std::vector<int64_t> values, ops;
  int64_t ops_count = 0;
  std::vector<ih_weight> weights;

  // Appends an op with outputs of those widths; gives the first one's number.
  int64_t op(OpKind kind, const std::vector<int64_t>& inputs, const std::vector<int64_t>& used,
             const std::vector<int64_t>& widths, const std::vector<int64_t>& attributes, int64_t dtype = 0,
             int64_t group = 0) {
    const int64_t output = static_cast<int64_t>(values.size() / 4);
    for (const int64_t width : widths) values.insert(values.end(), {0, width, dtype, group});
    ops.insert(ops.end(),
               {static_cast<int64_t>(kind), static_cast<int64_t>(inputs.size()), static_cast<int64_t>(used.size()),
                static_cast<int64_t>(widths.size()), static_cast<int64_t>(attributes.size())});
    for (const auto* list : {&inputs, &used}) ops.insert(ops.end(), list->begin(), list->end());
    for (size_t i = 0; i < widths.size(); ++i) ops.push_back(output + static_cast<int64_t>(i));
    ops.insert(ops.end(), attributes.begin(), attributes.end());
    ++ops_count;
    return output;
  }
  int64_t weight(const ih_weight& w) {
    weights.push_back(w);
    return static_cast<int64_t>(weights.size()) - 1;
  }
  int64_t embed(int64_t width) {
    return op(OpKind::kEmbed, {}, {weight(floats(kVocab, width))}, {width}, {0, 0, bits(1.0)});
  }
  int64_t codes(int64_t x, int64_t width, int64_t powers) {
    constexpr int64_t kInt8 = 1, kGroup = 32;
    return op(OpKind::kQuantizeRows, {x}, {}, {width}, {kGroup, powers}, kInt8, kGroup);
  }
  int64_t kv_heads = 1;
  std::vector<int64_t> words(int64_t output) const {
    std::vector<int64_t> all = {inhouse::kMagic, inhouse::kFlatVersion, kVocab, kPositions, 1, 1};
    all.insert(all.end(), {0, kv_heads, kDim, kDim, 0, 1, 0, 0});
    all.insert(all.end(), {static_cast<int64_t>(values.size() / 4), ops_count, 1});
    for (const auto* list : {&values, &ops}) all.insert(all.end(), list->begin(), list->end());
    all.push_back(output);
    return all;
  }
};

// Counts the second of two equal steps of one sequence: the first one makes room.
void step(const char* isa, const Flat& flat, int64_t output, int64_t rows, int64_t context, int kv_type) {
  const std::vector<int64_t> words = flat.words(output);
  int32_t status = 0;
  ih_model* model = ih_model_create(words.data(), static_cast<int64_t>(words.size()), flat.weights.data(),
                                    static_cast<int64_t>(flat.weights.size()), isa, 1, kv_type, &status);
  if (model == nullptr) fail("a model");
  const int64_t blocks = (context + 15) / 16;
  if (ih_state_allocate(model, &blocks) != IH_OK) fail("its state");
  std::vector<uint8_t> block(static_cast<size_t>(ih_block_bytes(model, 0)));
  for (size_t i = 0; i < block.size(); ++i) block[i] = static_cast<uint8_t>(0x30 + i * 7919 % 13);  // small, any type
  std::vector<int32_t> table, tokens, positions;
  for (int32_t b = 0; b < blocks; ++b) {
    table.push_back(b);
    if (ih_write_blocks(model, 0, &b, 1, block.data()) != IH_OK) fail("a block");
  }
  for (int64_t i = 0; i < rows; ++i) {
    tokens.push_back(static_cast<int32_t>(i % kVocab));
    positions.push_back(static_cast<int32_t>(context - rows + i));
  }
  const std::vector<int32_t> zeros(static_cast<size_t>(rows), 0), lengths = {static_cast<int32_t>(context)};
  const int32_t* tables = table.data();
  const ih_step arrays = {rows,    1,       0,       tokens.data(), positions.data(), zeros.data(), lengths.data(),
                          nullptr, &tables, &blocks, zeros.data(),  zeros.data(),     zeros.data(), nullptr};
  ih_output out;
  if (ih_run(model, 0, &arrays, &out) != IH_OK) fail("a step");
  count([&] { return static_cast<int>(ih_run(model, 0, &arrays, &out)); });
  ih_model_destroy(model);
}

void linear(const char* isa, const std::vector<int64_t>& n) {
  const int64_t out = n[1], in = n[2], rows = n[4];
  const ih_weight w = coded(n[0], out, in, n[3]);
  std::vector<float> x(static_cast<size_t>(rows * in)), y(static_cast<size_t>(rows * out));
  for (size_t k = 0; k < x.size(); ++k) x[k] = static_cast<float>(static_cast<int>(k % 255) - 127);
  count([&] { return static_cast<int>(ih_linear(isa, &w, x.data(), rows, static_cast<int32_t>(n[5]), y.data())); });
}

void pairs(const char* isa, const std::vector<int64_t>& n) {
  Flat flat;
  const int64_t x = flat.embed(n[2]), w = flat.weight(coded(n[0], n[1], n[2], n[3]));
  step(isa, flat, flat.op(OpKind::kLinears, {x}, {w, -1}, {n[1]}, {1}), n[4], n[4], 1);
}

void gated(const char* isa, const std::vector<int64_t>& n) {
  Flat flat;
  const int64_t out = n[1], x = flat.embed(n[2]), codes = flat.codes(x, n[2], 1);
  const int64_t gate = flat.weight(coded(n[0], out, n[2], n[3])), up = flat.weight(coded(n[0], out, n[2], n[3]));
  const int64_t both = flat.op(OpKind::kLinears, {codes}, {gate, up, -1, -1}, {out, out}, {0});
  const int64_t y = flat.op(OpKind::kGlu, {both, both + 1}, {}, {out}, {0, bits(0.0), bits(0.0)});
  flat.codes(y, out, 1);
  step(isa, flat, x, n[4], n[4], 1);
}

void coded_linear(const char* isa, const std::vector<int64_t>& n) {
  Flat flat;
  const int64_t x = flat.embed(n[2]), codes = flat.codes(x, n[2], 1);
  const int64_t w = flat.weight(coded(n[0], n[1], n[2], n[3]));
  step(isa, flat, flat.op(OpKind::kLinears, {codes}, {w, -1}, {n[1]}, {0}), n[4], n[4], 1);
}

void attention(const char* isa, const std::vector<int64_t>& n) {
  Flat flat;
  const int64_t heads = n[3], kv = flat.kv_heads = n[4];
  const int64_t q = flat.embed(heads * kDim), k = flat.embed(kv * kDim), v = flat.embed(kv * kDim);
  const int64_t y = flat.op(OpKind::kAttention, {q, k, v}, {}, {heads * kDim},
                            {0, 0, heads, kv, kDim, kDim, bits(0.125), 0, 0, 0, 0, 0, 0, 0, 0, -1, 0, 0, 0});
  step(isa, flat, y, n[2], n[1], static_cast<int>(n[0]));
}

void norm(const char* isa, bool rms, const std::vector<int64_t>& n) {
  Flat flat;
  const int64_t x = flat.embed(n[0]), w = flat.weight(floats(1, n[0]));
  const int64_t y = rms ? flat.op(OpKind::kRmsNorm, {x}, {w}, {n[0]}, {bits(1e-5), 1, bits(0.0)})
                        : flat.op(OpKind::kLayerNorm, {x}, {w, -1}, {n[0]}, {bits(1e-5)});
  step(isa, flat, y, n[1], n[1], 1);
}

void embed(const char* isa, const std::vector<int64_t>& n) {
  Flat flat;
  step(isa, flat, flat.embed(n[0]), n[1], n[1], 1);
}

void quantize(const char* isa, const std::vector<int64_t>& n) {
  Flat flat;
  const int64_t x = flat.embed(n[0]);
  flat.codes(x, n[0], n[2]);
  step(isa, flat, x, n[1], n[1], 1);
}

}  // namespace

int main(int argc, char** argv) {
  steps = std::getenv("INHOUSE_STEPPED") != nullptr;
  if (steps && !stepped::prepare(argv)) std::fprintf(stderr, "addresses are shuffled: runs may differ a little\n");
  for (int i = 2; i < argc; ++i) {
    const std::string word = argv[i], what = word.substr(0, word.find(':'));
    std::vector<int64_t> n;
    for (size_t at = word.find(':'); at != std::string::npos; at = word.find(':', at + 1)) {
      n.push_back(std::atol(word.c_str() + at + 1));
    }
    n.resize(6);
    if (what == "linear") {
      linear(argv[1], n);
    } else if (what == "pairs") {
      pairs(argv[1], n);
    } else if (what == "coded") {
      coded_linear(argv[1], n);
    } else if (what == "gated") {
      gated(argv[1], n);
    } else if (what == "attention") {
      attention(argv[1], n);
    } else if (what == "rms" || what == "layer") {
      norm(argv[1], what == "rms", n);
    } else if (what == "embed") {
      embed(argv[1], n);
    } else if (what == "quantize") {
      quantize(argv[1], n);
    } else {
      fail("unknown call");
    }
  }
  return 0;
}
