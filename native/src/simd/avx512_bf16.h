// Pairs of bf16 numbers for AVX-512 with BF16; the bits are those of ops/pairs-inl.h under flushed denormals. Included
// after simd/avx512.h.
#pragma once

namespace inhouse::IH_ISA {
namespace {

using Pairs = __m512i;  // sixteen pairs

IH_INLINE Pairs load_pairs(const uint16_t* p) { return _mm512_loadu_si512(p); }  // [16][2]
IH_INLINE Pairs load_firsts(const uint16_t* p) {                                 // p [16], each beside a zero
  return _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
IH_INLINE Pairs repeat_pair(const uint16_t* p) {  // sixteen times p [2]
  int32_t bits;
  __builtin_memcpy(&bits, p, 4);
  return _mm512_set1_epi32(bits);
}
IH_INLINE Pairs pair_columns(const uint16_t* p) {  // p [2][16]
  alignas(64) static constexpr uint16_t kOrder[32] = {0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
                                                      8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
  return _mm512_permutexvar_epi16(_mm512_load_si512(kOrder), _mm512_loadu_si512(p));
}
IH_INLINE Pairs first_of(Pairs x) { return _mm512_and_si512(x, _mm512_set1_epi32(0xffff)); }
IH_INLINE Pairs second_of(Pairs x) { return _mm512_andnot_si512(_mm512_set1_epi32(0xffff), x); }
IH_INLINE V dot_pairs(V sums, Pairs a, Pairs b) {
  return _mm512_dpbf16_ps(sums, reinterpret_cast<__m512bh>(a), reinterpret_cast<__m512bh>(b));
}

// 32 floats to bf16, denormals to zero.
IH_INLINE void store_pairs(uint16_t* p, V low, V high) {
  _mm512_storeu_si512(p, reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(high, low)));
}

using PairInput = uint16_t;  // of linear_bf16
IH_INLINE Pairs repeat_input(const PairInput* p) { return repeat_pair(p); }
IH_INLINE void store_inputs(PairInput* p, V low, V high) { store_pairs(p, low, high); }

}  // namespace
}  // namespace inhouse::IH_ISA
