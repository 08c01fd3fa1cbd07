// Vocabulary of sparse and vector-coded weights for NEON. Included after simd/neon_bytes.h and simd/expand_table.h.
#pragma once

namespace inhouse::IH_ISA {
namespace {

IH_INLINE int64_t ones(uint64_t mask) {
  int64_t n = 0;
  for (int i = 0; i < 8; ++i) n += kExpand.ones[mask >> (8 * i) & 255];
  return n;
}
IH_INLINE B fill_bytes(uint8_t v) {
  return each_byte([=](int) { return vdupq_n_u8(v); });
}
IH_INLINE void store_bytes(uint8_t* p, B v) {
  for (int i = 0; i < 4; ++i) vst1q_u8(p + 16 * i, v.q[i]);
}
IH_INLINE B add_bytes(B a, B b) {
  return each_byte([&](int i) { return vaddq_u8(a.q[i], b.q[i]); });
}
IH_INLINE B flip_bytes(B a) {
  return each_byte([&](int i) { return veorq_u8(a.q[i], vdupq_n_u8(128)); });
}
template <int SHIFT>  // -1: whole bytes
IH_INLINE uint8x16_t nibbles(uint8x16_t v) {
  if constexpr (SHIFT < 0) {
    return v;
  } else if constexpr (SHIFT == 0) {
    return vandq_u8(v, vdupq_n_u8(15));
  } else {
    return vshrq_n_u8(v, SHIFT);
  }
}
// Sixteen places: the bytes for the low eight are the first of `v`, those for the others begin at its byte 8.
IH_INLINE uint8x16_t sixteen(uint32_t low, uint32_t high, uint8x16_t v, uint8x16_t fill) {
  return vqtbx1q_u8(fill, v, vcombine_u8(vld1_u8(kExpand.first[low]), vld1_u8(kExpand.second[high])));
}
template <int SHIFT>
IH_INLINE B expand_any(uint64_t mask, const uint8_t* p, B fill) {
  B r;
  for (int i = 0; i < 4; ++i) {
    const uint32_t low = mask >> (16 * i) & 255, high = mask >> (16 * i + 8) & 255;
    const int64_t n = kExpand.ones[low];
    r.q[i] = sixteen(low, high, nibbles<SHIFT>(vcombine_u8(vld1_u8(p), vld1_u8(p + n))), fill.q[i]);
    p += n + kExpand.ones[high];
  }
  return r;
}
template <int SHIFT>
IH_INLINE B expand_any_pairs(uint64_t mask, const uint8_t* p, B fill) {
  B r;
  for (int i = 0; i < 4; ++i) {
    const uint32_t low = mask >> (16 * i) & 255, high = mask >> (16 * i + 8) & 255;
    const uint8x8_t v = vld1_u8(p + 8 * i);
    r.q[i] = sixteen(low, high, nibbles<SHIFT>(vcombine_u8(v, vext_u8(v, v, 4))), fill.q[i]);
  }
  return r;
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
  for (int i = 0; i < 4; ++i) {
    const uint8_t* four = index + 4 * i;
    const uint32x4_t a = vreinterpretq_u32_u8(vcombine_u8(vld1_u8(book + 8 * four[0]), vld1_u8(book + 8 * four[1])));
    const uint32x4_t b = vreinterpretq_u32_u8(vcombine_u8(vld1_u8(book + 8 * four[2]), vld1_u8(book + 8 * four[3])));
    first->q[i] = vreinterpretq_u8_u32(vuzp1q_u32(a, b));
    second->q[i] = vreinterpretq_u8_u32(vuzp2q_u32(a, b));
  }
}

IH_INLINE V gather(const float* x, const uint8_t* columns, int64_t n) {
  alignas(16) float found[16];
  for (int i = 0; i < 16; ++i) {
    uint16_t column;
    __builtin_memcpy(&column, columns + 2 * i, 2);
    found[i] = i < n ? x[column] : 0.0f;
  }
  return load(found);
}
IH_INLINE V load_values_i8(const uint8_t* p) {
  alignas(16) float found[16];
  for (int i = 0; i < 16; ++i) found[i] = static_cast<float>(static_cast<int8_t>(p[i]));
  return load(found);
}
IH_INLINE V load_values_bf16(const uint8_t* p) {
  alignas(16) uint16_t found[16];
  __builtin_memcpy(found, p, sizeof found);
  return load_bf16(found);
}
// The sums of a quad with four codes of activations.
template <class D>
IH_INLINE void add_four(D& dots, B quad, const int8_t* four) {
  int32_t codes;
  __builtin_memcpy(&codes, four, 4);
  dots.add(quad, codes);
}

}  // namespace
}  // namespace inhouse::IH_ISA
