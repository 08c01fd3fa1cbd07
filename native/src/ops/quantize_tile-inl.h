// quantize_tile: float weights to q8_0 or q4_0, sixteen rows at once, a packed tile at a time. The same operations in
// the same order as packed_quantize.py, so the same bytes.
namespace inhouse::IH_ISA {
namespace {

constexpr int kExtremes = 11;  // packed_quantize.Q4_EXTREMES: -6.5, -6.75, ... -9

IH_INLINE V divide_or_zero(V numerator, V v) { return select(less(zero(), abs(v)), div(numerator, v), zero()); }
IH_INLINE V clamp(V v, float low, float high) { return min(max(v, set1(low)), set1(high)); }

// `v` rounded to f16 and back; the f16 goes to `out`.
IH_INLINE V through_f16(V v, uint8_t* out) {
  uint16_t* halves = reinterpret_cast<uint16_t*>(out);
  store_f16(halves, v);
  return load_f16(halves);
}

// Scale of a group for q8_0; x [32][16].
IH_INLINE V scale_q8(const float* x) {
  V most = zero();
  for (int k = 0; k < kBlock; ++k) most = max(most, abs(load(x + k * 16)));
  return div(most, set1(127.0f));
}

// Scale of a group for q4_0: of the candidates, the one whose codes explain most of the sum of squares.
IH_INLINE V scale_q4(const float* x) {
  V most = set1(-1.0f), extreme = zero();
  for (int k = 0; k < kBlock; ++k) {
    const V v = load(x + k * 16);
    const M more = less(most, abs(v));
    most = select(more, abs(v), most);
    extreme = select(more, v, extreme);
  }
  extreme = select(less(abs(extreme), set1(kTiny)), zero(), extreme);
  V best_gain = zero(), best_scale = zero();
  for (int i = 0; i < kExtremes; ++i) {
    const V inverse = divide_or_zero(set1(-6.5f - 0.25f * static_cast<float>(i)), extreme);
    V xq = zero(), qq = zero();
    for (int k = 0; k < kBlock; ++k) {
      const V v = load(x + k * 16), code = clamp(round_even(mul(v, inverse)), -8.0f, 7.0f);
      xq = add(xq, mul(v, code));
      qq = add(qq, mul(code, code));
    }
    const V scale = divide_or_zero(xq, qq), gain = mul(xq, scale);
    const M better = less(best_gain, gain);
    best_gain = select(better, gain, best_gain);
    best_scale = select(better, scale, best_scale);
  }
  return best_scale;
}

// A quad of unsigned codes as sixteen words, input 0 in the low byte.
IH_INLINE VI quad_words(const float* x, V inverse, float low, float high, float zero_point) {
  VI words = set1_int(0);
  repeat<4>([&](auto i) __attribute__((always_inline)) {
    const V code = clamp(round_even(mul(load(x + i.value * 16), inverse)), low, high);
    words = add_int(words, shift_left<8 * i.value>(to_int(add(code, set1(zero_point)))));
  });
  return words;
}

IH_INLINE void store_words(uint8_t* p, VI words) { store(reinterpret_cast<float*>(p), from_bits(words)); }

// `format` is 3 (q8_0) or 4 (q4_0); x [rows][in], rows <= 16, every element finite; fills one whole tile.
void quantize_tile(int format, const float* x, int64_t rows, int64_t in, uint8_t* tile) {
  const Layout l = layout_of(kFormats[format], in);
  const bool wide = kFormats[format].low == 8;
  for (int64_t i = l.supers * 32; i < l.low; ++i) tile[i] = 0;
  alignas(64) float columns[kBlock * 16];
  for (int64_t b = 0; b < l.blocks; ++b) {
    for (int k = 0; k < kBlock; ++k) {
      const int64_t at = b * kBlock + k;
      for (int64_t r = 0; r < 16; ++r) columns[k * 16 + r] = r < rows && at < in ? x[r * in + at] : 0.0f;
    }
    const V scale = through_f16(wide ? scale_q8(columns) : scale_q4(columns), tile + l.scale + b * 32);
    const V inverse = divide_or_zero(set1(1.0f), scale);
    uint8_t* low = tile + l.low + b * kFormats[format].low * 64;
    for (int q = 0; q < (wide ? 8 : 4); ++q) {
      const float* quad = columns + q * 64;
      if (wide) {
        store_words(low + q * 64, quad_words(quad, inverse, -127.0f, 127.0f, 128.0f));
      } else {
        const VI upper = quad_words(quad + 4 * 64, inverse, -8.0f, 7.0f, 8.0f);
        store_words(low + q * 64, add_int(quad_words(quad, inverse, -8.0f, 7.0f, 8.0f), shift_left<4>(upper)));
      }
    }
  }
}

}  // namespace
}  // namespace inhouse::IH_ISA
