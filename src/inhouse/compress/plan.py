"""What a recipe will come to, before it is run: bytes as stored, bits a weight, disk. Knows formats, not methods."""

import math
from typing import Any

from inhouse.compress.calibrate import Calibration
from inhouse.compress.matrix import SPARSE, fitting
from inhouse.compress.recipe import Recipe, Stage
from inhouse.compress.stages import selected
from inhouse.compress.table import METHODS
from inhouse.compress.work import Work
from inhouse.runtime.packed_formats import FORMATS
from inhouse.runtime.packed_stored import stored_nbytes

FLOAT_BYTES = {"f32": 4, "f16": 2, "bf16": 2}


def predict(work: Work, recipe: Recipe) -> dict[str, Any]:
    """Bytes of all tensors as far as formats decide them (what pruning or factors change is known only afterwards), and
    how many weights go into which format."""
    formats = {name: work.source_dtype(name) for name in work.names()}
    exact = True
    for stage in recipe.stages:
        rows = {row.scope for row in stage.methods()}
        if rows == {"matrix"}:
            exact &= _apply(work, stage, formats)
        elif stage.format:
            formats |= {name: fitting(stage.format, work.shape(name))[0] for name in selected(work, stage)}
        else:
            exact = False
    sizes = {name: _bytes(fmt, work.shape(name)) for name, fmt in formats.items()}
    total, parameters = sum(sizes.values()), sum(math.prod(work.shape(name)) for name in formats)
    counts: dict[str, int] = {}
    for name, fmt in formats.items():
        counts[fmt] = counts.get(fmt, 0) + math.prod(work.shape(name))
    return {
        "bytes": total, "bits_per_weight": 8 * total / parameters, "parameters": parameters, "exact": exact,
        "formats": counts,
    }  # fmt: skip


def _apply(work: Work, stage: Stage, formats: dict[str, str]) -> bool:
    """Enters what the stage makes of each weight; False where its method decides more than the format says."""
    exact = True
    for name in selected(work, stage):
        chosen, fmt, _ = stage.choice(name)
        if fmt:
            formats[name] = fitting(fmt, work.shape(name))[0]
        exact &= METHODS[chosen].family in ("quantize", "prune") and bool(fmt) == (METHODS[chosen].family == "quantize")
    return exact


def _bytes(fmt: str, shape: tuple[int, ...]) -> int:
    if len(shape) == 1 or fmt in FLOAT_BYTES:
        return math.prod(shape) * FLOAT_BYTES.get(fmt, 4)
    row = FORMATS[fmt]  # how sparse is known only afterwards: counted as if it were not
    return stored_nbytes(row.base if row.coding in SPARSE else fmt, (shape[0], shape[1]))


def disk_need(work: Work, recipe: Recipe, calibration: Calibration | None, stored: int) -> int:
    """Bytes that a run takes on disk at most: what stages put, activations, and the checkpoint twice while it is
    written and brought into the store."""
    floats = sum(4 * math.prod(work.shape(name)) for name in work.names())
    puts = sum(1 for stage in recipe.stages if METHODS[stage.method].family != "quantize")
    spill = 0
    if calibration is not None:
        widths = max((sum(v.width for v in op.inputs) for op in work.program.ops), default=0) + 3 * work.spec.hidden
        spill = 4 * widths * calibration.tokens.numel()
    return min(puts, 2) * floats + spill + 3 * stored
