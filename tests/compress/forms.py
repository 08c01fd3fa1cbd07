"""Random packed matrices of every format, for tests of what is stored."""

import numpy as np
import numpy.typing as npt

from inhouse.runtime.packed import FORMATS, CodeRows, Packed, pack_codes, pack_float, pack_rows, pack_vectors
from inhouse.runtime.packed_layout import Format, layout, widen_bf16
from inhouse.runtime.packed_pack import narrow_bf16
from inhouse.runtime.packed_sparse import pack_columns, to_sparse

# What sub-scales of two-level formats may be in a GGUF block: these are stored at their own bits.
SUB_RANGE = {"q2_k": (0, 16), "q3_k": (-32, 32), "q4_k": (0, 64), "q5_k": (0, 64), "iq4_xs": (-32, 32)}


def random_packed(name: str, shape: tuple[int, int], seed: int = 0, wild: bool = False) -> Packed:
    """A matrix of any format with every code and random parameters; `wild`: integers of groups over all int8."""
    rng = np.random.default_rng(seed)
    fmt = FORMATS[name]
    if fmt.low == 0 and not fmt.coding:
        return pack_float(rng.standard_normal(shape).astype(np.float32), name)
    plan = layout(fmt, shape[1])
    if fmt.coding == "vectors":
        index = rng.integers(0, 256, (fmt.books, shape[0], -(-shape[1] // 8)), dtype=np.uint8)
        books = rng.integers(-42, 43, (fmt.books, 256, 8)).astype(np.int8)
        return pack_vectors(name, index, books, _scales(rng, fmt, (shape[0], plan.groups)).astype(np.float32), shape[1])
    if fmt.coding:
        return _sparse(rng, fmt, shape)
    codes = rng.integers(0, 1 << fmt.bits, shape, dtype=np.uint8)
    if fmt.table in ("e4m3", "e5m2"):
        limit = 0x7F if fmt.table == "e4m3" else 0x7C
        codes[(codes & 0x7F) >= limit] = 0x11
    each, groups = (shape[0], plan.supers), (shape[0], plan.groups)
    rows = CodeRows(
        codes,
        _scales(rng, fmt, each),
        _scales(rng, fmt, each) if fmt.minimum else None,
        _subs(rng, fmt, groups, wild) if fmt.two_level else None,
        _subs(rng, fmt, groups, wild).astype(np.int8) if fmt.two_level and fmt.minimum else None,
        _zeros(rng, fmt, groups, wild) if fmt.zeros else None,
    )
    return pack_rows(name, shape, [rows])


def _sparse(rng: np.random.Generator, fmt: Format, shape: tuple[int, int]) -> Packed:
    """Two of every four inputs, which every sparse format takes."""
    fours = np.zeros((shape[0], -(-shape[1] // 4), 4), bool)
    fours[:, :, 1:3] = True
    kept = fours.reshape(shape[0], -1)[:, : shape[1]]
    if fmt.low == 0:
        return pack_columns(np.where(kept, rng.standard_normal(shape), 0.0).astype(np.float32))
    base = FORMATS[fmt.base]
    codes = np.where(kept, rng.integers(0, 1 << base.bits, shape), base.zero).astype(np.uint8)
    scales = _scales(rng, base, (shape[0], layout(base, shape[1]).supers))
    return to_sparse(pack_codes(fmt.base, codes, scales), fmt.name)


def _scales(rng: np.random.Generator, fmt: Format, shape: tuple[int, int]) -> npt.NDArray[np.generic]:
    if fmt.scale == "e8m0":
        return rng.integers(100, 140, shape, dtype=np.uint8)
    values = rng.uniform(-0.1, 0.1, shape).astype(np.float32)
    if fmt.scale == "bf16":
        return widen_bf16(narrow_bf16(values))
    return values.astype(np.float16) if fmt.scale == "f16" else values


def _subs(
    rng: np.random.Generator, fmt: Format, shape: tuple[int, int], wild: bool
) -> npt.NDArray[np.uint8] | npt.NDArray[np.int8]:
    if fmt.float_subs:
        return rng.integers(0, 0x7F, shape, dtype=np.uint8)
    low, high = (-128, 128) if wild else SUB_RANGE.get(fmt.name, (-128, 128))
    return rng.integers(low, high, shape).astype(np.int8)


def _zeros(rng: np.random.Generator, fmt: Format, shape: tuple[int, int], wild: bool) -> npt.NDArray[np.int8]:
    low, high = (-128, 128) if wild else (-fmt.zero, (1 << fmt.bits) - fmt.zero)
    return rng.integers(low, high, shape).astype(np.int8)
