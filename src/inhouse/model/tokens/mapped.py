"""SentencePiece models whose pieces have other ids than their own: Marian (`vocab.json` beside `source.spm`), M2M100
(`vocab.json` beside `sentencepiece.bpe.model`), and fairseq's order (mBART, NLLB, XLM-R without a tokenizer.json).

Knows these folders' conventions. Marian's punctuation normalisation (sacremoses) is not applied.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Final

from inhouse.core.errors import FormatError
from inhouse.model.tokens import checks, files, hf, spm
from inhouse.model.tokens.hf import Configs
from inhouse.model.tokens.library import LibraryCodec
from inhouse.model.tokens.pieces import PieceRule
from inhouse.model.tokens.tokenizer import Specials

Built = tuple["MappedCodec", PieceRule, Specials]

SOURCE: Final = "source.spm"
PIECES: Final = "sentencepiece.bpe.model"
_CODE = re.compile(r">>[^<>]+<<")
_NAMED: Final = ("<s>", "<pad>", "</s>", "<unk>")

# Classes that keep fairseq's order -> the default source language; "": none.
_FAIRSEQ: Mapping[str, str] = {
    "XLMRobertaTokenizer": "", "MBartTokenizer": "en_XX", "MBart50Tokenizer": "en_XX", "NllbTokenizer": "eng_Latn",
}  # fmt: skip


class MappedCodec:
    """A SentencePiece encoder with a table of ids behind it; implements `library.Codec`.

    Args:
        pieces: the encoder.
        ids: its id -> ours.
        tokens: our id -> token; "" where there is none.
        added: our ids that are looked for in the text first; true where special.
    """

    def __init__(
        self, pieces: LibraryCodec, ids: Sequence[int], tokens: Sequence[str], added: Mapping[int, bool]
    ) -> None:
        self._pieces, self._ids, self._tokens = pieces, ids, tokens
        self._numbers = {token: i for i, token in enumerate(tokens) if token}
        self.added, self.size = added, len(tokens)
        names = sorted((tokens[i] for i in added), key=len, reverse=True)
        self._split = re.compile("|".join(map(re.escape, names)) or r"(?!)")

    def encode(self, text: str, parse_special: bool) -> list[int]:
        """See Codec.encode."""
        if not parse_special:
            return self._plain(text)
        ids: list[int] = []
        at = 0
        for match in self._split.finditer(text):
            ids += [*self._plain(text[at : match.start()]), self._numbers[match.group()]]
            at = match.end()
        return ids + self._plain(text[at:])

    def _plain(self, text: str) -> list[int]:
        return [self._ids[i] for i in self._pieces.encode(text, False)] if text else []

    def token_of(self, token_id: int) -> str | None:
        """See Codec.token_of."""
        return self._tokens[token_id] or None if 0 <= token_id < self.size else None

    def id_of(self, token: str) -> int | None:
        """See Codec.id_of."""
        return self._numbers.get(token)


def build(vocabulary: Path) -> Built | None:
    """The tokenizer of a folder of one of these forms, by its vocabulary file; None for any other. Raises FormatError
    for damaged files, and for language codes that no file lists."""
    folder, name = vocabulary.parent, vocabulary.name
    configs = hf.read_configs(folder)
    if name == "vocab.json" and (folder / SOURCE).is_file():
        return _marian(vocabulary, configs)
    if name == "vocab.json" and (folder / PIECES).is_file():
        return _m2m(vocabulary, configs)
    kind = files.class_name(configs.tokenizer, configs.model).removesuffix("Fast")
    if name == PIECES and kind in _FAIRSEQ:
        return _fairseq(vocabulary, configs, kind)
    return None


def _marian(vocabulary: Path, configs: Configs) -> Built:
    vocab = _vocabulary(vocabulary)
    tokens = _by_id(vocab)
    added = {vocab[token]: True for token in ("</s>", "<unk>", "<pad>") if token in vocab}
    added |= {number: True for token, number in vocab.items() if _CODE.fullmatch(token)}
    codec, rule = _mapped(vocabulary.with_name(SOURCE), vocab, tokens, added)
    return _finished(codec, rule, configs, "", "</s>")


def _m2m(vocabulary: Path, configs: Configs) -> Built:
    vocab = _vocabulary(vocabulary)
    codes = _codes(configs)
    vocab |= {code: len(vocab) + i for i, code in enumerate(code for code in codes if code not in vocab)}
    added = {vocab[token]: True for token in (*_NAMED, *codes) if token in vocab}
    codec, rule = _mapped(vocabulary.with_name(PIECES), vocab, _by_id(vocab), added)
    return _finished(codec, rule, configs, f"__{configs.tokenizer.get('src_lang') or 'en'}__", "</s>")


def _fairseq(vocabulary: Path, configs: Configs, kind: str) -> Built:
    """Four named tokens, the pieces from the fourth on, the language codes, and last the mask."""
    model = spm.read_model(checks.read_bytes(vocabulary))
    codes = _codes(configs) if _FAIRSEQ[kind] else []
    tokens = [*_NAMED, *(piece.text for piece in model.pieces[3:]), *codes, "<mask>"]
    vocab = {token: number for number, token in reversed(list(enumerate(tokens)))}
    added = {vocab[token]: True for token in (*_NAMED, *codes, "<mask>")}
    codec, rule = _mapped(vocabulary, vocab, tokens, added)
    spoken = configs.tokenizer.get("src_lang") or _FAIRSEQ[kind]
    if kind == "MBartTokenizer":
        return _finished(codec, rule, configs, "", "</s>", spoken)
    return _finished(codec, rule, configs, spoken or "<s>", "</s>")


def _vocabulary(path: Path) -> dict[str, int]:
    content = checks.json_object(checks.read_bytes(path), path.name)
    return dict(checks.vocabulary(content, path.name))


def _codes(configs: Configs) -> list[str]:
    """The language codes, in the order of their ids."""
    names = hf.names_of(configs).get("additional_special_tokens", [])
    codes = [name for name in names if name not in (*_NAMED, "<mask>")] if isinstance(names, list) else []
    if not codes:
        raise FormatError(
            "no file lists the language codes", remedy="additional_special_tokens must stand in special_tokens_map.json"
        )
    return codes


def _by_id(vocab: Mapping[str, int]) -> list[str]:
    tokens = [""] * (max(vocab.values(), default=-1) + 1)
    for token, number in vocab.items():
        tokens[number] = token
    return tokens


def _mapped(
    path: Path, vocab: Mapping[str, int], tokens: Sequence[str], added: Mapping[int, bool]
) -> tuple[MappedCodec, PieceRule]:
    """The codec over the SentencePiece model at `path`; a piece that the vocabulary lacks is unknown."""
    model = spm.read_model(checks.read_bytes(path))
    unknown = vocab.get("<unk>")
    if unknown is None:
        raise FormatError("the vocabulary has no <unk>")
    ids = [vocab.get(piece.text, unknown) for piece in model.pieces]
    codec = MappedCodec(LibraryCodec(spm.build(model)), ids, tokens, added)
    return codec, spm.rule_of(model)


def _finished(codec: MappedCodec, rule: PieceRule, configs: Configs, first: str, *last: str) -> Built:
    found = {name: codec.id_of(name) for name in (first, *last) if name}
    lacking = [name for name, number in found.items() if number is None]
    if lacking:
        raise FormatError(f"the vocabulary has no {lacking[0][:40]!r}", param="src_lang")
    prefix = tuple(i for name in (first,) if name and (i := found[name]) is not None)
    suffix = tuple(i for name in last if name and (i := found[name]) is not None)
    specials = hf.specials_of(codec, configs, (prefix, suffix))
    ends = specials.eos_ids or frozenset(i for i in (codec.id_of("</s>"),) if i is not None)
    return codec, rule, replace(specials, eos_ids=ends)
