// For levels that cannot expand bytes by a mask: shuffles by eight bits of it. Included inside an ISA namespace's file.
#pragma once
#include <cstdint>

namespace inhouse::IH_ISA {
namespace {

struct ExpandTable {
  uint8_t first[256][8];   // place i: how many bits below i are set, or 128 where bit i is not set
  uint8_t second[256][8];  // the same for eight bytes that begin at byte 8 of a register
  uint8_t ones[256];
};

constexpr ExpandTable expand_table() {
  ExpandTable t = {};
  for (int m = 0; m < 256; ++m) {
    uint8_t n = 0;
    for (int i = 0; i < 8; ++i) {
      const bool set = (m >> i & 1) != 0;
      t.first[m][i] = set ? n : 128;
      t.second[m][i] = set ? static_cast<uint8_t>(n + 8) : 128;
      n = static_cast<uint8_t>(n + (set ? 1 : 0));
    }
    t.ones[m] = n;
  }
  return t;
}
alignas(64) constexpr ExpandTable kExpand = expand_table();

}  // namespace
}  // namespace inhouse::IH_ISA
