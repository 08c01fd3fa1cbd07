"""Measures Inhouse and its peers in turns (A B A B) on this machine and keeps every figure.

    python bench/peers/run.py --kits FOLDER [--rounds 2] [--only REGEX] [--http] [--out bench/peers.json]

FOLDER holds what bench/peers/README.md says; what is not there is skipped, with a line that says so. Before each run
the machine's bandwidth is probed: on a virtual machine it moves. Nothing else may be running.
"""

import argparse
import json
import os
import platform
import re
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
OURS = HERE / "inhouse_engine.py"
SPEED = "prefill512,decode32,decode2048,batch8,batch32"
LONG = "prefill4096,decode8192"
TIMEOUT = 900


@dataclass(frozen=True)
class Side:
    """One engine on one form of a model."""

    engine: str
    form: str  # what weights and activations are, in words
    command: list[str]
    needs: list[Path]
    environment: dict[str, str] = field(default_factory=dict)
    cells: str = ""  # other cells than the pair's, for an engine that cannot do all


@dataclass(frozen=True)
class Pair:
    """Ours against a peer on one model, at about the same bits."""

    model: str
    bits: str
    ours: Side
    peer: Side
    cells: str

    @property
    def name(self) -> str:
        return f"{self.model} {self.bits} {self.peer.engine} {self.peer.form}"


def ours(model: Path, form: str, *flags: str, **environment: str) -> Side:
    """Inhouse on a model."""
    return Side("inhouse", form, [sys.executable, str(OURS), str(model), *flags], [model], environment)


def pairs(kits: Path) -> list[Pair]:
    """Every comparison that the kits allow for, present or not."""
    models, out = kits / "models", list[Pair]()

    def llama(file: Path, form: str, build: str = "build-lc") -> Side:
        tool = [sys.executable, str(HERE / "llama_cpp.py"), str(file), "--bin", str(kits / build / "bin")]
        return Side("llama.cpp" + ("" if build == "build-lc" else " (AVX2)"), form, tool, [file, kits / build / "bin"])

    def python(engine: str, kit: str, script: str, folder: Path, form: str, marker: str) -> Side:
        binary = kits / kit / "bin" / "python"
        command = [str(binary), str(HERE / script), str(folder)]
        return Side(engine, form, command, [binary, folder / marker], {"PYTHONPATH": ""})

    for model in ("qwen2.5-0.5b", "llama-3.2-1b"):
        folder = models / model
        four = ours(folder, OUR_FOUR, "--quantize", "q4")
        eight = ours(folder, OUR_EIGHT, "--quantize", "q8")
        every = f"cold,{SPEED},{LONG},rss"
        ov4 = python("openvino-genai", "v-ov", "openvino_engine.py", models / f"{model}-ov-int4",
                     "int4 sym g128, int8 head", "openvino_model.bin")  # fmt: skip
        ov8 = python("openvino-genai", "v-ov", "openvino_engine.py", models / f"{model}-ov-int8",
                     "int8 per channel", "openvino_model.bin")  # fmt: skip
        ort = python("onnxruntime-genai", "v-ort", "onnxruntime_engine.py", models / f"{model}-ort-int4",
                     "int4 g32, accuracy level 4", "genai_config.json")  # fmt: skip
        out += [
            Pair(model, "4.5", four, ov4, every),
            Pair(model, "4.5", four, llama(models / f"{model}-Q4_0.gguf", "Q4_0"), every),
            Pair(model, "4.5", four, ort, f"cold,{SPEED},rss"),
            Pair(model, "4.5, KV int8", ours(folder, OUR_FOUR + ", KV int8", "--quantize", "q4", "--kv", "int8"), ov4,
                 "decode2048,decode8192,prefill4096"),
            Pair(model, "8.5", eight, ov8, f"{SPEED}"),
            Pair(model, "8.5", eight, llama(models / f"{model}-Q8_0.gguf", "Q8_0"), f"{SPEED}"),
            Pair(model, "16", ours(folder, "bf16"), llama(models / f"{model}-BF16.gguf", "BF16"), SPEED),
            Pair(model, "4.5 AVX2", ours(folder, OUR_FOUR, "--quantize", "q4", INHOUSE_ISA="avx2"),
                 llama(models / f"{model}-Q4_0.gguf", "Q4_0", "build-lc-avx2"), "prefill512,decode32,batch8"),
        ]  # fmt: skip
    return out


OUR_FOUR = "q4_0, embedding and head q6_0; int8 activations per 32"
OUR_EIGHT = "q8_0; int8 activations per 32"


def busy() -> tuple[float, float]:
    """(CPU seconds of the whole machine, wall seconds)."""
    fields = [int(x) / os.sysconf("SC_CLK_TCK") for x in Path("/proc/stat").read_text().split("\n")[0].split()[1:9]]
    return fields[0] + fields[1] + fields[2] + fields[5] + fields[6], time.perf_counter()


def probe() -> dict[str, float]:
    """The machine's peaks now."""
    done = subprocess.run([sys.executable, "-m", "inhouse.tune.limits"], capture_output=True, text=True, check=True)
    peaks: dict[str, float] = json.loads(done.stdout)
    return peaks


def run_side(side: Side, cells: str, seed: int) -> list[dict[str, Any]]:
    """One process of an engine: its figures, each with the probe before and how much others used the CPU."""
    peaks, before = probe(), busy()
    used = os.times()
    done = subprocess.run(
        [*side.command, "--cells", side.cells or cells, "--seed", str(seed)],
        capture_output=True, text=True, timeout=TIMEOUT, env=os.environ | side.environment,
    )  # fmt: skip
    after, now = busy(), os.times()
    own = now.children_user + now.children_system - used.children_user - used.children_system
    foreign = max(0.0, (after[0] - before[0] - own) / max(after[1] - before[1], 0.01))
    if done.returncode:
        print(f"  {side.engine} failed: {done.stderr.strip()[-400:]}", flush=True)
    figures = [json.loads(line) for line in done.stdout.splitlines() if line.startswith('{"cell"')]
    return [figure | {"peaks": peaks, "foreign": round(foreign, 2)} for figure in figures]


def lacking(side: Side) -> list[str]:
    """What a side needs and is not there."""
    return [str(path) for path in side.needs if not path.exists()]


def machine() -> dict[str, Any]:
    """What the figures depend on."""
    names = [
        line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line
    ]
    return {
        "processor": names[0] if names else platform.machine(), "cores": os.cpu_count(),
        "system": platform.platform(), "python": platform.python_version(),
        "date": datetime.now(UTC).date().isoformat(), "command": "python " + " ".join(sys.argv[:1]),
    }  # fmt: skip


def versions(kits: Path) -> dict[str, str]:
    """Versions of the peers that are installed."""
    found = {}
    for kit, package in (("v-ov", "openvino-genai"), ("v-ort", "onnxruntime-genai")):
        python = kits / kit / "bin" / "python"
        if python.exists():
            code = f"import importlib.metadata as m; print(m.version({package!r}))"
            found[package] = subprocess.run([str(python), "-c", code], capture_output=True, text=True).stdout.strip()
    for folder in kits.glob("llama_cpp_python-*/"):
        found["llama.cpp"] = f"of {folder.name}"
    return found


# ---- over HTTP -------------------------------------------------------------------------------------------------------


def serve(command: list[str], port: int, environment: dict[str, str]) -> subprocess.Popen[bytes]:
    """Starts a server and waits until it answers /health or /v1/models."""
    process = subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=os.environ | environment
    )
    for _ in range(3000):
        for path in ("/health", "/v1/models"):
            try:
                if urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=1).status == 200:
                    return process
            except OSError:
                time.sleep(0.02)
        if process.poll() is not None:
            raise SystemExit(f"{command[0]} ended with {process.returncode}")
    raise SystemExit(f"{command[0]} does not answer")


def http_cells(trace: Path | None, rates: list[float], plans: Path) -> dict[str, list[str]]:
    """Name of a load -> arguments of http_load.py."""
    cells = {"http32": ["--clients", "32"]}
    for rate in rates if trace else []:
        plan = plans / f"plan-{rate:g}.json"
        made = subprocess.run(
            [sys.executable, str(HERE / "http_load.py"), "--make-plan", str(trace), "--rate", str(rate)],
            capture_output=True, text=True, check=True,
        )  # fmt: skip
        plan.write_text(made.stdout)
        cells[f"trace {rate:g} req/s"] = ["--plan", str(plan)]
    return cells


def http(kits: Path, rounds: int, trace: Path | None, rates: list[float]) -> list[dict[str, Any]]:
    """The HTTP loads on our server, on llama-server, and (in process, without HTTP) on OpenVINO's pipeline."""
    model, port = "qwen2.5-0.5b", 18090
    folder, file = kits / "models" / model, kits / "models" / f"{model}-Q4_0.gguf"
    tool, out = kits / "build-lc" / "bin" / "llama-server", list[dict[str, Any]]()
    servers: dict[str, tuple[list[str], list[Path]]] = {
        "inhouse": (
            [sys.executable, "-m", "inhouse", "serve", str(folder), "--quantize", "q4", "--threads", "2",
             "--port", str(port), "--kv-memory", "1GiB", "--no-prefix-cache"], [folder]),
        "llama-server": (
            [str(tool), "-m", str(file), "-t", "2", "-c", str(32 * 640), "-np", "32", "--port", str(port),
             "--host", "127.0.0.1", "--no-webui"], [tool, file]),
    }  # fmt: skip
    cells = http_cells(trace, rates, kits)
    for round_ in range(rounds):
        for engine, (command, needs) in servers.items():
            if missing := [str(path) for path in needs if not path.exists()]:
                print(f"skipped {engine} over HTTP: no {', '.join(missing)}", flush=True)
                continue
            process = serve(command, port, {})
            try:
                name = json.loads(urllib.request.urlopen(f"http://127.0.0.1:{port}/v1/models").read())["data"][0]["id"]
                for cell, flags in cells.items():
                    load = [sys.executable, str(HERE / "http_load.py"), f"http://127.0.0.1:{port}", "--model", name]
                    out += told(engine, cell, round_, [*load, *flags], {})
            finally:
                process.send_signal(signal.SIGTERM)
                process.wait()
        binary = kits / "v-ov" / "bin" / "python"
        folder_ov = kits / "models" / f"{model}-ov-int4"
        for cell, flags in cells.items():
            if flags[0] == "--plan" and binary.exists() and folder_ov.exists():
                command = [str(binary), str(HERE / "openvino_engine.py"), str(folder_ov), "--trace", flags[1]]
                out += told("openvino-genai (in process)", cell, round_, command, {"PYTHONPATH": ""})
    return out


def told(engine: str, load: str, round_: int, command: list[str], environment: dict[str, str]) -> list[dict[str, Any]]:
    """The figures of one load."""
    done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT, env=os.environ | environment)
    if done.returncode:
        print(f"  {engine} {load} failed: {done.stderr.strip()[-400:]}", flush=True)
    figures = [json.loads(line) for line in done.stdout.splitlines() if line.startswith('{"cell"')]
    print(f"  {engine}, {load}: " + ", ".join(f"{f['cell']} {f['value']:.3g} {f['unit']}" for f in figures), flush=True)
    return [{"engine": engine, "load": load, "round": round_, **figure} for figure in figures]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kits", type=Path, default=os.environ.get("INHOUSE_PEERS"))
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--only", default=".", help="regular expression over `model bits engine form`")
    parser.add_argument("--cells", default="", help="other cells than each pair's own")
    parser.add_argument("--append", action="store_true", help="further rounds beside those that are kept")
    parser.add_argument("--http", action="store_true", help="the loads over HTTP instead")
    parser.add_argument("--trace", type=Path, help="an Azure LLM inference trace (.csv.gz), for --http")
    parser.add_argument("--rates", default="0.5,1,1.5", help="requests a second of the trace's replays")
    parser.add_argument("--out", type=Path, default=HERE.parent / "peers.json")
    given = parser.parse_args()
    if given.kits is None:
        raise SystemExit(
            "name the folder of kits: --kits FOLDER or INHOUSE_PEERS; bench/peers/README.md says what it holds"
        )
    kits = given.kits.resolve()
    report: dict[str, Any] = json.loads(given.out.read_text()) if given.out.exists() else {}
    report |= {"machine": machine(), "versions": versions(kits)}
    if given.http:
        rates = [float(rate) for rate in given.rates.split(",")]
        report["http"] = http(kits, given.rounds, given.trace, rates)
    else:
        chosen = [pair for pair in pairs(kits) if re.search(given.only, pair.name)]
        names = {pair.name for pair in chosen}
        before = {entry["name"]: entry for entry in report.get("pairs", [])}
        kept = before if given.append else {name: e for name, e in before.items() if name not in names}

        def keep(entries: dict[str, dict[str, Any]]) -> None:
            report["pairs"] = list((kept | entries).values())
            write(report, given.out, kits)

        keep(compare(chosen, given.rounds, given.cells, kept, keep))
    write(report, given.out, kits)


def write(report: dict[str, Any], out: Path, kits: Path) -> None:
    """Keeps what is measured so far, whole or not at all."""
    scratch = out.with_suffix(".new")
    scratch.write_text(json.dumps(report, indent=1).replace(str(kits), "KITS") + "\n")
    scratch.replace(out)


def compare(
    chosen: list[Pair],
    rounds: int,
    cells: str,
    kept: dict[str, dict[str, Any]],
    keep: Callable[[dict[str, dict[str, Any]]], None],
) -> dict[str, dict[str, Any]]:
    """Runs every pair, ours then the peer's, round after round; rounds are counted on from those that are
    kept. `keep` gets what there is after each pair, so that a kill loses one pair at most."""
    entries: dict[str, dict[str, Any]] = {pair.name: kept[pair.name] for pair in chosen if pair.name in kept}
    done = [figure["round"] for entry in entries.values() for figure in entry["ours"]]
    first = max(done, default=-1) + 1
    for round_ in range(first, first + rounds):
        for pair in chosen:
            if missing := lacking(pair.ours) + lacking(pair.peer):
                if round_ == first:
                    print(f"skipped {pair.name}: no {', '.join(missing)}", flush=True)
                continue
            entry = entries.setdefault(
                pair.name,
                {"name": pair.name, "model": pair.model, "bits": pair.bits, "engine": pair.peer.engine,
                 "ours_form": pair.ours.form, "form": pair.peer.form, "ours": [], "peer": []},
            )  # fmt: skip
            for key, side in (("ours", pair.ours), ("peer", pair.peer)):
                figures = run_side(side, cells or pair.cells, 1000 * round_ + 7)
                entry[key] += [figure | {"round": round_} for figure in figures]
                shown = ", ".join(f"{f['cell']} {f['value']:.4g}" for f in figures)
                print(f"round {round_} {pair.name} {side.engine}: {shown}", flush=True)
            keep(entries)
    return entries


if __name__ == "__main__":
    main()
