// A small decoder in the flat form, with its weights: what runtime/native_flat.py would write.
#pragma once
#include <cstdlib>
#include <cstring>
#include <memory>
#include <vector>

#include "check.h"
#include "formats.h"
#include "inhouse.h"
#include "program.h"

namespace test {

using inhouse::OpKind;

class Decoder {
 public:
  static constexpr int64_t kVocab = 29, kContext = 700, kWidth = 32, kHeads = 4, kKv = 2, kDim = 8, kFfn = 64;
  static constexpr int64_t kExperts = 6, kTopK = 3;

  Decoder() {
    const int64_t table = matrix(kVocab, kWidth), norm = vector(kWidth), frequencies = vector(kDim / 2);
    const int64_t x = embed(table);
    const int64_t angles = op(OpKind::kRotary, {}, {frequencies}, {kDim}, {bits(1.0), 0});
    const int64_t h = op(OpKind::kRmsNorm, {x}, {norm}, {kWidth}, {bits(1e-5), 1, bits(0.0)});
    const int64_t q = op(OpKind::kLinears, {h},
                         {matrix(kHeads * kDim, kWidth), matrix(kKv * kDim, kWidth), matrix(kKv * kDim, kWidth), -1,
                          vector(kKv * kDim), -1},
                         {kHeads * kDim, kKv * kDim, kKv * kDim}, {0});
    const int64_t turned = op(OpKind::kRope, {q, angles}, {}, {kHeads * kDim}, {kDim, 0});
    const int64_t key = op(OpKind::kRope, {q + 1, angles}, {}, {kKv * kDim}, {kDim, 1});
    const int64_t a = op(OpKind::kAttention, {turned, key, q + 2}, {-1, vector(kHeads)}, {kHeads * kDim},
                         {0, 0, kHeads, kKv, kDim, kDim, bits(0.35), bits(3.0), 0, 0, 0, 0, 0, 0, 0, -1, 0, 0, 0});
    const int64_t o = op(OpKind::kLinears, {a}, {matrix(kWidth, kHeads * kDim), -1}, {kWidth}, {0});
    const int64_t y = op(OpKind::kAdd, {x, o}, {}, {kWidth}, {});
    const int64_t gate = op(OpKind::kLinears, {quantized(y, kWidth)},
                            {codes("q4_0", kFfn, kWidth), codes("q8_0", kFfn, kWidth), -1, -1}, {kFfn, kFfn}, {0});
    const int64_t f = op(OpKind::kGlu, {gate, gate + 1}, {}, {kFfn}, {0, bits(0.0), bits(0.0)});
    const int64_t down = op(OpKind::kLinears, {quantized(f, kFfn)}, {codes("q8_0", kWidth, kFfn), -1}, {kWidth}, {0});
    const int64_t mixed = mixture(op(OpKind::kAdd, {y, down}, {}, {kWidth}, {}));
    const int64_t z = op(OpKind::kLayerNorm, {mixed}, {norm, -1}, {kWidth}, {bits(1e-5)});
    const int64_t s = op(OpKind::kSelectRows, {z}, {}, {kWidth}, {}, 1);
    const int64_t logits = op(OpKind::kLinears, {s}, {table, -1}, {kVocab}, {0}, 1);
    const int64_t pooled = op(OpKind::kPool, {z}, {}, {kWidth}, {1, 1}, 2);
    outputs_ = {logits, pooled};
  }

  std::vector<int64_t> flat() const {
    std::vector<int64_t> f = {inhouse::kMagic, inhouse::kFlatVersion, kVocab, kContext, 1, 1};
    f.insert(f.end(), {0, kKv, kDim, kDim, 0, 1, 0, 0});
    f.insert(f.end(), {static_cast<int64_t>(values_.size() / 4), ops_count_, 2});
    f.insert(f.end(), values_.begin(), values_.end());
    f.insert(f.end(), ops_.begin(), ops_.end());
    f.insert(f.end(), outputs_.begin(), outputs_.end());
    return f;
  }
  const std::vector<ih_weight>& weights() const { return weights_; }
  // The weights that `linears` ops multiply with: what an adapter may stand beside.
  const std::vector<int64_t>& linears() const { return linears_; }

 private:
  struct Free {
    void operator()(void* p) const { std::free(p); }
  };

  static int64_t bits(double v) { return __builtin_bit_cast(int64_t, v); }

  int64_t add_weight(int32_t format, int64_t out, int64_t in, int64_t floats) {
    const size_t bytes = static_cast<size_t>((floats * 4 + 63) / 64 * 64);
    memory_.emplace_back(std::aligned_alloc(64, bytes));
    const std::vector<float> values = noise(static_cast<uint32_t>(weights_.size()), bytes / 4, 0.3f);
    std::copy(values.begin(), values.end(), static_cast<float*>(memory_.back().get()));
    weights_.push_back({format, 0, out, in, memory_.back().get(), static_cast<int64_t>(bytes)});
    return static_cast<int64_t>(weights_.size()) - 1;
  }
  int64_t vector(int64_t n) { return add_weight(-1, 1, n, n); }
  int64_t matrix(int64_t out, int64_t in) {
    return add_weight(0, out, in, inhouse::packed_bytes(inhouse::kFormats[0], out, in) / 4);
  }
  // A matrix of codes; those that follow each other in a program then meet int8 activations.
  int64_t codes(const char* format, int64_t out, int64_t in) {
    int32_t id = 0;
    while (std::strcmp(inhouse::kFormats[id].name, format) != 0) ++id;
    const int64_t bytes = inhouse::packed_bytes(inhouse::kFormats[id], out, in);
    memory_.emplace_back(std::aligned_alloc(64, static_cast<size_t>((bytes + 63) / 64 * 64)));
    const ih_weight w = {id, 0, out, in, memory_.back().get(), bytes};
    const std::vector<float> values =
        noise(static_cast<uint32_t>(weights_.size()), static_cast<size_t>(out * in), 0.3f);
    if (ih_quantize_tiles(nullptr, &w, values.data()) != IH_OK) std::abort();
    weights_.push_back(w);
    return static_cast<int64_t>(weights_.size()) - 1;
  }
  int64_t quantized(int64_t x, int64_t width) {
    const int64_t y = op(OpKind::kQuantizeRows, {x}, {}, {width}, {32, 1});
    values_[static_cast<size_t>(4 * y + 2)] = 1;   // int8
    values_[static_cast<size_t>(4 * y + 3)] = 32;  // a scale for so many
    return y;
  }
  // A mixture of experts with a shared matrix by heads, gated; gives x plus both.
  int64_t mixture(int64_t x) {
    const int64_t scores = op(OpKind::kLinears, {x}, {matrix(kExperts, kWidth), -1}, {kExperts}, {0});
    const int64_t routing =
        op(OpKind::kRoute, {scores}, {vector(kExperts)}, {2 * kTopK}, {kTopK, 1, 1, bits(1.5), 3, 2, 1, bits(0.0)});
    const int64_t sent = op(OpKind::kDispatch, {x, routing}, {}, {kWidth}, {}, 3);
    const int64_t rows = op(OpKind::kLinears, {sent}, {matrix(kWidth, kWidth), -1}, {kWidth}, {0}, 3);
    const int64_t inner =
        op(OpKind::kExpertLinears, {rows, routing}, experts({kFfn, kFfn}, kWidth), {kFfn, kFfn}, {kExperts}, 3);
    const int64_t gated = op(OpKind::kGlu, {inner, inner + 1}, {}, {kFfn}, {4, bits(1.0), bits(1.0)}, 3);
    const int64_t outer =
        op(OpKind::kExpertLinears, {gated, routing}, experts({kWidth}, kFfn), {kWidth}, {kExperts}, 3);
    const int64_t y = op(OpKind::kCombine, {outer, routing}, {}, {kWidth}, {});
    const int64_t heads = op(OpKind::kHeadLinears, {x}, {matrix(kWidth, kWidth / 2)}, {kWidth}, {2});
    const int64_t both = op(OpKind::kConcat, {y, heads}, {}, {2 * kWidth}, {2});
    const int64_t narrow = op(OpKind::kLinears, {both}, {matrix(kWidth, 2 * kWidth), -1}, {kWidth}, {0});
    const int64_t gate = op(OpKind::kLinears, {x}, {matrix(1, kWidth), -1}, {1}, {0});
    return op(OpKind::kAdd, {x, op(OpKind::kScaleRows, {narrow, gate}, {}, {kWidth}, {})}, {}, {kWidth}, {});
  }
  // A matrix [out, in] for each output and expert, then a bias for each.
  std::vector<int64_t> experts(std::vector<int64_t> outs, int64_t in) {
    std::vector<int64_t> names;
    for (int64_t out : outs) {
      for (int64_t e = 0; e < kExperts; ++e) names.push_back(matrix(out, in));
    }
    for (int64_t out : outs) {
      for (int64_t e = 0; e < kExperts; ++e) names.push_back(vector(out));
    }
    return names;
  }
  int64_t embed(int64_t table) { return op(OpKind::kEmbed, {}, {table}, {kWidth}, {0, 0, bits(1.0)}); }

  // Appends an op with outputs of those widths on one axis; gives its first output.
  int64_t op(OpKind kind, std::vector<int64_t> inputs, std::vector<int64_t> weights, std::vector<int64_t> widths,
             std::vector<int64_t> attrs, int64_t axis = 0) {
    const int64_t first = static_cast<int64_t>(values_.size() / 4);
    if (kind == OpKind::kLinears) linears_.insert(linears_.end(), weights.begin(), weights.begin() + widths.size());
    ops_.insert(ops_.end(),
                {static_cast<int64_t>(kind), static_cast<int64_t>(inputs.size()), static_cast<int64_t>(weights.size()),
                 static_cast<int64_t>(widths.size()), static_cast<int64_t>(attrs.size())});
    ops_.insert(ops_.end(), inputs.begin(), inputs.end());
    ops_.insert(ops_.end(), weights.begin(), weights.end());
    for (size_t i = 0; i < widths.size(); ++i) {
      ops_.push_back(first + static_cast<int64_t>(i));
      values_.insert(values_.end(), {axis, widths[i], 0, 0});
    }
    ops_.insert(ops_.end(), attrs.begin(), attrs.end());
    ++ops_count_;
    return first;
  }

  std::vector<int64_t> values_, ops_, outputs_, linears_;
  int64_t ops_count_ = 0;
  std::vector<ih_weight> weights_;
  std::vector<std::unique_ptr<void, Free>> memory_;
};

// A model on those weights, which it borrows.
struct Model {
  Model(const std::vector<int64_t>& flat, const std::vector<ih_weight>& weights, int threads, const char* isa = nullptr)
      : handle(ih_model_create(flat.data(), static_cast<int64_t>(flat.size()), weights.data(),
                               static_cast<int64_t>(weights.size()), isa, threads, 1, &status)) {}
  ~Model() { ih_model_destroy(handle); }
  Model(const Model&) = delete;
  int32_t status = 0;
  ih_model* handle;
};

// A step of one sequence: tokens at [first, first + rows), blocks in ascending order, all rows sampled.
class OneSequence {
 public:
  OneSequence(int32_t first, int32_t rows) {
    for (int32_t i = 0; i < rows; ++i) {
      tokens_.push_back((first + i) * 7 % static_cast<int32_t>(Decoder::kVocab));
      positions_.push_back(first + i);
      sampled_.push_back(i);
    }
    owners_.assign(static_cast<size_t>(rows), 0);
    lengths_ = {first + rows};
    for (int32_t b = 0; b * 16 < first + rows; ++b) table_.push_back(b);
    tables_ = {table_.data()};
    widths_ = {static_cast<int64_t>(table_.size())};
    zeros_.assign(static_cast<size_t>(rows), 0);
  }
  ih_step step() const {
    return {static_cast<int64_t>(tokens_.size()),
            1,
            static_cast<int64_t>(sampled_.size()),
            tokens_.data(),
            positions_.data(),
            owners_.data(),
            lengths_.data(),
            sampled_.data(),
            tables_.data(),
            widths_.data(),
            zeros_.data(),
            zeros_.data(),
            zeros_.data(),
            nullptr};
  }

 private:
  std::vector<int32_t> tokens_, positions_, owners_, lengths_, sampled_, table_, zeros_;
  std::vector<const int32_t*> tables_;
  std::vector<int64_t> widths_;
};

}  // namespace test
