"""Gates, paired questions and the report: the statistics against scipy, verdicts, and a page that stands alone."""

import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from scipy.stats import binomtest

from inhouse.compress import pipeline
from inhouse.compress.candidates import candidates, chosen
from inhouse.compress.evaluate import Evaluation, documents
from inhouse.compress.gate import BASELINE_SHARE, judge, scored_text
from inhouse.compress.recipe import Gate, parse_recipe
from inhouse.compress.search import Found, Limit, Measured, search
from inhouse.compress.tasks import Question, detectable, mcnemar, paired, read_questions
from inhouse.core.errors import CapacityError, NotFoundError, UsageError
from inhouse.store.home import Home


@pytest.mark.parametrize(("lost", "gained"), [(0, 0), (1, 0), (5, 1), (12, 12), (3, 40), (200, 150)])
def test_mcnemar_is_the_exact_binomial_test(lost: int, gained: int) -> None:
    wanted = binomtest(lost, lost + gained).pvalue if lost + gained else 1.0
    assert mcnemar(lost, gained) == pytest.approx(wanted, rel=1e-12)


def test_the_detectable_change_is_found_four_times_in_five() -> None:
    questions, share = 400, 0.1
    change = detectable(questions, int(share * questions))
    lost, gained = (share + change) / 2, (share - change) / 2
    drawn = np.random.default_rng(0).multinomial(questions, [lost, gained, 1 - share], 4000)
    found = np.mean([mcnemar(int(a), int(b)) < 0.05 for a, b, _ in drawn])
    assert 0.70 < found < 0.88  # the exact test is a little stricter than the formula's normal one
    assert detectable(1600, 160) == pytest.approx(change / 2, rel=0.05)


def test_paired_counts() -> None:
    found = paired([True, True, True, False], [True, False, False, True])
    assert (found.questions, found.before, found.after, found.lost, found.gained) == (4, 3, 2, 2, 1)
    assert not found.worse
    assert paired([True] * 12, [False] * 12).worse


def test_questions_are_read_strictly(tmp_path: Path) -> None:
    file = tmp_path / "q.tsv"
    file.write_text("# comment\nWho wrote it?\tAda|Lovelace; 1843\n\n", "utf-8")
    (question,) = read_questions(file)
    assert question == Question("Who wrote it?", (("ada", "lovelace"), ("1843",)))
    assert question.is_right("Lovelace, in 1843.")
    assert not question.is_right("Ada.")
    for bad in ("no tab here", "q\t", "\tkey", "q\ta;;b", ""):
        file.write_text(bad, "utf-8")
        with pytest.raises(UsageError, match="question"):
            read_questions(file)
    with pytest.raises(NotFoundError):
        read_questions(tmp_path / "none")


def evaluation(kld: float, perplexity: float = 10.0) -> Evaluation:
    return Evaluation(perplexity, 100, "own", kld, 2 * kld, 0.9, 10.0, kld / 2)


@pytest.mark.parametrize(
    ("gate", "kld", "perplexity", "healed", "baseline", "passed", "said"),
    [
        (Gate(), 5.0, 99.0, False, None, None, ""),
        (Gate(0.05), 0.05, 10.0, False, None, True, ""),
        (Gate(0.05), 0.051, 10.0, False, None, False, "limit is 0.05"),
        (Gate(0.05), math.nan, 10.0, False, None, False, "limit is 0.05"),
        (Gate(0.05), 0.03, 10.0, False, 0.03 / BASELINE_SHARE + 1e-9, True, ""),
        (Gate(0.05), 0.03, 10.0, False, 0.04, False, "30 % below plain rounding"),
        (Gate(0.05, 0.03), 0.5, 10.2, True, None, True, ""),
        (Gate(0.05, 0.03), 0.01, 10.4, True, None, False, "rose by 4.00%"),
        (Gate(0.05), 0.5, 10.0, True, None, False, "limit is 0.05"),
    ],
)
def test_verdicts(
    gate: Gate, kld: float, perplexity: float, healed: bool, baseline: float | None, passed: bool | None, said: str
) -> None:
    report = judge(gate, evaluation(kld, perplexity), "text", healed, baseline)
    assert report.passed is passed
    assert said in "; ".join(report.reasons)
    assert bool(report.reasons) == (passed is False)


def test_every_story_of_a_file_is_scored(tmp_path: Path) -> None:
    file = tmp_path / "stories.txt"
    file.write_text("One was red.\n<|endoftext|>\nTwo was blue.<|endoftext|>Three.", "utf-8")
    assert documents(scored_text(str(file), "stories"), "stories") == ["One was red.", "Two was blue.", "Three."]
    assert "<|endoftext|>" not in scored_text(str(file), "window:16")


def test_a_loss_of_answers_beyond_chance_fails() -> None:
    worse = paired([True] * 20, [False] * 10 + [True] * 10)
    report = judge(Gate(0.05), evaluation(0.01), "text", False, None, worse)
    assert report.passed is False
    assert "right answers lost" in report.reasons[0]
    assert judge(Gate(0.05), evaluation(0.01), "text", False, None, paired([True] * 20, [True] * 20)).passed


class Page(HTMLParser):
    """What a page loads or links, and whether its tags are closed."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.loads: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in ("meta", "br"):
            self.open.append(tag)
        self.loads += [value or "" for key, value in attrs if key in ("src", "href", "xlink:href")]

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.loads += [value or "" for key, value in attrs if key in ("src", "href", "xlink:href")]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


@pytest.mark.realdata
def test_a_run_ends_with_a_page_that_needs_no_network(stories: Path, tmp_path: Path) -> None:
    questions = tmp_path / "q.tsv"
    questions.write_text("Once upon a time\tthe\nThe dog\tzebra\n")
    document = {
        "calibration": {"samples": 16, "length": 128},
        "stages": [{"quantize": {"method": "gptq", "format": "q4_0"}}],
        "gates": {"max_kld": 1.0, "questions": str(questions)},
    }
    done = pipeline.compress(str(stories / "hf"), "small", parse_recipe(document))
    gate = done.result["gate"]
    assert gate["baseline_kld"] > 0
    assert gate["passed"] is (gate["kld_mean"] <= BASELINE_SHARE * gate["baseline_kld"])
    assert gate["questions"]["questions"] == 2
    page = Path(done.result["report"])
    text = page.read_text("utf-8")
    parser = Page()
    parser.feed(text)
    assert parser.open == []
    assert [load for load in parser.loads if not load.startswith(("#", "data:"))] == []
    assert not re.search(r"@import|url\(\s*['\"]?http", text)
    assert text.count("<svg") >= 7  # bits, errors, divergence, agreement, three spectra
    report = json.loads((page.parent / "report.json").read_text())
    assert report["size"]["bytes"] == done.result["bytes"] == sum(t["nbytes"] for t in report["tensors"])
    assert report["divergence"]["0.5"] == pytest.approx(gate["kld_median"], rel=1e-6)
    assert all(t["error"] < 0.2 for t in report["tensors"] if t["layout"] == "q4_0")
    assert report["speed"]["after"]["weights"] < report["speed"]["before"]["weights"]


def test_candidates_cover_the_ladder_with_plain_rounding_among_them() -> None:
    pool = list(candidates(5))
    assert len({c.name for c in pool}) == len(pool)
    for bits in (None, 8.0, 4.5, 3.0, 2.2):
        measured = chosen(pool, bits, 20)
        assert len(measured) >= 20
        assert any(c.plain for c in measured)
        assert len({c.name for c in measured}) == len(measured)
    kinds = {stage for c in chosen(pool, 4.5, 20) for part in c.stages for stage in part}
    assert kinds >= {"quantize", "lowrank", "prune"}


def test_the_front() -> None:
    points = [Measured("a", 10, 0.3), Measured("b", 20, 0.1), Measured("c", 20, 0.2), Measured("d", 5, 0, error="no")]
    recipe = parse_recipe({"stages": [{"quantize": {"method": "rtn", "format": "q8_0"}}]})
    found = Found(recipe, points[1], points)
    assert [m.name for m in found.front] == ["a", "b"]
    assert Limit(15).keeps(15, 9.0)
    assert not Limit(max_kld=0.1).keeps(1, 0.11)


@pytest.mark.realdata
def test_a_size_that_nothing_reaches_is_refused_before_anything_is_run(stories: Path) -> None:
    with pytest.raises(CapacityError, match="cannot be reached: the smallest recipe tried takes"):
        search(str(stories / "hf"), "tiny", Limit(20_000), {})
    assert not (Home.find().data / "searches" / "tiny" / "measured.json").exists()
