// Byte vocabulary for NEON with the dot product: B is 64 bytes, [16 rows][4 inputs], in four registers. Included after
// simd/neon.h.
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
  uint8x16_t q[4];
};

template <class F>
IH_INLINE B each_byte(F f) {
  return {{f(0), f(1), f(2), f(3)}};
}
IH_INLINE B load_bytes(const uint8_t* p) {
  return each_byte([=](int i) { return vld1q_u8(p + 16 * i); });
}
IH_INLINE B or_bytes(B a, B b) {
  return each_byte([&](int i) { return vorrq_u8(a.q[i], b.q[i]); });
}
IH_INLINE B and_bytes(B a, uint8_t mask) {
  return each_byte([&](int i) { return vandq_u8(a.q[i], vdupq_n_u8(mask)); });
}
// Bits of all bytes N places up (down if negative); other levels let bits of neighbours in, so a mask must follow.
template <int N>
IH_INLINE B shift_bytes(B a) {
  if constexpr (N >= 0) {
    return each_byte([&](int i) { return vshlq_n_u8(a.q[i], N); });
  } else {
    return each_byte([&](int i) { return vshrq_n_u8(a.q[i], -N); });
  }
}

// Four activations, ready for dot products with several vectors of codes.
using Four = int32_t;
IH_INLINE Four four(int32_t activations) { return activations; }

// acc[row] += codes[row][0..3] . activations[0..3], exact; codes of at most 7 bits are the same signed.
IH_INLINE VI dot(VI acc, B codes, int32_t activations) {
  const int8x16_t x = vreinterpretq_s8_s32(vdupq_n_s32(activations));
  return each_int([&](int i) { return vdotq_s32(acc.q[i], vreinterpretq_s8_u8(codes.q[i]), x); });
}
// The same for 8-bit codes, taken as code - 128 + kWideZero.
constexpr int kWideZero = 0;
IH_INLINE VI dot_wide(VI acc, B codes, int32_t activations) {
  return dot(acc, each_byte([&](int i) { return veorq_u8(codes.q[i], vdupq_n_u8(128)); }), activations);
}

// Sums of products over a block of codes of at most 4 bits; `start` goes to both ends. Here the same as other sums.
using Narrow = VI;
IH_INLINE Narrow narrow(int32_t start) { return set1_int(start); }
IH_INLINE Narrow dot_narrow(Narrow acc, B codes, int32_t activations) { return dot(acc, codes, activations); }
IH_INLINE VI widen(Narrow acc, int32_t) { return acc; }

// Byte I of each row as an integer.
template <int I>
IH_INLINE VI byte_of(B codes) {
  return each_int([&](int i) {
    const uint32x4_t word = vreinterpretq_u32_u8(codes.q[i]);
    return vreinterpretq_s32_u32(vshrq_n_u32(vshlq_n_u32(word, 24 - 8 * I), 24));
  });
}
// table[code] for codes 0..15.
IH_INLINE B lookup_bytes(const uint8_t* table, B codes) {
  const uint8x16_t t = vld1q_u8(table);
  return each_byte([&](int i) { return vqtbl1q_u8(t, codes.q[i]); });
}
IH_INLINE V lookup_floats(const float* table, VI codes) {  // the four bytes of float c lie at 4c
  const uint8_t* p = reinterpret_cast<const uint8_t*>(table);
  const uint8x16x4_t t = {{vld1q_u8(p), vld1q_u8(p + 16), vld1q_u8(p + 32), vld1q_u8(p + 48)}};
  return each([&](int i) {
    const int32x4_t at = vmlaq_n_s32(vdupq_n_s32(0x03020100), codes.q[i], 0x04040404);
    return vreinterpretq_f32_u8(vqtbl4q_u8(t, vreinterpretq_u8_s32(at)));
  });
}
IH_INLINE VI load_u8(const uint8_t* p) {
  const uint8x16_t bytes = vld1q_u8(p);
  const uint16x8_t half[2] = {vmovl_u8(vget_low_u8(bytes)), vmovl_u8(vget_high_u8(bytes))};
  return each_int([&](int i) {
    const uint16x4_t four = i % 2 == 0 ? vget_low_u16(half[i / 2]) : vget_high_u16(half[i / 2]);
    return vreinterpretq_s32_u32(vmovl_u16(four));
  });
}
IH_INLINE V load_i8(const int8_t* p) {
  const int8x16_t bytes = vld1q_s8(p);
  const int16x8_t low = vmovl_s8(vget_low_s8(bytes)), high = vmovl_s8(vget_high_s8(bytes));
  return {{vcvtq_f32_s32(vmovl_s16(vget_low_s16(low))), vcvtq_f32_s32(vmovl_s16(vget_high_s16(low))),
           vcvtq_f32_s32(vmovl_s16(vget_low_s16(high))), vcvtq_f32_s32(vmovl_s16(vget_high_s16(high)))}};
}
IH_INLINE void store_i8(int8_t* p, VI v) {
  const int16x8_t low = vcombine_s16(vmovn_s32(v.q[0]), vmovn_s32(v.q[1]));
  const int16x8_t high = vcombine_s16(vmovn_s32(v.q[2]), vmovn_s32(v.q[3]));
  vst1q_s8(p, vcombine_s8(vmovn_s16(low), vmovn_s16(high)));
}
IH_INLINE VI magnitude_bits(V v) {
  return each_int([&](int i) { return vandq_s32(vreinterpretq_s32_f32(v.q[i]), vdupq_n_s32(0x7fffffff)); });
}
IH_INLINE VI max_int(VI a, VI b) {
  return each_int([&](int i) { return vmaxq_s32(a.q[i], b.q[i]); });
}
IH_INLINE int32_t reduce_max_int(VI a) {
  return vmaxvq_s32(vmaxq_s32(vmaxq_s32(a.q[0], a.q[1]), vmaxq_s32(a.q[2], a.q[3])));
}
IH_INLINE int32_t reduce_add_int(VI a) {
  return vaddvq_s32(vaddq_s32(vaddq_s32(a.q[0], a.q[1]), vaddq_s32(a.q[2], a.q[3])));
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
