// Counts the instructions between two points of a process by running them one at a time, with the processor's trap
// flag: exact, slow (about ten microseconds each on a virtual machine, half of what a tracing process takes), and at
// every level that the machine has, which valgrind is not. A string instruction counts once, however often it repeats;
// what begin() and end() themselves take is in it. Linux on x86-64; needs no privilege.
#pragma once
#include <cstdint>
#include <cstdio>
#include <cstdlib>

#if defined(__linux__) && defined(__x86_64__)
#include <sys/personality.h>
#include <unistd.h>

#include <csignal>

namespace stepped {

struct Count {
  int64_t steps;
  const void* last;  // instruction that comes next
};
inline Count count = {};

inline void on_step(int, siginfo_t* info, void*) {
  count.steps += info->si_addr != count.last;  // else it repeats
  count.last = info->si_addr;
}

// Before anything else in main: from here on addresses are not shuffled, so that equal runs are equal. False where that
// is forbidden.
inline bool prepare(char** argv) {
  struct sigaction action = {};
  action.sa_sigaction = on_step;
  action.sa_flags = SA_SIGINFO;
  sigaction(SIGTRAP, &action, nullptr);
  const int now = personality(0xffffffff);
  if ((now & ADDR_NO_RANDOMIZE) != 0) return true;
  if (personality(static_cast<unsigned long>(now) | ADDR_NO_RANDOMIZE) < 0) return false;
  execv("/proc/self/exe", argv);
  return false;
}

// The flags are pushed below what the compiler may keep under the stack pointer.
inline void begin() {
  count = {};
  __asm__ volatile("lea -128(%%rsp), %%rsp\npushfq\norq $0x100, (%%rsp)\npopfq\nlea 128(%%rsp), %%rsp" ::
                       : "memory", "cc");
}

inline int64_t end() {
  __asm__ volatile("lea -128(%%rsp), %%rsp\npushfq\nandq $~0x100, (%%rsp)\npopfq\nlea 128(%%rsp), %%rsp" ::
                       : "memory", "cc");
  return count.steps;
}

}  // namespace stepped
#else
namespace stepped {

inline bool prepare(char**) {
  std::fprintf(stderr, "steps are counted on Linux on x86-64 alone\n");
  std::exit(77);
}
inline void begin() {}
inline int64_t end() { return 0; }

}  // namespace stepped
#endif
