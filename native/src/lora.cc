#include "lora.h"

#include <algorithm>
#include <string>

#include "formats.h"
#include "step.h"

namespace inhouse {
namespace {

constexpr int32_t kMaxSlots = 4096;
constexpr int64_t kMaxRank = 4096;

// An f32 matrix in tiles.
bool is_tiles(const ih_weight& w) {
  return w.format == 0 && w.out > 0 && w.in > 0 && w.data != nullptr &&
         w.bytes == packed_bytes(kFormats[0], w.out, w.in);
}

Weight weight_of(const ih_weight& w) {
  return {w.format, w.out, w.in, static_cast<const uint8_t*>(w.data), static_cast<size_t>(w.bytes)};
}

}  // namespace

Status Adapters::set(int32_t slot, const ih_adapter_pair* pairs, int64_t count, const std::vector<Weight>& weights) {
  if (slot < 1 || slot > kMaxSlots) return Status::usage("adapter slot " + std::to_string(slot) + " out of range");
  std::vector<AdapterPair> made(count > 0 ? weights.size() : 0);
  for (int64_t i = 0; i < count; ++i) {
    const ih_adapter_pair& pair = pairs[i];
    if (pair.weight < 0 || static_cast<size_t>(pair.weight) >= weights.size()) return Status::usage("no such weight");
    const Weight& base = weights[pair.weight];
    if (pair.a.in != base.in || pair.b.out != base.out || pair.a.out != pair.b.in || pair.a.out > kMaxRank) {
      return Status::usage("an adapter's matrices do not fit weight " + std::to_string(pair.weight));
    }
    if (!is_tiles(pair.a) || !is_tiles(pair.b)) return Status::usage("an adapter's matrices must be f32 in tiles");
    made[pair.weight] = {weight_of(pair.a), weight_of(pair.b)};
    largest_rank = std::max(largest_rank, pair.a.out);
    widest_ = std::max(widest_, base.in);
  }
  if (slots_.size() < static_cast<size_t>(slot)) slots_.resize(slot);
  slots_[slot - 1] = std::move(made);
  input.resize(std::max<size_t>(input.size(), kAdapterRows * ((widest_ + 31) / 32 * 32)));
  return {};
}

// The sequence that row r of an axis belongs to.
int32_t Runner::sequence_of(Axis axis, int64_t r) const {
  if (axis == Axis::kSequences) return static_cast<int32_t>(r);
  if (axis == Axis::kSampled) return step_.sequence_of[step_.sampled_rows[r]];
  return step_.sequence_of[axis == Axis::kRouted ? model_.routed_.token[r] : r];
}

// Adds what the adapters of the step's sequences say to the outputs of a linears op; rows of one slot go together.
void Runner::adapt(const Op& op) {
  if (step_.adapters == nullptr || !model_.adapters_.any()) return;
  const Axis axis = value(op.inputs[0]).axis;
  const int64_t rows = rows_of(op.inputs[0]);
  for (int64_t begin = 0, end = 0; begin < rows; begin = end) {
    const int32_t slot = step_.adapters[sequence_of(axis, begin)];
    for (end = begin + 1; end < rows && end - begin < kAdapterRows; ++end) {
      if (step_.adapters[sequence_of(axis, end)] != slot) break;
    }
    if (slot > 0) adapt_rows(op, slot, begin, end - begin);
  }
}

void Runner::adapt_rows(const Op& op, int32_t slot, int64_t begin, int64_t rows) {
  Adapters& adapters = model_.adapters_;
  std::vector<std::pair<int32_t, const AdapterPair*>>& found = model_.adapter_pairs_;  // (output, pair)
  found.clear();
  for (size_t i = 0; i < op.outputs.size(); ++i) {
    if (const AdapterPair* pair = adapters.find(slot, op.weights[i])) found.emplace_back(op.outputs[i], pair);
  }
  if (found.empty()) return;
  const int64_t width = value(op.inputs[0]).width, ranks = adapters.largest_rank;
  const float* x = floats_of(op.inputs[0], begin, rows);
  const size_t middle = found.size() * kAdapterRows * ranks;
  if (adapters.middle.size() < middle) adapters.middle.resize(middle);
  const size_t scratch = static_cast<size_t>(pool_.threads() * kAdapterRows * kAdapterTiles * kTileRows);
  if (adapters.scratch.size() < scratch) adapters.scratch.resize(scratch);

  pool_.run(static_cast<int64_t>(found.size()), [&](int64_t i, int) {
    const Weight& a = found[i].second->a;
    float* t = adapters.middle.data() + i * kAdapterRows * ranks;
    kernels_.linear_f32(a, x, width, static_cast<int>(rows), 0, (a.out + kTileRows - 1) / kTileRows, nullptr, t, a.out);
  });
  for (size_t i = 0; i < found.size(); ++i) {
    const Weight& b = found[i].second->b;
    const float* t = adapters.middle.data() + static_cast<int64_t>(i) * kAdapterRows * ranks;
    const int64_t tiles = (b.out + kTileRows - 1) / kTileRows;
    pool_.run((tiles + kAdapterTiles - 1) / kAdapterTiles, [&](int64_t part, int worker) {
      const int64_t first = part * kAdapterTiles, last = std::min(tiles, first + kAdapterTiles);
      const int64_t from = first * kTileRows, count = std::min(b.out, last * kTileRows) - from;
      float* u = adapters.scratch.data() + worker * kAdapterRows * kAdapterTiles * kTileRows;
      Weight strip = b;  // its tiles [first, last) as a matrix of their own, so that results start at u
      strip.data += first * layout_of(kFormats[0], b.in).tile_bytes;
      strip.out = count;
      kernels_.linear_f32(strip, t, b.in, static_cast<int>(rows), 0, last - first, nullptr, u, count);
      for (int64_t r = 0; r < rows; ++r) {
        float* y = row(found[i].first, begin + r) + from;
        kernels_.add(y, u + r * count, count, y);
      }
    });
  }
}

// Rows of a value as floats: themselves, or what quantised ones stand for.
const float* Runner::floats_of(int32_t v, int64_t begin, int64_t rows) {
  if (value(v).dtype != DType::kI8) return row(v, begin);
  const QuantRows q = codes(v);
  const int64_t width = value(v).width;
  float* x = model_.adapters_.input.data();
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t k = 0; k < width; ++k) {
      const int64_t entry = q.at(begin + r, k / kQuantGroup);
      x[r * width + k] = static_cast<float>(q.codes[entry * kQuantGroup + k % kQuantGroup]) * q.scales[entry];
    }
  }
  return x;
}

}  // namespace inhouse
