// Bodies of the row-wise float ops. Sums run over 16 lanes in ascending order, then down the fixed tree of reduce_add.
namespace inhouse::IH_ISA {
namespace {

// y[i] = f(x[i]) for i < n, sixteen at a time; y may be x.
template <class F>
IH_INLINE void map(const float* x, int64_t n, float* y, F f) {
  int64_t i = 0;
  for (; i + 16 <= n; i += 16) store(y + i, f(load(x + i)));
  if (i < n) store_n(y + i, n - i, f(load_n(x + i, n - i)));
}

// z[i] = f(x[i], y[i]); z may be x or y.
template <class F>
IH_INLINE void map2(const float* x, const float* y, int64_t n, float* z, F f) {
  int64_t i = 0;
  for (; i + 16 <= n; i += 16) store(z + i, f(load(x + i), load(y + i)));
  if (i < n) store_n(z + i, n - i, f(load_n(x + i, n - i), load_n(y + i, n - i)));
}

// Sum of f(x[i]); f(0) must be 0.
template <class F>
IH_INLINE float sum(const float* x, int64_t n, F f) {
  V even = zero(), odd = zero();
  int64_t i = 0;
  for (; i + 32 <= n; i += 32) {
    even = add(even, f(load(x + i)));
    odd = add(odd, f(load(x + i + 16)));
  }
  if (i + 16 <= n) {
    even = add(even, f(load(x + i)));
    i += 16;
  }
  if (i < n) odd = add(odd, f(load_n(x + i, n - i)));
  return reduce_add(add(even, odd));
}

inline float sqrt_one(float x) { return lane0(sqrt(set1(x))); }

void rms_norm(const float* x, const float* w, float eps, float offset, int64_t heads, int64_t n, float* y) {
  const V shift = set1(offset);
  for (int64_t h = 0; h < heads; ++h, x += n, y += n) {
    const float mean = sum(x, n, [](V v) { return mul(v, v); }) / static_cast<float>(n);
    const V inverse = set1(1.0f / sqrt_one(mean + eps));
    map2(x, w, n, y, [&](V v, V g) { return mul(mul(v, inverse), add(g, shift)); });
  }
}

void layer_norm(const float* x, const float* w, const float* b, float eps, int64_t n, float* y) {
  const float mean = sum(x, n, [](V v) { return v; }) / static_cast<float>(n);
  const V center = set1(mean);
  map(x, n, y, [&](V v) { return sub(v, center); });
  const float variance = sum(y, n, [](V v) { return mul(v, v); }) / static_cast<float>(n);
  const V inverse = set1(1.0f / sqrt_one(variance + eps));
  map2(y, w, n, y, [&](V v, V g) { return mul(mul(v, inverse), g); });
  if (b != nullptr) map2(y, b, n, y, [](V v, V shift) { return add(v, shift); });
}

template <int act>
void activation_of(const float* x, int64_t n, float* y) {
  map(x, n, y, [](V v) { return activate<act>(v); });
}

void activation(int act, const float* x, int64_t n, float* y) {
  switch (act) {
    case kSilu:
      return activation_of<kSilu>(x, n, y);
    case kGelu:
      return activation_of<kGelu>(x, n, y);
    case kGeluTanh:
      return activation_of<kGeluTanh>(x, n, y);
    case kRelu:
      return activation_of<kRelu>(x, n, y);
    case kQuickGelu:
      return activation_of<kQuickGelu>(x, n, y);
    case kTanh:
      return activation_of<kTanh>(x, n, y);
    default:
      return activation_of<kSigmoid>(x, n, y);
  }
}

template <int act>
void glu_of(const float* gate, const float* up, int64_t n, float* y) {
  map2(gate, up, n, y, [](V g, V u) { return mul(activate<act>(g), u); });
}

void glu(int act, const float* gate, const float* up, int64_t n, float* y) {
  switch (act) {
    case kSilu:
      return glu_of<kSilu>(gate, up, n, y);
    case kGelu:
      return glu_of<kGelu>(gate, up, n, y);
    case kGeluTanh:
      return glu_of<kGeluTanh>(gate, up, n, y);
    case kRelu:
      return glu_of<kRelu>(gate, up, n, y);
    case kQuickGelu:
      return glu_of<kQuickGelu>(gate, up, n, y);
    case kTanh:
      return glu_of<kTanh>(gate, up, n, y);
    default:
      return glu_of<kSigmoid>(gate, up, n, y);
  }
}

void add_rows(const float* a, const float* b, int64_t n, float* y) {
  map2(a, b, n, y, [](V u, V v) { return add(u, v); });
}

void mul_rows(const float* a, const float* b, int64_t n, float* y) {
  map2(a, b, n, y, [](V u, V v) { return mul(u, v); });
}

void max_rows(const float* a, const float* b, int64_t n, float* y) {
  map2(a, b, n, y, [](V u, V v) { return max(u, v); });
}

void scale_row(const float* a, float by, int64_t n, float* y) {
  const V factor = set1(by);
  map(a, n, y, [&](V v) { return mul(v, factor); });
}

void soft_cap(const float* a, float cap, int64_t n, float* y) {
  const V limit = set1(cap);
  map(a, n, y, [&](V v) { return mul(limit, tanh(div(v, limit))); });
}

// x / max(|x|, 1e-12), |x| the L2 norm.
void normalize_row(const float* x, int64_t n, float* y) {
  const float norm = sqrt_one(sum(x, n, [](V v) { return mul(v, v); }));
  const V by = set1(norm > 1e-12f ? norm : 1e-12f);
  map(x, n, y, [&](V v) { return div(v, by); });
}

// Angles in double: at position 100,000 a float product is off by thousandths of a radian.
void rotary(int32_t position, const float* inv_freq, float factor, int64_t half, float* cos_sin) {
  for (int64_t i = 0; i < half; ++i) {
    const SinCos angle = sin_cos(static_cast<double>(position) * static_cast<double>(inv_freq[i]));
    cos_sin[i] = static_cast<float>(angle.cosine * static_cast<double>(factor));
    cos_sin[half + i] = static_cast<float>(angle.sine * static_cast<double>(factor));
  }
}

// Pairs (i, i + half) of one head; y may be x.
IH_INLINE void rope_half(const float* x, const float* cosine, const float* sine, int64_t half, float* y) {
  for (int64_t i = 0; i < half; i += 16) {
    const int64_t n = half - i < 16 ? half - i : 16;
    const V a = load_n(x + i, n), b = load_n(x + half + i, n);
    const V c = load_n(cosine + i, n), s = load_n(sine + i, n);
    store_n(y + i, n, sub(mul(a, c), mul(b, s)));
    store_n(y + half + i, n, add(mul(b, c), mul(a, s)));
  }
}

// Pairs (2i, 2i + 1) of one head; y may be x.
IH_INLINE void rope_pairs(const float* x, const float* cosine, const float* sine, int64_t half, float* y) {
  for (int64_t i = 0; i < half; ++i) {
    const float a = x[2 * i], b = x[2 * i + 1];
    y[2 * i] = a * cosine[i] - b * sine[i];
    y[2 * i + 1] = b * cosine[i] + a * sine[i];
  }
}

void rope(const float* x, const float* cos_sin, int64_t heads, int64_t head_dim, int64_t rotary_dim, bool interleaved,
          float* y) {
  const int64_t half = rotary_dim / 2;
  for (int64_t h = 0; h < heads; ++h, x += head_dim, y += head_dim) {
    if (interleaved) {
      rope_pairs(x, cos_sin, cos_sin + half, half, y);
    } else {
      rope_half(x, cos_sin, cos_sin + half, half, y);
    }
    if (x != y) map(x + rotary_dim, head_dim - rotary_dim, y + rotary_dim, [](V v) { return v; });
  }
}

}  // namespace
}  // namespace inhouse::IH_ISA
