"""Writers of quantised linears, from the published descriptions alone: bit by bit over Python integers.

Each takes codes [out, in] with scales and zero points [out, groups] and gives the tensors of the file. They share no
code with the readers and are slow on purpose.
"""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int64]
F32 = npt.NDArray[np.float32]
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


def stream(codes: Sequence[int], bits: int) -> npt.NDArray[np.int32]:
    """Codes as one little-endian stream of bits, cut into words."""
    number = sum(int(code) << (bits * i) for i, code in enumerate(codes))
    words = -(-len(codes) * bits // 32)
    return np.frombuffer(number.to_bytes(words * 4, "little"), "<i4").copy()


def down(codes: Ints, bits: int) -> npt.NDArray[np.int32]:
    """[n, m] packed along the first axis."""
    return np.stack([stream(column.tolist(), bits) for column in codes.T], axis=1)


def across(codes: Ints, bits: int) -> npt.NDArray[np.int32]:
    """[n, m] packed along the last axis."""
    return np.stack([stream(row.tolist(), bits) for row in codes])


def gptq(
    codes: Ints, scales: F32, zeros: Ints, bits: int, group: int, *, v1: bool = True, order: Ints | None = None
) -> dict[str, npt.NDArray[np.generic]]:
    """`order`: the inputs in the order in which groups were formed (act-order): input order[j] is in group j // group.
    v1 stores the zero point less one in each field."""
    inputs = codes.shape[1]
    groups = np.arange(inputs) // group
    if order is not None:
        groups = np.empty(inputs, np.int64)
        groups[order] = np.arange(inputs) // group
    stored = (zeros - 1) % (1 << bits) if v1 else zeros
    return {
        "qweight": down(codes.T, bits),
        "qzeros": across(stored.T, bits),
        "scales": scales.T.copy(),
        "g_idx": groups.astype(np.int32),
    }


def awq_gemm(codes: Ints, scales: F32, zeros: Ints) -> dict[str, npt.NDArray[np.generic]]:
    def packed(rows: Ints) -> npt.NDArray[np.int32]:
        blocks = rows.reshape(len(rows), -1, 8)[:, :, list(AWQ_ORDER)].reshape(len(rows), -1)
        return across(blocks, 4)

    return {"qweight": packed(codes.T), "qzeros": packed(zeros.T), "scales": scales.T.copy()}


def awq_gemv(codes: Ints, scales: F32, zeros: Ints, group: int) -> dict[str, npt.NDArray[np.generic]]:
    words = -(-zeros.shape[1] // 8)
    step = {64: 2, 32: 4}.get(group, 1)
    words = -(-words // step) * step
    wide = np.zeros((len(zeros), 8 * words), np.int64)
    wide[:, : zeros.shape[1]] = zeros
    padded = np.zeros((len(zeros), 8 * words), np.float32)
    padded[:, : scales.shape[1]] = scales
    return {"qweight": across(codes, 4), "qzeros": across(wide, 4), "scales": padded}


def compressed(
    codes: Ints, scales: F32, zeros: Ints | None, bits: int, order: Ints | None = None, group: int = 0
) -> dict[str, npt.NDArray[np.generic]]:
    """Unsigned codes and zero points; the format stores them so."""
    tensors: dict[str, npt.NDArray[np.generic]] = {
        "weight_packed": across(codes, bits),
        "weight_scale": scales,
        "weight_shape": np.array(codes.shape, np.int64),
    }
    if zeros is not None:
        tensors["weight_zero_point"] = down(zeros, bits)
    if order is not None:
        groups = np.empty(codes.shape[1], np.int32)
        groups[order] = np.arange(codes.shape[1]) // group
        tensors["weight_g_idx"] = groups
    return tensors


def values(codes: Ints, scales: F32, zeros: Ints, group: int, order: Ints | None = None) -> F32:
    """What the file means, f32 [out, in] in the model's column order: scale * (code - zero)."""
    groups = np.arange(codes.shape[1]) // group
    if order is not None:
        place = np.empty_like(groups)
        place[order] = groups
        groups = place
    whole: F32 = scales[:, groups] * (codes - zeros[:, groups]).astype(np.float32)
    return whole


def round_to(
    weights: F32, bits: int, group: int, *, symmetric: bool, kind: str, order: Ints | None = None
) -> tuple[Ints, F32, Ints]:
    """Codes [out, in], scales (exact in `kind`: f16, bf16, f32) and zero points [out, groups] near the weights."""
    inputs = weights.shape[1]
    taken = weights if order is None else weights[:, order]
    starts = range(0, inputs, group)
    top = (1 << bits) - 1
    codes, scales, zeros = np.empty(weights.shape, np.int64), [], []
    for start in starts:
        part = taken[:, start : start + group]
        low, high = np.minimum(part.min(1), 0), np.maximum(part.max(1), 0)
        if symmetric:
            scale = narrow(np.maximum(2 * np.abs(part).max(1) / top, 1e-6), kind)
            zero = np.full(len(part), 1 << (bits - 1))
        else:
            scale = narrow(np.maximum((high - low) / top, 1e-6), kind)
            zero = np.clip(np.rint(-low / scale), 0, top).astype(np.int64)
        code = np.clip(np.rint(part / scale[:, None]) + zero[:, None], 0, top).astype(np.int64)
        where = np.arange(start, min(start + group, inputs))
        codes[:, where if order is None else order[where]] = code
        scales.append(scale)
        zeros.append(zero)
    return codes, np.stack(scales, 1), np.stack(zeros, 1)


def narrow(numbers: npt.NDArray[np.floating], kind: str) -> F32:
    """The nearest numbers of f16, bf16 (cut off) or f32."""
    wide = np.asarray(numbers, np.float32)
    if kind == "f16":
        return wide.astype(np.float16).astype(np.float32)
    return (wide.view(np.uint32) & np.uint32(0xFFFF0000)).view(np.float32) if kind == "bf16" else wide
