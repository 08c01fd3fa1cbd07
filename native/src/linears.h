// The matrices of one linears op as a single job for the pool. Knows how to cut it; knows no programs.
#pragma once
#include <cstddef>
#include <cstdint>

#include "kernels.h"
#include "threads.h"

namespace inhouse {

// One matrix of the op: y [rows][w->out] = x times w, plus a bias or null.
struct LinearTask {
  const Weight* w;
  const float* bias;
  float* y;
};

// What all of them multiply: f32 [rows][width], or quantised rows.
struct LinearInput {
  int64_t rows, width;
  const float* x;           // null where quantised
  const QuantRows* quants;  // null where not
  bool narrow;              // bf16 weights, floats rounded to bf16
};

void run_linears(Pool::Step& pool, const Kernels& kernels, const LinearInput& in, const LinearTask* tasks,
                 size_t count);

}  // namespace inhouse
