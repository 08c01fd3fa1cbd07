// Where the values of a program live: each gets a slot, and slots are shared by values that never live together.
#pragma once
#include <cstdint>
#include <memory>
#include <vector>

#include "program.h"

namespace inhouse {

// A run of memory for values of one axis: `row_bytes` for each row.
struct Slot {
  Axis axis;
  int64_t row_bytes;
};

struct Plan {
  std::vector<Slot> slots;
  std::vector<int32_t> slot_of;  // [values], -1 for a value that nothing makes
  std::vector<size_t> run_end;   // [ops] the op behind the run that starts here: row-wise ops run as one
  std::vector<bool> gated;       // [ops] whether this one and the next two may run as one (gated_step.cc)
};

// Whether each row of the outputs depends on the same row of the inputs alone.
bool row_wise(OpKind kind);

// Greedy by liveness; element-wise ops write over an input that dies with them. Outputs live to the end.
Plan plan_program(const Program& program);

// Bytes of one row of a value: f32, or codes, scales and sums.
int64_t row_bytes(const Value& value);

// Rows of each axis in a step.
struct Rows {
  int64_t of[static_cast<int>(Axis::kCount)];
  int64_t operator[](Axis axis) const { return of[static_cast<int>(axis)]; }
};

// The memory of all plans of a model (they never run at the same time). Grows, never shrinks.
class Arena {
 public:
  explicit Arena(std::vector<Plan> plans) : plans_(std::move(plans)) {}

  // Makes room for that many rows; only a larger step than any before allocates. Throws std::bad_alloc.
  void reserve(const Rows& rows);
  // Start of the value's memory, laid out for capacity(axis) rows.
  uint8_t* at(int program, int32_t value) { return memory_.get() + offsets_[program][plans_[program].slot_of[value]]; }
  const Plan& plan(int program) const { return plans_[static_cast<size_t>(program)]; }
  int64_t capacity(Axis axis) const { return rows_[axis]; }
  int64_t bytes() const { return bytes_; }

 private:
  struct Free {
    void operator()(uint8_t* p) const;
  };
  std::vector<Plan> plans_;
  std::vector<std::vector<int64_t>> offsets_;  // [program][slot]
  std::unique_ptr<uint8_t, Free> memory_;
  int64_t bytes_ = 0;
  Rows rows_ = {};
};

}  // namespace inhouse
