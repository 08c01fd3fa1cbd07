// Float vocabulary in plain C++ for any CPU: V is 16 floats in an array. fma() rounds twice here. Included by
// isa/scalar.cc alone.
#pragma once
#include <cstddef>
#include <cstdint>

#define IH_ISA scalar
#define IH_INLINE inline __attribute__((always_inline))
// Called, not inlined: this level is for any CPU, not for speed, and inlining these loops everywhere takes minutes.
#define IH_CALLED inline __attribute__((noinline))

namespace inhouse::IH_ISA {
namespace {

constexpr int kAccumulators = 4;  // V registers that a body may keep sums in without spilling

struct V {
  float v[16];
};
struct VI {
  int32_t v[16];
};
struct M {
  bool v[16];
};

template <class F>
IH_INLINE V each(F f) {
  V r;
  for (int i = 0; i < 16; ++i) r.v[i] = f(i);
  return r;
}
template <class F>
IH_INLINE VI each_int(F f) {
  VI r;
  for (int i = 0; i < 16; ++i) r.v[i] = f(i);
  return r;
}
template <class F>
IH_INLINE M each_bool(F f) {
  M r;
  for (int i = 0; i < 16; ++i) r.v[i] = f(i);
  return r;
}
IH_INLINE uint32_t float_bits(float x) { return __builtin_bit_cast(uint32_t, x); }
IH_INLINE float bits_float(uint32_t x) { return __builtin_bit_cast(float, x); }

IH_INLINE V zero() {
  return each([](int) { return 0.0f; });
}
IH_INLINE V set1(float x) {
  return each([=](int) { return x; });
}
IH_INLINE V load(const float* p) {
  return each([=](int i) { return p[i]; });
}
IH_CALLED void store(float* p, V v) {
  for (int i = 0; i < 16; ++i) p[i] = v.v[i];
}
IH_INLINE M first_n(int64_t n) {
  return each_bool([=](int i) { return i < n; });
}
IH_CALLED V load_n(const float* p, int64_t n) {  // rest zero
  return each([=](int i) { return i < n ? p[i] : 0.0f; });
}
IH_CALLED void store_n(float* p, int64_t n, V v) {
  for (int64_t i = 0; i < n; ++i) p[i] = v.v[i];
}
IH_INLINE V iota() {
  return each([](int i) { return static_cast<float>(i); });
}

IH_INLINE V add(V a, V b) {
  return each([&](int i) { return a.v[i] + b.v[i]; });
}
IH_CALLED V sub(V a, V b) {
  return each([&](int i) { return a.v[i] - b.v[i]; });
}
IH_CALLED V mul(V a, V b) {
  return each([&](int i) { return a.v[i] * b.v[i]; });
}
IH_CALLED V div(V a, V b) {
  return each([&](int i) { return a.v[i] / b.v[i]; });
}
IH_INLINE V fma(V a, V b, V c) {
  return each([&](int i) { return a.v[i] * b.v[i] + c.v[i]; });
}
IH_CALLED V sqrt(V a) {
  return each([&](int i) { return __builtin_sqrtf(a.v[i]); });
}
IH_CALLED V min(V a, V b) {  // b where either is NaN
  return each([&](int i) { return a.v[i] < b.v[i] ? a.v[i] : b.v[i]; });
}
IH_CALLED V max(V a, V b) {  // b where either is NaN
  return each([&](int i) { return a.v[i] > b.v[i] ? a.v[i] : b.v[i]; });
}
IH_CALLED V abs(V a) {
  return each([&](int i) { return __builtin_fabsf(a.v[i]); });
}
// Adding and taking away 1.5 * 2^23 rounds |x| < 2^22 to nearest even.
IH_CALLED V round_even(V a) {
  return each([&](int i) {
    const float magic = 12582912.0f;
    return __builtin_fabsf(a.v[i]) < 4194304.0f ? (a.v[i] + magic) - magic : a.v[i];
  });
}
IH_CALLED M less(V a, V b) {
  return each_bool([&](int i) { return a.v[i] < b.v[i]; });
}
IH_CALLED M less_equal(V a, V b) {
  return each_bool([&](int i) { return a.v[i] <= b.v[i]; });
}
IH_CALLED M both(M a, M b) {
  return each_bool([&](int i) { return a.v[i] && b.v[i]; });
}
IH_CALLED V select(M m, V a, V b) {  // m ? a : b
  return each([&](int i) { return m.v[i] ? a.v[i] : b.v[i]; });
}
IH_CALLED V copy_sign(V magnitude, V sign) {
  return each([&](int i) { return __builtin_copysignf(magnitude.v[i], sign.v[i]); });
}

IH_CALLED VI to_int(V a) {  // nearest even, for |a| < 2^22
  const V r = round_even(a);
  return each_int([&](int i) { return static_cast<int32_t>(r.v[i]); });
}
IH_CALLED V to_float(VI a) {
  return each([&](int i) { return static_cast<float>(a.v[i]); });
}
IH_CALLED V from_bits(VI a) {
  return each([&](int i) { return bits_float(static_cast<uint32_t>(a.v[i])); });
}
IH_CALLED VI set1_int(int32_t x) {
  return each_int([=](int) { return x; });
}
IH_CALLED VI add_int(VI a, VI b) {
  return each_int([&](int i) { return a.v[i] + b.v[i]; });
}
IH_CALLED VI sub_int(VI a, VI b) {
  return each_int([&](int i) { return a.v[i] - b.v[i]; });
}
IH_CALLED VI masked_or(VI a, VI mask, VI bits) {  // (a & mask) | bits
  return each_int([&](int i) { return (a.v[i] & mask.v[i]) | bits.v[i]; });
}
template <int N>
IH_CALLED VI shift_left(VI a) {
  return each_int([&](int i) { return static_cast<int32_t>(static_cast<uint32_t>(a.v[i]) << N); });
}
template <int N>
IH_CALLED VI shift_right_signed(VI a) {
  return each_int([&](int i) { return a.v[i] >> N; });
}

// Fixed tree: lanes i and i + 8, then + 4, + 2, + 1.
IH_INLINE float reduce_add(V a) {
  for (int n = 8; n > 0; n /= 2) {
    for (int i = 0; i < n; ++i) a.v[i] += a.v[i + n];
  }
  return a.v[0];
}
IH_INLINE float reduce_max(V a) {
  float m = a.v[0];
  for (int i = 1; i < 16; ++i) m = a.v[i] > m ? a.v[i] : m;
  return m;
}
IH_INLINE float lane0(V a) { return a.v[0]; }

IH_INLINE float widen_f16(uint16_t h) {
  const uint32_t sign = static_cast<uint32_t>(h & 0x8000u) << 16, rest = h & 0x7fffu;
  if (rest >= 0x7c00u) return bits_float(sign | 0x7f800000u | ((rest & 0x3ffu) << 13));
  if (rest >= 0x400u) return bits_float(sign | ((rest << 13) + 0x38000000u));
  return bits_float(sign | float_bits(static_cast<float>(rest) * 5.9604644775390625e-8f));  // rest * 2^-24
}
// Nearest even by the exponent trick: adding a power of two pushes the bits that f16 drops off the end.
IH_INLINE uint16_t narrow_f16(float x) {
  const uint32_t bits = float_bits(x), sign = (bits >> 16) & 0x8000u, rest = bits & 0x7fffffffu;
  if (rest > 0x7f800000u) return static_cast<uint16_t>(sign | 0x7e00u);
  if (rest >= 0x477ff000u) return static_cast<uint16_t>(sign | 0x7c00u);
  if (rest < 0x38800000u) {  // below 2^-14: the result counts units of 2^-24
    const float magic = 0.5f;
    return static_cast<uint16_t>(sign | (float_bits(bits_float(rest) + magic) - float_bits(magic)));
  }
  const uint32_t odd = (rest >> 13) & 1u;
  return static_cast<uint16_t>(sign | ((rest + 0xfffu + odd - 0x38000000u) >> 13));
}
IH_CALLED V load_f16(const uint16_t* p) {
  return each([=](int i) { return widen_f16(p[i]); });
}
IH_CALLED V load_bf16(const uint16_t* p) {
  return each([=](int i) { return bits_float(static_cast<uint32_t>(p[i]) << 16); });
}
IH_CALLED void store_f16(uint16_t* p, V v) {
  for (int i = 0; i < 16; ++i) p[i] = narrow_f16(v.v[i]);
}
// Nearest even; a NaN stays a (quiet) NaN.
IH_CALLED void store_bf16(uint16_t* p, V v) {
  for (int i = 0; i < 16; ++i) {
    const uint32_t bits = float_bits(v.v[i]);
    const bool nan = (bits & 0x7fffffffu) > 0x7f800000u;
    p[i] = static_cast<uint16_t>((nan ? bits | 0x400000u : bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
  }
}

}  // namespace
}  // namespace inhouse::IH_ISA
