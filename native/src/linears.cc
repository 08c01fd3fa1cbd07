#include "linears.h"

#include <algorithm>

namespace inhouse {

namespace {

constexpr int64_t kTileProducts = 65536;  // multiply-adds that are worth a claim of their own
constexpr int64_t kClaimsPerThread = 4, kClaimsOfManyRows = 8;
constexpr int64_t kManyRows = 64;

int64_t tiles_of(const Weight& w) { return (w.out + kTileRows - 1) / kTileRows; }

}  // namespace

// Chunks of weight tiles, counted through the matrices. Threads take claims in turns, so neighbours in the order of
// claims lie a thread's share apart: each thread then reads on where it stopped, in weights that it has asked for
// ahead.
void run_linears(Pool::Step& pool, const Kernels& kernels, const LinearInput& in, const LinearTask* tasks,
                 size_t count) {
  if (in.rows == 0) return;
  int64_t tiles = 0;
  for (size_t i = 0; i < count; ++i) tiles += tiles_of(*tasks[i].w);
  const int64_t threads = pool.threads(), each = in.rows < kManyRows ? kClaimsPerThread : kClaimsOfManyRows;
  const int64_t worth = std::max<int64_t>(1, tiles * kTileRows * in.rows * in.width / kTileProducts);
  const int64_t share = std::min({each, worth / threads, tiles / threads});
  const int64_t claims = share > 0 ? share * threads : 1;
  const int64_t unit = tiles >= 2 * claims ? 2 : 1;  // bodies work on two tiles at once
  const auto edge = [&](int64_t chunk) { return chunk == claims ? tiles : tiles * chunk / claims / unit * unit; };
  pool.run(claims, [&](int64_t claim, int) {
    const int64_t chunk = share > 0 ? claim % threads * share + claim / threads : 0;
    int64_t begin = edge(chunk), end = edge(chunk + 1);
    for (size_t i = 0; i < count && end > 0; ++i) {
      const LinearTask& task = tasks[i];
      const int64_t here = tiles_of(*task.w), last = std::min(end, here);
      const int rows = static_cast<int>(in.rows);
      if (begin < last && in.quants != nullptr) {
        kernels.linear_i8(*task.w, *in.quants, rows, begin, last, task.bias, task.y, task.w->out);
      } else if (begin < last) {
        const auto linear = in.narrow ? kernels.linear_bf16 : kernels.linear_f32;
        linear(*task.w, in.x, in.width, rows, begin, last, task.bias, task.y, task.w->out);
      }
      begin = std::max<int64_t>(0, begin - here);
      end -= here;
    }
  });
}

}  // namespace inhouse
