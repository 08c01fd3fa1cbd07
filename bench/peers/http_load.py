"""Load over HTTP on any server that speaks OpenAI's streaming completions, from loopback.

`http_load.py URL --clients 32`        that many clients at once, 128-token prompts, 128 new tokens
`http_load.py URL --plan PLAN.json`    requests at given times (made by `--make-plan TRACE.csv.gz`)

Goodput: requests a second that met both limits, time to first token and median time between tokens.
"""

import argparse
import csv
import gzip
import http.client
import json
import os
import statistics
import sys
import threading
import time
import urllib.parse
from dataclasses import asdict, dataclass
from datetime import datetime

sys.path.insert(0, os.path.dirname(__file__))
import common

FIRST_LIMIT, BETWEEN_LIMIT = 2.0, 0.1  # seconds


@dataclass
class Planned:
    """A request: when it comes (seconds), how long its prompt and answer are (tokens), the seed of its prompt."""

    at: float
    prompt: int
    new: int
    seed: int


@dataclass
class Ended:
    """A request that was answered: when it came and when each of its tokens did (seconds on one clock)."""

    at: float
    times: list[float]


def make_plan(trace: str, count: int, rate: float, most_prompt: int, most_new: int) -> list[Planned]:
    """The first `count` requests of an Azure LLM inference trace, cut to those lengths, their arrival times stretched
    so that `rate` come in a second on average."""
    rows = []
    with gzip.open(trace, "rt") as file:
        for row in csv.DictReader(file):
            at = datetime.fromisoformat(row["TIMESTAMP"][:26]).timestamp()
            rows.append((at, int(row["ContextTokens"]), int(row["GeneratedTokens"])))
            if len(rows) == count:
                break
    begin, span = rows[0][0], max(rows[-1][0] - rows[0][0], 1e-9)
    return [
        Planned((at - begin) / span * count / rate, min(prompt, most_prompt), max(2, min(new, most_new)), 500 + i)
        for i, (at, prompt, new) in enumerate(rows)
    ]


def read_plan(path: str) -> list[Planned]:
    """What `--make-plan` wrote."""
    with open(path) as file:
        return [Planned(**entry) for entry in json.load(file)]


def ask(url: urllib.parse.ParseResult, model: str, prompt: list[int], new: int) -> list[float]:
    """One streamed completion; the times at which tokens came."""
    connection = http.client.HTTPConnection(url.hostname or "", url.port, timeout=600)
    body = {
        "model": model, "prompt": prompt, "max_tokens": new, "temperature": 0, "stream": True, "ignore_eos": True,
    }  # fmt: skip
    connection.request("POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"})
    response = connection.getresponse()
    if response.status != 200:
        raise RuntimeError(f"{response.status}: {response.read()[:300]!r}")
    return [
        time.perf_counter()
        for line in response
        if line.startswith(b"data: {") and b'"choices":[{' in line.replace(b" ", b"")
    ]


def play(url: str, model: str, plan: list[Planned]) -> tuple[list[Ended], float]:
    """Sends every request at its time, each from a thread of its own."""
    parts = urllib.parse.urlparse(url)
    if parts.hostname not in ("127.0.0.1", "localhost", "::1"):
        raise SystemExit("only servers on loopback")
    ended: list[Ended] = []
    began = time.perf_counter()

    def one(request: Planned) -> None:
        prompt = common.ids(request.prompt, request.seed)
        time.sleep(max(0.0, request.at - (time.perf_counter() - began)))
        times = ask(parts, model, prompt, request.new)
        ended.append(Ended(request.at, [t - began for t in times]))

    failed: list[str] = []

    def told(request: Planned) -> None:
        try:
            one(request)
        except (OSError, RuntimeError, http.client.HTTPException) as error:
            failed.append(repr(error)[:300])

    threads = [threading.Thread(target=told, args=(request,)) for request in plan]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failed:  # requests that are refused would flatter those that are not
        raise SystemExit(f"{len(failed)} of {len(plan)} requests failed, the first with {failed[0]}")
    return ended, time.perf_counter() - began


def report(ended: list[Ended], seconds: float) -> None:
    """Tells goodput, median time to first token, median time between tokens, output rate."""
    first = [e.times[0] - e.at for e in ended]
    between = [
        statistics.median(b - a for a, b in zip(e.times, e.times[1:], strict=False)) if len(e.times) > 1 else 0
        for e in ended
    ]
    good = sum(f <= FIRST_LIMIT and b <= BETWEEN_LIMIT for f, b in zip(first, between, strict=False))
    common.tell("goodput", good / seconds, "req/s", good=good, requests=len(ended))
    common.tell("first_token", statistics.median(first), "s")
    common.tell("between_tokens", statistics.median(between), "s")
    common.tell("output", sum(len(e.times) for e in ended) / seconds, "tok/s")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("url", nargs="?")
    parser.add_argument("--model", default="m")
    parser.add_argument("--clients", type=int, default=0)
    parser.add_argument("--prompt", type=int, default=128)
    parser.add_argument("--new", type=int, default=128)
    parser.add_argument("--plan")
    parser.add_argument("--make-plan", metavar="TRACE")
    parser.add_argument("--requests", type=int, default=30)
    parser.add_argument("--rate", type=float, default=1.0)
    given = parser.parse_args()
    if given.make_plan:
        plan = make_plan(given.make_plan, given.requests, given.rate, 512, 96)
        print(json.dumps([asdict(entry) for entry in plan]))
        return
    play(given.url, given.model, [Planned(0.0, 32, 8, 1)])
    plan = read_plan(given.plan) if given.plan else [
        Planned(0.0, given.prompt, given.new, 100 + i) for i in range(given.clients)
    ]  # fmt: skip
    report(*play(given.url, given.model, plan))


if __name__ == "__main__":
    main()
