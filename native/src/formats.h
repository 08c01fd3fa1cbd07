// The table of packed weight formats and where the parts of a tile lie: the same numbers as runtime/packed_layout.py,
// which describes the layout in full. A test holds the two together.
#pragma once
#include <cstdint>

namespace inhouse {

enum Scalar : uint8_t { kF32, kF16, kBF16, kE8M0 };  // kE8M0: a byte e that means 2^(e - 128)

// What a code means: itself, a byte of kCodeTables, or a float (of kFloatTables, or of one byte); then activations are
// floats, too.
enum Table : uint8_t { kPlain, kIQ4, kE2M1, kLog4, kNF4, kFP4, kE4M3, kE5M2 };

// How the codes are kept: all of them; or of sparse and vector-coded matrices, which runtime/packed_expand.py
// describes.
enum Coding : uint8_t { kDense, kMask, kPairs, kVectors, kColumns };

struct Format {
  const char* name;
  int low, high;  // bits of a code in the low and in the high plane; low 0: a float format
  int zero;       // code that means 0
  int group;      // inputs that share a scale; 0: the whole row
  Scalar scale;   // of scale and minimum; of the weights in a float format
  bool minimum, two_level;
  Table table = kPlain;
  bool zeros = false;   // each group has a zero point, int8, taken off the code
  bool family = false;  // bodies made for one of these serve all that differ in `group` and `scale` alone
  Coding coding = kDense;
  int base = 0;   // of a coding: the dense format that holds the same values
  int books = 0;  // of kVectors: codebooks whose entries add up
};

// Sub-scales are int8; where d is one f32 a row they are unsigned e4m3 bytes.
constexpr bool float_subs(const Format& f) { return f.two_level && f.scale == kF32; }
// Formats whose weights meet int8 activations; others are multiplied with floats.
constexpr bool takes_int8(const Format& f) { return f.low > 0 && f.table < kNF4 && f.coding != kColumns; }
// Formats whose codes are numbers of a byte table.
constexpr bool looks_up_bytes(const Format& f) { return f.table != kPlain && f.table < kNF4; }
// Codes of 8 bits once looked up: the wide dot product.
constexpr bool is_wide(const Format& f) { return f.low == 8 || f.table == kIQ4 || f.table == kLog4; }
// What quantize_tile makes: groups of 32 with one f16 scale and codes around zero, of 8, 6 or 4 bits.
constexpr bool can_quantize(const Format& f) {
  const int bits = f.low + f.high;
  return f.table == kPlain && f.scale == kF16 && f.group == 32 && !f.minimum && !f.two_level && !f.family &&
         f.zero == 1 << (bits - 1) && bits != 5;
}
constexpr int scalar_bytes(Scalar s) { return s == kF32 ? 4 : s == kE8M0 ? 1 : 2; }

// [table - kIQ4]: the meaning of each code with `zero` added. IQ4_NL's levels; twice the values of e2m1; powers of two.
alignas(64) constexpr uint8_t kCodeTables[3][16] = {
    {1, 24, 45, 63, 79, 93, 106, 118, 129, 141, 153, 166, 181, 197, 217, 241},
    {12, 13, 14, 15, 16, 18, 20, 24, 12, 11, 10, 9, 8, 6, 4, 0},
    {128, 129, 130, 132, 136, 144, 160, 192, 128, 127, 126, 124, 120, 112, 96, 64},
};
// [table - kNF4]: the levels of bitsandbytes' NF4 (Dettmers et al. 2023, arXiv 2305.14314) and FP4.
alignas(64) constexpr float kFloatTables[2][16] = {
    {-1.0f, -0.6961928009986877f, -0.5250730514526367f, -0.39491748809814453f, -0.28444138169288635f,
     -0.18477343022823334f, -0.09105003625154495f, 0.0f, 0.07958029955625534f, 0.16093020141124725f,
     0.24611230194568634f, 0.33791524171829224f, 0.44070982933044434f, 0.5626170039176941f, 0.7229568362236023f, 1.0f},
    {0.0f, 0.005208333333f, 0.66666667f, 1.0f, 0.33333333f, 0.5f, 0.16666667f, 0.25f, -0.0f, -0.005208333333f,
     -0.66666667f, -1.0f, -0.33333333f, -0.5f, -0.16666667f, -0.25f},
};

// The twelve formats of a family: groups of 32, 64, 128 or the row, scales of f16, bf16 or f32.
#define IH_SCALES(NAME, LOW, HIGH, ZERO, GROUP, ZEROS)                                    \
  {NAME, LOW, HIGH, ZERO, GROUP, kF16, false, false, kPlain, ZEROS, true},                \
      {NAME "_bf16", LOW, HIGH, ZERO, GROUP, kBF16, false, false, kPlain, ZEROS, true}, { \
    NAME "_f32", LOW, HIGH, ZERO, GROUP, kF32, false, false, kPlain, ZEROS, true          \
  }
#define IH_FAMILY(NAME, LOW, HIGH, ZERO, ZEROS)                                                           \
  IH_SCALES(NAME "_g32", LOW, HIGH, ZERO, 32, ZEROS), IH_SCALES(NAME "_g64", LOW, HIGH, ZERO, 64, ZEROS), \
      IH_SCALES(NAME "_g128", LOW, HIGH, ZERO, 128, ZEROS), IH_SCALES(NAME "_row", LOW, HIGH, ZERO, 0, ZEROS)

// Four formats with the values of the f16 members of the family that begins at BASE.
#define IH_CODED(NAME, LOW, ZERO, CODING, BASE, BOOKS)                                                        \
  {NAME "_g32", LOW, 0, ZERO, 32, kF16, false, false, kPlain, false, false, CODING, BASE, BOOKS},             \
      {NAME "_g64", LOW, 0, ZERO, 64, kF16, false, false, kPlain, false, false, CODING, BASE + 3, BOOKS},     \
      {NAME "_g128", LOW, 0, ZERO, 128, kF16, false, false, kPlain, false, false, CODING, BASE + 6, BOOKS}, { \
    NAME "_row", LOW, 0, ZERO, 0, kF16, false, false, kPlain, false, false, CODING, BASE + 9, BOOKS           \
  }

constexpr Format kFormats[] = {
    {"f32", 0, 0, 0, 0, kF32, false, false},
    {"f16", 0, 0, 0, 0, kF16, false, false},
    {"bf16", 0, 0, 0, 0, kBF16, false, false},
    {"q8_0", 8, 0, 128, 32, kF16, false, false},
    {"q4_0", 4, 0, 8, 32, kF16, false, false},
    {"q4_1", 4, 0, 0, 32, kF16, true, false},
    {"q5_0", 4, 1, 16, 32, kF16, false, false},
    {"q5_1", 4, 1, 0, 32, kF16, true, false},
    {"q2_k", 2, 0, 0, 16, kF16, true, true},
    {"q3_k", 2, 1, 4, 16, kF16, false, true},
    {"q4_k", 4, 0, 0, 32, kF16, true, true},
    {"q5_k", 4, 1, 0, 32, kF16, true, true},
    {"q6_k", 4, 2, 32, 16, kF16, false, true},
    {"f8_e4m3_g32", 8, 0, 0, 32, kF32, false, false, kE4M3},
    {"f8_e4m3_g128", 8, 0, 0, 128, kF32, false, false, kE4M3},
    {"f8_e4m3_row", 8, 0, 0, 0, kF32, false, false, kE4M3},
    {"f8_e5m2_g128", 8, 0, 0, 128, kF32, false, false, kE5M2},
    {"f8_e5m2_row", 8, 0, 0, 0, kF32, false, false, kE5M2},
    IH_SCALES("i8_token", 8, 0, 128, 0, false),
    {"iq4_nl", 4, 0, 128, 32, kF16, false, false, kIQ4},
    {"iq4_xs", 4, 0, 128, 32, kF16, false, true, kIQ4},
    {"mxfp4", 4, 0, 12, 32, kE8M0, false, false, kE2M1},
    {"nvfp4", 4, 0, 12, 16, kF32, false, true, kE2M1},
    {"tq2_0", 2, 0, 1, 256, kF16, false, false},
    {"nf4_g64", 4, 0, 0, 64, kF32, false, false, kNF4},
    {"fp4_g64", 4, 0, 0, 64, kF32, false, false, kFP4},
    {"q6_0", 4, 2, 32, 32, kF16, false, false},
    IH_FAMILY("i4", 4, 0, 8, false),
    IH_FAMILY("i8", 8, 0, 128, false),
    IH_FAMILY("u2", 2, 0, 0, true),
    IH_FAMILY("u3", 2, 1, 0, true),
    IH_FAMILY("u4", 4, 0, 0, true),
    IH_FAMILY("u8", 8, 0, 128, true),
    {"log4_g32", 4, 0, 128, 32, kF16, false, false, kLog4},
    IH_CODED("s8", 8, 128, kMask, 41, 0),
    IH_CODED("s4", 4, 8, kMask, 29, 0),
    IH_CODED("p8", 8, 128, kPairs, 41, 0),
    IH_CODED("p4", 4, 8, kPairs, 29, 0),
    IH_CODED("vq1", 8, 128, kVectors, 41, 1),
    IH_CODED("vq2", 8, 128, kVectors, 41, 2),
    IH_CODED("vq3", 8, 128, kVectors, 41, 3),
    {"csr_i8", 8, 0, 128, 0, kF16, false, false, kPlain, false, false, kColumns, 50, 0},
    {"csr_bf16", 0, 0, 0, 0, kBF16, false, false, kPlain, false, false, kColumns, 2, 0},
};
#undef IH_CODED
#undef IH_FAMILY
#undef IH_SCALES
constexpr int kBf16Format = 2;
constexpr int kFormatCount = sizeof kFormats / sizeof kFormats[0];

constexpr int kBlock = 32;            // inputs of a code block
constexpr int kSuper = 256;           // inputs of a two-level super-block
constexpr int64_t kMaxGroups = 4096;  // (blocks or groups of 16) in a row: what a body prepares on its stack
constexpr int kVector = 8;            // inputs of an entry of a codebook
constexpr int kBook = 256;            // entries of a codebook
// Inputs of a coded matrix: a tile of its base is then within what a body unpacks on its stack.
constexpr int64_t kCodedInputs = 61440;
constexpr int64_t kUnpackedBytes = int64_t{1} << 20;

// The format whose bodies serve this one.
constexpr int body_of(int format) {
  if (format >= 101) return format;  // coded ones have bodies of their own (sparse-inl.h)
  if (format >= 29) return format - (format - 29) % 12;
  if (format >= 18 && format <= 20) return 41;  // i8_token: i8
  if (format == 14 || format == 15) return 13;
  return format == 17 ? 16 : format;
}

// Offsets from the start of a tile, in bytes; 0 for a section that the format lacks (only the first can be at 0).
struct Layout {
  int64_t width, blocks, groups, supers;
  int64_t scale, zeros, minimum, sub_scale, sub_minimum, low, high;  // float formats: weights at 0
  int64_t tile_bytes;
  bool valid;
};

constexpr int64_t padded(int64_t bytes) { return (bytes + 63) / 64 * 64; }

// Tiles of kMask and kColumns differ in length; a table in front of them says where each begins.
constexpr bool is_variable(const Format& f) { return f.coding == kMask || f.coding == kColumns; }

// Bytes in front of the tiles of a coded matrix: that table, or codebooks.
constexpr int64_t head_bytes(const Format& f, int64_t out) {
  return is_variable(f) ? padded(8 * ((out + 15) / 16 + 1)) : int64_t{f.books} * kBook * kVector;
}

// A coded format: `low` is where masks, indices or starts of rows lie, `high` where values follow them (of kPairs and
// kMask); `tile_bytes` is that of formats whose tiles are alike, else the most.
constexpr Layout coded_layout(const Format& f, int64_t in) {
  Layout l = {};
  l.width = f.coding == kColumns ? in : (in + kBlock - 1) / kBlock * kBlock;
  l.valid = in > 0 && in <= kCodedInputs;
  l.blocks = (l.width + kBlock - 1) / kBlock;
  l.groups = l.supers = f.group && f.coding != kColumns ? (l.width + f.group - 1) / f.group : 1;
  l.low = f.low ? padded(l.groups * 16 * scalar_bytes(f.scale)) : 0;
  if (f.coding == kColumns) {
    l.tile_bytes = l.low + padded(17 * 4) + padded(32 * in) + padded((f.low ? 16 : 32) * in);
  } else if (f.coding == kVectors) {
    l.tile_bytes = l.low + padded(l.width / kVector * f.books * 16);
  } else {
    l.high = l.low + l.blocks * 64;
    l.tile_bytes = l.high + l.blocks * f.low * (f.coding == kPairs ? 32 : 64);
  }
  return l;
}

// `valid` is false where `in` does not fit the format.
constexpr Layout layout_of(const Format& f, int64_t in) {
  if (f.coding != kDense) return coded_layout(f, in);
  Layout l = {};
  const int64_t item = scalar_bytes(f.scale);
  l.valid = in > 0;
  if (f.low == 0) {
    l.width = in;
    l.tile_bytes = padded(in * 16 * item);
    return l;
  }
  l.width = (in + kBlock - 1) / kBlock * kBlock;
  l.blocks = l.width / kBlock;
  const bool supers = f.two_level && !float_subs(f);
  l.valid = l.valid && (!supers || l.width % kSuper == 0) && l.blocks * (f.group == 16 ? 2 : 1) <= kMaxGroups;
  l.groups = f.group ? (l.width + f.group - 1) / f.group : 1;  // the last one may have fewer blocks
  l.supers = float_subs(f) ? 1 : supers ? l.width / kSuper : l.groups;
  int64_t at = padded(l.supers * 16 * item);
  if (f.zeros) {
    l.zeros = at;
    at += padded(l.groups * 16);
  }
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

// Bytes of a matrix; of one whose tiles differ, the most.
constexpr int64_t packed_bytes(const Format& f, int64_t out, int64_t in) {
  return (f.coding != kDense ? head_bytes(f, out) : 0) + (out + 15) / 16 * layout_of(f, in).tile_bytes +
         (is_variable(f) ? 64 : 0);
}

}  // namespace inhouse
