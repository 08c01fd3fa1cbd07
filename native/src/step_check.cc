// Proves a step well formed before any kernel sees it: the rules of runtime/step.py's check_step, which is their
// definition and says what is wrong where this says no.
#include <algorithm>
#include <cstdint>
#include <vector>

#include "inhouse.h"
#include "kernels.h"

namespace {

using inhouse::kCacheBlock;

bool within(const int32_t* values, int64_t count, int64_t low, int64_t high) {
  bool good = true;
  for (int64_t i = 0; i < count; ++i) good &= values[i] >= low && values[i] < high;
  return good;
}

bool arrays_fit(const ih_step_rules& rules, const ih_step& s) {
  const int64_t types = rules.types > 0 ? rules.types : INT32_MAX;
  return within(s.tokens, s.rows, 0, rules.vocab_size) && within(s.positions, s.rows, 0, rules.context_length) &&
         within(s.sequence_of, s.rows, 0, s.sequences) && within(s.lengths, s.sequences, 0, rules.context_length + 1) &&
         within(s.sampled_rows, s.sampled, 0, s.rows) && within(s.types, s.rows, 0, types) &&
         within(s.prefixes, s.sequences, 0, rules.context_length + 1) &&
         within(s.encoder_lengths, s.sequences, 0, rules.context_length + 1);
}

// Rows of one sequence stand together, one position after the other, below its length.
bool rows_fit(const ih_step& s) {
  for (int64_t r = 0; r < s.rows; ++r) {
    const int32_t n = s.sequence_of[r];
    if (s.positions[r] >= s.lengths[n]) return false;
    if (r == 0) continue;
    const int32_t before = s.sequence_of[r - 1];
    if (n < before || (n == before && s.positions[r] != s.positions[r - 1] + 1)) return false;
  }
  for (int64_t n = 0; n < s.sequences; ++n) {
    if (s.prefixes[n] > s.lengths[n]) return false;
  }
  return true;
}

bool is_static(const ih_step_group& group, int64_t block) {
  return block < group.sink / kCacheBlock || (group.stride > 0 && block % group.stride == 0);
}

// Every block that the step writes or reads is lent.
bool table_fits(const ih_step_group& group, const ih_step& s) {
  const int32_t* table = s.tables[group.index];
  const int64_t width = s.table_widths[group.index];
  if (!within(table, s.sequences * width, -1, std::max<int64_t>(group.blocks, 1))) return false;
  for (int64_t r = 0; r < s.rows; ++r) {
    const int32_t n = s.sequence_of[r];
    if (r > 0 && n == s.sequence_of[r - 1]) continue;  // its first row says where it begins
    const int64_t end = group.cross ? s.encoder_lengths[n] : s.lengths[n];
    if (group.cross && end == 0) return false;
    const int64_t first = group.window > 0 ? std::max<int64_t>(s.positions[r] - group.window + 1, 0) : 0;
    const int64_t last = (end + kCacheBlock - 1) / kCacheBlock;
    if (last > width) return false;
    for (int64_t b = 0; b < last; ++b) {
      if (b < first / kCacheBlock && !is_static(group, b)) continue;
      if (table[n * width + b] < 0) return false;
    }
  }
  return true;
}

}  // namespace

int32_t ih_step_fits(const ih_step_rules* rules, const ih_step* step) {
  if (!arrays_fit(*rules, *step) || !rows_fit(*step)) return 0;
  for (int64_t g = 0; g < rules->group_count; ++g) {
    if (!table_fits(rules->groups[g], *step)) return 0;
  }
  return 1;
}
