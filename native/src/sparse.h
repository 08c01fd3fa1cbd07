// Sparse and vector-coded weights (formats.h, runtime/packed_expand.py): their bodies at each level, apart from the
// others, and the proof that a matrix's parts fit one another.
#pragma once
#include "formats.h"
#include "kernels.h"

namespace inhouse {

constexpr int kFirstCoded = 102;  // all formats from here on have a coding
static_assert(kFormats[kFirstCoded].coding != kDense && kFormats[kFirstCoded - 1].coding == kDense);

// As the entries of Kernels of these names, for coded weights alone.
struct SparseKernels {
  decltype(Kernels::linear_f32) linear_f32;
  decltype(Kernels::linear_i8) linear_i8;
  decltype(Kernels::unpack_row) unpack_row;
};

const SparseKernels& sparse_kernels_scalar();
const SparseKernels& sparse_kernels_avx2();
const SparseKernels& sparse_kernels_avx512();  // those of avx2 where the machine lacks VBMI2
const SparseKernels& sparse_kernels_neon();

// Why a coded matrix cannot be used, or null. Reads its tables, masks and columns: after this no kernel leaves `data`.
const char* coded_fault(const Weight& w);

// Start of a tile of a coded matrix.
static inline int64_t tile_start(const Weight& w, const Layout& l, int64_t tile) {
  const Format& f = kFormats[w.format];
  if (!is_variable(f)) return head_bytes(f, w.out) + tile * l.tile_bytes;
  int64_t start;
  __builtin_memcpy(&start, w.data + 8 * tile, 8);
  return start;
}

}  // namespace inhouse
