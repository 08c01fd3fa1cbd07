"""The page of comparisons against figures made by hand."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tools"))

import peers_figures
import peers_page

SLOW = {"read_bytes": 40e9, "int8_ops": 900e9, "f32_ops": 200e9}
FAST = {**SLOW, "read_bytes": 60e9}
MODEL = {"model": "qwen2.5-0.5b", "bits": "4.5"}
REASON = {"why": "because.", "closes": "work."}
REASONS = {"qwen2.5-0.5b *": REASON}
HERE = {"machine": "AMD, 2 cores", "date": "2026-11-22T03:00+00:00", "version": "1"}


def figure(engine: str, cell: str, value: float, round_: int = 0, **more: Any) -> dict[str, Any]:
    """A figure of `engine`; ours reads 0.4 GB and computes nothing for a token, and was probed twice alike."""
    about = {**MODEL, "bout": f"{cell} round {round_}", "round": round_, "engine": engine, "form": "x", "kv": "f16"}
    work = {"bytes_read": 0.4e9} if engine == "inhouse" and cell not in ("cold", "rss") else None
    peaks = more.get("peaks", SLOW)
    beside = {"work": work, "work_tokens": 1, "early_tokens": 1, "peaks_after": peaks} if work else {}
    ours = {"ours": engine == "inhouse", "foreign": 0.0, "stolen": 0.0, "peaks": peaks}
    return {**about, **HERE, **ours, "cell": cell, "value": value, **beside, **more}


def once(found: dict[str, Any]) -> dict[str, Any]:
    """A figure as it was before there was a second probe."""
    return {key: value for key, value in found.items() if key != "peaks_after"}


def page(figures: list[dict[str, Any]]) -> str:
    """The page of these figures."""
    return "\n".join(peers_page.page({"figures": figures, "command": "c"}, REASONS))


def verdict(figures: list[dict[str, Any]], cell: str) -> str:
    """The verdict on a cell."""
    return next(row for row in peers_figures.judge_all(figures, "f16") if f" {cell} " in row.key).verdict


def test_a_share_is_of_its_own_rounds_peaks() -> None:
    assert peers_figures.share(figure("inhouse", "decode32", 80.0)) == pytest.approx(80 * 0.4 / 40)
    assert peers_figures.share(figure("inhouse", "decode32", 80.0, peaks=FAST)) == pytest.approx(80 * 0.4 / 60)
    assert peers_figures.share(figure("llama.cpp", "decode32", 80.0)) is None


def test_decode_needs_less_of_the_fast_placement() -> None:
    peer = figure("llama.cpp", "decode32", 79.0)
    assert "short" in verdict([figure("inhouse", "decode32", 80.0), peer], "decode32")  # 80 %
    assert verdict([figure("inhouse", "decode32", 86.0), peer], "decode32") == "reached by the limit"
    fast = figure("inhouse", "decode32", 114.0, peaks=FAST)  # 76 %
    assert verdict([fast, figure("llama.cpp", "decode32", 110.0)], "decode32") == "reached by the limit"
    assert "behind" in verdict([fast, figure("llama.cpp", "decode32", 120.0)], "decode32")


def test_the_best_peer_is_the_one_we_are_least_ahead_of_by_rounds() -> None:
    figures = [figure("inhouse", "decode2048", 60.0, 0), figure("inhouse", "decode2048", 90.0, 1)]
    figures += [figure("a", "decode2048", 30.0, 0), figure("a", "decode2048", 30.0, 1), figure("b", "decode2048", 25.0)]
    best = peers_figures.best_of(peers_figures.compare(figures, "decode2048", "f16"))
    assert (best.engine, best.ratios, best.ratio) == ("b", (2.4,), 2.4)
    assert verdict(figures, "decode2048") == "reached"


def test_a_peers_bout_without_ours_counts_nothing() -> None:
    figures = [figure("inhouse", "batch8", 60.0, 0), figure("a", "batch8", 30.0, 1)]
    assert peers_figures.compare(figures, "batch8", "f16") == []


def test_memory_needs_both_and_a_cold_start_its_time() -> None:
    held: dict[str, Any] = {"weights_bytes": 300e6, "kv_bytes": 20e6}  # 1.05 x 320 + 150 = 486 MB
    peer = figure("a", "rss", 600e6)
    assert verdict([figure("inhouse", "rss", 480e6, **held), peer], "rss") == "reached"
    assert "short" in verdict([figure("inhouse", "rss", 490e6, **held), peer], "rss")
    assert "behind" in verdict([figure("inhouse", "rss", 480e6, **held), figure("a", "rss", 470e6)], "rss")
    assert verdict([figure("inhouse", "cold", 0.45), figure("a", "cold", 0.9)], "cold") == "reached by the limit"
    assert "short" in verdict([figure("inhouse", "cold", 0.55), figure("a", "cold", 0.9)], "cold")


def test_avx2_has_its_own_ratio() -> None:
    figures = [figure("inhouse", "decode32", 61.0, bits="4.5 AVX2"), figure("a", "decode32", 50.0, bits="4.5 AVX2")]
    assert verdict(figures, "decode32") == "reached"


def load(served: str, name: str, cell: str, value: float) -> dict[str, Any]:
    """A figure of a load over HTTP."""
    return figure(served, cell, value, bout=f"qwen2.5-0.5b 4.5 http {name} round 0", served=served)


def test_goodput_is_each_engines_at_its_best_rate() -> None:
    figures = [
        load("inhouse", "trace 1", "goodput", 0.9), load("inhouse", "trace 2", "goodput", 1.7),
        load("openvino-genai (in process)", "trace 1", "goodput", 0.8),
        load("openvino-genai (in process)", "trace 2", "goodput", 0.2),
        load("llama-server", "trace 0.5", "goodput", 0.3),
        load("inhouse", "32 clients", "first_token", 3.0), load("llama-server", "32 clients", "first_token", 9.6),
    ]  # fmt: skip
    clients, goodput = peers_page.judge_http(figures)
    assert (clients.key, clients.verdict) == ("http first token", "reached")
    assert "1.70 req/s | 0.80 req/s | openvino-genai (in process) | 2.12" in goodput.cells
    assert goodput.verdict == "reached"


def test_a_shortfall_without_a_reason_is_refused() -> None:
    figures = [figure("inhouse", "decode32", 70.0), figure("a", "decode32", 60.0)]
    report = {"figures": figures, "command": "c"}
    with pytest.raises(peers_page.Unexplained, match=r"qwen2\.5-0\.5b 4\.5 decode32 kv=f16"):
        list(peers_page.page(report, {"qwen2.5-0.5b 4.5 batch8 *": REASON}))
    text = page(figures)
    assert "- decode after 32: because. What would close it: work." in text
    assert "At about 4.5 bits 0 of 1 cells reach a goal." in text
    assert "1.17, 70% (40/40 slow/slow)" in text


def test_a_reason_is_of_one_model() -> None:
    """The milliseconds of one model say nothing of another."""
    figures = [figure("inhouse", "decode32", 70.0, model="other"), figure("a", "decode32", 60.0, model="other")]
    with pytest.raises(peers_page.Unexplained, match="other 4"):
        list(peers_page.page({"figures": figures, "command": "c"}, REASONS))
    for pattern in ("* 4.5 decode32 *", "qwen* 4.5 *", "*"):
        with pytest.raises(peers_page.Unexplained, match="no one model"):
            list(peers_page.page({"figures": figures, "command": "c"}, {pattern: REASON}))


def test_a_share_rests_on_the_mean_of_two_probes() -> None:
    ours = figure("inhouse", "decode32", 80.0, peaks_after={**SLOW, "read_bytes": 42e9})
    assert peers_figures.share(ours) == pytest.approx(80 * 0.4 / 41)
    assert peers_figures.trust(ours) == ""


def test_a_round_between_unlike_probes_reaches_nothing() -> None:
    peer, moved = figure("a", "decode32", 79.0), {**SLOW, "read_bytes": 44.1e9}
    ours = figure("inhouse", "decode32", 95.0, peaks_after=moved)  # 90 %
    assert peers_figures.trust(ours) == "disturbed"
    assert "short" in verdict([ours, peer], "decode32")
    assert verdict([figure("inhouse", "decode32", 95.0), peer], "decode32") == "reached by the limit"
    elsewhere = {**SLOW, "f32_ops": 400e9}  # the limit of this cell does not rest on it
    assert peers_figures.trust(figure("inhouse", "decode32", 95.0, peaks_after=elsewhere)) == ""
    assert "90% (disturbed)" in page([ours, peer])
    calm = [figure("inhouse", "decode32", 87.0, 1), figure("a", "decode32", 79.0, 1)]
    assert "| 87% (1 of 2 rounds) | 85% | reached by the limit |" in page([ours, peer, *calm])


def test_more_than_the_limit_is_a_disturbed_probe() -> None:
    ours = figure("inhouse", "decode32", 101.0)
    assert peers_figures.trust(ours) == "disturbed"
    assert "short" in verdict([ours, figure("a", "decode32", 100.0)], "decode32")


def test_an_older_share_is_shown_as_resting_on_one_probe() -> None:
    figures = [once(figure("inhouse", "decode32", 87.0)), figure("a", "decode32", 79.0)]
    assert verdict(figures, "decode32") == "reached by the limit (on one probe)"
    text = page(figures)
    assert "| 87% (one probe) | 85% |" in text
    assert "1.10, 87% one probe (40/40 slow/slow)" in text


def test_a_page_of_one_source_says_so_once_and_one_of_several_says_which_is_which() -> None:
    alike = [figure("inhouse", "decode32", 90.0), figure("a", "decode32", 60.0)]
    assert "stand beside each other" not in page(alike)
    assert "Machine: AMD, 2 cores; 2026-11-22. inhouse 1; a 1." in page(alike)
    for name, other in (("machine", "ARM, 4 cores"), ("date", "2026-11-23T01:00+00:00"), ("version", "2")):
        more: dict[str, Any] = {name: other}
        text = page([*alike, figure("inhouse", "decode32", 90.0, 1, **more), figure("a", "decode32", 60.0, 1, **more)])
        assert "stand beside each other" in text
        assert f"- b: {more.get('machine', 'AMD, 2 cores')}, {more.get('date', HERE['date'])[:10]}, inhouse" in text
        assert "- decode32: a median over rounds of a and b, which are not alike." in text
        assert "1.50, 90% (40/40 slow/slow) a; 1.50, 90% (40/40 slow/slow) b" in text


def test_rates_of_streams_counted_the_old_way_are_named() -> None:
    figures = [figure("inhouse", "batch8", 90.0), figure("a", "batch8", 30.0)]
    assert "batch8: figures of ours from before" not in page(figures)
    del figures[0]["early_tokens"]
    assert "batch8: figures of ours from before" in page(figures)


def test_cpu_of_others_tells_what_was_stolen() -> None:
    figures = [figure("inhouse", "decode32", 90.0, foreign=0.3, stolen=0.25), figure("a", "decode32", 60.0)]
    assert "| 0.30 (0.25) |" in page(figures)
    del figures[0]["stolen"]
    assert "| 0.30 (?) |" in page(figures)


def test_the_kept_figures_say_whence_they_are() -> None:
    root = Path(__file__).resolve().parents[2]
    report = json.loads((root / "bench" / "peers.json").read_text())
    assert all(f["machine"] and f["date"] and f["version"] for f in report["figures"])
    for bout in {f["bout"] for f in report["figures"]}:
        own = {f["kv"] for f in report["figures"] if f["bout"] == bout and f["ours"]}
        assert own <= set(bout.rsplit(" kv ", 1)[1].split(","))
    shortfalls = json.loads((root / "bench" / "shortfalls.json").read_text())
    assert list(peers_page.page(report, shortfalls))


def test_beside_the_goals_only_what_is_behind_needs_a_reason() -> None:
    figures = [figure("inhouse", "decode32", 70.0, bits="16"), figure("a", "decode32", 60.0, bits="16")]
    assert not peers_figures.judge_all(figures, "f16")[0].short
    figures[1]["value"] = 71.0
    assert peers_figures.judge_all(figures, "f16")[0].short
