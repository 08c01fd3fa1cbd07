"""llama.cpp through its own tools: `llama_cpp.py MODEL.gguf --bin FOLDER` with llama-bench, llama-batched-bench and,
for cold start and memory, llama-server."""

import json
import os
import re
import subprocess
import sys
import time
import urllib.request

sys.path.insert(0, os.path.dirname(__file__))
import common

PORT = 18081


def bench(tool: str, model: str, threads: int, prompt: int, new: int, depth: int) -> float:
    """Tokens a second as llama-bench says, one repetition after its own warm-up."""
    command = [tool, "-m", model, "-t", str(threads), "-p", str(prompt), "-n", str(new), "-d", str(depth)]
    out = subprocess.run([*command, "-r", "1", "-o", "json"], capture_output=True, text=True, check=True).stdout
    return float(json.loads(out)[0]["avg_ts"])


def batched(tool: str, model: str, threads: int, streams: int, prompt: int, new: int) -> tuple[float, float]:
    """(decoded, prefilled) tokens a second of that many streams. The tool decodes after all prompts are done, so
    what it counts as decoded came in the time that it divides by."""
    command = [tool, "-m", model, "-t", str(threads), "-c", str(streams * (prompt + new)), "-npp", str(prompt)]
    out = subprocess.run(
        [*command, "-ntg", str(new), "-npl", str(streams)], capture_output=True, text=True, check=True
    ).stdout
    row = next(line for line in out.splitlines() if re.match(rf"\|\s+{prompt} \|", line))
    columns = [text.strip() for text in row.strip("|").split("|")]
    return float(columns[7]), float(columns[5])


def server(tool: str, model: str, threads: int, cells: list[str]) -> None:
    """Start to first token, and the peak after a request of 2048 + 128 tokens."""
    began = time.perf_counter()
    command = [tool, "-m", model, "-t", str(threads), "-c", "4096", "-np", "1", "--host", "127.0.0.1", "--no-webui"]
    process = subprocess.Popen([*command, "--port", str(PORT)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    url = f"http://127.0.0.1:{PORT}"
    try:
        while True:
            try:
                if urllib.request.urlopen(url + "/health", timeout=1).status == 200:
                    break
            except OSError:
                time.sleep(0.01)
            if process.poll() is not None:
                raise SystemExit(f"llama-server ended with {process.returncode}")

        def post(prompt: int, new: int) -> None:
            body = {"prompt": common.ids(prompt, 7), "n_predict": new, "ignore_eos": True}
            request = urllib.request.Request(
                url + "/completion", json.dumps(body).encode(), {"Content-Type": "application/json"}
            )
            urllib.request.urlopen(request).read()

        post(32, 1)
        if "cold" in cells:
            common.tell("cold", time.perf_counter() - began, "s")
        if "rss" in cells:
            post(*common.RSS)
            common.tell("rss", common.peak_rss(process.pid), "B")
    finally:
        process.terminate()
        process.wait()


def main() -> None:
    parser = common.arguments()
    parser.add_argument("--bin", required=True)
    given = parser.parse_args()
    cells, model, threads = given.cells.split(","), given.model, given.threads
    if {"cold", "rss"} & set(cells):
        server(os.path.join(given.bin, "llama-server"), model, threads, cells)
    for cell in cells:
        if cell not in common.CELLS:
            continue
        streams, prompt, new = common.CELLS[cell]
        if new == 1 and prompt > 512:  # llama-bench would warm up by the whole prompt
            tool = os.path.join(given.bin, "llama-batched-bench")
            common.tell(cell, batched(tool, model, threads, 1, prompt, 1)[1], "tok/s")
        elif streams > 1:
            tool = os.path.join(given.bin, "llama-batched-bench")
            decoded, prefilled = batched(tool, model, threads, streams, prompt, new)
            common.tell(cell, decoded, "tok/s", prefill_tokens_s=prefilled)
        else:
            tool = os.path.join(given.bin, "llama-bench")
            sizes = (prompt, 0, 0) if new == 1 else (0, new, prompt)
            common.tell(cell, bench(tool, model, threads, *sizes), "tok/s")


main()
