// quantize_row: one row of activations to int8, as packed_quantize.quantize_rows_reference defines it.
namespace inhouse::IH_ISA {
namespace {

constexpr float kTiny = 1e-30f;  // a group whose largest magnitude is below this counts as all zero

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

void quantize_row(const float* x, int64_t width, int64_t group, bool powers, const QuantRows& q, int64_t row) {
  int64_t at = q.at(row, 0);
  for (int64_t first = 0; first < width; first += group) {
    const int64_t end = width - first < group ? width : first + group;
    const int32_t bits = largest_bits(x + first, end - first);
    const bool finite = bits < 0x7f800000;
    const float most = __builtin_bit_cast(float, bits);
    const bool some = finite && (powers || most >= kTiny);
    const float found = powers ? power_scale(most) : most / 127.0f;
    const float scale = some ? found : finite ? 0.0f : __builtin_nanf("");
    const V inverse = set1(!some ? 0.0f : powers ? inverse_power(scale) : 127.0f / most);
    for (int64_t i = first; i < end; i += kQuantGroup, at += q.lanes) {
      q.scales[at] = scale;
      if (some) {
        quantize_block(x + i, end - i < kQuantGroup ? end - i : kQuantGroup, inverse, q, at);
      } else {
        zero_block(q, at);
      }
    }
  }
}

}  // namespace
}  // namespace inhouse::IH_ISA
