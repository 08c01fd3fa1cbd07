# Cross compilation for AArch64 with Debian's compiler; ctest runs the tests under qemu-user.
#   cmake -S native -B build/aarch64 -G Ninja -DCMAKE_TOOLCHAIN_FILE=aarch64.cmake -DINHOUSE_TESTS=ON
set(CMAKE_SYSTEM_NAME Linux)
set(CMAKE_SYSTEM_PROCESSOR aarch64)
set(CMAKE_CXX_COMPILER aarch64-linux-gnu-g++)
set(CMAKE_FIND_ROOT_PATH_MODE_LIBRARY ONLY)
set(CMAKE_FIND_ROOT_PATH_MODE_INCLUDE ONLY)
find_program(qemu NAMES qemu-aarch64 qemu-aarch64-static)
if(qemu)
  set(CMAKE_CROSSCOMPILING_EMULATOR ${qemu} -cpu max -L /usr/aarch64-linux-gnu)
endif()
