// Guarded memory ranges: a file mapping that loses its file under us becomes an error instead of the process's end.
#pragma once
#include <cstddef>
#include <cstdint>

namespace inhouse {

// Guards [begin, begin + bytes); gives a handle, or -1 when no slot is left.
int64_t guard_add(const void* begin, size_t bytes);
void guard_remove(int64_t handle);

// Whether a page of the range was lost since it was added.
bool guard_damaged(int64_t handle);

}  // namespace inhouse
