// The op bodies at the level scalar: a thin frame, no code of its own.
// clang-format off: the bodies need the vocabulary.
#include "kernels.h"
#include "simd/scalar.h"
#include "ops/table-inl.h"
// clang-format on

namespace inhouse {
const Kernels* kernels_scalar() { return &scalar::kTable; }
}  // namespace inhouse
