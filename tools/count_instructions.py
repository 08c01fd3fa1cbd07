"""Instructions that linears, attention, norms and the quantisation of inputs execute on fixed shapes: a guard against
slow code that no noisy machine can hide. Counted by valgrind at the level AVX2. Valgrind knows no AVX-512, so there
they are stepped one by one (native/bench/stepped.h), ten microseconds each, on smaller shapes; both are exact.

Usage: python tools/count_instructions.py [--level avx2|avx512] [--update]
Prints each count beside the committed one (native/bench/instruction_counts.json); --update writes them. Exit codes:
0 as before, 1 further from it than the level's tolerance (a fall too: the baseline is then to be written again), 77
nothing counted (the reasons are printed, as are those for a level that is left out).
"""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from inhouse.core.errors import InhouseError
from inhouse.runtime.library import library_path
from inhouse.runtime.native_library import available_levels
from inhouse.runtime.packed import FORMATS, packed_nbytes

ROOT = Path(__file__).resolve().parent.parent
BASELINE = ROOT / "native" / "bench" / "instruction_counts.json"
FORMATS_COUNTED = ("q4_0", "q8_0", "q6_0", "bf16", "q4_k", "q6_k")
KV_TYPES = {"f16": 1, "bf16": 2}  # as ih_model_create numbers them
COUNTED = "counted"  # the function of counted_calls.cc
SKIPPED = 77


@dataclass(frozen=True)
class Level:
    """What is counted at a level. `shape`: out and in of a matrix; `width`: of other ops; `gated`: rows of gate, up and
    their product as one op, and their outputs; `heads`: of attention, and of K and V; `attention`: positions and rows
    for each KV type: a step of an answer, chunks of a prompt, of which the last has more rows than one task takes."""

    name: str
    shape: tuple[int, int]
    width: int
    rows: tuple[int, ...]
    gated: tuple[int, int]
    heads: tuple[int, int]
    attention: tuple[tuple[int, int], ...]
    tolerance: float
    stepped: bool


LEVELS = (
    Level("avx2", (64, 1024), 896, (1, 8, 64), (16, 256), (14, 2), ((512, 1), (512, 16), (128, 48)), 0.03, False),
    Level("avx512", (32, 256), 256, (1, 8), (9, 64), (8, 1), ((96, 1), (24, 17)), 0.01, True),
)


class Skip(Exception):
    """Why nothing can be counted here."""


def compiler(path: Path) -> str:
    """The compiler's own mark in the library; counts of another compiler say nothing."""
    found = re.search(rb"GCC: \([^)]*\) [0-9.]+|clang version [0-9.]+", path.read_bytes())
    return found.group().decode() if found else "unknown"


def calls(level: Level) -> dict[str, tuple[str, str | None]]:
    """Name of each cell -> its word for native/bench/counted_calls.cc, and the cell that is counted in it besides."""
    return _matrices(level) | _attentions(level) | _others(level)


def _matrices(level: Level) -> dict[str, tuple[str, str | None]]:
    """Linears of every format, by steps where AVX-512 has bodies of its own for scales of powers of two; of pairs; and
    gate, up and their product. What takes long to step is counted in fewer cells."""
    cells: dict[str, tuple[str, str | None]] = {}
    shape, width, (rows, outputs) = level.shape, level.shape[1], level.gated
    for count in dict.fromkeys((*level.rows, rows)):
        cells[f"embed {width} {count}"] = _word("embed", width, count), None
        cells[f"codes {width} {count}"] = _word("quantize", width, count, 1), None
    for name in FORMATS_COUNTED:
        form, size = FORMATS[name], packed_nbytes(name, shape)
        for count in level.rows[:1] if level.stepped and form.two_level else level.rows:
            if level.stepped and form.low > 0:
                cells[f"{name} {count}"] = _word("coded", form.id, *shape, size, count), f"codes {width} {count}"
            else:
                cells[f"{name} {count}"] = _word("linear", form.id, *shape, size, count, form.low > 0), None
    for count in level.rows:
        word = _word("pairs", FORMATS["bf16"].id, *shape, packed_nbytes("bf16", shape), count)
        cells[f"bf16 pairs {count}"] = word, f"embed {width} {count}"
    for name in ("q4_0",) if level.stepped else ("q4_0", "q8_0"):
        word = _word("gated", FORMATS[name].id, outputs, width, packed_nbytes(name, (outputs, width)), rows)
        cells[f"gated {name} {rows}"] = word, f"codes {width} {rows}"
    return cells


def _attentions(level: Level) -> dict[str, tuple[str, str | None]]:
    return {
        f"attention {name} {positions}x{rows}": (_word("attention", number, positions, rows, *level.heads), None)
        for name, number in KV_TYPES.items()
        for positions, rows in (level.attention[:1] if level.stepped and name == "f16" else level.attention)
    }


def _others(level: Level) -> dict[str, tuple[str, str | None]]:
    width, look_up = level.width, f"embed {level.width} 8"
    return {
        look_up: (_word("embed", width, 8), None),
        "rms_norm 8": (_word("rms", width, 8), look_up),
        "layer_norm 8": (_word("layer", width, 8), look_up),
        "quantize_rows 8": (_word("quantize", width, 8, 0), look_up),
        "quantize_rows powers 8": (_word("quantize", width, 8, 1), look_up),
    }


def _word(kind: str, *numbers: int) -> str:
    return ":".join([kind, *(str(int(number)) for number in numbers)])


def build(path: Path, source: Path, program: Path) -> None:
    """Builds a program of native/bench against the library. Raises Skip where there is no compiler."""
    if (cc := shutil.which("c++")) is None:
        raise Skip("no C++ compiler here")
    include = [f"-I{ROOT / 'native' / part}" for part in ("include", "src", "bench")]
    link = [str(path), f"-Wl,-rpath,{path.resolve().parent}", "-Wl,-z,now"]  # else a first call looks up its symbols
    subprocess.run([cc, "-O1", "-std=c++20", *include, str(source), *link, "-o", str(program)], check=True)


def by_valgrind(program: Path, level: str, words: list[str]) -> list[int]:
    """Instructions of each call. Raises Skip where valgrind is missing or cannot run the library."""
    if (valgrind := shutil.which("valgrind")) is None:
        raise Skip("no valgrind here")
    out = program.parent / "counts"
    command = [
        valgrind, "--tool=callgrind", f"--toggle-collect={COUNTED}", f"--dump-after={COUNTED}",
        f"--callgrind-out-file={out}", str(program), level, *words,
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise Skip(f"valgrind cannot run the library: {done.stderr.strip().splitlines()[-1]}")
    dumps = [Path(f"{out}.{i + 1}").read_text() for i in range(len(words))]
    found = [re.search(r"^(?:totals|summary): (\d+)", text, re.MULTILINE) for text in dumps]
    if not all(found):
        raise Skip("valgrind's output lacks its totals")
    return [int(match[1]) for match in found if match]


def by_steps(program: Path, level: str, words: list[str]) -> list[int]:
    """Instructions of each call, one after the other. Raises Skip where they cannot be stepped here."""
    environment = os.environ | {"INHOUSE_STEPPED": "1"}
    command = [str(program), level, *words]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    if done.returncode == SKIPPED:
        raise Skip(done.stderr.strip())
    if done.returncode:
        raise RuntimeError(f"stepping {level} failed: {done.stderr.strip()}")
    return [int(line) for line in done.stdout.split()]


def count(path: Path, level: Level, cells: Mapping[str, tuple[str, str | None]]) -> dict[str, int]:
    """Cell -> instructions of its one call. Raises Skip where the tools or the level are missing."""
    if level.name not in available_levels():
        raise Skip(f"this machine does not run {level.name}")
    with tempfile.TemporaryDirectory() as folder:
        program = Path(folder, "calls")
        build(path, ROOT / "native" / "bench" / "counted_calls.cc", program)
        found = (by_steps if level.stepped else by_valgrind)(program, level.name, [word for word, _ in cells.values()])
    counts = dict(zip(cells, found, strict=True))
    return {cell: counts[cell] - (counts[besides] if besides else 0) for cell, (_, besides) in cells.items()}


def features() -> str:
    """What of AVX-512 this processor has: bodies differ by it."""
    flags = re.search(r"^flags\s*:(.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    return " ".join(sorted({flag for flag in (flags[1].split() if flags else []) if flag.startswith("avx512")}))


def compare(counts: dict[str, int], before: dict[str, int], tolerance: float) -> bool:
    """Prints a line a cell; whether all are within the tolerance of before."""
    good = True
    for cell, number in counts.items():
        change = number / before[cell] - 1 if cell in before else float("inf")
        near = abs(change) <= tolerance
        good = good and near
        print(f"{cell:24} {number:12,} {change:+7.1%}{'' if near else '  outside the tolerance'}")
    return good


def check(path: Path, level: Level, baseline: dict[str, Any], update: bool) -> bool:
    """Counts a level and compares; whether it is as before, or written anew. Raises Skip."""
    before = baseline.get(level.name, {"built_by": "", "features": "", "counts": {}})
    here = {"built_by": compiler(path), "features": features() if level.stepped else ""}
    for key, what in (("built_by", "the library was built by"), ("features", "this processor has")):
        if not update and here[key] != before[key]:
            raise Skip(f"{what} {here[key]!r}, the baseline's {before[key]!r}")
    counts = count(path, level, calls(level))
    good = compare(counts, before["counts"], level.tolerance)
    if update:
        baseline[level.name] = here | {"counts": counts}
    return good or update


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--level", choices=[level.name for level in LEVELS], help="one alone")
    parser.add_argument("--update", action="store_true", help="write the counts as the new baseline")
    given = parser.parse_args()
    baseline: dict[str, Any] = json.loads(BASELINE.read_text()) if BASELINE.exists() else {}
    results = []
    for level in LEVELS:
        if given.level not in (None, level.name):
            continue
        try:
            results.append(check(library_path(), level, baseline, given.update))
        except (Skip, InhouseError) as reason:
            print(f"instructions of {level.name} are not counted: {reason}")
    if given.update:
        BASELINE.write_text(json.dumps(baseline, indent=2) + "\n")
    return SKIPPED if not results else 0 if all(results) else 1


if __name__ == "__main__":
    sys.exit(main())
