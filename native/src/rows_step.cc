// The row-wise ops of a step: each row of an output depends on the same row of the inputs alone. A run of such ops goes
// row by row, so that what one made is still in the cache when the next reads it, with one barrier behind all of them.
#include "step.h"

namespace inhouse {

namespace {

// About the work of one row, in elements of a plain copy.
int64_t cost_of(const Op& op, int64_t width) {
  switch (op.kind) {
    case OpKind::kAct:
    case OpKind::kGlu:
    case OpKind::kSoftCap:
      return 8 * width;
    case OpKind::kAdd:
    case OpKind::kMul:
    case OpKind::kScale:
      return width;
    default:
      return 2 * width;
  }
}

}  // namespace

void Runner::row_ops(size_t begin, size_t end) {
  int64_t cost = 0;
  for (size_t i = begin; i < end; ++i) cost += cost_of(program_.ops[i], value(program_.ops[i].inputs[0]).width);
  each_row(rows_of(program_.ops[begin].inputs[0]), cost, [&](int64_t r) {
    for (size_t i = begin; i < end; ++i) row_op(program_.ops[i], r);
  });
}

void Runner::row_op(const Op& op, int64_t r) {
  const int32_t in = op.inputs[0], out = op.outputs[0];
  const int64_t width = value(in).width;
  const float* x = row(in, r);
  switch (op.kind) {
    case OpKind::kRmsNorm:
      return kernels_.rms_norm(x, vector(op, 0), op.real(0), op.real(2), op.integer(1), width / op.integer(1),
                               row(out, r));
    case OpKind::kLayerNorm:
      return kernels_.layer_norm(x, vector(op, 0), vector(op, 1), op.real(0), width, row(out, r));
    case OpKind::kQuantizeRows:
      return kernels_.quantize_row(x, width, value(out).group, op.integer(1) != 0, codes(out), r);
    case OpKind::kRope: {
      const int64_t head_dim = op.integer(0);
      return kernels_.rope(x, row(op.inputs[1], r), width / head_dim, head_dim, value(op.inputs[1]).width,
                           op.integer(1) != 0, row(out, r));
    }
    case OpKind::kAct:
      return kernels_.activation(static_cast<int>(op.integer(0)), x, width, row(out, r));
    case OpKind::kGlu:
      return glu(op, x, row(op.inputs[1], r), width, row(out, r));
    case OpKind::kAdd:
      return kernels_.add(x, row(op.inputs[1], r), width, row(out, r));
    case OpKind::kMul:
      return kernels_.mul(x, row(op.inputs[1], r), width, row(out, r));
    case OpKind::kScale:
      return kernels_.scale(x, op.real(0), width, row(out, r));
    default:
      return kernels_.soft_cap(x, op.real(0), width, row(out, r));
  }
}

void Runner::glu(const Op& op, const float* gate, const float* up, int64_t width, float* y) {
  const int act = static_cast<int>(op.integer(0));
  if (op.real(1) > 0.0f || op.real(2) != 0.0f) {
    const float limit = op.real(1) > 0.0f ? op.real(1) : __builtin_inff();
    return kernels_.glu_cut(act, limit, op.real(2), gate, up, width, y);
  }
  kernels_.glu(act, gate, up, width, y);
}

}  // namespace inhouse
