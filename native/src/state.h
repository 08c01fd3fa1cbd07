// The memory of state groups: blocks by id. Knows sizes, no attention.
#pragma once
#include <cstdint>
#include <vector>

#include "error.h"
#include "kernels.h"
#include "program.h"

namespace inhouse {

// Block b of a group holds, for each of its layers, a part as AttentionShape describes it.
class State {
 public:
  State(const std::vector<Group>& groups, KvType kv_type);
  ~State();
  State(const State&) = delete;
  State& operator=(const State&) = delete;

  Status allocate(const int64_t* blocks);
  Status copy(int group, const int32_t* source, const int32_t* target, int64_t count);
  Status read(int group, const int32_t* blocks, int64_t count, uint8_t* bytes) const;
  Status write(int group, const int32_t* blocks, int64_t count, const uint8_t* bytes);

  int groups() const { return static_cast<int>(pools_.size()); }
  int64_t block_bytes(int group) const { return pools_[group].block_bytes; }
  int64_t head_bytes(int group) const { return pools_[group].head_bytes; }
  uint8_t* layer(int group, int64_t slot) const { return pools_[group].memory + slot * pools_[group].layer_bytes; }
  KvType kv_type() const { return kv_type_; }
  int64_t bytes() const;

 private:
  struct Pool {
    int64_t head_bytes, layer_bytes, block_bytes;
    int64_t blocks, mapped;
    uint8_t* memory;
  };
  Status within(int group, const int32_t* blocks, int64_t count) const;
  void release();

  std::vector<Pool> pools_;
  KvType kv_type_;
};

}  // namespace inhouse
