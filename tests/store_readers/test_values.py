"""Values on disk: exact floats, and no NaN or infinity passes in values or scales, wherever it stands."""

from pathlib import Path

import gguf as reference
import numpy as np
import numpy.typing as npt
import pytest

from inhouse.core.errors import FormatError, NotFoundError, UnsupportedError
from inhouse.core.tensors import TensorSource
from inhouse.store import values
from inhouse.store.dtypes import GGML_TYPES
from inhouse.store.gguf import open_gguf
from inhouse.store.gguf_write import write_gguf
from inhouse.store.safetensors import open_safetensors, write_safetensors
from inhouse.store.source import open_source
from inhouse.store.values import check_finite, materialise
from inhouse.store.writing import from_array, from_bytes

pytestmark = pytest.mark.null
QUANTISED = sorted(name for name, kind in GGML_TYPES.items() if kind.block > 1)


def plain(path: Path, dtype: str, raw: npt.NDArray[np.uint8], size: int) -> TensorSource:
    write_safetensors(path, [from_bytes("t", dtype, (raw.nbytes // size,), raw)])
    return open_safetensors(path)


def test_every_half_is_exact(tmp_path: Path) -> None:
    bits = np.arange(1 << 16, dtype=np.uint16)
    half = materialise(plain(tmp_path / "f16", "F16", bits.view(np.uint8), 2), "t")
    assert np.array_equal(half, bits.view(np.float16).astype(np.float32), equal_nan=True)
    brain = materialise(plain(tmp_path / "bf16", "BF16", bits.view(np.uint8), 2), "t")
    assert np.array_equal(brain.view(np.uint32), bits.astype(np.uint32) << 16)


def test_wide_floats_and_shape(tmp_path: Path) -> None:
    array = np.random.default_rng(1).normal(size=(3, 4))
    write_safetensors(tmp_path / "x", [from_array("d", array), from_array("f", array.astype(np.float32))])
    source = open_safetensors(tmp_path / "x")
    for name in ("d", "f"):
        found = materialise(source, name)
        assert found.dtype == np.float32
        assert np.array_equal(found, array.astype(np.float32))
        found[0, 0] = 7  # a copy: may be written


def test_what_is_no_plain_float_is_refused(tmp_path: Path) -> None:
    write_safetensors(tmp_path / "x", [from_array("i", np.arange(3))])
    with pytest.raises(UnsupportedError, match="'i' is I64"):
        materialise(open_safetensors(tmp_path / "x"), "i")
    with pytest.raises(NotFoundError):
        materialise(open_safetensors(tmp_path / "x"), "j")


@pytest.mark.realdata
def test_the_stories_models_are_finite(stories: Path) -> None:
    for path in [stories / "hf", *sorted(stories.glob("*.gguf"))]:
        source = open_source(path)
        for name in source:
            check_finite(source, name)


PLAIN = {
    "F16": (np.uint16, [0x7C00, 0xFC00, 0x7E01, 0xFFFF], [0x7BFF, 0xFBFF, 0, 0x8000]),
    "BF16": (np.uint16, [0x7F80, 0xFF80, 0x7FC0, 0xFFFF], [0x7F7F, 0xFF7F, 0, 0x8000]),
    "F32": (np.uint32, [0x7F800000, 0xFF800000, 0x7FC00000, 0x7F800001], [0x7F7FFFFF, 0xFF7FFFFF, 1]),
    "F64": (np.uint64, [0x7FF0000000000000, 0xFFF8000000000000], [0x7FEFFFFFFFFFFFFF, 1]),
    "F8_E5M2": (np.uint8, [0x7C, 0xFC, 0x7F, 0xFF], [0x7B, 0xFB, 0]),
    "F8_E4M3": (np.uint8, [0x7F, 0xFF], [0x7E, 0xFE, 0x7C]),
    "F8_E8M0": (np.uint8, [0xFF], [0xFE, 0]),
}


@pytest.mark.parametrize("dtype", sorted(PLAIN))
@pytest.mark.parametrize("place", [0, 5, 999])
def test_a_single_bad_value_is_found(tmp_path: Path, dtype: str, place: int) -> None:
    kind, bad, good = PLAIN[dtype]
    size = np.dtype(kind).itemsize
    bits = np.resize(np.array(good, kind), 1000)
    check_finite(plain(tmp_path / "good", dtype, bits.view(np.uint8), size), "t")
    for value in bad:
        wrong = bits.copy()
        wrong[place] = value
        with pytest.raises(FormatError, match=rf"'t' \({dtype}\) is NaN or infinite at element {place}\."):
            check_finite(plain(tmp_path / "bad", dtype, wrong.view(np.uint8), size), "t")


def test_integers_pass(tmp_path: Path) -> None:
    write_safetensors(tmp_path / "x", [from_array("i", np.full(9, -1))])
    check_finite(open_safetensors(tmp_path / "x"), "i")


@pytest.mark.parametrize("name", QUANTISED)
def test_a_bad_scale_of_any_block_type_is_found_and_codes_are_not_mistaken(tmp_path: Path, name: str) -> None:
    kind = GGML_TYPES[name]
    clean = np.full((50, kind.nbytes), 0xFF, np.uint8)
    for field in kind.half_fields:
        clean[:, field : field + 2] = np.array([1.5], np.float16).view(np.uint8)
    for field in kind.e8m0_fields:
        clean[:, field] = 127
    decoded = reference.dequantize(clean, reference.GGMLQuantizationType[name])
    assert np.isfinite(decoded).all(), "the oracle too finds no NaN in the codes"

    def source(blocks: npt.NDArray[np.uint8]) -> TensorSource:
        write_gguf(tmp_path / "x", {}, [from_bytes("t", name, (50, kind.block), blocks.reshape(-1))])
        return open_gguf(tmp_path / "x")

    check_finite(source(clean), "t")
    for field in kind.half_fields:
        for value in (np.nan, np.inf, -np.inf):
            wrong = clean.copy()
            wrong[33, field : field + 2] = np.array([value], np.float16).view(np.uint8)
            assert not np.isfinite(reference.dequantize(wrong, reference.GGMLQuantizationType[name])).all()
            with pytest.raises(FormatError, match="block 33"):
                check_finite(source(wrong), "t")
    for field in kind.e8m0_fields:
        wrong = clean.copy()
        wrong[33, field] = 0xFF
        with pytest.raises(FormatError, match="block 33"):
            check_finite(source(wrong), "t")


def test_chunks_meet_without_a_gap(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(values, "CHUNK_BYTES", 40)
    for place in range(60):
        array = np.zeros(60, np.float32)
        array[place] = np.nan
        write_safetensors(tmp_path / "x", [from_array("t", array)])
        with pytest.raises(FormatError, match=f"element {place}"):
            check_finite(open_safetensors(tmp_path / "x"), "t")


def test_memory_is_bounded(tmp_path: Path) -> None:
    import tracemalloc

    write_safetensors(tmp_path / "x", [from_array("t", np.ones(16 << 20, np.float16))])
    source = open_safetensors(tmp_path / "x")
    tracemalloc.start()
    check_finite(source, "t")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 4 * values.CHUNK_BYTES
