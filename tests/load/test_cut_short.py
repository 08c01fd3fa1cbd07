"""Files that are cut short while they are read: an error, not the end of the process, and nothing is kept of them."""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from inhouse.core.errors import ExecutorError, FormatError
from inhouse.core.tensors import TensorSource
from inhouse.load.bind import Plan, bind
from inhouse.load.importer import import_model
from inhouse.load.model import open_model
from inhouse.load.packing import Part
from inhouse.runtime.executor import Weight
from inhouse.runtime.guard import guarded
from inhouse.store.home import Home
from inhouse.store.mapping import Mapping
from inhouse.store.store import Store
from tests.load.checkpoints import greedy

pytestmark = [pytest.mark.native, pytest.mark.realdata]


@pytest.fixture
def gguf(stories: Path, tmp_path: Path) -> Path:
    path = tmp_path / "m.gguf"
    shutil.copyfile(stories / "stories260K-F32.gguf", path)
    return path


def test_a_lost_page_reads_as_zeros_and_is_told(tmp_path: Path) -> None:
    path = tmp_path / "data"
    path.write_bytes(b"\1" * 100_000)
    data = Mapping(path).data
    sums: list[int] = []

    def read() -> None:
        with guarded([(data.ctypes.data, data.nbytes)], "data"):
            os.truncate(path, 4096)
            sums.extend(int(part.sum()) for part in (data[:4096], data[50_000:60_000]))

    with pytest.raises(FormatError, match="data was cut short"):
        read()
    assert sums == [4096, 0]
    with guarded([(data.ctypes.data, 4096)], "data"):
        assert data[0] == 1


def test_an_import_survives_it(gguf: Path) -> None:
    def cut(stage: str, done: int, total: int) -> None:
        if stage == "verify weights" and done < total // 4:
            os.truncate(gguf, 200_000)

    with Store() as store:
        with pytest.raises(FormatError):
            import_model(gguf, store=store, progress=cut)
        assert store.catalog.versions() == []
        assert list(store.blobs) == []


@pytest.mark.parametrize("cache", [True, False])
def test_opening_survives_it_and_keeps_no_pack(gguf: Path, monkeypatch: pytest.MonkeyPatch, cache: bool) -> None:
    def cutting(source: TensorSource, plan: Plan, **options: Any) -> Iterator[tuple[Part, Weight]]:
        os.truncate(gguf, 200_000)
        return bind(source, plan, **options)

    monkeypatch.setattr("inhouse.load.model.bind", cutting)
    with pytest.raises(FormatError):
        open_model(str(gguf), cache=cache)
    assert not list(Home.find().packs.glob("*")) if cache else True


def test_a_file_that_is_overwritten_while_packed_is_refused(gguf: Path) -> None:
    def touch(stage: str, done: int, total: int) -> None:
        if stage == "pack weights" and done < total:
            os.utime(gguf, (1, 1))

    with pytest.raises(FormatError, match="changed while in use"):
        open_model(str(gguf), progress=touch)
    assert not list(Home.find().packs.glob("*.pack"))


def test_a_pack_cut_under_a_running_model_ends_the_step_and_not_the_process(gguf: Path) -> None:
    model = open_model(str(gguf), context=64)
    assert len(greedy(model, [1], 3)) == 3
    os.truncate(next(Home.find().packs.glob("*.pack")), 8192)
    with pytest.raises(ExecutorError):
        greedy(model, [1], 3)
    model.close()
