// The op bodies at the level neon: a thin frame, no code of its own.
// clang-format off: the bodies need the vocabulary.
#include "kernels.h"
#include "simd/neon.h"
#include "ops/table-inl.h"
// clang-format on

namespace inhouse {
const Kernels* kernels_neon() { return &neon::kTable; }
}  // namespace inhouse
