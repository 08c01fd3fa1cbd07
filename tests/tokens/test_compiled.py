"""Compiled tokenizers give the same ids, tokens and text; a damaged or foreign cache file is made anew."""

import random
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from inhouse.core.errors import FormatError
from inhouse.model.tokens import compiled, tables
from inhouse.model.tokens.load import from_gguf, load_tokenizer, open_compiled
from inhouse.model.tokens.tables import TableCodec
from inhouse.model.tokens.tokenizer import Tokenizer

pytestmark = [pytest.mark.null, pytest.mark.realdata]

Load = Callable[[str], Tokenizer]
TABULATED = {"qwen2", "gpt2", "roberta-base", "phi-2", "phi-3-mini", "gpt-neox-20b", "minimind", "cl100k_base"}
EXTRA = [
    "<|im_start|>user\nhi<|im_end|>",
    "<s>a</s> b",
    "<|endoftext|> x <|endoftext|>",
    "<|user|>\n a",
    "e\u0301 \u00e9",
    "\x00\x01\x7f",
]


@pytest.mark.parametrize("name", sorted(TABULATED) + ["t5-small", "bert-cased"])
def test_the_compiled_form_gives_the_same_ids(
    name: str, load_named: Load, tmp_path: Path, reference: dict[str, Any]
) -> None:
    original = load_named(name)
    path = tmp_path / "x.itok"
    compiled.save(path, original.codec, original.rule, original.specials)  # type: ignore[arg-type]
    again = compiled.load(path)
    assert isinstance(again.codec, TableCodec) == (name in TABULATED)
    rng = random.Random(5)
    mixed = ["".join(rng.choice(reference["texts"])[:40] for _ in range(4)) for _ in range(60)]
    for text in [*reference["texts"], *EXTRA, *mixed]:
        for parse_special in (True, False):
            ids = original.encode(text, parse_special=parse_special)
            assert again.encode(text, parse_special=parse_special) == ids, text
        assert again.decode(ids) == original.decode(ids)
    for token_id in range(0, original.vocab_size + 3, 97):
        token = original.token_of(token_id)
        assert again.token_of(token_id) == token
        assert token is None or again.id_of(token) == original.id_of(token)
        assert again.token_bytes(token_id) == original.token_bytes(token_id)
    assert again.id_of("no such token") is None
    assert (again.specials, again.rule, again.vocab_size) == (original.specials, original.rule, original.vocab_size)
    assert again.special_ids == original.special_ids


def test_the_library_takes_over_after_much_work(
    load_named: Load, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tables, "PROMOTE", 2_000)
    original = load_named("minimind")
    compiled.save(tmp_path / "x", original.codec, original.rule, original.specials)  # type: ignore[arg-type]
    again = compiled.load(tmp_path / "x")
    codec = again.codec
    assert isinstance(codec, TableCodec)
    for _ in range(200):
        assert again.encode("Once upon a time") == original.encode("Once upon a time")
    assert codec._codec is None, "words seen before are free"
    for number in range(400):
        text = f"{number * 7919} 从前有座山{number}。<|im_end|>"
        assert again.encode(text) == original.encode(text)
    assert codec._codec is not None


def test_a_folder_is_compiled_once_and_anew_when_a_file_changes(stories: Path, tmp_path: Path) -> None:
    folder, cache = tmp_path / "model", tmp_path / "cache"
    folder.mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((stories / "hf" / name).read_bytes())
    first = load_tokenizer(folder, cache)
    kept = list(cache.iterdir())
    assert len(kept) == 1
    before = kept[0].stat().st_mtime_ns
    second = load_tokenizer(folder, cache)
    assert second.encode("Once upon <s>") == first.encode("Once upon <s>")
    assert kept[0].stat().st_mtime_ns == before
    (folder / "generation_config.json").write_text('{"eos_token_id": [2, 7]}')
    assert load_tokenizer(folder, cache).eos_ids == {2, 7}
    assert len(list(cache.iterdir())) == 2


def test_gguf_metadata_and_a_callers_key(
    stories: Path, tmp_path: Path, gguf_metadata: Callable[[Path], dict[str, Any]]
) -> None:
    metadata = gguf_metadata(stories / "stories260K-F32.gguf")
    assert open_compiled(tmp_path, "digest") is None
    original = from_gguf(metadata, tmp_path, "digest")
    found = open_compiled(tmp_path, "digest")
    assert found is not None
    assert found.encode("Once upon a time") == original.encode("Once upon a time") == [1, 403, 407, 261, 378]
    assert from_gguf(metadata, tmp_path).eos_ids == {2}
    assert len(list(tmp_path.iterdir())) == 2


def test_every_damage_to_the_file_is_noticed(stories: Path, tmp_path: Path) -> None:
    original = load_tokenizer(stories / "hf", tmp_path, "k")
    path = compiled.cache_path(tmp_path, "k")
    whole = path.read_bytes()
    rng = random.Random(6)
    for _ in range(150):
        broken = bytearray(whole)
        at = rng.randrange(len(broken))
        if rng.random() < 0.3:
            del broken[at:]
        else:
            broken[at] ^= 1 << rng.randrange(8)
        path.write_bytes(broken)
        found = open_compiled(tmp_path, "k")
        # Padding between sections and the part that only a long text needs may be hit unnoticed, and do no harm.
        assert found is None or found.encode("Hello <s> wörld") == original.encode("Hello <s> wörld")
    path.write_bytes(b"")
    assert load_tokenizer(stories / "hf", tmp_path, "k").encode("Hi") == original.encode("Hi")
    assert path.read_bytes() == whole
    path.write_bytes(b"IHTOK\0\0\x63" + whole[8:])
    with pytest.raises(FormatError, match="version"):
        compiled.load(path)


def test_a_cache_that_cannot_be_written_is_no_error(stories: Path, tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("not a folder")
    assert load_tokenizer(stories / "hf", blocked / "cache").vocab_size == 512


def test_many_writers_leave_one_whole_file(stories: Path, tmp_path: Path) -> None:
    threads = [threading.Thread(target=load_tokenizer, args=(stories / "hf", tmp_path, "k")) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [path.name for path in tmp_path.iterdir()] == [compiled.cache_path(tmp_path, "k").name]
    assert open_compiled(tmp_path, "k") is not None
