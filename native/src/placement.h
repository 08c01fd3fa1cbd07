// Where threads run: moves one from a processor to another and leaves its affinity as it was. Knows no jobs.
#pragma once
#include <cstdint>

namespace inhouse {

// The processor that runs the calling thread; -1 where that is unknown.
int current_processor();

int thread_id();  // of the calling thread, for the functions below

// Nanoseconds of processor time that a thread of this process has had; -1 where that is unknown.
int64_t processor_time(int thread);

// Puts a thread into the queue of a processor. Its affinity holds on afterwards; where that excludes the processor,
// nothing happens.
void move_to(int thread, int processor);

// Puts the calling thread into the queue of another processor; returns when it runs there. False if it may use none.
bool leave(int processor);

}  // namespace inhouse
