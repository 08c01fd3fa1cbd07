"""compressed-tensors checkpoints (llm-compressor): packed and plain integers, float8, NVFP4 and MXFP4.

Of each module: `weight_packed` int32 [out, words of in] with `weight_shape`, or `weight` int8 / float8 [out, in];
`weight_scale` [out, groups], [out, 1], [1] or one a block; `weight_zero_point` (packed along out); `weight_g_idx`
[in]. Codes are signed in the format and stored with 2^(bits - 1) added. Source: the compressed-tensors package.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from inhouse.core.errors import FormatError, UnsupportedError
from inhouse.core.tensors import CodedRows, Coding, TensorSource
from inhouse.store.quantized.config import QuantConfig, names_module
from inhouse.store.quantized.float4 import Float4Linear, float4_linear
from inhouse.store.quantized.float8 import KINDS, float8_linear, unused_scales
from inhouse.store.quantized.source import CodedLinear, Index, Part, QuantizedSource, column_order, widen
from inhouse.store.quantized.words import RUN, unpack_sparse_words, unpack_words, word_count

FORMATS = (
    "dense", "int-quantized", "float-quantized", "naive-quantized", "pack-quantized", "nvfp4-pack-quantized",
    "mxfp4-pack-quantized", "mixed-precision",
)  # fmt: skip
_INERT = ("ignore", "quantization_status", "global_compression_ratio", "version", "run_compressed")
_FLOATS = ("F16", "BF16", "F32")
_NOTE_KV = "kv_cache_scheme is not used: the cache has the type that was asked for"


@dataclass(frozen=True, slots=True)
class Scheme:
    """What one of config_groups says of its modules' weights."""

    bits: int
    kind: str  # int | float
    group: int  # 0: none given
    block: tuple[int, int]
    symmetric: bool
    per_token: bool  # int8 activations with one scale a token
    targets: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class IntLinear:
    """A linear of integers, packed in words or one a byte."""

    part: Part
    bits: int
    outputs: int
    inputs: int
    group: int  # 0: the whole row
    groups: int
    packed: bool
    dense: bool  # codes cross words
    zeros: bool
    per_token: bool

    @property
    def label(self) -> str:
        return f"CT-INT{self.bits}"

    @property
    def shape(self) -> tuple[int, int]:
        return self.outputs, self.inputs

    @property
    def parts(self) -> tuple[str, ...]:
        names = ("weight", "weight_packed", "weight_scale", "weight_zero_point", "weight_shape", "weight_g_idx")
        return tuple(self.part.name(name) for name in names if self.part.has(name))

    def coding(self) -> Coding:
        scale = self.part.scale_type("weight_scale")
        return Coding("int", self.bits, self.group, scale, self.zeros, self.per_token)

    def columns(self) -> Index | None:
        if not self.part.has("weight_g_idx") or self.groups == 1:
            return None
        groups = self.part.array("weight_g_idx", "<i4")
        return None if (groups == -1).all() else column_order(groups, self.group, self.groups, self.part)

    def rows(self, index: Index) -> CodedRows:
        if self.packed:
            unpack = unpack_words if self.dense else unpack_sparse_words
            codes = np.ascontiguousarray(unpack(self.part.words("weight_packed")[index].T, self.bits, self.inputs).T)
        else:
            codes = self.part.array("weight", np.uint8)[index] ^ np.uint8(128)
        order = self.columns()
        scales = self.part.floats("weight_scale").reshape(-1, self.groups)
        rows = widen(scales[index] if len(scales) > 1 else np.repeat(scales, index.size, 0))
        return CodedRows(codes if order is None else codes[:, order], rows, self._zeros(index))

    def _zeros(self, index: Index) -> npt.NDArray[np.uint8] | None:
        if not self.zeros:
            return None
        if self.part.source.info(self.part.name("weight_zero_point")).dtype == "I8":
            plain = self.part.array("weight_zero_point", np.int8).reshape(-1, self.groups)
            taken = plain[index] if len(plain) > 1 else np.repeat(plain, index.size, 0)
            return (taken.astype(np.int16) + (1 << (self.bits - 1))).astype(np.uint8)
        low = int(index.min()) // RUN * RUN
        high = int(index.max()) + 1
        words = self.part.words("weight_zero_point")
        if self.dense:
            words = words[low // RUN * self.bits : word_count(high, self.bits)]
            return unpack_words(words, self.bits, high - low)[index - low]
        return unpack_sparse_words(words, self.bits, high)[index]


def open_compressed(source: TensorSource, config: QuantConfig) -> QuantizedSource:
    """The linears of a compressed-tensors checkpoint. Raises FormatError, UnsupportedError."""
    config.expect("format", FORMATS)
    config.expect("moe_sparsity_config", ({},))
    config.expect("transform_config", ({},))
    sparsity = config.raw("sparsity_config", default={})
    if sparsity and (not isinstance(sparsity, dict) or sparsity.get("format", "dense") != "dense"):
        raise config.unsupported("sparsity_config", sparsity)
    cached = config.raw("kv_cache_scheme") is not None
    schemes = _schemes(config)
    config.finish(_INERT)
    linears: dict[str, CodedLinear] = {}
    for name in source:
        prefix, _, suffix = name.rpartition(".")
        if suffix == "weight_scale":
            linears[f"{prefix}.weight"] = _linear(Part(source, prefix), _scheme_of(schemes, prefix, config))
    for name in source:
        if name.endswith(".weight_packed") and f"{name.removesuffix('.weight_packed')}.weight" not in linears:
            raise FormatError(f"the quantised module {name.removesuffix('.weight_packed')} has no weight_scale")
    unused, notes = unused_scales(source)
    return QuantizedSource(source, linears, unused, [*notes, *([_NOTE_KV] if cached else [])])


def _schemes(config: QuantConfig) -> list[Scheme]:
    groups = config.raw("config_groups", default={})
    if not isinstance(groups, dict) or not groups:
        raise FormatError("quantization_config has no config_groups", param="config_groups")
    return [_scheme(name, group, config) for name, group in groups.items()]


def _scheme(name: str, group: Any, config: QuantConfig) -> Scheme:
    weights = group.get("weights") if isinstance(group, dict) else None
    if not isinstance(weights, dict):
        raise FormatError(f"config_groups: {name} says nothing of weights", param="config_groups")
    if group.get("format") not in (None, *FORMATS):
        raise config.unsupported("format", group["format"])
    bits, kind, size = weights.get("num_bits", 8), weights.get("type", "int"), weights.get("group_size") or 0
    block, targets = weights.get("block_structure") or [0, 0], group.get("targets", ["Linear"])
    sizes = [bits, size, *(block if isinstance(block, list) and len(block) == 2 else [None])]
    if not all(type(n) is int and -1 <= n < 1 << 31 for n in sizes) or kind not in ("int", "float"):
        raise FormatError(f"config_groups: {name} has weights {str(weights)[:200]}", param="config_groups")
    if not isinstance(targets, list) or not all(isinstance(target, str) for target in targets):
        raise FormatError(f"config_groups: {name} has targets {str(targets)[:80]}", param="config_groups")
    return Scheme(
        bits, kind, max(size, 0), (block[0], block[1]), weights.get("symmetric", True) is not False,
        _takes_tokens(name, group.get("input_activations")), tuple(targets),
    )  # fmt: skip


def _takes_tokens(name: str, activations: Any) -> bool:
    """Whether activations are int8; they then get one scale a token, also where the file has one for all."""
    if activations is None:
        return False
    if not isinstance(activations, Mapping):
        raise FormatError(f"config_groups: {name} has input_activations {str(activations)[:80]}")
    if activations.get("type", "int") == "float":
        return False
    if activations.get("num_bits", 8) != 8:
        raise UnsupportedError(
            f"config_groups: {name} wants activations of {activations.get('num_bits')} bits; 8 are run",
            param="input_activations",
        )
    return True


def _scheme_of(schemes: list[Scheme], module: str, config: QuantConfig) -> Scheme:
    if len(schemes) == 1:
        return schemes[0]
    named = [scheme for scheme in schemes if names_module([t for t in scheme.targets if t != "Linear"], module)]
    found = named or [scheme for scheme in schemes if "Linear" in scheme.targets]
    if not found:
        raise FormatError(f"no group of quantization_config names the module {module}", param="config_groups")
    return found[0]


def _linear(part: Part, scheme: Scheme) -> CodedLinear:
    if part.has("weight_packed"):
        if part.info("weight_packed", ("I32", "U8"), 2).dtype == "U8":
            return _float4(part, scheme)
        return _packed(part, scheme)
    kind = part.info("weight", ("I8", *KINDS, *_FLOATS), 2).dtype
    if kind in KINDS:
        return float8_linear(part, "weight_scale", scheme.block)
    if kind != "I8":
        raise UnsupportedError(
            f"module {part.prefix} has a scale, but its weight is {kind}: it was not compressed when it was saved",
            remedy="Save it with save_compressed=True.",
            param=part.prefix,
        )
    outputs, inputs = part.info("weight", ("I8",), 2).shape
    group, groups = _groups(part, scheme, outputs, inputs)
    zeros = part.has("weight_zero_point")
    per_token = scheme.per_token and groups == 1 and not zeros
    return IntLinear(part, 8, outputs, inputs, group, groups, False, True, zeros, per_token)


def _float4(part: Part, scheme: Scheme) -> Float4Linear:
    if scheme.kind != "float" or scheme.bits != 4:
        raise part.fault(f"weight_packed holds bytes, the config says {scheme.kind}{scheme.bits}")
    kind = "nvfp4" if part.has("weight_global_scale") else "mxfp4"
    return float4_linear(part, kind, "weight_packed", "weight_global_scale", inverse=True)


def _packed(part: Part, scheme: Scheme) -> IntLinear:
    if scheme.kind != "int" or not 2 <= scheme.bits <= 8:
        raise part.fault(f"weight_packed holds words, the config says {scheme.kind}{scheme.bits}")
    if part.info("weight_shape", ("I64", "I32")).shape != (2,):
        raise part.fault("weight_shape is not two numbers")
    dtype = "<i8" if part.info("weight_shape", ("I64", "I32")).dtype == "I64" else "<i4"
    outputs, inputs = (int(n) for n in part.array("weight_shape", dtype))
    rows, words = part.info("weight_packed", ("I32",), 2).shape
    dense = words == word_count(inputs, scheme.bits)
    if inputs < 1 or rows != outputs or rows < 1 or not (dense or words == -(-inputs // (32 // scheme.bits))):
        raise part.fault(f"weight_packed [{rows}, {words}] does not hold [{outputs}, {inputs}] of {scheme.bits} bits")
    group, groups = _groups(part, scheme, outputs, inputs)
    zeros = part.has("weight_zero_point")
    if zeros and part.info("weight_zero_point", ("I32", "I8"), 2).dtype == "I32":
        count = word_count(outputs, scheme.bits) if dense else -(-outputs // (32 // scheme.bits))
        if part.info("weight_zero_point", ("I32",)).shape != (count, groups):
            raise part.fault(f"weight_zero_point does not fit {outputs} rows of {groups} groups")
    if part.has("weight_g_idx") and part.info("weight_g_idx", ("I32",), 1).shape != (inputs,):
        raise part.fault(f"weight_g_idx does not name {inputs} inputs")
    return IntLinear(part, scheme.bits, outputs, inputs, group, groups, True, dense, zeros, per_token=False)


def _groups(part: Part, scheme: Scheme, outputs: int, inputs: int) -> tuple[int, int]:
    """(inputs of a group, groups); the scale's shape decides, and must agree with the config."""
    shape = part.info("weight_scale", _FLOATS).shape
    if int(np.prod(shape)) == 1 or shape in ((outputs,), (outputs, 1)):
        _same_shape(part, shape)
        return 0, 1
    if len(shape) != 2 or shape[0] != outputs or scheme.group < 1 or shape[1] != -(-inputs // scheme.group):
        raise part.fault(f"weight_scale {list(shape)} does not fit [{outputs}, {inputs}] in groups of {scheme.group}")
    _same_shape(part, shape)
    return scheme.group, shape[1]


def _same_shape(part: Part, shape: tuple[int, ...]) -> None:
    if part.has("weight_zero_point"):
        info = part.info("weight_zero_point", ("I32", "I8"))
        if info.dtype == "I8" and info.shape != shape:
            raise part.fault(f"weight_zero_point {list(info.shape)} differs from weight_scale {list(shape)}")
