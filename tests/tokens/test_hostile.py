"""Damaged and hostile tokenizer files: a FormatError that names the cause; no crash, no panic, no hang."""

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from inhouse.core.errors import FormatError
from inhouse.model.tokens import checks
from inhouse.model.tokens.load import from_gguf, load_tokenizer
from tests.tokens import fuzz_inputs

pytestmark = [pytest.mark.null, pytest.mark.realdata]

SHORT = 40
SOAK = 8_400
"""Inputs for each of the twelve targets: 480 in `make test`, 100,800 in `make soak`."""


@pytest.fixture(scope="module")
def targets(stories: Path, gguf_metadata: Callable[[Path], dict[str, Any]]) -> list[fuzz_inputs.Target]:
    metadata = gguf_metadata(stories / "stories260K-F32.gguf")
    return fuzz_inputs.targets(
        (stories / "hf" / "tokenizer.json").read_bytes(),
        (stories / "hf" / "tokenizer.model").read_bytes(),
        {name: value for name, value in metadata.items() if name.startswith("tokenizer.")},
    )


def outcomes(targets: list[fuzz_inputs.Target], seed: int, count: int) -> Counter[str]:
    found: Counter[str] = Counter()
    for target in targets:
        assert fuzz_inputs.survives(target, target.example) == "loaded", target.name
        for data in fuzz_inputs.mutations(target, seed, count):
            found[fuzz_inputs.survives(target, data)] += 1
    return found


def test_mutated_files(targets: list[fuzz_inputs.Target], capfd: pytest.CaptureFixture[str]) -> None:
    found = outcomes(targets, seed=0, count=SHORT)
    capfd.readouterr()  # the library announces its panics, which we turn into errors, on stderr
    assert found.total() == SHORT * len(targets)
    assert set(found) <= {"loaded", "FormatError", "UnsupportedError"}
    assert found["FormatError"] > found.total() / 2


@pytest.mark.soak
@pytest.mark.timeout(7200)
def test_a_hundred_thousand_mutated_files(targets: list[fuzz_inputs.Target], capfd: pytest.CaptureFixture[str]) -> None:
    found = outcomes(targets, seed=1, count=SOAK)
    capfd.readouterr()
    assert found.total() >= 100_000


def written(folder: Path, content: Any, name: str = "tokenizer.json") -> Path:
    data = content if isinstance(content, bytes) else json.dumps(content).encode()
    (folder / name).write_bytes(data)
    return folder


def bpe(vocab: Any, merges: Any = (), **more: Any) -> dict[str, Any]:
    return {"model": {"type": "BPE", "vocab": vocab, "merges": merges} | more.pop("model", {}), **more}


CASES: dict[str, tuple[Any, str]] = {
    "not JSON": (b'{"model": ', "not JSON"),
    "not UTF-8": (b'{"model": "\xff"}', "not UTF-8: invalid start byte at byte 11"),
    "a list": (b"[]", "holds a list"),
    "no model": ({}, "has no model"),
    "deep": (b'{"a":' * 100_000, "nested too deeply|not JSON"),
    "key twice": (b'{"model": {"vocab": {"a": 0, "a": 1}}}', "the key 'a' twice"),
    "NaN": (b'{"model": {"vocab": {"a": NaN}}}', "holds NaN"),
    "id twice": (bpe({"a": 0, "b": 0}), "'a' and 'b' of tokenizer.json share the id 0"),
    "negative id": (bpe({"a": -1}), "'a' of tokenizer.json has the id -1"),
    "huge id": (bpe({"a": 2**32 - 1}), "has the id 4294967295"),
    "huge number": (b'{"model": {"vocab": {"a": ' + b"9" * 5000 + b"}}}", "not JSON|has the id"),
    "float id": (bpe({"a": 1.5}), "has the id 1.5"),
    "boolean id": (bpe({"a": True}), "has the id True"),
    "vocabulary of another type": (bpe("abc"), "is a str"),
    "merge of an unknown token": (bpe({"a": 0}, [["a", "zz"]]), "merge 0 of tokenizer.json needs 'zz'"),
    "merge to an unknown token": (bpe({"a": 0, "b": 1}, [["a", "b"]]), "needs 'ab'"),
    "merges of another type": (bpe({"a": 0}, 5), "are a int"),
    "unknown type": ({"model": {"type": "Magic", "vocab": {}}}, "refused"),
    "score of another type": ({"model": {"type": "Unigram", "vocab": [["a", "b"]]}}, "entry 0"),
    "piece twice": ({"model": {"type": "Unigram", "vocab": [["a", 0], ["a", 1]]}}, "'a' stands twice"),
    "unk outside": ({"model": {"type": "Unigram", "vocab": [["a", 0]], "unk_id": 7}}, "unk_id 7"),
    "added without id": (bpe({"a": 0}, added_tokens=[{"content": "x"}]), "added token 'x' has the id None"),
    "added twice": (
        bpe({"a": 0}, added_tokens=[{"content": "x", "id": 1}, {"content": "y", "id": 1}]),
        "'x' and 'y' share the id 1",
    ),
    "word length": (bpe({"a": 0}, model={"max_input_chars_per_word": 10**12}), "max_input_chars_per_word"),
    "broken pattern": (
        bpe(
            {"a": 0},
            pre_tokenizer={"type": "Split", "pattern": {"Regex": "("}, "behavior": "Isolated", "invert": False},
        ),
        "refused",
    ),
    "long pattern": (
        bpe({"a": 0}, normalizer={"type": "Replace", "pattern": {"Regex": "a" * 20_000}, "content": ""}),
        "20000",
    ),
    "normaliser that explodes": (
        bpe(
            {"a": 0},
            normalizer={
                "type": "Sequence",
                "normalizers": [{"type": "Replace", "pattern": {"String": "a"}, "content": "aa"}] * 40,
            },
        ),
        "times longer",
    ),
    "broken charsmap": (bpe({"a": 0}, normalizer={"type": "Precompiled", "precompiled_charsmap": "AAAA"}), "refused"),
    "affix outside": (
        bpe({"a": 0}, post_processor={"type": "BertProcessing", "sep": ["x", 9], "cls": ["y", 2**31]}),
        "adds the id",
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_the_error_names_the_cause(name: str, tmp_path: Path) -> None:
    content, cause = CASES[name]
    with pytest.raises(FormatError, match=cause):
        load_tokenizer(written(tmp_path, content))


def test_hostile_padding_is_switched_off(tmp_path: Path) -> None:
    padding = {"strategy": {"Fixed": 10**12}, "direction": "Right", "pad_id": 0, "pad_type_id": 0, "pad_token": "a"}
    truncation = {"direction": "Right", "max_length": 1, "strategy": "LongestFirst", "stride": 0}
    split = {"type": "Split", "pattern": {"String": "a"}, "behavior": "Isolated", "invert": False}
    content = bpe({"a": 0}, padding=padding | {"pad_to_multiple_of": None}, truncation=truncation, pre_tokenizer=split)
    assert load_tokenizer(written(tmp_path, content)).encode("aaa") == [0, 0, 0]


@pytest.mark.parametrize(
    ("name", "content", "cause"),
    [
        ("tokenizer_config.json", b"[]", "tokenizer_config.json holds a list"),
        ("tokenizer_config.json", {"chat_template": 5}, "chat_template"),
        ("tokenizer_config.json", {"chat_template": "x" * (2**20 + 1)}, "limit"),
        ("tokenizer_config.json", {"added_tokens_decoder": {"x": {}}}, "added_tokens_decoder holds 'x'"),
        ("tokenizer_config.json", {"added_tokens_decoder": {"900": {"content": "<q>"}}}, "declared with id 900"),
        ("generation_config.json", {"eos_token_id": ["a"]}, "eos_token_id has the id a"),
        ("generation_config.json", b'{"eos_token_id": 1', "generation_config.json is not JSON"),
        ("added_tokens.json", {"<q>": -5}, "has the id -5"),
    ],
)
def test_configuration_files(name: str, content: Any, cause: str, stories: Path, tmp_path: Path) -> None:
    written(tmp_path, (stories / "hf" / "tokenizer.json").read_bytes())
    with pytest.raises(FormatError, match=cause):
        load_tokenizer(written(tmp_path, content, name))


@pytest.mark.parametrize(
    ("name", "data", "cause"),
    [
        ("vocab.txt", b"[UNK]\na\na\n", "'a' on the lines 2 and 3"),
        ("vocab.txt", b"a\n", r"no \[UNK\]"),
        ("x.tiktoken", b"!!!! 0\n", "line 1 of x.tiktoken"),
        ("x.tiktoken", b"YQ== 0\nYQ== 1\n", "line 2"),
        ("x.tiktoken", b"YQ== 99999999999\n", "has the id 99999999999"),
        ("tokenizer.model", b"\x0a\xff\xff\xff\xff\xff\xff", "truncated"),
    ],
)
def test_other_vocabulary_files(name: str, data: bytes, cause: str, tmp_path: Path) -> None:
    with pytest.raises(FormatError, match=cause):
        load_tokenizer(written(tmp_path, data, name))


def test_a_file_too_large_is_not_read(tmp_path: Path) -> None:
    with (tmp_path / "tokenizer.json").open("wb") as file:
        file.truncate(checks.MAX_FILE + 1)
    with pytest.raises(FormatError, match=f"has {checks.MAX_FILE + 1} bytes"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize(
    ("change", "cause"),
    [
        ({"tokens": None}, "tokens is missing"),
        ({"tokens": "abc"}, "tokens is a str"),
        ({"tokens": ["a", 5]}, "token 1 is a int"),
        ({"tokens": ["a", b"\xff"]}, "token 1 is not UTF-8"),
        ({"tokens": ["a", "a"]}, "'a' has the ids 0 and 1"),
        ({"token_type": [1]}, "has 1 entries, the vocabulary 2"),
        ({"token_type": [1, 99]}, "holds 99"),
        ({"bos_token_id": 2}, "bos_token_id is 2, the vocabulary has 2 tokens"),
        ({"eos_token_id": -1}, "eos_token_id is -1"),
        ({"merges": None}, "merges is missing"),
        ({"merges": ["a"]}, "merge 1 is 'a'"),
        ({"merges": ["a c"]}, "c"),
        ({"model": None}, "model is missing"),
        ({"model": 5}, "model is a int"),
        ({"model": "llama"}, "scores is missing"),
        ({"model": "llama", "scores": [0.0, float("nan")]}, "finite"),
        ({"add_bos_token": "perhaps"}, "true or false"),
    ],
)
def test_gguf_metadata(change: dict[str, Any], cause: str) -> None:
    base = {"model": "gpt2", "pre": "gpt-2", "tokens": ["a", "b"], "token_type": [1, 1], "merges": []}
    metadata = {f"tokenizer.ggml.{name}": value for name, value in (base | change).items() if value is not None}
    with pytest.raises(FormatError, match=cause):
        from_gguf(metadata)
