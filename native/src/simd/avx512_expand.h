// Vocabulary of sparse and vector-coded weights for AVX-512 with VBMI2. Included after simd/avx512_bytes.h.
#pragma once

namespace inhouse::IH_ISA {
namespace {

IH_INLINE int64_t ones(uint64_t mask) { return __builtin_popcountll(mask); }
IH_INLINE B fill_bytes(uint8_t v) { return _mm512_set1_epi8(static_cast<char>(v)); }
IH_INLINE void store_bytes(uint8_t* p, B v) { _mm512_store_si512(p, v); }
IH_INLINE B add_bytes(B a, B b) { return _mm512_add_epi8(a, b); }
IH_INLINE B flip_bytes(B a) { return _mm512_xor_si512(a, fill_bytes(128)); }

// Bytes at p, one after the other, to the places of the mask's bits; `fill` elsewhere. May load 64 bytes.
IH_INLINE B expand(uint64_t mask, const uint8_t* p, B fill) {
  return _mm512_mask_expand_epi8(fill, mask, _mm512_loadu_si512(p));
}
// The same of the nibbles at bit SHIFT of each byte.
template <int SHIFT>
IH_INLINE B expand_nibbles(uint64_t mask, const uint8_t* p, B fill) {
  const B v = _mm512_loadu_si512(p);
  return _mm512_mask_expand_epi8(fill, mask, and_bytes(SHIFT ? shift_bytes<-SHIFT>(v) : v, 15));
}
// The same where 32 bits are set, two of every four; loads 32 bytes.
IH_INLINE B expand_pairs(uint64_t mask, const uint8_t* p, B fill) {
  const __m256i v = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  return _mm512_mask_expand_epi8(fill, mask, _mm512_zextsi256_si512(v));
}
template <int SHIFT>
IH_INLINE B expand_nibble_pairs(uint64_t mask, const uint8_t* p, B fill) {
  __m256i v = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  if (SHIFT) v = _mm256_srli_epi16(v, SHIFT);
  v = _mm256_and_si256(v, _mm256_set1_epi8(15));
  return _mm512_mask_expand_epi8(fill, mask, _mm512_zextsi256_si512(v));
}

// Entries of 8 bytes that sixteen indices name: inputs 0..3 of each row to `first`, 4..7 to `second`.
IH_INLINE void entries(const uint8_t* book, const uint8_t* index, B* first, B* second) {
  const __m128i i = _mm_loadu_si128(reinterpret_cast<const __m128i*>(index));
  const __m512i a = _mm512_i32gather_epi64(_mm256_cvtepu8_epi32(i), book, 8);
  const __m512i b = _mm512_i32gather_epi64(_mm256_cvtepu8_epi32(_mm_srli_si128(i, 8)), book, 8);
  const __m512i even = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
  *first = _mm512_permutex2var_epi32(a, even, b);
  *second = _mm512_permutex2var_epi32(a, _mm512_add_epi32(even, _mm512_set1_epi32(1)), b);
}

// Sixteen x[columns[i]], the first n; zeros after them.
IH_INLINE V gather(const float* x, const uint8_t* columns, int64_t n) {
  const __m512i i = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(columns)));
  const __mmask16 k = n < 16 ? static_cast<__mmask16>((1u << n) - 1u) : static_cast<__mmask16>(0xffff);
  return _mm512_mask_i32gather_ps(_mm512_setzero_ps(), k, i, x, 4);
}
IH_INLINE V load_values_i8(const uint8_t* p) {
  return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
}
IH_INLINE V load_values_bf16(const uint8_t* p) {
  const __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  return _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16));
}

}  // namespace
}  // namespace inhouse::IH_ISA
