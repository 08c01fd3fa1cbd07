// linear_i8: code weights times int8 activations. For each group of weights the integer dot product is exact; then
// y = fma(dot, weight scale * activation scale, y), and where there is a minimum
// y = fma(minimum, activation scale * sum of the activation codes, y), in ascending order of groups.
namespace inhouse::IH_ISA {
namespace {

constexpr int64_t kAhead = 8192;   // bytes that a sweep prefetches ahead
constexpr int kStripRows = 64;     // rows whose sums are prepared at once and that share a tile while it is in L2
constexpr int64_t kStarts = 8192;  // (row, group) pairs prepared at once; bounds a matrix's inputs (kMaxInputs)

// What a strip of rows adds to each group's dot product, prepared once for all tiles of a call.
struct Strip {
  int32_t start[kStarts];  // [rows][groups] in place of the zero point
  float sum[kStarts];      // [rows][groups] activation scale * sum of codes, for the minimum
};

// What a dot product must start from, in units of the sum of the activation codes.
template <int ID>
constexpr int start_factor() {
  return (kFormats[ID].low == 8 ? 128 - kWideZero : 0) - kFormats[ID].zero;
}

template <int ID>
void prepare(const QuantRows& x, int64_t row, int64_t rows, int64_t groups, Strip& strip) {
  constexpr Format f = kFormats[ID];
  constexpr int parts = f.group == 16 ? 1 : 2;  // sums of 16 codes in a group, or in a block
  for (int64_t r = 0; r < rows; ++r) {
    const int32_t* sums = x.sums + (row + r) * (x.stride / 16);
    const float* scales = x.scales + (row + r) * x.groups;
    for (int64_t g = 0; g < groups; ++g) {
      const int32_t sum = parts == 1 ? sums[g] : sums[2 * g] + sums[2 * g + 1];
      strip.start[r * groups + g] = start_factor<ID>() * sum;
      if constexpr (f.minimum) {
        const float scale = scales[x.groups == 1 ? 0 : parts == 1 ? g / 2 : g];
        strip.sum[r * groups + g] = static_cast<float>(sum) * (f.two_level ? -scale : scale);
      }
    }
  }
}

IH_INLINE int32_t four_codes(const int8_t* p) {
  int32_t codes;
  __builtin_memcpy(&codes, p, 4);
  return codes;
}

// R rows of activations times one tile; `row` counts within the strip, x.codes and x.scales start at the strip.
template <int ID, int R>
void codes_tile(const Tile<ID>& tile, const QuantRows& x, const Strip& strip, int64_t row, V* y) {
  constexpr Format f = kFormats[ID];
  constexpr int halves = Tile<ID>::halves, quads = 8 / halves;
  const int64_t groups = tile.l.blocks * halves, per_block = x.groups > 1 ? 1 : 0;  // or one scale for a whole row
  V sums[R];
  repeat<R>([&](auto r) __attribute__((always_inline)) { sums[r.value] = zero(); });
  for (int64_t b = 0; b < tile.l.blocks; ++b) {
    const uint8_t *low = tile.low(b), *high = tile.high(b);
    repeat<f.low>([&](auto i) __attribute__((always_inline)) { prefetch(low + kAhead + i.value * 64); });
    repeat<f.high>([&](auto i) __attribute__((always_inline)) { prefetch(high + kAhead + i.value * 64); });
    const int8_t* codes = x.codes + row * x.stride + b * kBlock;
    repeat<halves>([&](auto half) __attribute__((always_inline)) {
      constexpr int h = half.value;
      const int64_t at = row * groups + b * halves + h;
      VI dots[R];
      repeat<R>([&](auto r) __attribute__((always_inline)) {
        dots[r.value] = set1_int(start_factor<ID>() == 0 ? 0 : strip.start[at + r.value * groups]);
      });
      repeat<quads>([&](auto i) __attribute__((always_inline)) {
        constexpr int q = h * quads + i.value;
        const B w = quad<ID, q>(low, high);
        repeat<R>([&](auto r) __attribute__((always_inline)) {
          const int32_t four = four_codes(codes + r.value * x.stride + 4 * q);
          dots[r.value] = f.low == 8 ? dot_wide(dots[r.value], w, four) : dot(dots[r.value], w, four);
        });
      });
      const V scale = tile.scale(b, h);
      repeat<R>([&](auto r) __attribute__((always_inline)) {
        const V both = mul(scale, set1(x.scales[(row + r.value) * x.groups + b * per_block]));
        sums[r.value] = fma(to_float(dots[r.value]), both, sums[r.value]);
      });
      if constexpr (f.minimum) {
        const V minimum = tile.minimum(b, h);
        repeat<R>([&](auto r) __attribute__((always_inline)) {
          sums[r.value] = fma(minimum, set1(strip.sum[at + r.value * groups]), sums[r.value]);
        });
      }
    });
  }
  repeat<R>([&](auto r) __attribute__((always_inline)) { y[r.value] = sums[r.value]; });
}

// Rows [row, rows) of the strip in blocks of R, then of half as many.
template <int ID, int R>
IH_INLINE void codes_rows(const Weight& w, const Layout& l, const QuantRows& x, const Strip& strip, int64_t row,
                          int64_t rows, int64_t tile, const float* bias, float* y, int64_t ldy) {
  for (; rows - row >= R; row += R) {
    V sums[R];
    codes_tile<ID, R>(tile_of<ID>(w, l, tile), x, strip, row, sums);
    for (int r = 0; r < R; ++r) store_outputs(w, tile, bias, sums[r], y + (row + r) * ldy);
  }
  if constexpr (R > 1) codes_rows<ID, R / 2>(w, l, x, strip, row, rows, tile, bias, y, ldy);
}

void linear_i8(const Weight& w, const QuantRows& x, int rows, int64_t tile_begin, int64_t tile_end, const float* bias,
               float* y, int64_t ldy) {
  const Layout l = layout_of(kFormats[w.format], w.in);
  with_codes_of(w.format, [&](auto id) {
    constexpr int ID = id.value;
    const int64_t groups = l.blocks * Tile<ID>::halves;
    int64_t fit = kStarts / groups < kStripRows ? kStarts / groups : kStripRows;
    if (fit > kIntRows) fit -= fit % kIntRows;
    Strip strip;
    for (int64_t row = 0; row < rows; row += fit) {
      const int64_t n = rows - row < fit ? rows - row : fit;
      prepare<ID>(x, row, n, groups, strip);
      QuantRows part = x;
      part.codes += row * x.stride;
      part.scales += row * x.groups;
      for (int64_t tile = tile_begin; tile < tile_end; ++tile) {
        codes_rows<ID, kIntRows>(w, l, part, strip, 0, n, tile, bias, y + row * ldy, ldy);
      }
    }
  });
}

}  // namespace
}  // namespace inhouse::IH_ISA
