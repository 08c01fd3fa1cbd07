#include "cpu.h"

#include <sched.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>

#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <asm/hwcap.h>
#include <sys/auxv.h>
#endif

namespace inhouse {

#if defined(__x86_64__)

bool cpu_has_avx2() {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
}
bool cpu_has_avx512() {
  return cpu_has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
         __builtin_cpu_supports("avx512vnni");
}
bool cpu_has_vbmi2() { return cpu_has_avx512() && __builtin_cpu_supports("avx512vbmi2"); }
bool cpu_has_bf16() { return cpu_has_avx512() && __builtin_cpu_supports("avx512bf16"); }
bool cpu_has_neon() { return false; }

FlushScope::FlushScope() : before_(_mm_getcsr()) { _mm_setcsr(static_cast<unsigned>(before_) | 0x8040u); }
FlushScope::~FlushScope() { _mm_setcsr(static_cast<unsigned>(before_)); }
void cpu_pause() { _mm_pause(); }

#elif defined(__aarch64__)

bool cpu_has_avx2() { return false; }
bool cpu_has_avx512() { return false; }
bool cpu_has_vbmi2() { return false; }
bool cpu_has_bf16() { return false; }
bool cpu_has_neon() { return (getauxval(AT_HWCAP) & HWCAP_ASIMDDP) != 0; }

FlushScope::FlushScope() {
  asm volatile("mrs %0, fpcr" : "=r"(before_));
  const uint64_t flushed = before_ | (uint64_t{1} << 24);
  asm volatile("msr fpcr, %0" ::"r"(flushed));
}
FlushScope::~FlushScope() { asm volatile("msr fpcr, %0" ::"r"(before_)); }
void cpu_pause() { asm volatile("yield"); }

#else

bool cpu_has_avx2() { return false; }
bool cpu_has_avx512() { return false; }
bool cpu_has_vbmi2() { return false; }
bool cpu_has_bf16() { return false; }
bool cpu_has_neon() { return false; }
FlushScope::FlushScope() : before_(0) {}
FlushScope::~FlushScope() = default;
void cpu_pause() {}

#endif

namespace {

int affinity_cpus() {
  cpu_set_t set;
  CPU_ZERO(&set);
  if (sched_getaffinity(0, sizeof(set), &set) != 0) return 1;
  const int count = CPU_COUNT(&set);
  return count > 0 ? count : 1;
}

// CPUs that a "quota period" line (cgroup v2's cpu.max) grants, rounded up; 0 where it grants all or cannot be read.
int quota_of_line(const char* line) {
  long long quota = 0, period = 0;
  if (std::sscanf(line, "%lld %lld", &quota, &period) != 2 || quota <= 0 || period <= 0) return 0;
  return static_cast<int>((quota + period - 1) / period);
}

bool first_line(const char* path, char* line, int size) {
  std::FILE* file = std::fopen(path, "r");
  if (file == nullptr) return false;
  const bool ok = std::fgets(line, size, file) != nullptr;
  std::fclose(file);
  if (ok) line[std::strcspn(line, "\n")] = 0;
  return ok;
}

// The process's own cgroup and every one above it may hold a quota: the lowest counts.
int quota_v2() {
  char line[512];
  if (!first_line("/proc/self/cgroup", line, sizeof(line)) || std::strncmp(line, "0::", 3) != 0) return 0;
  char path[600];
  int lowest = 0;
  for (char* part = line + 3; *part != 0;) {
    std::snprintf(path, sizeof(path), "/sys/fs/cgroup%s/cpu.max", part);
    char value[128];
    const int quota = first_line(path, value, sizeof(value)) ? quota_of_line(value) : 0;
    if (quota > 0 && (lowest == 0 || quota < lowest)) lowest = quota;
    char* slash = std::strrchr(part, '/');
    if (slash == nullptr) break;
    *slash = 0;
  }
  char value[128];
  const int top = first_line("/sys/fs/cgroup/cpu.max", value, sizeof(value)) ? quota_of_line(value) : 0;
  return top > 0 && (lowest == 0 || top < lowest) ? top : lowest;
}

int quota_v1() {
  char quota[64], period[64], line[160];
  if (!first_line("/sys/fs/cgroup/cpu/cpu.cfs_quota_us", quota, sizeof(quota))) return 0;
  if (!first_line("/sys/fs/cgroup/cpu/cpu.cfs_period_us", period, sizeof(period))) return 0;
  std::snprintf(line, sizeof(line), "%s %s", quota, period);
  return quota_of_line(line);
}

}  // namespace

int usable_cpus() {
  const int cpus = affinity_cpus();
  int quota = quota_v2();
  if (quota == 0) quota = quota_v1();
  return quota > 0 && quota < cpus ? quota : cpus;
}

}  // namespace inhouse
