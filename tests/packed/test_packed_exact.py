"""Packing changes no value: against the `gguf` package on random blocks, and on the stories260K files."""

from pathlib import Path

import gguf
import numpy as np
import pytest
import torch

from inhouse.core.errors import FormatError, UnsupportedError, UsageError
from inhouse.runtime.packed import (
    FORMATS,
    Packed,
    bits_per_weight,
    gguf_format,
    gguf_types,
    pack_codes,
    pack_float,
    pack_gguf,
)
from inhouse.runtime.packed_layout import F32, TABLES, U8, gather_plane, layout, spread_plane

pytestmark = pytest.mark.null

BLOCK_TYPES = [name for name in gguf_types() if not name.startswith(("F", "BF"))]


def random_blocks(name: str, shape: tuple[int, int], seed: int = 0) -> tuple[U8, F32]:
    """Random bytes with finite f16 fields, and what the oracle reads in them."""
    kind = gguf.GGMLQuantizationType[name]
    elements, nbytes = gguf.GGML_QUANT_SIZES[kind]
    raw = np.random.default_rng(seed).integers(0, 256, (shape[0], shape[1] // elements, nbytes), dtype=np.uint8)
    fields = {"Q2_K": (80, 82), "Q3_K": (108,), "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,)}
    fields |= {"TQ1_0": (52,), "TQ2_0": (64,), "MXFP4": (), "NVFP4": ()}
    for at in fields.get(name, (0, 2) if name in ("Q4_1", "Q5_1") else (0,)):
        raw[..., at + 1] &= 0xBF  # clears the top exponent bit: no infinity, no NaN
    if name == "MXFP4":
        raw[..., 0] = raw[..., 0] % 64 + 96  # products of 2^-64 to 2^64 stay finite
    raw = raw.reshape(shape[0], -1)
    return raw, gguf.quants.dequantize(raw, kind)


def same_bits(a: F32, b: F32) -> bool:
    return a.shape == b.shape and bool(np.array_equal(a.view(np.uint32), np.ascontiguousarray(b).view(np.uint32)))


@pytest.mark.parametrize("name", BLOCK_TYPES)
@pytest.mark.parametrize("out", [1, 16, 37])
def test_every_block_type_is_bit_exact(name: str, out: int) -> None:
    raw, expected = random_blocks(name, (out, 512))
    packed = pack_gguf(raw.reshape(-1), name, (out, 512))
    assert same_bits(packed.dequantize(), expected)


@pytest.mark.parametrize("name", BLOCK_TYPES)
def test_rows_are_picked_before_and_after_packing(name: str) -> None:
    raw, expected = random_blocks(name, (40, 256))
    ids = np.array([39, 0, 17, 17, 16])
    assert same_bits(pack_gguf(raw, name, (40, 256)).rows(ids), expected[ids])
    assert same_bits(pack_gguf(raw, name, (40, 256), rows=ids).dequantize(), expected[ids])


@pytest.mark.parametrize("name", BLOCK_TYPES)
def test_codes_scales_and_minimums_rebuild_the_values(name: str) -> None:
    raw, expected = random_blocks(name, (20, 512))
    codes = pack_gguf(raw, name, (20, 512)).codes()
    values = codes.codes.astype(np.float32) * np.repeat(codes.scales, codes.group, axis=1)
    if codes.minimums is not None:
        values += np.repeat(codes.minimums, codes.group, axis=1)
    assert np.array_equal(values, expected)


def test_runs_longer_than_one_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("packed_layout", "packed_pack"):
        monkeypatch.setattr(f"inhouse.runtime.{module}.CHUNK_ELEMENTS", 512 * 20)
    raw, expected = random_blocks("Q6_K", (75, 512))
    packed = pack_gguf(raw, "Q6_K", (75, 512))
    assert same_bits(packed.dequantize(), expected)
    assert np.array_equal(packed.codes().scales.shape, (75, 32))


@pytest.mark.realdata
def test_every_matrix_of_the_stories_files(stories: Path) -> None:
    seen = set()
    for path in sorted(stories.glob("*.gguf")):
        for tensor in gguf.GGUFReader(path).tensors:
            shape = tuple(int(n) for n in reversed(tensor.shape))
            if len(shape) == 2:
                packed = pack_gguf(
                    np.asarray(tensor.data).view(np.uint8), tensor.tensor_type.name, (shape[0], shape[1])
                )
                expected = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
                assert same_bits(packed.dequantize(), expected.reshape(shape)), (path.name, tensor.name)
                seen.add(tensor.tensor_type.name)
    assert seen == {"F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"}


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_planes_are_reversible(bits: int) -> None:
    codes = np.random.default_rng(1).integers(0, 1 << bits, (3, 5, 8, 4), dtype=np.uint8)
    plane = gather_plane(codes, bits)
    assert plane.shape == (3, 5, bits, 4)
    assert np.array_equal(spread_plane(plane, bits), codes)


def test_the_bytes_of_a_tile_lie_where_the_layout_says() -> None:
    """One q4_0 tile by hand: row 5, input 32 + 21 (block 1, quad 5: high nibble of vector 1, byte 5 * 4 + 1)."""
    raw = np.zeros((16, 2, 18), np.uint8)
    raw[5, 1, 2 + 5] = 0xA0  # element 21 of block 1
    raw[5, 1, 1] = 0x3C  # d = 1.0
    packed = pack_gguf(raw, "Q4_0", (16, 64))
    scales, low = 64, 2 * 4 * 64
    assert packed.nbytes == scales + low
    assert packed.data[32 + 5 * 2 + 1] == 0x3C
    assert packed.data[scales + 256 + 64 + 5 * 4 + 1] == 0xA0
    assert np.count_nonzero(packed.data) == 2


@pytest.mark.parametrize("name", ["f32", "f16", "bf16"])
def test_floats_are_kept_or_rounded_to_nearest(name: str) -> None:
    torch_like = np.random.default_rng(2).normal(size=(37, 172)).astype(np.float32)
    packed = pack_float(torch_like, name)
    bf16 = gguf.quants.quantize(torch_like, gguf.GGMLQuantizationType.BF16)
    expected = {
        "f32": torch_like,
        "f16": torch_like.astype(np.float16).astype(np.float32),
        "bf16": gguf.quants.dequantize(bf16, gguf.GGMLQuantizationType.BF16),
    }[name]
    assert same_bits(packed.dequantize(), expected)
    assert same_bits(packed.rows([36, 1]), expected[[36, 1]])
    assert same_bits(pack_float(bf16.view(np.uint16), "f32").dequantize(), pack_float(torch_like, "bf16").dequantize())


def test_narrowing_to_f16_refuses_what_it_cannot_hold() -> None:
    with pytest.raises(FormatError, match="beyond f16"):
        pack_float(np.full((1, 4), 1e6, np.float32), "f16")


def test_bits_per_weight_stay_near_the_file() -> None:
    file_bits = {name: size * 8 / n for name in BLOCK_TYPES for n, size in [gguf.GGML_QUANT_SIZES[_type(name)]]}
    for name, bits in file_bits.items():
        assert bits <= bits_per_weight(gguf_format(name)) <= bits + 0.5, name
    assert bits_per_weight("mxfp4") == file_bits["MXFP4"]
    assert bits_per_weight("q6_k") == file_bits["Q6_K"]


def _type(name: str) -> gguf.GGMLQuantizationType:
    return gguf.GGMLQuantizationType[name]


def test_mxfp4_at_the_ends_of_its_scale() -> None:
    raw = np.arange(4 * 17, dtype=np.uint8).reshape(4, 17)
    raw[:, 0] = 0, 1, 2, 252
    expected = gguf.quants.dequantize(raw, gguf.GGMLQuantizationType.MXFP4)
    assert same_bits(pack_gguf(raw, "MXFP4", (4, 32)).dequantize(), expected)


def test_nvfp4_keeps_codes_scales_and_factor() -> None:
    """The value of each code: e2m1 times e4m3 times the tensor's factor; torch knows e4m3."""
    rng = np.random.default_rng(5)
    codes = rng.integers(0, 16, (20, 96), dtype=np.uint8)
    sub = rng.integers(0, 127, (20, 6), dtype=np.uint8)
    levels = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], np.float32)
    signs = np.where(codes & 8, np.float32(-1), np.float32(1))
    widened = torch.from_numpy(sub).view(torch.float8_e4m3fn).float().numpy()
    packed = pack_codes("nvfp4", codes, np.full((20, 1), 0.5 * 0.03125, np.float32), sub_scales=sub)
    expected = levels[codes & 7] * signs * np.repeat(widened, 16, 1) * np.float32(0.03125)
    assert np.array_equal(packed.dequantize(), expected)


@pytest.mark.parametrize("name", ["nf4", "fp4"])
def test_bitsandbytes_levels_times_the_largest_of_each_group(name: str) -> None:
    rng = np.random.default_rng(6)
    codes, largest = rng.integers(0, 16, (17, 128), dtype=np.uint8), rng.random((17, 2), np.float32)
    packed = pack_codes(f"{name}_g64", codes, largest)
    levels = np.array(TABLES[name], np.float32)
    assert np.array_equal(packed.dequantize(), levels[codes] * np.repeat(largest, 64, 1))
    with pytest.raises(UsageError, match="floats, not codes"):
        packed.codes()


def test_ids_of_formats_are_their_places() -> None:
    assert [row.id for row in FORMATS.values()] == list(range(len(FORMATS)))


def test_what_does_not_fit_is_refused_by_name() -> None:
    with pytest.raises(UnsupportedError, match="IQ2_XXS"):
        pack_gguf(np.zeros(66, np.uint8), "IQ2_XXS", (1, 256))
    with pytest.raises(FormatError, match="does not take 17 bytes"):
        pack_gguf(np.zeros(17, np.uint8), "Q4_0", (1, 32))
    with pytest.raises(UsageError, match=r"0\.\.0"):
        pack_gguf(np.zeros(18, np.uint8), "Q4_0", (1, 32), rows=np.array([1]))
    with pytest.raises(UnsupportedError, match="multiples of 256"):
        layout(FORMATS["q4_k"], 128)
    with pytest.raises(FormatError, match="takes 320 bytes, got 64"):
        Packed("q4_0", (3, 32), np.zeros(64, np.uint8))
    with pytest.raises(UsageError, match="row ids"):
        pack_float(np.zeros((2, 2), np.float32), "f32").rows([2])
