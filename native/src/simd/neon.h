// Float vocabulary for AArch64 NEON: V is 16 floats in four registers. Included by isa/neon.cc alone.
#pragma once
#include <arm_neon.h>

#include <cstddef>
#include <cstdint>

#define IH_ISA neon
#define IH_INLINE inline __attribute__((always_inline))

namespace inhouse::IH_ISA {
namespace {

constexpr int kAccumulators = 4;  // V registers that a body may keep sums in without spilling

struct V {  // 16 x f32
  float32x4_t q[4];
};
struct VI {  // 16 x i32
  int32x4_t q[4];
};
struct M {  // 16 x bool, all ones or zero
  uint32x4_t q[4];
};

template <class F>
IH_INLINE V each(F f) {
  return {{f(0), f(1), f(2), f(3)}};
}
template <class F>
IH_INLINE VI each_int(F f) {
  return {{f(0), f(1), f(2), f(3)}};
}
template <class F>
IH_INLINE M each_bool(F f) {
  return {{f(0), f(1), f(2), f(3)}};
}

IH_INLINE V set1(float x) {
  return each([=](int) { return vdupq_n_f32(x); });
}
IH_INLINE V zero() { return set1(0.0f); }
IH_INLINE V load(const float* p) {
  return each([=](int i) { return vld1q_f32(p + 4 * i); });
}
IH_INLINE void store(float* p, V v) {
  for (int i = 0; i < 4; ++i) vst1q_f32(p + 4 * i, v.q[i]);
}
IH_INLINE V load_n(const float* p, int64_t n) {  // rest zero
  float buffer[16] = {};
  for (int64_t i = 0; i < n; ++i) buffer[i] = p[i];
  return load(buffer);
}
IH_INLINE void store_n(float* p, int64_t n, V v) {
  float buffer[16];
  store(buffer, v);
  for (int64_t i = 0; i < n; ++i) p[i] = buffer[i];
}
IH_INLINE V iota() {
  const float first[4] = {0, 1, 2, 3};
  const float32x4_t base = vld1q_f32(first);
  return each([&](int i) { return vaddq_f32(base, vdupq_n_f32(static_cast<float>(4 * i))); });
}

IH_INLINE V add(V a, V b) {
  return each([&](int i) { return vaddq_f32(a.q[i], b.q[i]); });
}
IH_INLINE V sub(V a, V b) {
  return each([&](int i) { return vsubq_f32(a.q[i], b.q[i]); });
}
IH_INLINE V mul(V a, V b) {
  return each([&](int i) { return vmulq_f32(a.q[i], b.q[i]); });
}
IH_INLINE V div(V a, V b) {
  return each([&](int i) { return vdivq_f32(a.q[i], b.q[i]); });
}
IH_INLINE V fma(V a, V b, V c) {
  return each([&](int i) { return vfmaq_f32(c.q[i], a.q[i], b.q[i]); });
}
IH_INLINE V sqrt(V a) {
  return each([&](int i) { return vsqrtq_f32(a.q[i]); });
}
IH_INLINE V min(V a, V b) {
  return each([&](int i) { return vminq_f32(a.q[i], b.q[i]); });
}
IH_INLINE V max(V a, V b) {
  return each([&](int i) { return vmaxq_f32(a.q[i], b.q[i]); });
}
IH_INLINE V abs(V a) {
  return each([&](int i) { return vabsq_f32(a.q[i]); });
}
IH_INLINE V round_even(V a) {
  return each([&](int i) { return vrndnq_f32(a.q[i]); });
}
IH_INLINE M less(V a, V b) {
  return each_bool([&](int i) { return vcltq_f32(a.q[i], b.q[i]); });
}
IH_INLINE M less_equal(V a, V b) {
  return each_bool([&](int i) { return vcleq_f32(a.q[i], b.q[i]); });
}
IH_INLINE M both(M a, M b) {
  return each_bool([&](int i) { return vandq_u32(a.q[i], b.q[i]); });
}
IH_INLINE V select(M m, V a, V b) {  // m ? a : b
  return each([&](int i) { return vbslq_f32(m.q[i], a.q[i], b.q[i]); });
}
IH_INLINE M first_n(int64_t n) { return less(iota(), set1(static_cast<float>(n))); }  // 0 <= n <= 16
IH_INLINE V copy_sign(V magnitude, V sign) {
  const uint32x4_t bit = vdupq_n_u32(0x80000000u);
  return each([&](int i) { return vbslq_f32(bit, sign.q[i], magnitude.q[i]); });
}

IH_INLINE VI to_int(V a) {  // nearest even
  return each_int([&](int i) { return vcvtnq_s32_f32(a.q[i]); });
}
IH_INLINE V to_float(VI a) {
  return each([&](int i) { return vcvtq_f32_s32(a.q[i]); });
}
IH_INLINE V from_bits(VI a) {
  return each([&](int i) { return vreinterpretq_f32_s32(a.q[i]); });
}
IH_INLINE VI set1_int(int32_t x) {
  return each_int([=](int) { return vdupq_n_s32(x); });
}
IH_INLINE VI add_int(VI a, VI b) {
  return each_int([&](int i) { return vaddq_s32(a.q[i], b.q[i]); });
}
IH_INLINE VI sub_int(VI a, VI b) {
  return each_int([&](int i) { return vsubq_s32(a.q[i], b.q[i]); });
}
IH_INLINE VI masked_or(VI a, VI mask, VI bits) {  // (a & mask) | bits
  return each_int([&](int i) { return vorrq_s32(vandq_s32(a.q[i], mask.q[i]), bits.q[i]); });
}
template <int N>
IH_INLINE VI shift_left(VI a) {
  return each_int([&](int i) { return vshlq_n_s32(a.q[i], N); });
}
template <int N>
IH_INLINE VI shift_right_signed(VI a) {
  return each_int([&](int i) { return vshrq_n_s32(a.q[i], N); });
}

// Fixed tree: lanes i and i + 8, then + 4, + 2, + 1.
IH_INLINE float reduce_add(V a) {
  const float32x4_t q = vaddq_f32(vaddq_f32(a.q[0], a.q[2]), vaddq_f32(a.q[1], a.q[3]));
  const float32x2_t d = vadd_f32(vget_low_f32(q), vget_high_f32(q));
  return vget_lane_f32(d, 0) + vget_lane_f32(d, 1);
}
IH_INLINE float reduce_max(V a) { return vmaxvq_f32(vmaxq_f32(vmaxq_f32(a.q[0], a.q[1]), vmaxq_f32(a.q[2], a.q[3]))); }
IH_INLINE float lane0(V a) { return vgetq_lane_f32(a.q[0], 0); }

IH_INLINE V load_f16(const uint16_t* p) {
  return each([=](int i) { return vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(p + 4 * i))); });
}
IH_INLINE V load_bf16(const uint16_t* p) {
  return each([=](int i) { return vreinterpretq_f32_u32(vshll_n_u16(vld1_u16(p + 4 * i), 16)); });
}
IH_INLINE void store_f16(uint16_t* p, V v) {
  for (int i = 0; i < 4; ++i) vst1_u16(p + 4 * i, vreinterpret_u16_f16(vcvt_f16_f32(v.q[i])));
}
// Nearest even; a NaN stays a (quiet) NaN.
IH_INLINE void store_bf16(uint16_t* p, V v) {
  for (int i = 0; i < 4; ++i) {
    const uint32x4_t bits = vreinterpretq_u32_f32(v.q[i]);
    const uint32x4_t odd = vandq_u32(vshrq_n_u32(bits, 16), vdupq_n_u32(1));
    const uint32x4_t rounded = vaddq_u32(bits, vaddq_u32(odd, vdupq_n_u32(0x7fff)));
    const uint32x4_t number = vceqq_f32(v.q[i], v.q[i]);
    const uint32x4_t quiet = vorrq_u32(bits, vdupq_n_u32(0x400000));
    vst1_u16(p + 4 * i, vmovn_u32(vshrq_n_u32(vbslq_u32(number, rounded, quiet), 16)));
  }
}

}  // namespace
}  // namespace inhouse::IH_ISA
