// The attention op of a step: rows to tasks, tasks to the pool.
#include <algorithm>

#include "attention.h"
#include "relative.h"
#include "step.h"

namespace inhouse {

namespace {

constexpr int64_t kSerialProducts = 32768;  // multiply-adds of a whole op that are not worth waking anyone for

}  // namespace

void Runner::find_spans() {
  std::vector<Span>& spans = model_.attention_.spans;
  spans.clear();
  for (int32_t r = 0; r < step_.rows; ++r) {
    const int32_t sequence = step_.sequence_of[r];
    if (spans.empty() || spans.back().sequence != sequence) spans.push_back({sequence, r, r});
    spans.back().end = r + 1;
  }
}

void Runner::attention(const Op& op) {
  const int group = near_group(op);
  AttentionShape shape = attention_shape(op, model_.state_->kv_type(), model_.state_->head_bytes(group));
  if (is_coded(op)) {
    const Group& codes = model_.set_.groups[op.integer(0)];
    shape.k_bits = static_cast<int32_t>(codes.k_bits);
    shape.v_bits = static_cast<int32_t>(codes.v_bits);
    shape.recent = static_cast<int32_t>(model_.set_.groups[group].window) - 1;
    shape.far_bytes = model_.state_->head_bytes(static_cast<int>(op.integer(0)));
  }
  if (op.integer(11) == 1) shape.slopes = vector(op, 0);
  if (op.integer(11) == 2) {
    shape.relative = relative_bias(op, model_.weights_, kernels_, &model_.relative_);
  }
  shape.sinks = vector(op, 1);
  if (!is_cross(op)) store_kv(op, shape);
  if (is_coded(op)) code_blocks(op, shape);
  cut(op, shape);
  AttentionMemory& memory = model_.attention_;
  int64_t products = 0;
  for (const Piece& p : memory.pieces) products += p.rows * p.units * kPartition;
  const bool serial = products * group_of(shape) * (shape.head_dim + shape.v_dim) < kSerialProducts;
  const int64_t whole = static_cast<int64_t>(memory.pieces.size());
  const bool apart = !serial && pool_.threads() > 1 && whole < split_below(pool_.threads());
  if (apart) split();
  const auto one = [&](int64_t i, int worker) {
    const Piece& piece = memory.pieces[i];
    float* scratch = memory.scratch.get() + worker * memory.scratch_floats;
    if (piece.unit < 0) return kernels_.attend(task_of(op, shape, piece), scratch);
    kernels_.attend_partition(task_of(op, shape, piece), piece.unit, scratch,
                              memory.partials + piece.partials + piece.unit * piece.unit_floats);
  };
  const int64_t tasks = static_cast<int64_t>(memory.pieces.size());
  if (serial) {
    for (int64_t i = 0; i < tasks; ++i) one(i, 0);
    return;
  }
  pool_.run(tasks, one);
  if (!apart) return;
  pool_.run(tasks, [&](int64_t i, int) {
    const Piece& piece = memory.pieces[i];
    if (piece.unit != 0) return;
    kernels_.attend_merge(task_of(op, shape, piece), 0, piece.units, memory.partials + piece.partials,
                          piece.unit_floats);
  });
}

// A cross group's rows are stored like any other's, by their own positions.
void Runner::write_cross(const Op& op) {
  const int group = static_cast<int>(op.integer(0));
  const Group& kept = model_.set_.groups[group];
  AttentionShape shape = {};
  shape.kv_heads = static_cast<int32_t>(kept.kv_heads);
  shape.head_dim = static_cast<int32_t>(kept.head_dim);
  shape.v_dim = static_cast<int32_t>(kept.v_dim);
  shape.kv_type = model_.state_->kv_type();
  shape.head_bytes = model_.state_->head_bytes(group);
  store_rows(op, shape, op.inputs[0], op.inputs[1]);
}

// Every row's K and V into its block; a barrier later they are read back from there, the step's own included.
void Runner::store_kv(const Op& op, const AttentionShape& shape) {
  store_rows(op, shape, op.inputs[1], op.inputs[shape.v_from_k ? 1 : 2]);
}

void Runner::store_rows(const Op& op, const AttentionShape& shape, int32_t k, int32_t v) {
  const bool cross = op.kind == OpKind::kWriteCross;
  const int group = cross ? static_cast<int>(op.integer(0)) : near_group(op);
  uint8_t* layer = model_.state_->layer(group, cross ? op.integer(1) : near_slot(op));
  const int64_t stride = model_.state_->block_bytes(group), width = step_.table_widths[group];
  each_row(step_.rows, 4 * (value(k).width + value(v).width), [&](int64_t r) {
    const int32_t position = step_.positions[r];
    const int32_t block = step_.tables[group][step_.sequence_of[r] * width + position / kCacheBlock];
    kernels_.store_kv(shape, row(k, r), row(v, r), layer + block * stride, position % kCacheBlock);
  });
}

// A block whose last position is a row of this step becomes codes: all of it is stored by now, and nobody reads it as
// codes before.
void Runner::code_blocks(const Op& op, const AttentionShape& shape) {
  const int recent = near_group(op), codes = static_cast<int>(op.integer(0));
  const uint8_t* from = model_.state_->layer(recent, near_slot(op));
  uint8_t* to = model_.state_->layer(codes, op.integer(1));
  const int64_t from_bytes = model_.state_->block_bytes(recent), to_bytes = model_.state_->block_bytes(codes);
  each_row(step_.rows, 2 * shape.kv_heads * (shape.head_dim + shape.v_dim), [&](int64_t r) {
    const int32_t position = step_.positions[r], column = position / kCacheBlock, sequence = step_.sequence_of[r];
    if (position % kCacheBlock != kCacheBlock - 1) return;
    const int64_t source = step_.tables[recent][sequence * step_.table_widths[recent] + column];
    const int64_t target = step_.tables[codes][sequence * step_.table_widths[codes] + column];
    kernels_.code_block(shape, from + source * from_bytes, to + target * to_bytes);
  });
}

// The keys that a sequence's rows may see: what is stored of it, or of its encoder input.
Keys Runner::keys_of(const Op& op, int32_t sequence) const {
  if (is_cross(op)) return {step_.encoder_lengths[sequence], 0};
  return {step_.lengths[sequence], op.integer(9) == kPrefix ? step_.prefixes[sequence] : 0};
}

// Tasks of whole rows. The longest come first, so that none starts last.
void Runner::cut(const Op& op, const AttentionShape& shape) {
  std::vector<Piece>& pieces = model_.attention_.pieces;
  pieces.clear();
  const int32_t step = static_cast<int32_t>(piece_rows(shape));
  int64_t floats = 0;
  for (const Span& span : model_.attention_.spans) {
    const int32_t count = (span.end - span.begin + step - 1) / step;
    for (int32_t i = count - 1; i >= 0; --i) {
      Piece piece = {};
      piece.sequence = span.sequence;
      piece.begin = span.begin + i * step;
      piece.rows = std::min(step, span.end - piece.begin);
      piece.unit = -1;
      piece.unit_floats = piece.rows * group_of(shape) * partial_pitch(shape.v_dim);
      const Keys keys = keys_of(op, span.sequence);
      piece.units = units_of(shape, step_.positions[piece.begin], piece.rows, keys.length, keys.prefix).count();
      for (piece.kv_head = 0; piece.kv_head < shape.kv_heads; ++piece.kv_head) {
        piece.partials = floats;
        floats += piece.unit_floats * piece.units;
        pieces.push_back(piece);
      }
    }
  }
}

// Too few tasks for the threads: each unit becomes one, if the partial results have room.
void Runner::split() {
  AttentionMemory& memory = model_.attention_;
  const size_t whole = memory.pieces.size();
  if (whole == 0) return;
  const Piece& last = memory.pieces.back();
  if (last.partials + last.unit_floats * last.units > memory.partial_floats) return;
  for (size_t i = 0; i < whole; ++i) {
    const Piece piece = memory.pieces[i];
    memory.pieces[i].unit = 0;
    for (int32_t u = 1; u < piece.units; ++u) {
      memory.pieces.push_back(piece);
      memory.pieces.back().unit = u;
    }
  }
}

AttentionTask Runner::task_of(const Op& op, const AttentionShape& shape, const Piece& piece) {
  const int group = near_group(op);
  AttentionTask task = {};
  task.shape = &shape;
  task.ldq = value(op.inputs[0]).width;
  task.q = row(op.inputs[0], piece.begin);
  task.ldy = value(op.outputs[0]).width;
  task.y = row(op.outputs[0], piece.begin);
  task.table = step_.tables[group] + piece.sequence * step_.table_widths[group];
  task.blocks = model_.state_->layer(group, near_slot(op));
  task.block_stride = model_.state_->block_bytes(group);
  if (is_coded(op)) {
    const int codes = static_cast<int>(op.integer(0));
    task.far_table = step_.tables[codes] + piece.sequence * step_.table_widths[codes];
    task.far_blocks = model_.state_->layer(codes, op.integer(1));
    task.far_stride = model_.state_->block_bytes(codes);
  }
  task.position = step_.positions[piece.begin];
  const Keys keys = keys_of(op, piece.sequence);
  task.length = keys.length;
  task.prefix = keys.prefix;
  task.rows = piece.rows;
  task.kv_head = piece.kv_head;
  return task;
}

}  // namespace inhouse
