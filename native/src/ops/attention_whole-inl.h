// Attention over bf16 K and V where every row of a task sees a whole partition and no bias is added: nothing is masked,
// and the queries are rounded once a task. The sums and their order, so the bits, are those of attention_bf16-inl.h.
namespace inhouse::IH_ISA {
namespace {

constexpr int kSoftRows = 2;  // rows whose weights are made side by side, so that one's waits are another's work

// Whether whole_rows may be taken for the unit.
bool sees_whole(const AttentionTask& task, Unit unit) {
  const AttentionShape& s = *task.shape;
  if (s.softcap != 0.0f || s.slopes != nullptr || s.relative != nullptr || !(s.scale > 0.0f)) return false;
  const int64_t start = int64_t{unit.partition} * kPartition;
  return visible(task, unit.far, task.position).high >= start + kPartition &&
         visible(task, unit.far, task.position + task.rows - 1).low <= start;
}

// Room for a task's queries, behind V that is part of K and was turned; null where they do not fit.
uint16_t* query_room(const AttentionTask& task, const Scratch& scratch) {
  const AttentionShape& s = *task.shape;
  const int64_t pairs = task.rows * (s.heads / s.kv_heads), width = (s.head_dim + kPairDim - 1) / kPairDim * kPairDim;
  const int64_t turned = s.v_from_k ? kPartition * static_cast<int64_t>(s.v_dim) : 0;
  const int64_t room = 2 * kPartition * (static_cast<int64_t>(s.head_dim) + s.v_dim);
  return turned + pairs * width <= room ? reinterpret_cast<uint16_t*>(scratch.wide) + turned : nullptr;
}

// All queries of a task as pair_queries lays them, in groups of kPairRows pairs; the last group may be smaller.
template <int R>
void pack_group(const AttentionTask& task, int first, int count, uint16_t* out) {
  if constexpr (R > 1) {
    if (count < R) return pack_group<R - 1>(task, first, count, out);
  }
  const AttentionShape& s = *task.shape;
  const int group = s.heads / s.kv_heads;
  Queries rows;
  for (int r = 0; r < R; ++r) {
    const int i = first + r;
    rows.q[r] = task.q + (i / group) * task.ldq + (task.kv_head * group + i % group) * static_cast<int64_t>(s.head_dim);
  }
  pair_queries<R>(rows, s.head_dim, out);
}

// Scores of N rows of a whole partition to weights, as soften_pairs does it, with m and the sum of each.
template <int N>
IH_INLINE void soften_whole(V unit, const float* scores, uint16_t* weights, float* softmax, int64_t pitch) {
  V top[N], back[N], sums[N];
  for (int r = 0; r < N; ++r) top[r] = set1(-__builtin_inff());
  for (int b = 0; b < kPartitionBlocks; ++b) {
    for (int r = 0; r < N; ++r) top[r] = max(load(scores + r * kPartition + b * kCacheBlock), top[r]);
  }
  for (int r = 0; r < N; ++r) {
    const V whole = round_even(mul(set1(reduce_max(top[r])), unit));
    softmax[r * pitch] = lane0(whole);
    back[r] = sub(zero(), whole);
    sums[r] = zero();
  }
  alignas(4) const uint16_t ones[2] = {0x3f80, 0x3f80};
  for (int b = 0; b < kPartitionBlocks; b += 2) {
    for (int r = 0; r < N; ++r) {
      const float* at = scores + r * kPartition + b * kCacheBlock;
      uint16_t* out = weights + r * kPartition + b * kCacheBlock;
      store_pairs(out, exp2_below(fma(load(at), unit, back[r])),
                  exp2_below(fma(load(at + kCacheBlock), unit, back[r])));
      sums[r] = dot_pairs(sums[r], load_pairs(out), repeat_pair(ones));
    }
  }
  for (int r = 0; r < N; ++r) softmax[r * pitch + 1] = reduce_add(sums[r]);
}

// Partial results of R pairs that see the whole partition.
template <int R>
void whole_rows(const AttentionShape& s, const uint16_t* q, const PairTiles& tiles, float* scores, float* partial) {
  constexpr int kStep = kAccumulators / R >= 4 ? 4 : kAccumulators / R >= 2 ? 2 : 1;
  const int64_t pitch = partial_pitch(s.v_dim), end = pitch - 16;
  alignas(64) uint16_t weights[R * kPartition];
  const V unit = set1(s.scale * kLog2e);
  pair_score<R>(s, q, tiles, 0, kPartitionBlocks, scores);
  for (int r = 0; r < R / kSoftRows * kSoftRows; r += kSoftRows) {
    soften_whole<kSoftRows>(unit, scores + r * kPartition, weights + r * kPartition, partial + r * pitch + end, pitch);
  }
  for (int r = R / kSoftRows * kSoftRows; r < R; ++r) {
    soften_whole<1>(unit, scores + r * kPartition, weights + r * kPartition, partial + r * pitch + end, pitch);
  }
  for (int r = 0; r < R; ++r) {
    for (int64_t c = 0; c < end; c += 16) store(partial + r * pitch + c, zero());
  }
  pair_weigh<R, kStep>(tiles, 0, kPartition / 2, s.v_dim, 0, weights, partial);
}

// The same for a count known only now, 1 <= count <= R.
template <int R>
void whole_any(const AttentionShape& s, int count, const uint16_t* q, const PairTiles& tiles, float* scores,
               float* partial) {
  if constexpr (R > 1) {
    if (count < R) return whole_any<R - 1>(s, count, q, tiles, scores, partial);
  }
  whole_rows<R>(s, q, tiles, scores, partial);
}

// A whole unit: use(first, count, queries) for each group of pairs.
template <class Use>
IH_INLINE void each_group(const AttentionTask& task, uint16_t* queries, Use use) {
  const AttentionShape& s = *task.shape;
  const int pairs = task.rows * (s.heads / s.kv_heads);
  const int64_t width = (s.head_dim + kPairDim - 1) / kPairDim * kPairDim;
  for (int i = 0; i < pairs; i += kPairRows) {
    use(i, pairs - i < kPairRows ? pairs - i : kPairRows, queries + i * width);
  }
}

template <class Take>
IH_INLINE void run_bf16(const AttentionTask& task, Unit unit, Scratch& scratch, Take take) {
  const AttentionShape& s = *task.shape;
  const PairTiles tiles = pair_tiles(task, unit, scratch.wide);
  uint16_t* queries = sees_whole(task, unit) ? query_room(task, scratch) : nullptr;
  if (queries == nullptr) {
    const auto work = [&](int count, const Queries& rows, bool) {
      pair_any<kPairRows>(s, count, rows, tiles, scratch.scores, scratch.fresh);
    };
    return each_pair(task, unit, kPairRows, scratch.fresh, work, take);
  }
  if (!scratch.packed) {
    each_group(task, queries, [&](int first, int count, uint16_t* q) { pack_group<kPairRows>(task, first, count, q); });
    scratch.packed = true;
  }
  const int64_t pitch = partial_pitch(s.v_dim);
  each_group(task, queries, [&](int first, int count, const uint16_t* q) {
    whole_any<kPairRows>(s, count, q, tiles, scratch.scores, scratch.fresh);
    for (int r = 0; r < count; ++r) take(first + r, scratch.fresh + r * pitch);
  });
}

}  // namespace
}  // namespace inhouse::IH_ISA
