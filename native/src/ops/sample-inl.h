// Sampling: the two passes over a whole row of logits. Everything after them works on few candidates (sample.cc).
namespace inhouse::IH_ISA {
namespace {

// maxima[b] = largest of x[b * kSampleBlock ...]; NaN if the block holds one.
void block_max(const float* x, int64_t n, float* maxima) {
  const V lowest = set1(-__builtin_inff());
  for (int64_t begin = 0; begin < n; begin += kSampleBlock) {
    const int64_t end = begin + kSampleBlock < n ? begin + kSampleBlock : n;
    V largest = lowest, nan = zero();
    for (int64_t i = begin; i < end; i += 16) {
      const int64_t left = end - i;
      const V v = left < 16 ? select(first_n(left), load_n(x + i, left), lowest) : load(x + i);
      largest = max(largest, v);
      nan = select(less_equal(v, v), nan, set1(1.0f));
    }
    *maxima++ = reduce_max(nan) > 0 ? __builtin_nanf("") : reduce_max(largest);
  }
}

// w[i] = e^((x[i] - top) * inverse), for x[i] <= top; sums[b] = sum of each kSampleBlock of them, sixteen lanes wide.
void exp_weights(const float* x, int64_t n, float top, float inverse, float* w, float* sums) {
  const V shift = set1(top), factor = set1(inverse);
  for (int64_t begin = 0; begin < n; begin += kSampleBlock) {
    const int64_t end = begin + kSampleBlock < n ? begin + kSampleBlock : n;
    V sum = zero();
    for (int64_t i = begin; i < end; i += 16) {
      const int64_t left = end - i;
      if (left < 16) {
        const V e = exp(mul(sub(load_n(x + i, left), shift), factor));
        store_n(w + i, left, e);
        sum = add(sum, select(first_n(left), e, zero()));
      } else {
        const V e = exp(mul(sub(load(x + i), shift), factor));
        store(w + i, e);
        sum = add(sum, e);
      }
    }
    *sums++ = reduce_add(sum);
  }
}

}  // namespace
}  // namespace inhouse::IH_ISA
