// linear_bf16: bf16 weights times float activations rounded to bf16, in pairs of neighbouring inputs. Pairs 0, 2, 4 ...
// have a sum, pairs 1, 3, 5 ... another, ascending, joined at the end. After pairs-inl.h or simd/avx512_bf16.h.
namespace inhouse::IH_ISA {
namespace {

constexpr int64_t kPairsAhead = 8192;           // bytes that a sweep prefetches ahead
constexpr int64_t kPairTilesBytes = 384 << 10;  // of weights that stay in the second-level cache for all rows

// R rows of pairs, `ldx` apart, times one tile; `in` is a multiple of 4.
template <int R>
IH_INLINE void pairs_tile(const uint8_t* tile, int64_t in, const PairInput* x, int64_t ldx, V* sums) {
  V even[R], odd[R];
  IH_UNROLL for (int r = 0; r < R; ++r) { even[r] = odd[r] = zero(); }
  for (int64_t k = 0; k < in; k += 4, tile += 128) {
    prefetch(tile + kPairsAhead);
    prefetch(tile + kPairsAhead + 64);
    const Pairs a = pair_columns(reinterpret_cast<const uint16_t*>(tile));
    const Pairs b = pair_columns(reinterpret_cast<const uint16_t*>(tile + 64));
    IH_UNROLL for (int r = 0; r < R; ++r) {
      even[r] = dot_pairs(even[r], a, repeat_input(x + r * ldx + k));
      odd[r] = dot_pairs(odd[r], b, repeat_input(x + r * ldx + k + 2));
    }
  }
  IH_UNROLL for (int r = 0; r < R; ++r) { sums[r] = add(even[r], odd[r]); }
}

// `rows` rows of pairs, at most R, times tiles [begin, end).
template <int R>
IH_INLINE void pairs_rows(const Weight& w, const PairInput* x, int64_t ldx, int64_t rows, int64_t begin, int64_t end,
                          const float* bias, float* y, int64_t ldy) {
  const int64_t tile_bytes = padded(w.in * 32);
  if (rows >= R) {
    for (int64_t tile = begin; tile < end; ++tile) {
      V sums[R];
      pairs_tile<R>(w.data + tile * tile_bytes, w.in, x, ldx, sums);
      for (int r = 0; r < R; ++r) store_outputs(w, tile, bias, sums[r], y + r * ldy);
    }
    x += R * ldx;
    y += R * ldy;
    rows -= R;
  }
  if constexpr (R > 1) {
    if (rows > 0) pairs_rows<R / 2>(w, x, ldx, rows, begin, end, bias, y, ldy);
  }
}

// Inputs rounded to bf16; n is a multiple of 4.
inline void narrow_row(const float* x, int64_t n, PairInput* y) {
  int64_t i = 0;
  for (; i + 32 <= n; i += 32) store_inputs(y + i, load(x + i), load(x + i + 16));
  if (i == n) return;
  alignas(64) float rest[32] = {};
  alignas(64) PairInput rounded[32];
  for (int64_t k = i; k < n; ++k) rest[k - i] = x[k];
  store_inputs(rounded, load(rest), load(rest + 16));
  for (int64_t k = i; k < n; ++k) y[k] = rounded[k - i];
}

void linear_bf16(const Weight& w, const float* x, int64_t ldx, int rows, int64_t tile_begin, int64_t tile_end,
                 const float* bias, float* y, int64_t ldy) {
  alignas(64) PairInput inputs[kFloatRows * kMostPairInputs];
  const int64_t tile_bytes = padded(w.in * 32);
  const int64_t tiles = tile_bytes < kPairTilesBytes ? kPairTilesBytes / tile_bytes : 1;
  for (int64_t begin = tile_begin; begin < tile_end; begin += tiles) {
    const int64_t end = tile_end - begin < tiles ? tile_end : begin + tiles;
    for (int64_t row = 0; row < rows; row += kFloatRows) {
      const int64_t n = rows - row < kFloatRows ? rows - row : kFloatRows;
      for (int64_t r = 0; r < n; ++r) narrow_row(x + (row + r) * ldx, w.in, inputs + r * w.in);
      pairs_rows<kFloatRows>(w, inputs, w.in, n, begin, end, bias, y + row * ldy, ldy);
    }
  }
}

}  // namespace
}  // namespace inhouse::IH_ISA
