"""Quantising weights and activation rows: error against Q4_0 and Q8_0 of the `gguf` package, ties, zeros, refusals."""

from collections.abc import Callable

import gguf
import numpy as np
import pytest

from inhouse.core.errors import FormatError, UsageError
from inhouse.runtime.packed import pack_codes, pack_gguf, quantize, quantize_rows_reference
from inhouse.runtime.packed_layout import F32, activation_group, is_float
from inhouse.runtime.packed_quantize import Kind

pytestmark = pytest.mark.null


def draws(name: str, shape: tuple[int, int] = (400, 512)) -> F32:
    rng = np.random.default_rng(3)
    kinds: dict[str, Callable[[], np.ndarray]] = {
        "normal": lambda: rng.normal(size=shape),
        "laplace": lambda: rng.laplace(size=shape),
        "heavy": lambda: rng.standard_t(4, size=shape),
    }
    return (kinds[name]() * 0.02).astype(np.float32)


def oracle_error(x: F32, kind: str) -> float:
    qtype = gguf.GGMLQuantizationType[kind]
    return float(np.square(gguf.quants.dequantize(gguf.quants.quantize(x, qtype), qtype) - x).mean())


@pytest.mark.parametrize(("name", "at_most"), [("normal", 0.90), ("laplace", 0.92), ("heavy", 0.93)])
def test_q4_beats_the_plain_signed_maximum(name: str, at_most: float) -> None:
    x = draws(name)
    error = float(np.square(quantize(x, "q4").dequantize() - x).mean())
    assert error <= at_most * oracle_error(x, "Q4_0")


def test_q8_is_no_worse_than_q8_0() -> None:
    x = draws("normal")
    assert float(np.square(quantize(x, "q8").dequantize() - x).mean()) <= 1.001 * oracle_error(x, "Q8_0")


@pytest.mark.parametrize("kind", ["q8", "q6", "q4"])
def test_zero_groups_and_tiny_ones_stay_zero(kind: Kind) -> None:
    x = draws("normal", (20, 96))
    x[3, 32:64] = 0
    x[4] = 1e-36
    values = quantize(x, kind).dequantize()
    assert np.all(values[3, 32:64] == 0)
    assert np.all(values[4] == 0)
    assert np.isfinite(values).all()


@pytest.mark.parametrize("kind", ["q8", "q6", "q4"])
def test_runs_of_rows_give_the_same_bytes(kind: Kind, monkeypatch: pytest.MonkeyPatch) -> None:
    x = draws("normal", (203, 172))
    whole = quantize(x, kind)
    monkeypatch.setattr("inhouse.runtime.packed_pack.CHUNK_ELEMENTS", 64 * 172)
    told: list[tuple[str, int, int]] = []
    pieces = quantize(
        (x[a:b] for a, b in [(0, 1), (1, 100), (100, 203)]), kind, lambda *t: told.append(t), shape=x.shape
    )
    assert np.array_equal(whole.data, pieces.data)
    assert told[-1] == ("quantize", x.size, x.size)
    assert [t[1] for t in told] == sorted(t[1] for t in told)


def test_inputs_that_are_no_multiple_of_the_group_are_padded_with_zeros() -> None:
    x = draws("normal", (17, 172))
    packed = quantize(x, "q8")
    assert packed.shape == (17, 172)
    assert np.abs(packed.dequantize() - x).max() < 1e-3
    codes = packed.codes()
    assert codes.codes.shape == (17, 172)
    assert codes.scales.shape == (17, 6)


@pytest.mark.parametrize("bad", [np.nan, np.inf, 1e9])
def test_weights_that_no_scale_reaches_are_refused(bad: float) -> None:
    x = draws("normal", (2, 32))
    x[1, 1] = bad
    with pytest.raises(FormatError, match="cannot be quantised"):
        quantize(x, "q8")


def test_rows_must_make_up_the_shape() -> None:
    with pytest.raises(UsageError, match="was given 16"):
        quantize(iter([draws("normal", (16, 32))]), "q8", shape=(17, 32))
    with pytest.raises(UsageError, match="shape"):
        quantize(iter([draws("normal", (16, 32))]), "q8")


def test_codes_with_their_own_zero_points_are_kept() -> None:
    """A GPTQ-like matrix: f16 scales, integer zero points, group 128: value = s * (code - zero) exactly."""
    rng = np.random.default_rng(5)
    codes = rng.integers(0, 16, (33, 256), dtype=np.uint8)
    scales = rng.normal(size=(33, 2)).astype(np.float16).astype(np.float32)
    zeros = rng.integers(0, 16, (33, 2), dtype=np.uint8)
    packed = pack_codes("u4_g128", codes, scales, zeros=zeros)
    expected = np.repeat(scales, 128, 1) * (codes.astype(np.float32) - np.repeat(zeros.astype(np.float32), 128, 1))
    assert np.array_equal(packed.dequantize(), expected)
    row = pack_codes("u8_row", codes, scales[:, :1], zeros=np.full((33, 1), 3, np.uint8))
    assert np.array_equal(row.dequantize(), scales[:, :1] * (codes.astype(np.float32) - np.float32(3)))
    assert np.array_equal(row.codes().codes, codes.astype(np.int32) - 3)
    assert row.group == 256


def test_pack_codes_refuses_what_would_change() -> None:
    codes, scale = np.full((1, 32), 15, np.uint8), np.full((1, 1), 0.1, np.float32)
    with pytest.raises(FormatError, match="not exact in f16"):
        pack_codes("q4_0", codes, scale)
    with pytest.raises(UsageError, match="code 16"):
        pack_codes("q4_0", codes + np.uint8(1), np.ones((1, 1), np.float32))
    with pytest.raises(UsageError, match="needs scales"):
        pack_codes("u4_g32", codes, np.ones((1, 2), np.float32), zeros=np.ones((1, 2), np.uint8))


@pytest.mark.parametrize("group", [32, 0, 64])
def test_quantized_rows_follow_their_definition(group: int) -> None:
    x = draws("heavy", (9, 172))
    x[2] = 0
    codes, scales = quantize_rows_reference(x, group)
    size = group or 172
    for row in range(9):
        for g in range(-(-172 // size)):
            part = x[row, g * size : (g + 1) * size]
            most = np.float32(np.abs(part).max())
            expected = np.rint(part * (np.float32(127) / most)) if most else np.zeros(part.size)
            assert scales[row, g] == most / np.float32(127)
            assert np.array_equal(codes[row, g * size : (g + 1) * size], expected)
    assert np.abs(codes).max() == 127


def test_scales_that_are_powers_of_two_are_the_least_that_hold_the_group() -> None:
    x = draws("heavy", (9, 172))
    x[2], x[3], x[4] = 0, 1e-35, 127 * np.float32(2.0**-20)
    codes, scales = quantize_rows_reference(x, 32, powers=True)
    mantissa, _ = np.frexp(scales)
    assert (mantissa == 0.5).all()
    assert (scales[2:4] == np.float32(2.0**-60)).all()
    assert (scales[4] == np.float32(2.0**-20)).all()
    for row in (0, 1, 4, 5, 6, 7, 8):
        for g in range(6):
            part = x[row, 32 * g : 32 * g + 32]
            most = np.abs(part).max() / scales[row, g]
            assert 63.5 < most <= 127
            assert np.array_equal(codes[row, 32 * g : 32 * g + 32], np.rint(part / scales[row, g]))


def test_a_fault_in_a_row_is_seen_in_its_scale() -> None:
    x = np.ones((3, 64), np.float32)
    x[0, 40], x[1, 0], x[2, :32] = np.nan, -np.inf, 1e-35
    codes, scales = quantize_rows_reference(x, 32)
    assert np.isnan(scales).tolist() == [[False, True], [True, False], [False, False]]
    assert scales[2, 0] == 0
    assert codes[0, 32:].tolist() == [0] * 32
    assert codes[2].tolist() == [0] * 32 + [127] * 32


def test_activation_group_of_formats() -> None:
    raw = np.zeros((1, 18), np.uint8)
    assert activation_group(pack_gguf(raw, "Q4_0", (1, 32)).format) == 32
    assert activation_group("bf16") == 0
    assert is_float("bf16")


def test_six_bits_lie_between_four_and_eight() -> None:
    x = draws("normal")
    errors = [float(np.square(quantize(x, kind).dequantize() - x).mean()) for kind in ("q4", "q6", "q8")]
    assert errors[0] > 10 * errors[1] > 100 * errors[2] / 2
    q8_step = float(np.abs(x).max()) / 127
    assert errors[1] < q8_step**2 * 4  # two bits less: four times the step, sixteen times the error, on smaller groups
