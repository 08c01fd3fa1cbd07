"""4-bit floats (e2m1) with small scales: NVFP4 (a float8 scale for 16 inputs and one f32 for all) and MXFP4 (a power
of two for 32 inputs). Two codes a byte, the even column in the low nibble; bit 3 is the sign, bits 0..2 index 0, 0.5,
1, 1.5, 2, 3, 4, 6. Sources: OCP Microscaling Formats 1.0; the compressed-tensors package; ModelOpt's export."""

from dataclasses import dataclass

import numpy as np

from inhouse.core.errors import FormatError
from inhouse.core.tensors import CodedRows, Coding, TensorSource
from inhouse.store.quantized.config import QuantConfig
from inhouse.store.quantized.source import CodedLinear, Index, Part, QuantizedSource, widen

_GROUPS = {"nvfp4": 16, "mxfp4": 32}


@dataclass(frozen=True, slots=True)
class Float4Linear:
    """One linear of 4-bit floats."""

    part: Part
    kind: str  # nvfp4 | mxfp4
    outputs: int
    inputs: int
    codes: str  # suffix of the packed codes
    whole: str  # suffix of the scale of all (nvfp4)
    inverse: bool  # that scale divides (compressed-tensors); else it multiplies (ModelOpt)

    @property
    def label(self) -> str:
        return self.kind.upper()

    @property
    def shape(self) -> tuple[int, int]:
        return self.outputs, self.inputs

    @property
    def parts(self) -> tuple[str, ...]:
        names = [self.codes, "weight_scale"] + ([self.whole] if self.kind == "nvfp4" else [])
        return tuple(self.part.name(name) for name in names)

    def coding(self) -> Coding:
        return Coding(self.kind, 4, _GROUPS[self.kind], "F32")

    def columns(self) -> Index | None:
        return None

    def rows(self, index: Index) -> CodedRows:
        pairs = self.part.array(self.codes, np.uint8)[index]
        codes = np.stack([pairs & np.uint8(15), pairs >> np.uint8(4)], axis=-1).reshape(index.size, self.inputs)
        subs = np.ascontiguousarray(self.part.array("weight_scale", np.uint8)[index])
        scale = np.ones(1, np.float32)
        if self.kind == "nvfp4":
            found = widen(self.part.floats(self.whole)).reshape(1)
            scale = np.float32(1) / found if self.inverse else found
        return CodedRows(codes, np.repeat(scale[:, None], index.size, 0), sub_scales=subs)


def float4_linear(part: Part, kind: str, codes: str, whole: str, *, inverse: bool) -> Float4Linear:
    """One linear, its shapes proven. Raises FormatError."""
    outputs, pairs = part.info(codes, ("U8",), 2).shape
    inputs = 2 * pairs
    allowed = ("F8_E4M3",) if kind == "nvfp4" else ("U8", "F8_E8M0")
    shape = part.info("weight_scale", allowed, 2).shape
    if 0 in (outputs, inputs) or inputs % _GROUPS[kind] or shape != (outputs, inputs // _GROUPS[kind]):
        raise part.fault(f"weight_scale {list(shape)} does not fit [{outputs}, {inputs}] of {kind}")
    if kind == "nvfp4" and int(np.prod(part.info(whole, ("F32",)).shape)) != 1:
        raise part.fault(f"{whole} is not one number")
    return Float4Linear(part, kind, outputs, inputs, codes, whole, inverse)


@dataclass(frozen=True, slots=True)
class MxExperts:
    """Matrices of every expert in one tensor (gpt-oss): `X_blocks` [experts, out, in / 32, 16] bytes of two codes, and
    `X_scales` [experts, out, in / 32]. Shown as `X_blocks` [experts, out, in]; its rows are those of all experts."""

    source: TensorSource
    stem: str
    shape: tuple[int, ...]

    @property
    def label(self) -> str:
        return "MXFP4"

    @property
    def parts(self) -> tuple[str, ...]:
        return f"{self.stem}_blocks", f"{self.stem}_scales"

    def coding(self) -> Coding:
        return Coding("mxfp4", 4, _GROUPS["mxfp4"], "F32")

    def columns(self) -> Index | None:
        return None

    def rows(self, index: Index) -> CodedRows:
        pairs = self.source.raw(self.parts[0]).reshape(-1, self.shape[-1] // 2)[index]
        codes = np.stack([pairs & np.uint8(15), pairs >> np.uint8(4)], axis=-1).reshape(index.size, -1)
        subs = np.ascontiguousarray(self.source.raw(self.parts[1]).reshape(-1, self.shape[-1] // 32)[index])
        return CodedRows(codes, np.ones((index.size, 1), np.float32), sub_scales=subs)


def open_mxfp4(source: TensorSource, config: QuantConfig) -> QuantizedSource:
    """The experts of a gpt-oss checkpoint. Raises FormatError, UnsupportedError."""
    config.finish(("modules_to_not_convert", "dequantize"))
    linears: dict[str, CodedLinear] = {}
    for name in source:
        if name.endswith("_blocks"):
            stem = name.removesuffix("_blocks")
            blocks = source.info(name)
            scales = source.info(f"{stem}_scales").shape if f"{stem}_scales" in source else ()
            if blocks.dtype != "U8" or len(blocks.shape) != 4 or blocks.shape[3] != 16 or 0 in blocks.shape:
                raise FormatError(f"tensor {name!r} is {blocks.dtype} {list(blocks.shape)}, not blocks", param=name)
            if scales != blocks.shape[:3] or source.info(f"{stem}_scales").dtype != "U8":
                raise FormatError(f"tensor {name!r} has no byte of scale for each block", param=name)
            linears[name] = MxExperts(source, stem, (*blocks.shape[:2], 32 * blocks.shape[2]))
    return QuantizedSource(source, linears)
