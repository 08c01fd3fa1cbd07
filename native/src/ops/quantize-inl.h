// quantize_row: one row of activations to int8, as packed_quantize.quantize_rows_reference defines it.
namespace inhouse::IH_ISA {
namespace {

constexpr int32_t kInfinityBits = 0x7f800000;  // of magnitudes: not finite from here on
constexpr float kTiny = 1e-30f;                // a group whose largest magnitude is below this counts as all zero

// Codes and sums of a block of n elements (`n` is below kQuantGroup at a row's end) into entry `at`.
IH_INLINE void quantize_block(const float* x, int64_t n, V inverse, const QuantRows& q, int64_t at) {
  const int64_t high = n > 16 ? n - 16 : 0;
  const V a = n >= 16 ? load(x) : load_n(x, n), b = high == 16  ? load(x + 16)
                                                    : high == 0 ? zero()
                                                                : load_n(x + 16, high);
  const VI low = to_int(mul(a, inverse)), rest = to_int(mul(b, inverse));
  store_block(q.codes + at * kQuantGroup, low, rest, q.low + at, q.sums + at);
}

IH_INLINE void zero_block(const QuantRows& q, int64_t at) {
  store_i8(q.codes + at * kQuantGroup, set1_int(0));
  store_i8(q.codes + at * kQuantGroup + 16, set1_int(0));
  q.low[at] = q.sums[at] = 0;
}

// Compared as integers, magnitudes order as floats do, with infinity and NaN on top.
IH_INLINE int32_t largest_bits(const float* x, int64_t n) {
  VI most = set1_int(0);
  int64_t i = 0;
  for (; i + 16 <= n; i += 16) most = max_int(most, magnitude_bits(load(x + i)));
  if (i < n) most = max_int(most, magnitude_bits(load_n(x + i, n - i)));
  return reduce_max_int(most);
}

// The least power of two that is not below most / 127, and not below kLeastPower.
IH_INLINE float power_scale(float most) {
  const int32_t bits = __builtin_bit_cast(int32_t, most / 127.0f);
  const float power = __builtin_bit_cast(float, (bits + 0x7fffff) & 0x7f800000);
  return power < kLeastPower ? kLeastPower : power;
}

// 1 / power, of a power of two from power_scale.
IH_INLINE float inverse_power(float power) {
  return __builtin_bit_cast(float, (254 << 23) - __builtin_bit_cast(int32_t, power));
}

// What a group's largest magnitude makes of it. A group that is not finite has codes of zero and a scale of NaN.
struct GroupScale {
  float scale, inverse;  // inverse 0: all codes are zero
};

IH_INLINE GroupScale scale_of(int32_t bits, bool powers) {
  const bool finite = bits < kInfinityBits;
  const float most = __builtin_bit_cast(float, bits);
  if (!finite) return {__builtin_nanf(""), 0.0f};
  if (powers) {
    const float power = power_scale(most);
    return {power, inverse_power(power)};
  }
  return most >= kTiny ? GroupScale{most / 127.0f, 127.0f / most} : GroupScale{0.0f, 0.0f};
}

// The elements [first, end) of a row, one group, from entry `at` on.
IH_INLINE void quantize_group(const float* x, int64_t first, int64_t end, bool powers, const QuantRows& q, int64_t at) {
  const GroupScale group = scale_of(largest_bits(x + first, end - first), powers);
  const V inverse = set1(group.inverse);
  for (int64_t i = first; i < end; i += kQuantGroup, at += q.lanes) {
    q.scales[at] = group.scale;
    if (group.inverse != 0.0f) {
      quantize_block(x + i, end - i < kQuantGroup ? end - i : kQuantGroup, inverse, q, at);
    } else {
      zero_block(q, at);
    }
  }
}

constexpr int64_t kBlocksAtOnce = 16;

// Up to kBlocksAtOnce whole blocks, each a group: all scales before all codes, so that they are made in vectors and no
// block waits for the one before it. False, and nothing done, if a block is not finite.
template <bool powers>
IH_INLINE bool quantize_blocks(const float* x, int64_t count, const QuantRows& q, int64_t at) {
  int32_t most[kBlocksAtOnce] = {};
  float scales[kBlocksAtOnce], inverses[kBlocksAtOnce];
  for (int64_t b = 0; b < count; ++b) {
    const float* block = x + b * kQuantGroup;
    most[b] = reduce_max_int(max_int(magnitude_bits(load(block)), magnitude_bits(load(block + 16))));
  }
  bool finite = true;
  for (int32_t bits : most) finite &= bits < kInfinityBits;
  if (!finite) return false;
  for (int64_t b = 0; b < kBlocksAtOnce; ++b) {  // no branches, for the compiler makes vectors of it
    const float largest = __builtin_bit_cast(float, most[b]);
    const bool some = powers || largest >= kTiny;
    const float scale = powers ? power_scale(largest) : largest / 127.0f;
    const float inverse = powers ? inverse_power(scale) : 127.0f / largest;
    scales[b] = some ? scale : 0.0f;
    inverses[b] = some ? inverse : 0.0f;
  }
  for (int64_t b = 0; b < count; ++b, at += q.lanes) {
    q.scales[at] = scales[b];
    quantize_block(x + b * kQuantGroup, kQuantGroup, set1(inverses[b]), q, at);
  }
  return true;
}

void quantize_row(const float* x, int64_t width, int64_t group, bool powers, const QuantRows& q, int64_t row) {
  int64_t at = q.at(row, 0), first = 0;
  if (group == kQuantGroup) {
    for (int64_t count = 0; first + kQuantGroup <= width; first += count * kQuantGroup, at += count * q.lanes) {
      const int64_t left = (width - first) / kQuantGroup;
      count = left < kBlocksAtOnce ? left : kBlocksAtOnce;
      if (!(powers ? quantize_blocks<true>(x + first, count, q, at)
                   : quantize_blocks<false>(x + first, count, q, at))) {
        for (int64_t b = 0; b < count; ++b) {
          const int64_t begin = first + b * kQuantGroup;
          quantize_group(x, begin, begin + kQuantGroup, powers, q, at + b * q.lanes);
        }
      }
    }
  }
  for (; first < width; first += group) {
    const int64_t end = width - first < group ? width : first + group;
    quantize_group(x, first, end, powers, q, at);
    at += (end - first + kQuantGroup - 1) / kQuantGroup * q.lanes;
  }
}

}  // namespace
}  // namespace inhouse::IH_ISA
