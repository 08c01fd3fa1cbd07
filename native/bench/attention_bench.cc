// Speed of attention beside the machine's limits: all layers of a model's attention over a paged cache, nothing else
// but the look-up of q, k and v. Usage: attention_bench [threads=2] [isa, default the highest] [seconds per figure=0.5]
// [words that a line's name must hold, e.g. "qwen f16 8192 x1"]
// A line: model, KV type, context x rows (one sequence's last rows where it says "chunk", else as many sequences with
// one row each), microseconds a layer, GB/s of K and V read once, GFLOP/s of visible scores and sums, shares of the two
// peaks probed in this run.
#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <string>
#include <vector>

#include "formats.h"
#include "inhouse.h"
#include "program.h"

namespace {

using inhouse::OpKind;

struct Model {
  const char* name;
  int64_t layers, heads, kv_heads, dim;
};
constexpr Model kModels[] = {
    {"qwen2.5-0.5b", 24, 14, 2, 64}, {"llama-3.2-1b", 16, 32, 8, 64}, {"four-layers", 4, 8, 4, 64}};
constexpr const char* kTypes[] = {"f32", "f16", "bf16", "int8", "int4"};  // int4: codes, the last 128 positions f16
constexpr int kCodes = 4, kF16 = 1;
constexpr int64_t kVocab = 64;

double now() { return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count(); }

[[noreturn]] void fail(const char* what) {
  char text[512];
  ih_error(text, sizeof text);
  std::printf("%s: %s\n", what, text);
  std::exit(1);
}

// Embeds q, k and v by token, then the attention of every layer over them.
std::vector<int64_t> program(const Model& m, int64_t context, bool coded) {
  const int64_t widths[] = {m.heads * m.dim, m.kv_heads * m.dim, m.kv_heads * m.dim};
  std::vector<int64_t> flat = {inhouse::kMagic, inhouse::kFlatVersion, kVocab, context, coded ? 2 : 1, 1};
  flat.insert(flat.end(), {0, m.kv_heads, m.dim, m.dim, 0, m.layers, coded ? 4 : 0, coded ? 4 : 0});
  if (coded) flat.insert(flat.end(), {1, m.kv_heads, m.dim, m.dim, 129, m.layers, 0, 0});
  flat.insert(flat.end(), {3 + m.layers, 3 + m.layers, 1});
  for (int64_t v = 0; v < 3 + m.layers; ++v) flat.insert(flat.end(), {0, v < 3 ? widths[v] : widths[0], 0, 0});
  const int64_t one = __builtin_bit_cast(int64_t, 1.0), scale = __builtin_bit_cast(int64_t, 0.125);
  for (int64_t v = 0; v < 3; ++v) flat.insert(flat.end(), {0, 0, 1, 1, 3, v, v, 0, 0, one});
  for (int64_t l = 0; l < m.layers; ++l) {
    flat.insert(flat.end(), {static_cast<int64_t>(OpKind::kAttention), 3, 0, 1, 19, 0, 1, 2, 3 + l});
    flat.insert(flat.end(), {0, l, m.heads, m.kv_heads, m.dim, m.dim, scale, 0, 0, 0, 0, 0, 0, 0, 0, coded ? 1 : -1,
                             coded ? l : 0, 0, 0});
  }
  flat.push_back(2 + m.layers);
  return flat;
}

struct Tables {
  explicit Tables(const Model& m) {
    for (const int64_t width : {m.heads * m.dim, m.kv_heads * m.dim, m.kv_heads * m.dim}) {
      const int64_t bytes = inhouse::packed_bytes(inhouse::kFormats[0], kVocab, width);
      float* data = static_cast<float*>(std::aligned_alloc(64, static_cast<size_t>(bytes)));
      for (int64_t i = 0; i < bytes / 4; ++i) data[i] = static_cast<float>((i * 7919) % 1009) / 500.0f - 1.0f;
      weights.push_back({0, 0, kVocab, width, data, bytes});
    }
  }
  std::vector<ih_weight> weights;
};

struct Load {
  int64_t context, sequences, rows;  // rows of each sequence
};

// Arrays of a step whose sequences end at `context`.
struct Arrays {
  explicit Arrays(const Load& load) : width((load.context + 15) / 16) {
    for (int64_t n = 0; n < load.sequences; ++n) {
      lengths.push_back(static_cast<int32_t>(load.context));
      for (int64_t i = 0; i < load.rows; ++i) {
        tokens.push_back(static_cast<int32_t>((n * 5 + i) % kVocab));
        positions.push_back(static_cast<int32_t>(load.context - load.rows + i));
        owners.push_back(static_cast<int32_t>(n));
      }
      for (int64_t b = 0; b < width; ++b) table.push_back(static_cast<int32_t>(n * width + b));
    }
    zeros.assign(tokens.size(), 0);
    tables[0] = tables[1] = table.data();
    widths[0] = widths[1] = width;
  }
  ih_step step() const {
    return {static_cast<int64_t>(tokens.size()),
            static_cast<int64_t>(lengths.size()),
            0,
            tokens.data(),
            positions.data(),
            owners.data(),
            lengths.data(),
            nullptr,
            tables,
            widths,
            zeros.data(),
            zeros.data(),
            zeros.data()};
  }
  int64_t width;
  std::vector<int32_t> tokens, positions, owners, lengths, table, zeros;
  const int32_t* tables[2];
  int64_t widths[2];
};

// Bytes that are small floats in every type, so that nothing is slow or infinite.
void fill(ih_model* model, int group, int64_t blocks) {
  std::vector<uint8_t> bytes(static_cast<size_t>(ih_block_bytes(model, group)));
  uint32_t state = 1;
  for (uint8_t& b : bytes) b = static_cast<uint8_t>(0x30 + ((state = state * 1664525 + 1013904223) >> 28));
  for (int32_t b = 0; b < blocks; ++b) {
    if (ih_write_blocks(model, group, &b, 1, bytes.data()) != IH_OK) fail("write");
  }
}

struct Peaks {
  double read, fma;
};

void measure(const Model& m, int type, const Load& load, int threads, const char* isa, double budget, Peaks peaks,
             const std::string& name) {
  const bool coded = type == kCodes;
  const std::vector<int64_t> flat = program(m, load.context, coded);
  const Tables tables(m);
  int32_t status = 0;
  ih_model* model = ih_model_create(flat.data(), static_cast<int64_t>(flat.size()), tables.weights.data(), 3, isa,
                                    threads, coded ? kF16 : type, &status);
  if (model == nullptr) fail("create");
  const Arrays arrays(load);
  const int64_t blocks = static_cast<int64_t>(arrays.table.size());
  const int64_t counts[2] = {blocks, blocks};
  if (ih_state_allocate(model, counts) != IH_OK) fail("allocate");
  for (int group = 0; group < (coded ? 2 : 1); ++group) fill(model, group, blocks);
  const ih_step step = arrays.step();
  ih_output output;
  std::vector<double> times;
  for (const double start = now(); times.size() < 3 || now() - start < budget;) {
    const double begin = now();
    if (ih_run(model, 0, &step, &output) != IH_OK) fail("run");
    times.push_back(now() - begin);
  }
  std::sort(times.begin(), times.end());
  const double layer = times[times.size() / 2] / static_cast<double>(m.layers);
  const double seen = static_cast<double>(load.context) - static_cast<double>(load.rows - 1) / 2;
  const double flops = 4.0 * seen * static_cast<double>(load.rows * load.sequences * m.heads * m.dim);
  const double bytes = static_cast<double>(ih_block_bytes(model, 0) / m.layers) / 16 *
                       static_cast<double>(load.context * load.sequences);
  std::printf("%-36s %10.1f us  %6.2f GB/s (%3.0f%%)  %7.1f GFLOP/s (%3.0f%%)\n", name.c_str(), layer * 1e6,
              bytes / layer / 1e9, 100 * bytes / layer / peaks.read, flops / layer / 1e9,
              100 * flops / layer / peaks.fma);
  std::fflush(stdout);
  ih_model_destroy(model);
}

bool wanted(const std::string& name, int argc, char** argv) {
  for (int i = 4; i < argc; ++i) {
    if ((" " + name + " ").find(" " + std::string(argv[i]) + " ") == std::string::npos) return false;
  }
  return true;
}

}  // namespace

int main(int argc, char** argv) {
  const int threads = argc > 1 ? std::atoi(argv[1]) : 2;
  const char* isa = argc > 2 && *argv[2] != 0 ? argv[2] : nullptr;
  const double budget = argc > 3 ? std::atof(argv[3]) : 0.5;
  Peaks peaks = {};
  if (ih_probe(isa, IH_PROBE_READ, threads, &peaks.read) != IH_OK) fail("probe");
  if (ih_probe(isa, IH_PROBE_FMA, threads, &peaks.fma) != IH_OK) fail("probe");
  std::printf("%s, %d threads: read %.1f GB/s, f32 %.0f GFLOP/s\n", ih_isa_name(isa), threads, peaks.read / 1e9,
              peaks.fma / 1e9);
  for (const Model& m : kModels) {
    for (int type = 0; type <= kCodes; ++type) {
      for (const int64_t context : {512, 2048, 4096, 8192, 32768}) {
        for (const int64_t rows : {1, 8, 32, 512}) {
          const bool chunk = rows == 512;
          if (chunk ? context > 8192 : context * rows > 65536) continue;  // more cache than a small machine holds
          const Load load = chunk ? Load{context, 1, rows} : Load{context, rows, 1};
          std::string name =
              std::string(m.name) + " " + kTypes[type] + " " + std::to_string(context) + " x" + std::to_string(rows);
          if (chunk) name += " chunk";
          if (wanted(name, argc, argv)) measure(m, type, load, threads, isa, budget, peaks, name);
        }
      }
    }
  }
  return 0;
}
