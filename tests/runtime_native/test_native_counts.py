"""Linears, gated steps, attention, norms and quantisation execute no more instructions than the committed baseline, at
AVX2 (valgrind) and AVX-512 (stepped one by one)."""

import subprocess
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tools"))

import count_instructions

from inhouse.runtime.library import library_path

pytestmark = pytest.mark.native

TOOL = Path(__file__).resolve().parents[2] / "tools" / "count_instructions.py"


def test_a_change_beyond_the_tolerance_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    before = {"q4_0 1": 1000, "q8_0 8": 1000, "rms_norm 8": 1000}
    assert count_instructions.compare({"q4_0 1": 1029, "q8_0 8": 971}, before, 0.03)
    capsys.readouterr()
    assert not count_instructions.compare({"q4_0 1": 1000, "q8_0 8": 1040, "bf16 1": 7}, before, 0.03)
    bad = [line for line in capsys.readouterr().out.splitlines() if "outside" in line]
    assert [line.split("  ")[0] for line in bad] == ["q8_0 8", "bf16 1"]


@pytest.mark.parametrize("level", [level.name for level in count_instructions.LEVELS])
def test_kernels_execute_what_they_did(level: str) -> None:
    command = [sys.executable, str(TOOL), "--level", level]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    if done.returncode == 77:
        pytest.skip(done.stdout.strip())
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_level_counts_gated_steps_and_prompts_of_bf16() -> None:
    for level in count_instructions.LEVELS:
        cells = count_instructions.calls(level)
        assert level.gated[0] >= 9  # fewer rows run as three ops
        assert f"gated q4_0 {level.gated[0]}" in cells
        positions, rows = level.attention[-1]
        assert rows > 128 // (level.heads[0] // level.heads[1])  # rows and query heads of one task
        assert f"attention bf16 {positions}x{rows}" in cells


STEPPED = r"""
#include <initializer_list>

#include "stepped.h"
int main(int, char** words) {
  static char from[4096], to[4096];
  if (!stepped::prepare(words)) return 1;
  for (const long turns : {10L, 1000L, -1L, 10L}) {
    stepped::begin();
    if (turns >= 0) {  // a dec and a jnz each turn
      __asm__ volatile("mov %0, %%rcx\n1:\ndec %%rcx\njnz 1b\n" ::"r"(turns) : "rcx", "cc");
    } else {  // one instruction that moves 4096 bytes
      void *a = to, *b = from;
      long count = sizeof from;
      __asm__ volatile("rep movsb" : "+D"(a), "+S"(b), "+c"(count)::"memory");
    }
    std::printf("%ld\n", static_cast<long>(stepped::end()));
  }
  return 0;
}
"""


def test_steps_are_exact_and_the_same_again(tmp_path: Path) -> None:
    """A loop of two instructions a turn; a string instruction counts once."""
    source, program = tmp_path / "stepped.cc", tmp_path / "stepped"
    source.write_text(STEPPED)
    try:
        count_instructions.build(library_path(), source, program)
        ten, thousand, string, again = count_instructions.by_steps(program, "", [])
    except count_instructions.Skip as reason:
        pytest.skip(str(reason))
    assert ten == again
    assert thousand - ten == 2 * 990
    assert 1 <= string < 20


def test_equal_runs_are_equal_and_a_failure_is_no_count(tmp_path: Path) -> None:
    program = tmp_path / "calls"
    try:
        count_instructions.build(library_path(), TOOL.parents[1] / "native" / "bench" / "counted_calls.cc", program)
        words = ["embed:64:1", "rms:64:2", "attention:2:16:1:2:1"]
        runs = [count_instructions.by_steps(program, "scalar", words) for _ in range(3)]
        with pytest.raises(RuntimeError, match="avx9"):
            count_instructions.by_steps(program, "avx9", words)
    except count_instructions.Skip as reason:
        pytest.skip(str(reason))
    assert runs[0] == runs[1] == runs[2]
    assert min(runs[0]) > 300
