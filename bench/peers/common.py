"""What the adapters share: the cells, prompts, and one JSON line a figure. Runs in each engine's own environment, so it
uses the standard library alone.

An adapter makes a function `generate(prompts, new)` that answers all prompts together, greedily and past end tokens,
and gives (seconds until every prompt had its first token, seconds in all).
"""

import argparse
import json
import os
import random
import time
from collections.abc import Callable, Sequence

Prompts = Sequence[Sequence[int]]
Generate = Callable[[Prompts, int], tuple[float, float]]

RSS = (2048, 128)  # prompt and new tokens after which `rss` is read

# cell -> (streams, prompt tokens, new tokens); one new token: the prompt is what is measured
CELLS = {
    "prefill512": (1, 512, 1),
    "prefill4096": (1, 4096, 1),
    "decode32": (1, 32, 128),
    "decode2048": (1, 2048, 128),
    "decode8192": (1, 8192, 128),
    "batch8": (8, 128, 128),
    "batch32": (32, 128, 128),
}


def arguments() -> argparse.ArgumentParser:
    """The arguments that every adapter takes."""
    parser = argparse.ArgumentParser()
    parser.add_argument("model", help="model file or folder")
    parser.add_argument("--cells", default="prefill512,decode32", help="of: cold, rss, " + ", ".join(CELLS))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    return parser


def ids(count: int, seed: int, vocabulary: int = 120_000) -> list[int]:
    """Ordinary tokens: special ones stand at the top of the vocabularies."""
    draw = random.Random(seed)
    return [draw.randrange(1000, vocabulary) for _ in range(count)]


def tell(cell: str, value: float, unit: str, **more: object) -> None:
    """One figure, as a line of JSON on stdout."""
    print(json.dumps({"cell": cell, "value": value, "unit": unit, **more}), flush=True)


def process_age() -> float:
    """Seconds since this process began."""
    with open("/proc/self/stat") as stat, open("/proc/uptime") as uptime:
        began = float(stat.read().rsplit(")", 1)[1].split()[19]) / os.sysconf("SC_CLK_TCK")
        return float(uptime.read().split()[0]) - began


def peak_rss(pid: int | str = "self") -> int:
    """Largest resident size so far, in bytes."""
    with open(f"/proc/{pid}/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM"))


def run_cells(
    wanted: str, generate: Generate, seed: int, more: Callable[[str], dict[str, object]] = lambda _: {}
) -> None:
    """Runs the cells in order, each once after a short warm-up, and tells their rates, and `more(cell)`, called just
    before the cell, beside."""
    generate([ids(32, seed + 1)], 8)
    for n, cell in enumerate(wanted.split(",")):
        if cell not in CELLS:
            continue
        streams, prompt, new = CELLS[cell]
        beside = more(cell)
        prompts = [ids(prompt, seed + 1000 * (n + 1) + i) for i in range(streams)]
        if new == 1:
            if prompt <= 512:
                generate([ids(prompt, seed + 2)], 1)
            tell(cell, prompt / generate(prompts, 1)[1], "tok/s", **beside)
        else:
            first, total = generate(prompts, new + 1)
            tell(cell, streams * new / (total - first), "tok/s", prefill_tokens_s=streams * prompt / first, **beside)
    if "rss" in wanted.split(","):
        generate([ids(RSS[0], 7)], RSS[1])
        tell("rss", peak_rss(), "B", **more("rss"))


def clock() -> float:
    """Seconds, for differences."""
    return time.perf_counter()
