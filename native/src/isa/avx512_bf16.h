// What machines with AVX-512 BF16 have beside those of the level avx512 that lack it. The bits are the same.
#pragma once
#include "kernels.h"

namespace inhouse {

const Kernels* kernels_avx512_plain();   // of every machine of the level
void add_bf16_avx512(Kernels& kernels);  // for machines with BF16 alone (cpu.h)

}  // namespace inhouse
