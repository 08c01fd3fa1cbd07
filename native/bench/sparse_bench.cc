// Speed of sparse, vector-coded and low-bit linears beside a dense format, one JSON object a line. The two matrices of
// a cell are multiplied in turns, so that whatever else the machine does meets both; figures are medians over rounds.
// Matrices are larger than the last cache and hold random values; weights are read from memory.
// Usage: sparse_bench [--cell A:KEPT:B,...] [--isa NAME,...] [--threads N] [--rows N] [--seconds S] [--out N] [--in N]
#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "dispatch.h"
#include "formats.h"
#include "inhouse.h"
#include "known.h"
#include "linears.h"
#include "sparse.h"

using namespace inhouse;

namespace {

struct Cell {
  std::string format;
  double kept;  // share of the weights that a sparse format keeps
  std::string beside;
};

struct Options {
  std::vector<Cell> cells = {{"s8_g32", 0.5, "q8_0"},
                             {"p8_g32", 0.5, "q8_0"},
                             {"s4_g32", 0.5, "q4_0"},
                             {"p4_g32", 0.5, "q4_0"},
                             {"q4_0", 1, "bf16"}};
  std::vector<std::string> levels;
  int threads = 0;
  int64_t rows = 1, out = 16384, in = 8192;
  double seconds = 2;
};

double now() { return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count(); }

struct Free {
  void operator()(uint8_t* p) const { std::free(p); }
};

struct Matrix {
  std::unique_ptr<uint8_t, Free> data;
  Weight weight;
};

// A mask of 64 bits, each set with that probability; of 2:4, two of every four.
uint64_t random_mask(const Format& f, double kept, std::mt19937_64& rng) {
  uint64_t mask = 0;
  if (f.coding == kPairs) {
    constexpr uint64_t two[6] = {3, 5, 6, 9, 10, 12};
    for (int i = 0; i < 16; ++i) mask |= two[rng() % 6] << (4 * i);
    return mask;
  }
  const uint32_t limit = static_cast<uint32_t>(kept * 65536);
  for (int i = 0; i < 64; i += 4) {
    const uint64_t random = rng();
    for (int k = 0; k < 4; ++k) mask |= uint64_t{(random >> (16 * k) & 0xffff) < limit} << (i + k);
  }
  return mask;
}

int64_t fill_mask_tile(const Format& f, const Layout& l, double kept, uint8_t* tile, std::mt19937_64& rng) {
  int64_t half[2] = {0, 0};
  for (int64_t i = 0; i < 8 * l.blocks; ++i) {
    const uint64_t mask = random_mask(f, kept, rng);
    std::memcpy(tile + l.low + 8 * i, &mask, 8);
    half[i % 8 / 4] += __builtin_popcountll(mask);
  }
  const int64_t values = f.low == 8 ? half[0] + half[1] : std::max(half[0], half[1]);
  for (int64_t i = 0; i < padded(values); ++i) tile[l.high + i] = static_cast<uint8_t>(rng());
  return f.coding == kPairs ? l.tile_bytes : l.high + padded(values);
}

int64_t fill_columns_tile(const Format& f, const Layout& l, int64_t in, double kept, uint8_t* tile,
                          std::mt19937_64& rng) {
  std::vector<uint16_t> columns;
  uint32_t starts[17] = {};
  const uint64_t limit = static_cast<uint64_t>(kept * 65536);
  for (int r = 0; r < 16; ++r) {
    for (int64_t k = 0; k < in; k += 4) {
      const uint64_t random = rng();
      for (int64_t i = 0; i < 4 && k + i < in; ++i) {
        if ((random >> (16 * i) & 0xffff) < limit) columns.push_back(static_cast<uint16_t>(k + i));
      }
    }
    starts[r + 1] = static_cast<uint32_t>(columns.size());
  }
  const int64_t count = starts[16], at = l.low + padded(sizeof starts), values = at + padded(2 * count);
  std::memcpy(tile + l.low, starts, sizeof starts);
  std::memcpy(tile + at, columns.data(), static_cast<size_t>(2 * count));
  const int64_t bytes = padded(count * (f.low ? 1 : 2));
  for (int64_t i = 0; i < bytes; ++i) tile[values + i] = f.low || i % 2 == 0 ? static_cast<uint8_t>(rng()) : 0x3c;
  return values + bytes;
}

Matrix make_matrix(int format, double kept, int64_t out, int64_t in) {
  const Format& f = kFormats[format];
  const Layout l = layout_of(f, in);
  const size_t most = static_cast<size_t>(packed_bytes(f, out, in) + 63) / 64 * 64;
  Matrix m = {std::unique_ptr<uint8_t, Free>(static_cast<uint8_t*>(std::aligned_alloc(64, most))), {}};
  uint8_t* data = m.data.get();
  std::mt19937_64 rng(7);
  int64_t at = f.coding == kDense ? 0 : head_bytes(f, out);
  const int64_t tiles = (out + 15) / 16;
  for (int64_t t = 0; t < tiles; ++t) {
    if (is_variable(f)) std::memcpy(data + 8 * t, &at, 8);
    uint8_t* tile = data + at;
    if (f.coding == kColumns) {
      std::memset(tile, 0x35, 64);  // 0x3535 is 0.33 in f16
      at += fill_columns_tile(f, l, in, kept, tile, rng);
    } else if (f.coding == kMask || f.coding == kPairs) {
      std::memset(tile, 0x35, static_cast<size_t>(l.low));
      at += fill_mask_tile(f, l, kept, tile, rng);
    } else {
      for (int64_t i = 0; i < l.tile_bytes; i += 8) {
        const uint64_t random = rng();
        std::memcpy(tile + i, &random, 8);
      }
      if (f.low) std::memset(tile, 0x35, static_cast<size_t>(l.low));
      if (!f.low) std::memset(tile, 0x35, static_cast<size_t>(l.tile_bytes));
      at += l.tile_bytes;
    }
  }
  if (is_variable(f)) {
    std::memcpy(data + 8 * tiles, &at, 8);
    at += 64;
  } else if (f.coding == kVectors) {
    for (int64_t i = 0; i < head_bytes(f, out); ++i) data[i] = static_cast<uint8_t>(rng() % 64);
  }
  m.weight = {format, out, in, data, static_cast<size_t>(at)};
  return m;
}

struct Input {
  std::vector<float> x;
  std::vector<uint8_t> memory;
  QuantRows quants;
  std::vector<float> y;
};

double time_once(const Kernels& kernels, const Options& o, const Matrix& m, Input& input) {
  const bool codes = takes_int8(kFormats[m.weight.format]);
  const LinearInput in = {o.rows, o.in, codes ? nullptr : input.x.data(), codes ? &input.quants : nullptr, false};
  const LinearTask task = {&m.weight, nullptr, input.y.data()};
  const double begin = now();
  Pool::Step pool(Pool::process(), o.threads);
  run_linears(pool, kernels, in, &task, 1);
  return now() - begin;
}

double median(std::vector<double> v) {
  std::nth_element(v.begin(), v.begin() + static_cast<ptrdiff_t>(v.size() / 2), v.end());
  return v[v.size() / 2];
}

int number_of(const std::string& format) {
  for (int i = 0; i < kFormatCount; ++i) {
    if (format == kFormats[i].name) return i;
  }
  std::fprintf(stderr, "sparse_bench: no format %s\n", format.c_str());
  std::exit(2);
}

void measure(const Kernels& kernels, const Options& o, const Cell& cell, Input& input) {
  const Matrix a = make_matrix(number_of(cell.format), cell.kept, o.out, o.in);
  const Matrix b = make_matrix(number_of(cell.beside), 1, o.out, o.in);
  for (const Matrix* m : {&a, &b}) {
    const char* fault = kFormats[m->weight.format].coding == kDense ? nullptr : coded_fault(m->weight);
    if (fault != nullptr) std::fprintf(stderr, "sparse_bench: %s\n", fault), std::exit(1);
  }
  std::vector<double> first, second, ratios;
  time_once(kernels, o, a, input);
  time_once(kernels, o, b, input);
  for (const double begin = now(); first.size() < 5 || now() - begin < o.seconds;) {
    first.push_back(time_once(kernels, o, a, input));
    second.push_back(time_once(kernels, o, b, input));
    ratios.push_back(second.back() / first.back());
  }
  std::printf(
      "{\"isa\":\"%s\",\"threads\":%d,\"rows\":%ld,\"out\":%ld,\"in\":%ld,\"format\":\"%s\",\"kept\":%.3f,"
      "\"beside\":\"%s\",\"speedup\":%.3f,\"ms\":%.4f,\"beside_ms\":%.4f,\"bytes\":%zu,\"beside_bytes\":%zu,"
      "\"GBs\":%.1f,\"beside_GBs\":%.1f,\"rounds\":%zu}\n",
      kernels.isa, o.threads, static_cast<long>(o.rows), static_cast<long>(o.out), static_cast<long>(o.in),
      cell.format.c_str(), cell.kept, cell.beside.c_str(), median(ratios), median(first) * 1e3, median(second) * 1e3,
      a.weight.bytes, b.weight.bytes, static_cast<double>(a.weight.bytes) / median(first) * 1e-9,
      static_cast<double>(b.weight.bytes) / median(second) * 1e-9, ratios.size());
  std::fflush(stdout);
}

std::vector<std::string> split(const std::string& text, char at) {
  std::vector<std::string> parts(1);
  for (const char c : text) {
    if (c == at) {
      parts.emplace_back();
    } else {
      parts.back() += c;
    }
  }
  return parts;
}

bool parse(int argc, char** argv, Options* o) {
  for (int i = 1; i + 1 < argc; i += 2) {
    const std::string key = argv[i], value = argv[i + 1];
    if (key == "--cell") {
      o->cells.clear();
      for (const std::string& cell : split(value, ',')) {
        const std::vector<std::string> parts = split(cell, ':');
        if (parts.size() != 3) return false;
        o->cells.push_back({parts[0], std::atof(parts[1].c_str()), parts[2]});
      }
    } else if (key == "--isa") {
      o->levels = split(value, ',');
    } else if (key == "--threads") {
      o->threads = std::atoi(value.c_str());
    } else if (key == "--rows") {
      o->rows = std::atol(value.c_str());
    } else if (key == "--out") {
      o->out = std::atol(value.c_str());
    } else if (key == "--in") {
      o->in = std::atol(value.c_str());
    } else if (key == "--seconds") {
      o->seconds = std::atof(value.c_str());
    } else {
      return false;
    }
  }
  if (o->threads < 1) o->threads = default_threads();
  return argc % 2 == 1 && o->rows > 0 && o->out > 0 && o->in > 0;
}

}  // namespace

int main(int argc, char** argv) {
  Options o;
  if (!parse(argc, argv, &o)) {
    std::fprintf(stderr, "sparse_bench: unknown option; bench/sparse_bench.cc begins with the list\n");
    return 2;
  }
  if (!are_known_levels(o.levels)) return 2;
  const int64_t capacity = (o.rows + kMaxLanes - 1) / kMaxLanes * kMaxLanes;
  Input input = {std::vector<float>(static_cast<size_t>(o.rows * o.in)),
                 std::vector<uint8_t>(static_cast<size_t>(quant_bytes(capacity, o.in))),
                 {},
                 std::vector<float>(static_cast<size_t>(o.rows * o.out))};
  std::mt19937 rng(3);
  std::normal_distribution<float> normal;
  for (float& v : input.x) v = normal(rng);
  const Kernels* kernels;
  for (int i = 0; (kernels = available_kernels(i)) != nullptr; ++i) {
    const bool last = available_kernels(i + 1) == nullptr;
    const bool named = std::find(o.levels.begin(), o.levels.end(), kernels->isa) != o.levels.end();
    if (o.levels.empty() ? !last : !named) continue;
    input.quants = quant_rows(input.memory.data(), capacity, o.in, o.rows);
    for (int64_t r = 0; r < o.rows; ++r) {
      kernels->quantize_row(input.x.data() + r * o.in, o.in, kQuantGroup, false, input.quants, r);
    }
    for (const Cell& cell : o.cells) measure(*kernels, o, cell, input);
  }
  return 0;
}
