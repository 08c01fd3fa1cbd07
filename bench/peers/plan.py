"""What is measured, in which order, and how long it takes: plans of bouts. In a bout all its engines run the same
cells, one after the other; rounds repeat bouts. Knows nothing of processes and results.

Rounds stand where the goals are: the cells at about 4.5 bits; 8.5 bits, bf16 and AVX2 have fewer. A bout's cells are
few, so that its engines run within minutes of each other: the machine's memory moves between placements.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from bench.peers.common import CELLS, RSS

ROUND_RANKS = 6
# (peer or load) -> rounds
Rounds = Mapping[str, int]


@dataclass(frozen=True)
class Entry:
    """Cells of one model at one number of bits, and how often each peer runs them; ours runs in each of its rounds.
    `rank`: what is dropped last. `second`: whether further KV types of ours run too."""

    rank: int
    model: str
    bits: str
    cells: str
    peers: Rounds
    second: bool = False


@dataclass(frozen=True)
class Bout:
    """One round of an entry: the engines in the order in which they run. Loads over HTTP have cells `http ...`.
    `kv`: the KV types of ours, comma-separated."""

    model: str
    bits: str
    cells: str
    round: int
    engines: tuple[str, ...]
    rank: int
    kv: str

    @property
    def importance(self) -> int:
        """The least comes first and is dropped last: another round counts as less than ROUND_RANKS further entries."""
        return self.rank + ROUND_RANKS * self.round

    @property
    def name(self) -> str:
        """What is kept as done under this name is not run again; so another KV type of ours is another bout."""
        return f"{self.model} {self.bits} {self.cells} round {self.round} kv {self.kv}"


QWEN, LLAMA = "qwen2.5-0.5b", "llama-3.2-1b"
HTTP = "http"  # begins the cells of a load over HTTP
FULL = (
    Entry(1, QWEN, "4.5", "prefill512,decode32,decode2048", {"openvino": 3, "llama": 3, "ort": 3}),
    Entry(2, QWEN, "4.5", "batch8,batch32", {"openvino": 3, "llama": 1, "ort": 1}),
    Entry(3, QWEN, "4.5", "prefill4096,decode8192", {"openvino": 2, "llama": 1, "ort": 1}, second=True),
    Entry(4, QWEN, "4.5", "cold,rss", {"openvino": 1, "llama": 2, "ort": 1}),
    Entry(5, LLAMA, "4.5", "prefill512,decode32,decode2048", {"openvino": 2, "llama": 2, "ort": 2}),
    Entry(6, QWEN, "4.5", "http 32 clients", {"llama": 2}),
    Entry(7, QWEN, "4.5", "http trace 1", {"llama": 1, "openvino": 2}),
    Entry(8, QWEN, "4.5", "http trace 1.5", {"openvino": 2}),
    Entry(8, QWEN, "4.5", "http trace 2", {"openvino": 2}),
    Entry(10, LLAMA, "4.5", "batch8,batch32", {"openvino": 2}),
    Entry(9, QWEN, "4.5 AVX2", "prefill512,decode32,batch8", {"llama": 2}),
    Entry(11, LLAMA, "4.5", "cold,rss", {"openvino": 1, "llama": 1, "ort": 1}),
    Entry(12, LLAMA, "4.5", "prefill4096,decode8192", {"openvino": 1}),
    Entry(13, QWEN, "4.5", "http trace 0.5", {"llama": 1}),
    Entry(14, QWEN, "8.5", "prefill512,decode32,batch8", {"openvino": 2, "llama": 1}),
    Entry(15, QWEN, "16", "prefill512,decode32,batch8", {"llama": 1}),
    Entry(16, LLAMA, "4.5", "batch8", {"llama": 1, "ort": 1}),
    Entry(17, LLAMA, "8.5", "prefill512,decode32", {"openvino": 1, "llama": 1}),
    Entry(18, LLAMA, "16", "prefill512,decode32", {"llama": 1}),
    Entry(19, LLAMA, "4.5", "decode8192", {"llama": 1}),
)
SHORT = (
    Entry(1, QWEN, "4.5", "prefill512,decode32,decode2048", {"openvino": 2, "llama": 2, "ort": 2}),
    Entry(2, QWEN, "4.5", "batch8,batch32", {"openvino": 2}),
    Entry(3, QWEN, "4.5", "cold,rss", {"llama": 1}),
    Entry(4, LLAMA, "4.5", "prefill512,decode32", {"openvino": 1, "llama": 1}),
)
SMOKE = (
    Entry(1, QWEN, "4.5", "decode32", {"openvino": 1, "llama": 1, "ort": 1}, second=True),
    Entry(2, QWEN, "4.5", "cold,rss", {"openvino": 1, "llama": 1, "ort": 1}),
    Entry(3, QWEN, "4.5 AVX2", "decode32", {"llama": 1}),
    Entry(4, QWEN, "4.5", "http 32 clients", {"llama": 1}),
    Entry(5, QWEN, "4.5", "http trace 2", {"openvino": 1}),
)
PLANS: Mapping[str, tuple[Entry, ...]] = {"full": FULL, "short": SHORT, "smoke": SMOKE}


def bouts(entries: Iterable[Entry], kv: str, second_kv: str) -> Iterator[Bout]:
    """All rounds by importance; `second_kv`: further KV types of ours, comma-separated. Odd rounds go the other way
    round, so that no engine always follows the same one."""
    further = [name for name in second_kv.split(",") if name and name != kv]
    found = []
    for entry in entries:
        kvs = [kv, *(further if entry.second else [])]
        own = tuple(f"ours {name}" for name in kvs)
        for round_ in range(max(entry.peers.values())):
            engines = own + tuple(name for name, rounds in entry.peers.items() if rounds > round_)
            order = engines[::-1] if round_ % 2 else engines
            found.append(Bout(entry.model, entry.bits, entry.cells, round_, order, entry.rank, ",".join(kvs)))
    return iter(sorted(found, key=lambda bout: bout.importance))


# ---- how long it takes -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Pace:
    """About how fast an engine is on the machine of docs/benchmarks.md: seconds to start; tokens a second of prompts
    of 512, 4096 and 8192; of one stream after 32, 2048 and 8192; of 8 and 32 streams."""

    start: float
    prompt: tuple[float, float, float]
    decode: tuple[float, float, float]
    streams: tuple[float, float]


PACES = {
    (QWEN, "ours"): Pace(0.7, (680, 520, 400), (85, 72, 50), (440, 500)),
    (QWEN, "openvino"): Pace(3.2, (630, 450, 330), (50, 40, 24), (220, 320)),
    (QWEN, "llama"): Pace(0.8, (300, 220, 170), (62, 40, 22), (120, 175)),
    (QWEN, "ort"): Pace(1.8, (200, 150, 110), (60, 43, 25), (155, 180)),
    (LLAMA, "ours"): Pace(0.9, (290, 240, 200), (36, 32, 24), (180, 215)),
    (LLAMA, "openvino"): Pace(5.8, (255, 200, 160), (31, 25, 17), (122, 160)),
    (LLAMA, "llama"): Pace(1.4, (130, 105, 85), (38, 27, 16), (53, 90)),
    (LLAMA, "ort"): Pace(3.2, (98, 80, 60), (36, 26, 17), (80, 93)),
}
PROBE = 1.0  # seconds; ours probes before and after each cell too
DECODE_SLOWER = {"4.5": 1.0, "4.5 AVX2": 1.1, "8.5": 1.6, "16": 2.6}
PROMPT_SLOWER = {"4.5": 1.0, "4.5 AVX2": 2.0, "8.5": 1.1, "16": 1.3}
TRACE_REQUESTS, TRACE_TOKENS = 40, (300, 70)  # requests of a replay; their prompts and answers, about


def seconds(bout: Bout, engine: str) -> float:
    """About how long an engine takes for its part of a bout."""
    name = engine.split()[0]
    pace = PACES[bout.model, name]
    slow, slower = PROMPT_SLOWER[bout.bits], DECODE_SLOWER[bout.bits]

    def prompts(count: int, length: int) -> float:
        rate = pace.prompt[0 if length <= 512 else 1 if length <= 4096 else 2]
        return count * length / rate * slow

    def answers(count: int, after: int, new: int) -> float:
        alone = pace.decode[0 if after < 1024 else 1 if after < 6000 else 2]
        return count * new / (alone if count == 1 else pace.streams[0 if count < 16 else 1]) * slower

    if bout.cells.startswith(HTTP):
        begin = pace.start + 2.0
        if bout.cells.endswith("clients"):
            return begin + prompts(32, 128) * 1.2 + answers(32, 128, 128) * 1.2
        prompt, new = TRACE_TOKENS
        work = prompts(TRACE_REQUESTS, prompt) * 1.3 + answers(8, 128, new) / 8 * TRACE_REQUESTS * 1.3
        return begin + max(work, TRACE_REQUESTS / float(bout.cells.split()[-1]) + 3.0)
    total, cells = pace.start + PROBE, bout.cells.split(",")
    for cell in cells:
        if cell == "cold":
            total += pace.start * 1.3
        elif cell == "rss":
            total += pace.start * (name == "llama") + prompts(1, RSS[0]) + answers(1, *RSS)
        else:
            count, length, new = CELLS[cell]
            total += prompts(count, length) * (2 if new == 1 and length <= 512 else 1)
            total += answers(count, length, new) if new > 1 else 0.0
            total += 2 * PROBE if name == "ours" else pace.start if name == "llama" else 0.0
    return total


def cut(all_bouts: list[Bout], cost: Mapping[str, float], budget: float) -> tuple[list[Bout], list[Bout]]:
    """(what fits into `budget` seconds, what is dropped): the least important is dropped first."""
    kept = sorted(all_bouts, key=lambda bout: bout.importance)
    dropped: list[Bout] = []
    while kept and sum(cost[bout.name] for bout in kept) > budget:
        dropped.append(kept.pop())
    return kept, dropped
