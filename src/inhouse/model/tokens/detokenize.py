"""Text out of a stream of ids, and stop strings inside a stream of text.

Knows bytes, UTF-8 and what was given out already. Does not know vocabularies or requests. One instance serves one
stream; none is thread-safe.
"""

import codecs
from collections.abc import Iterable, Sequence

from inhouse.core.errors import UsageError
from inhouse.model.tokens.tokenizer import Tokenizer


class Detokenizer:
    """Turns ids into text step by step.

    The pieces joined, `flush` included, equal `tokenizer.decode(prompt + ids)` without `tokenizer.decode(prompt)`,
    wherever the stream is cut. A piece never ends inside a character, and nothing given out changes later.

    Args:
        tokenizer: gives each token's bytes.
        skip_special: leave out special tokens.
        prompt: ids before the stream. The leading space that SentencePiece puts before a text is dropped once, before
            its first visible token: from the stream only where the prompt shows nothing.
    """

    def __init__(self, tokenizer: Tokenizer, skip_special: bool = True, prompt: Iterable[int] = ()) -> None:
        self._tokenizer = tokenizer
        self._skipped = tokenizer.special_ids if skip_special else frozenset()
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        shown = any(i not in self._skipped and tokenizer.token_bytes(i) for i in prompt)
        self._at_start = tokenizer.rule.strip_first and not shown

    def push(self, ids: Iterable[int]) -> str:
        """The text that the ids complete; empty while a character is unfinished."""
        token_bytes, skipped = self._tokenizer.token_bytes, self._skipped
        data = b"".join([token_bytes(i) for i in ids if i not in skipped])
        if data and self._at_start:
            self._at_start = False
            data = data.removeprefix(b" ")
        return self._utf8.decode(data)

    def flush(self) -> str:
        """What is left at the end: U+FFFD for an unfinished character, else nothing."""
        return self._utf8.decode(b"", final=True)


class StopStrings:
    """Finds the first stop string in a stream of text and holds back what might become one.

    The stop string that is complete first wins (of two that end together, the longer); the text before it is given out,
    no part of it ever is. The outcome does not depend on how the stream is cut.

    Args:
        stops: the strings; none may be empty.

    Raises:
        UsageError: an empty stop string.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        if not all(stops):
            raise UsageError("a stop string is empty", param="stop")
        self._stops = tuple(dict.fromkeys(stops))
        self._longest = max(map(len, self._stops), default=0)
        self._held = ""
        self._which: str | None = None

    def push(self, text: str) -> tuple[str, bool, str | None]:
        """Adds text.

        Returns:
            (what may be shown now, whether a stop string was found, which one). After a stop nothing more is shown.
        """
        if self._which is not None:
            return "", True, self._which
        text = self._held + text
        found = [(at + len(stop), at, stop) for stop in self._stops if (at := text.find(stop)) >= 0]
        if found:
            _, at, self._which = min(found)
            self._held = ""
            return text[:at], True, self._which
        keep = self._possible_prefix(text)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep], False, None

    def flush(self) -> str:
        """What was held back, at the end of a stream that no stop string ended."""
        text, self._held = self._held, ""
        return text

    def _possible_prefix(self, text: str) -> int:
        """Length of the longest end of the text that begins a stop string."""
        for size in range(min(self._longest - 1, len(text)), 0, -1):
            if any(stop.startswith(text[-size:]) for stop in self._stops):
                return size
        return 0
