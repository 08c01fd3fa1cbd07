// The first half of a gated feed-forward over many rows: gate and up, gate times up, and its codes, some outputs and
// some rows at a time. Done one after the other over all rows, the floats between them would fill the last cache
// several times; so they never leave the second-level cache. The bits are those of the three ops.
#include <algorithm>

#include "formats.h"
#include "step.h"

namespace inhouse {

namespace {

constexpr int64_t kGatedRows = 64;      // at once: as many as a body prepares
constexpr int64_t kLeastGatedRows = 9;  // below, floats are few, and weights want to be read in long runs
constexpr int64_t kShare = 4;           // groups of outputs a claim, about
constexpr int64_t kGroupTiles = kQuantGroup / kTileRows;

// Groups [begin, end) of kQuantGroup outputs as a matrix of their own.
Weight part_of(const Weight& w, int64_t begin, int64_t end) {
  Weight part = w;
  part.data += begin * kGroupTiles * layout_of(kFormats[w.format], w.in).tile_bytes;
  part.out = (end - begin) * kQuantGroup;
  return part;
}

// Claims of groups of outputs, each of `share` groups about.
struct Claims {
  Claims(int64_t width, int64_t threads)
      : groups(width / kQuantGroup),
        share(std::max<int64_t>(1, groups / (kShare * threads))),
        count(std::min(groups, share * threads)),
        most((groups + count - 1) / count * kQuantGroup) {}
  int64_t groups, share, count;
  int64_t most;  // outputs of a claim
};

bool is_plain(const Weight* w, int64_t width) {
  return w->out == width && takes_int8(kFormats[w->format]) && kFormats[w->format].coding == kDense;
}

}  // namespace

int64_t gated_floats(int64_t width, int64_t rows, int64_t threads) {
  return rows < kLeastGatedRows ? 0 : threads * 2 * kGatedRows * Claims(width, threads).most;
}

bool Runner::runs_gated(size_t i) const {
  if (!model_.arena_->plan(index_).gated[i]) return false;
  const Op& op = program_.ops[i];
  const int64_t width = value(op.outputs[0]).width;
  const bool adapted = step_.adapters != nullptr && model_.adapters_.any();
  return rows_of(op.inputs[0]) >= kLeastGatedRows && !adapted && is_plain(weight(op, 0), width) &&
         is_plain(weight(op, 1), width);
}

void Runner::gated(const Op& op, const Op& glu_op, const Op& quantize) {
  const int64_t rows = rows_of(op.inputs[0]), threads = pool_.threads();
  const QuantRows x = codes(op.inputs[0]), y = codes(quantize.outputs[0]);
  const bool powers = quantize.integer(1) != 0;
  const Claims claims(value(op.outputs[0]).width, threads);
  const int64_t most = claims.most;
  std::vector<float>& scratch = model_.gated_;  // gated_floats of them, at least
  pool_.run(claims.count, [&](int64_t claim, int worker) {
    // A thread reads on where it stopped, as in run_linears.
    const int64_t share = claims.share;
    const int64_t chunk = claims.count == share * threads ? claim % threads * share + claim / threads : claim;
    const int64_t begin = claims.groups * chunk / claims.count, end = claims.groups * (chunk + 1) / claims.count;
    const int64_t n = (end - begin) * kQuantGroup, from = begin * kQuantGroup;
    float* halves[2] = {scratch.data() + worker * 2 * kGatedRows * most, nullptr};
    halves[1] = halves[0] + kGatedRows * most;
    for (int64_t first = 0; first < rows; first += kGatedRows) {
      const int64_t count = std::min(kGatedRows, rows - first);
      for (size_t i = 0; i < 2; ++i) {
        const float* bias = vector(op, 2 + i);
        kernels_.linear_i8(part_of(*weight(op, i), begin, end), x.view(first, 0), static_cast<int>(count), 0,
                           n / kTileRows, bias == nullptr ? nullptr : bias + from, halves[i], n);
      }
      for (int64_t r = 0; r < count; ++r) {
        float* gate = halves[0] + r * n;
        glu(glu_op, gate, halves[1] + r * n, n, gate);
        kernels_.quantize_row(gate, n, kQuantGroup, powers, y.view(0, begin), first + r);
      }
    }
  });
}

}  // namespace inhouse
