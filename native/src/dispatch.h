// Which table of kernels a step runs with.
#pragma once
#include "error.h"
#include "kernels.h"

namespace inhouse {

// The level called `wanted`; null or "": $INHOUSE_ISA, else the highest that this machine has.
Status choose_kernels(const char* wanted, const Kernels** kernels);

// The i-th level that this machine can run, lowest first; null at the end.
const Kernels* available_kernels(int i);

}  // namespace inhouse
