// quantize_row: one row of activations to int8, as packed_quantize.quantize_rows_reference defines it.
namespace inhouse::IH_ISA {
namespace {

constexpr float kTiny = 1e-30f;  // a group whose largest magnitude is below this counts as all zero

// Codes and sums of elements [0, n) of a group; n is a multiple of 16 except at a row's end.
IH_INLINE void quantize_run(const float* x, int64_t n, V inverse, int8_t* codes, int32_t* sums) {
  for (int64_t i = 0; i < n; i += 16) {
    const V v = n - i >= 16 ? load(x + i) : load_n(x + i, n - i);
    const VI q = to_int(mul(v, inverse));
    store_i8(codes + i, q);
    sums[i / 16] = reduce_add_int(q);
  }
}

IH_INLINE void zero_run(int64_t n, int8_t* codes, int32_t* sums) {
  for (int64_t i = 0; i < n; i += 16) {
    store_i8(codes + i, set1_int(0));
    sums[i / 16] = 0;
  }
}

// `group` is a multiple of 16, or not below `width`; `stride` a multiple of 32.
void quantize_row(const float* x, int64_t width, int64_t stride, int64_t group, int8_t* codes, float* scales,
                  int32_t* sums) {
  for (int64_t first = 0; first < width; first += group) {
    const int64_t n = width - first < group ? width - first : group;
    // Compared as integers, magnitudes order as floats do, with infinity and NaN on top.
    VI most_bits = set1_int(0);
    for (int64_t i = 0; i < n; i += 16) {
      const V v = n - i >= 16 ? load(x + first + i) : load_n(x + first + i, n - i);
      most_bits = max_int(most_bits, magnitude_bits(v));
    }
    const int32_t bits = reduce_max_int(most_bits);
    const bool finite = bits < 0x7f800000;
    const float most = __builtin_bit_cast(float, bits);
    if (finite && most >= kTiny) {
      *scales++ = most / 127.0f;
      quantize_run(x + first, n, set1(127.0f / most), codes + first, sums + first / 16);
    } else {
      *scales++ = finite ? 0.0f : __builtin_nanf("");
      zero_run(n, codes + first, sums + first / 16);
    }
  }
  const int64_t end = (width + 15) / 16 * 16;
  if (end < stride) zero_run(stride - end, codes + end, sums + end / 16);
}

}  // namespace
}  // namespace inhouse::IH_ISA
