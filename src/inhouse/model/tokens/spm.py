"""SentencePiece models (tokenizer.model, *.spm, and the same vocabularies inside GGUF) as library tokenizers.

Knows ModelProto's fields, piece types, and how BPE by scores and Unigram are expressed by the library. Does not know
folders or GGUF keys. Format: github.com/google/sentencepiece, sentencepiece_model.proto.
"""

import base64
import json
import math
import re
from dataclasses import dataclass, field, replace
from enum import IntEnum
from typing import Any, Final

import tokenizers

from inhouse.core.errors import FormatError, UnsupportedError
from inhouse.model.tokens.checks import MAX_ID
from inhouse.model.tokens.library import guarded, settled
from inhouse.model.tokens.merges import merges_of_ranks
from inhouse.model.tokens.pieces import SPACE, PieceRule
from inhouse.model.tokens.protobuf import Value, fields, float32, int32


class PieceType(IntEnum):
    """ModelProto.SentencePiece.Type; GGUF's `tokenizer.ggml.token_type` uses the same numbers."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


@dataclass(frozen=True, slots=True)
class Piece:
    text: str
    score: float
    kind: PieceType


@dataclass(frozen=True, slots=True)
class Spm:
    """A SentencePiece model as a value.

    model: `bpe` or `unigram`. dummy_prefix: a space is put before the text. charsmap: precompiled normalisation rules.
    trim: leading, trailing and doubled spaces go. Ids -1 mean absent.
    """

    pieces: tuple[Piece, ...]
    model: str = "unigram"
    byte_fallback: bool = False
    dummy_prefix: bool = True
    trim: bool = True
    charsmap: bytes = b""
    unk_id: int = 0
    bos_id: int = 1
    eos_id: int = 2
    pad_id: int = -1
    strip_after: frozenset[int] = field(default_factory=frozenset)
    """Special tokens that swallow the white space after them (GGUF of Phi-3)."""

    def ids(self, kind: PieceType) -> list[int]:
        return [i for i, piece in enumerate(self.pieces) if piece.kind == kind]


_MODELS: Final = {1: "unigram", 2: "bpe"}


def read_model(data: bytes) -> Spm:
    """Parses a ModelProto.

    Raises:
        FormatError: truncated or damaged.
        UnsupportedError: word or char models, or a normaliser option that we do not express.
    """
    pieces: list[Piece] = []
    trainer: dict[int, Value] = {}
    normaliser: dict[int, Value] = {}
    for number, wire, value in fields(data, "the SentencePiece model"):
        match number, value:
            case 1, bytes(body) if wire == 2:
                pieces.append(_piece(body, len(pieces)))
            case 2, bytes(body) if wire == 2:
                trainer = {n: v for n, _, v in fields(body, "its trainer_spec")}
            case 3, bytes(body) if wire == 2:
                normaliser = {n: v for n, _, v in fields(body, "its normalizer_spec")}
    if not pieces:
        raise FormatError("the SentencePiece model has no pieces")
    kind = _number(trainer, 3, 1)
    if kind not in _MODELS:
        raise UnsupportedError(f"SentencePiece model type {kind} is not supported", remedy="BPE and Unigram are.")
    if _number(trainer, 24, 0):
        raise UnsupportedError("SentencePiece models with white space as suffix are not supported")
    if not _number(normaliser, 5, 1):
        raise UnsupportedError("SentencePiece models that keep spaces unescaped are not supported")
    charsmap = normaliser.get(2, b"")
    return Spm(
        tuple(pieces),
        model=_MODELS[kind],
        byte_fallback=bool(_number(trainer, 35, 0)),
        dummy_prefix=bool(_number(normaliser, 3, 1)),
        trim=bool(_number(normaliser, 4, 1)),
        charsmap=charsmap if isinstance(charsmap, bytes) else b"",
        unk_id=_unknown_id(pieces),
        bos_id=_id(trainer, 41, 1, len(pieces)),
        eos_id=_id(trainer, 42, 2, len(pieces)),
        pad_id=_id(trainer, 43, -1, len(pieces)),
    )


def _piece(body: bytes, number: int) -> Piece:
    text, score, kind = "", 0.0, 1
    for n, wire, value in fields(body, f"piece {number}"):
        match n, wire, value:
            case 1, 2, bytes(raw):
                try:
                    text = raw.decode()
                except UnicodeDecodeError as error:
                    raise FormatError(f"piece {number} of the SentencePiece model is not UTF-8") from error
            case 2, 5, int(bits):
                score = float32(bits)
            case 3, 0, int(word):
                kind = word
    if kind not in set(PieceType) or not math.isfinite(score) or not text:
        raise FormatError(
            f"piece {number} of the SentencePiece model has type {kind}, score {score}, text {text[:40]!r}"
        )
    return Piece(text, score, PieceType(kind))


def _number(message: dict[int, Value], number: int, default: int) -> int:
    value = message.get(number, default)
    return int32(value) if isinstance(value, int) else default


def _id(message: dict[int, Value], number: int, default: int, size: int) -> int:
    value = _number(message, number, default)
    return value if 0 <= value < size else -1


def _unknown_id(pieces: list[Piece]) -> int:
    found = [i for i, piece in enumerate(pieces) if piece.kind == PieceType.UNKNOWN]
    return found[0] if found else -1


def rule_of(model: Spm) -> PieceRule:
    """How its pieces become text."""
    return PieceRule("sentencepiece", strip_first=model.dummy_prefix, byte_tokens=model.byte_fallback)


def build(model: Spm) -> tokenizers.Tokenizer:
    """The library tokenizer that gives SentencePiece's ids; control pieces are its special tokens.

    Raises:
        FormatError: a piece stands twice, byte pieces are missing.
    """
    _check(model)
    content = {
        "version": "1.0",
        "added_tokens": _added(model),
        "normalizer": _normalizer(model),
        "model": _bpe(model) if model.model == "bpe" else _unigram(model),
    }
    with guarded("the SentencePiece vocabulary was refused"):
        return settled(tokenizers.Tokenizer.from_str(json.dumps(content, ensure_ascii=False)))


def _check(model: Spm) -> None:
    if len(model.pieces) >= MAX_ID:
        raise FormatError(f"the vocabulary has {len(model.pieces)} entries, the limit is {MAX_ID}")
    seen: dict[str, int] = {}
    for number, piece in enumerate(model.pieces):
        if seen.setdefault(piece.text, number) != number:
            raise FormatError(f"piece {piece.text[:60]!r} has the ids {seen[piece.text]} and {number}")
    if model.byte_fallback:
        missing = [byte for byte in range(256) if f"<0x{byte:02X}>" not in seen]
        if missing:
            raise FormatError(f"the vocabulary falls back to bytes and lacks {len(missing)} of the 256 byte pieces")
    if model.unk_id < 0 and not model.byte_fallback:
        raise FormatError("the vocabulary has neither an unknown piece nor byte pieces")


def _bpe(model: Spm) -> dict[str, Any]:
    """BPE by scores: merges in the order of their scores, control and byte pieces out of reach."""
    joined = {piece.text: -piece.score for piece in model.pieces if piece.kind == PieceType.NORMAL}
    return {
        "type": "BPE",
        "vocab": {piece.text: number for number, piece in enumerate(model.pieces)},
        "merges": merges_of_ranks(joined, joined),
        "unk_token": model.pieces[model.unk_id].text if model.unk_id >= 0 else None,
        "fuse_unk": True,
        "byte_fallback": model.byte_fallback,
    }


def _unigram(model: Spm) -> dict[str, Any]:
    return {
        "type": "Unigram",
        "vocab": [[piece.text, piece.score] for piece in model.pieces],
        "unk_id": model.unk_id if model.unk_id >= 0 else None,
        "byte_fallback": model.byte_fallback,
    }


def _added(model: Spm) -> list[dict[str, Any]]:
    return [
        {
            "id": number,
            "content": piece.text,
            "special": piece.kind != PieceType.USER_DEFINED,
            # User-defined pieces are looked for in the normalised text, as SentencePiece does.
            "normalized": piece.kind == PieceType.USER_DEFINED,
            "single_word": False,
            "lstrip": False,
            "rstrip": number in model.strip_after,
        }
        for number, piece in enumerate(model.pieces)
        if piece.kind in (PieceType.CONTROL, PieceType.UNKNOWN, PieceType.USER_DEFINED)
    ]


def _normalizer(model: Spm) -> dict[str, Any] | None:
    steps: list[dict[str, Any]] = []
    if model.charsmap:
        charsmap = base64.b64encode(model.charsmap).decode()
        steps.append({"type": "Precompiled", "precompiled_charsmap": charsmap})
    if model.trim:
        # Only U+0020: SentencePiece has turned the other spaces into it through its rules, or keeps them.
        for pattern, content in ((r"\A +| +\z", ""), (r" {2,}", " ")):
            steps.append({"type": "Replace", "pattern": {"Regex": pattern}, "content": content})
    if model.dummy_prefix:
        steps.append(_prefix(model))
    steps.append({"type": "Replace", "pattern": {"String": " "}, "content": SPACE})
    return {"type": "Sequence", "normalizers": steps}


def _prefix(model: Spm) -> dict[str, Any]:
    """The space before the text.

    The library normalises user-defined pieces too before it looks for them; the pattern leaves a text alone that is
    exactly such a piece. (A user's text that is one user-defined piece and nothing else thus loses its leading space.)
    """
    user = [re.escape(model.pieces[i].text) for i in model.ids(PieceType.USER_DEFINED)]
    if not user:
        return {"type": "Prepend", "prepend": SPACE}
    pattern = rf"\A(?!(?:{'|'.join(user)})\z)(?=[\s\S])"
    return {"type": "Replace", "pattern": {"Regex": pattern}, "content": SPACE}


def with_types(model: Spm, kinds: dict[int, PieceType]) -> Spm:
    """The same model with other types for some pieces."""
    pieces = [replace(piece, kind=kinds.get(i, piece.kind)) for i, piece in enumerate(model.pieces)]
    return replace(model, pieces=tuple(pieces))
