"""Torch checkpoints: equal to torch.save's tensors; hostile pickles execute nothing and end as FormatError."""

import io
import json
import os
import pickle
import struct
import subprocess
import sys
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from inhouse.core.errors import FormatError, NotFoundError, UnsupportedError
from inhouse.store.pickle import open_sharded_torch, open_torch
from inhouse.store.source import open_source
from inhouse.store.unpickler import Unpickler
from inhouse.store.values import materialise

torch = pytest.importorskip("torch", reason="the oracle is torch.save")
pytestmark = pytest.mark.torch

FORMS: list[dict[str, Any]] = [
    {},
    {"pickle_protocol": 4},
    {"_use_new_zipfile_serialization": False},
    {"_use_new_zipfile_serialization": False, "pickle_protocol": 5},
]


def raw_bytes(tensor: Any) -> bytes:
    return (
        bytes(tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()) if tensor.numel() else b""
    )


def sample() -> dict[str, Any]:
    """Every dtype, tied and sliced storages, all sorts of strides."""
    generator = torch.Generator().manual_seed(3)
    base = torch.randn(6, 8, generator=generator)
    kinds: tuple[str, ...] = (
        "uint8",
        "int8",
        "int16",
        "int32",
        "int64",
        "bool",
        "float16",
        "bfloat16",
        "float32",
        "float64",
    )
    kinds += ("complex64", "float8_e4m3fn", "float8_e5m2", "uint16", "uint32", "uint64")
    tensors = {kind: (torch.rand(3, 5, generator=generator) * 9).to(getattr(torch, kind)) for kind in kinds}
    return tensors | {
        "base": base,
        "tied": base,
        "rows": base[2:4],
        "transposed": base.t(),
        "window": base[1:3, 2:5],
        "every other": base[:, ::2],
        "expanded": torch.ones(1).expand(5, 7),
        "permuted": torch.arange(24).reshape(2, 3, 4).permute(2, 0, 1),
        "unit": base[:, :1],
        "scalar": torch.tensor(3.5),
        "empty": torch.zeros(0, 4),
        "parameter": torch.nn.Parameter(torch.ones(2)),
    }


@pytest.mark.parametrize("form", FORMS)
def test_tensors_are_those_that_torch_saved(tmp_path: Path, form: dict[str, Any]) -> None:
    torch.save(sample(), tmp_path / "x.bin", **form)
    source = open_source(tmp_path / "x.bin")
    assert source.format == "torch"
    assert list(source) == list(sample())
    for name, tensor in sample().items():
        info, raw = source.info(name), source.raw(name)
        assert info.shape == tuple(tensor.shape)
        assert info.nbytes == raw.nbytes == tensor.numel() * tensor.element_size()
        assert raw.tobytes() == raw_bytes(tensor), name
        assert not raw.flags.writeable


@pytest.mark.parametrize("form", FORMS)
def test_a_state_dict_of_a_module(tmp_path: Path, form: dict[str, Any]) -> None:
    state = torch.nn.Sequential(torch.nn.Linear(3, 5), torch.nn.LayerNorm(5)).state_dict()
    torch.save(state, tmp_path / "x.bin", **form)
    source = open_torch(tmp_path / "x.bin")
    assert {name: raw_bytes(tensor) for name, tensor in state.items()} == {n: source.raw(n).tobytes() for n in source}
    torch.save({"state_dict": state, "epoch": 3, "loss": 0.5, "note": None}, tmp_path / "y.pt", **form)
    wrapped = open_torch(tmp_path / "y.pt")
    assert list(wrapped) == list(source)
    assert dict(wrapped.metadata) == {"epoch": 3, "loss": 0.5, "note": None}


def test_contiguous_tensors_are_views_and_shared_storages_are_shared(tmp_path: Path) -> None:
    torch.save(sample(), tmp_path / "x.bin")
    source = open_torch(tmp_path / "x.bin")
    ((begin, size),) = source.mappings[0].address_ranges()
    for name in ("base", "rows", "float16"):
        assert begin <= source.raw(name).ctypes.data < begin + size
    assert source.raw("base").ctypes.data == source.raw("tied").ctypes.data
    assert source.raw("rows").ctypes.data == source.raw("base").ctypes.data + 2 * 8 * 4


def test_reading_needs_no_torch(tmp_path: Path) -> None:
    torch.save(sample(), tmp_path / "x.bin")
    code = (
        "import sys, pathlib; from inhouse.store.source import open_source;"
        "s = open_source(pathlib.Path(sys.argv[1])); print(sum(s.raw(n).nbytes for n in s), 'torch' in sys.modules)"
    )
    out = subprocess.run([sys.executable, "-c", code, tmp_path / "x.bin"], capture_output=True, text=True, check=True)
    assert out.stdout.split() == [str(sum(t.numel() * t.element_size() for t in sample().values())), "False"]


def test_shards(tmp_path: Path) -> None:
    tensors = sample()
    names = list(tensors)
    shards = {"pytorch_model-1.bin": names[:10], "pytorch_model-2.bin": names[10:]}
    for file, part in shards.items():
        torch.save({name: tensors[name] for name in part}, tmp_path / file)
    weight_map = {name: file for file, part in shards.items() for name in part}
    index = tmp_path / "pytorch_model.bin.index.json"
    index.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map}))
    for source in (open_source(tmp_path), open_sharded_torch(index)):
        assert set(source) == set(tensors)
        for name, tensor in tensors.items():
            assert source.raw(name).tobytes() == raw_bytes(tensor)
    index.write_text(json.dumps({"weight_map": weight_map | {"more": "pytorch_model-2.bin"}}))
    with pytest.raises(FormatError, match="in no shard: more"):
        open_source(tmp_path)
    (tmp_path / "pytorch_model-2.bin").unlink()
    with pytest.raises(NotFoundError):
        open_source(tmp_path)


@pytest.mark.realdata
def test_a_real_model_saved_by_torch(stories: Path, tmp_path: Path) -> None:
    original = open_source(stories / "hf")
    state = {name: torch.from_numpy(materialise(original, name)) for name in original}
    torch.save(state, tmp_path / "pytorch_model.bin")
    found = open_source(tmp_path)
    assert {n: found.raw(n).tobytes() for n in found} == {n: original.raw(n).tobytes() for n in original}


# Hostile pickles. The canary is a file that any executed payload would create.


class Calls:
    """Pickles as a call of any function: what `__reduce__` allows and attackers use."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> Any:
        return self.call


class Stateful:
    """Pickles as an object with state: BUILD."""

    def __init__(self) -> None:
        self.value = 1


def as_zip(path: Path, pickled: bytes, storages: dict[str, bytes] | None = None, method: int = 0) -> Path:
    with zipfile.ZipFile(path, "w", method) as archive:
        archive.writestr("archive/data.pkl", pickled)
        archive.writestr("archive/version", "3\n")
        for key, data in (storages or {}).items():
            archive.writestr(f"archive/data/{key}", data)
    return path


def as_legacy(path: Path, pickled: bytes) -> Path:
    head = [pickle.dumps(value, 2) for value in (0x1950A86A20F9469CFC6C, 1001, {"little_endian": True})]
    path.write_bytes(b"".join(head) + pickled + pickle.dumps([], 2))
    return path


def raw_code(module: str, name: str, argument: str, call: bytes = b"R") -> bytes:
    return (
        b"\x80\x02c"
        + f"{module}\n{name}\n".encode()
        + b"(X"
        + struct.pack("<I", len(argument))
        + (argument.encode() + b"t" + call + b".")
    )


def hostile(canary: Path) -> dict[str, bytes]:
    touch = f"touch {canary}"
    python = f"open({str(canary)!r}, 'w')"
    stacked = b"\x80\x04\x8c\x02os\x8c\x06system\x93" + pickle.dumps(touch, 4)[2:-1] + b"\x85R."
    return {
        "os.system": pickle.dumps(Calls(os.system, touch), 2),
        "posix.system by GLOBAL": raw_code("posix", "system", touch),
        "STACK_GLOBAL": stacked,
        "exec": pickle.dumps(Calls(exec, python), 2),
        "eval": raw_code("builtins", "eval", python),
        "old builtins": raw_code("__builtin__", "eval", python),
        "getattr": raw_code("builtins", "getattr", "x"),
        "subprocess": pickle.dumps(Calls(subprocess.call, ["touch", str(canary)]), 2),
        "inside a state dict": pickle.dumps({"weight": Calls(os.system, touch)}, 2),
        "inside an OrderedDict": pickle.dumps(OrderedDict(weight=Calls(os.system, touch)), 2),
        "NEWOBJ": raw_code("subprocess", "Popen", touch, b"\x81"),
        "OBJ": b"(c" + b"os\nsystem\n" + pickle.dumps(touch, 0)[:-1] + b"o.",
        "INST": b"(" + pickle.dumps(touch, 0)[:-1] + b"ios\nsystem\n.",
        "BUILD on an object": pickle.dumps(Stateful(), 2),
        "BUILD with other state": b"\x80\x02}}X\x01\x00\x00\x00aK\x01sb.",
        "BUILD on a storage type": b"\x80\x02ctorch\nFloatStorage\n}b.",
        "a call of a storage type": b"\x80\x02ctorch\nFloatStorage\n)R.",
        "a call of a dtype": b"\x80\x02ctorch\nfloat32\n)R.",
        "a call of a string": b"\x80\x02X\x09\x00\x00\x00os.system)R.",
        "torch.load": raw_code("torch", "load", str(canary)),
        "torch.hub": raw_code("torch.hub", "load", str(canary)),
        "a dotted name": raw_code("torch", "_utils.os.system", touch),
        "a spaced name": raw_code("torch._utils ", "_rebuild_tensor_v2", touch),
        "an extension code": b"\x80\x02\x82\x01.",
        "_rebuild_tensor_v2 of others": raw_code("torch._utils", "_rebuild_tensor_v2", touch),
        "a module by persistent id": b"\x80\x02X\x06\x00\x00\x00moduleK\x01K\x02\x87Q.",
        "a text persistent id": b"Pstorage\n.",
        "numpy reconstruct": pickle.dumps(np.ones(2), 2),
        "bytearray": pickle.dumps(bytearray(10), 5),
        "a set": pickle.dumps({1, 2}, 4),
        "a huge number": b"\x80\x02\x8b" + struct.pack("<I", 1 << 30) + b".",
        "a long number": b"\x80\x02\x8a\xff" + b"\xff" * 255 + b".",
        "a huge string": b"\x80\x02X\xff\xff\xff\xff.",
        "a huge memo index": b"\x80\x02Nr\xff\xff\xff\x7fj\xff\xff\xff\x7e.",
        "an unknown memo index": b"\x80\x02h\x05.",
        "marks without end": b"\x80\x02" + b"(" * 100_000 + b".",
        "tuples without end": b"\x80\x02)" + b"\x85" * 200_000 + b".",
        "a dict that holds itself": b"\x80\x02}q\x00X\x01\x00\x00\x00ah\x00s.",
        "a list that holds itself": b"\x80\x02]q\x00h\x00a.",
        "a tuple as key": b"\x80\x02}(K\x01K\x02\x86K\x03u.",
        "underflow": b"\x80\x02R.",
        "an empty stack": b"\x80\x02.",
        "pop below a mark": b"\x80\x02N(0.",
        "odd items": b"\x80\x02}(NNNu.",
        "append to a tuple": b"\x80\x02)Na.",
        "nothing": b"",
        "protocol 0": pickle.dumps({"a": 1}, 0),
        "protocol 200": b"\x80\xc8N.",
        "no stop": b"\x80\x02N",
        "a second pickle": pickle.dumps({}, 2) + pickle.dumps(Calls(os.system, touch), 2),
    }


@pytest.mark.parametrize("container", [as_zip, as_legacy])
@pytest.mark.parametrize("attack", sorted(hostile(Path("canary"))))
def test_hostile_pickles_are_refused_and_nothing_runs(
    tmp_path: Path, attack: str, container: Callable[[Path, bytes], Path], peak_bytes: Callable[..., int]
) -> None:
    canary = tmp_path / "canary"
    path = container(tmp_path / "model.bin", hostile(canary)[attack])

    def refused() -> None:
        with pytest.raises((FormatError, UnsupportedError)) as caught:
            open_torch(path)
        assert str(caught.value)

    assert peak_bytes(refused) < 64 << 20
    assert not canary.exists()


def test_the_attacks_would_work_on_a_plain_unpickler(tmp_path: Path) -> None:
    # Proves that the canary sings: the same bytes, given to pickle.loads, do run.
    for attack in ("os.system", "STACK_GLOBAL", "inside a state dict", "INST"):
        canary = tmp_path / attack.replace(" ", "-")
        pickle.loads(hostile(canary)[attack])
        assert canary.exists(), attack


def test_the_machine_resolves_only_its_own_table() -> None:
    for name in ("FloatStorage", "float16", "Size"):
        value = Unpickler(memoryview(b"\x80\x02ctorch\n" + name.encode() + b"\n."), 0, "x").load()
        assert type(value).__module__ == "inhouse.store.unpickler"


# Damaged and unsupported containers.


def saved(form: dict[str, Any]) -> bytes:
    buffer = io.BytesIO()
    torch.save({"a": torch.arange(6.0).reshape(2, 3), "b": torch.ones(2).half()}, buffer, **form)
    return buffer.getvalue()


@pytest.mark.parametrize("form", FORMS)
def test_every_truncation_is_refused(tmp_path: Path, form: dict[str, Any]) -> None:
    whole = saved(form)
    for size in range(0, len(whole), 7):
        (tmp_path / "cut").write_bytes(whole[:size])
        with pytest.raises(FormatError):
            open_torch(tmp_path / "cut")
    (tmp_path / "more").write_bytes(whole + b"\0")
    with pytest.raises(FormatError):
        open_torch(tmp_path / "more")


def tensor_pickle(
    count: int = 6, offset: int = 0, shape: tuple[Any, ...] = (2, 3), stride: tuple[Any, ...] = (3, 1), key: str = "0"
) -> bytes:
    """{"a": one float tensor}, with numbers to choose, as torch would pickle it."""
    storage = pickle.dumps(("storage", "S", key, "cpu", count), 2)[2:-1]
    storage = storage.replace(b"X\x01\x00\x00\x00S", b"ctorch\nFloatStorage\n", 1)
    rest = b"".join(pickle.dumps(value, 2)[2:-1] for value in (offset, shape, stride, False))
    call = b"ctorch._utils\n_rebuild_tensor_v2\n(" + storage + b"Q" + rest + b"ccollections\nOrderedDict\n)RtR"
    return b"\x80\x02}X\x01\x00\x00\x00a" + call + b"s."


DATA = {"0": np.arange(6, dtype=np.float32).tobytes()}


def test_the_hand_made_pickle_is_right(tmp_path: Path) -> None:
    path = as_zip(tmp_path / "x", tensor_pickle(), DATA)
    assert open_torch(path).raw("a").tobytes() == DATA["0"]


@pytest.mark.parametrize(
    ("numbers", "storages", "cause"),
    [
        ({"count": 7}, DATA, "takes 28 bytes, found 24"),
        ({"count": 5}, DATA, "beyond its storage of 20"),
        ({"count": -1}, DATA, "describes a storage wrongly"),
        ({"count": True}, DATA, "describes a storage wrongly"),
        ({"offset": 1}, DATA, "beyond its storage"),
        ({"offset": -1}, DATA, "wrong values"),
        ({"stride": (4, 1)}, DATA, "beyond its storage"),
        ({"stride": (-3, 1)}, DATA, "wrong values"),
        ({"stride": (1,)}, DATA, "2 sizes and 1 strides"),
        ({"shape": (1 << 61, 3)}, DATA, "beyond its storage"),
        ({"shape": (2.0, 3)}, DATA, "wrong values"),
        ({"shape": (1,) * 65, "stride": (1,) * 65}, DATA, "wrong values"),
        ({"key": "../x"}, DATA, "found 0"),
        ({}, {}, "found 0"),
        ({}, DATA | {"1": b"left"}, "1 storages belong to no tensor"),
    ],
)
def test_tensors_that_do_not_fit_are_refused(
    tmp_path: Path, numbers: dict[str, Any], storages: dict[str, bytes], cause: str
) -> None:
    with pytest.raises(FormatError, match=cause):
        open_torch(as_zip(tmp_path / "x", tensor_pickle(**numbers), storages))


def test_a_repeating_tensor_may_not_grow_without_bound(tmp_path: Path) -> None:
    path = as_zip(tmp_path / "x", tensor_pickle(shape=(1 << 40, 6), stride=(0, 1)), DATA)
    with pytest.raises(UnsupportedError, match="repeats 24 bytes"):
        open_torch(path)


def test_compressed_archives_are_refused_before_anything_grows(tmp_path: Path) -> None:
    path = as_zip(tmp_path / "x", tensor_pickle(count=1 << 20), {"0": bytes(4 << 20)}, zipfile.ZIP_DEFLATED)
    assert path.stat().st_size < 1 << 16
    with pytest.raises(UnsupportedError, match="is compressed"):
        open_torch(path)


def test_zip64_entries_are_read(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "x", "w") as archive:
        for name, data in {"archive/data.pkl": tensor_pickle(), "archive/data/0": DATA["0"]}.items():
            with archive.open(name, "w", force_zip64=True) as entry:
                entry.write(data)
    assert open_torch(tmp_path / "x").raw("a").tobytes() == DATA["0"]


def patched(path: Path, old: bytes, new: bytes, count: int = 1) -> Path:
    data = path.read_bytes()
    assert old in data
    path.write_bytes(data.replace(old, new, count))
    return path


def test_broken_archives_are_refused(tmp_path: Path) -> None:
    def fresh() -> Path:
        return as_zip(tmp_path / "x", tensor_pickle(), DATA)

    with pytest.raises(FormatError, match="another name"):
        open_torch(patched(fresh(), b"archive/data/0", b"archive/data/1"))
    with pytest.raises(FormatError, match="no zip record"):
        open_torch(patched(fresh(), b"PK\x01\x02", b"PK\x01\x03"))
    with pytest.raises(FormatError, match="is not there"):
        open_torch(patched(fresh(), b"PK\x05\x06\0\0\0\0\x03\0\x03\0", b"PK\x05\x06\0\0\0\0\xf0\x0f\xf0\x0f"))
    with pytest.raises(FormatError, match="left over in the zip directory"):
        open_torch(patched(fresh(), b"PK\x05\x06\0\0\0\0\x03\0\x03\0", b"PK\x05\x06\0\0\0\0\x02\0\x02\0"))
    with pytest.raises(UnsupportedError, match="several volumes"):
        open_torch(patched(fresh(), b"PK\x05\x06\0\0\0\0\x03\0\x03\0", b"PK\x05\x06\1\0\0\0\x03\0\x03\0"))
    with pytest.warns(UserWarning, match="Duplicate name"), zipfile.ZipFile(fresh(), "a") as archive:
        archive.writestr("archive/data/0", DATA["0"])
    with pytest.raises(FormatError, match="given twice"):
        open_torch(tmp_path / "x")


def test_archives_of_another_kind_are_named(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "x", "w") as archive:
        archive.writestr("word/document.xml", "")
    with pytest.raises(FormatError, match="0 data.pkl"):
        open_torch(tmp_path / "x")
    for name, data, cause in (
        ("archive/constants.pkl", b"", "TorchScript"),
        ("archive/byteorder", b"big", "not little endian"),
    ):
        with zipfile.ZipFile(as_zip(tmp_path / "x", tensor_pickle(), DATA), "a") as archive:
            archive.writestr(name, data)
        with pytest.raises(UnsupportedError, match=cause):
            open_torch(tmp_path / "x")


@pytest.mark.parametrize(
    ("value", "cause"),
    [
        ({"model": {"a": 1}, "optimizer": {"state": {}}}, "'optimizer' is a dict"),
        ({"a": torch.ones(1), "shapes": [1, 2]}, "'shapes' is a list"),
        ([torch.ones(1)], "holds a list"),
        (torch.ones(1), "holds a TensorRecord"),
    ],
)
def test_what_is_not_a_table_of_tensors_is_named(tmp_path: Path, value: Any, cause: str) -> None:
    torch.save(value, tmp_path / "x.pt")
    with pytest.raises(UnsupportedError, match=cause):
        open_torch(tmp_path / "x.pt")


@pytest.mark.parametrize("form", FORMS[::2])
def test_tensors_of_other_kinds_are_refused(tmp_path: Path, form: dict[str, Any]) -> None:
    for value in (
        torch.ones(2, 2).to_sparse(),
        torch.nn.Linear(2, 2),
    ):
        torch.save({"a": value}, tmp_path / "x.pt", **form)
        with pytest.raises(FormatError, match="which is not a tensor"):
            open_torch(tmp_path / "x.pt")
