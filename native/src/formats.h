// The table of packed weight formats and where the parts of a tile lie: the same numbers as runtime/packed_layout.py,
// which describes the layout in full. A test holds the two together.
#pragma once
#include <cstdint>

namespace inhouse {

enum Scalar : uint8_t { kF32, kF16, kBF16 };

struct Format {
  const char* name;
  int low, high;  // bits of a code in the low and in the high plane; low 0: a float format
  int zero;       // code that means 0
  int group;      // inputs that share a scale; 0: the whole row
  Scalar scale;   // of scale and minimum; of the weights in a float format
  bool minimum, two_level;
};

constexpr Format kFormats[] = {
    {"f32", 0, 0, 0, 0, kF32, false, false},    {"f16", 0, 0, 0, 0, kF16, false, false},
    {"bf16", 0, 0, 0, 0, kBF16, false, false},  {"q8_0", 8, 0, 128, 32, kF16, false, false},
    {"q4_0", 4, 0, 8, 32, kF16, false, false},  {"q4_1", 4, 0, 0, 32, kF16, true, false},
    {"q5_0", 4, 1, 16, 32, kF16, false, false}, {"q5_1", 4, 1, 0, 32, kF16, true, false},
    {"q2_k", 2, 0, 0, 16, kF16, true, true},    {"q3_k", 2, 1, 4, 16, kF16, false, true},
    {"q4_k", 4, 0, 0, 32, kF16, true, true},    {"q5_k", 4, 1, 0, 32, kF16, true, true},
    {"q6_k", 4, 2, 32, 16, kF16, false, true},  {"u4_g32", 4, 0, 0, 32, kF32, true, false},
    {"u4_g64", 4, 0, 0, 64, kF32, true, false}, {"u4_g128", 4, 0, 0, 128, kF32, true, false},
    {"u4_row", 4, 0, 0, 0, kF32, true, false},  {"u8_g32", 8, 0, 0, 32, kF32, true, false},
    {"u8_g64", 8, 0, 0, 64, kF32, true, false}, {"u8_g128", 8, 0, 0, 128, kF32, true, false},
    {"u8_row", 8, 0, 0, 0, kF32, true, false},
};
constexpr int kFormatCount = sizeof kFormats / sizeof kFormats[0];

constexpr int kBlock = 32;            // inputs of a code block
constexpr int kSuper = 256;           // inputs of a two-level super-block
constexpr int64_t kMaxGroups = 4096;  // (blocks or groups of 16) in a row: what a body prepares on its stack

// Offsets from the start of a tile, in bytes; 0 for a section that the format lacks (only the first can be at 0).
struct Layout {
  int64_t width, blocks, groups, supers;
  int64_t scale, minimum, sub_scale, sub_minimum, low, high;  // float formats: weights at 0
  int64_t tile_bytes;
  bool valid;
};

constexpr int64_t padded(int64_t bytes) { return (bytes + 63) / 64 * 64; }

// `valid` is false where `in` does not fit the format.
constexpr Layout layout_of(const Format& f, int64_t in) {
  Layout l = {};
  const int64_t item = f.scale == kF32 ? 4 : 2;
  l.valid = in > 0;
  if (f.low == 0) {
    l.width = in;
    l.tile_bytes = padded(in * 16 * item);
    return l;
  }
  l.width = (in + kBlock - 1) / kBlock * kBlock;
  l.blocks = l.width / kBlock;
  const int64_t unit = f.two_level ? kSuper : f.group > kBlock ? f.group : kBlock;
  l.valid = l.valid && l.width % unit == 0 && l.blocks * (f.group == 16 ? 2 : 1) <= kMaxGroups;
  l.groups = f.group ? l.width / f.group : 1;
  l.supers = f.two_level ? l.width / kSuper : l.groups;
  int64_t at = padded(l.supers * 16 * item);
  if (f.minimum) {
    l.minimum = at;
    at += padded(l.supers * 16 * item);
  }
  if (f.two_level) {
    l.sub_scale = at;
    at += padded(l.groups * 16);
    if (f.minimum) {
      l.sub_minimum = at;
      at += padded(l.groups * 16);
    }
  }
  l.low = at;
  at += l.blocks * f.low * 64;
  if (f.high) {
    l.high = at;
    at += l.blocks * f.high * 64;
  }
  l.tile_bytes = at;
  return l;
}

constexpr int64_t packed_bytes(const Format& f, int64_t out, int64_t in) {
  return (out + 15) / 16 * layout_of(f, in).tile_bytes;
}

}  // namespace inhouse
