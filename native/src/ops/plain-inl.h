// Linears over row-major float matrices (format -1) and quantised activations, until the packed bodies take over.
namespace inhouse::IH_ISA {
namespace {

void linear_f32(const Weight& w, const float* x, int64_t ldx, int rows, int64_t tile_begin, int64_t tile_end,
                const float* bias, float* y, int64_t ldy) {
  const float* data = reinterpret_cast<const float*>(w.data);
  const int64_t last = tile_end * kTileRows < w.out ? tile_end * kTileRows : w.out;
  for (int r = 0; r < rows; ++r) {
    for (int64_t o = tile_begin * kTileRows; o < last; ++o) {
      V sums = zero();
      for (int64_t i = 0; i < w.in; i += 16) {
        const int64_t n = w.in - i < 16 ? w.in - i : 16;
        sums = fma(load_n(x + r * ldx + i, n), load_n(data + o * w.in + i, n), sums);
      }
      y[r * ldy + o] = reduce_add(sums) + (bias == nullptr ? 0.0f : bias[o]);
    }
  }
}

void linear_i8(const Weight&, const QuantRows&, int, int64_t, int64_t, const float*, float*, int64_t) {}

void unpack_row(const Weight& w, int64_t row, float* out) {
  map(reinterpret_cast<const float*>(w.data) + row * w.in, w.in, out, [](V v) { return v; });
}

void quantize_row(const float*, int64_t, int64_t, int64_t, int8_t*, float*, int32_t*) {}

}  // namespace
}  // namespace inhouse::IH_ISA
