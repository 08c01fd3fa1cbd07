// Reading of the flat form. A faulty array gives a Status; it never reads past the end or makes an endless list.
#include "program.h"

#include <algorithm>
#include <string>

namespace inhouse {

namespace {

constexpr int64_t kMaxCount = 1 << 24;  // of anything countable; each item takes at least one number of the array
constexpr int64_t kMaxWidth = int64_t{1} << 31;

struct OpRow {
  const char* name;
  int attrs;
};

// By OpKind.
constexpr OpRow kOps[] = {
    {"embed", 3},       {"rms_norm", 3},    {"layer_norm", 1}, {"quantize_rows", 2}, {"linears", 1},
    {"rotary", 2},      {"rope", 2},        {"attention", 19}, {"act", 1},           {"glu", 3},
    {"add", 0},         {"mul", 0},         {"scale", 1},      {"soft_cap", 1},      {"select_rows", 0},
    {"pool", 2},        {"write_cross", 2}, {"route", 8},      {"dispatch", 0},      {"expert_linears", 1},
    {"combine", 0},     {"scale_rows", 0},  {"concat", 1},     {"head_linears", 1},  {"select_columns", 0},
    {"embed_train", 6},
};
static_assert(sizeof(kOps) / sizeof(kOps[0]) == static_cast<size_t>(OpKind::kCount));

class Reader {
 public:
  Reader(const int64_t* flat, int64_t length) : at_(flat), left_(length) {}

  // The next number, which must lie in [low, high]; after a failure every call gives `low`.
  int64_t next(const char* what, int64_t low, int64_t high) {
    if (failed()) return low;
    if (left_ == 0) return fail(std::string("the program ends before ") + what, low);
    const int64_t number = *at_;
    ++at_;
    --left_;
    if (number < low || number > high) {
      return fail(std::string(what) + " is " + std::to_string(number) + ", allowed " + std::to_string(low) + ".." +
                      std::to_string(high),
                  low);
    }
    return number;
  }
  // A count of items that each take at least one number of what is left.
  int64_t count(const char* what) { return next(what, 0, left_ < kMaxCount ? left_ : kMaxCount); }
  int64_t any(const char* what) { return next(what, INT64_MIN, INT64_MAX); }

  bool failed() const { return !status_.ok(); }
  Status finish() {
    if (!failed() && left_ != 0) fail(std::to_string(left_) + " numbers are left over after the program", 0);
    return status_;
  }

 private:
  int64_t fail(std::string text, int64_t value) {
    status_ = Status::usage("ill-formed program: " + std::move(text));
    return value;
  }

  const int64_t* at_;
  int64_t left_;
  Status status_;
};

Group read_group(Reader& in) {
  Group group = {};
  group.kind = static_cast<GroupKind>(in.next("a group's kind", 0, static_cast<int64_t>(GroupKind::kCount) - 1));
  group.kv_heads = in.next("kv_heads", 1, 1 << 16);
  group.head_dim = in.next("head_dim", 1, 1 << 16);
  group.v_dim = in.next("v_dim", 1, 1 << 16);
  group.window = in.next("window", 0, INT32_MAX);
  group.layers = in.next("layers", 1, 1 << 16);
  group.k_bits = in.next("the bits of K", 0, 8);
  group.v_bits = in.next("the bits of V", 0, 8);
  return group;
}

Value read_value(Reader& in) {
  Value value = {};
  value.axis = static_cast<Axis>(in.next("an axis", 0, static_cast<int64_t>(Axis::kCount) - 1));
  value.width = in.next("a width", 1, kMaxWidth);
  value.dtype = static_cast<DType>(in.next("a dtype", 0, static_cast<int64_t>(DType::kCount) - 1));
  const bool codes = value.dtype == DType::kI8;
  value.group = in.next("a value's group", codes ? 1 : 0, codes ? value.width : 0);
  return value;
}

std::vector<int32_t> read_indices(Reader& in, const char* what, int64_t count, int64_t low, int64_t end) {
  std::vector<int32_t> indices;
  for (int64_t i = 0; i < count && !in.failed(); ++i) {
    indices.push_back(static_cast<int32_t>(in.next(what, low, end - 1)));
  }
  return indices;
}

Op read_op(Reader& in, int64_t values, int64_t weights) {
  Op op = {};
  op.kind = static_cast<OpKind>(in.next("an op kind", 0, static_cast<int64_t>(OpKind::kCount) - 1));
  const int64_t inputs = in.count("an op's inputs"), names = in.count("an op's weights");
  const int64_t outputs = in.count("an op's outputs");
  const int64_t wanted = kOps[static_cast<int>(op.kind)].attrs;
  const int64_t attrs = in.next("an op's attributes", wanted, wanted);
  op.inputs = read_indices(in, "an input", inputs, 0, values);
  op.weights = read_indices(in, "a weight", names, -1, weights);
  op.outputs = read_indices(in, "an output", outputs, 0, values);
  for (int64_t i = 0; i < attrs && !in.failed(); ++i) op.attrs.push_back(in.any("an attribute"));
  return op;
}

Program read_program(Reader& in, int64_t weights) {
  Program program;
  const int64_t values = in.count("a program's values"), ops = in.count("a program's ops");
  const int64_t outputs = in.count("a program's outputs");
  for (int64_t i = 0; i < values && !in.failed(); ++i) program.values.push_back(read_value(in));
  for (int64_t i = 0; i < ops && !in.failed(); ++i) program.ops.push_back(read_op(in, values, weights));
  program.outputs = read_indices(in, "a program's output", outputs, 0, values);
  return program;
}

RoutedSizes routed_sizes(const ProgramSet& set) {
  RoutedSizes sizes;
  for (const Program& program : set.programs) {
    for (const Op& op : program.ops) {
      if (op.kind == OpKind::kRoute && !op.inputs.empty()) {
        sizes.top_k = std::max(sizes.top_k, op.integer(0));
        sizes.experts = std::max(sizes.experts, program.values[op.inputs[0]].width);
      }
      if (op.kind == OpKind::kExpertLinears) {
        sizes.outputs = std::max(sizes.outputs, static_cast<int64_t>(op.outputs.size()));
      }
    }
  }
  return sizes;
}

}  // namespace

const char* op_name(OpKind kind) { return kOps[static_cast<int>(kind)].name; }

Status read_programs(const int64_t* flat, int64_t length, int64_t weight_count, ProgramSet* set) {
  Reader in(flat, length);
  in.next("the magic number", kMagic, kMagic);
  in.next("the version", kFlatVersion, kFlatVersion);
  set->vocab_size = in.next("vocab_size", 1, INT32_MAX);
  set->context_length = in.next("context_length", 1, INT32_MAX);
  const int64_t groups = in.count("the groups"), programs = in.count("the programs");
  for (int64_t i = 0; i < groups && !in.failed(); ++i) set->groups.push_back(read_group(in));
  for (int64_t i = 0; i < programs && !in.failed(); ++i) set->programs.push_back(read_program(in, weight_count));
  if (!in.failed()) set->routed = routed_sizes(*set);
  return in.finish();
}

}  // namespace inhouse
