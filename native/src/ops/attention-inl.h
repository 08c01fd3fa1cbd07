// Attention over paged K and V of every type: how a row is stored, which body a unit takes. How a task walks over units
// is in attention_tasks-inl.h, the arithmetic in attention_rows-inl.h, attention_bf16-inl.h and attention_int8-inl.h.
namespace inhouse::IH_ISA {
namespace {

// x[n] to f32 or f16 elements `stride` apart; stride 1 for V, 16 for the transposed K.
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
    store_f16(half, load_n(x + i, count));
    for (int64_t j = 0; j < count; ++j) p[(i + j) * stride] = half[j];
  }
}

void store_kv(const AttentionShape& s, const float* k, const float* v, uint8_t* block, int slot) {
  if (s.kv_type == kKvInt8) return store_kv_int8(s, k, v, block, slot);
  if (s.kv_type == kKvBF16) return store_kv_bf16(s, k, v, block, slot);
  const int64_t size = s.kv_type == kKvF32 ? 4 : 2;
  for (int64_t h = 0; h < s.kv_heads; ++h, block += s.head_bytes) {
    store_vector(s.kv_type, k + h * s.head_dim, s.head_dim, block + slot * size, kCacheBlock);
    if (s.v_from_k) continue;
    store_vector(s.kv_type, v + h * s.v_dim, s.v_dim, block + (kCacheBlock * s.head_dim + slot * s.v_dim) * size, 1);
  }
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
IH_INLINE void run_int8(const AttentionTask& task, Unit unit, const Scratch& scratch, Take take) {
  const IntTiles tiles = int_tiles(task, unit, scratch.wide);
  const auto work = [&](int count, const Queries& rows, bool near) {
    int_any<kIntPairs>(*task.shape, count, rows, tiles, near, scratch.scores, scratch.fresh);
  };
  each_pair(task, unit, kIntPairs, scratch.fresh, work, take);
}

template <class Take>
IH_INLINE void run_unit(const AttentionTask& task, Unit unit, Scratch& scratch, Take take) {
  if (unit.far && task.shape->k_bits != 0) return run_codes(task, unit, scratch, take);
  switch (task.shape->kv_type) {
    case kKvF32:
      return run_floats<F32Kv>(task, unit, scratch, take);
    case kKvF16:
      return run_floats<F16Kv>(task, unit, scratch, take);
    case kKvBF16:
      return run_bf16(task, unit, scratch, take);
    default:
      return run_int8(task, unit, scratch, take);
  }
}

void attend(const AttentionTask& task, float* memory) {
  attend_with(task, memory, [&](Unit unit, Scratch& scratch, auto take) { run_unit(task, unit, scratch, take); });
}

void attend_partition(const AttentionTask& task, int unit, float* memory, float* partial) {
  attend_partition_with(task, unit, memory, partial,
                        [&](Unit at, Scratch& scratch, auto take) { run_unit(task, at, scratch, take); });
}

}  // namespace
}  // namespace inhouse::IH_ISA
