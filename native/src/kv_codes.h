// Where the parts of a kv head's block of coded K and V lie. Knows sizes, no arithmetic.
//
// K has a scale and a minimum for each channel over the block's sixteen positions (KIVI, arXiv 2402.02750), both 8-bit
// multiples of the head's own: key = minimum + scale * code. V has them, in f16, for each position and kValueGroup
// elements. A 32-bit word holds as many codes as it has room for, the first one lowest: of K sixteen words side by
// side, one for each position, hold the next channels; of V a word for each element holds the next positions.
//   floats: scale unit, least minimum, minimum unit, 0     f32 [4]
//   V scales and minimums                                  f16 [groups][2][16 positions]
//   K codes                                                u32 [channels / codes of a word][16 positions]
//   V codes                                                u32 [16 positions / codes of a word][v_dim in whole vectors]
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
  constexpr int64_t k_words() const { return (head_dim * k_bits + 31) / 32; }  // vectors of them
  constexpr int64_t v_words() const { return 16 * v_bits / 32; }               // rows of v_row() words
  constexpr int64_t v_row() const { return (v_dim + 15) / 16 * 16; }
  constexpr int64_t v_codes() const { return k_codes() + 64 * k_words(); }
  constexpr int64_t k_params() const { return v_codes() + 4 * v_words() * v_row(); }
  constexpr int64_t bytes() const { return (k_params() + 2 * head_dim + 15) / 16 * 16; }
};

}  // namespace inhouse
