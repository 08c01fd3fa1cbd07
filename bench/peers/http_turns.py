"""Loads over HTTP on our server and llama-server, and on OpenVINO's pipeline in process (it has no server of its own
here, which flatters it): each engine alone, started for the load and stopped after it."""

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from bench.peers.plan import TRACE_REQUESTS
from bench.peers.sides import HERE, Side, output_of

PORT, CLIENTS, TIMEOUT = 18090, 32, 600
MOST_PROMPT, MOST_NEW = 512, 96  # http_load.py cuts requests of a trace to these


def command(side: Side, kits: Path) -> tuple[list[str], str]:
    """What serves a side over HTTP, and its name. OpenVINO is not served: its command takes a trace."""
    if side.ours:
        folder = side.command[2]
        flags = side.command[side.command.index("--kv") + 2 :]
        return [
            sys.executable, "-m", "inhouse", "serve", folder, *flags, "--kv", side.kv, "--threads", "2",
            "--port", str(PORT), "--kv-memory", "1GiB", "--no-prefix-cache",
        ], "inhouse"  # fmt: skip
    if side.key == "llama":
        context = str(CLIENTS * (MOST_PROMPT + 128))
        return [
            str(kits / "build-lc" / "bin" / "llama-server"), "-m", side.command[2], "-t", "2", "-c", context,
            "-np", str(CLIENTS), "--port", str(PORT), "--host", "127.0.0.1", "--no-webui",
        ], "llama-server"  # fmt: skip
    return side.command, "openvino-genai (in process)"


def run_load(side: Side, load: str, kits: Path, trace: Path | None) -> list[dict[str, Any]]:
    """The figures of one load on one side: `http 32 clients` or `http trace RATE`. Raises RuntimeError where the
    server or the load fails, or a trace is needed and not named."""
    tool = str(HERE / "http_load.py")
    with tempfile.TemporaryDirectory() as scratch:
        if load.endswith("clients"):
            flags = ["--clients", str(CLIENTS)]
        elif trace is None:
            raise RuntimeError("no --trace named")
        else:
            plan = Path(scratch, "plan.json")
            wish = ["--make-plan", str(trace), "--rate", load.split()[-1], "--requests", str(TRACE_REQUESTS)]
            plan.write_text(output_of([sys.executable, tool, *wish], None, TIMEOUT))
            flags = ["--plan", str(plan)]
        serving, name = command(side, kits)
        if side.key == "openvino":
            printed = output_of([*serving, "--trace", flags[1]], side.run_environment(), TIMEOUT)
        else:
            with server(serving, side.run_environment(), Path(scratch, "log")) as url:
                with urllib.request.urlopen(f"{url}/v1/models", timeout=10) as answer:
                    model = json.load(answer)["data"][0]["id"]
                printed = output_of([sys.executable, tool, url, "--model", model, *flags], None, TIMEOUT)
    figures = [json.loads(line) for line in printed.splitlines() if line.startswith('{"cell"')]
    return [{"served": name, **figure} for figure in figures]


@contextmanager
def server(words: list[str], environment: dict[str, str], log: Path) -> Iterator[str]:
    """A server that answers, stopped at the end. Raises RuntimeError where it does not come up in a minute."""
    url = f"http://127.0.0.1:{PORT}"
    with log.open("wb") as written:
        process = subprocess.Popen(words, stdout=written, stderr=subprocess.STDOUT, env=environment)
    try:
        began = time.monotonic()
        answers = False
        while not answers:
            time.sleep(0.05)
            answers = any(_answers(url + path) for path in ("/health", "/v1/models"))
            if process.poll() is not None or time.monotonic() - began > 60:  # else another's server would be measured
                raise RuntimeError(f"{os.path.basename(words[0])} does not serve: {log.read_text()[-400:]}")
        yield url
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=1) as answer:
            return bool(answer.status == 200)
    except OSError:
        return False
