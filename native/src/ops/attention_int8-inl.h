// Attention over int8 K and V (a scale for each token and head). Queries and weights become integers of about 16
// bits, each as a high and a low byte, so that scores and weighted sums are exact integer dot products: no order of
// sums to keep.
namespace inhouse::IH_ISA {
namespace {

constexpr int kIntPairs = kAccumulators >= 8 ? 4 : 2;  // pairs that share the reads of K and V
constexpr float kLowUnits = 254.0f;                    // units of the low byte in one of the high byte

// Where the codes and scales of a partition's blocks lie.
struct IntTiles {
  const uint8_t* k[kPartitionBlocks];  // [head_dim / 4][16][4], code + 128
  const uint8_t* v[kPartitionBlocks];  // [4][v_dim in whole vectors][4]: four positions of an element side by side
  const float* k_scale[kPartitionBlocks];
  const float* v_scale[kPartitionBlocks];
};

// The largest magnitude of x [n], with infinity and NaN on top.
IH_INLINE float most_of(const float* x, int64_t n) {
  VI most = set1_int(0);
  for (int64_t i = 0; i < n; i += 16) {
    most = max_int(most, magnitude_bits(n - i >= 16 ? load(x + i) : load_n(x + i, n - i)));
  }
  return __builtin_bit_cast(float, reduce_max_int(most));
}
IH_INLINE bool is_finite(float x) { return __builtin_bit_cast(int32_t, x) < 0x7f800000; }  // of a magnitude

// x [n] to codes `place(i)` bytes after `out`, as quantize_row does it with one group; gives the scale.
template <class Place>
IH_INLINE float store_codes(const float* x, int64_t n, uint8_t* out, Place place) {
  const float most = most_of(x, n);
  const bool usable = is_finite(most) && most >= kTiny;
  const V inverse = set1(usable ? 127.0f / most : 0.0f);
  for (int64_t i = 0; i < n; i += 16) {
    const int64_t count = n - i < 16 ? n - i : 16;
    int8_t codes[16];
    store_i8(codes, usable ? to_int(mul(load_n(x + i, count), inverse)) : set1_int(0));
    for (int64_t j = 0; j < count; ++j) out[place(i + j)] = static_cast<uint8_t>(codes[j] + 128);
  }
  if (usable) return most / 127.0f;
  return is_finite(most) ? 0.0f : __builtin_nanf("");
}

void store_kv_int8(const AttentionShape& s, const float* k, const float* v, uint8_t* block, int slot) {
  for (int64_t h = 0; h < s.kv_heads; ++h, block += s.head_bytes) {
    const auto key = [=](int64_t d) { return d / 4 * 64 + slot * 4 + d % 4; };
    float* scales = reinterpret_cast<float*>(block + int8_scales(s.head_dim, s.v_from_k ? 0 : s.v_dim));
    scales[slot] = store_codes(k + h * s.head_dim, s.head_dim, block, key);
    for (int64_t d = s.head_dim; d % 4 != 0; ++d) block[key(d)] = 128;
    if (s.v_from_k) continue;
    uint8_t* values = block + int8_k_bytes(s.head_dim) + slot / 4 * int8_v_bytes(s.v_dim) / 4;
    scales[kCacheBlock + slot] =
        store_codes(v + h * s.v_dim, s.v_dim, values, [=](int64_t d) { return d * 4 + slot % 4; });
  }
}

// V that is part of K in V's own layout, for all blocks of a partition.
void turn_codes(const AttentionShape& s, IntTiles* tiles, float* memory) {
  uint8_t* out = reinterpret_cast<uint8_t*>((reinterpret_cast<uintptr_t>(memory) + 63) / 64 * 64);
  const int64_t bytes = int8_v_bytes(s.v_dim), group = bytes / 4;
  for (int b = 0; b < kPartitionBlocks; ++b, out += bytes) {
    const uint8_t* k = tiles->k[b];
    if (k == nullptr) continue;
    for (int64_t d = 0; d < s.v_dim; ++d) {
      for (int64_t p = 0; p < kCacheBlock; ++p) out[p / 4 * group + d * 4 + p % 4] = k[d / 4 * 64 + p * 4 + d % 4];
    }
    tiles->v[b] = out;
    tiles->v_scale[b] = tiles->k_scale[b];
  }
}

IntTiles int_tiles(const AttentionTask& task, Unit unit, float* turned) {
  const AttentionShape& s = *task.shape;
  IntTiles tiles = {};
  for (int b = 0; b < kPartitionBlocks; ++b) {
    const uint8_t* at = block_of(task, unit.far, int64_t{unit.partition} * kPartitionBlocks + b);
    if (at == nullptr) continue;
    tiles.k[b] = at;
    tiles.k_scale[b] = reinterpret_cast<const float*>(at + int8_scales(s.head_dim, s.v_from_k ? 0 : s.v_dim));
    if (s.v_from_k) continue;
    tiles.v[b] = at + int8_k_bytes(s.head_dim);
    tiles.v_scale[b] = tiles.k_scale[b] + kCacheBlock;
  }
  if (s.v_from_k) turn_codes(s, &tiles, turned);
  return tiles;
}

// Sixteen floats times `inverse`, at most 127 each, as high and low bytes in [-127, 127]; adds them to the two sums.
IH_INLINE void split_codes(V x, V inverse, int8_t* high, int8_t* low, VI* high_sum, VI* low_sum) {
  const V scaled = mul(x, inverse), whole = round_even(scaled);
  const VI top = to_int(whole), rest = to_int(mul(sub(scaled, whole), set1(kLowUnits)));
  store_i8(high, top);
  store_i8(low, rest);
  *high_sum = add_int(*high_sum, top);
  *low_sum = add_int(*low_sum, rest);
}

// Two sums of dot products with high and low bytes as one float.
IH_INLINE V joined(VI high, VI low) { return fma(to_float(high), set1(kLowUnits), to_float(low)); }

// What integer dot products start from, so that codes count as code - 128.
struct Start {
  int32_t high, low;
};

// Queries of R pairs as bytes: words [head_dim / 4][R][high, low] of four bytes; unit[r] is what a code stands for.
template <int R>
IH_INLINE void quantize_queries(const AttentionShape& s, const Queries& rows, int32_t* words, Start* start,
                                float* unit) {
  for (int r = 0; r < R; ++r) {
    const float most = most_of(rows.q[r], s.head_dim);
    const bool usable = is_finite(most) && most >= kTiny;
    const V inverse = set1(usable ? 127.0f / most : 0.0f);
    VI high_sum = set1_int(0), low_sum = set1_int(0);
    for (int64_t d = 0; d < s.head_dim; d += 16) {
      const int64_t count = s.head_dim - d < 16 ? s.head_dim - d : 16;
      alignas(16) int8_t high[16], low[16];
      const V x = usable ? load_n(rows.q[r] + d, count) : zero();
      split_codes(x, inverse, high, low, &high_sum, &low_sum);
      for (int64_t j = 0; j * 4 < count; ++j) {
        int32_t* word = words + ((d / 4 + j) * R + r) * 2;
        __builtin_memcpy(word, high + j * 4, 4);
        __builtin_memcpy(word + 1, low + j * 4, 4);
      }
    }
    start[r] = {-kWideZero * reduce_add_int(high_sum), -kWideZero * reduce_add_int(low_sum)};
    unit[r] = usable ? most / (127.0f * kLowUnits) * s.scale : is_finite(most) ? 0.0f : __builtin_nanf("");
  }
}

template <int R, int B>
IH_INLINE void int_scores(const IntTiles& tiles, int first, int64_t quads, const int32_t* words, const Start* start,
                          const float* unit, float* scores) {
  VI high[R][B], low[R][B];
  for (int r = 0; r < R; ++r) {
    for (int b = 0; b < B; ++b) {
      high[r][b] = set1_int(start[r].high);
      low[r][b] = set1_int(start[r].low);
    }
  }
  for (int64_t d = 0; d < quads; ++d, words += 2 * R) {
    for (int b = 0; b < B; ++b) {
      const auto k = load_bytes(tiles.k[first + b] + d * 64);
      for (int r = 0; r < R; ++r) {
        high[r][b] = dot_wide(high[r][b], k, words[2 * r]);
        low[r][b] = dot_wide(low[r][b], k, words[2 * r + 1]);
      }
    }
  }
  for (int r = 0; r < R; ++r) {
    for (int b = 0; b < B; ++b) {
      const V scale = mul(load(tiles.k_scale[first + b]), set1(unit[r]));
      store(scores + r * kPartition + (first + b) * kCacheBlock, mul(joined(high[r][b], low[r][b]), scale));
    }
  }
}

// One row's scores to weights times the scales of V, as bytes [high, low][256]; blocks outside [first, last) are not
// written, those that the row does not see are zero. Gives what a code stands for.
float quantize_weights(const AttentionShape& s, const IntTiles& tiles, const Queries& rows, int r, int first, int last,
                       float* weights, float* softmax, int8_t* bytes, Start* start) {
  for (int b = first; b < rows.low[r] / kCacheBlock; ++b) store(weights + b * kCacheBlock, zero());
  for (int b = (rows.high[r] + kCacheBlock - 1) / kCacheBlock; b < last; ++b) store(weights + b * kCacheBlock, zero());
  soften(s, rows, r, weights, softmax, softmax + 1,
         [&](int b, V weight) { return mul(weight, load(tiles.v_scale[b])); });
  VI most_bits = set1_int(0);
  for (int b = first; b < last; ++b) most_bits = max_int(most_bits, magnitude_bits(load(weights + b * kCacheBlock)));
  const float most = __builtin_bit_cast(float, reduce_max_int(most_bits));
  const bool usable = is_finite(most) && most >= kTiny;
  const V inverse = set1(usable ? 127.0f / most : 0.0f);
  VI high_sum = set1_int(0), low_sum = set1_int(0);
  for (int b = first; b < last; ++b) {
    const V x = usable ? load(weights + b * kCacheBlock) : zero();
    split_codes(x, inverse, bytes + b * 16, bytes + kPartition + b * 16, &high_sum, &low_sum);
  }
  *start = {-kWideZero * reduce_add_int(high_sum), -kWideZero * reduce_add_int(low_sum)};
  return usable ? most / (127.0f * kLowUnits) : is_finite(most) ? 0.0f : __builtin_nanf("");
}

template <int R, int C>
IH_INLINE void int_sums(const IntTiles& tiles, int first, int last, int64_t v_bytes, int64_t c, const int8_t* bytes,
                        const Start* start, const float* unit, int64_t pitch, float* sums) {
  VI high[R][C], low[R][C];
  for (int r = 0; r < R; ++r) {
    for (int j = 0; j < C; ++j) {
      high[r][j] = set1_int(start[r].high);
      low[r][j] = set1_int(start[r].low);
    }
  }
  for (int b = first; b < last; ++b) {
    const uint8_t* at = tiles.v[b] + c * 4;
    for (int g = 0; g < kCacheBlock / 4; ++g, at += v_bytes / 4) {
      for (int j = 0; j < C; ++j) {
        const auto v = load_bytes(at + j * 64);
        for (int r = 0; r < R; ++r) {
          int32_t top, rest;
          __builtin_memcpy(&top, bytes + r * 2 * kPartition + b * kCacheBlock + g * 4, 4);
          __builtin_memcpy(&rest, bytes + (r * 2 + 1) * kPartition + b * kCacheBlock + g * 4, 4);
          high[r][j] = dot_wide(high[r][j], v, top);
          low[r][j] = dot_wide(low[r][j], v, rest);
        }
      }
    }
  }
  for (int r = 0; r < R; ++r) {
    for (int j = 0; j < C; ++j) store(sums + r * pitch + c + 16 * j, mul(joined(high[r][j], low[r][j]), set1(unit[r])));
  }
}

// Partial results of R pairs over one partition.
template <int R>
void int_rows(const AttentionShape& s, const Queries& rows, const IntTiles& tiles, bool near, float* scores,
              float* partial) {
  const int64_t pitch = partial_pitch(s.v_dim), end = pitch - 16, quads = (s.head_dim + 3) / 4;
  int first = kPartition, last = 0;
  for (int r = 0; r < R; ++r) {
    first = rows.low[r] < first ? rows.low[r] : first;
    last = rows.high[r] > last ? rows.high[r] : last;
  }
  first /= kCacheBlock;
  last = (last + kCacheBlock - 1) / kCacheBlock;
  int8_t* bytes = reinterpret_cast<int8_t*>(scores + R * kPartition);                         // [R][high, low][256]
  int32_t* words = reinterpret_cast<int32_t*>(scores + R * kPartition + R * kPartition / 2);  // of the queries
  Start start[R];
  float unit[R];
  quantize_queries<R>(s, rows, words, start, unit);
  for (int b = first; !near && b < first + kAhead && b < last; ++b) fetch(tiles.k[b], quads * 64);
  int b = first;
  for (; b + 2 <= last; b += 2) {
    for (int i = b; !near && i < b + 2; ++i) {
      if (i + kAhead < last) fetch(tiles.k[i + kAhead], quads * 64);
      fetch(tiles.v[i], int8_v_bytes(s.v_dim));
    }
    int_scores<R, 2>(tiles, b, quads, words, start, unit, scores);
  }
  if (b < last) int_scores<R, 1>(tiles, b, quads, words, start, unit, scores);
  for (int r = 0; r < R; ++r) {
    unit[r] = quantize_weights(s, tiles, rows, r, first, last, scores + r * kPartition, partial + r * pitch + end,
                               bytes + r * 2 * kPartition, &start[r]);
  }
  int64_t c = 0;
  const int64_t v_bytes = int8_v_bytes(s.v_dim);
  for (; c + 32 <= end; c += 32) int_sums<R, 2>(tiles, first, last, v_bytes, c, bytes, start, unit, pitch, partial);
  if (c < end) int_sums<R, 1>(tiles, first, last, v_bytes, c, bytes, start, unit, pitch, partial);
}

template <int R>
void int_any(const AttentionShape& s, int count, const Queries& rows, const IntTiles& tiles, bool near, float* scores,
             float* partial) {
  if constexpr (R > 1) {
    if (count < R) return int_any<R - 1>(s, count, rows, tiles, near, scores, partial);
  }
  int_rows<R>(s, rows, tiles, near, scores, partial);
}

}  // namespace
}  // namespace inhouse::IH_ISA
