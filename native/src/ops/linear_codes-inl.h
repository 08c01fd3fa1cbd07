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

// Rows [first, end) of the view against tiles [begin, tiles_end); their lanes lie in [group, groups_end). `fresh`: the
// first rows to read these tiles.
struct Piece {
  int64_t first, end, begin, tiles_end;
  int64_t group, groups_end;
  bool fresh;
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

// Whether an f16 scale of a tile is an infinity or a NaN: exponents are not added to those.
template <int ID>
bool is_endless(const Tile<ID>& tile) {
  const uint8_t* p = tile.data + tile.l.scale;
  uint16_t most = 0;
  for (int64_t i = 0; i < tile.l.supers * kTileRows; ++i) {  // in vectors
    uint16_t bits;
    __builtin_memcpy(&bits, p + 2 * i, 2);
    bits = static_cast<uint16_t>(bits << 1);  // without the sign
    most = bits > most ? bits : most;
  }
  return most >= 0xf800;
}

// Zero if `scale` is a power of two that exponents can be added for.
inline uint32_t is_no_power(float scale) {
  constexpr uint32_t least = __builtin_bit_cast(uint32_t, kLeastPower), most = __builtin_bit_cast(uint32_t, kMostPower);
  const uint32_t bits = __builtin_bit_cast(uint32_t, scale);
  return (bits & 0x7fffff) | static_cast<uint32_t>(bits - least > most - least);
}

// Whether `count` scales, each `step` after the other, are such powers.
inline bool are_powers(const float* scales, int64_t count, int64_t step) {
  uint32_t wrong = 0;
  for (int64_t i = 0; step == 1 && i < count; ++i) wrong |= is_no_power(scales[i]);  // in vectors
  for (int64_t i = 0; step != 1 && i < count; ++i) wrong |= is_no_power(scales[i * step]);
  return wrong == 0;
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

IH_INLINE Four four_codes(const int8_t* p) {
  int32_t codes;
  __builtin_memcpy(&codes, p, 4);
  return four(codes);
}

// Whether the sums over a block of the format's codes may stay narrow.
constexpr bool is_small(const Format& f) { return f.table == kPlain && f.low + f.high <= 4; }

template <bool SMALL, bool WIDE>
struct Dots {
  VI sums;
  IH_INLINE void begin(int32_t start) { sums = set1_int(start); }
  IH_INLINE void add(B w, Four x) { sums = WIDE ? dot_wide(sums, w, x) : dot(sums, w, x); }
  IH_INLINE VI end(int32_t) const { return sums; }
};

template <bool WIDE>
struct Dots<true, WIDE> {
  Narrow sums;
  IH_INLINE void begin(int32_t start) { sums = narrow(start); }
  IH_INLINE void add(B w, Four x) { sums = dot_narrow(sums, w, x); }
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

template <int ID>
IH_INLINE void ask_for(const Tile<ID>& tile, int64_t b) {
  constexpr Format f = kFormats[ID];
  repeat<f.low>([&](auto i) __attribute__((always_inline)) { prefetch(tile.low(b) + i.value * 64); });
  repeat<f.high>([&](auto i) __attribute__((always_inline)) { prefetch(tile.high(b) + i.value * 64); });
  prefetch(tile.data + tile.l.scale + b * 32);
}

// R rows of activations, which lie side by side from `x`, times T tiles from `tile` on: y [R][T * 16], a row `ldy`
// after the other. What is read of the rows serves all tiles. POWERS: the scales are powers of two; the bits are the
// same, sooner. ASKS: for the tiles `ahead` bytes further; rows whose weights are in the cache do not, 3 % faster.
template <int ID, int T, int R, bool POWERS, bool ASKS>
__attribute__((noinline)) void codes_tiles(const Tile<ID>& tile, Entries x, int64_t lanes, int64_t ahead, float* y,
                                           int64_t ldy) {
  constexpr int halves = Tile<ID>::halves, quads = 8 / halves;
  using Sums = Dots<is_small(kFormats[ID]), is_wide(kFormats[ID])>;
  V sums[T][R];
  for_each<T, R>([&](auto t, auto r) __attribute__((always_inline)) { sums[t.value][r.value] = zero(); });
  const Tile<ID> last = tile.further((T - 1) * tile.l.tile_bytes);
  const auto nth = [&](int t) -> const Tile<ID>& { return T == 1 || t == 0 ? tile : last; };
  for (int64_t b = 0; b < tile.l.blocks; ++b) {
    const uint8_t *low[T], *high[T];
    repeat<T>([&](auto t) __attribute__((always_inline)) {
      low[t.value] = nth(t.value).low(b);
      high[t.value] = nth(t.value).high(b);
    });
    if constexpr (ASKS) {
      repeat<T>([&](auto t) __attribute__((always_inline)) { ask_for(nth(t.value).further(ahead), b); });
    }
    repeat<halves>([&](auto group) __attribute__((always_inline)) {
      constexpr int h = group.value;
      const auto start = [&](int r) { return start_factor<ID>() == 0 ? 0 : x.start[h][r]; };
      Sums dots[T][R];
      IH_UNROLL for (int r = 0; r < R; ++r) {
        dots[0][r].begin(start(r));
        if constexpr (T > 1) dots[T - 1][r] = dots[0][r];
      }
      repeat<quads>([&](auto i) __attribute__((always_inline)) {
        constexpr int q = h * quads + i.value;
        B w[T];
        repeat<T>([&](auto t)
                      __attribute__((always_inline)) { w[t.value] = quad<ID, q>(low[t.value], high[t.value]); });
        IH_UNROLL for (int r = 0; r < R; ++r) {
          const Four codes = four_codes(x.codes + r * kBlock + 4 * q);
          dots[0][r].add(w[0], codes);
          if constexpr (T > 1) dots[T - 1][r].add(w[T - 1], codes);
        }
      });
      repeat<T>([&](auto t) __attribute__((always_inline)) {
        const auto factor = factor_of<POWERS>(nth(t.value).scale(b, h));
        IH_UNROLL for (int r = 0; r < R; ++r) {
          V& sum = sums[t.value][r];
          sum = fma(to_float(dots[t.value][r].end(start(r))), times(factor, x.scale[r]), sum);
        }
        if constexpr (Tile<ID>::offset) {
          const V minimum = nth(t.value).minimum(b, h);
          IH_UNROLL for (int r = 0; r < R; ++r) {
            sums[t.value][r] = fma(minimum, set1(x.sum[h][r]), sums[t.value][r]);
          }
        }
      });
      x.start[h] += lanes;
      x.sum[h] += lanes;
    });
    x.codes += lanes * kBlock;
    x.scale += lanes;
  }
  for_each<R, T>([&](auto r, auto t) __attribute__((always_inline)) {
    store(y + r.value * ldy + t.value * kTileRows, sums[t.value][r.value]);
  });
}

// Rows that a body takes at once from `row` on: a power of two that its lanes and the rows left allow.
inline int64_t rows_at_once(const QuantRows& x, int64_t row, int64_t end, int64_t most) {
  int64_t n = most;
  while (n > 1 && (n > x.lanes || n > end - row || (x.row + row) % n != 0)) n /= 2;
  return n;
}

// Rows that go through some tiles together.
struct Sweep {
  int64_t row, rows;
  Entries entries;
};

// The sweeps of a piece's rows; returns how many.
inline int64_t plan_sweeps(const QuantRows& x, const Strip& strip, const Piece& p, int64_t blocks, int64_t most,
                           Sweep* sweeps) {
  const int64_t run = blocks * x.lanes, half = (p.groups_end - p.group) * run;
  int64_t count = 0;
  for (int64_t row = p.first; row < p.end; ++count) {
    const int64_t n = rows_at_once(x, row, p.end, most), all = x.at(row, 0);
    const int64_t at = ((x.row + row) / x.lanes - p.group) * run + (x.row + row) % x.lanes;
    sweeps[count] = {row,
                     n,
                     {x.codes + all * kBlock,
                      x.scales + all,
                      {strip.start + at, strip.start + half + at},
                      {strip.sum + at, strip.sum + half + at}}};
    row += n;
  }
  return count;
}

// A sweep of R rows, or less, through T tiles; `ahead` 0: it asks for nothing, if it has all R rows.
template <int ID, int T, int R, bool POWERS>
IH_INLINE void codes_rows(const Weight& w, const Tile<ID>& first, int64_t tile, const Sweep& sweep, int64_t lanes,
                          int64_t ahead, const float* bias, float* y, int64_t ldy) {
  if (sweep.rows == R) {
    constexpr bool always = R < int_rows(kFormats[ID]);
    const bool whole = bias == nullptr && (tile + T) * kTileRows <= w.out;
    alignas(64) float room[R][T * kTileRows];
    float* to = whole ? y + sweep.row * ldy + tile * kTileRows : room[0];
    const int64_t pitch = whole ? ldy : T * kTileRows;
    if (ahead == 0) {
      codes_tiles<ID, T, R, POWERS, always>(first, sweep.entries, lanes, ahead, to, pitch);
    } else {
      codes_tiles<ID, T, R, POWERS, true>(first, sweep.entries, lanes, ahead, to, pitch);
    }
    for (int r = 0; !whole && r < R; ++r) {
      for (int t = 0; t < T; ++t) {
        store_outputs(w, tile + t, bias, load(room[r] + t * kTileRows), y + (sweep.row + r) * ldy);
      }
    }
  } else if constexpr (R > 1) {
    codes_rows<ID, T, R / 2, POWERS>(w, first, tile, sweep, lanes, ahead, bias, y, ldy);
  }
}

// All sweeps through tiles [begin, end), T at a time: their weights stay in the first-level cache. The first sweep asks
// for weights a little ahead of itself or, if more will follow, for the next tiles. (Spread over more sweeps, memory
// was slower: docs/performance-log.md.)
template <int ID, int T, bool POWERS>
IH_INLINE void codes_sweeps(const Weight& w, const Layout& l, const Sweep* sweeps, int64_t count, int64_t lanes,
                            bool fresh, int64_t begin, int64_t end, const float* bias, float* y, int64_t ldy) {
  const int64_t ahead = count == 1 ? kAhead : T * l.tile_bytes;
  for (int64_t tile = begin; tile < end; tile += T) {
    const Tile<ID> first = tile_of<ID>(w, l, tile);
    if constexpr (POWERS) {
      if (is_endless(first) || (T > 1 && is_endless(first.further((T - 1) * l.tile_bytes)))) {
        codes_sweeps<ID, T, false>(w, l, sweeps, count, lanes, fresh, tile, tile + T, bias, y, ldy);
        continue;
      }
    }
    for (int64_t i = 0; i < count; ++i) {
      codes_rows<ID, T, int_rows(kFormats[ID]), POWERS>(w, first, tile, sweeps[i], lanes, fresh && i == 0 ? ahead : 0,
                                                        bias, y, ldy);
    }
  }
}

template <int ID, bool POWERS>
IH_INLINE void codes_piece(const Weight& w, const Layout& l, const QuantRows& x, const Strip& strip, const Piece& p,
                           const float* bias, float* y, int64_t ldy) {
  constexpr int T = int_tiles(kFormats[ID]), R = int_rows(kFormats[ID]);
  Sweep sweeps[kStripRows + 2 * kMaxLanes];
  const int64_t count = plan_sweeps(x, strip, p, l.blocks, R, sweeps);
  // A row or two read as fast as memory gives: one tile after the other.
  const int64_t together = T == 1 || p.end - p.first < R ? p.begin : p.tiles_end - (p.tiles_end - p.begin) % T;
  if constexpr (T > 1) {
    codes_sweeps<ID, T, POWERS>(w, l, sweeps, count, x.lanes, p.fresh, p.begin, together, bias, y, ldy);
  }
  codes_sweeps<ID, 1, POWERS>(w, l, sweeps, count, x.lanes, p.fresh, together, p.tiles_end, bias, y, ldy);
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
      const Piece piece = {first, stop, begin, end, g, last, g == group};
      if (groups_end - group > fit || begin == tile_begin) prepare<ID>(x, piece, l.blocks, strip);
      if constexpr (kAddsExponents && kFormats[ID].low + kFormats[ID].high <= 6) {
        if (may && has_powers(x, piece, l.blocks)) {
          codes_piece<ID, true>(w, l, x, strip, piece, bias, y, ldy);
          continue;
        }
      }
      codes_piece<ID, false>(w, l, x, strip, piece, bias, y, ldy);
    }
  }
}

}  // namespace
}  // namespace inhouse::IH_ISA
