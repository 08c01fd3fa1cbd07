// The ops of mixtures of experts, and matrices by head: which rows go to which expert, and how the work is cut.
#include <algorithm>
#include <cstring>
#include <limits>

#include "moe.h"
#include "step.h"

namespace inhouse {

namespace {

int64_t tiles_of(const Weight& w) { return (w.out + kTileRows - 1) / kTileRows; }

}  // namespace

void Runner::route(const Op& op) {
  const RouteShape shape = route_shape(op, value(op.inputs[0]).width);
  const float* correction = vector(op, 0);
  each_row(step_.rows, 64 * int64_t{shape.experts},
           [&](int64_t r) { kernels_.route(shape, row(op.inputs[0], r), correction, row(op.outputs[0], r)); });
  sort_rows(shape, op.outputs[0]);
}

// Where each (token, expert) pair stands among the routed rows: by expert, then by token. Of each token its rows in
// that order, with their weights.
void Runner::sort_rows(const RouteShape& shape, int32_t routing) {
  RoutedRows& routed = model_.routed_;
  const int32_t k = shape.top_k;
  const int64_t pairs = step_.rows * k;
  routed.begin.assign(static_cast<size_t>(shape.experts) + 1, 0);
  routed.token.resize(static_cast<size_t>(pairs));
  routed.row.resize(static_cast<size_t>(pairs));
  routed.weight.resize(static_cast<size_t>(pairs));
  for (int64_t t = 0; t < step_.rows; ++t) {
    for (int32_t i = 0; i < k; ++i) ++routed.begin[static_cast<size_t>(row(routing, t)[i]) + 1];
  }
  for (int32_t e = 0; e < shape.experts; ++e) routed.begin[e + 1] += routed.begin[e];
  routed.next.assign(routed.begin.begin(), routed.begin.end() - 1);
  for (int64_t t = 0; t < step_.rows; ++t) {
    const float* chosen = row(routing, t);
    int32_t* rows = routed.row.data() + t * k;
    float* weights = routed.weight.data() + t * k;
    for (int32_t i = 0; i < k; ++i) {
      const int32_t at = routed.next[static_cast<size_t>(chosen[i])]++;
      routed.token[at] = static_cast<int32_t>(t);
      int32_t j = i;
      for (; j > 0 && rows[j - 1] > at; --j) {
        rows[j] = rows[j - 1];
        weights[j] = weights[j - 1];
      }
      rows[j] = at;
      weights[j] = chosen[k + i];
    }
  }
  routed.active.clear();
  for (int32_t e = 0; e < shape.experts; ++e) {
    if (routed.rows_of(e) > 0) routed.active.push_back(e);
  }
  // The fullest first, so that none starts last.
  std::sort(routed.active.begin(), routed.active.end(), [&](int32_t a, int32_t b) {
    return routed.rows_of(a) != routed.rows_of(b) ? routed.rows_of(a) > routed.rows_of(b) : a < b;
  });
}

void Runner::dispatch(const Op& op) {
  const int64_t width = value(op.inputs[0]).width;
  const int32_t* token = model_.routed_.token.data();
  each_row(rows_of(op.outputs[0]), width, [&](int64_t r) {
    std::memcpy(row(op.outputs[0], r), row(op.inputs[0], token[r]), static_cast<size_t>(width) * 4);
  });
}

// One job of (matrix, expert, run of its tiles): as many tiles as make a task of `worth`, which is less where the
// expert has many rows.
void Runner::expert_linears(const Op& op) {
  RoutedRows& routed = model_.routed_;
  const int64_t experts = op.integer(0), width = value(op.inputs[0]).width;
  const int64_t outputs = static_cast<int64_t>(op.outputs.size()), active = static_cast<int64_t>(routed.active.size());
  int64_t tiles = 0;
  for (int64_t i = 0; i < outputs; ++i) tiles += tiles_of(*weight(op, i * experts));
  const int64_t products = rows_of(op.inputs[0]) * tiles * kTileRows * width;
  const int64_t worth = std::max(kTileProducts, products / (pool_.threads() * kTilesPerThread));
  const auto chunk_of = [&](int64_t e) {
    return std::max<int64_t>(1, worth / (routed.rows_of(static_cast<int32_t>(e)) * kTileRows * width));
  };
  routed.tasks.clear();
  int64_t tasks = 0;
  for (int64_t i = 0; i < outputs; ++i) {
    for (int64_t a = 0; a < active; ++a) {
      const int64_t chunk = chunk_of(routed.active[a]);
      tasks += (tiles_of(*weight(op, i * experts)) + chunk - 1) / chunk;
      routed.tasks.push_back(tasks);
    }
  }
  pool_.run(tasks, [&](int64_t task, int) {
    const int64_t which = std::upper_bound(routed.tasks.begin(), routed.tasks.end(), task) - routed.tasks.begin();
    const int64_t i = which / active, e = routed.active[which % active], chunk = chunk_of(e);
    const int64_t first = (task - (which > 0 ? routed.tasks[which - 1] : 0)) * chunk;
    const int64_t last = std::min(tiles_of(*weight(op, i * experts)), first + chunk);
    one_expert(op, i, e, first, last);
  });
}

void Runner::one_expert(const Op& op, int64_t output, int64_t expert, int64_t first_tile, int64_t last_tile) {
  const RoutedRows& routed = model_.routed_;
  const int64_t experts = op.integer(0), begin = routed.begin[expert];
  const int rows = routed.rows_of(static_cast<int32_t>(expert));
  const Weight& w = *weight(op, output * experts + expert);
  const float* bias = vector(op, op.weights.size() / 2 + output * experts + expert);
  float* y = row(op.outputs[output], begin);
  if (value(op.inputs[0]).dtype == DType::kI8) {
    kernels_.linear_i8(w, codes(op.inputs[0]).view(begin, 0), rows, first_tile, last_tile, bias, y, w.out);
  } else {
    kernels_.linear_f32(w, row(op.inputs[0], begin), w.in, rows, first_tile, last_tile, bias, y, w.out);
  }
}

void Runner::combine(const Op& op) {
  const int64_t width = value(op.outputs[0]).width, k = value(op.inputs[1]).width / 2;
  const RoutedRows& routed = model_.routed_;
  each_row(step_.rows, k * width, [&](int64_t t) {
    const float* rows[kMaxTopK];
    for (int64_t i = 0; i < k; ++i) rows[i] = row(op.inputs[0], routed.row[t * k + i]);
    kernels_.weighted_sum(rows, routed.weight.data() + t * k, static_cast<int>(k), width, row(op.outputs[0], t));
  });
}

void Runner::scale_rows(const Op& op) {
  const int64_t width = value(op.inputs[0]).width;
  each_row(rows_of(op.inputs[0]), width, [&](int64_t r) {
    kernels_.scale(row(op.inputs[0], r), *row(op.inputs[1], r), width, row(op.outputs[0], r));
  });
}

void Runner::concat(const Op& op) {
  const int64_t heads = op.integer(0);
  const size_t a = static_cast<size_t>(value(op.inputs[0]).width / heads) * 4;
  const size_t b = static_cast<size_t>(value(op.inputs[1]).width / heads) * 4;
  each_row(rows_of(op.inputs[0]), value(op.outputs[0]).width, [&](int64_t r) {
    const char *x = reinterpret_cast<const char*>(row(op.inputs[0], r)),
               *y = reinterpret_cast<const char*>(row(op.inputs[1], r));
    char* z = reinterpret_cast<char*>(row(op.outputs[0], r));
    for (int64_t h = 0; h < heads; ++h, x += a, y += b, z += a + b) {
      std::memcpy(z, x, a);
      std::memcpy(z + a, y, b);
    }
  });
}

// Each head's rows are whole tiles of the one matrix, so that a head is a run of tiles with an input of its own.
void Runner::head_linears(const Op& op) {
  const Weight& w = *weight(op, 0);
  const int64_t heads = op.integer(0), rows = rows_of(op.inputs[0]), width = value(op.inputs[0]).width;
  if (rows == 0) return;
  const int64_t tiles = w.out / heads / kTileRows;
  const int64_t worth = std::max<int64_t>(1, kTileProducts / (rows * w.in * kTileRows));
  const int64_t chunk = std::min(tiles, worth), each = (tiles + chunk - 1) / chunk;
  float* y = floats(op.outputs[0]);
  pool_.run(heads * each, [&](int64_t task, int) {
    const int64_t head = task / each, first = head * tiles + task % each * chunk;
    const int64_t last = std::min((head + 1) * tiles, first + chunk);
    if (value(op.inputs[0]).dtype == DType::kI8) {
      const QuantRows x = codes(op.inputs[0]).view(0, head * w.in / kQuantGroup);
      kernels_.linear_i8(w, x, static_cast<int>(rows), first, last, nullptr, y, w.out);
    } else {
      const float* x = floats(op.inputs[0]) + head * w.in;
      kernels_.linear_f32(w, x, width, static_cast<int>(rows), first, last, nullptr, y, w.out);
    }
  });
}

}  // namespace inhouse
