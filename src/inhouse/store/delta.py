"""Delta files: what turns one version of a model into another, a fraction of its size; exact unless asked otherwise.

    head      magic, where the manifest is and how long, its sha256, sha256 of the 56 bytes before
    payloads  one compressed piece after the other
    manifest  JSON: base and new version, for each file of the new one its steps

A step says how a run of the new file comes from the base: `same`, `diff`, `xor`, `sparse`, `coded` (delta_codec),
`patch` (zstd with the base's run as dictionary), `plain` (nothing older), `bit` (lossy, one bit an element). Every
payload has its sha256 in the manifest, every file of the result its own: one flipped byte anywhere is found. Knows
bytes and files; does not know the catalog (`load.delta`).
"""

import hashlib
import json
import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import zstandard

from inhouse.core.errors import ConflictError, FormatError, NotFoundError, UnsupportedError
from inhouse.core.progress import Progress, silent
from inhouse.store import delta_bits as bits
from inhouse.store import delta_codec as codec
from inhouse.store.delta_codec import PIECE, U8
from inhouse.store.delta_runs import Run, runs_of, tensor_places
from inhouse.store.mapping import Mapping as FileMapping
from inhouse.store.store import check_inner_path
from inhouse.store.strict_json import parse_object
from inhouse.store.writing import atomic_file, named_target

MAGIC = b"INHOUSE DELTA\0\0\0"
VERSIONS = (1, 2)  # 2: with steps that are `coded`; files without one are written as 1
PATCH, BIT = "patch", "bit"
MAX_PATCH_BYTES = 64 << 20  # of a run that zstd holds as a dictionary
MAX_MANIFEST_BYTES = 256 << 20
_HEAD = struct.Struct("<16sQQ32s")
_SEAL = 32
LITTLE = 0.9  # a delta of more than this share of the new version says little more than the version itself


@dataclass(frozen=True, slots=True)
class FileSet:
    """The files of one version: name inside the model -> (path on disk, sha256 in hexadecimal)."""

    digest: str
    files: Mapping[str, tuple[Path, str]]

    @property
    def paths(self) -> dict[str, Path]:
        return {name: path for name, (path, _) in self.files.items()}


@dataclass(frozen=True, slots=True)
class Made:
    """A written delta. `ways` counts the bytes of the new version by how they are said. tensors: of the new version,
    without those in files that the base has too; strangers: those that the base lacks by name, type and shape."""

    path: Path
    nbytes: int
    new_nbytes: int
    ways: Mapping[str, int]
    lossy: bool
    tensors: int = 0
    strangers: int = 0

    @property
    def share(self) -> float:
        """Of the new version's bytes."""
        return self.nbytes / max(self.new_nbytes, 1)

    @property
    def note(self) -> str:
        """What the user should know of two versions that have little to do with one another; else ""."""
        size = f"the delta is {self.share:.0%} of the new version"
        if self.tensors and self.strangers == self.tensors:
            return f"the old version has none of the {self.tensors} tensors by name, type and shape: {size}"
        if self.strangers:
            return f"the old version lacks {self.strangers} of {self.tensors} tensors by name, type and shape: {size}"
        return f"the versions have little in common: {size}" if self.share > LITTLE else ""


def make_delta(
    base: FileSet, new: FileSet, path: Path, about: Mapping[str, Any], *, lossy: bool = False,
    progress: Progress = silent,
) -> Made:  # fmt: skip
    """Writes the delta from `base` to `new`, atomically.

    Args:
        about: what else the manifest says of the new version (JSON).
        lossy: float matrices become base + scale * sign (BitDelta, arXiv 2402.10193), a scale a row; the result's own
            digests stand in the manifest, so that applying it is checked all the same.

    Raises FormatError, ConflictError (the file exists), NotFoundError (its folder does not), and what `named_target`
    raises.
    """
    with named_target(path):
        taken, has_folder = path.exists(), path.absolute().parent.is_dir()
    if taken:
        raise ConflictError(f"{path} is there already", remedy="Name a file that is not")
    if not has_folder:
        raise NotFoundError(
            f"there is no folder {path.parent} to write a delta into", remedy="Make it, or name another", param="file"
        )
    total = sum(file.stat().st_size for file, _ in new.files.values())
    with named_target(path), atomic_file(path) as out:
        out.write(bytes(_HEAD.size + _SEAL))
        writer = _Writer(base, out, lossy, total, progress)
        files = [writer.file(name, *new.files[name]) for name in sorted(new.files)]
        manifest = {
            "delta": VERSIONS[codec.CODED in writer.ways],
            "base": base.digest,
            "lossy": lossy,
            "about": dict(about),
            "files": files,
        }
        start, text = out.tell(), codec.compress(json.dumps(manifest, separators=(",", ":")).encode())
        out.write(text)
        head = _HEAD.pack(MAGIC, start, len(text), hashlib.sha256(text).digest())
        out.seek(0)
        out.write(head + hashlib.sha256(head).digest())
    return Made(path, path.stat().st_size, total, writer.ways, lossy, writer.tensors, writer.strangers)


class _Writer:
    """Appends payloads and collects the steps of each file."""

    def __init__(self, base: FileSet, out: BinaryIO, lossy: bool, total: int, progress: Progress) -> None:
        self._base, self._out, self._lossy = base, out, lossy
        self._mapped = {name: FileMapping(path) for name, path in base.paths.items()}
        self._places = tensor_places(base.paths)
        self._wholes: dict[str, list[Run]] = {}
        self._by_digest = {digest: name for name, (_, digest) in base.files.items()}
        self._total, self._done, self._progress = total, 0, progress
        self.ways: dict[str, int] = {}
        self.tensors = self.strangers = 0

    def file(self, name: str, path: Path, digest: str) -> dict[str, Any]:
        """The steps of one file of the new version."""
        mapping = FileMapping(path)
        entry: dict[str, Any] = {"path": name, "size": mapping.size, "sha256": digest}
        twin = self._by_digest.get(digest)
        if twin is not None:
            self._count("same", mapping.size)
            return entry | {"copy": twin}
        steps, result = [], hashlib.sha256()
        for run in runs_of(path, name):
            older = self._older(run, name)
            self.tensors += bool(run.tensor)
            self.strangers += bool(run.tensor) and older is None
            for at in range(run.begin, run.end, PIECE):
                end = min(at + PIECE, run.end)
                step, made = self._step(mapping.data[at:end], run, at - run.begin, older)
                result.update(np.ascontiguousarray(made).data)
                steps.append(step)
        mapping.check_unchanged()
        return entry | {"sha256": result.hexdigest(), "steps": steps}

    def _older(self, run: Run, name: str) -> tuple[str, Run] | None:
        """The run of the base that this one is likest to: the tensor of that name, type and shape, else what lies at
        the same place of the same file."""
        if run.tensor:
            return self._places.get((run.tensor, run.dtype, run.shape))
        if name not in self._base.files:
            return None
        if name not in self._wholes:  # once a file: a GGUF has a gap after most tensors
            self._wholes[name] = [r for r in runs_of(self._base.files[name][0], name) if not r.tensor]
        wholes = self._wholes[name]
        same = [r for r in wholes if r.begin == run.begin] or wholes[:1]
        return (name, same[0]) if same else None

    def _step(self, new: U8, run: Run, offset: int, older: tuple[str, Run] | None) -> tuple[list[Any], U8]:
        """[way, bytes, base file, base offset, base bytes, width, type, payload offset, payload bytes, sha256] and what
        it will give."""
        base, place = None, ("", 0, 0)
        if older is not None:
            file, found = older
            begin = found.begin + (offset if run.tensor else 0)
            length = new.size if run.tensor else min(found.size, MAX_PATCH_BYTES)
            base, place = self._mapped[file].data[begin : begin + length], (file, begin, length)
        made = new
        if self._lossy and base is not None and bits.fits(run.dtype, run.shape):
            way, payload, made = BIT, *bits.encode(new, base, run.dtype, run.shape[-1])
        elif base is not None and base.size == new.size:
            way, payload = codec.encode(new, base, run.width, run.dtype)
        elif base is not None and base.size and new.size <= MAX_PATCH_BYTES:
            way, payload = PATCH, _patch(new, base)
        else:
            (way, payload), place = codec.encode(new, None, run.width, run.dtype), ("", 0, 0)
        self._count(way, new.size)
        at = self._out.tell()
        self._out.write(payload)
        digest = hashlib.sha256(payload).hexdigest()
        return [way, new.size, *place, run.width, run.dtype, at, len(payload), digest, run.shape[-1:]], made

    def _count(self, way: str, size: int) -> None:
        self.ways[way] = self.ways.get(way, 0) + size
        self._done += size
        self._progress("delta", self._done, self._total)


def _patch(new: U8, base: U8) -> bytes:
    older = zstandard.ZstdCompressionDict(base.tobytes(), dict_type=zstandard.DICT_TYPE_RAWCONTENT)
    return zstandard.ZstdCompressor(level=codec.LEVEL, dict_data=older).compress(new.tobytes())


def _unpatch(payload: bytes, base: U8, size: int) -> U8:
    older = zstandard.ZstdCompressionDict(base.tobytes(), dict_type=zstandard.DICT_TYPE_RAWCONTENT)
    try:
        if zstandard.frame_content_size(payload) != size:
            raise FormatError(f"a part of the delta does not hold the {size} bytes that it stands for")
        plain = zstandard.ZstdDecompressor(dict_data=older).decompress(payload, max_output_size=size)
    except zstandard.ZstdError as error:
        raise FormatError(f"a part of the delta does not decompress: {error}") from None
    return np.frombuffer(plain, np.uint8)


class Delta:
    """An open delta file. Raises FormatError if its head or manifest is damaged, UnsupportedError for a newer form."""

    def __init__(self, path: Path) -> None:
        self._mapping = FileMapping(path)
        self._name = path.name
        document = self._read_manifest()
        if document.get("delta") not in VERSIONS:
            forms = " and ".join(map(str, VERSIONS))
            raise UnsupportedError(
                f"{path.name} is a delta of the form {document.get('delta')!r}, {forms} are read",
                remedy="Update Inhouse",
            )
        files, base, about = document.get("files"), document.get("base"), document.get("about")
        if not isinstance(files, list) or not isinstance(base, str) or not isinstance(about, dict):
            raise FormatError(f"{path.name} has no list of files")
        self.base = base
        self.about: Mapping[str, Any] = about
        self.lossy = bool(document.get("lossy"))
        self.files = [_checked(path.name, entry) for entry in files]

    @property
    def new_nbytes(self) -> int:
        """Bytes of the version that it makes."""
        return sum(entry["size"] for entry in self.files)

    def _read_manifest(self) -> Mapping[str, Any]:
        data, edge = self._mapping.data, _HEAD.size + _SEAL
        head = data[: _HEAD.size].tobytes()
        if data.size < edge or hashlib.sha256(head).digest() != data[_HEAD.size : edge].tobytes():
            raise FormatError(f"{self._name} is not a whole delta file", remedy="Fetch it again.")
        magic, start, length, digest = _HEAD.unpack(head)
        if magic != MAGIC or start + length != data.size:
            raise FormatError(f"{self._name} is not a whole delta file", remedy="Fetch it again.")
        text = data[start:].tobytes()
        if hashlib.sha256(text).digest() != digest:
            raise FormatError(f"{self._name} has a damaged manifest", remedy="Fetch it again.")
        size = zstandard.frame_content_size(text)
        if not 0 <= size <= MAX_MANIFEST_BYTES:
            raise FormatError(f"{self._name} has a manifest of {size} bytes, the limit is {MAX_MANIFEST_BYTES}")
        plain = zstandard.ZstdDecompressor().decompress(text, max_output_size=size)
        return parse_object(plain, what=self._name, max_depth=8)

    def verify(self) -> None:
        """Compares every payload with its sha256. Raises FormatError naming the first that differs."""
        for entry in self.files:
            for step in entry.get("steps", ()):
                self._payload(entry["path"], step)

    def apply(self, base: FileSet, folder: Path, progress: Progress = silent) -> list[tuple[str, Path]]:
        """Writes the new version's files into an empty folder: (name inside the model, file) each.

        Raises FormatError for a base that is not the one it was made from, for a damaged payload, and where a file
        comes out with another sha256 than promised (a base that was damaged on disk); nothing of it is then of use.
        """
        if base.digest != self.base:
            raise FormatError(
                f"{self._name} changes the version {self.base[:12]}..., this one is {base.digest[:12]}...",
                remedy="Apply it to the version it was made from.",
                wanted=self.base, found=base.digest,
            )  # fmt: skip
        mapped = {name: FileMapping(path) for name, path in base.paths.items()}
        done, out = 0, []
        for entry in self.files:
            target = folder / check_inner_path(entry["path"])
            target.parent.mkdir(parents=True, exist_ok=True)
            digest = hashlib.sha256()
            with open(target, "xb") as file:
                for piece in self._pieces(entry, mapped):
                    whole = np.ascontiguousarray(piece).data
                    digest.update(whole)
                    file.write(whole)
                    done += piece.size
                    progress("apply", done, self.new_nbytes)
            if digest.hexdigest() != entry["sha256"]:
                raise FormatError(
                    f"{entry['path']} comes out with another sha256 than the delta promises",
                    remedy="The base version is damaged on disk: verify it, or fetch it again.", param=entry["path"],
                )  # fmt: skip
            out.append((entry["path"], target))
        return out

    def _pieces(self, entry: Mapping[str, Any], mapped: Mapping[str, FileMapping]) -> Iterator[U8]:
        twin = entry.get("copy")
        if twin is not None:
            if twin not in mapped:
                raise FormatError(f"{self._name} copies {twin!r}, which the base does not have")
            data = mapped[twin].data
            yield from (data[at : at + PIECE] for at in range(0, data.size, PIECE))
            return
        for step in entry["steps"]:
            yield self._piece(entry["path"], step, mapped)

    def _piece(self, name: str, step: Sequence[Any], mapped: Mapping[str, FileMapping]) -> U8:
        way, size, file, begin, length, width, dtype, *_, last = step
        payload = self._payload(name, step)
        base = None
        if file:
            if file not in mapped or begin + length > mapped[file].size:
                raise FormatError(f"{self._name} reads beyond {file!r} of the base")
            base = mapped[file].data[begin : begin + length]
        if way == PATCH and base is not None:
            return _unpatch(payload, base, size)
        if way == BIT and base is not None and base.size == size:
            return bits.decode(payload, base, dtype, last[0] if last else 0)
        return codec.decode(way, payload, size, base, width, dtype)

    def _payload(self, name: str, step: Sequence[Any]) -> bytes:
        at, length, digest = step[7:10]
        if at + length > self._mapping.size:
            raise FormatError(f"{self._name} ends before a part of {name}")
        payload = self._mapping.data[at : at + length].tobytes()
        if hashlib.sha256(payload).hexdigest() != digest:
            raise FormatError(f"{self._name} is damaged: a part of {name} has another sha256", remedy="Fetch it again.")
        return payload

    def close(self) -> None:
        """Drops the mapping."""
        self._mapping.close()


_STEP = (str, int, str, int, int, int, str, int, int, str, list)


def _checked(name: str, entry: Any) -> dict[str, Any]:
    """The entry of a file, if its fields are what they must be. Raises FormatError."""
    good = (
        isinstance(entry, dict)
        and isinstance(entry.get("path"), str)
        and isinstance(entry.get("sha256"), str)
        and type(entry.get("size")) is int
        and 0 <= entry["size"] < 1 << 60
        and (isinstance(entry.get("copy"), str) or isinstance(entry.get("steps"), list))
    )
    if not good or not all(map(_is_step, entry.get("steps", ()))):
        raise FormatError(f"{name} has an entry that is none")
    sizes = sum(step[1] for step in entry.get("steps", ()))
    if "copy" not in entry and sizes != entry["size"]:
        raise FormatError(f"{name}: the steps of {entry['path']} give {sizes} bytes of {entry['size']}")
    return dict(entry)


def _is_step(step: Any) -> bool:
    if not isinstance(step, list) or len(step) != len(_STEP):
        return False
    if any(type(value) is not kind for value, kind in zip(step, _STEP, strict=True)):
        return False
    numbers = (step[1], step[3], step[4], step[7], step[8])
    return (
        all(0 <= number < 1 << 60 for number in numbers)
        and step[1] <= MAX_PATCH_BYTES
        and step[5] in (1, 2, 4, 8)
        and step[1] % step[5] == 0
        and all(type(value) is int and 0 < value < 1 << 40 for value in step[10])
    )
