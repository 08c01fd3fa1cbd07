"""Vocabularies in files of their own: vocab.json with merges.txt, vocab.txt of BERT, tiktoken ranks.

Knows the three file forms and which pre-tokenizer belongs to which tokenizer class. Does not know the other files of
a folder (`hf`) or GGUF.
"""

import base64
import binascii
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers

from inhouse.core.errors import FormatError, UnsupportedError
from inhouse.model.tokens import checks
from inhouse.model.tokens.library import guarded
from inhouse.model.tokens.merges import merges_of_ranks
from inhouse.model.tokens.patterns import GPT2, LLAMA3, O200K, QWEN2, PreTokenizer, normalizer, splitter
from inhouse.model.tokens.pieces import BYTE_TO_CHAR, byte_level

_QWEN_ROW: Final = PreTokenizer((QWEN2,), nfc=True)
_GPT2_ROW: Final = PreTokenizer((GPT2,))

_ROW_OF_CLASS: Final[Mapping[str, PreTokenizer]] = {
    "GPT2Tokenizer": _GPT2_ROW,
    "CodeGenTokenizer": _GPT2_ROW,
    "WhisperTokenizer": _GPT2_ROW,
    "RobertaTokenizer": _GPT2_ROW,
    "BartTokenizer": _GPT2_ROW,
    "LongformerTokenizer": _GPT2_ROW,
    "Qwen2Tokenizer": _QWEN_ROW,
    "GPTNeoXTokenizer": PreTokenizer((GPT2,), nfc=True),
}
_CLASS_OF_MODEL: Final[Mapping[str, str]] = {
    "qwen2": "Qwen2Tokenizer",
    "qwen3": "Qwen2Tokenizer",
    "qwen2_moe": "Qwen2Tokenizer",
    "qwen3_moe": "Qwen2Tokenizer",
    "roberta": "RobertaTokenizer",
    "bart": "BartTokenizer",
    "gpt_neox": "GPTNeoXTokenizer",
}
PAIR_CLASSES: Final = frozenset({"RobertaTokenizer", "BartTokenizer", "LongformerTokenizer"})
"""Classes that put BOS before and EOS after a text without saying so in their files."""


def class_name(config: Mapping[str, Any], model_config: Mapping[str, Any]) -> str:
    """The tokenizer class without `Fast`, from tokenizer_config.json, else from config.json's model type."""
    name = config.get("tokenizer_class")
    if isinstance(name, str):
        return name.removesuffix("Fast")
    return _CLASS_OF_MODEL.get(str(model_config.get("model_type")), "GPT2Tokenizer")


def vocab_and_merges(vocab: bytes, merges: bytes, cls: str, add_prefix_space: bool = False) -> tokenizers.Tokenizer:
    """Byte-level BPE from vocab.json and merges.txt.

    Args:
        vocab, merges: the files' bytes.
        cls: the tokenizer class, which names the pre-tokenizer.
        add_prefix_space: a space is put before a text that has none.

    Raises:
        FormatError: a line that is not two tokens, a merge of unknown tokens, ids twice.
        UnsupportedError: a tokenizer class whose pre-tokenizer we do not know.
    """
    row = _ROW_OF_CLASS.get(cls)
    if row is None:
        raise UnsupportedError(
            f"vocab.json with merges.txt of the class {cls[:60]!r} is not supported",
            remedy=f"Known: {', '.join(sorted(_ROW_OF_CLASS))}; a tokenizer.json works for every class.",
        )
    entries = checks.vocabulary(checks.json_object(vocab, "vocab.json"), "vocab.json")
    pairs = read_merges(checks.text_of(merges, "merges.txt").split("\n"))
    return byte_level_bpe(entries, pairs, row, add_prefix_space)


def read_merges(lines: list[str]) -> list[tuple[str, str]]:
    """Pairs of a merges list, each line `left right`; the first line may be a version."""
    pairs = []
    for number, line in enumerate(lines, 1):
        line = line.removesuffix("\r")
        if not line or (number == 1 and line.startswith("#version")):
            continue
        left, _, right = line.partition(" ")
        if not left or not right or " " in right:
            raise FormatError(f"merge {number} is {line[:60]!r}, two tokens with a space between them were expected")
        pairs.append((left, right))
    return pairs


def byte_level_bpe(
    vocab: Mapping[str, int],
    merges: list[tuple[str, str]],
    row: PreTokenizer,
    add_prefix_space: bool = False,
) -> tokenizers.Tokenizer:
    """The library's byte-level BPE; the caller adds the special tokens."""
    if add_prefix_space and row.patterns != (GPT2,):
        raise UnsupportedError("add_prefix_space is supported with GPT-2's pre-tokenizer only")
    with guarded("the BPE vocabulary was refused"):
        tokenizer = tokenizers.Tokenizer(models.BPE(dict(vocab), merges, ignore_merges=row.whole_words))
        if (norm := normalizer(row)) is not None:
            tokenizer.normalizer = norm
        tokenizer.pre_tokenizer = splitter(row.patterns, add_prefix_space)
        tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def vocab_txt(data: bytes, lowercase: bool | None) -> tokenizers.Tokenizer:
    """BERT's WordPiece from vocab.txt, one token a line.

    Args:
        lowercase: lower-case the text and strip accents; None: only if the vocabulary has (next to) no capitals.
    """
    lines = checks.text_of(data, "vocab.txt").split("\n")
    if lines and not lines[-1]:
        lines.pop()
    vocab: dict[str, int] = {}
    for number, line in enumerate(lines):
        token = line.removesuffix("\r")
        if vocab.setdefault(token, number) != number:
            raise FormatError(f"vocab.txt has {token[:60]!r} on the lines {vocab[token] + 1} and {number + 1}")
    return wordpiece(vocab, lowercase)


def wordpiece(
    vocab: Mapping[str, int], lowercase: bool | None, strip_accents: bool | None = None
) -> tokenizers.Tokenizer:
    """The library's WordPiece with BERT's cleaning and cutting; its bracketed tokens are special."""
    if "[UNK]" not in vocab:
        raise FormatError("the WordPiece vocabulary has no [UNK]")
    special = [token for token in ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]") if token in vocab]
    if lowercase is None:
        lowercase = not _is_cased(vocab)
    with guarded("the WordPiece vocabulary was refused"):
        tokenizer = tokenizers.Tokenizer(models.WordPiece(dict(vocab), unk_token="[UNK]"))
        tokenizer.normalizer = normalizers.BertNormalizer(
            clean_text=True, handle_chinese_chars=True, strip_accents=strip_accents, lowercase=lowercase
        )
        tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        tokenizer.decoder = decoders.WordPiece(prefix="##", cleanup=True)
        tokenizer.add_special_tokens([tokenizers.AddedToken(token, special=True) for token in special])
    return tokenizer


def _is_cased(vocab: Mapping[str, int]) -> bool:
    """Whether capitals A to Z occur in more than one token of a hundred (an uncased vocabulary has a stray few)."""
    capitals = sum(any("A" <= char <= "Z" for char in token) for token in vocab if not token.startswith("["))
    return capitals * 100 > len(vocab)


@dataclass(frozen=True, slots=True)
class _Encoding:
    """A published tiktoken encoding: the number of ranks tells which one a file is."""

    name: str
    row: PreTokenizer
    special: Mapping[str, int]
    eos: tuple[str, ...] = ("<|endoftext|>",)
    bos: str | None = None


_LLAMA3_NAMES: Final = (
    "<|begin_of_text|> <|end_of_text|> <|reserved_special_token_0|> <|reserved_special_token_1|> "
    "<|finetune_right_pad_id|> <|step_id|> <|start_header_id|> <|end_header_id|> <|eom_id|> <|eot_id|> <|python_tag|>"
).split()
_LLAMA3_SPECIAL: Final = {name: 128_000 + n for n, name in enumerate(_LLAMA3_NAMES)} | {
    f"<|reserved_special_token_{n}|>": 128_009 + n for n in range(2, 247)
}

_ENCODINGS: Final[Mapping[int, _Encoding]] = {
    50_256: _Encoding("r50k_base", _GPT2_ROW, {"<|endoftext|>": 50_256}),
    50_280: _Encoding("p50k_base", _GPT2_ROW, {"<|endoftext|>": 50_256}),
    100_256: _Encoding(
        "cl100k_base",
        PreTokenizer((LLAMA3,), whole_words=True),
        {
            "<|endoftext|>": 100_257,
            "<|fim_prefix|>": 100_258,
            "<|fim_middle|>": 100_259,
            "<|fim_suffix|>": 100_260,
            "<|endofprompt|>": 100_276,
        },
    ),
    128_000: _Encoding(
        "llama3",
        PreTokenizer((LLAMA3,), whole_words=True),
        _LLAMA3_SPECIAL,
        ("<|end_of_text|>", "<|eom_id|>", "<|eot_id|>"),
        "<|begin_of_text|>",
    ),
    151_643: _Encoding(
        "qwen",
        PreTokenizer((QWEN2,), nfc=True, whole_words=True),
        {"<|endoftext|>": 151_643, "<|im_start|>": 151_644, "<|im_end|>": 151_645}
        | {f"<|extra_{n}|>": 151_646 + n for n in range(205)},
        ("<|endoftext|>", "<|im_end|>"),
    ),
    199_998: _Encoding(
        "o200k_base",
        PreTokenizer((O200K,), whole_words=True),
        {"<|endoftext|>": 199_999, "<|endofprompt|>": 200_018},
    ),
}


def read_ranks(data: bytes, name: str) -> dict[bytes, int]:
    """Token bytes to rank, from lines of base64 and a number."""
    ranks: dict[bytes, int] = {}
    taken: set[int] = set()
    for number, line in enumerate(data.split(b"\n"), 1):
        if not line.strip():
            continue
        parts = line.split()
        try:
            token, rank = base64.b64decode(parts[0], validate=True), int(parts[1])
        except (IndexError, ValueError, binascii.Error) as error:
            raise FormatError(f"line {number} of {name} is not base64 and a rank: {line[:40]!r}") from error
        checks.token_id(rank, f"line {number} of {name}")
        if not token or token in ranks or rank in taken or len(parts) != 2:
            raise FormatError(f"line {number} of {name} has an empty or repeated token, or rank {rank} twice")
        ranks[token] = rank
        taken.add(rank)
    return ranks


def tiktoken(data: bytes, name: str) -> tuple[tokenizers.Tokenizer, str | None, tuple[str, ...]]:
    """Byte-level BPE from a tiktoken file, with the special tokens of the published encoding.

    Returns:
        The tokenizer, its BOS token's string, and its EOS tokens' strings.

    Raises:
        FormatError: a damaged line.
        UnsupportedError: a number of ranks that belongs to no encoding we know (its pattern is in no file).
    """
    ranks = read_ranks(data, name)
    encoding = _ENCODINGS.get(len(ranks))
    if encoding is None:
        known = ", ".join(f"{e.name} ({count})" for count, e in _ENCODINGS.items())
        raise UnsupportedError(f"{name} has {len(ranks)} ranks, which is no known encoding", remedy=f"Known: {known}.")
    missing = [byte for byte in range(256) if bytes([byte]) not in ranks]
    if missing:
        raise FormatError(f"{name} lacks {len(missing)} of the 256 single bytes")
    tokens = {byte_level(token): rank for token, rank in ranks.items()}
    joined = {token: rank for token, rank in sorted(tokens.items(), key=lambda item: item[1]) if len(token) > 1}
    merges = merges_of_ranks(joined, tokens.keys() | set(BYTE_TO_CHAR.values()))
    special = {text: i for text, i in encoding.special.items() if i not in tokens.values()}
    tokenizer = byte_level_bpe(tokens | special, merges, encoding.row)
    with guarded("the special tokens were refused"):
        added = [tokenizers.AddedToken(text, special=True, normalized=False) for text in special]
        tokenizer.add_special_tokens(added)
    return tokenizer, encoding.bos, tuple(text for text in encoding.eos if text in special)
