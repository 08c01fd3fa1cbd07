// The machine's own limits, measured by the level's probes on the process's pool.
#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdlib>
#include <cstring>
#include <memory>

#include "dispatch.h"
#include "error.h"
#include "inhouse.h"
#include "threads.h"

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace inhouse {
namespace {

constexpr int64_t kBufferBytes = int64_t{256} << 20;  // far beyond any cache
constexpr int64_t kHugePage = int64_t{2} << 20;
constexpr int64_t kParts = 64;  // tiles, so that a thread that starts late takes fewer
constexpr int64_t kFirstLoops = 100;
constexpr double kTrySeconds = 0.02;
constexpr int kTries = 5;

struct Free {
  void operator()(uint8_t* p) const { std::free(p); }
};
using Buffer = std::unique_ptr<uint8_t, Free>;

Buffer make_buffer() {
  Buffer buffer(static_cast<uint8_t*>(std::aligned_alloc(kHugePage, kBufferBytes)));
  if (!buffer) return buffer;
#if defined(__linux__)
  madvise(buffer.get(), kBufferBytes, MADV_HUGEPAGE);
#endif
  std::memset(buffer.get(), 1, kBufferBytes);
  return buffer;
}

double now() { return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count(); }

// Work of all parts, a second: the best of kTries, after one that warms up.
template <class Part>
double best_rate(int threads, Part part) {
  double best = 0.0;
  for (int i = 0; i <= kTries; ++i) {
    std::atomic<int64_t> work{0};
    Pool::Step step(Pool::process(), threads);
    const double begin = now();
    step.run(kParts, [&](int64_t tile, int) { work += static_cast<int64_t>(part(tile)); });
    const double rate = static_cast<double>(work.load()) / (now() - begin);
    if (i > 0) best = std::max(best, rate);
  }
  return best;
}

Status probe(const char* isa, int32_t kind, int32_t threads, double* per_second) {
  const Kernels* kernels = nullptr;
  if (Status status = choose_kernels(isa, &kernels); !status.ok()) return status;
  if (threads < 0 || threads > kMaxThreads) return Status::usage("threads out of range");
  if (threads == 0) threads = default_threads();
  std::atomic<int32_t> sinks{0};
  const auto sunk = [&](double work, int32_t sink) {
    sinks += sink;
    return work;
  };
  if (kind == IH_PROBE_READ) {
    const Buffer buffer = make_buffer();
    if (!buffer) return Status::capacity("no memory for the probe's buffer of 256 MiB");
    *per_second = best_rate(threads, [&](int64_t tile) {
      int32_t sink = 0;
      const int64_t bytes = kBufferBytes / kParts;
      return sunk(kernels->probe_read(buffer.get() + tile * bytes, bytes, &sink), sink);
    });
    return {};
  }
  if (kind != IH_PROBE_DOT && kind != IH_PROBE_FMA) return Status::usage("unknown kind of probe");
  const auto body = kind == IH_PROBE_DOT ? kernels->probe_dot : kernels->probe_fma;
  const auto rate = [&](int64_t loops) {
    return best_rate(threads, [&](int64_t) {
      int32_t sink = 0;
      return sunk(body(loops, &sink), sink);
    });
  };
  int32_t sink = 0;
  const double work = sunk(body(1, &sink), sink);  // of one loop
  const double loops = rate(kFirstLoops) * kTrySeconds / (work * kParts);
  *per_second = rate(std::max<int64_t>(static_cast<int64_t>(loops), kFirstLoops));
  return {};
}

}  // namespace
}  // namespace inhouse

extern "C" ih_status ih_probe(const char* isa, int32_t kind, int32_t threads, double* per_second) {
  if (per_second == nullptr) return inhouse::report(inhouse::Status::usage("ih_probe needs room for its result"));
  return inhouse::report(inhouse::probe(isa, kind, threads, per_second));
}
