"""GPTQ checkpoints (AutoGPTQ, GPTQModel, AutoRound's export), format v1 and v2: 2, 3, 4 and 8 bits.

Of each linear, in-major: `qweight` int32 [words of in, out], `qzeros` int32 [groups, words of out], `scales` [groups,
out], `g_idx` int32 [in]. Codes are a dense stream of bits along in (along out in qzeros), lowest first. v1 keeps each
zero point less one, subtracted from the packed word, so that it is added to the word before it is taken apart (but
see _ONES for 3 bits).
Sources: AutoGPTQ's and GPTQModel's packers (arXiv 2210.17323 for the method).
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from inhouse.core.tensors import CodedRows, Coding, TensorSource
from inhouse.store.quantized.config import QuantConfig
from inhouse.store.quantized.source import CodedLinear, Index, Part, QuantizedSource, column_order, widen
from inhouse.store.quantized.words import RUN, unpack_words, word_count

BITS = (2, 3, 4, 8)
# One in every field of a packed word. 3-bit fields cross words, over which no carry goes: one is added to each number.
_ONES: dict[int, tuple[int, ...]] = {2: (0x55555555,), 3: (), 4: (0x11111111,), 8: (0x01010101,)}
# What GPTQModel takes off 3-bit zero points when it writes v1, and adds when it reads: not one a field, but its own.
_GPTQMODEL_THREE = (0x24924924, 0x92492492, 0x49249249)
# Keys that say how the codes were found, or which program is to run them.
_INERT = (
    "damp_percent", "damp_auto_increment", "true_sequential", "static_groups", "model_name_or_path",
    "model_file_base_name", "lm_head", "dynamic", "quantizer", "tokenizer", "dataset", "batch_size",
    "block_name_to_quantize", "module_name_preceding_first_block", "modules_in_block_to_quantize", "model_seqlen",
    "use_cuda_fp16", "use_exllama", "disable_exllama", "exllama_config", "max_input_length", "cache_block_outputs",
    "pad_token_id", "backend", "hyb_act", "act_group_aware", "mse", "v2", "v2_alpha", "gptaq", "foem",
    "parallel_packing", "device", "pack_impl", "modules_to_not_convert", "modules_in_block", "autoround_version",
    "iters", "lr", "minmax_lr", "nsamples", "seqlen", "gradient_accumulate_steps", "low_gpu_mem_usage", "enable_*",
    "scale_dtype", "amp", "to_quant_block_names", "quant_block_list", "desc_act", "offload_to_disk*", "fail_safe",
    "failsafe", "provider", "version", "rounding", "use_layer_wise_tuning", "super_*", "not_use_best_mse",
    "dynamic_max_gap",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class GptqLinear:
    """One linear of a GPTQ checkpoint."""

    part: Part
    bits: int
    group: int  # inputs a group
    groups: int
    outputs: int
    inputs: int
    symmetric: bool  # by the config; the zero points are looked at all the same
    ones: tuple[int, ...] | None  # added to the words of qzeros in turn; (): to each number; None in v2

    @property
    def label(self) -> str:
        return f"GPTQ-{self.bits}"

    @property
    def shape(self) -> tuple[int, int]:
        return self.outputs, self.inputs

    @property
    def parts(self) -> tuple[str, ...]:
        names = ("qweight", "qzeros", "scales", "g_idx")
        return tuple(self.part.name(name) for name in names if self.part.has(name))

    def coding(self) -> Coding:
        zeros = not (self.symmetric and bool((self._zeros(0, self.outputs) == 1 << (self.bits - 1)).all()))
        group = 0 if self.groups == 1 else self.group
        return Coding("int", self.bits, group, self.part.scale_type("scales"), zeros)

    def columns(self) -> Index | None:
        if not self.part.has("g_idx") or self.groups == 1:
            return None
        return column_order(self.part.array("g_idx", "<i4"), self.group, self.groups, self.part)

    def rows(self, index: Index) -> CodedRows:
        codes = unpack_words(self.part.words("qweight")[:, index], self.bits, self.inputs)
        order = self.columns()
        if order is not None:
            codes = codes[order]
        low = int(index.min()) // RUN * RUN
        zeros = self._zeros(low, int(index.max()) + 1)[:, index - low]
        scales = widen(self.part.floats("scales")[:, index].T)
        return CodedRows(np.ascontiguousarray(codes.T), scales, np.ascontiguousarray(zeros.T))

    def _zeros(self, low: int, high: int) -> npt.NDArray[np.uint8]:
        """Zero points [groups, high - low] of those outputs; low is a multiple of 32."""
        first, last = low // RUN * self.bits, word_count(high, self.bits)
        words = self.part.words("qzeros")[:, first:last]
        if self.ones:
            turns = np.resize(np.array(self.ones, np.uint32), last)[first:]
            words = words + turns
        found = np.ascontiguousarray(unpack_words(words.T, self.bits, high - low).T)
        return (found + np.uint8(1)) & np.uint8(7) if self.ones == () else found


def open_gptq(source: TensorSource, config: QuantConfig) -> QuantizedSource:
    """The linears of a GPTQ checkpoint. Raises FormatError, UnsupportedError."""
    bits, group = config.integer("bits"), config.integer("group_size", default=-1)
    if bits not in BITS:
        raise config.unsupported("bits", bits)
    kind = config.text("checkpoint_format", "format", default="gptq")
    if kind not in ("gptq", "gptq_v2"):
        raise config.unsupported("checkpoint_format", kind)
    config.expect("method", ("gptq",))
    config.expect("is_marlin_format", (False,))
    config.expect("pack_dtype", ("int32",))
    config.expect("packing_format", ("auto_round:auto_gptq", "auto_gptq"))
    config.expect("data_type", ("int",))
    config.expect("act_bits", (16, 32))
    for name in ("rotation", "adapter", "bitblas"):
        config.expect(name, ("", False))
    symmetric = config.flag("sym", default=True)
    ones = _ones(config.raw("meta")) if kind == "gptq" else {}
    mixed = bool(config.raw("dynamic"))
    config.finish(_INERT)
    linears: dict[str, CodedLinear] = {}
    for name in source:
        if name.endswith(".qweight"):
            prefix = name.removesuffix(".qweight")
            part = Part(source, prefix)
            linears[f"{prefix}.weight"] = _linear(part, None if mixed else bits, group, symmetric, ones)
    return QuantizedSource(source, linears)


def _ones(meta: Any) -> dict[int, tuple[int, ...]]:
    quantizer = meta.get("quantizer", "") if isinstance(meta, dict) else ""
    return _ONES | {3: _GPTQMODEL_THREE} if "gptqmodel" in str(quantizer) else _ONES


def _linear(part: Part, bits: int | None, group: int, symmetric: bool, ones: dict[int, tuple[int, ...]]) -> GptqLinear:
    """One linear, its shapes proven to fit one another; `bits` None: what the shapes say."""
    words, outputs = part.info("qweight", ("I32",), 2).shape
    zeros = part.info("qzeros", ("I32",), 2).shape
    scale_info = part.info("scales", ("F16", "BF16", "F32"), 2)
    groups = scale_info.shape[0]
    if bits is None:
        fitting = [b for b in BITS if zeros[1] == word_count(outputs, b)]
        if len(fitting) != 1:
            raise part.fault(f"qzeros {list(zeros)} for {outputs} outputs is of no known number of bits")
        bits = fitting[0]
    indexed = part.has("g_idx")
    inputs = part.info("g_idx", ("I32",), 1).shape[0] if indexed else words * 32 // bits
    if 0 in (inputs, outputs, groups) or words != word_count(inputs, bits):
        raise part.fault(f"qweight {words} x {outputs} does not hold {inputs} inputs of {bits} bits")
    if scale_info.shape[1] != outputs or tuple(zeros) != (groups, word_count(outputs, bits)):
        raise part.fault(f"scales {list(scale_info.shape)} and qzeros {list(zeros)} do not fit {outputs} outputs")
    size = inputs if group in (-1, 0) or group >= inputs else group
    if size < 1 or -(-inputs // size) != groups:
        size = -(-inputs // groups)
        if inputs % groups:
            raise part.fault(f"{groups} groups of {group} do not make up {inputs} inputs")
    return GptqLinear(part, bits, size, groups, outputs, inputs, symmetric, ones.get(bits))
