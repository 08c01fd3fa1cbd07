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

// Four lanes of two entries each, for rows 0..7 or 8..15. Single loads: a gather takes longer for what it brings.
IH_INLINE __m512i eight_entries(const uint8_t* book, uint64_t index) {
  const auto two = [&](int i) __attribute__((always_inline)) {
    const auto entry = [&](int at) __attribute__((always_inline)) {
      return reinterpret_cast<const __m128i*>(book + 8 * (index >> (8 * at) & 255));
    };
    return _mm_unpacklo_epi64(_mm_loadl_epi64(entry(i)), _mm_loadl_epi64(entry(i + 1)));
  };
  const __m256i low = _mm256_inserti128_si256(_mm256_castsi128_si256(two(0)), two(2), 1);
  const __m256i high = _mm256_inserti128_si256(_mm256_castsi128_si256(two(4)), two(6), 1);
  return _mm512_inserti64x4(_mm512_castsi256_si512(low), high, 1);
}
// Entries of 8 bytes that sixteen indices name: inputs 0..3 of each row to `first`, 4..7 to `second`.
IH_INLINE void entries(const uint8_t* book, const uint8_t* index, B* first, B* second) {
  uint64_t rows[2];
  __builtin_memcpy(rows, index, 16);
  const __m512i a = eight_entries(book, rows[0]), b = eight_entries(book, rows[1]);
  const __m512i even = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
  *first = _mm512_permutex2var_epi32(a, even, b);
  *second = _mm512_permutex2var_epi32(a, _mm512_add_epi32(even, _mm512_set1_epi32(1)), b);
}

IH_INLINE __m128 four_of(const float* x, const uint8_t* columns) {
  uint64_t c;
  __builtin_memcpy(&c, columns, 8);
  return _mm_setr_ps(x[c & 0xffff], x[c >> 16 & 0xffff], x[c >> 32 & 0xffff], x[c >> 48]);
}
IH_INLINE __m256 eight_of(const float* x, const uint8_t* columns) {
  return _mm256_insertf128_ps(_mm256_castps128_ps256(four_of(x, columns)), four_of(x, columns + 8), 1);
}
// Sixteen x[columns[i]], the first n; zeros after them.
IH_INLINE V gather(const float* x, const uint8_t* columns, int64_t n) {
  if (n >= 16) {
    return _mm512_insertf32x8(_mm512_castps256_ps512(eight_of(x, columns)), eight_of(x, columns + 16), 1);
  }
  const __m512i i = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(columns)));
  return _mm512_mask_i32gather_ps(_mm512_setzero_ps(), static_cast<__mmask16>((1u << n) - 1u), i, x, 4);
}
IH_INLINE V load_values_i8(const uint8_t* p) {
  return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
}
IH_INLINE V load_values_bf16(const uint8_t* p) {
  const __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  return _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16));
}
// The sums of a quad with four codes of activations, which the dot product itself spreads: compilers load them apart.
template <class D>
IH_INLINE void add_four(D& dots, B quad, const int8_t* four) {
  using Four = int32_t __attribute__((may_alias, aligned(1)));
  asm("vpdpbusd %2%{1to16%}, %1, %0" : "+v"(dots.sums) : "v"(quad), "m"(*reinterpret_cast<const Four*>(four)));
}

}  // namespace
}  // namespace inhouse::IH_ISA
