// Every body at one level, and the table that exports them. Included by isa/*.cc after the level's vocabulary.
// clang-format off: each needs the ones before it.
#include "ops/math-inl.h"
#include "ops/rows-inl.h"
#include "ops/attention-inl.h"
#include "ops/sample-inl.h"
#include "ops/plain-inl.h"
// clang-format on

namespace inhouse::IH_ISA {
namespace {

#define IH_NAME_OF(level) #level
#define IH_NAME(level) IH_NAME_OF(level)

const Kernels kTable = {
    .isa = IH_NAME(IH_ISA),
    .linear_f32 = linear_f32,
    .linear_i8 = linear_i8,
    .unpack_row = unpack_row,
    .quantize_row = quantize_row,
    .rms_norm = rms_norm,
    .layer_norm = layer_norm,
    .activation = activation,
    .glu = glu,
    .add = add_rows,
    .mul = mul_rows,
    .scale = scale_row,
    .soft_cap = soft_cap,
    .rotary = rotary,
    .rope = rope,
    .max = max_rows,
    .normalize = normalize_row,
    .store_kv = store_kv,
    .attend = attend,
    .attend_partition = attend_partition,
    .block_max = block_max,
    .exp_weights = exp_weights,
    .attend_merge = attend_merge,
};

}  // namespace
}  // namespace inhouse::IH_ISA
