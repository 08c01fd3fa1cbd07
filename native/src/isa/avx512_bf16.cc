// Attention over bf16 K and V, and bf16 weights, at the level avx512 where the machine multiplies pairs of bf16
// numbers: the bits of the bodies that it replaces.
// clang-format off: the bodies need the vocabulary.
#include "isa/avx512_bf16.h"
#include "simd/avx512.h"
#include "simd/avx512_bytes.h"
#include "simd/avx512_bf16.h"
#include "ops/math-inl.h"
#include "ops/rows-inl.h"
#include "ops/attention_rows-inl.h"
#include "ops/attention_tasks-inl.h"
#include "ops/attention_bf16-inl.h"
#include "ops/attention_whole-inl.h"
#include "formats.h"
#include "sparse.h"
#include "ops/packed-inl.h"
#include "ops/linear_pairs-inl.h"
// clang-format on

namespace inhouse {

namespace {

void attend(const AttentionTask& task, float* memory) {
  if (task.shape->kv_type != kKvBF16) return kernels_avx512_plain()->attend(task, memory);
  avx512::attend_with(task, memory, [&](avx512::Unit unit, avx512::Scratch& scratch, auto take) {
    avx512::run_bf16(task, unit, scratch, take);
  });
}

void attend_partition(const AttentionTask& task, int unit, float* memory, float* partial) {
  if (task.shape->kv_type != kKvBF16) return kernels_avx512_plain()->attend_partition(task, unit, memory, partial);
  avx512::attend_partition_with(task, unit, memory, partial, [&](avx512::Unit at, avx512::Scratch& scratch, auto take) {
    avx512::run_bf16(task, at, scratch, take);
  });
}

}  // namespace

void add_bf16_avx512(Kernels& kernels) {
  kernels.linear_bf16 = avx512::linear_bf16;
  kernels.attend = attend;
  kernels.attend_partition = attend_partition;
}

}  // namespace inhouse
