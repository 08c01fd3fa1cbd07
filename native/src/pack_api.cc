// The C interface to single packed matrices: quantising weights at load, and the bodies by themselves for tests and
// tools. One thread, the caller's; a step goes through Model instead.
#include <string>
#include <vector>

#include "dispatch.h"
#include "formats.h"
#include "inhouse.h"
#include "kernels.h"
#include "sparse.h"

using inhouse::kFormats;
using inhouse::Status;

namespace {

inhouse::Weight weight_of(const ih_weight& w) {
  return {w.format, w.out, w.in, static_cast<const uint8_t*>(w.data), static_cast<size_t>(w.bytes)};
}

Status check_packed(const ih_weight& w) {
  if (w.format < 0 || w.format >= inhouse::kFormatCount) return Status::usage("unknown format");
  if (w.out < 1 || w.in < 1 || w.out > INT32_MAX || w.in > INT32_MAX) return Status::usage("impossible shape");
  if (!inhouse::layout_of(kFormats[w.format], w.in).valid) return Status::usage("the width does not fit the format");
  if (w.data == nullptr || reinterpret_cast<uintptr_t>(w.data) % 64 != 0) return Status::usage("data are not aligned");
  if (kFormats[w.format].coding != inhouse::kDense) {
    const char* damage = inhouse::coded_fault(weight_of(w));
    return damage == nullptr ? Status{} : Status::usage(damage);
  }
  if (w.bytes < inhouse::packed_bytes(kFormats[w.format], w.out, w.in)) return Status::usage("fewer bytes than needed");
  return {};
}

Status quantized_linear(const inhouse::Kernels& k, const ih_weight& w, const float* x, int64_t rows, float* y) {
  if (!takes_int8(kFormats[w.format])) return Status::usage("float weights take float activations");
  const int64_t capacity = (rows + inhouse::kMaxLanes - 1) / inhouse::kMaxLanes * inhouse::kMaxLanes;
  std::vector<uint8_t> memory(static_cast<size_t>(inhouse::quant_bytes(capacity, w.in)));
  const inhouse::QuantRows q = inhouse::quant_rows(memory.data(), capacity, w.in, rows);
  for (int64_t r = 0; r < rows; ++r) k.quantize_row(x + r * w.in, w.in, inhouse::kQuantGroup, false, q, r);
  k.linear_i8(weight_of(w), q, static_cast<int>(rows), 0, (w.out + 15) / 16, nullptr, y, w.out);
  return {};
}

Status linear(const char* isa, const ih_weight& w, const float* x, int64_t rows, bool quantized, float* y) {
  const inhouse::Kernels* kernels = nullptr;
  Status status = check_packed(w);
  if (status.ok()) status = inhouse::choose_kernels(isa, &kernels);
  if (!status.ok() || rows < 1) return status;
  if (rows > 65536) return Status::usage(std::to_string(rows) + " rows; at most 65536 at once");
  if (quantized) return quantized_linear(*kernels, w, x, rows, y);
  kernels->linear_f32(weight_of(w), x, w.in, static_cast<int>(rows), 0, (w.out + 15) / 16, nullptr, y, w.out);
  return {};
}

Status unpack(const char* isa, const ih_weight& w, const int64_t* ids, int64_t count, float* out) {
  const inhouse::Kernels* kernels = nullptr;
  Status status = check_packed(w);
  if (status.ok()) status = inhouse::choose_kernels(isa, &kernels);
  if (!status.ok()) return status;
  for (int64_t i = 0; i < count; ++i) {
    if (ids[i] < 0 || ids[i] >= w.out) return Status::usage("row " + std::to_string(ids[i]) + " lies outside");
  }
  for (int64_t i = 0; i < count; ++i) kernels->unpack_row(weight_of(w), ids[i], out + i * w.in);
  return {};
}

Status quantize(const char* isa, const ih_weight& w, const float* x, void* tiles) {
  const inhouse::Kernels* kernels = nullptr;
  Status status = check_packed(w);
  if (status.ok()) status = inhouse::choose_kernels(isa, &kernels);
  if (!status.ok()) return status;
  if (!inhouse::can_quantize(kFormats[w.format])) {
    return Status::usage("weights are quantised to q8_0, q6_0 or q4_0 only");
  }
  const int64_t tile_bytes = inhouse::layout_of(kFormats[w.format], w.in).tile_bytes;
  for (int64_t o = 0; o < w.out; o += 16) {
    const int64_t rows = w.out - o < 16 ? w.out - o : 16;
    kernels->quantize_tile(w.format, x + o * w.in, rows, w.in, static_cast<uint8_t*>(tiles) + o / 16 * tile_bytes);
  }
  return {};
}

template <class F>
ih_status guarded(F f) {
  try {
    return inhouse::report(f());
  } catch (const std::exception& error) {
    return inhouse::report(Status::capacity(error.what()));
  }
}

}  // namespace

extern "C" {

ih_status ih_linear(const char* isa, const ih_weight* w, const float* x, int64_t rows, int32_t quantized, float* y) {
  return guarded([&] { return linear(isa, *w, x, rows, quantized != 0, y); });
}

ih_status ih_unpack_rows(const char* isa, const ih_weight* w, const int64_t* ids, int64_t count, float* out) {
  return guarded([&] { return unpack(isa, *w, ids, count, out); });
}

ih_status ih_quantize_tiles(const char* isa, const ih_weight* w, const float* x) {
  return guarded([&] { return quantize(isa, *w, x, const_cast<void*>(w->data)); });
}

}  // extern "C"
