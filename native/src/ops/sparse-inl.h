// Sparse and vector-coded weights (runtime/packed_expand.py). One row of activations goes through the tile as it is
// stored; more rows, or float activations, through some tiles of the base format, unpacked into this thread's stack,
// and the dense bodies. The dot products are exact and the groups in the same order, so the bits are those of the base.
namespace inhouse::IH_ISA {
namespace {

constexpr int64_t kUnpackBytes = 384 << 10;  // of base tiles that are unpacked at once, where that is one tile at least

constexpr int64_t kCodedAhead = 8192;  // bytes that a sweep prefetches ahead of the values that it reads

IH_INLINE uint64_t mask_at(const uint8_t* p) {
  uint64_t mask;
  __builtin_memcpy(&mask, p, 8);
  return mask;
}

// Goes through a tile block by block: next(take) calls take(Int<q>, codes of quad q) for the eight quads, in any order.
template <Coding C, int BITS, int BOOKS>
struct Reader;

template <int BITS>
struct Reader<kMask, BITS, 0> {
  const uint8_t *mask, *low, *high;  // of values; 8 bits: low alone
  Reader(const Weight&, const Layout& l, const uint8_t* tile) : mask(tile + l.low), low(tile + l.high), high(low) {}

  template <class F>
  IH_INLINE void next(F take) {
    const B fill = fill_bytes(1 << (BITS - 1));
    if constexpr (BITS == 8) {
      repeat<8>([&](auto q) __attribute__((always_inline)) {
        const uint64_t m = mask_at(mask + 8 * q.value);
        take(q, expand(m, low, fill));
        low += ones(m);
      });
    } else {
      repeat<4>([&](auto q) __attribute__((always_inline)) {
        const uint64_t m = mask_at(mask + 8 * q.value), n = mask_at(mask + 8 * q.value + 32);
        take(q, expand_nibbles<0>(m, low, fill));
        take(Int<q.value + 4>{}, expand_nibbles<4>(n, high, fill));
        low += ones(m);
        high += ones(n);
      });
    }
    mask += 64;
  }
};

template <int BITS>
struct Reader<kPairs, BITS, 0> {
  const uint8_t *mask, *values;
  Reader(const Weight&, const Layout& l, const uint8_t* tile) : mask(tile + l.low), values(tile + l.high) {}

  template <class F>
  IH_INLINE void next(F take) {
    const B fill = fill_bytes(1 << (BITS - 1));
    if constexpr (BITS == 8) {
      repeat<8>([&](auto q) __attribute__((always_inline)) {
        take(q, expand_pairs(mask_at(mask + 8 * q.value), values + 32 * q.value, fill));
      });
    } else {
      repeat<4>([&](auto q) __attribute__((always_inline)) {
        const uint8_t* p = values + 32 * q.value;
        take(q, expand_nibble_pairs<0>(mask_at(mask + 8 * q.value), p, fill));
        take(Int<q.value + 4>{}, expand_nibble_pairs<4>(mask_at(mask + 8 * q.value + 32), p, fill));
      });
    }
    mask += 64;
    values += 32 * BITS;
  }
};

template <int BOOKS>
struct Reader<kVectors, 8, BOOKS> {
  const uint8_t *book, *index;
  Reader(const Weight& w, const Layout& l, const uint8_t* tile) : book(w.data), index(tile + l.low) {}

  template <class F>
  IH_INLINE void next(F take) {
    repeat<4>([&](auto j) __attribute__((always_inline)) {
      B first, second;
      entries(book, index, &first, &second);
      repeat<BOOKS - 1>([&](auto m) __attribute__((always_inline)) {
        B a, b;
        entries(book + (m.value + 1) * kBook * kVector, index + (m.value + 1) * 16, &a, &b);
        first = add_bytes(first, a);
        second = add_bytes(second, b);
      });
      index += BOOKS * 16;
      take(Int<2 * j.value>{}, flip_bytes(first));
      take(Int<2 * j.value + 1>{}, flip_bytes(second));
    });
  }
};

// The number of a base format's bodies (with_codes_of), by bits.
template <int BITS>
constexpr int base_body() {
  return BITS == 8 ? 41 : 29;
}

// One row, beginning at block 0 of the view, times a tile: as codes_tile.
template <class READER, int BITS>
__attribute__((noinline)) V coded_tile(const Weight& w, const Layout& l, int64_t t, const QuantRows& x) {
  constexpr int ID = base_body<BITS>();
  constexpr uint32_t factor = static_cast<uint32_t>(start_factor<ID>());
  const int64_t blocks_per_scale = l.groups == 1 ? l.blocks : kFormats[w.format].group / kBlock;
  const int64_t lanes = x.lanes, at = x.at(0, 0);
  const int8_t* codes = x.codes + at * kBlock;
  const float* scales = x.scales + at;
  const int32_t* totals = x.sums + at;
  // Scales, masks and values of a tile are read side by side, but asked for in the order of memory, so far ahead that
  // the first values of the next tile are on their way when its masks are read.
  const uint8_t *tile = w.data + tile_start(w, l, t), *ahead = tile + l.high + kCodedAhead;
  const int64_t lines = (tile_start(w, l, t + 1) - (tile - w.data)) / (64 * l.blocks) + 1;
  const int64_t step = (lines > 4 ? 6 : lines > 2 ? 4 : 2) * 64;
  READER reader(w, l, tile);
  V sum = zero(), scale = zero();
  int64_t left = 0;  // blocks of the group
  const uint8_t* group = tile;
  for (int64_t b = 0; b < l.blocks; ++b) {
    if (lines > 4) repeat<2>([&](auto i) __attribute__((always_inline)) { prefetch(ahead + (i.value + 4) * 64); });
    if (lines > 2) repeat<2>([&](auto i) __attribute__((always_inline)) { prefetch(ahead + (i.value + 2) * 64); });
    repeat<2>([&](auto i) __attribute__((always_inline)) { prefetch(ahead + i.value * 64); });
    ahead += step;
    if (left == 0) {
      scale = load_scalars<kF16>(group, 0);
      group += 32;
      left = blocks_per_scale;
    }
    --left;
    const int32_t start = static_cast<int32_t>(factor * static_cast<uint32_t>(*totals));
    Dots<is_small(kFormats[ID]), is_wide(kFormats[ID])> dots;
    dots.begin(start);
    reader.next([&](auto q, B quad) __attribute__((always_inline)) { add_four(dots, quad, codes + 4 * q.value); });
    sum = fma(to_float(dots.end(start)), mul(scale, set1(*scales)), sum);
    codes += lanes * kBlock;
    scales += lanes;
    totals += lanes;
  }
  return sum;
}

// A tile of the base format out of a coded one.
template <class READER, int BITS>
void unpack_tile(const Weight& w, const Layout& l, const uint8_t* tile, const Layout& base, uint8_t* out) {
  for (int64_t i = 0; i < l.low; i += 64) store_bytes(out + i, load_bytes(tile + i));
  READER reader(w, l, tile);
  for (int64_t b = 0; b < l.blocks; ++b) {
    uint8_t* low = out + base.low + b * BITS * 64;
    B quads[8];
    reader.next([&](auto q, B quad) __attribute__((always_inline)) { quads[q.value] = quad; });
    if constexpr (BITS == 8) {
      repeat<8>([&](auto q) __attribute__((always_inline)) { store_bytes(low + 64 * q.value, quads[q.value]); });
    } else {
      repeat<4>([&](auto q) __attribute__((always_inline)) {
        store_bytes(low + 64 * q.value, or_bytes(quads[q.value], shift_bytes<4>(quads[q.value + 4])));
      });
    }
  }
}

template <class T>
struct Pointee;
template <class T>
struct Pointee<T*> {
  using type = T;
};

// f(a Reader's type, Int<bits>) of a format with codes in quads.
template <class F>
IH_INLINE void with_reader(const Format& f, F run) {
  if (f.coding == kMask && f.low == 8) return run(static_cast<Reader<kMask, 8, 0>*>(nullptr), Int<8>{});
  if (f.coding == kMask) return run(static_cast<Reader<kMask, 4, 0>*>(nullptr), Int<4>{});
  if (f.coding == kPairs && f.low == 8) return run(static_cast<Reader<kPairs, 8, 0>*>(nullptr), Int<8>{});
  if (f.coding == kPairs) return run(static_cast<Reader<kPairs, 4, 0>*>(nullptr), Int<4>{});
  if (f.books == 1) return run(static_cast<Reader<kVectors, 8, 1>*>(nullptr), Int<8>{});
  if (f.books == 2) return run(static_cast<Reader<kVectors, 8, 2>*>(nullptr), Int<8>{});
  return run(static_cast<Reader<kVectors, 8, 3>*>(nullptr), Int<8>{});
}

// A dense matrix of tiles [begin, end) of a coded one; `memory` of kUnpackedBytes holds it.
Weight unpacked(const Weight& w, const Layout& l, int64_t begin, int64_t end, uint8_t* memory) {
  const Format& f = kFormats[w.format];
  const Layout base = layout_of(kFormats[f.base], w.in);
  with_reader(f, [&](auto* reader, auto bits) {
    using READER = typename Pointee<decltype(reader)>::type;
    for (int64_t t = begin; t < end; ++t) {
      unpack_tile<READER, bits.value>(w, l, w.data + tile_start(w, l, t), base, memory + (t - begin) * base.tile_bytes);
    }
  });
  const int64_t out = end * kTileRows < w.out ? (end - begin) * kTileRows : w.out - begin * kTileRows;
  return {f.base, out, w.in, memory, static_cast<size_t>((end - begin) * base.tile_bytes)};
}

// run(dense matrix, its first output) for runs of tiles.
template <class F>
__attribute__((noinline)) void through_base(const Weight& w, int64_t tile_begin, int64_t tile_end, F run) {
  const Layout l = layout_of(kFormats[w.format], w.in);
  const int64_t bytes = layout_of(kFormats[kFormats[w.format].base], w.in).tile_bytes;
  const int64_t tiles = bytes < kUnpackBytes ? kUnpackBytes / bytes : 1;
  alignas(64) uint8_t memory[kUnpackedBytes];
  for (int64_t t = tile_begin; t < tile_end; t += tiles) {
    const int64_t end = tile_end - t < tiles ? tile_end : t + tiles;
    run(unpacked(w, l, t, end, memory), t * kTileRows);
  }
}

IH_INLINE const Kernels& dense_kernels() { return *inhouse::IH_JOIN(kernels_, IH_ISA)(); }

void coded_linear_i8(const Weight& w, const QuantRows& x, int rows, int64_t tile_begin, int64_t tile_end,
                     const float* bias, float* y, int64_t ldy) {
  if (rows == 1) {
    const Layout l = layout_of(kFormats[w.format], w.in);
    with_reader(kFormats[w.format], [&](auto* reader, auto bits) {
      using READER = typename Pointee<decltype(reader)>::type;
      for (int64_t t = tile_begin; t < tile_end; ++t) {
        store_outputs(w, t, bias, coded_tile<READER, bits.value>(w, l, t, x), y);
      }
    });
    return;
  }
  through_base(w, tile_begin, tile_end, [&](const Weight& dense, int64_t first) {
    dense_kernels().linear_i8(dense, x, rows, 0, (dense.out + kTileRows - 1) / kTileRows,
                              bias == nullptr ? nullptr : bias + first, y + first, ldy);
  });
}

// A tile of kColumns.
struct Columns {
  const uint8_t *columns, *values;
  int64_t starts[kTileRows + 1];
};

IH_INLINE Columns columns_of(const Weight& w, const Layout& l, int64_t t) {
  Columns c;
  const uint8_t* tile = w.data + tile_start(w, l, t);
  for (int r = 0; r <= kTileRows; ++r) {
    uint32_t start;
    __builtin_memcpy(&start, tile + l.low + 4 * r, 4);
    c.starts[r] = start;
  }
  c.columns = tile + l.low + padded(4 * (kTileRows + 1));
  c.values = c.columns + padded(2 * c.starts[kTileRows]);
  return c;
}

// Entry e of a row goes to the sum of lane e % 16; the lanes are added down the tree of reduce_add, then scaled.
template <bool CODES>
IH_INLINE float columns_dot(const uint8_t* columns, const uint8_t* values, int64_t n, const float* x) {
  V sum = zero();
  for (int64_t e = 0; e < n; e += 16) {
    V v = CODES ? load_values_i8(values + e) : load_values_bf16(values + 2 * e);
    const int64_t some = n - e < 16 ? n - e : 16;
    if (some < 16) v = select(first_n(some), v, zero());  // what lies behind them may be a NaN
    sum = fma(v, gather(x, columns + 2 * e, some), sum);
  }
  return reduce_add(sum);
}

template <bool CODES>
void columns_linear(const Weight& w, const float* x, int64_t ldx, int rows, int64_t tile_begin, int64_t tile_end,
                    const float* bias, float* y, int64_t ldy) {
  constexpr int64_t item = CODES ? 1 : 2;
  const Layout l = layout_of(kFormats[w.format], w.in);
  for (int64_t t = tile_begin; t < tile_end; ++t) {
    const Columns c = columns_of(w, l, t);
    V scale = set1(1.0f);
    if constexpr (CODES) scale = load_scalars<kF16>(w.data + tile_start(w, l, t), 0);
    for (int64_t r = 0; r < rows; ++r) {
      alignas(64) float sums[kTileRows];
      for (int o = 0; o < kTileRows; ++o) {
        const int64_t from = c.starts[o], n = c.starts[o + 1] - from;
        sums[o] = columns_dot<CODES>(c.columns + 2 * from, c.values + item * from, n, x + r * ldx);
      }
      const V all = CODES ? mul(load(sums), scale) : load(sums);
      store_outputs(w, t, bias, all, y + r * ldy);
    }
  }
}

void coded_linear_f32(const Weight& w, const float* x, int64_t ldx, int rows, int64_t tile_begin, int64_t tile_end,
                      const float* bias, float* y, int64_t ldy) {
  const Format& f = kFormats[w.format];
  if (f.coding == kColumns) {
    return f.low ? columns_linear<true>(w, x, ldx, rows, tile_begin, tile_end, bias, y, ldy)
                 : columns_linear<false>(w, x, ldx, rows, tile_begin, tile_end, bias, y, ldy);
  }
  through_base(w, tile_begin, tile_end, [&](const Weight& dense, int64_t first) {
    dense_kernels().linear_f32(dense, x, ldx, rows, 0, (dense.out + kTileRows - 1) / kTileRows,
                               bias == nullptr ? nullptr : bias + first, y + first, ldy);
  });
}

template <bool CODES>
void columns_row(const Weight& w, int64_t row, float* out) {
  const Layout l = layout_of(kFormats[w.format], w.in);
  const Columns c = columns_of(w, l, row / kTileRows);
  alignas(64) float scales[kTileRows], values[16];
  if constexpr (CODES) store(scales, load_scalars<kF16>(w.data + tile_start(w, l, row / kTileRows), 0));
  for (int64_t k = 0; k < w.in; ++k) out[k] = CODES ? 0.0f * scales[row % kTileRows] : 0.0f;
  for (int64_t e = c.starts[row % kTileRows]; e < c.starts[row % kTileRows + 1]; ++e) {
    uint16_t column;
    __builtin_memcpy(&column, c.columns + 2 * e, 2);
    store(values, CODES ? load_values_i8(c.values + e) : load_values_bf16(c.values + 2 * e));
    out[column] = CODES ? values[0] * scales[row % kTileRows] : values[0];
  }
}

void coded_unpack_row(const Weight& w, int64_t row, float* out) {
  const Format& f = kFormats[w.format];
  if (f.coding == kColumns) return f.low ? columns_row<true>(w, row, out) : columns_row<false>(w, row, out);
  const int64_t tile = row / kTileRows;
  through_base(w, tile, tile + 1,
               [&](const Weight& dense, int64_t first) { dense_kernels().unpack_row(dense, row - first, out); });
}

SparseKernels sparse_table() { return {coded_linear_f32, coded_linear_i8, coded_unpack_row}; }

}  // namespace
}  // namespace inhouse::IH_ISA
