"""From text to tokens: the tokenizer of the demo model, its chat format, and the data set. Knows no torch."""

import itertools
import random
from collections import Counter
from collections.abc import Iterable, Iterator

from tokenizers import Tokenizer

from demo.corpus import Conversation, Corpus
from demo.questions import LANGUAGES
from inhouse.core.errors import FormatError
from inhouse.train.data import Dataset, make_dataset
from inhouse.train.tokenizer import train_tokenizer

VOCABULARY = 6000
CHARACTERS = 2700
SPECIALS = ("<|end|>", "<|system|>", "<|user|>", "<|assistant|>", "<|text|>", "<|pad|>")
END = SPECIALS[0]
RAW_STORY = 0.012  # share of samples that are a bare story, for completion without the chat template
PUNCTUATION = "，。？！：；、“”‘’（）《》…—·"
# One message after another, each closed by <|end|>; no white space between, so that nothing is spent on it.
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] not in ['system', 'user', 'assistant'] %}"
    "{{ raise_exception('the demo model knows the roles system, user and assistant') }}{% endif %}"
    "{{ '<|' + message['role'] + '|>' + message['content'] + '<|end|>' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


def common_characters() -> list[str]:
    """GB 2312's level 1: the 3,755 characters in common use, by pronunciation."""
    codes = (bytes((high, low)) for high in range(0xB0, 0xD8) for low in range(0xA1, 0xFF))
    return [text for text in (code.decode("gb2312", "ignore") for code in codes) if text]


def choose_characters(needed: str, modern: str, count: int = CHARACTERS) -> list[str]:
    """`count` characters: all that the data need, then those of GB 2312 level 1 that are commonest in modern text."""
    wanted = {c for c in needed if not c.isascii()}
    frequency = Counter(modern)
    rest = sorted((c for c in common_characters() if c not in wanted), key=lambda c: -frequency[c])
    return sorted(wanted) + rest[: max(0, count - len(wanted))]


def conversation_text(conversation: Conversation) -> str:
    """All its text, a line a message."""
    lines = [conversation.system] if conversation.system else []
    for exchange in conversation.exchanges:
        lines += [exchange.question, exchange.answer]
    return "\n".join(lines)


def build_tokenizer(corpus: Corpus, modern: str, *, seed: int) -> Tokenizer:
    """The demo tokenizer, from a sample of the training text and the stories."""
    sample = [conversation_text(c) for c in itertools.islice(corpus.stream(seed), 20000)]
    answers = [topic.fact.answers[language] for topic in corpus.facts for language in LANGUAGES]
    texts = sample + 20 * answers + corpus.stories
    poems = "".join(poem.answer for poem in corpus.poems)
    characters = choose_characters("".join(texts) + poems + PUNCTUATION, modern)
    return train_tokenizer(texts, characters, VOCABULARY, SPECIALS)


def special_id(tokenizer: Tokenizer, name: str) -> int:
    """The id of a special token. Raises FormatError if the tokenizer has none of that name."""
    found = tokenizer.token_to_id(name)
    if found is None:
        raise FormatError(f"the tokenizer has no token {name}", remedy="It is not the demo model's; build it again")
    return int(found)


class Encoder:
    """Conversations as (ids, learn): an answer and the <|end|> after it are learned, all else is not."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._special = {name: special_id(tokenizer, name) for name in SPECIALS}

    def message(self, role: str, text: str) -> tuple[list[int], list[bool]]:
        ids = self._tokenizer.encode(text, add_special_tokens=False).ids
        answer = role == "assistant"
        out = [self._special[f"<|{role}|>"], *ids, self._special[END]]
        return out, [False] + [answer] * (len(ids) + 1)

    def conversation(self, conversation: Conversation) -> tuple[list[int], list[bool]]:
        ids: list[int] = []
        learn: list[bool] = []
        messages = [("system", conversation.system)] if conversation.system else []
        for exchange in conversation.exchanges:
            messages += [("user", exchange.question), ("assistant", exchange.answer)]
        for role, text in messages:
            more, marks = self.message(role, text)
            ids += more
            learn += marks
        return ids, learn

    def story(self, text: str) -> tuple[list[int], list[bool]]:
        """A bare story: every token is learned."""
        ids = [*self._tokenizer.encode(text, add_special_tokens=False).ids, self._special[END]]
        return ids, [True] * len(ids)

    def samples(self, corpus: Corpus, count: int, seed: int) -> Iterator[tuple[list[int], list[bool]]]:
        """`count` samples of the training set."""
        rng = random.Random(seed)
        for conversation in itertools.islice(corpus.stream(seed), count):
            if rng.random() < RAW_STORY:
                yield self.story(rng.choice(corpus.stories))
            else:
                yield self.conversation(conversation)


def build_dataset(encoder: Encoder, corpus: Corpus, count: int, *, seed: int, context: int) -> Dataset:
    """`count` samples that fit the context; longer ones are left out and drawn again."""
    fitting: Iterable[tuple[list[int], list[bool]]] = (
        sample for sample in encoder.samples(corpus, 2 * count, seed) if len(sample[0]) <= context
    )
    return make_dataset(itertools.islice(fitting, count))
