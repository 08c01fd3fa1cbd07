// The doors of the packed bodies that know every format.
namespace inhouse::IH_ISA {
namespace {

void linear_i8(const Weight& w, const QuantRows& x, int rows, int64_t tile_begin, int64_t tile_end, const float* bias,
               float* y, int64_t ldy) {
  if (w.format >= kFirstCoded) return sparse_kernels().linear_i8(w, x, rows, tile_begin, tile_end, bias, y, ldy);
  with_codes_of(w.format, [&](auto id) {
    if constexpr (takes_int8(kFormats[id.value])) {
      codes_linear<id.value>(w, x, rows, tile_begin, tile_end, bias, y, ldy);
    }
  });
}

}  // namespace
}  // namespace inhouse::IH_ISA
