// The packed bodies at every level that this machine runs, on random tiles of every format, against a reference written
// apart from them: the same bits where fma rounds once (all levels but scalar), within rounding elsewhere; the same
// bits for any number of rows and any split of the tiles. Needs no library but this one.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <string>
#include <vector>

#include "dispatch.h"
#include "formats.h"
#include "kernels.h"

using namespace inhouse;

namespace {

int failures = 0;

void check(bool ok, const std::string& what) {
  if (ok) return;
  if (++failures <= 20) std::printf("FAILED %s\n", what.c_str());
}

struct Aligned {  // 64-byte aligned bytes, exactly as many as asked for, so that a sanitizer sees every overrun
  explicit Aligned(size_t n) : bytes(n), data(static_cast<uint8_t*>(std::aligned_alloc(64, (n + 63) / 64 * 64))) {}
  ~Aligned() { std::free(data); }
  Aligned(const Aligned&) = delete;
  size_t bytes;
  uint8_t* data;
};

float half_to_float(uint16_t h) {
  const int exponent = h >> 10 & 31, mantissa = h & 1023;
  const float m = exponent ? std::ldexp(1024.0f + mantissa, exponent - 25) : std::ldexp(1.0f * mantissa, -24);
  return h & 0x8000 ? -m : m;
}

// Random matrix of a format; scales are small finite numbers, codes any bytes.
struct Matrix {
  Matrix(int format, int64_t out, int64_t in, std::mt19937& rng)
      : f(kFormats[format]), l(layout_of(f, in)), bytes(packed_bytes(f, out, in)) {
    for (size_t i = 0; i < bytes.bytes; ++i) bytes.data[i] = static_cast<uint8_t>(rng());
    const int64_t tiles = (out + 15) / 16, item = scalar_bytes(f.scale);
    for (int64_t t = 0; t < tiles; ++t) {
      uint8_t* tile = bytes.data + t * l.tile_bytes;
      const int64_t end = f.low == 0 ? l.tile_bytes : f.two_level ? l.sub_scale : f.zeros ? l.zeros : l.low;
      for (int64_t i = 0; i + item <= end; i += item) {
        const float v = std::ldexp(1.0f * static_cast<int>(rng() % 2001) - 1000, -12);
        const uint32_t bits = __builtin_bit_cast(uint32_t, v);
        const uint16_t half = static_cast<uint16_t>((rng() & 0x83ff) | (rng() % 12 + 4) << 10);
        const uint16_t brain = static_cast<uint16_t>(bits >> 16);
        if (f.scale == kF32) std::memcpy(tile + i, &bits, 4);
        if (f.scale == kF16) std::memcpy(tile + i, &half, 2);
        if (f.scale == kBF16) std::memcpy(tile + i, &brain, 2);
        if (f.scale == kE8M0) tile[i] = static_cast<uint8_t>(120 + rng() % 16);
      }
      for (int64_t i = end; float_subs(f) && i < l.low; ++i) tile[i] &= 0x7f;  // e4m3 without a sign
    }
    weight = {format, out, in, bytes.data, bytes.bytes};
  }

  float parameter(const uint8_t* p, int64_t i) const {
    float wide;
    uint16_t half;
    if (f.scale == kF32) return std::memcpy(&wide, p + 4 * i, 4), wide;
    if (f.scale == kE8M0) return std::ldexp(1.0f, p[i] - 128);
    std::memcpy(&half, p + 2 * i, 2);
    return f.scale == kF16 ? half_to_float(half) : __builtin_bit_cast(float, static_cast<uint32_t>(half) << 16);
  }
  const uint8_t* tile(int64_t o) const { return bytes.data + o / 16 * l.tile_bytes; }
  int64_t group(int64_t k) const { return f.group ? k / f.group : 0; }
  float section(int64_t o, int64_t k, int64_t at, int64_t sub) const {
    const int64_t lane = o % 16;
    if (!f.two_level) return parameter(tile(o) + at, group(k) * 16 + lane);
    if (float_subs(f)) {
      const int e = tile(o)[sub + group(k) * 16 + lane];
      const float times = e < 8 ? std::ldexp(1.0f * e, -9) : std::ldexp(1.0f * (8 + e % 8), e / 8 - 10);
      return parameter(tile(o) + at, lane) * times;
    }
    const int8_t times = static_cast<int8_t>(tile(o)[sub + group(k) * 16 + lane]);
    return parameter(tile(o) + at, k / 256 * 16 + lane) * times;
  }
  float scale(int64_t o, int64_t k) const { return section(o, k, l.scale, l.sub_scale); }
  int zero_point(int64_t o, int64_t k) const {
    return f.zeros ? static_cast<int8_t>(tile(o)[l.zeros + group(k) * 16 + o % 16]) : 0;
  }
  bool offset() const { return f.minimum || f.zeros; }
  float minimum(int64_t o, int64_t k) const {
    if (f.zeros) return -(scale(o, k) * static_cast<float>(zero_point(o, k)));
    const float m = f.minimum ? section(o, k, l.minimum, l.sub_minimum) : 0.0f;
    return f.two_level ? -m : m;
  }
  int plane(int64_t o, int64_t k, int64_t at, int bits) const {  // the layout's prose, spelled out
    if (bits == 0) return 0;
    const int64_t block = k / 32, q = k % 32 / 4, byte = o % 16 * 4 + k % 4;
    const uint8_t* p = tile(o) + at + block * bits * 64;
    if (bits == 8) return p[q * 64 + byte];
    if (bits == 4) return q < 4 ? p[q * 64 + byte] & 15 : p[(q - 4) * 64 + byte] >> 4;
    if (bits == 2) return p[q / 4 * 64 + byte] >> (2 * (q % 4)) & 3;
    return p[byte] >> q & 1;
  }
  int raw(int64_t o, int64_t k) const { return plane(o, k, l.low, f.low) | plane(o, k, l.high, f.high) << f.low; }
  int code(int64_t o, int64_t k) const {
    const bool integers = looks_up_bytes(f);
    return (integers ? kCodeTables[f.table - kIQ4][raw(o, k)] : raw(o, k)) - f.zero;
  }
  float float8(int byte) const {
    const int e = byte & 127, fraction = f.table == kE4M3 ? 8 : 4, lowest = f.table == kE4M3 ? -9 : -16;
    const float v = e < fraction ? std::ldexp(1.0f * e, lowest)
                                 : std::ldexp(1.0f * (fraction + e % fraction), e / fraction - 1 + lowest);
    return byte & 128 ? -v : v;
  }
  float value(int64_t o, int64_t k) const {
    if (f.low == 0) return parameter(tile(o), k * 16 + o % 16);
    if (f.table >= kE4M3) return float8(raw(o, k)) * scale(o, k);
    if (f.table >= kNF4) return kFloatTables[f.table - kNF4][raw(o, k)] * scale(o, k);
    const float product = static_cast<float>(code(o, k) - zero_point(o, k)) * scale(o, k);
    return f.minimum ? product + minimum(o, k) : product;
  }

  Format f;
  Layout l;
  Aligned bytes;
  Weight weight;
};

struct Rows {  // activations, and their quantised form by the kernel itself
  Rows(const Kernels& k, int rows, int64_t width, int64_t group, std::mt19937& rng, bool powers = false)
      : x(rows * width),
        capacity((rows + kMaxLanes - 1) / kMaxLanes * kMaxLanes),
        memory(quant_bytes(capacity, width)) {
    std::normal_distribution<float> normal;
    for (float& v : x) v = normal(rng);
    remake(k, rows, width, group, powers);
  }
  void remake(const Kernels& k, int rows, int64_t width, int64_t group, bool powers = false) {
    q = quant_rows(memory.data(), capacity, width, rows);
    for (int r = 0; r < rows; ++r) k.quantize_row(&x[r * width], width, group, powers, q, r);
  }
  int8_t& code(int64_t r, int64_t k) const { return q.codes[q.at(r, k / 32) * 32 + k % 32]; }
  std::vector<float> x;
  int64_t capacity;
  std::vector<uint8_t> memory;
  QuantRows q;
};

// Group by group, as linear_codes-inl.h promises.
float expected_i8(const Matrix& m, const Rows& x, int r, int64_t o) {
  const int64_t run = m.f.group == 16 ? 16 : 32;
  float y = 0;
  for (int64_t first = 0; first < m.l.width; first += run) {
    int32_t dot = 0, sum = 0;
    for (int64_t k = first; k < first + run; ++k) {
      const int32_t a = x.code(r, k);
      dot += m.code(o, k) * a;
      sum += a;
    }
    const float s = x.q.scales[x.q.at(r, first / 32)];
    y = std::fma(static_cast<float>(dot), m.scale(o, first) * s, y);
    if (m.offset()) y = std::fma(m.minimum(o, first), static_cast<float>(sum) * s, y);
  }
  return y;
}

float expected_f32(const Matrix& m, const float* x, int64_t o) {
  float even = 0, odd = 0;
  for (int64_t k = 0; k < m.weight.in; ++k) {
    float& y = k % 2 ? odd : even;
    y = std::fma(m.value(o, k), x[k], y);
  }
  return even + odd;
}

float through_bf16(float v) {
  uint32_t bits;
  std::memcpy(&bits, &v, 4);
  bits = (bits + 0x7fff + (bits >> 16 & 1)) & 0xffff0000u;
  std::memcpy(&v, &bits, 4);
  return v;
}

float expected_bf16(const Matrix& m, const float* x, int64_t o) {
  float sums[2] = {};
  for (int64_t k = 0; k < m.weight.in; k += 2) {
    float& y = sums[k / 2 % 2];
    y = std::fma(m.value(o, k), through_bf16(x[k]), std::fma(m.value(o, k + 1), through_bf16(x[k + 1]), y));
  }
  return sums[0] + sums[1];
}

bool agree(float a, float b, bool exact, float size) { return exact ? a == b : std::fabs(a - b) <= 1e-4f * size; }

// All rows at once against the reference; then every count of rows and every split of tiles against all at once.
template <class Run, class Expected>
void check_linear(const std::string& name, const Matrix& m, int rows, bool exact, Run run, Expected expected) {
  const int64_t out = m.weight.out, tiles = (out + 15) / 16;
  std::vector<float> whole(rows * out, -1), part(rows * out);
  run(rows, 0, tiles, whole.data());
  float size = 0;
  for (float v : whole) size = std::max(size, std::fabs(v));
  for (int r = 0; r < rows; r += rows > 5 ? 5 : 1) {
    for (int64_t o = 0; o < out; ++o) {
      check(agree(whole[r * out + o], expected(r, o), exact, size), name + " value");
    }
  }
  for (int n = 1; n <= rows; ++n) {
    std::fill(part.begin(), part.end(), 0.0f);
    for (int64_t t = 0; t < tiles; ++t) run(n, t, t + 1, part.data());
    check(std::memcmp(part.data(), whole.data(), n * out * 4) == 0, name + " bits for " + std::to_string(n) + " rows");
  }
}

void check_matrix(const Kernels& k, int format, int64_t out, int64_t in, int rows, std::mt19937& rng) {
  const Matrix m(format, out, in, rng);
  if (!m.l.valid) return;
  const bool exact = std::string(k.isa) != "scalar";
  const std::string name = std::string(k.isa) + " " + m.f.name + " " + std::to_string(out) + "x" + std::to_string(in);
  std::vector<float> bias(out), row(in);
  for (float& b : bias) b = static_cast<float>(rng() % 100);
  for (int64_t o = 0; o < out; ++o) {
    k.unpack_row(m.weight, o, row.data());
    for (int64_t i = 0; i < in; ++i) check(row[i] == m.value(o, i), name + " unpack_row");
  }
  const Rows x(k, rows, in, 32, rng), whole(k, rows, in, in, rng);
  check_linear(
      name + " f32", m, rows, exact,
      [&](int n, int64_t a, int64_t b, float* y) {
        k.linear_f32(m.weight, x.x.data(), in, n, a, b, bias.data(), y, out);
      },
      [&](int r, int64_t o) { return expected_f32(m, &x.x[r * in], o) + bias[o]; });
  if (format == kBf16Format && in % 4 == 0) {
    check_linear(
        name + " bf16", m, rows, exact,
        [&](int n, int64_t a, int64_t b, float* y) {
          k.linear_bf16(m.weight, x.x.data(), in, n, a, b, bias.data(), y, out);
        },
        [&](int r, int64_t o) { return expected_bf16(m, &x.x[r * in], o) + bias[o]; });
  }
  if (!takes_int8(m.f)) return;
  check_linear(
      name + " i8", m, rows, exact,
      [&](int n, int64_t a, int64_t b, float* y) { k.linear_i8(m.weight, x.q, n, a, b, bias.data(), y, out); },
      [&](int r, int64_t o) { return expected_i8(m, x, r, o) + bias[o]; });
  check_linear(
      name + " i8 row scales", m, std::min(rows, 2), exact,
      [&](int n, int64_t a, int64_t b, float* y) { k.linear_i8(m.weight, whole.q, n, a, b, nullptr, y, out); },
      [&](int r, int64_t o) { return expected_i8(m, whole, r, o); });
}

// Scales that are powers of two: the reference's values; and beside a row with a NaN, or with scales too large to add
// exponents for, where bodies multiply them, the same bits.
void check_powers(const Kernels& k, int format, std::mt19937& rng) {
  const int64_t in = 512, out = 37;
  const int rows = 13;
  Matrix m(format, out, in, rng);
  if (!takes_int8(m.f) || !m.l.valid) return;
  if (m.f.scale == kF16 && !m.f.two_level) {
    for (int64_t o = 0; o < out; o += 3)
      std::memset(m.bytes.data + o / 16 * m.l.tile_bytes + m.l.scale + o % 16 * 2, 0, 2);
  }
  const std::string name = std::string(k.isa) + " " + m.f.name + " powers";
  Rows x(k, rows, in, 32, rng, true);
  std::fill_n(&x.x[2 * in + 64], 32, 0.0f);
  std::fill_n(&x.x[3 * in], in, 0x1p-90f);
  x.remake(k, rows, in, 32, true);
  const auto run = [&](const Rows& given, int n, int64_t a, int64_t b, float* y) {
    k.linear_i8(m.weight, given.q, n, a, b, nullptr, y, out);
  };
  check_linear(
      name, m, rows, std::string(k.isa) != "scalar", [&](int n, int64_t a, int64_t b, float* y) { run(x, n, a, b, y); },
      [&](int r, int64_t o) { return expected_i8(m, x, r, o); });
  std::vector<float> added(rows * out), multiplied(rows * out);
  run(x, rows, 0, 3, added.data());
  for (const float fault : {std::nanf(""), 0x1p100f}) {
    Rows other = x;
    other.x[(rows - 1) * in + 7] = fault;
    other.remake(k, rows, in, 32, true);
    run(other, rows, 0, 3, multiplied.data());
    check(std::memcmp(added.data(), multiplied.data(), static_cast<size_t>((rows - 1) * out) * 4) == 0, name + " bits");
    for (int64_t o = 0; o < out; ++o) {
      const float y = multiplied[(rows - 1) * out + o], wanted = expected_i8(m, other, rows - 1, o);
      check(std::isnan(fault) ? std::isnan(y) : agree(y, wanted, std::string(k.isa) != "scalar", std::fabs(wanted)),
            name + " fault");
    }
  }
}

// Scales that are infinite or no number: where exponents are added the bits are those of products all the same, and
// rows beside them keep their own. A scale of activations that is no power of two makes bodies multiply; its row counts
// for nothing here. Twice: many rows (more than a body takes at once), and one.
void check_endless_scales(const Kernels& k, int format, std::mt19937& rng) {
  const int64_t in = 512, out = 37;
  Matrix m(format, out, in, rng);
  if (!takes_int8(m.f) || !m.l.valid || m.f.scale != kF16) return;
  const std::string name = std::string(k.isa) + " " + m.f.name + " endless scales";
  const uint16_t faults[] = {0x7c00, 0xfc00, 0x7e00};  // of outputs 1, 18 and 35: another tile each
  for (int64_t i = 0; i < 3; ++i) {
    const int64_t o = 1 + 17 * i, group = m.f.two_level ? in / 256 - 1 : m.group(in / 2);
    std::memcpy(m.bytes.data + o / 16 * m.l.tile_bytes + m.l.scale + (group * 16 + o % 16) * 2, &faults[i], 2);
  }
  for (const int rows : {1, 13}) {
    Rows x(k, rows + 1, in, 32, rng, true);
    std::vector<float> added((rows + 1) * out), multiplied((rows + 1) * out);
    k.linear_i8(m.weight, x.q, rows, 0, 3, nullptr, added.data(), out);
    x.x[static_cast<size_t>(rows * in)] = 0x1p100f;
    x.remake(k, rows + 1, in, 32, true);
    k.linear_i8(m.weight, x.q, rows + 1, 0, 3, nullptr, multiplied.data(), out);
    check(std::memcmp(added.data(), multiplied.data(), static_cast<size_t>(rows * out) * 4) == 0, name + " bits");
    for (int64_t i = 0; i < rows * out; ++i) {
      const bool faulty = i % out % 17 == 1;
      check(std::isfinite(added[i]) != faulty, name + (faulty ? " are seen" : " touch no other row"));
    }
  }
}

// Rows and inputs from the middle of a larger matrix of activations give the bits of a matrix of their own.
void check_views(const Kernels& k, int format, std::mt19937& rng) {
  const int64_t in = 256, out = 20;
  const Matrix m(format, out, in, rng);
  if (!takes_int8(m.f) || !m.l.valid) return;
  const Rows wide(k, 21, 3 * in, 32, rng);
  std::vector<float> part(21 * out), own(21 * out);
  for (const int begin : {0, 1, 3, 8, 13}) {
    Rows x(k, 21, in, 32, rng);
    for (int r = begin; r < 21; ++r) std::memcpy(&x.x[(r - begin) * in], &wide.x[r * 3 * in + in], in * 4);
    x.remake(k, 21 - begin, in, 32);
    k.linear_i8(m.weight, wide.q.view(begin, in / 32), 21 - begin, 0, 2, nullptr, part.data(), out);
    k.linear_i8(m.weight, x.q, 21 - begin, 0, 2, nullptr, own.data(), out);
    check(std::memcmp(part.data(), own.data(), static_cast<size_t>((21 - begin) * out) * 4) == 0,
          std::string(k.isa) + " " + m.f.name + " view from row " + std::to_string(begin));
  }
}

// The extremes: codes of all ones times activations of +-127 must not saturate anywhere.
void check_extremes(const Kernels& k, int format, std::mt19937& rng) {
  const int64_t in = 256;
  Matrix m(format, 16, in, rng);
  if (!takes_int8(m.f) || !m.l.valid) return;
  for (const uint8_t fill : {0x00, 0xff, 0x80}) {
    std::memset(m.bytes.data + m.l.low, fill, m.l.tile_bytes - m.l.low);
    Rows x(k, 2, in, 32, rng);
    for (int64_t i = 0; i < in; ++i) {
      x.x[i] = 1.0f;
      x.x[in + i] = -1.0f;
    }
    x.remake(k, 2, in, 32);
    check_linear(
        std::string(k.isa) + " " + m.f.name + " extremes", m, 2, std::string(k.isa) != "scalar",
        [&](int n, int64_t a, int64_t b, float* y) { k.linear_i8(m.weight, x.q, n, a, b, nullptr, y, 16); },
        [&](int r, int64_t o) { return expected_i8(m, x, r, o); });
  }
}

// Row 2 of three, between rows that it must leave alone.
void check_quantize(const Kernels& k, int64_t width, int64_t group, bool powers, std::mt19937& rng) {
  Rows rows(k, 3, width, group, rng);
  float* x = &rows.x[2 * width];
  if (width > 40) std::fill(x, x + 32, 0.0f);
  if (width > 70) x[64] = std::nanf("");
  std::fill(rows.memory.begin(), rows.memory.end(), uint8_t{99});
  const QuantRows q = quant_rows(rows.memory.data(), rows.capacity, width, 3);
  k.quantize_row(x, width, group, powers, q, 2);
  const std::string name = std::string(k.isa) + " quantize_row " + std::to_string(width);
  for (int64_t first = 0; first < width; first += group) {
    const int64_t last = std::min(width, first + group);
    float most = 0;
    bool nan = false;
    for (int64_t i = first; i < last; ++i) {
      nan = nan || std::isnan(x[i]);
      most = std::max(most, std::fabs(x[i]));
    }
    for (int64_t i = first; i < last; ++i) {
      const float scale = q.scales[q.at(2, i / 32)];
      const float power = std::max(0x1p-60f, std::exp2(std::ceil(std::log2(most / 127.0f))));
      check(nan ? std::isnan(scale) : scale == (powers ? power : most / 127.0f), name + " scale");
      const float inverse = powers ? 1.0f / power : 127.0f / most;
      const float code = nan || most == 0 ? 0.0f : std::nearbyint(x[i] * inverse);
      check(rows.code(2, i) == code, name + " code");
    }
  }
  for (int64_t i = width; i < q.blocks * 32; ++i) check(rows.code(2, i) == 0, name + " padding");
  for (int64_t b = 0; b < q.blocks; ++b) {
    int32_t sums[2] = {};
    for (int64_t i = 0; i < 32; ++i) sums[i / 16] += rows.code(2, b * 32 + i);
    check(q.low[q.at(2, b)] == sums[0] && q.sums[q.at(2, b)] == sums[0] + sums[1], name + " sums");
    for (int64_t other = 0; other < 2; ++other) check(q.sums[q.at(other, b)] == 0x63636363, name + " others' rows");
  }
}

}  // namespace

int main() {
  std::mt19937 rng(7);
  int levels = 0;
  for (const Kernels* k; (k = available_kernels(levels)) != nullptr; ++levels) {
    const int rows = std::string(k->isa) == "scalar" ? 5 : 33;
    for (int format = 0; format < kFormatCount; ++format) {
      if (kFormats[format].coding != kDense) continue;  // sparse_test.cc
      // Of a family, whose bodies are one: the first, one of longer groups in bf16, and the whole row in f32.
      const int member = kFormats[format].family && format >= 29 ? (format - 29) % 12 : 0;
      if (member != 0 && member != 7 && member != 11) continue;
      check_matrix(*k, format, 37, 512, rows, rng);
      check_matrix(*k, format, 16, 256, 3, rng);
      check_matrix(*k, format, 5, 172, 9, rng);  // inputs that are no multiple of the block
      check_matrix(*k, format, 1, 32, 1, rng);
      check_extremes(*k, format, rng);
      check_views(*k, format, rng);
      check_powers(*k, format, rng);
      check_endless_scales(*k, format, rng);
    }
    for (const int64_t width : {1, 15, 16, 31, 32, 33, 172, 512}) {
      check_quantize(*k, width, 32, false, rng);
      check_quantize(*k, width, 32, true, rng);
      check_quantize(*k, width, width, false, rng);
    }
    std::printf("%s done\n", k->isa);
  }
  std::printf("%d levels, %d failures\n", levels, failures);
  return failures != 0;
}
