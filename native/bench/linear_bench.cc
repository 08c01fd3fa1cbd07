// Speed of the packed linears beside the machine's limits, one JSON object a line: first the peaks, measured by the
// same run, then for each model, format, level and number of rows every matrix and the sum of all. Matrices that share
// an input (q k v; gate up) are one, as in a step; weights are read from memory, not from a cache.
// Usage: linear_bench [--model NAME|all] [--format NAME,...] [--isa NAME,...] [--rows N,...] [--threads N]
//                     [--seconds S (a figure)] [--totals (no single matrices)] [--huge (huge pages)]
//                     [--fine (no activation scales of powers of two)]
#include <sys/mman.h>

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <string>
#include <vector>

#include "dispatch.h"
#include "formats.h"
#include "inhouse.h"
#include "known.h"
#include "linears.h"
#include "shapes.h"

using namespace inhouse;

namespace {

constexpr size_t kBufferBytes = size_t{192} << 20;  // weights in turn, far beyond the last cache
constexpr size_t kHugePage = size_t{2} << 20;
constexpr int64_t kPromptRows = 64;  // from here on the head is needed for one row

struct Options {
  std::string model = "qwen2.5-0.5b";
  std::vector<std::string> formats = {"q4_0", "q8_0", "bf16"}, levels;
  std::vector<int64_t> rows = {1, 2, 4, 8, 16, 32, 64, 512};
  int threads = 0;
  double seconds = 0.05;
  bool totals = false, huge = false, fine = false;
};

struct Free {
  void operator()(uint8_t* p) const { std::free(p); }
};
using Buffer = std::unique_ptr<uint8_t, Free>;

Buffer make_buffer(size_t bytes, bool huge) {
  bytes = (bytes + kHugePage - 1) / kHugePage * kHugePage;
  Buffer buffer(static_cast<uint8_t*>(std::aligned_alloc(kHugePage, bytes)));
  if (huge) madvise(buffer.get(), bytes, MADV_HUGEPAGE);
  std::memset(buffer.get(), 0x35, bytes);  // 0x3535 is 0.33 in f16
  return buffer;
}

double now() { return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count(); }

struct Peaks {
  double read, dot, fma;  // a second
};

Peaks peaks_of(const char* isa, int threads) {
  Peaks p = {};
  ih_probe(isa, IH_PROBE_READ, threads, &p.read);
  ih_probe(isa, IH_PROBE_DOT, threads, &p.dot);
  ih_probe(isa, IH_PROBE_FMA, threads, &p.fma);
  std::printf(
      "{\"kind\":\"peak\",\"isa\":\"%s\",\"threads\":%d,\"read_GBs\":%.1f,\"dot_GOPs\":%.1f,\"fma_GOPs\":%.1f}\n", isa,
      threads, p.read * 1e-9, p.dot * 1e-9, p.fma * 1e-9);
  return p;
}

struct Memory {
  Buffer weights, x, quants, y;
};

// Seconds of one multiplication, the median over `budget` seconds; `used` becomes the bytes of the weight.
double time_matrix(const Kernels& kernels, const Options& o, int format, int64_t out, int64_t in, int64_t rows,
                   const Memory& memory, size_t* used) {
  const size_t tile = static_cast<size_t>(layout_of(kFormats[format], in).tile_bytes);
  const int64_t cut = std::min<int64_t>(out, static_cast<int64_t>(kBufferBytes / tile) * kTileRows);
  const size_t bytes = static_cast<size_t>(packed_bytes(kFormats[format], cut, in));
  const size_t copies = kBufferBytes / bytes;
  const bool codes = takes_int8(kFormats[format]);
  const QuantRows quants = quant_rows(memory.quants.get(), (rows + kMaxLanes - 1) / kMaxLanes * kMaxLanes, in, rows);
  const float* x = reinterpret_cast<const float*>(memory.x.get());
  const bool powers = !o.fine && kFormats[format].low + kFormats[format].high <= 6;
  for (int64_t r = 0; codes && r < rows; ++r) kernels.quantize_row(x + r * in, in, kQuantGroup, powers, quants, r);
  const bool narrow =
      !o.fine && kFormats[format].scale == kBF16 && kFormats[format].low == 0 && in % 4 == 0 && in <= kMostPairInputs;
  const LinearInput input = {rows, in, codes ? nullptr : x, codes ? &quants : nullptr, narrow};
  std::vector<double> times;
  double last = now();
  for (const double begin = last; times.size() < 4 || last - begin < o.seconds;) {
    Pool::Step pool(Pool::process(), o.threads);
    const size_t copy = times.size() % copies;
    const Weight w = {format, cut, in, memory.weights.get() + copy * bytes, bytes};
    const LinearTask task = {&w, nullptr, reinterpret_cast<float*>(memory.y.get())};
    run_linears(pool, kernels, input, &task, 1);
    const double end = now();
    times.push_back(end - last);
    last = end;
  }
  std::nth_element(times.begin(), times.begin() + static_cast<ptrdiff_t>(times.size() / 2), times.end());
  *used = bytes * static_cast<size_t>(out) / static_cast<size_t>(cut);
  return times[times.size() / 2] * static_cast<double>(out) / static_cast<double>(cut);
}

void print_figures(double operations, double bytes, double time, const Peaks& peaks, bool codes) {
  const double peak = codes ? peaks.dot : peaks.fma;
  std::printf("\"ms\":%.4f,\"GOPs\":%.1f,\"GBs\":%.1f,\"of_compute\":%.3f,\"of_read\":%.3f}\n", time * 1e3,
              operations / time * 1e-9, bytes / time * 1e-9, operations / time / peak, bytes / time / peaks.read);
}

void measure(const Options& o, const Kernels& kernels, const Peaks& peaks, const ModelShape& model, int format,
             int64_t rows, const Memory& memory) {
  double time = 0, operations = 0, bytes = 0;
  const bool codes = takes_int8(kFormats[format]);
  for (int i = 0; i < kMatrices; ++i) {
    const MatrixShape m = matrix_of(model, i);
    if (!layout_of(kFormats[format], m.in).valid) return;
    const int64_t n = m.head && rows >= kPromptRows ? 1 : rows;
    size_t used = 0;
    const double once = time_matrix(kernels, o, format, m.out, m.in, n, memory, &used);
    const double products = 2.0 * static_cast<double>(m.out * m.in * n), count = static_cast<double>(m.count);
    if (!o.totals) {
      std::printf(
          "{\"kind\":\"matrix\",\"model\":\"%s\",\"matrix\":\"%s\",\"out\":%ld,\"in\":%ld,\"format\":\"%s\","
          "\"isa\":\"%s\",\"rows\":%ld,",
          model.name, m.what, m.out, m.in, kFormats[format].name, kernels.isa, n);
      print_figures(products, static_cast<double>(used), once, peaks, codes);
    }
    time += once * count;
    operations += products * count;
    bytes += static_cast<double>(used) * count;
  }
  std::printf("{\"kind\":\"model\",\"model\":\"%s\",\"format\":\"%s\",\"isa\":\"%s\",\"rows\":%ld,\"tokens_s\":%.1f,",
              model.name, kFormats[format].name, kernels.isa, rows, static_cast<double>(rows) / time);
  print_figures(operations, bytes, time, peaks, codes);
  std::fflush(stdout);
}

std::vector<std::string> split(const char* text) {
  std::vector<std::string> parts(1);
  for (const char* p = text; *p != 0; ++p) {
    if (*p == ',') {
      parts.emplace_back();
    } else {
      parts.back() += *p;
    }
  }
  return parts;
}

bool parse(int argc, char** argv, Options* o) {
  for (int i = 1; i < argc; ++i) {
    const std::string key = argv[i];
    if (key == "--totals" || key == "--huge" || key == "--fine") {
      (key == "--huge" ? o->huge : key == "--fine" ? o->fine : o->totals) = true;
      continue;
    }
    if (++i == argc) return false;
    if (key == "--model")
      o->model = argv[i];
    else if (key == "--format")
      o->formats = split(argv[i]);
    else if (key == "--isa")
      o->levels = split(argv[i]);
    else if (key == "--threads")
      o->threads = std::atoi(argv[i]);
    else if (key == "--seconds")
      o->seconds = std::atof(argv[i]);
    else if (key == "--rows") {
      o->rows.clear();
      for (const std::string& n : split(argv[i])) o->rows.push_back(std::max(1, std::atoi(n.c_str())));
    } else
      return false;
  }
  if (o->threads < 1) o->threads = default_threads();
  return true;
}

int number_of(const std::string& format) {
  for (int i = 0; i < kFormatCount; ++i) {
    if (format == kFormats[i].name) return i;
  }
  return -1;
}

// Whether all names of the options mean something: a figure that is left out in silence would pass for measured.
bool mean_something(const Options& o) {
  std::vector<std::string> formats, models = {"all"};
  for (const Format& f : kFormats) {
    if (f.coding == kDense) formats.push_back(f.name);  // others: sparse_bench
  }
  for (const ModelShape& m : kModels) models.push_back(m.name);
  const bool model = are_known("model", {o.model}, models), format = are_known("dense format", o.formats, formats);
  return are_known_levels(o.levels) && model && format;
}

}  // namespace

int main(int argc, char** argv) {
  Options o;
  if (!parse(argc, argv, &o)) {
    std::fprintf(stderr, "linear_bench: unknown option; bench/linear_bench.cc begins with the list\n");
    return 2;
  }
  if (!mean_something(o)) return 2;
  int64_t widest = 0, tallest = 0, most = *std::max_element(o.rows.begin(), o.rows.end());
  for (const ModelShape& m : kModels) {
    widest = std::max(widest, m.ffn);
    tallest = std::max({tallest, 2 * m.ffn * most, m.vocab * std::min(most, kPromptRows)});
  }
  const Memory memory = {make_buffer(kBufferBytes, o.huge), make_buffer(static_cast<size_t>(widest * most) * 4, o.huge),
                         make_buffer(static_cast<size_t>(quant_bytes(most + kMaxLanes, widest)), o.huge),
                         make_buffer(static_cast<size_t>(tallest) * 4, o.huge)};
  const Kernels* kernels;
  for (int i = 0; (kernels = available_kernels(i)) != nullptr; ++i) {
    const bool last = available_kernels(i + 1) == nullptr;
    const bool named = std::find(o.levels.begin(), o.levels.end(), kernels->isa) != o.levels.end();
    if (o.levels.empty() ? !last : !named) continue;
    const Peaks peaks = peaks_of(kernels->isa, o.threads);
    for (const ModelShape& m : kModels) {
      if (o.model != "all" && o.model != m.name) continue;
      for (const std::string& format : o.formats) {
        for (const int64_t rows : o.rows) measure(o, *kernels, peaks, m, number_of(format), rows, memory);
      }
    }
  }
  return 0;
}
