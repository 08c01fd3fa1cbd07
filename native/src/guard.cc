// The handler only reads atomics and calls mmap, which is safe in a signal handler on Linux.
#include "guard.h"

#include <signal.h>
#include <sys/mman.h>
#include <unistd.h>

#include <atomic>
#include <cerrno>
#include <mutex>

namespace inhouse {

namespace {

struct Range {
  std::atomic<uintptr_t> begin{0}, end{0};  // end 0: the slot is free
  std::atomic<bool> damaged{false};
};

constexpr int kSlots = 512;  // in each page of slots
constexpr int kPages = 256;

std::atomic<Range*> pages[kPages];
std::mutex add_mutex;
bool installed = false;
struct sigaction previous;
uintptr_t page_bytes = 4096;

Range* find(uintptr_t at) {
  for (std::atomic<Range*>& page : pages) {
    Range* slots = page.load(std::memory_order_acquire);
    if (slots == nullptr) return nullptr;
    for (int i = 0; i < kSlots; ++i) {
      const uintptr_t end = slots[i].end.load(std::memory_order_acquire);
      if (end != 0 && at < end && at >= slots[i].begin.load(std::memory_order_relaxed)) return &slots[i];
    }
  }
  return nullptr;
}

// Zeros from the lost page to the range's last whole page: what follows it in a shrunken file is lost as well. The
// page that holds the range's end is taken only if it is the lost one, since others may live on it.
bool patch(Range* range, uintptr_t at) {
  const uintptr_t from = at & ~(page_bytes - 1);
  uintptr_t to = range->end.load(std::memory_order_relaxed) & ~(page_bytes - 1);
  if (to <= from) to = from + page_bytes;
  void* got = mmap(reinterpret_cast<void*>(from), to - from, PROT_READ, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0);
  if (got == MAP_FAILED) return false;
  range->damaged.store(true, std::memory_order_release);
  return true;
}

void pass_on(int signal, siginfo_t* info, void* context) {
  if ((previous.sa_flags & SA_SIGINFO) != 0 && previous.sa_sigaction != nullptr) {
    previous.sa_sigaction(signal, info, context);
  } else if (previous.sa_handler == SIG_DFL || previous.sa_handler == SIG_IGN) {
    struct sigaction standard = {};
    standard.sa_handler = SIG_DFL;
    sigaction(SIGBUS, &standard, nullptr);  // the access repeats when we return, and ends the process
  } else {
    previous.sa_handler(signal);
  }
}

void on_bus_error(int signal, siginfo_t* info, void* context) {
  const int saved = errno;
  const uintptr_t at = reinterpret_cast<uintptr_t>(info->si_addr);
  Range* range = find(at);
  if (range == nullptr || !patch(range, at)) pass_on(signal, info, context);
  errno = saved;
}

void install() {
  if (installed) return;
  page_bytes = static_cast<uintptr_t>(sysconf(_SC_PAGESIZE));
  struct sigaction action = {};
  action.sa_sigaction = on_bus_error;
  action.sa_flags = SA_SIGINFO | SA_ONSTACK;
  sigemptyset(&action.sa_mask);
  installed = sigaction(SIGBUS, &action, &previous) == 0;
}

Range* slot_of(int64_t handle) { return &pages[handle / kSlots].load(std::memory_order_acquire)[handle % kSlots]; }

bool valid(int64_t handle) {
  return handle >= 0 && handle < int64_t{kSlots} * kPages &&
         pages[handle / kSlots].load(std::memory_order_acquire) != nullptr;
}

}  // namespace

int64_t guard_add(const void* begin, size_t bytes) {
  const std::lock_guard<std::mutex> lock(add_mutex);
  install();
  for (int page = 0; page < kPages; ++page) {
    Range* slots = pages[page].load(std::memory_order_acquire);
    if (slots == nullptr) {
      slots = new Range[kSlots];
      pages[page].store(slots, std::memory_order_release);
    }
    for (int i = 0; i < kSlots; ++i) {
      if (slots[i].end.load(std::memory_order_relaxed) != 0) continue;
      slots[i].damaged.store(false, std::memory_order_relaxed);
      slots[i].begin.store(reinterpret_cast<uintptr_t>(begin), std::memory_order_relaxed);
      slots[i].end.store(reinterpret_cast<uintptr_t>(begin) + bytes, std::memory_order_release);
      return int64_t{page} * kSlots + i;
    }
  }
  return -1;
}

void guard_remove(int64_t handle) {
  if (valid(handle)) slot_of(handle)->end.store(0, std::memory_order_release);
}

bool guard_damaged(int64_t handle) { return valid(handle) && slot_of(handle)->damaged.load(std::memory_order_acquire); }

}  // namespace inhouse
