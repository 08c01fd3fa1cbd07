"""The two versions between which `tests/load/delta_v1.delta` lies: made by the release that knew form 1 alone.

python -m tests.load.delta_v1    writes it anew, with the code of that release
"""

import hashlib
from pathlib import Path

import numpy as np
import numpy.typing as npt

from inhouse.store.delta import FileSet, make_delta
from inhouse.store.safetensors import write_safetensors
from inhouse.store.writing import from_bytes

FILE = Path(__file__).with_name("delta_v1.delta")


def noise(count: int, seed: int) -> npt.NDArray[np.uint32]:
    """Numbers that no library decides: xorshift, 32 bits."""
    state, out = seed * 2654435761 % (1 << 32) or 1, np.empty(count, np.uint32)
    for i in range(count):
        state ^= state << 13 & 0xFFFFFFFF
        state ^= state >> 17
        state ^= state << 5 & 0xFFFFFFFF
        out[i] = state
    return out


def versions(folder: Path) -> tuple[FileSet, FileSet]:
    """A base and what was made of it: bf16 that moved a little, that moved here and there, and that did not; bits that
    were turned; a tensor that is new; a text of other length."""
    plain = {name: (0x3C00 + noise(1500, seed) % 0x300).astype(np.uint16) for seed, name in enumerate("abcd", 1)}
    moved = {
        "a": plain["a"] + (noise(1500, 9) % 3).astype(np.uint16) - 1,
        "b": np.where(np.arange(1500) % 97 == 5, plain["b"] + 7, plain["b"]).astype(np.uint16),
        "c": plain["c"], "e": (noise(40, 5) % 0x4000).astype(np.uint16),
    }  # fmt: skip
    bits = noise(64, 7)
    return (
        _files(folder / "base", plain, bits, "once upon a time there was a model\n" * 4),
        _files(folder / "new", moved, bits ^ np.uint32(1 << 20), "once upon a time there was a better model\n" * 5),
    )


def _files(
    folder: Path, tensors: dict[str, npt.NDArray[np.uint16]], bits: npt.NDArray[np.uint32], text: str
) -> FileSet:
    folder.mkdir()
    entries = [from_bytes(name, "BF16", (x.size,), x.view(np.uint8)) for name, x in tensors.items()]
    entries.append(from_bytes("bits", "I32", (bits.size,), bits.view(np.uint8)))
    write_safetensors(folder / "model.safetensors", entries)
    (folder / "readme.txt").write_text(text)
    found = {path.name: (path, hashlib.sha256(path.read_bytes()).hexdigest()) for path in sorted(folder.iterdir())}
    return FileSet(hashlib.sha256(repr(sorted(d for _, d in found.values())).encode()).hexdigest(), found)


if __name__ == "__main__":
    import tempfile

    with tempfile.TemporaryDirectory() as scratch:
        base, new = versions(Path(scratch))
        print(make_delta(base, new, FILE, {}))
