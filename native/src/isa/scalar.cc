// The row and attention bodies at the level scalar: a thin frame, no code of its own.
// clang-format off: the bodies need the vocabulary.
#include "kernels.h"
#include "kv_codes.h"
#include "simd/scalar.h"
#include "simd/scalar_bytes.h"
#include "ops/table-inl.h"
// clang-format on

namespace inhouse {

void add_linears_scalar(Kernels& kernels);  // scalar_linear.cc

const Kernels* kernels_scalar() {
  static const Kernels table = scalar::table(add_linears_scalar);
  return &table;
}

}  // namespace inhouse
