// linear_i8: code weights times int8 activations. For each group of weights the integer dot product is exact; then
// y = fma(dot, weight scale * activation scale, y), and where there is a minimum
// y = fma(minimum, activation scale * sum of the activation codes, y), in ascending order of groups.
namespace inhouse::IH_ISA {
namespace {

constexpr int64_t kAhead = 12288;  // bytes that a sweep prefetches ahead (measured: 4 to 16 KiB)
constexpr int kStripRows = 64;     // rows whose sums are prepared at once and that share a tile while it is in L2
constexpr int64_t kStarts = 8 * kMaxGroups;  // (row, group) pairs prepared at once

// What goes with each (row, group) of a strip of rows, prepared once for all tiles of a call. Eight rows lie together,
// so that a body reaches them from one address: entry [row / 8][group][row % 8].
struct Strip {
  int32_t start[kStarts];  // of the dot product, in place of the zero point
  float scale[kStarts];    // of the activations
  float sum[kStarts];      // activation scale * sum of codes, for the minimum
};

// What a dot product must start from, in units of the sum of the activation codes.
template <int ID>
constexpr int start_factor() {
  return (is_wide(kFormats[ID]) ? 128 - kWideZero : 0) - kFormats[ID].zero;
}

template <int ID>
void prepare(const QuantRows& x, int64_t rows, int64_t groups, Strip& strip) {
  constexpr Format f = kFormats[ID];
  constexpr int halves = Tile<ID>::halves, sixteens = 2 / halves;
  for (int64_t r = 0; r < rows; ++r) {
    const int32_t* sums = x.sums + r * (x.stride / 16);
    const float* scales = x.scales + r * x.groups;
    for (int64_t g = 0; g < groups; ++g) {
      const int64_t at = (r / 8 * groups + g) * 8 + r % 8;
      const int32_t sum = sixteens == 1 ? sums[g] : sums[2 * g] + sums[2 * g + 1];
      const float scale = scales[x.groups > 1 ? g / halves : 0];  // one for a block, or for the whole row
      strip.start[at] = start_factor<ID>() * sum;
      strip.scale[at] = scale;
      if constexpr (f.minimum) strip.sum[at] = static_cast<float>(sum) * (f.two_level ? -scale : scale);
    }
  }
}

IH_INLINE int32_t four_codes(const int8_t* p) {
  int32_t codes;
  __builtin_memcpy(&codes, p, 4);
  return codes;
}

// R rows of activations times one tile; `row` counts within the strip, where `codes` [rows][stride] starts. R is a
// power of two and divides `row`.
template <int ID, int R>
__attribute__((noinline)) void codes_tile(const Tile<ID>& tile, const int8_t* codes, int64_t stride, const Strip& strip,
                                          int64_t row, V* y) {
  constexpr Format f = kFormats[ID];
  constexpr int halves = Tile<ID>::halves, quads = 8 / halves;
  const int64_t groups = tile.l.blocks * halves;
  V sums[R];
  IH_UNROLL for (int r = 0; r < R; ++r) { sums[r] = zero(); }
  for (int64_t b = 0; b < tile.l.blocks; ++b) {
    const uint8_t *low = tile.low(b), *high = tile.high(b);
    repeat<f.low>([&](auto i) __attribute__((always_inline)) { prefetch(low + kAhead + i.value * 64); });
    repeat<f.high>([&](auto i) __attribute__((always_inline)) { prefetch(high + kAhead + i.value * 64); });
    prefetch(tile.data + tile.l.scale + b * 32 + kAhead);
    const int8_t* fours = codes + row * stride + b * kBlock;
    repeat<halves>([&](auto half) __attribute__((always_inline)) {
      constexpr int h = half.value;
      const int64_t at = (row / 8 * groups + b * halves + h) * 8 + row % 8;
      VI dots[R];
      IH_UNROLL for (int r = 0; r < R; ++r) { dots[r] = set1_int(start_factor<ID>() == 0 ? 0 : strip.start[at + r]); }
      repeat<quads>([&](auto i) __attribute__((always_inline)) {
        constexpr int q = h * quads + i.value;
        const B w = quad<ID, q>(low, high);
        IH_UNROLL for (int r = 0; r < R; ++r) {
          const int32_t four = four_codes(fours + r * stride + 4 * q);
          dots[r] = is_wide(f) ? dot_wide(dots[r], w, four) : dot(dots[r], w, four);
        }
      });
      const V scale = tile.scale(b, h);
      IH_UNROLL for (int r = 0; r < R; ++r) {
        const V both = mul(scale, set1(strip.scale[at + r]));
        sums[r] = fma(to_float(dots[r]), both, sums[r]);
      }
      if constexpr (f.minimum) {
        const V minimum = tile.minimum(b, h);
        IH_UNROLL for (int r = 0; r < R; ++r) { sums[r] = fma(minimum, set1(strip.sum[at + r]), sums[r]); }
      }
    });
  }
  IH_UNROLL for (int r = 0; r < R; ++r) { y[r] = sums[r]; }
}

// Rows [row, rows) of the strip in blocks of R, then of half as many.
template <int ID, int R>
IH_INLINE void codes_rows(const Weight& w, const Layout& l, const QuantRows& x, const Strip& strip, int64_t row,
                          int64_t rows, int64_t tile, const float* bias, float* y, int64_t ldy) {
  for (; rows - row >= R; row += R) {
    V sums[R];
    codes_tile<ID, R>(tile_of<ID>(w, l, tile), x.codes, x.stride, strip, row, sums);
    for (int r = 0; r < R; ++r) store_outputs(w, tile, bias, sums[r], y + (row + r) * ldy);
  }
  if constexpr (R > 1) codes_rows<ID, R / 2>(w, l, x, strip, row, rows, tile, bias, y, ldy);
}

void linear_i8(const Weight& w, const QuantRows& x, int rows, int64_t tile_begin, int64_t tile_end, const float* bias,
               float* y, int64_t ldy) {
  const Layout l = layout_of(kFormats[w.format], w.in);
  with_codes_of(w.format, [&](auto id) {
    constexpr int ID = id.value;
    if constexpr (takes_int8(kFormats[ID])) {
      const int64_t groups = l.blocks * Tile<ID>::halves;
      const int64_t fit = kStarts / groups < kStripRows ? kStarts / groups / 8 * 8 : kStripRows;
      Strip strip;
      for (int64_t row = 0; row < rows; row += fit) {
        const int64_t n = rows - row < fit ? rows - row : fit;
        QuantRows part = x;
        part.codes += row * x.stride;
        part.scales += row * x.groups;
        part.sums += row * (x.stride / 16);
        prepare<ID>(part, n, groups, strip);
        for (int64_t tile = tile_begin; tile < tile_end; ++tile) {
          codes_rows<ID, kIntRows>(w, l, part, strip, 0, n, tile, bias, y + row * ldy, ldy);
        }
      }
    }
  });
}

}  // namespace
}  // namespace inhouse::IH_ISA
