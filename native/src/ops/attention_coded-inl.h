// Attention over codes of K and V (kv_codes.h), straight from the codes: a code c of b bits stands in the upper bits of
// a float 1 + c / 2^b, which takes a shift and one operation of bits, and scale and minimum are folded into queries and
// weights. With s = scale 2^b: q (minimum + scale c) = (q s) (1 + c / 2^b) + q (minimum - s).
// Scores run over channels in ascending order, weighted sums over positions; what codes are multiplied by is summed
// apart from what they are not.
namespace inhouse::IH_ISA {
namespace {

constexpr int kCodeChains = 8;  // sums of scores at once: rows times blocks
static_assert(kCodeChains >= kPairRows);

// Where a partition's codes and those of the next one lie; null where no row of the task may look.
struct CodeTiles {
  KvCodes codes;
  const uint8_t* at[2 * kPartitionBlocks];
};

CodeTiles code_tiles(const AttentionTask& task, int partition) {
  const AttentionShape& s = *task.shape;
  CodeTiles tiles = {{s.k_bits, s.v_bits, s.head_dim, s.v_dim}, {}};
  const int64_t end = far_end(s, task.position + task.rows - 1) / kCacheBlock;
  for (int b = 0; b < 2 * kPartitionBlocks; ++b) {
    const int64_t column = static_cast<int64_t>(partition) * kPartitionBlocks + b;
    if (column >= end) break;
    tiles.at[b] = task.far_blocks + task.far_table[column] * task.far_stride + task.kv_head * s.far_bytes;
  }
  return tiles;
}

IH_INLINE VI load_words(const uint8_t* p) {
  VI words;
  __builtin_memcpy(&words, p, sizeof words);
  return words;
}

// Code number `place` of each word as 1 + code / 2^bits.
template <int kBits, int kPlace>
IH_INLINE V code_at(VI words) {
  constexpr int up = 23 - kBits * (kPlace + 1);
  const VI mask = set1_int(((1 << kBits) - 1) << (23 - kBits)), one = set1_int(0x3f800000);
  if constexpr (up > 0) {
    return from_bits(masked_or(shift_left<up>(words), mask, one));
  } else {
    return from_bits(masked_or(shift_right_signed<-up>(words), mask, one));
  }
}

// use(place, codes) for every code of N words, the lowest first; codes are V [N].
template <int kBits, int N, int kPlace = 0, class Use>
IH_INLINE void each_code(const VI* words, Use use) {
  V codes[N];
  for (int i = 0; i < N; ++i) codes[i] = code_at<kBits, kPlace>(words[i]);
  use(kPlace, codes);
  if constexpr (kPlace + 1 < 32 / kBits) each_code<kBits, N, kPlace + 1>(words, use);
}

// `count` bytes, at most 16, as floats; 0 beyond.
IH_INLINE V load_bytes_n(const uint8_t* from, int64_t count) {
  alignas(16) uint8_t held[16] = {};
  if (count >= 16) {
    __builtin_memcpy(held, from, 16);
  } else {
    __builtin_memcpy(held, from, static_cast<size_t>(count));
  }
  return to_float(load_u8(held));
}

// Queries of R rows times the scales of one block, and what minimums add to each score; q is [head_dim / 16][R][16] and
// `folded` the same with `stride` floats in place of 16 R.
template <int R>
IH_INLINE void fold_queries(const KvCodes& c, const uint8_t* block, const float* q, float* folded, int stride,
                            float* added) {
  const float* unit = reinterpret_cast<const float*>(block);
  const uint8_t *scales = block + c.k_params(), *minimums = scales + c.head_dim;
  const V lift = set1(unit[0] * static_cast<float>(1 << c.k_bits)), base = set1(unit[1]), step = set1(unit[2]);
  V sums[R];
  for (int r = 0; r < R; ++r) sums[r] = zero();
  for (int64_t d = 0; d < c.head_dim; d += 16, q += 16 * R, folded += stride) {
    const V scale = mul(lift, load_bytes_n(scales + d, c.head_dim - d));
    const V minimum = sub(fma(step, load_bytes_n(minimums + d, c.head_dim - d), base), scale);
    for (int r = 0; r < R; ++r) {
      const V x = load(q + 16 * r);
      store(folded + 16 * r, mul(x, scale));
      sums[r] = fma(x, minimum, sums[r]);
    }
  }
  for (int r = 0; r < R; ++r) added[r] = reduce_add(sums[r]);
}

// scores[r][16 b ...] of R rows and B blocks from block `first`. Codes of later blocks are asked for line by line, so
// that none of those that are needed now wait behind them.
template <int R, int B, int kBits>
IH_INLINE void code_scores(const CodeTiles& tiles, int first, bool near, const float* q, float* folded, float* scores) {
  constexpr int kEach = 32 / kBits, kStride = 16 * R * B;
  const KvCodes& c = tiles.codes;
  const int64_t lines = near ? 0 : (c.bytes() / 64 + c.k_words()) / c.k_words();  // for each word of keys
  float added[B][R];
  const uint8_t *at[B], *next[B];
  V sums[R][B];
  for (int b = 0; b < B; ++b) {
    fold_queries<R>(c, tiles.at[first + b], q, folded + b * R * 16, kStride, added[b]);
    at[b] = tiles.at[first + b] + c.k_codes();
    next[b] = tiles.at[first + b + (B > kAhead ? B : kAhead)];
    if (next[b] == nullptr) next[b] = at[b];
    for (int r = 0; r < R; ++r) sums[r][b] = zero();
  }
  for (int64_t w = 0; w < c.k_words(); ++w) {
    const float* x = folded + w * kEach / 16 * kStride + w * kEach % 16;
    VI words[B];
    for (int b = 0; b < B; ++b) {
      words[b] = load_words(at[b] + 64 * w);
      for (int64_t i = 0; i < lines; ++i, next[b] += 64) __builtin_prefetch(next[b], 0, 2);
    }
    each_code<kBits, B>(words, [&](int place, const V* codes) __attribute__((always_inline)) {
      for (int b = 0; b < B; ++b) {
        for (int r = 0; r < R; ++r) sums[r][b] = fma(set1(x[(b * R + r) * 16 + place]), codes[b], sums[r][b]);
      }
    });
  }
  for (int r = 0; r < R; ++r) {
    for (int b = 0; b < B; ++b) {
      store(scores + r * kPartition + (first + b) * kCacheBlock, add(sums[r][b], set1(added[b][r])));
    }
  }
}

// Scores of R rows with blocks [0, last).
template <int R, int kBits>
void code_score(const CodeTiles& tiles, int last, bool near, const float* q, float* folded, float* scores) {
  constexpr int kStep = kCodeChains / R;
  int b = 0;
  for (; b + kStep <= last; b += kStep) code_scores<R, kStep, kBits>(tiles, b, near, q, folded, scores);
  for (; b < last; ++b) code_scores<R, 1, kBits>(tiles, b, near, q, folded, scores);
}

// sums_r[16 c ... 16 (c + C)) += weight_r . codes of V over blocks [first, last), and to added_r [groups of the
// columns], by position, what minimums add to them. The first vector begins a group.
template <int R, int C, int kBits>
IH_INLINE void code_columns(const CodeTiles& tiles, int first, int last, int64_t c, const float* weights, float* sums,
                            int64_t pitch, float* added, int64_t stride) {
  constexpr int kVectors = kValueGroup / 16, kGroups = (C + kVectors - 1) / kVectors;
  const KvCodes& codes = tiles.codes;
  const int64_t row = 4 * codes.v_row();
  V acc[R][C], rest[R][kGroups];
  for (int r = 0; r < R; ++r) {
    for (int g = 0; g < kGroups; ++g) rest[r][g] = load(added + g * stride + r * 16);
    for (int j = 0; j < C; ++j) acc[r][j] = load(sums + r * pitch + 16 * (c + j));
  }
  for (int b = first; b < last; ++b) {
    const uint8_t* at = tiles.at[b] + codes.v_codes() + 64 * c;
    const uint16_t* params = reinterpret_cast<const uint16_t*>(tiles.at[b] + codes.v_params()) + 32 * (c / kVectors);
    alignas(64) float folded[R][kGroups][16];
    for (int g = 0; g < kGroups; ++g) {
      const V scale = mul(load_f16(params + 32 * g), set1(static_cast<float>(1 << kBits)));
      const V minimum = sub(load_f16(params + 32 * g + 16), scale);
      for (int r = 0; r < R; ++r) {
        const V w = load(weights + r * kPartition + b * kCacheBlock);
        store(folded[r][g], mul(w, scale));
        rest[r][g] = fma(w, minimum, rest[r][g]);
      }
    }
    for (int p = 0; p < kCacheBlock; p += 32 / kBits, at += row) {
      VI words[C];
      for (int j = 0; j < C; ++j) words[j] = load_words(at + 64 * j);
      each_code<kBits, C>(words, [&](int place, const V* values) __attribute__((always_inline)) {
        for (int r = 0; r < R; ++r) {
          for (int j = 0; j < C; ++j) {
            acc[r][j] = fma(set1(folded[r][j / kVectors][p + place]), values[j], acc[r][j]);
          }
        }
      });
    }
  }
  for (int r = 0; r < R; ++r) {
    for (int g = 0; g < kGroups; ++g) store(added + g * stride + r * 16, rest[r][g]);
    for (int j = 0; j < C; ++j) store(sums + r * pitch + 16 * (c + j), acc[r][j]);
  }
}

// Columns from vector c on, C at once, what is left by fewer; `added` is [groups][stride], sixteen for each row.
template <int R, int C, int kBits>
void code_weigh(const CodeTiles& tiles, int first, int last, int64_t c, const float* weights, float* sums,
                int64_t pitch, float* added, int64_t stride) {
  const int64_t vectors = tiles.codes.v_row() / 16;
  for (; c + C <= vectors; c += C) {
    code_columns<R, C, kBits>(tiles, first, last, c, weights, sums, pitch, added + c * 16 / kValueGroup * stride,
                              stride);
  }
  if constexpr (C > 1) code_weigh<R, C / 2, kBits>(tiles, first, last, c, weights, sums, pitch, added, stride);
}

// Partial results of R rows over one partition, of which each sees whole blocks from the first on.
template <int R, int kKeyBits, int kValueBits>
void code_rows(const AttentionShape& s, const Queries& rows, const CodeTiles& tiles, bool near,
               const Scratch& scratch) {
  const int64_t pitch = partial_pitch(s.v_dim), end = pitch - 16, width = (s.head_dim + 15) / 16 * 16;
  const int64_t groups = tiles.codes.groups(), stride = R * 16;
  float *q = scratch.wide, *folded = q + R * width, *added = folded + kCodeChains * width;
  int last = 0, all = kPartitionBlocks;
  for (int r = 0; r < R; ++r) {
    const int seen = rows.high[r] / kCacheBlock;
    last = seen > last ? seen : last;
    all = seen < all ? seen : all;
    for (int64_t d = 0; d < s.head_dim; d += 16) {
      const int64_t left = s.head_dim - d;
      const V x = left >= 16 ? load(rows.q[r] + d) : load_n(rows.q[r] + d, left);
      store(q + d * R + 16 * r, mul(x, set1(s.scale)));
    }
  }
  code_score<R, kKeyBits>(tiles, last, near, q, folded, scratch.scores);
  for (int r = 0; r < R; ++r) {
    float* mine = scratch.fresh + r * pitch;
    for (int64_t c = 0; c < end; c += 16) store(mine + c, zero());
    for (int64_t g = 0; g < groups; ++g) store(added + g * stride + r * 16, zero());
    soften(s, rows, r, scratch.scores + r * kPartition, mine + end, mine + end + 1,
           [](int, V weight) { return weight; });
  }
  constexpr int kColumns = R <= kAccumulators / 4 ? 4 : 2;
  if (all > 0) {
    code_weigh<R, kColumns, kValueBits>(tiles, 0, all, 0, scratch.scores, scratch.fresh, pitch, added, stride);
  }
  for (int r = 0; r < R; ++r) {
    float* mine = scratch.fresh + r * pitch;
    if (rows.high[r] / kCacheBlock > all) {
      code_weigh<1, 4, kValueBits>(tiles, all, rows.high[r] / kCacheBlock, 0, scratch.scores + r * kPartition, mine,
                                   pitch, added + r * 16, stride);
    }
    for (int64_t c = 0; c < end; c += 16) {
      const float rest = reduce_add(load(added + c / kValueGroup * stride + r * 16));
      store(mine + c, add(load(mine + c), set1(rest)));
    }
  }
}

// The same for a count and for bits known only now, 1 <= count <= R.
template <int R>
void code_any(const AttentionShape& s, int count, const Queries& rows, const CodeTiles& tiles, bool near,
              const Scratch& scratch) {
  if constexpr (R > 1) {
    if (count < R) return code_any<R - 1>(s, count, rows, tiles, near, scratch);
  }
  if (s.k_bits == 8) return code_rows<R, 8, 4>(s, rows, tiles, near, scratch);
  if (s.v_bits == 8) return code_rows<R, 4, 8>(s, rows, tiles, near, scratch);
  code_rows<R, 4, 4>(s, rows, tiles, near, scratch);
}

template <class Take>
IH_INLINE void run_codes(const AttentionTask& task, Unit unit, const Scratch& scratch, Take take) {
  const CodeTiles tiles = code_tiles(task, unit.partition);
  const auto work = [&](int count, const Queries& rows, bool near) {
    code_any<kPairRows>(*task.shape, count, rows, tiles, near, scratch);
  };
  each_pair(task, unit, kPairRows, scratch.fresh, work, take);
}

}  // namespace
}  // namespace inhouse::IH_ISA
