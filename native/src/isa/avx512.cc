// The op bodies at the level avx512: a thin frame, no code of its own.
#include "kernels.h"
#include "simd/avx512.h"
// The bodies, in order of use.
#include "ops/table-inl.h"

namespace inhouse {
const Kernels* kernels_avx512() { return &avx512::kTable; }
}  // namespace inhouse
