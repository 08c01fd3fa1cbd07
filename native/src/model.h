// A model ready to run: programs proven, buffers planned, state kept, weights guarded.
#pragma once
#include <memory>
#include <utility>
#include <vector>

#include "inhouse.h"
#include "linears.h"
#include "lora.h"
#include "moe.h"
#include "plan.h"
#include "program.h"
#include "relative.h"
#include "state.h"

namespace inhouse {

// Rows [begin, end) of the step that belong to `sequence`; every sequence with rows has one.
struct Span {
  int32_t sequence, begin, end;
};

// Rows [begin, begin + rows) of one sequence against one kv head: all units (kernels.h), or one.
struct Piece {
  int32_t sequence, begin, rows, kv_head;
  int32_t unit;         // -1: all, merged at once
  int32_t units;        // that the rows see
  int64_t partials;     // floats from the start of the partials to those of the first unit
  int64_t unit_floats;  // from one unit's partials to the next
};

// Working memory of attention, made once for the largest step.
struct AttentionMemory {
  int64_t scratch_floats = 0;  // for each thread
  int64_t partial_floats = 0;
  std::unique_ptr<float[]> scratch;
  float* partials = nullptr;  // mapped, so that only what is used takes memory
  std::vector<Span> spans;
  std::vector<Piece> pieces;

  AttentionMemory() = default;
  ~AttentionMemory();
  AttentionMemory(const AttentionMemory&) = delete;
  AttentionMemory& operator=(const AttentionMemory&) = delete;
};

struct ModelOptions {
  const char* isa;
  int threads;  // 0: default_threads()
  KvType kv_type;
};

// Floats that the threads of a gated feed-forward hold while it runs over that many rows (gated_step.cc).
int64_t gated_floats(int64_t width, int64_t rows, int64_t threads);

class Model {
 public:
  static Status create(const int64_t* flat, int64_t length, const ih_weight* weights, int64_t count,
                       const ModelOptions& options, std::unique_ptr<Model>* model);
  ~Model();
  Model(const Model&) = delete;
  Model& operator=(const Model&) = delete;

  // Rows of every axis of a step with so many tokens, sampled rows and sequences.
  Rows rows_of(int64_t tokens, int64_t sampled, int64_t sequences) const {
    return {{tokens, sampled, sequences, tokens * set_.routed.top_k}};
  }
  // Room for a step of that many rows. Throws std::bad_alloc.
  void reserve(const Rows& rows);
  // One step; outputs point into the arena until the next one. Throws std::bad_alloc.
  Status run(int32_t program, const ih_step& step, ih_output* outputs);

  // Nanoseconds of each op of a program since the last call; the first call begins to take them. A run of row-wise ops
  // counts for its first.
  Status times(int32_t program, int64_t* nanoseconds, int64_t count);

  Status set_adapter(int32_t slot, const ih_adapter_pair* pairs, int64_t count) {
    return adapters_.set(slot, pairs, count, weights_);
  }

  State& state() { return *state_; }
  int64_t bytes() const { return arena_->bytes() + state_->bytes() + static_cast<int64_t>(gated_.size() * 4); }

 private:
  friend class Runner;
  Model() = default;
  Status take_weights(const ih_weight* weights, int64_t count);
  Status guard_weights();
  void size_attention();
  void reserve_gated(const Rows& rows);
  bool damaged();

  ProgramSet set_;
  std::vector<Weight> weights_;
  std::vector<int64_t> guards_;
  std::unique_ptr<Arena> arena_;
  std::unique_ptr<State> state_;
  const Kernels* kernels_ = nullptr;
  int threads_ = 1;
  int64_t kv_heads_ = 0;  // most of any group
  AttentionMemory attention_;
  std::vector<std::vector<int64_t>> times_;  // [program][op] nanoseconds; empty: not taken
  std::vector<LinearTask> linear_tasks_;     // of the op that runs
  std::vector<float> gated_;                 // [threads][2][rows][outputs] between the ops of gated_step.cc
  std::vector<Relative> relative_;           // made before the first step, so that none allocates
  RoutedRows routed_;
  Adapters adapters_;
  std::vector<std::pair<int32_t, const AdapterPair*>> adapter_pairs_;  // of the op that runs
  bool damaged_ = false;
};

}  // namespace inhouse
