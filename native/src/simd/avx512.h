// Float vocabulary for AVX-512 (F, BW, VL, DQ): V is 16 floats. Every level gives V sixteen lanes, so that a body
// written once has one accumulation order. Included by isa/avx512.cc alone.
#pragma once
#include <immintrin.h>

#include <cstddef>
#include <cstdint>

#define IH_ISA avx512
#define IH_INLINE inline __attribute__((always_inline))

namespace inhouse::IH_ISA {
namespace {

constexpr int kAccumulators = 16;  // V registers that a body may keep sums in without spilling

using V = __m512;     // 16 x f32
using VI = __m512i;   // 16 x i32
using M = __mmask16;  // 16 x bool

IH_INLINE V zero() { return _mm512_setzero_ps(); }
IH_INLINE V set1(float x) { return _mm512_set1_ps(x); }
IH_INLINE V load(const float* p) { return _mm512_loadu_ps(p); }
IH_INLINE void store(float* p, V v) { _mm512_storeu_ps(p, v); }
IH_INLINE M first_n(int64_t n) { return static_cast<M>((1u << n) - 1u); }                       // 0 <= n <= 16
IH_INLINE V load_n(const float* p, int64_t n) { return _mm512_maskz_loadu_ps(first_n(n), p); }  // rest zero
IH_INLINE void store_n(float* p, int64_t n, V v) { _mm512_mask_storeu_ps(p, first_n(n), v); }
IH_INLINE V iota() { return _mm512_setr_ps(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15); }

IH_INLINE V add(V a, V b) { return _mm512_add_ps(a, b); }
IH_INLINE V sub(V a, V b) { return _mm512_sub_ps(a, b); }
IH_INLINE V mul(V a, V b) { return _mm512_mul_ps(a, b); }
IH_INLINE V div(V a, V b) { return _mm512_div_ps(a, b); }
IH_INLINE V fma(V a, V b, V c) { return _mm512_fmadd_ps(a, b, c); }  // a * b + c
IH_INLINE V sqrt(V a) { return _mm512_sqrt_ps(a); }
IH_INLINE V min(V a, V b) { return _mm512_min_ps(a, b); }  // b where either is NaN
IH_INLINE V max(V a, V b) { return _mm512_max_ps(a, b); }  // b where either is NaN
IH_INLINE V abs(V a) { return _mm512_abs_ps(a); }
IH_INLINE V round_even(V a) { return _mm512_roundscale_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }

IH_INLINE M less(V a, V b) { return _mm512_cmp_ps_mask(a, b, _CMP_LT_OQ); }
IH_INLINE M less_equal(V a, V b) { return _mm512_cmp_ps_mask(a, b, _CMP_LE_OQ); }
IH_INLINE M both(M a, M b) { return static_cast<M>(a & b); }
IH_INLINE V select(M m, V a, V b) { return _mm512_mask_blend_ps(m, b, a); }  // m ? a : b
IH_INLINE V copy_sign(V magnitude, V sign) {
  const __m512i bit = _mm512_set1_epi32(static_cast<int>(0x80000000u));
  return _mm512_or_ps(_mm512_andnot_ps(_mm512_castsi512_ps(bit), magnitude),
                      _mm512_and_ps(_mm512_castsi512_ps(bit), sign));
}

IH_INLINE VI to_int(V a) { return _mm512_cvtps_epi32(a); }  // nearest even
IH_INLINE V to_float(VI a) { return _mm512_cvtepi32_ps(a); }
IH_INLINE V from_bits(VI a) { return _mm512_castsi512_ps(a); }
IH_INLINE VI set1_int(int32_t x) { return _mm512_set1_epi32(x); }
IH_INLINE VI add_int(VI a, VI b) { return _mm512_add_epi32(a, b); }
IH_INLINE VI sub_int(VI a, VI b) { return _mm512_sub_epi32(a, b); }
IH_INLINE VI masked_or(VI a, VI mask, VI bits) {  // (a & mask) | bits
  return _mm512_ternarylogic_epi32(a, mask, bits, 0xEA);
}
template <int N>
IH_INLINE VI shift_left(VI a) {
  return _mm512_slli_epi32(a, N);
}
template <int N>
IH_INLINE VI shift_right_signed(VI a) {
  return _mm512_srai_epi32(a, N);
}

// Fixed tree: lanes i and i + 8, then + 4, + 2, + 1.
IH_INLINE float reduce_add(V a) {
  const __m256 h = _mm256_add_ps(_mm512_castps512_ps256(a), _mm512_extractf32x8_ps(a, 1));
  const __m128 q = _mm_add_ps(_mm256_castps256_ps128(h), _mm256_extractf128_ps(h, 1));
  const __m128 d = _mm_add_ps(q, _mm_movehl_ps(q, q));
  return _mm_cvtss_f32(_mm_add_ss(d, _mm_shuffle_ps(d, d, 1)));
}
IH_INLINE float reduce_max(V a) { return _mm512_reduce_max_ps(a); }
IH_INLINE float lane0(V a) { return _mm512_cvtss_f32(a); }

IH_INLINE V load_f16(const uint16_t* p) {
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
IH_INLINE V load_bf16(const uint16_t* p) {
  const __m256i h = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(h), 16));
}
IH_INLINE void store_f16(uint16_t* p, V v) {
  const __m256i h = _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), h);
}
// Nearest even; a NaN stays a (quiet) NaN.
IH_INLINE void store_bf16(uint16_t* p, V v) {
  const __m512i bits = _mm512_castps_si512(v);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  __m512i r = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
  const __mmask16 nan = _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
  r = _mm512_mask_or_epi32(r, nan, bits, _mm512_set1_epi32(0x400000));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16(_mm512_srli_epi32(r, 16)));
}

}  // namespace
}  // namespace inhouse::IH_ISA
