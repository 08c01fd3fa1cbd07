"""Grids: the values that a packed code format can hold, as every quantiser needs them.

A `Grid` belongs to one format and one number of inputs. It fits scales (with zero points or minimums) to a matrix,
rounds columns to codes, says what codes mean and packs them; what it decodes is bit for bit what the packed matrix
decodes to. Knows formats and least squares, nothing of calibration, layers or methods. Float formats have no grid.

How a scale is found (`search`):

    minmax   the range of the group alone (symmetric: by `Convention`)
    mse      ranges shrunk step by step, the least sum of squared errors kept
    wls      also stretched to whole codes, the scale re-solved by weighted least squares for the codes each range
             gives; errors weigh as `importance` says. Never worse than minmax under that weight.

Every candidate is rounded to what the format stores before it is judged. Groups of zeros get scale 1 (0
where no level is 0).
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch

from inhouse.compress.grid_search import Candidates, affine, integer, table
from inhouse.core.errors import UnsupportedError, UsageError
from inhouse.runtime.encode import encodable, encode_rows
from inhouse.runtime.packed import FORMATS, CodeRows, Format, Packed, pack_rows
from inhouse.runtime.packed_formats import format_of, table_values, widen_e4m3
from inhouse.runtime.packed_layout import SUPER, layout

Tensor = torch.Tensor
Search = Literal["minmax", "mse", "wls"]
# Symmetric scales: `signed` lays the extreme on the lowest code (llama.cpp, AutoRound; the scale may be negative),
# `even` is 2 max|w| / (2^b - 1) (GPTQ, compressed-tensors), `restricted` max|w| / (2^(b-1) - 1).
Convention = Literal["signed", "even", "restricted"]
ScaleMode = Literal["free", "pow2"]
RUN_ELEMENTS = 1 << 18  # elements a search works on at once, so that they stay in the cache
NOT_NUMBERS = {"e4m3": (127, 255), "e5m2": (*range(124, 128), *range(252, 256))}
LEAST = 1e-3  # of the mean importance: what an input that was never active still counts


@dataclass(frozen=True, slots=True)
class Params:
    """What a group's codes mean: value = scale * (code - zero) + offset, or scale * table[code].

    Attributes:
        scale: f32 [out, groups].
        zero: f32 [out, groups], whole numbers, the format's own zero included; None where it is the format's.
        offset: f32 [out, groups] (minimums), or None.
        stored: the parts of a format whose scales are not kept as they are (two levels, e8m0); its codes are empty.
    """

    scale: Tensor
    zero: Tensor | None = None
    offset: Tensor | None = None
    stored: CodeRows | None = None


@dataclass(frozen=True, slots=True)
class Grid:
    """The values of one packed format over rows of `inputs` inputs.

    Raises UnsupportedError for a float format, an unknown one, or inputs that do not fit it.
    """

    name: str
    inputs: int
    convention: Convention = "signed"
    scale_mode: ScaleMode = "free"

    def __post_init__(self) -> None:
        fmt = format_of(self.name)
        if fmt.low == 0 or not _has_grid(fmt):
            raise UnsupportedError(f"format {self.name} has no grid", remedy=f"Known: {', '.join(gridded())}")
        if self.scale_mode == "pow2" and (fmt.two_level or fmt.minimum):
            raise UnsupportedError(f"format {self.name} has no power-of-two scales")
        layout(fmt, self.inputs)

    @property
    def format(self) -> Format:
        return FORMATS[self.name]

    @property
    def group(self) -> int:
        """Inputs that share a scale (the last group may be short)."""
        return self.format.group or self.inputs

    @property
    def groups(self) -> int:
        """Groups of a row as stored, padding included."""
        return layout(self.format, self.inputs).groups

    @property
    def keeps_zero(self) -> bool:
        """Whether 0 is one of the values in every group, so that masks survive."""
        return not self.format.minimum and self.format.table != "iq4"

    @property
    def one_level(self) -> bool:
        """Whether groups are fitted one by one (`fit_group`)."""
        return not self.format.two_level

    def index(self) -> Tensor:
        """Group of each input, int64 [in]."""
        return torch.arange(self.inputs) // self.group

    def levels(self) -> Tensor:
        """What each code of a table format means, f32 [codes]; NaN where the code is none to use."""
        values = torch.from_numpy(table_values(self.format).copy())
        for code in NOT_NUMBERS.get(self.format.table, ()):
            values[code] = torch.nan
        return values

    def fit(self, weight: Tensor, importance: Tensor | None = None, search: Search = "wls") -> Params:
        """Scales, zero points and minimums for a matrix.

        Args:
            weight: f32 [out, in], finite.
            importance: f32 [in] or [out, in], 0 or more: how much a squared error there counts (mean square of the
                input); None: all alike. Heeded by `wls` alone.
            search: see the module.

        Raises UsageError for shapes or values that do not fit.
        """
        _check(self, weight, importance)
        if self.format.two_level and not self.format.float_subs:
            return self._encoded(weight, importance if search == "wls" else None)
        weight = weight.detach().to(torch.float32)
        heed = None if importance is None or search != "wls" else _normal(importance)
        step = max(1, RUN_ELEMENTS // max(1, self.inputs))
        parts = []
        for start in range(0, max(1, len(weight)), step):
            rows = slice(start, start + step)
            share = heed if heed is None or heed.ndim == 1 else heed[rows]
            parts.append(self._fit_rows(weight[rows], share, search))
        return _join(parts)

    def fit_group(self, columns: Tensor, importance: Tensor | None = None, search: Search = "wls") -> Params:
        """Params of one group from its columns f32 [out, k] (k at most `group`): one-level formats only."""
        if not self.one_level:
            raise UnsupportedError(f"format {self.name} fits whole rows only")
        x = columns.to(torch.float32)[:, None, :]
        w = None if importance is None or search != "wls" else _normal(importance).expand(columns.shape)[:, None, :]
        return self._searched(x, w, search)

    def put_group(self, params: Params, group: int, part: Params) -> None:
        """Writes the params of one group (`fit_group`) into those of the matrix, in place."""
        for whole, piece in ((params.scale, part.scale), (params.zero, part.zero), (params.offset, part.offset)):
            if whole is not None and piece is not None:
                whole[:, group] = piece[:, 0]

    def round(self, columns: Tensor, params: Params, index: Tensor) -> Tensor:
        """The nearest code of each value, uint8 [out, k].

        Args:
            columns: f32 [out, k].
            index: int64 [k], the group of each column (a part of `index()`).
        """
        scale = params.scale[:, index]
        x = columns if params.offset is None else columns - params.offset[:, index]
        inverse = torch.where(scale == 0, 0.0, 1.0 / scale)
        if self.format.table:
            return nearest_codes(x * inverse, self.levels())
        zero = self.format.zero if params.zero is None else params.zero[:, index]
        codes = torch.round(x * inverse) + zero
        return codes.clamp(*self.code_range()).to(torch.uint8)

    def decode(self, codes: Tensor, params: Params, index: Tensor) -> Tensor:
        """What codes uint8 [out, k] of columns in groups `index` mean, f32: the bits of the packed matrix."""
        if self.format.table:
            level = self.levels()[codes.long()]
        else:
            level = codes.to(torch.float32) - (self.format.zero if params.zero is None else params.zero[:, index])
        value = level * params.scale[:, index]
        return value if params.offset is None else value + params.offset[:, index]

    def nearest(self, columns: Tensor, params: Params, index: Tensor) -> Tensor:
        """The nearest value to each, f32 [out, k]: `decode` of `round`."""
        return self.decode(self.round(columns, params, index), params, index)

    def code_range(self) -> tuple[int, int]:
        """Least and greatest code that are used (`q8_0` and its like leave code 0 free)."""
        fmt = self.format
        if fmt.name == "tq2_0":
            return 0, 2
        lowest = 1 if fmt.zero == 128 and not fmt.zeros else 0
        return lowest, (1 << fmt.bits) - 1

    def pack(self, codes: Tensor, params: Params) -> Packed:
        """Codes uint8 [out, in] and their params as the packed matrix."""
        rows = _numpy(codes).astype(np.uint8)
        if rows.shape[1] != self.inputs:
            raise UsageError(f"a grid of {self.inputs} inputs was given codes {list(rows.shape)}")
        stored = params.stored
        if stored is None:
            zeros = None
            if self.format.zeros:
                zero = params.scale.new_zeros(params.scale.shape) if params.zero is None else params.zero
                zeros = _numpy(zero - self.format.zero).astype(np.int8)
            minimums = None if params.offset is None else _numpy(params.offset)
            stored = CodeRows(rows, _numpy(params.scale), minimums, zeros=zeros)
        return pack_rows(self.name, (rows.shape[0], rows.shape[1]), [stored._replace(codes=rows)])

    def quantize(self, weight: Tensor, importance: Tensor | None = None, search: Search = "wls") -> Packed:
        """Plain rounding: fit, round, pack."""
        params = self.fit(weight, importance, search)
        return self.pack(self.round(weight.to(torch.float32), params, self.index()), params)

    def _fit_rows(self, weight: Tensor, importance: Tensor | None, search: Search) -> Params:
        group, groups = self.group, self.groups
        padded = torch.nn.functional.pad(weight, (0, groups * group - self.inputs))
        w = None
        if importance is not None:
            w = importance.to(torch.float32).expand(weight.shape)
            w = torch.nn.functional.pad(w, (0, groups * group - self.inputs)).reshape(len(weight), groups, group)
        x = padded.reshape(len(weight), groups, group)
        return self._nvfp4(x, w, search) if self.format.float_subs else self._searched(x, w, search)

    def _searched(self, x: Tensor, w: Tensor | None, search: Search) -> Params:
        """Groups [out, groups, G] of a one-level format."""
        fmt = self.format
        how = Candidates(search, self.convention, self.storable, fmt.scale == "e8m0")
        if fmt.minimum:
            scale, offset = affine(x, w, (1 << fmt.bits) - 1, how)
            return Params(scale, offset=offset)
        if fmt.table:
            scale = table(x, w, self.levels(), how)
        else:
            lowest, highest = self.code_range()
            scale, zero = integer(x, w, lowest - fmt.zero, highest - fmt.zero, fmt.zeros, how)
            if fmt.zeros:
                return Params(scale, zero=zero + fmt.zero)
        if fmt.scale == "e8m0":
            exponent = torch.frexp(scale).exponent - 1 + 128
            return Params(scale, stored=CodeRows(np.empty((0, 0), np.uint8), _numpy(exponent).astype(np.uint8)))
        return Params(scale)

    def storable(self, scale: Tensor) -> Tensor:
        """Scales (or minimums) rounded to what the format keeps."""
        kind = self.format.scale
        if self.scale_mode == "pow2" or kind == "e8m0":
            mantissa, exponent = torch.frexp(scale)
            up = (mantissa.abs() > 2**-0.5).to(exponent.dtype)  # the nearer one in the ratio
            least, most = (-127, 127) if kind == "e8m0" else (-14, 15) if kind == "f16" else (-126, 127)
            power = torch.ldexp(torch.ones_like(scale), (exponent - 1 + up).clamp(least, most))
            return torch.where(scale == 0, 0.0, power if kind == "e8m0" else torch.copysign(power, scale))
        if kind == "f16":
            return scale.clamp(-65504.0, 65504.0).half().float()
        return scale.bfloat16().float() if kind == "bf16" else scale

    def _encoded(self, weight: Tensor, importance: Tensor | None) -> Params:
        """Two-level block formats: by the encoder of GGUF blocks."""
        if importance is not None and importance.ndim != 1:
            raise UnsupportedError(f"format {self.name} takes one importance for each input, not for each weight")
        rows = encode_rows(self.name, _numpy(weight), None if importance is None else _numpy(importance))
        assert rows.sub_scales is not None
        times = rows.sub_scales.shape[1] // rows.scales.shape[1]
        scale = np.repeat(rows.scales.astype(np.float32), times, 1) * rows.sub_scales.astype(np.float32)
        offset = None
        if rows.minimums is not None and rows.sub_minimums is not None:
            low = np.repeat(rows.minimums.astype(np.float32), times, 1) * rows.sub_minimums.astype(np.float32)
            offset = torch.from_numpy(np.negative(low))
        return Params(torch.from_numpy(scale), offset=offset, stored=rows._replace(codes=np.empty((0, 0), np.uint8)))

    def _nvfp4(self, x: Tensor, w: Tensor | None, search: Search) -> Params:
        """Groups [out, groups, 16]: e4m3 sub-scales over one f32 factor a row, 1/448 of the largest group's scale."""
        how = Candidates(search, self.convention, lambda scale: scale)
        ideal = table(x, w, self.levels(), how).abs()
        factor = ideal.amax(1, keepdim=True) / 448.0
        subs = torch.from_numpy(widen_e4m3(np.arange(127, dtype=np.uint8)))
        wanted = ideal * torch.where(factor == 0, 0.0, 1.0 / factor)
        place = torch.bucketize(wanted, (subs[1:] + subs[:-1]) / 2)
        scale = factor * subs[place]
        stored = CodeRows(np.empty((0, 0), np.uint8), _numpy(factor), sub_scales=_numpy(place).astype(np.uint8))
        return Params(scale, stored=stored)


def nearest_codes(x: Tensor, levels: Tensor) -> Tensor:
    """Codes uint8 of the levels nearest to `x`; of two codes of one level the lower."""
    usable = torch.nonzero(~levels.isnan())[:, 0]
    values, order = torch.sort(levels[usable], stable=True)
    keep = torch.ones(len(values), dtype=torch.bool)
    keep[1:] = values[1:] != values[:-1]
    values, codes = values[keep], usable[order][keep]
    return codes[torch.bucketize(x, (values[1:] + values[:-1]) / 2)].to(torch.uint8)


def gridded() -> tuple[str, ...]:
    """Formats that have a grid."""
    return tuple(name for name, fmt in FORMATS.items() if fmt.low and _has_grid(fmt))


def fitting(name: str, inputs: int) -> bool:
    """Whether rows of that many inputs can be kept in the format."""
    fmt = format_of(name)
    return not (fmt.two_level and not fmt.float_subs and inputs % SUPER)


def _has_grid(fmt: Format) -> bool:
    return not fmt.coding and (not fmt.two_level or fmt.float_subs or fmt.name in encodable())


def _check(grid: Grid, weight: Tensor, importance: Tensor | None) -> None:
    if weight.ndim != 2 or weight.shape[1] != grid.inputs:
        raise UsageError(f"a grid of {grid.inputs} inputs was given a matrix {list(weight.shape)}")
    if not bool(torch.isfinite(weight).all()):
        raise UsageError("a weight is not finite")
    if importance is not None:
        if tuple(importance.shape) not in ((grid.inputs,), tuple(weight.shape)):
            raise UsageError(f"importance {list(importance.shape)} does not fit a matrix {list(weight.shape)}")
        if not bool(torch.isfinite(importance).all()) or bool((importance < 0).any()):
            raise UsageError("importance must be finite and 0 or more")


def _normal(importance: Tensor) -> Tensor:
    """Importance with mean 1, never below LEAST."""
    mean = importance.mean(dtype=torch.float64)
    if float(mean) == 0:
        return torch.ones_like(importance, dtype=torch.float32)
    return (importance / mean).to(torch.float32).clamp(min=LEAST)


def _numpy(values: Tensor) -> np.ndarray:
    array: np.ndarray = values.detach().contiguous().numpy()
    return array


def _join(parts: list[Params]) -> Params:
    if len(parts) == 1:
        return parts[0]

    def cat(pieces: Iterator[Tensor | None]) -> Tensor | None:
        held = [piece for piece in pieces if piece is not None]
        return torch.cat(held) if held else None

    stored = None
    if parts[0].stored is not None:
        fields = zip(*(part.stored for part in parts if part.stored is not None), strict=True)
        empty = np.empty((0, 0), np.uint8)
        columns = [None if c[0] is None else np.concatenate(c) for c in fields]
        stored = CodeRows(*columns)._replace(codes=empty)  # type: ignore[arg-type]
    return Params(
        torch.cat([part.scale for part in parts]),
        cat(part.zero for part in parts),
        cat(part.offset for part in parts),
        stored,
    )
