// Elementary functions over the float vocabulary. Coefficients are Chebyshev fits made for these intervals; errors
// are those of the fit, in front of float rounding.
namespace inhouse::IH_ISA {
namespace {

IH_INLINE VI bits_of(V v) { return __builtin_bit_cast(VI, v); }

// 2^n * p for integer n in [-252, 256], in two steps so that the ends of the float range come out right.
IH_INLINE V scale_by_power(V p, VI n) {
  const VI half = shift_right_signed<1>(n);
  const VI bias = set1_int(127);
  const V low = from_bits(shift_left<23>(add_int(half, bias)));
  const V high = from_bits(shift_left<23>(add_int(sub_int(n, half), bias)));
  return mul(mul(p, low), high);
}

// e^x; |error| of the fit 2e-10 relative. 0 below -103.97, infinite above 88.73, NaN stays NaN.
IH_INLINE V exp(V x) {
  const V clamped = max(set1(-104.0f), min(set1(89.0f), x));
  const V n = round_even(mul(clamped, set1(1.44269504088896341f)));
  V r = fma(n, set1(-0.693145751953125f), clamped);  // first 15 bits of ln 2: n times it is exact
  r = fma(n, set1(-1.42860682030941723e-6f), r);     // the rest
  V p = fma(set1(0.0001989098087f), r, set1(0.001393364103f));
  p = fma(p, r, set1(0.008333310934f));
  p = fma(p, r, set1(0.04166646501f));
  p = fma(p, r, set1(0.1666666668f));
  p = fma(p, r, set1(0.5f));
  p = fma(mul(r, r), p, r);
  const V y = scale_by_power(add(p, set1(1.0f)), to_int(n));
  return select(less(x, set1(-103.97f)), zero(), y);
}

// e^x for x <= 0 as the weights of a softmax need it: the fit is off by 9.1e-08 relative, reduction in one step by
// 6e-8 |x| more; e^0 is 1; what is below -87 counts as -87; NaN stays NaN.
IH_INLINE V exp_below(V x) {
  const V clamped = max(set1(-87.0f), x), log2e = set1(1.44269504088896341f);
  const V n = round_even(mul(clamped, log2e));
  const V r = fma(clamped, log2e, sub(zero(), n));
  V p = fma(set1(0.001326472614891827f), r, set1(0.009671512991189957f));
  p = fma(p, r, set1(0.05550733581185341f));
  p = fma(p, r, set1(0.24022242426872253f));
  p = fma(p, r, set1(0.6931470036506653f));
  p = fma(p, r, set1(1.0f));
  return mul(p, from_bits(shift_left<23>(add_int(to_int(n), set1_int(127)))));
}

// 2^x for whole x <= 0; 0 below -126, NaN stays NaN.
IH_INLINE V power_of_two(V x) {
  const V y = from_bits(shift_left<23>(add_int(to_int(max(set1(-126.0f), x)), set1_int(127))));
  return select(less(x, set1(-126.0f)), zero(), select(less_equal(x, x), y, x));
}

// 2^x as the weights of a softmax need it that are rounded to bf16: -126 where x is below, x <= 1; off by 2.7e-6
// relative, however far x is from the interval of the fit; NaN stays NaN.
IH_INLINE V exp2_below(V x) {
  constexpr float kWhole = 12583039.0f;  // 1.5 * 2^23 + 127: adding it leaves round(x) + 127 in the lowest bits
  const V held = max(set1(-126.0f), x), shifted = add(held, set1(kWhole));
  const V f = sub(held, sub(shifted, set1(kWhole)));
  V p = fma(set1(0.009570102207362652f), f, set1(0.05591785907745361f));
  p = fma(p, f, set1(0.240247443318367f));
  p = fma(p, f, set1(0.6931217908859253f));
  p = fma(p, f, set1(0.9999992847442627f));
  return mul(p, from_bits(shift_left<23>(bits_of(shifted))));
}

// tanh x; near zero by an odd polynomial (|x| < 0.6, 1e-9), elsewhere through e^2x.
IH_INLINE V tanh(V x) {
  const V a = abs(x), t = mul(x, x);
  V p = fma(set1(0.00237076564f), t, set1(-0.008410070802f));
  p = fma(p, t, set1(0.021788322f));
  p = fma(p, t, set1(-0.05396155178f));
  p = fma(p, t, set1(0.1333331287f));
  p = fma(p, t, set1(-0.3333333323f));
  const V near = fma(mul(x, t), p, x);
  const V e = exp(add(a, a));
  const V far = sub(set1(1.0f), div(set1(2.0f), add(e, set1(1.0f))));
  return select(less(a, set1(0.6f)), near, copy_sign(far, x));
}

IH_INLINE V sigmoid(V x) { return div(set1(1.0f), add(set1(1.0f), exp(sub(zero(), x)))); }

// erf x; |x| < 1 by an odd polynomial (1.3e-9), up to 4 as 1 - e^(-x^2) Q(1 / (1 + x / 2)) (1.3e-10), then 1.
IH_INLINE V erf(V x) {
  const V a = min(abs(x), set1(4.0f)), t = mul(a, a);
  V p = fma(set1(7.875875063e-5f), t, set1(-0.0008016864287f));
  p = fma(p, t, set1(0.005189087423f));
  p = fma(p, t, set1(-0.02685421201f));
  p = fma(p, t, set1(0.1128359472f));
  p = fma(p, t, set1(-0.3761262667f));
  p = fma(p, t, set1(1.128379166f));
  const V near = mul(x, p);
  const V u = div(set1(1.0f), fma(a, set1(0.5f), set1(1.0f)));
  V q = fma(set1(0.1208524332f), u, set1(-0.4765252744f));
  q = fma(q, u, set1(0.5712651758f));
  q = fma(q, u, set1(-0.1102082941f));
  q = fma(q, u, set1(0.3510303232f));
  q = fma(q, u, set1(0.2587513664f));
  q = fma(q, u, set1(0.2850616201f));
  q = fma(q, u, set1(-0.0001642363871f));
  const V far = sub(set1(1.0f), mul(exp(sub(zero(), t)), q));
  const V y = select(less(a, set1(1.0f)), near, copy_sign(far, x));
  return select(less_equal(a, set1(4.0f)), y, x);  // NaN stays NaN
}

// The activation number `act` of ACTIVATIONS (runtime/ops.py).
template <int act>
IH_INLINE V activate(V x) {
  if constexpr (act == kSilu) return div(x, add(set1(1.0f), exp(sub(zero(), x))));
  if constexpr (act == kGelu) {
    return mul(mul(set1(0.5f), x), add(set1(1.0f), erf(mul(x, set1(0.70710678118654752f)))));
  }
  if constexpr (act == kGeluTanh) {
    const V inner = mul(set1(0.79788456080286536f), fma(mul(set1(0.044715f), mul(x, x)), x, x));
    return mul(mul(set1(0.5f), x), add(set1(1.0f), tanh(inner)));
  }
  if constexpr (act == kRelu) return select(less(x, zero()), zero(), x);
  if constexpr (act == kQuickGelu) return div(x, add(set1(1.0f), exp(mul(set1(-1.702f), x))));
  if constexpr (act == kTanh) return tanh(x);
  if constexpr (act == kSigmoid) return sigmoid(x);
}

// sin and cos of a double, |x| < 2^30: reduced by pi/2 in three exact parts, then polynomials (below 1e-16).
struct SinCos {
  double sine, cosine;
};
inline SinCos sin_cos(double x) {
  const double turns = __builtin_rint(x * 0.63661977236758134308);
  double r = x - turns * 0x1.921fb54400000p+0;
  r -= turns * 0x1.0b4611a600000p-34;
  r -= turns * 0x1.3198a2e037073p-69;
  const double t = r * r;
  double s = 1.59181292948438357e-10;
  s = s * t - 2.50511318450032381e-8;
  s = s * t + 2.75573161025524377e-6;
  s = s * t - 0.000198412698367585743;
  s = s * t + 0.00833333333333094849;
  s = s * t - 0.166666666666666646;
  s = r + r * t * s;
  double c = -1.138263228307374e-11;
  c = c * t + 2.0876146265986686e-9;
  c = c * t - 2.75573172717148858e-7;
  c = c * t + 0.0000248015872987656477;
  c = c * t - 0.00138888888888873972;
  c = c * t + 0.0416666666666666654;
  c = 1.0 - 0.5 * t + t * t * c;
  const int quarter = static_cast<int>(static_cast<int64_t>(turns) & 3);
  const double sine = quarter & 1 ? c : s, cosine = quarter & 1 ? s : c;
  return {quarter & 2 ? -sine : sine, (quarter + 1) & 2 ? -cosine : cosine};
}

}  // namespace
}  // namespace inhouse::IH_ISA
