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
IH_INLINE Pairs pair_columns(const uint16_t* p) { return {load_bf16(p), load_bf16(p + 16)}; }  // p [2][16]
IH_INLINE Pairs first_of(Pairs x) { return {x.first, zero()}; }
IH_INLINE Pairs second_of(Pairs x) { return {zero(), x.second}; }

// Inputs of linear_bf16: numbers of bf16, kept as floats, so that repeating them takes no shifts.
using PairInput = float;
IH_INLINE Pairs repeat_input(const PairInput* p) { return {set1(p[0]), set1(p[1])}; }  // sixteen times p [2]
IH_INLINE V dot_pairs(V sums, Pairs a, Pairs b) { return fma(a.first, b.first, fma(a.second, b.second, sums)); }

// 32 floats to bf16, denormals to zero.
IH_INLINE void store_pairs(uint16_t* p, V low, V high) {
  store_bf16(p, low);
  store_bf16(p + 16, high);
}
IH_INLINE void store_inputs(PairInput* p, V low, V high) {
  alignas(64) uint16_t bits[32];
  store_pairs(bits, low, high);
  store(p, load_bf16(bits));
  store(p + 16, load_bf16(bits + 16));
}

}  // namespace
}  // namespace inhouse::IH_ISA
