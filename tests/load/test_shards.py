"""Models in several files: sharded safetensors and split GGUF come in and open as their single form does."""

import json
from pathlib import Path

import numpy as np
import pytest

from inhouse.core.errors import FormatError, NotFoundError
from inhouse.load.importer import import_model
from inhouse.load.model import open_model
from inhouse.runtime.executor import Weight
from inhouse.runtime.packed import Packed
from inhouse.store.gguf_write import write_gguf
from inhouse.store.safetensors import write_safetensors
from inhouse.store.source import open_source
from inhouse.store.store import Store
from inhouse.store.writing import from_array, from_source
from tests.load.checkpoints import copy_hf, read_arrays

pytestmark = [pytest.mark.native, pytest.mark.realdata]


def shard(folder: Path) -> Path:
    """Splits the folder's model.safetensors into three shards with an index."""
    arrays = read_arrays(folder)
    (folder / "model.safetensors").unlink()
    places: dict[str, str] = {}
    for number in range(3):
        file = f"model-0000{number + 1}-of-00003.safetensors"
        names = list(arrays)[number::3]
        write_safetensors(folder / file, [from_array(name, arrays[name]) for name in names])
        places |= dict.fromkeys(names, file)
    index = {"metadata": {"total_size": sum(a.nbytes for a in arrays.values())}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def split(source: Path, folder: Path) -> Path:
    """Splits a GGUF in two; returns the first file."""
    opened = open_source(source)
    tensors, paths = from_source(opened), []
    for number in range(2):
        path = folder / f"stories-0000{number + 1}-of-00002.gguf"
        keys = {
            "split.no": np.uint16(number),
            "split.count": np.uint16(2),
            "split.tensors.count": np.int32(len(tensors)),
        }
        write_gguf(path, (dict(opened.metadata) if number == 0 else {}) | keys, tensors[number::2])
        paths.append(path)
    return paths[0]


def same(one: dict[str, Weight], other: dict[str, Weight]) -> bool:
    def data(weight: Weight) -> object:
        return weight.data.tobytes() if isinstance(weight, Packed) else np.asarray(weight).tobytes()

    return list(one) == list(other) and all(data(one[name]) == data(other[name]) for name in one)


def test_sharded_safetensors(stories: Path, tmp_path: Path) -> None:
    folder = shard(copy_hf(stories, tmp_path / "sharded"))
    with Store() as store:
        version = import_model(folder, store=store).version
    assert len([file for file in version.files if file.path.endswith(".safetensors")]) == 3
    model, single = open_model("sharded"), open_model(str(stories / "hf"))
    assert same(dict(model.weights), dict(single.weights))
    assert model.digest == version.digest != single.digest
    model.close()
    single.close()


def test_a_weight_file_takes_along_what_lies_beside_it(stories: Path) -> None:
    with Store() as store:
        version = import_model(stories / "hf" / "model.safetensors", "one", store=store).version
    model, folder = open_model("one"), open_model(str(stories / "hf"))
    assert "config.json" in [file.path for file in version.files]
    assert model.digest == folder.digest
    model.close()
    folder.close()


def test_split_gguf(stories: Path, tmp_path: Path) -> None:
    first = split(stories / "stories260K-Q4_1.gguf", tmp_path)
    with Store() as store:
        version = import_model(first, store=store).version
        assert version.name == "stories"
        assert [file.path for file in version.files] == ["stories-00001-of-00002.gguf", "stories-00002-of-00002.gguf"]
    model, single = open_model("stories"), open_model(str(stories / "stories260K-Q4_1.gguf"))
    assert same(dict(model.weights), dict(single.weights))
    assert model.tokenizer.encode("Once upon") == single.tokenizer.encode("Once upon")
    model.close()
    single.close()


def test_a_missing_part_is_named(stories: Path, tmp_path: Path) -> None:
    folder = shard(copy_hf(stories, tmp_path / "sharded"))
    (folder / "model-00002-of-00003.safetensors").unlink()
    first = split(stories / "stories260K-Q4_1.gguf", tmp_path)
    first.with_name("stories-00002-of-00002.gguf").unlink()
    with Store() as store:
        for path, name in ((folder, "model-00002-of-00003"), (first, "stories-00002-of-00002")):
            with pytest.raises((NotFoundError, FormatError), match=name):
                import_model(path, store=store)
        assert store.catalog.versions() == []


def test_named_templates_are_part_of_the_model(stories: Path, tmp_path: Path) -> None:
    folder = copy_hf(stories, tmp_path / "templates")
    (folder / "chat_template.jinja").write_text("{{ messages[0]['content'] }}")
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "rag.jinja").write_text("rag {{ messages[0]['content'] }}")
    with Store() as store:
        imported = import_model(folder, store=store)
    assert imported.left_out == ()
    assert imported.notes == ()
    model = open_model("templates")
    assert model.chat_template.render([{"role": "user", "content": "hi"}]) == "hi"
    assert model.chat_template.render([{"role": "user", "content": "hi"}], template="rag") == "rag hi"
    model.close()
