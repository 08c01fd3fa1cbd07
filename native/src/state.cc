#include "state.h"

#include <sys/mman.h>
#include <unistd.h>

#include <cstring>
#include <string>

#include "kv_codes.h"

namespace inhouse {

namespace {

constexpr int64_t kTail = 4096;  // bodies read V to the end of a vector, past the last block's last row

int64_t physical_bytes() {
  return static_cast<int64_t>(sysconf(_SC_PHYS_PAGES)) * static_cast<int64_t>(sysconf(_SC_PAGESIZE));
}

}  // namespace

State::State(const std::vector<Group>& groups, KvType kv_type) : kv_type_(kv_type) {
  for (const Group& group : groups) {
    Pool pool = {};
    const int64_t v_dim = group.kind == GroupKind::kLatent ? 0 : group.v_dim;  // there V is part of K
    pool.head_bytes = kv_head_bytes(kv_type, group.head_dim, v_dim);
    if (group.k_bits != 0) pool.head_bytes = KvCodes{group.k_bits, group.v_bits, group.head_dim, v_dim}.bytes();
    pool.layer_bytes = group.kv_heads * pool.head_bytes;
    pool.block_bytes = group.layers * pool.layer_bytes;
    pools_.push_back(pool);
  }
}

State::~State() { release(); }

void State::release() {
  for (Pool& pool : pools_) {
    if (pool.memory != nullptr) munmap(pool.memory, static_cast<size_t>(pool.mapped));
    pool.memory = nullptr;
    pool.blocks = pool.mapped = 0;
  }
}

// Fresh anonymous memory reads as zeros and costs nothing until it is written.
Status State::allocate(const int64_t* blocks) {
  release();
  const int64_t most = physical_bytes();
  for (size_t g = 0; g < pools_.size(); ++g) {
    Pool& pool = pools_[g];
    if (blocks[g] < 0) return Status::usage("a state group cannot have " + std::to_string(blocks[g]) + " blocks");
    if (blocks[g] > (most - kTail) / pool.block_bytes) {
      return Status::capacity(std::to_string(blocks[g]) + " blocks of " + std::to_string(pool.block_bytes) +
                              " bytes exceed the machine's memory of " + std::to_string(most) + " bytes");
    }
    const int64_t bytes = blocks[g] * pool.block_bytes + kTail;
    void* memory =
        mmap(nullptr, static_cast<size_t>(bytes), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED) {
      release();
      return Status::capacity("no memory for " + std::to_string(bytes) + " bytes of state");
    }
    madvise(memory, static_cast<size_t>(bytes), MADV_HUGEPAGE);
    pool.memory = static_cast<uint8_t*>(memory);
    pool.mapped = bytes;
    pool.blocks = blocks[g];
  }
  return {};
}

Status State::within(int group, const int32_t* blocks, int64_t count) const {
  if (group < 0 || group >= groups()) return Status::usage("no state group " + std::to_string(group));
  for (int64_t i = 0; i < count; ++i) {
    if (blocks[i] < 0 || blocks[i] >= pools_[group].blocks) {
      return Status::usage("block " + std::to_string(blocks[i]) + " is not one of " +
                           std::to_string(pools_[group].blocks));
    }
  }
  return {};
}

Status State::copy(int group, const int32_t* source, const int32_t* target, int64_t count) {
  Status status = within(group, source, count);
  if (status.ok()) status = within(group, target, count);
  if (!status.ok()) return status;
  const Pool& pool = pools_[group];
  for (int64_t i = 0; i < count; ++i) {
    std::memmove(pool.memory + target[i] * pool.block_bytes, pool.memory + source[i] * pool.block_bytes,
                 static_cast<size_t>(pool.block_bytes));
  }
  return status;
}

Status State::read(int group, const int32_t* blocks, int64_t count, uint8_t* bytes) const {
  Status status = within(group, blocks, count);
  if (!status.ok()) return status;
  const Pool& pool = pools_[group];
  for (int64_t i = 0; i < count; ++i) {
    std::memcpy(bytes + i * pool.block_bytes, pool.memory + blocks[i] * pool.block_bytes,
                static_cast<size_t>(pool.block_bytes));
  }
  return status;
}

Status State::write(int group, const int32_t* blocks, int64_t count, const uint8_t* bytes) {
  Status status = within(group, blocks, count);
  if (!status.ok()) return status;
  const Pool& pool = pools_[group];
  for (int64_t i = 0; i < count; ++i) {
    std::memcpy(pool.memory + blocks[i] * pool.block_bytes, bytes + i * pool.block_bytes,
                static_cast<size_t>(pool.block_bytes));
  }
  return status;
}

int64_t State::bytes() const {
  int64_t total = 0;
  for (const Pool& pool : pools_) total += pool.blocks * pool.block_bytes;
  return total;
}

}  // namespace inhouse
