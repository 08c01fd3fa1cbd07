"""SentencePiece behind a table of ids: Marian and M2M100 folders against transformers, fairseq's order by its formula,
and where languages go."""

import io
import json
from pathlib import Path

import pytest
import sentencepiece
import transformers

from inhouse.core.errors import FormatError, UnsupportedError, UsageError
from inhouse.model.tokens.load import load_tokenizer
from inhouse.model.tokens.translate import Translation, language_codes, translate

LINES = [
    "The house is wonderful and the garden is green.", "Das Haus ist wunderbar und der Garten ist grün.",
    "A cat sat on the mat; two dogs ran away.", "Eine Katze saß auf der Matte, zwei Hunde liefen weg.",
    "Numbers: 1 2 3 4 5 6 7 8 9 0, signs: ! ? - ( ) [ ]", "Wer den Pfennig nicht ehrt, ist des Talers nicht wert.",
]  # fmt: skip
TEXTS = ["The cat is green.", "  two  spaces ", "Grün und wert 123", "snow ☃ man", "", "x"]


@pytest.fixture(scope="module")
def pieces() -> bytes:
    """A small SentencePiece model of the kind that these folders hold."""
    out = io.BytesIO()
    sentencepiece.SentencePieceTrainer.Train(
        sentence_iterator=iter(LINES * 20), model_writer=out, vocab_size=90, model_type="unigram", minloglevel=2,
        bos_id=1, eos_id=2, unk_id=0, hard_vocab_limit=False,
    )  # fmt: skip
    return out.getvalue()


def texts_of(data: bytes) -> list[str]:
    model = sentencepiece.SentencePieceProcessor(model_proto=data)
    return [model.id_to_piece(i) for i in range(model.get_piece_size())]


def marian(folder: Path, data: bytes) -> None:
    (folder / "source.spm").write_bytes(data)
    (folder / "target.spm").write_bytes(data)
    known = [text for text in texts_of(data) if text not in ("<unk>", "<s>", "</s>")]
    tokens = ["</s>", "<unk>", *reversed(known[3:]), ">>deu<<", ">>fra<<", "▁nowhere", "<pad>"]  # three pieces lack
    (folder / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(tokens)}), encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps({"source_lang": "en", "target_lang": "de"}))


def m2m(folder: Path, data: bytes) -> None:
    (folder / "sentencepiece.bpe.model").write_bytes(data)
    known = [text for text in texts_of(data) if text not in ("<unk>", "<s>", "</s>")]
    vocab = {token: i for i, token in enumerate(["<s>", "<pad>", "</s>", "<unk>", *reversed(known)])}
    (folder / "vocab.json").write_text(json.dumps(vocab), encoding="utf-8")
    codes = transformers.models.m2m_100.tokenization_m2m_100.FAIRSEQ_LANGUAGE_CODES["m2m100"]
    listed = {"additional_special_tokens": [f"__{code}__" for code in codes], "eos_token": "</s>", "unk_token": "<unk>"}
    (folder / "special_tokens_map.json").write_text(json.dumps(listed))


def test_marian_as_transformers(tmp_path: Path, pieces: bytes, recwarn: pytest.WarningsRecorder) -> None:
    marian(tmp_path, pieces)
    ours = load_tokenizer(tmp_path)
    theirs = transformers.MarianTokenizer.from_pretrained(tmp_path)
    for text in [*TEXTS, ">>fra<< The cat"]:
        assert ours.encode(text) == theirs(text).input_ids
    ids = ours.encode("Grün und wert 123")
    assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True)
    codes = language_codes("marian", ours)
    assert sorted(codes) == ["deu", "fra"]
    found = translate("marian", ours, codes, "The cat", None, "fra")
    assert found.encoder == theirs(">>fra<< The cat").input_ids
    with pytest.raises(UnsupportedError, match="finds out the source"):
        translate("marian", ours, codes, "The cat", "en", "fra")


def test_m2m100_as_transformers(tmp_path: Path, pieces: bytes) -> None:
    m2m(tmp_path, pieces)
    ours = load_tokenizer(tmp_path)
    theirs = transformers.M2M100Tokenizer.from_pretrained(tmp_path, src_lang="de")
    codes = language_codes("m2m_100", ours)
    assert len(codes) == 100
    for text in TEXTS:
        found = translate("m2m_100", ours, codes, text, "de", "fr")
        assert found == Translation(theirs(text).input_ids, first_token=theirs.get_lang_id("fr"))
    with pytest.raises(UsageError, match="target_language is 'xx'"):
        translate("m2m_100", ours, codes, "a", "de", "xx")


@pytest.mark.parametrize(
    ("kind", "before", "after"), [("MBart50Tokenizer", True, False), ("MBartTokenizer", False, True)]
)
def test_fairseq_order(kind: str, before: bool, after: bool, tmp_path: Path, pieces: bytes) -> None:
    (tmp_path / "sentencepiece.bpe.model").write_bytes(pieces)
    codes = ["ar_AR", "de_DE", "en_XX"] + (["ka_GE"] if before else [])
    (tmp_path / "special_tokens_map.json").write_text(json.dumps({"additional_special_tokens": codes}))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": kind, "src_lang": "de_DE"}))
    ours = load_tokenizer(tmp_path)
    model = sentencepiece.SentencePieceProcessor(model_proto=pieces)
    size = model.get_piece_size()
    plain = [i + 1 if i > 2 else 3 for i in model.encode("The cat is green.")]
    german, english = size + 1 + 1, size + 1 + 2
    assert ours.encode("The cat is green.") == [*([german] * before), *plain, 2, *([german] * after)]
    assert ours.id_of("<mask>") == size + 1 + len(codes)
    found = translate("mbart", ours, language_codes("mbart", ours), "The cat is green.", "de_DE", "en_XX")
    assert found.encoder == ours.encode("The cat is green.")
    assert (found.first_token, found.start_token) == ((english, None) if before else (None, english))


def test_t5_is_told_in_words(tmp_path: Path, pieces: bytes) -> None:
    marian(tmp_path, pieces)
    ours = load_tokenizer(tmp_path)
    found = translate("t5", ours, {}, "A cat", "en", "German")
    assert found.encoder == ours.encode("translate English to German: A cat")
    assert translate("t5", ours, {}, "A cat", None, None).encoder == ours.encode("A cat")
    for source, target, match in (("en", None, "missing"), ("en", "x: y", "no language")):
        with pytest.raises(UsageError, match=match):
            translate("t5", ours, {}, "A cat", source, target)
    with pytest.raises(UnsupportedError, match="one pair"):
        translate("bart", ours, {}, "A cat", "en", None)


def test_files_that_say_too_little(tmp_path: Path, pieces: bytes) -> None:
    m2m(tmp_path, pieces)
    (tmp_path / "special_tokens_map.json").unlink()
    with pytest.raises(FormatError, match="no file lists the language codes"):
        load_tokenizer(tmp_path)
    (tmp_path / "vocab.json").write_text(json.dumps({"a": 0}))
    (tmp_path / "source.spm").write_bytes(pieces)
    with pytest.raises(FormatError, match="no <unk>"):
        load_tokenizer(tmp_path)
