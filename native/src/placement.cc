#include "placement.h"

#include <sched.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

namespace inhouse {

int current_processor() { return sched_getcpu(); }

int thread_id() { return static_cast<int>(syscall(SYS_gettid)); }

int64_t processor_time(int thread) {
  // The kernel's name for the clock of any thread: pthread_getcpuclockid takes handles alone.
  const clockid_t clock = static_cast<clockid_t>((~static_cast<unsigned>(thread) << 3) | 6u);
  timespec time = {};
  if (clock_gettime(clock, &time) != 0) return -1;
  return static_cast<int64_t>(time.tv_sec) * 1000000000 + time.tv_nsec;
}

void move_to(int thread, int processor) {
  cpu_set_t allowed, one;
  if (processor < 0 || processor >= CPU_SETSIZE || sched_getaffinity(thread, sizeof(allowed), &allowed) != 0) return;
  if (!CPU_ISSET(processor, &allowed)) return;
  CPU_ZERO(&one);
  CPU_SET(processor, &one);
  if (sched_setaffinity(thread, sizeof(one), &one) == 0) sched_setaffinity(thread, sizeof(allowed), &allowed);
}

bool leave(int processor) {
  cpu_set_t allowed;
  if (processor < 0 || processor >= CPU_SETSIZE || sched_getaffinity(0, sizeof(allowed), &allowed) != 0) return false;
  cpu_set_t others = allowed;
  CPU_CLR(processor, &others);
  if (CPU_COUNT(&others) == 0 || sched_setaffinity(0, sizeof(others), &others) != 0) return false;
  sched_setaffinity(0, sizeof(allowed), &allowed);
  return true;
}

}  // namespace inhouse
