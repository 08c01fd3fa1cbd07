// The packed bodies, in the order that they need one another.
// clang-format off
#include "formats.h"
#include "ops/packed-inl.h"
#include "ops/unpack-inl.h"
#include "ops/quantize-inl.h"
#include "ops/quantize_tile-inl.h"
#include "ops/linear_floats-inl.h"
#include "ops/pairs-inl.h"
#include "ops/linear_pairs-inl.h"
#include "ops/linear_codes-inl.h"
#include "ops/linear_i8-inl.h"
#include "ops/probe-inl.h"
// clang-format on
