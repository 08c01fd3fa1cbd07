"""Measures Inhouse and its peers in turns on this machine and keeps every figure.

    python -m bench.peers.run --kits FOLDER [--plan full] [--minutes N] [--trace FILE] [--out bench/peers.json]

FOLDER holds what bench/peers/README.md says; what is not there is left out, with a line that says so. Before each
engine runs, and before and after each cell of ours, the machine's peaks are probed: on a virtual machine they move.
Nothing else may be running. Started again it goes on where it was stopped; --fresh begins anew. Each figure says on
which machine, when and by which version it was taken.
"""

import argparse
import json
import os
import platform
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from types import FrameType
from typing import Any, NoReturn

from bench.peers import plan, sides
from bench.peers.http_turns import run_load
from bench.peers.plan import Bout
from bench.peers.sides import Side, output_of

from inhouse.cli.main import own_version as inhouse_version

TIMEOUT, OVER = 900, 1.1  # seconds of one engine in a bout; how far a run may exceed its minutes


# ---- what the figures depend on --------------------------------------------------------------------------------------


def machine() -> dict[str, Any]:
    """The machine that this runs on."""
    names = [
        line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line
    ]
    return {
        "processor": names[0] if names else platform.machine(), "cores": os.cpu_count(),
        "system": platform.platform(),
    }  # fmt: skip


def versions(kits: Path) -> dict[str, str]:
    """Our version, and those of the peers that are installed, by engine."""
    found = {"inhouse": own_version()}
    for kit, package in (("v-ov", "openvino-genai"), ("v-ort", "onnxruntime-genai")):
        python = kits / kit / "bin" / "python"
        if python.exists():
            code = f"import importlib.metadata as m; print(m.version({package!r}))"
            found[package] = subprocess.run([str(python), "-c", code], capture_output=True, text=True).stdout.strip()
    for folder in kits.glob("llama_cpp_python-*/"):
        found["llama.cpp"] = f"of {folder.name}"
    return found


def own_version() -> str:
    """Ours, with the commit where the source tells it; `+` stands for changes that are not committed."""

    def git(*words: str) -> str:
        command = ["git", "-C", str(sides.HERE.parents[1]), *words]
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()

    commit, changed = git("rev-parse", "--short=9", "HEAD"), git("status", "--porcelain", "-uno", "--", "src", "native")
    at = f" at {commit}{'+' if changed else ''}" if commit else ""
    return f"{inhouse_version()}{at}, CPython {platform.python_version()}"


@dataclass(frozen=True)
class Used:
    """CPU seconds of the whole machine since it began, those of them that a hypervisor gave to others, and wall
    seconds."""

    cpu: float
    stolen: float
    wall: float


def cpu_seconds(stat: str, tick: float) -> tuple[float, float]:
    """(seconds that the CPUs were busy or stolen, stolen alone) from the text of /proc/stat:
    user, nice, system, irq, softirq and steal. Guests are counted in user already."""
    user, nice, system, _, _, irq, softirq, steal = (int(x) / tick for x in stat.split("\n")[0].split()[1:9])
    return user + nice + system + irq + softirq + steal, steal


def busy() -> Used:
    """What the machine's CPUs did until now."""
    return Used(*cpu_seconds(Path("/proc/stat").read_text(), os.sysconf("SC_CLK_TCK")), time.perf_counter())


def others(before: Used, after: Used, own: float) -> dict[str, float]:
    """How many CPUs others had between two moments, on average; `stolen` of them by the hypervisor. `own`: CPU seconds
    of ours."""
    wall = max(after.wall - before.wall, 0.01)
    foreign = max(0.0, (after.cpu - before.cpu - own) / wall)
    return {"foreign": round(foreign, 2), "stolen": round((after.stolen - before.stolen) / wall, 2)}


def probe(side: Side) -> dict[str, float]:
    """The machine's peaks now; ours at the level that it is kept to."""
    words = [sys.executable, "-m", "inhouse.tune.limits", "2"]
    environment = side.run_environment() if side.ours else None
    peaks: dict[str, float] = json.loads(
        subprocess.run(words, capture_output=True, text=True, check=True, env=environment).stdout
    )
    return peaks


# ---- one engine's part of a bout -------------------------------------------------------------------------------------


def run_side(side: Side, bout: Bout, kits: Path, trace: Path | None) -> list[dict[str, Any]]:
    """The figures of an engine, each with the probe before it, how much others used the CPU, and when it was taken.
    Raises RuntimeError where the engine fails."""
    date = datetime.now(UTC).isoformat(timespec="minutes")
    peaks, before, used = probe(side), busy(), os.times()
    if bout.cells.startswith(plan.HTTP):
        figures = run_load(side, bout.cells, kits, trace)
    else:
        figures = run_cells(side, bout)
    after, now = busy(), os.times()
    own = now.children_user + now.children_system - used.children_user - used.children_system
    about = {
        "bout": bout.name, "model": bout.model, "bits": bout.bits, "round": bout.round, "engine": side.engine,
        "form": side.form, "kv": side.kv, "ours": side.ours, "date": date, "peaks": peaks,
    }  # fmt: skip
    return [{**about, **others(before, after, own), **figure} for figure in figures]


def run_cells(side: Side, bout: Bout) -> list[dict[str, Any]]:
    """One process of an engine. A cold start comes second, after one that is thrown away and warms the disk."""
    seed = str(1000 * bout.round + 7)
    if "cold" in bout.cells.split(","):
        _figures(side, ["--cells", "cold", "--seed", seed])
    return _figures(side, ["--cells", bout.cells, "--seed", seed])


def _figures(side: Side, flags: Sequence[str]) -> list[dict[str, Any]]:
    printed = output_of([*side.command, *flags], side.run_environment(), TIMEOUT)
    figures = [json.loads(line) for line in printed.splitlines() if line.startswith('{"cell"')]
    if not figures:
        raise RuntimeError("it gave no figure")
    return figures


# ---- a whole run -----------------------------------------------------------------------------------------------------


class Report:
    """The results file: figures and times of bouts that are whole; written after each, whole or not at all."""

    def __init__(self, path: Path, kits: Path, fresh: bool) -> None:
        self.path, self.kits = path, kits
        self.machine, self.versions = "", dict[str, str]()  # of this run
        kept = json.loads(path.read_text()) if path.exists() and not fresh else {}
        self.kept: dict[str, Any] = {"figures": [], "times": [], "left_out": [], **kept}

    def done(self) -> set[str]:
        """Names of bouts that need not run again."""
        return {figure["bout"] for figure in self.kept["figures"]}

    def usual(self, bout: Bout, engine: str) -> float | None:
        """Seconds that an engine took for the same cells before."""
        key = f"{bout.model} {bout.bits} {bout.cells} {engine}"
        found = [entry["seconds"] for entry in self.kept["times"] if entry["of"] == key]
        return median(found) if found else None

    def begin(self, here: Mapping[str, Any], found: Mapping[str, str], command: str) -> None:
        """What this run depends on; each of its figures will say so."""
        self.machine = f"{here['processor']}, {here['cores']} cores, {here['system']}"
        self.versions = dict(found)
        self.kept["command"] = joined(self.kept.get("command", ""), command)

    def add(self, figures: list[dict[str, Any]], times: list[dict[str, Any]]) -> None:
        """Keeps a bout."""
        for figure in figures:
            version = self.versions.get(figure["engine"].split()[0], "unknown")
            self.kept["figures"].append({**figure, "machine": self.machine, "version": version})
        self.kept["times"] += times
        self.write()

    def leave_out(self, line: str) -> None:
        """Says, and keeps, what is not measured and why."""
        line = line.replace(str(self.kits), "KITS")
        print(f"left out: {line}", flush=True)
        if line not in self.kept["left_out"]:
            self.kept["left_out"].append(line)
            self.write()

    def write(self) -> None:
        """One line an entry, so that a change reads as what it is."""
        parts = []
        for key, value in self.kept.items():
            if isinstance(value, list):
                lines = ",\n".join("  " + json.dumps(entry) for entry in value)
                parts.append(f' "{key}": [\n{lines}\n ]' if value else f' "{key}": []')
            else:
                parts.append(f' "{key}": {json.dumps(value)}')
        scratch = self.path.with_suffix(".new")
        scratch.write_text("{\n" + ",\n".join(parts).replace(str(self.kits), "KITS") + "\n}\n")
        scratch.replace(self.path)


def side_of(bout: Bout, engine: str, kits: Path) -> Side:
    """The side of an engine's name in a bout."""
    if engine.startswith("ours"):
        return sides.ours(kits, bout.model, bout.bits, engine.split()[1])
    return sides.peer(kits, bout.model, bout.bits, engine)


def present(found: Sequence[Bout], report: Report, trace: Path | None) -> list[Bout]:
    """The bouts without engines that are not installed, which are told; without bouts where nothing is to compare."""
    out, told = [], set()
    for bout in found:
        here = []
        for engine in bout.engines:
            lacking = side_of(bout, engine, report.kits).lacking()
            here += [] if lacking else [engine]
            told |= {f"{engine} on {bout.model} at {bout.bits} bits: no {', '.join(lacking)}"} if lacking else set()
        if "trace" in bout.cells and trace is None:
            told.add("replays of a trace: no --trace named")
        elif len({engine.split()[0] for engine in here}) > 1:
            out.append(replace(bout, engines=tuple(here)))
    for line in sorted(told):
        report.leave_out(line)
    return out


def run_bout(bout: Bout, report: Report, trace: Path | None) -> bool:
    """Runs and keeps one bout; an engine that fails is told and left out. False where none had a figure."""
    figures: list[dict[str, Any]] = []
    times: list[dict[str, Any]] = []
    for engine in bout.engines:
        began = time.monotonic()
        try:
            got = run_side(side_of(bout, engine, report.kits), bout, report.kits, trace)
        except (RuntimeError, OSError, subprocess.SubprocessError) as error:
            report.leave_out(f"{engine} in {bout.name}: {' '.join(str(error).split())[-300:]}")
            continue
        figures += got
        times.append({"of": f"{bout.model} {bout.bits} {bout.cells} {engine}",
                      "seconds": round(time.monotonic() - began, 1)})  # fmt: skip
        print(f"  {engine}: " + ", ".join(f"{f['cell']} {f['value']:.4g}" for f in got), flush=True)
    report.add(figures, times)
    return bool(figures)


def command_of(given: argparse.Namespace) -> str:
    """The command again, as far as it decides what is measured."""
    words = ["python", "-m", "bench.peers.run", "--plan", given.plan, "--kv", given.kv, "--second-kv", given.second_kv]
    words += ["--minutes", f"{given.minutes:g}"] if given.minutes else []
    words += ["--only", given.only] if given.only != "." else []
    words += ["--trace", given.trace.name] if given.trace else []
    return shlex.join(words)


def joined(before: str, now: str) -> str:
    """The commands that a results file is of, in order."""
    if not before:
        return now
    return before if before.endswith(now) else f"{before}; then {now}"


def clock(seconds: float) -> str:
    """Minutes and seconds."""
    return f"{int(seconds) // 60}:{int(seconds) % 60:02}"


def run(found: list[Bout], report: Report, minutes: float, trace: Path | None) -> None:
    """Runs what is not done yet and fits."""
    left = [bout for bout in found if bout.name not in report.done()]
    if len(left) < len(found):
        print(f"{len(found) - len(left)} of {len(found)} bouts are kept from before", flush=True)
    cost = {
        bout.name: sum(report.usual(bout, engine) or plan.seconds(bout, engine) for engine in bout.engines)
        for bout in left
    }
    for bout in left:
        print(f"{clock(cost[bout.name]):>6}  {bout.name}: {', '.join(bout.engines)}", flush=True)
    print(f"about {clock(sum(cost.values()))} minutes in all", flush=True)
    if minutes:
        left, dropped = plan.cut(left, cost, minutes * 60)
        for bout in dropped:
            report.leave_out(f"{bout.name}: beyond {minutes:g} minutes")
    began, expected = time.monotonic(), 0.0
    for n, bout in enumerate(left):
        spent = time.monotonic() - began
        pace = min(2.0, max(0.5, spent / expected)) if expected > 60 else 1.0
        rest = sum(cost[b.name] for b in left[n:]) * pace
        if minutes and spent + cost[bout.name] * pace > minutes * 60 * OVER:
            report.leave_out(f"{bout.name}: no time was left of {minutes:g} minutes")
            continue
        print(f"[{clock(spent)}, about {clock(rest)} to go] {n + 1}/{len(left)} {bout.name}", flush=True)
        run_bout(bout, report, trace)
        expected += cost[bout.name]
    print(f"took {clock(time.monotonic() - began)}", flush=True)


def _stop(number: int, frame: FrameType | None) -> NoReturn:
    """Ends by way of what closes engines: one that ran on would take time from whatever is measured next."""
    raise SystemExit(128 + number)


def main() -> None:
    signal.signal(signal.SIGTERM, _stop)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kits", type=Path, default=os.environ.get("INHOUSE_PEERS"))
    parser.add_argument("--plan", choices=sorted(plan.PLANS), default="full")
    parser.add_argument("--minutes", type=float, default=0, help="drop rounds and what matters least, to fit")
    parser.add_argument("--only", default=".", help="regular expression over `model bits cells round N kv TYPE`")
    parser.add_argument("--kv", default="f16", help="KV type of ours")
    parser.add_argument("--second-kv", default="bf16,int8", help="others, in the cells where they matter; '': none")
    parser.add_argument("--trace", type=Path, help="an Azure LLM inference trace (.csv.gz), for the replays")
    parser.add_argument("--fresh", action="store_true", help="throw away what is kept")
    parser.add_argument("--estimate", action="store_true", help="print what would run and how long it takes")
    parser.add_argument("--out", type=Path, default=sides.HERE.parent / "peers.json")
    given = parser.parse_args()
    if given.kits is None:
        raise SystemExit("name the folder of kits: --kits FOLDER or INHOUSE_PEERS; see bench/peers/README.md")
    report = Report(given.out, given.kits.resolve(), given.fresh)
    every = list(plan.bouts(plan.PLANS[given.plan], given.kv, given.second_kv))
    chosen = [bout for bout in every if re.search(given.only, bout.name)]
    if given.estimate:
        report.write = lambda: None  # type: ignore[method-assign]
    else:
        report.begin(machine(), versions(report.kits), command_of(given))
    found = present(chosen, report, given.trace)
    if given.estimate:
        for bout in found:
            print(f"{clock(sum(plan.seconds(bout, engine) for engine in bout.engines)):>6}  {bout.name}")
        print(f"about {clock(sum(plan.seconds(b, e) for b in found for e in b.engines))} minutes in all")
    else:
        run(found, report, given.minutes, given.trace)


if __name__ == "__main__":
    main()
