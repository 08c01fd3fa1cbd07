// The row and attention bodies at the level avx2: a thin frame, no code of its own.
// clang-format off: the bodies need the vocabulary.
#include "kernels.h"
#include "kv_codes.h"
#include "simd/avx2.h"
#include "simd/avx2_bytes.h"
#include "ops/table-inl.h"
// clang-format on

namespace inhouse {

void add_linears_avx2(Kernels& kernels);  // avx2_linear.cc

const Kernels* kernels_avx2() {
  static const Kernels table = avx2::table(add_linears_avx2);
  return &table;
}

}  // namespace inhouse
