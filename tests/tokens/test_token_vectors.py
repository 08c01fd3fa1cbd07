"""Every tokenizer vector of the real data: reference_ids.json, llama.cpp's .inp/.out, stories260K's golden ids."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from inhouse.model.tokens import spm
from inhouse.model.tokens.load import from_gguf, load_tokenizer
from inhouse.model.tokens.tokenizer import Tokenizer
from tests.tokens.conftest import FOLDERS

pytestmark = [pytest.mark.null, pytest.mark.realdata]

Load = Callable[[str], Tokenizer]

SAME_VOCABULARY = {"qwen2": "qwen2", "deepseek-r1-qwen": "qwen2", "roberta-bpe": "roberta-base"}
"""Vectors whose .gguf is not in the real data, and the folder that holds the same vocabulary. None is left over."""


def llama_vectors(folder: Path, name: str) -> list[tuple[str, list[int]]]:
    stem = folder / f"ggml-vocab-{name}.gguf"
    texts = Path(f"{stem}.inp").read_text().split("\n__ggml_vocab_test__\n")
    lines = Path(f"{stem}.out").read_text().split("\n")
    assert len(texts) == len(lines) == 47
    return [(text, [int(word) for word in line.split()]) for text, line in zip(texts, lines, strict=True)]


def wrong(tokenizer: Tokenizer, vectors: list[tuple[str, list[int]]]) -> list[str]:
    return [text for text, ids in vectors if tokenizer.encode(text, add_special=False) != ids]


@pytest.mark.parametrize("name", FOLDERS)
def test_ids_equal_the_reference_libraries(name: str, load_named: Load, reference: dict[str, Any]) -> None:
    vectors = list(zip(reference["texts"], reference["ids"][name], strict=True))
    assert len(vectors) == 67
    assert wrong(load_named(name), vectors) == []


@pytest.mark.parametrize("name", ["bert-bge", "falcon", "gpt-2", "mpt", "phi-3"])
def test_ids_of_a_gguf_vocabulary_equal_llama_cpp(name: str, load_gguf: Load, realdata: Path) -> None:
    assert wrong(load_gguf(name), llama_vectors(realdata / "tokenizers" / "gguf", name)) == []


@pytest.mark.parametrize("name", SAME_VOCABULARY)
def test_ids_of_the_same_vocabulary_equal_llama_cpp(name: str, load_named: Load, realdata: Path) -> None:
    vectors = llama_vectors(realdata / "tokenizers" / "gguf", name)
    assert wrong(load_named(SAME_VOCABULARY[name]), vectors) == []


@pytest.mark.parametrize("pre", SAME_VOCABULARY)
def test_a_vocabulary_rewritten_as_gguf_keeps_its_ids(
    pre: str, load_named: Load, realdata: Path, reference: dict[str, Any]
) -> None:
    """The pre-tokenizers whose .gguf is missing, with the folder's vocabulary written the way converters write it."""
    folder = load_named(SAME_VOCABULARY[pre])
    library = folder.codec.library  # type: ignore[attr-defined]
    tokens = [folder.token_of(i) or f"[PAD{i}]" for i in range(folder.vocab_size)]
    merges = [" ".join(pair) for pair in json.loads(library.to_str())["model"]["merges"]]
    metadata = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [3 if i in folder.special_ids else 1 for i in range(len(tokens))],
        "tokenizer.ggml.merges": merges,
    }
    rebuilt = from_gguf(metadata)
    vectors = llama_vectors(realdata / "tokenizers" / "gguf", pre)
    vectors += list(zip(reference["texts"], reference["ids"][SAME_VOCABULARY[pre]], strict=True))
    assert wrong(rebuilt, vectors) == []


def test_t5_rewritten_as_gguf_keeps_its_ids(tokenizer_files: Callable[[str], Path], reference: dict[str, Any]) -> None:
    """The fourth GGUF vocabulary model, for which there is no vector file: Unigram with a precompiled charsmap."""
    model = spm.read_model(tokenizer_files("t5-small/spiece.model").read_bytes())
    metadata = {
        "tokenizer.ggml.model": "t5",
        "tokenizer.ggml.tokens": [piece.text for piece in model.pieces],
        "tokenizer.ggml.scores": [piece.score for piece in model.pieces],
        "tokenizer.ggml.token_type": [int(piece.kind) for piece in model.pieces],
        "tokenizer.ggml.precompiled_charsmap": list(model.charsmap),
        "tokenizer.ggml.eos_token_id": 1,
        "tokenizer.ggml.unknown_token_id": 2,
    }
    rebuilt = from_gguf(metadata)
    assert wrong(rebuilt, list(zip(reference["texts"], reference["ids"]["t5-small"], strict=True))) == []
    assert rebuilt.encode("Hello world") == [8774, 296, 1]


def test_an_old_gguf_without_token_types(stories: Path, golden: dict[str, Any], gguf_metadata: Any) -> None:
    metadata = gguf_metadata(stories / "stories260K-F32.gguf")
    del metadata["tokenizer.ggml.token_type"]
    tokenizer = from_gguf(metadata)
    for vector in golden["tokenizer"]:
        assert tokenizer.encode(vector["text"], parse_special=False) == vector["ids"], vector["text"]
    assert tokenizer.decode([1, 403, 407, 2]) == "Once upon"


@pytest.mark.parametrize("form", ["folder", "tokenizer.model", "F32.gguf", "Q4_0.gguf"])
def test_every_form_of_stories260k_gives_the_golden_ids_and_text(
    form: str, stories: Path, golden: dict[str, Any], gguf_metadata: Callable[[Path], dict[str, Any]]
) -> None:
    if form.endswith("gguf"):
        tokenizer = from_gguf(gguf_metadata(stories / f"stories260K-{form}"))
    else:
        tokenizer = load_tokenizer(stories / "hf" / ("" if form == "folder" else form))
    assert tokenizer.add_bos
    assert (tokenizer.bos_id, tokenizer.eos_ids, tokenizer.vocab_size) == (1, frozenset({2}), 512)
    for vector in golden["tokenizer"]:
        # "<s> not special" is among them: text of a user, which must not become the special token.
        assert tokenizer.encode(vector["text"], parse_special=False) == vector["ids"], vector["text"]
    for run in golden["greedy"]:
        assert tokenizer.encode(run["prompt"]) == run["prompt_ids"]
        assert tokenizer.decode(run["prompt_ids"] + run["output_ids"]) == run["text"]
