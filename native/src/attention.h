// How an attention op is cut into tasks. Knows rows and partitions; the arithmetic is in ops/attention-inl.h.
#pragma once
#include <algorithm>
#include <cstdint>

#include "kernels.h"
#include "program.h"

namespace inhouse {

constexpr int64_t kPiecePairs = 128;  // (row, query head) pairs of a task
constexpr int64_t kSplitPairs = 16;   // at most so many share a task that is split by partition

// The keys of a sequence: how many are stored, and how many of those see one another (mask prefix).
struct Keys {
  int32_t length, prefix;
};

inline bool is_cross(const Op& op) { return op.integer(10) != 0; }

inline bool is_coded(const Op& op) { return op.integer(15) >= 0; }
// The state group that the op writes to, and its layer's slot there: of codes, that of recent positions.
inline int near_group(const Op& op) { return static_cast<int>(op.integer(is_coded(op) ? 15 : 0)); }
inline int64_t near_slot(const Op& op) { return op.integer(is_coded(op) ? 16 : 1); }

inline int64_t group_of(const AttentionShape& s) { return s.heads / s.kv_heads; }

// Rows of a task.
inline int64_t piece_rows(const AttentionShape& s) { return std::max<int64_t>(1, kPiecePairs / group_of(s)); }

// Tasks are split by partition when there are fewer than this.
constexpr int64_t split_below(int threads) { return 2 * int64_t{threads}; }

// Units of that many positions: the far part and the near one may share a partition, and one more is begun by each.
constexpr int64_t partitions_in(int64_t positions) { return (positions + kPartition - 1) / kPartition + 2; }

constexpr int64_t kMostPartitions = 4096;                 // of a context that working memory is made for
constexpr int64_t kMostPartialFloats = int64_t{1} << 28;  // beyond this, partitions are not split

inline int64_t most_split_pieces(int64_t context, int threads) {
  return split_below(threads) * std::min(kMostPartitions, partitions_in(context));
}

inline int64_t most_partial_floats(const AttentionShape& s, int64_t context, int threads) {
  const int64_t pairs = std::max(kSplitPairs, group_of(s));
  return std::min(kMostPartialFloats, most_split_pieces(context, threads) * pairs * partial_pitch(s.v_dim));
}

// The shape of an attention op; slopes, sinks and relative bias are left null.
inline AttentionShape attention_shape(const Op& op, KvType kv_type, int64_t head_bytes) {
  AttentionShape s = {};
  s.heads = static_cast<int32_t>(op.integer(2));
  s.kv_heads = static_cast<int32_t>(op.integer(3));
  s.head_dim = static_cast<int32_t>(op.integer(4));
  s.v_dim = static_cast<int32_t>(op.integer(5));
  s.scale = op.real(6);
  s.softcap = op.real(7);
  s.window = static_cast<int32_t>(op.integer(8));
  s.mask = static_cast<Mask>(op.integer(9));
  s.reach = static_cast<int32_t>(op.integer(13));
  s.v_from_k = op.integer(14) != 0;
  s.kv_type = kv_type;
  s.head_bytes = head_bytes;
  s.sink = static_cast<int32_t>(op.integer(17));
  s.stride = static_cast<int32_t>(op.integer(18));
  return s;
}

}  // namespace inhouse
