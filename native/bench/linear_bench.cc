// Speed of the packed linears beside the machine's limits: all matrices of a model, activations quantised, no
// attention. Usage: linear_bench [format=q4_0] [threads=2] [isa, default the highest] [seconds per figure=2] [huge]
// Prints one line for each number of rows: tokens/s, bytes of weights/s, integer operations/s, and the share of the
// clock that the threads had to themselves (below 1 the machine was busy: do not quote the figures).
#include <sys/mman.h>
#include <time.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <thread>
#include <vector>

#include "dispatch.h"
#include "formats.h"
#include "kernels.h"

using namespace inhouse;

namespace {

struct Shape {
  int64_t out, in;
};

// Qwen2.5-0.5B: a layer's matrices, 24 layers, and the head.
const Shape kLayer[] = {{896, 896}, {128, 896}, {128, 896}, {896, 896}, {4864, 896}, {4864, 896}, {896, 4864}};
constexpr int kLayers = 24;
const Shape kHead = {151936, 896};
constexpr size_t kHuge = size_t{2} << 20;
constexpr int64_t kClaims = 2;  // pieces of a matrix for each thread

double seconds(clockid_t clock) {
  timespec t;
  clock_gettime(clock, &t);
  return static_cast<double>(t.tv_sec) + 1e-9 * static_cast<double>(t.tv_nsec);
}

struct Model {
  Model(int format, bool huge_pages) : huge(huge_pages) {
    for (int i = 0; i < kLayers; ++i) {
      for (const Shape& s : kLayer) add(format, s);
    }
    add(format, kHead);
  }
  void add(int format, const Shape& s) {
    const size_t bytes = static_cast<size_t>(packed_bytes(kFormats[format], s.out, s.in));
    uint8_t* data = static_cast<uint8_t*>(std::aligned_alloc(kHuge, (bytes + kHuge - 1) / kHuge * kHuge));
    if (huge) madvise(data, bytes, MADV_HUGEPAGE);
    std::memset(data, 0x35, bytes);  // 0x3535 is 0.33 in f16
    weights.push_back({format, s.out, s.in, data, bytes});
  }
  bool huge;
  std::vector<Weight> weights;
};

struct Team {  // a spin barrier for each matrix, tiles claimed by a counter
  explicit Team(int n) : size(n) {}
  void wait() {
    const int turn = turns.load();
    if (arrived.fetch_add(1) + 1 == size) {
      arrived = 0;
      next = 0;
      turns.fetch_add(1);
    } else {
      while (turns.load() == turn) {
      }
    }
  }
  const int size;
  std::atomic<int> arrived{0}, turns{0};
  std::atomic<int64_t> next{0};
};

struct Buffers {
  explicit Buffers(int rows)
      : x(rows * 4864, 0.5f),
        y(static_cast<size_t>(rows) * 4864),
        head(kHead.out),
        codes(static_cast<size_t>(quant_bytes(rows + kMaxLanes, 4864))) {}
  std::vector<float> x, y, head;
  std::vector<uint8_t> codes;
};

void step(const Kernels& k, const Model& m, int rows, Team& team, Buffers& b, int thread) {
  for (size_t i = 0; i < m.weights.size(); ++i) {
    const Weight& w = m.weights[i];
    const bool head = i + 1 == m.weights.size();
    const int n = head && rows > 32 ? 1 : rows;  // a long prompt needs the head for its last row
    const bool codes = kFormats[w.format].low != 0;
    const QuantRows q = quant_rows(b.codes.data(), (n + kMaxLanes - 1) / kMaxLanes * kMaxLanes, w.in, n);
    for (int r = thread; codes && r < n; r += team.size) k.quantize_row(&b.x[r * w.in], w.in, kQuantGroup, q, r);
    team.wait();
    float* y = head ? b.head.data() : b.y.data();
    const int64_t ldy = head ? (n > 1 ? 0 : w.out) : w.out, tiles = (w.out + 15) / 16;
    const int64_t claim = std::max<int64_t>(1, tiles / (team.size * kClaims));
    for (int64_t t; (t = team.next.fetch_add(claim)) < tiles;) {
      const int64_t end = t + claim < tiles ? t + claim : tiles;
      if (codes) {
        k.linear_i8(w, q, n, t, end, nullptr, y, ldy);
      } else {
        k.linear_f32(w, b.x.data(), w.in, n, t, end, nullptr, y, ldy);
      }
    }
    team.wait();
  }
}

void measure(const Kernels& k, const Model& m, int rows, int threads, double budget) {
  Team team(threads);
  Buffers buffers(rows);
  std::atomic<bool> more{true};
  int steps = 0;
  double busy = 0;
  const double begin = seconds(CLOCK_MONOTONIC);
  auto work = [&](int thread) {
    const double cpu = seconds(CLOCK_THREAD_CPUTIME_ID);
    while (true) {
      team.wait();
      if (!more) break;
      step(k, m, rows, team, buffers, thread);
      if (thread == 0) {
        ++steps;
        more = seconds(CLOCK_MONOTONIC) - begin < budget;
      }
    }
    if (thread == 0) busy = seconds(CLOCK_THREAD_CPUTIME_ID) - cpu;
  };
  std::vector<std::thread> others;
  for (int t = 1; t < threads; ++t) others.emplace_back(work, t);
  work(0);
  for (std::thread& t : others) t.join();
  const double time = seconds(CLOCK_MONOTONIC) - begin;
  double bytes = 0, operations = 0;
  for (const Weight& w : m.weights) {
    const bool head = &w == &m.weights.back();
    bytes += static_cast<double>(w.bytes) * steps;
    operations += 2.0 * static_cast<double>(w.out * w.in) * (head && rows > 32 ? 1 : rows) * steps;
  }
  std::printf("rows %4d  %8.1f tok/s  %6.1f GB/s  %7.1f GOP/s  own clock %.2f\n", rows, steps * rows / time,
              bytes / time * 1e-9, operations / time * 1e-9, busy / time);
}

}  // namespace

int main(int argc, char** argv) {
  const std::string name = argc > 1 ? argv[1] : "q4_0";
  const int threads = argc > 2 ? std::atoi(argv[2]) : 2;
  const double budget = argc > 4 ? std::atof(argv[4]) : 2.0;
  const Kernels* kernels = nullptr;
  const std::string isa = argc > 3 ? argv[3] : "";
  const Kernels* level;
  for (int i = 0; (level = available_kernels(i)) != nullptr; ++i) {
    if (isa.empty() || isa == level->isa) kernels = level;
  }
  int format = -1;
  for (int i = 0; i < kFormatCount; ++i) {
    if (name == kFormats[i].name && layout_of(kFormats[i], 896).valid) format = i;
  }
  if (kernels == nullptr || format < 0 || threads < 1) {
    std::fprintf(stderr, "unknown level or format (K types need inputs in multiples of 256)\n");
    return 2;
  }
  std::printf("%s %s, %d threads, Qwen2.5-0.5B shapes\n", kernels->isa, name.c_str(), threads);
  const Model model(format, argc > 5 && std::string(argv[5]) == "huge");
  for (const int rows : {1, 8, 32, 512}) measure(*kernels, model, rows, threads, budget);
  return 0;
}
