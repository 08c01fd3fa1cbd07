"""Tokenizer folders of the real data, unpacked once a session, and each tokenizer loaded once."""

import gzip
import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from inhouse.model.tokens.load import from_gguf, load_tokenizer
from inhouse.model.tokens.tokenizer import Tokenizer

FOLDERS = {
    "qwen2": "qwen2",
    "gpt2": "gpt2",
    "roberta-base": "roberta-base",
    "phi-2": "phi-2",
    "phi-3-mini": "phi-3-mini",
    "gpt-neox-20b": "gpt-neox-20b",
    "t5-small": "t5-small",
    "t5-small/spiece.model": "t5-small/spiece.model",
    "minimind": "minimind",
    "cl100k_base": "cl100k_base.tiktoken",
    "bert-cased": "bert-cased",
    "torchtune-m": "torchtune-m",
}
"""Names of reference_ids.json and where their files lie."""


_PLAIN = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}


def read_metadata(path: Path) -> dict[str, Any]:
    """The key-value table of a GGUF version 3 file."""
    data = path.read_bytes()
    at = 8

    def number(kind: str) -> Any:
        nonlocal at
        (value,) = struct.unpack_from("<" + kind, data, at)
        at += struct.calcsize(kind)
        return value

    def text() -> str:
        nonlocal at
        size = number("Q")
        at += size
        return data[at - size : at].decode()

    def value(kind: int) -> Any:
        if kind == 8:
            return text()
        if kind == 9:
            inner, count = number("I"), number("Q")
            return [value(inner) for _ in range(count)]
        return number(_PLAIN[kind])

    number("Q")  # tensors
    return {text(): value(number("I")) for _ in range(number("Q"))}


@pytest.fixture(scope="session")
def tokenizer_files(realdata: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder (or file) of a name in `FOLDERS`, its .gz files unpacked."""
    root = tmp_path_factory.mktemp("tokenizers")

    def unpack(source: Path, target: Path) -> None:
        target.parent.mkdir(parents=True, exist_ok=True)
        if not target.exists():
            data = source.read_bytes()
            target.write_bytes(gzip.decompress(data) if source.suffix == ".gz" else data)

    def files(name: str) -> Path:
        place = root / FOLDERS[name]
        source = realdata / "tokenizers" / FOLDERS[name]
        if source.is_dir():
            for file in source.iterdir():
                unpack(file, place / file.name.removesuffix(".gz"))
        else:
            unpack(source if source.exists() else source.with_name(source.name + ".gz"), place)
        return place

    return files


@pytest.fixture(scope="session")
def load_named(tokenizer_files: Callable[[str], Path]) -> Callable[[str], Tokenizer]:
    """The tokenizer of a name in `FOLDERS`."""
    loaded: dict[str, Tokenizer] = {}

    def load(name: str) -> Tokenizer:
        if name not in loaded:
            loaded[name] = load_tokenizer(tokenizer_files(name))
        return loaded[name]

    return load


@pytest.fixture(scope="session")
def gguf_metadata() -> Callable[[Path], dict[str, Any]]:
    """A GGUF file's key-value table (read here: the reference reader takes seconds for 65,000 strings)."""
    return read_metadata


@pytest.fixture(scope="session")
def load_gguf(realdata: Path, gguf_metadata: Callable[[Path], dict[str, Any]]) -> Callable[[str], Tokenizer]:
    """The tokenizer of `gguf/ggml-vocab-NAME.gguf`."""
    loaded: dict[str, Tokenizer] = {}

    def load(name: str) -> Tokenizer:
        if name not in loaded:
            path = realdata / "tokenizers" / "gguf" / f"ggml-vocab-{name}.gguf"
            loaded[name] = from_gguf(gguf_metadata(path))
        return loaded[name]

    return load


@pytest.fixture(scope="session")
def reference(realdata: Path) -> dict[str, Any]:
    """reference_ids.json: 67 texts and their ids by 12 reference tokenizers, without special tokens."""
    found: dict[str, Any] = json.loads((realdata / "tokenizers" / "reference_ids.json").read_text())
    return found


@pytest.fixture(scope="session")
def golden(stories: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((stories / "golden.json").read_text())
    return found
