#include "threads.h"

#include <linux/futex.h>
#include <sched.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <cstdlib>

#include "cpu.h"

namespace inhouse {

namespace {

constexpr int kWorkerSpins = 4000;  // pauses before a worker parks: some tens of microseconds
constexpr int kCallerSpins = 2000;  // pauses before the caller yields to workers that hold its last tiles
constexpr int kCallerYields = 64;   // yields before it sleeps

void futex_wait(std::atomic<uint32_t>& word, uint32_t value) {
  syscall(SYS_futex, reinterpret_cast<uint32_t*>(&word), FUTEX_WAIT_PRIVATE, value, nullptr, nullptr, 0);
}

void futex_wake_all(std::atomic<uint32_t>& word) {
  syscall(SYS_futex, reinterpret_cast<uint32_t*>(&word), FUTEX_WAKE_PRIVATE, 0x7fffffff, nullptr, nullptr, 0);
}

}  // namespace

int default_threads() {
  const char* text = std::getenv("INHOUSE_THREADS");
  if (text != nullptr && *text != 0) {
    char* end = nullptr;
    const long count = std::strtol(text, &end, 10);
    if (*end == 0 && count >= 1 && count <= kMaxThreads) return static_cast<int>(count);
  }
  const int cpus = usable_cpus();
  return cpus < kMaxThreads ? cpus : kMaxThreads;
}

// Never destroyed: its workers outlive every static object.
Pool& Pool::process() {
  static Pool* pool = new Pool;
  return *pool;
}

Pool::Step::Step(Pool& pool, int threads) : pool_(pool), threads_(threads), lock_(pool.step_mutex_) {
  if (threads > 1) pool_.grow(threads);
}

Pool::Step::~Step() = default;

void Pool::grow(int threads) {
  const int here = static_cast<int>(getpid());
  if (process_ != here) workers_ = 0;
  process_ = here;
  for (; workers_ < threads - 1; ++workers_) {
    std::thread([this, worker = workers_ + 1] { work(worker); }).detach();
  }
}

void Pool::run(Tile tile, void* context, int64_t tiles, int threads) {
  tile_.store(tile, std::memory_order_relaxed);
  context_.store(context, std::memory_order_relaxed);
  tiles_.store(static_cast<uint32_t>(tiles), std::memory_order_relaxed);
  limit_.store(threads, std::memory_order_relaxed);
  done_.store(0, std::memory_order_relaxed);
  const uint64_t number = (ticket_.load(std::memory_order_relaxed) >> 32) + 1;
  ticket_.store(number << 32 | static_cast<uint64_t>(tiles), std::memory_order_release);
  jobs_.fetch_add(1, std::memory_order_seq_cst);
  if (parked_.load(std::memory_order_seq_cst) > 0) futex_wake_all(jobs_);
  while (claim_and_run(0)) {
  }
  wait_until_done(tiles);
}

bool Pool::claim_and_run(int worker) {
  uint64_t ticket = ticket_.load(std::memory_order_acquire);
  while ((ticket & 0xffffffffu) != 0) {
    const Tile tile = tile_.load(std::memory_order_relaxed);
    void* context = context_.load(std::memory_order_relaxed);
    const uint32_t tiles = tiles_.load(std::memory_order_relaxed);
    if (worker >= limit_.load(std::memory_order_relaxed)) return false;
    if (!ticket_.compare_exchange_weak(ticket, ticket - 1, std::memory_order_acq_rel, std::memory_order_acquire)) {
      continue;
    }
    tile(context, tiles - static_cast<int64_t>(ticket & 0xffffffffu), worker);
    const uint32_t done = done_.fetch_add(1, std::memory_order_seq_cst) + 1;
    if (done == tiles && caller_waits_.load(std::memory_order_seq_cst) != 0) futex_wake_all(done_);
    return true;
  }
  return false;
}

void Pool::wait_until_done(int64_t tiles) {
  const uint32_t wanted = static_cast<uint32_t>(tiles);
  for (int i = 0; i < kCallerSpins; ++i) {
    if (done_.load(std::memory_order_acquire) == wanted) return;
    cpu_pause();
  }
  for (int i = 0; i < kCallerYields; ++i) {
    if (done_.load(std::memory_order_acquire) == wanted) return;
    sched_yield();
  }
  caller_waits_.store(1, std::memory_order_seq_cst);
  for (uint32_t done = done_.load(std::memory_order_seq_cst); done != wanted;
       done = done_.load(std::memory_order_seq_cst)) {
    futex_wait(done_, done);
  }
  caller_waits_.store(0, std::memory_order_relaxed);
}

void Pool::wait_for_job(uint32_t seen) {
  for (int i = 0; i < kWorkerSpins; ++i) {
    if (jobs_.load(std::memory_order_acquire) != seen) return;
    cpu_pause();
  }
  parked_.fetch_add(1, std::memory_order_seq_cst);
  while (jobs_.load(std::memory_order_seq_cst) == seen) futex_wait(jobs_, seen);
  parked_.fetch_sub(1, std::memory_order_seq_cst);
}

void Pool::work(int worker) {
  const FlushScope flush;
  for (;;) {
    const uint32_t seen = jobs_.load(std::memory_order_acquire);
    while (claim_and_run(worker)) {
    }
    wait_for_job(seen);
  }
}

}  // namespace inhouse
