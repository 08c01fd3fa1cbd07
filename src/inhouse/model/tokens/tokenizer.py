"""The tokenizer that the rest of the house sees: text to ids, ids to text, bytes of a token.

Knows ids, bytes and which ids are special. Does not know files (`load`), chat templates (`chat`) or streams
(`detokenize`). Every instance is immutable and may be used from any thread.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from typing import Final

from inhouse.core.errors import UnsupportedError, UsageError
from inhouse.model.tokens.library import Codec
from inhouse.model.tokens.pieces import PieceRule

PIECE_CACHE: Final = 65_536
"""Tokens whose bytes are kept after the first look; about 100 bytes each."""


@dataclass(frozen=True, slots=True)
class Pair:
    """How two texts stand in one input: prefix, first, middle, second, suffix; each of the five with its token type."""

    prefix: tuple[int, ...]
    middle: tuple[int, ...]
    suffix: tuple[int, ...]
    types: tuple[int, int, int, int, int]


def bert_pair(prefix: tuple[int, ...], suffix: tuple[int, ...]) -> Pair | None:
    """[CLS] first [SEP] second [SEP], the second text of type 1; None without a separator."""
    return Pair(prefix, suffix, suffix, (0, 0, 0, 1, 1)) if suffix else None


@dataclass(frozen=True, slots=True)
class Specials:
    """What the files say about the special tokens.

    prefix, suffix: ids put before and after a text by `encode(add_special=True)`.
    pair: how two texts are put together; None where the files do not say.
    names: `bos_token`, `eos_token` ... as chat templates see them.
    templates: chat templates by name; the one used by default is `default`.
    """

    bos_id: int | None = None
    eos_ids: frozenset[int] = frozenset()
    prefix: tuple[int, ...] = ()
    suffix: tuple[int, ...] = ()
    names: Mapping[str, str | list[str]] = field(default_factory=dict)
    templates: Mapping[str, str] = field(default_factory=dict)
    pair: Pair | None = None


class Tokenizer:
    """One vocabulary with its rules.

    Args:
        codec: text to ids, ids to token strings.
        rule: token strings to bytes.
        specials: BOS, EOS, affixes, chat templates.
    """

    def __init__(self, codec: Codec, rule: PieceRule, specials: Specials) -> None:
        self.codec = codec
        self.rule = rule
        self.specials = specials
        self._piece = lru_cache(maxsize=PIECE_CACHE)(self._make_piece)

    @property
    def vocab_size(self) -> int:
        """One more than the highest id that has a token; the model's matrix may be taller (padding rows)."""
        return self.codec.size

    @property
    def bos_id(self) -> int | None:
        return self.specials.bos_id

    @property
    def eos_ids(self) -> frozenset[int]:
        """Ids that end a turn or a text; may be empty."""
        return self.specials.eos_ids

    @property
    def add_bos(self) -> bool:
        """Whether `encode(add_special=True)` begins with BOS."""
        return self.bos_id is not None and self.specials.prefix[:1] == (self.bos_id,)

    @cached_property
    def special_ids(self) -> frozenset[int]:
        """Control tokens: never text of the user's, left out by `decode(skip_special=True)`."""
        marked = {i for i, special in self.codec.added.items() if special}
        return frozenset(marked | self.eos_ids | ({self.bos_id} if self.bos_id is not None else set()))

    @property
    def chat_template(self) -> str | None:
        """The default chat template, None where the model brings none."""
        return self.specials.templates.get("default")

    @property
    def chat_templates(self) -> Mapping[str, str]:
        """All chat templates by name (`default`, `tool_use`, `rag` ...)."""
        return self.specials.templates

    @property
    def special_tokens(self) -> Mapping[str, str | list[str]]:
        """`bos_token`, `eos_token`, ... for chat templates."""
        return self.specials.names

    def encode(self, text: str, add_special: bool = True, parse_special: bool = True) -> list[int]:
        """The ids of a text.

        Args:
            text: any Unicode text without lone surrogates.
            add_special: put BOS, EOS ([CLS], [SEP]) where the model expects them.
            parse_special: read `<|im_end|>` and its like as the special token; False for text of users, which
                then never becomes a special token.

        Raises:
            UsageError: the text holds lone surrogates.
            FormatError: the tokenizer's own files make the library fail on this text.
        """
        ids = self._encode(text, parse_special)
        return [*self.specials.prefix, *ids, *self.specials.suffix] if add_special else ids

    def encode_pair(
        self, first: str, second: str, most: int | None = None, parse_special: bool = True
    ) -> tuple[list[int], list[int]]:
        """Two texts as one input: its ids, and the token type of each.

        Args:
            most: ids at most; the longer text loses its end, one id after the other, until both fit.

        Raises:
            UnsupportedError: the tokenizer's files do not say how two texts stand together.
            UsageError: as `encode`; `most` leaves no room.
        """
        pair = self.specials.pair
        if pair is None:
            raise UnsupportedError("this model's tokenizer does not say how two texts stand together")
        texts = [self._encode(first, parse_special), self._encode(second, parse_special)]
        if most is not None:
            around = len(pair.prefix) + len(pair.middle) + len(pair.suffix)
            texts = shorten_pair(texts[0], texts[1], most - around)
        parts = (pair.prefix, texts[0], pair.middle, texts[1], pair.suffix)
        ids = [i for part in parts for i in part]
        return ids, [kind for part, kind in zip(parts, pair.types, strict=True) for _ in part]

    def _encode(self, text: str, parse_special: bool) -> list[int]:
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise UsageError(f"the text is not valid Unicode: {error.reason} at character {error.start}") from error
        return self.codec.encode(text, parse_special)

    def decode(self, ids: Iterable[int], skip_special: bool = True) -> str:
        """The text of ids: bytes joined, invalid UTF-8 as U+FFFD; ids without a token give nothing."""
        return self.decode_bytes(ids, skip_special).decode("utf-8", "replace")

    def decode_bytes(self, ids: Iterable[int], skip_special: bool = True) -> bytes:
        """The bytes of ids; the first visible token loses the leading space that its encoder put there."""
        skipped = self.special_ids if skip_special else frozenset()
        data = b"".join(self.token_bytes(i) for i in ids if i not in skipped)
        return data[1:] if self.rule.strip_first and data[:1] == b" " else data

    def token_bytes(self, token_id: int) -> bytes:
        """The exact bytes of one token, leading space included; empty for an id without a token.

        Raises:
            UsageError: the id is negative.
        """
        return self._piece(token_id)

    def id_of(self, token: str) -> int | None:
        """The id of a token's string as the vocabulary writes it (`Ġthe`, `▁the`, `<s>`), None if there is none."""
        return self.codec.id_of(token)

    def token_of(self, token_id: int) -> str | None:
        """The vocabulary's string of an id, None if there is none."""
        return self.codec.token_of(token_id)

    def _make_piece(self, token_id: int) -> bytes:
        if token_id < 0:
            raise UsageError(f"token id {token_id} is negative", param="ids")
        token = self.codec.token_of(token_id)
        return b"" if token is None else self.rule.piece(token, token_id in self.codec.added)


def shorten_pair(first: list[int], second: list[int], room: int) -> list[list[int]]:
    """Both texts within `room` ids, ends cut off: the longer one down to the shorter's length, then both to half of
    the room, whose odd id the longer keeps (of equal ones the second; `longest_first` of the tokenizers library).

    Raises UsageError if there is no room at all."""
    if room < 0:
        raise UsageError(f"there is no room for two texts: {-room} ids too many before a word is written")
    shorter, longer = sorted((len(first), len(second)))
    if shorter + longer > room:
        longer = max(shorter, room - shorter)
    if shorter + longer > room:
        shorter, longer = room // 2, room - room // 2
    second_longer = len(second) >= len(first)
    return [first[: shorter if second_longer else longer], second[: longer if second_longer else shorter]]
