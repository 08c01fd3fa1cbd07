"""Measures the demo model on this machine and writes docs/benchmarks.md from the results; nothing else may be running.

python tools/benchmarks.py            measures, keeps bench/results.json, writes the page
python tools/benchmarks.py --render   writes the page from bench/results.json
"""

import argparse
import json
import os
import platform
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS, PAGE = ROOT / "bench" / "results.json", ROOT / "docs" / "benchmarks.md"
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
    """A fresh `inhouse run demo "hi"` under /usr/bin/time's own accounting: wall seconds, CPU seconds, peak bytes."""
    code = (
        "import os,sys,time,json,resource,subprocess as s\n"
        "t=time.monotonic();p=s.run([sys.executable,'-m','inhouse','run','demo','hi'],stdout=s.DEVNULL)\n"
        "r=resource.getrusage(resource.RUSAGE_CHILDREN)\n"
        "print(json.dumps({'wall_s':time.monotonic()-t,'cpu_s':r.ru_utime+r.ru_stime,'peak_rss':r.ru_maxrss*1024}))"
    )
    runs = [json.loads(subprocess.check_output([sys.executable, "-c", code])) for _ in range(6)][1:]
    return {key: sorted(run[key] for run in runs)[2] for key in runs[0]}


def measure() -> dict[str, Any]:
    """All figures of the page."""
    report: dict[str, Any] = {"machine": machine(), "run_demo_hi": cold_run(), "runs": []}
    for name, flags in RUNS:
        command = [sys.executable, "-m", "inhouse", "bench", "demo", "--rounds", "5", "--json", *flags]
        report["runs"].append(
            {"name": name, "command": ["inhouse", *command[3:]]} | json.loads(subprocess.check_output(command))
        )
    return report


def render(report: dict[str, Any]) -> str:
    """The page."""
    info, cold = report["machine"], report["run_demo_hi"]
    lines = [
        "# Benchmarks", "",
        "Written by `python tools/benchmarks.py` from `bench/results.json`; do not edit. Medians of five rounds after",
        "a warm-up. No figure here is compared with another engine's: that takes rounds measured in turns, and has",
        "not been done yet.", "",
        f"Machine: {info['processor']}, {info['cores']} cores, {info['system']}, CPython {info['python']},",
        f"{info['date']}, load average before the run {info['load_before']:.2f}.", "",
        "## From nothing to an answer", "",
        '`inhouse run demo "hi"`, a whole process on a warm disk (median of five):', "",
        "| figure | value |", "|---|---|",
        f"| first byte of the answer | {report['runs'][0]['cold_start_s']:.3f} s |",
        f"| whole process | {cold['wall_s']:.3f} s wall, {cold['cpu_s']:.3f} s CPU |",
        f"| peak resident memory | {cold['peak_rss'] / 2**20:.0f} MiB |", "",
        "## Speed", "",
    ]  # fmt: skip
    for run in report["runs"]:
        lines += [
            f"### {run['name']}: {run['executor']}, weights {run['weights_bytes'] / 1e6:.1f} MB, KV {run['kv_dtype']}",
            "",
            f"`{' '.join(run['command'])}`", "",
            "| cell | streams | prompt | answer | prefill tok/s | decode tok/s | first token s | weights GB/s |",
            "|---|--:|--:|--:|--:|--:|--:|--:|",
        ]  # fmt: skip
        lines += [
            f"| {c['name']} | {c['streams']} | {c['prompt']} | {c['answer']} | {c['prefill_tokens_s']:.0f} | "
            f"{c['decode_tokens_s']:.0f} | {c['first_token_s']:.4f} | {c['weights_gb_s']:.2f} |"
            for c in run["cells"]
        ]
        lines.append("")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--render", action="store_true", help="do not measure")
    if not parser.parse_args().render:
        RESULTS.parent.mkdir(exist_ok=True)
        RESULTS.write_text(json.dumps(measure(), indent=1) + "\n")
    PAGE.write_text(render(json.loads(RESULTS.read_text())))


if __name__ == "__main__":
    main()
