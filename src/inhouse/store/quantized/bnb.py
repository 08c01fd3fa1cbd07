"""bitsandbytes checkpoints: NF4 and FP4 (blocks of the flattened matrix, also with nested scales) and LLM.int8.

4 bits: `weight` bytes, the even element in the high nibble; `weight.absmax` f32 of each block, or bytes that index
`weight.nested_quant_map` times `weight.nested_absmax` plus an offset; `weight.quant_map` f32 [16]; and
`weight.quant_state.bitsandbytes__nf4`, JSON with shape and block size. int8: `weight` int8 [out, in], `SCB` f32 [out].
Source: bitsandbytes' QuantState and serialisation (arXiv 2305.14314, 2208.07339 for the methods).
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from inhouse.core.errors import UnsupportedError
from inhouse.core.tensors import CodedRows, Coding, TensorSource
from inhouse.store.quantized.config import QuantConfig
from inhouse.store.quantized.source import CodedLinear, Index, Part, QuantizedSource
from inhouse.store.strict_json import parse_object

_STATE = "weight.quant_state.bitsandbytes__"
_INERT = ("load_in_4bit", "load_in_8bit", "_load_in_*", "bnb_4bit_*", "llm_int8_*", "modules_to_not_convert")
# What each code means, as bitsandbytes saves it in quant_map; another table would be another format.
TABLES: dict[str, tuple[float, ...]] = {
    "nf4": (
        -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
        -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
        0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
    ),
    "fp4": (
        0.0, 0.0052083334885537624, 0.6666666865348816, 1.0, 0.3333333432674408, 0.5, 0.1666666716337204, 0.25,
        -0.0, -0.0052083334885537624, -0.6666666865348816, -1.0, -0.3333333432674408, -0.5, -0.1666666716337204, -0.25,
    ),
}  # fmt: skip
_TO_SCALE = np.float32(7.874015718698502e-3)  # 1 / 127, as bitsandbytes multiplies


@dataclass(frozen=True, slots=True)
class Bnb4Linear:
    """One linear of 4-bit lookup codes."""

    part: Part
    kind: str
    outputs: int
    inputs: int
    block: int
    state: str  # name of the tensor with the JSON
    nested: tuple[int, float] | None  # block size and offset of the scales' own quantisation

    @property
    def label(self) -> str:
        return f"BNB-{self.kind.upper()}"

    @property
    def shape(self) -> tuple[int, int]:
        return self.outputs, self.inputs

    @property
    def parts(self) -> tuple[str, ...]:
        names = ["weight", "weight.absmax", "weight.quant_map", "weight.nested_absmax", "weight.nested_quant_map"]
        return (*(self.part.name(name) for name in names if self.part.has(name)), self.state)

    def coding(self) -> Coding:
        return Coding(self.kind, 4, self.block, "F32")

    def columns(self) -> Index | None:
        return None

    def rows(self, index: Index) -> CodedRows:
        raw = self.part.source.raw(self.part.name("weight")).reshape(self.outputs, self.inputs // 2)[index]
        codes = np.stack([raw >> np.uint8(4), raw & np.uint8(15)], axis=-1).reshape(index.size, self.inputs)
        return CodedRows(codes, self._scales(index))

    def _scales(self, index: Index) -> npt.NDArray[np.float32]:
        per = self.inputs // self.block
        if self.nested is None:
            return np.ascontiguousarray(self.part.array("weight.absmax", "<f4").reshape(-1, per)[index], np.float32)
        size, offset = self.nested
        places = index[:, None] * per + np.arange(per)
        codes = self.part.array("weight.absmax", np.uint8).reshape(-1)[places]
        found = self.part.array("weight.nested_quant_map", "<f4").reshape(-1)[codes]
        scaled = found * self.part.array("weight.nested_absmax", "<f4").reshape(-1)[places // size]
        return np.asarray(scaled + np.float32(offset), np.float32)


@dataclass(frozen=True, slots=True)
class Bnb8Linear:
    """One linear of LLM.int8: the value is code * SCB / 127."""

    part: Part
    outputs: int
    inputs: int

    @property
    def label(self) -> str:
        return "BNB-INT8"

    @property
    def shape(self) -> tuple[int, int]:
        return self.outputs, self.inputs

    @property
    def parts(self) -> tuple[str, ...]:
        return self.part.name("weight"), self.part.name("SCB")

    def coding(self) -> Coding:
        return Coding("int", 8, 0, "F32")

    def columns(self) -> Index | None:
        return None

    def rows(self, index: Index) -> CodedRows:
        codes = self.part.array("weight", np.uint8)[index] ^ np.uint8(128)
        return CodedRows(codes, (self.part.array("SCB", "<f4")[index] * _TO_SCALE)[:, None])


def open_bnb(source: TensorSource, config: QuantConfig) -> QuantizedSource:
    """The linears of a bitsandbytes checkpoint. Raises FormatError, UnsupportedError."""
    config.finish(_INERT)
    linears: dict[str, CodedLinear] = {}
    unused = []
    for name in source:
        prefix, mark, kind = name.partition(f".{_STATE}")
        if mark:
            linears[f"{prefix}.weight"] = _four(Part(source, prefix), name, kind)
        elif name.endswith(".SCB"):
            prefix = name.removesuffix(".SCB")
            linears[f"{prefix}.weight"] = _eight(Part(source, prefix))
        elif name.endswith(".weight_format"):
            unused.append(name)
            if source.raw(name).any():
                raise UnsupportedError(f"tensor {name!r} says that its int8 weights are tiled", param=name)
    return QuantizedSource(source, linears, unused)


def _eight(part: Part) -> Bnb8Linear:
    outputs, inputs = part.info("weight", ("I8",), 2).shape
    if 0 in (outputs, inputs) or part.info("SCB", ("F32",)).shape != (outputs,):
        raise part.fault(f"SCB does not have a number for each of {outputs} rows")
    return Bnb8Linear(part, outputs, inputs)


def _four(part: Part, name: str, kind: str) -> Bnb4Linear:
    state = parse_object(part.source.raw(name).tobytes(), what=name, max_depth=3)
    shape, block = state.get("shape"), state.get("blocksize")
    if kind not in TABLES or state.get("quant_type") != kind:
        raise UnsupportedError(f"tensor {name!r} is of the unknown type {kind!r}", param=name)
    if not isinstance(shape, list) or len(shape) != 2 or not all(_size(n) for n in [*shape, block]):
        raise part.fault(f"quant_state has shape {str(shape)[:40]} and blocksize {str(block)[:20]}")
    outputs, inputs = shape
    assert isinstance(block, int)
    if inputs % block or inputs % 2:
        raise UnsupportedError(
            f"module {part.prefix}: blocks of {block} cross rows of {inputs}, which no packed format keeps",
            param=part.prefix,
        )
    if 2 * part.source.info(part.name("weight")).nbytes != outputs * inputs:
        raise part.fault(f"weight does not hold {outputs} x {inputs} codes of 4 bits")
    table = part.info("weight.quant_map", ("F32",), 1)
    wanted = np.array(TABLES[kind], np.float32)
    if table.shape != (16,) or not np.allclose(part.array("weight.quant_map", "<f4"), wanted, rtol=0, atol=1e-6):
        raise UnsupportedError(f"module {part.prefix}: quant_map is not the table of {kind}", param=part.prefix)
    return Bnb4Linear(part, kind, outputs, inputs, block, name, _nested(part, state, outputs * inputs // block))


def _size(value: Any) -> bool:
    return type(value) is int and 0 < value < 1 << 40


def _nested(part: Part, state: dict[str, Any], blocks: int) -> tuple[int, float] | None:
    if "nested_blocksize" not in state:
        if part.info("weight.absmax", ("F32",)).shape != (blocks,):
            raise part.fault(f"absmax does not have a number for each of {blocks} blocks")
        return None
    size, offset = state["nested_blocksize"], state.get("nested_offset")
    if not _size(size) or isinstance(offset, bool) or not isinstance(offset, int | float):
        raise part.fault(f"quant_state has nested_blocksize {str(size)[:20]} and nested_offset {str(offset)[:20]}")
    found = (part.info("weight.absmax", ("U8",)).shape, part.info("weight.nested_quant_map", ("F32",)).shape)
    if found != ((blocks,), (256,)) or part.info("weight.nested_absmax", ("F32",)).shape != (-(-blocks // size),):
        raise part.fault(f"absmax and its nested scales do not fit {blocks} blocks")
    return size, float(offset)
