// linear_f32: any weights times float activations. Even and odd inputs have a sum each, ascending, joined at the end.
namespace inhouse::IH_ISA {
namespace {

constexpr int64_t kFloatAhead = 8192;  // bytes that a sweep prefetches ahead

// Adds inputs [0, n) of `values` (n even, or the last run) times R rows to the sums; weight(k) gives sixteen weights.
template <int R, class F>
IH_INLINE void accumulate(const float* x, int64_t ldx, int64_t n, V* even, V* odd, F weight) {
  int64_t k = 0;
  for (; k + 2 <= n; k += 2) {
    const V a = weight(k), b = weight(k + 1);
    IH_UNROLL for (int r = 0; r < R; ++r) {
      even[r] = fma(a, set1(x[r * ldx + k]), even[r]);
      odd[r] = fma(b, set1(x[r * ldx + k + 1]), odd[r]);
    }
  }
  if (k < n) {
    const V a = weight(k);
    IH_UNROLL for (int r = 0; r < R; ++r) { even[r] = fma(a, set1(x[r * ldx + k]), even[r]); }
  }
}

template <Scalar S, int R>
IH_INLINE void floats_tile(const uint8_t* tile, int64_t in, const float* x, int64_t ldx, V* even, V* odd) {
  constexpr int64_t item = S == kF32 ? 64 : 32;
  accumulate<R>(x, ldx, in, even, odd, [=](int64_t k) __attribute__((always_inline)) {
    prefetch(tile + k * item + kFloatAhead);
    return load_scalars<S>(tile, k);
  });
}

// The 32 inputs of a block of a tile, dequantised: values [32][16].
using UnpackBlock = void (*)(const Weight& w, const Layout& l, int64_t tile, int64_t block, float* values);

template <int ID>
void unpack_block(const Weight& w, const Layout& l, int64_t at, int64_t block, float* values) {
  constexpr Format f = kFormats[ID];
  const Tile<ID> tile = tile_of<ID>(w, l, at);
  constexpr int halves = Tile<ID>::halves, quads = 8 / halves;
  const V zero_point = set1(static_cast<float>(f.zero));
  repeat<halves>([&](auto half) __attribute__((always_inline)) {
    const V scale = tile.scale(block, half.value);
    V minimum = zero();
    if constexpr (f.minimum) minimum = tile.minimum(block, half.value);
    V points = zero_point;
    if constexpr (f.zeros) points = add(zero_point, tile.zero_point(block, half.value));
    repeat<quads>([&](auto i) __attribute__((always_inline)) {
      constexpr int q = half.value * quads + i.value;
      const B codes = quad<ID, q>(tile.low(block), tile.high(block));
      repeat<4>([&](auto k) __attribute__((always_inline)) {
        V v;
        if constexpr (f.table >= kE4M3) {
          v = mul(float_bytes<f.table>(byte_of<k.value>(codes)), scale);
        } else if constexpr (f.table >= kNF4) {
          v = mul(lookup_floats(kFloatTables[f.table - kNF4], byte_of<k.value>(codes)), scale);
        } else {
          v = mul(sub(to_float(byte_of<k.value>(codes)), points), scale);
        }
        if constexpr (f.minimum) v = f.two_level ? sub(v, minimum) : add(v, minimum);
        store(values + (q * 4 + k.value) * 16, v);
      });
    });
  });
}

// sweep(Int<R>, row, even, odd) adds one tile to the sums of R rows.
template <int R, class F>
IH_INLINE void float_rows(const Weight& w, int64_t row, int rows, int64_t tile, const float* bias, float* y,
                          int64_t ldy, F sweep) {
  for (; rows - row >= R; row += R) {
    V even[R], odd[R];
    IH_UNROLL for (int r = 0; r < R; ++r) { even[r] = odd[r] = zero(); }
    sweep(Int<R>{}, row, even, odd);
    for (int r = 0; r < R; ++r) store_outputs(w, tile, bias, add(even[r], odd[r]), y + (row + r) * ldy);
  }
  if constexpr (R > 1) float_rows<R / 2>(w, row, rows, tile, bias, y, ldy, sweep);
}

template <Scalar S>
void linear_floats(const Weight& w, const float* x, int64_t ldx, int rows, int64_t tile_begin, int64_t tile_end,
                   const float* bias, float* y, int64_t ldy) {
  const int64_t tile_bytes = padded(w.in * (S == kF32 ? 64 : 32));
  for (int64_t tile = tile_begin; tile < tile_end; ++tile) {
    float_rows<kFloatRows>(w, 0, rows, tile, bias, y, ldy, [&](auto r, int64_t row, V* even, V* odd) {
      floats_tile<S, r.value>(w.data + tile * tile_bytes, w.in, x + row * ldx, ldx, even, odd);
    });
  }
}

void linear_f32(const Weight& w, const float* x, int64_t ldx, int rows, int64_t tile_begin, int64_t tile_end,
                const float* bias, float* y, int64_t ldy) {
  if (w.format == 0) return linear_floats<kF32>(w, x, ldx, rows, tile_begin, tile_end, bias, y, ldy);
  if (w.format == 1) return linear_floats<kF16>(w, x, ldx, rows, tile_begin, tile_end, bias, y, ldy);
  if (w.format == 2) return linear_floats<kBF16>(w, x, ldx, rows, tile_begin, tile_end, bias, y, ldy);
  if (w.format >= kFirstCoded) {
    return sparse_kernels().linear_f32(w, x, ldx, rows, tile_begin, tile_end, bias, y, ldy);
  }
  const Layout l = layout_of(kFormats[w.format], w.in);
  UnpackBlock unpack = nullptr;
  with_codes_of(w.format, [&](auto id) { unpack = unpack_block<id.value>; });
  alignas(64) float values[kBlock * 16];
  for (int64_t tile = tile_begin; tile < tile_end; ++tile) {
    float_rows<kFloatRows>(w, 0, rows, tile, bias, y, ldy, [&](auto r, int64_t row, V* even, V* odd) {
      for (int64_t b = 0; b < l.blocks; ++b) {
        const int64_t first = b * kBlock, n = w.in - first < kBlock ? w.in - first : kBlock;
        unpack(w, l, tile, b, values);
        accumulate<r.value>(x + row * ldx + first, ldx, n, even, odd, [&](int64_t k) { return load(values + k * 16); });
      }
    });
  }
}

}  // namespace
}  // namespace inhouse::IH_ISA
