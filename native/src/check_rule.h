// What the shape rules of ops are written in (check.cc).
#pragma once
#include <cstddef>
#include <cstdint>
#include <vector>

#include "program.h"

namespace inhouse {

// What one op's rule sees; the first unmet need is kept.
class Rule {
 public:
  Rule(const ProgramSet& set, const Program& program, const Op& op, const std::vector<Weight>& weights)
      : set_(set), program_(program), op_(op), weights_(weights) {}

  void need(bool condition, const char* what) {
    if (!condition && fault_ == nullptr) fault_ = what;
  }
  const char* fault() const { return fault_; }

  const Op& op() const { return op_; }
  const ProgramSet& set() const { return set_; }
  const Value& value(int32_t v) const { return program_.values[v]; }
  const Value& in(int i) const { return program_.values[op_.inputs[i]]; }
  const Value& out(int i) const { return program_.values[op_.outputs[i]]; }
  const Weight* weight(size_t i) const {
    return i < op_.weights.size() && op_.weights[i] >= 0 ? &weights_[op_.weights[i]] : nullptr;
  }
  bool arity(size_t inputs, size_t weights_low, size_t weights_high, size_t outputs) {
    need(op_.inputs.size() == inputs, "wrong number of inputs");
    need(op_.weights.size() >= weights_low && op_.weights.size() <= weights_high, "wrong number of weights");
    need(op_.outputs.size() == outputs, "wrong number of outputs");
    return fault_ == nullptr;
  }
  void floats() {
    for (int32_t v : op_.inputs) need(program_.values[v].dtype == DType::kF32, "inputs must be f32");
    for (int32_t v : op_.outputs) need(program_.values[v].dtype == DType::kF32, "outputs must be f32");
  }
  void alike(const Value& a, const Value& b) { need(a.axis == b.axis && a.width == b.width, "values differ in shape"); }
  void vector(size_t i, int64_t length, bool optional) {
    const Weight* w = weight(i);
    if (w == nullptr) return need(optional, "a vector is missing");
    need(w->format < 0 && w->out == 1 && w->in == length, "a vector has the wrong length");
  }
  void integer(int i, int64_t low, int64_t high) {
    need(op_.integer(i) >= low && op_.integer(i) <= high, "an attribute is out of range");
  }

 private:
  const ProgramSet& set_;
  const Program& program_;
  const Op& op_;
  const std::vector<Weight>& weights_;
  const char* fault_ = nullptr;
};

}  // namespace inhouse
