"""The words that formats, families and the binder share: what a tensor on disk is, and where it comes from."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """One tensor as its file describes it.

    `dtype` is upper case: a plain type (`F32 F16 BF16 F64 I8 U8 I16 I32 I64 BOOL F8_E4M3 F8_E5M2`) or a
    GGUF block type (`Q4_0 Q4_1 Q5_0 Q5_1 Q8_0 Q2_K Q3_K Q4_K Q5_K Q6_K ...`).
    `shape` is in row-major (numpy, torch) order whatever the file's own order: a linear is [out, in].
    `nbytes` is the size of its raw bytes.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    nbytes: int


@runtime_checkable
class TensorSource(Protocol):
    """Lazy, memory-mapped tensors of one checkpoint, whatever format it came in.

    Opening checks every offset and size against the file; reading never copies and never fails for a file
    that has not changed since. All methods are thread-safe.
    """

    @property
    def format(self) -> str:
        """`safetensors`, `gguf` or `torch`."""

    @property
    def metadata(self) -> Mapping[str, Any]:
        """Key-value metadata of the file (GGUF's KV table; safetensors' `__metadata__`)."""

    def __iter__(self) -> Iterator[str]:
        """Tensor names in file order."""

    def __contains__(self, name: object) -> bool: ...

    def __len__(self) -> int: ...

    def info(self, name: str) -> TensorInfo:
        """Raises NotFoundError if there is no such tensor."""

    def raw(self, name: str) -> npt.NDArray[np.uint8]:
        """The tensor's bytes, uint8[nbytes], read-only, a view of the mapping (no copy)."""

    def close(self) -> None:
        """Drops the mapping; arrays handed out before stay valid until they are collected."""
