"""KV cache types: what a token takes is what the executors allocate, int8 codes are the same in both, and each type
stays near f32."""

import gzip
import importlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from inhouse.plan.memory import block_bytes
from inhouse.runtime.executor import KV_DTYPES
from inhouse.runtime.packed_pack import narrow_bf16
from inhouse.runtime.packed_quantize import quantize_rows_reference
from inhouse.runtime.program import Attr, StateKind
from inhouse.runtime.step import BLOCK_SIZE
from tests.runtime_native.making import F32, Model, OneOp, group, noise, steps

pytestmark = pytest.mark.native


def _attention(head_dim: int, v_dim: int, kind: StateKind = StateKind.PAGED) -> Model:
    """One op with two kv heads; token t's k and v are rows of the tables in1 and in2."""
    latent = kind is StateKind.LATENT
    attrs: dict[str, Attr] = {"group": "kv", "scale": 0.2, "heads": 2, "kv_heads": 2}
    attrs |= {"head_dim": head_dim, "v_dim": v_dim, "v_from_k": latent}
    widths = [2 * head_dim, 2 * head_dim] + ([] if latent else [2 * v_dim])
    kept = replace(group(1, 2, head_dim, v_dim), kind=kind)
    return OneOp().build("attention", widths, (), attrs, groups=[kept])


@pytest.mark.parametrize("kv_dtype", KV_DTYPES)
@pytest.mark.parametrize("kind", [StateKind.PAGED, StateKind.LATENT])
def test_the_formula_is_what_is_allocated(kv_dtype: str, kind: StateKind) -> None:
    for head_dim, v_dim in ((64, 64), (80, 80), (20, 17), (72, 64)):
        if kind is StateKind.LATENT and v_dim > head_dim:
            continue
        model = _attention(head_dim, v_dim, kind)
        native = model.native(kv_dtype=kv_dtype)
        stored = native.read_blocks("kv", np.zeros(1, np.int32))
        assert stored.shape[1] == block_bytes(model.programs.groups[0], kv_dtype), (head_dim, v_dim)


def test_int8_codes_are_those_of_quantize_rows() -> None:
    """One token's K in the native cache: code + 128 at [d / 4][slot][d % 4], its scale behind the codes."""
    model = _attention(32, 32)
    native = model.native(kv_dtype="int8")
    native.run("step", steps(model.programs, [([7, 11, 7], 0)], blocks_each=1))
    stored = native.read_blocks("kv", np.zeros(1, np.int32)).reshape(2, -1)
    keys = noise(101, 53, 64)
    for slot, token in enumerate((7, 11, 7)):
        for head in range(2):
            wanted = quantize_rows_reference(keys[token : token + 1, 32 * head : 32 * (head + 1)], 32)
            codes = stored[head, : 32 * BLOCK_SIZE].reshape(8, BLOCK_SIZE, 4)[:, slot].reshape(-1)
            scales: F32 = stored[head, 2 * 32 * BLOCK_SIZE :].view(np.float32)
            assert np.array_equal(codes.astype(np.int16) - 128, np.asarray(wanted[0]).reshape(-1))
            assert scales[slot] == np.asarray(wanted[1]).reshape(-1)[0]


@pytest.mark.parametrize("head_dim", [32, 21])
def test_bf16_lies_in_pairs(head_dim: int) -> None:
    """K at [d / 2][slot][d % 2], an odd last element at [slot]; V at [slot / 2][d][slot % 2]."""
    model = _attention(head_dim, 20)
    native = model.native(kv_dtype="bf16")
    native.run("step", steps(model.programs, [([7, 11, 7], 0)], blocks_each=1))
    stored = native.read_blocks("kv", np.zeros(1, np.int32)).reshape(2, -1).view(np.uint16)
    keys, values = noise(101, 53, 2 * head_dim), noise(102, 53, 40)
    even = head_dim // 2 * 2
    for slot, token in enumerate((7, 11, 7)):
        for head in range(2):
            k = narrow_bf16(keys[token, head_dim * head : head_dim * (head + 1)])
            v = narrow_bf16(values[token, 20 * head : 20 * (head + 1)])
            pairs = stored[head, : even * BLOCK_SIZE].reshape(-1, BLOCK_SIZE, 2)[:, slot].reshape(-1)
            assert np.array_equal(pairs, k[:even])
            assert np.array_equal(stored[head, even * BLOCK_SIZE + slot : head_dim * BLOCK_SIZE][:1], k[even:])
            rows = stored[head, head_dim * BLOCK_SIZE :].reshape(BLOCK_SIZE // 2, 20, 2)
            assert np.array_equal(rows[slot // 2, :, slot % 2], v)


@pytest.mark.realdata
def test_divergence_of_each_type_is_small(realdata: Path) -> None:
    text = gzip.decompress((realdata / "text" / "tinystories_sample_2MiB.txt.gz").read_bytes()).decode()
    bound = {"f32": 1e-12, "f16": 1e-5, "bf16": 1e-3, "int8": 1e-2}  # of codes of 4 bits and their mixtures too
    tool = importlib.import_module("tools.kv_types")
    for row in tool.divergences(str(realdata / "models" / "stories260k" / "hf"), text[:4000]):
        assert row.found.kld_mean is not None
        assert row.found.kld_mean <= bound.get(row.kv_dtype, 1e-2), row.kv_dtype
