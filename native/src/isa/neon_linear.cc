// The packed bodies at the level neon, apart from the others because they take long to compile.
// clang-format off: the bodies need the vocabulary.
#include "kernels.h"
#include "sparse.h"
#include "simd/neon.h"
#include "simd/neon_bytes.h"
#include "ops/linear-inl.h"
// clang-format on

namespace inhouse {

void add_linears_neon(Kernels& kernels) {
  kernels.linear_f32 = neon::linear_f32;
  kernels.linear_bf16 = neon::linear_bf16;
  kernels.linear_i8 = neon::linear_i8;
  kernels.unpack_row = neon::unpack_row;
  kernels.quantize_row = neon::quantize_row;
  kernels.quantize_tile = neon::quantize_tile;
  kernels.probe_dot = neon::probe_dot;
  kernels.probe_fma = neon::probe_fma;
  kernels.probe_read = neon::probe_read;
}

}  // namespace inhouse
