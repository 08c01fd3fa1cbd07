// linear_i8: code weights times int8 activations. For each group of weights the integer dot product is exact; then
// y = fma(dot, weight scale * activation scale, y), and where there is a minimum
// y = fma(minimum, activation scale * sum of the activation codes, y), in ascending order of groups.
namespace inhouse::IH_ISA {
namespace {

constexpr int64_t kAhead = 16384;           // bytes that a sweep prefetches ahead (measured: docs/performance-log.md)
constexpr int kStripRows = 64;              // rows whose sums are prepared at once
constexpr int64_t kTilesBytes = 384 << 10;  // of weights that stay in the second-level cache for all rows
constexpr int64_t kStarts = kMaxLanes * kMaxGroups;  // (row, group) pairs prepared at once

// What goes with each entry (QuantRows) of a strip of rows, prepared once for all tiles of a call. Where a block has
// two groups, the second half of the arrays is that of its second.
struct Strip {
  int32_t start[kStarts];  // of the dot product, in place of the zero point
  float sum[kStarts];      // activation scale * sum of codes, for the minimum
};

// Where a body that works on several rows finds what it needs: one after the other from here, `lanes` to the next
// block.
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

// Entries [from, from + count) of `x` into the strip from `to`; the second half of its arrays starts at `half`.
template <int ID>
void prepare_run(const QuantRows& x, int64_t from, int64_t count, Strip& strip, int64_t to, int64_t half) {
  constexpr bool two = Tile<ID>::halves == 2;
  constexpr uint32_t factor = static_cast<uint32_t>(start_factor<ID>());
  const int32_t *sums = x.sums + from, *low = x.low + from;
  const float* scales = x.scales + from;
  int32_t *start = strip.start + to, *start2 = start + half;
  float *sum = strip.sum + to, *sum2 = sum + half;
  const auto rest = [&](int64_t i) { return static_cast<uint32_t>(sums[i]) - static_cast<uint32_t>(low[i]); };
  for (int64_t i = 0; factor != 0 && i < count; ++i) {
    start[i] = static_cast<int32_t>(factor * static_cast<uint32_t>(two ? low[i] : sums[i]));
    if (two) start2[i] = static_cast<int32_t>(factor * rest(i));
  }
  for (int64_t i = 0; Tile<ID>::offset && i < count; ++i) {
    const float scale = Tile<ID>::taken ? -scales[i] : scales[i];
    sum[i] = static_cast<float>(two ? low[i] : sums[i]) * scale;
    if (two) sum2[i] = static_cast<float>(static_cast<int32_t>(rest(i))) * scale;
  }
}

// Whether the product of a scale of the tile and one of the activations may come from adding exponents, where the
// latter are powers of two: scales of f16 are normal numbers as floats, and codes of more bits keep finer scales.
template <int ID>
bool may_add_exponents(const Weight& w) {
  constexpr Format f = kFormats[ID];
  return kAddsExponents && f.low + f.high <= 6 && (f.family ? kFormats[w.format].scale : f.scale) == kF16;
}

// Rows [first, end) of the view against tiles [begin, tiles_end); their lanes lie in [group, groups_end).
struct Piece {
  int64_t first, end, begin, tiles_end;
  int64_t group, groups_end;
};

// All lanes of a piece. Those without a row hold whatever memory held.
template <int ID>
void prepare(const QuantRows& x, const Piece& p, int64_t blocks, Strip& strip) {
  const int64_t run = blocks * x.lanes;
  for (int64_t g = p.group; g < p.groups_end; ++g) {
    prepare_run<ID>(x, (g * x.blocks + x.block) * x.lanes, run, strip, (g - p.group) * run,
                    (p.groups_end - p.group) * run);
  }
}

// Whether `count` scales, each `step` after the other, are powers of two that exponents can be added for.
inline bool are_powers(const float* scales, int64_t count, int64_t step) {
  int32_t mantissas = 0;
  bool inside = true;
  for (int64_t i = 0; i < count; ++i) {
    const float scale = scales[i * step];
    mantissas |= __builtin_bit_cast(int32_t, scale) & 0x7fffff;
    inside &= scale >= kLeastPower && scale <= kMostPower;
  }
  return mantissas == 0 && inside;
}

// The same of all rows of a piece.
inline bool has_powers(const QuantRows& x, const Piece& p, int64_t blocks) {
  for (int64_t row = p.first; row < p.end;) {
    const int64_t lane = (x.row + row) % x.lanes, n = x.lanes - lane < p.end - row ? x.lanes - lane : p.end - row;
    const float* scales = x.scales + x.at(row, 0);
    if (n == x.lanes) {
      if (!are_powers(scales, blocks * n, 1)) return false;
    } else {
      for (int64_t r = 0; r < n; ++r) {
        if (!are_powers(scales + r, blocks, x.lanes)) return false;
      }
    }
    row += n;
  }
  return true;
}

IH_INLINE int32_t four_codes(const int8_t* p) {
  int32_t codes;
  __builtin_memcpy(&codes, p, 4);
  return codes;
}

// Whether the sums over a block of the format's codes may stay narrow.
constexpr bool is_small(const Format& f) { return f.table == kPlain && f.low + f.high <= 4; }

template <bool SMALL, bool WIDE>
struct Dots {
  VI sums;
  IH_INLINE void begin(int32_t start) { sums = set1_int(start); }
  IH_INLINE void add(B w, int32_t four) { sums = WIDE ? dot_wide(sums, w, four) : dot(sums, w, four); }
  IH_INLINE VI end(int32_t) const { return sums; }
};

template <bool WIDE>
struct Dots<true, WIDE> {
  Narrow sums;
  IH_INLINE void begin(int32_t start) { sums = narrow(start); }
  IH_INLINE void add(B w, int32_t four) { sums = dot_narrow(sums, w, four); }
  IH_INLINE VI end(int32_t start) const { return widen(sums, start); }
};

IH_INLINE V times(V scale, float by) { return mul(scale, set1(by)); }

// A scale of weights, made ready to be multiplied with scales of activations.
template <bool POWERS>
IH_INLINE auto factor_of(V scale) {
  if constexpr (POWERS) {
    return powered(scale);
  } else {
    return scale;
  }
}

// R rows of activations, which lie side by side from `x`, times one tile. POWERS: their scales are powers of two; the
// bits are the same, sooner.
template <int ID, int R, bool POWERS>
__attribute__((noinline)) void codes_tile(const Tile<ID>& tile, Entries x, int64_t lanes, V* y) {
  constexpr Format f = kFormats[ID];
  constexpr int halves = Tile<ID>::halves, quads = 8 / halves;
  using Sums = Dots<is_small(kFormats[ID]), is_wide(kFormats[ID])>;
  V sums[R];
  IH_UNROLL for (int r = 0; r < R; ++r) { sums[r] = zero(); }
  for (int64_t b = 0; b < tile.l.blocks; ++b) {
    const uint8_t *low = tile.low(b), *high = tile.high(b);
    repeat<f.low>([&](auto i) __attribute__((always_inline)) { prefetch(low + kAhead + i.value * 64); });
    repeat<f.high>([&](auto i) __attribute__((always_inline)) { prefetch(high + kAhead + i.value * 64); });
    prefetch(tile.data + tile.l.scale + b * 32 + kAhead);
    repeat<halves>([&](auto half) __attribute__((always_inline)) {
      constexpr int h = half.value;
      const auto start = [&](int r) { return start_factor<ID>() == 0 ? 0 : x.start[h][r]; };
      Sums dots[R];
      IH_UNROLL for (int r = 0; r < R; ++r) { dots[r].begin(start(r)); }
      repeat<quads>([&](auto i) __attribute__((always_inline)) {
        constexpr int q = h * quads + i.value;
        const B w = quad<ID, q>(low, high);
        IH_UNROLL for (int r = 0; r < R; ++r) { dots[r].add(w, four_codes(x.codes + r * kBlock + 4 * q)); }
      });
      const V scale = tile.scale(b, h);
      const auto factor = factor_of<POWERS>(scale);
      IH_UNROLL for (int r = 0; r < R; ++r) {
        sums[r] = fma(to_float(dots[r].end(start(r))), times(factor, x.scale[r]), sums[r]);
      }
      if constexpr (Tile<ID>::offset) {
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

// Rows that a body takes at once from `row` on: a power of two that its lanes and the rows left allow.
inline int64_t rows_at_once(const QuantRows& x, int64_t row, int64_t end) {
  int64_t n = kIntRows;
  while (n > 1 && (n > x.lanes || n > end - row || (x.row + row) % n != 0)) n /= 2;
  return n;
}

// `n` rows (R, or less) through all tiles of the piece: their activations stay in the first-level cache, and outputs
// are written in runs.
template <int ID, int R, bool POWERS>
IH_INLINE void codes_rows(const Weight& w, const Layout& l, const QuantRows& x, const Strip& strip, const Piece& p,
                          int64_t row, int64_t n, const float* bias, float* y, int64_t ldy) {
  if (n == R) {
    const int64_t all = x.at(row, 0), run = l.blocks * x.lanes, half = (p.groups_end - p.group) * run;
    const int64_t at = ((x.row + row) / x.lanes - p.group) * run + (x.row + row) % x.lanes;
    const Entries entries = {x.codes + all * kBlock,
                             x.scales + all,
                             {strip.start + at, strip.start + half + at},
                             {strip.sum + at, strip.sum + half + at}};
    for (int64_t tile = p.begin; tile < p.tiles_end; ++tile) {
      V sums[R];
      codes_tile<ID, R, POWERS>(tile_of<ID>(w, l, tile), entries, x.lanes, sums);
      for (int r = 0; r < R; ++r) store_outputs(w, tile, bias, sums[r], y + (row + r) * ldy);
    }
  } else if constexpr (R > 1) {
    codes_rows<ID, R / 2, POWERS>(w, l, x, strip, p, row, n, bias, y, ldy);
  }
}

template <int ID>
void codes_linear(const Weight& w, const QuantRows& x, int64_t rows, int64_t tile_begin, int64_t tile_end,
                  const float* bias, float* y, int64_t ldy) {
  const Layout l = layout_of(kFormats[w.format], w.in);
  const int64_t starts = l.blocks * Tile<ID>::halves * x.lanes;  // of one group of lanes
  const int64_t fit = kStarts / starts < kStripRows / x.lanes ? kStarts / starts : kStripRows / x.lanes;
  const int64_t tiles = l.tile_bytes < kTilesBytes ? kTilesBytes / l.tile_bytes : 1;
  const int64_t groups_end = (x.row + rows + x.lanes - 1) / x.lanes, group = x.row / x.lanes;
  const bool may = may_add_exponents<ID>(w);
  Strip strip;
  for (int64_t begin = tile_begin; begin < tile_end; begin += tiles) {
    const int64_t end = tile_end - begin < tiles ? tile_end : begin + tiles;
    for (int64_t g = group; g < groups_end; g += fit) {
      const int64_t last = groups_end - g < fit ? groups_end : g + fit;
      const int64_t first = g == group ? 0 : g * x.lanes - x.row;
      const int64_t stop = last == groups_end ? rows : last * x.lanes - x.row;
      const Piece piece = {first, stop, begin, end, g, last};
      if (groups_end - group > fit || begin == tile_begin) prepare<ID>(x, piece, l.blocks, strip);
      const bool powers = may && has_powers(x, piece, l.blocks);
      for (int64_t row = first; row < stop;) {
        const int64_t n = rows_at_once(x, row, stop);
        if constexpr (kAddsExponents && kFormats[ID].low + kFormats[ID].high <= 6) {
          if (powers) codes_rows<ID, kIntRows, true>(w, l, x, strip, piece, row, n, bias, y, ldy);
        }
        if (!powers) codes_rows<ID, kIntRows, false>(w, l, x, strip, piece, row, n, bias, y, ldy);
        row += n;
      }
    }
  }
}

}  // namespace
}  // namespace inhouse::IH_ISA
