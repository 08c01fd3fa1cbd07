"""AWQ checkpoints of AutoAWQ, versions GEMM and GEMV: 4 bits, with zero points.

GEMM, in-major: `qweight` int32 [in, out / 8], `qzeros` int32 [groups, out / 8], `scales` [groups, out]; a word's
nibbles, lowest first, are columns 0, 2, 4, 6, 1, 3, 5, 7 of its eight. GEMV, out-major: `qweight` int32 [out, in / 8],
`qzeros` int32 [out, padded groups / 8], `scales` [out, padded groups]; nibbles in plain order.
Source: AutoAWQ's packers (arXiv 2306.00978 for the method).
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from inhouse.core.tensors import CodedRows, Coding, TensorSource
from inhouse.store.quantized.config import QuantConfig
from inhouse.store.quantized.source import CodedLinear, Index, Part, QuantizedSource, widen
from inhouse.store.quantized.words import unpack_words

PER_WORD = 8
# Where column j of a word's eight lies among its nibbles: the inverse of 0, 2, 4, 6, 1, 3, 5, 7.
_PLACE = np.array([0, 4, 1, 5, 2, 6, 3, 7])
_INERT = ("modules_to_not_convert", "do_fuse", "modules_to_fuse", "fuse_max_seq_len", "exllama_config", "backend")
_BOTH = ("qweight", "qzeros", "scales")


def _nibbles(words: npt.NDArray[np.uint32]) -> npt.NDArray[np.uint8]:
    """uint32 [n, m] -> nibbles uint8 [n, m, 8], lowest first."""
    shifts = np.arange(0, 32, 4, dtype=np.uint32)
    return ((words[..., None] >> shifts) & np.uint32(15)).astype(np.uint8)


@dataclass(frozen=True, slots=True)
class GemmLinear:
    """One linear of version GEMM."""

    part: Part
    outputs: int
    inputs: int
    group: int
    groups: int

    @property
    def label(self) -> str:
        return "AWQ-4"

    @property
    def shape(self) -> tuple[int, int]:
        return self.outputs, self.inputs

    @property
    def parts(self) -> tuple[str, ...]:
        return tuple(self.part.name(name) for name in _BOTH)

    def coding(self) -> Coding:
        return Coding("int", 4, 0 if self.groups == 1 else self.group, self.part.scale_type("scales"), zeros=True)

    def columns(self) -> Index | None:
        return None

    def rows(self, index: Index) -> CodedRows:
        words, places = index // PER_WORD, _PLACE[index % PER_WORD]
        shifts = (4 * places).astype(np.uint32)
        codes = (self.part.words("qweight")[:, words] >> shifts) & np.uint32(15)
        zeros = (self.part.words("qzeros")[:, words] >> shifts) & np.uint32(15)
        scales = widen(self.part.floats("scales")[:, index].T)
        return CodedRows(
            np.ascontiguousarray(codes.T.astype(np.uint8)), scales, np.ascontiguousarray(zeros.T.astype(np.uint8))
        )


@dataclass(frozen=True, slots=True)
class GemvLinear(GemmLinear):
    """One linear of version GEMV; groups are padded in the file."""

    def rows(self, index: Index) -> CodedRows:
        codes = unpack_words(self.part.words("qweight")[index].T, 4, self.inputs)
        zeros = _nibbles(self.part.words("qzeros")[index]).reshape(index.size, -1)[:, : self.groups]
        scales = widen(self.part.floats("scales")[index][:, : self.groups])
        return CodedRows(np.ascontiguousarray(codes.T), scales, np.ascontiguousarray(zeros))


def open_awq(source: TensorSource, config: QuantConfig) -> QuantizedSource:
    """The linears of an AWQ checkpoint. Raises FormatError, UnsupportedError."""
    bits, group = config.integer("bits", "w_bit"), config.integer("group_size", "q_group_size", default=128)
    version = config.text("version", "format", default="gemm").lower()
    if bits != 4:
        raise config.unsupported("bits", bits)
    if version not in ("gemm", "gemv"):
        raise config.unsupported("version", version)
    config.expect("zero_point", (True,))
    config.expect("method", ("awq",))
    config.expect("sym", (False,))
    config.finish(_INERT)
    linears: dict[str, CodedLinear] = {}
    for name in source:
        if name.endswith(".qweight"):
            prefix = name.removesuffix(".qweight")
            part = Part(source, prefix)
            linears[f"{prefix}.weight"] = _gemm(part, group) if version == "gemm" else _gemv(part, group)
    return QuantizedSource(source, linears)


def _group(part: Part, group: int, inputs: int) -> int:
    size = inputs if group == -1 or group >= inputs else group
    if size < 1 or inputs % size:
        raise part.fault(f"{inputs} inputs are no multiple of the group of {group}")
    return size


def _gemm(part: Part, group: int) -> GemmLinear:
    inputs, words = part.info("qweight", ("I32",), 2).shape
    scales = part.info("scales", ("F16", "BF16", "F32"), 2).shape
    zeros = part.info("qzeros", ("I32",), 2).shape
    if inputs == 0 or words == 0:
        raise part.fault("qweight is empty")
    size = _group(part, group, inputs)
    groups = inputs // size
    if scales != (groups, words * PER_WORD) or zeros != (groups, words):
        raise part.fault(f"scales {list(scales)} and qzeros {list(zeros)} do not fit qweight [{inputs}, {words}]")
    return GemmLinear(part, words * PER_WORD, inputs, size, groups)


def _gemv(part: Part, group: int) -> GemvLinear:
    outputs, words = part.info("qweight", ("I32",), 2).shape
    scales = part.info("scales", ("F16", "BF16", "F32"), 2).shape
    zeros = part.info("qzeros", ("I32",), 2).shape
    inputs = words * PER_WORD
    if inputs == 0 or outputs == 0:
        raise part.fault("qweight is empty")
    size = _group(part, group, inputs)
    groups = inputs // size
    if scales[0] != outputs or zeros[0] != outputs or scales[1] < groups or zeros[1] * PER_WORD < groups:
        raise part.fault(f"scales {list(scales)} and qzeros {list(zeros)} do not fit qweight [{outputs}, {words}]")
    return GemvLinear(part, outputs, inputs, size, groups)
