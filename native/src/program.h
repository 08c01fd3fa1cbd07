// The compiled form of a ProgramSet, and the proof that it is well formed. Knows shapes; knows no buffers.
//
// Flat layout, int64 throughout (floats as the bits of a double), written by runtime/native_flat.py:
//   kMagic, kFlatVersion, vocab_size, context_length, groups, programs
//   a group:   kind (0 paged, 1 window, 2 cross, 3 latent), kv_heads, head_dim, v_dim, window, layers, bits of the
//              codes of K and of V (0: elements of the model's KV type)
//   a program: values, ops, outputs; values x (axis, width, dtype, group); the ops; outputs x value
//   an op:     kind, inputs, weights, outputs, attributes, then each of them (weights: index or -1)
#pragma once
#include <cstdint>
#include <vector>

#include "error.h"
#include "kernels.h"

namespace inhouse {

constexpr int64_t kMagic = 0x31575048494eLL;
constexpr int64_t kFlatVersion = 5;
constexpr int64_t kMaxTables = 4;       // of a tensor train
constexpr int64_t kMaxTrain = 1 << 16;  // numbers of any slice or product of slices of it

enum class Axis : int32_t { kTokens, kSampled, kSequences, kRouted, kCount };
enum class DType : int32_t { kF32, kI8, kCount };

enum class OpKind : int32_t {
  kEmbed,          // source (0 tokens, 1 positions, 2 types), offset, scale
  kRmsNorm,        // eps, heads, offset
  kLayerNorm,      // eps
  kQuantizeRows,   // group (never 0), whether scales are powers of two
  kLinears,        // whether inputs are rounded to bf16, of bf16 weights
  kRotary,         // factor, source (0 positions, 1 two-part)
  kRope,           // head_dim, interleaved
  kAttention,      // group, layer slot, heads, kv_heads, head_dim, v_dim, scale, softcap, window, mask (0 causal,
                   // 1 bidirectional, 2 prefix), cross, bias (0 none, 1 alibi, 2 relative), buckets, max_distance,
                   // v_from_k, group and layer slot of recent positions (-1: group has no codes), sink, stride
  kAct,            // act
  kGlu,            // act, limit, offset
  kAdd,            //
  kMul,            //
  kScale,          // by
  kSoftCap,        // cap
  kSelectRows,     //
  kPool,           // mode (0 cls, 1 mean, 2 last, 3 max), normalize
  kWriteCross,     // group, layer slot
  kRoute,          // top_k, normalize, scoring, scale, groups, top_groups, group_score (0 max, 1 top2), jitter
  kDispatch,       //
  kExpertLinears,  // experts
  kCombine,        //
  kScaleRows,      //
  kConcat,         // heads
  kHeadLinears,    // heads
  kSelectColumns,  //
  kEmbedTrain,     // source (0 tokens, 1 positions, 2 types), scale, kMaxTables widths (0 beyond the tables)
  kCount
};

struct Value {
  Axis axis;
  int64_t width;
  DType dtype;
  int64_t group;  // kI8: elements that share a scale
};

struct Op {
  OpKind kind;
  std::vector<int32_t> inputs, weights, outputs;  // weights: -1 where absent
  std::vector<int64_t> attrs;

  int64_t integer(int i) const { return attrs[i]; }
  float real(int i) const { return static_cast<float>(__builtin_bit_cast(double, attrs[i])); }
};

struct Program {
  std::vector<Value> values;
  std::vector<Op> ops;
  std::vector<int32_t> outputs;
};

enum class GroupKind : int32_t { kPaged, kWindow, kCross, kLatent, kCount };

struct Group {
  GroupKind kind;
  int64_t kv_heads, head_dim, v_dim, window, layers, k_bits, v_bits;
};

// The largest of any route op, and of the outputs of any expert_linears; top_k is one for all.
struct RoutedSizes {
  int64_t top_k = 0, experts = 0, outputs = 0;
};

struct ProgramSet {
  int64_t vocab_size, context_length;
  RoutedSizes routed;
  std::vector<Group> groups;
  std::vector<Program> programs;
};

// Reads the flat form; every count, index and size is bounded before use.
Status read_programs(const int64_t* flat, int64_t length, int64_t weight_count, ProgramSet* set);

// Proves each op's shapes against its values, weights and groups (the rules of runtime/ops.py, and what the bodies
// need beyond them).
Status check_programs(const ProgramSet& set, const std::vector<Weight>& weights);

const char* op_name(OpKind kind);

}  // namespace inhouse
