"""Choosing codes: weights to 8, 6 or 4 bits without calibration data, and activation rows to int8.

The numpy here is the definition; the native library, used where it is, follows it operation by operation to the same
bits.
"""

from collections.abc import Iterable, Iterator
from typing import Literal

import numpy as np
import numpy.typing as npt

from inhouse.core.errors import FormatError, UsageError
from inhouse.core.progress import Progress, silent
from inhouse.runtime.packed_layout import BLOCK, F32, I8, TILE_ROWS, Packed, format_of, layout
from inhouse.runtime.packed_native import fill_tiles
from inhouse.runtime.packed_pack import CodeRows, Packer, runs

Kind = Literal["q8", "q6", "q4"]
QUANTIZED_FORMAT = {"q8": "q8_0", "q6": "q6_0", "q4": "q4_0"}
# The code that the element of largest magnitude is stretched to, in search of the least squared error. -8 is plain
# Q4_0; fewer steps clip less, more steps clip the extreme. Wider and finer lists gain under 0.1 % of the error.
Q4_EXTREMES = tuple(-6.5 - 0.25 * i for i in range(11))
Q6_EXTREMES = (-30.0, -31.0, -32.0, -33.0)
TINY = np.float32(1e-30)  # a group whose largest magnitude is below this counts as all zero: 127 / max stays finite
LEAST_POWER = np.float32(2.0**-60)  # the smallest activation scale, where scales are powers of two


def quantize(
    rows: F32 | Iterable[F32],
    kind: Kind,
    progress: Progress = silent,
    *,
    shape: tuple[int, int] | None = None,
) -> Packed:
    """Quantises a matrix in groups of 32 inputs with an f16 scale each; deterministic.

    `q8` (8.5 bits a weight): scale = max|w| / 127. `q6` (6.5 bits) and `q4` (4.5 bits): for each extreme in Q6_EXTREMES
    or Q4_EXTREMES the codes are rounded, the scale solved by least squares, and the pair of least squared error kept.

    Args:
        rows: float32 [out, in], or runs of its rows in order (`shape` is then needed). `in` is padded to whole groups.
        kind: `q8`, `q6` or `q4`.
        progress: told ("quantize", weights done, weights in all).

    Raises:
        UsageError: another kind, or rows that do not make up the shape.
        FormatError: a weight that is not finite, or beyond what an f16 scale reaches.
    """
    if kind not in QUANTIZED_FORMAT:
        raise UsageError(f"unknown quantisation {kind!r}", remedy="Use q8, q6 or q4")
    if isinstance(rows, np.ndarray):
        shape = (rows.shape[0], rows.shape[1])
        rows = [rows]
    if shape is None:
        raise UsageError("runs of rows need the matrix's shape")
    packer = Packer(QUANTIZED_FORMAT[kind], shape)
    for run in _whole_tiles(rows, shape):
        _check(run, kind)
        tiles = packer.next_tiles(len(run))
        if fill_tiles(packer.format.name, run, tiles):
            packer.filled(len(run))
        else:
            packer.add(_quantize_rows(run, kind))
        progress("quantize", packer.rows * shape[1], shape[0] * shape[1])
    return packer.finish()


def _whole_tiles(source: Iterable[F32], shape: tuple[int, int]) -> Iterator[F32]:
    """Rows in runs of whole tiles (the last one excepted), contiguous float32."""
    step = runs(shape).step
    held: list[F32] = []
    count = 0
    for chunk in source:
        if chunk.ndim != 2 or chunk.shape[1] != shape[1]:
            raise UsageError(f"a run of rows {chunk.shape} does not belong to a matrix {shape}")
        for start in range(0, len(chunk), step):
            held.append(np.asarray(chunk[start : start + step], np.float32))
            count += len(held[-1])
            if count >= step:
                whole = count // TILE_ROWS * TILE_ROWS
                joined = np.concatenate(held)
                yield joined[:whole]
                held, count = [joined[whole:]], count - whole
    if count:
        yield np.concatenate(held)


def _check(run: F32, kind: Kind) -> None:
    largest = float(np.abs(run).max(initial=0.0))
    limit = 65504.0 * {"q8": 127, "q6": 30, "q4": 6.5}[kind]
    if not largest <= limit:  # also NaN
        raise FormatError(
            f"a weight of {largest} cannot be quantised to {kind} (limit {limit:g})",
            remedy="The tensor is damaged, or was trained with overflow; load it without --quantize",
        )


def _quantize_rows(run: F32, kind: Kind) -> CodeRows:
    name = QUANTIZED_FORMAT[kind]
    width = layout(format_of(name), run.shape[1]).width
    padded = run
    if width != run.shape[1]:
        padded = np.zeros((len(run), width), np.float32)
        padded[:, : run.shape[1]] = run
    groups = padded.reshape(-1, BLOCK).T.copy()  # [32, groups of all rows]: sums run over the first axis, in order
    if kind == "q8":
        scales, codes = _q8(groups)
    else:
        scales, codes = _searched(groups, *((Q6_EXTREMES, 32) if kind == "q6" else (Q4_EXTREMES, 8)))
    unsigned = (codes + np.float32(format_of(name).zero)).astype(np.uint8).T.reshape(len(run), width)
    return CodeRows(np.ascontiguousarray(unsigned[:, : run.shape[1]]), scales.reshape(len(run), -1))


def _inverse(numerator: np.float32, values: F32) -> F32:
    """numerator / value, 0 where the value is 0."""
    return np.divide(numerator, values, out=np.zeros_like(values), where=values != 0)


def _q8(groups: F32) -> tuple[F32, F32]:
    """[32, n] -> f16-exact scales [n] and signed codes [32, n]."""
    scales = (np.abs(groups).max(axis=0) / np.float32(127)).astype(np.float16).astype(np.float32)
    codes = np.rint(groups * _inverse(np.float32(1), scales))
    return scales, np.clip(codes, np.float32(-127), np.float32(127))


def _searched(groups: F32, extremes: tuple[float, ...], half: int) -> tuple[F32, F32]:
    """[32, n] -> f16-exact scales [n] and signed codes [32, n] in -half..half - 1."""
    low, high = np.float32(-half), np.float32(half - 1)
    first = np.abs(groups).argmax(axis=0)
    extreme = np.take_along_axis(groups, first[None, :], axis=0)[0]
    extreme = np.where(np.abs(extreme) < TINY, np.float32(0), extreme)
    best_gain = np.zeros_like(extreme)
    best_scale = np.zeros_like(extreme)
    for target in extremes:
        inverse = _inverse(np.float32(target), extreme)
        xq = np.zeros_like(extreme)
        qq = np.zeros_like(extreme)
        for row in groups:  # in order of inputs: the native body sums the same way
            code = np.clip(np.rint(row * inverse), low, high)
            xq += row * code
            qq += code * code
        scale = np.divide(xq, qq, out=np.zeros_like(xq), where=qq != 0)
        gain = xq * scale  # how much of sum(x^2) the codes explain
        better = gain > best_gain
        best_gain[better] = gain[better]
        best_scale[better] = scale[better]
    scales = best_scale.astype(np.float16).astype(np.float32)
    codes = np.rint(groups * _inverse(np.float32(1), scales))
    return scales, np.clip(codes, low, high)


def quantize_rows_reference(x: F32, group: int, powers: bool = False) -> tuple[I8, F32]:
    """Op quantize_rows, defined: int8 codes [rows, width] and f32 scales [rows, ceil(width / group)].

    For each group (0: the whole row; the last may be short), with m = max|x| and everything in f32:
    s = m / 127; codes = round-half-even(x * (127 / m)). A group with m < 1e-30 has s = 0 and codes 0; one that
    holds NaN or infinity has s = NaN and codes 0, so that the fault shows in every output it reaches.
    With `powers`, s is the least power of two that is not below m / 127, and at least LEAST_POWER;
    codes = round-half-even(x / s).
    """
    rows, width = x.shape
    group = group or width
    groups = -(-width // group)
    padded = np.zeros((rows, groups * group), np.float32)
    padded[:, :width] = x
    grouped = padded.reshape(rows, groups, group)
    most = (grouped.view(np.int32) & np.int32(0x7FFFFFFF)).max(axis=2, initial=0).view(np.float32)
    usable = (most >= TINY) & np.isfinite(most)
    scales = np.divide(most, np.float32(127), out=np.zeros_like(most), where=usable)
    inverse = np.divide(np.float32(127), most, out=np.zeros_like(most), where=usable)
    if powers:
        usable = np.isfinite(most)
        exact = np.divide(most, np.float32(127), out=np.zeros_like(most), where=usable)
        bits = (exact.view(np.int32) + np.int32(0x7FFFFF)) & np.int32(0x7F800000)
        scales = np.maximum(bits.view(np.float32), LEAST_POWER)
        inverse = np.float32(1) / scales
    clean: npt.NDArray[np.float32] = np.where(usable[:, :, None], grouped, np.float32(0))
    codes = np.rint(clean * inverse[:, :, None]).astype(np.int8).reshape(rows, -1)[:, :width]
    scales[~np.isfinite(most)] = np.nan
    return np.ascontiguousarray(codes), scales
