// The packed bodies at the level avx512, apart from the others because they take long to compile.
// clang-format off: the bodies need the vocabulary.
#include "kernels.h"
#include "sparse.h"
#include "simd/avx512.h"
#include "simd/avx512_bytes.h"
#include "ops/linear-inl.h"
// clang-format on

namespace inhouse {

void add_linears_avx512(Kernels& kernels) {
  kernels.linear_f32 = avx512::linear_f32;
  kernels.linear_bf16 = avx512::linear_bf16;
  kernels.linear_i8 = avx512::linear_i8;
  kernels.unpack_row = avx512::unpack_row;
  kernels.quantize_row = avx512::quantize_row;
  kernels.quantize_tile = avx512::quantize_tile;
  kernels.probe_dot = avx512::probe_dot;
  kernels.probe_fma = avx512::probe_fma;
  kernels.probe_read = avx512::probe_read;
}

}  // namespace inhouse
