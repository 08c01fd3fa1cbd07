"""Tokenizers written into GGUF and into folders, read back: the same ids on published test inputs."""

from collections.abc import Callable
from pathlib import Path

import pytest

from inhouse.core.errors import UnsupportedError
from inhouse.model.tokens import gguf
from inhouse.model.tokens.load import assemble, load_tokenizer
from inhouse.model.tokens.tokenizer import Tokenizer
from inhouse.model.tokens.write import gguf_tokenizer, hf_tokenizer

pytestmark = [pytest.mark.null, pytest.mark.realdata]
KINDS = {"qwen2": ("gpt2", "qwen2"), "gpt2": ("gpt2", "gpt-2"), "phi-2": ("gpt2", "gpt-2"),
         "phi-3-mini": ("llama", "default")}  # fmt: skip


@pytest.fixture
def samples(realdata: Path) -> list[str]:
    """The inputs of ggml's own vocabulary tests."""
    text = (realdata / "tokenizers" / "gguf" / "ggml-vocab-gpt-2.gguf.inp").read_text(encoding="utf-8")
    return [part.strip("\n") for part in text.split("__ggml_vocab_test__")]


@pytest.mark.parametrize("name", KINDS)
def test_written_tokenizers_give_the_same_ids(
    load_named: Callable[[str], Tokenizer], samples: list[str], tmp_path: Path, name: str
) -> None:
    original = load_named(name)
    table = gguf_tokenizer(original, original.vocab_size + 3)
    assert (table["tokenizer.ggml.model"], table["tokenizer.ggml.pre"]) == KINDS[name]
    assert table["tokenizer.ggml.tokens"][-1] == f"[PAD{original.vocab_size + 2}]"
    for file, text in hf_tokenizer(original).items():
        (tmp_path / file).parent.mkdir(exist_ok=True)
        (tmp_path / file).write_text(text, encoding="utf-8")
    inside, folder = assemble(gguf.build(table)), load_tokenizer(tmp_path)
    for text in samples:
        assert inside.encode(text) == original.encode(text), text
        assert folder.encode(text) == original.encode(text), text
    assert inside.chat_template == original.chat_template


def test_kinds_that_gguf_files_do_not_get_are_refused(load_named: Callable[[str], Tokenizer]) -> None:
    with pytest.raises(UnsupportedError, match="WordPiece"):
        gguf_tokenizer(load_named("bert-cased"), 28996)
