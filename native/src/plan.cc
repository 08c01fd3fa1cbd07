#include "plan.h"

#include <sys/mman.h>

#include <cstdlib>
#include <new>

namespace inhouse {

namespace {

constexpr int64_t kAlign = 64;
constexpr int64_t kHugePage = 2 << 20;

int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

// Whether output 0 may share memory with an input: the body reads element i of a row before it writes it.
bool in_place(OpKind kind) {
  switch (kind) {
    case OpKind::kRmsNorm:
    case OpKind::kLayerNorm:
    case OpKind::kRope:
    case OpKind::kAct:
    case OpKind::kGlu:
    case OpKind::kAdd:
    case OpKind::kMul:
    case OpKind::kScale:
    case OpKind::kSoftCap:
    case OpKind::kScaleRows:
      return true;
    default:
      return false;
  }
}

// The op after which each value is dead; the number of ops for outputs.
std::vector<size_t> last_uses(const Program& program) {
  std::vector<size_t> last(program.values.size(), 0);
  for (size_t i = 0; i < program.ops.size(); ++i) {
    for (int32_t v : program.ops[i].outputs) last[v] = i;
    for (int32_t v : program.ops[i].inputs) last[v] = i;
  }
  for (int32_t v : program.outputs) last[v] = program.ops.size();
  return last;
}

class Planner {
 public:
  explicit Planner(const Program& program) : program_(program), last_(last_uses(program)) {
    plan_.slot_of.assign(program.values.size(), -1);
  }

  Plan run() {
    plan_.run_end = run_ends();
    for (size_t i = 0; i < program_.ops.size(); ++i) plan_.gated.push_back(is_gated(i));
    std::vector<int32_t> read;  // by a gated op until the run behind it ends
    for (size_t begin = 0; begin < plan_.run_end.size(); begin = plan_.run_end[begin]) {
      const size_t end = plan_.run_end[begin];
      if (end - begin > 1) {
        place_run(begin, end);
        free_.insert(free_.end(), read.begin(), read.end());
        read.clear();
      } else {
        place(begin, plan_.gated[begin] ? &read : &free_);
      }
    }
    return std::move(plan_);
  }

 private:
  // rope reads its angles again for every head, so only its first input may be written over.
  // Nor may the numbers that rows are scaled by.
  static size_t shared_inputs(const Op& op) {
    return op.kind == OpKind::kRope || op.kind == OpKind::kScaleRows ? 1 : op.inputs.size();
  }

  // Row-wise ops that follow each other over the same rows are one run.
  std::vector<size_t> run_ends() const {
    const std::vector<Op>& ops = program_.ops;
    const auto axis = [&](size_t i) { return program_.values[ops[i].inputs[0]].axis; };
    std::vector<size_t> ends(ops.size());
    for (size_t i = ops.size(); i-- > 0;) {
      const bool on =
          row_wise(ops[i].kind) && i + 1 < ops.size() && row_wise(ops[i + 1].kind) && axis(i) == axis(i + 1);
      ends[i] = on ? ends[i + 1] : i + 1;
    }
    return ends;
  }

  // Two linears of quantised rows, what glu makes of them, and its codes, in groups of one block; nobody else reads
  // what lies between.
  bool is_gated(size_t i) const {
    const std::vector<Op>& ops = program_.ops;
    if (ops[i].kind != OpKind::kLinears || ops[i].outputs.size() != 2 || i + 3 > ops.size()) return false;
    const Op &op = ops[i], &glu = ops[i + 1], &quantize = ops[i + 2];
    if (glu.kind != OpKind::kGlu || quantize.kind != OpKind::kQuantizeRows || plan_.run_end[i + 1] != i + 3)
      return false;
    const Value &x = program_.values[op.inputs[0]], &y = program_.values[quantize.outputs[0]];
    const bool chained = glu.inputs == op.outputs && quantize.inputs[0] == glu.outputs[0] &&
                         last_[op.outputs[0]] == i + 1 && last_[op.outputs[1]] == i + 1 &&
                         last_[glu.outputs[0]] == i + 2;
    return chained && x.dtype == DType::kI8 && y.group == kQuantGroup && y.width % kQuantGroup == 0;
  }

  // `read`: where the slots of inputs go that are dead then.
  void place(size_t i, std::vector<int32_t>* read) {
    const Op& op = program_.ops[i];
    const bool early = in_place(op.kind);
    if (early) release(op, i, 0, shared_inputs(op), &free_);
    for (int32_t v : op.outputs) plan_.slot_of[v] = take(program_.values[v]);
    release(op, i, early ? shared_inputs(op) : 0, op.inputs.size(), read);
    for (int32_t v : op.outputs) {
      if (last_[v] == i) free_.push_back(plan_.slot_of[v]);  // made and never read
    }
  }

  // While a run is at one row, its first op has yet to read the rows behind: what dies within it is free only after it,
  // except to an output of the same width, whose rows lie where the input's do.
  void place_run(size_t begin, size_t end) {
    std::vector<int32_t> dead;
    for (size_t i = begin; i < end; ++i) {
      const Op& op = program_.ops[i];
      std::vector<int32_t> died;
      release(op, i, 0, op.inputs.size(), &died);
      const int32_t out = op.outputs[0], over = in_place(op.kind) ? heir(op, i) : -1;
      plan_.slot_of[out] = over < 0 ? take(program_.values[out]) : over;
      for (int32_t slot : died) {
        if (slot != over) dead.push_back(slot);
      }
      if (last_[out] == i) dead.push_back(plan_.slot_of[out]);
    }
    free_.insert(free_.end(), dead.begin(), dead.end());
  }

  // The slot of an input that dies with op i and has rows like its output's, or -1.
  int32_t heir(const Op& op, size_t i) const {
    const Value& out = program_.values[op.outputs[0]];
    for (size_t j = 0; j < shared_inputs(op); ++j) {
      const Value& in = program_.values[op.inputs[j]];
      if (last_[op.inputs[j]] == i && in.width == out.width && in.dtype == out.dtype)
        return plan_.slot_of[op.inputs[j]];
    }
    return -1;
  }

  // Puts the slots of those inputs [begin, end) that are dead after op i into `to`.
  void release(const Op& op, size_t i, size_t begin, size_t end, std::vector<int32_t>* to) {
    for (size_t j = begin; j < end; ++j) {
      const int32_t v = op.inputs[j];
      bool again = false;
      for (size_t k = 0; k < j; ++k) again = again || op.inputs[k] == v;
      if (last_[v] == i && !again) to->push_back(plan_.slot_of[v]);
    }
  }

  // The best free slot of the axis: the smallest that is large enough, else the largest, which then grows. The input
  // freed last wins among equals, so that in-place ops stay in place.
  int32_t take(const Value& value) {
    const int64_t need = row_bytes(value);
    int best = -1;
    for (int i = 0; i < static_cast<int>(free_.size()); ++i) {
      const Slot& slot = plan_.slots[free_[i]];
      if (slot.axis == value.axis && (best < 0 || better(slot, plan_.slots[free_[best]], need))) best = i;
    }
    if (best < 0) {
      plan_.slots.push_back({value.axis, need});
      return static_cast<int32_t>(plan_.slots.size()) - 1;
    }
    const int32_t slot = free_[best];
    free_.erase(free_.begin() + best);
    if (plan_.slots[slot].row_bytes < need) plan_.slots[slot].row_bytes = need;
    return slot;
  }

  static bool better(const Slot& a, const Slot& b, int64_t need) {
    const bool a_fits = a.row_bytes >= need, b_fits = b.row_bytes >= need;
    if (a_fits != b_fits) return a_fits;
    return a_fits ? a.row_bytes <= b.row_bytes : a.row_bytes >= b.row_bytes;
  }

  const Program& program_;
  std::vector<size_t> last_;
  std::vector<int32_t> free_;
  Plan plan_;
};

}  // namespace

bool row_wise(OpKind kind) {
  switch (kind) {
    case OpKind::kRmsNorm:
    case OpKind::kLayerNorm:
    case OpKind::kQuantizeRows:
    case OpKind::kRope:
    case OpKind::kAct:
    case OpKind::kGlu:
    case OpKind::kAdd:
    case OpKind::kMul:
    case OpKind::kScale:
    case OpKind::kSoftCap:
      return true;
    default:
      return false;
  }
}

int64_t row_bytes(const Value& value) {
  if (value.dtype == DType::kF32) return value.width * 4;
  return quant_bytes(1, value.width);
}

Plan plan_program(const Program& program) { return Planner(program).run(); }

void Arena::Free::operator()(uint8_t* p) const { std::free(p); }

void Arena::reserve(const Rows& rows) {
  bool enough = memory_ != nullptr;
  Rows wanted = rows_;
  for (int axis = 0; axis < static_cast<int>(Axis::kCount); ++axis) {
    enough = enough && rows.of[axis] <= rows_.of[axis];
    if (rows.of[axis] > wanted.of[axis]) wanted.of[axis] = round_up(rows.of[axis], kMaxLanes);
  }
  if (enough) return;
  std::vector<std::vector<int64_t>> offsets;
  int64_t bytes = 0;
  for (const Plan& plan : plans_) {
    int64_t at = 0;
    std::vector<int64_t> starts;
    for (const Slot& slot : plan.slots) {
      starts.push_back(at);
      at += round_up(slot.row_bytes * wanted[slot.axis], kAlign) + kAlign;  // three planes of codes stay aligned
    }
    offsets.push_back(std::move(starts));
    bytes = at > bytes ? at : bytes;
  }
  const bool huge = bytes >= 2 * kHugePage;
  bytes = round_up(bytes + kAlign, huge ? kHugePage : kAlign);
  memory_.reset();
  bytes_ = 0;
  uint8_t* memory = static_cast<uint8_t*>(std::aligned_alloc(huge ? kHugePage : kAlign, static_cast<size_t>(bytes)));
  if (memory == nullptr) {
    rows_ = {};
    throw std::bad_alloc();
  }
  if (huge) madvise(memory, static_cast<size_t>(bytes), MADV_HUGEPAGE);
  memory_.reset(memory);
  offsets_ = std::move(offsets);
  bytes_ = bytes;
  rows_ = wanted;
}

}  // namespace inhouse
