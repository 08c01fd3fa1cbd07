"""How the text of one token becomes bytes, for every decoder that the field uses.

Knows token strings and bytes. Does not know ids, vocabularies or streams: `tokenizer` joins pieces into text and
`detokenize` does so step by step.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final, Literal

from inhouse.core.errors import UnsupportedError

SPACE: Final = "\u2581"
"""SentencePiece writes a space as this character."""

_BYTE_TOKEN: Final = re.compile(r"<0x([0-9A-Fa-f]{2})>")

# What the WordPiece decoder of BERT tidies, token by token.
_TIDY: Final = (
    (" .", "."),
    (" ?", "?"),
    (" !", "!"),
    (" ,", ","),
    (" ' ", "'"),
    (" n't", "n't"),
    (" 'm", "'m"),
    (" do not", " don't"),
    (" 's", "'s"),
    (" 've", "'ve"),
    (" 're", "'re"),
)


def _byte_alphabet() -> dict[int, str]:
    """GPT-2's printable stand-in of each byte: itself where it is visible, else a character from U+0100 on."""
    visible = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [byte for byte in range(256) if byte not in set(visible)]
    return {byte: chr(byte) for byte in visible} | {byte: chr(256 + n) for n, byte in enumerate(hidden)}


BYTE_TO_CHAR: Final[Mapping[int, str]] = _byte_alphabet()
CHAR_TO_BYTE: Final[Mapping[str, int]] = {char: byte for byte, char in BYTE_TO_CHAR.items()}


def byte_level(data: bytes) -> str:
    """The bytes in GPT-2's alphabet, one character a byte."""
    return "".join(BYTE_TO_CHAR[byte] for byte in data)


Kind = Literal["byte_level", "sentencepiece", "wordpiece", "words"]


@dataclass(frozen=True, slots=True)
class PieceRule:
    """Turns token strings into bytes.

    kind: `byte_level` (GPT-2 alphabet), `sentencepiece` (U+2581 is a space), `wordpiece` (BERT), `words` (joined by
        spaces).
    strip_first: the first visible token of a text loses one leading space.
    byte_tokens: `<0xE4>` stands for one byte.
    prefix: what marks a continuation in WordPiece. tidy: WordPiece removes spaces before punctuation.
    """

    kind: Kind
    strip_first: bool = False
    byte_tokens: bool = False
    prefix: str = "##"
    tidy: bool = False

    def piece(self, token: str, added: bool = False) -> bytes:
        """The exact bytes of one token; `added` tokens stand outside the model's own alphabet."""
        match self.kind:
            case "byte_level":
                return token.encode() if added else _from_alphabet(token)
            case "sentencepiece":
                if self.byte_tokens and (byte := _BYTE_TOKEN.fullmatch(token)):
                    return bytes([int(byte[1], 16)])
                return token.replace(SPACE, " ").encode()
            case "wordpiece":
                return self._wordpiece(token).encode()
            case "words":
                return b" " + token.encode()

    def _wordpiece(self, token: str) -> str:
        text = token[len(self.prefix) :] if token.startswith(self.prefix) else " " + token
        if self.tidy:
            for old, new in _TIDY:
                text = text.replace(old, new)
        return text


def _from_alphabet(token: str) -> bytes:
    try:
        return bytes([CHAR_TO_BYTE[char] for char in token])
    except KeyError:
        return token.encode()


def rule_of_decoder(decoder: Mapping[str, Any] | None) -> PieceRule:
    """The rule that equals the `decoder` section of a tokenizer.json.

    Raises:
        UnsupportedError: a decoder whose text of one token depends on later tokens, or that we do not know.
    """
    if decoder is None:
        return PieceRule("words", strip_first=True)
    steps = _flatten(decoder)
    names = [str(step.get("type")) for step in steps]
    if "ByteLevel" in names and set(names) <= {"ByteLevel", "Fuse", "ByteFallback"}:
        return PieceRule("byte_level")
    if names == ["WordPiece"]:
        step = steps[0]
        return PieceRule("wordpiece", True, prefix=str(step.get("prefix", "##")), tidy=bool(step.get("cleanup", True)))
    if set(names) <= {"Replace", "ByteFallback", "Fuse", "Strip", "Metaspace"}:
        strips = [_strips_first(step) for step in steps]
        return PieceRule("sentencepiece", strip_first=any(strips), byte_tokens="ByteFallback" in names)
    raise UnsupportedError(
        f"the tokenizer's decoder {' + '.join(names)[:200]} is not supported",
        remedy="Decoders known: ByteLevel, Metaspace, WordPiece, and Replace/ByteFallback/Fuse/Strip.",
    )


def _flatten(decoder: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    if decoder.get("type") != "Sequence":
        return [decoder]
    return [step for part in decoder.get("decoders", ()) for step in _flatten(part)]


def _strips_first(step: Mapping[str, Any]) -> bool:
    """Whether a step of a SentencePiece-like decoder removes the leading space; refuses steps of another sort."""
    match step.get("type"):
        case "Replace":
            if (step.get("pattern"), step.get("content")) != ({"String": SPACE}, " "):
                raise UnsupportedError(f"the tokenizer's decoder replaces {str(step.get('pattern'))[:80]}")
            return False
        case "Strip":
            if (step.get("content"), step.get("stop")) != (" ", 0) or step.get("start") not in (0, 1):
                raise UnsupportedError(f"the tokenizer's decoder strips {str(dict(step))[:80]}")
            return bool(step.get("start"))
        case "Metaspace":
            if step.get("replacement") != SPACE:
                raise UnsupportedError(f"the tokenizer's Metaspace is {str(step.get('replacement'))[:20]!r}")
            scheme = step.get("prepend_scheme", "always" if step.get("add_prefix_space", True) else "never")
            return bool(scheme != "never")
        case _:
            return False
