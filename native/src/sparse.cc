#include "sparse.h"

#include <cstring>

namespace inhouse {

namespace {

constexpr int64_t kEnd = 64;  // bytes after the last tile, for whole loads

int64_t ones(const uint8_t* p, int64_t bytes) {
  int64_t n = 0;
  for (int64_t i = 0; i < bytes; i += 8) {
    uint64_t word;
    std::memcpy(&word, p + i, 8);
    n += __builtin_popcountll(word);
  }
  return n;
}

// Values of a kMask tile, in bytes.
int64_t mask_values(const Format& f, const uint8_t* mask, int64_t blocks) {
  int64_t low = 0, high = 0;
  for (int64_t b = 0; b < blocks; ++b) {
    low += ones(mask + 64 * b, 32);
    high += ones(mask + 64 * b + 32, 32);
  }
  return f.low == 8 ? low + high : low > high ? low : high;
}

const char* columns_fault(const Format& f, const Layout& l, int64_t in, const uint8_t* tile, int64_t bytes) {
  const int64_t at = l.low + padded(17 * 4);
  if (bytes < at) return "a tile without its rows";
  uint32_t starts[17];
  std::memcpy(starts, tile + l.low, sizeof starts);
  for (int r = 0; r < 16; ++r) {
    if (starts[0] != 0 || starts[r + 1] < starts[r]) return "rows that do not follow one another";
  }
  const int64_t count = starts[16];
  if (count > 16 * in || bytes != at + padded(2 * count) + padded(count * (f.low ? 1 : 2))) {
    return "columns that do not fit its values";
  }
  for (int r = 0; r < 16; ++r) {
    int32_t before = -1;
    for (int64_t i = starts[r]; i < starts[r + 1]; ++i) {
      uint16_t column;
      std::memcpy(&column, tile + at + 2 * i, 2);
      if (column >= in || column <= before) return "columns that do not ascend within the matrix";
      before = column;
    }
  }
  return nullptr;
}

}  // namespace

const char* coded_fault(const Weight& w) {
  const Format& f = kFormats[w.format];
  const Layout l = layout_of(f, w.in);
  const int64_t tiles = (w.out + 15) / 16, head = head_bytes(f, w.out), bytes = static_cast<int64_t>(w.bytes);
  if (!is_variable(f)) return bytes < head + tiles * l.tile_bytes ? "fewer bytes than its shape needs" : nullptr;
  if (bytes < head + kEnd) return "fewer bytes than its shape needs";
  int64_t start = tile_start(w, l, 0);
  if (start != head) return "a table of tiles that leads out of it";
  for (int64_t t = 0; t < tiles; ++t) {
    const int64_t end = tile_start(w, l, t + 1), size = end - start;
    if (end > bytes - kEnd || end % 64 != 0 || size < l.low || size > l.tile_bytes) {
      return "a table of tiles that leads out of it";
    }
    const uint8_t* tile = w.data + start;
    if (f.coding == kColumns) {
      const char* fault = columns_fault(f, l, w.in, tile, size);
      if (fault != nullptr) return fault;
    } else if (size < l.high || size != l.high + padded(mask_values(f, tile + l.low, l.blocks))) {
      return "a mask that does not fit its values";
    }
    start = end;
  }
  return nullptr;
}

}  // namespace inhouse
