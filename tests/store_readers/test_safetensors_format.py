"""Safetensors: equal to the reference package both ways, and every broken rule refused by its own message."""

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import safetensors.numpy as reference

from inhouse.core.errors import FormatError, InhouseError, NotFoundError, UnsupportedError, UsageError
from inhouse.core.tensors import TensorInfo
from inhouse.store.safetensors import open_safetensors, open_sharded, write_safetensors
from inhouse.store.writing import TensorData, from_array, from_bytes, from_source

pytestmark = pytest.mark.null
Arrays = dict[str, npt.NDArray[Any]]
DTYPES = ["bool", "u1", "i1", "u2", "i2", "f2", "u4", "i4", "f4", "u8", "i8", "f8"]


@pytest.fixture(scope="module")
def arrays() -> Arrays:
    """Every dtype of numpy in odd shapes, a scalar and an empty one."""
    rng = np.random.default_rng(7)
    out: Arrays = {f"t.{d}": (rng.random((3, 5)) * 100).astype(d) for d in DTYPES}
    return out | {"scalar": np.array(3.5, np.float32), "empty": np.zeros((0, 4), np.int32), "ünïcode": np.arange(3)}


def test_reads_what_the_reference_writes(tmp_path: Path, arrays: Arrays) -> None:
    path = tmp_path / "model.safetensors"
    reference.save_file(arrays, path, {"format": "np", "other": "x"})
    source = open_safetensors(path)
    assert (source.format, dict(source.metadata)) == ("safetensors", {"format": "np", "other": "x"})
    assert set(source) == set(arrays)
    for name, array in arrays.items():
        info, raw = source.info(name), source.raw(name)
        assert (info.shape, info.nbytes) == (array.shape, array.nbytes)
        assert raw.tobytes() == array.tobytes()
        assert not raw.flags.writeable
        assert raw.base is not None, "a copy was made"


def test_writes_the_very_bytes_of_the_reference(tmp_path: Path, arrays: Arrays) -> None:
    write_safetensors(tmp_path / "x", [from_array(n, a) for n, a in arrays.items()], {"format": "pt"})
    assert (tmp_path / "x").read_bytes() == reference.save(arrays, {"format": "pt"})
    write_safetensors(tmp_path / "x", [from_array(n, a) for n, a in arrays.items()])
    assert (tmp_path / "x").read_bytes() == reference.save(arrays)


def test_a_copy_of_a_source_is_the_file(stories: Path, tmp_path: Path) -> None:
    original = stories / "hf" / "model.safetensors"
    source = open_safetensors(original)
    write_safetensors(tmp_path / "copy", from_source(source), dict(source.metadata))
    expected, found = reference.load_file(original), reference.load_file(tmp_path / "copy")
    assert expected.keys() == found.keys()
    for name, array in expected.items():
        assert np.array_equal(found[name], array)
        assert source.raw(name).tobytes() == array.tobytes()
        assert source.info(name) == TensorInfo(name, "F32", array.shape, array.nbytes)


@pytest.mark.torch
def test_narrow_floats_against_the_reference(tmp_path: Path) -> None:
    import safetensors.torch
    import torch

    kinds = {
        "BF16": torch.bfloat16,
        "F8_E4M3": torch.float8_e4m3fn,
        "F8_E5M2": torch.float8_e5m2,
        "F8_E8M0": torch.float8_e8m0fnu,
        "C64": torch.complex64,
    }
    tensors = {name: torch.rand(4, 3).to(kind) for name, kind in kinds.items()}
    safetensors.torch.save_file(tensors, tmp_path / "reference")
    source = open_safetensors(tmp_path / "reference")
    for name, tensor in tensors.items():
        assert source.info(name).dtype == name
        assert source.raw(name).tobytes() == tensor.view(torch.uint8).numpy().tobytes()
    write_safetensors(tmp_path / "ours", from_source(source))
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "reference").read_bytes()


def entry(begin: int = 0, end: int = 8, shape: Any = (2,), dtype: Any = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": list(shape) if isinstance(shape, tuple) else shape, "data_offsets": [begin, end]}


def put(path: Path, header: bytes | dict[str, Any], data: int = 8, length: int | None = None) -> Path:
    text = json.dumps(header).encode() if isinstance(header, dict) else header
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + bytes(data))
    return path


def test_a_minimal_file_is_read(tmp_path: Path) -> None:
    source = open_safetensors(put(tmp_path / "x", {"a": entry()}))
    assert source.info("a") == TensorInfo("a", "F32", (2,), 8)
    assert len(open_safetensors(put(tmp_path / "x", b"{}   ", data=0))) == 0


BROKEN: list[tuple[str, dict[str, Any] | bytes, int, type[InhouseError]]] = [
    ("leaves a hole", {"a": entry(4, 12)}, 12, FormatError),
    ("leaves a hole", {"a": entry(0, 8), "b": entry(9, 17)}, 17, FormatError),
    ("overlaps", {"a": entry(0, 8), "b": entry(4, 12)}, 12, FormatError),
    ("overlaps", {"a": entry(0, 8), "b": entry(0, 8)}, 8, FormatError),
    ("the file has", {"a": entry()}, 7, FormatError),
    ("the file has", {"a": entry()}, 9, FormatError),
    ("takes 12", {"a": entry(shape=(3,))}, 8, FormatError),
    ("takes 4", {"a": entry(shape=())}, 8, FormatError),
    ("takes 0", {"a": entry(shape=(0, 1 << 62))}, 8, FormatError),
    ("takes", {"a": entry(shape=(1 << 62, 1 << 62))}, 8, FormatError),
    ("spans -8", {"a": entry(8, 0)}, 8, FormatError),
    ("shape of 'a'", {"a": entry(shape=(-2,))}, 8, FormatError),
    ("shape of 'a'", {"a": entry(shape=(True, 2))}, 8, FormatError),
    ("shape of 'a'", {"a": entry(shape=(2.0,))}, 8, FormatError),
    ("shape of 'a'", {"a": entry(shape=(1 << 63,))}, 8, FormatError),
    ("shape of 'a'", {"a": entry(shape="2")}, 8, FormatError),
    ("shape of 'a'", {"a": entry(shape=(1,) * 65)}, 8, FormatError),
    ("data_offsets of 'a'", {"a": {"dtype": "F32", "shape": [2], "data_offsets": [0]}}, 8, FormatError),
    ("data_offsets of 'a'", {"a": {"dtype": "F32", "shape": [2], "data_offsets": [False, 8]}}, 8, FormatError),
    ("data_offsets of 'a'", {"a": {"dtype": "F32", "shape": [2], "data_offsets": [-8, 0]}}, 8, FormatError),
    ("entry of 'a'", {"a": entry() | {"extra": 1}}, 8, FormatError),
    ("entry of 'a'", {"a": {"dtype": "F32", "shape": [2]}}, 8, FormatError),
    ("entry of 'a'", {"a": 1}, 8, FormatError),
    ("unknown type 'F33'", {"a": entry(dtype="F33")}, 8, FormatError),
    ("unknown type", {"a": entry(dtype=["F32"])}, 8, FormatError),
    ("type F4", {"a": entry(dtype="F4")}, 8, UnsupportedError),
    ("table of strings", {"__metadata__": {"a": 1}}, 0, FormatError),
    ("table of strings", {"__metadata__": "a"}, 0, FormatError),
    ("duplicate key", b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},"a":1}', 8, FormatError),
    ("begin with", b' {"a":1}', 0, FormatError),
    ("not valid JSON", b'{"a":', 0, FormatError),
    ("not valid JSON", b'{"\xff":1}', 0, FormatError),
    ("nested deeper", b'{"a":{"shape":[[]]}}', 0, FormatError),
    ("nested deeper|not valid", b'{"a":' + b"[" * 200_000, 0, FormatError),
]


@pytest.mark.parametrize(("cause", "header", "data", "kind"), BROKEN)
def test_refused(tmp_path: Path, cause: str, header: Any, data: int, kind: type[InhouseError]) -> None:
    with pytest.raises(kind, match=cause):
        open_safetensors(put(tmp_path / "bad.safetensors", header, data))


@pytest.mark.parametrize("length", [9, 1 << 20, 100_000_001, 1 << 63, (1 << 64) - 1])
def test_header_lengths_are_checked_before_they_are_used(tmp_path: Path, length: int) -> None:
    with pytest.raises(FormatError, match="a header of"):
        open_safetensors(put(tmp_path / "bad", b"{}", data=6, length=length))


def test_every_truncation_is_refused(tmp_path: Path) -> None:
    whole = reference.save({"a": np.ones((2, 3), np.float32), "b": np.ones(3, np.float16)})
    for size in range(len(whole)):
        (tmp_path / "cut").write_bytes(whole[:size])
        with pytest.raises(FormatError):
            open_safetensors(tmp_path / "cut")


# Shards.


def shard(folder: Path, change: Callable[[dict[str, Any], dict[str, Arrays]], None] | None = None) -> Path:
    files: dict[str, Arrays] = {
        "m-1.safetensors": {"a": np.arange(4.0), "b": np.ones(3, np.float32)},
        "m-2.safetensors": {"c": np.zeros(2)},
    }
    index: dict[str, Any] = {
        "metadata": {"total_size": 60},
        "weight_map": {name: file for file, tensors in files.items() for name in tensors},
    }
    if change:
        change(index, files)
    for name, tensors in files.items():
        reference.save_file(tensors, folder / name, {"format": "pt"})
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder / "model.safetensors.index.json"


def test_shards_are_one_source(tmp_path: Path) -> None:
    source = open_sharded(shard(tmp_path))
    assert dict(source.metadata) == {"total_size": 60, "format": "pt"}
    assert list(source) == ["a", "b", "c"]
    assert [path.name for path in source.paths] == ["m-1.safetensors", "m-2.safetensors"]
    assert np.array_equal(source.raw("a").view(np.float64), np.arange(4.0))
    assert np.array_equal(source.raw("c").view(np.float64), np.zeros(2))


def _set(index: dict[str, Any], name: str, value: Any) -> None:
    index["weight_map"][name] = value


@pytest.mark.parametrize(
    ("change", "cause"),
    [
        (lambda index, files: _set(index, "d", "m-2.safetensors"), "1 tensors .* in no shard: d"),
        (lambda index, files: index["weight_map"].pop("b"), "'b', which .* places in no file"),
        (lambda index, files: files["m-2.safetensors"].update(a=np.ones(1)), "'a', which .* places in m-1"),
        (lambda index, files: _set(index, "a", "../m-1.safetensors"), "not a plain"),
        (lambda index, files: _set(index, "a", "/etc/x.safetensors"), "not a plain"),
        (lambda index, files: _set(index, "a", "m-1.bin"), "not a plain"),
        (lambda index, files: _set(index, "a", 1), "not a plain"),
        (lambda index, files: index.pop("weight_map"), "no table weight_map"),
        (lambda index, files: index.update(weight_map={}), "no table weight_map"),
        (lambda index, files: index.update(metadata=[]), "metadata is not an object"),
    ],
)
def test_shards_that_disagree_are_refused(tmp_path: Path, change: Any, cause: str) -> None:
    with pytest.raises(FormatError, match=cause):
        open_sharded(shard(tmp_path, change))


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    index = shard(tmp_path)
    (tmp_path / "m-2.safetensors").unlink()
    with pytest.raises(NotFoundError, match=r"m-2\.safetensors"):
        open_sharded(index)


# Writing.


def test_a_failed_write_leaves_the_old_file_and_no_other(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(b"old")

    def broken() -> npt.NDArray[np.uint8]:
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write_safetensors(path, [TensorData(TensorInfo("a", "U8", (3,), 3), broken)])
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("tensors", "cause"),
    [
        ([from_array("a", np.ones(1)), from_array("a", np.ones(1))], "given twice"),
        ([from_array("__metadata__", np.ones(1))], "reserved"),
        ([from_bytes("a", "Q4_0", (32,), np.zeros(18, np.uint8))], "no type Q4_0"),
        ([from_bytes("a", "F32", (32,), np.zeros(18, np.uint8))], "do not match"),
    ],
)
def test_what_cannot_be_written_is_refused(tmp_path: Path, tensors: list[TensorData], cause: str) -> None:
    with pytest.raises(UsageError, match=cause):
        write_safetensors(tmp_path / "x", tensors)
    assert not list(tmp_path.iterdir())


def test_a_tensor_that_gives_another_size_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match="announced 4 bytes and gave 3"):
        write_safetensors(tmp_path / "x", [TensorData(TensorInfo("a", "U8", (4,), 4), lambda: np.zeros(3, np.uint8))])
    assert not list(tmp_path.iterdir())


def test_numpy_types_without_a_name_are_refused() -> None:
    with pytest.raises(FormatError, match="complex128 cannot be written"):
        from_array("a", np.ones(1, np.complex128))


def test_big_endian_and_strided_arrays_are_written_by_value(tmp_path: Path) -> None:
    array = np.arange(12, dtype=">f4").reshape(3, 4)
    write_safetensors(tmp_path / "x", [from_array("a", array.T)])
    assert np.array_equal(reference.load_file(tmp_path / "x")["a"], array.T.astype("<f4"))
