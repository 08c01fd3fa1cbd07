#include "linears.h"

#include <algorithm>

namespace inhouse {

namespace {

constexpr int64_t kTileProducts = 65536;  // multiply-adds that are worth a claim of their own
constexpr int64_t kClaimsPerThread = 4;

int64_t tiles_of(const Weight& w) { return (w.out + kTileRows - 1) / kTileRows; }

}  // namespace

// Chunks of weight tiles, counted through the matrices.
void run_linears(Pool::Step& pool, const Kernels& kernels, const LinearInput& in, const LinearTask* tasks,
                 size_t count) {
  if (in.rows == 0) return;
  int64_t tiles = 0;
  for (size_t i = 0; i < count; ++i) tiles += tiles_of(*tasks[i].w);
  const int64_t worth = std::max<int64_t>(1, kTileProducts / (in.rows * in.width * kTileRows));
  const int64_t fair = std::max<int64_t>(1, tiles / (pool.threads() * kClaimsPerThread));
  const int64_t chunk = std::max(worth, fair);
  pool.run((tiles + chunk - 1) / chunk, [&](int64_t claim, int) {
    int64_t begin = claim * chunk, end = std::min(tiles, begin + chunk);
    for (size_t i = 0; i < count && end > 0; ++i) {
      const LinearTask& task = tasks[i];
      const int64_t here = tiles_of(*task.w), last = std::min(end, here);
      const int rows = static_cast<int>(in.rows);
      if (begin < last && in.quants != nullptr) {
        kernels.linear_i8(*task.w, *in.quants, rows, begin, last, task.bias, task.y, task.w->out);
      } else if (begin < last) {
        kernels.linear_f32(*task.w, in.x, in.width, rows, begin, last, task.bias, task.y, task.w->out);
      }
      begin = std::max<int64_t>(0, begin - here);
      end -= here;
    }
  });
}

}  // namespace inhouse
