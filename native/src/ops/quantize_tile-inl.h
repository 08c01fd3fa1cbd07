// quantize_tile: float weights to q8_0, q6_0 or q4_0, sixteen rows at once, a packed tile at a time. The same
// operations in the same order as packed_quantize.py, so the same bytes.
namespace inhouse::IH_ISA {
namespace {

// The codes that the element of largest magnitude is stretched to in turn: `first`, `first` - `step`, ...
struct Extremes {
  float first, step;
  int count;
  float low, high;  // of the codes
};
constexpr Extremes kFour = {-6.5f, 0.25f, 11, -8.0f, 7.0f};  // packed_quantize.Q4_EXTREMES
constexpr Extremes kSix = {-30.0f, 1.0f, 4, -32.0f, 31.0f};  // packed_quantize.Q6_EXTREMES

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

// Scale of a group: of the candidates, the one whose codes explain most of the sum of squares.
IH_INLINE V searched_scale(const float* x, const Extremes& e) {
  V most = set1(-1.0f), extreme = zero();
  for (int k = 0; k < kBlock; ++k) {
    const V v = load(x + k * 16);
    const M more = less(most, abs(v));
    most = select(more, abs(v), most);
    extreme = select(more, v, extreme);
  }
  extreme = select(less(abs(extreme), set1(kTiny)), zero(), extreme);
  V best_gain = zero(), best_scale = zero();
  for (int i = 0; i < e.count; ++i) {
    const V inverse = divide_or_zero(set1(e.first - e.step * static_cast<float>(i)), extreme);
    V xq = zero(), qq = zero();
    for (int k = 0; k < kBlock; ++k) {
      const V v = load(x + k * 16), code = clamp(round_even(mul(v, inverse)), e.low, e.high);
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

enum Part { kWhole, kNibble, kUpper };  // of a code: all of it, its low four bits, the bits above them

// A quad of unsigned codes, or a part of each, as sixteen words, input 0 in the low byte.
template <Part P>
IH_INLINE VI quad_words(const float* x, V inverse, float low, float high, float zero_point) {
  VI words = set1_int(0);
  repeat<4>([&](auto i) __attribute__((always_inline)) {
    V code = add(clamp(round_even(mul(load(x + i.value * 16), inverse)), low, high), set1(zero_point));
    if constexpr (P != kWhole) {
      const V upper = round_even(sub(mul(code, set1(0.0625f)), set1(0.46875f)));  // floor(code / 16)
      code = P == kUpper ? upper : sub(code, mul(upper, set1(16.0f)));
    }
    words = add_int(words, shift_left<8 * i.value>(to_int(code)));
  });
  return words;
}

IH_INLINE void store_words(uint8_t* p, VI words) { store(reinterpret_cast<float*>(p), from_bits(words)); }

// One block of 4-bit or 6-bit codes: nibbles of quads q and q + 4 share a byte; the upper two bits of quads 4h .. 4h +
// 3 share vector h of the high plane.
template <bool SIX>
IH_INLINE void store_codes(const float* columns, V inverse, const Extremes& e, uint8_t* low, uint8_t* high) {
  VI upper[2] = {set1_int(0), set1_int(0)};
  repeat<4>([&](auto q) __attribute__((always_inline)) {
    const float *first = columns + q.value * 64, *second = first + 4 * 64;
    store_words(low + q.value * 64,
                add_int(quad_words<SIX ? kNibble : kWhole>(first, inverse, e.low, e.high, -e.low),
                        shift_left<4>(quad_words<SIX ? kNibble : kWhole>(second, inverse, e.low, e.high, -e.low))));
    if constexpr (SIX) {
      const VI a = quad_words<kUpper>(first, inverse, e.low, e.high, -e.low);
      const VI b = quad_words<kUpper>(second, inverse, e.low, e.high, -e.low);
      upper[0] = add_int(upper[0], shift_left<2 * q.value>(a));
      upper[1] = add_int(upper[1], shift_left<2 * q.value>(b));
    }
  });
  if constexpr (SIX) {
    store_words(high, upper[0]);
    store_words(high + 64, upper[1]);
  }
}

// `format` passes can_quantize; x [rows][in], rows <= 16, every element finite; fills one whole tile.
void quantize_tile(int format, const float* x, int64_t rows, int64_t in, uint8_t* tile) {
  const Layout l = layout_of(kFormats[format], in);
  const bool wide = kFormats[format].low == 8, six = kFormats[format].high == 2;
  const Extremes& e = six ? kSix : kFour;
  for (int64_t i = l.supers * 32; i < l.low; ++i) tile[i] = 0;
  alignas(64) float columns[kBlock * 16];
  for (int64_t b = 0; b < l.blocks; ++b) {
    for (int k = 0; k < kBlock; ++k) {
      const int64_t at = b * kBlock + k;
      for (int64_t r = 0; r < 16; ++r) columns[k * 16 + r] = r < rows && at < in ? x[r * in + at] : 0.0f;
    }
    const V scale = through_f16(wide ? scale_q8(columns) : searched_scale(columns, e), tile + l.scale + b * 32);
    const V inverse = divide_or_zero(set1(1.0f), scale);
    uint8_t* low = tile + l.low + b * kFormats[format].low * 64;
    if (wide) {
      for (int q = 0; q < 8; ++q)
        store_words(low + q * 64, quad_words<kWhole>(columns + q * 64, inverse, -127.0f, 127.0f, 128.0f));
    } else {
      (six ? store_codes<true> : store_codes<false>)(columns, inverse, e, low, tile + l.high + b * 128);
    }
  }
}

}  // namespace
}  // namespace inhouse::IH_ISA
