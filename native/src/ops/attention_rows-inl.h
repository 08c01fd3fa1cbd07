// The arithmetic of one attention partition: scores, softmax and weighted sums of a few (row, query head) pairs.
// Scores run over head_dim in ascending order, one position a lane; weighted sums run over positions in ascending
// order, one element of V a lane.
namespace inhouse::IH_ISA {
namespace {

constexpr int kPairRows = kAccumulators >= 8 ? kAttentionRows : 4;  // pairs that share the reads of K and V
constexpr int kAhead = 4;                                           // blocks between a prefetch and its use

struct F32Kv {
  using T = float;
  static IH_INLINE V get(const T* p) { return load(p); }
};
struct F16Kv {
  using T = uint16_t;
  static IH_INLINE V get(const T* p) { return load_f16(p); }
};

// Where the K and V of a partition's blocks lie, as T.
template <class T>
struct Tiles {
  const T* k[kPartitionBlocks];
  const T* v[kPartitionBlocks];
};

// A partition of the near part, or of the far one.
struct Unit {
  bool far;
  int32_t partition;
};
IH_INLINE Unit unit_at(const Units& units, int32_t i) {
  return {i < units.far, i < units.far ? i : units.first + i - units.far};
}

// The kv head's part of a block, by its place in the unit's part; null where no row of the task may look.
IH_INLINE const uint8_t* block_of(const AttentionTask& task, bool far, int64_t place) {
  const AttentionShape& s = *task.shape;
  const int64_t last = task.position + task.rows - 1;
  const bool seen = far ? place * kCacheBlock < far_end(s, last)
                        : place >= near_begin(s, task.position) / kCacheBlock && place * kCacheBlock < task.length;
  if (!seen) return nullptr;
  const int64_t column = far ? static_block(s, place) : place;
  return task.blocks + task.table[column] * task.block_stride + task.kv_head * s.head_bytes;
}

// Some (row, query head) pairs: their queries and the positions each sees, counted from the partition's start.
struct Queries {
  const float* q[kAttentionRows];
  int32_t low[kAttentionRows], high[kAttentionRows];  // [low, high) within the partition; empty where high <= low
  int32_t here[kAttentionRows];                       // the row's own position, counted from the partition's start
  int32_t head[kAttentionRows];
};

// Asks for the memory at [p, p + bytes) to be brought near; null: nothing.
IH_INLINE void fetch(const void* p, int64_t bytes) {
  if (p == nullptr) return;
  for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(static_cast<const uint8_t*>(p) + i, 0, 2);
}

// scores[r][16 b ...] = q_r . k for R queries (q [head_dim][R]) and B blocks from block `first`.
template <int R, int B, class Kv>
IH_INLINE void score_blocks(const float* q, const Tiles<typename Kv::T>& tiles, int first, int64_t head_dim,
                            float* scores) {
  V sums[R][B];
  for (int r = 0; r < R; ++r) {
    for (int b = 0; b < B; ++b) sums[r][b] = zero();
  }
  const typename Kv::T* at[B];
  for (int b = 0; b < B; ++b) at[b] = tiles.k[first + b];
  for (int64_t d = 0; d < head_dim; ++d, q += R) {
    V k[B];
    for (int b = 0; b < B; ++b) k[b] = Kv::get(at[b] + d * kCacheBlock);
    for (int r = 0; r < R; ++r) {
      const V x = set1(q[r]);
      for (int b = 0; b < B; ++b) sums[r][b] = fma(x, k[b], sums[r][b]);
    }
  }
  for (int r = 0; r < R; ++r) {
    for (int b = 0; b < B; ++b) store(scores + r * kPartition + (first + b) * kCacheBlock, sums[r][b]);
  }
}

// `near`: K and V are at hand (widened), so nothing is fetched ahead.
template <int R, class Kv>
void score(const AttentionShape& s, const float* q, const Tiles<typename Kv::T>& tiles, int first, int last, bool near,
           float* scores) {
  constexpr int kStep = kAccumulators / R < 8 ? kAccumulators / R : 8;
  const int64_t k_bytes = kCacheBlock * s.head_dim * static_cast<int64_t>(sizeof(typename Kv::T));
  const int64_t v_bytes = kCacheBlock * s.v_dim * static_cast<int64_t>(sizeof(typename Kv::T));
  const auto ahead = [&](int b) {
    if (near) return;
    if (b + kAhead < last) fetch(tiles.k[b + kAhead], k_bytes);
    fetch(tiles.v[b], v_bytes);
  };
  for (int b = first; !near && b < first + kAhead && b < last; ++b) fetch(tiles.k[b], k_bytes);
  int b = first;
  for (; b + kStep <= last; b += kStep) {
    for (int i = 0; i < kStep; ++i) ahead(b + i);
    score_blocks<R, kStep, Kv>(q, tiles, b, s.head_dim, scores);
  }
  for (; b < last; ++b) {
    ahead(b);
    score_blocks<R, 1, Kv>(q, tiles, b, s.head_dim, scores);
  }
}

// The distance of the first of sixteen keys, held where the bias of all sixteen no longer changes.
IH_INLINE int32_t clamp_gap(int32_t gap, int32_t reach) {
  if (gap > reach + 1) return reach + 1;
  return gap < -reach - 16 ? -reach - 16 : gap;
}

// Soft cap and biases of one row's scores [16 first, 16 last), before the mask.
void adjust(const AttentionShape& s, const Queries& rows, int r, int first, int last, float* scores) {
  const V cap = set1(s.softcap), here = set1(static_cast<float>(rows.here[r]));
  const V slope = set1(s.slopes == nullptr ? 0.0f : -s.slopes[rows.head[r]]);
  const float* relative = nullptr;
  if (s.relative != nullptr) relative = s.relative + rows.head[r] * relative_pitch(s.reach) + s.reach + 16;
  for (int b = first; b < last; ++b) {
    const V at = add(iota(), set1(static_cast<float>(b * kCacheBlock)));
    V x = load(scores + b * kCacheBlock);
    if (s.softcap != 0.0f) x = mul(cap, tanh(div(x, cap)));
    if (s.slopes != nullptr) x = fma(slope, abs(sub(at, here)), x);
    if (relative != nullptr) x = add(x, load(relative + clamp_gap(b * kCacheBlock - rows.here[r], s.reach)));
    store(scores + b * kCacheBlock, x);
  }
}

// Scores of one row to weights e^(score - maximum), zero outside [low, high); gives the maximum and the sum. What is
// stored in the scores' place is use(block, weights).
template <class Use>
IH_INLINE void soften(const AttentionShape& s, const Queries& rows, int r, float* scores, float* maximum, float* total,
                      Use use) {
  const int first = rows.low[r] / kCacheBlock, last = (rows.high[r] + kCacheBlock - 1) / kCacheBlock;
  const V low = set1(static_cast<float>(rows.low[r])), high = set1(static_cast<float>(rows.high[r]));
  const V none = set1(-__builtin_inff());
  if (s.softcap != 0.0f || s.slopes != nullptr || s.relative != nullptr) adjust(s, rows, r, first, last, scores);
  const auto whole = [&](int b) { return b * kCacheBlock >= rows.low[r] && (b + 1) * kCacheBlock <= rows.high[r]; };
  const auto inside = [&](int b) {
    const V at = add(iota(), set1(static_cast<float>(b * kCacheBlock)));
    return both(less_equal(low, at), less(at, high));
  };
  V top = none;
  for (int b = first; b < last; ++b) {
    V x = load(scores + b * kCacheBlock);
    if (!whole(b)) {
      x = select(inside(b), x, none);
      store(scores + b * kCacheBlock, x);
    }
    top = max(x, top);
  }
  *maximum = reduce_max(top);
  const V shift = set1(*maximum);
  V sums = zero();
  for (int b = first; b < last; ++b) {
    V weight = exp_below(sub(load(scores + b * kCacheBlock), shift));
    if (!whole(b)) weight = select(inside(b), weight, zero());
    sums = add(sums, weight);
    V used = use(b, weight);
    if (!whole(b)) used = select(inside(b), used, zero());
    store(scores + b * kCacheBlock, used);
  }
  *total = reduce_add(sums);
}

// sums_r[c ... c + 16 C) += weight_r[p] v_p for positions [low, high). V is read to the end of its last vector; what
// lies beyond v_dim reaches only the padding of the sums.
template <int R, int C, class Kv>
IH_INLINE void weigh_columns(const Tiles<typename Kv::T>& tiles, int low, int high, int64_t v_dim, int64_t c,
                             const float* weights, int64_t pitch, float* sums) {
  V acc[R][C];
  for (int r = 0; r < R; ++r) {
    for (int j = 0; j < C; ++j) acc[r][j] = load(sums + r * pitch + c + 16 * j);
  }
  for (int p = low; p < high;) {
    const int stop = (p / kCacheBlock + 1) * kCacheBlock < high ? (p / kCacheBlock + 1) * kCacheBlock : high;
    const typename Kv::T* row = tiles.v[p / kCacheBlock] + (p % kCacheBlock) * v_dim + c;
    for (; p < stop; ++p, row += v_dim) {
      V v[C];
      for (int j = 0; j < C; ++j) v[j] = Kv::get(row + 16 * j);
      for (int r = 0; r < R; ++r) {
        const V w = set1(weights[r * kPartition + p]);
        for (int j = 0; j < C; ++j) acc[r][j] = fma(w, v[j], acc[r][j]);
      }
    }
  }
  for (int r = 0; r < R; ++r) {
    for (int j = 0; j < C; ++j) store(sums + r * pitch + c + 16 * j, acc[r][j]);
  }
}

// Columns from c on, C vectors at once, what is left by fewer.
template <int R, int C, class Kv>
void weigh_from(const Tiles<typename Kv::T>& tiles, int low, int high, int64_t v_dim, int64_t c, const float* weights,
                float* sums) {
  const int64_t pitch = partial_pitch(v_dim);
  const int64_t end = C == 1 ? v_dim : v_dim / (16 * C) * (16 * C);
  for (; c < end; c += 16 * C) weigh_columns<R, C, Kv>(tiles, low, high, v_dim, c, weights, pitch, sums);
  if constexpr (C > 1) weigh_from<R, C / 2, Kv>(tiles, low, high, v_dim, c, weights, sums);
}

template <int R, class Kv>
void weigh(const Tiles<typename Kv::T>& tiles, int low, int high, int64_t v_dim, const float* weights, float* sums) {
  constexpr int kStep = kAccumulators / R >= 4 ? 4 : kAccumulators / R >= 2 ? 2 : 1;
  if (low < high) weigh_from<R, kStep, Kv>(tiles, low, high, v_dim, 0, weights, sums);
}

// Partial results of R pairs over one partition. Positions that all R see are taken together, the rest row by row,
// so that no row's sum meets a position it may not see.
template <int R, class Kv>
void partial_rows(const AttentionShape& s, const Queries& rows, const Tiles<typename Kv::T>& tiles, bool near,
                  float* scores, float* partial) {
  const int64_t pitch = partial_pitch(s.v_dim), end = pitch - 16;
  int first = kPartition, last = 0, low = 0, high = kPartition;
  for (int r = 0; r < R; ++r) {
    first = rows.low[r] < first ? rows.low[r] : first;
    last = rows.high[r] > last ? rows.high[r] : last;
    low = rows.low[r] > low ? rows.low[r] : low;
    high = rows.high[r] < high ? rows.high[r] : high;
  }
  float* q = scores + R * kPartition;  // [head_dim][R], scaled
  for (int64_t d = 0; d < s.head_dim; ++d) {
    for (int r = 0; r < R; ++r) q[d * R + r] = rows.q[r][d] * s.scale;
  }
  score<R, Kv>(s, q, tiles, first / kCacheBlock, (last + kCacheBlock - 1) / kCacheBlock, near, scores);
  for (int r = 0; r < R; ++r) {
    for (int64_t c = 0; c < end; c += 16) store(partial + r * pitch + c, zero());
    soften(s, rows, r, scores + r * kPartition, partial + r * pitch + end, partial + r * pitch + end + 1,
           [](int, V weight) { return weight; });
  }
  if (high < low) high = low;
  for (int r = 0; r < R; ++r) {
    const int stop = rows.high[r] < low ? rows.high[r] : low;
    weigh<1, Kv>(tiles, rows.low[r], stop, s.v_dim, scores + r * kPartition, partial + r * pitch);
  }
  weigh<R, Kv>(tiles, low, high, s.v_dim, scores, partial);
  for (int r = 0; r < R; ++r) {
    const int start = rows.low[r] > high ? rows.low[r] : high;
    weigh<1, Kv>(tiles, start, rows.high[r], s.v_dim, scores + r * kPartition, partial + r * pitch);
  }
}

// The same for a count known only now, 1 <= count <= R.
template <class Kv, int R>
void partial_any(const AttentionShape& s, int count, const Queries& rows, const Tiles<typename Kv::T>& tiles, bool near,
                 float* scores, float* partial) {
  if constexpr (R > 1) {
    if (count < R) return partial_any<Kv, R - 1>(s, count, rows, tiles, near, scores, partial);
  }
  partial_rows<R, Kv>(s, rows, tiles, near, scores, partial);
}

}  // namespace
}  // namespace inhouse::IH_ISA
