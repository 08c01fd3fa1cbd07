// The linear matrices of the usual models, [out, in], with how often a step multiplies by each.
#pragma once
#include <cstdint>

struct ModelShape {
  const char* name;
  int64_t hidden, heads, kv_heads, head_dim, ffn, layers, vocab;
};

constexpr ModelShape kModels[] = {
    {"qwen2.5-0.5b", 896, 14, 2, 64, 4864, 24, 151936},   {"qwen2.5-1.5b", 1536, 12, 2, 128, 8960, 28, 151936},
    {"qwen2.5-7b", 3584, 28, 4, 128, 18944, 28, 152064},  {"llama-3.2-1b", 2048, 32, 8, 64, 8192, 16, 128256},
    {"llama-3.2-3b", 3072, 24, 8, 128, 8192, 28, 128256}, {"llama-3.1-8b", 4096, 32, 8, 128, 14336, 32, 128256},
    {"mistral-7b", 4096, 32, 8, 128, 14336, 32, 32768},   {"qwen3-4b", 2560, 32, 8, 128, 9728, 36, 151936},
    {"gemma-2-2b", 2304, 8, 4, 256, 9216, 26, 256000},
};

struct MatrixShape {
  const char* what;
  int64_t out, in, count;
  bool head;  // multiplied for sampled rows alone
};
constexpr int kMatrices = 5;

// q and o are alike where heads * head_dim is the hidden width; they are listed apart, since not all models agree.
constexpr MatrixShape matrix_of(const ModelShape& m, int i) {
  const int64_t q = m.heads * m.head_dim, kv = m.kv_heads * m.head_dim;
  const MatrixShape all[kMatrices] = {{"qkv", q + 2 * kv, m.hidden, m.layers, false},
                                      {"o", m.hidden, q, m.layers, false},
                                      {"gate_up", 2 * m.ffn, m.hidden, m.layers, false},
                                      {"down", m.hidden, m.ffn, m.layers, false},
                                      {"head", m.vocab, m.hidden, 1, true}};
  return all[i];
}
