"""What the adapters share: the cells, prompts, and one JSON line a figure. Runs in each engine's own environment, so it
uses the standard library alone.

An adapter makes a function `generate(prompts, new)` that answers all prompts together, greedily and past end tokens,
and gives an Answered. A rate of answers counts what came after every prompt had its first token, no more: tokens that
an engine made before, for prompts that it admitted first, took time that is not counted.
"""

import argparse
import json
import os
import random
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

Prompts = Sequence[Sequence[int]]


class Answered(NamedTuple):
    """Seconds until every prompt had its first token, seconds in all, and how many tokens of all prompts together were
    out at the first of these moments. None: not known; then one a prompt, the fewest that there can be."""

    first: float
    total: float
    early: int | None = None


Generate = Callable[[Prompts, int], Answered]
Beside = Callable[[], dict[str, object]]  # what is told beside a cell, called just after it

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


def rate(streams: int, new: int, answered: Answered) -> float:
    """Tokens a second after every one of `streams` prompts had its first token, each answered with `new` tokens."""
    early = streams if answered.early is None else max(answered.early, streams)
    return (streams * new - early) / (answered.total - answered.first)


def run_cells(wanted: str, generate: Generate, seed: int, more: Callable[[str], Beside] = lambda _: dict) -> None:
    """Runs the cells in order, each once after a short warm-up, and tells their rates. `more(cell)` is called just
    before the cell, what it gives just after, and what that gives is told beside."""
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
            value = prompt / generate(prompts, 1).total
            tell(cell, value, "tok/s", **beside())
        else:
            answered = generate(prompts, new + 1)
            told = {"prefill_tokens_s": streams * prompt / answered.first, "early_tokens": answered.early}
            tell(cell, rate(streams, new + 1, answered), "tok/s", **told, **beside())
    if "rss" in wanted.split(","):
        beside = more("rss")
        generate([ids(RSS[0], 7)], RSS[1])
        tell("rss", peak_rss(), "B", **beside())


def clock() -> float:
    """Seconds, for differences."""
    return time.perf_counter()
