// The shape rules of every op, on the native side: a program that passes cannot make a body leave its buffers.
#include <algorithm>
#include <string>

#include "check_rule.h"
#include "formats.h"
#include "program.h"

namespace inhouse {

namespace {

void check_embed(Rule& r) {
  if (!r.arity(0, 1, 1, 1)) return;
  r.floats();
  r.integer(0, 0, 2);
  r.integer(1, 0, INT32_MAX);
  const Weight* table = r.weight(0);
  if (table == nullptr || table->format < 0) return r.need(false, "no packed table");
  const int64_t sizes[] = {r.set().vocab_size, r.set().context_length, 1};
  if (r.fault() != nullptr) return;
  r.need(r.out(0).axis == Axis::kTokens && r.out(0).width == table->in, "output does not fit the table");
  r.need(sizes[r.op().integer(0)] + r.op().integer(1) <= table->out, "the table has too few rows");
}

// Tables [m_k, r_(k-1) n_k r_k]: ids are digits in the base of the m_k, of which there must be enough.
void check_embed_train(Rule& r) {
  if (!r.arity(0, 2, kMaxTables, 1)) return;
  r.floats();
  r.integer(0, 0, 2);
  if (r.fault() != nullptr) return;
  const int64_t sizes[] = {r.set().vocab_size, r.set().context_length, 1};
  const int tables = static_cast<int>(r.op().weights.size());
  int64_t rank = 1, width = 1, rows = 1;
  for (int k = 0; k < tables; ++k) {
    const Weight* table = r.weight(k);
    const int64_t n = r.op().integer(2 + k);
    if (table == nullptr || table->format < 0) return r.need(false, "no packed table");
    r.integer(2 + k, 1, kMaxTrain);
    if (r.fault() != nullptr) return;
    r.need(table->in <= kMaxTrain && table->in % (rank * n) == 0, "a table does not fit its rank and width");
    if (r.fault() != nullptr) return;
    rank = table->in / (rank * n);
    width *= n;
    r.need(width * rank <= kMaxTrain, "a product of slices is too large");
    if (r.fault() != nullptr) return;
    rows = rows >= sizes[r.op().integer(0)] ? rows : rows * table->out;  // never far beyond int32
  }
  r.need(rank == 1, "the last table leaves a rank");
  r.need(r.out(0).axis == Axis::kTokens && r.out(0).width == width, "output does not fit the tables");
  r.need(rows >= sizes[r.op().integer(0)], "the tables have too few rows");
}

void check_rms_norm(Rule& r) {
  if (!r.arity(1, 1, 1, 1)) return;
  r.floats();
  r.alike(r.in(0), r.out(0));
  r.integer(1, 1, r.in(0).width);
  if (r.fault() != nullptr) return;
  r.need(r.in(0).width % r.op().integer(1) == 0, "width is no multiple of heads");
  r.vector(0, r.in(0).width / r.op().integer(1), false);
}

void check_layer_norm(Rule& r) {
  if (!r.arity(1, 1, 2, 1)) return;
  r.floats();
  r.alike(r.in(0), r.out(0));
  r.vector(0, r.in(0).width, false);
  r.vector(1, r.in(0).width, true);
}

void check_quantize_rows(Rule& r) {
  if (!r.arity(1, 0, 0, 1)) return;
  r.alike(r.in(0), r.out(0));
  r.need(r.in(0).dtype == DType::kF32 && r.out(0).dtype == DType::kI8, "must turn f32 into i8");
  r.need(r.out(0).group == r.op().integer(0), "group differs from the value's");
  r.need(r.op().integer(1) == 0 || r.op().integer(1) == 1, "powers must be 0 or 1");
  r.need(r.out(0).group % kQuantGroup == 0 || r.out(0).group == r.in(0).width, "group must be a multiple of 32");
}

// Code formats take int8 rows with a scale for every kQuantGroup elements, or one for the whole row.
bool takes_codes(const Weight& w, const Value& x) {
  return takes_int8(kFormats[w.format]) && (x.group == kQuantGroup || x.group == x.width);
}

void check_linears(Rule& r) {
  const size_t count = r.op().outputs.size();
  r.need(count > 0, "no outputs");
  if (!r.arity(1, 2 * count, 2 * count, count)) return;
  const bool narrow = r.op().integer(0) != 0;
  r.need(r.op().integer(0) == 0 || r.op().integer(0) == 1, "narrow must be 0 or 1");
  r.need(!narrow || (r.in(0).width % 4 == 0 && r.in(0).width <= kMostPairInputs), "inputs do not fit pairs");
  for (size_t i = 0; i < count; ++i) {
    const Weight* w = r.weight(i);
    const Value& y = r.out(static_cast<int>(i));
    if (w == nullptr || w->format < 0) return r.need(false, "a packed weight is missing");
    r.need(r.in(0).dtype == DType::kF32 || takes_codes(*w, r.in(0)), "a weight cannot take its quantised input");
    r.need(w->in == r.in(0).width, "a weight takes another width");
    r.need(!narrow || (w->format == kBf16Format && r.in(0).dtype == DType::kF32), "only bf16 weights take pairs");
    r.need(y.axis == r.in(0).axis && y.width == w->out && y.dtype == DType::kF32, "an output does not fit its weight");
    r.vector(count + i, w->out, true);
  }
}

void check_rotary(Rule& r) {
  if (!r.arity(0, 1, 1, 1)) return;
  r.floats();
  r.need(r.out(0).axis == Axis::kTokens && r.out(0).width % 2 == 0, "output must be [T, even]");
  r.integer(1, 0, 1);
  r.vector(0, r.out(0).width / 2, false);
}

void check_rope(Rule& r) {
  if (!r.arity(2, 0, 0, 1)) return;
  r.floats();
  r.alike(r.in(0), r.out(0));
  r.integer(0, 1, r.in(0).width);
  if (r.fault() != nullptr) return;
  r.need(r.in(0).axis == r.in(1).axis, "axes differ");
  r.need(r.in(0).width % r.op().integer(0) == 0, "width is no multiple of head_dim");
  r.need(r.in(1).width <= r.op().integer(0) && r.in(1).width % 2 == 0, "rotary width beyond head_dim");
}

// The weight that an attention op's bias attribute asks for.
void check_bias(Rule& r, int64_t heads) {
  const int64_t bias = r.op().integer(11), buckets = r.op().integer(12);
  if (bias == 0) return r.need(r.weight(0) == nullptr, "a bias table without a bias");
  if (bias == 1) return r.vector(0, heads, false);
  r.integer(12, 4, 1 << 16);
  r.integer(13, buckets, 1 << 20);
  r.need(r.op().integer(10) == 0, "cross attention has no relative bias");
  const Weight* w = r.weight(0);
  r.need(w != nullptr && w->format >= 0 && w->out == buckets && w->in == heads, "no bias table [buckets, heads]");
}

bool known_bits(int64_t bits) { return bits == 4 || bits == 8; }

// The far part: codes with a group of recent positions beside them, or static blocks beside a window.
void check_far(Rule& r, const Group& group) {
  const Op& op = r.op();
  const bool causal = op.integer(9) == kCausal && op.integer(10) == 0 && op.integer(14) == 0;
  r.integer(15, -1, static_cast<int64_t>(r.set().groups.size()) - 1);
  r.integer(17, 0, INT32_MAX);
  r.integer(18, 0, INT32_MAX);
  if (r.fault() != nullptr) return;
  const bool coded = group.k_bits != 0 || group.v_bits != 0, fixed = op.integer(17) != 0 || op.integer(18) != 0;
  r.need(coded == (op.integer(15) >= 0), "codes go with a group of recent positions");
  r.need(!coded || (known_bits(group.k_bits) && known_bits(group.v_bits)), "codes have 4 or 8 bits");
  r.need(!coded || (causal && op.integer(8) == 0 && !fixed), "codes go with plain causal attention");
  r.need(!fixed || (causal && op.integer(8) > 0 && op.integer(11) == 0), "static blocks go with a causal window");
  r.need(op.integer(17) % kCacheBlock == 0, "a sink must be whole blocks");
  if (!coded || r.fault() != nullptr) return;
  const Group& recent = r.set().groups[op.integer(15)];
  r.integer(16, 0, recent.layers - 1);
  r.need(recent.kind == GroupKind::kWindow && recent.window > 0 && recent.k_bits == 0 && recent.v_bits == 0,
         "recent positions are kept in a window group");
  r.need(recent.kv_heads == group.kv_heads && recent.head_dim == group.head_dim && recent.v_dim == group.v_dim,
         "recent positions have other heads");
}

void check_attention(Rule& r) {
  for (int i = 9; i < 15; ++i) r.integer(i, 0, i == 9 || i == 11 ? 2 : i == 12 || i == 13 ? INT32_MAX : 1);
  if (r.fault() != nullptr) return;
  const bool cross = r.op().integer(10) != 0, v_from_k = r.op().integer(14) != 0;
  if (!r.arity(cross ? 1 : v_from_k ? 2 : 3, 0, 2, 1)) return;
  r.floats();
  r.integer(0, 0, static_cast<int64_t>(r.set().groups.size()) - 1);
  for (int i = 2; i < 6; ++i) r.integer(i, 1, 1 << 16);
  r.integer(8, 0, INT32_MAX);
  if (r.fault() != nullptr) return;
  const Group& group = r.set().groups[r.op().integer(0)];
  const int64_t heads = r.op().integer(2), kv = r.op().integer(3), dim = r.op().integer(4), v_dim = r.op().integer(5);
  r.integer(1, 0, group.layers - 1);
  r.need(group.kv_heads == kv && group.head_dim == dim && group.v_dim == v_dim, "its state group has other heads");
  r.need(group.window == 0 || (r.op().integer(8) > 0 && r.op().integer(8) <= group.window),
         "it sees more positions than its state group keeps");
  r.need(heads % kv == 0, "heads is no multiple of kv_heads");
  r.need((group.kind == GroupKind::kLatent) == v_from_k, "a latent group goes with v_from_k");
  r.need(!v_from_k || v_dim <= dim, "v_dim is beyond the keys that v is part of");
  r.need(!cross || (group.kind == GroupKind::kCross && r.op().integer(8) == 0 && r.op().integer(9) == kBidirectional),
         "cross attention reads a whole cross group");
  r.need(r.op().integer(9) != kPrefix || r.op().integer(8) == 0, "the prefix mask takes no window");
  check_far(r, group);
  for (int32_t v : r.op().inputs) r.need(r.value(v).axis == Axis::kTokens, "inputs must be over tokens");
  r.need(r.out(0).axis == Axis::kTokens && r.out(0).width == heads * v_dim, "output must be heads * v_dim wide");
  r.need(r.in(0).width == heads * dim, "q must be heads * head_dim wide");
  r.need(cross || r.in(1).width == kv * dim, "k has the wrong width");
  r.need(cross || v_from_k || r.in(2).width == kv * v_dim, "v has the wrong width");
  check_bias(r, heads);
  r.vector(1, heads, true);
}

void check_write_cross(Rule& r) {
  if (!r.arity(2, 0, 0, 0)) return;
  r.floats();
  r.integer(0, 0, static_cast<int64_t>(r.set().groups.size()) - 1);
  if (r.fault() != nullptr) return;
  const Group& group = r.set().groups[r.op().integer(0)];
  r.integer(1, 0, group.layers - 1);
  r.need(group.kind == GroupKind::kCross && group.k_bits == 0 && group.v_bits == 0, "its group is not a cross group");
  r.need(r.in(0).axis == Axis::kTokens && r.in(1).axis == Axis::kTokens, "inputs must be over tokens");
  r.need(r.in(0).width == group.kv_heads * group.head_dim, "k has the wrong width");
  r.need(r.in(1).width == group.kv_heads * group.v_dim, "v has the wrong width");
}

void check_map(Rule& r, size_t inputs) {
  if (!r.arity(inputs, 0, 0, 1)) return;
  r.floats();
  for (size_t i = 0; i < inputs; ++i) r.alike(r.in(static_cast<int>(i)), r.out(0));
  const OpKind kind = r.op().kind;
  if (kind == OpKind::kAct || kind == OpKind::kGlu) r.integer(0, 0, kActivations - 1);
}

void check_glu(Rule& r) {
  check_map(r, 2);
  if (r.fault() == nullptr) r.need(r.op().real(1) >= 0.0f, "a negative limit");
}

void check_scale_rows(Rule& r) {
  if (!r.arity(2, 0, 0, 1)) return;
  r.floats();
  r.alike(r.in(0), r.out(0));
  r.need(r.in(0).axis == r.in(1).axis && r.in(1).width == 1, "needs one number for each row");
}

void check_concat(Rule& r) {
  if (!r.arity(2, 0, 0, 1)) return;
  r.floats();
  r.integer(0, 1, r.in(0).width);
  if (r.fault() != nullptr) return;
  const int64_t heads = r.op().integer(0);
  r.need(r.in(0).axis == r.in(1).axis && r.in(0).axis == r.out(0).axis, "axes differ");
  r.need(r.in(0).width % heads == 0 && r.in(1).width % heads == 0, "a width is no multiple of heads");
  r.need(r.out(0).width == r.in(0).width + r.in(1).width, "output has another width");
}

void check_head_linears(Rule& r) {
  if (!r.arity(1, 1, 1, 1)) return;
  r.integer(0, 1, r.in(0).width);
  const Weight* w = r.weight(0);
  if (w == nullptr || w->format < 0) return r.need(false, "no packed matrix");
  if (r.fault() != nullptr) return;
  const int64_t heads = r.op().integer(0);
  const Value &x = r.in(0), &y = r.out(0);
  r.need(w->out % heads == 0 && w->out / heads % kTileRows == 0, "a head's outputs must be a multiple of 16");
  r.need(x.width == heads * w->in, "the matrix takes another width");
  const bool codes = x.group == kQuantGroup && w->in % kQuantGroup == 0 && takes_int8(kFormats[w->format]);
  r.need(x.dtype == DType::kF32 || codes, "the matrix cannot take its quantised input");
  r.need(y.axis == x.axis && y.width == w->out && y.dtype == DType::kF32, "output does not fit the matrix");
}

void check_route(Rule& r) {
  if (!r.arity(1, 0, 1, 1)) return;
  r.floats();
  const int64_t experts = r.in(0).width, k = r.op().integer(0), groups = r.op().integer(4);
  r.need(experts <= kMaxExperts, "too many experts");
  r.integer(0, 1, std::min<int64_t>(experts, kMaxTopK));
  r.integer(2, 0, kScorings - 1);
  r.integer(4, 0, experts);
  r.integer(5, groups > 0 ? 1 : 0, std::max<int64_t>(groups, 0));
  r.integer(6, 0, 1);
  if (r.fault() != nullptr) return;
  r.vector(0, experts, true);
  r.need(k == r.set().routed.top_k, "route ops differ in top_k");
  r.need(groups == 0 || (experts % groups == 0 && k <= experts / groups * r.op().integer(5)), "groups do not fit");
  r.need(groups == 0 || r.op().integer(6) == 0 || experts / groups >= 2, "groups of one expert have no two best");
  r.need(r.op().integer(2) != kSparsemixer || (k == 2 && groups == 0), "sparsemixer takes two experts, no groups");
  r.need(r.in(0).axis == Axis::kTokens && r.out(0).axis == Axis::kTokens, "must be over tokens");
  r.need(r.out(0).width == 2 * k, "routing must be 2 * top_k wide");
}

// The routing an op reads must be the last one made: its rows are sorted then.
void check_routing(Rule& r, int32_t last_routing) {
  r.need(r.op().inputs.size() == 2 && r.op().inputs[1] == last_routing, "its routing is not the last one");
}

void check_dispatch(Rule& r, int32_t last_routing) {
  if (!r.arity(2, 0, 0, 1)) return;
  r.floats();
  check_routing(r, last_routing);
  r.need(r.in(0).axis == Axis::kTokens && r.out(0).axis == Axis::kRouted, "must turn [T, W] into [R, W]");
  r.need(r.in(0).width == r.out(0).width, "widths differ");
}

void check_combine(Rule& r, int32_t last_routing) {
  if (!r.arity(2, 0, 0, 1)) return;
  r.floats();
  check_routing(r, last_routing);
  r.need(r.in(0).axis == Axis::kRouted && r.out(0).axis == Axis::kTokens, "must turn [R, W] into [T, W]");
  r.need(r.in(0).width == r.out(0).width, "widths differ");
}

void check_expert_linears(Rule& r, int32_t last_routing, int64_t experts) {
  const size_t count = r.op().outputs.size();
  r.integer(0, experts, experts);
  r.need(count > 0, "no outputs");
  if (r.fault() != nullptr) return;
  const size_t each = static_cast<size_t>(experts), half = count * each;
  if (!r.arity(2, 2 * half, 2 * half, count)) return;
  check_routing(r, last_routing);
  r.need(r.in(0).axis == Axis::kRouted, "its input must be routed rows");
  for (size_t i = 0; i < half && r.fault() == nullptr; ++i) {
    const Weight* w = r.weight(i);
    const Value& y = r.out(static_cast<int>(i / each));
    if (w == nullptr || w->format < 0) return r.need(false, "a packed weight is missing");
    r.need(r.in(0).dtype == DType::kF32 || takes_codes(*w, r.in(0)), "a weight cannot take its quantised input");
    r.need(w->in == r.in(0).width, "a weight takes another width");
    r.need(y.axis == Axis::kRouted && y.width == w->out && y.dtype == DType::kF32, "an output does not fit its weight");
    r.vector(half + i, w->out, true);
  }
}

void check_select_rows(Rule& r) {
  if (!r.arity(1, 0, 0, 1)) return;
  r.floats();
  r.need(r.in(0).axis == Axis::kTokens && r.out(0).axis == Axis::kSampled, "must turn [T, W] into [S, W]");
  r.need(r.in(0).width == r.out(0).width, "widths differ");
}

// The order is read by the body as it is, so that each of its numbers must be a column.
void check_select_columns(Rule& r) {
  if (!r.arity(1, 1, 1, 1)) return;
  r.floats();
  r.alike(r.in(0), r.out(0));
  r.vector(0, r.in(0).width, false);
  if (r.fault() != nullptr) return;
  const float* order = reinterpret_cast<const float*>(r.weight(0)->data);
  for (int64_t i = 0; i < r.in(0).width; ++i) {
    r.need(order[i] >= 0 && order[i] < static_cast<float>(r.in(0).width), "a column does not exist");
  }
}

void check_pool(Rule& r) {
  if (!r.arity(1, 0, 0, 1)) return;
  r.floats();
  r.need(r.in(0).axis == Axis::kTokens && r.out(0).axis == Axis::kSequences, "must turn [T, W] into [N, W]");
  r.need(r.in(0).width == r.out(0).width, "widths differ");
  r.integer(0, 0, 3);
}

// The last routing made before an op, and over how many experts; -1 and 0 where there is none.
struct Routing {
  int32_t value = -1;
  int64_t experts = 0;
};

void check_op(Rule& r, const Routing& last) {
  switch (r.op().kind) {
    case OpKind::kDispatch:
      return check_dispatch(r, last.value);
    case OpKind::kExpertLinears:
      return check_expert_linears(r, last.value, last.experts);
    case OpKind::kCombine:
      return check_combine(r, last.value);
    case OpKind::kEmbed:
      return check_embed(r);
    case OpKind::kEmbedTrain:
      return check_embed_train(r);
    case OpKind::kRmsNorm:
      return check_rms_norm(r);
    case OpKind::kLayerNorm:
      return check_layer_norm(r);
    case OpKind::kQuantizeRows:
      return check_quantize_rows(r);
    case OpKind::kLinears:
      return check_linears(r);
    case OpKind::kRotary:
      return check_rotary(r);
    case OpKind::kRope:
      return check_rope(r);
    case OpKind::kAttention:
      return check_attention(r);
    case OpKind::kGlu:
      return check_glu(r);
    case OpKind::kRoute:
      return check_route(r);
    case OpKind::kScaleRows:
      return check_scale_rows(r);
    case OpKind::kConcat:
      return check_concat(r);
    case OpKind::kHeadLinears:
      return check_head_linears(r);
    case OpKind::kAdd:
    case OpKind::kMul:
      return check_map(r, 2);
    case OpKind::kSelectRows:
      return check_select_rows(r);
    case OpKind::kSelectColumns:
      return check_select_columns(r);
    case OpKind::kPool:
      return check_pool(r);
    case OpKind::kWriteCross:
      return check_write_cross(r);
    default:
      return check_map(r, 1);
  }
}

Status check_program(const ProgramSet& set, const Program& program, const std::vector<Weight>& weights) {
  std::vector<bool> made(program.values.size(), false);
  Routing last;
  for (size_t i = 0; i < program.ops.size(); ++i) {
    const Op& op = program.ops[i];
    Rule rule(set, program, op, weights);
    for (int32_t v : op.inputs) rule.need(made[v], "it reads a value before it is made");
    if (rule.fault() == nullptr) check_op(rule, last);
    if (rule.fault() == nullptr && op.kind == OpKind::kRoute)
      last = {op.outputs[0], program.values[op.inputs[0]].width};
    for (int32_t v : op.outputs) {
      rule.need(!made[v], "it makes a value again");
      made[v] = true;
    }
    if (rule.fault() != nullptr) {
      return Status::usage("ill-formed program: op " + std::to_string(i) + " (" + op_name(op.kind) +
                           "): " + rule.fault());
    }
  }
  for (int32_t v : program.outputs) {
    if (!made[v]) return Status::usage("ill-formed program: output %" + std::to_string(v) + " is not made");
    if (program.values[v].dtype != DType::kF32) return Status::usage("ill-formed program: an output is not f32");
  }
  return {};
}

}  // namespace

Status check_programs(const ProgramSet& set, const std::vector<Weight>& weights) {
  for (const Program& program : set.programs) {
    Status status = check_program(set, program, weights);
    if (!status.ok()) return status;
  }
  return {};
}

}  // namespace inhouse
