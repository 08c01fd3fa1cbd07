"""Measures the demo model on this machine and writes docs/benchmarks.md from all kept results; nothing else may run.

python tools/benchmarks.py            measures the demo model, keeps bench/results.json, writes the page
python tools/benchmarks.py --render   writes the page from what is kept: bench/{results,peers,quality}.json

Comparisons with other engines are measured by bench/peers/run.py (their page: peers_page.py, peers_figures.py; why a
cell falls short: bench/shortfalls.json, without which nothing is written), quality by tools/quality.py.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import peers_page

ROOT = Path(__file__).resolve().parents[1]
RESULTS, PAGE = ROOT / "bench" / "results.json", ROOT / "docs" / "benchmarks.md"
PEERS, QUALITY = ROOT / "bench" / "peers.json", ROOT / "bench" / "quality.json"
SHORTFALLS = ROOT / "bench" / "shortfalls.json"
RUNS: tuple[tuple[str, list[str]], ...] = (
    ("demo", []),
    ("demo, q8", ["--quantize", "q8"]),
    ("demo, q4", ["--quantize", "q4"]),
)


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


# ---- sections --------------------------------------------------------------------------------------------------------


def peers(report: Mapping[str, Any]) -> Iterator[str]:
    """The comparisons with other engines. Raises Unexplained."""
    return peers_page.page(report, json.loads(SHORTFALLS.read_text()) if SHORTFALLS.exists() else {})


def quality(report: Mapping[str, Any]) -> Iterator[str]:
    """Divergence of formats from the float model."""
    yield from [
        "## What the formats keep", "",
        f"Written by `{report['command']}`. KL divergence (nats a token) to the float model on the same weights and",
        "text; a peer's format is its weights' rounding alone, computed by us, though these engines round activations",
        "to 8 bits as well; ours includes its rounded activations and its KV type. Our q8 is Q8_0 itself, so what it",
        "has beyond llama.cpp's row is rounded activations. Random models have nearly flat distributions, so their",
        "likeliest token means little.", "",
        "| model | format | whose | bits a weight | mean KL | 99 % KL | top-1 equal |",
        "|---|---|---|--:|--:|--:|--:|",
    ]  # fmt: skip
    for row in report["rows"]:
        yield (
            f"| {row['model']} | {row['format']} | {row['whose']} | {row['bits']:.2f} | {row['kld_mean']:.2g} | "
            f"{row['kld_p99']:.2g} | {row['top1']:.1%} |"
        )
    yield ""
    yield from above(report["rows"])


def above(rows: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """Like beside like, weights alone: where ours moves further from the float model than a peer's format of about as
    many bits. What rounded activations add stands behind it."""
    for ours in (row for row in rows if row["format"] in ("q4 (weights alone)", "q8 (weights alone)")):
        wish, own = ours["format"][:2], [r for r in rows if r["model"] == ours["model"]]
        served = next((r["kld_mean"] for r in own if r["format"] == f"{wish} as served, KV f16"), None)
        alike = [r for r in own if "ours" not in r["whose"] and _eight(r["format"]) == (wish == "q8")]
        lower = [
            f"{r['whose']} {r['format']} ({r['kld_mean']:.5f} at {r['bits']:.2f} bits)"
            for r in alike if r["kld_mean"] < ours["kld_mean"]
        ]  # fmt: skip
        if not alike:
            continue
        verdict = "**above** " + "; ".join(lower) if lower else f"at or below all {len(alike)} peers' formats"
        shown = f"{ours['kld_mean']:.5f} at {ours['bits']:.2f} bits, {verdict}"
        yield f"- {ours['model']}, {wish}: {shown}" + (f"; as served {served:.5f}." if served is not None else ".")
    yield ""


def _eight(name: str) -> bool:
    """Whether a peer's format has about 8 bits."""
    return name.startswith(("Q8", "int8"))


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
            doubt = " (one probe)" if "peaks_after" not in c else " (disturbed)" if c["disturbed"] else ""
            yield (
                f"| {c['cell']} | {c['streams']} | {c['prompt']} | {c['answer']} | {c['tokens_s']:.0f} | "
                f"{c['gb_s']:.2f} | {c['gop_s']:.1f} | {c['share']:.0%}{doubt} | {c['first_token_s']:.4f} |"
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
    try:
        PAGE.write_text(render())
    except peers_page.Unexplained as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
