"""Speed of sparse and low-bit linears at batch 1, and from which share of zeros on they pay: by native/bench's
sparse_bench, whose two matrices are multiplied in turns. Writes docs/compression-results.json.

    cmake -S native -B build/native && cmake --build build/native --target sparse_bench
    python -m bench.compress.sparse_speed bars | coded | many | zeros [--runs N] [--bench FILE] [--threads N] [--save]
"""

import argparse
import json
import subprocess
from pathlib import Path
from typing import Any

from bench.compress.results import record

# (format, share kept, beside, least speedup by level; levels without a bar are reported)
BARS: tuple[tuple[str, float, str, float | None], ...] = (
    ("s8_g32", 0.5, "q8_0", 1.25),
    ("p8_g32", 0.5, "q8_0", None),
    ("s4_g32", 0.5, "q4_0", 1.05),
    ("p4_g32", 0.5, "q4_0", None),
    ("q4_0", 1, "bf16", 2.8),
)
CODED = (("vq1_g32", 1, "q4_0", None), ("vq2_g32", 1, "q4_0", None), ("log4_g32", 1, "q4_0", None))
MANY = (("s8_g32", 0.5, "q8_0", None), ("s4_g32", 0.5, "q4_0", None), ("vq2_g32", 1, "q8_0", None))
ZEROS = (0.5, 0.8, 0.9, 0.95, 0.97, 0.99)
SHAPE = (16384, 8192)  # 142 MB of q8_0, 75 MB of q4_0
Cell = tuple[str, float, str, float | None]


def run(bench: Path, cells: list[Cell], level: str, *options: str) -> list[dict[str, Any]]:
    """One line a cell of what the program measured."""
    named = ",".join(f"{name}:{kept:g}:{beside}" for name, kept, beside, _ in cells)
    done = subprocess.run(
        [bench, "--cell", named, "--isa", level, *options], check=True, capture_output=True, text=True
    )
    return [json.loads(line) for line in done.stdout.splitlines()]


def entry(found: dict[str, Any], bar: float | None, part: str) -> dict[str, Any]:
    """A measurement as the results keep it; a bar holds for AVX-512 alone."""
    goal = f">= {bar:g}" if bar is not None and found["isa"] == "avx512" else ""
    zeros = 1 - found["kept"]
    what = f"{found['format']}" + (f" at {zeros:.0%} zeros" if zeros else "")
    return {
        "id": f"sparse-{part}-{found['isa']}-{found['format']}-{found['kept']:g}-t{found['threads']}",
        "what": f"{what} beside {found['beside']}, {found['out']} x {found['in']}, rows {found['rows']}, "
        f"{found['isa']}, {found['threads']} threads: times as fast",
        "value": found["speedup"],
        "goal": goal,
        "bytes": found["bytes"],
        "seconds": found["ms"] / 1e3,
        "command": f"python -m bench.compress.sparse_speed {part}",
        "note": f"{found['ms']:.3f} ms against {found['beside_ms']:.3f} ms, {found['GBs']:.1f} GB/s against "
        f"{found['beside_GBs']:.1f}; median of {found['rounds']} rounds in turns",
    }


def cells_of(part: str) -> list[tuple[str, list[Cell], tuple[str, ...]]]:
    """(level, cells, options) of each call of a part."""
    out, width = (str(n) for n in SHAPE)
    large = ("--out", out, "--in", width, "--seconds", "0.5")
    if part == "bars":
        return [("avx512", list(BARS), large)]
    if part == "coded":
        return [("avx512", list(CODED), large), ("avx2", list(BARS), large)]
    if part == "many":
        return [("avx512", list(MANY), ("--rows", "128", "--out", "4096", "--in", "4096", "--seconds", "1"))]
    kept = [round(1 - zeros, 2) for zeros in ZEROS]
    eight: list[Cell] = [(name, k, "q8_0", None) for name in ("s8_g32", "csr_i8") for k in kept]
    four: list[Cell] = [("s4_g32", k, "q4_0", None) for k in kept]
    floats: list[Cell] = [("csr_bf16", k, "bf16", None) for k in kept]
    return [("avx512", [*eight, *four, *floats], ("--out", "12288", "--in", width, "--seconds", "0.3"))]


def table(entries: list[dict[str, Any]]) -> str:
    """Markdown rows."""
    return "\n".join(f"| {e['what']} | {e['value']:.2f} | {e['goal']} | {e['note']} |" for e in entries)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=("bars", "coded", "many", "zeros"))
    parser.add_argument("--bench", type=Path, default=Path("build/native/bench/sparse_bench"))
    parser.add_argument("--threads", type=int, default=0, help="0: as many as a step takes")
    parser.add_argument(
        "--runs", type=int, default=1, help="processes, each with its own memory; the middle one counts"
    )
    parser.add_argument("--save", action="store_true", help="into docs/compression-results.json")
    given = parser.parse_args()
    made = []
    for level, cells, options in cells_of(given.part):
        runs = [run(given.bench, cells, level, *options, "--threads", str(given.threads)) for _ in range(given.runs)]
        for cell, lines in zip(cells, zip(*runs, strict=True), strict=True):
            ordered = sorted(lines, key=lambda line: float(line["speedup"]))
            one = entry(ordered[len(ordered) // 2], cell[3], given.part)
            if given.runs > 1:
                one["note"] += f"; the middle of {given.runs} processes, {ordered[0]['speedup']} to "
                one["note"] += f"{ordered[-1]['speedup']}"
                one["command"] += f" --runs {given.runs}"
            made.append(one)
    print(table(made))
    for one in made if given.save else ():
        record(one)


if __name__ == "__main__":
    main()
