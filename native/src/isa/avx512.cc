// The op bodies at the level avx512: a thin frame, no code of its own.
// clang-format off: the bodies need the vocabulary.
#include "kernels.h"
#include "simd/avx512.h"
#include "ops/table-inl.h"
// clang-format on

namespace inhouse {
const Kernels* kernels_avx512() { return &avx512::kTable; }
}  // namespace inhouse
