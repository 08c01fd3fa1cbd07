#include "step.h"

#include <algorithm>
#include <cstring>

#include "cpu.h"
#include "linears.h"

namespace inhouse {

Runner::Runner(Model& model, int32_t program, const ih_step& step, const Rows& rows)
    : model_(model),
      index_(program),
      program_(model.set_.programs[program]),
      step_(step),
      rows_(rows),
      kernels_(*model.kernels_),
      pool_(Pool::process(), model.threads_) {}

void Runner::run() {
  const FlushScope flush;
  find_spans();
  for (const Op& op : program_.ops) run_op(op);
}

void Runner::run_op(const Op& op) {
  switch (op.kind) {
    case OpKind::kEmbed:
      return embed(op);
    case OpKind::kRmsNorm:
      return rms_norm(op);
    case OpKind::kLayerNorm:
      return layer_norm(op);
    case OpKind::kQuantizeRows:
      return quantize_rows(op);
    case OpKind::kLinears:
      return linears(op);
    case OpKind::kRotary:
      return rotary(op);
    case OpKind::kRope:
      return rope(op);
    case OpKind::kAttention:
      return attention(op);
    case OpKind::kWriteCross:
      return write_cross(op);
    case OpKind::kSelectRows:
      return select_rows(op);
    case OpKind::kPool:
      return pool(op);
    case OpKind::kRoute:
      return route(op);
    case OpKind::kDispatch:
      return dispatch(op);
    case OpKind::kExpertLinears:
      return expert_linears(op);
    case OpKind::kCombine:
      return combine(op);
    case OpKind::kScaleRows:
      return scale_rows(op);
    case OpKind::kConcat:
      return concat(op);
    case OpKind::kHeadLinears:
      return head_linears(op);
    default:
      return map(op);
  }
}

QuantRows Runner::codes(int32_t v) {
  const Value& q = value(v);
  return quant_rows(model_.arena_->at(index_, v), model_.arena_->capacity(q.axis), q.width, rows_[q.axis]);
}

void Runner::embed(const Op& op) {
  const Weight& table = *weight(op, 0);
  const int64_t source = op.integer(0), offset = op.integer(1), width = table.in;
  const float scale = op.real(2);
  const int32_t* ids = source == 0 ? step_.tokens : source == 1 ? step_.positions : step_.types;
  each_row(step_.rows, width, [&](int64_t r) {
    float* y = row(op.outputs[0], r);
    kernels_.unpack_row(table, ids[r] + offset, y);
    if (scale != 1.0f) kernels_.scale(y, scale, width, y);
  });
}

void Runner::rms_norm(const Op& op) {
  const int64_t width = value(op.inputs[0]).width, heads = op.integer(1);
  each_row(rows_of(op.inputs[0]), width, [&](int64_t r) {
    kernels_.rms_norm(row(op.inputs[0], r), vector(op, 0), op.real(0), op.real(2), heads, width / heads,
                      row(op.outputs[0], r));
  });
}

void Runner::layer_norm(const Op& op) {
  const int64_t width = value(op.inputs[0]).width;
  each_row(rows_of(op.inputs[0]), 2 * width, [&](int64_t r) {
    kernels_.layer_norm(row(op.inputs[0], r), vector(op, 0), vector(op, 1), op.real(0), width, row(op.outputs[0], r));
  });
}

void Runner::quantize_rows(const Op& op) {
  const Value& made = value(op.outputs[0]);
  const QuantRows q = codes(op.outputs[0]);
  each_row(rows_of(op.inputs[0]), made.width,
           [&](int64_t r) { kernels_.quantize_row(row(op.inputs[0], r), made.width, made.group, q, r); });
}

void Runner::linears(const Op& op) {
  const Value& x = value(op.inputs[0]);
  const bool quantized = x.dtype == DType::kI8;
  const QuantRows quants = quantized ? codes(op.inputs[0]) : QuantRows{};
  std::vector<LinearTask>& tasks = model_.linear_tasks_;
  tasks.clear();
  const size_t count = op.outputs.size();
  for (size_t i = 0; i < count; ++i) tasks.push_back({weight(op, i), vector(op, count + i), floats(op.outputs[i])});
  const LinearInput in = {rows_of(op.inputs[0]), x.width, quantized ? nullptr : floats(op.inputs[0]),
                          quantized ? &quants : nullptr};
  run_linears(pool_, kernels_, in, tasks.data(), count);
}

void Runner::rotary(const Op& op) {
  const int64_t half = value(op.outputs[0]).width / 2;
  each_row(step_.rows, 64 * half, [&](int64_t r) {
    kernels_.rotary(step_.positions[r], vector(op, 0), op.real(0), half, row(op.outputs[0], r));
  });
}

void Runner::rope(const Op& op) {
  const int64_t width = value(op.inputs[0]).width, head_dim = op.integer(0), turned = value(op.inputs[1]).width;
  each_row(rows_of(op.inputs[0]), width, [&](int64_t r) {
    kernels_.rope(row(op.inputs[0], r), row(op.inputs[1], r), width / head_dim, head_dim, turned, op.integer(1) != 0,
                  row(op.outputs[0], r));
  });
}

// The element-wise ops: rows do not matter, so the whole value is one run of elements, cut at multiples of a tile.
void Runner::map(const Op& op) {
  const int64_t count = rows_of(op.inputs[0]) * value(op.inputs[0]).width;
  const float* a = floats(op.inputs[0]);
  const float* b = op.inputs.size() > 1 ? floats(op.inputs[1]) : nullptr;
  float* y = floats(op.outputs[0]);
  pool_.run((count + kTileElements - 1) / kTileElements, [&](int64_t tile, int) {
    const int64_t at = tile * kTileElements, n = std::min(kTileElements, count - at);
    switch (op.kind) {
      case OpKind::kAct:
        return kernels_.activation(static_cast<int>(op.integer(0)), a + at, n, y + at);
      case OpKind::kGlu:
        if (op.real(1) > 0.0f || op.real(2) != 0.0f) {
          return kernels_.glu_cut(static_cast<int>(op.integer(0)), glu_limit(op), op.real(2), a + at, b + at, n,
                                  y + at);
        }
        return kernels_.glu(static_cast<int>(op.integer(0)), a + at, b + at, n, y + at);
      case OpKind::kAdd:
        return kernels_.add(a + at, b + at, n, y + at);
      case OpKind::kMul:
        return kernels_.mul(a + at, b + at, n, y + at);
      case OpKind::kScale:
        return kernels_.scale(a + at, op.real(0), n, y + at);
      default:
        return kernels_.soft_cap(a + at, op.real(0), n, y + at);
    }
  });
}

void Runner::select_rows(const Op& op) {
  const int64_t width = value(op.inputs[0]).width;
  each_row(step_.sampled, width, [&](int64_t r) {
    std::memcpy(row(op.outputs[0], r), row(op.inputs[0], step_.sampled_rows[r]), static_cast<size_t>(width) * 4);
  });
}

void Runner::pool(const Op& op) {
  const int64_t width = value(op.inputs[0]).width;
  std::memset(floats(op.outputs[0]), 0, static_cast<size_t>(step_.sequences * width) * 4);
  const std::vector<Span>& spans = model_.attention_.spans;
  pool_.run(static_cast<int64_t>(spans.size()), [&](int64_t i, int) { pool_one(op, spans[i]); });
}

void Runner::pool_one(const Op& op, const Span& span) {
  const int64_t width = value(op.inputs[0]).width, mode = op.integer(0);
  float* y = row(op.outputs[0], span.sequence);
  const int32_t start = mode == 2 ? span.end - 1 : span.begin;
  std::memcpy(y, row(op.inputs[0], start), static_cast<size_t>(width) * 4);
  for (int32_t r = span.begin + 1; (mode == 1 || mode == 3) && r < span.end; ++r) {
    (mode == 1 ? kernels_.add : kernels_.max)(y, row(op.inputs[0], r), width, y);
  }
  if (mode == 1) kernels_.scale(y, 1.0f / static_cast<float>(span.end - span.begin), width, y);
  if (op.integer(1) != 0) kernels_.normalize(y, width, y);
}

}  // namespace inhouse
