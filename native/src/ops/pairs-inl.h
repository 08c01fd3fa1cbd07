// Pairs of bf16 numbers for levels without dot products of them. The two products of a pair are added one after the
// other, the second element's first, as vdpbf16ps does it with denormals flushed: the same bits as
// simd/avx512_bf16.h.
namespace inhouse::IH_ISA {
namespace {

// Sixteen pairs, widened.
struct Pairs {
  V first, second;
};

IH_INLINE Pairs split_pairs(VI bits) {
  return {from_bits(shift_left<16>(bits)), from_bits(shift_left<16>(shift_right_signed<16>(bits)))};
}
IH_INLINE Pairs load_pairs(const uint16_t* p) {  // [16][2]
  VI bits;
  __builtin_memcpy(&bits, p, sizeof bits);
  return split_pairs(bits);
}
IH_INLINE Pairs load_firsts(const uint16_t* p) { return {load_bf16(p), zero()}; }  // p [16], each beside a zero
IH_INLINE Pairs repeat_pair(const uint16_t* p) {                                   // sixteen times p [2]
  int32_t bits;
  __builtin_memcpy(&bits, p, 4);
  return split_pairs(set1_int(bits));
}
IH_INLINE Pairs first_of(Pairs x) { return {x.first, zero()}; }
IH_INLINE Pairs second_of(Pairs x) { return {zero(), x.second}; }
IH_INLINE V dot_pairs(V sums, Pairs a, Pairs b) { return fma(a.first, b.first, fma(a.second, b.second, sums)); }

// 32 floats to bf16, denormals to zero.
IH_INLINE void store_pairs(uint16_t* p, V low, V high) {
  store_bf16(p, low);
  store_bf16(p + 16, high);
}

}  // namespace
}  // namespace inhouse::IH_ISA
