// Where the parts of a kv head's block of coded K and V lie. Knows sizes, no arithmetic.
//
// K has a scale and a minimum for each channel over the block's sixteen positions (KIVI, arXiv 2402.02750), both 8-bit
// multiples of the head's own: key = minimum + scale * code. V has them, in f16, for each position and kValueGroup
// elements. Codes of 4 bits: one byte holds positions p (low half) and p + 8.
//   floats: scale unit, least minimum, minimum unit, 0     f32 [4]
//   V scales and minimums                                  f16 [16][groups][2]
//   K codes                                                [head_dim][16 positions]
//   V codes                                                [16 positions][v_dim], of 4 bits [8][v_dim]
//   K scales, K minimums                                   u8 [head_dim] each
#pragma once
#include <cstdint>

namespace inhouse {

constexpr int64_t kValueGroup = 32;

struct KvCodes {
  int64_t k_bits, v_bits, head_dim, v_dim;

  constexpr int64_t groups() const { return (v_dim + kValueGroup - 1) / kValueGroup; }
  constexpr int64_t v_params() const { return 16; }
  constexpr int64_t k_codes() const { return v_params() + 64 * groups(); }
  constexpr int64_t v_codes() const { return k_codes() + 2 * k_bits * head_dim; }
  constexpr int64_t k_params() const { return v_codes() + 2 * v_bits * v_dim; }
  constexpr int64_t bytes() const { return (k_params() + 2 * head_dim + 15) / 16 * 16; }
};

}  // namespace inhouse
