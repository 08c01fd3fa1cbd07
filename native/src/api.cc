// The C interface: arguments in, statuses out, no exception past this file.
#include <algorithm>
#include <cstring>
#include <exception>
#include <memory>
#include <new>

#include "dispatch.h"
#include "error.h"
#include "guard.h"
#include "inhouse.h"
#include "model.h"
#include "threads.h"

using inhouse::Model;
using inhouse::Status;

struct ih_model {
  std::unique_ptr<Model> model;
};

namespace {

// Runs f, which gives a Status; turns what it throws into one.
template <class F>
ih_status guarded(F f) {
  try {
    return inhouse::report(f());
  } catch (const std::bad_alloc&) {
    return inhouse::report(Status::capacity("out of memory"));
  } catch (const std::exception& error) {
    return inhouse::report(Status::failed(error.what()));
  }
}

}  // namespace

extern "C" {

int32_t ih_abi_version(void) { return IH_ABI_VERSION; }

int64_t ih_error(char* text, int64_t size) {
  const std::string& last = inhouse::last_error();
  if (size > 0) {
    const size_t length = std::min(last.size(), static_cast<size_t>(size - 1));
    std::memcpy(text, last.data(), length);
    text[length] = 0;
  }
  return static_cast<int64_t>(last.size());
}

const char* ih_isa_name(const char* wanted) {
  const inhouse::Kernels* kernels = nullptr;
  guarded([&] { return inhouse::choose_kernels(wanted, &kernels); });
  return kernels == nullptr ? nullptr : kernels->isa;
}

const char* ih_isa_available(int32_t i) {
  const inhouse::Kernels* kernels = inhouse::available_kernels(i);
  return kernels == nullptr ? nullptr : kernels->isa;
}

int32_t ih_default_threads(void) { return inhouse::default_threads(); }

ih_model* ih_model_create(const int64_t* flat, int64_t flat_length, const ih_weight* weights, int64_t weight_count,
                          const char* isa, int32_t threads, int32_t kv_type, int32_t* status) {
  std::unique_ptr<ih_model> handle;
  const ih_status code = guarded([&]() -> Status {
    if (kv_type < 0 || kv_type >= inhouse::kKvTypes) return Status::usage("unknown KV dtype");
    if (flat_length < 0 || weight_count < 0) return Status::usage("a negative length");
    handle = std::make_unique<ih_model>();
    const inhouse::ModelOptions options = {isa, threads, static_cast<inhouse::KvType>(kv_type)};
    return Model::create(flat, flat_length, weights, weight_count, options, &handle->model);
  });
  if (status != nullptr) *status = code;
  return code == IH_OK ? handle.release() : nullptr;
}

void ih_model_destroy(ih_model* model) { delete model; }

int64_t ih_model_bytes(const ih_model* model) { return model->model->bytes(); }

ih_status ih_reserve(ih_model* model, int64_t rows, int64_t sampled, int64_t sequences) {
  return guarded([&]() -> Status {
    if (rows < 0 || sampled < 0 || sequences < 0) return Status::usage("a negative number of rows");
    model->model->reserve(model->model->rows_of(rows, sampled, sequences));
    return {};
  });
}

ih_status ih_state_allocate(ih_model* model, const int64_t* blocks) {
  return guarded([&] { return model->model->state().allocate(blocks); });
}

int64_t ih_block_bytes(const ih_model* model, int32_t group) {
  const inhouse::State& state = model->model->state();
  return group >= 0 && group < state.groups() ? state.block_bytes(group) : 0;
}

ih_status ih_copy_blocks(ih_model* model, int32_t group, const int32_t* source, const int32_t* target, int64_t count) {
  return guarded([&] { return model->model->state().copy(group, source, target, count); });
}

ih_status ih_read_blocks(ih_model* model, int32_t group, const int32_t* blocks, int64_t count, uint8_t* bytes) {
  return guarded([&] { return model->model->state().read(group, blocks, count, bytes); });
}

ih_status ih_write_blocks(ih_model* model, int32_t group, const int32_t* blocks, int64_t count, const uint8_t* bytes) {
  return guarded([&] { return model->model->state().write(group, blocks, count, bytes); });
}

ih_status ih_set_adapter(ih_model* model, int32_t slot, const ih_adapter_pair* pairs, int64_t count) {
  return guarded([&]() -> Status {
    if (count < 0 || (count > 0 && pairs == nullptr)) return Status::usage("no adapter pairs");
    return model->model->set_adapter(slot, pairs, count);
  });
}

ih_status ih_run(ih_model* model, int32_t program, const ih_step* step, ih_output* outputs) {
  return guarded([&]() -> Status {
    if (step == nullptr || outputs == nullptr) return Status::usage("ih_run needs a step and room for its outputs");
    return model->model->run(program, *step, outputs);
  });
}

ih_status ih_op_times(ih_model* model, int32_t program, int64_t* nanoseconds, int64_t count) {
  return guarded([&]() -> Status {
    if (nanoseconds == nullptr) return Status::usage("ih_op_times needs room for its times");
    return model->model->times(program, nanoseconds, count);
  });
}

int64_t ih_guard_add(const void* begin, int64_t bytes) {
  const int64_t handle = bytes > 0 ? inhouse::guard_add(begin, static_cast<size_t>(bytes)) : -1;
  if (handle < 0) inhouse::report(Status::capacity("no room to guard another mapping"));
  return handle;
}

int32_t ih_guard_damaged(int64_t handle) { return inhouse::guard_damaged(handle) ? 1 : 0; }

void ih_guard_remove(int64_t handle) { inhouse::guard_remove(handle); }

}  // extern "C"
