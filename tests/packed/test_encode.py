"""Our block encoders: against the `gguf` package where it has one, against bounds elsewhere; bytes there and back."""

import gguf
import numpy as np
import pytest

from inhouse.core.errors import FormatError, UnsupportedError, UsageError
from inhouse.runtime.encode import encodable, encode_rows
from inhouse.runtime.packed import Packed, gguf_format, pack_gguf
from inhouse.runtime.packed_blocks import code_rows, gguf_blocks, writable
from inhouse.runtime.packed_layout import F32
from inhouse.runtime.packed_pack import CodeRows, Packer

from .test_packed_exact import BLOCK_TYPES, random_blocks, same_bits

pytestmark = pytest.mark.null

# Relative squared error on normal weights that ggml's own encoder reaches (tools/compare_encoders.py, 2 % added).
BARS = {"q2_k": 0.0896, "q3_k": 0.0233, "q4_k": 5.24e-3, "q5_k": 1.347e-3, "q6_k": 3.26e-4, "iq4_nl": 5.99e-3}


def weights(shape: tuple[int, int] = (48, 512)) -> F32:
    return (np.random.default_rng(8).normal(size=shape) * 0.03).astype(np.float32)


def packed_of(name: str, rows: F32, importance: F32 | None = None) -> Packed:
    packer = Packer(name, (rows.shape[0], rows.shape[1]))
    packer.add(encode_rows(name, rows, importance))
    return packer.finish()


def relative(values: F32, rows: F32) -> float:
    return float(((values - rows) ** 2).sum() / (rows**2).sum())


@pytest.mark.parametrize("name", ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "MXFP4", "TQ2_0"])
def test_no_worse_than_the_encoder_of_the_gguf_package(name: str) -> None:
    rows, kind = weights(), gguf.GGMLQuantizationType[name]
    theirs = relative(gguf.quants.dequantize(gguf.quants.quantize(rows, kind), kind), rows)
    assert relative(packed_of(name.lower(), rows).dequantize(), rows) <= theirs * 1.0001


@pytest.mark.parametrize("name", BARS)
def test_error_is_within_two_percent_of_ggml(name: str) -> None:
    assert relative(packed_of(name, weights((64, 1024))).dequantize(), weights((64, 1024))) <= BARS[name]


@pytest.mark.parametrize("name", [n for n in encodable() if n not in ("q8_0", "mxfp4")])
def test_importance_moves_the_error_away_from_what_counts(name: str) -> None:
    rows = weights()
    importance = np.ones(512, np.float32)
    importance[::7] = 30
    plain, weighted = packed_of(name, rows).dequantize(), packed_of(name, rows, importance).dequantize()
    assert (((weighted - rows) ** 2) * importance).sum() < (((plain - rows) ** 2) * importance).sum()


@pytest.mark.parametrize("name", encodable())
def test_zero_rows_and_one_large_weight(name: str) -> None:
    rows = weights((17, 256))
    rows[3] = 0
    rows[5, 9] = 1000
    values = packed_of(name, rows).dequantize()
    assert np.isfinite(values).all()
    assert abs(values[5, 9] - 1000) < 260
    assert not values[3].any() or name == "iq4_nl"


@pytest.mark.parametrize("name", encodable())
def test_blocks_of_what_was_encoded_mean_the_same_to_the_gguf_package(name: str) -> None:
    rows = encode_rows(name, weights())
    packer = Packer(name, (48, 512))
    packer.add(rows)
    blocks = gguf_blocks(rows, name.upper())
    assert same_bits(
        gguf.quants.dequantize(blocks, gguf.GGMLQuantizationType[name.upper()]), packer.finish().dequantize()
    )


@pytest.mark.parametrize("name", BLOCK_TYPES)
def test_a_packed_matrix_goes_back_into_its_own_blocks(name: str) -> None:
    raw, expected = random_blocks(name, (37, 512))
    if name == "TQ1_0":  # random bytes hold digits that no writer makes
        kind = gguf.GGMLQuantizationType[name]
        raw = gguf.quants.quantize(weights((37, 512)), kind)
        expected = gguf.quants.dequantize(raw, kind)
    if name == "NVFP4":
        raw = raw.reshape(37, -1, 36)
        raw[..., :4] %= 127
        raw = raw.reshape(37, -1)
    runs = [gguf_blocks(rows, name) for rows in code_rows(pack_gguf(raw, name, (37, 512)))]
    assert np.array_equal(np.concatenate(runs), raw)
    assert writable()[name] == gguf_format(name)
    assert expected.shape == (37, 512)


def test_runs_of_rows_make_the_same_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = encode_rows("q4_k", weights())
    monkeypatch.setattr("inhouse.runtime.encode.RUN_ELEMENTS", 512 * 5)
    parts = encode_rows("q4_k", weights())
    assert np.array_equal(gguf_blocks(whole, "Q4_K"), gguf_blocks(parts, "Q4_K"))


def test_what_cannot_be_encoded_is_refused() -> None:
    rows = weights((2, 64))
    with pytest.raises(UnsupportedError, match="multiples of 256"):
        encode_rows("q4_k", rows)
    with pytest.raises(UnsupportedError, match="no encoder to 'f16'"):
        encode_rows("f16", rows)
    with pytest.raises(UsageError, match="64 finite numbers"):
        encode_rows("q4_0", rows, np.ones(3, np.float32))
    rows[1, 1] = np.nan
    with pytest.raises(FormatError, match="nan"):
        encode_rows("q4_0", rows)
    with pytest.raises(UnsupportedError, match="IQ1_S"):
        gguf_blocks(CodeRows(np.zeros((1, 32), np.uint8), np.zeros((1, 1), np.float32)), "IQ1_S")
    with pytest.raises(UnsupportedError, match="other codes"):
        gguf_blocks(CodeRows(np.full((1, 256), 3, np.uint8), np.zeros((1, 1), np.float32)), "TQ1_0")
