"""Tokenizers out of a GGUF file's metadata (`tokenizer.ggml.*`).

Knows the keys, and how each of the four vocabulary models behaves in the programs that use GGUF. Does not know the file
format: any mapping will do. Keys: github.com/ggml-org/ggml, docs/gguf.md.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Final

import tokenizers

from inhouse.core.errors import FormatError, UnsupportedError
from inhouse.model.tokens import checks, spm
from inhouse.model.tokens.files import byte_level_bpe, read_merges, wordpiece
from inhouse.model.tokens.library import LibraryCodec, guarded
from inhouse.model.tokens.patterns import PreTokenizer, pre_tokenizer
from inhouse.model.tokens.pieces import SPACE, PieceRule
from inhouse.model.tokens.spm import Piece, PieceType, Spm
from inhouse.model.tokens.tokenizer import Specials, bert_pair

KEY: Final = "tokenizer.ggml."

_ENDS: Final = frozenset(
    "<|eot_id|> <|im_end|> <|end|> <end_of_turn> <|endoftext|> <|eom_id|> <|end_of_text|> <EOT> _<EOT> [EOT] [EOS] "
    "<eos> <turn|> <|return|> <|call|> <|calls|> <|flush|> <end_of_utterance> </s>".split()
)
"""Special tokens that end a turn by their name: GGUF files rarely list all of them."""

_NAMES: Final = {
    "bos_token": ("bos_token_id",),
    "eos_token": ("eos_token_id",),
    "unk_token": ("unknown_token_id",),
    "pad_token": ("padding_token_id",),
    "sep_token": ("seperator_token_id", "separator_token_id"),
    "cls_token": ("cls_token_id",),
    "mask_token": ("mask_token_id",),
    "eot_token": ("eot_token_id",),
    "eom_token": ("eom_token_id",),
}


class Vocabulary:
    """Checked access to the keys."""

    def __init__(self, metadata: Mapping[str, Any]) -> None:
        self._metadata = metadata
        self.model = self.text("model", "")
        self.tokens: list[str] = self._tokens()
        self.types = self._types()
        self.position = {token: number for number, token in enumerate(self.tokens)}

    def raw(self, name: str) -> Any:
        return self._metadata.get(KEY + name)

    def metadata_items(self) -> Iterable[tuple[str, Any]]:
        return self._metadata.items()

    def text(self, name: str, default: str) -> str:
        value = self.raw(name)
        if value is not None and not isinstance(value, str):
            raise FormatError(f"{KEY}{name} is a {type(value).__name__}, a string was expected")
        return default if value is None else value

    def flag(self, name: str, default: bool) -> bool:
        value = self.raw(name)
        if value is not None and str(value) not in ("True", "False", "0", "1"):
            raise FormatError(f"{KEY}{name} is {str(value)[:40]}, true or false was expected")
        return default if value is None else bool(value)

    def number(self, *names: str) -> int | None:
        """The id under the first of the names that is there; FormatError where the vocabulary has no such id."""
        for name in names:
            if (value := self.raw(name)) is not None:
                if isinstance(value, bool) or not hasattr(value, "__index__") or not 0 <= int(value) < len(self.tokens):
                    raise FormatError(f"{KEY}{name} is {str(value)[:40]}, the vocabulary has {len(self.tokens)} tokens")
                return int(value)
        return None

    def sequence(self, name: str) -> Sequence[Any] | None:
        value = self.raw(name)
        if value is None:
            return None
        if isinstance(value, str | bytes) or not hasattr(value, "__len__") or not isinstance(value, Iterable):
            raise FormatError(f"{KEY}{name} is a {type(value).__name__}, an array was expected")
        found: Sequence[Any] = value.tolist() if hasattr(value, "tolist") else list(value)
        return found

    def scores(self) -> list[float]:
        found = self.sequence("scores")
        if found is None:
            raise FormatError(f"{KEY}scores is missing")
        if len(found) != len(self.tokens):
            raise FormatError(f"{KEY}scores has {len(found)} entries, the vocabulary {len(self.tokens)}")
        if not all(isinstance(score, int | float) and math.isfinite(score) for score in found):
            raise FormatError(f"{KEY}scores holds something else than finite numbers")
        return [float(score) for score in found]

    def _tokens(self) -> list[str]:
        found = self.sequence("tokens")
        if not found:
            raise FormatError(f"{KEY}tokens is missing or empty")
        if len(found) >= checks.MAX_ID:
            raise FormatError(f"{KEY}tokens has {len(found)} entries, the limit is {checks.MAX_ID - 1}")
        tokens: list[str] = []
        for number, entry in enumerate(found):
            token = checks.text_of(entry, f"token {number}") if isinstance(entry, bytes) else entry
            if not isinstance(token, str):
                raise FormatError(f"token {number} is a {type(entry).__name__}, a string was expected")
            tokens.append(token or f"[EMPTY_{number}]")
        if len(set(tokens)) != len(tokens):
            seen: dict[str, int] = {}
            for number, token in enumerate(tokens):
                if seen.setdefault(token, number) != number:
                    raise FormatError(f"token {token[:60]!r} has the ids {seen[token]} and {number}")
        return tokens

    def _types(self) -> list[PieceType]:
        found = self.sequence("token_type")
        if found is None:
            return [PieceType.NORMAL] * len(self.tokens)
        if len(found) != len(self.tokens):
            raise FormatError(f"{KEY}token_type has {len(found)} entries, the vocabulary {len(self.tokens)}")
        kinds = {int(kind): kind for kind in PieceType} | {0: PieceType.UNUSED}
        unknown = [value for value in found if not isinstance(value, int) or value not in kinds]
        if unknown:
            raise FormatError(f"{KEY}token_type holds {str(unknown[0])[:40]}, 0 to 6 are defined")
        return [kinds[value] for value in found]


def build(metadata: Mapping[str, Any]) -> tuple[LibraryCodec, PieceRule, Specials]:
    """The codec, decoding rule and special tokens of a GGUF file.

    Raises:
        FormatError: a key is missing, of the wrong type, or contradicts another.
        UnsupportedError: a vocabulary model or pre-tokenizer that we do not know.
    """
    vocab = Vocabulary(metadata)
    match vocab.model:
        case "llama":
            return _spm(vocab, metadata)
        case "gpt2":
            return _bpe(vocab)
        case "bert":
            return _wordpiece(vocab)
        case "t5":
            return _unigram(vocab)
        case "":
            raise FormatError(f"{KEY}model is missing: the file holds no tokenizer")
        case other:
            raise UnsupportedError(
                f"the GGUF vocabulary model {other[:60]!r} is not supported", remedy="Known: llama, gpt2, bert, t5."
            )


def _spm(vocab: Vocabulary, metadata: Mapping[str, Any]) -> tuple[LibraryCodec, PieceRule, Specials]:
    """SentencePiece BPE. Control tokens are matched in the raw text; each text after one gets a space of its own."""
    model = Spm(
        _pieces(vocab),
        model="bpe",
        byte_fallback=PieceType.BYTE in vocab.types or "<0x00>" in vocab.position,
        dummy_prefix=vocab.flag("add_space_prefix", True),
        trim=False,
        unk_id=_or_absent(vocab.number("unknown_token_id")),
        strip_after=_swallowers(vocab, metadata),
    )
    if vocab.raw("token_type") is None:
        ids = (vocab.number("bos_token_id"), vocab.number("eos_token_id"), vocab.number("unknown_token_id"))
        model = spm.with_types(model, {i: PieceType.CONTROL for i in ids if i is not None})
    tokenizer = spm.build(model)
    bos, eos = vocab.number("bos_token_id"), vocab.number("eos_token_id")
    prefix = (bos,) if vocab.flag("add_bos_token", True) and bos is not None else ()
    suffix = (eos,) if vocab.flag("add_eos_token", False) and eos is not None else ()
    return LibraryCodec(tokenizer, len(vocab.tokens)), spm.rule_of(model), _specials(vocab, prefix, suffix)


def _unigram(vocab: Vocabulary) -> tuple[LibraryCodec, PieceRule, Specials]:
    charsmap = vocab.sequence("precompiled_charsmap") or ()
    model = Spm(
        _pieces(vocab),
        byte_fallback=PieceType.BYTE in vocab.types,
        dummy_prefix=vocab.flag("add_space_prefix", True),
        trim=vocab.flag("remove_extra_whitespaces", True),
        charsmap=bytes(int(byte) & 0xFF for byte in charsmap),
        unk_id=_or_absent(vocab.number("unknown_token_id")),
    )
    tokenizer = spm.build(model)
    bos, eos = vocab.number("bos_token_id"), vocab.number("eos_token_id")
    prefix = (bos,) if bos is not None and vocab.flag("add_bos_token", False) else ()
    suffix = (eos,) if eos is not None and vocab.flag("add_eos_token", True) else ()
    return LibraryCodec(tokenizer, len(vocab.tokens)), spm.rule_of(model), _specials(vocab, prefix, suffix)


def _bpe(vocab: Vocabulary) -> tuple[LibraryCodec, PieceRule, Specials]:
    row = pre_tokenizer(vocab.text("pre", "default"))
    merges = vocab.sequence("merges")
    if merges is None:
        raise FormatError(f"{KEY}merges is missing")
    if not all(isinstance(merge, str) for merge in merges):
        raise FormatError(f"{KEY}merges holds something else than strings")
    tokenizer = byte_level_bpe(vocab.position, read_merges(list(merges)), row)
    _add_marked(tokenizer, zip(vocab.tokens, vocab.types, strict=True))
    codec = LibraryCodec(tokenizer, len(vocab.tokens))
    return codec, PieceRule("byte_level"), _specials(vocab, *_bpe_affixes(vocab, row))


def _add_marked(tokenizer: tokenizers.Tokenizer, tokens: Iterable[tuple[str, PieceType]]) -> None:
    """Control and unknown tokens are special, user-defined ones are matched in every text."""
    with guarded("the special tokens were refused"):
        for token, kind in tokens:
            if kind in (PieceType.CONTROL, PieceType.UNKNOWN, PieceType.USER_DEFINED):
                added = tokenizers.AddedToken(token, special=kind != PieceType.USER_DEFINED, normalized=False)
                (tokenizer.add_special_tokens if added.special else tokenizer.add_tokens)([added])


def _bpe_affixes(vocab: Vocabulary, row: PreTokenizer) -> tuple[tuple[int, ...], tuple[int, ...]]:
    bos, eos = vocab.number("bos_token_id"), vocab.number("eos_token_id")
    separator = vocab.number("seperator_token_id", "separator_token_id")
    suffix: tuple[int, ...] = ()
    if separator is None:
        separator = eos
    if separator is not None and vocab.flag("add_sep_token", row.add_sep):
        suffix = (separator,)
    elif eos is not None and vocab.flag("add_eos_token", False):
        suffix = (eos,)
    return ((bos,) if vocab.flag("add_bos_token", row.add_bos) and bos is not None else ()), suffix


def _wordpiece(vocab: Vocabulary) -> tuple[LibraryCodec, PieceRule, Specials]:
    """WordPiece; newer files mark the beginning of a word by U+2581 instead of its continuation by ##."""
    marked = any(token.startswith(SPACE) for token in vocab.tokens)
    position: dict[str, int] = {}
    for number, (token, kind) in enumerate(zip(vocab.tokens, vocab.types, strict=True)):
        if marked and kind == PieceType.NORMAL:
            token = token[1:] if token.startswith(SPACE) else "##" + token
        position[token] = number
    if len(position) != len(vocab.tokens):
        raise FormatError(f"{KEY}tokens holds {len(vocab.tokens) - len(position)} words twice")
    lowercase = vocab.raw("normalizer.lowercase")
    accents = vocab.raw("normalizer.strip_accents")
    tokenizer = wordpiece(
        position, None if lowercase is None else bool(lowercase), None if accents is None else bool(accents)
    )
    _add_marked(tokenizer, zip(position, vocab.types, strict=True))
    first = vocab.number("cls_token_id", "bos_token_id")
    last = vocab.number("seperator_token_id", "separator_token_id", "eos_token_id")
    prefix = (first,) if first is not None and vocab.flag("add_bos_token", True) else ()
    suffix = (last,) if last is not None and vocab.flag("add_sep_token", True) else ()
    codec = LibraryCodec(tokenizer, len(vocab.tokens))
    return (
        codec,
        PieceRule("wordpiece", strip_first=True, tidy=True),
        replace(_specials(vocab, prefix, suffix), pair=bert_pair(prefix, suffix)),
    )


def _pieces(vocab: Vocabulary) -> tuple[Piece, ...]:
    return tuple(map(Piece, vocab.tokens, vocab.scores(), vocab.types))


def _or_absent(number: int | None) -> int:
    return -1 if number is None else number


def _specials(vocab: Vocabulary, prefix: tuple[int, ...], suffix: tuple[int, ...]) -> Specials:
    ids = {name: vocab.number(*keys) for name, keys in _NAMES.items()}
    names: dict[str, str | list[str]] = {name: vocab.tokens[i] for name, i in ids.items() if i is not None}
    marked = {i for i, kind in enumerate(vocab.types) if kind in (PieceType.CONTROL, PieceType.USER_DEFINED)}
    ends = {i for token in _ENDS if (i := vocab.position.get(token, -1)) in marked}
    texts = {vocab.tokens[i] for i in ends}
    if "<|call|>" in texts or {"<|calls|>", "<|flush|>"} <= texts:
        # There <|end|> closes one message of a turn, not the turn.
        ends.discard(vocab.position.get("<|end|>", -1))
    ends |= {end for name in ("eos_token", "eot_token", "eom_token") if (end := ids[name]) is not None}
    return Specials(ids["bos_token"], frozenset(ends), prefix, suffix, names, _templates(vocab))


def _templates(vocab: Vocabulary) -> dict[str, str]:
    """`tokenizer.chat_template` and its named kin `tokenizer.chat_template.NAME`."""
    stem = "tokenizer.chat_template"
    found = {}
    for key, value in vocab.metadata_items():
        if (key == stem or key.startswith(stem + ".")) and isinstance(value, str):
            found[key[len(stem) + 1 :] or "default"] = value
    return found


def _swallowers(vocab: Vocabulary, metadata: Mapping[str, Any]) -> frozenset[int]:
    """Phi-3's special tokens swallow the white space after them; GGUF has no field for it, so the name decides."""
    name = str(metadata.get("general.name", "")).lower()
    if not any(word in name for word in ("phi-3", "phi3")):
        return frozenset()
    special = {i for i, kind in enumerate(vocab.types) if kind in (PieceType.CONTROL, PieceType.USER_DEFINED)}
    return frozenset(i for i in special if vocab.tokens[i] not in ("<unk>", "<s>", "<|endoftext|>"))
