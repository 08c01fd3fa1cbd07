// The pool: every tile once, whoever takes it; more threads than processors; jobs that follow at once; steps from
// several threads at a time; processors that others use, where threads are moved and keep their affinity; a fork.
#include "threads.h"

#include <dirent.h>
#include <sched.h>
#include <signal.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <chrono>
#include <thread>

#include "check.h"
#include "neighbour.h"
#include "placement.h"

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

void spin(int loops) {
  for (int i = 0; i < loops; ++i) __asm__ volatile("");
}

// Threads of this process whose affinity is not `wanted`.
int strayed(const cpu_set_t& wanted) {
  int count = 0;
  DIR* threads = opendir("/proc/self/task");
  for (const dirent* entry = threads != nullptr ? readdir(threads) : nullptr; entry != nullptr;
       entry = readdir(threads)) {
    cpu_set_t set;
    const int thread = std::atoi(entry->d_name);
    if (thread > 0 && sched_getaffinity(thread, sizeof(set), &set) == 0) count += !CPU_EQUAL(&set, &wanted);
  }
  if (threads != nullptr) closedir(threads);
  return count;
}

// Tiles that take some time, on processors that others have half of the time: threads are moved in the middle of jobs.
void check_neighbours() {
  const std::vector<int> list = test::processors();
  cpu_set_t before;
  if (list.size() < 2 || sched_getaffinity(0, sizeof(before), &before) != 0) {
    std::printf("one processor: neighbours are left out\n");
    return;
  }
  for (size_t crowd : {size_t{1}, size_t{2}}) {
    std::vector<pid_t> children;
    for (size_t i = 0; i < crowd; ++i) children.push_back(test::start_neighbour(list[list.size() - 1 - i]));
    const auto begin = std::chrono::steady_clock::now();
    for (int job = 0; std::chrono::steady_clock::now() - begin < std::chrono::milliseconds(300); ++job) {
      Pool::Step step(Pool::process(), 2);
      int counts[8] = {};
      step.run(8, [&](int64_t tile, int) {
        spin(20000);
        ++counts[tile];
      });
      for (const int count : counts) check(count == 1, "a tile was lost or doubled beside neighbours");
    }
    for (const pid_t child : children) {
      kill(child, SIGKILL);
      waitpid(child, nullptr, 0);
    }
    for (int i = 0; i < 100 && strayed(before) != 0; ++i) usleep(10000);  // a thread that moves has yet to arrive
    check(strayed(before) == 0, "threads keep their affinity");
  }
}

// What the pool moves with: here and away, and nothing where the affinity forbids it.
void check_placement() {
  const std::vector<int> list = test::processors();
  const int here = inhouse::current_processor(), self = inhouse::thread_id();
  check(inhouse::processor_time(self) > 0, "a thread has had processor time");
  check(inhouse::processor_time(1 << 24) == -1, "a thread that is not there has none");
  cpu_set_t before, after, one;
  sched_getaffinity(0, sizeof(before), &before);
  for (const int processor : list) inhouse::move_to(self, processor);
  inhouse::move_to(self, -1);
  check(inhouse::leave(here) == (list.size() > 1), "a thread leaves where it may");
  sched_getaffinity(0, sizeof(after), &after);
  check(CPU_EQUAL(&before, &after), "a move keeps the affinity");
  CPU_ZERO(&one);
  CPU_SET(list.front(), &one);
  sched_setaffinity(0, sizeof(one), &one);
  inhouse::move_to(self, list.back());
  check(inhouse::current_processor() == list.front() && !inhouse::leave(list.front()), "one processor is kept");
  sched_setaffinity(0, sizeof(before), &before);
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
  check_placement();
  check_neighbours();
  check_fork();
  return test::finish();
}
