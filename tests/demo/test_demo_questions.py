"""Patterns, the split, and what the data files promise: every fact in both languages, keys in the answers, sizes."""

import json
import random
from pathlib import Path

import pytest
from demo.corpus import Corpus
from demo.grade import holds_keys
from demo.grammar import parse, read_sections
from demo.questions import (
    DATA,
    LANGUAGES,
    is_held_out,
    load_decline_topics,
    load_fact_topics,
    load_facts,
    load_poems,
    load_smalltalk_topics,
    parse_keys,
    read_tsv,
)

from demo import noise

pytestmark = pytest.mark.null


def test_a_pattern_gives_all_its_strings_and_no_others() -> None:
    macros = {"m": parse("x|y", {})}
    pattern = parse("(a|b|)-{m}(1(2|3)|4)", macros)
    rng = random.Random(0)
    found = {pattern.sample(rng) for _ in range(2000)}
    assert found == {f"{a}-{m}{t}" for a in ("a", "b", "") for m in "xy" for t in ("12", "13", "4")}
    assert pattern.count() == len(found)


@pytest.mark.parametrize("bad", ["(a|b", "a)b", "((a)"])
def test_unbalanced_patterns_are_refused(bad: str) -> None:
    with pytest.raises(ValueError, match="parenthesis"):
        parse(bad, {})


def test_sections_and_macros() -> None:
    macros, sections = read_sections("# note\n@a = x|y\nkey: v\n[one]\nen: (p|q)\nzh: 三\n")
    assert macros["a"].count() == 2
    assert [(s.name, s.lines) for s in sections] == [("", (("key", "v"),)), ("one", (("en", "(p|q)"), ("zh", "三")))]


def test_keys() -> None:
    keys = parse_keys("a b | c & D")
    assert keys == (("a b", "c"), ("D",))
    assert holds_keys("xx A B then d", keys)
    assert not holds_keys("only c", keys)


def test_facts_are_80_to_100_in_both_languages_and_hold_their_keys() -> None:
    facts = load_facts()
    assert 80 <= len(facts) <= 100
    for fact in facts.values():
        for language in LANGUAGES:
            assert holds_keys(fact.answers[language], fact.keys), fact.name


def test_keys_tell_facts_apart() -> None:
    """No answer satisfies another fact's keys, but for the pairs listed (one command or path contains the other)."""
    related = {
        ("api", "base_url"),
        ("compress", "target_size"),
        ("cuda", "executors"),
        ("eval", "reference"),
        ("port", "base_url"),
        ("program", "show_program"),
        ("show", "show_program"),
    }
    facts = load_facts()
    clashes = {
        (keyed.name, other.name)
        for keyed in facts.values()
        for other in facts.values()
        for language in LANGUAGES
        if keyed.name != other.name and holds_keys(other.answers[language], keyed.keys)
    }
    assert {pair for pair in clashes if pair not in related} == set()


def test_every_fact_has_many_phrasings() -> None:
    for topic in load_fact_topics():
        for language in LANGUAGES:
            assert sum(pattern.count() for pattern in topic.patterns[language]) >= 25, topic.fact.name


def test_training_never_draws_a_held_out_core() -> None:
    rng = random.Random(3)
    for topic in load_fact_topics() + load_decline_topics() + load_smalltalk_topics():
        for language in LANGUAGES:
            core = topic.draw(language, rng)
            assert core is not None
            assert not is_held_out(core)


def test_held_out_files_are_well_formed_and_large_enough() -> None:
    names = set(load_facts()) | {topic.fact.name for topic in load_smalltalk_topics()}
    for name, least in (("heldout_independent.tsv", 120), ("heldout_same_style.tsv", 300)):
        rows = read_tsv(DATA / name)
        assert len(rows) >= least
        assert {label for label, _ in rows} <= names
    assert len(read_tsv(DATA / "heldout_out_of_scope.tsv")) >= 60


def test_equal_seeds_give_equal_corpora() -> None:
    corpus = Corpus(["Once there was a dog. It ran."])
    first, second = corpus.stream(5), corpus.stream(5)
    assert [next(first) for _ in range(200)] == [next(second) for _ in range(200)]
    other = corpus.stream(6)
    first = corpus.stream(5)
    assert [next(first) for _ in range(20)] != [next(other) for _ in range(20)]


def test_noise_keeps_a_question_recognisable() -> None:
    rng = random.Random(0)
    for _ in range(300):
        text = noise.decorate("which port does the server use", "en", rng)
        assert sum(word in text.lower() for word in ("which", "port", "does", "server", "use")) >= 3
    assert noise.drop_word("one two three", rng) == "one two three"
    assert noise.typo("abc", rng) == "abc"


def test_the_poems_are_whole() -> None:
    poems = load_poems()
    assert 30 <= len(poems) <= 60
    assert len({poem.title for poem in poems}) == len(poems)
    for poem in poems:
        lines = [part for part in poem.text.replace("，", "。").replace("？", "。").split("。") if part]
        assert len(lines) in (4, 6, 8), poem.title
        if poem.title != "登幽州台歌":
            assert {len(line) for line in lines} in ({5}, {7}), poem.title


def test_poems_agree_with_a_collection(realdata: Path) -> None:
    """Simplified characters differ from the collection's in fewer than half of the places, in the same order."""
    poems = load_poems()
    collection = ["".join(poem["paragraphs"]) for poem in json.loads((realdata / "text/zh/tang300.json").read_text())]

    def agreement(text: str) -> float:
        same_length = [other for other in collection if len(other) == len(text)]
        return max(sum(a == b for a, b in zip(text, other, strict=True)) / len(text) for other in same_length)

    found = [poem.title for poem in poems if agreement(poem.text) > 0.5]
    assert len(found) >= 30, found
