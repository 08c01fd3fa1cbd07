"""Mappings: read-only, lazy, checked for change, alive as long as arrays over them."""

import gc
import os
from pathlib import Path

import numpy as np
import pytest

from inhouse.core.errors import FormatError, NotFoundError, UsageError
from inhouse.core.tensors import TensorInfo, TensorSource
from inhouse.store.mapping import Entry, MappedSource, Mapping, first_overlap

pytestmark = pytest.mark.null


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "file"
    path.write_bytes(bytes(range(256)) * 32)
    return path


def test_data_is_the_file_and_read_only(file: Path) -> None:
    mapping = Mapping(file)
    assert mapping.size == 8192
    assert mapping.data.tobytes() == file.read_bytes()
    with pytest.raises(ValueError, match="read-only"):
        mapping.data[0] = 1


def test_identity_is_device_inode_and_mtime(file: Path) -> None:
    found = file.stat()
    assert Mapping(file).identity == (found.st_dev, found.st_ino, found.st_mtime_ns)


def test_nothing_is_mapped_before_data_is_asked_for(file: Path) -> None:
    Mapping(file)
    assert str(file) not in Path("/proc/self/maps").read_text()


def test_arrays_outlive_close_and_free_the_mapping_when_collected(file: Path) -> None:
    mapping = Mapping(file)
    part = mapping.data[100:200]
    mapping.close()
    gc.collect()
    assert part.tobytes() == file.read_bytes()[100:200]
    assert str(file) in Path("/proc/self/maps").read_text()
    del part
    gc.collect()
    assert str(file) not in Path("/proc/self/maps").read_text()


def test_no_descriptor_or_memory_is_left_after_close(file: Path) -> None:
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(8):
        mapping = Mapping(file)
        assert mapping.data[1] == 1
        mapping.close()
    gc.collect()
    assert len(os.listdir("/proc/self/fd")) == before


def test_address_ranges_cover_the_arrays(file: Path) -> None:
    mapping = Mapping(file)
    ((address, size),) = mapping.address_ranges()
    assert (address, size) == (mapping.data.ctypes.data, 8192)
    assert address % os.sysconf("SC_PAGE_SIZE") == 0


def test_an_empty_file_is_empty(tmp_path: Path) -> None:
    (tmp_path / "empty").touch()
    mapping = Mapping(tmp_path / "empty")
    assert mapping.data.nbytes == 0
    assert mapping.address_ranges() == []


def test_use_after_close_is_refused(file: Path) -> None:
    mapping = Mapping(file)
    mapping.close()
    with pytest.raises(UsageError, match="was closed"):
        _ = mapping.data


@pytest.mark.parametrize("action", ["truncate", "replace", "touch"])
def test_a_changed_file_is_noticed(file: Path, action: str) -> None:
    mapping = Mapping(file)
    if action == "truncate":
        os.truncate(file, 100)
    elif action == "replace":
        (file.parent / "new").write_bytes(file.read_bytes())
        (file.parent / "new").rename(file)
    else:
        os.utime(file, ns=(1, 1))
    with pytest.raises(FormatError, match="changed while in use"):
        mapping.check_unchanged()
    with pytest.raises(FormatError, match="changed while in use"):
        _ = mapping.data


def test_only_regular_files_are_mapped(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path, tmp_path / "pipe"):
        with pytest.raises(FormatError, match="not a regular file"):
            Mapping(path)
    with pytest.raises(NotFoundError, match="there is no file"):
        Mapping(tmp_path / "absent")
    with pytest.raises(NotFoundError):
        Mapping(tmp_path / "pipe" / "inside")


def test_first_overlap() -> None:
    assert first_overlap([(0, 4, "a"), (4, 8, "b"), (4, 4, "empty"), (8, 9, "c")]) is None
    assert first_overlap([(4, 8, "b"), (0, 5, "a")]) == ("a", "b")
    assert first_overlap([(0, 9, "a"), (3, 4, "b")]) == ("a", "b")


def test_mapped_source_keeps_the_contract(file: Path) -> None:
    mapping = Mapping(file)
    entries = {"b": Entry(TensorInfo("b", "U8", (2, 3), 6), mapping, 10)}
    source = MappedSource("gguf", entries, [mapping], {"key": 1})
    assert isinstance(source, TensorSource)
    assert (list(source), len(source), "b" in source, "c" in source) == (["b"], 1, True, False)
    assert np.array_equal(source.raw("b"), np.arange(10, 16))
    assert source.paths == (file,)
    assert source.metadata == {"key": 1}
    with pytest.raises(NotFoundError, match="no tensor 'c'"):
        source.info("c")
