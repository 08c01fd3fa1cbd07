"""Form and the stored rows of packed matrices: there and back bit by bit, counted as written, hostile parts refused."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from inhouse.core.errors import FormatError, UsageError
from inhouse.runtime.form import Form
from inhouse.runtime.packed import FORMATS, Packed, pack_float, quantize
from inhouse.runtime.packed_layout import layout
from inhouse.runtime.packed_stored import (
    StoredPart,
    from_stored,
    pack_bits,
    stored_nbytes,
    stored_nbytes_of,
    stored_parts,
    to_stored,
    unpack_bits,
)
from tests.compress.forms import random_packed

WIDE = [name for name in FORMATS if FORMATS[name].two_level or FORMATS[name].zeros]  # integers that may be narrowed


def width_for(name: str, wanted: int) -> int:
    """The next width that the format takes."""
    for width in (wanted, 512, 256):
        try:
            layout(FORMATS[name], width)
            return width
        except UsageError:
            continue
    raise AssertionError(name)


def raw_parts(packed: Packed) -> dict[str, tuple[StoredPart, np.ndarray]]:
    return {
        name: (part, np.ascontiguousarray(array).reshape(-1).view(np.uint8))
        for name, (part, array) in to_stored(packed).items()
    }


CASES = [(name, False) for name in FORMATS] + [(name, True) for name in WIDE]


@pytest.mark.parametrize(("name", "wild"), CASES)
@pytest.mark.parametrize("shape", [(1, 32), (37, 172), (50, 500)])
def test_there_and_back_bit_by_bit(name: str, wild: bool, shape: tuple[int, int]) -> None:
    packed = random_packed(name, (shape[0], width_for(name, shape[1])), shape[0], wild)
    parts = raw_parts(packed)
    again = from_stored(name, packed.shape, parts)
    assert np.array_equal(again.data, packed.data)
    written = sum(raw.nbytes for _, raw in parts.values())
    assert written == sum(part.nbytes for part, _ in parts.values()) == stored_nbytes_of(packed)
    if not wild and not FORMATS[name].variable:
        assert written == stored_nbytes(name, packed.shape)
        assert {key: part for key, (part, _) in parts.items()} == stored_parts(name, packed.shape)


@pytest.mark.parametrize("kind", ["q8", "q6", "q4"])
def test_what_the_native_packer_makes_comes_back(kind: str) -> None:
    rows = np.random.default_rng(3).standard_normal((45, 172)).astype(np.float32)
    packed = quantize([rows], kind, shape=(45, 172))  # type: ignore[arg-type]
    assert np.array_equal(from_stored(packed.format, packed.shape, raw_parts(packed)).data, packed.data)


def test_bits_a_weight_are_the_formats_own() -> None:
    assert stored_nbytes("i4_g32", (64, 192)) * 8 / (64 * 192) == 4.5
    assert stored_nbytes("u4_g32", (64, 192)) * 8 / (64 * 192) == 4.625
    assert stored_nbytes("q4_k", (64, 256)) * 8 / (64 * 256) == 4.5
    assert stored_nbytes("q3_k", (64, 256)) * 8 / (64 * 256) == 3.4375
    assert stored_nbytes("q5_0", (1, 172)) == 192 * 5 // 8 + 6 * 2  # the padded inputs count, padded rows do not


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 8), st.integers(0, 70), st.integers(0, 3), st.integers(0, 2**32 - 1))
def test_bits_pack_and_unpack(bits: int, count: int, rows: int, seed: int) -> None:
    codes = np.random.default_rng(seed).integers(0, 1 << bits, (rows, count), dtype=np.uint8)
    raw = pack_bits(codes, bits)
    assert raw.shape == (rows, -(-count * bits // 8))
    assert np.array_equal(unpack_bits(raw, bits, count), codes)
    for row, line in zip(codes, raw, strict=True):  # the definition: one long little-endian number
        number = sum(int(code) << (i * bits) for i, code in enumerate(row))
        assert number == int.from_bytes(line.tobytes(), "little")


def test_hostile_parts_are_refused() -> None:
    packed = random_packed("u4_g32", (20, 64))
    good = raw_parts(packed)
    scale, raw = good["scale"]
    bad = raw.copy()
    bad.view(np.float16)[3] = np.inf
    short = {key: value for key, value in good.items() if key != "zeros"}
    for parts in (
        short,
        good | {"more": good["zeros"]},
        good | {"scale": (scale, bad)},
        good | {"scale": (StoredPart("F32", scale.shape), raw)},
        good | {"scale": (scale, raw[:-2])},
        good | {"codes": (StoredPart("U8", (20, 31)), good["codes"][1][:620])},
    ):
        with pytest.raises(FormatError):
            from_stored("u4_g32", (20, 64), parts)


def test_a_form_is_what_it_runs_as() -> None:
    rng = np.random.default_rng(0)
    main = random_packed("q4_0", (24, 64))
    order = rng.permutation(64).astype(np.int64)
    a = pack_float(rng.standard_normal((3, 64)).astype(np.float32), "f16")
    b = pack_float(rng.standard_normal((24, 3)).astype(np.float32), "f32")
    form = Form(main, (a, b), order)
    x = rng.standard_normal((5, 64)).astype(np.float64)
    wide = [part.dequantize().astype(np.float64) for part in (main, a, b)]
    wanted = x[:, order] @ wide[0].T + x @ wide[1].T @ wide[2].T
    assert np.allclose(x @ form.value().astype(np.float64).T, wanted, rtol=1e-5, atol=1e-5)
    assert form.nbytes == 24 * (32 + 4) + 64 * 2 + 3 * 64 * 2 + 24 * 3 * 4
    assert Form(None, (a, b)).shape == (24, 64)
    assert np.array_equal(Form(main).value(), main.dequantize())


def test_forms_that_do_not_fit_are_refused() -> None:
    main, a = random_packed("q4_0", (24, 64)), random_packed("f32", (3, 64))
    with pytest.raises(UsageError):
        Form(None)
    with pytest.raises(UsageError):
        Form(main, (a, random_packed("f32", (24, 4))))
    with pytest.raises(UsageError):
        Form(main, (a, random_packed("f32", (25, 3))))
    with pytest.raises(UsageError):
        Form(main, columns=np.zeros(64, np.int64))
    with pytest.raises(UsageError):
        Form(None, (a, random_packed("f32", (24, 3))), np.arange(64))
