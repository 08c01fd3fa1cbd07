// The least that a test needs: counted checks, random floats.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <string>
#include <vector>

namespace test {

inline int failures = 0;

inline void check(bool ok, const std::string& what) {
  if (ok) return;
  if (++failures <= 20) std::printf("FAILED %s\n", what.c_str());
}

inline std::vector<float> noise(uint32_t seed, size_t n, float scale = 1.0f) {
  std::mt19937 rng(seed);
  std::normal_distribution<float> normal(0.0f, scale);
  std::vector<float> values(n);
  for (float& v : values) v = normal(rng);
  return values;
}

// max|a - b| / max|b|
template <class A, class B>
double worst(const A& a, const B& b) {
  double difference = 0, largest = 0;
  for (size_t i = 0; i < b.size(); ++i) {
    difference = std::fmax(difference, std::fabs(static_cast<double>(a[i]) - static_cast<double>(b[i])));
    largest = std::fmax(largest, std::fabs(static_cast<double>(b[i])));
    if (std::isnan(a[i])) return INFINITY;
  }
  return largest > 0 ? difference / largest : difference;
}

// Whether a level is to be tested: all of them, or the one in $INHOUSE_TEST_LEVEL. An emulator takes minutes for what
// the portable level, which the host has tested already, does in a second.
inline bool wanted(const char* isa) {
  const char* only = std::getenv("INHOUSE_TEST_LEVEL");
  return only == nullptr || std::string(only) == isa;
}

inline int finish() {
  std::printf("%d failures\n", failures);
  return failures != 0;
}

}  // namespace test
