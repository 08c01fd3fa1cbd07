// Sparse and vector-coded weights at every level that this machine runs: against a dense matrix that a reader of this
// file's own made of them, bit by bit; columns against a sum in their order; the same bits for any number of rows and
// any split of tiles; damaged matrices are refused, or run without leaving their bytes (sanitizers look on).
#include "sparse.h"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <string>
#include <vector>

#include "check.h"
#include "dispatch.h"
#include "formats.h"
#include "kernels.h"

using namespace inhouse;

namespace {

int failures = 0;

void check(bool ok, const std::string& what) {
  if (ok) return;
  if (++failures <= 20) std::printf("FAILED %s\n", what.c_str());
}

struct Aligned {  // 64-byte aligned bytes, exactly as many as asked for, so that a sanitizer sees every overrun
  explicit Aligned(size_t n) : bytes(n), data(static_cast<uint8_t*>(std::aligned_alloc(64, (n + 63) / 64 * 64))) {}
  Aligned(Aligned&& o) : bytes(o.bytes), data(o.data) { o.data = nullptr; }
  ~Aligned() { std::free(data); }
  size_t bytes;
  uint8_t* data;
};

struct Sparse {
  Aligned bytes;
  Weight weight;
};

void put_scales(uint8_t* at, int64_t count, std::mt19937& rng) {
  for (int64_t i = 0; i < count; ++i) {
    const uint16_t half = static_cast<uint16_t>((rng() & 0x83ff) | (rng() % 12 + 4) << 10);
    std::memcpy(at + 2 * i, &half, 2);
  }
}

std::vector<uint8_t> mask_tile(const Format& f, const Layout& l, int kept, std::mt19937& rng) {
  std::vector<uint8_t> tile(static_cast<size_t>(l.tile_bytes));
  put_scales(tile.data(), l.groups * 16, rng);
  int64_t half[2] = {0, 0};
  for (int64_t i = 0; i < 8 * l.blocks; ++i) {
    uint64_t mask = 0;
    for (int k = 0; k < 64; ++k) mask |= uint64_t{static_cast<int>(rng() % 100) < kept} << k;
    if (f.coding == kPairs) {
      constexpr uint64_t two[6] = {3, 5, 6, 9, 10, 12};
      mask = 0;
      for (int k = 0; k < 16; ++k) mask |= two[rng() % 6] << (4 * k);
    }
    std::memcpy(&tile[static_cast<size_t>(l.low + 8 * i)], &mask, 8);
    half[i % 8 / 4] += __builtin_popcountll(mask);
  }
  const int64_t values = f.low == 8 ? half[0] + half[1] : std::max(half[0], half[1]);
  for (int64_t i = 0; i < values; ++i) tile[static_cast<size_t>(l.high + i)] = static_cast<uint8_t>(rng());
  tile.resize(static_cast<size_t>(l.high + padded(values)));
  return tile;
}

std::vector<uint8_t> columns_tile(const Format& f, const Layout& l, int64_t in, int kept, std::mt19937& rng) {
  std::vector<uint16_t> columns;
  uint32_t starts[17] = {};
  for (int r = 0; r < 16; ++r) {
    for (int64_t k = 0; k < in; ++k) {
      if (static_cast<int>(rng() % 100) < kept) columns.push_back(static_cast<uint16_t>(k));
    }
    starts[r + 1] = static_cast<uint32_t>(columns.size());
  }
  const int64_t count = starts[16], at = l.low + padded(sizeof starts), values = at + padded(2 * count);
  std::vector<uint8_t> tile(static_cast<size_t>(values + padded(count * (f.low ? 1 : 2))));
  if (f.low) put_scales(tile.data(), 16, rng);
  std::memcpy(&tile[static_cast<size_t>(l.low)], starts, sizeof starts);
  if (count) std::memcpy(&tile[static_cast<size_t>(at)], columns.data(), static_cast<size_t>(2 * count));
  for (int64_t i = 0; i < count; ++i) {
    const uint16_t brain = static_cast<uint16_t>((rng() & 0x8000) | 0x3e00 | (rng() & 0x1ff));
    if (f.low) {
      tile[static_cast<size_t>(values + i)] = static_cast<uint8_t>(rng());
    } else {
      std::memcpy(&tile[static_cast<size_t>(values + 2 * i)], &brain, 2);
    }
  }
  return tile;
}

Sparse make(int format, int64_t out, int64_t in, int kept, std::mt19937& rng) {
  const Format& f = kFormats[format];
  const Layout l = layout_of(f, in);
  const int64_t tiles = (out + 15) / 16, head = head_bytes(f, out);
  std::vector<uint8_t> all(static_cast<size_t>(head));
  for (int64_t i = 0; f.coding == kVectors && i < head; ++i) all[static_cast<size_t>(i)] = static_cast<uint8_t>(rng());
  for (int64_t t = 0; t < tiles; ++t) {
    const int64_t start = static_cast<int64_t>(all.size());
    std::vector<uint8_t> tile(static_cast<size_t>(l.tile_bytes));
    if (f.coding == kColumns) {
      tile = columns_tile(f, l, in, kept, rng);
    } else if (f.coding != kVectors) {
      tile = mask_tile(f, l, kept, rng);
    } else {
      for (uint8_t& byte : tile) byte = static_cast<uint8_t>(rng());
      put_scales(tile.data(), l.groups * 16, rng);
    }
    all.insert(all.end(), tile.begin(), tile.end());
    const int64_t end = static_cast<int64_t>(all.size());
    if (is_variable(f)) {
      std::memcpy(&all[static_cast<size_t>(8 * t)], &start, 8);
      std::memcpy(&all[static_cast<size_t>(8 * t + 8)], &end, 8);
    }
  }
  if (is_variable(f)) all.resize(all.size() + 64);
  Sparse s = {Aligned(all.size()), {}};
  std::memcpy(s.bytes.data, all.data(), all.size());
  s.weight = {format, out, in, s.bytes.data, all.size()};
  return s;
}

// The base matrix of masks, 2:4 and vectors, code by code.
Sparse dense_of(const Weight& w) {
  const Format& f = kFormats[w.format];
  const Format& g = kFormats[f.base];
  const Layout l = layout_of(f, w.in), base = layout_of(g, w.in);
  Sparse s = {Aligned(static_cast<size_t>(packed_bytes(g, w.out, w.in))), {}};
  std::memset(s.bytes.data, 0, s.bytes.bytes);
  for (int64_t t = 0; t < (w.out + 15) / 16; ++t) {
    const uint8_t* tile = w.data + tile_start(w, l, t);
    uint8_t* to = s.bytes.data + t * base.tile_bytes;
    std::memcpy(to, tile, static_cast<size_t>(l.low));
    int64_t place[2] = {0, 0};
    for (int64_t b = 0; b < l.blocks; ++b) {
      for (int q = 0; q < 8; ++q) {
        for (int i = 0; i < 64; ++i) {
          int code = g.zero;
          if (f.coding == kVectors) {
            code = 128;
            const int64_t vector = b * 4 + q / 2;
            for (int m = 0; m < f.books; ++m) {
              const int entry = tile[l.low + (vector * f.books + m) * 16 + i / 4];
              code += static_cast<int8_t>(w.data[m * 2048 + entry * 8 + q % 2 * 4 + i % 4]);
            }
          } else if (tile[l.low + b * 64 + q * 8 + i / 8] >> (i % 8) & 1) {
            const int stream = f.low == 4 ? q / 4 : 0;
            const uint8_t value = tile[l.high + place[stream]++];
            code = f.low == 8 ? value : stream == 0 ? value & 15 : value >> 4;
          }
          const int64_t at = base.low + b * g.low * 64 + (g.low == 8 ? q * 64 : q % 4 * 64) + i;
          to[at] = static_cast<uint8_t>(to[at] | (code & 255) << (g.low == 4 && q >= 4 ? 4 : 0));
        }
      }
    }
  }
  s.weight = {f.base, w.out, w.in, s.bytes.data, s.bytes.bytes};
  return s;
}

struct Rows {
  Rows(const Kernels& k, int rows, int64_t width, std::mt19937& rng)
      : x(static_cast<size_t>(rows * width)),
        memory(static_cast<size_t>(quant_bytes((rows + 7) / 8 * 8, width))),
        q(quant_rows(memory.data(), (rows + 7) / 8 * 8, width, rows)) {
    std::normal_distribution<float> normal;
    for (float& v : x) v = normal(rng);
    for (int r = 0; r < rows; ++r) k.quantize_row(&x[static_cast<size_t>(r * width)], width, kQuantGroup, false, q, r);
  }
  std::vector<float> x;
  std::vector<uint8_t> memory;
  QuantRows q;
};

// Row by row and tile by tile against all at once.
template <class Run>
void check_splits(const std::string& name, const Weight& w, int rows, const std::vector<float>& whole, Run run) {
  const int64_t tiles = (w.out + 15) / 16;
  std::vector<float> part(whole.size());
  for (int n = 1; n <= rows; n += n < 3 ? 1 : 3) {
    std::fill(part.begin(), part.end(), 0.0f);
    for (int64_t t = 0; t < tiles; ++t) run(n, t, t + 1, part.data());
    check(std::memcmp(part.data(), whole.data(), static_cast<size_t>(n * w.out) * 4) == 0,
          name + " bits for " + std::to_string(n) + " rows");
  }
}

void check_dense(const Kernels& k, const Weight& w, int rows, std::mt19937& rng) {
  const Sparse dense = dense_of(w);
  const int64_t tiles = (w.out + 15) / 16;
  const std::string name = std::string(k.isa) + " " + kFormats[w.format].name + " " + std::to_string(w.in);
  const Rows in(k, rows, w.in, rng);
  std::vector<float> bias(static_cast<size_t>(w.out)), whole(static_cast<size_t>(rows * w.out)), wanted = whole;
  for (float& v : bias) v = static_cast<float>(rng() % 7) - 3;
  k.linear_i8(dense.weight, in.q, rows, 0, tiles, bias.data(), wanted.data(), w.out);
  k.linear_i8(w, in.q, rows, 0, tiles, bias.data(), whole.data(), w.out);
  check(std::memcmp(whole.data(), wanted.data(), whole.size() * 4) == 0, name + " codes");
  check_splits(name + " codes", w, rows, whole, [&](int n, int64_t begin, int64_t end, float* y) {
    k.linear_i8(w, in.q, n, begin, end, bias.data(), y, w.out);
  });
  if (rows > 2) {  // a view that begins at another row
    std::vector<float> one(static_cast<size_t>(w.out));
    k.linear_i8(w, in.q.view(2, 0), 1, 0, tiles, bias.data(), one.data(), w.out);
    check(std::memcmp(one.data(), &whole[static_cast<size_t>(2 * w.out)], one.size() * 4) == 0, name + " view");
  }
  k.linear_f32(dense.weight, in.x.data(), w.in, rows, 0, tiles, nullptr, wanted.data(), w.out);
  k.linear_f32(w, in.x.data(), w.in, rows, 0, tiles, nullptr, whole.data(), w.out);
  check(std::memcmp(whole.data(), wanted.data(), whole.size() * 4) == 0, name + " floats");
  std::vector<float> row(static_cast<size_t>(w.in)), same = row;
  for (int64_t o = 0; o < w.out; o += 5) {
    k.unpack_row(dense.weight, o, same.data());
    k.unpack_row(w, o, row.data());
    check(std::memcmp(row.data(), same.data(), row.size() * 4) == 0, name + " row");
  }
}

void check_columns(const Kernels& k, const Weight& w, int rows, std::mt19937& rng) {
  const bool exact = std::string(k.isa) != "scalar";
  const int64_t tiles = (w.out + 15) / 16;
  const std::string name = std::string(k.isa) + " " + kFormats[w.format].name + " " + std::to_string(w.in);
  const Rows in(k, rows, w.in, rng);
  std::vector<float> whole(static_cast<size_t>(rows * w.out)), row(static_cast<size_t>(w.in));
  k.linear_f32(w, in.x.data(), w.in, rows, 0, tiles, nullptr, whole.data(), w.out);
  check_splits(name, w, rows, whole, [&](int n, int64_t begin, int64_t end, float* y) {
    k.linear_f32(w, in.x.data(), w.in, n, begin, end, nullptr, y, w.out);
  });
  const Layout l = layout_of(kFormats[w.format], w.in);
  for (int64_t o = 0; o < w.out; ++o) {
    k.unpack_row(w, o, row.data());
    const uint8_t* tile = w.data + tile_start(w, l, o / 16);
    uint32_t starts[17];
    std::memcpy(starts, tile + l.low, sizeof starts);
    const int64_t at = l.low + padded(sizeof starts), values = at + padded(2 * int64_t{starts[16]});
    uint16_t half = 0x3c00;
    if (kFormats[w.format].low) std::memcpy(&half, tile + 2 * (o % 16), 2);
    const float m = std::ldexp(1024.0f + (half & 1023), (half >> 10 & 31) - 25), scale = half & 0x8000 ? -m : m;
    float lanes[16] = {}, size = 0;
    for (uint32_t e = starts[o % 16]; e < starts[o % 16 + 1]; ++e) {
      uint16_t column, brain;
      std::memcpy(&column, tile + at + 2 * e, 2);
      std::memcpy(&brain, tile + values + 2 * e, kFormats[w.format].low ? 0 : 2);
      const float v = kFormats[w.format].low ? static_cast<float>(static_cast<int8_t>(tile[values + e]))
                                             : __builtin_bit_cast(float, static_cast<uint32_t>(brain) << 16);
      float& lane = lanes[(e - starts[o % 16]) % 16];
      lane = std::fma(v, in.x[column], lane);
      size += std::fabs(v * in.x[column] * scale);
      check(row[column] == v * scale, name + " row");
      row[column] = 0;
    }
    for (const float v : row) check(v == 0, name + " zeros");
    for (int n = 8; n > 0; n /= 2) {
      for (int i = 0; i < n; ++i) lanes[i] += lanes[i + n];
    }
    const float y = lanes[0] * scale, got = whole[static_cast<size_t>(o)];
    check(exact ? got == y : std::fabs(got - y) <= 1e-5f * size, name + " value");
  }
}

// Bytes of the table, the masks or the rows changed: refused, or run to the end within its bytes.
void check_damage(const Kernels& k, int format, std::mt19937& rng) {
  const Sparse whole = make(format, 37, 96 * (kFormats[format].group > 64 ? 4 : 2), 40, rng);
  const Rows in(k, 3, whole.weight.in, rng);
  std::vector<float> y(static_cast<size_t>(3 * whole.weight.out)), row(static_cast<size_t>(whole.weight.in));
  int refused = 0;
  for (int turn = 0; turn < 400; ++turn) {
    const size_t bytes = turn % 8 == 7 ? rng() % (whole.bytes.bytes / 64) * 64 + 64 : whole.bytes.bytes;
    Aligned copy(bytes);
    std::memcpy(copy.data, whole.bytes.data, bytes);
    for (unsigned i = rng() % 3; i < 4; ++i)
      copy.data[rng() % (turn % 2 ? std::min<size_t>(bytes, 128) : bytes)] = rng();
    const Weight w = {format, whole.weight.out, whole.weight.in, copy.data, bytes};
    if (coded_fault(w) != nullptr) {
      ++refused;
      continue;
    }
    for (const int rows : {1, 3}) {
      if (takes_int8(kFormats[format])) k.linear_i8(w, in.q, rows, 0, 3, nullptr, y.data(), w.out);
      k.linear_f32(w, in.x.data(), w.in, rows, 0, 3, nullptr, y.data(), w.out);
    }
    for (const int64_t o : {0, 17, 36}) k.unpack_row(w, o, row.data());
  }
  check(refused > (is_variable(kFormats[format]) ? 100 : 10), std::string(kFormats[format].name) + " takes damage");
}

}  // namespace

int main() {
  std::mt19937 rng(11);
  int levels = 0;
  for (const Kernels* k; (k = available_kernels(levels)) != nullptr; ++levels) {
    if (!test::wanted(k->isa)) continue;
    const int rows = std::string(k->isa) == "scalar" ? 3 : 19;
    for (int format = kFirstCoded; format < kFormatCount; ++format) {
      for (const int kept : {0, 7, 50, 100}) {
        for (const auto& [out, in] : {std::pair<int64_t, int64_t>{37, 512}, {16, 256}, {5, 172}, {1, 32}}) {
          if (!layout_of(kFormats[format], in).valid) continue;
          const Sparse s = make(format, out, in, kept, rng);
          const char* fault = coded_fault(s.weight);
          check(fault == nullptr, std::string(kFormats[format].name) + " " + (fault ? fault : ""));
          if (kFormats[format].coding == kColumns) {
            check_columns(*k, s.weight, rows, rng);
          } else {
            check_dense(*k, s.weight, rows, rng);
          }
        }
      }
      check_damage(*k, format, rng);
    }
    std::printf("%s done\n", k->isa);
  }
  std::printf("%d levels, %d failures\n", levels, failures);
  return failures != 0;
}
