// Vocabulary of sparse and vector-coded weights in plain C++. Included after simd/scalar_bytes.h.
#pragma once

namespace inhouse::IH_ISA {
namespace {

IH_CALLED int64_t ones(uint64_t mask) { return __builtin_popcountll(mask); }
IH_CALLED B fill_bytes(uint8_t v) {
  return each_byte([=](int) { return v; });
}
IH_CALLED void store_bytes(uint8_t* p, B v) { __builtin_memcpy(p, v.v, 64); }
IH_CALLED B add_bytes(B a, B b) {
  return each_byte([&](int i) { return a.v[i] + b.v[i]; });
}
IH_CALLED B flip_bytes(B a) {
  return each_byte([&](int i) { return a.v[i] ^ 128; });
}
// As simd/avx512_expand.h says; loads no more than is used.
template <class F>
IH_CALLED B expand_with(uint64_t mask, B fill, F next) {
  for (int i = 0; i < 64; ++i) {
    if (mask >> i & 1) fill.v[i] = static_cast<uint8_t>(next());
  }
  return fill;
}
IH_CALLED B expand(uint64_t mask, const uint8_t* p, B fill) {
  return expand_with(mask, fill, [&] { return *p++; });
}
template <int SHIFT>
IH_CALLED B expand_nibbles(uint64_t mask, const uint8_t* p, B fill) {
  return expand_with(mask, fill, [&] { return *p++ >> SHIFT & 15; });
}
// A mask that a file got wrong may have more bits than there are values: 32, whatever it says.
IH_CALLED B expand_pairs(uint64_t mask, const uint8_t* p, B fill) {
  const uint8_t* end = p + 32;
  return expand_with(mask, fill, [&] { return p < end ? *p++ : 0; });
}
template <int SHIFT>
IH_CALLED B expand_nibble_pairs(uint64_t mask, const uint8_t* p, B fill) {
  const uint8_t* end = p + 32;
  return expand_with(mask, fill, [&] { return p < end ? *p++ >> SHIFT & 15 : 0; });
}

IH_CALLED void entries(const uint8_t* book, const uint8_t* index, B* first, B* second) {
  for (int i = 0; i < 64; ++i) {
    const uint8_t* entry = book + 8 * index[i / 4];
    first->v[i] = entry[i % 4];
    second->v[i] = entry[4 + i % 4];
  }
}

IH_CALLED V gather(const float* x, const uint8_t* columns, int64_t n) {
  V r = zero();
  for (int64_t i = 0; i < n && i < 16; ++i) {
    uint16_t column;
    __builtin_memcpy(&column, columns + 2 * i, 2);
    r.v[i] = x[column];
  }
  return r;
}
IH_CALLED V load_values_i8(const uint8_t* p) {
  return each([=](int i) { return static_cast<float>(static_cast<int8_t>(p[i])); });
}
IH_CALLED V load_values_bf16(const uint8_t* p) {
  uint16_t found[16];
  __builtin_memcpy(found, p, sizeof found);
  return load_bf16(found);
}
// The sums of a quad with four codes of activations.
template <class D>
IH_INLINE void add_four(D& dots, B quad, const int8_t* four) {
  int32_t codes;
  __builtin_memcpy(&codes, four, 4);
  dots.add(quad, codes);
}

}  // namespace
}  // namespace inhouse::IH_ISA
