// The op bodies at the level avx2: a thin frame, no code of its own.
// clang-format off: the bodies need the vocabulary.
#include "kernels.h"
#include "simd/avx2.h"
#include "ops/table-inl.h"
// clang-format on

namespace inhouse {
const Kernels* kernels_avx2() { return &avx2::kTable; }
}  // namespace inhouse
