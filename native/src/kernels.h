// The seam between the step machinery (program, planner, threads) and the op bodies: one table of kernels for each
// ISA level, filled by a thin file in isa/. Everything here is plain C types; bodies live in an ISA namespace with
// internal linkage, so that the linker can never keep an AVX-512 copy of a shared inline function for an older CPU.
#pragma once
#include <cstddef>
#include <cstdint>

namespace inhouse {

constexpr int kTileRows = 16;    // output rows of a linear that are interleaved in one packed tile
constexpr int kQuantGroup = 32;  // elements of an activation row that share a scale, unless it is the whole row

// A matrix in packed form. The meaning of `format` and the layout of `data` are those of runtime/packed.py.
struct Weight {
  int32_t format;       // index into the table of formats (formats.h; same numbers as packed.py)
  int64_t out, in;      // logical shape, out rows of in elements
  const uint8_t* data;  // 64-byte aligned, may be a file mapping
  size_t bytes;
};

// Rows of quantised activations (op quantize_rows), in blocks of kQuantGroup elements, the last one padded with zeros.
// `lanes` rows lie together, so that a body that works on several rows finds them side by side: of row r and block b,
// entry (r / lanes * blocks + b) * lanes + r % lanes. A view begins at another row or block than the first.
struct QuantRows {
  int8_t* codes;  // [entries][kQuantGroup]
  float* scales;  // [entries]; of a group that is longer than a block, in each of its blocks
  int32_t* sums;  // [entries] sum of the block's codes
  int32_t* low;   // [entries] sum of the first half of them
  int64_t blocks, lanes;
  int64_t row, block;  // where a view begins

  // Entry of row r and block b of the view.
  int64_t at(int64_t r, int64_t b) const {
    return ((row + r) / lanes * blocks + block + b) * lanes + (row + r) % lanes;
  }
  QuantRows view(int64_t first_row, int64_t first_block) const {
    QuantRows v = *this;
    v.row += first_row;
    v.block += first_block;
    return v;
  }
};

constexpr int64_t kMaxLanes = 8;
constexpr int64_t kMostPairInputs = 16384;  // of linear_bf16
constexpr float kLeastPower = 0x1p-60f;     // of scales that are powers of two
constexpr float kMostPower = 0x1p60f;       // up to which bodies may add exponents; beyond it they multiply

// Rows that lie together where a step has so many.
constexpr int64_t lanes_for(int64_t rows) { return rows < 2 ? 1 : rows < 3 ? 2 : rows < 5 ? 4 : kMaxLanes; }

// The rows in memory of `capacity` rows (a multiple of kMaxLanes): codes first, then the three planes of words.
inline QuantRows quant_rows(uint8_t* memory, int64_t capacity, int64_t width, int64_t rows) {
  const int64_t blocks = (width + kQuantGroup - 1) / kQuantGroup, entries = capacity * blocks;
  uint8_t* words = memory + entries * kQuantGroup;
  return {reinterpret_cast<int8_t*>(memory),
          reinterpret_cast<float*>(words),
          reinterpret_cast<int32_t*>(words + 4 * entries),
          reinterpret_cast<int32_t*>(words + 8 * entries),
          blocks,
          lanes_for(rows),
          0,
          0};
}

// Bytes of `capacity` rows of that width.
constexpr int64_t quant_bytes(int64_t capacity, int64_t width) {
  return capacity * ((width + kQuantGroup - 1) / kQuantGroup) * (kQuantGroup + 12);
}

// Index into ACTIVATIONS of runtime/ops.py.
enum Activation : int32_t { kSilu, kGelu, kGeluTanh, kRelu, kQuickGelu, kTanh, kSigmoid, kActivations };

// Element type of cached K and V.
enum KvType : int32_t { kKvF32, kKvF16, kKvBF16, kKvInt8, kKvTypes };

constexpr int kCacheBlock = 16;  // positions in a block of a state group
constexpr int kPartition = 256;  // positions in an attention partition, at absolute multiples
constexpr int kPartitionBlocks = kPartition / kCacheBlock;

// Index into MASKS of runtime/ops.py.
enum Mask : int32_t { kCausal, kBidirectional, kPrefix, kMasks };

// A kv head's part of a block of int8 codes: K [head_dim / 4][16][4], V [4][v_dim in whole vectors][4] (four positions
// of an element side by side), then the scales of K [16] and of V [16]; a code is stored as code + 128.
constexpr int64_t int8_k_bytes(int64_t head_dim) { return (head_dim + 3) / 4 * 64; }
constexpr int64_t int8_v_bytes(int64_t v_dim) { return (v_dim + 15) / 16 * 256; }
constexpr int64_t int8_scales(int64_t head_dim, int64_t v_dim) { return int8_k_bytes(head_dim) + int8_v_bytes(v_dim); }

// Bytes of one kv head in a block; v_dim is 0 where V is part of K.
constexpr int64_t kv_head_bytes(KvType type, int64_t head_dim, int64_t v_dim) {
  if (type == kKvInt8) return int8_scales(head_dim, v_dim) + 2 * kCacheBlock * 4;
  return kCacheBlock * (head_dim + v_dim) * (type == kKvF32 ? 4 : 2);
}

// What an attention op is. A kv head's part of an f32 or f16 block is K [head_dim][16], then V [16][v_dim] unless V is
// the first v_dim elements of K; of bf16, in pairs: K [head_dim / 2][16][2], an odd last one [16], V [8][v_dim][2].
struct AttentionShape {
  int32_t heads, kv_heads, head_dim, v_dim;
  int32_t window;  // 0: all
  Mask mask;
  bool v_from_k;
  KvType kv_type;
  float scale, softcap;   // softcap 0: none
  const float* slopes;    // ALiBi [heads] or null
  const float* relative;  // bias by distance [heads][relative_pitch(reach)] (relative.h), or null
  int32_t reach;          // distance from which the bias is the same
  const float* sinks;     // [heads] or null
  int64_t head_bytes;     // of one kv head in a block
  // The far part, read before the near one. Coded: a row at p reads the blocks that end at or before p - recent as
  // codes (kv_codes.h) of another state group. Static: beside the window it sees the first `sink` positions and every
  // stride-th block, counted from the first.
  int32_t k_bits, v_bits, recent;  // k_bits 0: not coded
  int64_t far_bytes;               // of one kv head in a block of codes
  int32_t sink, stride;            // sink is whole blocks; both 0: no static part
};

// Blocks below block n that are static.
constexpr int64_t static_blocks(const AttentionShape& s, int64_t n) {
  const int64_t sinks = s.sink / kCacheBlock;
  if (n <= sinks || s.stride == 0) return n < sinks ? n : sinks;
  return sinks + (n + s.stride - 1) / s.stride - (sinks + s.stride - 1) / s.stride;
}
// The block that is the j-th static one.
constexpr int64_t static_block(const AttentionShape& s, int64_t j) {
  const int64_t sinks = s.sink / kCacheBlock;
  return j < sinks || s.stride == 0 ? j : ((sinks + s.stride - 1) / s.stride + j - sinks) * s.stride;
}

// Positions of the far part that a row at `position` sees; static ones are counted without the gaps between them.
constexpr int64_t far_end(const AttentionShape& s, int64_t position) {
  if (s.k_bits != 0) return position < s.recent ? 0 : (position - s.recent) / kCacheBlock * kCacheBlock;
  if ((s.sink == 0 && s.stride == 0) || position < s.window) return 0;
  const int64_t low = position - s.window + 1, block = low / kCacheBlock, seen = static_blocks(s, block);
  return seen * kCacheBlock + (static_blocks(s, block + 1) > seen ? low % kCacheBlock : 0);
}
// The first position of the near part that it sees.
constexpr int64_t near_begin(const AttentionShape& s, int64_t position) {
  if (s.k_bits != 0) return far_end(s, position);
  return s.window > 0 && position >= s.window ? position - s.window + 1 : 0;
}
// One past the last; `length` positions are stored, those below `prefix` see one another.
constexpr int64_t near_end(const AttentionShape& s, int64_t position, int64_t length, int64_t prefix) {
  if (s.mask == kPrefix) return prefix > position + 1 ? prefix : position + 1;
  if (s.mask == kBidirectional) return s.window > 0 && length - position > s.window ? position + s.window : length;
  return position + 1;
}

// What rows [position, position + rows) see: `far` partitions of the far part, then partitions [first, last).
struct Units {
  int32_t far, first, last;
  constexpr int32_t count() const { return far + last - first; }
};
constexpr Units units_of(const AttentionShape& s, int64_t position, int64_t rows, int64_t length, int64_t prefix) {
  const int64_t end = position + rows - 1;
  return {static_cast<int32_t>((far_end(s, end) + kPartition - 1) / kPartition),
          static_cast<int32_t>(near_begin(s, position) / kPartition),
          static_cast<int32_t>((near_end(s, end, length, prefix) + kPartition - 1) / kPartition)};
}

// Entry i of a head's row is the bias of key - query = i - reach - 16, so that sixteen neighbours are one load.
constexpr int64_t relative_pitch(int64_t reach) { return 2 * reach + 33; }

// Some rows of one sequence against one kv head. Row i stands at `position` + i; `length` keys are stored, of which
// those below `prefix` see one another (mask prefix).
struct AttentionTask {
  const AttentionShape* shape;
  const float* q;  // [rows][ldq], all query heads
  int64_t ldq;
  float* y;  // [rows][ldy], all query heads
  int64_t ldy;
  const int32_t* table;   // block ids of the sequence
  const uint8_t* blocks;  // this layer's part of block b is at blocks + b * block_stride
  int64_t block_stride;
  int32_t position, length, prefix, rows, kv_head;
  const int32_t* far_table;  // the same of the codes; null where there are none
  const uint8_t* far_blocks;
  int64_t far_stride;
};

// Index into SCORINGS of runtime/ops.py.
enum Scoring : int32_t { kScoreSoftmax, kScoreSigmoid, kSoftmaxAfter, kSparsemixer, kScorings };

constexpr int kMaxExperts = 4096;  // of a layer
constexpr int kMaxTopK = 64;       // of a token

// What a route op is; runtime/ops.py says what each field means. two_best: a group counts as its two best experts.
struct RouteShape {
  int32_t experts, top_k, groups, top_groups;
  Scoring scoring;
  bool normalize, two_best;
  float scale, jitter;
};

// Every body follows one accumulation order, a function of the weight format alone: y[r][o] has the same bits
// whatever `rows`, `tile_begin` and `tile_end` are.
struct Kernels {
  const char* isa;
  // y[r * ldy + o] = x_r . w_o + bias_o for the outputs of tiles [tile_begin, tile_end); x is f32 [rows][ldx].
  void (*linear_f32)(const Weight& w, const float* x, int64_t ldx, int rows, int64_t tile_begin, int64_t tile_end,
                     const float* bias, float* y, int64_t ldy);
  // The same of bf16 weights, with x rounded to bf16; `in` is a multiple of 4 and at most kMostPairInputs.
  void (*linear_bf16)(const Weight& w, const float* x, int64_t ldx, int rows, int64_t tile_begin, int64_t tile_end,
                      const float* bias, float* y, int64_t ldy);
  // The same from quantised rows, for code formats.
  void (*linear_i8)(const Weight& w, const QuantRows& x, int rows, int64_t tile_begin, int64_t tile_end,
                    const float* bias, float* y, int64_t ldy);
  // Row `row` of a packed matrix as f32 [in] (embedding gather; exact dequantisation).
  void (*unpack_row)(const Weight& w, int64_t row, float* out);
  // Row `row` of quantize_rows from x [width]; `group` is a multiple of kQuantGroup, or not below `width`; `powers`:
  // scales are powers of two.
  void (*quantize_row)(const float* x, int64_t width, int64_t group, bool powers, const QuantRows& q, int64_t row);
  // Row-wise f32 bodies.
  void (*rms_norm)(const float* x, const float* w, float eps, float offset, int64_t heads, int64_t n, float* y);
  void (*layer_norm)(const float* x, const float* w, const float* b, float eps, int64_t n, float* y);
  void (*activation)(int act, const float* x, int64_t n, float* y);  // act: index into ACTIVATIONS
  void (*glu)(int act, const float* gate, const float* up, int64_t n, float* y);
  void (*add)(const float* a, const float* b, int64_t n, float* y);
  void (*mul)(const float* a, const float* b, int64_t n, float* y);
  void (*scale)(const float* a, float by, int64_t n, float* y);
  void (*soft_cap)(const float* a, float cap, int64_t n, float* y);
  void (*rotary)(int32_t position, const float* inv_freq, float factor, int64_t half, float* cos_sin);
  void (*rope)(const float* x, const float* cos_sin, int64_t heads, int64_t head_dim, int64_t rotary_dim,
               bool interleaved, float* y);
  // One tile of q8_0, q6_0 or q4_0 from x [rows][in], rows <= 16, every element finite.
  void (*quantize_tile)(int format, const float* x, int64_t rows, int64_t in, uint8_t* tile);
  // Further entries (attention over paged blocks, sampling) are added by their owners below this line.
  void (*max)(const float* a, const float* b, int64_t n, float* y);
  void (*normalize)(const float* x, int64_t n, float* y);  // x / max(L2 norm, 1e-12)
  // Puts one row's k [kv_heads * head_dim] and v [kv_heads * v_dim] into slot `slot` of this layer's part of a block;
  // v is not read where the shape has v_from_k.
  void (*store_kv)(const AttentionShape& shape, const float* k, const float* v, uint8_t* block, int slot);
  // All partitions of a task; `scratch` holds attention_scratch(shape, rows) floats.
  void (*attend)(const AttentionTask& task, float* scratch);
  // One unit, counted as units_of does: unmerged results to `partial` [rows * group][partial_pitch(v_dim)].
  void (*attend_partition)(const AttentionTask& task, int unit, float* scratch, float* partial);
  // Largest logit of each kSampleBlock of x [n], NaN where the block holds one; weights e^((x - top) * inverse) and
  // their sum over each block (sampling).
  void (*block_max)(const float* x, int64_t n, float* maxima);
  void (*exp_weights)(const float* x, int64_t n, float top, float inverse, float* w, float* sums);
  // Merges the partials of units [begin, end), each `stride` floats after the one before, and writes y.
  void (*attend_merge)(const AttentionTask& task, int begin, int end, float* partials, int64_t stride);
  // One row of route: logits [experts], correction [experts] or null -> routing [2 * top_k].
  void (*route)(const RouteShape& shape, const float* logits, const float* correction, float* routing);
  // y [n] = the sum of `count` rows [n], each times its weight, in that order.
  void (*weighted_sum)(const float* const* rows, const float* weights, int count, int64_t n, float* y);
  // glu with gate at most `limit`, up within -limit..limit, and `offset` added to up.
  void (*glu_cut)(int act, float limit, float offset, const float* gate, const float* up, int64_t n, float* y);
  // Yardsticks of benchmarks (ops/probe-inl.h): each gives the work it has done; `sink` keeps it from being left out.
  double (*probe_dot)(int64_t loops, int32_t* sink);
  double (*probe_fma)(int64_t loops, int32_t* sink);
  double (*probe_read)(const uint8_t* p, int64_t bytes, int32_t* sink);
  // This layer's part of a whole block of f16 K and V to codes.
  void (*code_block)(const AttentionShape& shape, const uint8_t* block, uint8_t* codes);
};

// A partial result: v_dim sums padded to 16, then the maximum of the scores and the sum of the weights.
constexpr int64_t partial_pitch(int64_t v_dim) { return (v_dim + 15) / 16 * 16 + 16; }

constexpr int kSampleBlock = 256;  // logits that the sampler looks at together
constexpr int kAttentionRows = 8;  // (row, query head) pairs that a body works on at once, at most

// Floats that `attend` and `attend_partition` need: scores and queries, widened K and V, merged and fresh partials.
constexpr int64_t attention_scratch(const AttentionShape& s, int64_t rows) {
  const int64_t pairs = rows * (s.heads / s.kv_heads);
  return kAttentionRows * (kPartition + int64_t{s.head_dim}) + int64_t{kPartition} * (s.head_dim + s.v_dim) + 16 +
         (pairs + kAttentionRows) * partial_pitch(s.v_dim);
}

const Kernels* kernels_scalar();
const Kernels* kernels_avx2();  // null where not compiled in
const Kernels* kernels_avx512();
const Kernels* kernels_neon();

}  // namespace inhouse
