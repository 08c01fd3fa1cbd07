// Cost of the pool: an empty job, and jobs like those of a decode step and of a prompt, alone and beside neighbours
// that spin, each pinned to a processor of its own. One JSON object a line; `share` is work done against one thread
// alone times the threads. Usage: threads_bench [--threads N] [--seconds S (a figure)] [--turns N]
#include <sched.h>
#include <signal.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>

#include "../tests/neighbour.h"
#include "threads.h"

using namespace inhouse;

namespace {

struct Job {
  const char* name;
  int tiles;
  int loops;  // of a tile: about a nanosecond each
};
constexpr Job kJobs[] = {{"empty", 2, 0}, {"decode", 8, 5000}, {"prompt", 16, 100000}};

double now() { return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count(); }

// Arithmetic that waits for itself, so that its time is that of the processor alone.
void compute(int loops, double* sink) {
  double x = *sink;
  for (int i = 0; i < loops; ++i) x = x * 0.999999 + 1e-9;
  *sink = x;
}

// Jobs a second over `seconds`.
double speed(const Job& job, int threads, double seconds) {
  std::vector<double> sinks(static_cast<size_t>(job.tiles) * 16, 1.0);
  const double begin = now();
  int64_t jobs = 0;
  double spent = 0;
  while (spent < seconds) {
    Pool::Step step(Pool::process(), threads);  // as long as a step of a model
    for (int i = 0; i < 100; ++i, ++jobs) {
      step.run(job.tiles, [&](int64_t tile, int) { compute(job.loops, &sinks[static_cast<size_t>(tile) * 16]); });
    }
    spent = now() - begin;
  }
  return static_cast<double>(jobs) / spent;
}

}  // namespace

int main(int argc, char** argv) {
  int threads = default_threads(), turns = 1;
  double seconds = 0.5;
  size_t most = 256;
  for (int i = 1; i < argc; i += 2) {
    const std::string key = argv[i];
    if (i + 1 < argc && key == "--threads") {
      threads = std::atoi(argv[i + 1]);
    } else if (i + 1 < argc && key == "--seconds") {
      seconds = std::atof(argv[i + 1]);
    } else if (i + 1 < argc && key == "--turns") {
      turns = std::atoi(argv[i + 1]);
    } else if (i + 1 < argc && key == "--neighbours") {
      most = static_cast<size_t>(std::max(0, std::atoi(argv[i + 1])));
    } else {
      std::fprintf(stderr, "threads_bench: unknown option; bench/threads_bench.cc begins with the list\n");
      return 2;
    }
  }
  const std::vector<int> list = test::processors();
  for (int turn = 0; turn < turns; ++turn) {
    for (const Job& job : kJobs) {
      const double alone = speed(job, 1, seconds / 4) * threads;
      for (size_t count = 0; count <= std::min(most, list.size()); ++count) {
        std::vector<pid_t> children;
        for (size_t i = 0; i < count; ++i) children.push_back(test::start_neighbour(list[list.size() - 1 - i]));
        const double found = speed(job, threads, seconds);
        for (const pid_t child : children) {
          kill(child, SIGKILL);
          waitpid(child, nullptr, 0);
        }
        std::printf("{\"job\":\"%s\",\"tiles\":%d,\"threads\":%d,\"neighbours\":%zu,\"us\":%.2f,\"share\":%.3f}\n",
                    job.name, job.tiles, threads, count, 1e6 / found, job.loops > 0 ? found / alone : 0.0);
        std::fflush(stdout);
      }
    }
  }
  return 0;
}
