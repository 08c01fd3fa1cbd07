// Attention over paged K and V: what a task sees, partition by partition, the far part's first (kernels.h), merged in
// ascending order. Nothing depends on which rows share a task, so a row's bits are those it has alone. The arithmetic
// is in attention_rows-inl.h.
namespace inhouse::IH_ISA {
namespace {

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
  if (s.kv_type == kKvInt8) return store_kv_int8(s, k, v, block, slot);
  const int64_t size = s.kv_type == kKvF32 ? 4 : 2;
  for (int64_t h = 0; h < s.kv_heads; ++h, block += s.head_bytes) {
    store_vector(s.kv_type, k + h * s.head_dim, s.head_dim, block + slot * size, kCacheBlock);
    if (s.v_from_k) continue;
    store_vector(s.kv_type, v + h * s.v_dim, s.v_dim, block + (kCacheBlock * s.head_dim + slot * s.v_dim) * size, 1);
  }
}

IH_INLINE Units task_units(const AttentionTask& task) {
  return units_of(*task.shape, task.position, task.rows, task.length, task.prefix);
}

// Positions [low, high) of the unit's part that the row at `position` sees.
struct Range {
  int64_t low, high;
};
IH_INLINE Range visible(const AttentionTask& task, bool far, int64_t position) {
  const AttentionShape& s = *task.shape;
  if (far) return {0, far_end(s, position)};
  return {near_begin(s, position), near_end(s, position, task.length, task.prefix)};
}

// Fills `rows` with up to `most` pairs from pair `first` that see the unit; returns how many; *taken is
// the index of the first of them. Pairs that do not see it are passed over.
int gather(const AttentionTask& task, Unit unit, int first, int pairs, int most, Queries* rows, int* taken) {
  const AttentionShape& s = *task.shape;
  const int group = s.heads / s.kv_heads, start = unit.partition * kPartition;
  int count = 0;
  for (int i = first; i < pairs && count < most; ++i) {
    const int32_t position = task.position + i / group, head = task.kv_head * group + i % group;
    const Range seen = visible(task, unit.far, position);
    const int32_t low = static_cast<int32_t>(seen.low > start ? seen.low - start : 0);
    const int32_t high = static_cast<int32_t>(seen.high - start < kPartition ? seen.high - start : kPartition);
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
Tiles<typename Kv::T> tiles_of(const AttentionTask& task, Unit unit) {
  using T = typename Kv::T;
  const AttentionShape& s = *task.shape;
  Tiles<T> tiles = {};
  for (int b = 0; b < kPartitionBlocks; ++b) {
    const uint8_t* at = block_of(task, unit.far, int64_t{unit.partition} * kPartitionBlocks + b);
    if (at == nullptr) continue;
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

// Runs up to `most` pairs at once over one unit: `work(count, rows, near)` leaves their partials in `fresh`,
// `take(i, partial)` gets each pair that sees it. `near`: its K and V were read a moment ago.
template <class Work, class Take>
IH_INLINE void each_pair(const AttentionTask& task, Unit unit, int most, const float* fresh, Work work, Take take) {
  const int pairs = task.rows * (task.shape->heads / task.shape->kv_heads);
  const int64_t pitch = partial_pitch(task.shape->v_dim);
  Queries rows;
  int taken = 0;
  for (int i = 0; i < pairs;) {
    const int count = gather(task, unit, i, pairs, most, &rows, &taken);
    if (count == 0) break;
    work(count, rows, i > 0);
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
  out.wide = out.scores + kAttentionRows * (kPartition + int64_t{s.head_dim});
  out.fresh = out.wide + int64_t{kPartition} * (s.head_dim + s.v_dim) + 16;
  out.merged = out.fresh + kAttentionRows * partial_pitch(s.v_dim);
  return out;
}

template <class Kv, class Take>
IH_INLINE void run_floats(const AttentionTask& task, Unit unit, const Scratch& scratch, Take take) {
  const AttentionShape& s = *task.shape;
  const Tiles<typename Kv::T> tiles = tiles_of<Kv>(task, unit);
  const int pairs = task.rows * (s.heads / s.kv_heads);
  if (s.v_from_k || (pairs > 2 * kPairRows && s.kv_type != kKvF32)) {
    const Tiles<float> wide = widen<Kv>(task, tiles, scratch.wide);
    const auto work = [&](int count, const Queries& rows, bool) {
      partial_any<F32Kv, kPairRows>(s, count, rows, wide, true, scratch.scores, scratch.fresh);
    };
    return each_pair(task, unit, kPairRows, scratch.fresh, work, take);
  }
  const auto work = [&](int count, const Queries& rows, bool near) {
    partial_any<Kv, kPairRows>(s, count, rows, tiles, near, scratch.scores, scratch.fresh);
  };
  each_pair(task, unit, kPairRows, scratch.fresh, work, take);
}

template <class Take>
IH_INLINE void run_opened(const AttentionTask& task, Unit unit, const Scratch& scratch, Take take) {
  const Tiles<float> wide = open_codes(task, unit.partition, scratch.wide);
  const auto work = [&](int count, const Queries& rows, bool) {
    partial_any<F32Kv, kPairRows>(*task.shape, count, rows, wide, true, scratch.scores, scratch.fresh);
  };
  each_pair(task, unit, kPairRows, scratch.fresh, work, take);
}

template <class Take>
IH_INLINE void run_int8(const AttentionTask& task, Unit unit, const Scratch& scratch, Take take) {
  const IntTiles tiles = int_tiles(task, unit, scratch.wide);
  const auto work = [&](int count, const Queries& rows, bool near) {
    int_any<kIntPairs>(*task.shape, count, rows, tiles, near, scratch.scores, scratch.fresh);
  };
  each_pair(task, unit, kIntPairs, scratch.fresh, work, take);
}

template <class Take>
IH_INLINE void run_unit(const AttentionTask& task, Unit unit, const Scratch& scratch, Take take) {
  if (unit.far && task.shape->k_bits != 0) return run_opened(task, unit, scratch, take);
  switch (task.shape->kv_type) {
    case kKvF32:
      return run_floats<F32Kv>(task, unit, scratch, take);
    case kKvF16:
      return run_floats<F16Kv>(task, unit, scratch, take);
    case kKvBF16:
      return run_floats<BF16Kv>(task, unit, scratch, take);
    default:
      return run_int8(task, unit, scratch, take);
  }
}

void attend(const AttentionTask& task, float* memory) {
  const AttentionShape& s = *task.shape;
  const Scratch scratch = scratch_of(s, memory);
  const int64_t pitch = partial_pitch(s.v_dim), end = pitch - 16;
  const int pairs = task.rows * (s.heads / s.kv_heads);
  for (int i = 0; i < pairs; ++i) scratch.merged[i * pitch + end + 1] = -1.0f;  // nothing merged yet
  const Units units = task_units(task);
  for (int32_t u = 0; u < units.count(); ++u) {
    run_unit(task, unit_at(units, u), scratch, [&](int i, const float* fresh) {
      float* merged = scratch.merged + i * pitch;
      if (merged[end + 1] < 0.0f) return copy_partial(merged, fresh, pitch);
      merge(merged, fresh, pitch);
    });
  }
  for (int i = 0; i < pairs; ++i) finish(task, i, scratch.merged + i * pitch);
}

void attend_partition(const AttentionTask& task, int unit, float* memory, float* partial) {
  const Scratch scratch = scratch_of(*task.shape, memory);
  const int64_t pitch = partial_pitch(task.shape->v_dim), end = pitch - 16;
  const int pairs = task.rows * (task.shape->heads / task.shape->kv_heads);
  for (int i = 0; i < pairs; ++i) partial[i * pitch + end + 1] = -1.0f;  // pairs that do not see the unit
  run_unit(task, unit_at(task_units(task), unit), scratch,
           [&](int i, const float* fresh) { copy_partial(partial + i * pitch, fresh, pitch); });
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
