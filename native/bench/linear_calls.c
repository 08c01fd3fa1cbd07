// Calls ih_linear once for each run of arguments "format out in bytes rows quantized", on fixed numbers: what
// tools/count_instructions.py runs under valgrind. First argument: the level.
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "inhouse.h"

int main(int argc, char** argv) {
  for (int i = 2; i + 5 < argc; i += 6) {
    const long out = atol(argv[i + 1]), in = atol(argv[i + 2]), bytes = atol(argv[i + 3]), rows = atol(argv[i + 4]);
    void* data = aligned_alloc(64, (size_t)(bytes + 63) / 64 * 64);
    float* x = malloc((size_t)(rows * in) * sizeof *x);
    float* y = malloc((size_t)(rows * out) * sizeof *y);
    if (data == NULL || x == NULL || y == NULL) return 1;
    memset(data, 0x35, (size_t)bytes);  // 0x3535 is 0.33 in f16
    for (long k = 0; k < rows * in; ++k) x[k] = (float)(k % 255 - 127);
    const ih_weight w = {atoi(argv[i]), 0, out, in, data, bytes};
    if (ih_linear(argv[1], &w, x, rows, atoi(argv[i + 5]), y) != IH_OK) return 1;
    free(data);
    free(x);
    free(y);
  }
  return 0;
}
