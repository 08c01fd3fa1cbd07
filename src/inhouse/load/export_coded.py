"""Linears as GPTQ, AWQ and compressed-tensors keep them: integer codes, scales and zero points, packed in words.

value = scale * (code - zero). Sources: AutoGPTQ and GPTQModel (v1 stores zero - 1, subtracted from the packed word),
AutoAWQ's GEMM layout, compressed-tensors' pack-quantized. Codes come from weights that are kept so, else they are
chosen here, group by group, with the range that gives the least squared error.
"""

import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from inhouse.core.errors import UsageError
from inhouse.core.tensors import TensorInfo
from inhouse.load.export_report import Written
from inhouse.load.export_targets import Target, Weights, as_bytes
from inhouse.runtime.packed_layout import F32, FORMATS, U8
from inhouse.store.writing import TensorData

CODED_WISHES: Mapping[str, tuple[str, ...]] = {
    "gptq": ("int4", "int8"),
    "awq": ("int4",),
    "compressed-tensors": ("int4", "int8"),
}
GROUPS = (128, 64, 32)
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
SHRINK = tuple(1.0 - 0.04 * i for i in range(9))  # of the range, tried in turn
I32 = npt.NDArray[np.int32]


class Rounded(NamedTuple):
    """A linear as integers: value = scales * (codes - zeros), group by group along the inputs."""

    codes: U8  # [out, in]
    scales: npt.NDArray[Any]  # [out, groups] f16, or bf16 as bit patterns
    zeros: U8  # [out, groups]


class Carried(NamedTuple):
    """How a form keeps a packed format's codes as they are."""

    bits: int
    group: int
    scale: str  # file type of the scales


def carried(form: str, name: str) -> Carried | None:
    """None where the form cannot keep the codes of that packed format, and they are rounded anew."""
    fmt = FORMATS.get(name)
    if fmt is None or fmt.low == 0 or fmt.table or fmt.minimum or fmt.two_level or fmt.bits not in (4, 8):
        return None
    if fmt.group not in GROUPS or (form == "awq" and fmt.bits != 4) or fmt.per_token:
        return None
    if fmt.scale == "f16" or (fmt.scale == "bf16" and form == "compressed-tensors"):
        return Carried(fmt.bits, fmt.group, fmt.scale.upper())
    return None


@dataclass(frozen=True, slots=True)
class CodedForm:
    """One of the forms, with its bits and group; the group of all linears is one number, as the forms want it.

    `symmetric`: every zero point is the middle. GPTQ then says so (fast kernels want it); compressed-tensors has none.
    """

    form: str
    bits: int
    group: int = 128
    scale: str = "F16"
    symmetric: bool = False

    def refuses(self, target: Target) -> str:
        """Why a linear must stay a float; "" if it need not."""
        out, width = target.matrix
        if width % self.group or out % (32 // self.bits):
            return f"{out} x {width} does not fit groups of {self.group} and whole words"
        if target.transpose and self.form == "compressed-tensors":
            return "the form has no transposed linears"
        return ""

    def tensors(self, target: Target, weights: Weights, done: Callable[[], None]) -> tuple[list[TensorData], Written]:
        """The tensors that replace the weight of a linear that fits."""
        out, width = target.matrix
        was = "/".join(sorted(target.formats))
        kept = self._kept(target, weights)
        cache: list[Rounded] = []
        left = [0]

        def rounded() -> Rounded:
            if not cache:
                cache.append(self._codes(target, weights) if kept else round_groups(weights.matrix(target), self))
            return cache[0]

        stem = target.name.removesuffix(".weight")
        plan = self._layout(out, width)

        def reader(pick: Callable[[Rounded], npt.NDArray[Any]]) -> Callable[[], U8]:
            def read() -> U8:
                raw = as_bytes(pick(rounded()))
                left[0] += 1
                if left[0] == len(plan):
                    cache.clear()
                    done()
                return raw

            return read

        made = []
        for suffix, (dtype, shape, pick) in plan.items():
            nbytes = int(np.prod(shape)) * {"I32": 4, "I64": 8, "F16": 2, "BF16": 2}[dtype]
            made.append(TensorData(TensorInfo(f"{stem}.{suffix}", dtype, shape, nbytes), reader(pick)))
        note = f"rounded anew from {was}" if weights.is_coded(target) and not kept else ""
        note = "; ".join(filter(None, (weights.changed(target), note)))
        return made, Written(target.name, was, f"{self.form} int{self.bits} g{self.group}", kept, note)

    def _kept(self, target: Target, weights: Weights) -> bool:
        """Whether the codes go over as they are."""
        return carried(self.form, weights.shared_codes(target)) == (self.bits, self.group, self.scale)

    def centred(self, target: Target, weights: Weights) -> bool:
        """Whether the codes go over as they are and have no zero points of their own."""
        return self._kept(target, weights) and not FORMATS[weights.shared_codes(target)].zeros

    def _codes(self, target: Target, weights: Weights) -> Rounded:
        rows = weights.codes(target)
        zeros = np.full(rows.scales.shape, FORMATS[weights.shared_codes(target)].zero, np.int16)
        if rows.zeros is not None:
            zeros += rows.zeros
        return Rounded(rows.codes, rows.scales, zeros.astype(np.uint8))

    def _layout(
        self, out: int, width: int
    ) -> dict[str, tuple[str, tuple[int, ...], Callable[[Rounded], npt.NDArray[Any]]]]:
        groups, per = width // self.group, 32 // self.bits
        if self.form == "gptq":
            return {
                "qweight": ("I32", (width // per, out), lambda r: pack_words(r.codes, self.bits).T),
                "qzeros": (
                    "I32",
                    (groups, out // per),
                    lambda r: less_one(pack_words(r.zeros.T, self.bits), self.bits),
                ),
                "scales": ("F16", (groups, out), lambda r: r.scales.T),
                "g_idx": ("I32", (width,), lambda r: np.arange(width, dtype=np.int32) // self.group),
            }
        if self.form == "awq":
            return {
                "qweight": ("I32", (width, out // 8), lambda r: pack_awq(r.codes.T)),
                "qzeros": ("I32", (groups, out // 8), lambda r: pack_awq(r.zeros.T)),
                "scales": ("F16", (groups, out), lambda r: r.scales.T),
            }
        plan: dict[str, tuple[str, tuple[int, ...], Callable[[Rounded], npt.NDArray[Any]]]] = {
            "weight_packed": ("I32", (out, width // per), lambda r: pack_words(r.codes, self.bits)),
            "weight_scale": (self.scale, (out, groups), lambda r: r.scales),
            "weight_zero_point": ("I32", (out // per, groups), lambda r: pack_words(r.zeros.T, self.bits).T),
            "weight_shape": ("I64", (2,), lambda r: np.array([out, width], np.int64)),
        }
        return {name: row for name, row in plan.items() if not (self.symmetric and name == "weight_zero_point")}

    def config(self, floats: Sequence[str]) -> dict[str, Any]:
        """`quantization_config` of config.json; `floats`: modules that were left alone, the head among them."""
        if self.form == "gptq":
            return {
                "quant_method": "gptq", "bits": self.bits, "group_size": self.group, "desc_act": False,
                "sym": self.symmetric,
                "true_sequential": False, "damp_percent": 0.01, "checkpoint_format": "gptq", "pack_dtype": "int32",
                "lm_head": False, "dynamic": {f"-:^{re.escape(name)}$": {} for name in floats if name != "lm_head"},
            }  # fmt: skip
        if self.form == "awq":
            return {
                "quant_method": "awq", "bits": self.bits, "group_size": self.group, "zero_point": True,
                "version": "gemm", "modules_to_not_convert": list(floats),
            }  # fmt: skip
        scheme = {
            "num_bits": self.bits, "type": "int", "symmetric": self.symmetric, "strategy": "group",
            "group_size": self.group, "dynamic": False, "actorder": None, "block_structure": None, "observer": "minmax",
            "observer_kwargs": {},
        }  # fmt: skip
        group = {"targets": ["Linear"], "weights": scheme, "input_activations": None, "output_activations": None}
        return {
            "quant_method": "compressed-tensors", "format": "pack-quantized", "quantization_status": "compressed",
            "config_groups": {"group_0": group}, "ignore": list(floats), "kv_cache_scheme": None,
        }  # fmt: skip


def coded_form(form: str, wish: str, linears: Sequence[Target], weights: Weights) -> CodedForm:
    """The form for `--type`: the bits and group that keep the codes of most weights as they are, where there are such;
    else the bits asked for (int4) in the largest group that divides most widths."""
    if form not in CODED_WISHES or (wish and wish not in CODED_WISHES[form]):
        raise UsageError(f"{form} has no type {wish!r}")
    sizes: Counter[Carried | None] = Counter()
    for target in linears:
        found = carried(form, weights.shared_codes(target))
        if not CodedForm(form, *(found or Carried(4, min(GROUPS), "F16"))).refuses(target):
            sizes[found] += target.matrix[0] * target.matrix[1]
    most = max(sizes, key=lambda found: sizes[found], default=None)
    if most is not None and 2 * sizes[most] > sizes.total() and (not wish or wish == f"int{most.bits}"):
        chosen = CodedForm(form, *most)
        return replace(chosen, symmetric=all(chosen.centred(t, weights) for t in linears if not chosen.refuses(t)))
    bits = 8 if wish == "int8" else 4
    fitting = {group: sum(target.matrix[1] % group == 0 for target in linears) for group in GROUPS}
    return CodedForm(form, bits, max(GROUPS, key=lambda group: (fitting[group], group)))


def round_groups(matrix: F32, form: CodedForm) -> Rounded:
    """Codes of a matrix [out, in]: for each group the range, shrunk in steps, that gives the least squared error.

    Zero points lie in 1..2^bits - 1: GPTQ's v1 readers stumble over 0.
    """
    out, width = matrix.shape
    top = (1 << form.bits) - 1
    x = matrix.reshape(out, -1, form.group)
    low, high = np.minimum(x.min(axis=2), 0), np.maximum(x.max(axis=2), 0)
    best: F32 = np.full(low.shape, np.inf, np.float32)
    codes = np.zeros(x.shape, np.uint8)
    scales, zeros = np.zeros(low.shape, np.float16), np.full(low.shape, 1 << (form.bits - 1), np.uint8)
    for shrink in SHRINK:
        span = (high - low) * np.float32(shrink)
        scale = np.maximum(span / np.float32(top), np.float32(6e-5)).astype(np.float16)  # no f16 denormal
        wide = scale.astype(np.float32)
        zero = np.clip(np.rint(-low * np.float32(shrink) / wide), 1, top)
        found = np.clip(np.rint(x / wide[..., None]) + zero[..., None], 0, top)
        error = (((found - zero[..., None]) * wide[..., None] - x) ** 2).sum(axis=2, dtype=np.float32)
        better = error < best
        best = np.where(better, error, best)
        codes[better] = found[better].astype(np.uint8)
        scales[better], zeros[better] = scale[better], zero[better].astype(np.uint8)
    return Rounded(codes.reshape(out, width), scales, zeros)


def pack_words(codes: npt.NDArray[np.uint8], bits: int) -> I32:
    """[n, m] codes -> [n, m * bits / 32] words along the rows, the first code in the lowest bits."""
    per = 32 // bits
    fields = codes.reshape(codes.shape[0], -1, per).astype(np.uint32) << np.arange(0, 32, bits, dtype=np.uint32)
    words: I32 = np.bitwise_or.reduce(fields, axis=2).view(np.int32)
    return words


def less_one(words: I32, bits: int) -> I32:
    """GPTQ v1: every zero point less one, as its packers do it, on the whole word."""
    ones = sum(1 << at for at in range(0, 32, bits))
    return (words.view(np.uint32) - np.uint32(ones)).view(np.int32)


def pack_awq(codes: npt.NDArray[np.uint8]) -> I32:
    """[n, out] codes -> [n, out / 8] words: nibble i of a word is column AWQ_ORDER[i]."""
    shuffled = codes.reshape(codes.shape[0], -1, 8)[:, :, list(AWQ_ORDER)]
    return pack_words(np.ascontiguousarray(shuffled).reshape(codes.shape), 4)
