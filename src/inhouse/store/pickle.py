"""PyTorch checkpoints (.bin, .pt, .pth) as a TensorSource, without torch and without running anything in them.

Knows the two containers of torch.save (zip, and the legacy row of pickles) and sharded folders; the pickle itself
is read by `unpickler`. Tensors are views of the mapping; one that is not contiguous in its storage is copied
each time it is read. Source: torch.serialization.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from inhouse.core.errors import FormatError, UnsupportedError
from inhouse.core.tensors import TensorInfo
from inhouse.store import zip_entries
from inhouse.store.dtypes import PLAIN_BYTES
from inhouse.store.mapping import Entry, MappedSource
from inhouse.store.mapping import Mapping as FileMapping
from inhouse.store.safetensors import check_complete, check_shard, read_index
from inhouse.store.unpickler import MAX_PICKLE_BYTES, Storage, TensorRecord, Unpickler

INDEX_NAME = "pytorch_model.bin.index.json"
LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
LEGACY_PROTOCOL = 1001
# A tensor that repeats its storage (stride 0) may be small in the file and huge in memory.
MAX_EXPANDED_BYTES = 64 << 20
# Under these keys training loops keep the model beside their own state.
_WRAPPERS = ("state_dict", "model_state_dict", "model", "module")


@dataclass(frozen=True, slots=True)
class Strided:
    """A tensor whose elements are not in row-major order in the file; `stride` counts elements."""

    entry: Entry
    span: int  # bytes from the first to behind the last element
    stride: tuple[int, ...]


class TorchSource(MappedSource):
    """A TensorSource of format `torch`; `metadata` holds the numbers and strings saved beside the tensors."""

    def __init__(
        self,
        entries: Mapping[str, Entry],
        strided: Mapping[str, Strided],
        mappings: list[FileMapping],
        metadata: Mapping[str, Any],
    ) -> None:
        super().__init__("torch", entries, mappings, metadata)
        self._strided = strided

    def raw(self, name: str) -> npt.NDArray[np.uint8]:
        """The bytes in row-major order, uint8[nbytes], read-only: a view, or a copy if they are not so in the file.

        Raises NotFoundError.
        """
        strided = self._strided.get(name)
        return super().raw(name) if strided is None else _gather(strided)


def open_torch(path: Path) -> TorchSource:
    """One file of torch.save.

    Raises:
        NotFoundError: no such file.
        FormatError: damaged, or the pickle holds anything other than tensors and plain values.
        UnsupportedError: TorchScript, tar files, compressed zips, big-endian, optimiser state and the like.
    """
    mapping = FileMapping(path)
    entries, strided, metadata = _read_file(mapping)
    return TorchSource(entries, strided, [mapping], metadata)


def open_sharded_torch(index: Path) -> TorchSource:
    """The shards named by a `pytorch_model.bin.index.json`, as one source. Raises as `open_torch`, and
    FormatError where index and shards disagree in any tensor."""
    weight_map, metadata = read_index(index, ".bin")
    entries: dict[str, Entry] = {}
    strided: dict[str, Strided] = {}
    mappings = []
    for shard in sorted(set(weight_map.values())):
        mapping = FileMapping(index.parent / shard)
        found, found_strided, own_metadata = _read_file(mapping)
        check_shard(index.name, shard, found, weight_map)
        entries |= found
        strided |= found_strided
        metadata = own_metadata | metadata
        mappings.append(mapping)
    check_complete(index.name, entries, weight_map)
    return TorchSource(entries, strided, mappings, metadata)


def is_torch(head: bytes) -> bool:
    """Whether a file that begins so can be one of torch.save: a zip, or a pickle of protocol 2 to 5."""
    return head.startswith(zip_entries.MAGIC) or (len(head) > 1 and head[0] == 0x80 and 2 <= head[1] <= 5)


def _read_file(mapping: FileMapping) -> tuple[dict[str, Entry], dict[str, Strided], dict[str, Any]]:
    file = mapping.path.name
    if mapping.data[:4].tobytes() == zip_entries.MAGIC:
        top, place = _read_zip(mapping)
    elif mapping.data[257:262].tobytes() == b"ustar":
        raise UnsupportedError(f"{file} is a tar file of torch before 0.2", remedy="Save it again with torch.save.")
    else:
        top, place = _read_legacy(mapping)
    tensors, metadata = _tensors_of(file, top)
    entries: dict[str, Entry] = {}
    strided: dict[str, Strided] = {}
    for name, record in tensors.items():
        entries[name], loose = _entry(mapping, name, record, place(record.storage))
        if loose is not None:
            strided[name] = loose
    return entries, strided, metadata


def _read_zip(mapping: FileMapping) -> tuple[Any, Callable[[Storage], int]]:
    """(the pickled value, storage -> offset of its first byte in the file)."""
    file = mapping.path.name
    entries = zip_entries.read_entries(mapping)
    roots = [name.removesuffix("/data.pkl") for name in entries if name.endswith("/data.pkl")]
    if len(roots) != 1 or "/" in roots[0]:
        raise FormatError(f"{file}: a zip archive with {len(roots)} data.pkl is not a torch checkpoint")
    root = roots[0]
    if f"{root}/constants.pkl" in entries:
        raise UnsupportedError(f"{file} is a TorchScript program", remedy="Save its state_dict instead.")
    order = entries.get(f"{root}/byteorder")
    if order and mapping.data[order.offset : order.offset + min(order.size, 8)].tobytes() != b"little":
        raise UnsupportedError(f"{file} is not little endian", remedy="Save it on a little-endian machine.")
    pickled = entries[f"{root}/data.pkl"]
    if pickled.size > MAX_PICKLE_BYTES:
        raise FormatError(f"{file}: a pickle of {pickled.size} bytes, the limit is {MAX_PICKLE_BYTES}")
    machine = Unpickler(mapping.data[pickled.offset : pickled.offset + pickled.size].data, 0, file)
    top = machine.load()
    if machine.at != pickled.size:
        raise FormatError(f"{file}: {pickled.size - machine.at} bytes are left over behind the pickle")
    prefix = f"{root}/data/"
    stored = {name[len(prefix) :]: entry for name, entry in entries.items() if name.startswith(prefix)}
    _check_storages(file, machine.storages, {key: entry.size for key, entry in stored.items()})
    return top, lambda storage: stored[storage.key].offset


def _check_storages(file: str, wanted: Mapping[str, Storage], found: Mapping[str, int]) -> None:
    for key, storage in wanted.items():
        if found.get(key) != storage.nbytes:
            raise FormatError(f"{file}: storage {key[:40]!r} takes {storage.nbytes} bytes, found {found.get(key, 0)}")
    left_over = [key for key in found if key not in wanted]
    if left_over:
        raise FormatError(f"{file}: {len(left_over)} storages belong to no tensor, the first is {left_over[0]!r}")


def _read_legacy(mapping: FileMapping) -> tuple[Any, Callable[[Storage], int]]:
    """magic, protocol, machine, value and storage keys, each a pickle; then the storages in the order of the keys."""
    file, data = mapping.path.name, mapping.data.data
    at = 0

    def load() -> tuple[Any, Unpickler]:
        nonlocal at
        machine = Unpickler(data, at, file)
        value = machine.load()
        at = machine.at
        return value, machine

    if load()[0] != LEGACY_MAGIC or load()[0] != LEGACY_PROTOCOL:
        raise FormatError(f"{file} is a pickle, but not one of torch.save")
    system = load()[0]
    if type(system) is not dict or system.get("little_endian") is not True:
        raise UnsupportedError(f"{file} is not little endian", remedy="Save it on a little-endian machine.")
    top, machine = load()
    keys = load()[0]
    if type(keys) is not list or not all(type(key) is str for key in keys) or len(set(keys)) != len(keys):
        raise FormatError(f"{file}: the list of storages is not a list of names")
    offsets: dict[str, int] = {}
    sizes: dict[str, int] = {}
    for key in keys:
        storage = machine.storages.get(key)
        itemsize = PLAIN_BYTES[storage.dtype] if storage else 1
        count = int.from_bytes(data[at : at + 8], "little")
        offsets[key], sizes[key] = at + 8, count * itemsize
        at += 8 + count * itemsize
        if at > data.nbytes:
            raise FormatError(f"{file}: storage {key[:40]!r} ends at {at}, the file has {data.nbytes} bytes")
    if at != data.nbytes:
        raise FormatError(f"{file}: {data.nbytes - at} bytes are left over behind the storages")
    _check_storages(file, machine.storages, sizes)
    return top, lambda storage: offsets[storage.key]


def _tensors_of(file: str, top: Any) -> tuple[dict[str, TensorRecord], dict[str, Any]]:
    """(name -> tensor, the plain values beside them)."""
    metadata: dict[str, Any] = {}
    if type(top) is dict and not any(type(value) is TensorRecord for value in top.values()):
        wrapper = next((key for key in _WRAPPERS if type(top.get(key)) is dict), None)
        if wrapper is not None:
            metadata = _plain_values(file, {key: value for key, value in top.items() if key != wrapper})
            top = top[wrapper]
    if type(top) is not dict:
        raise UnsupportedError(f"{file} holds a {type(top).__name__}, not a table of tensors")
    tensors = {key: value for key, value in top.items() if type(key) is str and type(value) is TensorRecord}
    rest = {key: value for key, value in top.items() if key not in tensors}
    return tensors, metadata | _plain_values(file, rest)


def _plain_values(file: str, values: Mapping[Any, Any]) -> dict[str, Any]:
    for key, value in values.items():
        if type(key) is not str or not isinstance(value, bool | int | float | str | None):
            raise UnsupportedError(
                f"{file}: the entry {str(key)[:80]!r} is a {type(value).__name__}, not a tensor",
                remedy="Save the model's state_dict alone.",
                param=str(key)[:80],
            )
    return dict(values)


def _entry(mapping: FileMapping, name: str, record: TensorRecord, base: int) -> tuple[Entry, Strided | None]:
    """The tensor's place; base is the offset of its storage's first byte in the file."""
    itemsize = PLAIN_BYTES[record.dtype]
    nbytes = math.prod(record.shape) * itemsize
    begin = base + record.storage.begin + record.offset * itemsize
    entry = Entry(TensorInfo(name, record.dtype, record.shape, nbytes), mapping, begin)
    if nbytes == 0 or _is_contiguous(record):
        return entry, None
    if nbytes > max(record.storage.nbytes, MAX_EXPANDED_BYTES):
        raise UnsupportedError(
            f"{mapping.path.name}: tensor {name!r} repeats {record.storage.nbytes} bytes to {nbytes}", param=name
        )
    steps = sum((size - 1) * step for size, step in zip(record.shape, record.stride, strict=True))
    return entry, Strided(entry, (steps + 1) * itemsize, record.stride)


def _is_contiguous(record: TensorRecord) -> bool:
    step = 1
    for size, stride in zip(reversed(record.shape), reversed(record.stride), strict=True):
        if size != 1 and stride != step:
            return False
        step *= size
    return True


def _gather(strided: Strided) -> npt.NDArray[np.uint8]:
    entry = strided.entry
    itemsize = PLAIN_BYTES[entry.info.dtype]
    span = entry.mapping.data[entry.offset : entry.offset + strided.span].view(f"V{itemsize}")
    view = np.lib.stride_tricks.as_strided(
        span, entry.info.shape, [step * itemsize for step in strided.stride], writeable=False
    )
    out = np.ascontiguousarray(view).reshape(-1).view(np.uint8)
    out.flags.writeable = False
    return out
