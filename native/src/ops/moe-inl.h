// Bodies of mixtures of experts: the choice of experts for a token, the weighted sum of their outputs, the gated unit
// with limits. A row's bits depend on that row alone.
namespace inhouse::IH_ISA {
namespace {

// e^(x - most) of each logit; gives their sum, in ascending order of runs of sixteen, then down the tree of reduce_add.
inline float exp_scores(const float* x, int64_t n, float most, float* y) {
  const V top = set1(most);
  map(x, n, y, [&](V v) { return exp(sub(v, top)); });
  return sum(y, n, [](V v) { return v; });
}

inline float largest(const float* x, int64_t n) {
  float most = x[0];
  for (int64_t i = 1; i < n; ++i) most = x[i] > most ? x[i] : most;
  return most;
}

// The largest of the values still open, the first among equals; it is open no longer. At least one must be open.
inline int32_t take_best(const float* values, int32_t n, bool* open) {
  int32_t best = -1;
  for (int32_t i = 0; i < n; ++i) {
    if (open[i] && (best < 0 || values[i] > values[best])) best = i;
  }
  open[best] = false;
  return best;
}

// What a run of experts counts as: its largest value, or its two largest together.
inline float run_value(const float* values, int32_t n, bool two) {
  int32_t first = 0, second = -1;
  for (int32_t i = 1; i < n; ++i) {
    if (values[i] > values[first]) {
      second = first;
      first = i;
    } else if (second < 0 || values[i] > values[second]) {
      second = i;
    }
  }
  return two ? values[first] + values[second] : values[first];
}

// Leaves open the experts of the best runs.
void open_best_groups(const RouteShape& s, const float* choice, bool* open) {
  float values[kMaxExperts];
  bool open_groups[kMaxExperts];
  const int32_t each = s.experts / s.groups;
  for (int32_t g = 0; g < s.groups; ++g) {
    values[g] = run_value(choice + g * each, each, s.two_best);
    open_groups[g] = true;
  }
  for (int32_t e = 0; e < s.experts; ++e) open[e] = false;
  for (int32_t i = 0; i < s.top_groups; ++i) {
    const int32_t g = take_best(values, s.groups, open_groups);
    for (int32_t e = 0; e < each; ++e) open[g * each + e] = true;
  }
}

// Two experts in turn, each weighed among the open ones that are near the best.
void sparse_mixer(const RouteShape& s, const float* logits, float* routing) {
  bool open[kMaxExperts];
  float near[kMaxExperts];
  for (int32_t e = 0; e < s.experts; ++e) open[e] = true;
  for (int i = 0; i < 2; ++i) {
    const int32_t best = take_best(logits, s.experts, open);
    const float top = logits[best];
    int32_t count = 1;
    near[0] = top;
    for (int32_t e = 0; e < s.experts; ++e) {
      const float magnitude = logits[e] < 0 ? -logits[e] : logits[e];
      const float against = magnitude > top ? magnitude : top;
      if (open[e] && !((top - logits[e]) / against > 2.0f * s.jitter)) near[count++] = logits[e];
    }
    routing[i] = static_cast<float>(best);
    routing[2 + i] = 1.0f / exp_scores(near, count, top, near) * s.scale;
  }
}

void route(const RouteShape& s, const float* logits, const float* correction, float* routing) {
  if (s.scoring == kSparsemixer) return sparse_mixer(s, logits, routing);
  float scores[kMaxExperts], choice[kMaxExperts];
  bool open[kMaxExperts];
  if (s.scoring == kScoreSigmoid) {
    activation_of<kSigmoid>(logits, s.experts, scores);
  } else if (s.scoring == kScoreSoftmax) {
    const V total = set1(exp_scores(logits, s.experts, largest(logits, s.experts), scores));
    map(scores, s.experts, scores, [&](V v) { return div(v, total); });
  } else {
    for (int32_t e = 0; e < s.experts; ++e) scores[e] = logits[e];
  }
  for (int32_t e = 0; e < s.experts; ++e) {
    choice[e] = correction == nullptr ? scores[e] : scores[e] + correction[e];
    open[e] = true;
  }
  if (s.groups > 0) open_best_groups(s, choice, open);
  float* weights = routing + s.top_k;
  float total = 0.0f;
  for (int32_t i = 0; i < s.top_k; ++i) {
    const int32_t best = take_best(choice, s.experts, open);
    routing[i] = static_cast<float>(best);
    weights[i] = scores[best];
    total += weights[i];
  }
  if (s.scoring == kSoftmaxAfter) total = exp_scores(weights, s.top_k, largest(weights, s.top_k), weights);
  if (s.scoring != kSoftmaxAfter) total += 1e-20f;
  const bool divide = s.normalize || s.scoring == kSoftmaxAfter;
  for (int32_t i = 0; i < s.top_k; ++i) weights[i] = (divide ? weights[i] / total : weights[i]) * s.scale;
}

// y = rows[0] * weights[0] + rows[1] * weights[1] + ..., each product rounded, in that order.
void weighted_sum(const float* const* rows, const float* weights, int count, int64_t n, float* y) {
  for (int64_t i = 0; i < n; i += 16) {
    const int64_t m = n - i < 16 ? n - i : 16;
    V total = mul(load_n(rows[0] + i, m), set1(weights[0]));
    for (int j = 1; j < count; ++j) total = add(total, mul(load_n(rows[j] + i, m), set1(weights[j])));
    store_n(y + i, m, total);
  }
}

// act(gate) * (up + offset), gate at most `limit`, up within it; NaN stays NaN.
template <int act>
void glu_cut_of(float limit, float offset, const float* gate, const float* up, int64_t n, float* y) {
  const V high = set1(limit), low = set1(-limit), shift = set1(offset);
  map2(gate, up, n, y, [&](V g, V u) { return mul(activate<act>(min(high, g)), add(max(low, min(high, u)), shift)); });
}

void glu_cut(int act, float limit, float offset, const float* gate, const float* up, int64_t n, float* y) {
  switch (act) {
    case kSilu:
      return glu_cut_of<kSilu>(limit, offset, gate, up, n, y);
    case kGelu:
      return glu_cut_of<kGelu>(limit, offset, gate, up, n, y);
    case kGeluTanh:
      return glu_cut_of<kGeluTanh>(limit, offset, gate, up, n, y);
    case kRelu:
      return glu_cut_of<kRelu>(limit, offset, gate, up, n, y);
    case kQuickGelu:
      return glu_cut_of<kQuickGelu>(limit, offset, gate, up, n, y);
    case kTanh:
      return glu_cut_of<kTanh>(limit, offset, gate, up, n, y);
    default:
      return glu_cut_of<kSigmoid>(limit, offset, gate, up, n, y);
  }
}

}  // namespace
}  // namespace inhouse::IH_ISA
