// Attention over paged K and V. Scores run over head_dim in ascending order, one position a lane; weighted sums run
// over positions in ascending order, one element of V a lane; partitions merge in ascending order. None of it depends
// on which rows share a task, so a row's bits are those it has alone.
namespace inhouse::IH_ISA {
namespace {

struct F32Kv {
  using T = float;
  static IH_INLINE V get(const T* p) { return load(p); }
};
struct F16Kv {
  using T = uint16_t;
  static IH_INLINE V get(const T* p) { return load_f16(p); }
};
struct BF16Kv {
  using T = uint16_t;
  static IH_INLINE V get(const T* p) { return load_bf16(p); }
};

// Sixteen floats to the cache's type, through `half` where it is a 16-bit one.
IH_INLINE void narrow16(KvType type, V v, uint16_t* half) {
  if (type == kKvF16) store_f16(half, v);
  if (type == kKvBF16) store_bf16(half, v);
}

// x[n] to elements `stride` apart; stride 1 for V, 16 for the transposed K.
void store_vector(KvType type, const float* x, int64_t n, uint8_t* out, int64_t stride) {
  if (type == kKvF32) {
    float* p = reinterpret_cast<float*>(out);
    for (int64_t i = 0; i < n; ++i) p[i * stride] = x[i];
    return;
  }
  uint16_t* p = reinterpret_cast<uint16_t*>(out);
  for (int64_t i = 0; i < n; i += 16) {
    uint16_t half[16];
    const int64_t count = n - i < 16 ? n - i : 16;
    narrow16(type, load_n(x + i, count), half);
    for (int64_t j = 0; j < count; ++j) p[(i + j) * stride] = half[j];
  }
}

void store_kv(const AttentionShape& s, const float* k, const float* v, uint8_t* block, int slot) {
  const int64_t size = s.kv_type == kKvF32 ? 4 : 2;
  for (int64_t h = 0; h < s.kv_heads; ++h, block += s.head_bytes) {
    store_vector(s.kv_type, k + h * s.head_dim, s.head_dim, block + slot * size, kCacheBlock);
    if (s.v_from_k) continue;
    store_vector(s.kv_type, v + h * s.v_dim, s.v_dim, block + (kCacheBlock * s.head_dim + slot * s.v_dim) * size, 1);
  }
}

// Where the K and V of a partition's blocks lie, as T.
template <class T>
struct Tiles {
  const T* k[kPartitionBlocks];
  const T* v[kPartitionBlocks];
};

// Some (row, query head) pairs: their queries and the positions each sees, counted from the partition's start.
struct Queries {
  const float* q[kAttentionRows];
  int32_t low[kAttentionRows], high[kAttentionRows];  // [low, high) within the partition; empty where high <= low
  int32_t here[kAttentionRows];                       // the row's own position, counted from the partition's start
  int32_t head[kAttentionRows];
};

// scores[r][16 b ...] = q_r . k for R queries and B blocks from block `first`.
template <int R, int B, class Kv>
IH_INLINE void score_blocks(const Queries& rows, const Tiles<typename Kv::T>& tiles, int first, int64_t head_dim,
                            float* scores) {
  V sums[R][B];
  for (int r = 0; r < R; ++r) {
    for (int b = 0; b < B; ++b) sums[r][b] = zero();
  }
  for (int64_t d = 0; d < head_dim; ++d) {
    V k[B];
    for (int b = 0; b < B; ++b) k[b] = Kv::get(tiles.k[first + b] + d * kCacheBlock);
    for (int r = 0; r < R; ++r) {
      const V q = set1(rows.q[r][d]);
      for (int b = 0; b < B; ++b) sums[r][b] = fma(q, k[b], sums[r][b]);
    }
  }
  for (int r = 0; r < R; ++r) {
    for (int b = 0; b < B; ++b) store(scores + r * kPartition + (first + b) * kCacheBlock, sums[r][b]);
  }
}

template <int R, class Kv>
void score(const Queries& rows, const Tiles<typename Kv::T>& tiles, int first, int last, int64_t head_dim,
           float* scores) {
  constexpr int kStep = kAccumulators / R;
  int b = first;
  for (; b + kStep <= last; b += kStep) score_blocks<R, kStep, Kv>(rows, tiles, b, head_dim, scores);
  for (; b < last; ++b) score_blocks<R, 1, Kv>(rows, tiles, b, head_dim, scores);
}

// The distance of the first of sixteen keys, held where the bias of all sixteen no longer changes.
IH_INLINE int32_t clamp_gap(int32_t gap, int32_t reach) {
  if (gap > reach + 1) return reach + 1;
  return gap < -reach - 16 ? -reach - 16 : gap;
}

// Scores of one row to weights e^(score - maximum), zero outside [low, high); gives the maximum and the sum.
void soften(const AttentionShape& s, const Queries& rows, int r, float* scores, float* maximum, float* total) {
  const int first = rows.low[r] / kCacheBlock, last = (rows.high[r] + kCacheBlock - 1) / kCacheBlock;
  const V low = set1(static_cast<float>(rows.low[r])), high = set1(static_cast<float>(rows.high[r]));
  const V scale = set1(s.scale), cap = set1(s.softcap), none = set1(-__builtin_inff());
  const V slope = set1(s.slopes == nullptr ? 0.0f : -s.slopes[rows.head[r]]);
  const V here = set1(static_cast<float>(rows.here[r]));
  const float* relative = nullptr;
  if (s.relative != nullptr) relative = s.relative + rows.head[r] * relative_pitch(s.reach) + s.reach + 16;
  V top = none;
  for (int b = first; b < last; ++b) {
    const V at = add(iota(), set1(static_cast<float>(b * kCacheBlock)));
    V x = mul(load(scores + b * kCacheBlock), scale);
    if (s.softcap != 0.0f) x = mul(cap, tanh(div(x, cap)));
    if (s.slopes != nullptr) x = fma(slope, abs(sub(at, here)), x);
    if (relative != nullptr) x = add(x, load(relative + clamp_gap(b * kCacheBlock - rows.here[r], s.reach)));
    x = select(both(less_equal(low, at), less(at, high)), x, none);
    store(scores + b * kCacheBlock, x);
    top = max(x, top);
  }
  *maximum = reduce_max(top);
  const V shift = set1(*maximum);
  V sums = zero();
  for (int b = first; b < last; ++b) {
    const V at = add(iota(), set1(static_cast<float>(b * kCacheBlock)));
    const V inside = exp(sub(load(scores + b * kCacheBlock), shift));
    const V weight = select(both(less_equal(low, at), less(at, high)), inside, zero());
    store(scores + b * kCacheBlock, weight);
    sums = add(sums, weight);
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
  for (int p = low; p < high; ++p) {
    const typename Kv::T* row = tiles.v[p / kCacheBlock] + (p % kCacheBlock) * v_dim + c;
    V v[C];
    for (int j = 0; j < C; ++j) v[j] = Kv::get(row + 16 * j);
    for (int r = 0; r < R; ++r) {
      const V w = set1(weights[r * kPartition + p]);
      for (int j = 0; j < C; ++j) acc[r][j] = fma(w, v[j], acc[r][j]);
    }
  }
  for (int r = 0; r < R; ++r) {
    for (int j = 0; j < C; ++j) store(sums + r * pitch + c + 16 * j, acc[r][j]);
  }
}

template <int R, class Kv>
void weigh(const Tiles<typename Kv::T>& tiles, int low, int high, int64_t v_dim, const float* weights, float* sums) {
  constexpr int kStep = kAccumulators / R;
  const int64_t pitch = partial_pitch(v_dim);
  int64_t c = 0;
  if (low >= high) return;
  for (; c + 16 * kStep <= v_dim; c += 16 * kStep) {
    weigh_columns<R, kStep, Kv>(tiles, low, high, v_dim, c, weights, pitch, sums);
  }
  for (; c < v_dim; c += 16) weigh_columns<R, 1, Kv>(tiles, low, high, v_dim, c, weights, pitch, sums);
}

// Partial results of R pairs over one partition. Positions that all R see are taken together, the rest row by row,
// so that no row's sum meets a position it may not see.
template <int R, class Kv>
void partial_rows(const AttentionShape& s, const Queries& rows, const Tiles<typename Kv::T>& tiles, float* scores,
                  float* partial) {
  const int64_t pitch = partial_pitch(s.v_dim), end = pitch - 16;
  int first = kPartition, last = 0, low = 0, high = kPartition;
  for (int r = 0; r < R; ++r) {
    first = rows.low[r] < first ? rows.low[r] : first;
    last = rows.high[r] > last ? rows.high[r] : last;
    low = rows.low[r] > low ? rows.low[r] : low;
    high = rows.high[r] < high ? rows.high[r] : high;
  }
  score<R, Kv>(rows, tiles, first / kCacheBlock, (last + kCacheBlock - 1) / kCacheBlock, s.head_dim, scores);
  for (int r = 0; r < R; ++r) {
    for (int64_t c = 0; c < end; c += 16) store(partial + r * pitch + c, zero());
    soften(s, rows, r, scores + r * kPartition, partial + r * pitch + end, partial + r * pitch + end + 1);
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

// Positions [*low, *high) that the row at `position` sees.
IH_INLINE void visible(const AttentionTask& task, int32_t position, int32_t* low, int32_t* high) {
  const AttentionShape& s = *task.shape;
  *low = s.window > 0 && position >= s.window ? position - s.window + 1 : 0;
  *high = position + 1;
  if (s.mask == kPrefix && *high < task.prefix) *high = task.prefix;
  if (s.mask == kBidirectional) {
    *high = s.window > 0 && task.length - position > s.window ? position + s.window : task.length;
  }
}

// The partitions [*begin, *end) that any row of the task sees.
IH_INLINE void partitions_of(const AttentionTask& task, int* begin, int* end) {
  int32_t low, high, unused;
  visible(task, task.position, &low, &unused);
  visible(task, task.position + task.rows - 1, &unused, &high);
  *begin = low / kPartition;
  *end = (high + kPartition - 1) / kPartition;
}

// Fills `rows` with up to kAttentionRows pairs from pair `first` that see the partition; returns how many; *taken is
// the index of the first of them. Pairs that do not see it are passed over.
int gather(const AttentionTask& task, int partition, int first, int pairs, Queries* rows, int* taken) {
  const AttentionShape& s = *task.shape;
  const int group = s.heads / s.kv_heads, start = partition * kPartition;
  int count = 0;
  for (int i = first; i < pairs && count < kAttentionRows; ++i) {
    const int32_t position = task.position + i / group, head = task.kv_head * group + i % group;
    int32_t low, high;
    visible(task, position, &low, &high);
    low = low > start ? low - start : 0;
    high = high - start < kPartition ? high - start : kPartition;
    if (high <= low) {
      if (count > 0) break;
      continue;
    }
    if (count == 0) *taken = i;
    rows->q[count] = task.q + (i / group) * task.ldq + static_cast<int64_t>(head) * s.head_dim;
    rows->low[count] = low;
    rows->high[count] = high;
    rows->here[count] = position - start;
    rows->head[count] = head;
    ++count;
  }
  return count;
}

template <class Kv>
Tiles<typename Kv::T> tiles_of(const AttentionTask& task, int partition) {
  using T = typename Kv::T;
  const AttentionShape& s = *task.shape;
  Tiles<T> tiles = {};
  const int32_t low = s.window > 0 && task.position >= s.window ? task.position - s.window + 1 : 0;
  for (int b = 0; b < kPartitionBlocks; ++b) {
    const int32_t column = partition * kPartitionBlocks + b;
    if (column < low / kCacheBlock || column * kCacheBlock >= task.length) continue;
    const uint8_t* at = task.blocks + task.table[column] * task.block_stride + task.kv_head * s.head_bytes;
    tiles.k[b] = reinterpret_cast<const T*>(at);
    if (!s.v_from_k) tiles.v[b] = tiles.k[b] + kCacheBlock * s.head_dim;
  }
  return tiles;
}

// K and V of a partition as floats, so that many rows need not widen them again. V that is part of K is turned.
template <class Kv>
Tiles<float> widen(const AttentionTask& task, const Tiles<typename Kv::T>& tiles, float* out) {
  const AttentionShape& s = *task.shape;
  const int64_t elements = kCacheBlock * (static_cast<int64_t>(s.head_dim) + s.v_dim);
  const int64_t stored = s.v_from_k ? kCacheBlock * static_cast<int64_t>(s.head_dim) : elements;
  Tiles<float> wide = {};
  for (int b = 0; b < kPartitionBlocks; ++b, out += elements) {
    if (tiles.k[b] == nullptr) continue;
    for (int64_t i = 0; i < stored; i += 16) store(out + i, Kv::get(tiles.k[b] + i));
    wide.k[b] = out;
    float* v = out + kCacheBlock * s.head_dim;
    for (int64_t d = 0; s.v_from_k && d < s.v_dim; ++d) {
      for (int64_t p = 0; p < kCacheBlock; ++p) v[p * s.v_dim + d] = out[d * kCacheBlock + p];
    }
    wide.v[b] = v;
  }
  return wide;
}

template <class Kv>
void partial_any(const AttentionShape& s, int count, const Queries& rows, const Tiles<typename Kv::T>& tiles,
                 float* scores, float* partial) {
  if (count == 4) return partial_rows<4, Kv>(s, rows, tiles, scores, partial);
  if (count == 3) return partial_rows<3, Kv>(s, rows, tiles, scores, partial);
  if (count == 2) return partial_rows<2, Kv>(s, rows, tiles, scores, partial);
  return partial_rows<1, Kv>(s, rows, tiles, scores, partial);
}

// Adds `fresh`, a later partition's partial, to `merged`.
IH_INLINE void merge(float* merged, const float* fresh, int64_t pitch) {
  const int64_t end = pitch - 16;
  const V m = set1(merged[end]), n = set1(fresh[end]), top = max(m, n);
  const V a = exp(sub(m, top)), b = exp(sub(n, top));
  for (int64_t c = 0; c < end; c += 16) {
    store(merged + c, fma(load(fresh + c), b, mul(load(merged + c), a)));
  }
  const V total = fma(set1(fresh[end + 1]), b, mul(set1(merged[end + 1]), a));
  merged[end] = lane0(top);
  merged[end + 1] = lane0(total);
}

IH_INLINE void copy_partial(float* to, const float* from, int64_t pitch) {
  for (int64_t c = 0; c < pitch; c += 16) store(to + c, load(from + c));
}

// The merged partial of pair i to y, with the head's sink.
void finish(const AttentionTask& task, int i, const float* merged) {
  const AttentionShape& s = *task.shape;
  const int group = s.heads / s.kv_heads, head = task.kv_head * group + i % group;
  const int64_t end = partial_pitch(s.v_dim) - 16;
  V factor = set1(1.0f), total = set1(merged[end + 1]);
  if (s.sinks != nullptr) {
    const V m = set1(merged[end]), sink = set1(s.sinks[head]), top = max(m, sink);
    factor = exp(sub(m, top));
    total = fma(total, factor, exp(sub(sink, top)));
  }
  map(merged, s.v_dim, task.y + (i / group) * task.ldy + static_cast<int64_t>(head) * s.v_dim,
      [&](V v) { return div(mul(v, factor), total); });
}

// One partition for all pairs of the task: `take(i, partial)` gets each pair that sees it.
template <class Kv, class Take>
IH_INLINE void each_pair(const AttentionTask& task, int partition, const Tiles<typename Kv::T>& tiles, float* scores,
                         float* fresh, Take take) {
  const AttentionShape& s = *task.shape;
  const int pairs = task.rows * (s.heads / s.kv_heads);
  const int64_t pitch = partial_pitch(s.v_dim);
  Queries rows;
  int taken = 0;
  for (int i = 0; i < pairs;) {
    const int count = gather(task, partition, i, pairs, &rows, &taken);
    if (count == 0) break;
    partial_any<Kv>(s, count, rows, tiles, scores, fresh);
    for (int r = 0; r < count; ++r) take(taken + r, fresh + r * pitch);
    i = taken + count;
  }
}

// `scratch` as attention_scratch lays it out.
struct Scratch {
  float *scores, *wide, *fresh, *merged;
};
IH_INLINE Scratch scratch_of(const AttentionShape& s, float* p) {
  Scratch out;
  out.scores = p;
  out.wide = out.scores + kAttentionRows * kPartition;
  out.fresh = out.wide + int64_t{kPartition} * (s.head_dim + s.v_dim) + 16;
  out.merged = out.fresh + kAttentionRows * partial_pitch(s.v_dim);
  return out;
}

template <class Kv, class Take>
IH_INLINE void run_partition(const AttentionTask& task, int partition, const Scratch& scratch, Take take) {
  const Tiles<typename Kv::T> tiles = tiles_of<Kv>(task, partition);
  const int pairs = task.rows * (task.shape->heads / task.shape->kv_heads);
  if (task.shape->v_from_k || (pairs > 2 * kAttentionRows && task.shape->kv_type != kKvF32)) {
    each_pair<F32Kv>(task, partition, widen<Kv>(task, tiles, scratch.wide), scratch.scores, scratch.fresh, take);
  } else {
    each_pair<Kv>(task, partition, tiles, scratch.scores, scratch.fresh, take);
  }
}

template <class Kv>
void attend_as(const AttentionTask& task, float* memory) {
  const AttentionShape& s = *task.shape;
  const Scratch scratch = scratch_of(s, memory);
  const int64_t pitch = partial_pitch(s.v_dim), end = pitch - 16;
  const int pairs = task.rows * (s.heads / s.kv_heads);
  for (int i = 0; i < pairs; ++i) scratch.merged[i * pitch + end + 1] = -1.0f;  // nothing merged yet
  int begin, stop;
  partitions_of(task, &begin, &stop);
  for (int p = begin; p < stop; ++p) {
    run_partition<Kv>(task, p, scratch, [&](int i, const float* fresh) {
      float* merged = scratch.merged + i * pitch;
      if (merged[end + 1] < 0.0f) return copy_partial(merged, fresh, pitch);
      merge(merged, fresh, pitch);
    });
  }
  for (int i = 0; i < pairs; ++i) finish(task, i, scratch.merged + i * pitch);
}

template <class Kv>
void attend_partition_as(const AttentionTask& task, int partition, float* memory, float* partial) {
  const Scratch scratch = scratch_of(*task.shape, memory);
  const int64_t pitch = partial_pitch(task.shape->v_dim), end = pitch - 16;
  const int pairs = task.rows * (task.shape->heads / task.shape->kv_heads);
  for (int i = 0; i < pairs; ++i) partial[i * pitch + end + 1] = -1.0f;  // pairs that do not see the partition
  run_partition<Kv>(task, partition, scratch,
                    [&](int i, const float* fresh) { copy_partial(partial + i * pitch, fresh, pitch); });
}

void attend(const AttentionTask& task, float* scratch) {
  switch (task.shape->kv_type) {
    case kKvF32:
      return attend_as<F32Kv>(task, scratch);
    case kKvF16:
      return attend_as<F16Kv>(task, scratch);
    default:
      return attend_as<BF16Kv>(task, scratch);
  }
}

void attend_partition(const AttentionTask& task, int partition, float* scratch, float* partial) {
  switch (task.shape->kv_type) {
    case kKvF32:
      return attend_partition_as<F32Kv>(task, partition, scratch, partial);
    case kKvF16:
      return attend_partition_as<F16Kv>(task, partition, scratch, partial);
    default:
      return attend_partition_as<BF16Kv>(task, partition, scratch, partial);
  }
}

void attend_merge(const AttentionTask& task, int begin, int end, float* partials, int64_t stride) {
  const int64_t pitch = partial_pitch(task.shape->v_dim), sum = pitch - 15;
  const int pairs = task.rows * (task.shape->heads / task.shape->kv_heads);
  for (int i = 0; i < pairs; ++i) {
    float* merged = nullptr;
    for (int p = begin; p < end; ++p) {
      float* fresh = partials + (p - begin) * stride + i * pitch;
      if (fresh[sum] < 0.0f) continue;
      if (merged == nullptr) {
        merged = fresh;
      } else {
        merge(merged, fresh, pitch);
      }
    }
    finish(task, i, merged);
  }
}

}  // namespace
}  // namespace inhouse::IH_ISA
