// unpack_row: one row of a packed matrix as floats, the values that packed_layout's `rows` gives, bit for bit.
namespace inhouse::IH_ISA {
namespace {

// Code of quad q, input i, row `lane` of a block in a plane of so many bits.
IH_INLINE uint32_t code_at(const uint8_t* plane, int bits, int q, int i, int lane) {
  if (bits == 8) return plane[64 * q + 4 * lane + i];
  const int per = 8 / bits, vector = bits == 4 ? q % 4 : q / per, slot = bits == 4 ? q / 4 : q % per;
  return (plane[64 * vector + 4 * lane + i] >> (slot * bits)) & ((1u << bits) - 1u);
}

template <Scalar S>
void unpack_floats(const Weight& w, int64_t row, float* out) {
  const int64_t item = S == kF32 ? 64 : 32;
  const uint8_t* tile = w.data + row / kTileRows * padded(w.in * item);
  alignas(64) float lanes[16];
  for (int64_t k = 0; k < w.in; ++k) {
    store(lanes, load_scalars<S>(tile, k));
    out[k] = lanes[row % kTileRows];
  }
}

template <int ID>
void unpack_codes(const Tile<ID>& tile, int lane, int64_t in, float* out) {
  constexpr Format f = kFormats[ID];
  alignas(64) float scales[16], minimums[16], points[16], looked[16];
  for (int64_t k = 0; k < in; ++k) {
    const int64_t block = k / kBlock;
    const int at = static_cast<int>(k % kBlock), half = at / (kBlock / Tile<ID>::halves);
    if (at % (kBlock / Tile<ID>::halves) == 0) {
      store(scales, tile.scale(block, half));
      if constexpr (f.minimum) store(minimums, tile.minimum(block, half));
      if constexpr (f.zeros) store(points, tile.zero_point(block, half));
    }
    uint32_t code = code_at(tile.low(block), f.low, at / 4, at % 4, lane);
    if constexpr (f.high != 0) code |= code_at(tile.high(block), f.high, at / 4, at % 4, lane) << f.low;
    if constexpr (looks_up_bytes(f)) code = kCodeTables[f.table - kIQ4][code];
    float v = static_cast<float>(static_cast<int32_t>(code) - f.zero);
    if constexpr (f.zeros) v -= points[lane];
    if constexpr (f.table == kNF4 || f.table == kFP4) v = kFloatTables[f.table - kNF4][code];
    if constexpr (f.table >= kE4M3) {
      store(looked, float_bytes<f.table>(set1_int(static_cast<int32_t>(code))));
      v = looked[0];
    }
    v *= scales[lane];
    if constexpr (f.minimum) v = f.two_level ? v - minimums[lane] : v + minimums[lane];
    out[k] = v;
  }
}

void unpack_row(const Weight& w, int64_t row, float* out) {
  if (w.format == 0) return unpack_floats<kF32>(w, row, out);
  if (w.format == 1) return unpack_floats<kF16>(w, row, out);
  if (w.format == 2) return unpack_floats<kBF16>(w, row, out);
  if (w.format >= kFirstCoded) return sparse_kernels().unpack_row(w, row, out);
  const Layout l = layout_of(kFormats[w.format], w.in);
  with_codes_of(w.format, [&](auto id) {
    unpack_codes(tile_of<id.value>(w, l, row / kTileRows), static_cast<int>(row % kTileRows), w.in, out);
  });
}

}  // namespace
}  // namespace inhouse::IH_ISA
