"""Grades the demo model by key strings fixed beforehand. Knows answers as text; knows neither tokens nor weights."""

import random
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from demo.corpus import Corpus
from demo.questions import Fact, held_out_file, normal, read_tsv

Answer = Callable[[Sequence[str]], list[str]]
TARGETS = {"same_style": 0.80, "independent": 0.65, "out_of_scope": 0.60}
STORY_WORDS = 40  # fewer than this is no story
STORY_PROMPTS = (
    "Tell me a story.",
    "tell me a short story please",
    "Could you tell me a bedtime story?",
    "write a story about a dog",
    "I want a story about a cat",
    "a story about a little girl, please",
    "make up a tale",
    "讲个故事",
    "给我讲一个小故事吧",
    "我想听故事",
)


@dataclass(slots=True)
class Score:
    """How many of a set were right, and what went wrong."""

    right: int = 0
    total: int = 0
    wrong: list[tuple[str, str, str]] = field(default_factory=list)  # (label, question, answer)

    @property
    def share(self) -> float:
        return self.right / self.total if self.total else 0.0

    def count(self, ok: bool, label: str, question: str, answer: str) -> None:
        self.total += 1
        self.right += ok
        if not ok:
            self.wrong.append((label, question, answer))


def holds_keys(answer: str, keys: Iterable[Iterable[str]]) -> bool:
    """Whether every group of keys is met by any of its strings, whatever the case."""
    text = answer.lower()
    return all(any(key.lower() in text for key in group) for group in keys)


def known_facts(corpus: Corpus) -> dict[str, Fact]:
    """Facts and small talk by name."""
    return {topic.fact.name: topic.fact for topic in corpus.facts + corpus.smalltalk}


def grade_file(name: str, facts: Mapping[str, Fact], answer: Answer) -> Score:
    """A held-out set whose labels are facts."""
    rows, score = read_tsv(held_out_file(name)), Score()
    for (label, question), text in zip(rows, answer([q for _, q in rows]), strict=True):
        score.count(holds_keys(text, facts[label].keys), label, question, text)
    return score


def grade_out_of_scope(corpus: Corpus, answer: Answer) -> Score:
    """Out-of-scope questions; right is to decline."""
    keys = corpus.decline[0].fact.keys
    rows, score = read_tsv(held_out_file("out_of_scope")), Score()
    for (label, question), text in zip(rows, answer([q for _, q in rows]), strict=True):
        score.count(holds_keys(text, keys), label, question, text)
    return score


def grade_poems(corpus: Corpus, answer: Answer, seed: int = 7) -> Score:
    """Every poem, asked for by its title and in one held-out way; right is the exact text."""
    rng, score = random.Random(seed), Score()
    asked = [(poem, f"背诵《{poem.title}》") for poem in corpus.poems]
    asked += [(poem, corpus.poem_question(poem, rng, held_out=True)) for poem in corpus.poems]
    for (poem, question), text in zip(asked, answer([q for _, q in asked]), strict=True):
        score.count(poem.text in text, poem.title, question, text)
    return score


def grade_stories(answer: Answer) -> Score:
    """Story prompts; right is an English text of some length that comes to an end."""
    score = Score()
    for question, text in zip(STORY_PROMPTS, answer(STORY_PROMPTS), strict=True):
        score.count(len(text.split()) >= STORY_WORDS and text.strip()[-1:] in '.!"', "story", question, text)
    return score


def grade_all(corpus: Corpus, answer: Answer) -> dict[str, Score]:
    """All sets by name."""
    facts = known_facts(corpus)
    return {
        "same_style": grade_file("same_style", facts, answer),
        "independent": grade_file("independent", facts, answer),
        "out_of_scope": grade_out_of_scope(corpus, answer),
        "poems": grade_poems(corpus, answer),
        "stories": grade_stories(answer),
    }


def units(text: str) -> list[str]:
    """Words, and each Chinese character by itself, in lower case without marks."""
    return re.findall(r"[a-z0-9_]+|[^\x00-\x7f\W]", text.lower())


@dataclass(frozen=True, slots=True)
class Overlap:
    """What held-out questions share with training questions, in units (words or Chinese characters)."""

    longest: int
    example: str
    whole: tuple[str, ...]  # questions that occur whole in training, case and marks aside
    mean_share: float  # mean over questions of longest shared run / length
    questions: int


def overlap(held_out: Sequence[str], training: Iterable[str]) -> Overlap:
    """The longest run of units that each held-out question shares with any training question."""
    grams: dict[tuple[str, ...], set[int]] = {}
    lengths = [len(units(question)) for question in held_out]
    for number, question in enumerate(held_out):
        words = units(question)
        for begin in range(len(words)):
            for end in range(begin + 1, len(words) + 1):
                grams.setdefault(tuple(words[begin:end]), set()).add(number)
    longest, runs = [0] * len(held_out), [""] * len(held_out)
    whole, wanted = set(), {normal(question) for question in held_out}
    for text in training:
        if normal(text) in wanted:
            whole.add(normal(text))
        _extend(units(text), grams, longest, runs)
    best = max(range(len(held_out)), key=lambda i: longest[i])
    shares = [run / max(1, length) for run, length in zip(longest, lengths, strict=True)]
    met = tuple(question for question in held_out if normal(question) in whole)
    return Overlap(longest[best], runs[best], met, sum(shares) / len(shares), len(held_out))


def without(score: Score, left_out: Iterable[str], asked: Iterable[str]) -> Score:
    """The score of the set `asked` less the questions `left_out`."""
    wrong = [row for row in score.wrong if row[1] not in set(left_out)]
    total = sum(question not in set(left_out) for question in asked)
    return Score(total - len(wrong), total, wrong)


def _extend(words: list[str], grams: Mapping[tuple[str, ...], set[int]], longest: list[int], runs: list[str]) -> None:
    """Takes the runs of one training question into account."""
    for begin in range(len(words)):
        for end in range(begin + 1, len(words) + 1):
            run = tuple(words[begin:end])
            if run not in grams:
                break
            for number in grams[run]:
                if end - begin > longest[number]:
                    longest[number], runs[number] = end - begin, " ".join(run)
