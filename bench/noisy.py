"""Speed of a whole model beside neighbours that spin: nobody, one process pinned to one CPU, one on each of two CPUs,
in turns. A fair scheduler takes half of a CPU for each neighbour; ratios are to the quiet run of the same turn.

    python -m bench.noisy [MODEL] [--quantize q4] [--cells prefill512,decode32] [--turns 2] [--threads N] [--json]
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from inhouse.core.settings import load_settings
from inhouse.engine.session import Session
from inhouse.tune.limits import fresh_peaks
from inhouse.tune.measure import Cell, choose, fit, measure

NEIGHBOURS = (0, 1, 2)
# Ends with its parent, however that ends.
SPIN = """
import os
os.sched_setaffinity(0, {%d})
while os.getppid() == %d:
    for _ in range(1_000_000):
        pass
"""


@contextmanager
def neighbours(cpus: list[int]) -> Iterator[None]:
    """One spinning process pinned to each of the CPUs."""
    started = [subprocess.Popen([sys.executable, "-c", SPIN % (cpu, os.getpid())]) for cpu in cpus]
    try:
        yield
    finally:
        for process in started:
            process.kill()
            process.wait()


def fair(count: int, cpus: int) -> float:
    """Share of the machine that is left beside `count` neighbours, each of which takes half of a CPU."""
    return 1 - count / (2 * cpus)


def turns(session: Session, cells: list[Cell], rounds: int, threads: int) -> dict[str, list[list[float]]]:
    """Cell -> for each turn the tokens/s beside each number of NEIGHBOURS."""
    peaks, cpus = fresh_peaks(threads), sorted(os.sched_getaffinity(0))
    speeds: dict[str, list[list[float]]] = {cell.key: [] for cell in cells}
    for _ in range(rounds):
        for cell in cells:
            speeds[cell.key].append([])
        for count in NEIGHBOURS:
            with neighbours(cpus[len(cpus) - count :]):
                for cell in cells:
                    speeds[cell.key][-1].append(measure(session, cell, lambda: peaks, rounds=1).tokens_s)
    return speeds


def summary(cell: str, speeds: list[list[float]], cpus: int) -> list[dict[str, Any]]:
    """One row a number of neighbours: median tokens/s, median ratio to the quiet run of its turn, the fair share."""
    return [
        {
            "cell": cell,
            "neighbours": count,
            "tokens_s": round(statistics.median(turn[i] for turn in speeds), 1),
            "ratio": round(statistics.median(turn[i] / turn[0] for turn in speeds), 3),
            "fair": round(fair(count, cpus), 3),
            "turns": [round(turn[i], 1) for turn in speeds],
        }
        for i, count in enumerate(NEIGHBOURS)
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="demo")
    parser.add_argument("--quantize", default=None)
    parser.add_argument("--cells", default="prefill512,decode32")
    parser.add_argument("--turns", type=int, default=2)
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    cpus = len(os.sched_getaffinity(0))
    if cpus < max(NEIGHBOURS):
        parser.error(f"needs {max(NEIGHBOURS)} CPUs; this process may use {cpus}")
    settings = load_settings({"quantize": given.quantize, "threads": given.threads, "prefix_cache": False})
    with Session.open(given.model, settings) as session:
        engine = session.engine
        cells = [
            c for cell in choose(given.cells) if (c := fit(cell, engine.context_length, engine.config.max_running))
        ]
        speeds = turns(session, cells, given.turns, settings.threads or cpus)
    rows = [row for cell in cells for row in summary(cell.key, speeds[cell.key], cpus)]
    if given.json:
        print(json.dumps({"model": given.model, "cpus": cpus, "rows": rows}, indent=2))
        return
    print(f"{given.model}, {cpus} CPUs: {'cell':12} {'neighbours':>10} {'tokens/s':>9} {'ratio':>6} {'fair':>6}")
    for row in rows:
        print(
            f"{row['cell']:12} {row['neighbours']:10} {row['tokens_s']:9} {row['ratio']:6} {row['fair']:6}  "
            f"{row['turns']}"
        )


if __name__ == "__main__":
    main()
