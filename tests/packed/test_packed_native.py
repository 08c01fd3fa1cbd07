"""The native bodies on matrices that numpy packed: every format, every level of this machine, against float64."""

import numpy as np
import pytest
import scipy.sparse

from inhouse.core.errors import UnsupportedError, UsageError
from inhouse.runtime.native_library import available_levels
from inhouse.runtime.packed import (
    FORMATS,
    Packed,
    activation_group,
    pack_codes,
    pack_float,
    pack_gguf,
    quantize,
    quantize_rows_reference,
)
from inhouse.runtime.packed_layout import F32
from inhouse.runtime.packed_native import fill_tiles, linear, unpack_rows
from inhouse.runtime.packed_quantize import Kind

from .sparse_matrices import coded_matrix
from .test_packed_exact import BLOCK_TYPES, random_blocks

pytestmark = pytest.mark.native

SHAPE = (37, 512)


def matrices() -> list[Packed]:
    floats = np.random.default_rng(1).normal(size=(37, 171)).astype(np.float32)
    blocks = [pack_gguf(random_blocks(name, SHAPE, seed=9)[0], name, SHAPE) for name in BLOCK_TYPES]
    return [
        *blocks,
        *(float_table(name) for name in ("nf4_g64", "fp4_g64")),
        *(own_codes(name) for name, fmt in FORMATS.items() if fmt.zeros or name.startswith(("i4", "i8", "f8"))),
        *(coded_matrix(name, (37, 256)) for name, fmt in FORMATS.items() if fmt.coding),
        *(pack_float(floats, name) for name in ("f32", "f16", "bf16")),
        quantize(floats, "q4"),
        quantize(floats, "q6"),
        quantize(floats, "q8"),
    ]


def float_table(name: str) -> Packed:
    rng = np.random.default_rng(3)
    codes = rng.integers(0, 16, (37, 192), dtype=np.uint8)
    return pack_codes(name, codes, np.abs(rng.normal(size=(37, 3))).astype(np.float32))


def own_codes(name: str) -> Packed:
    """Random codes, scales of that type and, where the format has them, zero points over their whole range."""
    fmt, rng = FORMATS[name], np.random.default_rng(len(name))
    inputs = {0: 171, 32: 171, 64: 192, 128: 256}[fmt.group]
    codes = rng.integers(0, 1 << fmt.bits, (37, inputs), dtype=np.uint8)
    if fmt.table:
        codes[(codes & 0x7F) >= (0x7F if fmt.table == "e4m3" else 0x7C)] = 0
    groups = -(-inputs // fmt.group) if fmt.group else 1
    scales = rng.normal(size=(37, groups)).astype(np.float32)
    if fmt.scale == "f16":
        scales = scales.astype(np.float16).astype(np.float32)
    if fmt.scale == "bf16":
        scales = (scales.view(np.uint32) & np.uint32(0xFFFF0000)).view(np.float32)
    zeros = rng.integers(0, 1 << fmt.bits, (37, groups), dtype=np.uint8) if fmt.zeros else None
    return pack_codes(name, codes, scales, zeros=zeros)


@pytest.mark.parametrize("packed", matrices(), ids=lambda p: f"{p.format}-{p.shape[1]}")
def test_rows_and_products_at_every_level(packed: Packed) -> None:
    x = np.random.default_rng(2).normal(size=(5, packed.shape[1])).astype(np.float32)
    weights = packed.dequantize()
    with np.errstate(over="ignore", invalid="ignore"):
        exact = x.astype(np.float64) @ weights.T.astype(np.float64)
        size = np.abs(x).astype(np.float64) @ np.abs(weights.T).astype(np.float64)
    for isa in available_levels():
        assert np.array_equal(unpack_rows(packed, [36, 0, 17, 17], isa), weights[[36, 0, 17, 17]]), isa
        assert (np.abs(linear(packed, x, quantized=False, isa=isa) - exact) <= 2e-6 * size).all(), isa
        if activation_group(packed.format):
            assert (
                np.abs(linear(packed, x, quantized=True, isa=isa) - integer_product(packed, x)) <= 2e-6 * size
            ).all()


def integer_product(packed: Packed, x: F32) -> np.ndarray:
    """What linear_i8 means, in float64: the dequantised weights times the dequantised activation rows."""
    codes, scales = quantize_rows_reference(x, 32)
    rows = codes.astype(np.float64) * np.repeat(scales.astype(np.float64), 32, axis=1)[:, : x.shape[1]]
    product: np.ndarray = rows @ packed.dequantize().T.astype(np.float64)
    return product


def wide(name: str) -> Packed:
    """A matrix [80, 896] of random codes."""
    fmt, rng = FORMATS[name], np.random.default_rng(3)
    codes = rng.integers(0, min(1 << fmt.bits, 120), (80, 896), dtype=np.uint8)
    scales = rng.random((80, 896 // fmt.group if fmt.group else 1)).astype(np.float16).astype(np.float32)
    zeros = np.full(scales.shape, 3, np.uint8) if fmt.zeros else None
    return pack_codes(name, codes, scales, zeros=zeros)


@pytest.mark.parametrize("name", ["q4_0", "u4_g128", "u3_g32", "i8_token", "u8_row", "f8_e4m3_g128"])
def test_bits_do_not_depend_on_the_number_of_rows(name: str) -> None:
    floats = np.random.default_rng(3).normal(size=(80, 896)).astype(np.float32)
    packed = quantize(floats, "q4") if name == "q4_0" else wide(name)
    x = np.random.default_rng(4).normal(size=(140, 896)).astype(np.float32)
    for isa in available_levels():
        for quantized in (True, False) if activation_group(name) else (False,):
            whole = linear(packed, x, quantized=quantized, isa=isa)
            for n in (1, 2, 3, 7, 8, 9, 31, 64, 65):
                assert np.array_equal(linear(packed, x[:n], quantized=quantized, isa=isa), whole[:n]), (isa, n)


@pytest.mark.parametrize("name", [name for name, fmt in FORMATS.items() if fmt.coding])
def test_a_coded_matrix_gives_the_bits_of_its_plain_form(name: str) -> None:
    """Where the order is the same; columns have an order of their own, the same for any number of rows."""
    packed = coded_matrix(name, (80, 896), share=0.5 if FORMATS[name].coding != "columns" else 0.05)
    plain = packed.plain()
    x = np.random.default_rng(4).normal(size=(19, 896)).astype(np.float32)
    for isa in available_levels():
        for quantized in (True, False) if activation_group(name) else (False,):
            whole = linear(packed, x, quantized=quantized, isa=isa)
            if FORMATS[name].coding != "columns":
                assert np.array_equal(whole, linear(plain, x, quantized=quantized, isa=isa)), isa
            for n in (1, 2, 3, 8, 9):
                assert np.array_equal(linear(packed, x[:n], quantized=quantized, isa=isa), whole[:n]), (isa, n)


@pytest.mark.parametrize("name", ["csr_i8", "csr_bf16", "s8_row"])
def test_products_are_scipys(name: str) -> None:
    packed = coded_matrix(name, (80, 896), share=0.05)
    theirs = scipy.sparse.csr_array(packed.dequantize().astype(np.float64))
    x = np.random.default_rng(4).normal(size=(3, 896)).astype(np.float32)
    exact, size = theirs.dot(x.T.astype(np.float64)).T, abs(theirs).dot(np.abs(x.T)).T
    for isa in available_levels():
        assert (np.abs(linear(packed, x, quantized=False, isa=isa) - exact) <= 2e-6 * size).all(), isa


@pytest.mark.parametrize("kind", ["q8", "q6", "q4"])
@pytest.mark.parametrize("shape", [(1, 32), (37, 172), (64, 512)])
def test_native_quantisation_is_numpys_byte_for_byte(
    kind: Kind, shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    x = (np.random.default_rng(5).standard_t(3, size=shape) * 0.05).astype(np.float32)
    x[0, :8] = 0
    x[-1] = 0
    x[-1, 3:5] = 1e-7, -1e-7
    monkeypatch.setattr("inhouse.runtime.packed_quantize.fill_tiles", lambda *_: False)
    expected = quantize(x, kind)
    for isa in available_levels():
        tiles = np.full_like(expected.data, 0xEE)
        aligned = Packed(expected.format, shape, _aligned_copy(tiles))
        assert fill_tiles(expected.format, x, aligned.data, isa)
        assert np.array_equal(aligned.data, expected.data), isa


def _aligned_copy(data: np.ndarray) -> np.ndarray:
    buffer = np.empty(data.size + 64, np.uint8)
    start = -buffer.ctypes.data % 64
    buffer[start : start + data.size] = data
    return buffer[start : start + data.size]


def test_what_does_not_fit_is_refused() -> None:
    packed = pack_float(np.zeros((2, 4), np.float32), "f32")
    with pytest.raises(UsageError, match="do not fit"):
        linear(packed, np.zeros((1, 5), np.float32), quantized=False)
    with pytest.raises(UsageError, match="float activations"):
        linear(packed, np.zeros((1, 4), np.float32), quantized=True)
    with pytest.raises(UsageError, match="row 2 lies outside"):
        unpack_rows(packed, [2])
    with pytest.raises(UsageError, match="unknown instruction set"):
        linear(packed, np.zeros((1, 4), np.float32), quantized=False, isa="sse9")
    missing = {"scalar", "avx2", "avx512", "neon"} - set(available_levels())
    for isa in missing:
        with pytest.raises(UnsupportedError, match=isa):
            linear(packed, np.zeros((1, 4), np.float32), quantized=False, isa=isa)
