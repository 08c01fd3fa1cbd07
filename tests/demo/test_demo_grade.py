"""The grading's logic, with a model made of a table."""

from collections.abc import Sequence

import pytest
from demo.corpus import Corpus
from demo.grade import (
    Score,
    grade_all,
    grade_stories,
    known_facts,
    overlap,
    units,
    without,
)
from demo.questions import DATA, read_tsv

pytestmark = pytest.mark.null


@pytest.fixture(scope="module")
def corpus() -> Corpus:
    return Corpus([])


def test_a_model_that_knows_all_gets_all(corpus: Corpus) -> None:
    facts = known_facts(corpus)
    table = {
        question: facts[label].answers["en"]
        for name in ("heldout_independent.tsv", "heldout_same_style.tsv")
        for label, question in read_tsv(DATA / name)
    }
    declined = corpus.decline[0].fact.answers["zh"]
    table |= {question: declined for _, question in read_tsv(DATA / "heldout_out_of_scope.tsv")}
    poems = {poem.title: poem.answer for poem in corpus.poems} | {poem.text[:5]: poem.answer for poem in corpus.poems}

    def answer(questions: Sequence[str]) -> list[str]:
        return [
            table.get(q) or next((poems[k] for k in sorted(poems, key=len, reverse=True) if k in q), "Word. " * 50)
            for q in questions
        ]

    scores = grade_all(corpus, answer)
    assert {name: score.share for name, score in scores.items()} == dict.fromkeys(scores, 1.0)


def test_a_model_that_always_declines_gets_only_that(corpus: Corpus) -> None:
    declined = corpus.decline[0].fact.answers["en"]
    scores = grade_all(corpus, lambda questions: [declined] * len(questions))
    assert scores["out_of_scope"].share == 1.0
    assert scores["independent"].share < 0.05
    assert scores["poems"].share == scores["stories"].share == 0.0


def test_a_story_must_be_long_and_end() -> None:
    assert grade_stories(lambda qs: ["word " * 60 + "end."] * len(qs)).share == 1.0
    assert grade_stories(lambda qs: ["word " * 60] * len(qs)).share == 0.0
    assert grade_stories(lambda qs: ["short."] * len(qs)).share == 0.0


def test_score_keeps_what_was_wrong() -> None:
    score = Score()
    score.count(True, "a", "q", "x")
    score.count(False, "b", "r", "y")
    assert score.share == 0.5
    assert score.wrong == [("b", "r", "y")]
    assert Score().share == 0.0


def test_units_are_words_and_chinese_characters() -> None:
    assert units("Use INHOUSE_HOME，怎么 do?") == ["use", "inhouse_home", "怎", "么", "do"]


def test_overlap_finds_the_longest_shared_run() -> None:
    found = overlap(["how do I stop it now", "怎么停"], ["please, how do I stop?", "stop it now", "怎 么停！"])
    assert (found.longest, found.example) == (4, "how do i stop")
    assert found.whole == ("怎么停",)
    assert found.mean_share == pytest.approx((4 / 6 + 1) / 2)
    assert found.questions == 2


def test_a_score_without_some_questions() -> None:
    score = Score(2, 4, [("f", "b", "?"), ("f", "c", "?")])
    rest = without(score, ["a", "b"], ["a", "b", "c", "d"])
    assert (rest.right, rest.total, rest.wrong) == (1, 2, [("f", "c", "?")])
