// The packed bodies at the level scalar, apart from the others because they take long to compile.
// clang-format off: the bodies need the vocabulary.
#include "kernels.h"
#include "sparse.h"
#include "simd/scalar.h"
#include "simd/scalar_bytes.h"
#include "ops/linear-inl.h"
// clang-format on

namespace inhouse {

void add_linears_scalar(Kernels& kernels) {
  kernels.linear_f32 = scalar::linear_f32;
  kernels.linear_bf16 = scalar::linear_bf16;
  kernels.linear_i8 = scalar::linear_i8;
  kernels.unpack_row = scalar::unpack_row;
  kernels.quantize_row = scalar::quantize_row;
  kernels.quantize_tile = scalar::quantize_tile;
  kernels.probe_dot = scalar::probe_dot;
  kernels.probe_fma = scalar::probe_fma;
  kernels.probe_read = scalar::probe_read;
}

}  // namespace inhouse
