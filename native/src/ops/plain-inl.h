// Linears over f32 tiles, until the packed bodies take over.
namespace inhouse::IH_ISA {
namespace {

void linear_f32(const Weight& w, const float* x, int64_t ldx, int rows, int64_t tile_begin, int64_t tile_end,
                const float* bias, float* y, int64_t ldy) {
  for (int64_t tile = tile_begin; tile < tile_end; ++tile) {
    const float* data = reinterpret_cast<const float*>(w.data) + tile * 16 * w.in;
    const int64_t o = tile * 16, n = w.out - o < 16 ? w.out - o : 16;
    for (int r = 0; r < rows; ++r) {
      V sums = zero();
      for (int64_t i = 0; i < w.in; ++i) sums = fma(set1(x[r * ldx + i]), load(data + i * 16), sums);
      if (bias != nullptr) sums = add(sums, load_n(bias + o, n));
      store_n(y + r * ldy + o, n, sums);
    }
  }
}

void linear_i8(const Weight&, const QuantRows&, int, int64_t, int64_t, const float*, float*, int64_t) {}

void unpack_row(const Weight& w, int64_t row, float* out) {
  const float* data = reinterpret_cast<const float*>(w.data) + row / 16 * 16 * w.in + row % 16;
  for (int64_t i = 0; i < w.in; ++i) out[i] = data[i * 16];
}

void quantize_row(const float*, int64_t, int64_t, int64_t, int8_t*, float*, int32_t*) {}

}  // namespace
}  // namespace inhouse::IH_ISA
