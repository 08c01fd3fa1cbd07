"""The page of comparisons against figures made by hand."""

import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tools"))

import peers_page

SLOW = {"read_bytes": 40e9, "int8_ops": 900e9, "f32_ops": 200e9}
FAST = {**SLOW, "read_bytes": 60e9}
MODEL = {"model": "qwen2.5-0.5b", "bits": "4.5"}
REASONS = {"*": {"why": "because.", "closes": "work."}}


def figure(engine: str, cell: str, value: float, round_: int = 0, **more: Any) -> dict[str, Any]:
    """A figure of `engine`; ours reads 0.4 GB and computes nothing for a token."""
    about = {**MODEL, "bout": f"{cell} round {round_}", "round": round_, "engine": engine, "form": "x", "kv": "f16"}
    work = {"bytes_read": 0.4e9} if engine == "inhouse" and cell not in ("cold", "rss") else None
    beside = {"work": work, "work_tokens": 1} if work else {}
    ours = {"ours": engine == "inhouse", "foreign": 0.0, "peaks": SLOW}
    return {**about, **ours, "cell": cell, "value": value, **beside, **more}


def verdict(figures: list[dict[str, Any]], cell: str) -> str:
    """The verdict on a cell."""
    return next(row for row in peers_page.judge_all(figures, "f16") if f" {cell} " in row.key).verdict


def test_a_share_is_of_its_own_rounds_peaks() -> None:
    assert peers_page.share(figure("inhouse", "decode32", 80.0)) == pytest.approx(80 * 0.4 / 40)
    assert peers_page.share(figure("inhouse", "decode32", 80.0, peaks=FAST)) == pytest.approx(80 * 0.4 / 60)
    assert peers_page.share(figure("llama.cpp", "decode32", 80.0)) is None


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
    best = peers_page.best_of(peers_page.compare(figures, "decode2048", "f16"))
    assert (best.engine, best.ratios, best.ratio) == ("b", (2.4,), 2.4)
    assert verdict(figures, "decode2048") == "reached"


def test_a_peers_bout_without_ours_counts_nothing() -> None:
    figures = [figure("inhouse", "batch8", 60.0, 0), figure("a", "batch8", 30.0, 1)]
    assert peers_page.compare(figures, "batch8", "f16") == []


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
    report = {"figures": figures, "machine": {"processor": "p", "cores": 2, "system": "s", "date": "d"}, "command": "c"}
    with pytest.raises(peers_page.Unexplained, match=r"qwen2\.5-0\.5b 4\.5 decode32 kv=f16"):
        list(peers_page.page(report, {"* batch8 *": REASONS["*"]}))
    text = "\n".join(peers_page.page(report, REASONS))
    assert "- decode after 32: because. What would close it: work." in text
    assert "At about 4.5 bits 0 of 1 cells reach a goal." in text
    assert "1.17, 70% (40/40 slow/slow)" in text


def test_beside_the_goals_only_what_is_behind_needs_a_reason() -> None:
    figures = [figure("inhouse", "decode32", 70.0, bits="16"), figure("a", "decode32", 60.0, bits="16")]
    assert not peers_page.judge_all(figures, "f16")[0].short
    figures[1]["value"] = 71.0
    assert peers_page.judge_all(figures, "f16")[0].short
