"""Speed of the linear kernels on the shapes of the usual models, by native/bench's linear_bench, kept in a file from
which tools/kernels_page.py writes docs/kernels.md. What the file has already is left out, so that a long table can be
measured in pieces; say the same command again until nothing is left. Nothing else may run meanwhile.

    cmake -S native -B build/native -G Ninja && ninja -C build/native linear_bench
    python tools/kernel_speed.py [--models NAME,...] [--levels avx2,avx512] [--formats q4_0,q8_0,bf16] [--rows 1,...]
                                 [--limit SECONDS] [--again] [--file bench/kernels.jsonl]

The file has a line {machine, command, date, threads} for each run, and after it what that run measured, a line for one
model's matrices at one level, format and number of rows, with the peaks that the same process had probed before:
{model, isa, format, rows, tokens_s, GOPs, GBs, of_compute, of_read, matrices: {name: [ms, of_compute, of_read]},
peaks: {read_GBs, dot_GOPs, fma_GOPs}}.
"""

import argparse
import datetime
import json
import os
import platform
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from inhouse.runtime.native_library import available_levels

ROOT = Path(__file__).resolve().parents[1]
FILE = ROOT / "bench" / "kernels.jsonl"
MODELS = (
    "qwen2.5-0.5b", "llama-3.2-1b", "qwen2.5-1.5b", "gemma-2-2b", "llama-3.2-3b", "qwen3-4b", "mistral-7b",
    "qwen2.5-7b", "llama-3.1-8b",
)  # fmt: skip
ROWS = (1, 2, 4, 8, 16, 32, 64, 512)
Line = dict[str, Any]
Key = tuple[str, str, str, int]


def key(line: Line) -> Key:
    """What a line is about; a later line about the same takes the place of an earlier one."""
    return line["model"], line["isa"], line["format"], line["rows"]


def read(path: Path) -> dict[Key, Line]:
    """The file's figures by what they are about, each with its `run`; nothing where there is no file."""
    found: dict[Key, Line] = {}
    run: Line = {}
    for text in path.read_text().splitlines() if path.exists() else ():
        line = json.loads(text)
        if "machine" in line:
            run = line
        else:
            found[key(line)] = line | {"run": run}
    return found


def gather(output: Iterable[str]) -> Iterator[Line]:
    """Lines of the file from those that linear_bench prints: peaks, then a model's matrices and their sum, in turn."""
    peaks: Line = {}
    matrices: Line = {}
    for text in output:
        found = json.loads(text)
        kind = found.pop("kind")
        if kind == "peak":
            peaks = {name: found[name] for name in ("read_GBs", "dot_GOPs", "fma_GOPs")}
        elif kind == "matrix":
            matrices[found["matrix"]] = [found["ms"], found["of_compute"], found["of_read"]]
        else:
            found.pop("ms")
            yield found | {"matrices": matrices, "peaks": peaks}
            matrices = {}


def missing(
    have: Iterable[Key], models: list[str], levels: list[str], formats: list[str], rows: list[int]
) -> list[Key]:
    """What is not measured yet, a model after the other."""
    known = set(have)
    return [k for m in models for i in levels for f in formats for r in rows if (k := (m, i, f, r)) not in known]


def measure(bench: Path, keys: list[Key], threads: int, until: float) -> Iterator[Line]:
    """One process a (model, level, format), killed at `until` (time.monotonic); gives what was finished. Raises
    CalledProcessError where the program fails."""
    groups: dict[tuple[str, str, str], list[int]] = {}
    for model, level, name, rows in keys:
        groups.setdefault((model, level, name), []).append(rows)
    for (model, level, name), rows_here in groups.items():
        left = until - time.monotonic()
        if left <= 0:
            return
        command = [str(bench), "--model", model, "--isa", level, "--format", name]
        command += ["--rows", ",".join(map(str, rows_here)), "--threads", str(threads)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            timer = threading.Timer(left, process.kill)
            timer.start()
            assert process.stdout is not None
            yield from gather(text for text in process.stdout if text.endswith("}\n"))  # a kill cuts the last line
            timer.cancel()
        if process.returncode not in (0, -signal.SIGKILL):  # that is our own kill; a crash is another signal
            raise subprocess.CalledProcessError(process.returncode, command)


def machine() -> str:
    """Processor, number of CPUs and system."""
    names = [t.split(":", 1)[1].strip() for t in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in t]
    return f"{names[0] if names else platform.machine()}, {os.cpu_count()} CPUs, {platform.platform()}"


def levels() -> list[str]:
    """Those of this machine that are worth a table; linear_bench refuses others."""
    here = available_levels()
    return [name for name in ("avx512", "avx2", "neon") if name in here]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default=",".join(MODELS))
    parser.add_argument("--levels", default=",".join(levels()))
    parser.add_argument("--formats", default="q4_0,q8_0,bf16")
    parser.add_argument("--rows", default=",".join(map(str, ROWS)))
    parser.add_argument("--limit", type=float, default=1e9, help="seconds after which nothing more is begun or kept")
    parser.add_argument("--again", action="store_true", help="measure anew what the file has")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--bench", type=Path, default=ROOT / "build" / "native" / "bench" / "linear_bench")
    parser.add_argument("--file", type=Path, default=FILE)
    given = parser.parse_args()
    models = given.models.split(",")
    if unknown := set(models) - set(MODELS):
        parser.error(f"unknown models: {', '.join(sorted(unknown))}; known: {', '.join(MODELS)}")
    rows = [int(word) for word in given.rows.split(",")]
    have: dict[Key, Line] = {} if given.again else read(given.file)
    keys = missing(have, models, given.levels.split(","), given.formats.split(","), rows)
    run = {
        "machine": machine(), "command": shlex.join(["python", "tools/kernel_speed.py", *sys.argv[1:]]),
        "date": datetime.date.today().isoformat(), "threads": given.threads,
    }  # fmt: skip
    done = 0
    with given.file.open("a") as file:
        for line in measure(given.bench, keys, given.threads, time.monotonic() + given.limit):
            for one in (line,) if done else (run, line):
                file.write(json.dumps(one, separators=(",", ":")) + "\n")
            file.flush()
            done += 1
    print(f"{done} measured, {len(keys) - done} left")
    return 0


if __name__ == "__main__":
    sys.exit(main())
