// The op bodies at the level avx2: a thin frame, no code of its own.
#include "kernels.h"
#include "simd/avx2.h"
// The bodies, in order of use.
#include "ops/table-inl.h"

namespace inhouse {
const Kernels* kernels_avx2() { return &avx2::kTable; }
}  // namespace inhouse
