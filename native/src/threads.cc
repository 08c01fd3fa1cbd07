#include "threads.h"

#include <linux/futex.h>
#include <sched.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include <cstdlib>

#include "cpu.h"
#include "placement.h"

namespace inhouse {

namespace {

constexpr int kWorkerSpins = 4000;        // pauses before a worker parks: some tens of microseconds
constexpr int kCrowdSpins = 200;          // where threads are more than processors, another one waits for this one
constexpr int kCallerSpins = 2000;        // pauses before the caller looks for workers that stand
constexpr int kLookSpins = 64;            // pauses between looks at where a thread runs
constexpr int kRescueSpins = 1000;        // pauses in which a worker that runs uses processor time
constexpr int64_t kRanAtLeast = 2000;     // nanoseconds of it
constexpr timespec kSleep = {0, 500000};  // before the caller looks again

void futex_wait(std::atomic<uint32_t>& word, uint32_t value, const timespec* longest = nullptr) {
  syscall(SYS_futex, reinterpret_cast<uint32_t*>(&word), FUTEX_WAIT_PRIVATE, value, longest, nullptr, 0);
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
  if (threads <= 1) return;
  pool_.grow(threads);
  pool_.seats_[0].thread.store(thread_id(), std::memory_order_relaxed);
}

Pool::Step::~Step() { pool_.seats_[0].thread.store(0, std::memory_order_relaxed); }

void Pool::grow(int threads) {
  const int here = static_cast<int>(getpid());
  if (process_ != here) start_over();
  process_ = here;
  for (; workers_ < threads - 1; ++workers_) {
    std::thread([this, worker = workers_ + 1] { work(worker); }).detach();
  }
}

// In a new process, which has none of the workers.
void Pool::start_over() {
  workers_ = 0;
  usable_ = usable_cpus();
  for (Seat& seat : seats_) {
    seat.busy.store(0, std::memory_order_relaxed);
    seat.moves.store(0, std::memory_order_relaxed);
  }
}

void Pool::run(Tile tile, void* context, int64_t tiles, int threads) {
  tile_.store(tile, std::memory_order_relaxed);
  context_.store(context, std::memory_order_relaxed);
  tiles_.store(static_cast<uint32_t>(tiles), std::memory_order_relaxed);
  limit_.store(threads, std::memory_order_relaxed);
  done_.store(0, std::memory_order_relaxed);
  caller_at_.store(threads <= usable_ ? current_processor() : -1, std::memory_order_relaxed);
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
  wait_long(wanted);
}

// Another process may have the processor of a worker that holds a tile, for milliseconds: such a worker is put into
// this processor's queue, which this thread leaves to it.
void Pool::wait_long(uint32_t wanted) {
  const int limit = caller_at_.load(std::memory_order_relaxed) >= 0 ? limit_.load(std::memory_order_relaxed) : 0;
  int64_t times[kMaxThreads];
  caller_waits_.store(1, std::memory_order_seq_cst);
  for (uint32_t done = done_.load(std::memory_order_seq_cst); done != wanted;
       done = done_.load(std::memory_order_seq_cst)) {
    for (int i = 1; i < limit; ++i) times[i] = seats_[i].busy_time();
    for (int i = 0; i < kRescueSpins && done_.load(std::memory_order_acquire) != wanted; ++i) cpu_pause();
    if (done_.load(std::memory_order_seq_cst) != done) continue;
    for (int i = 1; i < limit; ++i) {
      const int64_t now = seats_[i].busy_time();
      if (times[i] >= 0 && now >= 0 && now - times[i] < kRanAtLeast) move_here(seats_[i]);
    }
    futex_wait(done_, done, &kSleep);
  }
  caller_waits_.store(0, std::memory_order_relaxed);
}

int64_t Pool::Seat::busy_time() const {
  if (busy.load(std::memory_order_relaxed) == 0) return -1;
  return processor_time(thread.load(std::memory_order_relaxed));
}

// A thread is moved by one other at a time: each puts back the affinity that it found.
void Pool::move_here(Seat& seat) {
  if (seat.moves.exchange(1, std::memory_order_acquire) != 0) return;
  move_to(seat.thread.load(std::memory_order_relaxed), current_processor());
  seat.moves.store(0, std::memory_order_release);
}

bool Pool::leave_caller(Seat& seat) {
  if (seat.moves.exchange(1, std::memory_order_acquire) != 0) return true;
  const bool left = leave(current_processor());
  seat.moves.store(0, std::memory_order_release);
  return left;
}

bool Pool::beside_caller() const {
  const int at = caller_at_.load(std::memory_order_relaxed);
  return at >= 0 && at == current_processor();
}

void Pool::wait_for_job(uint32_t seen) {
  const int spins = caller_at_.load(std::memory_order_relaxed) < 0 ? kCrowdSpins : kWorkerSpins;
  for (int i = 0; i < spins; ++i) {
    if (jobs_.load(std::memory_order_acquire) != seen) return;
    if (i % kLookSpins == 0 && beside_caller()) break;  // the caller waits for this processor
    cpu_pause();
  }
  // One worker watches the caller of this job, the others just sleep.
  const bool watches =
      caller_at_.load(std::memory_order_relaxed) >= 0 && looked_.exchange(seen, std::memory_order_relaxed) != seen;
  parked_.fetch_add(1, std::memory_order_seq_cst);
  if (watches) watch_caller(seen);
  while (jobs_.load(std::memory_order_seq_cst) == seen) futex_wait(jobs_, seen);
  parked_.fetch_sub(1, std::memory_order_seq_cst);
}

// Another process may have the caller's processor as well: in the middle of a step the caller is then put into the
// queue of this one, which the worker leaves to it. Returns when the step has ended or the next job has come.
void Pool::watch_caller(uint32_t seen) {
  const int caller = seats_[0].thread.load(std::memory_order_relaxed);
  if (caller == 0) return;
  int64_t before = processor_time(caller);
  for (int i = 0; i < kRescueSpins && jobs_.load(std::memory_order_acquire) == seen; ++i) cpu_pause();
  while (jobs_.load(std::memory_order_seq_cst) == seen && seats_[0].thread.load(std::memory_order_relaxed) == caller) {
    const int64_t now = processor_time(caller);
    if (now - before < kRanAtLeast && !beside_caller()) move_here(seats_[0]);
    before = now;
    futex_wait(jobs_, seen, &kSleep);
  }
}

void Pool::work(int worker) {
  const FlushScope flush;
  Seat& seat = seats_[worker];
  seat.thread.store(thread_id(), std::memory_order_relaxed);
  bool movable = true;
  for (;;) {
    const uint32_t seen = jobs_.load(std::memory_order_acquire);
    if (movable && worker < limit_.load(std::memory_order_relaxed) && beside_caller()) movable = leave_caller(seat);
    seat.busy.store(1, std::memory_order_relaxed);
    while (claim_and_run(worker)) {
    }
    seat.busy.store(0, std::memory_order_relaxed);
    wait_for_job(seen);
  }
}

}  // namespace inhouse
