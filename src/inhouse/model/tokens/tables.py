"""Byte-pair encoding from flat arrays, for the first moments of a process.

The library takes half a second (with the interpreter lock held) and 98 MiB to build a vocabulary of 150,000 entries;
these arrays are ready in 6 ms and take 8 MiB. They merge about half a million bytes a second, words seen before cost
nothing; once `PROMOTE` bytes were merged, the library would have been cheaper, so it is built and takes over. The ids
are the same: text is cut by the library's own normaliser and pre-tokenizer in both cases, only merging is done here.

Knows merges and token strings as arrays. Does not know files (`compiled`).
"""

import heapq
import json
from bisect import bisect_left
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from threading import Lock
from typing import Any, Final

import tokenizers

from inhouse.model.tokens.library import LibraryCodec, guarded, plain_twin
from inhouse.model.tokens.pieces import BYTE_TO_CHAR

PROMOTE: Final = 250_000
"""Bytes merged after which the library is built: half a second's worth, what building it costs."""

_UTF8_BYTES: Final = tuple(byte for byte in range(0xF5) if byte not in (0xC0, 0xC1))
"""The bytes that occur in UTF-8; some vocabularies lack the others."""

_WORD_CACHE: Final = 50_000
_CACHED_WORD: Final = 48


@dataclass(frozen=True, slots=True)
class Tables:
    """A BPE vocabulary as arrays; `size` tokens, `n` strings, `m` merges.

    starts: uint32[size + 1], where each token's UTF-8 begins in `text`. order: uint32[n], ids sorted by their bytes.
    pairs: uint64[m], left << 32 | right, ascending. ranks, joined: uint32[m], a pair's rank and the id it becomes.
    added: ids matched before the model, true where special. outside: added ids that the model does not know.
    """

    size: int
    text: memoryview
    starts: memoryview
    order: memoryview
    pairs: memoryview
    ranks: memoryview
    joined: memoryview
    added: Mapping[int, bool]
    outside: frozenset[int]
    whole_words: bool

    def bytes_of(self, token_id: int) -> bytes:
        return bytes(self.text[self.starts[token_id] : self.starts[token_id + 1]])

    def id_of(self, token: bytes) -> int | None:
        order = self.order
        at = bisect_left(range(len(order)), token, key=lambda i: self.bytes_of(order[i]))
        return order[at] if at < len(order) and self.bytes_of(order[at]) == token else None

    def merge_of(self, left: int, right: int) -> tuple[int, int] | None:
        """(rank, id) of two neighbours, None where they do not join."""
        pair = left << 32 | right
        at = bisect_left(self.pairs, pair)
        return (self.ranks[at], self.joined[at]) if at < len(self.pairs) and self.pairs[at] == pair else None


class TableCodec:
    """Encodes by `Tables` until the library pays. Thread-safe: the caches are dicts of pure results.

    Args:
        tables: the vocabulary.
        shell: the text of a tokenizer.json with the normaliser, pre-tokenizer and added tokens of the original, whose
            model turns each word into its bytes: byte b as the id `tables.size + b`.
        library: gives the text of the whole tokenizer.json.
    """

    def __init__(self, tables: Tables, shell: str, library: Callable[[], str]) -> None:
        self.tables = tables
        self.size = tables.size
        self.added = tables.added
        self._special = frozenset(i for i, special in tables.added.items() if special)
        with guarded("the compiled tokenizer was refused"):
            self._shell = tokenizers.Tokenizer.from_str(shell)
            self._plain_shell: tokenizers.Tokenizer | None = None
        self._library = library
        self._codec: LibraryCodec | None = None
        self._merged = 0
        self._lock = Lock()
        self._pairs: dict[int, tuple[int, int] | None] = {}
        self._chars: dict[str, tuple[int, ...]] = {}
        self._words: dict[bytes, tuple[int, ...]] = {}

    def encode(self, text: str, parse_special: bool) -> list[int]:
        if self._merged > PROMOTE or len(text) > PROMOTE:
            return self._promoted().encode(text, parse_special)
        shell = self._shell if parse_special else self._plain()
        with guarded("encoding failed"):
            encoding = shell.encode(text, add_special_tokens=False)
            return self._join_words(encoding.ids, encoding.word_ids)

    def token_of(self, token_id: int) -> str | None:
        if not 0 <= token_id < self.size:
            return None
        return self.tables.bytes_of(token_id).decode() or None

    def id_of(self, token: str) -> int | None:
        return self.tables.id_of(token.encode("utf-8", "surrogatepass")) if token else None

    def _plain(self) -> tokenizers.Tokenizer:
        with self._lock:
            if self._plain_shell is None:
                self._plain_shell = plain_twin(self._shell)
            return self._plain_shell

    def _promoted(self) -> LibraryCodec:
        with self._lock:
            if self._codec is None:
                with guarded("the compiled tokenizer was refused"):
                    self._codec = LibraryCodec(tokenizers.Tokenizer.from_str(self._library()), self.size)
            return self._codec

    def _join_words(self, ids: list[int], words: list[int | None]) -> list[int]:
        """Ids from the shell's: bytes of one word are joined, added tokens stay."""
        found: list[int] = []
        word, current, base = bytearray(), -1, self.size
        for shell_id, number in zip(ids, words, strict=True):
            if word and (shell_id < base or number != current):
                found += self._word(bytes(word))
                word.clear()
            if shell_id < base:
                found.append(shell_id)
            else:
                current = -1 if number is None else number
                word.append(shell_id - base)
        return found + list(self._word(bytes(word))) if word else found

    def _word(self, word: bytes) -> tuple[int, ...]:
        known = self._words.get(word)
        if known is None:
            known = self._encode_word(word)
            if len(word) <= _CACHED_WORD and len(self._words) < _WORD_CACHE:
                self._words[word] = known
        return known

    def _encode_word(self, word: bytes) -> tuple[int, ...]:
        self._merged += len(word)
        if self.tables.whole_words:
            whole = self.tables.id_of(word)
            if whole is not None and whole not in self.tables.outside and whole not in self._special:
                return (whole,)
        symbols = [i for char in word.decode() for i in self._char(char)]
        return tuple(self._merge(symbols)) if len(symbols) > 1 else tuple(symbols)

    def _char(self, char: str) -> tuple[int, ...]:
        """A character's id, or those of its bytes where the vocabulary lacks it."""
        known = self._chars.get(char)
        if known is None:
            whole = self.tables.id_of(char.encode())
            parts = [self.tables.id_of(b"<0x%02X>" % byte) for byte in char.encode()] if whole is None else [whole]
            known = tuple(i for i in parts if i is not None)
            self._chars[char] = known
        return known

    def _pair(self, left: int, right: int) -> tuple[int, int] | None:
        key = left << 32 | right
        if key in self._pairs:
            return self._pairs[key]
        found = self.tables.merge_of(left, right)
        if len(self._pairs) < 4 * _WORD_CACHE:
            self._pairs[key] = found
        return found

    def _merge(self, symbols: list[int]) -> list[int]:
        """Joins the best-ranked neighbours, leftmost first, until none joins. A joined right half becomes -1."""
        count = len(symbols)
        after, before = list(range(1, count + 1)), list(range(-1, count - 1))
        heap: list[tuple[int, int, int, int, int]] = []

        def offer(left: int, right: int) -> None:
            if (merge := self._pair(symbols[left], symbols[right])) is not None:
                heapq.heappush(heap, (merge[0], left, symbols[left], symbols[right], merge[1]))

        for at in range(count - 1):
            offer(at, at + 1)
        while heap:
            _, left, left_id, right_id, joined = heapq.heappop(heap)
            right = after[left]
            if symbols[left] != left_id or right >= count or symbols[right] != right_id:
                continue
            symbols[left], symbols[right] = joined, -1
            after[left] = after[right]
            if after[left] < count:
                before[after[left]] = left
                offer(left, after[left])
            if before[left] >= 0:
                offer(before[left], left)
        return [symbol for symbol in symbols if symbol >= 0]


def shell_of(content: Mapping[str, Any], size: int) -> str:
    """The tokenizer.json that cuts a text as `content` does and gives each word's bytes as `size + byte`."""
    added = content.get("added_tokens") or []
    vocab = {f"<0x{byte:02X}>": size + byte for byte in range(256)} | {t["content"]: t["id"] for t in added}
    shell = {
        "version": "1.0",
        "added_tokens": added,
        "normalizer": content.get("normalizer"),
        "pre_tokenizer": content.get("pre_tokenizer"),
        "model": {"type": "BPE", "vocab": vocab, "merges": [], "byte_fallback": True},
    }
    return json.dumps(shell, ensure_ascii=False)


def can_tabulate(content: Mapping[str, Any]) -> bool:
    """Whether the arrays give exactly the library's ids: BPE over all bytes, nothing random, no odd affixes."""
    model, added = content["model"], content.get("added_tokens") or []
    if model.get("type", "BPE") != "BPE" or "merges" not in model or model.get("dropout"):
        return False
    if model.get("continuing_subword_prefix") or model.get("end_of_word_suffix"):
        return False
    vocab = model["vocab"]
    special = {token["content"] for token in added if token["special"]}
    bytes_named = any(f"<0x{byte:02X}>" in {token["content"] for token in added} for byte in range(256))
    if bytes_named or any(len(token["content"]) == 1 for token in added):
        return False
    if any("".join(merge) in special for merge in model["merges"]):
        return False
    if model.get("byte_fallback"):
        return all(f"<0x{byte:02X}>" in vocab for byte in range(256))
    return _ends_byte_level(content.get("pre_tokenizer")) and all(BYTE_TO_CHAR[byte] in vocab for byte in _UTF8_BYTES)


def _ends_byte_level(part: Mapping[str, Any] | None) -> bool:
    if part and part.get("type") == "Sequence":
        return _ends_byte_level((part.get("pretokenizers") or [None])[-1])
    return bool(part) and part is not None and part.get("type") == "ByteLevel"
