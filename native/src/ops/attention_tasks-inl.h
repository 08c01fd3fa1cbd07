// How a task walks over what it sees: partition by partition, the far part's first (kernels.h), merged in ascending
// order. Nothing depends on which rows share a task, so a row's bits are those it has alone. Knows no KV type's bodies.
namespace inhouse::IH_ISA {
namespace {

constexpr float kLn2 = 0.693147180559945309f;

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

// What sums whose maximum is x above another one (x <= 0) shrink by beside it. Over bf16 maxima are whole powers of
// two.
IH_INLINE V shrink(const AttentionShape& s, V x) { return s.kv_type == kKvBF16 ? power_of_two(x) : exp(x); }

// Adds `fresh`, a later partition's partial, to `merged`.
IH_INLINE void merge(const AttentionShape& s, float* merged, const float* fresh) {
  const int64_t end = partial_pitch(s.v_dim) - 16;
  const V m = set1(merged[end]), n = set1(fresh[end]), top = max(m, n);
  const V a = shrink(s, sub(m, top)), b = shrink(s, sub(n, top));
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
    const V m = set1(s.kv_type == kKvBF16 ? merged[end] * kLn2 : merged[end]);
    const V sink = set1(s.sinks[head]), top = max(m, sink);
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
  bool packed;  // the task's queries lie in `wide` (attention_whole-inl.h)
};
IH_INLINE Scratch scratch_of(const AttentionShape& s, float* p) {
  Scratch out = {};
  out.scores = p;
  out.wide = out.scores + kAttentionRows * (kPartition + int64_t{s.head_dim});
  out.fresh = out.wide + int64_t{kPartition} * (s.head_dim + s.v_dim) + 16;
  out.merged = out.fresh + kAttentionRows * partial_pitch(s.v_dim);
  return out;
}

// All units of a task: run(unit, scratch, take) gives take(pair, partial) what each pair has from a unit.
template <class Run>
IH_INLINE void attend_with(const AttentionTask& task, float* memory, Run run) {
  const AttentionShape& s = *task.shape;
  Scratch scratch = scratch_of(s, memory);
  const int64_t pitch = partial_pitch(s.v_dim), end = pitch - 16;
  const int pairs = task.rows * (s.heads / s.kv_heads);
  for (int i = 0; i < pairs; ++i) scratch.merged[i * pitch + end + 1] = -1.0f;  // nothing merged yet
  const Units units = task_units(task);
  for (int32_t u = 0; u < units.count(); ++u) {
    run(unit_at(units, u), scratch, [&](int i, const float* fresh) {
      float* merged = scratch.merged + i * pitch;
      if (merged[end + 1] < 0.0f) return copy_partial(merged, fresh, pitch);
      merge(s, merged, fresh);
    });
  }
  for (int i = 0; i < pairs; ++i) finish(task, i, scratch.merged + i * pitch);
}

template <class Run>
IH_INLINE void attend_partition_with(const AttentionTask& task, int unit, float* memory, float* partial, Run run) {
  Scratch scratch = scratch_of(*task.shape, memory);
  const int64_t pitch = partial_pitch(task.shape->v_dim), end = pitch - 16;
  const int pairs = task.rows * (task.shape->heads / task.shape->kv_heads);
  for (int i = 0; i < pairs; ++i) partial[i * pitch + end + 1] = -1.0f;  // pairs that do not see the unit
  run(unit_at(task_units(task), unit), scratch,
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
        merge(*task.shape, merged, fresh);
      }
    }
    finish(task, i, merged);
  }
}

}  // namespace
}  // namespace inhouse::IH_ISA
