// The bodies of sparse and vector-coded weights at the level neon: a thin frame, no code of its own.
// clang-format off: the bodies need the vocabulary.
#include "kernels.h"
#include "sparse.h"
#include "simd/neon.h"
#include "simd/neon_bytes.h"
#include "ops/packed-inl.h"
#include "simd/expand_table.h"
#include "simd/neon_expand.h"
#include "ops/linear_codes-inl.h"
#include "ops/sparse-inl.h"
// clang-format on

namespace inhouse {

const SparseKernels& sparse_kernels_neon() {
  static const SparseKernels kernels = neon::sparse_table();
  return kernels;
}

}  // namespace inhouse
