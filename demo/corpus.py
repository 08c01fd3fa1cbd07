"""The training set of the demo model: an endless, seeded draw of conversations. Knows no tokens and no torch."""

import gzip
import random
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from demo import noise, questions
from demo.questions import LANGUAGES, Topic

# Shares of single exchanges, by kind.
MIXTURE = {"fact": 0.58, "decline": 0.20, "poem": 0.12, "story": 0.06, "smalltalk": 0.03, "verse": 0.01}
MULTI_TURN = 0.12
SYSTEM = 0.10
STORY_CHARACTERS = (200, 850)
NOUNS = tuple(
    "dog cat bird tree ball car boat bear fish frog rabbit flower cake doll train park rain boy girl king toy mouse "
    "moon sun apple box horse duck".split()
)
ANY_POEM = (
    "背一首诗", "背首古诗", "来一首唐诗", "念首诗吧", "recite a poem", "tell me a poem", "a Chinese poem", "poem",
)  # fmt: skip
BY_AUTHOR = ("背一首{}的诗", "{}的诗", "来一首{}的古诗", "你会{}的诗吗", "念一首{}写的诗")


@dataclass(frozen=True, slots=True)
class Exchange:
    """One question and its answer."""

    question: str
    answer: str


@dataclass(frozen=True, slots=True)
class Conversation:
    """What is trained on: an optional system prompt and exchanges; the loss is on the answers only."""

    system: str
    exchanges: tuple[Exchange, ...]


def read_stories(path: Path) -> list[str]:
    """The sample's whole stories of fitting length, each one paragraph, in the file's order."""
    text = gzip.decompress(path.read_bytes()).decode()
    stories = [" ".join(story.split()) for story in text.split("<|endoftext|>")[:-1]]
    low, high = STORY_CHARACTERS
    return [s for s in stories if low <= len(s) <= high and s.isascii() and s[-1] in '.!"']


class Corpus:
    """Draws conversations. Two draws with generators of equal state are equal."""

    def __init__(self, stories: list[str]) -> None:
        self.facts = questions.load_fact_topics()
        self.decline = questions.load_decline_topics()
        self.smalltalk = questions.load_smalltalk_topics()
        self.poems = questions.load_poems()
        self.stories = stories
        self._poem_patterns = questions.no_macros(questions.POEM_PATTERNS)
        self._story_patterns = questions.no_macros(questions.STORY_PATTERNS)
        self._nouns = {s: [n for n in NOUNS if re.search(rf"\b{n}\b", s)] for s in stories}
        self._by_author: dict[str, questions.Poem] = {}
        for poem in self.poems:
            self._by_author.setdefault(poem.author, poem)

    def exchange(self, rng: random.Random) -> Exchange:
        """One exchange of a kind drawn by MIXTURE."""
        kind = rng.choices(list(MIXTURE), list(MIXTURE.values()))[0]
        topics: Mapping[str, list[Topic]] = {"fact": self.facts, "decline": self.decline, "smalltalk": self.smalltalk}
        if kind in topics:
            return self._topic(rng.choice(topics[kind]), rng)
        return {"poem": self._poem, "story": self._story, "verse": self._verse}[kind](rng)

    def _topic(self, topic: Topic, rng: random.Random) -> Exchange:
        language = rng.choice(LANGUAGES)
        core = topic.draw(language, rng)
        if core is None:
            raise ValueError(f"no training phrasing for {topic.fact.name} in {language}")
        question = noise.decorate(core, language, rng, about=topic.group == "fact")
        return Exchange(question, topic.fact.answers[language])

    def _poem(self, rng: random.Random) -> Exchange:
        poem = rng.choice(self.poems)
        core = self.poem_question(poem, rng)
        return Exchange(noise.decorate(core, "en" if core[0].isascii() else "zh", rng), poem.answer)

    def poem_question(self, poem: questions.Poem, rng: random.Random, *, held_out: bool = False) -> str:
        """A way to ask for this poem, on the asked side of the split."""
        first = re.split("[，。？]", poem.text)[0]
        while True:
            core = rng.choices(self._poem_patterns, (4, 2, 4, 2, 1))[0].sample(rng)
            core = core.replace("T", poem.title).replace("A", poem.author).replace("F", first)
            if questions.is_held_out(core) == held_out:
                return core

    def _story(self, rng: random.Random) -> Exchange:
        story = rng.choice(self.stories)
        core = rng.choice(self._story_patterns).sample(rng)
        nouns = self._nouns[story]
        if nouns and rng.random() < 0.5 and core[0].isascii() and core.endswith(("story", "tale")):
            core += rng.choice((" about a ", " with a ", " about the ", " about ")) + rng.choice(nouns)
        return Exchange(noise.decorate(core, "en" if core[0].isascii() else "zh", rng), story)

    def _verse(self, rng: random.Random) -> Exchange:
        """Any poem, or one by an author: always the same, the first of the list."""
        author, poem = rng.choice(list(self._by_author.items()))
        if rng.random() < 0.5:
            return Exchange(noise.decorate(rng.choice(BY_AUTHOR).format(author), "zh", rng), poem.answer)
        core = rng.choice(ANY_POEM)
        return Exchange(noise.decorate(core, "en" if core[0].isascii() else "zh", rng), self.poems[0].answer)

    def conversation(self, rng: random.Random) -> Conversation:
        """One exchange mostly, two or three at times, a system prompt at times."""
        turns = rng.choice((2, 3)) if rng.random() < MULTI_TURN else 1
        system = rng.choice(questions.SYSTEM_PROMPTS) if rng.random() < SYSTEM else ""
        return Conversation(system, tuple(self.exchange(rng) for _ in range(turns)))

    def stream(self, seed: int) -> Iterator[Conversation]:
        """The training set, without end."""
        rng = random.Random(seed)
        while True:
            yield self.conversation(rng)
