"""Stored checkpoints for tests, made from plain ones: which weight gets which form is the test's to say."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from inhouse.load.bind import bind, plan_binding
from inhouse.load.describe import describe
from inhouse.load.stored import stored_config, stored_sides
from inhouse.runtime.form import Form
from inhouse.runtime.packed import Packed, pack_codes, pack_float
from inhouse.store.stored_model import StoredModel, write_stored

F32 = npt.NDArray[np.float32]
Choose = Callable[[str, F32], Form]


def weights_of(folder: Path) -> dict[str, F32]:
    """Canonical name -> float32."""
    described = describe(folder)
    plan = plan_binding(described.source, described.spec, described.family, described.programs())
    out = {
        part.spec.name: weight.dequantize() if isinstance(weight, Packed) else weight
        for part, weight in bind(described.source, plan)
    }
    described.source.close()
    return out


def store(folder: Path, target: Path, choose: Choose, manifest: Mapping[str, Any] | None = None) -> StoredModel:
    """The model of `folder` in the forms that `choose` gives its matrices."""
    weights = weights_of(folder)
    described = describe(folder)
    try:
        return write_stored(
            target,
            stored_config(described),
            ((name, choose(name, value)) for name, value in weights.items() if value.ndim == 2),
            ((name, value) for name, value in weights.items() if value.ndim == 1),
            manifest or {},
            stored_sides(described),
        )
    finally:
        described.source.close()


def q4(value: F32) -> Packed:
    """Plain rounding to symmetric 4 bits, groups of 32."""
    out, width = value.shape
    groups = -(-width // 32)
    padded = np.zeros((out, groups * 32), np.float32)
    padded[:, :width] = value
    blocks = padded.reshape(out, groups, 32)
    scales = (np.abs(blocks).max(axis=2) / 7).astype(np.float16).astype(np.float32)
    safe = np.where(scales == 0, np.float32(1), scales)
    codes = (np.clip(np.rint(blocks / safe[:, :, None]), -8, 7) + 8).astype(np.uint8)
    return pack_codes("i4_g32", codes.reshape(out, -1)[:, :width].copy(), scales)


def repaired(value: F32, main: Packed | None, rank: int, kind: str = "f16") -> Form:
    """`main` with a side branch of what it lacks; None: the branch alone."""
    rest = value if main is None else value - main.dequantize()
    u, s, v = np.linalg.svd(rest.astype(np.float64), full_matrices=False)
    b, a = (u[:, :rank] * s[:rank]).astype(np.float32), v[:rank].astype(np.float32)
    return Form(main, (pack_float(a, kind), pack_float(b, kind)))


def mixed(name: str, value: F32) -> Form:
    """All that a form can be: q4, act-order, side branch, branch alone, f16, bf16."""
    if name == "embed.weight":
        return Form(q4(value))
    if name.endswith("attn.q.weight"):
        return repaired(value, q4(value), 4)
    if name.endswith("attn.v.weight"):
        order = np.random.default_rng(len(name)).permutation(value.shape[1]).astype(np.int64)
        return Form(q4(np.ascontiguousarray(value[:, order])), None, order)
    if name.endswith("attn.o.weight"):
        order = np.arange(value.shape[1])[::-1].astype(np.int64).copy()
        main = q4(np.ascontiguousarray(value[:, order]))
        branch = repaired(value, None, 3, "f32").low_rank
        return Form(main, branch if name.startswith("layers.1.") else None, order)
    if name.endswith("mlp.up.weight") and name.startswith("layers.0."):
        return repaired(value, None, 40)
    if name.endswith("mlp.gate.weight"):
        return Form(pack_float(value, "f16"))
    if name.endswith("attn.k.weight"):
        return Form(pack_float(value, "bf16"))
    return Form(q4(value))
