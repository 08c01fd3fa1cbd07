#!/usr/bin/env bash
# C++ tests under AddressSanitizer and UBSan; those with several threads under ThreadSanitizer; the AArch64 build under
# qemu-user. What a machine lacks is left out, in words.
set -euo pipefail
cd "$(dirname "$0")/.."
jobs=$(nproc)

targets=()
configure() { # name, then cmake arguments; builds $targets, or everything where that is empty
  local name=$1
  shift
  cmake -S native -B "build/$name" -G Ninja -DINHOUSE_TESTS=ON -DINHOUSE_WERROR=ON "$@" >"build/$name.log" 2>&1 ||
    { cat "build/$name.log"; exit 1; }
  cmake --build "build/$name" --parallel "$jobs" ${targets[@]+--target "${targets[@]}"} >"build/$name.log" 2>&1 ||
    { tail -n 60 "build/$name.log"; exit 1; }
}

mkdir -p build
configure sanitized -DINHOUSE_SANITIZE=address,undefined
ctest --test-dir build/sanitized --output-on-failure --parallel "$jobs"

# The prefix under which ThreadSanitizer runs here: none, or one that leaves addresses unshuffled for an older runtime.
tsan_prefix() {
  local prefix
  echo 'int main() {}' | "${CXX:-c++}" -x c++ -fsanitize=thread -o build/tsan-probe - 2>/dev/null || return 1
  for prefix in "" "setarch -R"; do
    $prefix build/tsan-probe 2>/dev/null && { echo "$prefix"; return 0; }
  done
  return 1
}

if prefix=$(tsan_prefix); then
  targets=(threads_test callers_test lora_test model_test)
  # One level: races lie between the bodies, which are written once; vector code takes minutes more to compile.
  configure tsan -DINHOUSE_SANITIZE=thread -DINHOUSE_SCALAR_ONLY=ON
  targets=()
  for name in threads_test callers_test lora_test "model_test 1000"; do
    echo "ThreadSanitizer: $name"
    # shellcheck disable=SC2086  # words on purpose
    $prefix build/tsan/tests/$name >build/tsan.log 2>&1 || { tail -n 80 build/tsan.log; exit 1; }
  done
else
  echo "native-test: ThreadSanitizer does not build or run here; races were not looked for"
fi

if command -v aarch64-linux-gnu-g++ >/dev/null && command -v qemu-aarch64 >/dev/null; then
  configure aarch64 -DCMAKE_TOOLCHAIN_FILE=aarch64.cmake
  echo "native-test: threads_test is left out under qemu-user, which fails an assertion of its own when a process with threads forks"
  ctest --test-dir build/aarch64 --output-on-failure --parallel "$jobs" --exclude-regex threads_test
else
  echo "native-test: no aarch64-linux-gnu-g++ or no qemu-aarch64 here; the NEON level was not built"
fi
command -v clang++ >/dev/null || echo "native-test: no clang++ here; the library was built with the default compiler alone"
