// What this CPU and this process may use: instruction sets, threads, the float environment. Knows no kernels.
#pragma once
#include <cstdint>

namespace inhouse {

bool cpu_has_avx2();    // with FMA and F16C
bool cpu_has_avx512();  // F, BW, VL, DQ and VNNI
bool cpu_has_vbmi2();   // VBMI2 besides, which expands bytes by a mask
bool cpu_has_bf16();    // AVX-512 BF16 besides: dot products of pairs
bool cpu_has_neon();    // with dot products

// CPUs of the affinity mask, lowered to the cgroup's quota (rounded up); at least 1.
int usable_cpus();

// Denormals are zero while this lives: on the calling thread, restored afterwards.
class FlushScope {
 public:
  FlushScope();
  ~FlushScope();
  FlushScope(const FlushScope&) = delete;
  FlushScope& operator=(const FlushScope&) = delete;

 private:
  uint64_t before_;
};

// One short pause of a spinning loop.
void cpu_pause();

}  // namespace inhouse
