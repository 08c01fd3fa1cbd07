// What this level can reach at most, measured by loops that do nothing else: the yardstick of benchmarks.
namespace inhouse::IH_ISA {
namespace {

constexpr int kProbeSums = 12;  // independent chains, so that latency never limits

// Operations (a multiply and an add are two) of `loops` rounds of int8 dot products out of the first-level cache.
double probe_dot(int64_t loops, int32_t* sink) {
  alignas(64) uint8_t codes[64];
  alignas(64) int32_t fours[kProbeSums];
  for (int i = 0; i < 64; ++i) codes[i] = static_cast<uint8_t>(i);
  for (int i = 0; i < kProbeSums; ++i) fours[i] = i * 0x01010101;
  VI sums[kProbeSums];
  IH_UNROLL for (int i = 0; i < kProbeSums; ++i) { sums[i] = set1_int(0); }
  for (int64_t n = 0; n < loops; ++n) {
    __asm__ volatile("" ::: "memory");  // else the products, equal in every round, would be made once
    const B w = load_bytes(codes);
    IH_UNROLL for (int i = 0; i < kProbeSums; ++i) { sums[i] = dot(sums[i], w, fours[i]); }
  }
  VI all = sums[0];
  IH_UNROLL for (int i = 1; i < kProbeSums; ++i) { all = add_int(all, sums[i]); }
  *sink += reduce_add_int(all);
  return static_cast<double>(loops) * kProbeSums * 128;
}

// The same for f32 fused multiply-adds.
double probe_fma(int64_t loops, int32_t* sink) {
  alignas(64) float factors[16];
  for (float& x : factors) x = 1.0f;
  V sums[kProbeSums];
  IH_UNROLL for (int i = 0; i < kProbeSums; ++i) { sums[i] = set1(static_cast<float>(i)); }
  for (int64_t n = 0; n < loops; ++n) {
    __asm__ volatile("" ::: "memory");
    const V w = load(factors);
    IH_UNROLL for (int i = 0; i < kProbeSums; ++i) { sums[i] = fma(w, w, sums[i]); }
  }
  V all = sums[0];
  IH_UNROLL for (int i = 1; i < kProbeSums; ++i) { all = add(all, sums[i]); }
  *sink += static_cast<int32_t>(reduce_add(all) > 0.0f);
  return static_cast<double>(loops) * kProbeSums * 32;
}

// Bytes read from p [bytes], a multiple of 512, front to back.
double probe_read(const uint8_t* p, int64_t bytes, int32_t* sink) {
  B sums[8];
  IH_UNROLL for (int i = 0; i < 8; ++i) { sums[i] = load_bytes(p + 64 * i); }
  for (int64_t at = 512; at < bytes; at += 512) {
    IH_UNROLL for (int i = 0; i < 8; ++i) {
      prefetch(p + at + 64 * i + 4096);
      sums[i] = or_bytes(sums[i], load_bytes(p + at + 64 * i));
    }
  }
  IH_UNROLL for (int i = 1; i < 8; ++i) { sums[0] = or_bytes(sums[0], sums[i]); }
  *sink += reduce_add_int(byte_of<0>(sums[0]));
  return static_cast<double>(bytes);
}

}  // namespace
}  // namespace inhouse::IH_ISA
