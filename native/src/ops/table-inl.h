// Every body at one level but the packed ones, and the table that exports them. Included by isa/*.cc after the level's
// vocabulary.
// clang-format off: each needs the ones before it.
#include "ops/math-inl.h"
#include "ops/rows-inl.h"
#include "ops/quantize-inl.h"
#include "ops/attention_rows-inl.h"
#include "ops/attention_tasks-inl.h"
#include "ops/pairs-inl.h"
#include "ops/attention_bf16-inl.h"
#include "ops/attention_whole-inl.h"
#include "ops/attention_int8-inl.h"
#include "ops/attention_codes-inl.h"
#include "ops/attention_coded-inl.h"
#include "ops/attention-inl.h"
#include "ops/sample-inl.h"
#include "ops/moe-inl.h"
// clang-format on

namespace inhouse::IH_ISA {
namespace {

#define IH_NAME_OF(level) #level
#define IH_NAME(level) IH_NAME_OF(level)

// `add_linears` fills the entries of the packed bodies.
Kernels table(void (*add_linears)(Kernels&)) {
  Kernels t = {};
  add_linears(t);
  t.isa = IH_NAME(IH_ISA);
  t.rms_norm = rms_norm;
  t.layer_norm = layer_norm;
  t.activation = activation;
  t.glu = glu;
  t.add = add_rows;
  t.mul = mul_rows;
  t.scale = scale_row;
  t.soft_cap = soft_cap;
  t.rotary = rotary;
  t.rope = rope;
  t.max = max_rows;
  t.normalize = normalize_row;
  t.store_kv = store_kv;
  t.attend = attend;
  t.attend_partition = attend_partition;
  t.block_max = block_max;
  t.exp_weights = exp_weights;
  t.attend_merge = attend_merge;
  t.code_block = code_block;
  t.route = route;
  t.weighted_sum = weighted_sum;
  t.glu_cut = glu_cut;
  return t;
}

}  // namespace
}  // namespace inhouse::IH_ISA
