"""SentencePiece models against sentencepiece, and tiktoken files against tiktoken, on texts made to differ."""

import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from inhouse.core.errors import FormatError, UnsupportedError
from inhouse.model.tokens import spm
from inhouse.model.tokens.files import read_ranks
from inhouse.model.tokens.load import load_tokenizer
from inhouse.model.tokens.patterns import LLAMA3, PRE_TOKENIZERS, splitter
from inhouse.model.tokens.protobuf import fields
from inhouse.model.tokens.tokenizer import Tokenizer

pytestmark = [pytest.mark.null, pytest.mark.realdata]

ODD = "aab  ..-=\n\té你ﬁ①🦙\u3000\u00a0\u200be"


def odd_texts(pieces: list[str], count: int, seed: int) -> Iterator[str]:
    """Runs of one character (where many joins rank alike), pieces in odd company, and characters from everywhere."""
    rng = random.Random(seed)
    for _ in range(count):
        parts = []
        for _ in range(rng.randint(1, 8)):
            match rng.randrange(4):
                case 0:
                    parts.append(rng.choice(pieces))
                case 1:
                    parts.append(rng.choice(ODD) * rng.choice((1, 2, 3, 5, 9, 17)))
                case 2:
                    parts.append(chr(rng.choice((rng.randrange(32, 0x300), rng.randrange(0x4E00, 0x9FFF)))))
                case _:
                    parts.append(rng.choice(pieces).strip() + rng.choice((" ", "")))
        yield "".join(parts)


def reference_model(tokenizer: Tokenizer, metadata: dict[str, Any]) -> bytes:
    """A ModelProto with the vocabulary of a GGUF file, written by the reference library."""
    model_pb2 = pytest.importorskip("sentencepiece.sentencepiece_model_pb2", reason="the oracle is sentencepiece")
    model = model_pb2.ModelProto()
    kinds = {0: 2, 1: 3, 2: 3}
    columns = (metadata[f"tokenizer.ggml.{name}"] for name in ("tokens", "scores", "token_type"))
    for number, (piece, score, kind) in enumerate(zip(*columns, strict=True)):
        unused = kind == 2 or number >= 32_000
        model.pieces.add(piece=piece, score=score, type=kinds.get(number, 5 if unused else kind))
    trainer, normaliser = model.trainer_spec, model.normalizer_spec
    trainer.model_type, trainer.byte_fallback, trainer.pad_id = 2, True, -1
    trainer.unk_id, trainer.bos_id, trainer.eos_id = 0, 1, 2
    normaliser.add_dummy_prefix, normaliser.remove_extra_whitespaces = True, False
    data: bytes = model.SerializeToString()
    return data


def differing(model: bytes, count: int, seed: int) -> tuple[int, list[str]]:
    """How many texts were tried, and those whose ids differ from the sentencepiece library's."""
    sentencepiece = pytest.importorskip("sentencepiece", reason="the oracle is sentencepiece")
    oracle = sentencepiece.SentencePieceProcessor(model_proto=model)
    value = spm.read_model(model)
    ours = spm.build(value)
    pieces = [piece.text.replace("▁", " ") for piece in value.pieces if piece.kind == spm.PieceType.NORMAL]
    texts = list(odd_texts(pieces, count, seed))
    return len(texts), [
        text for text in texts if ours.encode(text, add_special_tokens=False).ids != oracle.encode(text)
    ]


def test_bpe_by_scores_is_exact_llama_vocabulary(
    realdata: Path, load_gguf: Callable[[str], Tokenizer], gguf_metadata: Callable[[Path], dict[str, Any]]
) -> None:
    """Merges derived from scores give the ids of SentencePiece's own search: 32,000 pieces, 2,000 odd texts."""
    metadata = gguf_metadata(realdata / "tokenizers" / "gguf" / "ggml-vocab-phi-3.gguf")
    assert differing(reference_model(load_gguf("phi-3"), metadata), 2000, seed=1) == (2000, [])


def test_bpe_by_scores_is_exact_stories(stories: Path) -> None:
    assert differing((stories / "hf" / "tokenizer.model").read_bytes(), 1500, seed=2) == (1500, [])


@pytest.mark.parametrize("name", ["torchtune-m/m.model", "t5-small/spiece.model"])
def test_unigram_differs_only_among_equal_scores(name: str, realdata: Path) -> None:
    """The library adds scores in double precision, SentencePiece in single: of two cuts that tie either may win.

    Every differing text must be such a tie (the same pieces in another order) or hold a compatibility character, which
    the library normalises grapheme by grapheme. At most 3 texts in 100 differ, all made of long runs.
    """
    sentencepiece = pytest.importorskip("sentencepiece", reason="the oracle is sentencepiece")
    model = (realdata / "tokenizers" / name).read_bytes()
    oracle, ours = sentencepiece.SentencePieceProcessor(model_proto=model), spm.build(spm.read_model(model))
    tried, texts = differing(model, 1000, seed=3)
    assert len(texts) * 100 <= 3 * tried
    for text in texts:
        mine, theirs = ours.encode(text, add_special_tokens=False).ids, oracle.encode(text)
        assert sorted(mine) == sorted(theirs) or any(char in "ﬁ①\u0301" for char in text), text


def test_user_defined_pieces_are_found_in_the_normalised_text() -> None:
    """Against sentencepiece: user-defined symbols win over merges, and the text after one gets no second prefix."""
    sentencepiece = pytest.importorskip("sentencepiece", reason="the oracle is sentencepiece")
    model_pb2 = pytest.importorskip("sentencepiece.sentencepiece_model_pb2", reason="the oracle is sentencepiece")
    model = model_pb2.ModelProto()
    pieces = [
        ("<unk>", 2),
        ("<s>", 3),
        ("</s>", 3),
        ("▁▁", 4),
        ("<br>", 4),
        *((char, 1) for char in "▁ab<r>"),
        ("ab", 1),
    ]
    for number, (piece, kind) in enumerate(pieces):
        model.pieces.add(piece=piece, score=-float(number), type=kind)
    model.trainer_spec.model_type = 2
    model.normalizer_spec.remove_extra_whitespaces = False
    for prefix in (True, False):
        model.normalizer_spec.add_dummy_prefix = prefix
        data = model.SerializeToString()
        ours, oracle = spm.build(spm.read_model(data)), sentencepiece.SentencePieceProcessor(model_proto=data)
        for text in ("ab<br>ab", "a  b", "   a", "<br>a", "ab <br> ab", "a<b>", "ab  <br>", ""):
            assert ours.encode(text, add_special_tokens=False).ids == oracle.encode(text), (prefix, text)


def test_damaged_models_name_the_cause(stories: Path) -> None:
    model = (stories / "hf" / "tokenizer.model").read_bytes()
    with pytest.raises(FormatError, match="truncated"):
        spm.read_model(model[:4000])
    with pytest.raises(FormatError, match="no pieces"):
        spm.read_model(b"")
    with pytest.raises(FormatError, match="wire type 7"):
        list(fields(b"\x0f", "it"))
    with pytest.raises(FormatError, match="more than 10 bytes"):
        list(fields(b"\xff" * 11, "it"))
    value = spm.read_model(model)
    doubled = spm.Spm((*value.pieces, value.pieces[300]), model="bpe", byte_fallback=True)
    with pytest.raises(FormatError, match="has the ids 300 and 512"):
        spm.build(doubled)
    with pytest.raises(FormatError, match="lacks 256 of the 256 byte pieces"):
        spm.build(spm.Spm(value.pieces[259:], model="bpe", byte_fallback=True))
    # Field 3 of field 2 is the model type; 3 is `word`.
    with pytest.raises(UnsupportedError, match="type 3"):
        spm.read_model(b"\x0a\x03\x0a\x01a" + b"\x12\x02\x18\x03")


def test_tiktoken_is_exact(tokenizer_files: Callable[[str], Path]) -> None:
    tiktoken = pytest.importorskip("tiktoken", reason="the oracle is tiktoken")
    path = tokenizer_files("cl100k_base")
    ranks = read_ranks(path.read_bytes(), path.name)
    pattern = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|"
    pattern += r"\s*[\r\n]+|\s+(?!\S)|\s+"
    assert pattern == LLAMA3
    oracle = tiktoken.Encoding(
        "cl100k", pat_str=pattern, mergeable_ranks=ranks, special_tokens={"<|endoftext|>": 100_257}
    )
    ours = load_tokenizer(path)
    pieces = [token.decode("utf-8", "ignore") or "x" for token in list(ranks)[256:60_000:7]]
    for text in odd_texts(pieces, 1500, seed=4):
        ids = ours.encode(text)
        assert ids == oracle.encode_ordinary(text), text
        assert b"".join(map(ours.token_bytes, ids)) == oracle.decode_bytes(ids)
    assert ours.encode("a<|endoftext|>") == [64, 100_257]
    assert ours.encode("a<|endoftext|>", parse_special=False) == oracle.encode_ordinary("a<|endoftext|>")


def test_every_pre_tokenizer_pattern_compiles_and_loses_nothing() -> None:
    text = "Hello, I'LL pay 1234567 €  for\n\n\tit… 你好，世界! ça 🦙\r\n  x"
    for name, row in PRE_TOKENIZERS.items():
        cut = splitter(row.patterns).pre_tokenize_str(text)
        assert cut[0][1][0] == 0, name
        assert cut[-1][1][1] == len(text), name
        assert all(a[1][1] == b[1][0] for a, b in zip(cut, cut[1:], strict=False)), name
