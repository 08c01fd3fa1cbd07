#include "dispatch.h"

#include <cstdlib>
#include <cstring>

#include "cpu.h"

namespace inhouse {

namespace {

struct Level {
  const char* name;
  const Kernels* (*kernels)();
  bool (*supported)();
};

bool always() { return true; }

// Lowest first.
const Level kLevels[] = {
    {"scalar", kernels_scalar, always},
#if defined(INHOUSE_SCALAR_ONLY)
#elif defined(__x86_64__)
    {"avx2", kernels_avx2, cpu_has_avx2},
    {"avx512", kernels_avx512, cpu_has_avx512},
#elif defined(__aarch64__)
    {"neon", kernels_neon, cpu_has_neon},
#endif
};

const char* const kNames[] = {"scalar", "avx2", "avx512", "neon"};

std::string supported_names() {
  std::string names;
  for (const Level& level : kLevels) {
    if (level.supported()) names += (names.empty() ? "" : ", ") + std::string(level.name);
  }
  return names;
}

}  // namespace

Status choose_kernels(const char* wanted, const Kernels** kernels) {
  if (wanted == nullptr || *wanted == 0) wanted = std::getenv("INHOUSE_ISA");
  const bool any = wanted == nullptr || *wanted == 0;
  *kernels = nullptr;
  for (const Level& level : kLevels) {
    if (level.supported() && (any || std::strcmp(level.name, wanted) == 0)) *kernels = level.kernels();
  }
  if (*kernels != nullptr) return {};
  for (const char* name : kNames) {
    if (std::strcmp(name, wanted) == 0) {
      return Status::unsupported("this machine cannot run the instruction set level " + std::string(wanted) +
                                 "; it can run " + supported_names());
    }
  }
  return Status::usage("unknown instruction set level '" + std::string(wanted) +
                       "'; known: scalar, avx2, avx512, neon");
}

const Kernels* available_kernels(int i) {
  for (const Level& level : kLevels) {
    if (level.supported() && i-- == 0) return level.kernels();
  }
  return nullptr;
}

}  // namespace inhouse
