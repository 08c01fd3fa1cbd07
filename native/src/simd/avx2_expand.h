// Vocabulary of sparse and vector-coded weights for AVX2. Included after simd/avx2_bytes.h and simd/expand_table.h.
#pragma once

namespace inhouse::IH_ISA {
namespace {

IH_INLINE int64_t ones(uint64_t mask) { return __builtin_popcountll(mask); }
IH_INLINE B fill_bytes(uint8_t v) {
  const __m256i x = _mm256_set1_epi8(static_cast<char>(v));
  return {x, x};
}
IH_INLINE void store_bytes(uint8_t* p, B v) {
  _mm256_store_si256(reinterpret_cast<__m256i*>(p), v.a);
  _mm256_store_si256(reinterpret_cast<__m256i*>(p + 32), v.b);
}
IH_INLINE B add_bytes(B x, B y) { return {_mm256_add_epi8(x.a, y.a), _mm256_add_epi8(x.b, y.b)}; }
IH_INLINE B flip_bytes(B x) {
  const __m256i m = _mm256_set1_epi8(static_cast<char>(128));
  return {_mm256_xor_si256(x.a, m), _mm256_xor_si256(x.b, m)};
}
IH_INLINE __m128i eight(const uint8_t* p) { return _mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)); }
IH_INLINE __m128i two_eights(__m128i a, __m128i b) { return _mm_unpacklo_epi64(a, b); }
template <int SHIFT>  // -1: whole bytes
IH_INLINE __m128i nibbles(__m128i v) {
  if (SHIFT < 0) return v;
  return _mm_and_si128(SHIFT > 0 ? _mm_srli_epi16(v, SHIFT < 0 ? 0 : SHIFT) : v, _mm_set1_epi8(15));
}
// Sixteen places: the bytes for the low eight are the first of `v`, those for the others begin at its byte 8.
IH_INLINE __m128i sixteen(uint32_t low, uint32_t high, __m128i v, __m128i fill) {
  const __m128i order = two_eights(eight(kExpand.first[low]), eight(kExpand.second[high]));
  return _mm_blendv_epi8(_mm_shuffle_epi8(v, order), fill, order);
}
// Where the values of byte I of the mask begin.
template <int I>
IH_INLINE const uint8_t* values_at(uint64_t mask, const uint8_t* p) {
  return I == 0 ? p : p + ones(mask << (64 - 8 * (I == 0 ? 1 : I)));
}
template <int SHIFT, int I>
IH_INLINE __m128i expand_two(uint64_t mask, const uint8_t* p, __m128i fill) {
  const __m128i v = two_eights(eight(values_at<I>(mask, p)), eight(values_at<I + 1>(mask, p)));
  return sixteen(mask >> (8 * I) & 255, mask >> (8 * I + 8) & 255, nibbles<SHIFT>(v), fill);
}
template <int SHIFT>
IH_INLINE B expand_any(uint64_t mask, const uint8_t* p, B fill) {
  const __m128i f = _mm256_castsi256_si128(fill.a);
  return {_mm256_set_m128i(expand_two<SHIFT, 2>(mask, p, f), expand_two<SHIFT, 0>(mask, p, f)),
          _mm256_set_m128i(expand_two<SHIFT, 6>(mask, p, f), expand_two<SHIFT, 4>(mask, p, f))};
}
template <int SHIFT>
IH_INLINE B expand_any_pairs(uint64_t mask, const uint8_t* p, B fill) {
  const __m128i f = _mm256_castsi256_si128(fill.a);
  __m128i part[4];
  IH_UNROLL for (int i = 0; i < 4; ++i) {
    const uint32_t low = mask >> (16 * i) & 255, high = mask >> (16 * i + 8) & 255;
    const __m128i v = eight(p + 8 * i);
    part[i] = sixteen(low, high, nibbles<SHIFT>(two_eights(v, _mm_srli_epi64(v, 32))), f);
  }
  return {_mm256_set_m128i(part[1], part[0]), _mm256_set_m128i(part[3], part[2])};
}
// As simd/avx512_expand.h says.
IH_INLINE B expand(uint64_t mask, const uint8_t* p, B fill) { return expand_any<-1>(mask, p, fill); }
template <int SHIFT>
IH_INLINE B expand_nibbles(uint64_t mask, const uint8_t* p, B fill) {
  return expand_any<SHIFT>(mask, p, fill);
}
IH_INLINE B expand_pairs(uint64_t mask, const uint8_t* p, B fill) { return expand_any_pairs<-1>(mask, p, fill); }
template <int SHIFT>
IH_INLINE B expand_nibble_pairs(uint64_t mask, const uint8_t* p, B fill) {
  return expand_any_pairs<SHIFT>(mask, p, fill);
}

IH_INLINE void entries(const uint8_t* book, const uint8_t* index, B* first, B* second) {
  __m128i low[4], high[4];
  IH_UNROLL for (int i = 0; i < 4; ++i) {
    const uint8_t* four = index + 4 * i;
    const __m128 a = _mm_castsi128_ps(two_eights(eight(book + 8 * four[0]), eight(book + 8 * four[1])));
    const __m128 b = _mm_castsi128_ps(two_eights(eight(book + 8 * four[2]), eight(book + 8 * four[3])));
    low[i] = _mm_castps_si128(_mm_shuffle_ps(a, b, 0x88));
    high[i] = _mm_castps_si128(_mm_shuffle_ps(a, b, 0xDD));
  }
  *first = {_mm256_set_m128i(low[1], low[0]), _mm256_set_m128i(low[3], low[2])};
  *second = {_mm256_set_m128i(high[1], high[0]), _mm256_set_m128i(high[3], high[2])};
}

IH_INLINE __m128 four_of(const float* x, const uint8_t* columns) {
  uint64_t c;
  __builtin_memcpy(&c, columns, 8);
  return _mm_setr_ps(x[c & 0xffff], x[c >> 16 & 0xffff], x[c >> 32 & 0xffff], x[c >> 48]);
}
IH_INLINE V gather(const float* x, const uint8_t* columns, int64_t n) {
  if (n >= 16) {
    return {_mm256_set_m128(four_of(x, columns + 8), four_of(x, columns)),
            _mm256_set_m128(four_of(x, columns + 24), four_of(x, columns + 16))};
  }
  alignas(32) float found[16] = {};
  for (int64_t i = 0; i < n; ++i) {
    uint16_t column;
    __builtin_memcpy(&column, columns + 2 * i, 2);
    found[i] = x[column];
  }
  return load(found);
}
IH_INLINE V load_values_i8(const uint8_t* p) {
  const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return {_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(bytes)),
          _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_srli_si128(bytes, 8)))};
}
IH_INLINE __m256 widen_eight(const uint8_t* p) {
  const __m128i halves = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(halves), 16));
}
IH_INLINE V load_values_bf16(const uint8_t* p) { return {widen_eight(p), widen_eight(p + 16)}; }
// The sums of a quad with four codes of activations.
template <class D>
IH_INLINE void add_four(D& dots, B quad, const int8_t* four) {
  int32_t codes;
  __builtin_memcpy(&codes, four, 4);
  dots.add(quad, codes);
}

}  // namespace
}  // namespace inhouse::IH_ISA
