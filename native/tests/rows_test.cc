// The row-wise bodies at every level of this machine, against double arithmetic: elementary functions over their whole
// range, norms, rotary angles; in place where the planner makes them so.
#include <cstring>

#include "check.h"
#include "dispatch.h"
#include "kernels.h"

using namespace inhouse;
using test::check;
using test::noise;
using test::worst;

namespace {

using Function = double (*)(double);

double silu(double x) { return x / (1 + std::exp(-x)); }
double gelu(double x) { return 0.5 * x * std::erfc(-x * M_SQRT1_2); }
double gelu_tanh(double x) { return 0.5 * x * (1 + std::tanh(std::sqrt(2 / M_PI) * (x + 0.044715 * x * x * x))); }
double relu(double x) { return x > 0 ? x : 0; }
double quick_gelu(double x) { return x / (1 + std::exp(-1.702 * x)); }
double hyperbolic(double x) { return std::tanh(x); }
double sigmoid(double x) { return 1 / (1 + std::exp(-x)); }

constexpr Function kFunctions[] = {silu, gelu, gelu_tanh, relu, quick_gelu, hyperbolic, sigmoid};

// Error in units of the last place of the result, or of 1e-7 where the result is smaller than that.
double error(float found, double exact) {
  return std::fabs(static_cast<double>(found) - exact) / std::fmax(std::fabs(exact), 1e-2);
}

void check_functions(const Kernels& k) {
  std::vector<float> x, y;
  for (double v = 1e-6; v < 120; v *= 1.003) {
    x.push_back(static_cast<float>(v));
    x.push_back(static_cast<float>(-v));
  }
  y.resize(x.size());
  for (int act = 0; act < kActivations; ++act) {
    k.activation(act, x.data(), static_cast<int64_t>(x.size()), y.data());
    double most = 0;
    for (size_t i = 0; i < x.size(); ++i)
      most = std::fmax(most, error(y[i], kFunctions[act](static_cast<double>(x[i]))));
    check(
        most < 3e-5 * (act == kGelu || act == kGeluTanh ? 1 : 0.1),
        std::string(k.isa) + " activation " + std::to_string(act) + " is off by " + std::to_string(most * 1e6) + "e-6");
  }
}

void check_special(const Kernels& k) {
  const float x[4] = {INFINITY, -INFINITY, NAN, 0.0f};
  float y[4];
  for (int act = 0; act < kActivations; ++act) {
    k.activation(act, x, 4, y);
    check(std::isnan(y[2]), std::string(k.isa) + ": NaN is kept by activation " + std::to_string(act));
    const bool bounded = act == kTanh || act == kSigmoid;
    check(y[0] == (bounded ? 1.0f : INFINITY), std::string(k.isa) + ": infinity, activation " + std::to_string(act));
    check(y[3] == (act == kSigmoid ? 0.5f : 0.0f), std::string(k.isa) + ": zero, activation " + std::to_string(act));
  }
}

void check_norms(const Kernels& k, int64_t n) {
  const std::vector<float> x = noise(1, static_cast<size_t>(n), 3.0f), w = noise(2, static_cast<size_t>(n)),
                           b = noise(3, static_cast<size_t>(n));
  double squares = 0, sum = 0, variance = 0;
  for (float v : x) {
    squares += double{v} * v;
    sum += v;
  }
  for (float v : x) variance += (v - sum / n) * (v - sum / n);
  std::vector<double> rms, layer;
  for (int64_t i = 0; i < n; ++i) {
    rms.push_back(x[i] / std::sqrt(squares / n + 1e-5) * (w[i] + 1.0));
    layer.push_back((x[i] - sum / n) / std::sqrt(variance / n + 1e-5) * w[i] + b[i]);
  }
  std::vector<float> y(x), z(x);
  k.rms_norm(y.data(), w.data(), 1e-5f, 1.0f, 1, n, y.data());
  k.layer_norm(z.data(), w.data(), b.data(), 1e-5f, n, z.data());
  check(worst(y, rms) < 1e-6, std::string(k.isa) + " rms_norm " + std::to_string(n));
  check(worst(z, layer) < 2e-6, std::string(k.isa) + " layer_norm " + std::to_string(n));
}

void check_rope(const Kernels& k, bool interleaved) {
  constexpr int64_t kDim = 40, kTurned = 36, kHeads = 3;
  const std::vector<float> frequencies = noise(4, kTurned / 2, 0.3f), x = noise(5, kHeads * kDim);
  std::vector<float> angles(kTurned), y(x);
  const int32_t position = 131071;
  k.rotary(position, frequencies.data(), 1.0f, kTurned / 2, angles.data());
  k.rope(y.data(), angles.data(), kHeads, kDim, kTurned, interleaved, y.data());
  std::vector<double> expected(x.begin(), x.end());
  for (int64_t h = 0; h < kHeads; ++h) {
    for (int64_t i = 0; i < kTurned / 2; ++i) {
      const int64_t a = h * kDim + (interleaved ? 2 * i : i), b = interleaved ? a + 1 : a + kTurned / 2;
      const double angle = double{frequencies[i]} * position;
      expected[a] = x[a] * std::cos(angle) - x[b] * std::sin(angle);
      expected[b] = x[b] * std::cos(angle) + x[a] * std::sin(angle);
    }
  }
  check(worst(y, expected) < 5e-7, std::string(k.isa) + " rope");
}

// Nothing beyond n is written, whatever n is.
void check_tails(const Kernels& k) {
  for (int64_t n = 1; n < 40; ++n) {
    const std::vector<float> a = noise(6, 40), b = noise(7, 40);
    std::vector<float> y(48, -7.0f);
    k.add(a.data(), b.data(), n, y.data());
    for (int64_t i = 0; i < 48; ++i) check(y[i] == (i < n ? a[i] + b[i] : -7.0f), std::string(k.isa) + " tail of add");
    k.max(a.data(), b.data(), n, y.data());
    for (int64_t i = 0; i < n; ++i) check(y[i] == std::fmax(a[i], b[i]), std::string(k.isa) + " max");
  }
}

}  // namespace

int main() {
  int levels = 0;
  for (const Kernels* k; (k = available_kernels(levels)) != nullptr; ++levels) {
    check_functions(*k);
    check_special(*k);
    for (int64_t n : {1, 15, 16, 17, 33, 64, 100, 4096}) check_norms(*k, n);
    check_rope(*k, false);
    check_rope(*k, true);
    check_tails(*k);
    std::printf("%s done\n", k->isa);
  }
  return test::finish();
}
