"""Instructions that the packed linears execute on fixed shapes, counted by valgrind: a guard against slow code that no
noisy machine can hide. Valgrind knows no AVX-512, so the level is AVX2; the bodies are the same for all levels.

Usage: python tools/count_instructions.py [--update]
Prints each count beside the committed one (native/bench/instruction_counts.json); --update writes them. Exit codes:
0 as before, 1 more than TOLERANCE from before, 77 nothing counted (the reason is printed).
"""

import argparse
import json
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from inhouse.core.errors import InhouseError
from inhouse.runtime.library import library_path
from inhouse.runtime.packed import FORMATS, packed_nbytes

ROOT = Path(__file__).resolve().parent.parent
BASELINE = ROOT / "native" / "bench" / "instruction_counts.json"
LEVEL = "avx2"
SHAPE = (64, 512)  # out, in
CELLS = tuple((name, rows) for name in ("q4_0", "q8_0", "q4_k", "q6_k", "bf16") for rows in (1, 8))
TOLERANCE = 0.03
SKIPPED = 77


class Skip(Exception):
    """Why nothing can be counted here."""


def compiler(path: Path) -> str:
    """The compiler's own mark in the library; counts of another compiler say nothing."""
    found = re.search(rb"GCC: \([^)]*\) [0-9.]+|clang version [0-9.]+", path.read_bytes())
    return found.group().decode() if found else "unknown"


def count(path: Path) -> dict[str, int]:
    """Instructions of one call a cell, `format rows` -> count. Raises Skip where the tools are missing."""
    cc, valgrind = shutil.which("cc"), shutil.which("valgrind")
    if cc is None or valgrind is None:
        raise Skip("no C compiler here" if cc is None else "no valgrind here")
    cells = [
        (FORMATS[name].id, *SHAPE, packed_nbytes(name, SHAPE), rows, int(FORMATS[name].low > 0)) for name, rows in CELLS
    ]
    with tempfile.TemporaryDirectory() as folder:
        program, out = Path(folder, "calls"), Path(folder, "counts")
        source, include = ROOT / "native" / "bench" / "linear_calls.c", ROOT / "native" / "include"
        link = [str(path), f"-Wl,-rpath,{path.resolve().parent}"]
        subprocess.run([cc, "-O1", f"-I{include}", str(source), *link, "-o", str(program)], check=True)
        arguments = [str(number) for cell in cells for number in cell]
        done = subprocess.run(
            [valgrind, "--tool=callgrind", "--toggle-collect=ih_linear", "--dump-after=ih_linear",
             f"--callgrind-out-file={out}", str(program), LEVEL, *arguments],
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        if done.returncode:
            raise Skip(f"valgrind cannot run the library: {done.stderr.strip().splitlines()[-1]}")
        dumps = [Path(f"{out}.{i + 1}").read_text() for i in range(len(cells))]
    found = [re.search(r"^(?:totals|summary): (\d+)", text, re.MULTILINE) for text in dumps]
    if not all(found):
        raise Skip("valgrind's output lacks its totals")
    return {f"{name} {rows}": int(match[1]) for (name, rows), match in zip(CELLS, found, strict=True) if match}


def compare(counts: dict[str, int], before: dict[str, int]) -> bool:
    """Prints a line a cell; whether all are within TOLERANCE of before."""
    good = True
    for cell, number in counts.items():
        change = number / before[cell] - 1 if cell in before else float("inf")
        near = abs(change) <= TOLERANCE
        good = good and near
        print(f"{cell:10} {number:10,} {change:+7.1%}{'' if near else '  outside the tolerance'}")
    return good


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--update", action="store_true", help="write the counts as the new baseline")
    update = parser.parse_args().update
    baseline: dict[str, Any] = json.loads(BASELINE.read_text()) if BASELINE.exists() else {"compiler": "", "counts": {}}
    try:
        path = library_path()
        if not update and compiler(path) != baseline["compiler"]:
            raise Skip(f"the library was built by {compiler(path)}, the baseline by {baseline['compiler']}")
        counts = count(path)
    except (Skip, InhouseError) as reason:
        print(f"instructions are not counted: {reason}")
        return SKIPPED
    good = compare(counts, baseline["counts"])
    if update:
        BASELINE.write_text(json.dumps({"compiler": compiler(path), "level": LEVEL, "counts": counts}, indent=2) + "\n")
    return 0 if good or update else 1


if __name__ == "__main__":
    sys.exit(main())
