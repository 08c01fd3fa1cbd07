#include "step.h"

#include <algorithm>
#include <chrono>
#include <cstring>

#include "cpu.h"
#include "linears.h"

namespace inhouse {

using Clock = std::chrono::steady_clock;

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
  const std::vector<size_t>& ends = model_.arena_->plan(index_).run_end;
  std::vector<int64_t>& times = model_.times_[static_cast<size_t>(index_)];
  const bool timed = !times.empty();  // who asks for times while a step runs has them from the next on
  for (size_t i = 0, next = 0; i < ends.size(); i = next) {
    const auto before = timed ? Clock::now() : Clock::time_point();
    next = ends[i];
    if (row_wise(program_.ops[i].kind)) {
      row_ops(i, next);
    } else if (runs_gated(i)) {
      gated(program_.ops[i], program_.ops[i + 1], program_.ops[i + 2]);
      next = i + 3;
    } else {
      run_op(program_.ops[i]);
    }
    if (timed) times[i] += std::chrono::nanoseconds(Clock::now() - before).count();
  }
}

void Runner::run_op(const Op& op) {
  switch (op.kind) {
    case OpKind::kEmbed:
      return embed(op);
    case OpKind::kEmbedTrain:
      return embed_train(op);
    case OpKind::kLinears:
      return linears(op);
    case OpKind::kRotary:
      return rotary(op);
    case OpKind::kAttention:
      return attention(op);
    case OpKind::kWriteCross:
      return write_cross(op);
    case OpKind::kSelectRows:
      return select_rows(op);
    case OpKind::kSelectColumns:
      return select_columns(op);
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
      return;  // row-wise
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

void Runner::linears(const Op& op) {
  const Value& x = value(op.inputs[0]);
  const bool quantized = x.dtype == DType::kI8;
  const QuantRows quants = quantized ? codes(op.inputs[0]) : QuantRows{};
  std::vector<LinearTask>& tasks = model_.linear_tasks_;
  tasks.clear();
  const size_t count = op.outputs.size();
  for (size_t i = 0; i < count; ++i) tasks.push_back({weight(op, i), vector(op, count + i), floats(op.outputs[i])});
  const LinearInput in = {rows_of(op.inputs[0]), x.width, quantized ? nullptr : floats(op.inputs[0]),
                          quantized ? &quants : nullptr, op.integer(0) != 0};
  run_linears(pool_, kernels_, in, tasks.data(), count);
  adapt(op);
}

void Runner::rotary(const Op& op) {
  const int64_t half = value(op.outputs[0]).width / 2;
  each_row(step_.rows, 64 * half, [&](int64_t r) {
    float* y = row(op.outputs[0], r);
    const float factor = op.real(0);
    const float* frequencies = vector(op, 0);
    if (op.integer(1) == 0) return kernels_.rotary(step_.positions[r], frequencies, factor, half, y);
    const int32_t turn = std::max(step_.prefixes[step_.sequence_of[r]] - 1, 0);  // where the first part stops
    kernels_.rotary(std::min(step_.positions[r], turn), frequencies, factor, half, y);
    for (int64_t i = half / 2; i < half; ++i) {
      float pair[2];
      kernels_.rotary(std::max(step_.positions[r] - turn, 0), frequencies + i, factor, 1, pair);
      y[i] = pair[0];
      y[half + i] = pair[1];
    }
  });
}

void Runner::select_rows(const Op& op) {
  const int64_t width = value(op.inputs[0]).width;
  each_row(step_.sampled, width, [&](int64_t r) {
    std::memcpy(row(op.outputs[0], r), row(op.inputs[0], step_.sampled_rows[r]), static_cast<size_t>(width) * 4);
  });
}

void Runner::select_columns(const Op& op) {
  const int64_t width = value(op.inputs[0]).width;
  const float* order = vector(op, 0);
  each_row(rows_of(op.inputs[0]), width, [&](int64_t r) {
    const float* x = row(op.inputs[0], r);
    float* y = row(op.outputs[0], r);
    for (int64_t i = 0; i < width; ++i) y[i] = x[static_cast<int64_t>(order[i])];
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
