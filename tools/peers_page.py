"""The comparisons of bench/peers.json as Markdown: every cell as peers_figures.py judges it, and for each that falls
short the reason from bench/shortfalls.json, which has to be of that model. Refuses a shortfall without a reason, and
says where figures of several machines, days or versions stand beside each other. Measures nothing.
"""

import fnmatch
import statistics
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from peers_figures import (
    AVX2,
    FAST,
    RSS_FACTOR,
    RSS_MORE,
    Compared,
    Figure,
    Judged,
    compare,
    early_counted,
    judge_all,
    peaks_of,
    share,
    source,
    sources,
    trust,
)

from inhouse.tune.limits import DISTURBED

FIRST_TOKEN_RATIO, GOODPUT_RATIO = 3.0, 2.0
READING = f"""
In a round all engines run the same cells one after the other, two threads, greedy. A ratio is the median over rounds
of ours by the peer's (for seconds and bytes the other way round), so above 1 is ahead. A rate of several streams counts
the tokens that came after the last stream had its first one. The limit is the roofline at the machine's bandwidth and
arithmetic peaks, each the mean of a probe just before that cell and one just after it (`inhouse.tune.limits`: every
matrix once a step, the head for sampled rows, K and V in the bytes of their type, attention and bf16 weights at the
bf16 peak, which is twice that of f32). Either goal of a row counts, as the lesser is the goal; a share stands for its
own round's probes (from {FAST / 1e9:.0f} GB/s on: the fast placement of memory). A round is disturbed where the limits
by its two probes differ by more than {DISTURBED:.0%}, or where more was measured than they allow: its share reaches no
goal, and is left out where other rounds remain. `one probe`: an older figure with the probe before it alone. CPU of
others: processors that other processes had on average, and of these what the hypervisor gave to other machines (`?`:
older figures, which leave that out). Peers' KV types are their own defaults: llama.cpp f16,
OpenVINO u8 (its attention in bf16), ONNX Runtime f32. Resident memory: after 2048 + 128 tokens; its limit is
{RSS_FACTOR} x (weights + filled cache) + {RSS_MORE / 1e6:.0f} MB. 8.5 bits and bf16 stand beside; the goals are for
about 4.5.
"""


class Unexplained(Exception):
    """Cells that fall short of their goals without a reason, or reasons that are of no model."""


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


def http(
    figures: Sequence[Figure], reasons: Mapping[str, Mapping[str, str]], letters: Mapping[str, str]
) -> Iterator[str]:
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
                bouts = {f["bout"] for f in figures if f["served"] == served and _load(f) == load}
                ours = (f for f in figures if f["ours"] and f["bout"] in bouts)
                marks = sorted({letters[source(f)] for f in ours}) if len(letters) > 1 else []
                yield (
                    f"| {load} | {served} | {m['goodput']:.2f} | {m['first_token']:.2f} | "
                    f"{m['between_tokens'] * 1000:.0f} | {m['output']:.0f} | {' '.join([str(len(bouts)), *marks])} |"
                )
    yield ""


# ---- Markdown --------------------------------------------------------------------------------------------------------


def reason_of(key: str, reasons: Mapping[str, Mapping[str, str]]) -> Mapping[str, str] | None:
    """The first entry whose pattern fits a key."""
    return next((reason for pattern, reason in reasons.items() if fnmatch.fnmatchcase(key, pattern)), None)


def demand_models(reasons: Mapping[str, Mapping[str, str]]) -> None:
    """Raises Unexplained for a reason over several models: what was measured on one says nothing of another."""
    if loose := [pattern for pattern in reasons if set("*?[") & set(pattern.split()[0])]:
        raise Unexplained("bench/shortfalls.json has reasons of no one model: " + "; ".join(loose))


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
    """Raises Unexplained where a cell falls short and bench/shortfalls.json does not say why for that model."""
    demand_models(reasons)
    rows = [row for figures in groups_of(report).values() for kv in own_kvs(figures) for row in judge_all(figures, kv)]
    rows += judge_http([f for f in report["figures"] if "served" in f])
    if missing := [row.key for row in rows if row.short and reason_of(row.key, reasons) is None]:
        raise Unexplained("no reason in bench/shortfalls.json for: " + "; ".join(missing))


def goal_table(
    figures: Sequence[Figure], kv: str, reasons: Mapping[str, Mapping[str, str]], letters: Mapping[str, str]
) -> Iterator[str]:
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
    yield from cautions(figures, kv, letters)
    yield from why(rows, reasons)


def cautions(figures: Sequence[Figure], kv: str, letters: Mapping[str, str]) -> Iterator[str]:
    """What the medians of one table mix, and which figures were counted in an older way."""
    own = [f for f in figures if f["ours"] and f["kv"] == kv]
    lines = []
    for cell in dict.fromkeys(f["cell"] for f in own):
        found = sorted({letters[source(f)] for f in own if f["cell"] == cell})
        if len(found) > 1:
            lines.append(f"- {cell}: a median over rounds of {' and '.join(found)}, which are not alike.")
    if older := list(dict.fromkeys(f["cell"] for f in own if early_counted(f))):
        lines.append(
            f"- {', '.join(older)}: figures of ours from before tokens made ahead of the last stream's first one were "
            "left out; that flatters ours by a few per cent."
        )
    yield from lines
    if lines:
        yield ""


def every_peer(figures: Sequence[Figure], letters: Mapping[str, str]) -> Iterator[str]:
    """Every peer and cell with its rounds, so that nothing hides behind the best."""
    where = f"| {figures[0]['model']} | {figures[0]['bits']}"
    for kv in own_kvs(figures):
        for cell in dict.fromkeys(f["cell"] for f in figures if f["ours"] and f["kv"] == kv):
            for c in compare(figures, cell, kv):
                busiest = max((f for pair in c.rounds for f in pair), key=lambda f: float(f["foreign"]))
                stolen = f"{busiest['stolen']:.2f}" if "stolen" in busiest else "?"
                yield (
                    f"{where} | {cell} | {kv} | {c.engine} | {c.median(0):.4g} | {c.median(1):.4g} | {c.ratio:.2f} | "
                    f"{'; '.join(_rounds(c, letters))} | {busiest['foreign']:.2f} ({stolen}) |"
                )


def _rounds(c: Compared, letters: Mapping[str, str]) -> Iterator[str]:
    """Ratio, our share of the limit and its doubt, the bandwidths of our cell and before the peer, and where there are
    several the source, for each round."""
    for ratio, (ours, peer) in zip(c.ratios, c.rounds, strict=True):
        found, probes = share(ours), [peaks_of(f).read_bytes / 1e9 for f in (ours, peer)]
        placement = "/".join("fast" if p * 1e9 >= FAST else "slow" for p in probes)
        part = " ".join(filter(None, [f", {found:.0%}", trust(ours)])) if found is not None else ""
        mark = f" {letters[source(ours)]}" if len(letters) > 1 else ""
        yield f"{ratio:.2f}{part} ({probes[0]:.0f}/{probes[1]:.0f} {placement}){mark}"


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


def taken(figures: Sequence[Figure], letters: Mapping[str, str]) -> Iterator[str]:
    """On which machines, when and by which versions the figures were taken; a warning where these are several."""
    machines = list(dict.fromkeys(f["machine"] for f in figures))
    days = sorted({str(f["date"])[:10] for f in figures})
    versions: dict[str, list[str]] = {}
    for figure in figures:
        found = versions.setdefault(str(figure["engine"]).split()[0], [])
        found += [figure["version"]] if figure["version"] not in found else []
    yield f"Machine: {'; '.join(machines)}; {', '.join(days)}. " + "; ".join(
        f"{engine} {' and '.join(several)}" for engine, several in versions.items()
    ) + "."  # fmt: skip
    yield ""
    if len(letters) > 1:
        yield (
            "**Figures of several machines, days or versions stand beside each other here**; a ratio or share is "
            "always within one round, a median may be over rounds of several, and says so:"
        )
        yield from ["", *(f"- {letter}: {text}" for text, letter in letters.items()), ""]


def page(report: Mapping[str, Any], reasons: Mapping[str, Mapping[str, str]]) -> Iterator[str]:
    """The comparisons. Raises Unexplained."""
    demand_reasons(report, reasons)
    letters = sources(report["figures"])
    yield from [
        "## Against other engines", "",
        f"Measured by `{report['command']}` (`make bench-peers`; bench/peers/README.md says which kits it needs, and",
        "what is left out where one is not installed).", "", *textwrap.wrap(READING.strip(), 118), "",
        *taken(report["figures"], letters), *summary(report),
    ]  # fmt: skip
    if report.get("note"):
        yield from [report["note"], ""]
    groups = groups_of(report)
    for figures in groups.values():
        for kv in own_kvs(figures):
            if judge_all(figures, kv):
                yield from goal_table(figures, kv, reasons, letters)
    if served := [f for f in report["figures"] if "served" in f]:
        yield from http(served, reasons, letters)
    yield from [
        "### Every peer, every round", "",
        "Rounds: ratio, our share of the limit (GB/s of our cell / probed before the peer, placement)"
        + (", which figures." if len(letters) > 1 else "."), "",
        "| model | bits | cell | our KV | peer | ours | peer's | ratio | rounds | CPU of others (stolen) |",
        "|---|---|---|---|---|--:|--:|--:|---|--:|",
    ]  # fmt: skip
    for figures in groups.values():
        yield from every_peer(figures, letters)
    yield ""
    if report.get("left_out"):
        yield from ["Left out:", "", *(f"- {line}" for line in report["left_out"]), ""]
