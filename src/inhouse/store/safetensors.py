"""The safetensors format: one file, or shards named by `model.safetensors.index.json`; read and written.

Knows the header and its rules; does not know what the tensors mean. Layout: u64 (little endian) length n of the
header, n bytes of JSON (`{"name": {"dtype", "shape", "data_offsets": [begin, end]}, "__metadata__": {..}}`), then
the data, to which the offsets refer. The data has no hole, no overlap and nothing after it.
Source: the format section of the safetensors README.
"""

import json
import math
from collections.abc import Iterable, Sequence
from collections.abc import Mapping as MappingType
from pathlib import Path
from typing import Any

from inhouse.core.errors import FormatError, UnsupportedError, UsageError
from inhouse.core.tensors import TensorInfo
from inhouse.store.dtypes import PLAIN_BYTES, PLAIN_RANK
from inhouse.store.mapping import Entry, MappedSource, Mapping
from inhouse.store.strict_json import parse_object, read_json
from inhouse.store.writing import TensorData, atomic_file, write_tensor

MAX_HEADER_BYTES = 100_000_000
MAX_RANK = 64
INDEX_NAME = "model.safetensors.index.json"
_METADATA = "__metadata__"
_ENTRY_KEYS = frozenset({"dtype", "shape", "data_offsets"})
# Types of the format with less than a byte, or a byte of a kind that no op of ours reads.
_UNREAD = frozenset({"F4", "F6_E2M3", "F6_E3M2", "F8_E4M3FNUZ", "F8_E5M2FNUZ"})


def open_safetensors(path: Path) -> MappedSource:
    """One .safetensors file.

    Raises:
        NotFoundError: no such file.
        FormatError: any rule of the format is broken (the message says which and where).
        UnsupportedError: a tensor has a type of the format that we do not read (F4, F6, FNUZ).
    """
    mapping = Mapping(path)
    entries, metadata = _read_file(mapping)
    return MappedSource("safetensors", entries, [mapping], metadata)


def open_sharded(index: Path) -> MappedSource:
    """The shards that an index file names, as one source; tensors in shard order.

    `metadata` holds the index's own and then the shards', the first shard's value where they differ.
    Raises as `open_safetensors`, and FormatError where index and shards disagree in any tensor.
    """
    weight_map, metadata = read_index(index, ".safetensors")
    entries: dict[str, Entry] = {}
    mappings = []
    for shard in sorted(set(weight_map.values())):
        mapping = Mapping(index.parent / shard)
        found, own_metadata = _read_file(mapping)
        check_shard(index.name, shard, found, weight_map)
        entries |= found
        metadata = own_metadata | metadata
        mappings.append(mapping)
    check_complete(index.name, entries, weight_map)
    return MappedSource("safetensors", entries, mappings, metadata)


def read_index(index: Path, suffix: str) -> tuple[dict[str, str], dict[str, Any]]:
    """The (tensor -> shard file) table and the metadata of an index file. Raises FormatError."""
    document = read_json(index)
    weight_map = document.get("weight_map")
    metadata = document.get("metadata", {})
    if not isinstance(weight_map, dict) or not weight_map:
        raise FormatError(f"{index.name} has no table weight_map", param="weight_map")
    if not isinstance(metadata, dict):
        raise FormatError(f"{index.name}: metadata is not an object", param="metadata")
    for name, shard in weight_map.items():
        # A shard lies beside its index: a path would let a model read any file of the machine.
        if not isinstance(shard, str) or Path(shard).name != shard or not shard.endswith(suffix) or "\0" in shard:
            raise FormatError(
                f"{index.name}: tensor {name!r} lies in {shard!r}, which is not a plain *{suffix} name", param=name
            )
    return weight_map, metadata


def check_shard(index: str, shard: str, found: Iterable[str], weight_map: MappingType[str, str]) -> None:
    """Raises FormatError if the shard holds a tensor that the index does not place there."""
    for name in found:
        if weight_map.get(name) != shard:
            place = weight_map.get(name, "no file")
            raise FormatError(f"{shard} holds tensor {name!r}, which {index} places in {place}", param=name)


def check_complete(index: str, found: MappingType[str, Any], weight_map: MappingType[str, str]) -> None:
    """Raises FormatError naming the tensors of the index that no shard holds."""
    missing = [name for name in weight_map if name not in found]
    if missing:
        names = ", ".join(missing[:5])
        raise FormatError(
            f"{len(missing)} tensors of {index} are in no shard: {names}",
            remedy="Fetch the shards again.",
            param=missing[0],
        )


def _read_file(mapping: Mapping) -> tuple[dict[str, Entry], dict[str, Any]]:
    name = mapping.path.name
    start, header = _read_header(mapping)
    metadata = header.pop(_METADATA, {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise FormatError(f"{name}: {_METADATA} is not a table of strings")
    placed = sorted(
        ((*_parse_entry(name, tensor, fields), tensor) for tensor, fields in header.items()), key=lambda e: e[:2]
    )
    entries: dict[str, Entry] = {}
    reach = 0
    for begin, end, info, tensor in placed:
        if begin != reach:
            kind = "overlaps the one before" if begin < reach else "leaves a hole"
            raise FormatError(f"{name}: tensor {tensor!r} begins at {begin}, not {reach}: it {kind}", param=tensor)
        reach = end
        entries[tensor] = Entry(info, mapping, start + begin)
    if start + reach != mapping.size:
        raise FormatError(
            f"{name}: the header describes {start + reach} bytes, the file has {mapping.size}",
            remedy="The file was cut short or added to; fetch it again.",
        )
    return entries, metadata


def _read_header(mapping: Mapping) -> tuple[int, dict[str, Any]]:
    """(where the data starts, the header as an object)."""
    name = mapping.path.name
    if mapping.size < 8:
        raise FormatError(f"{name}: {mapping.size} bytes cannot hold a safetensors header")
    length = int.from_bytes(mapping.data[:8].tobytes(), "little")
    if length > MAX_HEADER_BYTES:
        raise FormatError(f"{name}: a header of {length} bytes, the limit is {MAX_HEADER_BYTES}")
    if length > mapping.size - 8:
        raise FormatError(f"{name}: a header of {length} bytes, {mapping.size - 8} bytes are left in the file")
    text = mapping.data[8 : 8 + length].tobytes()
    if not text.startswith(b"{"):
        raise FormatError(f"{name}: the header does not begin with {{", remedy="This is not a safetensors file.")
    # name -> entry -> shape is the whole depth of a header.
    return 8 + length, parse_object(text, what=f"{name} header", max_depth=3)


def _parse_entry(file: str, name: str, fields: Any) -> tuple[int, int, TensorInfo]:
    """(begin, end, info) of one tensor, begin and end counted from the start of the data."""
    if not isinstance(fields, dict) or fields.keys() != _ENTRY_KEYS:
        raise FormatError(f"{file}: the entry of {name!r} is not dtype, shape, data_offsets", param=name)
    dtype, shape, offsets = fields["dtype"], fields["shape"], fields["data_offsets"]
    if not isinstance(dtype, str) or dtype not in PLAIN_BYTES:
        if isinstance(dtype, str) and dtype in _UNREAD:
            raise UnsupportedError(f"{file}: tensor {name!r} has type {dtype}, which is not read", param=name)
        raise FormatError(f"{file}: tensor {name!r} has the unknown type {str(dtype)[:40]!r}", param=name)
    if not _are_sizes(shape) or len(shape) > MAX_RANK:
        raise FormatError(f"{file}: the shape of {name!r} is not a list of sizes", param=name)
    if not _are_sizes(offsets) or len(offsets) != 2:
        raise FormatError(f"{file}: the data_offsets of {name!r} are not two sizes", param=name)
    begin, end = offsets
    nbytes = math.prod(shape) * PLAIN_BYTES[dtype]
    if end - begin != nbytes:
        raise FormatError(
            f"{file}: tensor {name!r} spans {end - begin} bytes, {dtype} of shape {shape} takes {nbytes}", param=name
        )
    return begin, end, TensorInfo(name, dtype, tuple(shape), nbytes)


def _are_sizes(value: Any) -> bool:
    # `type(..) is int` and not isinstance: True is an int to Python and not to the format.
    return isinstance(value, list) and all(type(item) is int and 0 <= item < 1 << 63 for item in value)


def write_safetensors(path: Path, tensors: Sequence[TensorData], metadata: MappingType[str, str] | None = None) -> None:
    """Writes one file, streamed tensor by tensor, atomically (an old file stays until the new one is whole).

    Tensors are laid out widest type first, then by name, and the header is padded to 8 bytes: every
    tensor is then aligned to its own element size, and the bytes are those that the reference writer gives.
    Raises UsageError: a name is given twice or is `__metadata__`, a type that safetensors does not have.
    """
    ordered = sorted(tensors, key=lambda tensor: (-_rank(tensor.info), tensor.info.name))
    header: dict[str, Any] = {_METADATA: dict(metadata)} if metadata else {}
    reach = 0
    for info in (tensor.info for tensor in ordered):
        if info.name in header or info.name == _METADATA:
            raise UsageError(f"tensor name {info.name!r} is given twice or reserved", param=info.name)
        offsets = [reach, reach + info.nbytes]
        header[info.name] = {"dtype": info.dtype, "shape": list(info.shape), "data_offsets": offsets}
        reach += info.nbytes
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode("utf-8")
    text += b" " * (-len(text) % 8)
    with atomic_file(path) as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for tensor in ordered:
            write_tensor(file, tensor)


def _rank(info: TensorInfo) -> int:
    rank = PLAIN_RANK.get(info.dtype)
    if rank is None:
        raise UsageError(f"tensor {info.name!r}: safetensors has no type {info.dtype}", param=info.name)
    if info.nbytes != math.prod(info.shape) * PLAIN_BYTES[info.dtype]:
        raise UsageError(f"tensor {info.name!r}: {info.nbytes} bytes do not match {info.shape}", param=info.name)
    return rank
