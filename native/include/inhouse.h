// The C interface of libinhouse. Plain C types, no exceptions; every call that can fail returns a status and leaves
// its reason, as UTF-8 text, where ih_error finds it (for the calling thread).
#ifndef INHOUSE_H
#define INHOUSE_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#define IH_ABI_VERSION 4
#define IH_API __attribute__((visibility("default")))

typedef enum ih_status {
  IH_OK = 0,
  IH_USAGE = 1,        // an argument is wrong
  IH_UNSUPPORTED = 2,  // understood, and cannot be done
  IH_CAPACITY = 3,     // memory does not suffice
  IH_FAILED = 4,       // a step failed: a damaged mapping
} ih_status;

IH_API int32_t ih_abi_version(void);

// Copies the reason of the calling thread's last failure, cut to `size` with its final zero; gives its full length.
IH_API int64_t ih_error(char* text, int64_t size);

// ---- instruction sets and threads ----------------------------------------------------------------------------------

// Name of the level for `wanted` ("scalar", "avx2", "avx512", "neon"); null or "": $INHOUSE_ISA, else the highest of
// this machine. Null, with a reason, where it is unknown or this machine lacks it.
IH_API const char* ih_isa_name(const char* wanted);
// Name of the i-th level that this machine can run, lowest first; null at the end.
IH_API const char* ih_isa_available(int32_t i);
// Threads of a step where none are asked for: $INHOUSE_THREADS, else the cgroup's quota, at most the affinity mask.
IH_API int32_t ih_default_threads(void);

typedef enum ih_probe_kind {
  IH_PROBE_READ = 0,  // bytes a second out of memory
  IH_PROBE_DOT = 1,   // operations a second of int8 dot products (a multiply and an add are two)
  IH_PROBE_FMA = 2,   // the same for f32 fused multiply-adds
} ih_probe_kind;

// What this machine reaches at most with `threads` threads (0: the default), the best of a few tries; takes about a
// tenth of a second, and 256 MiB of memory for IH_PROBE_READ.
IH_API ih_status ih_probe(const char* isa, int32_t kind, int32_t threads, double* per_second);

// ---- models --------------------------------------------------------------------------------------------------------

typedef struct ih_weight {
  int32_t format;    // a format number of runtime/packed.py; -1: a plain f32 vector or matrix, row after row
  int32_t reserved;  // 0
  int64_t out, in;   // logical shape; a vector has out = 1
  const void* data;  // borrowed: must outlive the model
  int64_t bytes;
} ih_weight;

typedef struct ih_model ih_model;

// Builds a model from its programs as a flat array (layout: src/program.h and runtime/native_flat.py) and its weights.
//   flat [flat_length], weights [weight_count]; isa: as for ih_isa_name; threads: 0 for ih_default_threads;
//   kv_type: 0 f32, 1 f16, 2 bf16, 3 int8. Null, with a reason, on failure; *status says which kind (may be null).
IH_API ih_model* ih_model_create(const int64_t* flat, int64_t flat_length, const ih_weight* weights,
                                 int64_t weight_count, const char* isa, int32_t threads, int32_t kv_type,
                                 int32_t* status);
IH_API void ih_model_destroy(ih_model* model);

// Number of floating-point buffers' bytes and state bytes that the model holds now.
IH_API int64_t ih_model_bytes(const ih_model* model);

// Nanoseconds that each op of a program took since the last call, [count = its ops]; the first call begins to measure.
// Row-wise ops that follow each other run as one and count for the first of them.
IH_API ih_status ih_op_times(ih_model* model, int32_t program, int64_t* nanoseconds, int64_t count);

// Makes room for steps of that many rows, so that none of them allocates.
IH_API ih_status ih_reserve(ih_model* model, int64_t rows, int64_t sampled, int64_t sequences);

// ---- state ---------------------------------------------------------------------------------------------------------

// blocks [groups]: block count of each state group; what was stored is dropped.
IH_API ih_status ih_state_allocate(ih_model* model, const int64_t* blocks);
// Bytes of one block of a group, over all its layers.
IH_API int64_t ih_block_bytes(const ih_model* model, int32_t group);
// Block source[i] onto block target[i], i < count, in ascending order of i.
IH_API ih_status ih_copy_blocks(ih_model* model, int32_t group, const int32_t* source, const int32_t* target,
                                int64_t count);
// bytes [count][ih_block_bytes] from or to the blocks.
IH_API ih_status ih_read_blocks(ih_model* model, int32_t group, const int32_t* blocks, int64_t count, uint8_t* bytes);
IH_API ih_status ih_write_blocks(ih_model* model, int32_t group, const int32_t* blocks, int64_t count,
                                 const uint8_t* bytes);

// ---- steps ---------------------------------------------------------------------------------------------------------

// runtime/step.py says what each array means; they must have passed its check_step or ih_step_fits.
typedef struct ih_step {
  int64_t rows, sequences, sampled;
  const int32_t* tokens;           // [rows]
  const int32_t* positions;        // [rows]
  const int32_t* sequence_of;      // [rows]
  const int32_t* lengths;          // [sequences]
  const int32_t* sampled_rows;     // [sampled]
  const int32_t* const* tables;    // [groups] -> [sequences][table_widths[g]]
  const int64_t* table_widths;     // [groups]
  const int32_t* types;            // [rows]
  const int32_t* prefixes;         // [sequences]
  const int32_t* encoder_lengths;  // [sequences]
  const int32_t* adapters;         // [sequences] slots of ih_set_adapter, 0: none; null: none anywhere
} ih_step;

// What one state group asks of the steps of a program: `runtime.step.StepRules`.
typedef struct ih_step_group {
  int32_t index;   // into tables
  int32_t cross;   // read by encoder position
  int64_t window;  // 0: all positions are read
  int64_t blocks;  // allocated
  int64_t sink;    // with a window: the first positions, whole blocks, are read too,
  int64_t stride;  // and every stride-th block; 0: none
} ih_step_group;

typedef struct ih_step_rules {
  int64_t vocab_size, context_length;
  int64_t types;  // rows of the table of token types; 0: none
  int64_t group_count;
  const ih_step_group* groups;  // [group_count]
} ih_step_rules;

// 1 if the step has passed all rules of check_step but those of the arrays' own types and lengths; else 0, and
// check_step says which it breaks.
IH_API int32_t ih_step_fits(const ih_step_rules* rules, const ih_step* step);

// What an adapter adds to one weight: y += b (a x).
typedef struct ih_adapter_pair {
  int32_t weight;  // index into the model's weights
  int32_t reserved;
  ih_weight a, b;  // f32 in tiles, [rank, in] and [out, rank]; borrowed until the slot is set again
} ih_adapter_pair;

// Puts pairs [count] into slot 1, 2, ... in place of what was there; count 0 empties it. Between steps only.
IH_API ih_status ih_set_adapter(ih_model* model, int32_t slot, const ih_adapter_pair* pairs, int64_t count);

typedef struct ih_output {
  const float* data;  // [rows][width], valid until the model's next run
  int64_t rows, width;
} ih_output;

// Runs a program; outputs [outputs of the program], in the program's order.
IH_API ih_status ih_run(ih_model* model, int32_t program, const ih_step* step, ih_output* outputs);

// ---- guarded mappings ----------------------------------------------------------------------------------------------
// A file that shrinks under a mapping raises SIGBUS at the next touch. Inside a guarded range the page is replaced by
// zeros and the range marked; elsewhere the handler that was there before gets the signal. Weights of a model are
// guarded by ih_model_create.

// Gives a handle for ih_guard_damaged and ih_guard_remove, or -1 with a reason.
IH_API int64_t ih_guard_add(const void* begin, int64_t bytes);
IH_API int32_t ih_guard_damaged(int64_t handle);
IH_API void ih_guard_remove(int64_t handle);

// ---- single packed matrices ----------------------------------------------------------------------------------------
// For loading, tests and tools; one thread, the caller's. isa: as for ih_isa_name.

// y [rows][out] = x [rows][in] times the matrix; quantized: x goes through quantize_rows first (code formats only).
IH_API ih_status ih_linear(const char* isa, const ih_weight* w, const float* x, int64_t rows, int32_t quantized,
                           float* y);
// Rows ids [count] as floats: out [count][in].
IH_API ih_status ih_unpack_rows(const char* isa, const ih_weight* w, const int64_t* ids, int64_t count, float* out);
// Fills w->data, of format q8_0, q6_0 or q4_0, from x [out][in], every element finite.
IH_API ih_status ih_quantize_tiles(const char* isa, const ih_weight* w, const float* x);

// ---- sampling ------------------------------------------------------------------------------------------------------
// Over rows of logits f32 [logit_rows][vocab], which are read only. runtime/sampling.py says what each field means.

typedef enum ih_sample_status {
  IH_SAMPLE_OK = 0,
  IH_SAMPLE_NAN = 1,       // the logits hold NaN or +infinity
  IH_SAMPLE_NO_TOKEN = 2,  // every token is ruled out
} ih_sample_status;

typedef struct ih_sample_row {
  uint64_t seed;
  int64_t position;                                        // absolute, of the token to draw
  int64_t bias_begin, bias_end;                            // of bias_ids and bias_values
  int64_t history_begin, history_prompt_end, history_end;  // of history: prompt, then output; empty: no penalties
  int32_t logit_row, choice, top_k, mask_row;              // top_k 0: off; mask_row -1: none
  float temperature, top_p, min_p, typical_p;              // temperature 0: greedy
  float repetition_penalty, presence_penalty, frequency_penalty;
  int32_t reserved;  // 0
} ih_sample_row;

typedef struct ih_sample_sizes {
  int64_t rows, vocab, logit_rows, biases, history, masks;
} ih_sample_sizes;

// Draws a token for each row: tokens [rows] (-1 where status is not OK), status [rows] (ih_sample_status).
//   rows [sizes->rows]; bias_ids, bias_values [biases]; history [history]; masks [masks][(vocab + 31) / 32], a set bit
//   allows a token.
IH_API ih_status ih_sample(const ih_sample_sizes* sizes, const float* logits, const ih_sample_row* rows,
                           const int32_t* bias_ids, const float* bias_values, const int32_t* history,
                           const uint32_t* masks, int32_t* tokens, int32_t* status);
// For each of `count` (row of logits, target): logprobs [count] and ranks [count] of the target, the `top` likeliest
// ids and their logprobs [count][top] (-1 and -infinity where -infinity logits leave fewer), status [count].
IH_API ih_status ih_logprobs(const float* logits, int64_t logit_rows, int64_t vocab, const int32_t* rows,
                             const int32_t* targets, int64_t count, int64_t top, float* logprobs, int32_t* ranks,
                             int32_t* top_ids, float* top_logprobs, int32_t* status);
// The u in [0, 1) that a draw is made from.
IH_API double ih_sample_uniform(uint64_t seed, int64_t position, int32_t choice);

#ifdef __cplusplus
}
#endif

#endif
