"""PyTorch pickles at the import's door: tensors come in, code does not run."""

import os
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from inhouse.core.errors import InhouseError
from inhouse.load.importer import import_model
from inhouse.load.model import open_model
from inhouse.store.store import Store
from tests.load.checkpoints import copy_hf, read_arrays
from tests.store.tables import dump

pytestmark = [pytest.mark.torch, pytest.mark.realdata]


@pytest.fixture
def store() -> Iterator[Store]:
    with Store() as store:
        yield store


@pytest.fixture
def folder(stories: Path, tmp_path: Path) -> Path:
    return copy_hf(stories, tmp_path / "stories")


def contents(store: Store) -> tuple[list[str], str]:
    return sorted(store.blobs), dump(store)


def test_a_torch_pickle_comes_in_through_the_safe_reader(store: Store, folder: Path) -> None:
    tensors = {name: torch.from_numpy(value) for name, value in read_arrays(folder).items()}
    (folder / "model.safetensors").unlink()
    torch.save(tensors, folder / "pytorch_model.bin")
    version = import_model(folder, store=store).version
    assert version.format == "torch"
    assert version.summary.parameters == 260_032
    model = open_model("stories", executor="torch")
    assert model.report.formats == {"f32": 36}
    model.close()


def test_a_pickle_that_runs_code_is_refused_unrun(store: Store, folder: Path, tmp_path: Path) -> None:
    witness = tmp_path / "ran"

    class Evil:
        def __reduce__(self) -> tuple[Callable[[str], object], tuple[str]]:
            return os.mkdir, (str(witness),)

    (folder / "model.safetensors").unlink()
    torch.save({"model.norm.weight": Evil()}, folder / "pytorch_model.bin")
    before = contents(store)
    with pytest.raises(InhouseError):
        import_model(folder, store=store)
    assert not witness.exists()
    assert contents(store) == before


@pytest.mark.parametrize("place", ["cuda:3", "mps", "xpu:0"])
def test_where_a_tensor_lay_does_not_matter(folder: Path, tmp_path: Path, place: str) -> None:
    """A file saved from a GPU opens without one: the place in the pickle is read over."""
    arrays = read_arrays(folder)
    torch.save({name: torch.from_numpy(value) for name, value in arrays.items()}, tmp_path / "cpu.bin")
    with zipfile.ZipFile(tmp_path / "cpu.bin") as old, zipfile.ZipFile(folder / "pytorch_model.bin", "w") as new:
        for entry in old.namelist():
            data = old.read(entry)
            if entry.endswith("data.pkl"):
                said = b"X" + len(place).to_bytes(4, "little") + place.encode()
                assert b"X\x03\x00\x00\x00cpu" in data
                data = data.replace(b"X\x03\x00\x00\x00cpu", said)
            new.writestr(entry, data)
    (folder / "model.safetensors").unlink()
    assert place.encode() in (folder / "pytorch_model.bin").read_bytes()
    found = read_arrays(folder)
    assert found.keys() == arrays.keys()
    assert all(np.array_equal(found[name], value) for name, value in arrays.items())
