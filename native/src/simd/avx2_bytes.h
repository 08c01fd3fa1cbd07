// Byte vocabulary for AVX2: B is 64 bytes, [16 rows][4 inputs], in two registers. Included after simd/avx2.h.
#pragma once
#include "formats.h"

namespace inhouse::IH_ISA {
namespace {

// Rows of activations and tiles of weights that linear_i8 works on at once.
constexpr int int_rows(const Format&) { return 4; }
constexpr int int_tiles(const Format&) { return 1; }
constexpr int kFloatRows = 2;           // the same for linear_f32, which keeps two sums a row
constexpr bool kAddsExponents = false;  // to multiply scales with powers of two
IH_INLINE V powered(V scale) { return scale; }

struct B {
  __m256i a, b;
};

IH_INLINE B load_bytes(const uint8_t* p) {
  return {_mm256_load_si256(reinterpret_cast<const __m256i*>(p)),
          _mm256_load_si256(reinterpret_cast<const __m256i*>(p + 32))};
}
IH_INLINE B or_bytes(B x, B y) { return {_mm256_or_si256(x.a, y.a), _mm256_or_si256(x.b, y.b)}; }
IH_INLINE B and_bytes(B x, uint8_t mask) {
  const __m256i m = _mm256_set1_epi8(static_cast<char>(mask));
  return {_mm256_and_si256(x.a, m), _mm256_and_si256(x.b, m)};
}
// Bits of all bytes N places up (down if negative); bits of neighbours come in, so a mask must follow.
template <int N>
IH_INLINE B shift_bytes(B x) {
  if constexpr (N >= 0) {
    return {_mm256_slli_epi16(x.a, N), _mm256_slli_epi16(x.b, N)};
  } else {
    return {_mm256_srli_epi16(x.a, -N), _mm256_srli_epi16(x.b, -N)};
  }
}

// Four activations, ready for dot products with several vectors of codes.
using Four = int32_t;
IH_INLINE Four four(int32_t activations) { return activations; }

// acc[row] += codes[row][0..3] . activations[0..3], exact: with codes of at most 7 bits no pair exceeds
// 2 * 127 * 127, which 16 bits hold.
IH_INLINE VI dot(VI acc, B codes, int32_t activations) {
  const __m256i x = _mm256_set1_epi32(activations), one = _mm256_set1_epi16(1);
  return {_mm256_add_epi32(acc.a, _mm256_madd_epi16(_mm256_maddubs_epi16(codes.a, x), one)),
          _mm256_add_epi32(acc.b, _mm256_madd_epi16(_mm256_maddubs_epi16(codes.b, x), one))};
}
// The same for 8-bit codes, taken as code - 128 + kWideZero. The magnitude goes in as the unsigned operand (128 fits),
// its sign moves to the activation (-127..127): no pair exceeds 2 * 128 * 127.
constexpr int kWideZero = 0;
IH_INLINE __m256i dot_signed(__m256i acc, __m256i codes, __m256i x) {
  const __m256i w = _mm256_xor_si256(codes, _mm256_set1_epi8(static_cast<char>(128)));
  const __m256i pairs = _mm256_maddubs_epi16(_mm256_abs_epi8(w), _mm256_sign_epi8(x, w));
  return _mm256_add_epi32(acc, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
}
IH_INLINE VI dot_wide(VI acc, B codes, int32_t activations) {
  const __m256i x = _mm256_set1_epi32(activations);
  return {dot_signed(acc.a, codes.a, x), dot_signed(acc.b, codes.b, x)};
}

// Sums of products over a block of codes of at most 4 bits; `start` goes to both ends. They stay in 16 bits: eight
// quads give at most 8 * 2 * 15 * 127 = 30480.
struct Narrow {
  __m256i a, b;
};
IH_INLINE Narrow narrow(int32_t) { return {_mm256_setzero_si256(), _mm256_setzero_si256()}; }
IH_INLINE Narrow dot_narrow(Narrow acc, B codes, int32_t activations) {
  const __m256i x = _mm256_set1_epi32(activations);
  return {_mm256_add_epi16(acc.a, _mm256_maddubs_epi16(codes.a, x)),
          _mm256_add_epi16(acc.b, _mm256_maddubs_epi16(codes.b, x))};
}
IH_INLINE VI widen(Narrow acc, int32_t start) {
  const __m256i one = _mm256_set1_epi16(1), s = _mm256_set1_epi32(start);
  return {_mm256_add_epi32(s, _mm256_madd_epi16(acc.a, one)), _mm256_add_epi32(s, _mm256_madd_epi16(acc.b, one))};
}

// Byte I of each row as an integer.
template <int I>
IH_INLINE VI byte_of(B codes) {
  const __m256i m = _mm256_set1_epi32(255);
  return {_mm256_and_si256(_mm256_srli_epi32(codes.a, 8 * I), m),
          _mm256_and_si256(_mm256_srli_epi32(codes.b, 8 * I), m)};
}
// table[code] for codes 0..15; the tables are aligned.
IH_INLINE B lookup_bytes(const uint8_t* table, B codes) {
  const __m256i t = _mm256_broadcastsi128_si256(_mm_load_si128(reinterpret_cast<const __m128i*>(table)));
  return {_mm256_shuffle_epi8(t, codes.a), _mm256_shuffle_epi8(t, codes.b)};
}
IH_INLINE __m256 lookup_eight(const float* table, __m256i codes) {
  const __m256 low = _mm256_permutevar8x32_ps(_mm256_load_ps(table), codes);
  const __m256 high = _mm256_permutevar8x32_ps(_mm256_load_ps(table + 8), codes);
  return _mm256_blendv_ps(low, high, _mm256_castsi256_ps(_mm256_slli_epi32(codes, 28)));
}
IH_INLINE V lookup_floats(const float* table, VI codes) {
  return {lookup_eight(table, codes.a), lookup_eight(table, codes.b)};
}
IH_INLINE VI load_u8(const uint8_t* p) {
  const __m128i bytes = _mm_load_si128(reinterpret_cast<const __m128i*>(p));
  return {_mm256_cvtepu8_epi32(bytes), _mm256_cvtepu8_epi32(_mm_srli_si128(bytes, 8))};
}
IH_INLINE V load_i8(const int8_t* p) {
  const __m128i bytes = _mm_load_si128(reinterpret_cast<const __m128i*>(p));
  return {_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(bytes)),
          _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_srli_si128(bytes, 8)))};
}
IH_INLINE void store_i8(int8_t* p, VI v) {
  const __m256i words = _mm256_permute4x64_epi64(_mm256_packs_epi32(v.a, v.b), 0xD8);
  const __m128i bytes = _mm_packs_epi16(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), bytes);
}
IH_INLINE VI magnitude_bits(V v) {
  const __m256i m = _mm256_set1_epi32(0x7fffffff);
  return {_mm256_and_si256(_mm256_castps_si256(v.a), m), _mm256_and_si256(_mm256_castps_si256(v.b), m)};
}
IH_INLINE VI max_int(VI x, VI y) { return {_mm256_max_epi32(x.a, y.a), _mm256_max_epi32(x.b, y.b)}; }
IH_INLINE int32_t reduce_max_int(VI x) {
  const __m256i h = _mm256_max_epi32(x.a, x.b);
  __m128i q = _mm_max_epi32(_mm256_castsi256_si128(h), _mm256_extracti128_si256(h, 1));
  q = _mm_max_epi32(q, _mm_shuffle_epi32(q, 0x4E));
  return _mm_cvtsi128_si32(_mm_max_epi32(q, _mm_shuffle_epi32(q, 0xB1)));
}
IH_INLINE int32_t reduce_add_int(VI x) {
  const __m256i h = _mm256_add_epi32(x.a, x.b);
  __m128i q = _mm_add_epi32(_mm256_castsi256_si128(h), _mm256_extracti128_si256(h, 1));
  q = _mm_add_epi32(q, _mm_shuffle_epi32(q, 0x4E));
  return _mm_cvtsi128_si32(_mm_add_epi32(q, _mm_shuffle_epi32(q, 0xB1)));
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
