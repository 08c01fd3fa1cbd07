"""The `tokenizers` library behind one door: every failure of it, panics too, becomes an error of ours.

Knows the library's objects. Does not know files, decoding to text (`pieces`) or what the special tokens mean.
"""

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from threading import Lock
from typing import Any, Final, Protocol

import tokenizers

from inhouse.core.errors import FormatError, InhouseError, UnsupportedError

LONG_TEXT: Final = 4096
"""Characters from which on a text is encoded with the interpreter lock released (costs 50 us a call)."""


class Codec(Protocol):
    """Text to ids and ids to token strings: the library, or our compiled tables."""

    @property
    def size(self) -> int:
        """One more than the highest id."""

    @property
    def added(self) -> Mapping[int, bool]:
        """Ids of the tokens that are matched in the text before the model sees it; true where special."""

    def encode(self, text: str, parse_special: bool) -> list[int]:
        """Ids of the text without BOS and EOS."""

    def token_of(self, token_id: int) -> str | None: ...

    def id_of(self, token: str) -> int | None: ...


@contextmanager
def guarded(what: str) -> Iterator[None]:
    """Turns whatever the library raises, its panics (a BaseException) included, into a FormatError."""
    try:
        yield
    except (InhouseError, KeyboardInterrupt, SystemExit, GeneratorExit, MemoryError):
        raise
    except BaseException as error:
        cause = " ".join(str(error).split())[:300] or type(error).__name__
        raise FormatError(f"{what}: {cause}", remedy="The tokenizer files are damaged; fetch them again.") from error


def parse(text: str) -> tokenizers.Tokenizer:
    """A library tokenizer from the text of a tokenizer.json.

    Truncation and padding are switched off: the engine decides about lengths, and a hostile file could
    otherwise ask for terabytes of padding.
    """
    with guarded("tokenizer.json was refused"):
        tokenizer = tokenizers.Tokenizer.from_str(text)
        return settled(tokenizer)


def settled(tokenizer: tokenizers.Tokenizer) -> tokenizers.Tokenizer:
    """The same tokenizer without truncation, padding or hidden switches."""
    tokenizer.no_truncation()
    tokenizer.no_padding()
    tokenizer.encode_special_tokens = False
    return tokenizer


class LibraryCodec:
    """The library's tokenizer. Thread-safe: nothing is changed after it was built.

    Args:
        library: the tokenizer.
        size: one more than its highest id, where the caller knows it; else the whole vocabulary is looked through.
    """

    def __init__(self, library: tokenizers.Tokenizer, size: int | None = None) -> None:
        self.library = library
        self._plain: tokenizers.Tokenizer | None = None
        self._lock = Lock()
        with guarded("reading the vocabulary"):
            decoder = library.get_added_tokens_decoder()
            self.added: Mapping[int, bool] = {i: token.special for i, token in decoder.items()}
            ids = library.get_vocab(True).values() if size is None else [size - 1, *decoder]
            self.size: int = max(ids, default=-1) + 1

    def encode(self, text: str, parse_special: bool) -> list[int]:
        tokenizer = self.library if parse_special else self._without_special()
        with guarded("encoding failed"):
            if len(text) < LONG_TEXT:
                return list(tokenizer.encode(text, add_special_tokens=False).ids)
            return list(tokenizer.encode_batch_fast([text], add_special_tokens=False)[0].ids)

    def token_of(self, token_id: int) -> str | None:
        if not 0 <= token_id < self.size:
            return None
        token: str | None = self.library.id_to_token(token_id)
        return token

    def id_of(self, token: str) -> int | None:
        with guarded("looking up a token"):
            token_id: int | None = self.library.token_to_id(token)
            return token_id

    def _without_special(self) -> tokenizers.Tokenizer:
        with self._lock:
            if self._plain is None:
                with guarded("building the encoder of plain text"):
                    self._plain = plain_twin(self.library)
            return self._plain


def plain_twin(full: tokenizers.Tokenizer) -> tokenizers.Tokenizer:
    """A tokenizer that never yields a special token, whatever the text holds; it shares the model where it can."""
    twin = tokenizers.Tokenizer(full.model)
    if full.normalizer is not None:
        twin.normalizer = full.normalizer
    if full.pre_tokenizer is not None:
        twin.pre_tokenizer = full.pre_tokenizer
    added = full.get_added_tokens_decoder()
    for token_id in sorted(added):
        _add(twin, added[token_id])
    twin.encode_special_tokens = True
    special = {i: token.content for i, token in added.items() if token.special}
    moved = any(twin.token_to_id(token.content) != i for i, token in added.items())
    reached = any(i in twin.encode(text, add_special_tokens=False).ids for i, text in special.items())
    return _cleaned(full, special) if moved or reached else settled_plain(twin)


def settled_plain(twin: tokenizers.Tokenizer) -> tokenizers.Tokenizer:
    twin.no_truncation()
    twin.no_padding()
    return twin


def _add(tokenizer: tokenizers.Tokenizer, token: tokenizers.AddedToken) -> None:
    if token.special:
        tokenizer.add_special_tokens([token])
    else:
        tokenizer.add_tokens([token])


def _cleaned(full: tokenizers.Tokenizer, special: Mapping[int, str]) -> tokenizers.Tokenizer:
    """A tokenizer whose model itself cannot form a special token (Unigram and WordPiece match whole strings)."""
    data: dict[str, Any] = json.loads(full.to_str())
    kept = [token for token in data["added_tokens"] if not token["special"]]
    model, names = data["model"], set(special.values())
    if isinstance(model.get("merges"), list):
        model["merges"] = [merge for merge in model["merges"] if "".join(merge) not in names]
    # A name that no text can hold on purpose: it is drawn anew each time.
    hidden = {name: f"{os.urandom(16).hex()}-{token_id}" for token_id, name in special.items()}
    unknown = model.get("unk_token")
    if isinstance(model["vocab"], list):
        model["vocab"] = [[hidden.get(piece, piece), score] for piece, score in model["vocab"]]
    else:
        model["vocab"] = {hidden.get(t, t) if t != unknown else t: i for t, i in model["vocab"].items()}
        model["vocab"] |= {token["content"]: token["id"] for token in kept}
    data["added_tokens"], data["post_processor"] = kept, None
    twin = tokenizers.Tokenizer.from_str(json.dumps(data, ensure_ascii=False))
    for token in kept:
        if twin.token_to_id(token["content"]) != token["id"]:
            raise UnsupportedError(f"token {token['content'][:60]!r} cannot keep its id {token['id']} in plain text")
    return settled(twin)
