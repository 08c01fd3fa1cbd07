// The row and attention bodies at the level avx512: a thin frame, no code of its own.
// clang-format off: the bodies need the vocabulary.
#include "cpu.h"
#include "isa/avx512_bf16.h"
#include "kernels.h"
#include "kv_codes.h"
#include "simd/avx512.h"
#include "simd/avx512_bytes.h"
#include "ops/table-inl.h"
// clang-format on

namespace inhouse {

void add_linears_avx512(Kernels& kernels);  // avx512_linear.cc

const Kernels* kernels_avx512_plain() {
  static const Kernels table = avx512::table(add_linears_avx512);
  return &table;
}

const Kernels* kernels_avx512() {
  static const Kernels table = [] {
    Kernels kernels = *kernels_avx512_plain();
    if (cpu_has_bf16()) add_bf16_avx512(kernels);
    return kernels;
  }();
  return &table;
}

}  // namespace inhouse
