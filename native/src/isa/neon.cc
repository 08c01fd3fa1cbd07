// The row and attention bodies at the level neon: a thin frame, no code of its own.
// clang-format off: the bodies need the vocabulary.
#include "kernels.h"
#include "kv_codes.h"
#include "simd/neon.h"
#include "simd/neon_bytes.h"
#include "ops/table-inl.h"
// clang-format on

namespace inhouse {

void add_linears_neon(Kernels& kernels);  // neon_linear.cc

const Kernels* kernels_neon() {
  static const Kernels table = neon::table(add_linears_neon);
  return &table;
}

}  // namespace inhouse
