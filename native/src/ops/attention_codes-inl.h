// Coded K and V (kv_codes.h): a block's codes from its f16 form. Every element is rounded by itself, so the bits depend
// on nothing but the block.
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

// Adds sixteen codes of `bits` to the words at `out`, as the one that is `place`-th in them.
IH_INLINE void put_codes(const uint8_t* codes, int64_t bits, int64_t place, uint8_t* out) {
  uint32_t words[16];
  __builtin_memcpy(words, out, sizeof words);
  for (int i = 0; i < 16; ++i) {
    words[i] = (place == 0 ? 0 : words[i]) | static_cast<uint32_t>(codes[i]) << (bits * place);
  }
  __builtin_memcpy(out, words, sizeof words);
}

void code_keys(const KvCodes& c, const uint16_t* k, uint8_t* out) {
  const float levels = c.k_bits == 8 ? 255.0f : 15.0f;
  const int64_t each = 32 / c.k_bits;  // channels of a word
  float* unit = reinterpret_cast<float*>(out);
  uint8_t *scales = out + c.k_params(), *minimums = scales + c.head_dim, *codes = out + c.k_codes();
  channel_params(k, c.head_dim, levels, unit, scales, minimums);
  const bool usable = unit[0] == unit[0];
  for (int64_t d = 0; d < c.head_dim; ++d) {
    uint8_t wide[16] = {};
    if (usable) encode16(load_f16(k + d * kCacheBlock), channel(unit, scales[d], minimums[d]), levels, wide);
    put_codes(wide, c.k_bits, d % each, codes + d / each * 64);
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
  const int64_t groups = c.groups(), each = 32 / c.v_bits;  // positions of a word
  for (int64_t p = 0; p < kCacheBlock; ++p) {
    uint8_t* codes = out + c.v_codes() + p / each * 4 * c.v_row();
    for (int64_t g = 0; g < groups; ++g) {
      const int64_t begin = g * kValueGroup, end = begin + kValueGroup < c.v_dim ? begin + kValueGroup : c.v_dim;
      const Affine wide = value_params(v + p * c.v_dim, begin, end, levels);
      alignas(64) float both[16] = {wide.scale, wide.minimum};
      uint16_t half[16];
      store_f16(half, load(both));
      store(both, load_f16(half));
      params[g * 32 + p] = half[0];
      params[g * 32 + 16 + p] = half[1];
      for (int64_t at = begin; at < end; at += 16) {
        uint8_t made[16] = {};
        if (both[1] == both[1]) encode16(group_part(v + p * c.v_dim, at, end), {both[0], both[1]}, levels, made);
        put_codes(made, c.v_bits, p % each, codes + 4 * at);
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

}  // namespace
}  // namespace inhouse::IH_ISA
