// Embeddings as tensor trains: a token's row is the product of one slice of each table.
#include <algorithm>
#include <vector>

#include "step.h"

namespace inhouse {

namespace {

// y [rows * n][out] = x [rows][rank] times slice [rank][n][out], each sum in the order of the rank.
void product(const float* x, int64_t rows, const float* slice, int64_t rank, int64_t columns, float* y) {
  for (int64_t i = 0; i < rows; ++i) {
    float* to = y + i * columns;
    std::fill(to, to + columns, 0.0f);
    for (int64_t k = 0; k < rank; ++k) {
      const float by = x[i * rank + k];
      const float* from = slice + k * columns;
      for (int64_t j = 0; j < columns; ++j) to[j] += by * from[j];
    }
  }
}

}  // namespace

void Runner::embed_train(const Op& op) {
  const size_t tables = op.weights.size();
  const int64_t source = op.integer(0), width = value(op.outputs[0]).width;
  const float scale = op.real(1);
  const int32_t* ids = source == 0 ? step_.tokens : source == 1 ? step_.positions : step_.types;
  int64_t slice = 0, part = 1, rank = 1;  // the largest slice, the largest product
  for (size_t k = 0, rows = 1; k < tables; ++k) {
    const int64_t n = op.integer(2 + static_cast<int>(k));
    slice = std::max(slice, weight(op, k)->in);
    rank = weight(op, k)->in / (rank * n);
    rows *= static_cast<size_t>(n);
    part = std::max(part, static_cast<int64_t>(rows) * rank);
  }
  each_row(step_.rows, 4 * slice, [&](int64_t r) {
    std::vector<float> room(static_cast<size_t>(slice + 2 * part));
    float *loaded = room.data(), *x = loaded + slice, *y = x + part;
    int64_t digits[kMaxTables], id = ids[r];
    for (size_t k = tables; k-- > 0;) {
      digits[k] = id % weight(op, k)->out;
      id /= weight(op, k)->out;
    }
    x[0] = 1.0f;
    int64_t rows = 1, before = 1;
    for (size_t k = 0; k < tables; ++k) {
      const Weight& table = *weight(op, k);
      const int64_t n = op.integer(2 + static_cast<int>(k));
      kernels_.unpack_row(table, digits[k], loaded);
      product(x, rows, loaded, before, table.in / before, y);
      before = table.in / (before * n);
      rows *= n;
      std::swap(x, y);
    }
    std::copy(x, x + width, row(op.outputs[0], r));
    if (scale != 1.0f) kernels_.scale(x, scale, width, row(op.outputs[0], r));
  });
}

}  // namespace inhouse
