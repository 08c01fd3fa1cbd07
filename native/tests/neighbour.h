// Other processes on the same processors, for tests and benchmarks of the pool beside them.
#pragma once
#include <sched.h>
#include <signal.h>
#include <sys/prctl.h>
#include <unistd.h>

#include <vector>

namespace test {

// The processors that this process may run on.
inline std::vector<int> processors() {
  cpu_set_t set;
  std::vector<int> list;
  if (sched_getaffinity(0, sizeof(set), &set) != 0) return list;
  for (int i = 0; i < CPU_SETSIZE; ++i) {
    if (CPU_ISSET(i, &set)) list.push_back(i);
  }
  return list;
}

// A process that keeps a processor busy until it is killed, or its parent ends.
inline pid_t start_neighbour(int processor) {
  const pid_t child = fork();
  if (child != 0) return child;
  prctl(PR_SET_PDEATHSIG, SIGKILL);
  cpu_set_t set;
  CPU_ZERO(&set);
  CPU_SET(processor, &set);
  sched_setaffinity(0, sizeof(set), &set);
  for (;;) __asm__ volatile("");
}

}  // namespace test
