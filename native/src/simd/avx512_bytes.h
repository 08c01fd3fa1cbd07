// Byte vocabulary for AVX-512 with VNNI: B is 64 bytes, [16 rows][4 inputs]. Included after simd/avx512.h.
#pragma once
#include "formats.h"

namespace inhouse::IH_ISA {
namespace {

// Rows of activations and tiles of weights that linear_i8 works on at once. Two tiles take fewer loads for each
// product; where codes are costly to unpack, or fill the first-level cache, eight rows share one.
constexpr int int_rows(const Format& f) { return f.high == 0 && f.low <= 4 ? 4 : 8; }
constexpr int int_tiles(const Format& f) { return f.high == 0 && f.low <= 4 ? 2 : 1; }
constexpr int kFloatRows = 8;  // the same for linear_f32, which keeps two sums a row

using B = __m512i;

IH_INLINE B load_bytes(const uint8_t* p) { return _mm512_load_si512(p); }
IH_INLINE B or_bytes(B a, B b) { return _mm512_or_si512(a, b); }
IH_INLINE B and_bytes(B a, uint8_t mask) { return _mm512_and_si512(a, _mm512_set1_epi8(static_cast<char>(mask))); }
// Bits of all bytes N places up (down if negative); bits of neighbours come in, so a mask must follow.
template <int N>
IH_INLINE B shift_bytes(B a) {
  return N >= 0 ? _mm512_slli_epi16(a, N < 0 ? 0 : N) : _mm512_srli_epi16(a, N < 0 ? -N : 0);
}

// Four activations, ready for dot products with several vectors of codes.
using Four = VI;
IH_INLINE Four four(int32_t activations) { return _mm512_set1_epi32(activations); }

// acc[row] += codes[row][0..3] . activations[0..3], exact; codes of at most 7 bits.
IH_INLINE VI dot(VI acc, B codes, Four activations) { return _mm512_dpbusd_epi32(acc, codes, activations); }
IH_INLINE VI dot(VI acc, B codes, int32_t activations) { return dot(acc, codes, four(activations)); }
// The same for 8-bit codes, taken as code - 128 + kWideZero.
constexpr int kWideZero = 128;
template <class A>
IH_INLINE VI dot_wide(VI acc, B codes, A activations) {
  return dot(acc, codes, activations);
}

// Sums of products over a block of codes of at most 4 bits; `start` goes to both ends. Here the same as other sums.
using Narrow = VI;
IH_INLINE Narrow narrow(int32_t start) { return set1_int(start); }
IH_INLINE Narrow dot_narrow(Narrow acc, B codes, Four activations) { return dot(acc, codes, activations); }
IH_INLINE VI widen(Narrow acc, int32_t) { return acc; }

// A scale times powers of two, by adding exponents: an addition takes a port that products leave free. Exact where
// scale and product are normal numbers or zero.
constexpr bool kAddsExponents = true;
struct Powered {
  VI bits;  // of the scale, less those of 1
  M some;   // where it is not zero
};
IH_INLINE Powered powered(V scale) {
  const VI bits = _mm512_castps_si512(scale);
  return {_mm512_sub_epi32(bits, _mm512_set1_epi32(0x3f800000)),
          _mm512_test_epi32_mask(bits, _mm512_set1_epi32(0x7fffffff))};
}
IH_INLINE V times(Powered scale, float power) {
  const VI bits = _mm512_set1_epi32(__builtin_bit_cast(int32_t, power));
  return _mm512_castsi512_ps(_mm512_maskz_add_epi32(scale.some, scale.bits, bits));
}

// Byte I of each row as an integer.
template <int I>
IH_INLINE VI byte_of(B codes) {
  return _mm512_and_si512(_mm512_srli_epi32(codes, 8 * I), _mm512_set1_epi32(255));
}
// table[code] for codes 0..15; the tables are aligned.
IH_INLINE B lookup_bytes(const uint8_t* table, B codes) {
  return _mm512_shuffle_epi8(_mm512_broadcast_i32x4(_mm_load_si128(reinterpret_cast<const __m128i*>(table))), codes);
}
IH_INLINE V lookup_floats(const float* table, VI codes) { return _mm512_permutexvar_ps(codes, _mm512_load_ps(table)); }
IH_INLINE VI load_u8(const uint8_t* p) {
  return _mm512_cvtepu8_epi32(_mm_load_si128(reinterpret_cast<const __m128i*>(p)));
}
IH_INLINE V load_i8(const int8_t* p) {
  return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_load_si128(reinterpret_cast<const __m128i*>(p))));
}
IH_INLINE void store_i8(int8_t* p, VI v) { _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtepi32_epi8(v)); }
IH_INLINE VI magnitude_bits(V v) { return _mm512_and_si512(_mm512_castps_si512(v), _mm512_set1_epi32(0x7fffffff)); }
IH_INLINE VI max_int(VI a, VI b) { return _mm512_max_epi32(a, b); }
IH_INLINE int32_t reduce_max_int(VI a) { return _mm512_reduce_max_epi32(a); }
IH_INLINE int32_t reduce_add_int(VI a) { return _mm512_reduce_add_epi32(a); }
// 32 codes, the sum of the first half and that of all.
IH_INLINE void store_block(int8_t* p, VI low, VI rest, int32_t* low_sum, int32_t* sum) {
  const __m256i codes =
      _mm256_inserti128_si256(_mm256_castsi128_si256(_mm512_cvtepi32_epi8(low)), _mm512_cvtepi32_epi8(rest), 1);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), codes);
  __m256i sums = _mm256_dpbusd_epi32(_mm256_setzero_si256(), _mm256_set1_epi8(1), codes);
  sums = _mm256_add_epi32(sums, _mm256_shuffle_epi32(sums, 0x4e));
  sums = _mm256_add_epi32(sums, _mm256_shuffle_epi32(sums, 0xb1));
  *low_sum = _mm256_cvtsi256_si32(sums);
  *sum = *low_sum + _mm_cvtsi128_si32(_mm256_extracti128_si256(sums, 1));
}

}  // namespace
}  // namespace inhouse::IH_ISA
