// The packed bodies at the level avx2, apart from the others because they take long to compile.
// clang-format off: the bodies need the vocabulary.
#include "kernels.h"
#include "sparse.h"
#include "simd/avx2.h"
#include "simd/avx2_bytes.h"
#include "ops/linear-inl.h"
// clang-format on

namespace inhouse {

void add_linears_avx2(Kernels& kernels) {
  kernels.linear_f32 = avx2::linear_f32;
  kernels.linear_bf16 = avx2::linear_bf16;
  kernels.linear_i8 = avx2::linear_i8;
  kernels.unpack_row = avx2::unpack_row;
  kernels.quantize_row = avx2::quantize_row;
  kernels.quantize_tile = avx2::quantize_tile;
  kernels.probe_dot = avx2::probe_dot;
  kernels.probe_fma = avx2::probe_fma;
  kernels.probe_read = avx2::probe_read;
}

}  // namespace inhouse
