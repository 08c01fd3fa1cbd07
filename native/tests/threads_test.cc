// The pool: every tile once, whoever takes it; more threads than processors; jobs that follow at once; steps from
// several threads at a time; a fork.
#include "threads.h"

#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <thread>

#include "check.h"

using inhouse::Pool;
using test::check;

namespace {

// Jobs of varying size, each tile counted.
void run_jobs(int threads, int jobs, uint32_t seed) {
  std::mt19937 rng(seed);
  Pool::Step step(Pool::process(), threads);
  std::vector<int> counts(200);
  for (int job = 0; job < jobs; ++job) {
    const int tiles = static_cast<int>(rng() % 200) + 1;
    for (int& count : counts) count = 0;
    std::atomic<bool> worker_ok{true};
    step.run(tiles, [&](int64_t tile, int worker) {
      ++counts[tile];  // each tile has one owner, and the end of the job orders it before the caller
      if (worker < 0 || worker >= threads) worker_ok = false;
    });
    int wrong = 0;
    for (int i = 0; i < 200; ++i) wrong += counts[i] != (i < tiles ? 1 : 0);
    check(wrong == 0 && worker_ok, std::to_string(threads) + " threads: a tile was lost, doubled or misplaced");
  }
}

// ThreadSanitizer ends a process that forks with threads and then starts some.
#if defined(__SANITIZE_THREAD__)
void check_fork() { std::printf("the fork is left out under ThreadSanitizer\n"); }
#else
void check_fork() {
  const pid_t child = fork();
  if (child == 0) {
    test::failures = 0;
    run_jobs(3, 20, 9);
    _exit(test::failures == 0 ? 0 : 1);
  }
  int status = 0;
  waitpid(child, &status, 0);
  check(status == 0, "a forked process has a pool of its own");
}
#endif

}  // namespace

int main() {
  for (int threads : {1, 2, 3, 4, 17}) run_jobs(threads, 2000, static_cast<uint32_t>(threads));
  run_jobs(2, 1, 5);
  usleep(20000);  // the workers park
  run_jobs(4, 200, 6);
  std::vector<std::thread> callers;
  for (uint32_t i = 0; i < 3; ++i) callers.emplace_back([i] { run_jobs(2 + static_cast<int>(i), 300, i); });
  for (std::thread& caller : callers) caller.join();
  check_fork();
  return test::finish();
}
