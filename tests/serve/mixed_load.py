"""A load of every kind of request on one server, each answer held against the same request alone. No test module."""

import json
import random
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import httpx
import psutil

CLIENTS = 8
HANG_UP = "hang up"  # a stream whose client leaves after two events: nothing to compare
Body = dict[str, Any]


@dataclass(frozen=True)
class Request:
    """What is asked, and of whom."""

    kind: str
    path: str
    body: Body


def ask(http: httpx.Client, request: Request) -> list[str]:
    """The answer as text alone: of each choice, or of each vector its base64; a stream's pieces joined."""
    if not request.body.get("stream"):
        answer = http.post(request.path, json=request.body)
        assert answer.status_code == 200, answer.text
        found = answer.json()
        return [_text(one) for one in found.get("choices") or found["data"]]
    with http.stream("POST", request.path, json=request.body) as answer:
        assert answer.status_code == 200, answer.read()
        events = (line.removeprefix("data: ") for line in answer.iter_lines() if line)
        if request.kind == HANG_UP:
            next(events), next(events)
            return ["left"]
        *chunks, last = list(events)
        assert last == "[DONE]", last
    choices = [choice for chunk in chunks for choice in json.loads(chunk)["choices"]]
    assert choices[-1]["finish_reason"] in ("stop", "length")
    return ["".join(_text(choice) for choice in choices)]


def _text(one: Body) -> str:
    if "embedding" in one:
        return str(one["embedding"])
    said = one.get("message") or one.get("delta") or one
    return str(said.get("text") or said.get("content") or "")


@dataclass
class Outcome:
    """What a load came to; RSS in bytes, a sample every `every` seconds."""

    done: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    rss: list[int] = field(default_factory=list)
    threads: list[int] = field(default_factory=list)
    files: list[int] = field(default_factory=list)

    def summary(self) -> str:
        """Requests by kind, errors, and memory in five places, in one line."""
        marks = [self.rss[i * (len(self.rss) - 1) // 4] >> 10 for i in range(5)]
        kinds = ", ".join(f"{count} {kind}" for kind, count in sorted(self.done.items()))
        return f"{self.done.total()} requests ({kinds}), {len(self.wrong)} wrong, RSS {marks} KiB"


class Load:
    """`CLIENTS` clients that draw requests in an order of their own until the time is over."""

    def __init__(self, url: str, requests: list[Request]) -> None:
        self._url = url
        self._requests = requests
        with self._client() as http:
            self._alone = [ask(http, request) for request in requests]
        assert all(all(answer) for answer in self._alone), "an empty answer would prove nothing"
        self._outcome = Outcome()
        self._lock = threading.Lock()

    def _client(self) -> httpx.Client:
        return httpx.Client(base_url=self._url, trust_env=False, timeout=120)

    def alone_again(self) -> bool:
        """Whether each request alone is answered as before the load."""
        with self._client() as http:
            return [ask(http, request) for request in self._requests] == self._alone

    def run(self, process: psutil.Process, seconds: float, every: float = 1.0) -> Outcome:
        """All clients at once for `seconds`, with the process watched meanwhile."""
        self._outcome = Outcome()
        end = time.monotonic() + seconds
        with ThreadPoolExecutor(CLIENTS) as pool:
            running = [pool.submit(self._one, seed, end) for seed in range(CLIENTS)]
            while time.monotonic() < end:
                self._outcome.rss.append(process.memory_info().rss)
                self._outcome.threads.append(process.num_threads())
                self._outcome.files.append(process.num_fds())
                time.sleep(min(every, max(0.0, end - time.monotonic())))
            for each in running:
                each.result()
        return self._outcome

    def _one(self, seed: int, end: float) -> None:
        draw = random.Random(seed)
        with self._client() as http:
            while time.monotonic() < end:
                i = draw.randrange(len(self._requests))
                self._check(i, http)

    def _check(self, i: int, http: httpx.Client) -> None:
        request = self._requests[i]
        try:
            answer = ask(http, request)
        except (AssertionError, httpx.HTTPError, KeyError, ValueError) as error:
            answer = [f"{type(error).__name__}: {error}"]
        with self._lock:
            self._outcome.done[request.kind] += 1
            if answer != self._alone[i]:
                self._outcome.wrong.append(f"{request}: {answer} in the crowd, {self._alone[i]} alone")
