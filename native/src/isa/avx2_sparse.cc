// The bodies of sparse and vector-coded weights at the level avx2: a thin frame, no code of its own.
// clang-format off: the bodies need the vocabulary.
#include "kernels.h"
#include "sparse.h"
#include "simd/avx2.h"
#include "simd/avx2_bytes.h"
#include "ops/packed-inl.h"
#include "simd/expand_table.h"
#include "simd/avx2_expand.h"
#include "ops/linear_codes-inl.h"
#include "ops/sparse-inl.h"
// clang-format on

namespace inhouse {

const SparseKernels& sparse_kernels_avx2() {
  static const SparseKernels kernels = avx2::sparse_table();
  return kernels;
}

}  // namespace inhouse
