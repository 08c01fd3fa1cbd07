"""Measures the demo model on this machine and writes docs/benchmarks.md from all kept results; nothing else may run.

python tools/benchmarks.py            measures the demo model, keeps bench/results.json, writes the page
python tools/benchmarks.py --render   writes the page from what is kept: bench/{results,peers,quality,kernels}.json

Comparisons with other engines are measured by bench/peers/run.py, quality by tools/quality.py.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from inhouse.runtime.probe import Peaks
from inhouse.tune.limits import Work

ROOT = Path(__file__).resolve().parents[1]
RESULTS, PAGE = ROOT / "bench" / "results.json", ROOT / "docs" / "benchmarks.md"
PEERS, QUALITY = ROOT / "bench" / "peers.json", ROOT / "bench" / "quality.json"
RUNS: tuple[tuple[str, list[str]], ...] = (
    ("demo", []),
    ("demo, q8", ["--quantize", "q8"]),
    ("demo, q4", ["--quantize", "q4"]),
)


@dataclass(frozen=True, slots=True)
class Goal:
    """What a cell is to reach: a ratio to the best peer and a share of the limit (0: none); the lesser counts."""

    cell: str
    title: str
    ratio: float
    share: float


GOALS = (
    Goal("prefill512", "prefill, 512 tokens", 1.5, 0.75),
    Goal("prefill4096", "prefill, 4096 tokens", 1.5, 0.70),
    Goal("decode32", "decode after 32", 1.5, 0.85),
    Goal("decode2048", "decode after 2048", 2.0, 0.75),
    Goal("decode8192", "decode after 8192", 2.0, 0.75),
    Goal("batch8", "8 streams", 1.8, 0.65),
    Goal("batch32", "32 streams", 2.0, 0.70),
)
AVX2_GOAL = 1.2


def machine() -> dict[str, Any]:
    """What the figures depend on."""
    names = [
        line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line
    ]
    return {
        "processor": names[0] if names else platform.machine(), "cores": os.cpu_count(), "system": platform.platform(),
        "python": platform.python_version(), "date": datetime.now(UTC).date().isoformat(),
        "load_before": os.getloadavg()[0],
    }  # fmt: skip


def cold_run() -> dict[str, float]:
    """A fresh `inhouse run demo "hi"` under the system's own accounting: wall seconds, CPU seconds, peak bytes."""
    code = (
        "import os,sys,time,json,resource,subprocess as s\n"
        "t=time.monotonic();p=s.run([sys.executable,'-m','inhouse','run','demo','hi'],stdout=s.DEVNULL)\n"
        "r=resource.getrusage(resource.RUSAGE_CHILDREN)\n"
        "print(json.dumps({'wall_s':time.monotonic()-t,'cpu_s':r.ru_utime+r.ru_stime,'peak_rss':r.ru_maxrss*1024}))"
    )
    runs = [json.loads(subprocess.check_output([sys.executable, "-c", code])) for _ in range(6)][1:]
    return {key: sorted(run[key] for run in runs)[2] for key in runs[0]}


def measure() -> dict[str, Any]:
    """The demo model's figures."""
    report: dict[str, Any] = {"machine": machine(), "run_demo_hi": cold_run(), "runs": []}
    for name, flags in RUNS:
        command = [sys.executable, "-m", "inhouse", "bench", "demo", "--rounds", "5", "--json", *flags]
        report["runs"].append(
            {"name": name, "command": ["inhouse", *command[3:]]} | json.loads(subprocess.check_output(command))
        )
    return report


# ---- comparisons -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Compared:
    """One cell of one pair: medians of both sides, the median of the rounds' ratios, our share of the limit."""

    engine: str
    form: str
    ours: float
    peer: float
    ratio: float
    ratios: tuple[float, ...]
    share: float | None


def _by_round(figures: Sequence[Mapping[str, Any]], cell: str) -> dict[int, Mapping[str, Any]]:
    return {figure["round"]: figure for figure in figures if figure["cell"] == cell}


def _share(figure: Mapping[str, Any]) -> float | None:
    """Share of the time that the machine's peaks, probed before that run, allow."""
    if "work" not in figure:
        return None
    least = Work(**figure["work"]).seconds(Peaks(**figure["peaks"])) / float(figure["work_tokens"])
    return float(figure["value"]) * least


def compared(entry: Mapping[str, Any], cell: str) -> Compared | None:
    """A cell of a pair, None where a side has no figure."""
    ours, peer = _by_round(entry["ours"], cell), _by_round(entry["peer"], cell)
    rounds = sorted(set(ours) & set(peer))
    if not rounds:
        return None
    less = cell in ("cold", "rss")  # the smaller is the better
    pairs = [(ours[r]["value"], peer[r]["value"]) for r in rounds]
    ratios = tuple(b / a if less else a / b for a, b in pairs)
    shares = [s for s in (_share(ours[r]) for r in rounds) if s is not None]
    return Compared(
        entry["engine"], entry["form"], statistics.median(a for a, _ in pairs), statistics.median(b for _, b in pairs),
        statistics.median(ratios), ratios, statistics.median(shares) if shares else None,
    )  # fmt: skip


def _best(entries: Sequence[Mapping[str, Any]], cell: str) -> Compared | None:
    """The comparison with the peer that is best in this cell: the one we are least ahead of."""
    found = [c for c in (compared(entry, cell) for entry in entries) if c is not None]
    return min(found, key=lambda c: c.ratio) if found else None


def _verdict(goal: Goal, best: Compared) -> str:
    if best.ratio >= goal.ratio or (best.share or 0.0) >= goal.share:
        return "reached"
    return "ahead, short of the goal" if best.ratio > 1.0 else "**behind**"


def _range(ratios: Sequence[float]) -> str:
    return f"{min(ratios):.2f}-{max(ratios):.2f}" if len(ratios) > 1 else "one round"


def goal_table(model: str, bits: str, entries: Sequence[Mapping[str, Any]], goals: Sequence[Goal]) -> Iterator[str]:
    """Rows of ours against the best peer, for one model and number of bits."""
    yield f"### {model}, about {bits} bits"
    yield ""
    yield f"Ours: {entries[0]['ours_form']}. Peers: " + "; ".join(f"{e['engine']} {e['form']}" for e in entries) + "."
    yield ""
    yield "| cell | ours tok/s | best peer tok/s | which | ratio (rounds) | goal | share of limit | goal | |"
    yield "|---|--:|--:|---|--:|--:|--:|--:|---|"
    for goal in goals:
        if best := _best(entries, goal.cell):
            share = "" if best.share is None else f"{best.share:.0%}"
            wished = f"{goal.share:.0%}" if goal.share else ""
            yield (
                f"| {goal.title} | {best.ours:.4g} | {best.peer:.4g} | {best.engine} | {best.ratio:.2f} "
                f"({_range(best.ratios)}) | {goal.ratio:g} | {share} | {wished} | {_verdict(goal, best)} |"
            )
    for cell, title, scale, unit in (("cold", "process start to first token", 1, "s"),
                                     ("rss", "largest resident memory", 2**20, "MiB")):  # fmt: skip
        if best := _best(entries, cell):
            yield (
                f"| {title} | {best.ours / scale:.4g} {unit} | {best.peer / scale:.4g} {unit} | {best.engine} | "
                f"{best.ratio:.2f} ({_range(best.ratios)}) | {1.0 if cell == 'rss' else 1.5:g} | | | |"
            )
    yield ""


def every_peer(entries: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """Every pair and cell, so that nothing hides behind the best."""
    yield "| model | bits | peer | cell | ours | peer | ratio | rounds | CPU taken by others |"
    yield "|---|---|---|---|--:|--:|--:|--:|--:|"
    for entry in entries:
        for cell in dict.fromkeys(figure["cell"] for figure in entry["ours"]):
            if c := compared(entry, cell):
                foreign = max(f["foreign"] for f in (*entry["ours"], *entry["peer"]) if f["cell"] == cell)
                yield (
                    f"| {entry['model']} | {entry['bits']} | {c.engine} {c.form} | {cell} | {c.ours:.4g} | "
                    f"{c.peer:.4g} | {c.ratio:.2f} | {len(c.ratios)} | {foreign:.2f} |"
                )
    yield ""


def peers(report: Mapping[str, Any]) -> Iterator[str]:
    """The comparisons of bench/peers.json."""
    info = report["machine"]
    yield from [
        "## Against other engines", "",
        "Measured by `python bench/peers/run.py` in turns (ours, the peer, ours, the peer), two threads, greedy; the",
        "ratio is the median over rounds of ours divided by the peer's (for seconds and bytes the other way round), so",
        "above 1 is ahead. The limit is the roofline at the bandwidth and arithmetic peaks probed just before each run",
        "(`inhouse.tune.limits`); reaching either goal of a row counts.", "",
        f"Machine: {info['processor']}, {info['cores']} cores, {info['system']}, {info['date']}. "
        + ", ".join(f"{k} {v}" for k, v in report.get("versions", {}).items()) + ".", "",
    ]  # fmt: skip
    groups: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for entry in report.get("pairs", []):
        groups.setdefault((entry["model"], entry["bits"]), []).append(entry)
    for (model, bits), entries in groups.items():
        avx2 = [Goal(goal.cell, goal.title, AVX2_GOAL, 0.0) for goal in GOALS]
        yield from goal_table(model, bits, entries, avx2 if "AVX2" in bits else GOALS)
    yield from ["### Every pair", ""]
    yield from every_peer(report.get("pairs", []))
    if report.get("http"):
        yield from http(report["http"], report.get("http_note", ""))


def http(figures: Sequence[Mapping[str, Any]], note: str) -> Iterator[str]:
    """Loads over HTTP: medians over rounds."""
    yield from [
        "### Over HTTP, qwen2.5-0.5b at 4 bits", "",
        "`http32`: 32 clients at once, 128-token prompts, 128 tokens each. `trace`: thirty requests of a public trace",
        "(Azure LLM inference 2023, conversations; prompts cut to 512, answers to 96 tokens) at that many a second;",
        "goodput counts requests with a first token within 2 s and a median of at most 100 ms between tokens. OpenVINO",
        "replays the trace in process, without HTTP. " + note, "",
        "| load | engine | goodput req/s | median first token s | median between tokens ms | output tok/s | rounds |",
        "|---|---|--:|--:|--:|--:|--:|",
    ]  # fmt: skip
    for load in dict.fromkeys(figure["load"] for figure in figures):
        for engine in dict.fromkeys(figure["engine"] for figure in figures):
            own = [f for f in figures if (f["load"], f["engine"]) == (load, engine)]
            if own:
                cells, rounds = {f["cell"] for f in own}, len({f["round"] for f in own})
                median = {c: statistics.median(f["value"] for f in own if f["cell"] == c) for c in cells}
                yield (
                    f"| {load} | {engine} | {median['goodput']:.2f} | {median['first_token']:.2f} | "
                    f"{median['between_tokens'] * 1000:.0f} | {median['output']:.0f} | {rounds} |"
                )
    yield ""


def quality(report: Mapping[str, Any]) -> Iterator[str]:
    """Divergence of formats from the float model."""
    yield from [
        "## What the formats keep", "",
        f"Written by `{report['command']}`. KL divergence (nats a token) to the float model on the same weights and",
        "text; a peer's format is its weights' rounding alone, computed by us; ours includes its rounded activations.",
        "",
        "| model | format | whose | bits a weight | mean KL | 99 % KL | top-1 equal |",
        "|---|---|---|--:|--:|--:|--:|",
    ]  # fmt: skip
    for row in report["rows"]:
        yield (
            f"| {row['model']} | {row['format']} | {row['whose']} | {row['bits']:.2f} | {row['kld_mean']:.4f} | "
            f"{row['kld_p99']:.3f} | {row['top1']:.1%} |"
        )
    yield ""


# ---- the demo model --------------------------------------------------------------------------------------------------


def demo(report: Mapping[str, Any]) -> Iterator[str]:
    """What `inhouse bench demo` and `inhouse run demo` say."""
    info, cold = report["machine"], report["run_demo_hi"]
    yield from [
        "## The demo model", "",
        f"Machine: {info['processor']}, {info['cores']} cores, {info['system']}, CPython {info['python']},",
        f"{info['date']}, load average before the run {info['load_before']:.2f}. Medians of five rounds, one warm-up.",
        "", '`inhouse run demo "hi"`, a whole process on a warm disk (median of five):', "",
        "| figure | value |", "|---|---|",
        f"| first byte of the answer | {report['runs'][0]['cold_start_s']:.3f} s |",
        f"| whole process | {cold['wall_s']:.3f} s wall, {cold['cpu_s']:.3f} s CPU |",
        f"| peak resident memory | {cold['peak_rss'] / 2**20:.0f} MiB |", "",
    ]  # fmt: skip
    for run in report["runs"]:
        yield from [
            f"### {run['name']}: {run['executor']}, weights {run['weights_bytes'] / 1e6:.1f} MB, KV {run['kv_dtype']}",
            "", f"`{' '.join(run['command'])}`", "",
            "| cell | streams | prompt | answer | tok/s | GB/s | GOP/s | share of limit | first token s |",
            "|---|--:|--:|--:|--:|--:|--:|--:|--:|",
        ]  # fmt: skip
        for c in run["cells"]:
            yield (
                f"| {c['cell']} | {c['streams']} | {c['prompt']} | {c['answer']} | {c['tokens_s']:.0f} | "
                f"{c['gb_s']:.2f} | {c['gop_s']:.1f} | {c['share']:.0%} | {c['first_token_s']:.4f} |"
            )
        yield ""


def render() -> str:
    """The page, from every results file that is there."""
    lines = [
        "# Benchmarks", "",
        "Written by `python tools/benchmarks.py` from the files in `bench/`; do not edit.", "",
    ]  # fmt: skip
    for path, section in ((PEERS, peers), (QUALITY, quality), (RESULTS, demo)):
        if path.exists():
            lines += section(json.loads(path.read_text()))
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--render", action="store_true", help="do not measure")
    if not parser.parse_args().render:
        RESULTS.write_text(json.dumps(measure(), indent=1) + "\n")
    PAGE.write_text(render())


if __name__ == "__main__":
    main()
