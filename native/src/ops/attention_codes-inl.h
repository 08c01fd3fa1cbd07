// Coded K and V (kv_codes.h): a block's codes from its f16 form, and a partition's codes back to floats. Every element
// is rounded and widened by itself, so the bits depend on nothing but the block.
namespace inhouse::IH_ISA {
namespace {

// code = round((x - minimum) / scale), 0 where the scale is 0.
struct Affine {
  float scale, minimum;
};

IH_INLINE float least(V x) { return -reduce_max(sub(zero(), x)); }

IH_INLINE void encode16(V x, Affine a, float levels, uint8_t* codes) {
  const V inverse = set1(a.scale > 0.0f ? 1.0f / a.scale : 0.0f);
  const V at = min(max(mul(sub(x, set1(a.minimum)), inverse), zero()), set1(levels));
  int8_t shifted[16];
  store_i8(shifted, sub_int(to_int(at), set1_int(128)));
  for (int i = 0; i < 16; ++i) codes[i] = static_cast<uint8_t>(shifted[i] + 128);
}

// The parameters of a channel from its two bytes.
IH_INLINE Affine channel(const float* unit, uint8_t scale, uint8_t minimum) {
  return {unit[0] * static_cast<float>(scale), unit[1] + unit[2] * static_cast<float>(minimum)};
}

// Minimums first, since scales must reach from them to the largest value; both are rounded outwards.
void channel_params(const uint16_t* k, int64_t head_dim, float levels, float* unit, uint8_t* scales,
                    uint8_t* minimums) {
  VI bits = set1_int(0);
  V low = set1(__builtin_inff()), high = set1(-__builtin_inff());
  for (int64_t d = 0; d < head_dim; ++d) {
    const V x = load_f16(k + d * kCacheBlock);
    bits = max_int(bits, magnitude_bits(x));
    const V smallest = set1(least(x));
    low = min(low, smallest);
    high = max(high, smallest);
  }
  const bool finite = is_finite(__builtin_bit_cast(float, reduce_max_int(bits)));
  unit[0] = finite ? 0.0f : __builtin_nanf("");
  unit[1] = finite ? lane0(low) : __builtin_nanf("");
  unit[2] = finite ? (lane0(high) - lane0(low)) / 255.0f : 0.0f;
  unit[3] = 0.0f;
  float widest = 0.0f;
  for (int64_t d = 0; d < head_dim; ++d) {
    const V x = load_f16(k + d * kCacheBlock);
    const float above = least(x) - unit[1];
    minimums[d] = unit[2] > 0.0f ? static_cast<uint8_t>(above / unit[2]) : 0;
    const float wide = (reduce_max(x) - channel(unit, 0, minimums[d]).minimum) / levels;
    if (wide > widest) widest = wide;
  }
  if (finite) unit[0] = widest / 255.0f;
  for (int64_t d = 0; d < head_dim; ++d) {
    const float wide = (reduce_max(load_f16(k + d * kCacheBlock)) - channel(unit, 0, minimums[d]).minimum) / levels;
    const float steps = unit[0] > 0.0f && wide > 0.0f ? wide / unit[0] : 0.0f;
    const int whole = static_cast<int>(steps);
    const int up = whole + (steps > static_cast<float>(whole) ? 1 : 0);
    scales[d] = static_cast<uint8_t>(up < 255 ? up : 255);
  }
}

void code_keys(const KvCodes& c, const uint16_t* k, uint8_t* out) {
  const float levels = c.k_bits == 8 ? 255.0f : 15.0f;
  float* unit = reinterpret_cast<float*>(out);
  uint8_t *scales = out + c.k_params(), *minimums = scales + c.head_dim, *codes = out + c.k_codes();
  channel_params(k, c.head_dim, levels, unit, scales, minimums);
  const bool usable = unit[0] == unit[0];
  for (int64_t d = 0; d < c.head_dim; ++d, codes += 2 * c.k_bits) {
    uint8_t wide[16] = {};
    if (usable) encode16(load_f16(k + d * kCacheBlock), channel(unit, scales[d], minimums[d]), levels, wide);
    for (int p = 0; p < 16 && c.k_bits == 8; ++p) codes[p] = wide[p];
    for (int p = 0; p < 8 && c.k_bits == 4; ++p) codes[p] = static_cast<uint8_t>(wide[p] | wide[p + 8] << 4);
  }
}

// Elements [at, at + 16) of a group that ends at `end`, the last one repeated beyond it.
IH_INLINE V group_part(const uint16_t* v, int64_t at, int64_t end) {
  uint16_t held[16];
  for (int64_t i = 0; i < 16; ++i) held[i] = v[at + i < end ? at + i : end - 1];
  return load_f16(held);
}

Affine value_params(const uint16_t* v, int64_t begin, int64_t end, float levels) {
  V low = group_part(v, begin, end), high = low;
  VI bits = magnitude_bits(low);
  for (int64_t at = begin + 16; at < end; at += 16) {
    const V x = group_part(v, at, end);
    low = min(low, x);
    high = max(high, x);
    bits = max_int(bits, magnitude_bits(x));
  }
  if (!is_finite(__builtin_bit_cast(float, reduce_max_int(bits)))) return {0.0f, __builtin_nanf("")};
  const float minimum = least(low);  // an f16, as all of them are
  return {(reduce_max(high) - minimum) / levels, minimum};
}

void code_values(const KvCodes& c, const uint16_t* v, uint8_t* out) {
  const float levels = c.v_bits == 8 ? 255.0f : 15.0f;
  uint16_t* params = reinterpret_cast<uint16_t*>(out + c.v_params());
  const int64_t groups = c.groups();
  for (int64_t p = 0; p < kCacheBlock; ++p) {
    uint8_t* codes = out + c.v_codes() + (c.v_bits == 8 ? p : p % 8) * c.v_dim;
    for (int64_t g = 0; g < groups; ++g) {
      const int64_t begin = g * kValueGroup, end = begin + kValueGroup < c.v_dim ? begin + kValueGroup : c.v_dim;
      const Affine wide = value_params(v + p * c.v_dim, begin, end, levels);
      alignas(64) float both[16] = {wide.scale, wide.minimum};
      uint16_t half[16];
      store_f16(half, load(both));
      store(both, load_f16(half));
      params[(p * groups + g) * 2] = half[0];
      params[(p * groups + g) * 2 + 1] = half[1];
      for (int64_t at = begin; at < end; at += 16) {
        uint8_t made[16] = {};
        if (both[1] == both[1]) encode16(group_part(v + p * c.v_dim, at, end), {both[0], both[1]}, levels, made);
        for (int64_t i = 0; i < 16 && at + i < end; ++i) {
          codes[at + i] = c.v_bits == 8 || p < 8 ? made[i] : static_cast<uint8_t>(codes[at + i] | made[i] << 4);
        }
      }
    }
  }
}

void code_block(const AttentionShape& s, const uint8_t* block, uint8_t* codes) {
  const KvCodes c = {s.k_bits, s.v_bits, s.head_dim, s.v_dim};
  for (int64_t h = 0; h < s.kv_heads; ++h, block += s.head_bytes, codes += s.far_bytes) {
    const uint16_t* k = reinterpret_cast<const uint16_t*>(block);
    code_keys(c, k, codes);
    code_values(c, k + kCacheBlock * s.head_dim, codes);
  }
}

// Sixteen bytes in one register: what is put together from halves in memory cannot be read back at once.
typedef uint64_t Bytes16 __attribute__((vector_size(16)));
constexpr uint64_t kNibbles = 0x0f0f0f0f0f0f0f0full;

IH_INLINE V decode16(Bytes16 codes, V scale, V minimum) {
  uint8_t held[16];
  __builtin_memcpy(held, &codes, 16);
  return fma(scale, to_float(load_u8(held)), minimum);
}

// Sixteen bytes of which `count` are there.
IH_INLINE Bytes16 load_part(const uint8_t* from, int64_t count) {
  Bytes16 bytes = {0, 0};
  if (count == 16) {
    __builtin_memcpy(&bytes, from, 16);
  } else {
    __builtin_memcpy(&bytes, from, static_cast<size_t>(count));
  }
  return bytes;
}

// K of one block to floats [head_dim][16].
void open_keys(const KvCodes& c, const uint8_t* in, float* out) {
  const float* unit = reinterpret_cast<const float*>(in);
  const uint8_t *scales = in + c.k_params(), *minimums = scales + c.head_dim, *codes = in + c.k_codes();
  alignas(64) float scale[16], minimum[16];
  for (int64_t d = 0; d < c.head_dim; ++d, codes += 2 * c.k_bits) {
    if (d % 16 == 0) {
      const int64_t count = c.head_dim - d < 16 ? c.head_dim - d : 16;
      store(scale, decode16(load_part(scales + d, count), set1(unit[0]), zero()));
      uint8_t held[16];
      const Bytes16 part = load_part(minimums + d, count);
      __builtin_memcpy(held, &part, 16);
      store(minimum, add(set1(unit[1]), mul(set1(unit[2]), to_float(load_u8(held)))));
    }
    Bytes16 wide;
    if (c.k_bits == 4) {
      uint64_t word;
      __builtin_memcpy(&word, codes, 8);
      wide = Bytes16{word & kNibbles, word >> 4 & kNibbles};
    } else {
      __builtin_memcpy(&wide, codes, 16);
    }
    store(out + d * kCacheBlock, decode16(wide, set1(scale[d % 16]), set1(minimum[d % 16])));
  }
}

// V of one block to floats [16][v_dim]. A vector holds the parameters of eight groups.
void open_values(const KvCodes& c, const uint8_t* in, float* out) {
  const int64_t groups = c.groups(), rows = 2 * c.v_bits;
  const uint16_t* params = reinterpret_cast<const uint16_t*>(in + c.v_params());
  for (int64_t p = 0; p < rows; ++p) {
    const uint8_t* codes = in + c.v_codes() + p * c.v_dim;
    alignas(64) float pairs[2][16];
    for (int64_t at = 0; at < c.v_dim; at += 16) {
      const int64_t count = c.v_dim - at < 16 ? c.v_dim - at : 16, g = at / kValueGroup;
      if (at % (8 * kValueGroup) == 0) {  // what lies beyond a row's own parameters is the next row's, or codes
        store(pairs[0], load_f16(params + (p * groups + g) * 2));
        if (c.v_bits == 4) store(pairs[1], load_f16(params + ((p + 8) * groups + g) * 2));
      }
      const Bytes16 both = load_part(codes + at, count);
      const float *near = pairs[0] + g % 8 * 2, *far = pairs[1] + g % 8 * 2;
      float* row = out + p * c.v_dim + at;
      if (c.v_bits == 8) {
        store_n(row, count, decode16(both, set1(near[0]), set1(near[1])));
        continue;
      }
      store_n(row, count, decode16(both & kNibbles, set1(near[0]), set1(near[1])));
      store_n(row + 8 * c.v_dim, count, decode16(both >> 4 & kNibbles, set1(far[0]), set1(far[1])));
    }
  }
}

// The far partition's K and V as floats.
Tiles<float> open_codes(const AttentionTask& task, int partition, float* out) {
  const AttentionShape& s = *task.shape;
  const KvCodes c = {s.k_bits, s.v_bits, s.head_dim, s.v_dim};
  const int64_t end = far_end(s, task.position + task.rows - 1) / kCacheBlock;
  Tiles<float> wide = {};
  for (int b = 0; b < kPartitionBlocks; ++b, out += kCacheBlock * (static_cast<int64_t>(s.head_dim) + s.v_dim)) {
    const int64_t column = static_cast<int64_t>(partition) * kPartitionBlocks + b;
    if (column >= end) break;
    const uint8_t* at = task.far_blocks + task.far_table[column] * task.far_stride + task.kv_head * s.far_bytes;
    open_keys(c, at, out);
    open_values(c, at, out + kCacheBlock * s.head_dim);
    wide.k[b] = out;
    wide.v[b] = out + kCacheBlock * s.head_dim;
  }
  return wide;
}

}  // namespace
}  // namespace inhouse::IH_ISA
