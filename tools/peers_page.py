"""The comparisons of bench/peers.json as Markdown: every cell judged by both of its goals, round by round, and for each
that falls short the reason from bench/shortfalls.json. Refuses a shortfall without a reason. Measures nothing.

A goal in two columns is the lesser of the two, so either reaches it: the ratio to the best peer (median over the rounds
that both ran), or the share of the limit (median over our rounds, each by the peaks probed before it).
"""

import fnmatch
import statistics
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from inhouse.runtime.probe import Peaks
from inhouse.tune.limits import Work

Figure = Mapping[str, Any]
FAST = 50e9  # bytes a second: a probe of more met the fast placement of memory
RSS_FACTOR, RSS_MORE = 1.05, 150e6  # of weights and filled cache; bytes
AVX2 = " AVX2"
READING = f"""
In a round all engines run the same cells one after the other, two threads, greedy. A ratio is the median over rounds
of ours by the peer's (for seconds and bytes the other way round), so above 1 is ahead. The limit is the roofline at
the bandwidth and arithmetic peaks probed just before that cell (`inhouse.tune.limits`: every matrix once a step, the
head for sampled rows, K and V in the bytes of their type, attention and bf16 weights at the bf16 peak, which is
twice that of f32). Either goal of a row counts, as the lesser is the goal; a share stands for its own round's probe
(from {FAST / 1e9:.0f} GB/s on: the fast placement of memory) and counts up to 100 %: above, something disturbed the
probe. Peers' KV types are their own defaults: llama.cpp f16,
OpenVINO u8 (its attention in bf16), ONNX Runtime f32. Resident memory: after 2048 + 128 tokens; its limit is
{RSS_FACTOR} x (weights + filled cache) + {RSS_MORE / 1e6:.0f} MB. 8.5 bits and bf16 stand beside; the goals are for
about 4.5.
"""


@dataclass(frozen=True, slots=True)
class Goal:
    """What a cell is to reach: a ratio to the best peer and a share of the limit (0: none); the lesser counts.
    `fast_share`: the share where the round met the fast placement."""

    cell: str
    title: str
    ratio: float
    share: float
    fast_share: float = 0.0

    def share_in(self, figure: Figure) -> float:
        """The share that counts for one round."""
        return self.fast_share if self.fast_share and figure["peaks"]["read_bytes"] >= FAST else self.share


GOALS = (
    Goal("prefill512", "prefill, 512 tokens", 1.5, 0.75),
    Goal("prefill4096", "prefill, 4096 tokens", 1.5, 0.70),
    Goal("decode32", "decode after 32", 1.5, 0.85, 0.75),
    Goal("decode2048", "decode after 2048", 2.0, 0.75),
    Goal("decode8192", "decode after 8192", 2.0, 0.75),
    Goal("batch8", "8 streams", 1.8, 0.65),
    Goal("batch32", "32 streams", 2.0, 0.70),
)
AVX2_RATIO = 1.2
COLD, RSS = "cold", "rss"
COLD_LIMIT = 0.5  # seconds
FIRST_TOKEN_RATIO, GOODPUT_RATIO = 3.0, 2.0


class Unexplained(Exception):
    """Cells that fall short of their goals without a reason."""


@dataclass(frozen=True, slots=True)
class Compared:
    """One cell against one peer, by rounds: (ours, the peer's)."""

    engine: str
    form: str
    kv: str
    rounds: tuple[tuple[Figure, Figure], ...]

    @property
    def ratios(self) -> tuple[float, ...]:
        """Ours by the peer's in each round, above 1 is ahead."""
        less = self.rounds[0][0]["cell"] in (COLD, RSS)  # the smaller is the better
        values = [(ours["value"], peer["value"]) for ours, peer in self.rounds]
        return tuple(b / a if less else a / b for a, b in values)

    @property
    def ratio(self) -> float:
        """Their median."""
        return statistics.median(self.ratios)

    def median(self, side: int) -> float:
        """Median of ours (0) or of the peer's (1)."""
        return float(statistics.median(pair[side]["value"] for pair in self.rounds))


@dataclass(frozen=True, slots=True)
class Judged:
    """A row of the goal table: key for bench/shortfalls.json, Markdown cells before the verdict, the verdict, and
    whether a reason has to be named."""

    key: str
    title: str
    cells: str
    verdict: str
    short: bool


# ---- figures ---------------------------------------------------------------------------------------------------------


def share(figure: Figure) -> float | None:
    """Share of the time that the machine's peaks, probed before that cell, allow; None where it has no limit."""
    if "work" not in figure:
        return None
    least = Work(**figure["work"]).seconds(Peaks(**figure["peaks"])) / float(figure["work_tokens"])
    return float(figure["value"]) * least


def compare(figures: Sequence[Figure], cell: str, kv: str) -> list[Compared]:
    """A cell against each peer that ran it in the same bouts as ours with that KV type."""
    own = {f["bout"]: f for f in figures if f["ours"] and f["cell"] == cell and f["kv"] == kv}
    peers: dict[tuple[str, str, str], list[tuple[Figure, Figure]]] = {}
    for figure in figures:
        if not figure["ours"] and figure["cell"] == cell and figure["bout"] in own:
            key = (figure["engine"], figure["form"], figure["kv"])
            peers.setdefault(key, []).append((own[figure["bout"]], figure))
    return [Compared(*key, tuple(rounds)) for key, rounds in peers.items()]


def best_of(found: Sequence[Compared]) -> Compared:
    """The peer that we are least ahead of."""
    return min(found, key=lambda c: c.ratio)


# ---- judging ---------------------------------------------------------------------------------------------------------


def judge(figures: Sequence[Figure], goal: Goal, kv: str) -> Judged | None:
    """A speed cell against both goals; None where ours or every peer has no figure."""
    found = compare(figures, goal.cell, kv)
    if not found:
        return None
    best, bits = best_of(found), figures[0]["bits"]
    wished = AVX2_RATIO if bits.endswith(AVX2) else goal.ratio
    own = [f for f in figures if f["ours"] and f["cell"] == goal.cell and f["kv"] == kv]
    shares = [(s, goal.share_in(f)) for f in own if (s := share(f)) is not None and not bits.endswith(AVX2)]
    counted = [a / b for a, b in shares if a <= 1]  # above it, something disturbed the probe
    by_share = bool(counted) and statistics.median(counted) >= 1
    wish = "/".join(f"{w:.0%}" for w in sorted({w for _, w in shares}, reverse=True))
    shown = (
        f"{statistics.median(a for a, _ in shares if a <= 1):.0%}" if counted else "probe disturbed" if shares else ""
    )
    cells = f"{_sides(best, 1, '')} | {wished:g} | {shown} | {wish}"
    return _judged(figures, goal.cell, goal.title, kv, cells, best.ratio, best.ratio >= wished, by_share)


def judge_cold(figures: Sequence[Figure], kv: str) -> Judged | None:
    """Process start to first token: a time that is to be reached."""
    if not (found := compare(figures, COLD, kv)):
        return None
    best = best_of(found)
    cells = f"{_sides(best, 1, ' s')} | | | under {COLD_LIMIT} s"
    own = statistics.median(f["value"] for f in figures if f["ours"] and f["cell"] == COLD and f["kv"] == kv)
    return _judged(figures, COLD, "process start to first token", kv, cells, best.ratio, False, own < COLD_LIMIT)


def judge_rss(figures: Sequence[Figure], kv: str) -> Judged | None:
    """Largest resident size: below the best peer's and below what weights and filled cache allow."""
    if not (found := compare(figures, RSS, kv)):
        return None
    best = best_of(found)
    own = [f for f in figures if f["ours"] and f["cell"] == RSS and f["kv"] == kv and "weights_bytes" in f]
    allowed = [RSS_FACTOR * (f["weights_bytes"] + f["kv_bytes"]) + RSS_MORE for f in own]
    within = all(f["value"] <= most for f, most in zip(own, allowed, strict=True))
    limit = f"{statistics.median(allowed) / 2**20:.0f} MiB" if allowed else ""
    cells = f"{_sides(best, 2**20, ' MiB')} | 1 | | {limit}"
    reached = best.ratio > 1 and within
    return _judged(figures, RSS, "largest resident memory", kv, cells, best.ratio, reached, reached)


def _sides(best: Compared, scale: float, unit: str) -> str:
    spread = f"{min(best.ratios):.2f}-{max(best.ratios):.2f}" if len(best.ratios) > 1 else "one round"
    return (
        f"{best.median(0) / scale:.4g}{unit} | {best.median(1) / scale:.4g}{unit} | {best.engine} | "
        f"{best.ratio:.2f} ({spread})"
    )


def _judged(
    figures: Sequence[Figure], cell: str, title: str, kv: str, cells: str, ratio: float, by_ratio: bool, by_limit: bool
) -> Judged:
    bits = figures[0]["bits"]
    key = f"{figures[0]['model']} {bits} {cell} kv={kv}"
    if by_ratio or by_limit:
        verdict = "reached" if by_ratio else "reached by the limit"
        return Judged(key, title, cells, verdict if ratio > 1 else verdict + ", **behind the peer**", ratio <= 1)
    ahead = "ahead, **short of both goals**" if ratio > 1 else "**behind**"
    return Judged(key, title, cells, ahead, ratio <= 1 or bits.startswith("4.5"))


def judge_all(figures: Sequence[Figure], kv: str) -> list[Judged]:
    """All cells of one model at one number of bits, ours with that KV type."""
    found = [judge(figures, goal, kv) for goal in GOALS] + [judge_cold(figures, kv), judge_rss(figures, kv)]
    return [row for row in found if row is not None]


# ---- loads over HTTP -------------------------------------------------------------------------------------------------


def _medians(figures: Sequence[Figure], load: str, served: str) -> dict[str, float]:
    own = [f for f in figures if f["served"] == served and _load(f) == load]
    return {c: statistics.median(f["value"] for f in own if f["cell"] == c) for c in {f["cell"] for f in own}}


def _load(figure: Figure) -> str:
    return str(figure["bout"]).split("http ")[1].split(" round")[0]


def judge_http(figures: Sequence[Figure]) -> list[Judged]:
    """Median first token of many clients beside llama-server's; goodput of the replays, each engine at the rate that
    suits it best."""
    out, loads = [], dict.fromkeys(_load(f) for f in figures)
    for load in loads:
        own, peer = _medians(figures, load, "inhouse"), _medians(figures, load, "llama-server")
        if "clients" in load and own and peer:
            ratio = peer["first_token"] / own["first_token"]
            cells = f"{own['first_token']:.2f} s | {peer['first_token']:.2f} s | llama-server | {ratio:.2f} | 3"
            out.append(_http("first token", f"median first token, {load}", cells, ratio, FIRST_TOKEN_RATIO))
    best = {
        served: max(_medians(figures, load, served).get("goodput", 0.0) for load in loads if "trace" in load)
        for served in dict.fromkeys(f["served"] for f in figures if "trace" in _load(f))
    }
    if peers := {name: value for name, value in best.items() if name != "inhouse"}:
        name = max(peers, key=lambda served: peers[served])
        ratio = best.get("inhouse", 0.0) / max(peers[name], 1e-9)
        cells = f"{best.get('inhouse', 0.0):.2f} req/s | {peers[name]:.2f} req/s | {name} | {min(ratio, 99.0):.2f} | 2"
        out.append(_http("goodput", "goodput of the trace at the best rate", cells, ratio, GOODPUT_RATIO))
    return out


def _http(key: str, title: str, cells: str, ratio: float, wished: float) -> Judged:
    verdict = "reached" if ratio >= wished else "ahead, **short of the goal**" if ratio > 1 else "**behind**"
    return Judged(f"http {key}", title, cells, verdict, ratio < wished)


def http(figures: Sequence[Figure], reasons: Mapping[str, Mapping[str, str]]) -> Iterator[str]:
    """The goals, then every load and engine."""
    yield from [
        "### Over HTTP, qwen2.5-0.5b at about 4.5 bits", "",
        "Clients at once: 128-token prompts, 128 tokens each. `trace`: requests of a public trace (Azure LLM inference",
        "2023; prompts cut to 512, answers to 96 tokens) at that many a second; goodput counts requests a second with",
        "a first token within 2 s and a median of at most 100 ms between tokens. Engines in turns, each started for",
        "its load; OpenVINO replays the trace in process, without HTTP, which flatters it.", "",
        "| goal | ours | best peer | which | ratio | goal | |", "|---|--:|--:|---|--:|--:|---|",
    ]  # fmt: skip
    rows = judge_http(figures)
    yield from (f"| {row.title} | {row.cells} | {row.verdict} |" for row in rows)
    yield ""
    yield from why(rows, reasons)
    yield "| load | engine | goodput req/s | median first token s | median between tokens ms | output tok/s | rounds |"
    yield "|---|---|--:|--:|--:|--:|--:|"
    for load in dict.fromkeys(_load(f) for f in figures):
        for served in dict.fromkeys(f["served"] for f in figures):
            if m := _medians(figures, load, served):
                rounds = len({f["bout"] for f in figures if f["served"] == served and _load(f) == load})
                yield (
                    f"| {load} | {served} | {m['goodput']:.2f} | {m['first_token']:.2f} | "
                    f"{m['between_tokens'] * 1000:.0f} | {m['output']:.0f} | {rounds} |"
                )
    yield ""


# ---- Markdown --------------------------------------------------------------------------------------------------------


def reason_of(key: str, reasons: Mapping[str, Mapping[str, str]]) -> Mapping[str, str] | None:
    """The first entry whose pattern fits a key."""
    return next((reason for pattern, reason in reasons.items() if fnmatch.fnmatchcase(key, pattern)), None)


def why(rows: Sequence[Judged], reasons: Mapping[str, Mapping[str, str]]) -> Iterator[str]:
    """A line for each row that falls short."""
    short = [(row, reason_of(row.key, reasons)) for row in rows if row.short]
    for row, reason in short:
        if reason is not None:
            yield f"- {row.title}: {reason['why']} What would close it: {reason['closes']}"
    if short:
        yield ""


def groups_of(report: Mapping[str, Any]) -> dict[tuple[str, str], list[Figure]]:
    """(model, bits) -> figures of the cells in process."""
    groups: dict[tuple[str, str], list[Figure]] = {}
    for figure in report["figures"]:
        if "served" not in figure:
            groups.setdefault((figure["model"], figure["bits"]), []).append(figure)
    return groups


def own_kvs(figures: Sequence[Figure]) -> list[str]:
    """The KV types of ours in the order in which they came."""
    return list(dict.fromkeys(f["kv"] for f in figures if f["ours"]))


def demand_reasons(report: Mapping[str, Any], reasons: Mapping[str, Mapping[str, str]]) -> None:
    """Raises Unexplained where a cell falls short and bench/shortfalls.json does not say why."""
    rows = [row for figures in groups_of(report).values() for kv in own_kvs(figures) for row in judge_all(figures, kv)]
    rows += judge_http([f for f in report["figures"] if "served" in f])
    if missing := [row.key for row in rows if row.short and reason_of(row.key, reasons) is None]:
        raise Unexplained("no reason in bench/shortfalls.json for: " + "; ".join(missing))


def goal_table(figures: Sequence[Figure], kv: str, reasons: Mapping[str, Mapping[str, str]]) -> Iterator[str]:
    """Ours with one KV type beside the best peer of each cell."""
    first = next(f for f in figures if f["ours"] and f["kv"] == kv)
    level = ", AVX2" if first["bits"].endswith(AVX2) else ""
    yield f"### {first['model']}, about {first['bits'].removesuffix(AVX2)} bits{level}, our KV {kv}"
    rows = judge_all(figures, kv)
    peers = dict.fromkeys((f["engine"], f["form"], f["kv"]) for f in figures if not f["ours"])
    yield from [
        "", f"Ours: {first['form']}; KV {kv}. Peers: " + "; ".join(f"{e} {form}; KV {k}" for e, form, k in peers) + ".",
        "", "| cell | ours tok/s | best peer tok/s | which | ratio (rounds) | goal | share of limit | goal | |",
        "|---|--:|--:|---|--:|--:|--:|--:|---|",
    ]  # fmt: skip
    yield from (f"| {row.title} | {row.cells} | {row.verdict} |" for row in rows)
    yield ""
    yield from why(rows, reasons)


def every_peer(figures: Sequence[Figure]) -> Iterator[str]:
    """Every peer and cell with its rounds, so that nothing hides behind the best."""
    where = f"| {figures[0]['model']} | {figures[0]['bits']}"
    for kv in own_kvs(figures):
        for cell in dict.fromkeys(f["cell"] for f in figures if f["ours"] and f["kv"] == kv):
            for c in compare(figures, cell, kv):
                foreign = max(f["foreign"] for pair in c.rounds for f in pair)
                yield (
                    f"{where} | {cell} | {kv} | {c.engine} | {c.median(0):.4g} | {c.median(1):.4g} | {c.ratio:.2f} | "
                    f"{'; '.join(_rounds(c))} | {foreign:.2f} |"
                )


def _rounds(c: Compared) -> Iterator[str]:
    """Ratio, our share of the limit, and the probes before ours and before the peer, for each round."""
    for ratio, (ours, peer) in zip(c.ratios, c.rounds, strict=True):
        found, probes = share(ours), [f["peaks"]["read_bytes"] / 1e9 for f in (ours, peer)]
        placement = "/".join("fast" if p * 1e9 >= FAST else "slow" for p in probes)
        part = f", {found:.0%}" if found is not None else ""
        yield f"{ratio:.2f}{part} ({probes[0]:.0f}/{probes[1]:.0f} {placement})"


def summary(report: Mapping[str, Any]) -> Iterator[str]:
    """How many cells reach their goals; all that do not, by name."""
    groups = groups_of(report)
    rows = [
        (f"{model} {bits} bits, KV {kv}", row)
        for (model, bits), figures in groups.items() if bits.startswith("4.5")
        for kv in own_kvs(figures) for row in judge_all(figures, kv)
    ]  # fmt: skip
    rows += [("HTTP", row) for row in judge_http([f for f in report["figures"] if "served" in f])]
    good = sum("reached" in row.verdict for _, row in rows)
    yield f"At about 4.5 bits {good} of {len(rows)} cells reach a goal."
    for word, title in (("behind", "Behind the best peer"), ("short", "Ahead, but short of their goals")):
        named = [f"{row.title} ({where})" for where, row in rows if word in row.verdict]
        yield f"{title}: {'; '.join(named) or 'none'}."
    yield ""


def page(report: Mapping[str, Any], reasons: Mapping[str, Mapping[str, str]]) -> Iterator[str]:
    """The comparisons. Raises Unexplained."""
    demand_reasons(report, reasons)
    info = report["machine"]
    yield from [
        "## Against other engines", "",
        f"Measured by `{report['command']}` (`make bench-peers`; bench/peers/README.md says which kits it needs, and",
        "what is left out where one is not installed).", "", *textwrap.wrap(READING.strip(), 118), "",
        f"Machine: {info['processor']}, {info['cores']} cores, {info['system']}, {info['date']}. "
        + ", ".join(f"{k} {v}" for k, v in report.get("versions", {}).items()) + ".", "",
        *summary(report),
    ]  # fmt: skip
    if report.get("note"):
        yield from [report["note"], ""]
    groups = groups_of(report)
    for figures in groups.values():
        for kv in own_kvs(figures):
            if judge_all(figures, kv):
                yield from goal_table(figures, kv, reasons)
    if served := [f for f in report["figures"] if "served" in f]:
        yield from http(served, reasons)
    yield from [
        "### Every peer, every round", "",
        "Rounds: ratio, our share of the limit (GB/s probed before ours / before the peer, placement).", "",
        "| model | bits | cell | our KV | peer | ours | peer's | ratio | rounds | CPU of others |",
        "|---|---|---|---|---|--:|--:|--:|---|--:|",
    ]  # fmt: skip
    for figures in groups.values():
        yield from every_peer(figures)
    yield ""
    if report.get("left_out"):
        yield from ["Left out:", "", *(f"- {line}" for line in report["left_out"]), ""]
