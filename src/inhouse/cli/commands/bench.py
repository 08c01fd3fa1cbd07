"""`inhouse bench`: speed of a model on this machine."""

import os
import subprocess
import sys
import time
from collections.abc import Mapping
from functools import partial
from typing import Annotated, Any

import typer

from inhouse.cli.commands import common
from inhouse.cli.output import human_bytes, print_json, print_table
from inhouse.core.errors import ExecutorError

app = common.app()
CELL_KEYS = "prefill512, prefill4096, decode32, decode2048, decode8192, batch8, batch32"


@app.command(epilog="Example: inhouse bench demo --rounds 5 --json")
def command(
    model: common.Reference,
    rounds: Annotated[int, typer.Option(min=1, help="counted rounds of each cell, after a warm-up")] = 3,
    cells: Annotated[str, typer.Option(help="usual, all, or some of: " + CELL_KEYS)] = "usual",
    cold: Annotated[bool, typer.Option(help="also time a fresh process to its first token")] = True,
    quantize: common.Quantize = None,
    threads: common.Threads = None,
    executor: common.Executor = None,
    device: common.Device = None,
    kv_dtype: common.KvDtype = None,
    context: common.Context = None,
    kv_memory: Annotated[str | None, typer.Option(help="memory for the KV cache, such as 2GiB")] = None,
    json: common.Json = False,
) -> None:
    """Measures prompts, one stream and several, cold start and memory, each beside what this machine could reach.
    Random prompts, greedy, end tokens ignored."""
    from inhouse.engine.session import Session
    from inhouse.plan.memory import weight_bytes
    from inhouse.tune.limits import fresh_peaks
    from inhouse.tune.measure import choose, fit, measure

    wanted = choose(cells)
    flags = {"--quantize": quantize, "--threads": threads, "--executor": executor, "--device": device, "--kv": kv_dtype,
             "--context": context}  # fmt: skip
    settings = common.settings(
        quantize=quantize, threads=threads, executor=executor, device=device, kv_dtype=kv_dtype, context=context,
        kv_memory=kv_memory, prefix_cache=False,
    )  # fmt: skip
    report: dict[str, Any] = {"model": model, "cold_start_s": _cold_start(model, flags) if cold else None}
    with Session.open(model, settings) as session:
        session.need_decoder("this benchmark")
        engine = session.engine
        report |= {
            "executor": session.model.executor.name,
            "formats": session.model.report.formats,
            "weights_bytes": weight_bytes(session.model.weights),
            "kv_dtype": session.model.executor.kv_dtype,
            "state_bytes": engine.state_bytes,
            "cells": [],
        }
        fitting = {cell.key: fit(cell, engine.context_length, engine.config.max_running) for cell in wanted}
        report["left_out"] = [key for key, cell in fitting.items() if cell is None]
        for cell in filter(None, fitting.values()):
            # before and after each cell: a virtual machine's bandwidth moves
            report["cells"].append(measure(session, cell, partial(fresh_peaks, settings.threads), rounds).to_dict())
        report["peak_rss_bytes"] = _peak_rss()
    if json:
        print_json(report)
    else:
        _print(report)


def _print(report: dict[str, Any]) -> None:
    print(
        f"{report['model']} on {report['executor']}: weights {human_bytes(report['weights_bytes'])}, "
        f"KV {report['kv_dtype']}"
    )
    if report["cells"]:
        shown = [key for key in report["cells"][0] if not key.startswith("peaks")]
        print_table(report["cells"], shown)
        peaks = report["cells"][-1]["peaks_after"]
        print(
            f"this machine at most: {peaks['read_bytes'] / 1e9:.1f} GB/s, {peaks['int8_ops'] / 1e9:.0f} int8 GOP/s, "
            f"{peaks['f32_ops'] / 1e9:.0f} f32 GFLOP/s; `share` is of the time that these allow, "
            "probed before and after each cell; `disturbed`: the two probes differ by more than a tenth there"
        )
    if report["left_out"]:
        print(f"left out, the context is too short: {', '.join(report['left_out'])}")
    if report["cold_start_s"] is not None:
        print(f"cold start to the first token: {report['cold_start_s']:.3f} s (process start, warm disk, median of 3)")
    print(f"peak memory of this process: {human_bytes(report['peak_rss_bytes'])}")


def _cold_start(model: str, flags: Mapping[str, object]) -> float:
    """Seconds from the start of `inhouse run` to the first byte of its answer: the median of three, after one."""
    command = [sys.executable, "-m", "inhouse", "run", model, "hi", "--max-tokens", "8"]
    command += [word for flag, value in flags.items() if value is not None for word in (flag, str(value))]
    times = []
    for _ in range(4):
        began = time.monotonic()
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
            assert process.stdout is not None
            os.read(process.stdout.fileno(), 1)
            times.append(time.monotonic() - began)
            _, error = process.communicate()
        if process.returncode:
            raise ExecutorError(f"`inhouse run {model}` failed: {error.decode()[-300:].strip()}")
    return sorted(times[1:])[1]


def _peak_rss() -> int:
    """Largest resident size of this process so far, in bytes (Linux VmHWM)."""
    with open("/proc/self/status") as status:
        for line in status:
            if line.startswith("VmHWM"):
                return int(line.split()[1]) * 1024
    return 0
