// The bodies of sparse and vector-coded weights at the level avx512: a thin frame, no code of its own.
// clang-format off: the bodies need the vocabulary.
#include "cpu.h"
#include "kernels.h"
#include "sparse.h"
#include "simd/avx512.h"
#include "simd/avx512_bytes.h"
#include "ops/packed-inl.h"
#include "simd/avx512_expand.h"
#include "ops/linear_codes-inl.h"
#include "ops/sparse-inl.h"
// clang-format on

namespace inhouse {

const SparseKernels& sparse_kernels_avx512() {
  static const SparseKernels kernels = cpu_has_vbmi2() ? avx512::sparse_table() : sparse_kernels_avx2();
  return kernels;
}

}  // namespace inhouse
