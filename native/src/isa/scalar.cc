// The op bodies at the level scalar: a thin frame, no code of its own.
#include "kernels.h"
#include "simd/scalar.h"
// The bodies, in order of use.
#include "ops/table-inl.h"

namespace inhouse {
const Kernels* kernels_scalar() { return &scalar::kTable; }
}  // namespace inhouse
