// Runs one program over one step: an op after the other, a barrier between them.
#pragma once
#include <algorithm>
#include <cstdint>

#include "attention.h"
#include "inhouse.h"
#include "model.h"
#include "threads.h"

namespace inhouse {

constexpr int64_t kTileElements = 16384;  // row-wise elements that are worth a tile of their own
constexpr int64_t kTileProducts = 65536;  // multiply-adds of a linear that are
constexpr int64_t kTilesPerThread = 4;

class Runner {
 public:
  Runner(Model& model, int32_t program, const ih_step& step, const Rows& rows);
  void run();

 private:
  void run_op(const Op& op);
  void embed(const Op& op);
  void linears(const Op& op);
  void rotary(const Op& op);
  void select_rows(const Op& op);
  void select_columns(const Op& op);
  void pool(const Op& op);
  void pool_one(const Op& op, const Span& span);

  // rows_step.cc
  void row_ops(size_t begin, size_t end);
  void row_op(const Op& op, int64_t r);
  void glu(const Op& op, const float* gate, const float* up, int64_t width, float* y);

  // gated_step.cc: ops i to i + 2 as one
  bool runs_gated(size_t i) const;
  void gated(const Op& op, const Op& glu_op, const Op& quantize);

  // train_step.cc
  void embed_train(const Op& op);

  // moe_step.cc
  void route(const Op& op);
  void sort_rows(const RouteShape& shape, int32_t routing);
  void dispatch(const Op& op);
  void expert_linears(const Op& op);
  void one_expert(const Op& op, int64_t output, int64_t expert, int64_t first_tile, int64_t last_tile);
  void combine(const Op& op);
  void scale_rows(const Op& op);
  void concat(const Op& op);
  void head_linears(const Op& op);

  // lora.cc
  void adapt(const Op& op);
  void adapt_rows(const Op& op, int32_t slot, int64_t begin, int64_t rows);
  int32_t sequence_of(Axis axis, int64_t r) const;
  const float* floats_of(int32_t v, int64_t begin, int64_t rows);

  // attention_step.cc
  void attention(const Op& op);
  void write_cross(const Op& op);
  void find_spans();
  void store_kv(const Op& op, const AttentionShape& shape);
  void store_rows(const Op& op, const AttentionShape& shape, int32_t k, int32_t v);
  void code_blocks(const Op& op, const AttentionShape& shape);
  Keys keys_of(const Op& op, int32_t sequence) const;
  void cut(const Op& op, const AttentionShape& shape);
  void split();
  AttentionTask task_of(const Op& op, const AttentionShape& shape, const Piece& piece);

  const Value& value(int32_t v) const { return program_.values[v]; }
  int64_t rows_of(int32_t v) const { return rows_[value(v).axis]; }
  float* floats(int32_t v) { return reinterpret_cast<float*>(model_.arena_->at(index_, v)); }
  float* row(int32_t v, int64_t r) { return floats(v) + r * value(v).width; }
  QuantRows codes(int32_t v);
  const Weight* weight(const Op& op, size_t i) const {
    return i < op.weights.size() && op.weights[i] >= 0 ? &model_.weights_[op.weights[i]] : nullptr;
  }
  const float* vector(const Op& op, size_t i) const {
    const Weight* w = weight(op, i);
    return w == nullptr ? nullptr : reinterpret_cast<const float*>(w->data);
  }
  // f(r) for each row r of `rows`, in tiles worth a thread's while; `cost` is about the elements of a row.
  template <class F>
  void each_row(int64_t rows, int64_t cost, F f) {
    const int64_t chunk = std::max<int64_t>(1, kTileElements / std::max<int64_t>(1, cost));
    pool_.run((rows + chunk - 1) / chunk, [&](int64_t tile, int) {
      const int64_t end = std::min(rows, (tile + 1) * chunk);
      for (int64_t r = tile * chunk; r < end; ++r) f(r);
    });
  }

  Model& model_;
  const int32_t index_;
  const Program& program_;
  const ih_step& step_;
  const Rows rows_;
  const Kernels& kernels_;
  Pool::Step pool_;
};

}  // namespace inhouse
