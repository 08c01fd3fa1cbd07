// linear_i8: code weights times int8 activations. For each group of weights the integer dot product is exact; then
// y = fma(dot, weight scale * activation scale, y), and where there is a minimum
// y = fma(minimum, activation scale * sum of the activation codes, y), in ascending order of groups.
namespace inhouse::IH_ISA {
namespace {

constexpr int64_t kAhead = 12288;  // bytes that a sweep prefetches ahead (measured: 4 to 16 KiB)
constexpr int kStripRows = 64;     // rows whose sums are prepared at once
constexpr int64_t kTilesBytes = 384 << 10;  // of weights that stay in the second-level cache for all rows
constexpr int64_t kStarts = kMaxLanes * kMaxGroups;  // (row, group) pairs prepared at once

// What goes with each entry (QuantRows) of a strip of rows, prepared once for all tiles of a call. Where a block has two
// groups, the second half of the arrays is that of its second.
struct Strip {
  int32_t start[kStarts];  // of the dot product, in place of the zero point
  float sum[kStarts];      // activation scale * sum of codes, for the minimum
};

// Where a body that works on several rows finds what it needs: one after the other from here, `lanes` to the next block.
struct Entries {
  const int8_t* codes;
  const float* scale;
  const int32_t* start[2];  // of the first and the second group of a block
  const float* sum[2];
};

// What a dot product must start from, in units of the sum of the activation codes.
template <int ID>
constexpr int start_factor() {
  return (is_wide(kFormats[ID]) ? 128 - kWideZero : 0) - kFormats[ID].zero;
}

// The strip of `rows` rows from `row`, a multiple of the lanes. Lanes without a row hold whatever memory held.
template <int ID>
void prepare(const QuantRows& x, int64_t row, int64_t rows, Strip& strip) {
  constexpr Format f = kFormats[ID];
  constexpr bool two = Tile<ID>::halves == 2;
  constexpr uint32_t factor = static_cast<uint32_t>(start_factor<ID>());
  const int64_t from = row * x.blocks, count = (rows + x.lanes - 1) / x.lanes * x.lanes * x.blocks;
  const int32_t *sums = x.sums + from, *low = x.low + from;
  const float* scales = x.scales + from;
  const auto rest = [&](int64_t i) { return static_cast<uint32_t>(sums[i]) - static_cast<uint32_t>(low[i]); };
  for (int64_t i = 0; factor != 0 && i < count; ++i) {
    strip.start[i] = static_cast<int32_t>(factor * static_cast<uint32_t>(two ? low[i] : sums[i]));
    if (two) strip.start[count + i] = static_cast<int32_t>(factor * rest(i));
  }
  for (int64_t i = 0; f.minimum && i < count; ++i) {
    const float scale = f.two_level ? -scales[i] : scales[i];
    strip.sum[i] = static_cast<float>(two ? low[i] : sums[i]) * scale;
    if (two) strip.sum[count + i] = static_cast<float>(static_cast<int32_t>(rest(i))) * scale;
  }
}

IH_INLINE int32_t four_codes(const int8_t* p) {
  int32_t codes;
  __builtin_memcpy(&codes, p, 4);
  return codes;
}

// R rows of activations, which lie side by side from `x`, times one tile.
template <int ID, int R>
__attribute__((noinline)) void codes_tile(const Tile<ID>& tile, Entries x, int64_t lanes, V* y) {
  constexpr Format f = kFormats[ID];
  constexpr int halves = Tile<ID>::halves, quads = 8 / halves;
  V sums[R];
  IH_UNROLL for (int r = 0; r < R; ++r) { sums[r] = zero(); }
  for (int64_t b = 0; b < tile.l.blocks; ++b) {
    const uint8_t *low = tile.low(b), *high = tile.high(b);
    repeat<f.low>([&](auto i) __attribute__((always_inline)) { prefetch(low + kAhead + i.value * 64); });
    repeat<f.high>([&](auto i) __attribute__((always_inline)) { prefetch(high + kAhead + i.value * 64); });
    prefetch(tile.data + tile.l.scale + b * 32 + kAhead);
    repeat<halves>([&](auto half) __attribute__((always_inline)) {
      constexpr int h = half.value;
      VI dots[R];
      IH_UNROLL for (int r = 0; r < R; ++r) { dots[r] = set1_int(start_factor<ID>() == 0 ? 0 : x.start[h][r]); }
      repeat<quads>([&](auto i) __attribute__((always_inline)) {
        constexpr int q = h * quads + i.value;
        const B w = quad<ID, q>(low, high);
        IH_UNROLL for (int r = 0; r < R; ++r) {
          const int32_t four = four_codes(x.codes + r * kBlock + 4 * q);
          dots[r] = is_wide(f) ? dot_wide(dots[r], w, four) : dot(dots[r], w, four);
        }
      });
      const V scale = tile.scale(b, h);
      IH_UNROLL for (int r = 0; r < R; ++r) {
        sums[r] = fma(to_float(dots[r]), mul(scale, set1(x.scale[r])), sums[r]);
      }
      if constexpr (f.minimum) {
        const V minimum = tile.minimum(b, h);
        IH_UNROLL for (int r = 0; r < R; ++r) { sums[r] = fma(minimum, set1(x.sum[h][r]), sums[r]); }
      }
      x.start[h] += lanes;
      x.sum[h] += lanes;
    });
    x.codes += lanes * kBlock;
    x.scale += lanes;
  }
  IH_UNROLL for (int r = 0; r < R; ++r) { y[r] = sums[r]; }
}

// A strip: rows [first, first + rows) against tiles [begin, end).
struct Piece {
  int64_t first, rows, begin, end;
};

// Rows [row, rows) of a strip in blocks of R, then of half as many. A block goes through all tiles before the next, so
// that its activations stay in the first-level cache and its outputs are written in runs.
template <int ID, int R>
IH_INLINE void codes_rows(const Weight& w, const Layout& l, const QuantRows& x, const Strip& strip, const Piece& p,
                          int64_t row, const float* bias, float* y, int64_t ldy) {
  const int64_t count = (p.rows + x.lanes - 1) / x.lanes * x.lanes * x.blocks;
  for (; p.rows - row >= R; row += R) {
    const int64_t at = x.at(row, 0), all = p.first * x.blocks + at;
    const Entries entries = {x.codes + all * kBlock,
                             x.scales + all,
                             {strip.start + at, strip.start + count + at},
                             {strip.sum + at, strip.sum + count + at}};
    for (int64_t tile = p.begin; tile < p.end; ++tile) {
      V sums[R];
      codes_tile<ID, R>(tile_of<ID>(w, l, tile), entries, x.lanes, sums);
      for (int r = 0; r < R; ++r) store_outputs(w, tile, bias, sums[r], y + (p.first + row + r) * ldy);
    }
  }
  if constexpr (R > 1) codes_rows<ID, R / 2>(w, l, x, strip, p, row, bias, y, ldy);
}

template <int ID>
void codes_linear(const Weight& w, const QuantRows& x, int64_t rows, int64_t tile_begin, int64_t tile_end,
                  const float* bias, float* y, int64_t ldy) {
  const Layout l = layout_of(kFormats[w.format], w.in);
  const int64_t groups = l.blocks * Tile<ID>::halves;
  const int64_t fit = kStarts / groups < kStripRows ? kStarts / groups / kMaxLanes * kMaxLanes : kStripRows;
  const int64_t tiles = l.tile_bytes < kTilesBytes ? kTilesBytes / l.tile_bytes : 1;
  Strip strip;
  for (int64_t begin = tile_begin; begin < tile_end; begin += tiles) {
    const int64_t end = tile_end - begin < tiles ? tile_end : begin + tiles;
    for (int64_t row = 0; row < rows; row += fit) {
      const int64_t n = rows - row < fit ? rows - row : fit;
      if (rows > fit || begin == tile_begin) prepare<ID>(x, row, n, strip);
      codes_rows<ID, kIntRows>(w, l, x, strip, {row, n, begin, end}, 0, bias, y, ldy);
    }
  }
}

void linear_i8(const Weight& w, const QuantRows& x, int rows, int64_t tile_begin, int64_t tile_end, const float* bias,
               float* y, int64_t ldy) {
  with_codes_of(w.format, [&](auto id) {
    if constexpr (takes_int8(kFormats[id.value])) {
      codes_linear<id.value>(w, x, rows, tile_begin, tile_end, bias, y, ldy);
    }
  });
}

}  // namespace
}  // namespace inhouse::IH_ISA
