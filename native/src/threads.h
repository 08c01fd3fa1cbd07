// The process's compute pool: fixed tiles claimed by a counter, so that who computes a tile never changes a sum.
// Knows nothing of models.
#pragma once
#include <atomic>
#include <cstdint>
#include <mutex>
#include <thread>
#include <type_traits>

namespace inhouse {

constexpr int kMaxThreads = 256;

// $INHOUSE_THREADS, else usable_cpus().
int default_threads();

// Runs one job at a time over worker threads and the caller. Workers spin shortly for the next job, then park.
//
// `ticket_` holds the job's number and how many of its tiles are unclaimed. A worker reads the ticket, then the job,
// then claims a tile by compare-and-swap of the same ticket: success proves that the job it read is still open, since
// a job is replaced only after all its tiles were claimed and done.
class Pool {
 public:
  using Tile = void (*)(void* context, int64_t tile, int worker);

  static Pool& process();

  // Holds the pool for one step; jobs of `run` then use up to `threads` threads, this one included.
  class Step {
   public:
    Step(Pool& pool, int threads);
    ~Step();
    Step(const Step&) = delete;
    Step& operator=(const Step&) = delete;

    // f(tile, worker) for every tile of [0, tiles); worker is in [0, threads). Returns when all are done.
    template <class F>
    void run(int64_t tiles, F&& f) {
      if (tiles <= 0) return;
      if (tiles == 1 || threads_ == 1) {
        for (int64_t tile = 0; tile < tiles; ++tile) f(tile, 0);
        return;
      }
      pool_.run([](void* g, int64_t tile, int worker) { (*static_cast<std::remove_reference_t<F>*>(g))(tile, worker); },
                const_cast<void*>(static_cast<const void*>(&f)), tiles, threads_);
    }
    int threads() const { return threads_; }

   private:
    Pool& pool_;
    int threads_;
    std::unique_lock<std::mutex> lock_;
  };

 private:
  struct alignas(64) Seat {
    std::atomic<int> thread{0};      // of the system
    std::atomic<uint32_t> moves{0};  // while its affinity is being changed
    std::atomic<uint32_t> busy{0};   // while it may hold a tile
    int64_t busy_time() const;       // processor time of a busy thread, -1 of another
  };

  void grow(int threads);
  void start_over();
  void run(Tile tile, void* context, int64_t tiles, int threads);
  void work(int worker);
  bool claim_and_run(int worker);
  void wait_for_job(uint32_t seen);
  void wait_until_done(int64_t tiles);
  void wait_long(uint32_t wanted);
  void watch_caller(uint32_t seen);
  void move_here(Seat& seat);
  bool leave_caller(Seat& seat);
  bool beside_caller() const;

  std::mutex step_mutex_;
  int workers_ = 0;  // threads started beside the caller
  int process_ = 0;  // the process they live in: a fork has none of them
  int usable_ = 0;   // processors that it had when they were started

  Seat seats_[kMaxThreads];  // [0]: the caller's, its thread 0 where nobody holds a step

  alignas(64) std::atomic<uint64_t> ticket_{0};  // job number << 32 | tiles left
  std::atomic<Tile> tile_{nullptr};
  std::atomic<void*> context_{nullptr};
  std::atomic<uint32_t> tiles_{0};
  std::atomic<int> limit_{0};       // workers [1, limit) take part
  std::atomic<int> caller_at_{-1};  // the caller's processor, -1 if there are more threads than processors
  alignas(64) std::atomic<uint32_t> done_{0};
  std::atomic<uint32_t> caller_waits_{0};
  alignas(64) std::atomic<uint32_t> jobs_{0};  // futex word: jobs begun
  std::atomic<int> parked_{0};
  std::atomic<uint32_t> looked_{0};  // job after which a worker looked whether the caller runs
};

}  // namespace inhouse
