"""One door to every format: what is opened is decided by content; ambiguous folders are refused; files are listed."""

import json
import shutil
from pathlib import Path
from typing import Any

import gguf as reference
import numpy as np
import pytest
import safetensors.numpy

from inhouse.core.errors import FormatError, InhouseError, NotFoundError
from inhouse.core.tensors import TensorSource
from inhouse.store.gguf_write import write_gguf
from inhouse.store.safetensors import write_safetensors
from inhouse.store.source import gguf_metadata, model_files, open_source
from inhouse.store.writing import from_array

pytestmark = pytest.mark.null
ONE = [from_array("t", np.ones(2, np.float32))]


def folder(path: Path, *names: str) -> Path:
    """A folder of weight files that all hold the tensor `t`; an index points to the other files of its kind."""
    path.mkdir()
    for name in names:
        if name.endswith(".safetensors"):
            write_safetensors(path / name, ONE)
        elif name.endswith(".gguf"):
            write_gguf(path / name, {}, ONE)
        else:
            (path / name).write_text(json.dumps({"weight_map": {"t": "part-1.safetensors"}}))
    return path


@pytest.mark.realdata
def test_the_stories_folder_and_files(stories: Path) -> None:
    expected = safetensors.numpy.load_file(stories / "hf" / "model.safetensors")
    for path in (stories / "hf", stories / "hf" / "model.safetensors"):
        source = open_source(path)
        assert isinstance(source, TensorSource)
        assert source.format == "safetensors"
        assert {name: source.raw(name).tobytes() for name in source} == {n: a.tobytes() for n, a in expected.items()}
    for path in sorted(stories.glob("*.gguf")):
        source = open_source(path)
        assert source.format == "gguf"
        assert len(source) == len(reference.GGUFReader(path).tensors)
        assert gguf_metadata(path)["general.architecture"] == "llama"


@pytest.mark.realdata
@pytest.mark.parametrize("name", ["stories260K.bin", "tok512.bin", "hf/config.json", "hf/tokenizer.model"])
def test_other_files_are_refused(stories: Path, name: str) -> None:
    with pytest.raises(FormatError):
        open_source(stories / name)


def test_content_decides_and_not_the_name(tmp_path: Path) -> None:
    write_gguf(tmp_path / "model.safetensors", {}, ONE)
    write_safetensors(tmp_path / "model.gguf", ONE)
    assert open_source(tmp_path / "model.safetensors").format == "gguf"
    assert open_source(tmp_path / "model.gguf").format == "safetensors"
    assert open_source(tmp_path).format == "gguf"


@pytest.mark.parametrize(
    ("names", "opened"),
    [
        (["model.safetensors"], "model.safetensors"),
        (["model.safetensors.index.json", "part-1.safetensors"], "part-1.safetensors"),
        (["only.safetensors"], "only.safetensors"),
        (["x.gguf"], "x.gguf"),
        (["model.safetensors", "x.gguf"], "model.safetensors"),
        (["model.safetensors", "pytorch_model.bin.index.json"], "model.safetensors"),
    ],
)
def test_folders(tmp_path: Path, names: list[str], opened: str) -> None:
    source = open_source(folder(tmp_path / "m", *names))
    assert isinstance(source, TensorSource)
    assert [path.name for path in getattr(source, "paths")] == [opened]  # noqa: B009 (not in the protocol)
    assert source.raw("t").view(np.float32).tolist() == [1.0, 1.0]


@pytest.mark.parametrize(
    ("names", "kind", "cause"),
    [
        ([], NotFoundError, "holds no weights"),
        (["a.safetensors", "b.safetensors"], FormatError, "2 weight files and no index: a.safetensors, b"),
        (["a.gguf", "b.gguf"], FormatError, "2 weight files"),
        (["model.safetensors", "model.safetensors.index.json"], FormatError, "holds both"),
        (["model.safetensors.index.json"], NotFoundError, "part-1.safetensors"),
    ],
)
def test_folders_that_are_refused(tmp_path: Path, names: list[str], kind: type[InhouseError], cause: str) -> None:
    path = folder(tmp_path / "m", *names)
    for call in (open_source, model_files):
        with pytest.raises(kind, match=cause):
            call(path)


@pytest.mark.parametrize("data", [b"", b"G", b"GGUF", bytes(100), b"\x80\x02", b"PK\x03\x04", b"#!/bin/sh\n", b"{}"])
def test_fragments_are_refused(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "x").write_bytes(data)
    with pytest.raises(FormatError):
        open_source(tmp_path / "x")


def test_nothing_there(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError):
        open_source(tmp_path / "absent")


def names_of(files: list[Path]) -> list[str]:
    return [file.name for file in files]


@pytest.mark.realdata
def test_files_of_the_stories_models(stories: Path) -> None:
    side = ["config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "tokenizer.model"]
    assert names_of(model_files(stories / "hf")) == ["model.safetensors", *side]
    assert names_of(model_files(stories / "stories260K-Q4_0.gguf")) == ["stories260K-Q4_0.gguf"]


def test_files_of_a_sharded_folder_with_what_lies_beside(tmp_path: Path) -> None:
    path = folder(tmp_path / "m", "model.safetensors.index.json", "part-1.safetensors")
    for name in ("config.json", "LICENSE", "README.md", "qwen.tiktoken", "merges.txt", "chat_template.jinja"):
        (path / name).write_text("x")
    for name in ("train.py", "weights.old", ".hidden", "optimizer.pt"):
        (path / name).write_text("x")
    (path / "1_Pooling").mkdir()
    (path / "1_Pooling" / "config.json").write_text("{}")
    assert [file.relative_to(path).as_posix() for file in model_files(path)] == [
        "model.safetensors.index.json",
        "part-1.safetensors",
        "config.json",
        "merges.txt",
        "chat_template.jinja",
        "1_Pooling/config.json",
        "qwen.tiktoken",
        "LICENSE",
        "README.md",
    ]


def test_files_of_a_split_gguf(tmp_path: Path) -> None:
    whole = ["m-00001-of-00002.gguf", "m-00002-of-00002.gguf"]
    path = folder(tmp_path / "m", *whole)
    assert names_of(model_files(path / whole[1])) == whole
    assert names_of(model_files(path)) == whole
    (path / whole[0]).unlink()
    with pytest.raises(NotFoundError, match="m-00001-of-00002"):
        model_files(path / whole[1])


def test_a_split_gguf_in_a_folder_is_one_source(tmp_path: Path) -> None:
    (tmp_path / "m").mkdir()
    for number in (0, 1):
        keys: dict[str, Any] = {"split.no": np.uint16(number), "split.count": np.uint16(2)}
        keys["split.tensors.count"] = np.int32(2)
        name = f"m-0000{number + 1}-of-00002.gguf"
        write_gguf(tmp_path / "m" / name, keys, [from_array(f"t{number}", np.ones(2, np.float32))])
    assert list(open_source(tmp_path / "m")) == ["t0", "t1"]
    shutil.copy(tmp_path / "m" / "m-00001-of-00002.gguf", tmp_path / "m" / "other.gguf")
    with pytest.raises(FormatError, match="3 weight files"):
        open_source(tmp_path / "m")


def test_a_header_whose_length_looks_like_a_pickle(tmp_path: Path) -> None:
    """640 bytes: the file begins with 0x80 0x02, as pickles of protocol 2 do."""
    for pad in range(700):
        write_safetensors(tmp_path / "m.safetensors", ONE, {"pad": "x" * pad})
        if (tmp_path / "m.safetensors").read_bytes()[:2] == b"\x80\x02":
            break
    else:
        raise AssertionError("no header of 640 bytes was made")
    assert list(open_source(tmp_path / "m.safetensors")) == ["t"]
