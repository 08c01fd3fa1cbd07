"""Files that are cut short while they are read: an error, not the end of the process, and nothing is kept of them."""

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from inhouse.core.errors import FormatError
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
from tests.conftest import ROOT

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


_CUT_UNDER_A_MODEL = """
import os, sys
from pathlib import Path
from inhouse.core.errors import ExecutorError
from inhouse.load.model import open_model
from inhouse.store.home import Home
from tests.load.checkpoints import greedy
model = open_model(sys.argv[1], context=64)
assert len(greedy(model, [1], 3)) == 3
os.truncate(next(Home.find().packs.glob("*.pack")), 8192)
try:
    greedy(model, [1], 3)
except ExecutorError as error:
    print("ended with", error.code)
"""


def test_a_pack_cut_under_a_running_model_ends_the_step_and_not_the_process(gguf: Path) -> None:
    # In a process of its own: if the promise breaks, the process is what dies.
    command = [sys.executable, "-c", _CUT_UNDER_A_MODEL, str(gguf)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, cwd=ROOT)
    assert (done.returncode, done.stdout) == (0, "ended with executor_failed\n"), done.stderr
