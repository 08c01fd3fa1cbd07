"""Instructions that linears, attention, norms and the quantisation of inputs execute on fixed shapes, counted by
valgrind: a guard against slow code that no noisy machine can hide. Valgrind knows no AVX-512, so the level is AVX2; the
bodies are written once for all levels, but what AVX-512 alone has (its dot products, `vdpbf16ps`) is not guarded here.

Usage: python tools/count_instructions.py [--update]
Prints each count beside the committed one (native/bench/instruction_counts.json); --update writes them. Exit codes:
0 as before, 1 more than TOLERANCE from before (a fall too: the baseline is then to be written again), 77 nothing
counted (the reason is printed).
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
SHAPE = (64, 1024)  # out, in: wide enough for activation scales of powers of two
FORMATS_COUNTED = ("q4_0", "q8_0", "q6_0", "bf16", "q4_k", "q6_k")
ROWS = (1, 8, 64)
KV_TYPES = {"f16": 1, "bf16": 2}  # as ih_model_create numbers them
ATTENTION = ((512, 1), (512, 16))  # positions, rows: a step of an answer, a chunk of a prompt
WIDTH = 896
TOLERANCE = 0.03
COUNTED = "counted"  # the function of counted_calls.cc
SKIPPED = 77


class Skip(Exception):
    """Why nothing can be counted here."""


def compiler(path: Path) -> str:
    """The compiler's own mark in the library; counts of another compiler say nothing."""
    found = re.search(rb"GCC: \([^)]*\) [0-9.]+|clang version [0-9.]+", path.read_bytes())
    return found.group().decode() if found else "unknown"


def calls() -> dict[str, tuple[str, str | None]]:
    """Name of each cell -> its word for native/bench/counted_calls.cc, and the cell that is counted in it besides."""
    cells: dict[str, tuple[str, str | None]] = {}
    for name in FORMATS_COUNTED:
        form = FORMATS[name]
        for rows in ROWS:
            word = _word("linear", form.id, *SHAPE, packed_nbytes(name, SHAPE), rows, form.low > 0)
            cells[f"{name} {rows}"] = word, None
    for rows in ROWS:
        cells[f"embed {SHAPE[1]} {rows}"] = _word("embed", SHAPE[1], rows), None
        word = _word("pairs", FORMATS["bf16"].id, *SHAPE, packed_nbytes("bf16", SHAPE), rows)
        cells[f"bf16 pairs {rows}"] = word, f"embed {SHAPE[1]} {rows}"
    for name, number in KV_TYPES.items():
        for positions, rows in ATTENTION:
            cells[f"attention {name} {positions}x{rows}"] = _word("attention", number, positions, rows), None
    look_up = f"embed {WIDTH} 8"
    cells[look_up] = _word("embed", WIDTH, 8), None
    cells["rms_norm 8"], cells["layer_norm 8"] = (_word("rms", WIDTH, 8), look_up), (_word("layer", WIDTH, 8), look_up)
    cells["quantize_rows 8"] = _word("quantize", WIDTH, 8, 0), look_up
    cells["quantize_rows powers 8"] = _word("quantize", WIDTH, 8, 1), look_up
    return cells


def _word(kind: str, *numbers: int) -> str:
    return ":".join([kind, *(str(int(number)) for number in numbers)])


def count(path: Path) -> dict[str, int]:
    """Cell -> instructions of its one call. Raises Skip where the tools are missing."""
    cc, valgrind = shutil.which("c++"), shutil.which("valgrind")
    if cc is None or valgrind is None:
        raise Skip("no C++ compiler here" if cc is None else "no valgrind here")
    cells = calls()
    with tempfile.TemporaryDirectory() as folder:
        program, out = Path(folder, "calls"), Path(folder, "counts")
        source = ROOT / "native" / "bench" / "counted_calls.cc"
        include = [f"-I{ROOT / 'native' / part}" for part in ("include", "src")]
        link = [str(path), f"-Wl,-rpath,{path.resolve().parent}"]
        subprocess.run([cc, "-O1", "-std=c++20", *include, str(source), *link, "-o", str(program)], check=True)
        done = subprocess.run(
            [valgrind, "--tool=callgrind", f"--toggle-collect={COUNTED}", f"--dump-after={COUNTED}",
             f"--callgrind-out-file={out}", str(program), LEVEL, *(word for word, _ in cells.values())],
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        if done.returncode:
            raise Skip(f"valgrind cannot run the library: {done.stderr.strip().splitlines()[-1]}")
        dumps = [Path(f"{out}.{i + 1}").read_text() for i in range(len(cells))]
    found = [re.search(r"^(?:totals|summary): (\d+)", text, re.MULTILINE) for text in dumps]
    if not all(found):
        raise Skip("valgrind's output lacks its totals")
    counts = {cell: int(match[1]) for cell, match in zip(cells, found, strict=True) if match}
    return {cell: counts[cell] - (counts[besides] if besides else 0) for cell, (_, besides) in cells.items()}


def compare(counts: dict[str, int], before: dict[str, int]) -> bool:
    """Prints a line a cell; whether all are within TOLERANCE of before."""
    good = True
    for cell, number in counts.items():
        change = number / before[cell] - 1 if cell in before else float("inf")
        near = abs(change) <= TOLERANCE
        good = good and near
        print(f"{cell:24} {number:12,} {change:+7.1%}{'' if near else '  outside the tolerance'}")
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
