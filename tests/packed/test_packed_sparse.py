"""Sparse and vector-coded matrices: exact there and back, sizes as counted, hostile bytes refused; scipy knows CSR."""

import numpy as np
import pytest
import scipy.sparse
from hypothesis import given, settings
from hypothesis import strategies as st

from inhouse.core.errors import FormatError, UnsupportedError, UsageError
from inhouse.runtime.packed import FORMATS, Packed, aligned_empty, bits_per_weight, pack_codes, packed_nbytes
from inhouse.runtime.packed_blocks import code_rows
from inhouse.runtime.packed_formats import Format
from inhouse.runtime.packed_layout import F32
from inhouse.runtime.packed_sparse import (
    is_pairs,
    kept_share,
    pack_columns,
    pack_vectors,
    sparse_formats,
    to_sparse,
    vector_parts,
)
from tests.packed.sparse_matrices import coded_matrix, plain_matrix

pytestmark = pytest.mark.null

CODED = [name for name, fmt in FORMATS.items() if fmt.coding]
FROM_PLAIN = [name for name in CODED if FORMATS[name].coding in ("mask", "pairs") or name == "csr_i8"]


def width_of(fmt: Format, wanted: int) -> int:
    step = max(fmt.group, 8)
    return -(-wanted // step) * step if fmt.group > 32 or fmt.coding == "vectors" else wanted


@pytest.mark.parametrize("name", FROM_PLAIN)
@pytest.mark.parametrize("shape", [(1, 32), (37, 172), (16, 256), (50, 500)])
@pytest.mark.parametrize("share", [0.0, 0.4, 1.0])
def test_zeros_leave_and_come_back(name: str, shape: tuple[int, int], share: float) -> None:
    fmt = FORMATS[name]
    plain = plain_matrix(name, (shape[0], width_of(fmt, shape[1])), share)
    sparse = to_sparse(plain, name)
    assert np.array_equal(sparse.plain().data, plain.data)
    values = plain.dequantize()
    assert np.array_equal(sparse.dequantize(), values)
    ids = np.array([shape[0] - 1, 0, shape[0] // 2, 0])
    assert np.array_equal(sparse.rows(ids), values[ids])
    assert np.array_equal(sparse.codes().codes, plain.codes().codes)
    assert sparse.nbytes <= packed_nbytes(name, sparse.shape)
    again = next(iter(code_rows(sparse)))
    assert np.array_equal(again.codes, next(iter(code_rows(plain))).codes)


@pytest.mark.parametrize("share", [0.01, 0.1])
def test_columns_of_floats_are_scipys(share: float) -> None:
    rng = np.random.default_rng(1)
    dense = rng.normal(size=(37, 171)).astype(np.float32) * (rng.random((37, 171)) < share)
    dense = (dense.view(np.uint32) & np.uint32(0xFFFF0000)).view(np.float32)
    packed = pack_columns(dense)
    assert np.array_equal(packed.dequantize(), dense)
    theirs = scipy.sparse.csr_array(dense)
    assert kept_share(packed) == theirs.nnz / dense.size
    tile = packed.data[packed.data[:8].view("<i8")[0] :]
    starts = tile[: 4 * 17].view("<u4")
    assert np.array_equal(starts, theirs.indptr[:17])
    assert np.array_equal(tile[128 : 128 + 2 * starts[-1]].view("<u2"), theirs.indices[: starts[-1]])


def test_bytes_are_those_of_mask_and_values() -> None:
    """Half of 8 bits: a bit and half a byte a weight; 2:4 is never larger than the bitmask."""
    plain = plain_matrix("p8_g128", (64, 4096), 0.5)
    mask, pairs = to_sparse(plain, "s8_g128"), to_sparse(plain, "p8_g128")
    assert pairs.nbytes <= mask.nbytes < pairs.nbytes + 64 * 4
    assert pairs.nbytes == 64 * 4096 * 5 // 8 + 64 * 32 * 2
    assert bits_per_weight("p4_g32") == 1 + 2 + 0.5
    assert bits_per_weight("vq2_row") == pytest.approx(2, abs=0.01)
    assert kept_share(pairs) == 0.5


def test_more_than_two_of_four_is_refused() -> None:
    plain = plain_matrix("s8_g32", (16, 64), 0.9)
    with pytest.raises(UsageError, match="two of every four"):
        to_sparse(plain, "p8_g32")
    with pytest.raises(UsageError, match="not a sparse form"):
        to_sparse(plain, "s4_g32")
    assert sparse_formats("i8_row") == ("s8_row", "p8_row", "csr_i8")
    assert is_pairs(np.array([[1, 0, 1, 0, 1]], bool))
    assert not is_pairs(np.array([[1, 1, 1, 0]], bool))


@pytest.mark.parametrize("name", [n for n in CODED if FORMATS[n].coding == "vectors"])
def test_vectors_are_sums_of_entries(name: str) -> None:
    packed = coded_matrix(name, (37, 256))
    index, books, scales = vector_parts(packed)
    sums = np.zeros((37, 32, 8), np.int64)
    for book, chosen in zip(books.astype(np.int64), index, strict=True):
        sums += book[chosen]
    expected = sums.reshape(37, 256).astype(np.float32) * np.repeat(scales, 256 // scales.shape[1], 1)
    assert np.array_equal(packed.dequantize(), expected)
    assert np.array_equal(pack_vectors(name, index, books, scales).data, packed.data)


def test_vectors_beyond_int8_are_refused() -> None:
    books = np.full((2, 256, 8), 64, np.int8)
    with pytest.raises(FormatError, match="beyond int8"):
        pack_vectors("vq2_row", np.zeros((2, 3, 4), np.uint8), books, np.ones((3, 1), np.float32))
    with pytest.raises(UsageError, match="not exact"):
        pack_vectors("vq1_row", np.zeros((1, 3, 4), np.uint8), books[:1], np.full((3, 1), 0.1, np.float32))


def test_too_many_inputs_are_refused() -> None:
    with pytest.raises(UnsupportedError, match="at most 61440"):
        packed_nbytes("s8_g32", (1, 61472))


def copy_of(packed: Packed) -> np.ndarray:
    raw = aligned_empty(packed.nbytes)
    raw[:] = packed.data
    return raw


@pytest.mark.parametrize("name", ["s8_g32", "s4_row", "csr_i8", "csr_bf16", "p4_g32"])
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_hostile_bytes_are_refused_or_harmless(name: str, data: st.DataObject) -> None:
    """Any byte of the table, the masks or the rows may be wrong: an error of ours or a matrix of finite shape."""
    packed = coded_matrix(name, (40, 96))
    raw = copy_of(packed)
    for _ in range(data.draw(st.integers(1, 4))):
        raw[data.draw(st.integers(0, raw.size - 1))] = data.draw(st.integers(0, 255))
    try:
        with np.errstate(all="ignore"):
            values: F32 = Packed(name, packed.shape, raw).dequantize()
    except FormatError:
        return
    assert values.shape == packed.shape


@pytest.mark.parametrize("at", [0, 8, 16, 24])
def test_tables_that_lead_out_are_refused(at: int) -> None:
    packed = coded_matrix("s8_g32", (40, 96))
    for value in (-64, 1, 1 << 40, int(packed.data[at : at + 8].view("<i8")[0]) + 64):
        raw = copy_of(packed)
        raw[at : at + 8].view("<i8")[0] = value
        with pytest.raises(FormatError):
            Packed("s8_g32", packed.shape, raw)
    with pytest.raises(FormatError):
        Packed("s8_g32", packed.shape, copy_of(packed)[:64])


def test_log4_levels_are_powers_of_two() -> None:
    codes = np.arange(16, dtype=np.uint8)[None, :].repeat(2, 1)
    packed = pack_codes("log4_g32", codes, np.full((1, 1), 0.5, np.float32))
    assert set(np.abs(packed.dequantize()).ravel()) == {0, 0.5, 1, 2, 4, 8, 16, 32}
