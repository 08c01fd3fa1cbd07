"""Every kind of question the demo model is trained on, with its answer. Knows the data files, no tokens.

A question's core (the pattern's string before decoration) is held out when its checksum says so; such a core never
comes up in training, and the same-style held-out file is drawn from those cores alone.
"""

import random
import re
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from demo.grammar import Choice, Section, parse, read_sections

DATA = Path(__file__).parent / "data"
HELD_OUT_ONE_IN = 12
LANGUAGES = ("en", "zh")


@dataclass(frozen=True, slots=True)
class Fact:
    """What is taught: an answer in each language, and the key strings a right answer holds (all of any of)."""

    name: str
    answers: Mapping[str, str]
    keys: tuple[tuple[str, ...], ...]


@dataclass(frozen=True, slots=True)
class Topic:
    """Patterns that all get one fact's answer, by language."""

    fact: Fact
    patterns: Mapping[str, tuple[Choice, ...]]
    group: str  # "fact" | "decline" | "smalltalk"

    def draw(self, language: str, rng: random.Random, *, held_out: bool = False, tries: int = 50) -> str | None:
        """A core question on the asked side of the split; None if `tries` draws gave none."""
        patterns = self.patterns[language]
        weights = [min(pattern.count(), 400) ** 0.5 for pattern in patterns]
        for _ in range(tries):
            core = " ".join(rng.choices(patterns, weights)[0].sample(rng).split())
            if is_held_out(core) == held_out:
                return core
        return None


@dataclass(frozen=True, slots=True)
class Poem:
    """A poem in simplified characters."""

    title: str
    author: str
    text: str

    @property
    def answer(self) -> str:
        return f"《{self.title}》{self.author}\n{self.text}"


def normal(text: str) -> str:
    """The text without case, spaces and marks: what the split and the overlap look at."""
    return re.sub(r"[\W_]+", "", text.lower())


def is_held_out(core: str) -> bool:
    """Whether the split keeps this question out of training."""
    return zlib.crc32(normal(core).encode()) % HELD_OUT_ONE_IN == 0


def parse_keys(line: str) -> tuple[tuple[str, ...], ...]:
    """`a | b & c` -> ((a, b), (c,)): every group must be met, by any of its strings."""
    return tuple(tuple(part.strip() for part in group.split(" | ")) for group in line.split(" & "))


def load_facts() -> dict[str, Fact]:
    """facts.txt by name, in the file's order."""
    _, sections = read_sections((DATA / "facts.txt").read_text())
    return {section.name: _fact(section) for section in sections if section.name}


def _fact(section: Section, prefix: str = "") -> Fact:
    answers = {language: section.value(prefix + language) for language in LANGUAGES}
    return Fact(section.name, answers, parse_keys(section.value("key")))


def load_fact_topics() -> list[Topic]:
    """Facts with the patterns of all phrasing files."""
    facts = load_facts()
    macros: dict[str, Choice] = {}
    patterns: dict[str, dict[str, list[Choice]]] = {name: {lang: [] for lang in LANGUAGES} for name in facts}
    for path in sorted(DATA.glob("phrasings_*.txt")):
        found, sections = read_sections(path.read_text())
        macros |= found
        for section in sections:
            for language, pattern in section.lines:
                patterns[section.name][language].append(parse(pattern, macros))
    return [
        Topic(fact, {lang: tuple(patterns[name][lang]) for lang in LANGUAGES}, "fact") for name, fact in facts.items()
    ]


def load_decline_topics() -> list[Topic]:
    """Kinds of out-of-scope questions; all share one answer in each language."""
    macros, sections = read_sections((DATA / "decline.txt").read_text())
    head, kinds = sections[0], sections[1:]
    answers = {language: head.value(f"answer-{language}") for language in LANGUAGES}
    keys = parse_keys(head.value("key"))
    return [
        Topic(
            Fact(f"decline/{kind.name}", answers, keys),
            {language: tuple(parse(p, macros) for p in kind.values(language)) for language in LANGUAGES},
            "decline",
        )
        for kind in kinds
    ]


def load_smalltalk_topics() -> list[Topic]:
    """Greetings, thanks and the like."""
    macros, sections = read_sections((DATA / "smalltalk.txt").read_text())
    return [
        Topic(
            _fact(section),
            {language: tuple(parse(p, macros) for p in section.values(f"q-{language}")) for language in LANGUAGES},
            "smalltalk",
        )
        for section in sections
        if section.name
    ]


def load_poems() -> list[Poem]:
    """The stated list, in the file's order."""
    lines = (DATA / "poems.txt").read_text().splitlines()
    return [Poem(*line.split("|")) for line in lines if line and not line.startswith("#")]


def held_out_file(name: str) -> Path:
    """The file of a held-out set: same_style, independent or out_of_scope."""
    return DATA / f"heldout_{name}.tsv"


def read_tsv(path: Path) -> list[tuple[str, str]]:
    """(label, question) of each line of a held-out file."""
    rows = [line.split("\t") for line in path.read_text().splitlines() if line and not line.startswith("#")]
    return [(label, question) for label, question in rows]


POEM_PATTERNS = (
    "(背诵|背|背一下|背一遍|念|念一下|朗诵|默写|请背诵|请背|来一首|写出|吟诵|给我背|帮我背|我想听|说一下)"
    "(古诗|唐诗|)(《T》|T|A的《T》|A的T)",
    "(会背|能背|你会背|可以背|能不能背|知道)(《T》|T|A的T|A的《T》)吗",
    "(《T》|T|A的《T》|A T|T A|A《T》)(全文|原文|全诗|这首诗|怎么背|的内容是什么|的原文是什么|)",
    "(recite|please recite|can you recite|say|tell me|read me|give me|quote)"
    " (the poem |the Chinese poem |)(T|《T》|T by A)",
    "(F|“F”)(的下一句是什么|下一句|，下一句呢|后面是什么|是哪首诗|出自哪首诗|接下去|)",
)
STORY_PATTERNS = (
    "(tell me|tell|please tell me|write|write me|give me|can you tell me|could you tell me|I want to hear|"
    "I would like|make up|read me)"
    " (a story|a short story|a little story|a bedtime story|a tale|some story|a nice story|a children's story)",
    "(story|a story please|story time|another story|bedtime story|once upon a time|one more story|a story)",
    "(讲|说|给我讲|请讲|来|讲一下|我想听|再讲|能不能讲|写)(个|一个|一个英文|个小|个英文)(故事|小故事|睡前故事|童话)",
)
SYSTEM_PROMPTS = (
    "You are the Inhouse demo model.",
    "You are a helpful assistant.",
    "Answer briefly.",
    "你是一个有用的助手。",
    "You are Inhouse's assistant. Be polite.",
    "请简短回答。",
    "You answer questions about Inhouse.",
    "你是 Inhouse 的演示模型。",
)


def no_macros(patterns: Sequence[str]) -> tuple[Choice, ...]:
    """Patterns that use no macro."""
    return tuple(parse(pattern, {}) for pattern in patterns)
