#include "model.h"

#include <sys/mman.h>

#include <algorithm>
#include <new>
#include <string>
#include <utility>

#include "attention.h"
#include "dispatch.h"
#include "formats.h"
#include "guard.h"
#include "sparse.h"
#include "step.h"
#include "threads.h"

namespace inhouse {

namespace {

constexpr int64_t kMaxElements = int64_t{1} << 40;
constexpr int64_t kGuardGap = 4096;

Status fault(int64_t i, const char* what) { return Status::usage("weight " + std::to_string(i) + ": " + what); }

Weight weight_of(const ih_weight& w) {
  return {w.format, w.out, w.in, static_cast<const uint8_t*>(w.data), static_cast<size_t>(w.bytes)};
}

Status check_weight(int64_t i, const ih_weight& w) {
  if (w.data == nullptr) return fault(i, "no data");
  if (w.format < -1 || w.format >= kFormatCount) return fault(i, "unknown format");
  if (w.out < 1 || w.in < 1 || w.out > INT32_MAX || w.in > INT32_MAX || w.out > kMaxElements / w.in) {
    return fault(i, "impossible shape");
  }
  if (w.format == -1) {
    if (reinterpret_cast<uintptr_t>(w.data) % 4 != 0) return fault(i, "floats are not aligned");
    return w.bytes >= w.out * w.in * 4 ? Status{} : fault(i, "fewer bytes than its shape needs");
  }
  const Format& format = kFormats[w.format];
  if (!layout_of(format, w.in).valid) return fault(i, "its width does not fit its format");
  if (reinterpret_cast<uintptr_t>(w.data) % 64 != 0) return fault(i, "data are not aligned to 64 bytes");
  if (format.coding != kDense) {
    const char* damage = coded_fault(weight_of(w));
    return damage == nullptr ? Status{} : fault(i, damage);
  }
  return w.bytes >= packed_bytes(format, w.out, w.in) ? Status{} : fault(i, "fewer bytes than its shape needs");
}

}  // namespace

Status Model::create(const int64_t* flat, int64_t length, const ih_weight* weights, int64_t count,
                     const ModelOptions& options, std::unique_ptr<Model>* out) {
  std::unique_ptr<Model> model(new Model);
  Status status = choose_kernels(options.isa, &model->kernels_);
  if (status.ok()) status = read_programs(flat, length, count, &model->set_);
  if (status.ok()) status = model->take_weights(weights, count);
  if (status.ok()) status = check_programs(model->set_, model->weights_);
  if (!status.ok()) return status;
  for (const Group& group : model->set_.groups) {
    if ((group.k_bits != 0 || group.v_bits != 0) && options.kv_type != kKvF16) {
      return Status::usage("codes of K and V are made from f16");
    }
  }
  if (options.threads < 0 || options.threads > kMaxThreads) {
    return Status::usage(std::to_string(options.threads) + " threads; allowed 1.." + std::to_string(kMaxThreads));
  }
  model->threads_ = options.threads > 0 ? options.threads : default_threads();
  std::vector<Plan> plans;
  for (const Program& program : model->set_.programs) plans.push_back(plan_program(program));
  model->arena_ = std::make_unique<Arena>(std::move(plans));
  model->times_.resize(model->set_.programs.size());
  model->state_ = std::make_unique<State>(model->set_.groups, options.kv_type);
  model->size_attention();
  status = model->guard_weights();
  if (status.ok()) *out = std::move(model);
  return status;
}

Model::~Model() {
  for (int64_t guard : guards_) guard_remove(guard);
}

AttentionMemory::~AttentionMemory() {
  if (partials != nullptr) munmap(partials, static_cast<size_t>(partial_floats) * sizeof(float));
}

Status Model::take_weights(const ih_weight* weights, int64_t count) {
  for (int64_t i = 0; i < count; ++i) {
    const Status status = check_weight(i, weights[i]);
    if (!status.ok()) return status;
    weights_.push_back(weight_of(weights[i]));
  }
  return {};
}

// Weights that lie less than a page apart share a range: between them is no whole page of anybody else's, and a model
// of thousands of experts needs few ranges.
Status Model::guard_weights() {
  std::vector<std::pair<const uint8_t*, const uint8_t*>> ranges;
  for (const Weight& weight : weights_) {
    if (weight.bytes > 0) ranges.emplace_back(weight.data, weight.data + weight.bytes);
  }
  std::sort(ranges.begin(), ranges.end());
  for (size_t i = 0; i < ranges.size();) {
    const uint8_t *begin = ranges[i].first, *end = ranges[i].second;
    for (++i; i < ranges.size() && ranges[i].first < end + kGuardGap; ++i) end = std::max(end, ranges[i].second);
    const int64_t guard = guard_add(begin, static_cast<size_t>(end - begin));
    if (guard < 0) return Status::capacity("no room to guard another mapping");
    guards_.push_back(guard);
  }
  return {};
}

bool Model::damaged() {
  for (int64_t guard : guards_) damaged_ = damaged_ || guard_damaged(guard);
  return damaged_;
}

void Model::size_attention() {
  for (const Program& program : set_.programs) {
    for (const Op& op : program.ops) {
      if (op.kind != OpKind::kAttention) continue;
      const AttentionShape shape = attention_shape(op, KvType::kKvF32, 0);
      const int64_t scratch = attention_scratch(shape, piece_rows(shape));
      attention_.scratch_floats = std::max(attention_.scratch_floats, scratch);
      attention_.partial_floats =
          std::max(attention_.partial_floats, most_partial_floats(shape, set_.context_length, threads_));
      kv_heads_ = std::max(kv_heads_, int64_t{shape.kv_heads});
      if (op.integer(11) == 2) relative_bias(op, weights_, *kernels_, &relative_);
    }
  }
  if (attention_.scratch_floats == 0) return;
  attention_.scratch =
      std::make_unique_for_overwrite<float[]>(static_cast<size_t>(attention_.scratch_floats * threads_));
  const size_t bytes = static_cast<size_t>(attention_.partial_floats) * sizeof(float);
  void* memory = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED) throw std::bad_alloc();
  attention_.partials = static_cast<float*>(memory);
}

// No more than it has, as a rule; then this looks through a few hundred ops.
void Model::reserve_gated(const Rows& rows) {
  int64_t most = 0;
  for (size_t p = 0; p < set_.programs.size(); ++p) {
    const Program& program = set_.programs[p];
    const std::vector<bool>& gated = arena_->plan(static_cast<int>(p)).gated;
    for (size_t i = 0; i < gated.size(); ++i) {
      if (!gated[i]) continue;
      const Value& out = program.values[program.ops[i].outputs[0]];
      most = std::max(most, gated_floats(out.width, rows[out.axis], threads_));
    }
  }
  if (static_cast<int64_t>(gated_.size()) < most) gated_.resize(static_cast<size_t>(most));
}

void Model::reserve(const Rows& rows) {
  arena_->reserve(rows);
  reserve_gated(rows);
  routed_.reserve(rows[Axis::kTokens], set_.routed);
  const size_t sequences = static_cast<size_t>(rows[Axis::kSequences]);
  const size_t split = static_cast<size_t>(most_split_pieces(set_.context_length, threads_));
  const size_t whole = static_cast<size_t>(rows[Axis::kTokens] * kv_heads_);
  attention_.spans.reserve(sequences);
  attention_.pieces.reserve(std::max(split, whole));
}

Status Model::run(int32_t program, const ih_step& step, ih_output* outputs) {
  if (program < 0 || program >= static_cast<int32_t>(set_.programs.size())) {
    return Status::usage("no program " + std::to_string(program));
  }
  if (damaged_) return Status::failed("a mapped weight was lost in an earlier step");
  const Rows rows = rows_of(step.rows, step.sampled, step.sequences);
  reserve(rows);
  Runner(*this, program, step, rows).run();
  if (damaged()) return Status::failed("the file behind a mapped weight was cut short or could not be read");
  const Program& which = set_.programs[program];
  for (size_t i = 0; i < which.outputs.size(); ++i) {
    const Value& value = which.values[which.outputs[i]];
    const void* data = arena_->at(program, which.outputs[i]);
    outputs[i] = {static_cast<const float*>(data), rows[value.axis], value.width};
  }
  return {};
}

Status Model::times(int32_t program, int64_t* nanoseconds, int64_t count) {
  if (program < 0 || program >= static_cast<int32_t>(set_.programs.size())) {
    return Status::usage("no program " + std::to_string(program));
  }
  const size_t ops = set_.programs[program].ops.size();
  if (count != static_cast<int64_t>(ops)) {
    return Status::usage("room for " + std::to_string(count) + " times, the program has " + std::to_string(ops) +
                         " ops");
  }
  std::vector<int64_t>& times = times_[static_cast<size_t>(program)];
  times.resize(ops);
  std::copy(times.begin(), times.end(), nanoseconds);
  std::fill(times.begin(), times.end(), 0);
  return {};
}

}  // namespace inhouse
