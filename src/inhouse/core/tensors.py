"""The words that formats, families and the binder share: what a tensor on disk is, and where it comes from."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, runtime_checkable

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


@dataclass(frozen=True, slots=True)
class Coding:
    """How a quantised matrix [out, in] of a checkpoint is written: value = scale * (code - zero), rounded once to f32.

    `kind`: what a code is: `int` (unsigned, of `bits` bits), `f8_e4m3` or `f8_e5m2` (a float of one byte), or a key of
    a lookup table (`nf4`, `fp4`, `mxfp4`, `nvfp4`).
    `group`: inputs that share a scale, counted along the packed columns; 0: the whole row.
    `scale`: `F16`, `BF16` or `F32`: a type that holds every scale exactly.
    `zeros`: each group has a zero point; without them the code 2^(bits - 1) of kind `int` means 0.
    `per_token`: the checkpoint was made for int8 activations with one scale a token.
    """

    kind: str
    bits: int
    group: int
    scale: str
    zeros: bool = False
    per_token: bool = False


class CodedRows(NamedTuple):
    """Some rows of a quantised matrix, taken apart without rounding."""

    codes: npt.NDArray[np.uint8]  # [n, in], in packed column order
    scales: npt.NDArray[np.float32]  # [n, groups]
    zeros: npt.NDArray[np.uint8] | None = None  # [n, groups], where the coding has zero points
    sub_scales: npt.NDArray[np.uint8] | None = None  # [n, groups] bytes; then `scales` is [n, 1] (nvfp4)


@runtime_checkable
class CodedSource(TensorSource, Protocol):
    """A TensorSource that shows each quantised linear of a checkpoint as one tensor [out, in]."""

    def coding(self, name: str) -> Coding | None:
        """How that tensor is coded; None for one that is not quantised. Raises FormatError if its parts disagree."""

    def coded_rows(self, name: str, rows: npt.NDArray[np.int64]) -> CodedRows:
        """Rows of a quantised tensor. Raises FormatError for contents that its format does not allow."""

    def columns(self, name: str) -> npt.NDArray[np.int64] | None:
        """int64 [in] where the columns are kept in another order (act-order): packed column j is input columns[j]."""

    def notes(self) -> tuple[str, ...]:
        """What the reader leaves out of account, one sentence each."""
