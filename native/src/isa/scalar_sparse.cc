// The bodies of sparse and vector-coded weights at the level scalar: a thin frame, no code of its own.
// clang-format off: the bodies need the vocabulary.
#include "kernels.h"
#include "sparse.h"
#include "simd/scalar.h"
#include "simd/scalar_bytes.h"
#include "ops/packed-inl.h"
#include "simd/scalar_expand.h"
#include "ops/linear_codes-inl.h"
#include "ops/sparse-inl.h"
// clang-format on

namespace inhouse {

const SparseKernels& sparse_kernels_scalar() {
  static const SparseKernels kernels = scalar::sparse_table();
  return kernels;
}

}  // namespace inhouse
