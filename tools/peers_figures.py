"""Figures of bench/peers.json judged: every cell by both of its goals, round by round. No Markdown but table cells;
measures nothing.

A goal in two columns is the lesser of the two, so either reaches it: the ratio to the best peer (median over the rounds
that both ran), or the share of the limit (median over our rounds, each by the mean of the peaks probed before and after
it). A round whose two probes allow limits that differ by more than a tenth was disturbed: its share reaches no goal.
"""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from inhouse.runtime.probe import Peaks
from inhouse.tune.limits import Work, disturbed, mean_peaks

Figure = Mapping[str, Any]
FAST = 50e9  # bytes a second: a probe of more met the fast placement of memory
RSS_FACTOR, RSS_MORE = 1.05, 150e6  # of weights and filled cache; bytes
AVX2 = " AVX2"


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
        return self.fast_share if self.fast_share and peaks_of(figure).read_bytes >= FAST else self.share


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
STREAMS = ("batch8", "batch32")
DISTURBED, ONE_PROBE = "disturbed", "one probe"


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


def peaks_of(figure: Figure) -> Peaks:
    """The machine's peaks in that round: the mean of the probes before and after, where both were taken."""
    before = Peaks(**figure["peaks"])
    return mean_peaks(before, Peaks(**figure["peaks_after"])) if "peaks_after" in figure else before


def share(figure: Figure) -> float | None:
    """Share of the time that the machine's peaks allow; None where it has no limit."""
    if "work" not in figure:
        return None
    return float(figure["value"]) * Work(**figure["work"]).seconds(peaks_of(figure)) / float(figure["work_tokens"])


def trust(figure: Figure) -> str:
    """What is to be said of a share: `` where both probes agree and nothing is above them, `one probe` where only the
    one before was taken, `disturbed` where the two disagree or allow less than was measured."""
    own = share(figure)
    if own is None:
        return ""
    if "peaks_after" in figure:
        probes = Peaks(**figure["peaks"]), Peaks(**figure["peaks_after"])
        if disturbed(Work(**figure["work"]), *probes):
            return DISTURBED
    return DISTURBED if own > 1 else "" if "peaks_after" in figure else ONE_PROBE


def early_counted(figure: Figure) -> bool:
    """Whether a rate of ours over several streams may hold tokens from before the last one had begun: figures from
    before that was told."""
    return bool(figure["ours"]) and figure["cell"] in STREAMS and "early_tokens" not in figure


def sources(figures: Sequence[Figure]) -> dict[str, str]:
    """Where, when and by which version of ours a bout was taken -> a letter for it, in the order in which they came."""
    found = dict.fromkeys(source(f) for f in figures if f["ours"])
    return {text: chr(ord("a") + n % 26) * (1 + n // 26) for n, text in enumerate(found)}


def source(ours: Figure) -> str:
    """Machine, day and version of a figure of ours: what a bout was taken with."""
    return f"{ours['machine']}, {str(ours['date'])[:10]}, inhouse {ours['version']}"


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
    shown, wish, by_share, probed = _shares([] if bits.endswith(AVX2) else own, goal)
    cells = f"{_sides(best, 1, '')} | {wished:g} | {shown} | {wish}"
    return _judged(figures, goal.cell, goal.title, kv, cells, best.ratio, best.ratio >= wished, by_share, probed)


def _shares(own: Sequence[Figure], goal: Goal) -> tuple[str, str, bool, str]:
    """(share as shown, the goals of the rounds, whether the share reaches it, how far it is to be trusted). Disturbed
    rounds are left out where others remain, and reach nothing."""
    rounds = [(value, goal.share_in(f), trust(f)) for f in own if (value := share(f)) is not None]
    if not rounds:
        return "", "", False, ""
    wish = "/".join(f"{w:.0%}" for w in sorted({w for _, w, _ in rounds}, reverse=True))
    counted = [(value, wished, word) for value, wished, word in rounds if word != DISTURBED]
    if not counted:
        return f"{statistics.median(value for value, _, _ in rounds):.0%} ({DISTURBED})", wish, False, DISTURBED
    word = ONE_PROBE if any(word == ONE_PROBE for _, _, word in counted) else ""
    told = [word] if word else []
    told += [f"{len(counted)} of {len(rounds)} rounds"] if len(counted) < len(rounds) else []
    shown = f"{statistics.median(value for value, _, _ in counted):.0%}" + (f" ({', '.join(told)})" if told else "")
    return shown, wish, statistics.median(value / wished for value, wished, _ in counted) >= 1, word


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
    figures: Sequence[Figure],
    cell: str,
    title: str,
    kv: str,
    cells: str,
    ratio: float,
    by_ratio: bool,
    by_limit: bool,
    probed: str = "",
) -> Judged:
    bits = figures[0]["bits"]
    key = f"{figures[0]['model']} {bits} {cell} kv={kv}"
    if by_ratio or by_limit:
        verdict = "reached" if by_ratio else "reached by the limit" + (f" (on {probed})" if probed else "")
        return Judged(key, title, cells, verdict if ratio > 1 else verdict + ", **behind the peer**", ratio <= 1)
    ahead = "ahead, **short of both goals**" if ratio > 1 else "**behind**"
    return Judged(key, title, cells, ahead, ratio <= 1 or bits.startswith("4.5"))


def judge_all(figures: Sequence[Figure], kv: str) -> list[Judged]:
    """All cells of one model at one number of bits, ours with that KV type."""
    found = [judge(figures, goal, kv) for goal in GOALS] + [judge_cold(figures, kv), judge_rss(figures, kv)]
    return [row for row in found if row is not None]
