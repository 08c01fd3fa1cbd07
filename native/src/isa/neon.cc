// The op bodies at the level neon: a thin frame, no code of its own.
#include "kernels.h"
#include "simd/neon.h"
// The bodies, in order of use.
#include "ops/table-inl.h"

namespace inhouse {
const Kernels* kernels_neon() { return &neon::kTable; }
}  // namespace inhouse
