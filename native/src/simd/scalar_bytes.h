// Byte vocabulary in plain C++: B is 64 bytes, [16 rows][4 inputs]. Included after simd/scalar.h.
#pragma once
#include "formats.h"

namespace inhouse::IH_ISA {
namespace {

// Rows of activations and tiles of weights that linear_i8 works on at once.
constexpr int int_rows(const Format&) { return 1; }
constexpr int int_tiles(const Format&) { return 1; }
constexpr int kFloatRows = 1;           // the same for linear_f32
constexpr bool kAddsExponents = false;  // to multiply scales with powers of two
IH_INLINE V powered(V scale) { return scale; }

struct B {
  uint8_t v[64];
};

template <class F>
IH_INLINE B each_byte(F f) {
  B r;
  for (int i = 0; i < 64; ++i) r.v[i] = static_cast<uint8_t>(f(i));
  return r;
}
IH_CALLED B load_bytes(const uint8_t* p) {
  return each_byte([=](int i) { return p[i]; });
}
IH_CALLED B or_bytes(B a, B b) {
  return each_byte([&](int i) { return a.v[i] | b.v[i]; });
}
IH_CALLED B and_bytes(B a, uint8_t mask) {
  return each_byte([&](int i) { return a.v[i] & mask; });
}
// Bits of all bytes N places up (down if negative); other levels let bits of neighbours in, so a mask must follow.
template <int N>
IH_CALLED B shift_bytes(B a) {
  return each_byte([&](int i) { return N >= 0 ? a.v[i] << (N < 0 ? 0 : N) : a.v[i] >> (N < 0 ? -N : 0); });
}

// Four activations, ready for dot products with several vectors of codes.
using Four = int32_t;
IH_INLINE Four four(int32_t activations) { return activations; }

// acc[row] += codes[row][0..3] . activations[0..3], exact.
IH_CALLED VI dot(VI acc, B codes, int32_t activations) {
  const uint32_t bits = static_cast<uint32_t>(activations);
  for (int k = 0; k < 4; ++k) {
    const int32_t x = static_cast<int8_t>(bits >> (8 * k));
    for (int i = 0; i < 16; ++i) acc.v[i] += codes.v[4 * i + k] * x;
  }
  return acc;
}
// The same for 8-bit codes, taken as code - 128 + kWideZero.
constexpr int kWideZero = 128;
IH_INLINE VI dot_wide(VI acc, B codes, int32_t activations) { return dot(acc, codes, activations); }

// Sums of products over a block of codes of at most 4 bits; `start` goes to both ends. Here the same as other sums.
using Narrow = VI;
IH_INLINE Narrow narrow(int32_t start) { return set1_int(start); }
IH_INLINE Narrow dot_narrow(Narrow acc, B codes, int32_t activations) { return dot(acc, codes, activations); }
IH_INLINE VI widen(Narrow acc, int32_t) { return acc; }

// Byte I of each row as an integer.
template <int I>
IH_CALLED VI byte_of(B codes) {
  return each_int([&](int i) { return codes.v[4 * i + I]; });
}
// table[code] for codes 0..15.
IH_CALLED B lookup_bytes(const uint8_t* table, B codes) {
  return each_byte([&](int i) { return table[codes.v[i]]; });
}
IH_CALLED V lookup_floats(const float* table, VI codes) {
  return each([&](int i) { return table[codes.v[i]]; });
}
IH_CALLED VI load_u8(const uint8_t* p) {
  return each_int([=](int i) { return p[i]; });
}
IH_CALLED V load_i8(const int8_t* p) {
  return each([=](int i) { return static_cast<float>(p[i]); });
}
IH_CALLED void store_i8(int8_t* p, VI v) {
  for (int i = 0; i < 16; ++i) p[i] = static_cast<int8_t>(v.v[i]);
}
IH_CALLED VI magnitude_bits(V v) {
  return each_int([&](int i) { return static_cast<int32_t>(float_bits(v.v[i]) & 0x7fffffffu); });
}
IH_CALLED VI max_int(VI a, VI b) {
  return each_int([&](int i) { return a.v[i] > b.v[i] ? a.v[i] : b.v[i]; });
}
IH_CALLED int32_t reduce_max_int(VI a) {
  int32_t m = a.v[0];
  for (int i = 1; i < 16; ++i) m = a.v[i] > m ? a.v[i] : m;
  return m;
}
IH_CALLED int32_t reduce_add_int(VI a) {
  int32_t s = 0;
  for (int i = 0; i < 16; ++i) s += a.v[i];
  return s;
}
// 32 codes, the sum of the first half and that of all.
IH_INLINE void store_block(int8_t* p, VI low, VI rest, int32_t* low_sum, int32_t* sum) {
  store_i8(p, low);
  store_i8(p + 16, rest);
  *low_sum = reduce_add_int(low);
  *sum = *low_sum + reduce_add_int(rest);
}

}  // namespace
}  // namespace inhouse::IH_ISA
