"""FP8 checkpoints: e4m3 (or e5m2) weights with a scale for the tensor, each channel, or each block of 128 x 128.

`weight` float8 [out, in], and `weight_scale` or `weight_scale_inv`, which both multiply, whatever the second one's
name says. Scales of the activations (`input_scale`, `activation_scale`) are not used: activations stay floats.
Source: the fp8 and fbgemm_fp8 quantisers of Hugging Face transformers, DeepSeek-V3's model card.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

import numpy as np
import numpy.typing as npt

from inhouse.core.tensors import CodedRows, Coding, TensorSource
from inhouse.store.quantized.config import QuantConfig
from inhouse.store.quantized.source import CodedLinear, Index, Part, QuantizedSource, widen

KINDS = {"F8_E4M3": "f8_e4m3", "F8_E5M2": "f8_e5m2"}
_SCALE_TYPES = ("F32", "F16", "BF16", "F8_E8M0")
_INERT = ("modules_to_not_convert", "modules_to_convert", "ignored_layers", "activation_scheme", "activation_scale_ub",
          "dequantize", "fmt", "ignore", "kv_cache_scheme")  # fmt: skip
UNUSED = ("*.input_scale", "*.activation_scale", "*.k_scale", "*.v_scale", "*.q_scale", "*.prob_scale",
          "*.input_scale_ub", "*.output_scale", "*.input_zero_point", "*.output_zero_point",
          "*.input_global_scale")  # fmt: skip


@dataclass(frozen=True, slots=True)
class Float8Linear:
    """One linear of one-byte floats."""

    part: Part
    outputs: int
    inputs: int
    scale: str  # suffix of the scale
    block: tuple[int, int]  # outputs and inputs that share a scale; 0: all

    @property
    def label(self) -> str:
        return self.part.source.info(self.part.name("weight")).dtype

    @property
    def shape(self) -> tuple[int, int]:
        return self.outputs, self.inputs

    @property
    def parts(self) -> tuple[str, ...]:
        return self.part.name("weight"), self.part.name(self.scale)

    def coding(self) -> Coding:
        return Coding(KINDS[self.label], 8, self.block[1], "F32")

    def columns(self) -> Index | None:
        return None

    def rows(self, index: Index) -> CodedRows:
        codes = np.ascontiguousarray(self.part.array("weight", np.uint8)[index])
        scales = self._scales().reshape(-1, -(-self.inputs // self.block[1]) if self.block[1] else 1)
        which = index // self.block[0] if self.block[0] else np.zeros_like(index)
        return CodedRows(codes, np.ascontiguousarray(scales[which]))

    def _scales(self) -> npt.NDArray[np.float32]:
        if self.part.source.info(self.part.name(self.scale)).dtype == "F8_E8M0":
            exponents = self.part.array(self.scale, np.uint8).astype(np.int32) - 127
            return np.ldexp(np.float32(1), exponents).astype(np.float32)
        return widen(self.part.floats(self.scale))


def open_float8(source: TensorSource, config: QuantConfig) -> QuantizedSource:
    """The linears of an FP8 checkpoint. Raises FormatError, UnsupportedError."""
    block = config.raw("weight_block_size")
    config.expect("scale_fmt", ("float", "ue8m0"))
    config.expect("expert_dtype", ("fp8",))
    config.expect("quant_algo", ("FP8",))
    config.finish(_INERT)
    size = (0, 0)
    if block is not None:
        if not isinstance(block, list) or len(block) != 2 or not all(type(n) is int and n > 0 for n in block):
            raise config.unsupported("weight_block_size", block)
        size = (block[0], block[1])
    linears: dict[str, CodedLinear] = {}
    for name in source:
        if name.endswith(".weight") and source.info(name).dtype in KINDS:
            part = Part(source, name.removesuffix(".weight"))
            suffix = "weight_scale_inv" if part.has("weight_scale_inv") else "weight_scale"
            linears[name] = float8_linear(part, suffix, size)
    unused, notes = unused_scales(source)
    return QuantizedSource(source, linears, unused, notes)


def float8_linear(part: Part, suffix: str, block: tuple[int, int]) -> Float8Linear:
    """One linear; `block` (0, 0) where the scale's own shape says tensor or channel."""
    outputs, inputs = part.info("weight", tuple(KINDS), 2).shape
    shape = part.info(suffix, _SCALE_TYPES).shape
    if 0 in (outputs, inputs):
        raise part.fault("weight is empty")
    count = int(np.prod(shape))
    if block[0] and shape == (-(-outputs // block[0]), -(-inputs // block[1])):
        return Float8Linear(part, outputs, inputs, suffix, block)
    if count == 1:
        return Float8Linear(part, outputs, inputs, suffix, (0, 0))
    if shape in ((outputs,), (outputs, 1)):
        return Float8Linear(part, outputs, inputs, suffix, (1, 0))
    raise part.fault(f"{suffix} {list(shape)} fits neither the tensor, nor its {outputs} rows, nor blocks of {block}")


def unused_scales(source: TensorSource, patterns: Sequence[str] = UNUSED) -> tuple[list[str], list[str]]:
    """(tensors that set the range of activations or of the cache, the note that says so)."""
    found = [name for name in source if any(fnmatchcase(name, pattern) for pattern in patterns)]
    if not found:
        return [], []
    kinds = ", ".join(sorted({name.rsplit(".", 1)[-1] for name in found}))
    return found, [f"{len(found)} static scales of activations or cache are not used ({kinds}): both keep their range"]
