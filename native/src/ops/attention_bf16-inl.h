// Attention over bf16 K and V. Queries and softmax weights are rounded to bf16 too, so that both products are those of
// pairs of bf16 numbers with f32 sums. Weights are powers of two, 2^(score log2(e) - m), where m is a whole number near
// the largest: whatever m is, they are rounded alike, so rounding does not know how the keys are cut into partitions.
// Scores run over pairs of head elements in ascending order, weighted sums over pairs of positions.
namespace inhouse::IH_ISA {
namespace {

constexpr float kLog2e = 1.44269504088896341f;
constexpr int kPairDim = 64;  // elements of a query that lie together

// x [n] to elements place(i) of `out`.
template <class Place>
IH_INLINE void scatter_bf16(const float* x, int64_t n, uint16_t* out, Place place) {
  for (int64_t i = 0; i < n; i += 16) {
    uint16_t half[16];
    const int64_t count = n - i < 16 ? n - i : 16;
    store_bf16(half, load_n(x + i, count));
    for (int64_t j = 0; j < count; ++j) out[place(i + j)] = half[j];
  }
}

// Where element d of a slot's key lies: beside its neighbour, the last one of an odd number alone.
IH_INLINE int64_t key_place(const AttentionShape& s, int64_t d, int64_t slot) {
  if (d % 2 == 0 && d == s.head_dim - 1) return d * kCacheBlock + slot;
  return d / 2 * 2 * kCacheBlock + slot * 2 + d % 2;
}

void store_kv_bf16(const AttentionShape& s, const float* k, const float* v, uint8_t* block, int slot) {
  for (int64_t h = 0; h < s.kv_heads; ++h, block += s.head_bytes) {
    uint16_t* keys = reinterpret_cast<uint16_t*>(block);
    scatter_bf16(k + h * s.head_dim, s.head_dim, keys, [&](int64_t d) { return key_place(s, d, slot); });
    if (s.v_from_k) continue;
    uint16_t* values = keys + kCacheBlock * s.head_dim;
    scatter_bf16(v + h * s.v_dim, s.v_dim, values + slot / 2 * 2 * s.v_dim + slot % 2, [](int64_t d) { return 2 * d; });
  }
}

struct PairTiles : Tiles<uint16_t> {
  const uint16_t* next[kPartitionBlocks];  // K of the unit's next partition, to be asked for ahead; or null
};

// K [head_dim / 2][16][2], an odd last element [16], and V [8][v_dim][2] of a partition's blocks; V that is part of K
// is turned into `memory`.
PairTiles pair_tiles(const AttentionTask& task, Unit unit, float* memory) {
  const AttentionShape& s = *task.shape;
  PairTiles tiles = {};
  uint16_t* turned = reinterpret_cast<uint16_t*>(memory);
  for (int b = 0; b < kPartitionBlocks; ++b) {
    const int64_t place = int64_t{unit.partition} * kPartitionBlocks + b;
    const uint8_t *at = block_of(task, unit.far, place), *next = block_of(task, unit.far, place + kPartitionBlocks);
    tiles.next[b] = reinterpret_cast<const uint16_t*>(next);
    if (at == nullptr) continue;
    const uint16_t* k = tiles.k[b] = reinterpret_cast<const uint16_t*>(at);
    if (!s.v_from_k) {
      tiles.v[b] = k + kCacheBlock * s.head_dim;
      continue;
    }
    tiles.v[b] = turned;
    for (int64_t p = 0; p < kCacheBlock; p += 2, turned += 2 * s.v_dim) {
      for (int64_t d = 0; d < s.v_dim; ++d) {
        turned[2 * d] = k[key_place(s, d, p)];
        turned[2 * d + 1] = k[key_place(s, d, p + 1)];
      }
    }
  }
  return tiles;
}

// Queries of R pairs as bf16 [head_dim / kPairDim][R][kPairDim], filled up with zeros.
template <int R>
IH_INLINE void pair_queries(const Queries& rows, int64_t head_dim, uint16_t* out) {
  for (int64_t d = 0; d < head_dim; d += kPairDim) {
    for (int r = 0; r < R; ++r, out += kPairDim) {
      for (int i = 0; i < kPairDim; i += 16) {
        const int64_t left = head_dim - d - i;
        store_bf16(out + i, left >= 16 ? load(rows.q[r] + d + i) : left > 0 ? load_n(rows.q[r] + d + i, left) : zero());
      }
    }
  }
}

// Asks for one line of memory. V is asked for while K is multiplied, line by line, and the next K while V is: memory
// then works while nothing waits for it.
IH_INLINE void fetch_line(const void* p) { __builtin_prefetch(p, 0, 2); }

// scores[r][16 b ...] = q_r . k for R queries and B blocks from block `first`.
template <int R, int B>
IH_INLINE void pair_scores(const uint16_t* q, const PairTiles& tiles, int first, int64_t head_dim, float* scores) {
  V sums[R][B];
  for (int r = 0; r < R; ++r) {
    for (int b = 0; b < B; ++b) sums[r][b] = zero();
  }
  const uint16_t *at[B], *v[B];
  for (int b = 0; b < B; ++b) {
    at[b] = tiles.k[first + b];
    v[b] = tiles.v[first + b];
  }
  for (int64_t d = 0; d < head_dim; d += kPairDim, q += R * kPairDim) {
    const int64_t end = head_dim - d < kPairDim ? head_dim - d : kPairDim;
    const auto step = [&](int64_t i, auto keys) {
      Pairs k[B];
      for (int b = 0; b < B; ++b) {
        k[b] = keys(at[b] + (d + i) * kCacheBlock);
        fetch_line(v[b] + (d + i) * kCacheBlock);
      }
      for (int r = 0; r < R; ++r) {
        const Pairs x = repeat_pair(q + r * kPairDim + i);
        for (int b = 0; b < B; ++b) sums[r][b] = dot_pairs(sums[r][b], k[b], x);
      }
    };
    for (int64_t i = 0; i + 2 <= end; i += 2) step(i, [](const uint16_t* p) { return load_pairs(p); });
    if (end % 2 != 0) step(end - 1, [](const uint16_t* p) { return load_firsts(p); });
  }
  for (int r = 0; r < R; ++r) {
    for (int b = 0; b < B; ++b) store(scores + r * kPartition + (first + b) * kCacheBlock, sums[r][b]);
  }
}

// Scores of R queries with blocks [first, last).
template <int R>
void pair_score(const AttentionShape& s, const uint16_t* q, const PairTiles& tiles, int first, int last,
                float* scores) {
  constexpr int kStep = kAccumulators / R < 1 ? 1 : kAccumulators / R < 8 ? kAccumulators / R : 8;
  int b = first;
  for (; b + kStep <= last; b += kStep) pair_scores<R, kStep>(q, tiles, b, s.head_dim, scores);
  for (; b < last; ++b) pair_scores<R, 1>(q, tiles, b, s.head_dim, scores);
}

// Scores of one row to weights, zero outside [low, high) as far as its own pairs of blocks go; gives m and their sum.
void soften_pairs(const AttentionShape& s, const Queries& rows, int r, float* scores, uint16_t* weights, float* maximum,
                  float* total) {
  const int first = rows.low[r] / kCacheBlock, last = (rows.high[r] + kCacheBlock - 1) / kCacheBlock;
  const int low = rows.low[r], high = rows.high[r];
  const bool adjusted = s.softcap != 0.0f || s.slopes != nullptr || s.relative != nullptr;
  const V unit = set1(adjusted ? kLog2e : s.scale * kLog2e), none = set1(-__builtin_inff());
  for (int b = first; adjusted && b < last; ++b) {
    store(scores + b * kCacheBlock, mul(load(scores + b * kCacheBlock), set1(s.scale)));
  }
  if (adjusted) adjust(s, rows, r, first, last, scores);
  const auto inside = [&](int b, V x, V outside) {
    if (b * kCacheBlock >= low && (b + 1) * kCacheBlock <= high) return x;
    const V at = add(iota(), set1(static_cast<float>(b * kCacheBlock)));
    const auto seen = both(less_equal(set1(static_cast<float>(low)), at), less(at, set1(static_cast<float>(high))));
    return select(seen, x, outside);
  };
  V top = none;
  for (int b = first; b < last; ++b) top = max(inside(b, mul(load(scores + b * kCacheBlock), unit), none), top);
  const V whole = round_even(set1(reduce_max(top))), back = sub(zero(), whole);
  const auto weight = [&](int b) {
    return inside(b, exp2_below(fma(load(scores + b * kCacheBlock), unit, back)), zero());
  };
  for (int b = first / 2 * 2; b < last; b += 2) store_pairs(weights + b * kCacheBlock, weight(b), weight(b + 1));
  alignas(4) const uint16_t ones[2] = {0x3f80, 0x3f80};
  V sums = zero();
  for (int b = first / 2 * 2; b < last; b += 2) {
    sums = dot_pairs(sums, load_pairs(weights + b * kCacheBlock), repeat_pair(ones));
  }
  *maximum = lane0(whole);
  *total = reduce_add(sums);
}

// sums_r[c ... c + 16 C) += weight_r . V over pairs of positions [low, high). V is read to the end of its last vector;
// what lies beyond v_dim reaches only the padding of the sums.
template <int R, int C>
IH_INLINE void pair_columns(const PairTiles& tiles, int low, int high, int64_t v_dim, int64_t c,
                            const uint16_t* weights, int64_t pitch, float* sums) {
  constexpr int kBlockPairs = kCacheBlock / 2;
  V acc[R][C];
  for (int r = 0; r < R; ++r) {
    for (int j = 0; j < C; ++j) acc[r][j] = load(sums + r * pitch + c + 16 * j);
  }
  for (int p = low; p < high;) {
    const int block = p / kBlockPairs, stop = (block + 1) * kBlockPairs < high ? (block + 1) * kBlockPairs : high;
    const int64_t at = (p % kBlockPairs * v_dim + c) * 2;
    const uint16_t *row = tiles.v[block] + at, *next = tiles.next[block] == nullptr ? row : tiles.next[block] + at;
    for (; p < stop; ++p, row += 2 * v_dim, next += 2 * v_dim) {
      Pairs v[C];
      for (int j = 0; j < C; ++j) {
        v[j] = load_pairs(row + 32 * j);
        fetch_line(next + 32 * j);
      }
      for (int r = 0; r < R; ++r) {
        const Pairs w = repeat_pair(weights + r * kPartition + 2 * p);
        for (int j = 0; j < C; ++j) acc[r][j] = dot_pairs(acc[r][j], v[j], w);
      }
    }
  }
  for (int r = 0; r < R; ++r) {
    for (int j = 0; j < C; ++j) store(sums + r * pitch + c + 16 * j, acc[r][j]);
  }
}

// Columns from c on, C vectors at once, what is left by fewer.
template <int R, int C>
void pair_weigh(const PairTiles& tiles, int low, int high, int64_t v_dim, int64_t c, const uint16_t* weights,
                float* sums) {
  const int64_t pitch = partial_pitch(v_dim), end = C == 1 ? v_dim : v_dim / (16 * C) * (16 * C);
  for (; c < end; c += 16 * C) pair_columns<R, C>(tiles, low, high, v_dim, c, weights, pitch, sums);
  if constexpr (C > 1) pair_weigh<R, C / 2>(tiles, low, high, v_dim, c, weights, sums);
}

// One row's product with one position, whose neighbour it may not see.
void weigh_half(const PairTiles& tiles, int position, int64_t v_dim, const uint16_t* weights, float* sums) {
  const uint16_t* row = tiles.v[position / kCacheBlock] + position % kCacheBlock / 2 * 2 * v_dim;
  const Pairs w = repeat_pair(weights + position / 2 * 2);
  for (int64_t c = 0; c < v_dim; c += 16) {
    const Pairs v = load_pairs(row + 2 * c);
    store(sums + c, dot_pairs(load(sums + c), position % 2 == 0 ? first_of(v) : second_of(v), w));
  }
}

// Weighted sums of R pairs. Positions that all R see are taken together, the rest row by row, so that no row's sum
// meets a position it may not see; a row's order is its own whatever the others see.
template <int R>
void pair_sums(const AttentionShape& s, const Queries& rows, const PairTiles& tiles, const uint16_t* weights,
               float* sums) {
  constexpr int kStep = kAccumulators / R >= 4 ? 4 : kAccumulators / R >= 2 ? 2 : 1;
  const int64_t pitch = partial_pitch(s.v_dim);
  int begin[R], end[R], low = 0, high = kPartition / 2;  // pairs of positions
  for (int r = 0; r < R; ++r) {
    begin[r] = (rows.low[r] + 1) / 2;
    end[r] = rows.high[r] / 2;
    low = begin[r] > low ? begin[r] : low;
    high = end[r] < high ? end[r] : high;
  }
  if (high < low) high = low;
  const auto alone = [&](int r, int from, int to) {
    if (from < to) pair_weigh<1, 4>(tiles, from, to, s.v_dim, 0, weights + r * kPartition, sums + r * pitch);
  };
  for (int r = 0; r < R; ++r) {
    if (rows.low[r] % 2 != 0) weigh_half(tiles, rows.low[r], s.v_dim, weights + r * kPartition, sums + r * pitch);
    alone(r, begin[r], end[r] < low ? end[r] : low);
  }
  if (low < high) pair_weigh<R, kStep>(tiles, low, high, s.v_dim, 0, weights, sums);
  for (int r = 0; r < R; ++r) {
    alone(r, begin[r] > high ? begin[r] : high, end[r]);
    if (rows.high[r] % 2 != 0) {
      weigh_half(tiles, rows.high[r] - 1, s.v_dim, weights + r * kPartition, sums + r * pitch);
    }
  }
}

// Partial results of R pairs over one partition.
template <int R>
void pair_rows(const AttentionShape& s, const Queries& rows, const PairTiles& tiles, float* scores, float* partial) {
  const int64_t pitch = partial_pitch(s.v_dim), end = pitch - 16;
  int first = kPartition, last = 0;
  for (int r = 0; r < R; ++r) {
    first = rows.low[r] < first ? rows.low[r] : first;
    last = rows.high[r] > last ? rows.high[r] : last;
  }
  alignas(64) uint16_t weights[R * kPartition], few[R * kPairDim];
  uint16_t* q = s.head_dim <= kPairDim ? few : reinterpret_cast<uint16_t*>(scores + R * kPartition);
  pair_queries<R>(rows, s.head_dim, q);
  pair_score<R>(s, q, tiles, first / kCacheBlock, (last + kCacheBlock - 1) / kCacheBlock, scores);
  for (int r = 0; r < R; ++r) {
    float* mine = partial + r * pitch;
    for (int64_t c = 0; c < end; c += 16) store(mine + c, zero());
    soften_pairs(s, rows, r, scores + r * kPartition, weights + r * kPartition, mine + end, mine + end + 1);
  }
  pair_sums<R>(s, rows, tiles, weights, partial);
}

// The same for a count known only now, 1 <= count <= R.
template <int R>
void pair_any(const AttentionShape& s, int count, const Queries& rows, const PairTiles& tiles, float* scores,
              float* partial) {
  if constexpr (R > 1) {
    if (count < R) return pair_any<R - 1>(s, count, rows, tiles, scores, partial);
  }
  pair_rows<R>(s, rows, tiles, scores, partial);
}

}  // namespace
}  // namespace inhouse::IH_ISA
